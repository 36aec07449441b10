"""Copying pages between guest memory and linear buffers, and finding zero pages.  C does the work: csrc/copy.c.

``gather``, ``scatter``, ``zero_pages`` are for anybody; ``PageStage`` and ``PageIntake`` with its
``PageBoard`` are the two ends of a migration.
"""
from cpython.buffer cimport Py_buffer, PyBuffer_Release, PyObject_CheckBuffer
from libc.errno cimport E2BIG, EBUSY, EEXIST, EILSEQ, EINVAL, ENOMEM, EPROTO, ERANGE
from libc.stdint cimport UINT64_MAX, uint8_t, uint16_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc

from .buffers cimport as_pgsize, as_u64, open_buffer, open_u64
from .errno cimport raise_errno

cdef extern from "copy.h" nogil:
    int copy_check(const uint64_t *runs, size_t n, uint64_t npages, uint64_t *total, uint64_t *lowest, uint64_t *end)
    uint64_t copy_gather(void *linear, uint64_t room, const void *base, uint64_t npages, const uint64_t *runs,
                         size_t n, uint64_t pgsize)
    uint64_t copy_scatter(const void *linear, uint64_t room, void *base, uint64_t npages, const uint64_t *runs,
                          size_t n, uint64_t pgsize)
    uint64_t copy_zero_pages(uint8_t *out, const void *base, uint64_t n, uint64_t pgsize)

    ctypedef struct copy_chunk "struct copy_chunk":
        const uint64_t *runs
        size_t n
        uint64_t *kept
        uint64_t *zeros
        size_t nkept, nzeros, max_runs
        uint64_t kept_pages, zero_pages

    bint copy_next_chunk(copy_chunk *chunk, void *stage, const void *base, uint64_t pgsize, uint64_t most,
                         uint64_t most_zeros)
    int copy_admit(uint64_t *own, const void *runs, size_t n, uint64_t npages, uint64_t most, uint64_t *total)
    int copy_claim(const uint64_t *runs, size_t n, uint16_t *brought, uint16_t epoch)
    void copy_touch(const uint64_t *runs, size_t n, uint8_t *touched)
    void copy_clear(void *base, const uint64_t *runs, size_t n, uint64_t pgsize, const uint8_t *touched)


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


cdef class PageStage:
    """Runs of pages of memory that is being written, a chunk at a time: content staged, zero pages set apart.

    Parameters
    ----------
    memory : buffer
        C-contiguous; held until this object goes.
    runs : (n, 2) uint64 array
        First page and number of pages of each run.  Held, and not to be changed.
    stage : writable buffer or None
        Where the content of a chunk goes: its size in pages is what a chunk may have.  None: content stays where it is,
        and is only looked at.
    pgsize : int
        Bytes of a page, a power of two.
    npages : int, optional
        Pages with content of a chunk, at most; needed where ``stage`` is None.
    zeros : int
        Pages of a chunk, at most, zero ones included.
    max_runs : int
        Runs of a chunk, at most, of each kind.

    Attributes
    ----------
    kept, zeros : (n, 2) uint64 ndarray
        The chunk's runs of pages with content, and of pages that were all zero; copies.
    kept_pages, zero_pages : int
        How many pages these are.

    Raises
    ------
    InvalidArgumentError
        EINVAL: an empty run; no room for a page.  ERANGE: a run that is not inside the memory.

    Notes
    -----
    One pass over memory, without the GIL; for one thread at a time.  A page is looked at and then copied while others
    may write it: what is staged, or taken for zero, was there at some time in between.  Source: as of ``gather``.
    """
    cdef Py_buffer _memory, _runs, _stage
    cdef bint _has_memory, _has_runs, _has_stage
    cdef copy_chunk _chunk
    cdef uint64_t _pgsize, _most, _most_zeros

    def __cinit__(self, memory, runs, stage, pgsize=4096, npages=None, zeros=1 << 14, max_runs=1 << 12):
        cdef uint64_t total, lowest, end
        cdef int err
        self._pgsize = as_pgsize("stage", pgsize)
        open_buffer(memory, &self._memory, "stage", False)
        self._has_memory = True
        open_u64(runs, &self._runs, "stage", False, 2)
        self._has_runs = True
        if stage is not None:
            open_buffer(stage, &self._stage, "stage", True)
            self._has_stage = True
            self._most = <uint64_t> self._stage.len // self._pgsize
        if npages is not None:
            end = as_u64("stage", npages)
            self._most = min(self._most, end) if self._has_stage else end
        self._most_zeros = as_u64("stage", zeros)
        self._chunk.max_runs = as_u64("stage", max_runs)
        if not self._most or not self._most_zeros or not self._chunk.max_runs or self._chunk.max_runs > 1 << 24:
            raise_errno(EINVAL, "stage", None, None, "a chunk has no room for a page")
        err = copy_check(<const uint64_t *> self._runs.buf, self._runs.shape[0],
                         <uint64_t> self._memory.len // self._pgsize, &total, &lowest, &end)
        if err:
            raise_errno(-err, "stage", None, None, "a run is empty" if err == -EINVAL
                        else "a run is not inside the memory")
        self._chunk.runs = <const uint64_t *> self._runs.buf
        self._chunk.n = self._runs.shape[0]
        self._chunk.kept = <uint64_t *> malloc(self._chunk.max_runs * 32)
        if self._chunk.kept == NULL:
            raise_errno(ENOMEM, "stage")
        self._chunk.zeros = self._chunk.kept + 2 * self._chunk.max_runs

    def __dealloc__(self):
        self._release()
        free(self._chunk.kept)

    cdef void _release(self):
        self._chunk.n = 0
        if self._has_stage:
            self._has_stage = False
            PyBuffer_Release(&self._stage)
        if self._has_runs:
            self._has_runs = False
            PyBuffer_Release(&self._runs)
        if self._has_memory:
            self._has_memory = False
            PyBuffer_Release(&self._memory)

    def release(self):
        """Let go of the buffers; there are no more chunks.  Idempotent."""
        self._release()

    def next(self):
        """Stage the next chunk; return False when there are no more pages."""
        cdef bint more
        with nogil:
            more = copy_next_chunk(&self._chunk, self._stage.buf if self._has_stage else NULL, self._memory.buf,
                                   self._pgsize, self._most, self._most_zeros)
        return more

    @property
    def kept(self):
        return copied_runs(self._chunk.kept, self._chunk.nkept)

    @property
    def zeros(self):
        return copied_runs(self._chunk.zeros, self._chunk.nzeros)

    @property
    def kept_pages(self):
        return self._chunk.kept_pages

    @property
    def zero_pages(self):
        return self._chunk.zero_pages


cdef object copied_runs(const uint64_t *runs, size_t n):
    import numpy
    return numpy.frombuffer((<const char *> runs)[:n * 16], numpy.uint64).reshape(-1, 2)


cdef class PageBoard:
    """One block of memory that pages from outside are put into, and which pages came in which epoch.

    Parameters
    ----------
    memory : writable buffer
        C-contiguous; held until ``release``.
    pgsize : int
        Bytes of a page, a power of two.
    fresh : bool
        The memory holds nothing but zeros.

    Attributes
    ----------
    frontier : int
        Number of the page after the last one that was ever admitted.

    Notes
    -----
    Shared by the PageIntakes of any number of threads; a page is given to one of them an epoch.  It needs two bytes a
    page, and a third one for fresh memory.
    """
    cdef Py_buffer _memory
    cdef bint _has_memory
    cdef object _view
    cdef uint64_t _pgsize, _npages, _frontier
    cdef uint16_t *_brought         # the number + 1 of the last epoch that brought a page; 0: none did
    cdef uint8_t *_touched          # NULL: memory is not fresh
    cdef int _busy                  # threads that are in it without the GIL; changed with it

    def __cinit__(self, memory, pgsize=4096, fresh=False):
        self._pgsize = as_pgsize("intake", pgsize)
        open_buffer(memory, &self._memory, "intake", True)
        self._has_memory = True
        self._view = memoryview(memory).cast("B")
        self._npages = <uint64_t> self._memory.len // self._pgsize
        self._brought = <uint16_t *> calloc(self._npages + 1, 2)
        if fresh:
            self._touched = <uint8_t *> calloc(self._npages + 1, 1)
        if self._brought == NULL or (fresh and self._touched == NULL):
            raise_errno(ENOMEM, "intake")

    def __dealloc__(self):
        free(self._brought)
        free(self._touched)
        if self._has_memory:
            PyBuffer_Release(&self._memory)

    @property
    def frontier(self):
        return self._frontier

    def release(self):
        """Let go of the memory; nothing can be admitted any more.  Idempotent.

        Raises
        ------
        BusyError
            EBUSY: a thread is copying into it.
        """
        if self._busy:
            raise_errno(EBUSY, "intake", None, None, "a thread is copying into the memory")
        self._npages = 0
        self._view = None
        if self._has_memory:
            self._has_memory = False
            PyBuffer_Release(&self._memory)


cdef class PageIntake:
    """What one thread needs to put pages from outside into blocks, each at most once an epoch.

    Parameters
    ----------
    max_runs : int
        Runs that are taken at once, at most.

    Notes
    -----
    ``admit`` checks runs and keeps them; then ``put`` or ``clear`` does to memory what they say, or ``views`` tells
    where content may be received to, and ``done`` notes that it was.  The GIL is released; for one thread at a time.
    Source: docs/stream.md, what the receiver checks.
    """
    cdef PageBoard _board
    cdef uint64_t _total
    cdef uint64_t *_runs
    cdef size_t _n, _max_runs

    def __cinit__(self, max_runs=1 << 16):
        self._max_runs = as_u64("intake", max_runs)
        if self._max_runs > 1 << 24:
            raise_errno(EINVAL, "intake", None, None, f"{max_runs} runs at once")
        self._runs = <uint64_t *> calloc(self._max_runs + 1, 16)
        if self._runs == NULL:
            raise_errno(ENOMEM, "intake")

    def __dealloc__(self):
        free(self._runs)

    def admit(self, PageBoard board not None, runs, nruns, epoch, most):
        """Check runs from outside against the block and what came before.

        Parameters
        ----------
        board : PageBoard
            The block that they say.
        runs : buffer
            ``nruns`` times first page and number of pages, u64, little-endian.
        nruns : int
            Not 0.
        epoch : int
            From 0 to 65,534.
        most : int
            Pages of all runs, at most.

        Returns
        -------
        int
            Pages of the runs.

        Raises
        ------
        ProtocolError
            EPROTO: an empty run, runs that are not ascending or overlap, a run outside, too many pages, or a page that
            came in this epoch already, by whichever intake.
        """
        cdef Py_buffer view
        cdef uint64_t limit = as_u64("intake", most), n = as_u64("intake", nruns), total = 0
        cdef uint16_t number = epoch + 1
        cdef int err = 0
        self._forget()
        open_buffer(runs, &view, "intake", False)
        try:
            if not n or n > self._max_runs or n > <uint64_t> view.len // 16:
                refuse("without runs" if not n else f"with {n} runs in {view.len} bytes")
            board._busy += 1
            with nogil:
                err = copy_admit(self._runs, view.buf, n, board._npages, limit, &total)
                if not err:
                    err = copy_claim(self._runs, n, board._brought, number)
            board._busy -= 1
        finally:
            PyBuffer_Release(&view)
        if err == -EINVAL:
            refuse("with an empty run")
        elif err == -ERANGE:
            refuse(f"with a run that ends behind the block's {board._npages} pages")
        elif err == -EILSEQ:
            refuse("with runs that are not ascending or overlap")
        elif err == -E2BIG:
            refuse(f"with {total} pages, more than a chunk")
        elif err == -EEXIST:
            refuse(f"with a page that came twice in epoch {epoch}")
        self._n = n
        self._total = total
        self._board = board
        board._frontier = max(board._frontier, self._runs[2 * n - 2] + self._runs[2 * n - 1])
        return total

    def put(self, content):
        """Copy the admitted pages' content, one page after another, into memory."""
        cdef Py_buffer view
        cdef PageBoard board = self._board
        open_buffer(content, &view, "intake", False)
        try:
            if board is None or <uint64_t> view.len != self._total * board._pgsize:
                raise_errno(EINVAL, "intake", None, None, f"{view.len} bytes for {self._total} pages")
            board._busy += 1
            with nogil:
                copy_scatter(view.buf, self._total, board._memory.buf, board._npages, self._runs, self._n,
                             board._pgsize)
                if board._touched != NULL:
                    copy_touch(self._runs, self._n, board._touched)
            board._busy -= 1
            self._forget()
        finally:
            PyBuffer_Release(&view)

    def clear(self):
        """Clear the admitted pages; in fresh memory only those that some epoch brought content for."""
        cdef PageBoard board = self._board
        if board is None:
            return
        board._busy += 1
        with nogil:
            # A released board has no pages, and nothing to clear.
            if board._npages:
                copy_clear(board._memory.buf, self._runs, self._n, board._pgsize, board._touched)
        board._busy -= 1
        self._forget()

    def views(self):
        """Return a memoryview of each admitted run's bytes in memory.  Write into them at once, then call ``done``."""
        cdef size_t i
        cdef PageBoard board = self._board
        if board is None or not board._npages:
            return []
        if board._touched != NULL:      # whatever arrives, and whether all of it does
            copy_touch(self._runs, self._n, board._touched)
        return [board._view[self._runs[2 * i] * board._pgsize:
                            (self._runs[2 * i] + self._runs[2 * i + 1]) * board._pgsize] for i in range(self._n)]

    def done(self):
        """Note that the admitted pages came."""
        self._forget()

    cdef void _forget(self):
        self._n = self._total = 0
        self._board = None


cdef int refuse(str why) except -1:
    raise_errno(EPROTO, "migration_stream", None, None, why)
    return 0
