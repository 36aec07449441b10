# The part of the iommufd ABI that the compiled core handles: csrc/uapi, under the kernel's names without "iommu_".
from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef extern from "uapi/iommufd.h" nogil:
    enum:
        IOAS_COPY "UAPI_IOMMU_IOAS_COPY"
        IOAS_MAP "UAPI_IOMMU_IOAS_MAP"
        IOAS_MAP_FILE "UAPI_IOMMU_IOAS_MAP_FILE"
        IOAS_UNMAP "UAPI_IOMMU_IOAS_UNMAP"
        HWPT_SET_DIRTY_TRACKING "UAPI_IOMMU_HWPT_SET_DIRTY_TRACKING"
        HWPT_GET_DIRTY_BITMAP "UAPI_IOMMU_HWPT_GET_DIRTY_BITMAP"

        MAP_FIXED_IOVA "UAPI_IOMMU_IOAS_MAP_FIXED_IOVA"
        MAP_WRITEABLE "UAPI_IOMMU_IOAS_MAP_WRITEABLE"
        MAP_READABLE "UAPI_IOMMU_IOAS_MAP_READABLE"
        DIRTY_TRACKING_ENABLE "UAPI_IOMMU_HWPT_DIRTY_TRACKING_ENABLE"
        DIRTY_BITMAP_NO_CLEAR "UAPI_IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR"

    ctypedef struct ioas_map "struct uapi_iommu_ioas_map":
        uint32_t size, flags, ioas_id, __reserved
        uint64_t user_va, length, iova
    ctypedef struct ioas_map_file "struct uapi_iommu_ioas_map_file":
        uint32_t size, flags, ioas_id
        int32_t fd
        uint64_t start, length, iova
    ctypedef struct ioas_copy "struct uapi_iommu_ioas_copy":
        uint32_t size, flags, dst_ioas_id, src_ioas_id
        uint64_t length, dst_iova, src_iova
    ctypedef struct ioas_unmap "struct uapi_iommu_ioas_unmap":
        uint32_t size, ioas_id
        uint64_t iova, length
    ctypedef struct hwpt_set_dirty_tracking "struct uapi_iommu_hwpt_set_dirty_tracking":
        uint32_t size, flags, hwpt_id, __reserved
    ctypedef struct hwpt_get_dirty_bitmap "struct uapi_iommu_hwpt_get_dirty_bitmap":
        uint32_t size, hwpt_id, flags, __reserved
        uint64_t iova, length, page_size, data
