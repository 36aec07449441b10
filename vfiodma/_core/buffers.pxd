# Numbers of pages and buffers as arguments: wrong types are TypeError, wrong values typed errors.
from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBUF_ND, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_Clear, PyErr_Occurred
from cpython.long cimport PyLong_CheckExact
from cpython.number cimport PyNumber_Index
from libc.errno cimport EACCES, EINVAL, ERANGE
from libc.stdint cimport UINT64_MAX, uint64_t, uintptr_t

from .errno cimport raise_errno

cdef extern from "Python.h":
    # Declared without its exception, which as_u64() tests for itself.
    uint64_t PyLong_AsUnsignedLongLong(object) noexcept


cdef inline uint64_t as_u64(str operation, object number) except? 0xffffffffffffffff:
    """The integer as uint64: TypeError for another type, EINVAL for another integer."""
    cdef uint64_t value
    if not PyLong_CheckExact(number):
        number = PyNumber_Index(number)
    value = PyLong_AsUnsignedLongLong(number)
    if value == UINT64_MAX and PyErr_Occurred():
        PyErr_Clear()
        raise_errno(EINVAL, operation, None, None, f"{number} is not within 0 ... 2**64 - 1")
    return value


cdef inline uint64_t as_pgsize(str operation, object number) except 0:
    cdef uint64_t value = as_u64(operation, number)
    if value == 0 or value & (value - 1):
        raise_errno(EINVAL, operation, None, None, f"page size {value:#x} is not a power of two")
    return value


cdef inline int check_pages(str operation, uint64_t first, uint64_t n, uint64_t npages) except -1:
    """The n > 0 pages from `first` on lie inside."""
    if n == 0:
        raise_errno(EINVAL, operation, None, None, "the number of pages is zero")
    if first >= npages or n > npages - first:
        raise_errno(ERANGE, operation, None, None, f"{n} pages from page {first} on are not within {npages} pages")
    return 0


cdef inline uint64_t page_range(str operation, object first, object npages, uint64_t limit,
                         uint64_t *n) except? 0xffffffffffffffff:
    """The first page; *n becomes the number of pages, None being all up to the end."""
    cdef uint64_t start = as_u64(operation, first)
    n[0] = limit - start if npages is None and start < limit else 1 if npages is None else as_u64(operation, npages)
    check_pages(operation, start, n[0], limit)
    return start


cdef inline int open_buffer(object source, Py_buffer *view, str operation, bint writable) except -1:
    """A contiguous buffer of any element; EACCES when it must be writable and is not."""
    try:
        PyObject_GetBuffer(source, view, PyBUF_ND | PyBUF_FORMAT | PyBUF_C_CONTIGUOUS)
    except (BufferError, ValueError) as error:
        raise_errno(EINVAL, operation, None, None, f"the buffer is not C-contiguous: {error}")
    if writable and view.readonly:
        PyBuffer_Release(view)
        raise_errno(EACCES, operation, None, None, "the buffer is read-only")
    return 0


cdef inline int open_u64(object source, Py_buffer *view, str operation, bint writable, int columns) except -1:
    """A contiguous buffer of uint64 of shape (n,), or (n, columns) where columns > 1."""
    cdef bint fits
    open_buffer(source, view, operation, writable)
    if view.itemsize != 8 or view.format == NULL or (<bytes> view.format).lstrip(b"@=<") not in (b"Q", b"L"):
        PyBuffer_Release(view)
        raise TypeError(f"{operation}: the elements of the buffer must be uint64")
    fits = view.ndim == 1 if columns == 1 else view.ndim == 2 and view.shape[1] == columns
    if not fits or <uintptr_t> view.buf % 8:
        PyBuffer_Release(view)
        shape = "(n,)" if columns == 1 else f"(n, {columns})"
        raise_errno(EINVAL, operation, None, None, f"the array must have the shape {shape} and be aligned to 8 bytes")
    return 0
