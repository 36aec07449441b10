from libc.stdint cimport uint32_t, uint64_t

from .state cimport group_t, type1_t

cdef int pin_pages(type1_t *t, group_t *group, uint64_t iova, uint64_t npages, uint32_t prot) noexcept nogil
cdef void unpin_pages(type1_t *t, uint64_t iova, uint64_t npages) noexcept nogil
cdef int dma_rw(type1_t *t, uint64_t iova, void *data, uint64_t size, bint write) noexcept nogil
cdef int device_access(type1_t *t, uint64_t iova, void *data, uint64_t size, bint write, uint64_t *done) noexcept nogil
