# ioctl(2) with typed arguments: the running kernel's, or that of a software VFIO in this process.
from libc.stdint cimport uint32_t, uint64_t

cdef class Descriptor:
    cdef readonly object system             # a VfioSystem; None = the running kernel
    cdef readonly bint real                          # ioctl(2) itself, without a detour through Python
    cdef readonly int fd                    # -1 = closed
    cdef int users                          # threads in ioctl(2), without the GIL
    cdef int release(self, int fd) except -1
    cdef long once_nogil(self, int fd, uint32_t request, void *arg) except? -1
    cdef long call(self, uint32_t request, void *arg) except? -1
    cdef long call_system(self, uint32_t request, void *arg) except? -1
    cdef long call_again(self, uint32_t request, void *arg, long result) except? -1
    cdef int fail(self, int err, str operation, object iova=*, object size=*, object entry=*) except -1

cdef class Type1Ioctls(Descriptor):
    cdef public uint64_t max_map_size
    cdef public uint64_t pgsize
    cdef uint64_t piece(self, uint64_t done, uint64_t size) noexcept
    cdef long map_one(self, uint64_t iova, uint64_t vaddr, uint64_t size, uint32_t flags) except? -1
    cdef long map_pieces(self, uint64_t iova, uint64_t vaddr, uint64_t size, uint32_t flags) except? -1
    cdef int map_rows(self, str operation, object entries, Py_ssize_t columns) except -1
    cdef long unmap_one(self, uint64_t iova, uint64_t size, uint32_t flags, uint64_t *unmapped) except? -1
    cdef long dirty(self, uint32_t flags) except? -1
