from libc.stdint cimport uint32_t, uint64_t

from .state cimport type1_t

cdef long type1_ioctl(type1_t *t, uint32_t request, uint64_t arg) noexcept nogil
cdef long type1_extension(int version, type1_t *t, uint64_t extension) noexcept nogil
