"""Ordered map of disjoint address ranges, and the way back from virtual addresses (csrc/rangemap.c)."""
from cpython.buffer cimport PyBUF_WRITABLE, Py_buffer, PyBuffer_Release
from libc.errno cimport EEXIST, EINVAL, ENOENT, ENOMEM
from libc.stdint cimport UINT64_MAX, uint64_t
from libc.stdlib cimport free, malloc

from .args cimport acquire, acquire_rows, u64
from .errno cimport raise_errno

# Below this many elements a batch keeps the GIL: letting it go costs about as much as the work.
cdef enum:
    WORTH_RELEASING = 64
    PIECE = 64


cdef int refuse(str operation, object start, object size, str hint) except -1:
    return raise_errno(EINVAL, operation, start, size, hint)


cdef inline uint64_t last_of(str operation, uint64_t start, uint64_t size) except? 0xffffffffffffffff:
    if not size:
        refuse(operation, start, size, "the size is zero")
    if size - 1 > UINT64_MAX - start:
        refuse(operation, start, size, "the range goes beyond 2**64 - 1")
    return start + (size - 1)


cdef inline tuple as_tuple(const rangemap_entry *entry):
    return entry.start, entry.last - entry.start + 1, entry.value


cdef class RangeMap:
    """Map disjoint ranges of 64-bit addresses to 64-bit values.

    Look-ups may run in any number of threads beside one that changes the map, without waiting for it.  An address
    inside a range translates to ``value + address - start``, modulo 2**64.

    Notes
    -----
    Addresses and sizes are in bytes.  A range may end at 2**64 - 1.  Every number is an integer in 0 ... 2**64 - 1:
    another type is a TypeError, another integer an InvalidArgumentError (EINVAL).  What raises has changed nothing.

    Source: a DMA mapping is the ``iova``, ``vaddr`` and ``size`` of VFIO_IOMMU_MAP_DMA (include/uapi/linux/vfio.h).

    Examples
    --------
    >>> from vfiodma._core.rangemap import RangeMap
    >>> ranges = RangeMap()
    >>> ranges.insert(0x1000, 0x2000, 0x7f0000000000)
    >>> hex(ranges.translate(0x1010))
    '0x7f0000000010'
    >>> ranges.get(0x3000) is None
    True
    """

    def __cinit__(self):
        self.map = rangemap_new()
        if self.map == NULL:
            raise MemoryError

    def __dealloc__(self):
        rangemap_free(self.map)

    def __len__(self):
        return rangemap_count(self.map)

    def __sizeof__(self):
        return object.__sizeof__(self) + rangemap_memory(self.map)

    def __contains__(self, key):
        return rangemap_find(self.map, u64("find", key), NULL)

    def __iter__(self):
        """Yield (start, size, value) in ascending order.

        The map may change meanwhile: what was there all the time comes exactly once.
        """
        cdef uint64_t key = 0
        while True:
            piece = self._piece(key)
            yield from piece
            if len(piece) < PIECE:
                return
            start, size, _ = piece[PIECE - 1]
            if start + size > UINT64_MAX:
                return
            key = start + size

    cdef list _piece(self, uint64_t key):
        cdef rangemap_entry entries[PIECE]
        cdef size_t i, n = rangemap_copy(self.map, key, entries, PIECE)
        return [as_tuple(&entries[i]) for i in range(n)]

    @property
    def level(self):
        """str: the CPU level in use: ``"scalar"``, ``"avx2"`` or ``"avx512"``."""
        return rangemap_level(self.map).decode()

    def insert(self, start, size, value):
        """Add the range [start, start + size).

        Parameters
        ----------
        start, size : int
            Bytes.
        value : int
            What ``start`` translates to.

        Raises
        ------
        OverlapError
            EEXIST: an entry shares an address with the range.
        InvalidArgumentError
            EINVAL: the size is zero or the range goes beyond 2**64 - 1.
        """
        cdef uint64_t first = u64("insert", start), nbytes = u64("insert", size), to = u64("insert", value)
        cdef uint64_t last = last_of("insert", first, nbytes)
        cdef rangemap_entry entry
        cdef int err = rangemap_insert(self.map, first, last, to)
        if err:
            if err == -ENOMEM:
                raise MemoryError
            hint = ""
            if rangemap_lower(self.map, first, &entry):
                hint = f"[{entry.start:#x}, {entry.last:#x}] is there already"
            raise_errno(-err, "insert", first, nbytes, hint)

    def remove(self, start):
        """Remove the entry that begins at exactly `start` and return its value.

        Raises
        ------
        NotMappedError
            ENOENT: no entry begins there.
        """
        cdef uint64_t first = u64("remove", start)
        cdef rangemap_entry entry
        if rangemap_remove(self.map, first, &entry):
            raise_errno(ENOENT, "remove", first, None, "no entry begins there")
        return entry.value

    def set_value(self, start, value):
        """Replace the value of the entry that begins at exactly `start`.

        Raises
        ------
        NotMappedError
            ENOENT: no entry begins there.
        """
        cdef uint64_t first = u64("set_value", start), to = u64("set_value", value)
        if rangemap_set_value(self.map, first, to):
            raise_errno(ENOENT, "set_value", first, None, "no entry begins there")

    def translate(self, key):
        """Return ``value + key - start`` of the entry that contains `key`.

        Raises
        ------
        NotMappedError
            ENOENT: no entry contains the address.  Where misses are normal, `get` is faster.
        """
        cdef rangemap_entry entry
        cdef uint64_t at = u64("translate", key)
        if not rangemap_find(self.map, at, &entry):
            raise_errno(ENOENT, "translate", at)
        return entry.value + (at - entry.start)

    def get(self, key, default=None):
        """As `translate`, but return `default` where there is nothing."""
        cdef rangemap_entry entry
        cdef uint64_t at = u64("get", key)
        if not rangemap_find(self.map, at, &entry):
            return default
        return entry.value + (at - entry.start)

    def find(self, key):
        """Return (start, size, value) of the entry that contains `key`, or None."""
        cdef rangemap_entry entry
        return as_tuple(&entry) if rangemap_find(self.map, u64("find", key), &entry) else None

    def lower(self, key):
        """Return (start, size, value) of the entry that contains `key`, else of the next above it, or None."""
        cdef rangemap_entry entry
        return as_tuple(&entry) if rangemap_lower(self.map, u64("lower", key), &entry) else None

    def overlaps(self, start, size):
        """Does an entry share an address with [start, start + size)?"""
        cdef uint64_t first = u64("overlaps", start)
        return rangemap_overlaps(self.map, first, last_of("overlaps", first, u64("overlaps", size)))

    def translate_many(self, keys, out=None, miss=UINT64_MAX):
        """Translate many addresses.

        Parameters
        ----------
        keys : buffer of uint64
            Addresses, C-contiguous, of any shape.
        out : writable buffer of uint64, optional
            Where the results go, as many elements as `keys`; it may be `keys` itself, not overlap it otherwise.
        miss : int
            The result for an address that no entry contains.

        Returns
        -------
        ndarray of uint64, one dimension, or `out` where given
            Owned by the caller.

        Notes
        -----
        The GIL is released for more than 64 addresses.  Beside a writer, each result was true at some moment.
        """
        cdef Py_buffer source, target
        cdef uint64_t absent = u64("translate_many", miss)
        cdef size_t n
        acquire(keys, &source, 0, "translate_many")
        try:
            n = source.len // 8
            if out is None:
                import numpy
                out = numpy.empty(n, numpy.uint64)
            acquire(out, &target, PyBUF_WRITABLE, "translate_many")
            try:
                if <size_t>target.len // 8 != n:
                    raise ValueError(f"translate_many: out has {target.len // 8} elements, keys has {n}")
                if n > WORTH_RELEASING:
                    with nogil:
                        rangemap_find_many(self.map, <const uint64_t *>source.buf, <uint64_t *>target.buf, n, absent)
                else:
                    rangemap_find_many(self.map, <const uint64_t *>source.buf, <uint64_t *>target.buf, n, absent)
            finally:
                PyBuffer_Release(&target)
        finally:
            PyBuffer_Release(&source)
        return out

    def build(self, entries):
        """Fill an empty map from entries that are ascending and disjoint, in linear time.

        Parameters
        ----------
        entries : buffer of uint64, shape (n, 3)
            Rows of start, size, value; C-contiguous.

        Raises
        ------
        OverlapError
            EEXIST: the map is not empty.
        InvalidArgumentError
            EINVAL: the rows are not ascending and disjoint, a size is zero or a range goes beyond 2**64 - 1.

        Notes
        -----
        The GIL is released.
        """
        cdef Py_buffer source
        cdef Py_ssize_t n
        cdef int err
        acquire_rows(entries, &source, 3, &n, "build")
        with nogil:
            err = rangemap_build_sizes(self.map, <const uint64_t *>source.buf, n)
        PyBuffer_Release(&source)
        if err == -ENOMEM:
            raise MemoryError
        if err == -EEXIST:
            raise_errno(EEXIST, "build", None, None, "the map is not empty")
        if err:
            refuse("build", None, None, "rows must be ascending and disjoint, of a size over zero, and end below 2**64")

    def clear(self):
        """Remove every entry.  The memory stays with the map: a reader may still look at it."""
        rangemap_clear(self.map)

    def to_array(self):
        """Return every entry as rows of start, size, value.

        Returns
        -------
        ndarray of uint64, shape (n, 3)
            Ascending; a copy, owned by the caller.

        Notes
        -----
        One consistent moment.  The GIL is released.
        """
        import numpy
        cdef Py_buffer target
        cdef size_t n, copied
        while True:
            n = rangemap_count(self.map) + 1        # one more: whether something was added meanwhile shows
            rows = numpy.empty((n, 3), numpy.uint64)
            acquire(rows, &target, PyBUF_WRITABLE, "to_array")
            with nogil:
                copied = copy_sizes(self.map, <rangemap_entry *>target.buf, n)
            PyBuffer_Release(&target)
            if copied < n:
                return rows[:copied]

    def check(self):
        """Return 0, or the number of an invariant of the tree that does not hold.  For tests."""
        return rangemap_check(self.map)


cdef size_t copy_sizes(rangemap *map, rangemap_entry *rows, size_t n) noexcept nogil:
    cdef size_t i, copied = rangemap_copy(map, 0, rows, n)
    for i in range(copied):
        rows[i].last = rows[i].last - rows[i].start + 1
    return copied


cdef class VaddrIndex:
    """From a virtual address to the IOVAs that it is mapped at, of which there may be many.

    Notes
    -----
    Addresses and sizes are in bytes; numbers are refused as by `RangeMap`.  The index has its own lock.
    """

    def __cinit__(self):
        self.index = vaddrindex_new()
        if self.index == NULL:
            raise MemoryError

    def __dealloc__(self):
        vaddrindex_free(self.index)

    def __len__(self):
        return vaddrindex_count(self.index)

    def insert(self, vaddr, size, iova):
        """Note that [vaddr, vaddr + size) is mapped at `iova`.

        Raises
        ------
        OverlapError
            EEXIST: this vaddr at this iova is there already.
        InvalidArgumentError
            EINVAL: the size is zero, or the range of either address goes beyond 2**64 - 1.
        """
        cdef uint64_t first = u64("insert", vaddr), nbytes = u64("insert", size), to = u64("insert", iova)
        last_of("insert", to, nbytes)
        cdef int err = vaddrindex_insert(self.index, first, last_of("insert", first, nbytes), to)
        if err == -ENOMEM:
            raise MemoryError
        if err:
            raise_errno(-err, "insert", to, nbytes, f"vaddr {first:#x} is there already")

    def remove(self, vaddr, iova):
        """Forget the mapping of exactly `vaddr` at exactly `iova`.

        Raises
        ------
        NotMappedError
            ENOENT: there is none.
        """
        cdef uint64_t first = u64("remove", vaddr), to = u64("remove", iova)
        if vaddrindex_remove(self.index, first, to):
            raise_errno(ENOENT, "remove", to, None, f"not a mapping of vaddr {first:#x}")

    cdef list _find(self, uint64_t address, bint whole):
        cdef vaddrindex_entry few[16]
        cdef vaddrindex_entry *found = few
        cdef size_t i, cap = 16, n = vaddrindex_find(self.index, address, few, cap)
        try:
            while n > cap:
                if found != few:
                    free(found)
                cap = n
                found = <vaddrindex_entry *>malloc(cap * sizeof(vaddrindex_entry))
                if found == NULL:
                    raise MemoryError
                n = vaddrindex_find(self.index, address, found, cap)
            if whole:
                return [(found[i].vaddr, found[i].last - found[i].vaddr + 1, found[i].iova) for i in range(n)]
            return [found[i].iova + (address - found[i].vaddr) for i in range(n)]
        finally:
            if found != few:
                free(found)

    def find(self, address):
        """Return (vaddr, size, iova) of each mapping that covers `address`, ascending by vaddr and iova."""
        return self._find(u64("find", address), True)

    def iovas(self, address):
        """Return every IOVA at which the byte at `address` is mapped, in the order of `find`."""
        return self._find(u64("iovas", address), False)

    def clear(self):
        """Forget everything."""
        vaddrindex_clear(self.index)

    def check(self):
        """Return 0, or the number of an invariant of the tree that does not hold.  For tests."""
        return vaddrindex_check(self.index)
