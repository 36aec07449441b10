from libc.stdint cimport uint32_t, uint64_t

from .ioas_state cimport context_t, device_t, hwpt_t
from .nesting cimport pagewalk_fault, pagewalk_result, wrote_entry

cdef int nested_new(context_t *c, device_t *device, hwpt_t *parent, uint32_t data_type, uint32_t data_len, uint64_t data,
                    hwpt_t **out) noexcept nogil
cdef void nested_free(hwpt_t *hwpt) noexcept nogil
cdef int nested_enter(hwpt_t *hwpt, const device_t *device) noexcept nogil
cdef void nested_forget(hwpt_t *hwpt) noexcept nogil
cdef int nested_invalidate(hwpt_t *hwpt, uint32_t data_type, uint64_t data, uint32_t entry_len, uint32_t *n) noexcept nogil
cdef int nested_walk(hwpt_t *hwpt, uint64_t address, unsigned access, pagewalk_result *found, pagewalk_fault *fault,
                     wrote_entry wrote, void *log) noexcept nogil
cdef tuple nested_cache(const hwpt_t *hwpt)
