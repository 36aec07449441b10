from libc.stdint cimport uint64_t

from .ioas_state cimport area_t, hwpt_t, ioas_t

cdef int dirty_prepare(ioas_t *ioas, area_t *area) noexcept nogil
cdef void dirty_forget(area_t *area, const hwpt_t *hwpt) noexcept nogil
cdef int dirty_split(area_t *area, area_t *rest) noexcept nogil
cdef void dirty_move(area_t *area, area_t *rest) noexcept nogil
cdef void dirty_mark(area_t *area, const hwpt_t *hwpt, uint64_t iova, uint64_t size) noexcept nogil
cdef int dirty_enable(hwpt_t *hwpt) noexcept nogil
cdef void dirty_disable(hwpt_t *hwpt) noexcept nogil
cdef int dirty_get(hwpt_t *hwpt, uint64_t iova, uint64_t length, uint64_t page_size, uint64_t data, bint clear) noexcept nogil
