from libc.stdint cimport uint64_t


cdef class DmaPath:
    # Move bytes; 0, -EINVAL/-ENOENT nothing mapped, -EPERM, -EFAULT; *done = bytes moved, also when it fails.
    cdef int access(self, uint64_t iova, void *data, uint64_t size, bint write, uint64_t *done) noexcept nogil
    cdef int check_process(self, str operation) except -1
