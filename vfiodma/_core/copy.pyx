"""Copying pages between guest memory and a linear buffer, and finding zero pages.  C does the work: csrc/copy.c."""
from cpython.buffer cimport Py_buffer, PyBuffer_Release, PyObject_CheckBuffer
from libc.errno cimport EINVAL, ERANGE
from libc.stdint cimport UINT64_MAX, uint8_t, uint64_t, uintptr_t

from .buffers cimport as_pgsize, as_u64, open_buffer, open_u64
from .errno cimport raise_errno

cdef extern from "copy.h" nogil:
    int copy_check(const uint64_t *runs, size_t n, uint64_t npages, uint64_t *total, uint64_t *lowest, uint64_t *end)
    uint64_t copy_gather(void *linear, uint64_t room, const void *base, uint64_t npages, const uint64_t *runs,
                         size_t n, uint64_t pgsize)
    uint64_t copy_scatter(const void *linear, uint64_t room, void *base, uint64_t npages, const uint64_t *runs,
                          size_t n, uint64_t pgsize)
    uint64_t copy_zero_pages(uint8_t *out, const void *base, uint64_t n, uint64_t pgsize)


def gather(source, runs, out, pgsize=4096):
    """Copy runs of pages into a linear buffer, one after another.

    Parameters
    ----------
    source : int or buffer
        The memory that page 0 is the start of: a C-contiguous buffer, or the address of memory of this process.
        Behind an address the pages of every run must be readable: that is not checked.
    runs : (n, 2) uint64 array
        First page and number of pages of each run, as ``DirtyBitmap.runs()`` returns them.
    out : writable buffer
        Where to; at least as many bytes as the runs have.  It must not overlap the pages.
    pgsize : int
        Bytes of a page, a power of two.

    Returns
    -------
    int
        Bytes written to ``out``.

    Raises
    ------
    InvalidArgumentError
        EINVAL: an empty run, or memory that overlaps.  ERANGE: a run that is not inside ``source``, or ``out`` is too
        small.  Nothing was copied.
    DmaPermissionError
        EACCES: ``out`` is read-only.

    Notes
    -----
    The GIL is released.  From 16 MiB on the stores bypass the cache.  Source: the runs are those of a dirty bitmap as
    ``VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`` and ``VFIO_IOMMU_DIRTY_PAGES`` report it.
    """
    return transfer("gather", source, runs, out, pgsize, True)


def scatter(source, runs, destination, pgsize=4096):
    """Copy pages from a linear buffer to where the runs say: the reverse of ``gather``.

    Parameters
    ----------
    source : buffer
        The pages, one after another; at least as many bytes as the runs have.
    runs : (n, 2) uint64 array
        First page and number of pages of each run.
    destination : int or writable buffer
        The memory that page 0 is the start of: a C-contiguous buffer, or the address of memory of this process.
        Behind an address the pages of every run must be writable: that is not checked.
    pgsize : int
        Bytes of a page, a power of two.

    Returns
    -------
    int
        Bytes written to ``destination``.

    Raises
    ------
    InvalidArgumentError
        EINVAL: an empty run, or memory that overlaps.  ERANGE: a run that is not inside ``destination``, or ``source``
        is too small.  Nothing was copied.
    DmaPermissionError
        EACCES: ``destination`` is read-only.

    Notes
    -----
    The GIL is released.  Source: as of ``gather``.
    """
    return transfer("scatter", destination, runs, source, pgsize, False)


cdef object transfer(str operation, object memory, object runs, object linear, object pgsize, bint gathering):
    cdef Py_buffer pages, pairs, line
    cdef uint64_t size = as_pgsize(operation, pgsize), base, npages, total, lowest, end, first, last, done
    # NumPy's integers are buffers as well; as such they have no dimension.
    cdef bint borrowed = PyObject_CheckBuffer(memory) and getattr(memory, "ndim", 1) != 0
    cdef int err
    if borrowed:
        open_buffer(memory, &pages, operation, not gathering)
        base = <uintptr_t> pages.buf
        npages = <uint64_t> pages.len // size
    else:
        base = as_u64(operation, memory)
        npages = (UINT64_MAX - base) // size
    try:
        open_u64(runs, &pairs, operation, False, 2)
        try:
            open_buffer(linear, &line, operation, gathering)
            try:
                with nogil:
                    err = copy_check(<const uint64_t *> pairs.buf, pairs.shape[0], npages, &total, &lowest, &end)
                if err:
                    raise_errno(-err, operation, None, None, "a run is empty" if err == -EINVAL
                                else f"a run is not inside the {npages} pages of the memory")
                if total > <uint64_t> line.len // size:
                    raise_errno(ERANGE, operation, None, None,
                                f"the runs have {total} pages of {size} bytes, the linear buffer has {line.len} bytes")
                if total == 0:
                    return 0
                first = <uintptr_t> line.buf
                last = first + total * size
                if base + lowest * size < last and first < base + end * size:
                    raise_errno(EINVAL, operation, None, None, "the pages and the linear buffer overlap in memory")
                with nogil:
                    if gathering:
                        done = copy_gather(line.buf, total, <const void *> <uintptr_t> base, npages,
                                           <const uint64_t *> pairs.buf, pairs.shape[0], size)
                    else:
                        done = copy_scatter(line.buf, total, <void *> <uintptr_t> base, npages,
                                            <const uint64_t *> pairs.buf, pairs.shape[0], size)
                return done * size
            finally:
                PyBuffer_Release(&line)
        finally:
            PyBuffer_Release(&pairs)
    finally:
        if borrowed:
            PyBuffer_Release(&pages)


def zero_pages(buffer, pgsize=4096, out=None):
    """Tell which pages hold nothing but zeros.

    Parameters
    ----------
    buffer : buffer
        C-contiguous; whole pages.
    pgsize : int
        Bytes of a page, a power of two.
    out : writable buffer of bytes, optional
        Where to write the answer, at least one byte a page.

    Returns
    -------
    (n,) bool ndarray
        One element a page; a view of ``out`` where it is given.

    Raises
    ------
    InvalidArgumentError
        EINVAL: the buffer is not whole pages.  ERANGE: ``out`` is too short; nothing was written.
    DmaPermissionError
        EACCES: ``out`` is read-only.

    Notes
    -----
    The GIL is released.
    """
    cdef Py_buffer view, flags
    cdef uint64_t size = as_pgsize("zero_pages", pgsize), n
    import numpy
    open_buffer(buffer, &view, "zero_pages", False)
    try:
        n = <uint64_t> view.len // size
        if <uint64_t> view.len % size:
            raise_errno(EINVAL, "zero_pages", None, None, f"{view.len} bytes are not whole pages of {size} bytes")
        if out is None:
            out = numpy.empty(n, numpy.bool_)
        open_buffer(out, &flags, "zero_pages", True)
        try:
            if flags.itemsize != 1 or flags.ndim != 1:
                raise TypeError("zero_pages: `out` must be a buffer of bytes")
            if <uint64_t> flags.len < n:
                raise_errno(ERANGE, "zero_pages", None, None, f"`out` has {flags.len} bytes, {n} are needed")
            if (<uintptr_t> flags.buf < <uintptr_t> view.buf + <uintptr_t> view.len
                    and <uintptr_t> view.buf < <uintptr_t> flags.buf + n):
                raise_errno(EINVAL, "zero_pages", None, None, "`out` overlaps the pages in memory")
            with nogil:
                copy_zero_pages(<uint8_t *> flags.buf, view.buf, n, size)
        finally:
            PyBuffer_Release(&flags)
    finally:
        PyBuffer_Release(&view)
    return numpy.frombuffer(out, numpy.bool_)[:n] if n else numpy.empty(0, numpy.bool_)
