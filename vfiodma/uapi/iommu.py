"""The first user-visible IOMMU interface: nested translation of the vSVA series.

Linux 6.1 still has the fault part; iommufd replaces it.  Source: uapi section 3.
"""
from .layout import Layout

# Nesting: what the hardware offers
# ---------------------------------

# iommu_nesting_info.features
IOMMU_NESTING_FEAT_BIND_PGTBL = 1 << 0
IOMMU_NESTING_FEAT_CACHE_INVLD = 1 << 1

# page table formats; LAST is one past the newest
IOMMU_PASID_FORMAT_INTEL_VTD = 1
IOMMU_PASID_FORMAT_LAST = 2

# VT-d: capability registers that a guest may rely on.
iommu_nesting_info_vtd = Layout("iommu_nesting_info_vtd", 32,
    "0:u32 flags; 4:u8[12] padding; 16:u64 cap_reg; 24:u64 ecap_reg")

# Format, features, address width and PASID bits of the first stage.
iommu_nesting_info = Layout("iommu_nesting_info", 64,
    "0:u32 argsz; 4:u32 flags; 8:u32 format; 12:u32 features; 16:u16 addr_width; 18:u16 pasid_bits; "
    "20:u8[12] padding; 32:union vendor; 32:|iommu_nesting_info_vtd vendor.vtd")


# Binding a guest's page table to a PASID
# ---------------------------------------

IOMMU_GPASID_BIND_VERSION_1 = 1

# iommu_gpasid_bind_data.flags
IOMMU_SVA_GPASID_VAL = 1 << 0

# iommu_gpasid_bind_data_vtd.flags
IOMMU_SVA_VTD_GPASID_SRE = 1 << 0
IOMMU_SVA_VTD_GPASID_EAFE = 1 << 1
IOMMU_SVA_VTD_GPASID_PCD = 1 << 2
IOMMU_SVA_VTD_GPASID_PWT = 1 << 3
IOMMU_SVA_VTD_GPASID_EMTE = 1 << 4
IOMMU_SVA_VTD_GPASID_CD = 1 << 5
IOMMU_SVA_VTD_GPASID_LAST = 1 << 6
IOMMU_SVA_VTD_GPASID_MTS_MASK = 0x3c

# VT-d: memory type settings of the entry.
iommu_gpasid_bind_data_vtd = Layout("iommu_gpasid_bind_data_vtd", 16, "0:u64 flags; 8:u32 pat; 12:u32 emt")

# gpgd is the guest-physical root of the table; hpasid the PASID really used.
iommu_gpasid_bind_data = Layout("iommu_gpasid_bind_data", 72,
    "0:u32 argsz; 4:u32 version; 8:u32 format; 12:u32 addr_width; 16:u64 flags; 24:u64 gpgd; 32:u64 hpasid; "
    "40:u64 gpasid; 48:u8[8] padding; 56:union vendor; 56:|iommu_gpasid_bind_data_vtd vendor.vtd")


# Invalidating first-stage caches
# -------------------------------

IOMMU_CACHE_INVALIDATE_INFO_VERSION_1 = 1

# iommu_cache_invalidate_info.cache, a mask
IOMMU_CACHE_INV_TYPE_IOTLB = 1 << 0
IOMMU_CACHE_INV_TYPE_DEV_IOTLB = 1 << 1
IOMMU_CACHE_INV_TYPE_PASID = 1 << 2
IOMMU_CACHE_INV_TYPE_NR = 3

# enum iommu_inv_granularity: iommu_cache_invalidate_info.granularity
IOMMU_INV_GRANU_DOMAIN = 0
IOMMU_INV_GRANU_PASID = 1
IOMMU_INV_GRANU_ADDR = 2
IOMMU_INV_GRANU_NR = 3

# iommu_inv_addr_info.flags
IOMMU_INV_ADDR_FLAGS_PASID = 1 << 0
IOMMU_INV_ADDR_FLAGS_ARCHID = 1 << 1
IOMMU_INV_ADDR_FLAGS_LEAF = 1 << 2

# nb_granules blocks of granule_size bytes from addr.
iommu_inv_addr_info = Layout("iommu_inv_addr_info", 40,
    "0:u32 flags; 4:u32 archid; 8:u64 pasid; 16:u64 addr; 24:u64 granule_size; 32:u64 nb_granules")

# iommu_inv_pasid_info.flags
IOMMU_INV_PASID_FLAGS_PASID = 1 << 0
IOMMU_INV_PASID_FLAGS_ARCHID = 1 << 1

# Everything of one PASID or architecture id.
iommu_inv_pasid_info = Layout("iommu_inv_pasid_info", 16, "0:u32 flags; 4:u32 archid; 8:u64 pasid")

# granularity tells which member of granu counts.
iommu_cache_invalidate_info = Layout("iommu_cache_invalidate_info", 56,
    "0:u32 argsz; 4:u32 version; 8:u8 cache; 9:u8 granularity; 10:u8[6] padding; 16:union granu; "
    "16:|iommu_inv_pasid_info granu.pasid_info; 16:|iommu_inv_addr_info granu.addr_info")


# Faults and page requests
# ------------------------

# access that was tried (perm)
IOMMU_FAULT_PERM_READ = 1 << 0
IOMMU_FAULT_PERM_WRITE = 1 << 1
IOMMU_FAULT_PERM_EXEC = 1 << 2
IOMMU_FAULT_PERM_PRIV = 1 << 3

# enum iommu_fault_type: iommu_fault.type
IOMMU_FAULT_DMA_UNRECOV = 1
IOMMU_FAULT_PAGE_REQ = 2

# enum iommu_fault_reason: iommu_fault_unrecoverable.reason
IOMMU_FAULT_REASON_UNKNOWN = 0
IOMMU_FAULT_REASON_PASID_FETCH = 1
IOMMU_FAULT_REASON_BAD_PASID_ENTRY = 2
IOMMU_FAULT_REASON_PASID_INVALID = 3
IOMMU_FAULT_REASON_WALK_EABT = 4
IOMMU_FAULT_REASON_PTE_FETCH = 5
IOMMU_FAULT_REASON_PERMISSION = 6
IOMMU_FAULT_REASON_ACCESS = 7
IOMMU_FAULT_REASON_OOR_ADDRESS = 8

# iommu_fault_unrecoverable.flags
IOMMU_FAULT_UNRECOV_PASID_VALID = 1 << 0
IOMMU_FAULT_UNRECOV_ADDR_VALID = 1 << 1
IOMMU_FAULT_UNRECOV_FETCH_ADDR_VALID = 1 << 2

# Nobody can repair this one; fetch_addr is where a table walk failed.
iommu_fault_unrecoverable = Layout("iommu_fault_unrecoverable", 32,
    "0:u32 reason; 4:u32 flags; 8:u32 pasid; 12:u32 perm; 16:u64 addr; 24:u64 fetch_addr")

# iommu_fault_page_request.flags
IOMMU_FAULT_PAGE_REQUEST_PASID_VALID = 1 << 0
IOMMU_FAULT_PAGE_REQUEST_LAST_PAGE = 1 << 1
IOMMU_FAULT_PAGE_REQUEST_PRIV_DATA = 1 << 2
IOMMU_FAULT_PAGE_RESPONSE_NEEDS_PASID = 1 << 3

# The device waits for an answer; grpid ties the requests of a group together.
iommu_fault_page_request = Layout("iommu_fault_page_request", 40,
    "0:u32 flags; 4:u32 pasid; 8:u32 grpid; 12:u32 perm; 16:u64 addr; 24:u64[2] private_data")

# One record of the fault queue.
iommu_fault = Layout("iommu_fault", 64,
    "0:u32 type; 4:u32 padding; 8:|iommu_fault_unrecoverable event; 8:|iommu_fault_page_request prm; "
    "8:|u8[56] padding2")

# the answer
IOMMU_PAGE_RESP_VERSION_1 = 1
IOMMU_PAGE_RESP_PASID_VALID = 1 << 0

# enum iommu_page_response_code: iommu_page_response.code
IOMMU_PAGE_RESP_SUCCESS = 0
IOMMU_PAGE_RESP_INVALID = 1
IOMMU_PAGE_RESP_FAILURE = 2

# Answers every request of grpid.
iommu_page_response = Layout("iommu_page_response", 24,
    "0:u32 argsz; 4:u32 version; 8:u32 flags; 12:u32 pasid; 16:u32 grpid; 20:u32 code")


# The named enumerations, for turning numbers into names.
ENUMS = {
    "iommu_inv_granularity": {
        "IOMMU_INV_GRANU_DOMAIN": IOMMU_INV_GRANU_DOMAIN, "IOMMU_INV_GRANU_PASID": IOMMU_INV_GRANU_PASID,
        "IOMMU_INV_GRANU_ADDR": IOMMU_INV_GRANU_ADDR, "IOMMU_INV_GRANU_NR": IOMMU_INV_GRANU_NR,
    },
    "iommu_fault_type": {
        "IOMMU_FAULT_DMA_UNRECOV": IOMMU_FAULT_DMA_UNRECOV, "IOMMU_FAULT_PAGE_REQ": IOMMU_FAULT_PAGE_REQ,
    },
    "iommu_fault_reason": {
        "IOMMU_FAULT_REASON_UNKNOWN": IOMMU_FAULT_REASON_UNKNOWN,
        "IOMMU_FAULT_REASON_PASID_FETCH": IOMMU_FAULT_REASON_PASID_FETCH,
        "IOMMU_FAULT_REASON_BAD_PASID_ENTRY": IOMMU_FAULT_REASON_BAD_PASID_ENTRY,
        "IOMMU_FAULT_REASON_PASID_INVALID": IOMMU_FAULT_REASON_PASID_INVALID,
        "IOMMU_FAULT_REASON_WALK_EABT": IOMMU_FAULT_REASON_WALK_EABT,
        "IOMMU_FAULT_REASON_PTE_FETCH": IOMMU_FAULT_REASON_PTE_FETCH,
        "IOMMU_FAULT_REASON_PERMISSION": IOMMU_FAULT_REASON_PERMISSION,
        "IOMMU_FAULT_REASON_ACCESS": IOMMU_FAULT_REASON_ACCESS,
        "IOMMU_FAULT_REASON_OOR_ADDRESS": IOMMU_FAULT_REASON_OOR_ADDRESS,
    },
    "iommu_page_response_code": {
        "IOMMU_PAGE_RESP_SUCCESS": IOMMU_PAGE_RESP_SUCCESS, "IOMMU_PAGE_RESP_INVALID": IOMMU_PAGE_RESP_INVALID,
        "IOMMU_PAGE_RESP_FAILURE": IOMMU_PAGE_RESP_FAILURE,
    },
}
