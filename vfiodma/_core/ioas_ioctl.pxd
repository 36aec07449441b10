from libc.stdint cimport uint32_t, uint64_t

from .ioas_state cimport context_t

cdef enum:
    NEEDS_DESCRIPTOR = -4096            # not an errno: the request makes a descriptor, which the caller must do

cdef long iommufd_ioctl(context_t *c, uint32_t request, uint64_t arg) noexcept nogil
