/* iommufd: objects behind /dev/iommu.
   Every argument begins with its own size.  A kernel takes any size from a minimum up, and wants 0 in what it does not
   know (E2BIG). */
#ifndef UAPI_IOMMUFD_H
#define UAPI_IOMMUFD_H

#include "layout.h"

enum {
    UAPI_IOMMUFD_TYPE = ';',
};

/* ---- Commands: numbers and ioctls ---- */

enum {
    UAPI_IOMMUFD_CMD_BASE = 128,
    UAPI_IOMMUFD_CMD_DESTROY = 128,
    UAPI_IOMMUFD_CMD_IOAS_ALLOC = 129,
    UAPI_IOMMUFD_CMD_IOAS_ALLOW_IOVAS = 130,
    UAPI_IOMMUFD_CMD_IOAS_COPY = 131,
    UAPI_IOMMUFD_CMD_IOAS_IOVA_RANGES = 132,
    UAPI_IOMMUFD_CMD_IOAS_MAP = 133,
    UAPI_IOMMUFD_CMD_IOAS_UNMAP = 134,
    UAPI_IOMMUFD_CMD_OPTION = 135,
    UAPI_IOMMUFD_CMD_VFIO_IOAS = 136,
    UAPI_IOMMUFD_CMD_HWPT_ALLOC = 137,
    UAPI_IOMMUFD_CMD_GET_HW_INFO = 138,
    UAPI_IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING = 139,
    UAPI_IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP = 140,
    UAPI_IOMMUFD_CMD_HWPT_INVALIDATE = 141,
    UAPI_IOMMUFD_CMD_FAULT_QUEUE_ALLOC = 142,
    UAPI_IOMMUFD_CMD_IOAS_MAP_FILE = 143,
    UAPI_IOMMUFD_CMD_VIOMMU_ALLOC = 144,
    UAPI_IOMMUFD_CMD_VDEVICE_ALLOC = 145,
    UAPI_IOMMUFD_CMD_IOAS_CHANGE_PROCESS = 146,
    UAPI_IOMMUFD_CMD_VEVENTQ_ALLOC = 147,
    UAPI_IOMMUFD_CMD_HW_QUEUE_ALLOC = 148,
};

enum {
    UAPI_IOMMU_DESTROY = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_DESTROY),
    UAPI_IOMMU_IOAS_ALLOC = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_IOAS_ALLOC),
    UAPI_IOMMU_IOAS_ALLOW_IOVAS = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_IOAS_ALLOW_IOVAS),
    UAPI_IOMMU_IOAS_COPY = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_IOAS_COPY),
    UAPI_IOMMU_IOAS_IOVA_RANGES = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_IOAS_IOVA_RANGES),
    UAPI_IOMMU_IOAS_MAP = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_IOAS_MAP),
    UAPI_IOMMU_IOAS_UNMAP = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_IOAS_UNMAP),
    UAPI_IOMMU_OPTION = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_OPTION),
    UAPI_IOMMU_VFIO_IOAS = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_VFIO_IOAS),
    UAPI_IOMMU_HWPT_ALLOC = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_HWPT_ALLOC),
    UAPI_IOMMU_GET_HW_INFO = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_GET_HW_INFO),
    UAPI_IOMMU_HWPT_SET_DIRTY_TRACKING = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING),
    UAPI_IOMMU_HWPT_GET_DIRTY_BITMAP = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP),
    UAPI_IOMMU_HWPT_INVALIDATE = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_HWPT_INVALIDATE),
    UAPI_IOMMU_FAULT_QUEUE_ALLOC = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_FAULT_QUEUE_ALLOC),
    UAPI_IOMMU_IOAS_MAP_FILE = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_IOAS_MAP_FILE),
    UAPI_IOMMU_VIOMMU_ALLOC = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_VIOMMU_ALLOC),
    UAPI_IOMMU_VDEVICE_ALLOC = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_VDEVICE_ALLOC),
    UAPI_IOMMU_IOAS_CHANGE_PROCESS = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_IOAS_CHANGE_PROCESS),
    UAPI_IOMMU_VEVENTQ_ALLOC = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_VEVENTQ_ALLOC),
    UAPI_IOMMU_HW_QUEUE_ALLOC = UAPI_IO(UAPI_IOMMUFD_TYPE, UAPI_IOMMUFD_CMD_HW_QUEUE_ALLOC),
};

/* Free any object by id; EBUSY while something uses it. */
struct uapi_iommu_destroy {
    uint32_t size, id;
};
UAPI_LAYOUT(iommu_destroy, 8, size, 0, id, 4);

/* ---- I/O address spaces ---- */

/* A new, empty address space. */
struct uapi_iommu_ioas_alloc {
    uint32_t size, flags, out_ioas_id;
};
UAPI_LAYOUT(iommu_ioas_alloc, 12, size, 0, flags, 4, out_ioas_id, 8);

/* last is inclusive. */
struct uapi_iommu_iova_range {
    uint64_t start, last;
};
UAPI_LAYOUT(iommu_iova_range, 16, start, 0, last, 8);

/* Reports num_iovas ranges to allowed_iovas, and the alignment they ask for. */
struct uapi_iommu_ioas_iova_ranges {
    uint32_t size, ioas_id, num_iovas, __reserved;
    uint64_t allowed_iovas, out_iova_alignment;
};
UAPI_LAYOUT(iommu_ioas_iova_ranges, 32, size, 0, ioas_id, 4, num_iovas, 8, __reserved, 12, allowed_iovas, 16,
            out_iova_alignment, 24);

/* From now on allocate only inside these ranges. */
struct uapi_iommu_ioas_allow_iovas {
    uint32_t size, ioas_id, num_iovas, __reserved;
    uint64_t allowed_iovas;
};
UAPI_LAYOUT(iommu_ioas_allow_iovas, 24, size, 0, ioas_id, 4, num_iovas, 8, __reserved, 12, allowed_iovas, 16);

/* flags of IOAS_MAP, IOAS_MAP_FILE and IOAS_COPY */
enum uapi_iommufd_ioas_map_flags {
    UAPI_IOMMU_IOAS_MAP_FIXED_IOVA = 1 << 0,
    UAPI_IOMMU_IOAS_MAP_WRITEABLE = 1 << 1,
    UAPI_IOMMU_IOAS_MAP_READABLE = 1 << 2,
};

/* Map length bytes at user_va; iova is chosen by the kernel unless fixed. */
struct uapi_iommu_ioas_map {
    uint32_t size, flags, ioas_id, __reserved;
    uint64_t user_va, length, iova;
};
UAPI_LAYOUT(iommu_ioas_map, 40, size, 0, flags, 4, ioas_id, 8, __reserved, 12, user_va, 16, length, 24, iova, 32);

/* The same from offset start of a memfd or dma-buf; outlives the caller's mapping. */
struct uapi_iommu_ioas_map_file {
    uint32_t size, flags, ioas_id;
    int32_t fd;
    uint64_t start, length, iova;
};
UAPI_LAYOUT(iommu_ioas_map_file, 40, size, 0, flags, 4, ioas_id, 8, fd, 12, start, 16, length, 24, iova, 32);

/* Map in one space what another maps already. */
struct uapi_iommu_ioas_copy {
    uint32_t size, flags, dst_ioas_id, src_ioas_id;
    uint64_t length, dst_iova, src_iova;
};
UAPI_LAYOUT(iommu_ioas_copy, 40, size, 0, flags, 4, dst_ioas_id, 8, src_ioas_id, 12, length, 16, dst_iova, 24,
            src_iova, 32);

/* iova 0 with length 2**64-1 unmaps all; length returns the bytes unmapped. */
struct uapi_iommu_ioas_unmap {
    uint32_t size, ioas_id;
    uint64_t iova, length;
};
UAPI_LAYOUT(iommu_ioas_unmap, 24, size, 0, ioas_id, 4, iova, 8, length, 16);

/* Move every file mapping's accounting to the calling process. */
struct uapi_iommu_ioas_change_process {
    uint32_t size, __reserved;
};
UAPI_LAYOUT(iommu_ioas_change_process, 8, size, 0, __reserved, 4);

/* iommu_option.option_id */
enum uapi_iommufd_option {
    UAPI_IOMMU_OPTION_RLIMIT_MODE = 0,
    UAPI_IOMMU_OPTION_HUGE_PAGES = 1,
};

/* iommu_option.op */
enum uapi_iommufd_option_ops {
    UAPI_IOMMU_OPTION_OP_SET = 0,
    UAPI_IOMMU_OPTION_OP_GET = 1,
};

/* Read or set one option, of the context or of object_id. */
struct uapi_iommu_option {
    uint32_t size, option_id;
    uint16_t op, __reserved;
    uint32_t object_id;
    uint64_t val64;
};
UAPI_LAYOUT(iommu_option, 24, size, 0, option_id, 4, op, 8, __reserved, 10, object_id, 12, val64, 16);

/* iommu_vfio_ioas.op */
enum uapi_iommufd_vfio_ioas_op {
    UAPI_IOMMU_VFIO_IOAS_GET = 0,
    UAPI_IOMMU_VFIO_IOAS_SET = 1,
    UAPI_IOMMU_VFIO_IOAS_CLEAR = 2,
};

/* Which address space stands behind the VFIO compatibility ioctls. */
struct uapi_iommu_vfio_ioas {
    uint32_t size, ioas_id;
    uint16_t op, __reserved;
};
UAPI_LAYOUT(iommu_vfio_ioas, 12, size, 0, ioas_id, 4, op, 8, __reserved, 10);

/* ---- Hardware information ---- */

/* in_data_type and out_data_type of GET_HW_INFO */
enum uapi_iommu_hw_info_type {
    UAPI_IOMMU_HW_INFO_TYPE_NONE = 0,
    UAPI_IOMMU_HW_INFO_TYPE_INTEL_VTD = 1,
    UAPI_IOMMU_HW_INFO_TYPE_DEFAULT = 0,
    UAPI_IOMMU_HW_INFO_TYPE_ARM_SMMUV3 = 2,
    UAPI_IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV = 3,
    UAPI_IOMMU_HW_INFO_TYPE_AMD = 4,
};

/* iommu_hw_info.flags */
enum uapi_iommufd_hw_info_flags {
    UAPI_IOMMU_HW_INFO_FLAG_INPUT_TYPE = 1 << 0,
};

/* iommu_hw_info.out_capabilities */
enum uapi_iommufd_hw_capabilities {
    UAPI_IOMMU_HW_CAP_DIRTY_TRACKING = 1 << 0,
    UAPI_IOMMU_HW_CAP_PCI_PASID_EXEC = 1 << 1,
    UAPI_IOMMU_HW_CAP_PCI_PASID_PRIV = 1 << 2,
    UAPI_IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED = 1 << 3,
};

/* Describes the IOMMU in front of dev_id; data_uptr gets the vendor's structure. */
struct uapi_iommu_hw_info {
    uint32_t size, flags, dev_id, data_len;
    uint64_t data_uptr;
    union {
        uint32_t in_data_type, out_data_type;
    };
    uint8_t out_max_pasid_log2, __reserved[3];
    uint64_t out_capabilities;
};
UAPI_LAYOUT(iommu_hw_info, 40, size, 0, flags, 4, dev_id, 8, data_len, 12, data_uptr, 16, in_data_type, 24,
            out_data_type, 24, out_max_pasid_log2, 28, __reserved, 29, out_capabilities, 32);

/* iommu_hw_info_vtd.flags */
enum uapi_iommu_hw_info_vtd_flags {
    UAPI_IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17 = 1 << 0,
};

/* Intel VT-d registers. */
struct uapi_iommu_hw_info_vtd {
    uint32_t flags, __reserved;
    uint64_t cap_reg, ecap_reg;
};
UAPI_LAYOUT(iommu_hw_info_vtd, 24, flags, 0, __reserved, 4, cap_reg, 8, ecap_reg, 16);

/* Arm SMMUv3 id registers. */
struct uapi_iommu_hw_info_arm_smmuv3 {
    uint32_t flags, __reserved, idr[6], iidr, aidr;
};
UAPI_LAYOUT(iommu_hw_info_arm_smmuv3, 40, flags, 0, __reserved, 4, idr, 8, iidr, 32, aidr, 36);

/* NVIDIA Tegra241 command queue virtualisation. */
struct uapi_iommu_hw_info_tegra241_cmdqv {
    uint32_t flags;
    uint8_t version, log2vcmdqs, log2vsids, __reserved;
};
UAPI_LAYOUT(iommu_hw_info_tegra241_cmdqv, 8, flags, 0, version, 4, log2vcmdqs, 5, log2vsids, 6, __reserved, 7);

/* AMD extended feature registers. */
struct uapi_iommu_hw_info_amd {
    uint64_t efr, efr2;
};
UAPI_LAYOUT(iommu_hw_info_amd, 16, efr, 0, efr2, 8);

/* ---- Page tables of the hardware ---- */

/* iommu_hwpt_alloc.flags */
enum uapi_iommufd_hwpt_alloc_flags {
    UAPI_IOMMU_HWPT_ALLOC_NEST_PARENT = 1 << 0,
    UAPI_IOMMU_HWPT_ALLOC_DIRTY_TRACKING = 1 << 1,
    UAPI_IOMMU_HWPT_FAULT_ID_VALID = 1 << 2,
    UAPI_IOMMU_HWPT_ALLOC_PASID = 1 << 3,
};

/* iommu_hwpt_alloc.data_type */
enum uapi_iommu_hwpt_data_type {
    UAPI_IOMMU_HWPT_DATA_NONE = 0,
    UAPI_IOMMU_HWPT_DATA_VTD_S1 = 1,
    UAPI_IOMMU_HWPT_DATA_ARM_SMMUV3 = 2,
    UAPI_IOMMU_HWPT_DATA_AMD_GUEST = 3,
};

/* pt_id is an ioas, or a parent page table for nesting. */
struct uapi_iommu_hwpt_alloc {
    uint32_t size, flags, dev_id, pt_id, out_hwpt_id, __reserved, data_type, data_len;
    uint64_t data_uptr;
    uint32_t fault_id, __reserved2;
};
UAPI_LAYOUT(iommu_hwpt_alloc, 48, size, 0, flags, 4, dev_id, 8, pt_id, 12, out_hwpt_id, 16, __reserved, 20,
            data_type, 24, data_len, 28, data_uptr, 32, fault_id, 40, __reserved2, 44);

/* iommu_hwpt_vtd_s1.flags */
enum uapi_iommu_hwpt_vtd_s1_flags {
    UAPI_IOMMU_VTD_S1_SRE = 1 << 0,
    UAPI_IOMMU_VTD_S1_EAFE = 1 << 1,
    UAPI_IOMMU_VTD_S1_WPE = 1 << 2,
};

/* VT-d first stage of a guest. */
struct uapi_iommu_hwpt_vtd_s1 {
    uint64_t flags, pgtbl_addr;
    uint32_t addr_width, __reserved;
};
UAPI_LAYOUT(iommu_hwpt_vtd_s1, 24, flags, 0, pgtbl_addr, 8, addr_width, 16, __reserved, 20);

/* The two words of a guest's stream table entry that count. */
struct uapi_iommu_hwpt_arm_smmuv3 {
    uapi_le64 ste[2];
};
UAPI_LAYOUT(iommu_hwpt_arm_smmuv3, 16, ste, 0);

/* The guest's device table entry. */
struct uapi_iommu_hwpt_amd_guest {
    uint64_t dte[4];
};
UAPI_LAYOUT(iommu_hwpt_amd_guest, 32, dte, 0);

/* ---- Dirty tracking of a page table ---- */

/* iommu_hwpt_set_dirty_tracking.flags */
enum uapi_iommufd_hwpt_set_dirty_tracking_flags {
    UAPI_IOMMU_HWPT_DIRTY_TRACKING_ENABLE = 1 << 0,
};

/* Switch it on or off. */
struct uapi_iommu_hwpt_set_dirty_tracking {
    uint32_t size, flags, hwpt_id, __reserved;
};
UAPI_LAYOUT(iommu_hwpt_set_dirty_tracking, 16, size, 0, flags, 4, hwpt_id, 8, __reserved, 12);

/* iommu_hwpt_get_dirty_bitmap.flags */
enum uapi_iommufd_hwpt_get_dirty_bitmap_flags {
    UAPI_IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR = 1 << 0,
};

/* Harvest length bytes from iova into data, one bit for page_size bytes. */
struct uapi_iommu_hwpt_get_dirty_bitmap {
    uint32_t size, hwpt_id, flags, __reserved;
    uint64_t iova, length, page_size, data;
};
UAPI_LAYOUT(iommu_hwpt_get_dirty_bitmap, 48, size, 0, hwpt_id, 4, flags, 8, __reserved, 12, iova, 16, length, 24,
            page_size, 32, data, 40);

/* ---- Invalidation of a guest's first stage ---- */

/* iommu_hwpt_invalidate.data_type */
enum uapi_iommu_hwpt_invalidate_data_type {
    UAPI_IOMMU_HWPT_INVALIDATE_DATA_VTD_S1 = 0,
    UAPI_IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3 = 1,
};

/* entry_num records of entry_len bytes; returns how many were done. */
struct uapi_iommu_hwpt_invalidate {
    uint32_t size, hwpt_id;
    uint64_t data_uptr;
    uint32_t data_type, entry_len, entry_num, __reserved;
};
UAPI_LAYOUT(iommu_hwpt_invalidate, 32, size, 0, hwpt_id, 4, data_uptr, 8, data_type, 16, entry_len, 20,
            entry_num, 24, __reserved, 28);

/* iommu_hwpt_vtd_s1_invalidate.flags */
enum uapi_iommu_hwpt_vtd_s1_invalidate_flags {
    UAPI_IOMMU_VTD_INV_FLAGS_LEAF = 1 << 0,
};

/* npages 2**64-1 from addr 0 means everything. */
struct uapi_iommu_hwpt_vtd_s1_invalidate {
    uint64_t addr, npages;
    uint32_t flags, __reserved;
};
UAPI_LAYOUT(iommu_hwpt_vtd_s1_invalidate, 24, addr, 0, npages, 8, flags, 16, __reserved, 20);

/* A command as the guest queued it. */
struct uapi_iommu_viommu_arm_smmuv3_invalidate {
    uapi_le64 cmd[2];
};
UAPI_LAYOUT(iommu_viommu_arm_smmuv3_invalidate, 16, cmd, 0);

/* ---- Page faults ---- */

/* A queue read as iommu_hwpt_pgfault and answered by writing iommu_hwpt_page_response. */
struct uapi_iommu_fault_alloc {
    uint32_t size, flags, out_fault_id, out_fault_fd;
};
UAPI_LAYOUT(iommu_fault_alloc, 16, size, 0, flags, 4, out_fault_id, 8, out_fault_fd, 12);

/* iommu_hwpt_pgfault.flags */
enum uapi_iommu_hwpt_pgfault_flags {
    UAPI_IOMMU_PGFAULT_FLAGS_PASID_VALID = 1 << 0,
    UAPI_IOMMU_PGFAULT_FLAGS_LAST_PAGE = 1 << 1,
};

/* iommu_hwpt_pgfault.perm */
enum uapi_iommu_hwpt_pgfault_perm {
    UAPI_IOMMU_PGFAULT_PERM_READ = 1 << 0,
    UAPI_IOMMU_PGFAULT_PERM_WRITE = 1 << 1,
    UAPI_IOMMU_PGFAULT_PERM_EXEC = 1 << 2,
    UAPI_IOMMU_PGFAULT_PERM_PRIV = 1 << 3,
};

/* cookie goes back in the answer. */
struct uapi_iommu_hwpt_pgfault {
    uint32_t flags, dev_id, pasid, grpid, perm, __reserved;
    uint64_t addr;
    uint32_t length, cookie;
};
UAPI_LAYOUT(iommu_hwpt_pgfault, 40, flags, 0, dev_id, 4, pasid, 8, grpid, 12, perm, 16, __reserved, 20, addr, 24,
            length, 32, cookie, 36);

/* iommu_hwpt_page_response.code */
enum uapi_iommufd_page_response_code {
    UAPI_IOMMUFD_PAGE_RESP_SUCCESS = 0,
    UAPI_IOMMUFD_PAGE_RESP_INVALID = 1,
};

/* Answers the whole group of cookie. */
struct uapi_iommu_hwpt_page_response {
    uint32_t cookie, code;
};
UAPI_LAYOUT(iommu_hwpt_page_response, 8, cookie, 0, code, 4);

/* ---- Virtual IOMMUs: their devices, events and queues ---- */

/* iommu_viommu_alloc.type */
enum uapi_iommu_viommu_type {
    UAPI_IOMMU_VIOMMU_TYPE_DEFAULT = 0,
    UAPI_IOMMU_VIOMMU_TYPE_ARM_SMMUV3 = 1,
    UAPI_IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV = 2,
};

/* A slice of the IOMMU for one guest, on a nesting parent. */
struct uapi_iommu_viommu_alloc {
    uint32_t size, flags, type, dev_id, hwpt_id, out_viommu_id, data_len, __reserved;
    uint64_t data_uptr;
};
UAPI_LAYOUT(iommu_viommu_alloc, 40, size, 0, flags, 4, type, 8, dev_id, 12, hwpt_id, 16, out_viommu_id, 20,
            data_len, 24, __reserved, 28, data_uptr, 32);

/* Where to mmap the guest's command queue page. */
struct uapi_iommu_viommu_tegra241_cmdqv {
    uint64_t out_vintf_mmap_offset, out_vintf_mmap_length;
};
UAPI_LAYOUT(iommu_viommu_tegra241_cmdqv, 16, out_vintf_mmap_offset, 0, out_vintf_mmap_length, 8);

/* The guest's name (virt_id) for a device. */
struct uapi_iommu_vdevice_alloc {
    uint32_t size, viommu_id, dev_id, out_vdevice_id;
    uint64_t virt_id;
};
UAPI_LAYOUT(iommu_vdevice_alloc, 24, size, 0, viommu_id, 4, dev_id, 8, out_vdevice_id, 12, virt_id, 16);

/* iommufd_vevent_header.flags */
enum uapi_iommu_veventq_flag {
    UAPI_IOMMU_VEVENTQ_FLAG_LOST_EVENTS = 1 << 0,
};

/* iommu_veventq_alloc.type */
enum uapi_iommu_veventq_type {
    UAPI_IOMMU_VEVENTQ_TYPE_DEFAULT = 0,
    UAPI_IOMMU_VEVENTQ_TYPE_ARM_SMMUV3 = 1,
    UAPI_IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV = 2,
};

/* A queue of hardware events for the guest. */
struct uapi_iommu_veventq_alloc {
    uint32_t size, flags, viommu_id, type, veventq_depth, out_veventq_id, out_veventq_fd, __reserved;
};
UAPI_LAYOUT(iommu_veventq_alloc, 32, size, 0, flags, 4, viommu_id, 8, type, 12, veventq_depth, 16,
            out_veventq_id, 20, out_veventq_fd, 24, __reserved, 28);

/* In front of each event read; a gap in sequence is a loss. */
struct uapi_iommufd_vevent_header {
    uint32_t flags, sequence;
};
UAPI_LAYOUT(iommufd_vevent_header, 8, flags, 0, sequence, 4);

/* The event record, with the guest's stream id. */
struct uapi_iommu_vevent_arm_smmuv3 {
    uapi_le64 evt[4];
};
UAPI_LAYOUT(iommu_vevent_arm_smmuv3, 32, evt, 0);

/* Error bits of the guest's queues. */
struct uapi_iommu_vevent_tegra241_cmdqv {
    uapi_le64 lvcmdq_err_map[2];
};
UAPI_LAYOUT(iommu_vevent_tegra241_cmdqv, 16, lvcmdq_err_map, 0);

/* iommu_hw_queue_alloc.type */
enum uapi_iommu_hw_queue_type {
    UAPI_IOMMU_HW_QUEUE_TYPE_DEFAULT = 0,
    UAPI_IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV = 1,
};

/* A queue in guest memory that the hardware reads by itself. */
struct uapi_iommu_hw_queue_alloc {
    uint32_t size, flags, viommu_id, type, index, out_hw_queue_id;
    uint64_t nesting_parent_iova, length;
};
UAPI_LAYOUT(iommu_hw_queue_alloc, 40, size, 0, flags, 4, viommu_id, 8, type, 12, index, 16, out_hw_queue_id, 20,
            nesting_parent_iova, 24, length, 32);

#endif
