from libc.stdint cimport int64_t, uint32_t, uint64_t

from .ioas_state cimport context_t, pages_t

cdef pages_t *pages_of_user(context_t *c, uint64_t start, uint64_t npages, bint writable) noexcept nogil
cdef pages_t *pages_of_file(context_t *c, int fd, uint64_t start, uint64_t npages, bint writable, int *err) noexcept nogil
cdef void pages_put(pages_t *pages) noexcept nogil
cdef int pages_hold(pages_t *pages, uint64_t first, uint64_t last) noexcept nogil
cdef void pages_drop(pages_t *pages, uint64_t first, uint64_t last) noexcept nogil
cdef int pages_access(pages_t *pages, uint64_t offset, void *data, uint64_t size, bint write) noexcept nogil
cdef int pages_swap(pages_t *pages, uint64_t offset, uint64_t seen, uint64_t wanted) noexcept nogil
cdef int pages_address(pages_t *pages, uint64_t *address) noexcept nogil
cdef void forget_user_charges() noexcept nogil
