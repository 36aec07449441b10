"""TCE tables of a POWER partitionable endpoint: DMA windows, the translations in them, and memory registered for them.

A translation control entry (TCE) leads one IOMMU page to process memory, which version 2 of the interface has registered
and pinned before.  Loops over pages run without the GIL, under the lock of the tables.

Source: the SPAPR TCE driver of VFIO and the IODA2 code of PowerNV.
"""
cimport cython
from libc.errno cimport EFAULT, EINVAL, ENOMEM, EPERM
from libc.stdint cimport int64_t, uint32_t, uint64_t

from .dma cimport DmaPath
from .errno cimport raise_errno
from .mappings cimport charge_process, uncharge_process
from .state cimport (
    PIN_WRITE, pin, pin_memory, pin_read, pin_release, pin_write, pthread_rwlock_destroy, pthread_rwlock_init,
    pthread_rwlock_rdlock, pthread_rwlock_t, pthread_rwlock_unlock, pthread_rwlock_wrlock,
)

cdef extern from "memlock.h" nogil:
    bint memlock_capable()

cdef extern from "usercopy.h" nogil:
    int user_read(void *dst, uint64_t src, size_t n)
    int user_write(uint64_t dst, const void *src, size_t n)

cdef extern from "tcetable.h" nogil:
    struct tce_region:
        uint64_t vaddr, size, mapped
        pin *memory
    struct tce:
        uint64_t vaddr
        uint32_t prot
        tce_region *region
    ctypedef struct tce_table:
        pass
    tce_table *tce_table_new(uint64_t npages)
    void tce_table_free(tce_table *)
    const tce *tce_table_find(const tce_table *, uint64_t index)
    int tce_table_fill(tce_table *, uint64_t first, uint64_t npages, uint64_t vaddr, uint64_t page, uint32_t prot,
                       tce_region *region, uint64_t *done)
    uint64_t tce_table_clear(tce_table *, uint64_t first, uint64_t npages)

cdef enum:
    READ = 1
    WRITE = 2
    SLOTS = 2


def charge(uint64_t npages, int64_t limit):
    """Charge locked memory to the process; ENOMEM above the limit, unless the caller has CAP_IPC_LOCK."""
    if charge_process(npages, -2 if memlock_capable() else limit):
        raise_errno(ENOMEM, "lock_memory", None, None, f"{npages} pages are above the limit of locked memory")


def uncharge(uint64_t npages):
    """Give charged pages back."""
    uncharge_process(npages)


cdef class Region:
    """Registered memory: pinned for writing from here on.

    Attributes
    ----------
    vaddr, size : int
    shift : int
        log2 of the largest IOMMU page that it allows.
    mapped : int
        TCEs that lead into it.
    released : bool
        Nobody has it registered any more; it goes with the last TCE.
    """
    cdef tce_region c                   # stays where it is: TCEs lead to it while they are mapped
    cdef readonly unsigned shift
    cdef public bint released
    cdef object __weakref__

    def __cinit__(self, uint64_t vaddr, uint64_t size, unsigned shift):
        cdef uint64_t counted = 0
        cdef int err = 0
        self.c.vaddr, self.c.size, self.shift = vaddr, size, shift
        if size:
            with nogil:
                err = pin_memory(vaddr, size, PIN_WRITE, <uint64_t> -1, &self.c.memory, &counted)
        if err:
            raise_errno(-err, "register_memory", None, size, "memory to be registered is writable, all of it")

    def __dealloc__(self):
        pin_release(self.c.memory)

    @property
    def vaddr(self):
        return self.c.vaddr

    @property
    def size(self):
        return self.c.size

    @property
    def mapped(self):
        return self.c.mapped


cdef struct window_t:
    uint64_t start, npages
    unsigned shift
    tce_table *table


@cython.no_gc           # regions lead to nothing; __dealloc__ needs them
cdef class TceTables:
    """The windows of a container and their translations.  Thread-safe."""
    cdef window_t windows[SLOTS]
    cdef pthread_rwlock_t lock
    cdef set regions                    # TCEs lead to these, also when the container that registered them is closed
    cdef bint stale                     # one of them was released while a TCE led to it

    def __cinit__(self):
        self.regions = set()
        pthread_rwlock_init(&self.lock, NULL)

    def __dealloc__(self):
        with nogil:
            for slot in range(SLOTS):
                self.drop(&self.windows[slot])
        pthread_rwlock_destroy(&self.lock)

    cdef void drop(self, window_t *window) noexcept nogil:
        tce_table_free(window.table)
        window.table = NULL

    def create(self, unsigned slot, uint64_t start, uint64_t npages, unsigned shift):
        """Put an empty window into a free slot."""
        cdef tce_table *table = tce_table_new(npages)
        if not table:
            raise_errno(ENOMEM, "create_window", start, npages << shift)
        with nogil:
            pthread_rwlock_wrlock(&self.lock)
        self.windows[slot].start, self.windows[slot].npages, self.windows[slot].shift = start, npages, shift
        self.windows[slot].table = table
        pthread_rwlock_unlock(&self.lock)

    def remove(self, unsigned slot):
        """Clear a window, and free its slot."""
        with nogil:
            pthread_rwlock_wrlock(&self.lock)
            self.drop(&self.windows[slot])
            pthread_rwlock_unlock(&self.lock)
        self.forget()

    def release(self, Region region not None):
        """Nobody has a region registered any more: let it go, now or with the last TCE."""
        if region.c.mapped:
            self.stale = True
        else:
            self.regions.discard(region)

    cdef int forget(self) except -1:
        """Let go of released regions to which no TCE leads any more."""
        cdef Region region
        if not self.stale:
            return 0
        self.stale = False
        for region in list(self.regions):
            if region.released:
                if region.c.mapped:
                    self.stale = True
                else:
                    self.regions.discard(region)
        return 0

    def clear(self):
        """Clear every entry of every window."""
        with nogil:
            pthread_rwlock_wrlock(&self.lock)
            for slot in range(SLOTS):
                if self.windows[slot].table:
                    tce_table_clear(self.windows[slot].table, 0, self.windows[slot].npages)
            pthread_rwlock_unlock(&self.lock)
        self.forget()

    def map(self, unsigned slot, uint64_t first, uint64_t npages, uint64_t vaddr, uint32_t prot, regions):
        """Write TCEs; what was there is replaced.

        Parameters
        ----------
        slot : int
            A window that is there; ``first`` and ``npages`` are inside it.
        regions : list of Region or None
            Registered memory (version 2); None: each page is pinned by itself (version 1).

        Raises
        ------
        VfioError
            EINVAL, EFAULT, ENOMEM; then the entries before the failed one are empty.
        """
        cdef window_t *window = &self.windows[slot]
        cdef uint64_t page = <uint64_t> 1 << window.shift, i = 0, at = vaddr
        cdef Region region = None
        cdef uint64_t count
        cdef int err = 0
        if regions is None:
            with nogil:
                err = pinnable(at, npages * page, prot & WRITE)
                if err:             # which page is it?
                    while i < npages and pinnable(at + i * page, page, prot & WRITE) == 0:
                        i += 1
            if not err:
                err = self.fill(window, first, npages, vaddr, prot, NULL, &i)
        else:
            while i < npages and not err:
                if region is None or at < region.c.vaddr or at + page > region.c.vaddr + region.c.size:
                    region = find(regions, at, page)
                    if region is None or window.shift > region.shift:
                        err = -EINVAL
                        break
                self.regions.add(region)
                # All pages up to the end of this region.
                count = min(npages - i, (region.c.vaddr + region.c.size - at) // page)
                err = self.fill(window, first + i, count, at, prot, &region.c, &count)
                i += count
                at += count * page
        if err:
            with nogil:
                pthread_rwlock_wrlock(&self.lock)
                tce_table_clear(window.table, first, i)
                pthread_rwlock_unlock(&self.lock)
        self.forget()
        if err:
            raise_errno(-err, "map_dma", window.start + ((first + i) << window.shift), npages * page,
                        "memory must be registered as a whole, in regions that allow the window's page size"
                        if regions is not None else "memory that is there, writable where it is mapped for writing")

    cdef int fill(self, window_t *window, uint64_t first, uint64_t npages, uint64_t vaddr, uint32_t prot,
                  tce_region *region, uint64_t *done):
        cdef int err
        with nogil:
            pthread_rwlock_wrlock(&self.lock)
            err = tce_table_fill(window.table, first, npages, vaddr, <uint64_t> 1 << window.shift, prot, region, done)
            pthread_rwlock_unlock(&self.lock)
        return err

    def unmap(self, unsigned slot, uint64_t first, uint64_t npages):
        """Clear TCEs; empty ones are passed over.  Return how many were set."""
        cdef uint64_t found
        with nogil:
            pthread_rwlock_wrlock(&self.lock)
            found = tce_table_clear(self.windows[slot].table, first, npages)
            pthread_rwlock_unlock(&self.lock)
        self.forget()
        return found

    def entry(self, unsigned slot, uint64_t index):
        """Return (vaddr, prot) of a TCE; prot 0: it is empty."""
        cdef const tce *found
        if not self.windows[slot].table or index >= self.windows[slot].npages:
            raise_errno(EINVAL, "read_tce", None, None, f"slot {slot} has no entry {index}")
        found = tce_table_find(self.windows[slot].table, index)
        if not found:
            return 0, 0
        return found.vaddr, found.prot

    cdef int access(self, uint64_t iova, void *data, uint64_t size, bint write, uint64_t *done) noexcept nogil:
        cdef uint64_t n, offset, page
        cdef const tce *found
        cdef int err = 0
        done[0] = 0
        pthread_rwlock_rdlock(&self.lock)
        while done[0] < size and not err:
            found = self.find_entry(iova + done[0], &page)
            if not found:
                err = -EINVAL
                break
            # The hardware has no write-only pages.
            if write and not found.prot & WRITE:
                err = -EPERM
                break
            offset = (iova + done[0]) & (page - 1)
            n = min(size - done[0], page - offset)
            if found.region:
                if write:
                    err = pin_write(found.region.memory, found.vaddr + offset - found.region.vaddr,
                                    <char *> data + done[0], n)
                else:
                    err = pin_read(found.region.memory, found.vaddr + offset - found.region.vaddr,
                                   <char *> data + done[0], n)
            elif write:
                err = user_write(found.vaddr + offset, <char *> data + done[0], n)
            else:
                err = user_read(<char *> data + done[0], found.vaddr + offset, n)
            if not err:
                done[0] += n
        pthread_rwlock_unlock(&self.lock)
        return err

    cdef const tce *find_entry(self, uint64_t iova, uint64_t *page) noexcept nogil:
        cdef window_t *window
        for slot in range(SLOTS):
            window = &self.windows[slot]
            if window.table and iova >= window.start and (iova - window.start) >> window.shift < window.npages:
                page[0] = <uint64_t> 1 << window.shift
                return tce_table_find(window.table, (iova - window.start) >> window.shift)
        return NULL


cdef Region find(list regions, uint64_t at, uint64_t page):
    cdef Region region
    for region in regions:
        if at >= region.c.vaddr and page <= region.c.size and at - region.c.vaddr <= region.c.size - page:
            return region
    return None


cdef int pinnable(uint64_t vaddr, uint64_t size, bint write) noexcept nogil:
    cdef pin *memory = NULL
    cdef uint64_t counted = 0
    cdef int err
    if not size:
        return 0
    err = pin_memory(vaddr, size, PIN_WRITE if write else 0, <uint64_t> -1, &memory, &counted)
    if err:
        return -EFAULT
    pin_release(memory)
    return 0


cdef class TcePath(DmaPath):
    """The way of a group's devices through a container's tables, up to a fault: then the endpoint is frozen.

    Parameters
    ----------
    tables : TceTables
    freezes : bool
        Whether there is an endpoint that a fault can freeze.

    Attributes
    ----------
    frozen : bool
        No DMA passes.
    """
    cdef TceTables tables
    cdef bint freezes
    cdef public bint frozen

    def __cinit__(self, TceTables tables not None, bint freezes=True):
        self.tables = tables
        self.freezes = freezes

    cdef int access(self, uint64_t iova, void *data, uint64_t size, bint write, uint64_t *done) noexcept nogil:
        cdef int err
        done[0] = 0
        if self.frozen:
            return -EPERM
        err = self.tables.access(iova, data, size, write, done)
        if err and self.freezes:
            self.frozen = True
        return err
