/* The first user-visible IOMMU interface: nested translation of the vSVA series.  Linux 6.1 still has its fault part;
   iommufd.h replaces it. */
#ifndef UAPI_IOMMU_H
#define UAPI_IOMMU_H

#include "layout.h"

/* ---- Nesting: what the hardware offers ---- */

/* iommu_nesting_info.features */
enum {
    UAPI_IOMMU_NESTING_FEAT_BIND_PGTBL = 1 << 0,
    UAPI_IOMMU_NESTING_FEAT_CACHE_INVLD = 1 << 1,
};

/* page table formats; LAST is one past the newest */
enum {
    UAPI_IOMMU_PASID_FORMAT_INTEL_VTD = 1,
    UAPI_IOMMU_PASID_FORMAT_LAST = 2,
};

/* VT-d: capability registers that a guest may rely on. */
struct uapi_iommu_nesting_info_vtd {
    uint32_t flags;
    uint8_t padding[12];
    uint64_t cap_reg, ecap_reg;
};
UAPI_LAYOUT(iommu_nesting_info_vtd, 32, flags, 0, padding, 4, cap_reg, 16, ecap_reg, 24);

/* Format, features, address width and PASID bits of the first stage. */
struct uapi_iommu_nesting_info {
    uint32_t argsz, flags, format, features;
    uint16_t addr_width, pasid_bits;
    uint8_t padding[12];
    union {
        struct uapi_iommu_nesting_info_vtd vtd;
    } vendor;
};
UAPI_LAYOUT(iommu_nesting_info, 64, argsz, 0, flags, 4, format, 8, features, 12, addr_width, 16, pasid_bits, 18,
            padding, 20, vendor, 32, vendor.vtd, 32);

/* ---- Binding a guest's page table to a PASID ---- */

enum {
    UAPI_IOMMU_GPASID_BIND_VERSION_1 = 1,
};

/* iommu_gpasid_bind_data.flags */
enum {
    UAPI_IOMMU_SVA_GPASID_VAL = 1 << 0,
};

/* iommu_gpasid_bind_data_vtd.flags */
enum {
    UAPI_IOMMU_SVA_VTD_GPASID_SRE = 1 << 0,
    UAPI_IOMMU_SVA_VTD_GPASID_EAFE = 1 << 1,
    UAPI_IOMMU_SVA_VTD_GPASID_PCD = 1 << 2,
    UAPI_IOMMU_SVA_VTD_GPASID_PWT = 1 << 3,
    UAPI_IOMMU_SVA_VTD_GPASID_EMTE = 1 << 4,
    UAPI_IOMMU_SVA_VTD_GPASID_CD = 1 << 5,
    UAPI_IOMMU_SVA_VTD_GPASID_LAST = 1 << 6,
    UAPI_IOMMU_SVA_VTD_GPASID_MTS_MASK = 0x3c,
};

/* VT-d: memory type settings of the entry. */
struct uapi_iommu_gpasid_bind_data_vtd {
    uint64_t flags;
    uint32_t pat, emt;
};
UAPI_LAYOUT(iommu_gpasid_bind_data_vtd, 16, flags, 0, pat, 8, emt, 12);

/* gpgd is the guest-physical root of the table; hpasid the PASID really used. */
struct uapi_iommu_gpasid_bind_data {
    uint32_t argsz, version, format, addr_width;
    uint64_t flags, gpgd, hpasid, gpasid;
    uint8_t padding[8];
    union {
        struct uapi_iommu_gpasid_bind_data_vtd vtd;
    } vendor;
};
UAPI_LAYOUT(iommu_gpasid_bind_data, 72, argsz, 0, version, 4, format, 8, addr_width, 12, flags, 16, gpgd, 24,
            hpasid, 32, gpasid, 40, padding, 48, vendor, 56, vendor.vtd, 56);

/* ---- Invalidating first-stage caches ---- */

enum {
    UAPI_IOMMU_CACHE_INVALIDATE_INFO_VERSION_1 = 1,
};

/* iommu_cache_invalidate_info.cache, a mask */
enum {
    UAPI_IOMMU_CACHE_INV_TYPE_IOTLB = 1 << 0,
    UAPI_IOMMU_CACHE_INV_TYPE_DEV_IOTLB = 1 << 1,
    UAPI_IOMMU_CACHE_INV_TYPE_PASID = 1 << 2,
    UAPI_IOMMU_CACHE_INV_TYPE_NR = 3,
};

/* iommu_cache_invalidate_info.granularity */
enum uapi_iommu_inv_granularity {
    UAPI_IOMMU_INV_GRANU_DOMAIN = 0,
    UAPI_IOMMU_INV_GRANU_PASID = 1,
    UAPI_IOMMU_INV_GRANU_ADDR = 2,
    UAPI_IOMMU_INV_GRANU_NR = 3,
};

/* iommu_inv_addr_info.flags */
enum {
    UAPI_IOMMU_INV_ADDR_FLAGS_PASID = 1 << 0,
    UAPI_IOMMU_INV_ADDR_FLAGS_ARCHID = 1 << 1,
    UAPI_IOMMU_INV_ADDR_FLAGS_LEAF = 1 << 2,
};

/* nb_granules blocks of granule_size bytes from addr. */
struct uapi_iommu_inv_addr_info {
    uint32_t flags, archid;
    uint64_t pasid, addr, granule_size, nb_granules;
};
UAPI_LAYOUT(iommu_inv_addr_info, 40, flags, 0, archid, 4, pasid, 8, addr, 16, granule_size, 24, nb_granules, 32);

/* iommu_inv_pasid_info.flags */
enum {
    UAPI_IOMMU_INV_PASID_FLAGS_PASID = 1 << 0,
    UAPI_IOMMU_INV_PASID_FLAGS_ARCHID = 1 << 1,
};

/* Everything of one PASID or architecture id. */
struct uapi_iommu_inv_pasid_info {
    uint32_t flags, archid;
    uint64_t pasid;
};
UAPI_LAYOUT(iommu_inv_pasid_info, 16, flags, 0, archid, 4, pasid, 8);

/* granularity tells which member of granu counts. */
struct uapi_iommu_cache_invalidate_info {
    uint32_t argsz, version;
    uint8_t cache, granularity, padding[6];
    union {
        struct uapi_iommu_inv_pasid_info pasid_info;
        struct uapi_iommu_inv_addr_info addr_info;
    } granu;
};
UAPI_LAYOUT(iommu_cache_invalidate_info, 56, argsz, 0, version, 4, cache, 8, granularity, 9, padding, 10, granu, 16,
            granu.pasid_info, 16, granu.addr_info, 16);

/* ---- Faults and page requests ---- */

/* access that was tried (perm) */
enum {
    UAPI_IOMMU_FAULT_PERM_READ = 1 << 0,
    UAPI_IOMMU_FAULT_PERM_WRITE = 1 << 1,
    UAPI_IOMMU_FAULT_PERM_EXEC = 1 << 2,
    UAPI_IOMMU_FAULT_PERM_PRIV = 1 << 3,
};

/* iommu_fault.type */
enum uapi_iommu_fault_type {
    UAPI_IOMMU_FAULT_DMA_UNRECOV = 1,
    UAPI_IOMMU_FAULT_PAGE_REQ = 2,
};

/* iommu_fault_unrecoverable.reason */
enum uapi_iommu_fault_reason {
    UAPI_IOMMU_FAULT_REASON_UNKNOWN = 0,
    UAPI_IOMMU_FAULT_REASON_PASID_FETCH = 1,
    UAPI_IOMMU_FAULT_REASON_BAD_PASID_ENTRY = 2,
    UAPI_IOMMU_FAULT_REASON_PASID_INVALID = 3,
    UAPI_IOMMU_FAULT_REASON_WALK_EABT = 4,
    UAPI_IOMMU_FAULT_REASON_PTE_FETCH = 5,
    UAPI_IOMMU_FAULT_REASON_PERMISSION = 6,
    UAPI_IOMMU_FAULT_REASON_ACCESS = 7,
    UAPI_IOMMU_FAULT_REASON_OOR_ADDRESS = 8,
};

/* iommu_fault_unrecoverable.flags */
enum {
    UAPI_IOMMU_FAULT_UNRECOV_PASID_VALID = 1 << 0,
    UAPI_IOMMU_FAULT_UNRECOV_ADDR_VALID = 1 << 1,
    UAPI_IOMMU_FAULT_UNRECOV_FETCH_ADDR_VALID = 1 << 2,
};

/* Nobody can repair this one; fetch_addr is where a table walk failed. */
struct uapi_iommu_fault_unrecoverable {
    uint32_t reason, flags, pasid, perm;
    uint64_t addr, fetch_addr;
};
UAPI_LAYOUT(iommu_fault_unrecoverable, 32, reason, 0, flags, 4, pasid, 8, perm, 12, addr, 16, fetch_addr, 24);

/* iommu_fault_page_request.flags */
enum {
    UAPI_IOMMU_FAULT_PAGE_REQUEST_PASID_VALID = 1 << 0,
    UAPI_IOMMU_FAULT_PAGE_REQUEST_LAST_PAGE = 1 << 1,
    UAPI_IOMMU_FAULT_PAGE_REQUEST_PRIV_DATA = 1 << 2,
    UAPI_IOMMU_FAULT_PAGE_RESPONSE_NEEDS_PASID = 1 << 3,
};

/* The device waits for an answer; grpid ties the requests of a group together. */
struct uapi_iommu_fault_page_request {
    uint32_t flags, pasid, grpid, perm;
    uint64_t addr, private_data[2];
};
UAPI_LAYOUT(iommu_fault_page_request, 40, flags, 0, pasid, 4, grpid, 8, perm, 12, addr, 16, private_data, 24);

/* One record of the fault queue. */
struct uapi_iommu_fault {
    uint32_t type, padding;
    union {
        struct uapi_iommu_fault_unrecoverable event;
        struct uapi_iommu_fault_page_request prm;
        uint8_t padding2[56];
    };
};
UAPI_LAYOUT(iommu_fault, 64, type, 0, padding, 4, event, 8, prm, 8, padding2, 8);

/* the answer */
enum {
    UAPI_IOMMU_PAGE_RESP_VERSION_1 = 1,
    UAPI_IOMMU_PAGE_RESP_PASID_VALID = 1 << 0,
};

/* iommu_page_response.code */
enum uapi_iommu_page_response_code {
    UAPI_IOMMU_PAGE_RESP_SUCCESS = 0,
    UAPI_IOMMU_PAGE_RESP_INVALID = 1,
    UAPI_IOMMU_PAGE_RESP_FAILURE = 2,
};

/* Answers every request of grpid. */
struct uapi_iommu_page_response {
    uint32_t argsz, version, flags, pasid, grpid, code;
};
UAPI_LAYOUT(iommu_page_response, 24, argsz, 0, version, 4, flags, 8, pasid, 12, grpid, 16, code, 20);

#endif
