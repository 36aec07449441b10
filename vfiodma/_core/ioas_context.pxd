from libc.stdint cimport uint64_t

from .dma cimport DmaPath
from .ioas_state cimport access_t, context_t, device_t
from .type1 cimport IommuGroup


cdef class IommufdContext:
    cdef context_t c
    cdef bint initialised
    cdef unsigned generation            # of the process that made it: a forked child has a higher one
    cdef list listeners
    cdef readonly str kernel

    cdef void free_objects(self) noexcept nogil
    cdef bint has_devices(self) noexcept nogil
    cdef int check_process(self, str operation) except -1
    cdef void take(self) noexcept
    cdef int enter(self, str operation) except -1
    cdef void leave(self) noexcept nogil


cdef class IommufdDevice(DmaPath):
    cdef device_t device
    cdef readonly IommufdContext context
    cdef IommuGroup group               # owns the list of reserved regions


cdef class IommufdAccess(DmaPath):
    cdef access_t entry
    cdef readonly IommufdContext context
    cdef object callback
