"""The table of mappings of a Type1 instance: map, unmap, vaddr invalidation and update, locked-memory accounting.

Every function but type1_new and type1_free is called with the instance's lock held, returns 0 or -errno, and leaves the
state as it was when it fails, except where the kernel does not.  Source: the VFIO Type1 driver of Linux 5.4 to 7.2.
"""
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EBUSY, EEXIST, EFAULT, EINTR, EINVAL, ENOENT, ENOMEM, ENOSPC, EOVERFLOW
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

from .dirty cimport bisects, dirty_allocate, dirty_copy_out
from .state cimport (
    PIN_IN_BATCHES, PIN_NO_WRITEBACK, PIN_WRITE, PIN_ZERO_PAGE_FREE, PS, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP,
    V5_12, V6_1, V7_2, dma_t, dmapool_free, dmapool_give, dmapool_new, dmapool_restore, dmapool_take, first_from, iommu_mapped, min_pgsize, next_of, pin, pin_memory, pin_release,
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_timedwait, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, pthread_rwlock_destroy, pthread_rwlock_init,
    pthread_rwlock_unlock, pthread_rwlock_wrlock, pthread_rwlockattr_init, pthread_rwlockattr_setkind_np,
    pthread_rwlockattr_t, rangemap_copy, rangemap_count, rangemap_entry, rangemap_find, rangemap_free, rangemap_insert,
    rangemap_new, rangemap_overlaps, rangemap_remove, set_vaddr_valid, type1_t, vaddr_of, vaddr_valid,
)
from .uapi cimport MAP_READ, MAP_VADDR, MAP_WRITE, UNMAP_ALL, UNMAP_DIRTY, UNMAP_VADDR

cdef extern from "memlock.h" nogil:
    void memlock_charge(uint64_t pages)
    void memlock_uncharge(uint64_t pages)
    uint64_t memlock_charged()
    uint64_t memlock_vmlck()
    uint64_t memlock_allowed(int64_t limit, bint capable)
    bint memlock_capable()
    void memlock_forget()
    int MEMLOCK_UNLIMITED

cdef extern from *:
    void prefetch "__builtin_prefetch"(const void *, int write) noexcept nogil

cdef enum:
    AHEAD = 16                          # mappings fetched before their turn: each is a cache miss
    WAIT_NS = 100000000                 # between looks at pending signals
    WINDOW = 64                         # mappings read from the table at once
    UNMAP_ROUNDS = 10                   # of callbacks for one mapping; the kernel stops with a BUG after them


cdef uint64_t charged_pages() noexcept nogil:
    return memlock_charged()


cdef uint64_t process_locked_pages() noexcept nogil:
    return memlock_charged() + memlock_vmlck()


cdef void forget_charges() noexcept nogil:
    memlock_forget()


cdef int charge_process(uint64_t pages, int64_t limit) noexcept nogil:
    """Charge pages to the process's locked memory, for somebody without CAP_IPC_LOCK."""
    if pages > memlock_allowed(limit, False):
        return -ENOMEM
    memlock_charge(pages)
    return 0


cdef void uncharge_process(uint64_t pages) noexcept nogil:
    memlock_uncharge(pages)


cdef type1_t *type1_new(int version, bint v2, uint32_t entry_limit, int64_t memlock_limit, void *owner) noexcept nogil:
    cdef pthread_rwlockattr_t attributes
    cdef type1_t *t = <type1_t *> calloc(1, sizeof(type1_t))
    if not t:
        return NULL
    t.mappings = rangemap_new()
    t.pool = dmapool_new()
    if not t.mappings or not t.pool:
        rangemap_free(t.mappings)
        dmapool_free(t.pool)
        free(t)
        return NULL
    # Devices hammer the read side: without this, map and unmap would starve.
    pthread_rwlockattr_init(&attributes)
    pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP)
    pthread_rwlock_init(&t.iotlb, &attributes)
    pthread_mutex_init(&t.lock, NULL)
    pthread_cond_init(&t.valid, NULL)
    t.version = version
    t.v2 = v2
    t.dma_avail = entry_limit
    t.memlock_limit = memlock_limit
    t.owner = owner
    t.pgsizes = ~<uint64_t> (PS - 1)
    t.vaddr_generation = 1
    t.vaddrs_valid = True
    return t


cdef void type1_free(type1_t *t) noexcept nogil:
    remove_all(t)
    rangemap_free(t.mappings)
    dmapool_free(t.pool)
    free(t.ranges)
    pthread_cond_destroy(&t.valid)
    pthread_rwlock_destroy(&t.iotlb)
    pthread_mutex_destroy(&t.lock)
    free(t)


# ---- pinning and accounting

cdef uint64_t pins_of(const dma_t *dma) noexcept nogil:
    return rangemap_count(dma.pinned) if dma.pinned else 0


cdef unsigned rules_of(const type1_t *t, const dma_t *dma) noexcept nogil:
    cdef unsigned rules = PIN_WRITE if dma.prot & MAP_WRITE else 0
    rules |= PIN_ZERO_PAGE_FREE if t.version <= V6_1 else PIN_NO_WRITEBACK
    return rules | (PIN_IN_BATCHES if t.version >= V5_12 else 0)


cdef int pin_mapping(type1_t *t, dma_t *dma) noexcept nogil:
    """Pin the mapping's memory for the IOMMU and account it; pages that are pinned externally are accounted already."""
    cdef uint64_t allowed = memlock_allowed(t.memlock_limit, dma.lock_cap)
    cdef uint64_t counted, external = dma.countable
    cdef pin *pages = NULL
    cdef int err
    if allowed + external > allowed:
        allowed += external
    err = pin_memory(vaddr_of(t, dma)[0], dma.size, rules_of(t, dma), allowed, &pages, &counted)
    if err:
        return err
    counted -= min(external, counted)
    memlock_charge(counted)
    dma.locked += counted
    pthread_rwlock_wrlock(&t.iotlb)
    dma.pages = pages
    pthread_rwlock_unlock(&t.iotlb)
    return 0


cdef void unpin_mapping(type1_t *t, dma_t *dma) noexcept nogil:
    """Take the mapping out of the IOMMU; what stays accounted is what is pinned externally."""
    cdef pin *pages = dma.pages
    if not pages:
        return
    pthread_rwlock_wrlock(&t.iotlb)
    dma.pages = NULL
    pthread_rwlock_unlock(&t.iotlb)
    pin_release(pages)
    memlock_uncharge(dma.locked - dma.countable)
    dma.locked = dma.countable


cdef int count_page(type1_t *t, dma_t *dma, uint64_t iova, bint *countable) noexcept nogil:
    """Pin one page for an emulated device; it is accounted only where no IOMMU has it accounted."""
    cdef uint64_t allowed = <uint64_t> -1 if iommu_mapped(dma) else memlock_allowed(t.memlock_limit, dma.lock_cap)
    cdef uint64_t counted
    cdef pin *page = NULL
    cdef int err = pin_memory(vaddr_of(t, dma)[0] + (iova - dma.iova), PS, rules_of(t, dma), allowed, &page, &counted)
    if err:
        return err
    pin_release(page)
    countable[0] = counted != 0
    if countable[0]:
        dma.countable += 1
        if not iommu_mapped(dma):
            memlock_charge(1)
            dma.locked += 1
    return 0


cdef void uncount_page(dma_t *dma, bint countable) noexcept nogil:
    if not countable:
        return
    dma.countable -= 1
    if not iommu_mapped(dma):
        memlock_uncharge(1)
        dma.locked -= 1


# ---- the table

cdef dma_t *find_mapping(type1_t *t, uint64_t iova) noexcept nogil:
    cdef rangemap_entry entry
    return <dma_t *> entry.value if rangemap_find(t.mappings, iova, &entry) else NULL


cdef bint ends_at_the_top(type1_t *t, uint64_t iova, uint64_t size) noexcept nogil:
    """Up to 6.12 such a range's end wraps to 0, and the look-up goes astray: nothing is ever found."""
    return t.version < V7_2 and iova + size == 0


cdef void release(type1_t *t, dma_t *dma) noexcept nogil:
    """Free a mapping that has left the table."""
    pin_release(dma.pages)
    memlock_uncharge(dma.locked)
    t.mapped_bytes -= dma.size
    if not vaddr_valid(t, dma):
        made_valid(t)
    if dma.pinned:
        rangemap_free(dma.pinned)
    free(dma.bitmap)
    dmapool_give(t.pool, dma)
    t.dma_avail += 1


cdef void remove_mapping(type1_t *t, dma_t *dma) noexcept nogil:
    cdef rangemap_entry entry
    pthread_rwlock_wrlock(&t.iotlb)
    rangemap_remove(t.mappings, dma.iova, &entry)
    pthread_rwlock_unlock(&t.iotlb)
    release(t, dma)


cdef uint64_t remove_unfindable(type1_t *t) noexcept nogil:
    cdef uint64_t size = 0
    cdef dma_t *dma
    while t.unfindable:
        dma = t.unfindable
        t.unfindable = dma.next
        size += dma.size
        release(t, dma)
    return size


cdef void remove_all(type1_t *t) noexcept nogil:
    cdef dma_t *dma = first_from(t, 0)
    while dma:
        remove_mapping(t, dma)
        dma = first_from(t, 0)
    remove_unfindable(t)


cdef bint in_one_range(type1_t *t, uint64_t iova, uint64_t last) noexcept nogil:
    cdef size_t i
    for i in range(t.nranges):
        if iova >= t.ranges[i].start and last <= t.ranges[i].last:
            return True
    return t.nranges == 0


# ---- waiting for a valid vaddr

cdef void made_valid(type1_t *t) noexcept nogil:
    t.vaddr_invalid_count -= 1
    pthread_cond_broadcast(&t.valid)


cdef bint interrupted(void *owner) noexcept with gil:
    """Run signal handlers; what one raises is kept for the call that waits."""
    try:
        PyErr_CheckSignals()
    except BaseException as exc:
        (<object> owner)._interrupt(exc)
        return True
    return False


cdef bint is_invalid(type1_t *t, uint64_t iova, bint everything) noexcept nogil:
    cdef dma_t *dma = NULL if everything else find_mapping(t, iova)
    return t.vaddr_invalid_count != 0 if everything else dma != NULL and not vaddr_valid(t, dma)


cdef int wait_until_valid(type1_t *t, uint64_t iova, bint everything) noexcept nogil:
    """What stands in the way of a use of the mapping at `iova`, or of all: -EBUSY, or up to 5.12 a wait for new vaddrs."""
    cdef timespec until
    cdef bint stop
    if t.version >= V6_1:
        return -EBUSY if t.vaddr_invalid_count else 0
    while is_invalid(t, iova, everything):
        if t.container_closed or t.dead:
            return -EFAULT
        clock_gettime(CLOCK_REALTIME, &until)
        until.tv_nsec += WAIT_NS
        if until.tv_nsec >= 1000000000:
            until.tv_sec += 1
            until.tv_nsec -= 1000000000
        if pthread_cond_timedwait(&t.valid, &t.lock, &until):
            pthread_mutex_unlock(&t.lock)
            stop = interrupted(t.owner)
            pthread_mutex_lock(&t.lock)
            if stop:
                return -EINTR
    return 0


# ---- map

cdef int update_vaddr(type1_t *t, uint64_t iova, uint64_t vaddr, uint64_t size) noexcept nogil:
    cdef dma_t *dma = NULL if ends_at_the_top(t, iova, size) else first_from(t, iova)
    if not dma or dma.iova > iova + size - 1:
        return -ENOENT
    if vaddr_valid(t, dma) or dma.iova != iova or dma.size != size:
        return -EINVAL
    # The owner can't change: a model lives in one process, so there is nothing to account anew.
    vaddr_of(t, dma)[0] = vaddr
    set_vaddr_valid(t, dma, True)
    made_valid(t)
    return 0


cdef void fetch_ahead(const type1_t *t, const rangemap_entry *window, size_t first, size_t n) noexcept nogil:
    cdef size_t i
    for i in range(first, first + n):
        prefetch(<void *> window[i].value, 1)
        prefetch(vaddr_of(t, <dma_t *> window[i].value), 1)


cdef bint restore_vaddrs(type1_t *t, const uint64_t *rows, size_t n) noexcept nogil:
    """update_vaddr for every mapping, all of which are invalid; False, and nothing has changed, if it is not just that."""
    cdef uint64_t everything = rangemap_count(t.mappings)
    if n == 0 or n != everything or t.vaddr_invalid_count != everything or t.unfindable:
        return False
    if not dmapool_restore(t.mappings, rows, n, min_pgsize(t), not t.vaddr_column):
        return False
    pthread_rwlock_wrlock(&t.iotlb)
    t.vaddr_column = not t.vaddr_column
    pthread_rwlock_unlock(&t.iotlb)
    t.vaddr_generation += 1
    t.vaddrs_valid = True
    t.vaddr_invalid_count = 0
    pthread_cond_broadcast(&t.valid)
    return True


cdef int update_vaddrs(type1_t *t, const uint64_t *rows, size_t n, size_t *failed) noexcept nogil:
    """update_vaddr for n rows of (iova, vaddr, size), all or none; *failed = the row that stands against it.

    Rows in ascending order are found by reading the table in order; they may be all that are invalid, as of whoever
    restores everything, or some.
    """
    cdef rangemap_entry window[WINDOW]
    cdef size_t i, at = 0, filled = 0
    cdef dma_t *dma
    cdef int err = 0
    cdef uint64_t *before
    if restore_vaddrs(t, rows, n):
        return 0
    before = <uint64_t *> malloc(n * 8 + 8)
    if not before:
        failed[0] = 0
        return -ENOMEM
    for i in range(n):
        err = check_map(t, rows[3 * i], rows[3 * i + 1], rows[3 * i + 2], MAP_VADDR)
        if err:
            break
        if at == filled or window[at].start != rows[3 * i]:
            filled = rangemap_copy(t.mappings, rows[3 * i], window, WINDOW)
            at = 0
            fetch_ahead(t, window, 0, min(<size_t> AHEAD, filled))
        if at + AHEAD < filled:
            fetch_ahead(t, window, at + AHEAD, 1)
        dma = <dma_t *> window[at].value if filled else NULL
        if not dma or window[at].start > rows[3 * i] + (rows[3 * i + 2] - 1) or ends_at_the_top(t, rows[3 * i], rows[3 * i + 2]):
            err = -ENOENT
        elif vaddr_valid(t, dma) or window[at].start != rows[3 * i] or window[at].last != rows[3 * i] + (rows[3 * i + 2] - 1):
            err = -EINVAL
        if err:
            break
        before[i] = vaddr_of(t, dma)[0]
        vaddr_of(t, dma)[0] = rows[3 * i + 1]
        set_vaddr_valid(t, dma, True)
        at += 1
    if err:
        failed[0] = i
        for i in range(failed[0]):
            dma = find_mapping(t, rows[3 * i])
            vaddr_of(t, dma)[0] = before[i]
            set_vaddr_valid(t, dma, False)
    elif n:
        t.vaddr_invalid_count -= n
        pthread_cond_broadcast(&t.valid)
    free(before)
    return err


cdef int check_map(type1_t *t, uint64_t iova, uint64_t vaddr, uint64_t size, uint32_t flags) noexcept nogil:
    if size == 0:
        return -EINVAL
    if iova + size - 1 < iova or vaddr + size - 1 < vaddr:
        return -EOVERFLOW if t.version >= V7_2 else -EINVAL
    if ((flags & (MAP_READ | MAP_WRITE)) != 0) == ((flags & MAP_VADDR) != 0):
        return -EINVAL
    return -EINVAL if (size | iova | vaddr) & (min_pgsize(t) - 1) else 0


cdef int fill_mapping(type1_t *t, dma_t *dma) noexcept nogil:
    cdef int err = 0
    if t.domains:
        err = pin_mapping(t, dma)
    if not err and t.tracking:
        err = dirty_allocate(t, dma)
    return err


cdef int map_dma(type1_t *t, uint64_t iova, uint64_t vaddr, uint64_t size, uint32_t flags) noexcept nogil:
    cdef uint64_t last = iova + size - 1
    cdef bint top = ends_at_the_top(t, iova, size)
    cdef dma_t *dma
    cdef int err = check_map(t, iova, vaddr, size, flags)
    if err:
        return err
    if flags & MAP_VADDR:
        return update_vaddr(t, iova, vaddr, size)
    if not top and rangemap_overlaps(t.mappings, iova, last):
        return -EEXIST
    if t.dma_avail == 0:
        return -ENOSPC
    if not in_one_range(t, iova, last):
        return -EINVAL
    dma = dmapool_take(t.pool)
    if not dma:
        return -ENOMEM
    dma.iova = iova
    dma.size = size
    vaddr_of(t, dma)[0] = vaddr
    set_vaddr_valid(t, dma, True)
    dma.prot = flags
    dma.lock_cap = t.memlock_limit == MEMLOCK_UNLIMITED or memlock_capable()
    t.dma_avail -= 1
    t.mapped_bytes += size
    err = fill_mapping(t, dma)
    if not err and not top:
        pthread_rwlock_wrlock(&t.iotlb)
        err = rangemap_insert(t.mappings, iova, last, <uint64_t> dma)
        pthread_rwlock_unlock(&t.iotlb)
    if err:
        release(t, dma)
        return err
    if top:
        dma.next = t.unfindable
        t.unfindable = dma
    return 0


# ---- unmap

cdef void notify_unmap(void *owner, uint64_t iova, uint64_t size) noexcept with gil:
    (<object> owner)._notify_unmap(iova, size)


cdef void revert_invalid(type1_t *t, uint64_t iova, dma_t *stop) noexcept nogil:
    cdef dma_t *dma = first_from(t, iova)
    while dma != stop:
        set_vaddr_valid(t, dma, True)
        t.vaddr_invalid_count -= 1
        dma = next_of(t, dma)


cdef int invalidate_vaddrs(type1_t *t, uint64_t iova, uint64_t last, bint everything, uint64_t *size) noexcept nogil:
    """Mark the vaddrs of a range invalid; all of them must be valid."""
    cdef rangemap_entry window[WINDOW]
    cdef uint64_t key = iova
    cdef size_t i, filled = WINDOW
    cdef dma_t *dma
    if everything and t.vaddr_invalid_count == 0:
        t.vaddr_generation += 1
        t.vaddrs_valid = False
        t.vaddr_invalid_count = rangemap_count(t.mappings)
        dma = t.unfindable
        while dma:
            t.vaddr_invalid_count += 1
            dma = dma.next
        size[0] += t.mapped_bytes
        return 0
    while filled == WINDOW:
        filled = rangemap_copy(t.mappings, key, window, WINDOW)
        fetch_ahead(t, window, 0, filled)
        for i in range(filled):
            dma = <dma_t *> window[i].value
            if dma.iova > last:
                filled = 0
                break
            if not vaddr_valid(t, dma):
                revert_invalid(t, iova, dma)
                return -EINVAL
            set_vaddr_valid(t, dma, False)
            t.vaddr_invalid_count += 1
            size[0] += dma.size
        if not filled or window[filled - 1].last == <uint64_t> -1:
            break
        key = window[filled - 1].last + 1
    dma = t.unfindable if everything else NULL
    while dma:
        if vaddr_valid(t, dma):
            set_vaddr_valid(t, dma, False)
            t.vaddr_invalid_count += 1
            size[0] += dma.size
        dma = dma.next
    return 0


cdef int check_unmap(type1_t *t, uint64_t iova, uint64_t size, uint32_t flags, uint64_t pgsize) noexcept nogil:
    cdef uint64_t page = min_pgsize(t)
    if flags & UNMAP_VADDR and t.emulated and t.version >= V6_1:
        return -EBUSY
    if iova & (page - 1):
        return -EINVAL
    if flags & UNMAP_ALL:
        if iova or size:
            return -EINVAL
    elif size == 0 or size & (page - 1):
        return -EINVAL
    elif iova + size - 1 < iova:
        return -EOVERFLOW if t.version >= V7_2 else -EINVAL
    if flags & UNMAP_DIRTY and (not t.tracking or pgsize != page):
        return -EINVAL
    return 0


cdef int unmap_dma(type1_t *t, uint64_t iova, uint64_t size, uint32_t flags, uint64_t pgsize, uint64_t data,
                   uint64_t *unmapped) noexcept nogil:
    """Remove (or, with VADDR, invalidate) the mappings of a range.  *unmapped = bytes, also of those gone before an error."""
    cdef bint everything = (flags & UNMAP_ALL) != 0
    cdef uint64_t last = <uint64_t> -1 if everything else iova + size - 1
    cdef uint64_t busy_iova = 0
    cdef int rounds = 0
    cdef dma_t *dma
    cdef int err = check_unmap(t, iova, size, flags, pgsize)
    unmapped[0] = 0
    if err:
        return err
    if t.v2 and not everything and bisects(t, iova, last):
        return -EINVAL
    if not everything and ends_at_the_top(t, iova, size):
        return 0
    if flags & UNMAP_VADDR:
        dma = first_from(t, iova)
        if not t.v2 and dma and dma.iova < iova:
            return 0
        err = invalidate_vaddrs(t, iova, last, everything, unmapped)
        if err:
            unmapped[0] = 0
        return err
    dma = first_from(t, iova)
    while dma and dma.iova <= last:
        if dma.iova < iova:
            break                       # v1: a range that starts inside a mapping ends the walk
        if pins_of(dma):
            # Emulated devices must let go first.  They are called without the lock, so everything may have changed after.
            rounds = rounds + 1 if rounds and busy_iova == dma.iova else 1
            busy_iova = dma.iova
            if rounds > UNMAP_ROUNDS:
                return -EBUSY
            size = dma.size
            pthread_mutex_unlock(&t.lock)
            notify_unmap(t.owner, busy_iova, size)
            pthread_mutex_lock(&t.lock)
            if t.v2 and not everything and bisects(t, iova, last):
                return -EINVAL
            dma = first_from(t, iova)
            continue
        if flags & UNMAP_DIRTY:
            err = dirty_copy_out(t, dma, iova, data)
            if err:
                return err
        unmapped[0] += dma.size
        remove_mapping(t, dma)
        dma = first_from(t, iova)
    if everything:
        unmapped[0] += remove_unfindable(t)
    return 0
