# The part of the VFIO ABI that the compiled core handles: csrc/uapi, under the kernel's names without "vfio_iommu_type1".
from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef extern from "uapi/vfio.h" nogil:
    enum:
        CHECK_EXTENSION "UAPI_VFIO_CHECK_EXTENSION"
        GET_INFO "UAPI_VFIO_IOMMU_GET_INFO"
        MAP_DMA "UAPI_VFIO_IOMMU_MAP_DMA"
        UNMAP_DMA "UAPI_VFIO_IOMMU_UNMAP_DMA"
        DIRTY_PAGES "UAPI_VFIO_IOMMU_DIRTY_PAGES"

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
