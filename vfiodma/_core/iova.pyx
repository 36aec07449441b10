"""Where mappings go: an allocator of I/O virtual addresses."""
import errno as _errno
from typing import NamedTuple

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc

from ..errors import IovaSpaceError
from ..types import IovaRange
from .args cimport u64
from .errno cimport raise_errno


cdef extern from "gaps.h" nogil:
    uint64_t gaps_largest(const gaps *, uint64_t align, uint64_t last)
    size_t gaps_count(const gaps *)


cdef extern from "rangemap.h" nogil:
    size_t rangemap_count(rangemap *)
    size_t rangemap_copy(rangemap *, uint64_t key, rangemap_entry *out, size_t n)


cdef extern from "iovaspace.h" nogil:
    ctypedef struct iovaspace_request:
        uint64_t npages, guard, align, last, hint, hint_align
        bint top_down, ephemeral
    iovaspace *iovaspace_new(unsigned pgshift)
    void iovaspace_free(iovaspace *)
    int iovaspace_set_ranges(iovaspace *, const iovaspace_range *, size_t n)
    int iovaspace_allocate(iovaspace *, const iovaspace_request *, uint64_t *start)
    int iovaspace_reserve(iovaspace *, uint64_t start, uint64_t npages)
    int iovaspace_release(iovaspace *, uint64_t start)
    size_t iovaspace_list(iovaspace *, bint stranded, uint64_t page, iovaspace_range *out, size_t n, uint64_t *next)
    uint64_t iovaspace_free_pages(iovaspace *)
    const char *iovaspace_check(iovaspace *)


cdef extern from *:
    int __builtin_clzll(unsigned long long) nogil


cdef enum:
    KIB4 = 1 << 12
    MIB2 = 1 << 21
    GIB = 1 << 30
    BATCH = 256

cdef uint64_t ALL = <uint64_t>-1        # no limit; also iovaspace's "no hint"


cdef inline uint64_t highest_bit(uint64_t value) noexcept nogil:
    return <uint64_t>1 << (63 - __builtin_clzll(value))


class IovaStats(NamedTuple):
    """What is left of an I/O address space.  Sizes are bytes.

    Attributes
    ----------
    total : int
        Bytes of the valid ranges: the reported ranges without the reserved windows.
    used : int
        Bytes of them in use, guards included.  ``total == used + free``.
    free : int
        Bytes of them not in use, page 0 and the free part of the ephemeral pool included.
    allocations : int
        Allocations and reservations alive, those outside of the valid ranges included.
    gaps : int
        Holes between them.  Page 0 is in no gap; a gap does not reach across the border of an ephemeral chunk.
    chunks : int
        Chunks of the ephemeral pool.
    fragmentation : float
        ``1 - largest[pgsize] / free``; 0.0 when nothing is free.
    largest : dict
        Alignment in bytes -> bytes of the largest hole beginning on it, for 4 KiB, 2 MiB, 1 GiB and every page size
        up to 1 GiB (alignments below the smallest page size are left out).
    """

    total: int
    used: int
    free: int
    allocations: int
    gaps: int
    chunks: int
    fragmentation: float
    largest: dict


cdef list pairs(object ranges, str operation):
    """(start, last) for each, sorted and checked."""
    cdef list out = []
    cdef uint64_t start, last
    for a, b in ranges:
        start = u64(operation, a)
        last = u64(operation, b)
        if last < start:
            raise_errno(_errno.EINVAL, operation, start, None, f"range with last {last:#x} below its start")
        out.append((start, last))
    out.sort()
    return out


cdef list subtract(list ranges, list reserved, unsigned pgshift):
    """Pages of the ranges, rounded inwards, without the reserved windows, rounded outwards; joined where they touch."""
    cdef list joined = []
    low = high = 0
    for start, last in ranges:
        start, end = (start + (1 << pgshift) - 1) >> pgshift, (last + 1) >> pgshift
        if start >= end:
            continue
        if start > high:
            joined.append((low, high))
            low, high = start, end
        else:
            high = max(high, end)
    joined.append((low, high))
    out = []
    windows = [(start >> pgshift, (last >> pgshift) + 1) for start, last in reserved]
    for start, end in joined:
        for window_start, window_end in windows:
            if window_end <= start or window_start >= end:
                continue
            if window_start > start:
                out.append((start, window_start - 1))
            start = max(start, window_end)
        if start < end:
            out.append((start, end - 1))
    return out


cdef class IovaAllocator:
    """Hands out I/O virtual addresses inside the ranges that the IOMMU reports.

    Parameters
    ----------
    ranges : iterable of IovaRange or (start, last)
        The ranges that may be mapped; `last` is part of the range.  They may touch or overlap.  Ends that are not on a
        page border are rounded inwards.
    pgsizes : int
        Bitmap of the IOMMU's page sizes, bit n = 2**n bytes.  The smallest is the granule of everything and is at least
        4 KiB.
    reserved : iterable of IovaRange or (start, last)
        Windows that must not be used (MSI, for example), rounded outwards.

    Attributes
    ----------
    pgsizes : int
        As given.
    pgsize : int
        The smallest page size, in bytes.

    Notes
    -----
    The lowest place that fits is used; with `top_down` the highest.  That, and the answer whether there is a place, is
    exact for alignments of the smallest page size, 2 MiB and 1 GiB, and takes O(log n) however fragmented the space is.
    For other alignments up to 64 holes are tried in order, then the first hole that is sure to fit; only when there is
    none either, the remaining holes are tried one by one, so that the answer whether there is a place is still exact.

    Ephemeral allocations share chunks (2 MiB and larger) carved from the top of the space, so that they never fragment
    the lasting ones.  A chunk goes back when it is empty.  When nothing else is left, lasting allocations may use free
    space of chunks, and ephemeral ones any hole.  The cost of that is borne by the calls that filled the chunk.

    IOVA 0 is never handed out by `allocate`, too many drivers take it for "none"; `reserve` can have it.

    Thread safe: one mutex, which does not rely on the GIL.  Allocating and freeing do not release the GIL unless they
    have to wait.

    Source: struct vfio_iommu_type1_info_cap_iova_range and VFIO_IOMMU_MAP_DMA in include/uapi/linux/vfio.h; errno as
    vfio_dma_do_map in drivers/vfio/vfio_iommu_type1.c.
    """

    def __cinit__(self, ranges, *, pgsizes=0x40201000, reserved=()):
        self.pgsizes = u64("IovaAllocator", pgsizes)
        if not self.pgsizes or self.pgsizes & (KIB4 - 1):
            raise_errno(_errno.EINVAL, "IovaAllocator", None, None,
                        f"pgsizes is a bitmap of page sizes from 4 KiB up, it is {pgsizes:#x}")
        self.pgsize = self.pgsizes & (~self.pgsizes + 1)
        self.pgshift = int(self.pgsize).bit_length() - 1
        windows = pairs(reserved, "IovaAllocator")
        valid = subtract(pairs(ranges, "IovaAllocator"), windows, self.pgshift)
        self.space = iovaspace_new(self.pgshift)
        if self.space is NULL:
            raise_errno(_errno.ENOMEM, "IovaAllocator")
        self.apply(valid, windows)

    def __dealloc__(self):
        iovaspace_free(self.space)

    def allocate(self, size, *, align=None, limit=None, hint=None, bint top_down=False, guard=0, bint ephemeral=False):
        """Take a free place.

        Parameters
        ----------
        size : int
            Bytes, a multiple of the smallest page size.
        align : int, optional
            Bytes, a power of two up to 1 GiB (or the smallest page size, if larger).  By default the largest page size
            not above `size`, at most 1 GiB, so that the IOMMU can use it; pass `pgsize` to fit into any hole.
        limit : int, optional
            The last address that the device can reach, inclusive; the guard may lie beyond it.
        hint : int, optional
            Use this place when it is free, below `limit`, aligned to `align` (to the smallest page size when `align` is
            not given) and not 0; otherwise it counts for nothing.
        top_down : bool
            The highest place rather than the lowest.
        guard : int
            Bytes after the allocation, a multiple of the smallest page size, that nobody else gets until it is freed.
            They lie within the valid ranges.
        ephemeral : bool
            It will be freed soon: use the pool.  Where exactly is not promised; `limit` and `align` hold.

        Returns
        -------
        int
            The IOVA.

        Raises
        ------
        InvalidArgumentError
            EINVAL: size, align or guard can't be.
        IovaSpaceError
            ENOSPC: no hole fits; the text says how large the largest is.
        LockedMemoryError
            ENOMEM: out of memory.
        """
        cdef iovaspace_request request
        cdef uint64_t nbytes = u64("allocate", size), mask = self.pgsize - 1, alignment, start
        cdef int err
        if not nbytes or nbytes & mask:
            self.misaligned("allocate", None, size, "size")
        request.npages = nbytes >> self.pgshift
        if align is None:
            nbytes = self.pgsizes & (2 * highest_bit(min(nbytes, <uint64_t>GIB)) - 1)
            alignment = highest_bit(nbytes) if nbytes else self.pgsize
        else:
            alignment = u64("allocate", align)
            if not alignment or alignment & (alignment - 1) or alignment > max(self.pgsize, <uint64_t>GIB):
                raise_errno(_errno.EINVAL, "allocate", None, size,
                            f"align must be a power of two up to 1 GiB, it is {alignment:#x}")
            alignment = max(alignment, self.pgsize)
        request.align = alignment >> self.pgshift
        nbytes = u64("allocate", guard)
        if nbytes & mask:
            self.misaligned("allocate", None, size, "guard")
        request.guard = nbytes >> self.pgshift
        nbytes = ALL if limit is None else u64("allocate", limit)
        if nbytes < mask:
            self.no_space(size, alignment, 0, limit)
        request.last = (nbytes - mask) >> self.pgshift      # the last page that ends at the limit or before it
        request.hint = ALL
        request.hint_align = 1 if align is None else request.align
        if hint is not None:
            start = u64("allocate", hint)
            if not start & mask:
                request.hint = start >> self.pgshift
        request.top_down = top_down
        request.ephemeral = ephemeral
        self.lock()
        err = iovaspace_allocate(self.space, &request, &start)
        self.unlock()
        if err == -_errno.ENOSPC:
            self.no_space(size, alignment, request.guard, limit)
        if err:
            raise_errno(-err, "allocate", None, size)
        return start << self.pgshift

    def reserve(self, iova, size):
        """Take a given place, IOVA 0 included; free it with `free`.

        Parameters
        ----------
        iova, size : int
            Bytes, multiples of the smallest page size.

        Raises
        ------
        InvalidArgumentError
            EINVAL: misaligned, empty, wrapping, or not wholly inside one of the valid ranges.
        OverlapError
            EEXIST: part of it is in use, or the guard of an allocation.
        LockedMemoryError
            ENOMEM: out of memory.
        """
        cdef uint64_t start = u64("reserve", iova), nbytes = u64("reserve", size)
        cdef uint64_t mask = self.pgsize - 1
        cdef int err
        if not nbytes or (start | nbytes) & mask:
            self.misaligned("reserve", iova, size, "iova and size")
        if start + (nbytes - 1) < start:
            raise_errno(_errno.EINVAL, "reserve", iova, size, "the range ends above 2**64 - 1")
        self.lock()
        err = iovaspace_reserve(self.space, start >> self.pgshift, nbytes >> self.pgshift)
        self.unlock()
        if err == -_errno.EINVAL:
            raise_errno(_errno.EINVAL, "reserve", iova, size, "it is not wholly inside one of the valid IOVA ranges")
        if err:
            raise_errno(-err, "reserve", iova, size)

    def free(self, iova):
        """Give back what `allocate` returned or `reserve` took, with its guard.

        Parameters
        ----------
        iova : int
            Its first address.

        Raises
        ------
        NotMappedError
            ENOENT: nothing in use begins there.
        LockedMemoryError
            ENOMEM: out of memory; it is still allocated.
        """
        cdef uint64_t start = u64("free", iova)
        cdef int err = -_errno.ENOENT
        if not start & (self.pgsize - 1):
            self.lock()
            err = iovaspace_release(self.space, start >> self.pgshift)
            self.unlock()
        if err:
            raise_errno(-err, "free", iova)

    def set_ranges(self, ranges, reserved=None):
        """Change the valid ranges, as when a device joins or leaves.  O(allocations).

        Parameters
        ----------
        ranges : iterable of IovaRange or (start, last)
            As in the constructor.
        reserved : iterable of IovaRange or (start, last), optional
            New reserved windows; without it they stay as they are.

        Returns
        -------
        list of IovaRange
            Allocations, without their guards, that no valid range holds any more, ascending.  They stay allocated until
            they are freed; of their place only what is valid then can be used again.

        Raises
        ------
        InvalidArgumentError
            EINVAL: a range whose last is below its start, or not within 64 bits.
        LockedMemoryError
            ENOMEM: out of memory; nothing has changed.
        """
        windows = self.reserved if reserved is None else pairs(reserved, "set_ranges")
        cdef list valid = subtract(pairs(ranges, "set_ranges"), windows, self.pgshift)
        self.apply(valid, windows)
        return self.listing(True)

    def allocations(self):
        """What is in use, without guards, ascending.

        Returns
        -------
        list of IovaRange
        """
        return self.listing(False)

    def __len__(self):
        return rangemap_count(self.space.used)

    def __repr__(self):
        return f"<IovaAllocator: {len(self)} allocations, pgsizes {self.pgsizes:#x}>"

    @property
    def ranges(self):
        """The valid ranges without the reserved windows, ascending; a list of IovaRange."""
        cdef size_t i
        self.lock()
        try:
            return [IovaRange(self.space.valid[i].start << self.pgshift,
                              ((self.space.valid[i].last + 1) << self.pgshift) - 1) for i in range(self.space.nvalid)]
        finally:
            self.unlock()

    def stats(self):
        """How much is free, and in what pieces.  O(log n) for alignments of the smallest page size, 2 MiB and 1 GiB;
        a scan of the gaps for each other page size.

        Returns
        -------
        IovaStats
        """
        cdef uint64_t align = self.pgsize, sizes = self.pgsizes | KIB4 | MIB2 | GIB
        cdef object total, left, most       # the whole space is 2**64 bytes
        cdef dict largest = {}
        self.lock()
        try:
            while align <= max(self.pgsize, <uint64_t>GIB):
                if sizes & align:
                    largest[align] = <object>self.largest(align, ALL >> self.pgshift) << self.pgshift
                align <<= 1
            total = <object>self.space.total_pages << self.pgshift
            left = <object>iovaspace_free_pages(self.space) << self.pgshift
            most = largest[self.pgsize]
            return IovaStats(
                total=total, used=total - left, free=left, allocations=rangemap_count(self.space.used),
                gaps=gaps_count(self.space.lasting) + gaps_count(self.space.pool),
                chunks=rangemap_count(self.space.chunks), fragmentation=1 - most / left if left else 0.0,
                largest=largest)
        finally:
            self.unlock()

    def _chunks(self):
        """The chunks of the ephemeral pool, for tests."""
        cdef rangemap_entry entry
        cdef uint64_t page = 0
        cdef list out = []
        self.lock()
        while rangemap_copy(self.space.chunks, page, &entry, 1):
            out.append(IovaRange(entry.start << self.pgshift, ((entry.last + 1) << self.pgshift) - 1))
            page = entry.last + 1
        self.unlock()
        return out

    def _check(self):
        """Raise AssertionError when an invariant of the structures is broken; for tests."""
        cdef const char *broken
        self.lock()
        broken = iovaspace_check(self.space)
        self.unlock()
        if broken is not NULL:
            raise AssertionError(broken.decode())

    cdef apply(self, list valid, list reserved):
        cdef size_t i, n = len(valid)
        cdef int err = -_errno.ENOMEM
        cdef iovaspace_range *pages = <iovaspace_range *>malloc((n + 1) * sizeof(iovaspace_range))
        if pages is not NULL:
            for i in range(n):
                pages[i].start, pages[i].last = valid[i]
            with nogil:
                pthread_mutex_lock(&self.space.mutex)
                err = iovaspace_set_ranges(self.space, pages, n)
                pthread_mutex_unlock(&self.space.mutex)
            free(pages)
        if err:
            raise_errno(-err, "set_ranges")
        self.reserved = reserved

    cdef list listing(self, bint stranded):
        cdef iovaspace_range entries[BATCH]
        cdef uint64_t page = 0
        cdef size_t i, n = BATCH
        cdef list out = []
        while n == BATCH:
            self.lock()
            n = iovaspace_list(self.space, stranded, page, entries, BATCH, &page)
            self.unlock()
            for i in range(n):
                out.append(IovaRange(entries[i].start << self.pgshift, ((entries[i].last + 1) << self.pgshift) - 1))
        return out

    cdef uint64_t largest(self, uint64_t align, uint64_t last_page) noexcept:
        """Pages of the largest hole, whoever may use it; needs the lock."""
        align >>= self.pgshift
        return max(gaps_largest(self.space.lasting, align, last_page), gaps_largest(self.space.pool, align, last_page))

    cdef object no_space(self, object size, uint64_t align, uint64_t guard, object limit):
        cdef uint64_t mask = self.pgsize - 1, last = ALL if limit is None else limit
        cdef object aligned = 0, most = 0
        if last >= mask:
            last = (last - mask) >> self.pgshift
            self.lock()
            aligned = <object>self.largest(align, last + guard) << self.pgshift
            most = <object>self.largest(self.pgsize, last + guard) << self.pgshift
            self.unlock()
        wanted = "" if limit is None else f" up to {limit:#x}"
        wanted += f" with a guard of {guard << self.pgshift:#x}" if guard else ""
        if most >= size + (guard << self.pgshift) > aligned:
            todo = f"pass align={self.pgsize:#x} to take it"
        else:
            todo = "free something, ask for less" + ("" if limit is None else ", raise limit")
        raise IovaSpaceError(
            _errno.ENOSPC, "No hole in the IOVA ranges is large enough", operation="allocate", size=size,
            hint=f"the largest hole{wanted} is {aligned:#x} bytes at alignment {align:#x}, {most:#x} at any; {todo}")

    cdef object misaligned(self, str operation, object iova, object size, str names):
        raise_errno(_errno.EINVAL, operation, iova, size,
                    f"{names} must be a multiple of the smallest page size {self.pgsize:#x}, and size more than 0")
