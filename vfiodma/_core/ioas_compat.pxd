from libc.stdint cimport uint32_t, uint64_t

from .ioas_state cimport context_t

cdef long compat_ioctl(context_t *c, uint32_t request, uint64_t arg) noexcept nogil
cdef int compat_ioas(context_t *c) noexcept nogil
