from libc.stdint cimport uint32_t

from .ioas_state cimport context_t

cdef int object_add(context_t *c, int kind, void *data, uint32_t *id) noexcept nogil
cdef void object_remove(context_t *c, uint32_t id) noexcept nogil
