from libc.stdint cimport uint32_t, uint64_t

from .ioas_state cimport context_t, device_t, hwpt_t

cdef enum:                                  # flags of HWPT_ALLOC
    NEST_PARENT = 1
    DIRTY_TRACKING = 2
    FAULT_ID_VALID = 4
    PASID = 8

cdef struct hwpt_arguments:
    uint32_t flags, device, pt, data_type, data_len, fault

cdef int hwpt_alloc(context_t *c, const hwpt_arguments *args, uint32_t *id) noexcept nogil
cdef void hwpt_destroy(hwpt_t *hwpt) noexcept nogil
cdef int device_bind(context_t *c, device_t *device) noexcept nogil
cdef void device_unbind(context_t *c, device_t *device) noexcept nogil
cdef int refuse_attach(context_t *c, uint32_t pt) noexcept nogil
cdef int device_attach(context_t *c, device_t *device, uint32_t *pt) noexcept nogil
cdef void device_detach(context_t *c, device_t *device) noexcept nogil
cdef int device_dma(context_t *c, device_t *device, uint64_t iova, void *data, uint64_t size, bint write, uint64_t *done) noexcept nogil
