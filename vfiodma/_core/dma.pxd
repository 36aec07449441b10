from libc.stdint cimport uint64_t

from .nesting cimport pagewalk_fault


cdef class DmaPath:
    # Move bytes; 0, -EINVAL/-ENOENT nothing mapped, -EPERM, -EFAULT; *done = bytes moved, also when it fails.
    cdef int access(self, uint64_t iova, void *data, uint64_t size, bint write, uint64_t *done) noexcept nogil
    # Move bytes up to the end of a page of the PASID's own table; -EFAULT with *fault filled in.
    cdef int nested(self, uint64_t pasid, uint64_t address, void *data, uint64_t size, unsigned access, uint64_t *gpa,
                    uint64_t *done, pagewalk_fault *fault) noexcept nogil
    cdef int check_process(self, str operation) except -1
