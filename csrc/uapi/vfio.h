/* VFIO containers and groups: the IOMMU side (type1, its nesting series, SPAPR, EEH).  vfio_device.h has the rest.
 *
 * Numbers are reused: what an ioctl means depends on the kind of fd. */
#ifndef UAPI_VFIO_H
#define UAPI_VFIO_H

#include "iommu.h"
#include "layout.h"

enum {
    UAPI_VFIO_TYPE = ';',
    UAPI_VFIO_BASE = 100,
};

/* ---- Container: the fd of /dev/vfio/vfio ---- */

/* ioctls of any container */
enum {
    UAPI_VFIO_GET_API_VERSION = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 0),
    UAPI_VFIO_CHECK_EXTENSION = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 1),
    UAPI_VFIO_SET_IOMMU = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 2),
};

enum {
    UAPI_VFIO_API_VERSION = 0,
};

/* what CHECK_EXTENSION answers for; the IOMMU drivers among them are what SET_IOMMU takes */
enum {
    UAPI_VFIO_TYPE1_IOMMU = 1,
    UAPI_VFIO_SPAPR_TCE_IOMMU = 2,
    UAPI_VFIO_TYPE1v2_IOMMU = 3,
    UAPI_VFIO_DMA_CC_IOMMU = 4,
    UAPI_VFIO_EEH = 5,
    UAPI_VFIO_TYPE1_NESTING_IOMMU = 6,
    UAPI_VFIO_SPAPR_TCE_v2_IOMMU = 7,
    UAPI_VFIO_NOIOMMU_IOMMU = 8,
    UAPI_VFIO_UNMAP_ALL = 9,
    UAPI_VFIO_UPDATE_VADDR = 10,
};

/* 7.2 keeps number 6 under this name, without the driver behind it */
enum {
    UAPI___VFIO_RESERVED_TYPE1_NESTING_IOMMU = 6,
};

/* Head of one capability. next counts from the start of the whole reply; 0 ends the chain. */
struct uapi_vfio_info_cap_header {
    uint16_t id, version;
    uint32_t next;
};
UAPI_LAYOUT(vfio_info_cap_header, 8, id, 0, version, 2, next, 4);

/* ---- Group: the fd of /dev/vfio/<number> ---- */

enum {
    UAPI_VFIO_GROUP_GET_STATUS = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 3),
    UAPI_VFIO_GROUP_SET_CONTAINER = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 4),
    UAPI_VFIO_GROUP_UNSET_CONTAINER = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 5),
    UAPI_VFIO_GROUP_GET_DEVICE_FD = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 6),
};

enum {
    UAPI_VFIO_GROUP_FLAGS_VIABLE = 1 << 0,
    UAPI_VFIO_GROUP_FLAGS_CONTAINER_SET = 1 << 1,
};

/* Reply of GROUP_GET_STATUS. */
struct uapi_vfio_group_status {
    uint32_t argsz, flags;
};
UAPI_LAYOUT(vfio_group_status, 8, argsz, 0, flags, 4);

/* ---- Type1: mapping, dirty pages, capabilities ---- */

enum {
    UAPI_VFIO_IOMMU_GET_INFO = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 12),
    UAPI_VFIO_IOMMU_MAP_DMA = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 13),
    UAPI_VFIO_IOMMU_UNMAP_DMA = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 14),
    UAPI_VFIO_IOMMU_DIRTY_PAGES = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 17),
};

/* vfio_iommu_type1_info.flags */
enum {
    UAPI_VFIO_IOMMU_INFO_PGSIZES = 1 << 0,
    UAPI_VFIO_IOMMU_INFO_CAPS = 1 << 1,
};

/* capability ids of GET_INFO; NESTING belongs to the vSVA series only */
enum {
    UAPI_VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE = 1,
    UAPI_VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION = 2,
    UAPI_VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL = 3,
    UAPI_VFIO_IOMMU_TYPE1_INFO_CAP_NESTING = 4,
};

/* Reply of GET_INFO. cap_offset is 0 when the chain did not fit argsz; argsz then says what would. */
struct uapi_vfio_iommu_type1_info {
    uint32_t argsz, flags;
    uint64_t iova_pgsizes;
    uint32_t cap_offset, pad;
};
UAPI_LAYOUT(vfio_iommu_type1_info, 24, argsz, 0, flags, 4, iova_pgsizes, 8, cap_offset, 16, pad, 20);

/* One usable window, end inclusive. */
struct uapi_vfio_iova_range {
    uint64_t start, end;
};
UAPI_LAYOUT(vfio_iova_range, 16, start, 0, end, 8);

/* Capability: the windows that every attached group can reach. */
struct uapi_vfio_iommu_type1_info_cap_iova_range {
    struct uapi_vfio_info_cap_header header;
    uint32_t nr_iovas, reserved;
    struct uapi_vfio_iova_range iova_ranges[];
};
UAPI_LAYOUT(vfio_iommu_type1_info_cap_iova_range, 16, header, 0, nr_iovas, 8, reserved, 12);
UAPI_FLEXIBLE(vfio_iommu_type1_info_cap_iova_range, iova_ranges, 16, 16);

/* Capability: page sizes and largest buffer (bytes) that dirty tracking takes. */
struct uapi_vfio_iommu_type1_info_cap_migration {
    struct uapi_vfio_info_cap_header header;
    uint32_t flags;
    uint64_t pgsize_bitmap, max_dirty_bitmap_size;
};
UAPI_LAYOUT(vfio_iommu_type1_info_cap_migration, 32, header, 0, flags, 8, pgsize_bitmap, 16,
            max_dirty_bitmap_size, 24);

/* Capability: how many more mappings the container takes. */
struct uapi_vfio_iommu_type1_info_dma_avail {
    struct uapi_vfio_info_cap_header header;
    uint32_t avail;
};
UAPI_LAYOUT(vfio_iommu_type1_info_dma_avail, 12, header, 0, avail, 8);

/* vfio_iommu_type1_dma_map.flags */
enum {
    UAPI_VFIO_DMA_MAP_FLAG_READ = 1 << 0,
    UAPI_VFIO_DMA_MAP_FLAG_WRITE = 1 << 1,
    UAPI_VFIO_DMA_MAP_FLAG_VADDR = 1 << 2,
};

/* Map size bytes at vaddr to iova. */
struct uapi_vfio_iommu_type1_dma_map {
    uint32_t argsz, flags;
    uint64_t vaddr, iova, size;
};
UAPI_LAYOUT(vfio_iommu_type1_dma_map, 32, argsz, 0, flags, 4, vaddr, 8, iova, 16, size, 24);

/* vfio_iommu_type1_dma_unmap.flags */
enum {
    UAPI_VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP = 1 << 0,
    UAPI_VFIO_DMA_UNMAP_FLAG_ALL = 1 << 1,
    UAPI_VFIO_DMA_UNMAP_FLAG_VADDR = 1 << 2,
};

/* A dirty bitmap of the caller: pgsize bytes a bit, size bytes of words at data. */
struct uapi_vfio_bitmap {
    uint64_t pgsize, size;
    uint64_t *data;
};
UAPI_LAYOUT(vfio_bitmap, 24, pgsize, 0, size, 8, data, 16);

/* Unmap [iova, iova + size). size returns the bytes really unmapped; data holds one vfio_bitmap on request. */
struct uapi_vfio_iommu_type1_dma_unmap {
    uint32_t argsz, flags;
    uint64_t iova, size;
    uint8_t data[];
};
UAPI_LAYOUT(vfio_iommu_type1_dma_unmap, 24, argsz, 0, flags, 4, iova, 8, size, 16);
UAPI_FLEXIBLE(vfio_iommu_type1_dma_unmap, data, 24, 1);

/* vfio_iommu_type1_dirty_bitmap.flags, one at a time */
enum {
    UAPI_VFIO_IOMMU_DIRTY_PAGES_FLAG_START = 1 << 0,
    UAPI_VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP = 1 << 1,
    UAPI_VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP = 1 << 2,
};

/* Argument of DIRTY_PAGES; with GET_BITMAP data holds a dirty_bitmap_get. */
struct uapi_vfio_iommu_type1_dirty_bitmap {
    uint32_t argsz, flags;
    uint8_t data[];
};
UAPI_LAYOUT(vfio_iommu_type1_dirty_bitmap, 8, argsz, 0, flags, 4);
UAPI_FLEXIBLE(vfio_iommu_type1_dirty_bitmap, data, 8, 1);

/* Which range to report, and where to. */
struct uapi_vfio_iommu_type1_dirty_bitmap_get {
    uint64_t iova, size;
    struct uapi_vfio_bitmap bitmap;
};
UAPI_LAYOUT(vfio_iommu_type1_dirty_bitmap_get, 40, iova, 0, size, 8, bitmap, 16);

/* ---- Type1 nesting, vSVA series only ---- */

enum {
    UAPI_VFIO_IOMMU_NESTING_OP = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 18),
};

enum {
    UAPI_VFIO_NESTING_OP_MASK = 0xffff,
    UAPI_VFIO_IOMMU_NESTING_OP_BIND_PGTBL = 0,
    UAPI_VFIO_IOMMU_NESTING_OP_UNBIND_PGTBL = 1,
    UAPI_VFIO_IOMMU_NESTING_OP_CACHE_INVLD = 2,
};

/* Capability: what the hardware offers for a guest's own first stage. */
struct uapi_vfio_iommu_type1_info_cap_nesting {
    struct uapi_vfio_info_cap_header header;
    struct uapi_iommu_nesting_info info;
};
UAPI_LAYOUT(vfio_iommu_type1_info_cap_nesting, 72, header, 0, info, 8);

/* The low 16 bits of flags pick the operation; data holds its structure from iommu. */
struct uapi_vfio_iommu_type1_nesting_op {
    uint32_t argsz, flags;
    uint8_t data[];
};
UAPI_LAYOUT(vfio_iommu_type1_nesting_op, 8, argsz, 0, flags, 4);
UAPI_FLEXIBLE(vfio_iommu_type1_nesting_op, data, 8, 1);

/* ---- SPAPR TCE: windows of the POWER IOMMU ---- */

/* the numbers coincide with those of type1 and of devices: the fd decides */
enum {
    UAPI_VFIO_IOMMU_SPAPR_TCE_GET_INFO = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 12),
    UAPI_VFIO_IOMMU_ENABLE = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 15),
    UAPI_VFIO_IOMMU_DISABLE = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 16),
    UAPI_VFIO_IOMMU_SPAPR_REGISTER_MEMORY = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 17),
    UAPI_VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 18),
    UAPI_VFIO_IOMMU_SPAPR_TCE_CREATE = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 19),
    UAPI_VFIO_IOMMU_SPAPR_TCE_REMOVE = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 20),
};

enum {
    UAPI_VFIO_IOMMU_SPAPR_INFO_DDW = 1 << 0,
};

/* What dynamic windows can be: page sizes, how many, how many table levels. */
struct uapi_vfio_iommu_spapr_tce_ddw_info {
    uint64_t pgsizes;
    uint32_t max_dynamic_windows_supported, levels;
};
UAPI_LAYOUT(vfio_iommu_spapr_tce_ddw_info, 16, pgsizes, 0, max_dynamic_windows_supported, 8, levels, 12);

/* The default 32-bit window, and ddw when the flag says so. */
struct uapi_vfio_iommu_spapr_tce_info {
    uint32_t argsz, flags, dma32_window_start, dma32_window_size;
    struct uapi_vfio_iommu_spapr_tce_ddw_info ddw;
};
UAPI_LAYOUT(vfio_iommu_spapr_tce_info, 32, argsz, 0, flags, 4, dma32_window_start, 8, dma32_window_size, 12, ddw, 16);

/* Memory to pin (or let go) ahead of its mapping; flags must be 0. */
struct uapi_vfio_iommu_spapr_register_memory {
    uint32_t argsz, flags;
    uint64_t vaddr, size;
};
UAPI_LAYOUT(vfio_iommu_spapr_register_memory, 24, argsz, 0, flags, 4, vaddr, 8, size, 16);

/* Make a window of 1 << page_shift pages; the driver returns start_addr. */
struct uapi_vfio_iommu_spapr_tce_create {
    uint32_t argsz, flags, page_shift, __resv1;
    uint64_t window_size;
    uint32_t levels, __resv2;
    uint64_t start_addr;
};
UAPI_LAYOUT(vfio_iommu_spapr_tce_create, 40, argsz, 0, flags, 4, page_shift, 8, __resv1, 12, window_size, 16,
            levels, 24, __resv2, 28, start_addr, 32);

/* Drop the window that begins at start_addr. */
struct uapi_vfio_iommu_spapr_tce_remove {
    uint32_t argsz, flags;
    uint64_t start_addr;
};
UAPI_LAYOUT(vfio_iommu_spapr_tce_remove, 16, argsz, 0, flags, 4, start_addr, 8);

/* ---- EEH: error handling of POWER partitionable endpoints ---- */

enum {
    UAPI_VFIO_EEH_PE_OP = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 21),
};

enum {
    UAPI_VFIO_EEH_PE_DISABLE = 0,
    UAPI_VFIO_EEH_PE_ENABLE = 1,
    UAPI_VFIO_EEH_PE_UNFREEZE_IO = 2,
    UAPI_VFIO_EEH_PE_UNFREEZE_DMA = 3,
    UAPI_VFIO_EEH_PE_GET_STATE = 4,
    UAPI_VFIO_EEH_PE_RESET_DEACTIVATE = 5,
    UAPI_VFIO_EEH_PE_RESET_HOT = 6,
    UAPI_VFIO_EEH_PE_RESET_FUNDAMENTAL = 7,
    UAPI_VFIO_EEH_PE_CONFIGURE = 8,
    UAPI_VFIO_EEH_PE_INJECT_ERR = 9,
};

/* what GET_STATE returns */
enum {
    UAPI_VFIO_EEH_PE_STATE_NORMAL = 0,
    UAPI_VFIO_EEH_PE_STATE_RESET = 1,
    UAPI_VFIO_EEH_PE_STATE_STOPPED = 2,
    UAPI_VFIO_EEH_PE_STATE_STOPPED_DMA = 4,
    UAPI_VFIO_EEH_PE_STATE_UNAVAIL = 5,
};

/* The error to inject. */
struct uapi_vfio_eeh_pe_err {
    uint32_t type, func;
    uint64_t addr, mask;
};
UAPI_LAYOUT(vfio_eeh_pe_err, 24, type, 0, func, 4, addr, 8, mask, 16);

/* Plain operations end after op (12 bytes); INJECT_ERR needs err too, behind 4 bytes of padding. */
struct uapi_vfio_eeh_pe_op {
    uint32_t argsz, flags, op;
    union {
        struct uapi_vfio_eeh_pe_err err;
    };
};
UAPI_LAYOUT(vfio_eeh_pe_op, 40, argsz, 0, flags, 4, op, 8, err, 16);

#endif
