# The part of the VFIO ABI that the compiled core handles: csrc/uapi, under the kernel's names without "vfio_iommu_type1".
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "uapi/vfio.h" nogil:
    enum:
        CHECK_EXTENSION "UAPI_VFIO_CHECK_EXTENSION"
        GET_INFO "UAPI_VFIO_IOMMU_GET_INFO"
        MAP_DMA "UAPI_VFIO_IOMMU_MAP_DMA"
        UNMAP_DMA "UAPI_VFIO_IOMMU_UNMAP_DMA"
        DIRTY_PAGES "UAPI_VFIO_IOMMU_DIRTY_PAGES"
        NESTING_OP "UAPI_VFIO_IOMMU_NESTING_OP"

        TYPE1_IOMMU "UAPI_VFIO_TYPE1_IOMMU"
        TYPE1v2_IOMMU "UAPI_VFIO_TYPE1v2_IOMMU"
        DMA_CC_IOMMU "UAPI_VFIO_DMA_CC_IOMMU"
        TYPE1_NESTING_IOMMU "UAPI_VFIO_TYPE1_NESTING_IOMMU"
        EXT_UNMAP_ALL "UAPI_VFIO_UNMAP_ALL"
        EXT_UPDATE_VADDR "UAPI_VFIO_UPDATE_VADDR"

        INFO_PGSIZES "UAPI_VFIO_IOMMU_INFO_PGSIZES"
        INFO_CAPS "UAPI_VFIO_IOMMU_INFO_CAPS"
        CAP_IOVA_RANGE "UAPI_VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE"
        CAP_MIGRATION "UAPI_VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION"
        CAP_DMA_AVAIL "UAPI_VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL"
        CAP_NESTING "UAPI_VFIO_IOMMU_TYPE1_INFO_CAP_NESTING"

        MAP_READ "UAPI_VFIO_DMA_MAP_FLAG_READ"
        MAP_WRITE "UAPI_VFIO_DMA_MAP_FLAG_WRITE"
        MAP_VADDR "UAPI_VFIO_DMA_MAP_FLAG_VADDR"
        UNMAP_DIRTY "UAPI_VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP"
        UNMAP_ALL "UAPI_VFIO_DMA_UNMAP_FLAG_ALL"
        UNMAP_VADDR "UAPI_VFIO_DMA_UNMAP_FLAG_VADDR"
        DIRTY_START "UAPI_VFIO_IOMMU_DIRTY_PAGES_FLAG_START"
        DIRTY_STOP "UAPI_VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP"
        DIRTY_GET "UAPI_VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP"

    ctypedef struct cap_header "struct uapi_vfio_info_cap_header":
        uint16_t id, version
        uint32_t next
    ctypedef struct type1_info "struct uapi_vfio_iommu_type1_info":
        uint32_t argsz, flags
        uint64_t iova_pgsizes
        uint32_t cap_offset, pad
    ctypedef struct cap_migration "struct uapi_vfio_iommu_type1_info_cap_migration":
        cap_header header
        uint32_t flags
        uint64_t pgsize_bitmap, max_dirty_bitmap_size
    ctypedef struct cap_dma_avail "struct uapi_vfio_iommu_type1_info_dma_avail":
        cap_header header
        uint32_t avail
    ctypedef struct cap_iova_range "struct uapi_vfio_iommu_type1_info_cap_iova_range":
        cap_header header
        uint32_t nr_iovas, reserved
    ctypedef struct dma_map "struct uapi_vfio_iommu_type1_dma_map":
        uint32_t argsz, flags
        uint64_t vaddr, iova, size
    ctypedef struct dma_unmap "struct uapi_vfio_iommu_type1_dma_unmap":
        uint32_t argsz, flags
        uint64_t iova, size
    ctypedef struct user_bitmap "struct uapi_vfio_bitmap":
        uint64_t pgsize, size
        void *data
    ctypedef struct dirty_bitmap "struct uapi_vfio_iommu_type1_dirty_bitmap":
        uint32_t argsz, flags
    ctypedef struct dirty_bitmap_get "struct uapi_vfio_iommu_type1_dirty_bitmap_get":
        uint64_t iova, size
        user_bitmap bitmap

    ctypedef struct nesting_head "struct uapi_vfio_iommu_type1_nesting_op":
        uint32_t argsz, flags

cdef extern from "uapi/iommu.h" nogil:
    ctypedef struct nesting_vtd "struct uapi_iommu_nesting_info_vtd":
        uint32_t flags
        uint64_t cap_reg, ecap_reg
    ctypedef union nesting_vendor:
        nesting_vtd vtd
    ctypedef struct nesting_info "struct uapi_iommu_nesting_info":
        uint32_t argsz, flags, format, features
        uint16_t addr_width, pasid_bits
        nesting_vendor vendor
    ctypedef struct bind_vtd "struct uapi_iommu_gpasid_bind_data_vtd":
        uint64_t flags
    ctypedef union bind_vendor:
        bind_vtd vtd
    ctypedef struct bind_data "struct uapi_iommu_gpasid_bind_data":
        uint32_t argsz, version, format, addr_width
        uint64_t flags, gpgd, hpasid, gpasid
        uint8_t padding[8]
        bind_vendor vendor
    ctypedef struct inv_pasid_info "struct uapi_iommu_inv_pasid_info":
        uint32_t flags, archid
        uint64_t pasid
    ctypedef struct inv_addr_info "struct uapi_iommu_inv_addr_info":
        uint32_t flags, archid
        uint64_t pasid, addr, granule_size, nb_granules
    ctypedef union inv_granu:
        inv_pasid_info pasid_info
        inv_addr_info addr_info
    ctypedef struct cache_info "struct uapi_iommu_cache_invalidate_info":
        uint32_t argsz, version
        uint8_t cache, granularity
        uint8_t padding[6]
        inv_granu granu

cdef extern from "uapi/vfio.h" nogil:
    ctypedef struct cap_nesting "struct uapi_vfio_iommu_type1_info_cap_nesting":
        cap_header header
        nesting_info info
