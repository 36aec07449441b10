from libc.stdint cimport uint32_t, uint64_t

from .ioas_state cimport context_t, device_t, hwpt_t, queue_t
from .nesting cimport pagewalk_fault, wrote_entry

cdef enum:                                  # flags of HWPT_ALLOC
    NEST_PARENT = 1
    DIRTY_TRACKING = 2
    FAULT_ID_VALID = 4
    PASID = 8

cdef struct hwpt_arguments:
    uint32_t flags, device, pt, data_type, data_len, fault
    uint64_t data

cdef int hwpt_alloc(context_t *c, const hwpt_arguments *args, uint32_t *id) noexcept nogil
cdef void hwpt_destroy(hwpt_t *hwpt) noexcept nogil
cdef int device_bind(context_t *c, device_t *device) noexcept nogil
cdef void device_unbind(context_t *c, device_t *device) noexcept nogil
cdef int device_attach(context_t *c, device_t *device, uint32_t *pt) noexcept nogil
cdef void device_detach(context_t *c, device_t *device) noexcept nogil
cdef int pasid_attach(context_t *c, device_t *device, uint32_t pasid, uint32_t pt) noexcept nogil
cdef void pasid_detach(context_t *c, device_t *device, uint32_t pasid) noexcept nogil
cdef const queue_t *device_queue(device_t *device, uint32_t pasid, uint64_t *serial) noexcept nogil
cdef int nested_dma(context_t *c, device_t *device, uint64_t pasid, uint64_t address, void *data, uint64_t size,
                    unsigned access, uint64_t *gpa, uint64_t *done, pagewalk_fault *fault, wrote_entry wrote, void *log) noexcept nogil
cdef int device_dma(context_t *c, device_t *device, uint64_t iova, void *data, uint64_t size, bint write, uint64_t *done) noexcept nogil
