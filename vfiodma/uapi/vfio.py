"""VFIO: containers, groups, the type1 and SPAPR IOMMU drivers, devices and their migration.

ioctl numbers are reused: what one means depends on the kind of fd.  Numbers that live in u32 fields are given as u32.
``Layout.at`` and ``constant_at`` answer for an older kernel.  Source: uapi sections 1, 2, 4, 5, 6 and 8.
"""
from . import iommu  # noqa: F401  declares iommu_nesting_info
from .layout import Layout, at_kernel, io

VFIO_TYPE = ord(";")
VFIO_BASE = 100


# Container: the fd of /dev/vfio/vfio
# -----------------------------------

# ioctls of any container
VFIO_GET_API_VERSION = io(VFIO_TYPE, VFIO_BASE + 0)
VFIO_CHECK_EXTENSION = io(VFIO_TYPE, VFIO_BASE + 1)
VFIO_SET_IOMMU = io(VFIO_TYPE, VFIO_BASE + 2)

VFIO_API_VERSION = 0

# what CHECK_EXTENSION answers for; the IOMMU drivers among them are what SET_IOMMU takes
VFIO_TYPE1_IOMMU = 1
VFIO_SPAPR_TCE_IOMMU = 2
VFIO_TYPE1v2_IOMMU = 3
VFIO_DMA_CC_IOMMU = 4
VFIO_EEH = 5
VFIO_TYPE1_NESTING_IOMMU = 6
VFIO_SPAPR_TCE_v2_IOMMU = 7
VFIO_NOIOMMU_IOMMU = 8
VFIO_UNMAP_ALL = 9
VFIO_UPDATE_VADDR = 10

# 7.2 keeps number 6 under this name, without the driver behind it
__VFIO_RESERVED_TYPE1_NESTING_IOMMU = 6

# Head of one capability. next counts from the start of the whole reply; 0 ends the chain.
vfio_info_cap_header = Layout("vfio_info_cap_header", 8, "0:u16 id; 2:u16 version; 4:u32 next")


# Group: the fd of /dev/vfio/<number>
# -----------------------------------

VFIO_GROUP_GET_STATUS = io(VFIO_TYPE, VFIO_BASE + 3)
VFIO_GROUP_SET_CONTAINER = io(VFIO_TYPE, VFIO_BASE + 4)
VFIO_GROUP_UNSET_CONTAINER = io(VFIO_TYPE, VFIO_BASE + 5)
VFIO_GROUP_GET_DEVICE_FD = io(VFIO_TYPE, VFIO_BASE + 6)

VFIO_GROUP_FLAGS_VIABLE = 1 << 0
VFIO_GROUP_FLAGS_CONTAINER_SET = 1 << 1

# Reply of GROUP_GET_STATUS.
vfio_group_status = Layout("vfio_group_status", 8, "0:u32 argsz; 4:u32 flags")


# Type1: mapping, dirty pages, capabilities
# -----------------------------------------

VFIO_IOMMU_GET_INFO = io(VFIO_TYPE, VFIO_BASE + 12)
VFIO_IOMMU_MAP_DMA = io(VFIO_TYPE, VFIO_BASE + 13)
VFIO_IOMMU_UNMAP_DMA = io(VFIO_TYPE, VFIO_BASE + 14)
VFIO_IOMMU_DIRTY_PAGES = io(VFIO_TYPE, VFIO_BASE + 17)

# vfio_iommu_type1_info.flags
VFIO_IOMMU_INFO_PGSIZES = 1 << 0
VFIO_IOMMU_INFO_CAPS = 1 << 1

# capability ids of GET_INFO; NESTING belongs to the vSVA series only
VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE = 1
VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION = 2
VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL = 3
VFIO_IOMMU_TYPE1_INFO_CAP_NESTING = 4

# Reply of GET_INFO. cap_offset is 0 when the chain did not fit argsz; argsz then says what would.
vfio_iommu_type1_info = Layout("vfio_iommu_type1_info", 24,
    "0:u32 argsz; 4:u32 flags; 8:u64 iova_pgsizes; 16:u32 cap_offset; 20:u32 pad", older={
    "6.1": (24, "0:u32 argsz; 4:u32 flags; 8:u64 iova_pgsizes; 16:u32 cap_offset"),
})

# One usable window, end inclusive.
vfio_iova_range = Layout("vfio_iova_range", 16, "0:u64 start; 8:u64 end")

# Capability: the windows that every attached group can reach.
vfio_iommu_type1_info_cap_iova_range = Layout("vfio_iommu_type1_info_cap_iova_range", 16,
    "0:vfio_info_cap_header header; 8:u32 nr_iovas; 12:u32 reserved; 16:vfio_iova_range[] iova_ranges")

# Capability: page sizes and largest buffer (bytes) that dirty tracking takes.
vfio_iommu_type1_info_cap_migration = Layout("vfio_iommu_type1_info_cap_migration", 32,
    "0:vfio_info_cap_header header; 8:u32 flags; 16:u64 pgsize_bitmap; 24:u64 max_dirty_bitmap_size")

# Capability: how many more mappings the container takes.
vfio_iommu_type1_info_dma_avail = Layout("vfio_iommu_type1_info_dma_avail", 12,
    "0:vfio_info_cap_header header; 8:u32 avail")

# vfio_iommu_type1_dma_map.flags
VFIO_DMA_MAP_FLAG_READ = 1 << 0
VFIO_DMA_MAP_FLAG_WRITE = 1 << 1
VFIO_DMA_MAP_FLAG_VADDR = 1 << 2

# Map size bytes at vaddr to iova.
vfio_iommu_type1_dma_map = Layout("vfio_iommu_type1_dma_map", 32,
    "0:u32 argsz; 4:u32 flags; 8:u64 vaddr; 16:u64 iova; 24:u64 size")

# vfio_iommu_type1_dma_unmap.flags
VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP = 1 << 0
VFIO_DMA_UNMAP_FLAG_ALL = 1 << 1
VFIO_DMA_UNMAP_FLAG_VADDR = 1 << 2

# A dirty bitmap of the caller: pgsize bytes a bit, size bytes of words at data.
vfio_bitmap = Layout("vfio_bitmap", 24, "0:u64 pgsize; 8:u64 size; 16:ptr data")

# Unmap [iova, iova + size). size returns the bytes really unmapped; data holds one vfio_bitmap on request.
vfio_iommu_type1_dma_unmap = Layout("vfio_iommu_type1_dma_unmap", 24,
    "0:u32 argsz; 4:u32 flags; 8:u64 iova; 16:u64 size; 24:u8[] data", older={
    "5.4": (24, "0:u32 argsz; 4:u32 flags; 8:u64 iova; 16:u64 size"),
})

# vfio_iommu_type1_dirty_bitmap.flags, one at a time
VFIO_IOMMU_DIRTY_PAGES_FLAG_START = 1 << 0
VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP = 1 << 1
VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP = 1 << 2

# Argument of DIRTY_PAGES; with GET_BITMAP data holds a dirty_bitmap_get.
vfio_iommu_type1_dirty_bitmap = Layout("vfio_iommu_type1_dirty_bitmap", 8, "0:u32 argsz; 4:u32 flags; 8:u8[] data")

# Which range to report, and where to.
vfio_iommu_type1_dirty_bitmap_get = Layout("vfio_iommu_type1_dirty_bitmap_get", 40,
    "0:u64 iova; 8:u64 size; 16:vfio_bitmap bitmap")


# Type1 nesting, vSVA series only
# -------------------------------

VFIO_IOMMU_NESTING_OP = io(VFIO_TYPE, VFIO_BASE + 18)

VFIO_NESTING_OP_MASK = 0xffff
VFIO_IOMMU_NESTING_OP_BIND_PGTBL = 0
VFIO_IOMMU_NESTING_OP_UNBIND_PGTBL = 1
VFIO_IOMMU_NESTING_OP_CACHE_INVLD = 2

# Capability: what the hardware offers for a guest's own first stage.
vfio_iommu_type1_info_cap_nesting = Layout("vfio_iommu_type1_info_cap_nesting", 72,
    "0:vfio_info_cap_header header; 8:iommu_nesting_info info")

# The low 16 bits of flags pick the operation; data holds its structure from iommu.
vfio_iommu_type1_nesting_op = Layout("vfio_iommu_type1_nesting_op", 8, "0:u32 argsz; 4:u32 flags; 8:u8[] data")


# SPAPR TCE: windows of the POWER IOMMU
# -------------------------------------

# the numbers coincide with those of type1 and of devices: the fd decides
VFIO_IOMMU_SPAPR_TCE_GET_INFO = io(VFIO_TYPE, VFIO_BASE + 12)
VFIO_IOMMU_ENABLE = io(VFIO_TYPE, VFIO_BASE + 15)
VFIO_IOMMU_DISABLE = io(VFIO_TYPE, VFIO_BASE + 16)
VFIO_IOMMU_SPAPR_REGISTER_MEMORY = io(VFIO_TYPE, VFIO_BASE + 17)
VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY = io(VFIO_TYPE, VFIO_BASE + 18)
VFIO_IOMMU_SPAPR_TCE_CREATE = io(VFIO_TYPE, VFIO_BASE + 19)
VFIO_IOMMU_SPAPR_TCE_REMOVE = io(VFIO_TYPE, VFIO_BASE + 20)

VFIO_IOMMU_SPAPR_INFO_DDW = 1 << 0

# What dynamic windows can be: page sizes, how many, how many table levels.
vfio_iommu_spapr_tce_ddw_info = Layout("vfio_iommu_spapr_tce_ddw_info", 16,
    "0:u64 pgsizes; 8:u32 max_dynamic_windows_supported; 12:u32 levels")

# The default 32-bit window, and ddw when the flag says so.
vfio_iommu_spapr_tce_info = Layout("vfio_iommu_spapr_tce_info", 32,
    "0:u32 argsz; 4:u32 flags; 8:u32 dma32_window_start; 12:u32 dma32_window_size; "
    "16:vfio_iommu_spapr_tce_ddw_info ddw")

# Memory to pin (or let go) ahead of its mapping; flags must be 0.
vfio_iommu_spapr_register_memory = Layout("vfio_iommu_spapr_register_memory", 24,
    "0:u32 argsz; 4:u32 flags; 8:u64 vaddr; 16:u64 size")

# Make a window of 1 << page_shift pages; the driver returns start_addr.
vfio_iommu_spapr_tce_create = Layout("vfio_iommu_spapr_tce_create", 40,
    "0:u32 argsz; 4:u32 flags; 8:u32 page_shift; 12:u32 __resv1; 16:u64 window_size; 24:u32 levels; "
    "28:u32 __resv2; 32:u64 start_addr")

# Drop the window that begins at start_addr.
vfio_iommu_spapr_tce_remove = Layout("vfio_iommu_spapr_tce_remove", 16, "0:u32 argsz; 4:u32 flags; 8:u64 start_addr")


# EEH: error handling of POWER partitionable endpoints
# ----------------------------------------------------

VFIO_EEH_PE_OP = io(VFIO_TYPE, VFIO_BASE + 21)

VFIO_EEH_PE_DISABLE = 0
VFIO_EEH_PE_ENABLE = 1
VFIO_EEH_PE_UNFREEZE_IO = 2
VFIO_EEH_PE_UNFREEZE_DMA = 3
VFIO_EEH_PE_GET_STATE = 4
VFIO_EEH_PE_RESET_DEACTIVATE = 5
VFIO_EEH_PE_RESET_HOT = 6
VFIO_EEH_PE_RESET_FUNDAMENTAL = 7
VFIO_EEH_PE_CONFIGURE = 8
VFIO_EEH_PE_INJECT_ERR = 9

# what GET_STATE returns
VFIO_EEH_PE_STATE_NORMAL = 0
VFIO_EEH_PE_STATE_RESET = 1
VFIO_EEH_PE_STATE_STOPPED = 2
VFIO_EEH_PE_STATE_STOPPED_DMA = 4
VFIO_EEH_PE_STATE_UNAVAIL = 5

# The error to inject.
vfio_eeh_pe_err = Layout("vfio_eeh_pe_err", 24, "0:u32 type; 4:u32 func; 8:u64 addr; 16:u64 mask")

# Plain operations end after op (12 bytes); INJECT_ERR needs err too, behind 4 bytes of padding.
vfio_eeh_pe_op = Layout("vfio_eeh_pe_op", 40, "0:u32 argsz; 4:u32 flags; 8:u32 op; 16:|vfio_eeh_pe_err err")


# Device: information and bus names
# ---------------------------------

VFIO_DEVICE_GET_INFO = io(VFIO_TYPE, VFIO_BASE + 7)
VFIO_DEVICE_RESET = io(VFIO_TYPE, VFIO_BASE + 11)

# vfio_device_info.flags
VFIO_DEVICE_FLAGS_RESET = 1 << 0
VFIO_DEVICE_FLAGS_PCI = 1 << 1
VFIO_DEVICE_FLAGS_PLATFORM = 1 << 2
VFIO_DEVICE_FLAGS_AMBA = 1 << 3
VFIO_DEVICE_FLAGS_CCW = 1 << 4
VFIO_DEVICE_FLAGS_AP = 1 << 5
VFIO_DEVICE_FLAGS_FSL_MC = 1 << 6
VFIO_DEVICE_FLAGS_CAPS = 1 << 7
VFIO_DEVICE_FLAGS_CDX = 1 << 8

# capability ids of a device
VFIO_DEVICE_INFO_CAP_ZPCI_BASE = 1
VFIO_DEVICE_INFO_CAP_ZPCI_GROUP = 2
VFIO_DEVICE_INFO_CAP_ZPCI_UTIL = 3
VFIO_DEVICE_INFO_CAP_ZPCI_PFIP = 4
VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP = 5

# device API names as sysfs spells them
VFIO_DEVICE_API_PCI_STRING = "vfio-pci"
VFIO_DEVICE_API_PLATFORM_STRING = "vfio-platform"
VFIO_DEVICE_API_AMBA_STRING = "vfio-amba"
VFIO_DEVICE_API_CCW_STRING = "vfio-ccw"
VFIO_DEVICE_API_AP_STRING = "vfio-ap"

# Reply of DEVICE_GET_INFO.
vfio_device_info = Layout("vfio_device_info", 24,
    "0:u32 argsz; 4:u32 flags; 8:u32 num_regions; 12:u32 num_irqs; 16:u32 cap_offset; 20:u32 pad", older={
    "5.4": (16, "0:u32 argsz; 4:u32 flags; 8:u32 num_regions; 12:u32 num_irqs"),
    "6.1": (20, "0:u32 argsz; 4:u32 flags; 8:u32 num_regions; 12:u32 num_irqs; 16:u32 cap_offset"),
})

# widths of atomic completion
VFIO_PCI_ATOMIC_COMP32 = 1 << 0
VFIO_PCI_ATOMIC_COMP64 = 1 << 1
VFIO_PCI_ATOMIC_COMP128 = 1 << 2

# Capability: which atomic operations the root port completes.
vfio_device_info_cap_pci_atomic_comp = Layout("vfio_device_info_cap_pci_atomic_comp", 16,
    "0:vfio_info_cap_header header; 8:u32 flags; 12:u32 reserved")


# Regions
# -------

VFIO_DEVICE_GET_REGION_INFO = io(VFIO_TYPE, VFIO_BASE + 8)

VFIO_REGION_INFO_FLAG_READ = 1 << 0
VFIO_REGION_INFO_FLAG_WRITE = 1 << 1
VFIO_REGION_INFO_FLAG_MMAP = 1 << 2
VFIO_REGION_INFO_FLAG_CAPS = 1 << 3

# capability ids of a region
VFIO_REGION_INFO_CAP_SPARSE_MMAP = 1
VFIO_REGION_INFO_CAP_TYPE = 2
VFIO_REGION_INFO_CAP_MSIX_MAPPABLE = 3
VFIO_REGION_INFO_CAP_NVLINK2_SSATGT = 4
VFIO_REGION_INFO_CAP_NVLINK2_LNKSPD = 5

# Ask by index; offset is the position for pread, pwrite and mmap on the device fd.
vfio_region_info = Layout("vfio_region_info", 32,
    "0:u32 argsz; 4:u32 flags; 8:u32 index; 12:u32 cap_offset; 16:u64 size; 24:u64 offset")

# One part that may be mapped, relative to the region.
vfio_region_sparse_mmap_area = Layout("vfio_region_sparse_mmap_area", 16, "0:u64 offset; 8:u64 size")

# Capability: only these parts may be mapped.
vfio_region_info_cap_sparse_mmap = Layout("vfio_region_info_cap_sparse_mmap", 16,
    "0:vfio_info_cap_header header; 8:u32 nr_areas; 12:u32 reserved; 16:vfio_region_sparse_mmap_area[] areas")

# Capability: what a device-specific region is.
vfio_region_info_cap_type = Layout("vfio_region_info_cap_type", 16,
    "0:vfio_info_cap_header header; 8:u32 type; 12:u32 subtype")

# Capability: NVLink2 address target.
vfio_region_info_cap_nvlink2_ssatgt = Layout("vfio_region_info_cap_nvlink2_ssatgt", 16,
    "0:vfio_info_cap_header header; 8:u64 tgt")

# Capability: NVLink2 link speed.
vfio_region_info_cap_nvlink2_lnkspd = Layout("vfio_region_info_cap_nvlink2_lnkspd", 16,
    "0:vfio_info_cap_header header; 8:u32 link_speed; 12:u32 __pad")

# region types; with the top bit set the low half is a PCI vendor id (in a u32 field the bit is 0x80000000)
VFIO_REGION_TYPE_PCI_VENDOR_TYPE = 0x80000000
VFIO_REGION_TYPE_PCI_VENDOR_MASK = 0xffff
VFIO_REGION_TYPE_GFX = 1
VFIO_REGION_TYPE_CCW = 2
VFIO_REGION_TYPE_MIGRATION_DEPRECATED = 3

# subtypes, counted anew under each type
VFIO_REGION_SUBTYPE_INTEL_IGD_OPREGION = 1
VFIO_REGION_SUBTYPE_INTEL_IGD_HOST_CFG = 2
VFIO_REGION_SUBTYPE_INTEL_IGD_LPC_CFG = 3
VFIO_REGION_SUBTYPE_NVIDIA_NVLINK2_RAM = 1
VFIO_REGION_SUBTYPE_IBM_NVLINK2_ATSD = 1
VFIO_REGION_SUBTYPE_GFX_EDID = 1
VFIO_REGION_SUBTYPE_CCW_ASYNC_CMD = 1
VFIO_REGION_SUBTYPE_CCW_SCHIB = 2
VFIO_REGION_SUBTYPE_CCW_CRW = 3
VFIO_REGION_SUBTYPE_MIGRATION_DEPRECATED = 1


# Interrupts
# ----------

VFIO_DEVICE_GET_IRQ_INFO = io(VFIO_TYPE, VFIO_BASE + 9)
VFIO_DEVICE_SET_IRQS = io(VFIO_TYPE, VFIO_BASE + 10)

VFIO_IRQ_INFO_EVENTFD = 1 << 0
VFIO_IRQ_INFO_MASKABLE = 1 << 1
VFIO_IRQ_INFO_AUTOMASKED = 1 << 2
VFIO_IRQ_INFO_NORESIZE = 1 << 3

# Ask by index; count vectors.
vfio_irq_info = Layout("vfio_irq_info", 16, "0:u32 argsz; 4:u32 flags; 8:u32 index; 12:u32 count")

# vfio_irq_set.flags: one kind of data with one action
VFIO_IRQ_SET_DATA_NONE = 1 << 0
VFIO_IRQ_SET_DATA_BOOL = 1 << 1
VFIO_IRQ_SET_DATA_EVENTFD = 1 << 2
VFIO_IRQ_SET_ACTION_MASK = 1 << 3
VFIO_IRQ_SET_ACTION_UNMASK = 1 << 4
VFIO_IRQ_SET_ACTION_TRIGGER = 1 << 5
VFIO_IRQ_SET_DATA_TYPE_MASK = 0x7
VFIO_IRQ_SET_ACTION_TYPE_MASK = 0x38

# Act on vectors [start, start + count); data holds a byte or a s32 fd for each, or nothing.
vfio_irq_set = Layout("vfio_irq_set", 20,
    "0:u32 argsz; 4:u32 flags; 8:u32 index; 12:u32 start; 16:u32 count; 20:u8[] data")


# Fixed indices of each bus
# -------------------------

# PCI regions and interrupts
VFIO_PCI_BAR0_REGION_INDEX = 0
VFIO_PCI_BAR1_REGION_INDEX = 1
VFIO_PCI_BAR2_REGION_INDEX = 2
VFIO_PCI_BAR3_REGION_INDEX = 3
VFIO_PCI_BAR4_REGION_INDEX = 4
VFIO_PCI_BAR5_REGION_INDEX = 5
VFIO_PCI_ROM_REGION_INDEX = 6
VFIO_PCI_CONFIG_REGION_INDEX = 7
VFIO_PCI_VGA_REGION_INDEX = 8
VFIO_PCI_NUM_REGIONS = 9
VFIO_PCI_INTX_IRQ_INDEX = 0
VFIO_PCI_MSI_IRQ_INDEX = 1
VFIO_PCI_MSIX_IRQ_INDEX = 2
VFIO_PCI_ERR_IRQ_INDEX = 3
VFIO_PCI_REQ_IRQ_INDEX = 4
VFIO_PCI_NUM_IRQS = 5

# channel I/O
VFIO_CCW_CONFIG_REGION_INDEX = 0
VFIO_CCW_NUM_REGIONS = 1
VFIO_CCW_IO_IRQ_INDEX = 0
VFIO_CCW_CRW_IRQ_INDEX = 1
VFIO_CCW_REQ_IRQ_INDEX = 2
VFIO_CCW_NUM_IRQS = 3

# adjunct processors
VFIO_AP_REQ_IRQ_INDEX = 0
VFIO_AP_CFG_CHG_IRQ_INDEX = 1
VFIO_AP_NUM_IRQS = 2


# PCI hot reset
# -------------

VFIO_DEVICE_GET_PCI_HOT_RESET_INFO = io(VFIO_TYPE, VFIO_BASE + 12)
VFIO_DEVICE_PCI_HOT_RESET = io(VFIO_TYPE, VFIO_BASE + 13)

# vfio_pci_hot_reset_info.flags: the list carries devids, and all of them are the caller's
VFIO_PCI_HOT_RESET_FLAG_DEV_ID = 1 << 0
VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED = 1 << 1

# special devids of the u32 field
VFIO_PCI_DEVID_OWNED = 0
VFIO_PCI_DEVID_NOT_OWNED = 0xffffffff

# A device that the reset would hit too.
vfio_pci_dependent_device = Layout("vfio_pci_dependent_device", 8,
    "0:|u32 group_id; 0:|u32 devid; 4:u16 segment; 6:u8 bus; 7:u8 devfn", older={
    "6.1": (8, "0:u32 group_id; 4:u16 segment; 6:u8 bus; 7:u8 devfn"),
})

# count returns how many there are, even when argsz was too small (ENOSPC).
vfio_pci_hot_reset_info = Layout("vfio_pci_hot_reset_info", 12,
    "0:u32 argsz; 4:u32 flags; 8:u32 count; 12:vfio_pci_dependent_device[] devices")

# Prove ownership with the group fds, or with none on a cdev.
vfio_pci_hot_reset = Layout("vfio_pci_hot_reset", 12, "0:u32 argsz; 4:u32 flags; 8:u32 count; 12:s32[] group_fds")


# Graphics planes
# ---------------

VFIO_DEVICE_QUERY_GFX_PLANE = io(VFIO_TYPE, VFIO_BASE + 14)
VFIO_DEVICE_GET_GFX_DMABUF = io(VFIO_TYPE, VFIO_BASE + 15)

VFIO_GFX_PLANE_TYPE_PROBE = 1 << 0
VFIO_GFX_PLANE_TYPE_DMABUF = 1 << 1
VFIO_GFX_PLANE_TYPE_REGION = 1 << 2

# One plane of a virtual display: a region index or a dma-buf id.
vfio_device_gfx_plane_info = Layout("vfio_device_gfx_plane_info", 64,
    "0:u32 argsz; 4:u32 flags; 8:u32 drm_plane_type; 12:u32 drm_format; 16:u64 drm_format_mod; 24:u32 width; "
    "28:u32 height; 32:u32 stride; 36:u32 size; 40:u32 x_pos; 44:u32 y_pos; 48:u32 x_hot; 52:u32 y_hot; "
    "56:|u32 region_index; 56:|u32 dmabuf_id; 60:u32 reserved", older={
    "6.1": (64,
        "0:u32 argsz; 4:u32 flags; 8:u32 drm_plane_type; 12:u32 drm_format; 16:u64 drm_format_mod; 24:u32 width; "
        "28:u32 height; 32:u32 stride; 36:u32 size; 40:u32 x_pos; 44:u32 y_pos; 48:u32 x_hot; 52:u32 y_hot; "
        "56:|u32 region_index; 56:|u32 dmabuf_id"),
})

# vfio_region_gfx_edid.link_state
VFIO_DEVICE_GFX_LINK_STATE_UP = 1
VFIO_DEVICE_GFX_LINK_STATE_DOWN = 2

# Head of the region through which a monitor description is given.
vfio_region_gfx_edid = Layout("vfio_region_gfx_edid", 24,
    "0:u32 edid_offset; 4:u32 edid_max_size; 8:u32 edid_size; 12:u32 max_xres; 16:u32 max_yres; "
    "20:u32 link_state")


# ioeventfd: a write that an eventfd does
# ---------------------------------------

VFIO_DEVICE_IOEVENTFD = io(VFIO_TYPE, VFIO_BASE + 16)

VFIO_DEVICE_IOEVENTFD_8 = 1 << 0
VFIO_DEVICE_IOEVENTFD_16 = 1 << 1
VFIO_DEVICE_IOEVENTFD_32 = 1 << 2
VFIO_DEVICE_IOEVENTFD_64 = 1 << 3
VFIO_DEVICE_IOEVENTFD_SIZE_MASK = 0xf

# Write data at offset whenever fd fires; fd -1 removes it.
vfio_device_ioeventfd = Layout("vfio_device_ioeventfd", 32,
    "0:u32 argsz; 4:u32 flags; 8:u64 offset; 16:u64 data; 24:s32 fd; 28:u32 reserved", older={
    "6.1": (32, "0:u32 argsz; 4:u32 flags; 8:u64 offset; 16:u64 data; 24:s32 fd"),
})


# Device features
# ---------------

VFIO_DEVICE_FEATURE = io(VFIO_TYPE, VFIO_BASE + 17)

# vfio_device_feature.flags: a feature number with what to do
VFIO_DEVICE_FEATURE_MASK = 0xffff
VFIO_DEVICE_FEATURE_GET = 1 << 16
VFIO_DEVICE_FEATURE_SET = 1 << 17
VFIO_DEVICE_FEATURE_PROBE = 1 << 18

# feature numbers
VFIO_DEVICE_FEATURE_PCI_VF_TOKEN = 0
VFIO_DEVICE_FEATURE_MIGRATION = 1
VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE = 2
VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY = 3
VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP = 4
VFIO_DEVICE_FEATURE_LOW_POWER_EXIT = 5
VFIO_DEVICE_FEATURE_DMA_LOGGING_START = 6
VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP = 7
VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT = 8
VFIO_DEVICE_FEATURE_MIG_DATA_SIZE = 9
VFIO_DEVICE_FEATURE_BUS_MASTER = 10
VFIO_DEVICE_FEATURE_DMA_BUF = 11
VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 = 12

# Head; data is the feature's own structure.
vfio_device_feature = Layout("vfio_device_feature", 8, "0:u32 argsz; 4:u32 flags; 8:u8[] data")

# Sleep, and signal the eventfd on waking.
vfio_device_low_power_entry_with_wakeup = Layout("vfio_device_low_power_entry_with_wakeup", 8,
    "0:s32 wakeup_eventfd; 4:u32 reserved")

# Start logging: num_ranges records of the next structure at ranges.
vfio_device_feature_dma_logging_control = Layout("vfio_device_feature_dma_logging_control", 24,
    "0:u64 page_size; 8:u32 num_ranges; 12:u32 __reserved; 16:u64 ranges")

# Length bytes from iova.
vfio_device_feature_dma_logging_range = Layout("vfio_device_feature_dma_logging_range", 16,
    "0:u64 iova; 8:u64 length")

# Harvest length bytes from iova into bitmap, one bit for page_size bytes.
vfio_device_feature_dma_logging_report = Layout("vfio_device_feature_dma_logging_report", 32,
    "0:u64 iova; 8:u64 length; 16:u64 page_size; 24:u64 bitmap")

# vfio_device_feature_bus_master.op
VFIO_DEVICE_FEATURE_CLEAR_MASTER = 0
VFIO_DEVICE_FEATURE_SET_MASTER = 1

# Switch the device's DMA off or on.
vfio_device_feature_bus_master = Layout("vfio_device_feature_bus_master", 4, "0:u32 op")

# A part of a region to export.
vfio_region_dma_range = Layout("vfio_region_dma_range", 16, "0:u64 offset; 8:u64 length")

# Export parts of a region as a dma-buf; the call returns its fd.
vfio_device_feature_dma_buf = Layout("vfio_device_feature_dma_buf", 16,
    "0:u32 region_index; 4:u32 open_flags; 8:u32 flags; 12:u32 nr_ranges; 16:vfio_region_dma_range[] dma_ranges")


# Migration
# ---------

VFIO_MIG_GET_PRECOPY_INFO = io(VFIO_TYPE, VFIO_BASE + 21)

# vfio_device_feature_migration.flags
VFIO_MIGRATION_STOP_COPY = 1 << 0
VFIO_MIGRATION_P2P = 1 << 1
VFIO_MIGRATION_PRE_COPY = 1 << 2

# Which optional states the device has.
vfio_device_feature_migration = Layout("vfio_device_feature_migration", 8, "0:u64 flags")

# enum vfio_device_mig_state: vfio_device_feature_mig_state.device_state
VFIO_DEVICE_STATE_ERROR = 0
VFIO_DEVICE_STATE_STOP = 1
VFIO_DEVICE_STATE_RUNNING = 2
VFIO_DEVICE_STATE_STOP_COPY = 3
VFIO_DEVICE_STATE_RESUMING = 4
VFIO_DEVICE_STATE_RUNNING_P2P = 5
VFIO_DEVICE_STATE_PRE_COPY = 6
VFIO_DEVICE_STATE_PRE_COPY_P2P = 7
VFIO_DEVICE_STATE_NR = 8

# Set or get the state; a transition may hand out data_fd.
vfio_device_feature_mig_state = Layout("vfio_device_feature_mig_state", 8, "0:u32 device_state; 4:s32 data_fd")

# Estimated bytes of the stop-and-copy data.
vfio_device_feature_mig_data_size = Layout("vfio_device_feature_mig_data_size", 8, "0:u64 stop_copy_length")

# vfio_precopy_info.flags (out)
VFIO_PRECOPY_INFO_REINIT = 1 << 0

# Asked on the migration data fd, not on the device.
vfio_precopy_info = Layout("vfio_precopy_info", 24,
    "0:u32 argsz; 4:u32 flags; 8:u64 initial_bytes; 16:u64 dirty_bytes")

# the first migration protocol, a region: state bits of device_state
VFIO_DEVICE_STATE_V1_RUNNING = 1 << 0
VFIO_DEVICE_STATE_V1_SAVING = 1 << 1
VFIO_DEVICE_STATE_V1_RESUMING = 1 << 2
VFIO_DEVICE_STATE_V1_STOP = 0
VFIO_DEVICE_STATE_MASK = 0x7

# Registers at the start of that region.
vfio_device_migration_info = Layout("vfio_device_migration_info", 32,
    "0:u32 device_state; 4:u32 reserved; 8:u64 pending_bytes; 16:u64 data_offset; 24:u64 data_size")


# Device cdev: binding to iommufd
# -------------------------------

VFIO_DEVICE_BIND_IOMMUFD = io(VFIO_TYPE, VFIO_BASE + 18)
VFIO_DEVICE_ATTACH_IOMMUFD_PT = io(VFIO_TYPE, VFIO_BASE + 19)
VFIO_DEVICE_DETACH_IOMMUFD_PT = io(VFIO_TYPE, VFIO_BASE + 20)

VFIO_DEVICE_BIND_FLAG_TOKEN = 1 << 0

# Take the device for this iommufd; out_devid names it there.
vfio_device_bind_iommufd = Layout("vfio_device_bind_iommufd", 24,
    "0:u32 argsz; 4:u32 flags; 8:s32 iommufd; 12:u32 out_devid; 16:u64 token_uuid_ptr", older={
    "6.12": (16, "0:u32 argsz; 4:u32 flags; 8:s32 iommufd; 12:u32 out_devid"),
})

VFIO_DEVICE_ATTACH_PASID = 1 << 0

# Attach to an ioas or hwpt; returns the hwpt in pt_id.
vfio_device_attach_iommufd_pt = Layout("vfio_device_attach_iommufd_pt", 16,
    "0:u32 argsz; 4:u32 flags; 8:u32 pt_id; 12:u32 pasid", older={
    "6.12": (12, "0:u32 argsz; 4:u32 flags; 8:u32 pt_id"),
})

VFIO_DEVICE_DETACH_PASID = 1 << 0

# Detach, the whole device or one PASID.
vfio_device_detach_iommufd_pt = Layout("vfio_device_detach_iommufd_pt", 12,
    "0:u32 argsz; 4:u32 flags; 8:u32 pasid", older={
    "6.12": (8, "0:u32 argsz; 4:u32 flags"),
})


# The named enumerations, for turning numbers into names.
ENUMS = {
    "vfio_device_mig_state": {
        "VFIO_DEVICE_STATE_ERROR": VFIO_DEVICE_STATE_ERROR, "VFIO_DEVICE_STATE_STOP": VFIO_DEVICE_STATE_STOP,
        "VFIO_DEVICE_STATE_RUNNING": VFIO_DEVICE_STATE_RUNNING,
        "VFIO_DEVICE_STATE_STOP_COPY": VFIO_DEVICE_STATE_STOP_COPY,
        "VFIO_DEVICE_STATE_RESUMING": VFIO_DEVICE_STATE_RESUMING,
        "VFIO_DEVICE_STATE_RUNNING_P2P": VFIO_DEVICE_STATE_RUNNING_P2P,
        "VFIO_DEVICE_STATE_PRE_COPY": VFIO_DEVICE_STATE_PRE_COPY,
        "VFIO_DEVICE_STATE_PRE_COPY_P2P": VFIO_DEVICE_STATE_PRE_COPY_P2P,
        "VFIO_DEVICE_STATE_NR": VFIO_DEVICE_STATE_NR,
    },
}

# Counts that grew: the older values by the last kernel known to have them.
OLDER_VALUES = {"VFIO_AP_NUM_IRQS": {"6.12": 1}, "VFIO_CCW_NUM_IRQS": {"5.4": 1}}


def constant_at(name: str, kernel: str) -> int:
    """Return the value of a constant in ``kernel`` ("6.12"); KeyError for an unknown name."""
    return at_kernel(kernel, OLDER_VALUES.get(name, {}), globals()[name])
