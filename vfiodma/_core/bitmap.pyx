"""Dirty bitmaps, and the log that device threads mark pages in.  C does the work: csrc/bitmap.c, csrc/dirtylog.c."""
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_STRIDES, PyBUF_WRITABLE, Py_buffer, PyBuffer_Release
from libc.errno cimport EACCES, EINVAL, ENOMEM, EOVERFLOW, ERANGE
from libc.stdint cimport UINT64_MAX, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

from .buffers cimport as_pgsize, as_u64, check_pages, open_buffer, open_u64, page_range
from .errno cimport raise_errno

cdef extern from "bitmap.h" nogil:
    uint64_t bitmap_nwords(uint64_t nbits)
    bint bitmap_test(const uint64_t *words, uint64_t i)
    void bitmap_set(uint64_t *words, uint64_t first, uint64_t n)
    void bitmap_clear(uint64_t *words, uint64_t first, uint64_t n)
    void bitmap_or(uint64_t *dst, const uint64_t *src, uint64_t nwords)
    void bitmap_andnot(uint64_t *dst, const uint64_t *src, uint64_t nwords)
    uint64_t bitmap_count_bits(const uint64_t *words, uint64_t nbits)
    bint bitmap_any_bits(const uint64_t *words, uint64_t nbits)
    uint64_t bitmap_harvest(uint64_t *dst, uint64_t dst_bit, uint64_t *src, uint64_t nbits)
    void bitmap_compact(uint64_t *dst, const uint64_t *src, uint64_t nbits, unsigned shift)
    void bitmap_expand(uint64_t *dst, const uint64_t *src, uint64_t nbits, unsigned shift)
    uint64_t bitmap_count_runs(const uint64_t *words, uint64_t nbits)
    size_t bitmap_runs(const uint64_t *words, uint64_t nbits, uint64_t *pairs, size_t cap)
    size_t bitmap_indices(const uint64_t *words, uint64_t nbits, uint64_t *out, size_t cap)
    const char *bitmap_cpu()
    int bitmap_use_cpu(const char *name)

cdef extern from "dirtylog.h" nogil:
    dirtylog *dirtylog_new(uint64_t nbits)
    void dirtylog_free(dirtylog *log)
    uint64_t dirtylog_harvest(dirtylog *log, uint64_t first, uint64_t nbits, uint64_t *dst, uint64_t dst_bit)

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *address, size_t size, int advice)
    int MADV_HUGEPAGE

cdef enum:
    # Bytes from which huge pages are asked for: with small ones each of many far bits is a TLB miss as well.
    HUGE = 4 << 20
    # Pages from which an operation takes longer than letting the GIL go: 16 KiB of words.
    WORTH_RELEASING = 131072
    LINE = 64

cdef object VIEW = object()             # makes a DirtyBitmap without memory of its own


def cpu_variant(name=None):
    """Name the CPU variant of the bitmap kernels, or choose another one.

    Parameters
    ----------
    name : {"scalar", "neon", "avx2", "avx512"}, optional
        The variant to use from now on in the whole process; None leaves it.  Only tests need this: the best variant is
        chosen when the module is loaded, and the environment variable VFIODMA_CPU lowers it.

    Returns
    -------
    str
        The variant in use.

    Raises
    ------
    InvalidArgumentError
        EINVAL: no such variant, or this CPU doesn't have it.
    """
    if name is not None:
        if not isinstance(name, str):
            raise TypeError("the name of a CPU variant is a str")
        if bitmap_use_cpu(name.encode()):
            raise_errno(EINVAL, "cpu_variant", None, None, f"{name!r} is not a variant that this CPU has")
    return bitmap_cpu().decode()


# ---- the bitmap ----

cdef class DirtyBitmap:
    """One bit per page: set means dirty.

    Bit i is bit i % 64 of word i // 64, least significant bit first: the layout of VFIO's and iommufd's dirty bitmaps,
    and of Arrow's boolean arrays.  The object is a writable buffer of ``(npages + 63) // 64`` words (format "Q");
    NumPy arrays made from it share its memory and keep it alive.  Bits after the last page are never counted, reported
    or changed.

    Parameters
    ----------
    npages : int
        Number of pages, at least 1.  All start clean.
    pgsize : int
        Bytes of a page, a power of two.

    Attributes
    ----------
    npages, pgsize : int
    nbytes : int
        Bytes of the words.
    readonly : bool
        Made from a read-only buffer: what would change it raises DmaPermissionError (EACCES).

    Raises
    ------
    InvalidArgumentError
        EINVAL: zero pages, or a page size that is not a power of two.
    LockedMemoryError
        ENOMEM: no memory for the words.

    Notes
    -----
    Operations on more than 131,072 pages release the GIL.  A bitmap has no lock: threads that change one at the same
    time must agree among themselves, or mark pages in a DirtyLog.  Source: ``struct vfio_bitmap`` and
    ``struct iommu_hwpt_get_dirty_bitmap`` of the Linux headers.

    Examples
    --------
    >>> from vfiodma import DirtyBitmap
    >>> bitmap = DirtyBitmap(1000)
    >>> bitmap.set(10, 3)
    >>> bitmap.set(99)
    >>> bitmap.count()
    4
    >>> bitmap.runs().tolist()
    [[10, 3], [99, 1]]
    """

    def __cinit__(self, npages, pgsize=4096):
        if npages is VIEW:
            return
        self.npages = as_u64("DirtyBitmap", npages)
        self.pgsize = as_pgsize("DirtyBitmap", pgsize)
        if self.npages == 0:
            raise_errno(EINVAL, "DirtyBitmap", None, None, "the number of pages is zero")
        # calloc gives fresh pages that cost nothing until they are used; the kernels want whole cache lines.
        self.memory = calloc(bitmap_nwords(self.npages) * 8 + LINE, 1)
        if not self.memory:
            raise_errno(ENOMEM, "DirtyBitmap", None, None, f"no memory for a bitmap of {npages} pages")
        self.words = <uint64_t *> ((<uintptr_t> self.memory + LINE - 1) // LINE * LINE)
        # Such a block is a mapping of its own.  It is only advice, so the outcome doesn't matter.
        if self.nbytes >= HUGE:
            madvise(<void *> (<uintptr_t> self.words // 4096 * 4096), self.nbytes, MADV_HUGEPAGE)

    def __dealloc__(self):
        free(self.memory)
        if self.borrowed:
            PyBuffer_Release(&self.lender)

    def __getbuffer__(self, Py_buffer *view, int flags):
        if flags & PyBUF_WRITABLE and self.readonly:
            raise BufferError("the bitmap is read-only")
        self.shape[0] = bitmap_nwords(self.npages)
        self.strides[0] = 8
        view.buf = self.words
        view.obj = self
        view.len = self.shape[0] * 8
        view.itemsize = 8
        view.readonly = self.readonly
        view.format = <char *> "Q" if flags & PyBUF_FORMAT else NULL
        view.ndim = 1
        view.shape = self.shape if flags & PyBUF_ND else NULL
        view.strides = self.strides if flags & PyBUF_STRIDES == PyBUF_STRIDES else NULL
        view.suboffsets = NULL
        view.internal = NULL

    @staticmethod
    def frombuffer(buffer, npages, pgsize=4096):
        """Use the memory of a buffer as a bitmap.

        Parameters
        ----------
        buffer : buffer
            C-contiguous, aligned to 8 bytes, at least ``(npages + 63) // 64 * 8`` bytes.  It is kept alive, and locked
            against resizing, as long as the bitmap lives.
        npages, pgsize : int
            As in the constructor.

        Returns
        -------
        DirtyBitmap
            Shares the memory; ``readonly`` if the buffer is.

        Raises
        ------
        InvalidArgumentError
            EINVAL: the buffer is too small, misaligned or not contiguous.
        """
        cdef uint64_t pages = as_u64("frombuffer", npages), size = as_pgsize("frombuffer", pgsize)
        cdef DirtyBitmap bitmap = DirtyBitmap.__new__(DirtyBitmap, VIEW)
        if pages == 0:
            raise_errno(EINVAL, "frombuffer", None, None, "the number of pages is zero")
        open_buffer(buffer, &bitmap.lender, "frombuffer", False)
        bitmap.borrowed = True
        if <uint64_t> bitmap.lender.len // 8 < bitmap_nwords(pages):
            raise_errno(EINVAL, "frombuffer", None, None,
                        f"{npages} pages need {bitmap_nwords(pages) * 8} bytes, the buffer has {bitmap.lender.len}")
        if <uintptr_t> bitmap.lender.buf % 8:
            raise_errno(EINVAL, "frombuffer", None, None, "the buffer is not aligned to 8 bytes")
        bitmap.words = <uint64_t *> bitmap.lender.buf
        bitmap.npages = pages
        bitmap.pgsize = size
        bitmap.readonly = bitmap.lender.readonly
        return bitmap

    @property
    def nbytes(self):
        return bitmap_nwords(self.npages) * 8

    def __len__(self):
        return self.npages

    def __repr__(self):
        return f"DirtyBitmap(npages={self.npages}, pgsize={self.pgsize})"

    def __getitem__(self, pages):
        """A bitmap of the pages [a, b) that shares this one's memory; a must be a multiple of 64."""
        cdef Py_ssize_t a, b, step
        cdef DirtyBitmap bitmap
        if not isinstance(pages, slice):
            raise TypeError("a bitmap is indexed by slices only: use test(page)")
        a, b, step = pages.indices(self.npages)
        if step != 1 or a % 64:
            raise_errno(EINVAL, "slice", None, None, "a slice starts at a multiple of 64 pages and has step 1")
        if b <= a:
            raise_errno(EINVAL, "slice", None, None, "the slice is empty")
        bitmap = DirtyBitmap.__new__(DirtyBitmap, VIEW)
        bitmap.parent = self
        bitmap.words = self.words + a // 64
        bitmap.npages = b - a
        bitmap.pgsize = self.pgsize
        bitmap.readonly = self.readonly
        return bitmap

    cdef int check_writable(self, str operation) except -1:
        if self.readonly:
            raise_errno(EACCES, operation, None, None, "the bitmap is read-only")
        return 0

    cdef int check_disjoint(self, DirtyBitmap other, str operation) except -1:
        """Words are read and written many at a time, so shifted copies of one another would depend on the CPU."""
        if (self.words < other.words + bitmap_nwords(other.npages)
                and other.words < self.words + bitmap_nwords(self.npages)):
            raise_errno(EINVAL, operation, None, None, "the bitmaps overlap in memory")
        return 0

    cdef int check_same_shape(self, DirtyBitmap other, str operation) except -1:
        self.check_writable(operation)
        if self.npages != other.npages or self.pgsize != other.pgsize:
            raise_errno(EINVAL, operation, None, None,
                        f"{other!r} is not of the shape of {self!r}; scale() changes the page size")
        if self.words != other.words:
            self.check_disjoint(other, operation)
        return 0

    def set(self, first, npages=1):
        """Mark pages dirty.

        Parameters
        ----------
        first : int
            The first page.
        npages : int
            How many, at least 1.

        Raises
        ------
        InvalidArgumentError
            ERANGE: not inside the bitmap.  EINVAL: no pages, or a number outside uint64.
        """
        cdef uint64_t start = as_u64("set", first), n = as_u64("set", npages)
        self.check_writable("set")
        check_pages("set", start, n, self.npages)
        bitmap_set(self.words, start, n)

    def clear(self, first=0, npages=None):
        """Mark pages clean.

        Parameters
        ----------
        first : int
            The first page.
        npages : int, optional
            How many, at least 1; None is all up to the end.

        Raises
        ------
        InvalidArgumentError
            ERANGE: not inside the bitmap.  EINVAL: no pages, or a number outside uint64.
        """
        cdef uint64_t n = 0, start = page_range("clear", first, npages, self.npages, &n)
        self.check_writable("clear")
        bitmap_clear(self.words, start, n)

    def test(self, page):
        """Tell whether a page is dirty.

        Parameters
        ----------
        page : int

        Returns
        -------
        bool

        Raises
        ------
        InvalidArgumentError
            ERANGE: not inside the bitmap.
        """
        cdef uint64_t i = as_u64("test", page)
        check_pages("test", i, 1, self.npages)
        return bitmap_test(self.words, i)

    def merge(self, DirtyBitmap other not None):
        """OR another bitmap of the same number and size of pages into this one.

        Parameters
        ----------
        other : DirtyBitmap
            Stays as it is.

        Raises
        ------
        InvalidArgumentError
            EINVAL: another shape, or memory that overlaps this one's in part.
        """
        cdef uint64_t n = self.npages // 64, left = self.npages % 64
        self.check_same_shape(other, "merge")
        if self.npages < WORTH_RELEASING:
            bitmap_or(self.words, other.words, n)
        else:
            with nogil:
                bitmap_or(self.words, other.words, n)
        if left:
            self.words[n] |= other.words[n] & ((<uint64_t> 1 << left) - 1)

    def andnot(self, DirtyBitmap other not None):
        """Mark the pages clean that are dirty in another bitmap of the same number and size of pages.

        Parameters
        ----------
        other : DirtyBitmap
            Stays as it is.

        Raises
        ------
        InvalidArgumentError
            EINVAL: another shape, or memory that overlaps this one's in part.
        """
        cdef uint64_t n = self.npages // 64, left = self.npages % 64
        self.check_same_shape(other, "andnot")
        if self.npages < WORTH_RELEASING:
            bitmap_andnot(self.words, other.words, n)
        else:
            with nogil:
                bitmap_andnot(self.words, other.words, n)
        if left:
            self.words[n] &= ~(other.words[n] & ((<uint64_t> 1 << left) - 1))

    def count(self):
        """Return the number of dirty pages."""
        cdef uint64_t n
        if self.npages < WORTH_RELEASING:
            return bitmap_count_bits(self.words, self.npages)
        with nogil:
            n = bitmap_count_bits(self.words, self.npages)
        return n

    def any(self):
        """Return whether any page is dirty."""
        cdef bint found
        if self.npages < WORTH_RELEASING:
            return bitmap_any_bits(self.words, self.npages)
        with nogil:
            found = bitmap_any_bits(self.words, self.npages)
        return found

    def harvest(self, into, bit_offset=0):
        """Move the dirty pages to another bitmap: OR them in there, and mark all clean here, in one pass.

        Parameters
        ----------
        into : DirtyBitmap or writable buffer
            Where to; a buffer is used as by ``frombuffer``.  Bits outside of the ``npages`` from ``bit_offset`` on
            stay.
        bit_offset : int
            The page of ``into`` that this bitmap's page 0 becomes.

        Returns
        -------
        int
            The number of dirty pages here, whether or not they were dirty there.

        Raises
        ------
        InvalidArgumentError
            ERANGE: the pages don't fit there.  EINVAL: another page size, or bitmaps that overlap in memory.
        DmaPermissionError
            EACCES: one of both is read-only.
        """
        cdef DirtyBitmap to = as_target("harvest", into, self.pgsize)
        cdef uint64_t at = as_u64("harvest", bit_offset), n
        self.check_writable("harvest")
        check_pages("harvest", at, self.npages, to.npages)
        self.check_disjoint(to, "harvest")
        if self.npages < WORTH_RELEASING:
            return bitmap_harvest(to.words, at, self.words, self.npages)
        with nogil:
            n = bitmap_harvest(to.words, at, self.words, self.npages)
        return n

    def scale(self, pgsize):
        """Return the same dirty memory in pages of another size.

        Parameters
        ----------
        pgsize : int
            Bytes, a power of two.  A larger page is dirty when any of its parts is; the last one may lie partly after
            the end.  A dirty page becomes dirty pages where they are smaller.

        Returns
        -------
        DirtyBitmap
            A new bitmap.

        Raises
        ------
        InvalidArgumentError
            EINVAL: not a power of two.  EOVERFLOW: the smaller pages are 2**64 or more.
        """
        cdef uint64_t size = as_pgsize("scale", pgsize), small = min(size, self.pgsize), n
        cdef unsigned shift = 0
        cdef DirtyBitmap scaled
        while small << shift != max(size, self.pgsize):
            shift += 1
        if size < self.pgsize:
            if self.npages > UINT64_MAX >> shift:
                raise_errno(EOVERFLOW, "scale", None, None, f"{self.npages} << {shift} pages are 2**64 or more")
            n = self.npages << shift
        else:
            n = ((self.npages - 1) >> shift) + 1
        scaled = DirtyBitmap(n, size)
        with nogil:
            if size < self.pgsize:
                bitmap_expand(scaled.words, self.words, n, shift)
            else:
                bitmap_compact(scaled.words, self.words, self.npages, shift)
        return scaled

    def runs(self, out=None):
        """Return the runs of dirty pages, ascending.

        Parameters
        ----------
        out : (m, 2) uint64 array, optional
            Where to write them; C-contiguous, at least as many rows as there are runs.

        Returns
        -------
        (n, 2) uint64 ndarray
            First page and number of pages of each run; a view of ``out`` where it is given.

        Raises
        ------
        InvalidArgumentError
            ERANGE: ``out`` has too few rows; nothing was written.
        """
        cdef uint64_t n
        with nogil:
            n = bitmap_count_runs(self.words, self.npages)
        return self.extract("runs", out, n, 2)

    def indices(self, out=None):
        """Return the dirty pages, ascending.

        Parameters
        ----------
        out : (m,) uint64 array, optional
            Where to write them; contiguous, at least as many elements as there are dirty pages.

        Returns
        -------
        (n,) uint64 ndarray
            Page numbers; a view of ``out`` where it is given.

        Raises
        ------
        InvalidArgumentError
            ERANGE: ``out`` is too short; nothing was written.
        """
        return self.extract("indices", out, self.count(), 1)

    cdef object extract(self, str operation, object out, uint64_t n, int columns):
        cdef Py_buffer view
        cdef uint64_t *to
        import numpy
        if out is None:
            out = numpy.empty((n, 2), numpy.uint64) if columns == 2 else numpy.empty(n, numpy.uint64)
        open_u64(out, &view, operation, True, columns)
        try:
            if <uint64_t> view.shape[0] < n:
                raise_errno(ERANGE, operation, None, None, f"{n} are needed in `out`, which has {view.shape[0]}")
            to = <uint64_t *> view.buf
            # Where `out` is our own memory, the words would change under the loop.
            if to < self.words + bitmap_nwords(self.npages) and self.words < to + n * columns:
                raise_errno(EINVAL, operation, None, None, "`out` overlaps the bitmap in memory")
            with nogil:
                # No more than n even if somebody sets bits meanwhile.
                if columns == 2:
                    n = bitmap_runs(self.words, self.npages, to, n)
                else:
                    n = bitmap_indices(self.words, self.npages, to, n)
        finally:
            PyBuffer_Release(&view)
        return numpy.asarray(out)[:n]


cdef DirtyBitmap as_target(str operation, object into, uint64_t pgsize):
    """The bitmap to harvest into."""
    cdef DirtyBitmap to
    if isinstance(into, DirtyBitmap):
        to = into
        if to.pgsize != pgsize:
            raise_errno(EINVAL, operation, None, None,
                        f"{to!r} has other pages than of {pgsize} bytes; scale() changes them")
    else:
        to = DirtyBitmap.frombuffer(into, memoryview(into).nbytes // 8 * 64, pgsize)
    to.check_writable(operation)
    return to


# ---- the log ----

cdef class DirtyLog:
    """A dirty bitmap that many threads mark while another one harvests it.

    No mark is lost: a page that is marked while a harvest runs is in that harvest or in the next.

    Parameters
    ----------
    npages : int
        Number of pages, at least 1.
    pgsize : int
        Bytes of a page, a power of two.

    Attributes
    ----------
    npages, pgsize : int

    Raises
    ------
    InvalidArgumentError
        EINVAL: zero pages, or a page size that is not a power of two.
    LockedMemoryError
        ENOMEM: no memory for the log.

    Notes
    -----
    Marking takes no lock and a harvest stops no writer; harvests wait for one another.  Device models in C or Cython
    call ``dirtylog_mark`` of ``csrc/dirtylog.h`` without the GIL.  Source: DMA logging of the VFIO device features
    (``VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT``), which reports and clears in the same way.

    Examples
    --------
    >>> from vfiodma import DirtyBitmap, DirtyLog
    >>> log = DirtyLog(1000)
    >>> log.mark(10, 3)
    >>> dirty = DirtyBitmap(1000)
    >>> log.harvest(dirty), log.harvest(dirty), dirty.count()
    (3, 0, 3)
    """

    def __cinit__(self, npages, pgsize=4096):
        self.npages = as_u64("DirtyLog", npages)
        self.pgsize = as_pgsize("DirtyLog", pgsize)
        if self.npages == 0:
            raise_errno(EINVAL, "DirtyLog", None, None, "the number of pages is zero")
        self.log = dirtylog_new(self.npages)
        if not self.log:
            raise_errno(ENOMEM, "DirtyLog", None, None, f"no memory for a log of {npages} pages")

    def __dealloc__(self):
        dirtylog_free(self.log)

    def __repr__(self):
        return f"DirtyLog(npages={self.npages}, pgsize={self.pgsize})"

    def mark(self, first, npages=1):
        """Mark pages dirty.  Any thread may do so at any time.

        Parameters
        ----------
        first : int
            The first page.
        npages : int
            How many, at least 1.

        Raises
        ------
        InvalidArgumentError
            ERANGE: not inside the log.  EINVAL: no pages, or a number outside uint64.
        """
        cdef uint64_t start = as_u64("mark", first), n = as_u64("mark", npages)
        check_pages("mark", start, n, self.npages)
        dirtylog_mark(self.log, start, n)

    def mark_many(self, pages):
        """Mark single pages dirty, in the order given.

        Parameters
        ----------
        pages : (n,) uint64 array
            Page numbers, contiguous.

        Raises
        ------
        InvalidArgumentError
            ERANGE: one is not inside the log; none is marked then.

        Notes
        -----
        The GIL is released.
        """
        cdef Py_buffer view
        cdef const uint64_t *page
        cdef uint64_t i, n, worst = 0
        open_u64(pages, &view, "mark_many", False, 1)
        page = <const uint64_t *> view.buf
        n = view.shape[0]
        try:
            with nogil:
                for i in range(n):
                    worst = max(worst, page[i])
                if n and worst < self.npages:
                    for i in range(n):
                        # Once more: the array is not ours, and another thread may write to it.
                        if page[i] < self.npages:
                            dirtylog_mark(self.log, page[i], 1)
            if n:
                check_pages("mark_many", worst, 1, self.npages)
        finally:
            PyBuffer_Release(&view)

    def harvest(self, into, bit_offset=0, *, first=0, npages=None):
        """Move the marks to a bitmap: OR them in there, and forget them here.

        Parameters
        ----------
        into : DirtyBitmap or writable buffer
            Where to; a buffer is used as by ``DirtyBitmap.frombuffer``.
        bit_offset : int
            The page of ``into`` that page ``first`` becomes.
        first : int
            The first page to harvest.
        npages : int, optional
            How many; None is all up to the end.  Marks outside stay for later harvests.

        Returns
        -------
        int
            The number of pages that were marked, whether or not they were dirty there.

        Raises
        ------
        InvalidArgumentError
            ERANGE: the pages are not inside the log, or don't fit there.  EINVAL: another page size.
        DmaPermissionError
            EACCES: ``into`` is read-only.

        Notes
        -----
        The GIL is released.
        """
        cdef uint64_t n = 0, start = page_range("harvest", first, npages, self.npages, &n)
        cdef DirtyBitmap to = as_target("harvest", into, self.pgsize)
        cdef uint64_t at = as_u64("harvest", bit_offset)
        check_pages("harvest", at, n, to.npages)
        with nogil:
            n = dirtylog_harvest(self.log, start, n, to.words, at)
        return n
