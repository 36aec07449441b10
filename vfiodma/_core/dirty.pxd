from libc.stdint cimport uint64_t

from .state cimport dma_t, type1_t

cdef uint64_t bitmap_bytes(uint64_t npages) noexcept nogil
cdef bint bitmap_arguments_ok(uint64_t size, uint64_t pgsize, uint64_t bitmap_size) noexcept nogil
cdef int dirty_allocate(type1_t *t, dma_t *dma) noexcept nogil
cdef void dirty_fill_all(type1_t *t) noexcept nogil
cdef void dirty_mark(type1_t *t, dma_t *dma, uint64_t iova, uint64_t size) noexcept nogil
cdef void dirty_resize(type1_t *t) noexcept nogil
cdef int dirty_start(type1_t *t) noexcept nogil
cdef void dirty_stop(type1_t *t) noexcept nogil
cdef int dirty_copy_out(type1_t *t, dma_t *dma, uint64_t base, uint64_t data) noexcept nogil
cdef int dirty_get(type1_t *t, uint64_t iova, uint64_t size, uint64_t pgsize, uint64_t bitmap_size, uint64_t data) noexcept nogil
cdef bint bisects(type1_t *t, uint64_t iova, uint64_t last) noexcept nogil
