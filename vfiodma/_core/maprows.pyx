"""Rows of mappings on their way from one process to another, without NumPy."""
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer, Py_buffer
from libc.errno cimport EINVAL, EPROTO
from libc.stdint cimport uint64_t

from .args cimport acquire, acquire_rows
from .errno cimport raise_errno

cdef extern from "maprows.h" nogil:
    int maprows_check(const uint64_t *rows, size_t n, const uint64_t *sizes, size_t nregions, uint64_t pgsize,
                      uint64_t *totals, size_t *bad)
    void maprows_place(const uint64_t *rows, size_t n, const uint64_t *bases, uint64_t *entries)
    int maprows_split(const uint64_t *entries, size_t n, uint64_t extra, uint64_t *translations, uint64_t *tags,
                      uint64_t *updates, size_t *bad)
    int maprows_rejoin(const uint64_t *rows, const uint64_t *waiting, size_t n, uint64_t *translations)

FAULTS = ("", "leads to no region, or has no permission", "is empty, misaligned or ends above 2**64 - 1",
          "overlaps the one before it, or is out of order", "reaches beyond its region", "is more than can be")


cdef object table(Py_ssize_t n, Py_ssize_t columns):
    """Return a memoryview of n rows of uint64."""
    return memoryview(bytearray(n * columns * 8)).cast("Q", [n, columns])


def check_rows(rows, sizes, uint64_t pgsize):
    """Check placed rows.

    Parameters
    ----------
    rows : (n, 4) buffer of uint64
        iova, offset into the region, size, region << 3 | mmio << 2 | prot.
    sizes : buffer of uint64
        Bytes of each region.
    pgsize : int
        A power of two that addresses and sizes are multiples of.

    Returns
    -------
    (int, int)
        Bytes of all, and of those that are no device memory.

    Raises
    ------
    ProtocolError
        EPROTO: a row is wrong.
    """
    cdef Py_buffer view, lengths
    cdef uint64_t[2] totals
    cdef size_t bad = 0
    cdef Py_ssize_t n
    cdef int fault
    acquire(sizes, &lengths, 0, "check_rows")
    try:
        acquire_rows(rows, &view, 4, &n, "check_rows")
        with nogil:
            fault = maprows_check(<uint64_t *> view.buf, n, <uint64_t *> lengths.buf, lengths.len // 8, pgsize, totals, &bad)
        PyBuffer_Release(&view)
    finally:
        PyBuffer_Release(&lengths)
    if fault:
        raise_errno(EPROTO, "live_update", None, None, f"the table is wrong: mapping {bad} {FAULTS[fault]}")
    return totals[0], totals[1]


def place_rows(rows, bases):
    """Return (n, 4) entries of iova, vaddr, size, mmio << 2 | prot of rows that check_rows() took; region i begins at bases[i]."""
    cdef Py_buffer view, begin, out
    cdef Py_ssize_t n
    acquire(bases, &begin, 0, "place_rows")
    try:
        acquire_rows(rows, &view, 4, &n, "place_rows")
        try:
            entries = table(n, 4)
            PyObject_GetBuffer(entries, &out, PyBUF_SIMPLE | PyBUF_WRITABLE)
            with nogil:
                maprows_place(<uint64_t *> view.buf, n, <uint64_t *> begin.buf, <uint64_t *> out.buf)
            PyBuffer_Release(&out)
        finally:
            PyBuffer_Release(&view)
    finally:
        PyBuffer_Release(&begin)
    return entries


def split_entries(entries, uint64_t extra=0):
    """Return what tables and backends take: (iova, size, vaddr), (iova, size, tag | extra) and (iova, vaddr, size) rows.

    EINVAL for a tag without permission.
    """
    cdef Py_buffer view
    cdef Py_buffer[3] outs
    cdef Py_ssize_t n
    cdef size_t bad = 0
    cdef int i, err
    acquire_rows(entries, &view, 4, &n, "adopt")
    try:
        parts = tuple(table(n, 3) for _ in range(3))
        for i in range(3):
            PyObject_GetBuffer(parts[i], &outs[i], PyBUF_SIMPLE | PyBUF_WRITABLE)
        with nogil:
            err = maprows_split(<uint64_t *> view.buf, n, extra, <uint64_t *> outs[0].buf, <uint64_t *> outs[1].buf,
                                <uint64_t *> outs[2].buf, &bad)
        for i in range(3):
            PyBuffer_Release(&outs[i])
    finally:
        PyBuffer_Release(&view)
    if err:
        raise_errno(EINVAL, "adopt", None, None, f"entry {bad} has no permission")
    return parts


def rejoin_rows(rows, waiting):
    """Return (iova, size, vaddr) of rows (iova, vaddr, size) that are those waiting (iova, size, old vaddr), or None."""
    cdef Py_buffer view, others, out
    cdef Py_ssize_t n, m
    cdef int err
    acquire_rows(rows, &view, 3, &n, "rejoin_rows")
    try:
        acquire_rows(waiting, &others, 3, &m, "rejoin_rows")
        try:
            if n != m or not n:
                return None
            translations = table(n, 3)
            PyObject_GetBuffer(translations, &out, PyBUF_SIMPLE | PyBUF_WRITABLE)
            with nogil:
                err = maprows_rejoin(<uint64_t *> view.buf, <uint64_t *> others.buf, n, <uint64_t *> out.buf)
            PyBuffer_Release(&out)
        finally:
            PyBuffer_Release(&others)
    finally:
        PyBuffer_Release(&view)
    return None if err else translations
