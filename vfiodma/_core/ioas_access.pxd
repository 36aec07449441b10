from libc.stdint cimport uint32_t, uint64_t

from .ioas_state cimport access_t, context_t

cdef int access_bind(context_t *c, access_t *access) noexcept nogil
cdef void access_unbind(context_t *c, access_t *access) noexcept nogil
cdef int access_attach(context_t *c, access_t *access, uint32_t id) noexcept nogil
cdef void access_detach(access_t *access) noexcept nogil
cdef int access_pin(access_t *access, uint64_t iova, uint64_t length, bint write) noexcept nogil
cdef void access_unpin(access_t *access, uint64_t iova, uint64_t length) noexcept nogil
cdef int access_rw(access_t *access, uint64_t iova, void *data, uint64_t size, bint write) noexcept nogil
