"""Nested translation of a Type1 instance, as the series "vfio: expose virtual Shared Virtual Addressing to VMs" has it.

The first stage is the guest's, in its own memory, which is reached through the second stage: the container's mappings.
Functions without another word are called with the instance's lock held.  Source: VFIO_IOMMU_NESTING_OP of that series
and the IOMMU core and VT-d driver of Linux 5.12 behind it.
"""
import threading

from libc.errno cimport EBUSY, EFAULT, EINVAL, ENOENT, EOPNOTSUPP, EPERM
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from .args cimport u64
from .errno cimport raise_errno
from .mappings cimport find_mapping
from .pinning cimport device_access
from .state cimport (
    VSVA, dma_t, pagewalk, pin_page, pin_read, pin_swap, pthread_rwlock_rdlock, pthread_rwlock_unlock, pthread_rwlock_wrlock, type1_t,
    vaddr_of,
)
from .uapi cimport MAP_WRITE, bind_data, cache_info, nesting_head, nesting_info

cdef extern from "usercopy.h" nogil:
    int user_read(void *dst, uint64_t src, size_t n)

cdef extern from "pagewalk.h" nogil:
    ctypedef struct pagewalk_memory:
        void *context
        int (*load)(void *context, uint64_t gpa, uint64_t *entry) noexcept nogil
        int (*update)(void *context, uint64_t gpa, uint64_t seen, uint64_t entry) noexcept nogil
        void (*fetch)(void *context, uint64_t gpa) noexcept nogil
    pagewalk *pagewalk_new(unsigned width, bint huge, size_t most)
    void pagewalk_free(pagewalk *)
    int pagewalk_bind(pagewalk *, uint32_t pasid, uint64_t root, unsigned levels, unsigned flags)
    bint pagewalk_unbind(pagewalk *, uint32_t pasid)
    uint64_t pagewalk_bound(pagewalk *, uint64_t pasid)
    size_t pagewalk_cached(pagewalk *)
    size_t pagewalk_cache_bytes(pagewalk *)
    int pagewalk_translate(pagewalk *, const pagewalk_memory *, uint64_t pasid, uint64_t address, unsigned access,
                           pagewalk_result *, pagewalk_fault *)
    void pagewalk_translate_many(pagewalk *, const pagewalk_memory *, uint64_t pasid, const uint64_t *addresses, uint64_t *gpas,
                                 size_t n, unsigned access)
    void pagewalk_flush_pages(pagewalk *, uint32_t pasid, uint64_t address, unsigned order)
    void pagewalk_flush_pasid(pagewalk *, uint32_t pasid)

cdef extern from *:
    int RELAXED "__ATOMIC_RELAXED"
    void prefetch "__builtin_prefetch" (const void *) nogil
    uint64_t load_word "__atomic_load_n" (const uint64_t *, int) nogil

cdef enum:
    PASIDS = 1 << 20
    CHUNK = 1024                        # translations for which mappings can't change
    KNOWN = 64                          # pages of the second stage that are remembered meanwhile
    MOST_CACHED = 1 << 22               # translations kept
    ENOTSUPP = 524                      # not for user space, but what the driver returns
    VTD = 1                             # IOMMU_PASID_FORMAT_INTEL_VTD
    BIND = 0
    UNBIND = 1
    INVALIDATE = 2
    BIND_MIN = 56                       # up to the vendor's part
    BIND_SIZE = 72
    BIND_SRE_EAFE = 3
    BIND_MEMORY_TYPES = 0x3c
    BIND_FLAGS = 0x3f
    INVALIDATE_MIN = 16
    INVALIDATE_PASID = 32
    INVALIDATE_SIZE = 56
    IOTLB = 1
    DEV_IOTLB = 2
    PASID_CACHE = 4
    BY_DOMAIN = 0
    BY_PASID = 1
    BY_ADDRESS = 2


# ---- PASIDs

cdef class PasidSpace:
    """The 20-bit PASIDs of a system: which of them are allocated.  Thread-safe.

    Parameters
    ----------
    freed : callable, optional
        Called with a PASID that was given back.

    Source: /dev/ioasid of the series, which no descriptor stands for here.
    """
    def __cinit__(self, freed=None):
        self.lock = threading.Lock()
        self.freed = freed
        self.bits = <uint8_t *> calloc(PASIDS // 8, 1)
        if not self.bits:
            raise MemoryError

    def __dealloc__(self):
        free(self.bits)

    def allocate(self, first=1, last=PASIDS - 1):
        """Allocate the lowest free PASID of ``first`` to ``last``, both included.

        Raises
        ------
        InvalidArgumentError
            EINVAL: the bounds are not 1 ... 2**20 - 1, or nothing between them is free.
        """
        cdef uint64_t low = u64("allocate_pasid", first), high = u64("allocate_pasid", last)
        if low == 0 or high >= PASIDS:
            raise_errno(EINVAL, "allocate_pasid", None, None, "PASIDs are 1 ... 2**20 - 1")
        with self.lock:
            while low <= high:
                if not self.bits[low // 8] >> low % 8 & 1:
                    self.bits[low // 8] |= 1 << low % 8
                    return low
                low += 1
        raise_errno(EINVAL, "allocate_pasid", None, None, f"none of {first} ... {last} is free")

    def free(self, pasid):
        """Give a PASID back; EINVAL if it isn't allocated.

        Page requests for it that wait are invalid now; a table that is bound to it stays bound.
        """
        cdef uint64_t number = u64("free_pasid", pasid)
        with self.lock:
            if number >= PASIDS or not self.bits[number // 8] >> number % 8 & 1:
                raise_errno(EINVAL, "free_pasid", None, None, f"PASID {pasid} is not allocated")
            self.bits[number // 8] &= ~(1 << number % 8)
        if self.freed is not None:
            self.freed(number)


# ---- the container's side

cdef bint nests(const type1_t *t) noexcept nogil:
    return t.version == VSVA and t.nesting


cdef unsigned address_width(const type1_t *t) noexcept nogil:
    cdef uint64_t last = t.domains.aperture.last
    cdef unsigned bits = 0
    while last:
        last >>= 1
        bits += 1
    return bits


cdef void nesting_start(type1_t *t) noexcept nogil:
    """A group with an IOMMU has come: page tables can be bound.  Out of memory: no nesting, as without the capability."""
    cdef pagewalk *nest = pagewalk_new(address_width(t), True, MOST_CACHED)
    pthread_rwlock_wrlock(&t.iotlb)
    t.nest = nest
    pthread_rwlock_unlock(&t.iotlb)


cdef void nesting_stop(type1_t *t) noexcept nogil:
    cdef pagewalk *nest
    pthread_rwlock_wrlock(&t.iotlb)
    nest = t.nest
    t.nest = NULL
    pthread_rwlock_unlock(&t.iotlb)
    pagewalk_free(nest)


cdef void describe_nesting(const type1_t *t, nesting_info *info) noexcept nogil:
    memset(info, 0, sizeof(nesting_info))
    info.argsz = sizeof(nesting_info)
    info.format = VTD
    info.features = 3                                   # BIND_PGTBL, CACHE_INVLD
    info.addr_width = address_width(t)
    info.pasid_bits = 20
    info.vendor.vtd.cap_reg = <uint64_t> 1 << 56 | <uint64_t> 1 << 60                       # FL1GP, FL5LP
    info.vendor.vtd.ecap_reg = <uint64_t> 1 << 29 | <uint64_t> 1 << 31 | <uint64_t> 1 << 34 | <uint64_t> 1 << 40  # PRS SRS EAFS PASID


# ---- NESTING_OP

cdef bint nonzero(const uint8_t *bytes, size_t n) noexcept nogil:
    cdef size_t i
    for i in range(n):
        if bytes[i]:
            return True
    return False


cdef int read_bind_data(uint64_t arg, bind_data *data) noexcept nogil:
    """What bind and unbind check alike."""
    memset(data, 0, sizeof(bind_data))
    if user_read(data, arg, BIND_MIN):
        return -EFAULT
    if data.argsz < BIND_MIN:
        return -EINVAL
    if data.argsz > BIND_MIN and user_read(<char *> data + BIND_MIN, arg + BIND_MIN, min(data.argsz, <uint32_t> BIND_SIZE) - BIND_MIN):
        return -EFAULT
    if data.version != 1 or data.format > VTD or data.flags & ~<uint64_t> 1 or nonzero(data.padding, 8):
        return -EINVAL
    return 0


cdef int bind(type1_t *t, uint64_t arg) noexcept nogil:
    cdef bind_data data
    cdef unsigned levels
    cdef int err = read_bind_data(arg, &data)
    if err:
        return err
    if data.format != VTD or data.argsz < BIND_SIZE or data.vendor.vtd.flags & ~<uint64_t> BIND_FLAGS:
        return -EINVAL
    if not t.domains.groups.pci:
        return -ENOTSUPP
    if data.hpasid == 0 or data.hpasid >= PASIDS:
        return -EINVAL
    if not t.pasids or not t.pasids[data.hpasid // 8] >> data.hpasid % 8 & 1:
        return -ENOENT
    if pagewalk_bound(t.nest, data.hpasid):
        return -EBUSY
    if data.addr_width != 48 and data.addr_width != 57:
        return -EINVAL
    levels = 4 if data.addr_width == 48 else 5
    if data.gpgd > t.domains.aperture.last or data.vendor.vtd.flags & BIND_MEMORY_TYPES:
        return -EINVAL
    return pagewalk_bind(t.nest, data.hpasid, data.gpgd, levels, data.vendor.vtd.flags & BIND_SRE_EAFE)


cdef int unbind(type1_t *t, uint64_t arg) noexcept nogil:
    cdef bind_data data
    cdef int err = read_bind_data(arg, &data)
    if not err and data.hpasid < PASIDS:
        pagewalk_unbind(t.nest, data.hpasid)
    return err


cdef int read_cache_info(uint64_t arg, cache_info *info) noexcept nogil:
    memset(info, 0, sizeof(cache_info))
    if user_read(info, arg, INVALIDATE_MIN):
        return -EFAULT
    if info.argsz < INVALIDATE_MIN or info.granularity == BY_PASID and info.argsz < INVALIDATE_PASID:
        return -EINVAL
    if info.granularity == BY_ADDRESS and info.argsz < INVALIDATE_SIZE:
        return -EINVAL
    if info.argsz > INVALIDATE_MIN and user_read(<char *> info + INVALIDATE_MIN, arg + INVALIDATE_MIN,
                                                 min(info.argsz, <uint32_t> INVALIDATE_SIZE) - INVALIDATE_MIN):
        return -EFAULT
    if info.version != 1 or info.cache & ~7 or info.granularity > BY_ADDRESS:
        return -EINVAL
    if info.granularity == BY_ADDRESS and (info.cache & PASID_CACHE or info.granu.addr_info.flags & ~<uint32_t> 7):
        return -EINVAL
    if info.granularity == BY_PASID and info.granu.pasid_info.flags & ~<uint32_t> 3:
        return -EINVAL
    if info.granularity == BY_DOMAIN and info.cache & DEV_IOTLB:
        return -EINVAL
    return -EINVAL if nonzero(info.padding, 6) else 0


cdef int invalidate(type1_t *t, uint64_t arg) noexcept nogil:
    """VT-d takes the caches lowest first and stops, without an error, at the first that it can't do.

    Only the IOTLB holds anything of its own here: a device TLB is dropped with it, and entries of the PASID table are
    never cached.
    """
    cdef cache_info info
    cdef uint64_t npages, pasid
    cdef unsigned order = 0
    cdef int err = read_cache_info(arg, &info)
    if err or not info.cache & IOTLB or info.granularity == BY_DOMAIN:
        return err
    if info.granularity == BY_PASID:
        pasid = info.granu.pasid_info.pasid if info.granu.pasid_info.flags & 1 else 0
        if pasid < PASIDS:
            pagewalk_flush_pasid(t.nest, pasid)
        return 0
    pasid = info.granu.addr_info.pasid if info.granu.addr_info.flags & 1 else 0
    npages = info.granu.addr_info.granule_size * info.granu.addr_info.nb_granules >> 12
    while order < 63 and <uint64_t> 1 << order < npages:
        order += 1
    if pasid < PASIDS:
        pagewalk_flush_pages(t.nest, pasid, info.granu.addr_info.addr, order)   # the low bits of addr do not count
    return 0


cdef long nesting_op(type1_t *t, uint64_t arg) noexcept nogil:
    cdef nesting_head head
    cdef int err
    if user_read(&head, arg, sizeof(head)):
        return -EFAULT
    if head.argsz < sizeof(head) or head.flags & ~<uint32_t> 0xffff or head.flags > INVALIDATE:
        return -EINVAL
    if not t.nest:
        return -EOPNOTSUPP
    arg += sizeof(head)
    if head.flags == BIND:
        err = bind(t, arg)
        if err:
            unbind(t, arg)              # of every device: a table that was bound before goes as well
        return err
    # The errors of these two stay in the kernel.
    if head.flags == UNBIND:
        unbind(t, arg)
    else:
        invalidate(t, arg)
    return 0


# ---- the devices' side: these take `iotlb`

cdef struct page_known:                     # of the second stage
    uint64_t number
    dma_t *dma                              # NULL: nothing known here
    uint64_t *words                         # the page; NULL: by pin_read() and pin_swap()

cdef struct second_stage:
    type1_t *t
    uint64_t mask                           # of the numbers below
    page_known *known                       # for as long as `iotlb` is held: pages of tables are few
    wrote_entry wrote                       # told of changed entries: they are writes to the guest's memory
    void *log                               # or NULL


cdef const page_known *page_of(second_stage *stage, uint64_t gpa) noexcept nogil:
    cdef page_known *known = &stage.known[gpa >> 12 & stage.mask]
    cdef dma_t *dma
    if not known.dma or known.number != gpa >> 12:
        dma = find_mapping(stage.t, gpa)
        if not dma or not dma.pages:
            return NULL
        known.number, known.dma = gpa >> 12, dma
        known.words = pin_page(dma.pages, (gpa & ~<uint64_t> 4095) - dma.iova)
    return known


cdef int load_entry(void *context, uint64_t gpa, uint64_t *entry) noexcept nogil:
    cdef const page_known *page = page_of(<second_stage *> context, gpa)
    if not page:
        return -EINVAL
    if page.words:
        entry[0] = load_word(page.words + (gpa >> 3 & 511), RELAXED)
        return 0
    return pin_read(page.dma.pages, gpa - page.dma.iova, entry, 8)      # readable even if WRITE only, as VT-d maps it up to 6.12


cdef void fetch_entry(void *context, uint64_t gpa) noexcept nogil:
    cdef const page_known *page = page_of(<second_stage *> context, gpa)
    if page and page.words:
        prefetch(page.words + (gpa >> 3 & 511))


cdef int update_entry(void *context, uint64_t gpa, uint64_t seen, uint64_t entry) noexcept nogil:
    cdef second_stage *stage = <second_stage *> context
    cdef const page_known *page = page_of(stage, gpa)
    cdef int err
    if not page:
        return -EINVAL
    if not page.dma.prot & MAP_WRITE:
        return -EPERM
    err = pin_swap(page.dma.pages, gpa - page.dma.iova, seen, entry)
    if not err and stage.log:
        stage.wrote(stage.log, gpa)
    return err


cdef int nested_translate(type1_t *t, uint64_t pasid, uint64_t address, unsigned access, pagewalk_result *found,
                          pagewalk_fault *fault, wrote_entry wrote, void *log) noexcept nogil:
    """The first stage's result for one address; -EFAULT with *fault filled in."""
    cdef page_known known[8]
    cdef second_stage stage
    cdef pagewalk_memory memory
    cdef int err = -EFAULT
    memset(known, 0, sizeof(known))
    stage.t, stage.mask, stage.known, stage.wrote, stage.log = t, 7, known, wrote, log
    memory.context, memory.load, memory.update, memory.fetch = &stage, load_entry, update_entry, NULL
    pthread_rwlock_rdlock(&t.iotlb)
    if t.nest:
        err = pagewalk_translate(t.nest, &memory, pasid, address, access, found, fault)
    else:
        memset(fault, 0, sizeof(pagewalk_fault))
        fault.reason = PAGEWALK_PASID_FETCH             # there is no PASID table
    pthread_rwlock_unlock(&t.iotlb)
    return err


cdef int nested_access(type1_t *t, uint64_t pasid, uint64_t address, void *data, uint64_t size, unsigned access,
                       uint64_t *gpa, uint64_t *done, pagewalk_fault *fault, wrote_entry wrote, void *log) noexcept nogil:
    """Move bytes up to the end of the first-stage page, at the gpa that comes back; -EFAULT with *fault filled in."""
    cdef pagewalk_result found
    cdef int err
    done[0] = gpa[0] = 0
    err = nested_translate(t, pasid, address, access, &found, fault, wrote, log)
    if err:
        return err
    gpa[0] = found.gpa
    err = device_access(t, found.gpa, data, min(size, found.room), (access & PAGEWALK_WRITE) != 0, done)
    if err:
        memset(fault, 0, sizeof(pagewalk_fault))
        fault.reason = PAGEWALK_PERMISSION if err == -EPERM else PAGEWALK_UNKNOWN if err == -EFAULT else PAGEWALK_PTE_FETCH
        return -EFAULT
    return 0


cdef size_t translate_many(type1_t *t, const uint64_t *addresses, uint64_t *out, size_t n, bint nested, uint64_t pasid,
                           unsigned access, wrote_entry wrote, void *log) noexcept nogil:
    """The process's addresses of what devices would reach, or UINT64_MAX; returns how many are found."""
    cdef page_known known[KNOWN]
    cdef second_stage stage
    cdef pagewalk_memory memory
    cdef uint64_t at
    cdef dma_t *dma
    cdef size_t i = 0, stop, hits = 0
    stage.t, stage.mask, stage.known, stage.wrote, stage.log = t, KNOWN - 1, known, wrote, log
    memory.context, memory.load, memory.update, memory.fetch = &stage, load_entry, update_entry, fetch_entry
    while i < n:
        stop = min(n, i + CHUNK)
        pthread_rwlock_rdlock(&t.iotlb)
        if nested and t.nest:
            memset(known, 0, sizeof(known))
            pagewalk_translate_many(t.nest, &memory, pasid, addresses + i, out + i, stop - i, access)
        elif nested:
            memset(out + i, 0xff, (stop - i) * 8)
        else:
            memcpy(out + i, addresses + i, (stop - i) * 8)
        while i < stop:
            at = out[i]
            dma = NULL if nested and at == <uint64_t> -1 else find_mapping(t, at)
            if dma and dma.pages:
                out[i] = vaddr_of(t, dma)[0] + (at - dma.iova)
                hits += 1
            else:
                out[i] = <uint64_t> -1
            i += 1
        pthread_rwlock_unlock(&t.iotlb)
    return hits


cdef uint64_t nested_bound(type1_t *t, uint64_t pasid) noexcept nogil:
    """The serial number of a PASID's table, or 0; takes `iotlb`."""
    cdef uint64_t serial
    pthread_rwlock_rdlock(&t.iotlb)
    serial = pagewalk_bound(t.nest, pasid) if t.nest else 0
    pthread_rwlock_unlock(&t.iotlb)
    return serial


cdef tuple cache_size(type1_t *t):
    """(translations, bytes) of the cache; takes `iotlb`."""
    cdef size_t n = 0, size = 0
    with nogil:
        pthread_rwlock_rdlock(&t.iotlb)
        if t.nest:
            n, size = pagewalk_cached(t.nest), pagewalk_cache_bytes(t.nest)
        pthread_rwlock_unlock(&t.iotlb)
    return n, size
