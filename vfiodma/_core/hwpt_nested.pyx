"""Page tables of guests in iommufd: allocated on top of a page table of the hardware, invalidated by arrays, walked.

The walker and its cache are those of NESTING_OP; the second stage are the areas of the parent's address space.  Callers
hold the context's lock, for nested_walk its `iotlb`.  Functions return 0 or -errno.  Source: struct iommu_hwpt_vtd_s1,
struct iommu_hwpt_vtd_s1_invalidate; hw_pagetable of iommufd and the VT-d driver of Linux 6.12 and 7.2.
"""
from libc.errno cimport EFAULT, EINVAL, ENOMEM, EOPNOTSUPP, EPERM
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from .ioas cimport permitted
from .ioas_dirty cimport dirty_mark
from .ioas_objects cimport object_add, object_remove
from .ioas_pages cimport pages_access, pages_swap
from .ioas_state cimport NEST_NONE, NEST_SELFTEST, NEST_VTD, NESTED, area_at, area_t, context_t, device_t, hwpt_t
from .ioas_uapi cimport vtd_s1_data, vtd_s1_invalidation
from .nesting cimport PAGEWALK_BAD_PASID_ENTRY, pagewalk_fault, pagewalk_result, wrote_entry
from .state cimport V7_2, pagewalk

cdef extern from "usercopy.h" nogil:
    int user_read(void *dst, uint64_t src, size_t n)

cdef extern from "pagewalk.h" nogil:
    ctypedef struct pagewalk_memory:
        void *context
        int (*load)(void *context, uint64_t gpa, uint64_t *entry) noexcept nogil
        int (*update)(void *context, uint64_t gpa, uint64_t seen, uint64_t entry) noexcept nogil
        void (*fetch)(void *context, uint64_t gpa) noexcept nogil
    enum:
        PAGEWALK_SRE, PAGEWALK_EAFE, PAGEWALK_WPE
    pagewalk *pagewalk_new(unsigned width, bint huge, size_t most)
    void pagewalk_free(pagewalk *)
    int pagewalk_bind(pagewalk *, uint32_t pasid, uint64_t root, unsigned levels, unsigned flags)
    size_t pagewalk_cached(pagewalk *)
    size_t pagewalk_cache_bytes(pagewalk *)
    int pagewalk_translate(pagewalk *, const pagewalk_memory *, uint64_t pasid, uint64_t address, unsigned access,
                           pagewalk_result *, pagewalk_fault *)
    void pagewalk_flush_range(pagewalk *, uint32_t pasid, uint64_t address, uint64_t npages)
    void pagewalk_flush_all(pagewalk *)

cdef enum:
    ONLY = 1                            # the walker wants a number for the one table that it has here
    MOST_CACHED = 1 << 22               # translations kept
    WIDE = 256                          # pages whose invalidation looks at the whole cache
    MOST_WIDE = 64                      # of them in one array; then everything goes, as hardware may always do
    LEAF = 1
    MOST_IOTLB_ID = 3                   # of the mock IOMMU
    FL1GP = 56                          # bits of cap
    FL5LP = 60
    NEST = 26                           # of ecap
    SRS = 31
    EAFS = 34

cdef struct format_t:                   # how HWPT_ALLOC and HWPT_INVALIDATE speak to a driver
    uint32_t data_type, data_min, data_size, entry_type, entry_size

cdef struct mock_invalidation:
    uint32_t flags, iotlb_id


cdef format_t format_of(const context_t *c, int nest) noexcept nogil:
    cdef format_t format
    memset(&format, 0, sizeof(format))
    if nest == NEST_VTD:
        format.data_type = 1
        format.data_min = format.data_size = sizeof(vtd_s1_data)
        format.entry_size = sizeof(vtd_s1_invalidation)
    elif nest == NEST_SELFTEST:
        format.data_type, format.data_min, format.data_size = 0xdead, 4, 8 if c.version >= V7_2 else 4
        format.entry_type, format.entry_size = 0xdeadbeef, sizeof(mock_invalidation)
    return format


# ---- life

cdef int nested_new(context_t *c, device_t *device, hwpt_t *parent, uint32_t data_type, uint32_t data_len, uint64_t data,
                    hwpt_t **out) noexcept nogil:
    """A guest's table over a nesting parent, whose flags were looked at.  What it says is checked when a device attaches."""
    cdef format_t format = format_of(c, device.nest)
    cdef vtd_s1_data given
    cdef hwpt_t *hwpt
    cdef int err
    if device.nest == NEST_NONE:
        return -EOPNOTSUPP
    if parent.automatic or not parent.nest_parent:
        return -EINVAL
    if device.nest == NEST_VTD and not device.ecap >> NEST & 1 or data_type != format.data_type:
        return -EOPNOTSUPP
    if data_len < format.data_min or data_len > format.data_size:
        return -EINVAL
    memset(&given, 0, sizeof(given))
    if user_read(&given, data, data_len):
        return -EFAULT
    hwpt = <hwpt_t *> calloc(1, sizeof(hwpt_t))
    if not hwpt:
        return -ENOMEM
    memcpy(hwpt, parent, sizeof(hwpt_t))
    hwpt.nest_parent = hwpt.tracking = False
    hwpt.users = 0
    hwpt.queue = NULL
    hwpt.next = NULL
    hwpt.parent = parent
    if device.nest == NEST_VTD:
        hwpt.root, hwpt.address_width = given.pgtbl_addr, given.addr_width
        hwpt.walk_flags = given.flags & (PAGEWALK_SRE | PAGEWALK_EAFE | PAGEWALK_WPE)
    err = object_add(c, NESTED, hwpt, &hwpt.id)
    if err:
        free(hwpt)
        return err
    parent.users += 1
    out[0] = hwpt
    return 0


cdef void nested_free(hwpt_t *hwpt) noexcept nogil:
    """Free a table that no device uses."""
    hwpt.parent.users -= 1
    object_remove(hwpt.ioas.context, hwpt.id)
    pagewalk_free(hwpt.walk)
    free(hwpt)


cdef int nested_enter(hwpt_t *hwpt, const device_t *device) noexcept nogil:
    """A device is about to be attached: can its IOMMU walk the table?"""
    cdef unsigned bits = 0
    cdef uint64_t last = device.aperture.last
    cdef int err
    if device.nest == NEST_SELFTEST:
        return 0
    if device.nest != NEST_VTD or not device.ecap >> NEST & 1:
        return -EINVAL
    if hwpt.address_width != 48 and (hwpt.address_width != 57 or not device.cap >> FL5LP & 1):
        return -EINVAL
    if hwpt.walk_flags & PAGEWALK_SRE and not device.ecap >> SRS & 1:
        return -EINVAL
    if hwpt.walk_flags & PAGEWALK_EAFE and not device.ecap >> EAFS & 1:
        return -EINVAL
    if hwpt.walk:
        return 0
    while last:
        last >>= 1
        bits += 1
    hwpt.walk = pagewalk_new(bits, device.cap >> FL1GP & 1, MOST_CACHED)
    if not hwpt.walk:
        return -ENOMEM
    err = pagewalk_bind(hwpt.walk, ONLY, hwpt.root, 4 if hwpt.address_width == 48 else 5, hwpt.walk_flags)
    if err:
        pagewalk_free(hwpt.walk)
        hwpt.walk = NULL
    return err


cdef void nested_forget(hwpt_t *hwpt) noexcept nogil:
    """A device has left: hardware drops what it kept for it."""
    if hwpt.walk:
        pagewalk_flush_all(hwpt.walk)


# ---- invalidation

cdef int invalidate_vtd(hwpt_t *hwpt, uint64_t at, uint32_t *wide) noexcept nogil:
    cdef vtd_s1_invalidation entry
    if user_read(&entry, at, sizeof(entry)):
        return -EFAULT
    if entry.flags & ~<uint32_t> LEAF or entry.reserved:
        return -EOPNOTSUPP
    if entry.addr & 4095 or entry.npages == UINT64_MAX and entry.addr:
        return -EINVAL
    if not hwpt.walk:
        return 0
    if entry.npages > WIDE:
        wide[0] += 1
    if entry.npages == UINT64_MAX or wide[0] > MOST_WIDE:
        pagewalk_flush_all(hwpt.walk)
    else:
        pagewalk_flush_range(hwpt.walk, ONLY, entry.addr, entry.npages)
    return 0


cdef int invalidate_mock(uint64_t at) noexcept nogil:
    cdef mock_invalidation entry
    if user_read(&entry, at, sizeof(entry)):
        return -EFAULT
    if entry.flags & ~<uint32_t> 1:
        return -EOPNOTSUPP
    return -EINVAL if entry.iotlb_id > MOST_IOTLB_ID else 0


cdef int nested_invalidate(hwpt_t *hwpt, uint32_t data_type, uint64_t data, uint32_t entry_len, uint32_t *n) noexcept nogil:
    """Do the entries in turn up to the first bad one; *n becomes their number."""
    cdef format_t format = format_of(hwpt.ioas.context, hwpt.nest)
    cdef uint32_t wanted = n[0], wide = 0
    cdef int err = 0
    n[0] = 0
    if data_type != format.entry_type:
        return -EINVAL
    while n[0] < wanted:
        if entry_len != format.entry_size:
            return -EINVAL
        err = invalidate_mock(data) if hwpt.nest == NEST_SELFTEST else invalidate_vtd(hwpt, data, &wide)
        if err:
            return err
        data += entry_len
        n[0] += 1
    return 0


# ---- walking

cdef struct second_stage:
    hwpt_t *parent
    wrote_entry wrote                   # told of changed entries, as the device's own log is to have them
    void *log                           # or NULL


cdef int load_entry(void *context, uint64_t gpa, uint64_t *entry) noexcept nogil:
    cdef area_t *area = area_at((<second_stage *> context).parent.ioas, gpa)
    if not area or not area.held:
        return -EINVAL
    if not permitted(area, False):
        return -EPERM
    return pages_access(area.pages, area.offset + (gpa - area.iova), entry, 8, False)


cdef int update_entry(void *context, uint64_t gpa, uint64_t seen, uint64_t entry) noexcept nogil:
    cdef second_stage *stage = <second_stage *> context
    cdef area_t *area = area_at(stage.parent.ioas, gpa)
    cdef int err
    if not area or not area.held:
        return -EINVAL
    if not permitted(area, True):
        return -EPERM
    err = pages_swap(area.pages, area.offset + (gpa - area.iova), seen, entry)
    if not err:
        dirty_mark(area, stage.parent, gpa, 8)      # the guest's memory has changed, as by any other write of a device
        if stage.log:
            stage.wrote(stage.log, gpa)
    return err


cdef int nested_walk(hwpt_t *hwpt, uint64_t address, unsigned access, pagewalk_result *found, pagewalk_fault *fault,
                     wrote_entry wrote, void *log) noexcept nogil:
    """The guest-physical address of one address; -EFAULT with *fault filled in."""
    cdef second_stage stage
    cdef pagewalk_memory memory
    if not hwpt.walk:
        memset(fault, 0, sizeof(pagewalk_fault))
        fault.reason = PAGEWALK_BAD_PASID_ENTRY     # the mock IOMMU's
        return -EFAULT
    stage.parent, stage.wrote, stage.log = hwpt.parent, wrote, log
    memory.context, memory.load, memory.update, memory.fetch = &stage, load_entry, update_entry, NULL
    return pagewalk_translate(hwpt.walk, &memory, ONLY, address, access, found, fault)


cdef tuple nested_cache(const hwpt_t *hwpt):
    """(translations, bytes) of the cache."""
    if not hwpt.walk:
        return 0, 0
    return pagewalk_cached(hwpt.walk), pagewalk_cache_bytes(hwpt.walk)
