"""A Type1 IOMMU instance in process: the class that owns its state, with a typed and a raw (ioctl) door to the same logic.

Everything below the argument parsing runs without the interpreter; one lock an instance makes it correct from many threads.
"""
import errno as _errno
import os
import resource

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer, Py_buffer
from cpython.bytes cimport PyBytes_AS_STRING
from cpython.exc cimport PyErr_WriteUnraisable
from libc.errno cimport EINTR, EINVAL
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from .attach cimport attach_group, detach_group, forget_groups
from .dirty cimport dirty_get, dirty_start, dirty_stop
from .args cimport acquire_rows, new_bytes, u64
from .errno cimport raise_errno
from .ioctl cimport type1_extension, type1_ioctl
from .mappings cimport forget_charges, map_dma, process_locked_pages, type1_free, type1_new, unmap_dma, update_vaddrs
from .nesting cimport PasidSpace, nesting_stop
from .pinning cimport dma_rw, pin_pages, unpin_pages
from .state cimport (
    V5_4, V5_12, V6_1, V6_12, V7_2, VSVA, dma_t, first_from, iova_range, min_pgsize, next_of, pthread_cond_broadcast,
    pthread_mutex_lock, pthread_mutex_trylock, pthread_mutex_unlock, rangemap_count, vaddr_of, vaddr_valid,
)
from .uapi cimport MAP_VADDR, NESTING_OP, UNMAP_ALL, UNMAP_VADDR

from ..errors import ForkedError
from ..types import IovaRange

VERSIONS = {"5.4": V5_4, "5.12": V5_12, "vsva": VSVA, "6.1": V6_1, "6.12": V6_12, "7.2": V7_2}

cdef unsigned fork_generation = 0


def _after_fork_in_child():
    global fork_generation
    fork_generation += 1
    forget_charges()


os.register_at_fork(after_in_child=_after_fork_in_child)


def generation():
    """Number of forks between the interpreter's start and this process."""
    return fork_generation


def locked_pages():
    """Pages that count against RLIMIT_MEMLOCK: the process's VmLck plus what software containers have charged to it."""
    return process_locked_pages()


def extension(kernel, uint64_t number):
    """CHECK_EXTENSION of the Type1 driver before SET_IOMMU."""
    return type1_extension(VERSIONS[kernel], NULL, number)


cdef class IommuGroup:
    """A group's side of the IOMMU: what an instance must know to attach it.

    Parameters
    ----------
    number : int
        The group's number.
    aperture : (int, int)
        First and last IOVA that its IOMMU translates.
    reserved : sequence of (int, int)
        First and last IOVA of reserved regions, in the order they are cut out.
    pgsizes : int
        Bitmap of page sizes.
    emulated : bool
        Mediated devices: no IOMMU, none of the above.
    coherent, msi_isolated, nestable : bool
        The IOMMU enforces cache coherency, isolates MSI, can nest.
    pci : bool
        Its devices are on PCI.
    """

    def __cinit__(self, int number, aperture, reserved, uint64_t pgsizes, bint emulated, bint coherent, bint msi_isolated, bint nestable,
                  bint pci=True):
        cdef size_t i
        self.number = number
        self.group.emulated = emulated
        self.group.coherent = coherent
        self.group.msi_isolated = msi_isolated
        self.group.nestable = nestable
        self.group.pci = pci
        self.group.pgsizes = pgsizes
        self.group.aperture.start, self.group.aperture.last = aperture
        self.group.nreserved = len(reserved)
        self.group.reserved = <iova_range *> calloc(len(reserved) + 1, sizeof(iova_range))
        if not self.group.reserved:
            raise MemoryError
        for i, (start, last) in enumerate(reserved):
            self.group.reserved[i].start = start
            self.group.reserved[i].last = last

    def __dealloc__(self):
        free(self.group.reserved)

    @property
    def emulated(self):
        """Whether its devices are mediated."""
        return bool(self.group.emulated)


cdef class Type1:
    """One Type1 or Type1v2 instance.

    Parameters
    ----------
    kernel : {"5.4", "5.12", "6.1", "6.12", "7.2", "vsva"}
        Whose behaviour to reproduce.
    v2 : bool
        Type1v2: mappings can't be split by an unmap.
    nesting : bool
        Every ordinary group's IOMMU must be able to nest.
    entry_limit : int
        Mappings that it may hold.
    memlock_limit : int
        Bytes of locked memory; -1 = RLIMIT_MEMLOCK of the process, -2 = unlimited.
    pasids : PasidSpace, optional
        The PASIDs that page tables can be bound to ("vsva").
    unbound : callable, optional
        Called after NESTING_OP: page tables may have been unbound.

    Notes
    -----
    Thread-safe.  Usable only in the process that made it: in a forked child every call raises ForkedError.
    Source: drivers/vfio/vfio_iommu_type1.c behaviour of Linux 5.4 to 7.2.
    """

    def __cinit__(self, str kernel, bint v2, unsigned entry_limit, int64_t memlock_limit, bint nesting=False,
                  PasidSpace pasids=None, unbound=None):
        self.kernel = kernel
        self.entry_limit = entry_limit
        self.listeners = []
        self.groups = set()
        self.generation = fork_generation
        self.t = type1_new(VERSIONS[kernel], v2, entry_limit, memlock_limit, <void *> self)
        if not self.t:
            raise MemoryError
        self.t.nesting = nesting
        self.pasids = pasids
        self.unbound = unbound
        if pasids is not None:
            self.t.pasids = pasids.bits

    def __dealloc__(self):
        # In a forked child the pinned memory is the parent's, and the lock may have been held.
        if self.t and self.generation == fork_generation:
            nesting_stop(self.t)
            type1_free(self.t)

    # ---- the lock

    cdef int check_process(self, str operation) except -1:
        if self.generation != fork_generation:
            raise ForkedError(_errno.EBADF, "opened before a fork", operation=operation, hint="open it again in this process")
        return 0

    cdef int enter(self, str operation) except -1:
        """Take the lock, never waiting for it with the GIL held."""
        self.check_process(operation)
        if pthread_mutex_trylock(&self.t.lock):
            with nogil:
                pthread_mutex_lock(&self.t.lock)
        if self.t.dead:
            self.leave()
            raise_errno(_errno.EBADF, operation, None, None, "the container has lost its last group")
        return 0

    cdef void leave(self) noexcept nogil:
        pthread_mutex_unlock(&self.t.lock)

    cdef int fail(self, int err, str operation, object iova=None, object size=None, object entry=None) except -1:
        self.check_interruption(err)
        hint = self._hint(-err)
        if entry is not None:
            hint = f"entry {entry}" + (f"; {hint}" if hint else "")
        return raise_errno(-err, operation, iova, size, hint)

    def _hint(self, int err):
        if err == _errno.ENOMEM:
            limit = self.t.memlock_limit if self.t.memlock_limit >= 0 else resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            return (f"{process_locked_pages()} pages are locked and the limit of locked memory (RLIMIT_MEMLOCK) is {limit} bytes: "
                    "raise it with 'ulimit -l', limits.conf or LimitMEMLOCK=, or run with CAP_IPC_LOCK")
        if err == _errno.ENOSPC:
            return (f"all {self.entry_limit} mappings (dma_entry_limit) are in use: map larger pieces, or raise the limit "
                    "(dma_entry_limit of SoftwareVfio; of the module vfio_iommu_type1 on a real kernel)")
        if err == _errno.EEXIST:
            return "a mapping overlaps it: unmap that first"
        if err == _errno.EFAULT:
            return "the memory is not mapped in this process, or not with the permission needed"
        if err == _errno.EINVAL:
            return f"see iova_ranges(); addresses and sizes are multiples of {min_pgsize(self.t)}"
        return ""

    def close(self):
        """End the instance: every mapping is removed, groups are let go.  Idempotent."""
        if self.generation != fork_generation:
            return
        with nogil:
            pthread_mutex_lock(&self.t.lock)
            if not self.t.dead:
                forget_groups(self.t)
                self.t.dead = True
                pthread_cond_broadcast(&self.t.valid)
            pthread_mutex_unlock(&self.t.lock)

    def container_closed(self):
        """The container's descriptor is gone: whoever waits for a vaddr gives up with EFAULT.  Idempotent."""
        if self.generation == fork_generation:
            with nogil:
                pthread_mutex_lock(&self.t.lock)
                self.t.container_closed = True
                pthread_cond_broadcast(&self.t.valid)
                pthread_mutex_unlock(&self.t.lock)

    # ---- groups

    def attach(self, IommuGroup group not None):
        """Attach a group.

        Raises
        ------
        VfioError
            EBUSY while a vaddr is invalid (5.12: waits); EINVAL where a mapping stands outside its aperture or in a reserved region;
            EPERM without isolated MSI; ENOMEM, EFAULT when mappings of emulated groups can't be pinned.
        """
        cdef int err
        if group.owner is not None:
            raise_errno(EINVAL, "attach")
        self.enter("attach")
        self.groups.add(group)              # before it is linked: it must outlive that
        with nogil:
            err = attach_group(self.t, &group.group)
            self.leave()
        if err:
            self.groups.discard(group)
            self.fail(err, "attach")
        group.owner = self

    def detach(self, IommuGroup group not None):
        """Detach a group; the last one takes every mapping with it."""
        if group.owner is not self:
            raise_errno(EINVAL, "detach")
        self.enter("detach")
        with nogil:
            detach_group(self.t, &group.group)
            self.leave()
        group.owner = None
        self.groups.discard(group)

    def add_unmap_listener(self, callback):
        """Have ``callback(iova, size)`` called when an unmap needs pinned pages back; it must unpin them."""
        self.enter("add_unmap_listener")
        self.t.unmap_listeners += 1
        self.leave()
        self.listeners.append(callback)

    def remove_unmap_listener(self, callback):
        """The opposite of add_unmap_listener."""
        self.listeners.remove(callback)
        self.enter("remove_unmap_listener")
        self.t.unmap_listeners -= 1
        self.leave()

    def _notify_unmap(self, iova, size):
        # All of them are told; what one raises is reported as unraisable, as there is nobody to catch it.
        for callback in list(self.listeners):
            try:
                callback(iova, size)
            except BaseException:
                PyErr_WriteUnraisable(callback)

    def _interrupt(self, exception):
        self.interruption = exception

    cdef int check_interruption(self, int err) except -1:
        """Raise what a signal handler raised while a call waited."""
        cdef object exception = self.interruption
        if err == -EINTR and exception is not None:
            self.interruption = None
            raise exception
        return 0

    # ---- the raw door

    def ioctl(self, uint32_t request, uint64_t arg):
        """Do what ioctl(2) does on a container with this driver.

        Parameters
        ----------
        request : int
            VFIO_IOMMU_* or VFIO_CHECK_EXTENSION.
        arg : int
            A value, or the address of the argument in this process.

        Returns
        -------
        int

        Raises
        ------
        VfioError
            With the kernel's errno.  The GIL is released.
        """
        cdef long result
        self.enter("ioctl")
        with nogil:
            result = type1_ioctl(self.t, request, arg)
            self.leave()
        if request == NESTING_OP and self.unbound is not None:
            self.unbound()
        if result < 0:
            self.check_interruption(result)
            raise_errno(-result, "ioctl")
        return result

    # ---- the typed door

    def map_dma(self, iova, vaddr, size, prot):
        """Map ``[vaddr, vaddr + size)`` at ``iova``.

        Parameters
        ----------
        iova, vaddr, size : int
            Bytes; multiples of the smallest page size.
        prot : int
            Prot.READ, Prot.WRITE or both, as the device sees it.

        Raises
        ------
        OverlapError
            EEXIST.
        DmaLimitError
            ENOSPC: no mapping is left.
        LockedMemoryError
            ENOMEM: over the limit of locked memory.
        MemoryFaultError
            EFAULT: the memory can't be pinned.
        InvalidArgumentError
            EINVAL, EOVERFLOW.

        Notes
        -----
        The GIL is released while memory is pinned.  Source: VFIO_IOMMU_MAP_DMA.
        """
        cdef uint64_t at = u64("map_dma", iova), address = u64("map_dma", vaddr)
        cdef uint64_t length = u64("map_dma", size), access = u64("map_dma", prot)
        cdef int err
        if access & ~<uint64_t> 3:
            raise_errno(EINVAL, "map_dma", iova, size, "prot is READ, WRITE or both")
        self.enter("map_dma")
        if self.t.domains:
            with nogil:
                err = map_dma(self.t, at, address, length, <uint32_t> access)
                self.leave()
        else:
            err = map_dma(self.t, at, address, length, <uint32_t> access)
            self.leave()
        if err:
            self.fail(err, "map_dma", iova, size)

    def map_many(self, entries):
        """Map an (n, 4) uint64 array of (iova, vaddr, size, prot): all of them, or none.

        Raises
        ------
        VfioError
            As map_dma; the text names the entry.  The GIL is released once.
        """
        cdef Py_buffer view
        cdef uint64_t *row
        cdef uint64_t unmapped
        cdef Py_ssize_t i = 0, n
        cdef int err = 0
        acquire_rows(entries, &view, 4, &n, "map_many")
        try:
            row = <uint64_t *> view.buf
            self.enter("map_many")
            with nogil:
                while i < n and not err:
                    err = -EINVAL if row[i * 4 + 3] & ~<uint64_t> 3 else map_dma(
                        self.t, row[i * 4], row[i * 4 + 1], row[i * 4 + 2], <uint32_t> row[i * 4 + 3])
                    i += 1
                if err:
                    n = i - 1
                    for i in range(n):
                        unmap_dma(self.t, row[i * 4], row[i * 4 + 2], 0, 0, 0, &unmapped)
                self.leave()
            if err:
                self.fail(err, "map_many", row[n * 4], row[n * 4 + 2], n)
        finally:
            PyBuffer_Release(&view)

    def unmap_dma(self, iova, size):
        """Remove the mappings inside ``[iova, iova + size)``; return the bytes removed.

        Raises
        ------
        InvalidArgumentError
            EINVAL (the range would split a mapping), EOVERFLOW.
        BusyError
            EBUSY: an emulated device does not let its pins go.

        Notes
        -----
        The GIL is released.  Source: VFIO_IOMMU_UNMAP_DMA.
        """
        return self.unmap(u64("unmap_dma", iova), u64("unmap_dma", size), 0, "unmap_dma")

    def unmap_all(self):
        """Remove every mapping; return the bytes removed.  Source: VFIO_DMA_UNMAP_FLAG_ALL."""
        return self.unmap(0, 0, UNMAP_ALL, "unmap_all")

    def invalidate_vaddr(self, iova=0, size=None):
        """Declare the vaddrs of a range (None: of every mapping) invalid; DMA goes on.  Return the bytes.

        Raises
        ------
        BusyError
            EBUSY: an emulated group is attached.
        InvalidArgumentError
            EINVAL: some vaddr is invalid already; nothing has changed.
        UnsupportedError
            EOPNOTSUPP before Linux 5.12.

        Notes
        -----
        Source: VFIO_DMA_UNMAP_FLAG_VADDR.
        """
        self.needs_vaddr("invalidate_vaddr")
        return self.unmap(u64("invalidate_vaddr", iova), 0 if size is None else u64("invalidate_vaddr", size),
                           UNMAP_VADDR | (UNMAP_ALL if size is None else 0), "invalidate_vaddr")

    cdef int needs_vaddr(self, str operation) except -1:
        if self.t.version < V5_12:
            raise_errno(_errno.EOPNOTSUPP, operation, None, None, f"kernel {self.kernel} has no vaddr update (5.12 has)")
        return 0

    cdef object unmap(self, uint64_t iova, uint64_t size, uint32_t flags, str operation):
        cdef uint64_t unmapped = 0
        cdef int err
        self.enter(operation)
        with nogil:
            err = unmap_dma(self.t, iova, size, flags, 0, 0, &unmapped)
            self.leave()
        if err:
            self.fail(err, operation, iova, size)
        return unmapped

    def update_vaddr(self, iova, vaddr, size):
        """Give the invalid mapping exactly at ``[iova, iova + size)`` a new address.

        Raises
        ------
        NotMappedError
            ENOENT: nothing is mapped there.
        InvalidArgumentError
            EINVAL: it is valid, or has another place or size.
        """
        cdef uint64_t at = u64("update_vaddr", iova), address = u64("update_vaddr", vaddr), length = u64("update_vaddr", size)
        cdef int err
        self.needs_vaddr("update_vaddr")
        self.enter("update_vaddr")
        err = map_dma(self.t, at, address, length, MAP_VADDR)
        self.leave()
        if err:
            self.fail(err, "update_vaddr", iova, size)

    def update_vaddr_many(self, entries):
        """update_vaddr for an (n, 3) uint64 array of (iova, vaddr, size): all of them, or none.  The GIL is released."""
        cdef Py_buffer view
        cdef uint64_t *row
        cdef Py_ssize_t n
        cdef size_t failed = 0
        cdef int err
        self.needs_vaddr("update_vaddr_many")
        acquire_rows(entries, &view, 3, &n, "update_vaddr_many")
        try:
            row = <uint64_t *> view.buf
            self.enter("update_vaddr_many")
            with nogil:
                err = update_vaddrs(self.t, row, n, &failed)
                self.leave()
            if err:
                self.fail(err, "update_vaddr_many", row[failed * 3], row[failed * 3 + 2], failed)
        finally:
            PyBuffer_Release(&view)

    # ---- dirty tracking

    def start_dirty(self):
        """Start dirty tracking; no effect when it is on.  Source: VFIO_IOMMU_DIRTY_PAGES_FLAG_START."""
        cdef int err
        self.needs_dirty("start_dirty")
        self.enter("start_dirty")
        with nogil:
            err = dirty_start(self.t)
            self.leave()
        if err:
            self.fail(err, "start_dirty")

    def stop_dirty(self):
        """Stop dirty tracking; no effect when it is off."""
        self.needs_dirty("stop_dirty")
        self.enter("stop_dirty")
        with nogil:
            dirty_stop(self.t)
            self.leave()

    cdef int needs_dirty(self, str operation) except -1:
        if self.t.version < V5_12:
            raise_errno(_errno.EOPNOTSUPP, operation, None, None, f"kernel {self.kernel} has no dirty tracking (5.8 has)")
        if not self.t.v2:
            raise_errno(_errno.EACCES, operation, None, None, "a Type1 (v1) container has no dirty tracking: use Type1v2")
        return 0

    def read_dirty(self, iova, size, bitmap):
        """Store the dirty bits of a range into a bitmap and clear them.

        Parameters
        ----------
        iova, size : int
            Bytes; the range must not split a mapping.
        bitmap : writable buffer
            Little-endian u64 words, bit 0 = the page at ``iova``.  Start with zeros: words that hold a mapping are stored,
            others are left as they are.

        Notes
        -----
        While an ordinary group is attached, everything mapped is dirty; only emulated devices are tracked page by page.
        The GIL is released.  Source: VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP.
        """
        cdef uint64_t at = u64("read_dirty", iova), length = u64("read_dirty", size)
        cdef Py_buffer view
        cdef int err
        self.needs_dirty("read_dirty")
        PyObject_GetBuffer(bitmap, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            self.enter("read_dirty")
            with nogil:
                err = dirty_get(self.t, at, length, min_pgsize(self.t), view.len, <uint64_t> view.buf)
                self.leave()
            if err:
                self.fail(err, "read_dirty", iova, size)
        finally:
            PyBuffer_Release(&view)

    # ---- emulated devices

    def pin_pages(self, IommuGroup group not None, iova, npages, prot):
        """Pin pages for an emulated device of ``group``; they stay dirty while pinned.  Source: vfio_pin_pages()."""
        cdef uint64_t at = u64("pin_pages", iova), n = u64("pin_pages", npages), access = u64("pin_pages", prot)
        cdef int err
        if access & ~<uint64_t> 3:
            raise_errno(EINVAL, "pin_pages", iova, None, "prot is READ, WRITE or both")
        self.enter("pin_pages")
        with nogil:
            err = pin_pages(self.t, &group.group, at, n, <uint32_t> access)
            self.leave()
        if err:
            self.fail(err, "pin_pages", iova, npages * 4096)

    def unpin_pages(self, iova, npages):
        """Let pages go that pin_pages pinned; those that are not pinned are passed over."""
        cdef uint64_t at = u64("unpin_pages", iova), n = u64("unpin_pages", npages)
        self.enter("unpin_pages")
        with nogil:
            unpin_pages(self.t, at, n)
            self.leave()

    def dma_read(self, iova, size):
        """Read ``size`` bytes as an emulated device does.

        Raises
        ------
        VfioError
            EINVAL not mapped, EPERM not readable, EFAULT memory gone, EBUSY while a vaddr is invalid.
        """
        cdef uint64_t at = u64("dma_read", iova), length = u64("dma_read", size)
        cdef bytes data = new_bytes("dma_read", iova, length)
        cdef char *to = PyBytes_AS_STRING(data)
        cdef int err
        self.enter("dma_read")
        with nogil:
            err = dma_rw(self.t, at, to, length, False)
            self.leave()
        if err:
            self.fail(err, "dma_read", iova, size)
        return data

    def dma_write(self, iova, data):
        """Write bytes-like ``data`` as an emulated device does; errors as dma_read, EPERM also without READ."""
        cdef uint64_t at = u64("dma_write", iova)
        cdef Py_buffer view
        cdef int err
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.enter("dma_write")
            with nogil:
                err = dma_rw(self.t, at, view.buf, view.len, True)
                self.leave()
            if err:
                self.fail(err, "dma_write", iova, view.len)
        finally:
            PyBuffer_Release(&view)

    # ---- what there is

    @property
    def pgsizes(self):
        """Bitmap of page sizes."""
        return self.t.pgsizes

    @property
    def dma_avail(self):
        """Mappings left."""
        return self.t.dma_avail

    @property
    def v2(self):
        """Whether this is Type1v2."""
        return bool(self.t.v2)

    @property
    def has_emulated(self):
        """Whether an emulated group is attached."""
        return self.t.emulated != NULL

    @property
    def dead(self):
        """Whether the instance has ended."""
        return bool(self.t.dead)

    def iova_ranges(self):
        """Return the valid ranges as a tuple of IovaRange, ascending; empty = no restriction."""
        cdef size_t i
        cdef list bounds
        self.enter("iova_ranges")
        try:
            bounds = [(self.t.ranges[i].start, self.t.ranges[i].last) for i in range(self.t.nranges)]
        finally:
            self.leave()
        # Without the lock: this runs Python code, which may raise or come back here.
        return tuple([IovaRange(start, last) for start, last in bounds])

    def mappings(self):
        """Return an (n, 5) uint64 array of (iova, vaddr, size, prot, vaddr valid), by iova."""
        import numpy
        cdef uint64_t[:, ::1] rows
        cdef dma_t *dma
        cdef size_t i = 0
        self.enter("mappings")
        try:
            array = numpy.empty((rangemap_count(self.t.mappings), 5), numpy.uint64)
            rows = array
            dma = first_from(self.t, 0)
            while dma:
                rows[i, 0], rows[i, 1], rows[i, 2], rows[i, 3], rows[i, 4] = dma.iova, vaddr_of(self.t, dma)[0], dma.size, dma.prot, vaddr_valid(self.t, dma)
                i += 1
                dma = next_of(self.t, dma)
        finally:
            self.leave()
        return array
