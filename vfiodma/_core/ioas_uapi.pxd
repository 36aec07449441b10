# The part of the iommufd ABI that the compiled core handles: csrc/uapi, under the kernel's names without "iommu_".
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "uapi/iommufd.h" nogil:
    ctypedef struct destroy_args "struct uapi_iommu_destroy":
        uint32_t size, id
    ctypedef struct ioas_alloc_args "struct uapi_iommu_ioas_alloc":
        uint32_t size, flags, out_ioas_id
    ctypedef struct ioas_iova_ranges_args "struct uapi_iommu_ioas_iova_ranges":
        uint32_t size, ioas_id, num_iovas
        uint32_t reserved "__reserved"
        uint64_t allowed_iovas, out_iova_alignment
    ctypedef struct ioas_allow_iovas_args "struct uapi_iommu_ioas_allow_iovas":
        uint32_t size, ioas_id, num_iovas
        uint32_t reserved "__reserved"
        uint64_t allowed_iovas
    ctypedef struct ioas_map_args "struct uapi_iommu_ioas_map":
        uint32_t size, flags, ioas_id
        uint32_t reserved "__reserved"
        uint64_t user_va, length, iova
    ctypedef struct ioas_map_file_args "struct uapi_iommu_ioas_map_file":
        uint32_t size, flags, ioas_id
        int32_t fd
        uint64_t start, length, iova
    ctypedef struct ioas_copy_args "struct uapi_iommu_ioas_copy":
        uint32_t size, flags, dst_ioas_id, src_ioas_id
        uint64_t length, dst_iova, src_iova
    ctypedef struct ioas_unmap_args "struct uapi_iommu_ioas_unmap":
        uint32_t size, ioas_id
        uint64_t iova, length
    ctypedef struct option_args "struct uapi_iommu_option":
        uint32_t size, option_id
        uint16_t op
        uint16_t reserved "__reserved"
        uint32_t object_id
        uint64_t val64
    ctypedef struct vfio_ioas_args "struct uapi_iommu_vfio_ioas":
        uint32_t size, ioas_id
        uint16_t op
        uint16_t reserved "__reserved"
    ctypedef struct hwpt_alloc_args "struct uapi_iommu_hwpt_alloc":
        uint32_t size, flags, dev_id, pt_id, out_hwpt_id
        uint32_t reserved "__reserved"
        uint32_t data_type, data_len
        uint64_t data_uptr
        uint32_t fault_id
    ctypedef struct vtd_s1_data "struct uapi_iommu_hwpt_vtd_s1":
        uint64_t flags, pgtbl_addr
        uint32_t addr_width
    ctypedef struct vtd_s1_invalidation "struct uapi_iommu_hwpt_vtd_s1_invalidate":
        uint64_t addr, npages
        uint32_t flags
        uint32_t reserved "__reserved"
    ctypedef struct hw_info_args "struct uapi_iommu_hw_info":
        uint32_t size, flags, dev_id, data_len
        uint64_t data_uptr
        uint32_t out_data_type
        uint8_t out_max_pasid_log2
        uint8_t reserved "__reserved"[3]
        uint64_t out_capabilities
    ctypedef struct set_dirty_tracking_args "struct uapi_iommu_hwpt_set_dirty_tracking":
        uint32_t size, flags, hwpt_id
    ctypedef struct get_dirty_bitmap_args "struct uapi_iommu_hwpt_get_dirty_bitmap":
        uint32_t size, hwpt_id, flags
        uint32_t reserved "__reserved"
        uint64_t iova, length, page_size, data
    ctypedef struct invalidate_args "struct uapi_iommu_hwpt_invalidate":
        uint32_t size, hwpt_id
        uint64_t data_uptr
        uint32_t data_type, entry_len, entry_num
        uint32_t reserved "__reserved"
    ctypedef struct fault_alloc_args "struct uapi_iommu_fault_alloc":
        uint32_t size, flags, out_fault_id, out_fault_fd
    ctypedef struct change_process_args "struct uapi_iommu_ioas_change_process":
        uint32_t size
        uint32_t reserved "__reserved"
    ctypedef struct viommu_alloc_args "struct uapi_iommu_viommu_alloc":
        uint32_t size, flags, type, dev_id, hwpt_id
    ctypedef struct vdevice_alloc_args "struct uapi_iommu_vdevice_alloc":
        uint32_t size, viommu_id, dev_id
    ctypedef struct veventq_alloc_args "struct uapi_iommu_veventq_alloc":
        uint32_t size, flags, viommu_id, type, veventq_depth
        uint32_t reserved "__reserved"
    ctypedef struct hw_queue_alloc_args "struct uapi_iommu_hw_queue_alloc":
        uint32_t size, flags, viommu_id, type, index
        uint64_t nesting_parent_iova, length

    enum:
        CMD_DESTROY "UAPI_IOMMUFD_CMD_DESTROY"
        CMD_IOAS_ALLOC "UAPI_IOMMUFD_CMD_IOAS_ALLOC"
        CMD_IOAS_ALLOW_IOVAS "UAPI_IOMMUFD_CMD_IOAS_ALLOW_IOVAS"
        CMD_IOAS_COPY "UAPI_IOMMUFD_CMD_IOAS_COPY"
        CMD_IOAS_IOVA_RANGES "UAPI_IOMMUFD_CMD_IOAS_IOVA_RANGES"
        CMD_IOAS_MAP "UAPI_IOMMUFD_CMD_IOAS_MAP"
        CMD_IOAS_UNMAP "UAPI_IOMMUFD_CMD_IOAS_UNMAP"
        CMD_OPTION "UAPI_IOMMUFD_CMD_OPTION"
        CMD_VFIO_IOAS "UAPI_IOMMUFD_CMD_VFIO_IOAS"
        CMD_HWPT_ALLOC "UAPI_IOMMUFD_CMD_HWPT_ALLOC"
        CMD_GET_HW_INFO "UAPI_IOMMUFD_CMD_GET_HW_INFO"
        CMD_SET_DIRTY_TRACKING "UAPI_IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING"
        CMD_GET_DIRTY_BITMAP "UAPI_IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP"
        CMD_HWPT_INVALIDATE "UAPI_IOMMUFD_CMD_HWPT_INVALIDATE"
        CMD_FAULT_QUEUE_ALLOC "UAPI_IOMMUFD_CMD_FAULT_QUEUE_ALLOC"
        CMD_IOAS_MAP_FILE "UAPI_IOMMUFD_CMD_IOAS_MAP_FILE"
        CMD_VIOMMU_ALLOC "UAPI_IOMMUFD_CMD_VIOMMU_ALLOC"
        CMD_VDEVICE_ALLOC "UAPI_IOMMUFD_CMD_VDEVICE_ALLOC"
        CMD_IOAS_CHANGE_PROCESS "UAPI_IOMMUFD_CMD_IOAS_CHANGE_PROCESS"
        CMD_VEVENTQ_ALLOC "UAPI_IOMMUFD_CMD_VEVENTQ_ALLOC"
        CMD_HW_QUEUE_ALLOC "UAPI_IOMMUFD_CMD_HW_QUEUE_ALLOC"
