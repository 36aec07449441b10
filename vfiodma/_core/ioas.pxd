from libc.stdint cimport uint32_t, uint64_t

from .ioas_state cimport area_t, context_t, ioas_t, pages_t
from .state cimport V7_2

cdef enum:                                  # flags of IOAS_MAP, MAP_FILE and COPY
    FIXED_IOVA = 1
    WRITEABLE = 2
    READABLE = 4

# What page tables let devices do.  Up to 6.12 the VT-d driver sets the read bit in every entry, so WRITE-only memory can
# be read as well.
cdef inline bint permitted(const area_t *area, bint write) noexcept nogil:
    if write or area.pages.context.version >= V7_2:
        return (area.prot & (WRITEABLE if write else READABLE)) != 0
    return True

cdef struct element_t:                      # a part of a pages object that becomes an area
    pages_t *pages
    uint64_t offset, length

cdef ioas_t *ioas_new(context_t *c) noexcept nogil
cdef void ioas_free(ioas_t *ioas) noexcept nogil
cdef int area_hold(area_t *area) noexcept nogil
cdef void area_drop(area_t *area) noexcept nogil
cdef int map_user(ioas_t *ioas, uint64_t vaddr, uint64_t length, uint64_t *iova, uint32_t prot, bint fixed) noexcept nogil
cdef int map_file(ioas_t *ioas, int fd, uint64_t start, uint64_t length, uint64_t *iova, uint32_t prot, bint fixed) noexcept nogil
cdef int copy_check(ioas_t *source, uint64_t iova, uint64_t length) noexcept nogil
cdef int copy_areas(ioas_t *target, ioas_t *source, uint64_t source_iova, uint64_t length, uint64_t *iova, uint32_t prot,
                    bint fixed) noexcept nogil
cdef int unmap(ioas_t *ioas, uint64_t iova, uint64_t length, uint64_t *unmapped) noexcept nogil
cdef int unmap_all(ioas_t *ioas, uint64_t *unmapped) noexcept nogil
cdef int split(ioas_t *ioas, uint64_t at) noexcept nogil
cdef int reserve(ioas_t *ioas, uint64_t start, uint64_t last, void *owner) noexcept nogil
cdef void unreserve(ioas_t *ioas, void *owner) noexcept nogil
cdef bint next_hole(ioas_t *ioas, uint64_t *start, uint64_t *last) noexcept nogil
cdef int check_alignment(ioas_t *ioas, uint64_t alignment) noexcept nogil
cdef void update_alignment(ioas_t *ioas) noexcept nogil
cdef int disable_large_pages(ioas_t *ioas) noexcept nogil
cdef int enable_large_pages(ioas_t *ioas) noexcept nogil
