from libc.stdint cimport uint64_t

from .nesting cimport pagewalk_fault
from .state cimport pthread_rwlock_t

cdef extern from "dirtylog.h" nogil:
    ctypedef struct dirtylog:
        pass

cdef enum:
    MAX_LOG_RANGES = 256                # PAGE_SIZE / sizeof(struct vfio_device_feature_dma_logging_range)

cdef struct log_range:
    uint64_t start, last
    dirtylog *log

cdef struct dma_log:                    # of what a device has written
    pthread_rwlock_t lock               # read: a write is being logged; write: the log starts or stops
    log_range ranges[MAX_LOG_RANGES]
    size_t nranges                      # 0 = the log is off
    uint64_t pgsize

# What a walk through a guest's tables calls for each entry that it has changed, with the log of the device's path.
cdef void log_entry(void *log, uint64_t gpa) noexcept nogil


cdef class DmaPath:
    cdef object port                    # the DmaPort that uses it, or None; keeps `log` alive
    cdef dma_log *log
    # The serial number of the table bound to a PASID, or 0.
    cdef uint64_t bound(self, uint64_t pasid)
    # Move bytes; 0, -EINVAL/-ENOENT nothing mapped, -EPERM, -EFAULT; *done = bytes moved, also when it fails.
    cdef int access(self, uint64_t iova, void *data, uint64_t size, bint write, uint64_t *done) noexcept nogil
    # Must requests without a PASID go by nested(), as PASID 0?
    cdef bint nests(self) noexcept nogil
    # Move bytes up to the end of a page of the PASID's own table; -EFAULT with *fault filled in.
    cdef int nested(self, uint64_t pasid, uint64_t address, void *data, uint64_t size, unsigned access, uint64_t *gpa,
                    uint64_t *done, pagewalk_fault *fault) noexcept nogil
    cdef int check_process(self, str operation) except -1
