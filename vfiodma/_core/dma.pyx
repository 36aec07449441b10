"""A software device's way to memory: DMA through its container, faults recorded, writes logged page by page."""
import errno as _errno
from collections import deque

from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer, Py_buffer,
)
from cpython.bytes cimport PyBytes_AS_STRING
from libc.errno cimport E2BIG, EFAULT, EINVAL, ENOMEM, EOVERFLOW
from libc.stdint cimport uint64_t

from .args cimport acquire, new_bytes, u64
from .errno cimport raise_errno
from .pinning cimport device_access, dma_rw
from .state cimport (
    pthread_mutex_lock, pthread_mutex_unlock, pthread_rwlock_destroy, pthread_rwlock_init, pthread_rwlock_rdlock,
    pthread_rwlock_t, pthread_rwlock_unlock, pthread_rwlock_wrlock, type1_t,
)
from .type1 cimport IommuGroup, Type1

from ..types import DmaFault

cdef extern from "dirtylog.h" nogil:
    ctypedef struct dirtylog:
        pass
    dirtylog *dirtylog_new(uint64_t nbits)
    void dirtylog_free(dirtylog *)
    void dirtylog_mark(dirtylog *, uint64_t first, uint64_t n)
    uint64_t dirtylog_harvest(dirtylog *, uint64_t first, uint64_t nbits, uint64_t *dst, uint64_t dst_bit)

cdef enum:
    MAX_LOG_RANGES = 256                # PAGE_SIZE / sizeof(struct vfio_device_feature_dma_logging_range)
    KEPT_FAULTS = 1024

cdef struct log_range:
    uint64_t start, last, first_bit

cdef dict REASONS = {-_errno.EINVAL: "not mapped", -_errno.ENOENT: "not mapped",
                     -_errno.EPERM: "not permitted", -_errno.EFAULT: "memory is gone",
                     -_errno.EBUSY: "a vaddr is invalid"}


cdef class DmaPath:
    """What stands between a device and memory: an IOMMU, or a container for devices without one."""

    cdef int access(self, uint64_t iova, void *data, uint64_t size, bint write, uint64_t *done) noexcept nogil:
        done[0] = 0
        return -EINVAL

    cdef int check_process(self, str operation) except -1:
        return 0

    def pin_pages(self, iova, npages, prot):
        """Pin pages of an emulated device."""
        raise_errno(EINVAL, "pin_pages", iova, None, "the device goes through an IOMMU")

    def unpin_pages(self, iova, npages):
        """Let pinned pages go."""
        raise_errno(EINVAL, "unpin_pages", iova, None, "the device goes through an IOMMU")


cdef class Type1Path(DmaPath):
    """The way of a group's devices through a Type1 instance."""
    cdef Type1 type1
    cdef IommuGroup group
    cdef bint emulated

    def __cinit__(self, Type1 type1 not None, IommuGroup group not None):
        self.type1 = type1
        self.group = group
        self.emulated = group.emulated

    cdef int access(self, uint64_t iova, void *data, uint64_t size, bint write, uint64_t *done) noexcept nogil:
        cdef type1_t *t = self.type1.t
        cdef int err
        if not self.emulated:
            return device_access(t, iova, data, size, write, done)
        pthread_mutex_lock(&t.lock)
        err = dma_rw(t, iova, data, size, write)
        pthread_mutex_unlock(&t.lock)
        done[0] = 0 if err else size
        return err

    cdef int check_process(self, str operation) except -1:
        return self.type1.check_process(operation)

    def pin_pages(self, iova, npages, prot):
        """Pin pages of an emulated device; see Type1.pin_pages."""
        self.type1.pin_pages(self.group, iova, npages, prot)

    def unpin_pages(self, iova, npages):
        """Let pinned pages go."""
        self.type1.unpin_pages(iova, npages)


cdef class DmaPort:
    """DMA of one software device.

    An ordinary device goes through the software IOMMU: its accesses run beside each other and go on while vaddrs are
    invalid.  An emulated one goes through the container, which marks what it writes as dirty.

    Attributes
    ----------
    device : str
        The device's address, as faults name it.
    faults : collections.deque of DmaFault
        The newest 1,024 faults.
    fault_count : int
        All of them.

    Notes
    -----
    Thread-safe.  The GIL is released for every access.
    """
    cdef DmaPath path
    cdef pthread_rwlock_t log_lock      # read: a write is being logged; write: the log starts or stops
    cdef dirtylog *log
    cdef log_range ranges[MAX_LOG_RANGES]
    cdef size_t nranges
    cdef uint64_t pgsize
    cdef readonly str device
    cdef readonly object faults
    cdef readonly uint64_t fault_count

    def __cinit__(self, DmaPath path not None, str device):
        pthread_rwlock_init(&self.log_lock, NULL)
        self.path = path
        self.device = device
        self.faults = deque(maxlen=KEPT_FAULTS)

    def __dealloc__(self):
        if self.log:
            dirtylog_free(self.log)
        pthread_rwlock_destroy(&self.log_lock)

    # ---- access

    cdef int access(self, DmaPath path, uint64_t iova, void *data, uint64_t size, bint write, uint64_t *done) noexcept nogil:
        # Addresses do not go round: what would continue at 0 is a fault there.
        cdef uint64_t reach = size if size == 0 or iova + size - 1 >= iova else 0 - iova
        cdef int err = path.access(iova, data, reach, write, done)
        # Logged after the bytes are there: whoever harvests the bit finds them.
        if write and done[0]:
            self.mark(iova, done[0])
        return err if err or reach == size else -EINVAL

    cdef DmaPath connected(self, str operation):
        cdef DmaPath path = self.path
        if path is None:
            raise_errno(_errno.EBADF, operation, None, None, "the device is closed")
        path.check_process(operation)
        return path

    cdef record(self, int err, uint64_t iova, uint64_t size, bint write):
        self.fault_count += 1
        fault = DmaFault(self.device, iova, size, bool(write), REASONS.get(err, "fault"))
        self.faults.append(fault)
        return fault

    cdef int fault(self, int err, uint64_t iova, uint64_t size, bint write) except -1:
        cdef object fault = self.record(err, iova, size, write)
        return raise_errno(EFAULT, "dma_write" if write else "dma_read", iova, size, f"DMA fault of {self.device}: {fault.reason}")

    def read(self, iova, size):
        """Read ``size`` bytes at ``iova``.

        Raises
        ------
        MemoryFaultError
            EFAULT: the fault is recorded.
        ClosedError
            EBADF: the device is closed.
        """
        cdef uint64_t at = u64("dma_read", iova), length = u64("dma_read", size), done
        cdef DmaPath path = self.connected("dma_read")
        cdef bytes data = new_bytes("dma_read", iova, length)
        cdef char *to = PyBytes_AS_STRING(data)
        cdef int err
        with nogil:
            err = self.access(path, at, to, length, False, &done)
        if err:
            self.fault(err, at + done, length - done, False)
        return data

    def write(self, iova, data):
        """Write bytes-like ``data`` at ``iova``; errors as read().  What stands before a fault is written."""
        cdef uint64_t at = u64("dma_write", iova), done, size
        cdef DmaPath path = self.connected("dma_write")
        cdef Py_buffer view
        cdef int err
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            size = view.len
            with nogil:
                err = self.access(path, at, view.buf, size, True, &done)
        finally:
            PyBuffer_Release(&view)
        if err:
            self.fault(err, at + done, size - done, True)

    def write_many(self, iovas, data):
        """Write row i of ``data`` at ``iovas[i]``, with one release of the GIL.

        Parameters
        ----------
        iovas : (n,) uint64 array
        data : (n, k) array of bytes, contiguous

        Returns
        -------
        int
            Rows that faulted; each is recorded.
        """
        cdef DmaPath path = self.connected("dma_write")
        cdef Py_buffer where, what
        cdef uint64_t done, size
        cdef Py_ssize_t i = 0, n, faulted = 0
        cdef int err = 0
        acquire(iovas, &where, 0, "write_many")
        try:
            PyObject_GetBuffer(data, &what, PyBUF_C_CONTIGUOUS)
            try:
                n = where.len // 8
                if where.ndim != 1 or what.ndim != 2 or what.shape[0] != n:
                    raise TypeError("expected n uint64 addresses and an (n, k) array of bytes")
                size = what.shape[1] * what.itemsize
                while i < n:
                    with nogil:
                        err = 0
                        while i < n and not err:
                            err = self.access(path, (<uint64_t *> where.buf)[i], <char *> what.buf + i * size, size, True, &done)
                            i += 1
                    if err:
                        faulted += 1
                        self.record(err, (<uint64_t *> where.buf)[i - 1] + done, size - done, True)
            finally:
                PyBuffer_Release(&what)
        finally:
            PyBuffer_Release(&where)
        return faulted

    def pin_pages(self, iova, npages, prot):
        """Pin pages of an emulated device; see Type1.pin_pages."""
        self.connected("pin_pages").pin_pages(iova, npages, prot)

    def unpin_pages(self, iova, npages):
        """Let pinned pages go."""
        self.connected("unpin_pages").unpin_pages(iova, npages)

    def disconnect(self):
        """Cut the device off; later accesses raise ClosedError.  Stops the log."""
        self.path = None
        self.stop_logging()

    # ---- the log

    cdef void mark(self, uint64_t iova, uint64_t size) noexcept nogil:
        cdef uint64_t last = iova + size - 1, low, high
        cdef size_t i
        pthread_rwlock_rdlock(&self.log_lock)
        if self.log:
            for i in range(self.nranges):
                low = max(iova, self.ranges[i].start)
                high = min(last, self.ranges[i].last)
                if low <= high:
                    low = (low - self.ranges[i].start) // self.pgsize
                    high = (high - self.ranges[i].start) // self.pgsize
                    dirtylog_mark(self.log, self.ranges[i].first_bit + low, high - low + 1)
        pthread_rwlock_unlock(&self.log_lock)

    @property
    def logging(self):
        """Whether the log is on."""
        return self.log != NULL

    def start_logging(self, ranges, pgsize=4096):
        """Log DMA writes into the given IOVA ranges.

        Parameters
        ----------
        ranges : sequence of (iova, size)
            1 to 256 disjoint ranges, in multiples of ``pgsize``.
        pgsize : int
            Bytes a bit stands for, a power of two of at least 4096.

        Raises
        ------
        InvalidArgumentError
            EINVAL (none, misaligned, overlapping, or already on), E2BIG, EOVERFLOW.

        Notes
        -----
        Source: VFIO_DEVICE_FEATURE_DMA_LOGGING_START.
        """
        cdef log_range checked[MAX_LOG_RANGES]
        cdef dirtylog *log
        cdef uint64_t bits = 0, previous = 0, iova, size
        cdef size_t n = 0
        cdef uint64_t page = u64("start_logging", pgsize)
        ordered = sorted(ranges)
        if not ordered or page < 4096 or page & (page - 1):
            raise_errno(EINVAL, "start_logging", None, None, "give at least one range, and a page size that is a power of two")
        if len(ordered) > MAX_LOG_RANGES:
            raise_errno(E2BIG, "start_logging", None, None, f"at most {MAX_LOG_RANGES} ranges: join neighbours")
        for start, length in ordered:
            iova, size = u64("start_logging", start), u64("start_logging", length)
            if size == 0 or iova % page or size % page or (n and iova <= previous):
                raise_errno(EINVAL, "start_logging", iova, size, "ranges are multiples of the page size and disjoint")
            if iova + size < iova:
                raise_errno(EOVERFLOW, "start_logging", iova, size)
            checked[n].start = iova
            checked[n].last = previous = iova + size - 1
            checked[n].first_bit = bits
            bits += size // page
            n += 1
        log = dirtylog_new(bits)
        if not log:
            raise_errno(ENOMEM, "start_logging")
        pthread_rwlock_wrlock(&self.log_lock)
        if self.log:
            pthread_rwlock_unlock(&self.log_lock)
            dirtylog_free(log)
            raise_errno(EINVAL, "start_logging", None, None, "the log is on: stop it first")
        self.ranges = checked
        self.nranges = n
        self.pgsize = page
        self.log = log
        pthread_rwlock_unlock(&self.log_lock)

    cdef const char *refuse_harvest(self, uint64_t iova, uint64_t size, uint64_t room) noexcept nogil:
        if self.log == NULL:
            return b"the log is off"
        if size == 0 or iova + size - 1 < iova or iova % self.pgsize or size % self.pgsize:
            return b"the range is a multiple of the log's page size"
        if room < (size // self.pgsize + 63) // 64 * 8:
            return b"the bitmap is too small"
        return NULL

    def harvest(self, iova, size, into):
        """OR the pages written in ``[iova, iova + size)`` into ``into`` and clear them here.

        Parameters
        ----------
        iova, size : int
            Multiples of the log's page size.
        into : writable buffer
            Little-endian u64 words, bit 0 = the page at ``iova``.

        Returns
        -------
        int
            Pages reported.

        Notes
        -----
        No write is lost: one that is logged meanwhile is in this report or in the next.  One harvest at a time; the GIL is
        released.  Source: VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT.
        """
        cdef Py_buffer view
        cdef uint64_t first = u64("harvest", iova), length = u64("harvest", size)
        cdef uint64_t last = first + length - 1, low, high, bit, found = 0
        cdef const char *refusal
        cdef uint64_t *words
        cdef size_t i
        PyObject_GetBuffer(into, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            words = <uint64_t *> view.buf
            with nogil:
                # The page size and with it the bitmap's size hold only under the lock: the log may be started anew.
                pthread_rwlock_rdlock(&self.log_lock)
                refusal = self.refuse_harvest(first, length, view.len)
                for i in range(0 if refusal else self.nranges):
                    low = max(first, self.ranges[i].start)
                    high = min(last, self.ranges[i].last)
                    if low <= high:
                        bit = self.ranges[i].first_bit + (low - self.ranges[i].start) // self.pgsize
                        found += dirtylog_harvest(self.log, bit, (high - low) // self.pgsize + 1, words,
                                                  (low - first) // self.pgsize)
                pthread_rwlock_unlock(&self.log_lock)
            if refusal:
                raise_errno(EINVAL, "harvest", iova, size, refusal.decode())
        finally:
            PyBuffer_Release(&view)
        return found

    def stop_logging(self):
        """Stop the log and forget it; no effect when it is off."""
        cdef dirtylog *log
        pthread_rwlock_wrlock(&self.log_lock)
        log = self.log
        self.log = NULL
        self.nranges = 0
        pthread_rwlock_unlock(&self.log_lock)
        if log:
            dirtylog_free(log)
