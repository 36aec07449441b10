from libc.stdint cimport int64_t, uint32_t, uint64_t

from .state cimport dma_t, type1_t

cdef type1_t *type1_new(int version, bint v2, uint32_t entry_limit, int64_t memlock_limit, void *owner) noexcept nogil
cdef void type1_free(type1_t *t) noexcept nogil
cdef int pin_mapping(type1_t *t, dma_t *dma) noexcept nogil
cdef void unpin_mapping(type1_t *t, dma_t *dma) noexcept nogil
cdef int map_dma(type1_t *t, uint64_t iova, uint64_t vaddr, uint64_t size, uint32_t flags) noexcept nogil
cdef int unmap_dma(type1_t *t, uint64_t iova, uint64_t size, uint32_t flags, uint64_t pgsize, uint64_t data,
                   uint64_t *unmapped) noexcept nogil
cdef void remove_all(type1_t *t) noexcept nogil
cdef int update_vaddrs(type1_t *t, const uint64_t *rows, size_t n, size_t *failed) noexcept nogil
cdef dma_t *find_mapping(type1_t *t, uint64_t iova) noexcept nogil
cdef int wait_until_valid(type1_t *t, uint64_t iova, bint everything) noexcept nogil
cdef int count_page(type1_t *t, dma_t *dma, uint64_t iova, bint *countable) noexcept nogil
cdef void uncount_page(dma_t *dma, bint countable) noexcept nogil
cdef uint64_t charged_pages() noexcept nogil
cdef uint64_t process_locked_pages() noexcept nogil
cdef void forget_charges() noexcept nogil
cdef int charge_process(uint64_t pages, int64_t limit) noexcept nogil
cdef void uncharge_process(uint64_t pages) noexcept nogil
