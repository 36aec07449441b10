"""A software device's way to memory: DMA through its container, faults recorded, writes logged page by page."""
import errno as _errno
from collections import deque

from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer, Py_buffer,
)
from cpython.bytes cimport PyBytes_AS_STRING
from libc.errno cimport E2BIG, EFAULT, EINVAL, ENOMEM, EOVERFLOW
from libc.stdint cimport uint64_t
from libc.string cimport memcpy, memset

from .args cimport acquire, new_bytes, u64
from .errno cimport raise_errno
from .nesting cimport (
    PAGEWALK_OOR_ADDRESS, PAGEWALK_PASID_FETCH, PAGEWALK_PRIV, PAGEWALK_READ, PAGEWALK_WRITE, cache_size, nested_access,
    nested_bound, pagewalk_fault, translate_many,
)
from .pinning cimport device_access, dma_rw
from .state cimport (
    pthread_mutex_lock, pthread_mutex_unlock, pthread_rwlock_destroy, pthread_rwlock_init, pthread_rwlock_rdlock,
    pthread_rwlock_unlock, pthread_rwlock_wrlock, type1_t,
)
from .type1 cimport IommuGroup, Type1

from ..errors import MemoryFaultError
from ..types import DmaFault

cdef extern from "dirtylog.h" nogil:
    dirtylog *dirtylog_new(uint64_t nbits)
    void dirtylog_free(dirtylog *)
    void dirtylog_mark(dirtylog *, uint64_t first, uint64_t n)
    uint64_t dirtylog_harvest(dirtylog *, uint64_t first, uint64_t nbits, uint64_t *dst, uint64_t dst_bit)

cdef enum:
    KEPT_FAULTS = 1024

cdef dict REASONS = {-_errno.EINVAL: "not mapped", -_errno.ENOENT: "not mapped",
                     -_errno.EPERM: "not permitted", -_errno.EFAULT: "memory is gone",
                     -_errno.EBUSY: "a vaddr is invalid"}


cdef tuple NESTED_REASONS = ("unknown", "PASID table", "PASID has no table", "PASID out of range", "walk aborted", "not mapped",
                             "not permitted", "accessed flag can't be set", "address out of range")


cdef void log_write(dma_log *log, uint64_t iova, uint64_t size) noexcept nogil:
    cdef uint64_t last = iova + size - 1, low, high
    cdef size_t i
    pthread_rwlock_rdlock(&log.lock)
    for i in range(log.nranges):
        low = max(iova, log.ranges[i].start)
        high = min(last, log.ranges[i].last)
        if low <= high:
            low = (low - log.ranges[i].start) // log.pgsize
            high = (high - log.ranges[i].start) // log.pgsize
            dirtylog_mark(log.ranges[i].log, low, high - low + 1)
    pthread_rwlock_unlock(&log.lock)


cdef void log_entry(void *log, uint64_t gpa) noexcept nogil:
    """The IOMMU has set flags in a guest's table for the device.

    A device does not see this on hardware; but the log is often the only one who could tell that the page has changed.
    """
    log_write(<dma_log *> log, gpa, 8)


cdef class DmaPath:
    """What stands between a device and memory: an IOMMU, or a container for devices without one."""

    cdef int access(self, uint64_t iova, void *data, uint64_t size, bint write, uint64_t *done) noexcept nogil:
        done[0] = 0
        return -EINVAL

    cdef bint nests(self) noexcept nogil:
        return False

    cdef int nested(self, uint64_t pasid, uint64_t address, void *data, uint64_t size, unsigned access, uint64_t *gpa,
                    uint64_t *done, pagewalk_fault *fault) noexcept nogil:
        done[0] = gpa[0] = 0
        memset(fault, 0, sizeof(pagewalk_fault))
        fault.reason = PAGEWALK_PASID_FETCH
        return -EFAULT

    cdef uint64_t bound(self, uint64_t pasid):
        return 0

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

    cdef int nested(self, uint64_t pasid, uint64_t address, void *data, uint64_t size, unsigned access, uint64_t *gpa,
                    uint64_t *done, pagewalk_fault *fault) noexcept nogil:
        if self.emulated:
            return DmaPath.nested(self, pasid, address, data, size, access, gpa, done, fault)
        return nested_access(self.type1.t, pasid, address, data, size, access, gpa, done, fault, log_entry, self.log)

    cdef uint64_t bound(self, uint64_t pasid):
        cdef type1_t *t = self.type1.t
        cdef uint64_t serial = 0
        if not self.emulated:
            with nogil:
                serial = nested_bound(t, pasid)
        return serial

    cdef int check_process(self, str operation) except -1:
        return self.type1.check_process(operation)

    def translate_many(self, addresses, pasid=None, perm=1):
        """Translate a device's addresses as an access would, without one.

        Parameters
        ----------
        addresses : (n,) uint64 array
        pasid : int or None
            The table to walk before the container's mappings; None: those alone.
        perm : int
            1 read, 2 write, 8 privileged.

        Returns
        -------
        (n,) uint64 array
            Addresses of this process; 2**64 - 1 where the access would be a fault.

        Notes
        -----
        Accessed and dirty flags are set and translations cached, as for an access; faults are not reported.  The GIL is
        released.
        """
        import numpy
        cdef Py_buffer view
        cdef uint64_t[::1] rows
        cdef uint64_t number = 0 if pasid is None else u64("translate_many", pasid)
        cdef unsigned access = perm
        cdef bint nested = pasid is not None
        cdef DmaPort port = self.port       # stays while its log is written
        self.type1.check_process("translate_many")
        acquire(addresses, &view, 0, "translate_many")
        try:
            found = numpy.empty(view.len // 8, numpy.uint64)
            rows = found
            if view.len:
                with nogil:
                    translate_many(self.type1.t, <uint64_t *> view.buf, &rows[0], view.len // 8, nested, number, access,
                                   log_entry, self.log if port is not None else NULL)
        finally:
            PyBuffer_Release(&view)
        return found

    @property
    def cached(self):
        """Translations in the cache of the first stage, and the bytes that it takes."""
        return cache_size(self.type1.t)

    def pin_pages(self, iova, npages, prot):
        """Pin pages of an emulated device; see Type1.pin_pages."""
        self.type1.pin_pages(self.group, iova, npages, prot)

    def unpin_pages(self, iova, npages):
        """Let pinned pages go."""
        self.type1.unpin_pages(iova, npages)


cdef list without(tuple whole, uint64_t start, uint64_t last):
    """What is left of (iova, size) without [start, last]."""
    cdef uint64_t iova = whole[0], size = whole[1], end = iova + size - 1
    if size == 0 or end < start or iova > last:
        return [whole]
    return ([(iova, start - iova)] if iova < start else []) + ([(last + 1, end - last)] if end > last else [])


cdef size_t check_ranges(str operation, ranges, uint64_t page, size_t most, log_range *checked) except? 0:
    """Check (iova, size) ranges to log, in any order; return their number."""
    cdef uint64_t iova, size, previous = 0
    cdef size_t n = 0
    ordered = sorted(ranges)
    if len(ordered) > most:
        raise_errno(E2BIG, operation, None, None, f"at most {MAX_LOG_RANGES} ranges: join neighbours")
    for start, length in ordered:
        iova, size = u64(operation, start), u64(operation, length)
        if size == 0 or iova % page or size % page or (n and iova <= previous):
            raise_errno(EINVAL, operation, iova, size, "ranges are multiples of the page size and disjoint")
        if iova + size < iova:
            raise_errno(EOVERFLOW, operation, iova, size)
        checked[n].start = iova
        checked[n].last = previous = iova + size - 1
        n += 1
    return n


cdef int make_logs(str operation, log_range *ranges, size_t n, uint64_t page) except -1:
    cdef size_t i
    for i in range(n):
        ranges[i].log = dirtylog_new((ranges[i].last - ranges[i].start) // page + 1)
        if not ranges[i].log:
            free_logs(ranges, i)
            raise_errno(ENOMEM, operation)
    return 0


cdef void free_logs(log_range *ranges, size_t n) noexcept:
    cdef size_t i
    for i in range(n):
        dirtylog_free(ranges[i].log)


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
    fault_sink : object or None
        Where faults of accesses with a PASID are reported, and pages asked for.

    Notes
    -----
    Thread-safe.  The GIL is released for every access.
    """
    cdef DmaPath path
    cdef dma_log log
    cdef readonly str device
    cdef readonly object faults
    cdef readonly uint64_t fault_count
    cdef public object fault_sink

    def __cinit__(self, DmaPath path not None, str device):
        pthread_rwlock_init(&self.log.lock, NULL)
        self.path = path
        path.port, path.log = self, &self.log
        self.device = device
        self.faults = deque(maxlen=KEPT_FAULTS)

    def __dealloc__(self):
        free_logs(self.log.ranges, self.log.nranges)
        pthread_rwlock_destroy(&self.log.lock)

    # ---- access

    cdef int access(self, DmaPath path, uint64_t iova, void *data, uint64_t size, bint write, uint64_t *done) noexcept nogil:
        # Addresses do not go round: what would continue at 0 is a fault there.
        cdef uint64_t reach = size if size == 0 or iova + size - 1 >= iova else 0 - iova
        cdef int err = path.access(iova, data, reach, write, done)
        # Logged after the bytes are there: whoever harvests the bit finds them.
        if write and done[0]:
            log_write(&self.log, iova, done[0])
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

    cdef int access_nested(self, uint64_t pasid, uint64_t at, char *data, uint64_t size, bint write, bint privileged) except -1:
        cdef unsigned access = (PAGEWALK_WRITE if write else PAGEWALK_READ) | (PAGEWALK_PRIV if privileged else 0)
        cdef str operation = "dma_write" if write else "dma_read"
        cdef uint64_t gpa, done
        cdef pagewalk_fault fault
        cdef DmaPath path
        cdef int err
        while size:
            path = self.connected(operation)
            with nogil:
                err = path.nested(pasid, at, data, size, access, &gpa, &done, &fault)
                if write and done:
                    log_write(&self.log, gpa, done)     # dirt is known by what the second stage translates
            at += done
            data += done
            size -= done
            if size and not err and at < done:          # addresses do not go round
                err, fault.reason, fault.missing, fault.fetched = -EFAULT, PAGEWALK_OOR_ADDRESS, False, False
            if err and not (fault.missing and self.fault_sink is not None and self.fault_sink.request_page(pasid, at, access)):
                if self.fault_sink is not None:
                    self.fault_sink.unrecoverable(fault.reason, pasid, access, at, fault.fetch_addr if fault.fetched else None)
                self.fault_count += 1
                self.faults.append(DmaFault(self.device, at, size, bool(write), NESTED_REASONS[fault.reason]))
                raise_errno(EFAULT, operation, at, size,
                            f"DMA fault of {self.device}{f', PASID {pasid}' if pasid else ''}: {NESTED_REASONS[fault.reason]}")
        return 0

    def read(self, iova, size, pasid=None, privileged=False):
        """Read ``size`` bytes at ``iova``; with a PASID, at that address of the PASID's own table.

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
        if pasid is not None or path.nests():
            self.access_nested(u64("dma_read", pasid or 0), at, to, length, False, privileged)
            return data
        with nogil:
            err = self.access(path, at, to, length, False, &done)
        if err:
            self.fault(err, at + done, length - done, False)
        return data

    def write(self, iova, data, pasid=None, privileged=False):
        """Write bytes-like ``data`` at ``iova``; PASID and errors as read().  What stands before a fault is written."""
        cdef uint64_t at = u64("dma_write", iova), done, size
        cdef DmaPath path = self.connected("dma_write")
        cdef Py_buffer view
        cdef int err
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            size = view.len
            if pasid is not None or path.nests():
                self.access_nested(u64("dma_write", pasid or 0), at, <char *> view.buf, size, True, privileged)
                return
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
                if path.nests():
                    for i in range(n):
                        try:
                            self.access_nested(0, (<uint64_t *> where.buf)[i], <char *> what.buf + i * size, size, True, False)
                        except MemoryFaultError:
                            faulted += 1
                    return faulted
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
        cdef DmaPath path = self.path
        self.path = None
        if path is not None:
            path.port = None
        self.stop_logging()

    def bound(self, pasid):
        """A number that stands for the page table that the device's accesses with a PASID walk; 0: there is none."""
        cdef DmaPath path = self.path
        return 0 if path is None else path.bound(u64("bound", pasid))

    # ---- the log

    @property
    def logging(self):
        """Whether the log is on."""
        return self.log.nranges != 0

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
        cdef size_t n
        cdef uint64_t page = u64("start_logging", pgsize)
        cdef bint on
        if page < 4096 or page & (page - 1):
            raise_errno(EINVAL, "start_logging", None, None, "the page size is a power of two from 4096")
        n = check_ranges("start_logging", ranges, page, MAX_LOG_RANGES, checked)
        if n == 0:
            raise_errno(EINVAL, "start_logging", None, None, "give at least one range")
        make_logs("start_logging", checked, n, page)
        pthread_rwlock_wrlock(&self.log.lock)
        on = self.log.nranges != 0
        if not on:
            memcpy(self.log.ranges, checked, n * sizeof(log_range))
            self.log.nranges = n
            self.log.pgsize = page
        pthread_rwlock_unlock(&self.log.lock)
        if on:
            free_logs(checked, n)
            raise_errno(EINVAL, "start_logging", None, None, "the log is on: stop it first")

    def extend_logging(self, iova, size):
        """Log a further range as well; nothing that was logged is lost, and what is logged already stays.

        Parameters
        ----------
        iova, size : int
            Multiples of the log's page size.

        Raises
        ------
        InvalidArgumentError
            EINVAL: the log is off, or the range is misaligned; E2BIG: more than 256 ranges.
        """
        cdef log_range checked[MAX_LOG_RANGES]
        cdef size_t n, i
        cdef list pieces = [(u64("extend_logging", iova), u64("extend_logging", size))]
        cdef bint off = self.log.nranges == 0
        if off:
            raise_errno(EINVAL, "extend_logging", iova, size, "the log is off: start it")
        check_ranges("extend_logging", pieces, self.log.pgsize, 1, checked)
        for i in range(self.log.nranges):
            pieces = [piece for whole in pieces for piece in without(whole, self.log.ranges[i].start, self.log.ranges[i].last)]
        n = check_ranges("extend_logging", pieces, self.log.pgsize, MAX_LOG_RANGES - self.log.nranges, checked)
        make_logs("extend_logging", checked, n, self.log.pgsize)
        pthread_rwlock_wrlock(&self.log.lock)
        memcpy(&self.log.ranges[self.log.nranges], checked, n * sizeof(log_range))
        self.log.nranges += n
        pthread_rwlock_unlock(&self.log.lock)

    cdef const char *refuse_harvest(self, uint64_t iova, uint64_t size, uint64_t room) noexcept nogil:
        if self.log.nranges == 0:
            return b"the log is off"
        if size == 0 or iova + size - 1 < iova or iova % self.log.pgsize or size % self.log.pgsize:
            return b"the range is a multiple of the log's page size"
        if room < (size // self.log.pgsize + 63) // 64 * 8:
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
                pthread_rwlock_rdlock(&self.log.lock)
                refusal = self.refuse_harvest(first, length, view.len)
                for i in range(0 if refusal else self.log.nranges):
                    low = max(first, self.log.ranges[i].start)
                    high = min(last, self.log.ranges[i].last)
                    if low <= high:
                        bit = (low - self.log.ranges[i].start) // self.log.pgsize
                        found += dirtylog_harvest(self.log.ranges[i].log, bit, (high - low) // self.log.pgsize + 1, words,
                                                  (low - first) // self.log.pgsize)
                pthread_rwlock_unlock(&self.log.lock)
            if refusal:
                raise_errno(EINVAL, "harvest", iova, size, refusal.decode())
        finally:
            PyBuffer_Release(&view)
        return found

    def stop_logging(self):
        """Stop the log and forget it; no effect when it is off."""
        cdef log_range old[MAX_LOG_RANGES]
        cdef size_t n
        pthread_rwlock_wrlock(&self.log.lock)
        n = self.log.nranges
        memcpy(old, self.log.ranges, n * sizeof(log_range))
        self.log.nranges = 0
        pthread_rwlock_unlock(&self.log.lock)
        free_logs(old, n)
