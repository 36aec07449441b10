from .state cimport group_t, type1_t

cdef int attach_group(type1_t *t, group_t *group) noexcept nogil
cdef void detach_group(type1_t *t, group_t *group) noexcept nogil
cdef void forget_groups(type1_t *t) noexcept nogil
cdef bint enforces_coherency(const type1_t *t) noexcept nogil
