/* VFIO devices: regions, interrupts, reset, features, migration, and binding to iommufd. */
#ifndef UAPI_VFIO_DEVICE_H
#define UAPI_VFIO_DEVICE_H

#include "layout.h"
#include "vfio.h"

/* ---- Device: information and bus names ---- */

enum {
    UAPI_VFIO_DEVICE_GET_INFO = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 7),
    UAPI_VFIO_DEVICE_RESET = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 11),
};

/* vfio_device_info.flags */
enum {
    UAPI_VFIO_DEVICE_FLAGS_RESET = 1 << 0,
    UAPI_VFIO_DEVICE_FLAGS_PCI = 1 << 1,
    UAPI_VFIO_DEVICE_FLAGS_PLATFORM = 1 << 2,
    UAPI_VFIO_DEVICE_FLAGS_AMBA = 1 << 3,
    UAPI_VFIO_DEVICE_FLAGS_CCW = 1 << 4,
    UAPI_VFIO_DEVICE_FLAGS_AP = 1 << 5,
    UAPI_VFIO_DEVICE_FLAGS_FSL_MC = 1 << 6,
    UAPI_VFIO_DEVICE_FLAGS_CAPS = 1 << 7,
    UAPI_VFIO_DEVICE_FLAGS_CDX = 1 << 8,
};

/* capability ids of a device */
enum {
    UAPI_VFIO_DEVICE_INFO_CAP_ZPCI_BASE = 1,
    UAPI_VFIO_DEVICE_INFO_CAP_ZPCI_GROUP = 2,
    UAPI_VFIO_DEVICE_INFO_CAP_ZPCI_UTIL = 3,
    UAPI_VFIO_DEVICE_INFO_CAP_ZPCI_PFIP = 4,
    UAPI_VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP = 5,
};

/* device API names as sysfs spells them */
#define UAPI_VFIO_DEVICE_API_PCI_STRING "vfio-pci"
#define UAPI_VFIO_DEVICE_API_PLATFORM_STRING "vfio-platform"
#define UAPI_VFIO_DEVICE_API_AMBA_STRING "vfio-amba"
#define UAPI_VFIO_DEVICE_API_CCW_STRING "vfio-ccw"
#define UAPI_VFIO_DEVICE_API_AP_STRING "vfio-ap"

/* Reply of DEVICE_GET_INFO. */
struct uapi_vfio_device_info {
    uint32_t argsz, flags, num_regions, num_irqs, cap_offset, pad;
};
UAPI_LAYOUT(vfio_device_info, 24, argsz, 0, flags, 4, num_regions, 8, num_irqs, 12, cap_offset, 16, pad, 20);
UAPI_OLDER(vfio_device_info, 5_4, num_irqs, 16);
UAPI_OLDER(vfio_device_info, 6_1, cap_offset, 20);

/* widths of atomic completion */
enum {
    UAPI_VFIO_PCI_ATOMIC_COMP32 = 1 << 0,
    UAPI_VFIO_PCI_ATOMIC_COMP64 = 1 << 1,
    UAPI_VFIO_PCI_ATOMIC_COMP128 = 1 << 2,
};

/* Capability: which atomic operations the root port completes. */
struct uapi_vfio_device_info_cap_pci_atomic_comp {
    struct uapi_vfio_info_cap_header header;
    uint32_t flags, reserved;
};
UAPI_LAYOUT(vfio_device_info_cap_pci_atomic_comp, 16, header, 0, flags, 8, reserved, 12);

/* ---- Regions ---- */

enum {
    UAPI_VFIO_DEVICE_GET_REGION_INFO = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 8),
};

enum {
    UAPI_VFIO_REGION_INFO_FLAG_READ = 1 << 0,
    UAPI_VFIO_REGION_INFO_FLAG_WRITE = 1 << 1,
    UAPI_VFIO_REGION_INFO_FLAG_MMAP = 1 << 2,
    UAPI_VFIO_REGION_INFO_FLAG_CAPS = 1 << 3,
};

/* capability ids of a region */
enum {
    UAPI_VFIO_REGION_INFO_CAP_SPARSE_MMAP = 1,
    UAPI_VFIO_REGION_INFO_CAP_TYPE = 2,
    UAPI_VFIO_REGION_INFO_CAP_MSIX_MAPPABLE = 3,
    UAPI_VFIO_REGION_INFO_CAP_NVLINK2_SSATGT = 4,
    UAPI_VFIO_REGION_INFO_CAP_NVLINK2_LNKSPD = 5,
};

/* Ask by index; offset is the position for pread, pwrite and mmap on the device fd. */
struct uapi_vfio_region_info {
    uint32_t argsz, flags, index, cap_offset;
    uint64_t size, offset;
};
UAPI_LAYOUT(vfio_region_info, 32, argsz, 0, flags, 4, index, 8, cap_offset, 12, size, 16, offset, 24);

/* One part that may be mapped, relative to the region. */
struct uapi_vfio_region_sparse_mmap_area {
    uint64_t offset, size;
};
UAPI_LAYOUT(vfio_region_sparse_mmap_area, 16, offset, 0, size, 8);

/* Capability: only these parts may be mapped. */
struct uapi_vfio_region_info_cap_sparse_mmap {
    struct uapi_vfio_info_cap_header header;
    uint32_t nr_areas, reserved;
    struct uapi_vfio_region_sparse_mmap_area areas[];
};
UAPI_LAYOUT(vfio_region_info_cap_sparse_mmap, 16, header, 0, nr_areas, 8, reserved, 12);
UAPI_FLEXIBLE(vfio_region_info_cap_sparse_mmap, areas, 16, 16);

/* Capability: what a device-specific region is. */
struct uapi_vfio_region_info_cap_type {
    struct uapi_vfio_info_cap_header header;
    uint32_t type, subtype;
};
UAPI_LAYOUT(vfio_region_info_cap_type, 16, header, 0, type, 8, subtype, 12);

/* Capability: NVLink2 address target. */
struct uapi_vfio_region_info_cap_nvlink2_ssatgt {
    struct uapi_vfio_info_cap_header header;
    uint64_t tgt;
};
UAPI_LAYOUT(vfio_region_info_cap_nvlink2_ssatgt, 16, header, 0, tgt, 8);

/* Capability: NVLink2 link speed. */
struct uapi_vfio_region_info_cap_nvlink2_lnkspd {
    struct uapi_vfio_info_cap_header header;
    uint32_t link_speed, __pad;
};
UAPI_LAYOUT(vfio_region_info_cap_nvlink2_lnkspd, 16, header, 0, link_speed, 8, __pad, 12);

/* region types; with the top bit set the low half is a PCI vendor id (in a u32 field the bit is 0x80000000) */
enum {
    UAPI_VFIO_REGION_TYPE_PCI_VENDOR_TYPE = -0x7fffffff - 1,
    UAPI_VFIO_REGION_TYPE_PCI_VENDOR_MASK = 0xffff,
    UAPI_VFIO_REGION_TYPE_GFX = 1,
    UAPI_VFIO_REGION_TYPE_CCW = 2,
    UAPI_VFIO_REGION_TYPE_MIGRATION_DEPRECATED = 3,
};

/* subtypes, counted anew under each type */
enum {
    UAPI_VFIO_REGION_SUBTYPE_INTEL_IGD_OPREGION = 1,
    UAPI_VFIO_REGION_SUBTYPE_INTEL_IGD_HOST_CFG = 2,
    UAPI_VFIO_REGION_SUBTYPE_INTEL_IGD_LPC_CFG = 3,
    UAPI_VFIO_REGION_SUBTYPE_NVIDIA_NVLINK2_RAM = 1,
    UAPI_VFIO_REGION_SUBTYPE_IBM_NVLINK2_ATSD = 1,
    UAPI_VFIO_REGION_SUBTYPE_GFX_EDID = 1,
    UAPI_VFIO_REGION_SUBTYPE_CCW_ASYNC_CMD = 1,
    UAPI_VFIO_REGION_SUBTYPE_CCW_SCHIB = 2,
    UAPI_VFIO_REGION_SUBTYPE_CCW_CRW = 3,
    UAPI_VFIO_REGION_SUBTYPE_MIGRATION_DEPRECATED = 1,
};

/* ---- Interrupts ---- */

enum {
    UAPI_VFIO_DEVICE_GET_IRQ_INFO = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 9),
    UAPI_VFIO_DEVICE_SET_IRQS = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 10),
};

enum {
    UAPI_VFIO_IRQ_INFO_EVENTFD = 1 << 0,
    UAPI_VFIO_IRQ_INFO_MASKABLE = 1 << 1,
    UAPI_VFIO_IRQ_INFO_AUTOMASKED = 1 << 2,
    UAPI_VFIO_IRQ_INFO_NORESIZE = 1 << 3,
};

/* Ask by index; count vectors. */
struct uapi_vfio_irq_info {
    uint32_t argsz, flags, index, count;
};
UAPI_LAYOUT(vfio_irq_info, 16, argsz, 0, flags, 4, index, 8, count, 12);

/* vfio_irq_set.flags: one kind of data with one action */
enum {
    UAPI_VFIO_IRQ_SET_DATA_NONE = 1 << 0,
    UAPI_VFIO_IRQ_SET_DATA_BOOL = 1 << 1,
    UAPI_VFIO_IRQ_SET_DATA_EVENTFD = 1 << 2,
    UAPI_VFIO_IRQ_SET_ACTION_MASK = 1 << 3,
    UAPI_VFIO_IRQ_SET_ACTION_UNMASK = 1 << 4,
    UAPI_VFIO_IRQ_SET_ACTION_TRIGGER = 1 << 5,
    UAPI_VFIO_IRQ_SET_DATA_TYPE_MASK = 0x7,
    UAPI_VFIO_IRQ_SET_ACTION_TYPE_MASK = 0x38,
};

/* Act on vectors [start, start + count); data holds a byte or a s32 fd for each, or nothing. */
struct uapi_vfio_irq_set {
    uint32_t argsz, flags, index, start, count;
    uint8_t data[];
};
UAPI_LAYOUT(vfio_irq_set, 20, argsz, 0, flags, 4, index, 8, start, 12, count, 16);
UAPI_FLEXIBLE(vfio_irq_set, data, 20, 1);

/* ---- Fixed indices of each bus ---- */

/* PCI regions and interrupts */
enum {
    UAPI_VFIO_PCI_BAR0_REGION_INDEX = 0,
    UAPI_VFIO_PCI_BAR1_REGION_INDEX = 1,
    UAPI_VFIO_PCI_BAR2_REGION_INDEX = 2,
    UAPI_VFIO_PCI_BAR3_REGION_INDEX = 3,
    UAPI_VFIO_PCI_BAR4_REGION_INDEX = 4,
    UAPI_VFIO_PCI_BAR5_REGION_INDEX = 5,
    UAPI_VFIO_PCI_ROM_REGION_INDEX = 6,
    UAPI_VFIO_PCI_CONFIG_REGION_INDEX = 7,
    UAPI_VFIO_PCI_VGA_REGION_INDEX = 8,
    UAPI_VFIO_PCI_NUM_REGIONS = 9,
    UAPI_VFIO_PCI_INTX_IRQ_INDEX = 0,
    UAPI_VFIO_PCI_MSI_IRQ_INDEX = 1,
    UAPI_VFIO_PCI_MSIX_IRQ_INDEX = 2,
    UAPI_VFIO_PCI_ERR_IRQ_INDEX = 3,
    UAPI_VFIO_PCI_REQ_IRQ_INDEX = 4,
    UAPI_VFIO_PCI_NUM_IRQS = 5,
};

/* channel I/O */
enum {
    UAPI_VFIO_CCW_CONFIG_REGION_INDEX = 0,
    UAPI_VFIO_CCW_NUM_REGIONS = 1,
    UAPI_VFIO_CCW_IO_IRQ_INDEX = 0,
    UAPI_VFIO_CCW_CRW_IRQ_INDEX = 1,
    UAPI_VFIO_CCW_REQ_IRQ_INDEX = 2,
    UAPI_VFIO_CCW_NUM_IRQS = 3,
};

/* adjunct processors */
enum {
    UAPI_VFIO_AP_REQ_IRQ_INDEX = 0,
    UAPI_VFIO_AP_CFG_CHG_IRQ_INDEX = 1,
    UAPI_VFIO_AP_NUM_IRQS = 2,
};

/* ---- PCI hot reset ---- */

enum {
    UAPI_VFIO_DEVICE_GET_PCI_HOT_RESET_INFO = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 12),
    UAPI_VFIO_DEVICE_PCI_HOT_RESET = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 13),
};

/* vfio_pci_hot_reset_info.flags: the list carries devids, and all of them are the caller's */
enum {
    UAPI_VFIO_PCI_HOT_RESET_FLAG_DEV_ID = 1 << 0,
    UAPI_VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED = 1 << 1,
};

/* special devids of the u32 field */
enum {
    UAPI_VFIO_PCI_DEVID_OWNED = 0,
    UAPI_VFIO_PCI_DEVID_NOT_OWNED = -1,
};

/* A device that the reset would hit too. */
struct uapi_vfio_pci_dependent_device {
    union {
        uint32_t group_id, devid;
    };
    uint16_t segment;
    uint8_t bus, devfn;
};
UAPI_LAYOUT(vfio_pci_dependent_device, 8, group_id, 0, devid, 0, segment, 4, bus, 6, devfn, 7);

/* count returns how many there are, even when argsz was too small (ENOSPC). */
struct uapi_vfio_pci_hot_reset_info {
    uint32_t argsz, flags, count;
    struct uapi_vfio_pci_dependent_device devices[];
};
UAPI_LAYOUT(vfio_pci_hot_reset_info, 12, argsz, 0, flags, 4, count, 8);
UAPI_FLEXIBLE(vfio_pci_hot_reset_info, devices, 12, 8);

/* Prove ownership with the group fds, or with none on a cdev. */
struct uapi_vfio_pci_hot_reset {
    uint32_t argsz, flags, count;
    int32_t group_fds[];
};
UAPI_LAYOUT(vfio_pci_hot_reset, 12, argsz, 0, flags, 4, count, 8);
UAPI_FLEXIBLE(vfio_pci_hot_reset, group_fds, 12, 4);

/* ---- Graphics planes ---- */

enum {
    UAPI_VFIO_DEVICE_QUERY_GFX_PLANE = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 14),
    UAPI_VFIO_DEVICE_GET_GFX_DMABUF = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 15),
};

enum {
    UAPI_VFIO_GFX_PLANE_TYPE_PROBE = 1 << 0,
    UAPI_VFIO_GFX_PLANE_TYPE_DMABUF = 1 << 1,
    UAPI_VFIO_GFX_PLANE_TYPE_REGION = 1 << 2,
};

/* One plane of a virtual display: a region index or a dma-buf id. */
struct uapi_vfio_device_gfx_plane_info {
    uint32_t argsz, flags, drm_plane_type, drm_format;
    uint64_t drm_format_mod;
    uint32_t width, height, stride, size, x_pos, y_pos, x_hot, y_hot;
    union {
        uint32_t region_index, dmabuf_id;
    };
    uint32_t reserved;
};
UAPI_LAYOUT(vfio_device_gfx_plane_info, 64, argsz, 0, flags, 4, drm_plane_type, 8, drm_format, 12,
            drm_format_mod, 16, width, 24, height, 28, stride, 32, size, 36, x_pos, 40, y_pos, 44, x_hot, 48,
            y_hot, 52, region_index, 56, dmabuf_id, 56, reserved, 60);

/* vfio_region_gfx_edid.link_state */
enum {
    UAPI_VFIO_DEVICE_GFX_LINK_STATE_UP = 1,
    UAPI_VFIO_DEVICE_GFX_LINK_STATE_DOWN = 2,
};

/* Head of the region through which a monitor description is given. */
struct uapi_vfio_region_gfx_edid {
    uint32_t edid_offset, edid_max_size, edid_size, max_xres, max_yres, link_state;
};
UAPI_LAYOUT(vfio_region_gfx_edid, 24, edid_offset, 0, edid_max_size, 4, edid_size, 8, max_xres, 12, max_yres, 16,
            link_state, 20);

/* ---- ioeventfd: a write that an eventfd does ---- */

enum {
    UAPI_VFIO_DEVICE_IOEVENTFD = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 16),
};

enum {
    UAPI_VFIO_DEVICE_IOEVENTFD_8 = 1 << 0,
    UAPI_VFIO_DEVICE_IOEVENTFD_16 = 1 << 1,
    UAPI_VFIO_DEVICE_IOEVENTFD_32 = 1 << 2,
    UAPI_VFIO_DEVICE_IOEVENTFD_64 = 1 << 3,
    UAPI_VFIO_DEVICE_IOEVENTFD_SIZE_MASK = 0xf,
};

/* Write data at offset whenever fd fires; fd -1 removes it. */
struct uapi_vfio_device_ioeventfd {
    uint32_t argsz, flags;
    uint64_t offset, data;
    int32_t fd;
    uint32_t reserved;
};
UAPI_LAYOUT(vfio_device_ioeventfd, 32, argsz, 0, flags, 4, offset, 8, data, 16, fd, 24, reserved, 28);

/* ---- Device features ---- */

enum {
    UAPI_VFIO_DEVICE_FEATURE = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 17),
};

/* vfio_device_feature.flags: a feature number with what to do */
enum {
    UAPI_VFIO_DEVICE_FEATURE_MASK = 0xffff,
    UAPI_VFIO_DEVICE_FEATURE_GET = 1 << 16,
    UAPI_VFIO_DEVICE_FEATURE_SET = 1 << 17,
    UAPI_VFIO_DEVICE_FEATURE_PROBE = 1 << 18,
};

/* feature numbers */
enum {
    UAPI_VFIO_DEVICE_FEATURE_PCI_VF_TOKEN = 0,
    UAPI_VFIO_DEVICE_FEATURE_MIGRATION = 1,
    UAPI_VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE = 2,
    UAPI_VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY = 3,
    UAPI_VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP = 4,
    UAPI_VFIO_DEVICE_FEATURE_LOW_POWER_EXIT = 5,
    UAPI_VFIO_DEVICE_FEATURE_DMA_LOGGING_START = 6,
    UAPI_VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP = 7,
    UAPI_VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT = 8,
    UAPI_VFIO_DEVICE_FEATURE_MIG_DATA_SIZE = 9,
    UAPI_VFIO_DEVICE_FEATURE_BUS_MASTER = 10,
    UAPI_VFIO_DEVICE_FEATURE_DMA_BUF = 11,
    UAPI_VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 = 12,
};

/* Head; data is the feature's own structure. */
struct uapi_vfio_device_feature {
    uint32_t argsz, flags;
    uint8_t data[];
};
UAPI_LAYOUT(vfio_device_feature, 8, argsz, 0, flags, 4);
UAPI_FLEXIBLE(vfio_device_feature, data, 8, 1);

/* Sleep, and signal the eventfd on waking. */
struct uapi_vfio_device_low_power_entry_with_wakeup {
    int32_t wakeup_eventfd;
    uint32_t reserved;
};
UAPI_LAYOUT(vfio_device_low_power_entry_with_wakeup, 8, wakeup_eventfd, 0, reserved, 4);

/* Start logging: num_ranges records of the next structure at ranges. */
struct uapi_vfio_device_feature_dma_logging_control {
    uint64_t page_size;
    uint32_t num_ranges, __reserved;
    uint64_t ranges;
};
UAPI_LAYOUT(vfio_device_feature_dma_logging_control, 24, page_size, 0, num_ranges, 8, __reserved, 12, ranges, 16);

/* Length bytes from iova. */
struct uapi_vfio_device_feature_dma_logging_range {
    uint64_t iova, length;
};
UAPI_LAYOUT(vfio_device_feature_dma_logging_range, 16, iova, 0, length, 8);

/* Harvest length bytes from iova into bitmap, one bit for page_size bytes. */
struct uapi_vfio_device_feature_dma_logging_report {
    uint64_t iova, length, page_size, bitmap;
};
UAPI_LAYOUT(vfio_device_feature_dma_logging_report, 32, iova, 0, length, 8, page_size, 16, bitmap, 24);

/* vfio_device_feature_bus_master.op */
enum {
    UAPI_VFIO_DEVICE_FEATURE_CLEAR_MASTER = 0,
    UAPI_VFIO_DEVICE_FEATURE_SET_MASTER = 1,
};

/* Switch the device's DMA off or on. */
struct uapi_vfio_device_feature_bus_master {
    uint32_t op;
};
UAPI_LAYOUT(vfio_device_feature_bus_master, 4, op, 0);

/* A part of a region to export. */
struct uapi_vfio_region_dma_range {
    uint64_t offset, length;
};
UAPI_LAYOUT(vfio_region_dma_range, 16, offset, 0, length, 8);

/* Export parts of a region as a dma-buf; the call returns its fd. */
struct uapi_vfio_device_feature_dma_buf {
    uint32_t region_index, open_flags, flags, nr_ranges;
    struct uapi_vfio_region_dma_range dma_ranges[];
};
UAPI_LAYOUT(vfio_device_feature_dma_buf, 16, region_index, 0, open_flags, 4, flags, 8, nr_ranges, 12);
UAPI_FLEXIBLE(vfio_device_feature_dma_buf, dma_ranges, 16, 16);

/* ---- Migration ---- */

enum {
    UAPI_VFIO_MIG_GET_PRECOPY_INFO = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 21),
};

/* vfio_device_feature_migration.flags */
enum {
    UAPI_VFIO_MIGRATION_STOP_COPY = 1 << 0,
    UAPI_VFIO_MIGRATION_P2P = 1 << 1,
    UAPI_VFIO_MIGRATION_PRE_COPY = 1 << 2,
};

/* Which optional states the device has. */
struct uapi_vfio_device_feature_migration {
    uint64_t flags;
};
UAPI_LAYOUT(vfio_device_feature_migration, 8, flags, 0);

/* vfio_device_feature_mig_state.device_state */
enum uapi_vfio_device_mig_state {
    UAPI_VFIO_DEVICE_STATE_ERROR = 0,
    UAPI_VFIO_DEVICE_STATE_STOP = 1,
    UAPI_VFIO_DEVICE_STATE_RUNNING = 2,
    UAPI_VFIO_DEVICE_STATE_STOP_COPY = 3,
    UAPI_VFIO_DEVICE_STATE_RESUMING = 4,
    UAPI_VFIO_DEVICE_STATE_RUNNING_P2P = 5,
    UAPI_VFIO_DEVICE_STATE_PRE_COPY = 6,
    UAPI_VFIO_DEVICE_STATE_PRE_COPY_P2P = 7,
    UAPI_VFIO_DEVICE_STATE_NR = 8,
};

/* Set or get the state; a transition may hand out data_fd. */
struct uapi_vfio_device_feature_mig_state {
    uint32_t device_state;
    int32_t data_fd;
};
UAPI_LAYOUT(vfio_device_feature_mig_state, 8, device_state, 0, data_fd, 4);

/* Estimated bytes of the stop-and-copy data. */
struct uapi_vfio_device_feature_mig_data_size {
    uint64_t stop_copy_length;
};
UAPI_LAYOUT(vfio_device_feature_mig_data_size, 8, stop_copy_length, 0);

/* vfio_precopy_info.flags (out) */
enum {
    UAPI_VFIO_PRECOPY_INFO_REINIT = 1 << 0,
};

/* Asked on the migration data fd, not on the device. */
struct uapi_vfio_precopy_info {
    uint32_t argsz, flags;
    uint64_t initial_bytes, dirty_bytes;
};
UAPI_LAYOUT(vfio_precopy_info, 24, argsz, 0, flags, 4, initial_bytes, 8, dirty_bytes, 16);

/* the first migration protocol, a region: state bits of device_state */
enum {
    UAPI_VFIO_DEVICE_STATE_V1_RUNNING = 1 << 0,
    UAPI_VFIO_DEVICE_STATE_V1_SAVING = 1 << 1,
    UAPI_VFIO_DEVICE_STATE_V1_RESUMING = 1 << 2,
    UAPI_VFIO_DEVICE_STATE_V1_STOP = 0,
    UAPI_VFIO_DEVICE_STATE_MASK = 0x7,
};

/* Registers at the start of that region. */
struct uapi_vfio_device_migration_info {
    uint32_t device_state, reserved;
    uint64_t pending_bytes, data_offset, data_size;
};
UAPI_LAYOUT(vfio_device_migration_info, 32, device_state, 0, reserved, 4, pending_bytes, 8, data_offset, 16,
            data_size, 24);

/* ---- Device cdev: binding to iommufd ---- */

enum {
    UAPI_VFIO_DEVICE_BIND_IOMMUFD = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 18),
    UAPI_VFIO_DEVICE_ATTACH_IOMMUFD_PT = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 19),
    UAPI_VFIO_DEVICE_DETACH_IOMMUFD_PT = UAPI_IO(UAPI_VFIO_TYPE, UAPI_VFIO_BASE + 20),
};

enum {
    UAPI_VFIO_DEVICE_BIND_FLAG_TOKEN = 1 << 0,
};

/* Take the device for this iommufd; out_devid names it there. */
struct uapi_vfio_device_bind_iommufd {
    uint32_t argsz, flags;
    int32_t iommufd;
    uint32_t out_devid;
    uint64_t token_uuid_ptr;
};
UAPI_LAYOUT(vfio_device_bind_iommufd, 24, argsz, 0, flags, 4, iommufd, 8, out_devid, 12, token_uuid_ptr, 16);
UAPI_OLDER(vfio_device_bind_iommufd, 6_12, out_devid, 16);

enum {
    UAPI_VFIO_DEVICE_ATTACH_PASID = 1 << 0,
};

/* Attach to an ioas or hwpt; returns the hwpt in pt_id. */
struct uapi_vfio_device_attach_iommufd_pt {
    uint32_t argsz, flags, pt_id, pasid;
};
UAPI_LAYOUT(vfio_device_attach_iommufd_pt, 16, argsz, 0, flags, 4, pt_id, 8, pasid, 12);
UAPI_OLDER(vfio_device_attach_iommufd_pt, 6_12, pt_id, 12);

enum {
    UAPI_VFIO_DEVICE_DETACH_PASID = 1 << 0,
};

/* Detach, the whole device or one PASID. */
struct uapi_vfio_device_detach_iommufd_pt {
    uint32_t argsz, flags, pasid;
};
UAPI_LAYOUT(vfio_device_detach_iommufd_pt, 12, argsz, 0, flags, 4, pasid, 8);
UAPI_OLDER(vfio_device_detach_iommufd_pt, 6_12, flags, 8);

#endif
