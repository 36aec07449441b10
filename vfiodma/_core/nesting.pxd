from libc.stdint cimport uint8_t, uint32_t, uint64_t

from .state cimport pagewalk, type1_t
from .uapi cimport nesting_info

cdef extern from "pagewalk.h" nogil:
    enum:
        PAGEWALK_READ, PAGEWALK_WRITE, PAGEWALK_PRIV
        PAGEWALK_UNKNOWN, PAGEWALK_PASID_FETCH, PAGEWALK_BAD_PASID_ENTRY, PAGEWALK_PASID_INVALID, PAGEWALK_PTE_FETCH
        PAGEWALK_PERMISSION, PAGEWALK_OOR_ADDRESS
    ctypedef struct pagewalk_result:
        uint64_t gpa, room
    ctypedef struct pagewalk_fault:
        uint32_t reason
        bint missing, fetched
        uint64_t fetch_addr


cdef class PasidSpace:
    cdef uint8_t *bits
    cdef object lock, freed

ctypedef void (*wrote_entry)(void *log, uint64_t gpa) noexcept nogil

cdef bint nests(const type1_t *t) noexcept nogil
cdef void nesting_start(type1_t *t) noexcept nogil
cdef void nesting_stop(type1_t *t) noexcept nogil
cdef void describe_nesting(const type1_t *t, nesting_info *info) noexcept nogil
cdef long nesting_op(type1_t *t, uint64_t arg) noexcept nogil
cdef int nested_access(type1_t *t, uint64_t pasid, uint64_t address, void *data, uint64_t size, unsigned access,
                       uint64_t *gpa, uint64_t *done, pagewalk_fault *fault, wrote_entry wrote, void *log) noexcept nogil
cdef uint64_t nested_bound(type1_t *t, uint64_t pasid) noexcept nogil
cdef size_t translate_many(type1_t *t, const uint64_t *addresses, uint64_t *out, size_t n, bint nested, uint64_t pasid,
                           unsigned access, wrote_entry wrote, void *log) noexcept nogil
cdef tuple cache_size(type1_t *t)
