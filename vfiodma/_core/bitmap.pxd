from cpython.buffer cimport Py_buffer
from libc.stdint cimport uint64_t

cdef extern from "dirtylog.h" nogil:
    ctypedef struct dirtylog:
        pass
    # Device models written in C or Cython mark pages with this, without the GIL, on the `log` of a DirtyLog that they
    # keep alive.
    void dirtylog_mark(dirtylog *log, uint64_t first, uint64_t n)


cdef class DirtyBitmap:
    cdef uint64_t *words
    cdef readonly uint64_t npages
    cdef readonly uint64_t pgsize
    cdef readonly bint readonly
    cdef void *memory                   # what we allocated; NULL in a view
    cdef Py_buffer lender               # of frombuffer
    cdef bint borrowed
    cdef DirtyBitmap parent             # of a slice
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t strides[1]
    cdef int check_writable(self, str operation) except -1
    cdef int check_disjoint(self, DirtyBitmap other, str operation) except -1
    cdef int check_same_shape(self, DirtyBitmap other, str operation) except -1
    cdef object extract(self, str operation, object out, uint64_t n, int columns)


cdef class DirtyLog:
    cdef dirtylog *log
    cdef readonly uint64_t npages
    cdef readonly uint64_t pgsize
