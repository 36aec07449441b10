# Mapping in an I/O address space of iommufd, and the dirty bits of its hardware page tables.
from cpython.buffer cimport Py_buffer
from libc.stdint cimport uint32_t, uint64_t

from .kernel cimport Descriptor
from .rangemap cimport rangemap, rangemap_entry

cdef class IoasIoctls:
    cdef readonly Descriptor iommufd
    cdef readonly uint32_t id               # 0 = destroyed
    cdef rangemap *noted                    # what was mapped through this object
    cdef long map_one(self, uint64_t *iova, uint64_t vaddr, uint64_t size, uint32_t flags) except? -1
    cdef long unmap_one(self, uint64_t iova, uint64_t size, uint64_t *unmapped) except? -1
    cdef long note(self, uint64_t iova, uint64_t size) except? -1
    cdef long note_copy(self, IoasIoctls source, uint64_t src, uint64_t size, uint64_t dst) except? -1
    cdef void forget(self, uint64_t iova, uint64_t last) noexcept
    cdef long unmap_area(self, uint64_t iova, uint64_t size, uint64_t *unmapped) except? -1
    cdef long unmap_range(self, uint64_t iova, uint64_t size, uint64_t *unmapped) except? -1
    cdef int fail(self, long err, str operation, object iova=*, object size=*, object entry=*) except -1

cdef class HwptIoctls:
    cdef readonly IoasIoctls ioas
    cdef readonly uint32_t id               # 0 = destroyed
    cdef public bint loses_last_page
    cdef public bint tracking
    cdef long get_bits(self, uint64_t iova, uint64_t size, uint64_t pgsize, uint32_t flags, void *words) except? -1
    cdef int check(self, str operation, object iova, object size, uint64_t at, uint64_t length, uint64_t pgsize,
                   Py_buffer *view) except -1
