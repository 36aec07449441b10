"""Pages of memory at fixed places of a file, with a hash of each.  C does the work: csrc/pagefile.c, csrc/pagehash.c."""
from cpython.buffer cimport Py_buffer, PyBuffer_Release
from libc.errno cimport EINVAL
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memset

from .buffers cimport as_pgsize, as_u64, open_buffer, open_u64
from .errno cimport raise_errno

cdef extern from "copy.h" nogil:
    int copy_check(const uint64_t *runs, size_t n, uint64_t npages, uint64_t *total, uint64_t *lowest, uint64_t *end)

cdef extern from "pagefile.h" nogil:
    int pagefile_write(int fd, uint64_t offset, const uint64_t *runs, size_t n, const void *content, uint64_t pgsize)
    int pagefile_read(int fd, uint64_t offset, const uint64_t *runs, size_t n, void *base, uint64_t pgsize)
    int pagefile_map(int fd, uint64_t offset, const uint64_t *runs, size_t n, void *base, uint64_t pgsize)
    int pagefile_punch(int fd, uint64_t offset, const uint64_t *runs, size_t n, uint64_t pgsize)

cdef extern from "pagehash.h" nogil:
    ctypedef struct pagehash_key:
        uint64_t word[8]
    uint64_t pagehash_differ(const pagehash_key *, const void *, uint64_t npages, size_t pgsize, const uint64_t *,
                             uint64_t *words)
    void pagehash_note(const pagehash_key *, const uint64_t *runs, size_t nruns, const void *content, size_t pgsize,
                       uint64_t *)


cdef class PageSums:
    """Hashes of the pages that a file holds, 0 for a page of zeros.

    Parameters
    ----------
    key : bytes
        64 of them, little-endian words.
    sums : writable (n,) uint64 array
        One element a page; held.
    pgsize : int
        Bytes of a page, a power of two from 64 on.

    Notes
    -----
    The arithmetic is that of csrc/pagehash.c.  Pages are written and read by pwrite(2) and pread(2), a call a run, each
    page at its place; the GIL is released.  An offset is where page 0 lies in the file, in bytes.
    """
    cdef pagehash_key _key
    cdef Py_buffer _sums
    cdef bint _has_sums
    cdef uint64_t _pgsize

    def __cinit__(self, bytes key not None, sums, pgsize=4096):
        cdef const unsigned char *word
        cdef size_t i, j
        self._pgsize = as_pgsize("page_sums", pgsize)
        if len(key) != sizeof(pagehash_key) or self._pgsize < 64:
            raise_errno(EINVAL, "page_sums", None, None, f"a key of {len(key)} bytes, pages of {pgsize}")
        word = key
        for i in range(8):
            for j in range(8):
                self._key.word[i] |= <uint64_t> word[8 * i + j] << (8 * j)
        open_u64(sums, &self._sums, "page_sums", True, 1)
        self._has_sums = True

    def __dealloc__(self):
        if self._has_sums:
            PyBuffer_Release(&self._sums)

    cdef uint64_t _check(self, const Py_buffer *runs, uint64_t npages) except? 0:
        cdef uint64_t total = 0, lowest, end
        cdef int err = copy_check(<const uint64_t *> runs.buf, runs.shape[0], npages, &total, &lowest, &end)
        if err:
            raise_errno(-err, "page_sums", None, None, f"a run is empty, or not inside the {npages} pages")
        return total

    def write(self, int fd, offset, runs, content):
        """Write the runs' pages, which stand one after another in ``content``, and note their hashes.

        Where it fails, with the errno of pwrite(2), any part of them may have been written; no hash was noted.
        """
        cdef Py_buffer pairs, data
        cdef uint64_t at = as_u64("write", offset)
        cdef int err
        open_u64(runs, &pairs, "write", False, 2)
        try:
            open_buffer(content, &data, "write", False)
            try:
                if self._check(&pairs, self._sums.shape[0]) * self._pgsize != <uint64_t> data.len:
                    raise_errno(EINVAL, "write", None, data.len, "the content is not the runs' pages")
                with nogil:
                    err = pagefile_write(fd, at, <const uint64_t *> pairs.buf, pairs.shape[0], data.buf, self._pgsize)
                    if not err:
                        pagehash_note(&self._key, <const uint64_t *> pairs.buf, pairs.shape[0], data.buf, self._pgsize,
                                      <uint64_t *> self._sums.buf)
            finally:
                PyBuffer_Release(&data)
        finally:
            PyBuffer_Release(&pairs)
        if err:
            raise_errno(-err, "write")

    def clear(self, runs):
        """Note that the runs' pages are zero."""
        cdef Py_buffer pairs
        cdef uint64_t *run
        cdef Py_ssize_t i
        open_u64(runs, &pairs, "clear", False, 2)
        try:
            self._check(&pairs, self._sums.shape[0])
            run = <uint64_t *> pairs.buf
            for i in range(pairs.shape[0]):
                memset(<uint64_t *> self._sums.buf + run[2 * i], 0, run[2 * i + 1] * 8)
        finally:
            PyBuffer_Release(&pairs)

    def differ(self, memory, into):
        """Set, in a buffer of u64 words, the bits of the pages whose hash is another one; return how many.

        Pages of zeros in the file count, and are not touched in memory.
        """
        cdef Py_buffer data, words
        cdef uint64_t npages, found
        open_buffer(memory, &data, "differ", False)
        try:
            open_buffer(into, &words, "differ", True)
            try:
                npages = <uint64_t> data.len // self._pgsize
                if npages > <uint64_t> self._sums.shape[0] or (npages + 63) // 64 * 8 > <uint64_t> words.len:
                    raise_errno(EINVAL, "differ", None, data.len, f"{npages} pages are more than there are hashes or bits")
                with nogil:
                    found = pagehash_differ(&self._key, data.buf, npages, self._pgsize, <uint64_t *> self._sums.buf,
                                            <uint64_t *> words.buf)
            finally:
                PyBuffer_Release(&words)
        finally:
            PyBuffer_Release(&data)
        return found

    def read(self, int fd, offset, runs, memory):
        """Read the runs' pages to their places in ``memory``; ENODATA where the file ends before."""
        self._place(fd, as_u64("read", offset), runs, memory, False)

    def map(self, int fd, offset, runs, memory):
        """Map the runs' pages, private (copy on write), over those of ``memory``, a mapping of whole pages."""
        self._place(fd, as_u64("map", offset), runs, memory, True)

    cdef int _place(self, int fd, uint64_t offset, object runs, object memory, bint mapped) except -1:
        cdef Py_buffer pairs, data
        cdef int err
        open_u64(runs, &pairs, "read", False, 2)
        try:
            open_buffer(memory, &data, "read", True)
            try:
                self._check(&pairs, <uint64_t> data.len // self._pgsize)
                if mapped and (<uintptr_t> data.buf | offset | self._pgsize) % 4096:
                    raise_errno(EINVAL, "map", None, data.len, "not whole pages")
                with nogil:
                    if mapped:
                        err = pagefile_map(fd, offset, <const uint64_t *> pairs.buf, pairs.shape[0], data.buf, self._pgsize)
                    else:
                        err = pagefile_read(fd, offset, <const uint64_t *> pairs.buf, pairs.shape[0], data.buf, self._pgsize)
            finally:
                PyBuffer_Release(&data)
        finally:
            PyBuffer_Release(&pairs)
        if err:
            raise_errno(-err, "map" if mapped else "read")
        return 0

    def punch(self, int fd, offset, runs):
        """Make holes of the runs' pages in the file.

        Notes
        -----
        Source: fallocate(2), FALLOC_FL_PUNCH_HOLE.
        """
        cdef Py_buffer pairs
        cdef uint64_t at = as_u64("punch", offset)
        cdef int err
        open_u64(runs, &pairs, "punch", False, 2)
        try:
            self._check(&pairs, self._sums.shape[0])
            with nogil:
                err = pagefile_punch(fd, at, <const uint64_t *> pairs.buf, pairs.shape[0], self._pgsize)
        finally:
            PyBuffer_Release(&pairs)
        if err:
            raise_errno(-err, "punch")
