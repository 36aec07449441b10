"""iommufd: objects behind /dev/iommu.

Every argument begins with its own size.  A kernel takes any size from ``Layout.minimum`` up, and wants 0 in what it
does not know (E2BIG).  Source: uapi sections 1 and 7.
"""
from .layout import Layout, io

IOMMUFD_TYPE = ord(";")


# Commands: numbers and ioctls
# ----------------------------

IOMMUFD_CMD_BASE = 128
IOMMUFD_CMD_DESTROY = 128
IOMMUFD_CMD_IOAS_ALLOC = 129
IOMMUFD_CMD_IOAS_ALLOW_IOVAS = 130
IOMMUFD_CMD_IOAS_COPY = 131
IOMMUFD_CMD_IOAS_IOVA_RANGES = 132
IOMMUFD_CMD_IOAS_MAP = 133
IOMMUFD_CMD_IOAS_UNMAP = 134
IOMMUFD_CMD_OPTION = 135
IOMMUFD_CMD_VFIO_IOAS = 136
IOMMUFD_CMD_HWPT_ALLOC = 137
IOMMUFD_CMD_GET_HW_INFO = 138
IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING = 139
IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP = 140
IOMMUFD_CMD_HWPT_INVALIDATE = 141
IOMMUFD_CMD_FAULT_QUEUE_ALLOC = 142
IOMMUFD_CMD_IOAS_MAP_FILE = 143
IOMMUFD_CMD_VIOMMU_ALLOC = 144
IOMMUFD_CMD_VDEVICE_ALLOC = 145
IOMMUFD_CMD_IOAS_CHANGE_PROCESS = 146
IOMMUFD_CMD_VEVENTQ_ALLOC = 147
IOMMUFD_CMD_HW_QUEUE_ALLOC = 148

IOMMU_DESTROY = io(IOMMUFD_TYPE, IOMMUFD_CMD_DESTROY)
IOMMU_IOAS_ALLOC = io(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_ALLOC)
IOMMU_IOAS_ALLOW_IOVAS = io(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_ALLOW_IOVAS)
IOMMU_IOAS_COPY = io(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_COPY)
IOMMU_IOAS_IOVA_RANGES = io(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_IOVA_RANGES)
IOMMU_IOAS_MAP = io(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_MAP)
IOMMU_IOAS_UNMAP = io(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_UNMAP)
IOMMU_OPTION = io(IOMMUFD_TYPE, IOMMUFD_CMD_OPTION)
IOMMU_VFIO_IOAS = io(IOMMUFD_TYPE, IOMMUFD_CMD_VFIO_IOAS)
IOMMU_HWPT_ALLOC = io(IOMMUFD_TYPE, IOMMUFD_CMD_HWPT_ALLOC)
IOMMU_GET_HW_INFO = io(IOMMUFD_TYPE, IOMMUFD_CMD_GET_HW_INFO)
IOMMU_HWPT_SET_DIRTY_TRACKING = io(IOMMUFD_TYPE, IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING)
IOMMU_HWPT_GET_DIRTY_BITMAP = io(IOMMUFD_TYPE, IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP)
IOMMU_HWPT_INVALIDATE = io(IOMMUFD_TYPE, IOMMUFD_CMD_HWPT_INVALIDATE)
IOMMU_FAULT_QUEUE_ALLOC = io(IOMMUFD_TYPE, IOMMUFD_CMD_FAULT_QUEUE_ALLOC)
IOMMU_IOAS_MAP_FILE = io(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_MAP_FILE)
IOMMU_VIOMMU_ALLOC = io(IOMMUFD_TYPE, IOMMUFD_CMD_VIOMMU_ALLOC)
IOMMU_VDEVICE_ALLOC = io(IOMMUFD_TYPE, IOMMUFD_CMD_VDEVICE_ALLOC)
IOMMU_IOAS_CHANGE_PROCESS = io(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_CHANGE_PROCESS)
IOMMU_VEVENTQ_ALLOC = io(IOMMUFD_TYPE, IOMMUFD_CMD_VEVENTQ_ALLOC)
IOMMU_HW_QUEUE_ALLOC = io(IOMMUFD_TYPE, IOMMUFD_CMD_HW_QUEUE_ALLOC)

# Free any object by id; EBUSY while something uses it.
iommu_destroy = Layout("iommu_destroy", 8, "0:u32 size; 4:u32 id")


# I/O address spaces
# ------------------

# A new, empty address space.
iommu_ioas_alloc = Layout("iommu_ioas_alloc", 12, "0:u32 size; 4:u32 flags; 8:u32 out_ioas_id")

# last is inclusive.
iommu_iova_range = Layout("iommu_iova_range", 16, "0:u64 start; 8:u64 last")

# Reports num_iovas ranges to allowed_iovas, and the alignment they ask for.
iommu_ioas_iova_ranges = Layout("iommu_ioas_iova_ranges", 32,
    "0:u32 size; 4:u32 ioas_id; 8:u32 num_iovas; 12:u32 __reserved; 16:u64 allowed_iovas; "
    "24:u64 out_iova_alignment")

# From now on allocate only inside these ranges.
iommu_ioas_allow_iovas = Layout("iommu_ioas_allow_iovas", 24,
    "0:u32 size; 4:u32 ioas_id; 8:u32 num_iovas; 12:u32 __reserved; 16:u64 allowed_iovas")

# enum iommufd_ioas_map_flags: flags of IOAS_MAP, IOAS_MAP_FILE and IOAS_COPY
IOMMU_IOAS_MAP_FIXED_IOVA = 1 << 0
IOMMU_IOAS_MAP_WRITEABLE = 1 << 1
IOMMU_IOAS_MAP_READABLE = 1 << 2

# Map length bytes at user_va; iova is chosen by the kernel unless fixed.
iommu_ioas_map = Layout("iommu_ioas_map", 40,
    "0:u32 size; 4:u32 flags; 8:u32 ioas_id; 12:u32 __reserved; 16:u64 user_va; 24:u64 length; 32:u64 iova")

# The same from offset start of a memfd or dma-buf; outlives the caller's mapping.
iommu_ioas_map_file = Layout("iommu_ioas_map_file", 40,
    "0:u32 size; 4:u32 flags; 8:u32 ioas_id; 12:s32 fd; 16:u64 start; 24:u64 length; 32:u64 iova")

# Map in one space what another maps already.
iommu_ioas_copy = Layout("iommu_ioas_copy", 40,
    "0:u32 size; 4:u32 flags; 8:u32 dst_ioas_id; 12:u32 src_ioas_id; 16:u64 length; 24:u64 dst_iova; "
    "32:u64 src_iova")

# iova 0 with length 2**64-1 unmaps all; length returns the bytes unmapped.
iommu_ioas_unmap = Layout("iommu_ioas_unmap", 24, "0:u32 size; 4:u32 ioas_id; 8:u64 iova; 16:u64 length")

# Move every file mapping's accounting to the calling process.
iommu_ioas_change_process = Layout("iommu_ioas_change_process", 8, "0:u32 size; 4:u32 __reserved")

# enum iommufd_option: iommu_option.option_id
IOMMU_OPTION_RLIMIT_MODE = 0
IOMMU_OPTION_HUGE_PAGES = 1

# enum iommufd_option_ops: iommu_option.op
IOMMU_OPTION_OP_SET = 0
IOMMU_OPTION_OP_GET = 1

# Read or set one option, of the context or of object_id.
iommu_option = Layout("iommu_option", 24,
    "0:u32 size; 4:u32 option_id; 8:u16 op; 10:u16 __reserved; 12:u32 object_id; 16:u64 val64")

# enum iommufd_vfio_ioas_op: iommu_vfio_ioas.op
IOMMU_VFIO_IOAS_GET = 0
IOMMU_VFIO_IOAS_SET = 1
IOMMU_VFIO_IOAS_CLEAR = 2

# Which address space stands behind the VFIO compatibility ioctls.
iommu_vfio_ioas = Layout("iommu_vfio_ioas", 12, "0:u32 size; 4:u32 ioas_id; 8:u16 op; 10:u16 __reserved")


# Hardware information
# --------------------

# enum iommu_hw_info_type: in_data_type and out_data_type of GET_HW_INFO
IOMMU_HW_INFO_TYPE_NONE = 0
IOMMU_HW_INFO_TYPE_INTEL_VTD = 1
IOMMU_HW_INFO_TYPE_DEFAULT = 0
IOMMU_HW_INFO_TYPE_ARM_SMMUV3 = 2
IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV = 3
IOMMU_HW_INFO_TYPE_AMD = 4

# enum iommufd_hw_info_flags: iommu_hw_info.flags
IOMMU_HW_INFO_FLAG_INPUT_TYPE = 1 << 0

# enum iommufd_hw_capabilities: iommu_hw_info.out_capabilities
IOMMU_HW_CAP_DIRTY_TRACKING = 1 << 0
IOMMU_HW_CAP_PCI_PASID_EXEC = 1 << 1
IOMMU_HW_CAP_PCI_PASID_PRIV = 1 << 2
IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED = 1 << 3

# Describes the IOMMU in front of dev_id; data_uptr gets the vendor's structure.
iommu_hw_info = Layout("iommu_hw_info", 40,
    "0:u32 size; 4:u32 flags; 8:u32 dev_id; 12:u32 data_len; 16:u64 data_uptr; 24:|u32 in_data_type; "
    "24:|u32 out_data_type; 28:u8 out_max_pasid_log2; 29:u8[3] __reserved; 32:u64 out_capabilities", minimum=32, older={
    "6.12": (40,
        "0:u32 size; 4:u32 flags; 8:u32 dev_id; 12:u32 data_len; 16:u64 data_uptr; 24:u32 out_data_type; "
        "28:u8 out_max_pasid_log2; 29:u8[3] __reserved; 32:u64 out_capabilities"),
})

# enum iommu_hw_info_vtd_flags: iommu_hw_info_vtd.flags
IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17 = 1 << 0

# Intel VT-d registers.
iommu_hw_info_vtd = Layout("iommu_hw_info_vtd", 24, "0:u32 flags; 4:u32 __reserved; 8:u64 cap_reg; 16:u64 ecap_reg")

# Arm SMMUv3 id registers.
iommu_hw_info_arm_smmuv3 = Layout("iommu_hw_info_arm_smmuv3", 40,
    "0:u32 flags; 4:u32 __reserved; 8:u32[6] idr; 32:u32 iidr; 36:u32 aidr")

# NVIDIA Tegra241 command queue virtualisation.
iommu_hw_info_tegra241_cmdqv = Layout("iommu_hw_info_tegra241_cmdqv", 8,
    "0:u32 flags; 4:u8 version; 5:u8 log2vcmdqs; 6:u8 log2vsids; 7:u8 __reserved")

# AMD extended feature registers.
iommu_hw_info_amd = Layout("iommu_hw_info_amd", 16, "0:u64 efr; 8:u64 efr2")


# Page tables of the hardware
# ---------------------------

# enum iommufd_hwpt_alloc_flags: iommu_hwpt_alloc.flags
IOMMU_HWPT_ALLOC_NEST_PARENT = 1 << 0
IOMMU_HWPT_ALLOC_DIRTY_TRACKING = 1 << 1
IOMMU_HWPT_FAULT_ID_VALID = 1 << 2
IOMMU_HWPT_ALLOC_PASID = 1 << 3

# enum iommu_hwpt_data_type: iommu_hwpt_alloc.data_type
IOMMU_HWPT_DATA_NONE = 0
IOMMU_HWPT_DATA_VTD_S1 = 1
IOMMU_HWPT_DATA_ARM_SMMUV3 = 2
IOMMU_HWPT_DATA_AMD_GUEST = 3

# pt_id is an ioas, or a parent page table for nesting.
iommu_hwpt_alloc = Layout("iommu_hwpt_alloc", 48,
    "0:u32 size; 4:u32 flags; 8:u32 dev_id; 12:u32 pt_id; 16:u32 out_hwpt_id; 20:u32 __reserved; "
    "24:u32 data_type; 28:u32 data_len; 32:u64 data_uptr; 40:u32 fault_id; 44:u32 __reserved2", minimum=24)

# enum iommu_hwpt_vtd_s1_flags: iommu_hwpt_vtd_s1.flags
IOMMU_VTD_S1_SRE = 1 << 0
IOMMU_VTD_S1_EAFE = 1 << 1
IOMMU_VTD_S1_WPE = 1 << 2

# VT-d first stage of a guest.
iommu_hwpt_vtd_s1 = Layout("iommu_hwpt_vtd_s1", 24,
    "0:u64 flags; 8:u64 pgtbl_addr; 16:u32 addr_width; 20:u32 __reserved")

# The two words of a guest's stream table entry that count.
iommu_hwpt_arm_smmuv3 = Layout("iommu_hwpt_arm_smmuv3", 16, "0:le64[2] ste")

# The guest's device table entry.
iommu_hwpt_amd_guest = Layout("iommu_hwpt_amd_guest", 32, "0:u64[4] dte")


# Dirty tracking of a page table
# ------------------------------

# enum iommufd_hwpt_set_dirty_tracking_flags: iommu_hwpt_set_dirty_tracking.flags
IOMMU_HWPT_DIRTY_TRACKING_ENABLE = 1 << 0

# Switch it on or off.
iommu_hwpt_set_dirty_tracking = Layout("iommu_hwpt_set_dirty_tracking", 16,
    "0:u32 size; 4:u32 flags; 8:u32 hwpt_id; 12:u32 __reserved")

# enum iommufd_hwpt_get_dirty_bitmap_flags: iommu_hwpt_get_dirty_bitmap.flags
IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR = 1 << 0

# Harvest length bytes from iova into data, one bit for page_size bytes.
iommu_hwpt_get_dirty_bitmap = Layout("iommu_hwpt_get_dirty_bitmap", 48,
    "0:u32 size; 4:u32 hwpt_id; 8:u32 flags; 12:u32 __reserved; 16:u64 iova; 24:u64 length; 32:u64 page_size; "
    "40:u64 data")


# Invalidation of a guest's first stage
# -------------------------------------

# enum iommu_hwpt_invalidate_data_type: iommu_hwpt_invalidate.data_type
IOMMU_HWPT_INVALIDATE_DATA_VTD_S1 = 0
IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3 = 1

# entry_num records of entry_len bytes; returns how many were done.
iommu_hwpt_invalidate = Layout("iommu_hwpt_invalidate", 32,
    "0:u32 size; 4:u32 hwpt_id; 8:u64 data_uptr; 16:u32 data_type; 20:u32 entry_len; 24:u32 entry_num; "
    "28:u32 __reserved")

# enum iommu_hwpt_vtd_s1_invalidate_flags: iommu_hwpt_vtd_s1_invalidate.flags
IOMMU_VTD_INV_FLAGS_LEAF = 1 << 0

# npages 2**64-1 from addr 0 means everything.
iommu_hwpt_vtd_s1_invalidate = Layout("iommu_hwpt_vtd_s1_invalidate", 24,
    "0:u64 addr; 8:u64 npages; 16:u32 flags; 20:u32 __reserved")

# A command as the guest queued it.
iommu_viommu_arm_smmuv3_invalidate = Layout("iommu_viommu_arm_smmuv3_invalidate", 16, "0:le64[2] cmd")


# Page faults
# -----------

# A queue read as iommu_hwpt_pgfault and answered by writing iommu_hwpt_page_response.
iommu_fault_alloc = Layout("iommu_fault_alloc", 16,
    "0:u32 size; 4:u32 flags; 8:u32 out_fault_id; 12:u32 out_fault_fd")

# enum iommu_hwpt_pgfault_flags: iommu_hwpt_pgfault.flags
IOMMU_PGFAULT_FLAGS_PASID_VALID = 1 << 0
IOMMU_PGFAULT_FLAGS_LAST_PAGE = 1 << 1

# enum iommu_hwpt_pgfault_perm: iommu_hwpt_pgfault.perm
IOMMU_PGFAULT_PERM_READ = 1 << 0
IOMMU_PGFAULT_PERM_WRITE = 1 << 1
IOMMU_PGFAULT_PERM_EXEC = 1 << 2
IOMMU_PGFAULT_PERM_PRIV = 1 << 3

# cookie goes back in the answer.
iommu_hwpt_pgfault = Layout("iommu_hwpt_pgfault", 40,
    "0:u32 flags; 4:u32 dev_id; 8:u32 pasid; 12:u32 grpid; 16:u32 perm; 20:u32 __reserved; 24:u64 addr; "
    "32:u32 length; 36:u32 cookie")

# enum iommufd_page_response_code: iommu_hwpt_page_response.code
IOMMUFD_PAGE_RESP_SUCCESS = 0
IOMMUFD_PAGE_RESP_INVALID = 1

# Answers the whole group of cookie.
iommu_hwpt_page_response = Layout("iommu_hwpt_page_response", 8, "0:u32 cookie; 4:u32 code")


# Virtual IOMMUs: their devices, events and queues
# ------------------------------------------------

# enum iommu_viommu_type: iommu_viommu_alloc.type
IOMMU_VIOMMU_TYPE_DEFAULT = 0
IOMMU_VIOMMU_TYPE_ARM_SMMUV3 = 1
IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV = 2

# A slice of the IOMMU for one guest, on a nesting parent.
iommu_viommu_alloc = Layout("iommu_viommu_alloc", 40,
    "0:u32 size; 4:u32 flags; 8:u32 type; 12:u32 dev_id; 16:u32 hwpt_id; 20:u32 out_viommu_id; 24:u32 data_len; "
    "28:u32 __reserved; 32:u64 data_uptr", minimum=24)

# Where to mmap the guest's command queue page.
iommu_viommu_tegra241_cmdqv = Layout("iommu_viommu_tegra241_cmdqv", 16,
    "0:u64 out_vintf_mmap_offset; 8:u64 out_vintf_mmap_length")

# The guest's name (virt_id) for a device.
iommu_vdevice_alloc = Layout("iommu_vdevice_alloc", 24,
    "0:u32 size; 4:u32 viommu_id; 8:u32 dev_id; 12:u32 out_vdevice_id; 16:u64 virt_id")

# enum iommu_veventq_flag: iommufd_vevent_header.flags
IOMMU_VEVENTQ_FLAG_LOST_EVENTS = 1 << 0

# enum iommu_veventq_type: iommu_veventq_alloc.type
IOMMU_VEVENTQ_TYPE_DEFAULT = 0
IOMMU_VEVENTQ_TYPE_ARM_SMMUV3 = 1
IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV = 2

# A queue of hardware events for the guest.
iommu_veventq_alloc = Layout("iommu_veventq_alloc", 32,
    "0:u32 size; 4:u32 flags; 8:u32 viommu_id; 12:u32 type; 16:u32 veventq_depth; 20:u32 out_veventq_id; "
    "24:u32 out_veventq_fd; 28:u32 __reserved", minimum=28)

# In front of each event read; a gap in sequence is a loss.
iommufd_vevent_header = Layout("iommufd_vevent_header", 8, "0:u32 flags; 4:u32 sequence")

# The event record, with the guest's stream id.
iommu_vevent_arm_smmuv3 = Layout("iommu_vevent_arm_smmuv3", 32, "0:le64[4] evt")

# Error bits of the guest's queues.
iommu_vevent_tegra241_cmdqv = Layout("iommu_vevent_tegra241_cmdqv", 16, "0:le64[2] lvcmdq_err_map")

# enum iommu_hw_queue_type: iommu_hw_queue_alloc.type
IOMMU_HW_QUEUE_TYPE_DEFAULT = 0
IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV = 1

# A queue in guest memory that the hardware reads by itself.
iommu_hw_queue_alloc = Layout("iommu_hw_queue_alloc", 40,
    "0:u32 size; 4:u32 flags; 8:u32 viommu_id; 12:u32 type; 16:u32 index; 20:u32 out_hw_queue_id; "
    "24:u64 nesting_parent_iova; 32:u64 length")


# The named enumerations, for turning numbers into names.
ENUMS = {
    "iommufd_ioas_map_flags": {
        "IOMMU_IOAS_MAP_FIXED_IOVA": IOMMU_IOAS_MAP_FIXED_IOVA, "IOMMU_IOAS_MAP_WRITEABLE": IOMMU_IOAS_MAP_WRITEABLE,
        "IOMMU_IOAS_MAP_READABLE": IOMMU_IOAS_MAP_READABLE,
    },
    "iommufd_option": {
        "IOMMU_OPTION_RLIMIT_MODE": IOMMU_OPTION_RLIMIT_MODE, "IOMMU_OPTION_HUGE_PAGES": IOMMU_OPTION_HUGE_PAGES,
    },
    "iommufd_option_ops": {
        "IOMMU_OPTION_OP_SET": IOMMU_OPTION_OP_SET, "IOMMU_OPTION_OP_GET": IOMMU_OPTION_OP_GET,
    },
    "iommufd_vfio_ioas_op": {
        "IOMMU_VFIO_IOAS_GET": IOMMU_VFIO_IOAS_GET, "IOMMU_VFIO_IOAS_SET": IOMMU_VFIO_IOAS_SET,
        "IOMMU_VFIO_IOAS_CLEAR": IOMMU_VFIO_IOAS_CLEAR,
    },
    "iommu_hw_info_type": {
        "IOMMU_HW_INFO_TYPE_NONE": IOMMU_HW_INFO_TYPE_NONE,
        "IOMMU_HW_INFO_TYPE_INTEL_VTD": IOMMU_HW_INFO_TYPE_INTEL_VTD,
        "IOMMU_HW_INFO_TYPE_DEFAULT": IOMMU_HW_INFO_TYPE_DEFAULT,
        "IOMMU_HW_INFO_TYPE_ARM_SMMUV3": IOMMU_HW_INFO_TYPE_ARM_SMMUV3,
        "IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV": IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV,
        "IOMMU_HW_INFO_TYPE_AMD": IOMMU_HW_INFO_TYPE_AMD,
    },
    "iommufd_hw_info_flags": {
        "IOMMU_HW_INFO_FLAG_INPUT_TYPE": IOMMU_HW_INFO_FLAG_INPUT_TYPE,
    },
    "iommufd_hw_capabilities": {
        "IOMMU_HW_CAP_DIRTY_TRACKING": IOMMU_HW_CAP_DIRTY_TRACKING,
        "IOMMU_HW_CAP_PCI_PASID_EXEC": IOMMU_HW_CAP_PCI_PASID_EXEC,
        "IOMMU_HW_CAP_PCI_PASID_PRIV": IOMMU_HW_CAP_PCI_PASID_PRIV,
        "IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED": IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED,
    },
    "iommu_hw_info_vtd_flags": {
        "IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17": IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17,
    },
    "iommufd_hwpt_alloc_flags": {
        "IOMMU_HWPT_ALLOC_NEST_PARENT": IOMMU_HWPT_ALLOC_NEST_PARENT,
        "IOMMU_HWPT_ALLOC_DIRTY_TRACKING": IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
        "IOMMU_HWPT_FAULT_ID_VALID": IOMMU_HWPT_FAULT_ID_VALID, "IOMMU_HWPT_ALLOC_PASID": IOMMU_HWPT_ALLOC_PASID,
    },
    "iommu_hwpt_data_type": {
        "IOMMU_HWPT_DATA_NONE": IOMMU_HWPT_DATA_NONE, "IOMMU_HWPT_DATA_VTD_S1": IOMMU_HWPT_DATA_VTD_S1,
        "IOMMU_HWPT_DATA_ARM_SMMUV3": IOMMU_HWPT_DATA_ARM_SMMUV3,
        "IOMMU_HWPT_DATA_AMD_GUEST": IOMMU_HWPT_DATA_AMD_GUEST,
    },
    "iommu_hwpt_vtd_s1_flags": {
        "IOMMU_VTD_S1_SRE": IOMMU_VTD_S1_SRE, "IOMMU_VTD_S1_EAFE": IOMMU_VTD_S1_EAFE,
        "IOMMU_VTD_S1_WPE": IOMMU_VTD_S1_WPE,
    },
    "iommufd_hwpt_set_dirty_tracking_flags": {
        "IOMMU_HWPT_DIRTY_TRACKING_ENABLE": IOMMU_HWPT_DIRTY_TRACKING_ENABLE,
    },
    "iommufd_hwpt_get_dirty_bitmap_flags": {
        "IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR": IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
    },
    "iommu_hwpt_invalidate_data_type": {
        "IOMMU_HWPT_INVALIDATE_DATA_VTD_S1": IOMMU_HWPT_INVALIDATE_DATA_VTD_S1,
        "IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3": IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3,
    },
    "iommu_hwpt_vtd_s1_invalidate_flags": {
        "IOMMU_VTD_INV_FLAGS_LEAF": IOMMU_VTD_INV_FLAGS_LEAF,
    },
    "iommu_hwpt_pgfault_flags": {
        "IOMMU_PGFAULT_FLAGS_PASID_VALID": IOMMU_PGFAULT_FLAGS_PASID_VALID,
        "IOMMU_PGFAULT_FLAGS_LAST_PAGE": IOMMU_PGFAULT_FLAGS_LAST_PAGE,
    },
    "iommu_hwpt_pgfault_perm": {
        "IOMMU_PGFAULT_PERM_READ": IOMMU_PGFAULT_PERM_READ, "IOMMU_PGFAULT_PERM_WRITE": IOMMU_PGFAULT_PERM_WRITE,
        "IOMMU_PGFAULT_PERM_EXEC": IOMMU_PGFAULT_PERM_EXEC, "IOMMU_PGFAULT_PERM_PRIV": IOMMU_PGFAULT_PERM_PRIV,
    },
    "iommufd_page_response_code": {
        "IOMMUFD_PAGE_RESP_SUCCESS": IOMMUFD_PAGE_RESP_SUCCESS,
        "IOMMUFD_PAGE_RESP_INVALID": IOMMUFD_PAGE_RESP_INVALID,
    },
    "iommu_viommu_type": {
        "IOMMU_VIOMMU_TYPE_DEFAULT": IOMMU_VIOMMU_TYPE_DEFAULT,
        "IOMMU_VIOMMU_TYPE_ARM_SMMUV3": IOMMU_VIOMMU_TYPE_ARM_SMMUV3,
        "IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV": IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV,
    },
    "iommu_veventq_flag": {
        "IOMMU_VEVENTQ_FLAG_LOST_EVENTS": IOMMU_VEVENTQ_FLAG_LOST_EVENTS,
    },
    "iommu_veventq_type": {
        "IOMMU_VEVENTQ_TYPE_DEFAULT": IOMMU_VEVENTQ_TYPE_DEFAULT,
        "IOMMU_VEVENTQ_TYPE_ARM_SMMUV3": IOMMU_VEVENTQ_TYPE_ARM_SMMUV3,
        "IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV": IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV,
    },
    "iommu_hw_queue_type": {
        "IOMMU_HW_QUEUE_TYPE_DEFAULT": IOMMU_HW_QUEUE_TYPE_DEFAULT,
        "IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV": IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV,
    },
}
