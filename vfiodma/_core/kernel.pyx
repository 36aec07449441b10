"""Typed ioctls on a descriptor: of the running kernel, or of a software VFIO in this process.

Arguments are built on the C stack; with the running kernel the GIL is released for every call, where there is another
thread to take it.
"""
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer, Py_buffer
from cpython.exc cimport PyErr_CheckSignals
from cpython.long cimport PyLong_CheckExact
from libc.errno cimport EAGAIN, EBADF, EINTR, EINVAL, errno
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.string cimport memset
from posix.time cimport nanosleep, timespec

from .args cimport acquire_rows, u64
from .errno cimport raise_errno
from .uapi cimport (
    DIRTY_GET, DIRTY_PAGES, DIRTY_START, DIRTY_STOP, MAP_DMA, MAP_VADDR, UNMAP_ALL, UNMAP_DIRTY, UNMAP_DMA, UNMAP_VADDR,
    dirty_bitmap, dirty_bitmap_get, dma_map, dma_unmap, user_bitmap,
)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, void *arg)

cdef extern from *:
    """
    /* Whether no other thread of Python can be waiting for the GIL, so that letting go of it gains nothing. */
    static inline int kernel_only_thread(void)
    {
    #ifdef Py_GIL_DISABLED
        return 0;
    #else
        PyInterpreterState *interpreter = PyInterpreterState_Head();
        PyThreadState *thread = PyInterpreterState_ThreadHead(interpreter);
        return !PyInterpreterState_Next(interpreter) && thread && !thread->next;
    #endif
    }
    """
    bint kernel_only_thread() noexcept nogil


cdef inline long once(int fd, uint32_t request, void *arg) noexcept nogil:
    """Return the result of one ioctl, or -errno."""
    cdef int result = ioctl(fd, request, arg)
    return result if result >= 0 else -errno


cdef enum:
    EAGAIN_TRIES = 1000             # of a millisecond each: a lock of the device that somebody holds for long is EAGAIN

cdef struct unmap_request:
    dma_unmap head
    user_bitmap bitmap

cdef struct dirty_request:
    dirty_bitmap head
    dirty_bitmap_get get


cdef class Descriptor:
    """A descriptor and the system that its ioctls go to; it does not own the descriptor until close().

    Parameters
    ----------
    system : VfioSystem or None
        None, or one with a true attribute ``real``: the running kernel.
    fd : int
    """

    def __init__(self, system, int fd):
        self.system = system
        self.real = system is None or getattr(system, "real", False)
        self.fd = fd

    @cython.final
    cdef long call(self, uint32_t request, void *arg) except? -1:
        """Return the ioctl's result, or -errno; raises for signals only."""
        cdef int fd = self.fd
        cdef long result
        if not self.real or fd < 0:
            return self.call_system(request, arg)
        result = once(fd, request, arg) if kernel_only_thread() else self.once_nogil(fd, request, arg)
        if result >= 0 or (result != -EINTR and result != -EAGAIN):
            return result
        return self.call_again(request, arg, result)

    @cython.final
    cdef long once_nogil(self, int fd, uint32_t request, void *arg) except? -1:
        cdef long result
        self.users += 1                     # so long the number stays this file's
        with nogil:
            result = once(fd, request, arg)
        self.users -= 1
        if self.fd != fd and not self.users:
            self.release(fd)
        return result

    @cython.final
    cdef long call_system(self, uint32_t request, void *arg) except? -1:
        if self.fd < 0:
            return -EBADF
        try:
            return self.system.ioctl(self.fd, request, <size_t> arg)
        except OSError as exc:
            return -<long> exc.errno

    @cython.final
    cdef long call_again(self, uint32_t request, void *arg, long result) except? -1:
        """Go on with an ioctl that ended with EINTR or EAGAIN."""
        cdef int fd = self.fd, tries = 0
        cdef timespec pause
        while True:
            if result == -EAGAIN:
                if tries == EAGAIN_TRIES:
                    return result
                tries += 1
                pause.tv_sec, pause.tv_nsec = 0, 1000000
                with nogil:
                    nanosleep(&pause, NULL)
            PyErr_CheckSignals()
            if self.fd != fd:               # closed meanwhile: the number may be somebody else's
                return -EBADF
            result = self.once_nogil(fd, request, arg)
            if result != -EINTR and result != -EAGAIN:
                return result

    cdef int fail(self, int err, str operation, object iova=None, object size=None, object entry=None) except -1:
        hint = self._hint(-err, operation)
        if entry is not None:
            hint = f"entry {entry}" + (f"; {hint}" if hint else "")
        return raise_errno(-err, operation, iova, size, hint)

    def _hint(self, int err, str operation):
        """Say what to do about an errno; containers know more."""
        return "the descriptor is closed" if err == EBADF else ""

    def ioctl(self, uint32_t request, arg=0, str operation="ioctl"):
        """Do an ioctl.

        Parameters
        ----------
        request : int
        arg : int or writable buffer
            A value or an address, or the memory of the argument.
        operation : str
            What errors call it.

        Returns
        -------
        int

        Raises
        ------
        VfioError
            With the errno.  EINTR is repeated; so is EAGAIN, for a second.
        """
        cdef Py_buffer view
        cdef long result
        if isinstance(arg, int):
            result = self.call(request, <void *> <size_t> <uint64_t> (arg & UINT64_MAX))
        else:
            PyObject_GetBuffer(arg, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
            try:
                result = self.call(request, view.buf)
            finally:
                PyBuffer_Release(&view)
        if result < 0:
            self.fail(result, operation)
        return result

    def close(self):
        """Close the descriptor; idempotent.  An ioctl that another thread is in ends first, as it would in the kernel."""
        cdef int fd = self.fd
        self.fd = -1
        if fd >= 0 and not self.users:
            self.release(fd)

    cdef int release(self, int fd) except -1:
        if self.system is not None:
            self.system.close(fd)
        else:
            import os
            os.close(fd)
        return 0


cdef class Type1Ioctls(Descriptor):
    """MAP_DMA, UNMAP_DMA and DIRTY_PAGES on a container's descriptor.

    Attributes
    ----------
    max_map_size : int
        Bytes that one mapping may have (what one dirty bitmap can tell); larger ones are made of several.
    pgsize : int
        Bytes a bit of a dirty bitmap stands for.
    """

    def __init__(self, system, int fd):
        Descriptor.__init__(self, system, fd)
        self.max_map_size = UINT64_MAX
        self.pgsize = 4096

    cdef uint64_t piece(self, uint64_t done, uint64_t size) noexcept:
        return min(self.max_map_size, size - done)

    # ---- one ioctl

    @cython.final
    cdef long map_one(self, uint64_t iova, uint64_t vaddr, uint64_t size, uint32_t flags) except? -1:
        cdef dma_map args
        args.argsz = sizeof(args)
        args.flags = flags
        args.vaddr = vaddr
        args.iova = iova
        args.size = size
        return self.call(MAP_DMA, &args)

    @cython.final
    cdef long unmap_one(self, uint64_t iova, uint64_t size, uint32_t flags, uint64_t *unmapped) except? -1:
        cdef dma_unmap args
        cdef long result
        args.argsz = sizeof(args)
        args.flags = flags
        args.iova = iova
        args.size = size
        result = self.call(UNMAP_DMA, &args)
        unmapped[0] = 0 if result < 0 else args.size
        return result

    # ---- mapping

    @cython.final
    cdef long map_pieces(self, uint64_t iova, uint64_t vaddr, uint64_t size, uint32_t flags) except? -1:
        """Map, in pieces where it is too large for one; all of them, or none."""
        cdef uint64_t done = 0, piece, unmapped
        cdef long result = -EINTR               # stays so when an exception goes through
        if size <= self.max_map_size:
            return self.map_one(iova, vaddr, size, flags)
        if iova + (size - 1) < iova or vaddr + (size - 1) < vaddr:
            return -EINVAL
        try:
            while done < size:
                piece = self.piece(done, size)
                result = -EINTR
                result = self.map_one(iova + done, vaddr + done, piece, flags)
                if result < 0:
                    return result
                done += piece
        finally:
            while result < 0 and done:
                done -= self.max_map_size
                # The pieces of an address update become invalid again, as they were.
                self.unmap_one(iova + done, self.max_map_size, UNMAP_VADDR if flags == MAP_VADDR else 0, &unmapped)
        return 0

    cdef int map_rows(self, str operation, object entries, Py_ssize_t columns) except -1:
        """Map rows of iova, vaddr, size, prot, or update vaddrs where there is no prot; all of them, or none."""
        cdef uint32_t flags = MAP_VADDR
        cdef Py_buffer view
        cdef uint64_t *row
        cdef uint64_t unmapped
        cdef Py_ssize_t done = 0, n
        cdef long result
        acquire_rows(entries, &view, columns, &n, operation)
        row = <uint64_t *> view.buf
        try:
            while done < n:
                result = 0
                if columns == 4:
                    flags = <uint32_t> row[3]
                    result = -EINVAL if row[3] - 1 > 2 else 0
                if result == 0:
                    result = self.map_pieces(row[0], row[1], row[2], flags)
                if result < 0:
                    self.fail(result, operation, row[0], row[2], done)
                row += columns
                done += 1
        except BaseException:
            for _ in range(done):
                row -= columns
                self.unmap_one(row[0], row[2], UNMAP_VADDR if columns == 3 else 0, &unmapped)
            raise
        finally:
            PyBuffer_Release(&view)
        return 0

    # The methods of the hot path are built-in ones: the interpreter calls them with fewer steps than Cython's functions.
    @cython.binding(False)
    @cython.embedsignature.format("clinic")
    def map_dma(self, iova, vaddr, size, prot):
        """Map ``[vaddr, vaddr + size)`` at ``iova``; the pages are pinned.

        Parameters
        ----------
        iova, vaddr, size : int
            Bytes; multiples of the smallest page size.
        prot : int
            Prot.READ, Prot.WRITE or both, as the device sees it.

        Raises
        ------
        VfioError
            EEXIST, EINVAL, EOVERFLOW, ENOSPC, ENOMEM, EFAULT; nothing is mapped then.

        Notes
        -----
        The GIL is released.  Source: VFIO_IOMMU_MAP_DMA.
        """
        cdef uint64_t access = u64("map_dma", prot)
        cdef long result
        if access & ~<uint64_t> 3 or not access:            # without rights: Type1 refuses it, iommufd's container does not
            raise_errno(EINVAL, "map_dma", iova, size, "prot is READ, WRITE or both")
        result = self.map_pieces(u64("map_dma", iova), u64("map_dma", vaddr), u64("map_dma", size), <uint32_t> access)
        if result < 0:
            self.fail(result, "map_dma", iova, size)

    def map_many(self, entries):
        """Map an (n, 4) uint64 array of (iova, vaddr, size, prot): all of them, or none; the text of an error names the entry."""
        self.map_rows("map_many", entries, 4)

    @cython.binding(False)
    @cython.embedsignature.format("clinic")
    def unmap_dma(self, iova, size):
        """Remove the mappings inside ``[iova, iova + size)``; return the bytes removed.

        Raises
        ------
        VfioError
            EINVAL (Type1v2: the range would split a mapping), EBUSY.

        Notes
        -----
        The GIL is released.  Source: VFIO_IOMMU_UNMAP_DMA.
        """
        cdef uint64_t start = u64("unmap_dma", iova), length = u64("unmap_dma", size), unmapped
        cdef long result = self.unmap_one(start, length, 0, &unmapped)
        if result < 0:
            self.fail(result, "unmap_dma", iova, size)
        return size if unmapped == length and PyLong_CheckExact(size) else unmapped      # no new int for the same number

    def unmap_all(self):
        """Remove every mapping; return the bytes removed.  Source: VFIO_DMA_UNMAP_FLAG_ALL (Linux 5.12)."""
        cdef uint64_t unmapped
        cdef long result = self.unmap_one(0, 0, UNMAP_ALL, &unmapped)
        if result < 0:
            self.fail(result, "unmap_all")
        return unmapped

    # ---- vaddrs

    def invalidate_vaddr(self, iova=0, size=None):
        """Declare the vaddrs of a range (None: of every mapping) invalid; DMA goes on.  Return the bytes.

        Source: VFIO_DMA_UNMAP_FLAG_VADDR.
        """
        cdef uint64_t unmapped
        cdef uint32_t flags = UNMAP_VADDR | (UNMAP_ALL if size is None else 0)
        cdef long result = self.unmap_one(u64("invalidate_vaddr", iova), 0 if size is None else u64("invalidate_vaddr", size),
                                          flags, &unmapped)
        if result < 0:
            self.fail(result, "invalidate_vaddr", iova, size)
        return unmapped

    def update_vaddr(self, iova, vaddr, size):
        """Give the invalid mapping exactly at ``[iova, iova + size)`` a new address.  Source: VFIO_DMA_MAP_FLAG_VADDR."""
        cdef long result = self.map_pieces(u64("update_vaddr", iova), u64("update_vaddr", vaddr), u64("update_vaddr", size), MAP_VADDR)
        if result < 0:
            self.fail(result, "update_vaddr", iova, size)

    def update_vaddr_many(self, entries):
        """update_vaddr for an (n, 3) uint64 array of (iova, vaddr, size): all of them, or none."""
        self.map_rows("update_vaddr_many", entries, 3)

    # ---- dirty tracking

    cdef long dirty(self, uint32_t flags) except? -1:
        cdef dirty_bitmap args
        args.argsz = sizeof(args)
        args.flags = flags
        return self.call(DIRTY_PAGES, &args)

    def start_dirty(self):
        """Start dirty tracking; no effect when it is on.  Source: VFIO_IOMMU_DIRTY_PAGES_FLAG_START."""
        cdef long result = self.dirty(DIRTY_START)
        if result < 0:
            self.fail(result, "start_dirty")

    def stop_dirty(self):
        """Stop dirty tracking; no effect when it is off."""
        cdef long result = self.dirty(DIRTY_STOP)
        if result < 0:
            self.fail(result, "stop_dirty")

    def read_dirty(self, iova, size, bitmap):
        """Store the dirty bits of a range into a bitmap and clear them.

        Parameters
        ----------
        iova, size : int
            Bytes; the range must not split a mapping.  One larger than ``max_map_size`` is read in several calls.
        bitmap : writable buffer
            Little-endian u64 words, bit 0 = the page at ``iova``.  Start with zeros: words that hold a mapping are stored,
            others are left as they are.

        Notes
        -----
        A Type1 container calls everything dirty that an ordinary device could have written.  The GIL is released.
        Source: VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP.
        """
        cdef uint64_t at = u64("read_dirty", iova), length = u64("read_dirty", size), done = 0, words
        cdef dirty_request args
        cdef Py_buffer view
        cdef long result
        PyObject_GetBuffer(bitmap, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            if <uint64_t> view.len < ((length // self.pgsize + 63) // 64) * 8:
                raise_errno(EINVAL, "read_dirty", iova, size, f"the bitmap has {view.len} bytes, fewer than the range needs")
            while True:
                memset(&args, 0, sizeof(args))
                args.head.argsz = sizeof(args)
                args.head.flags = DIRTY_GET
                args.get.iova = at + done
                args.get.size = self.piece(done, length)
                words = (args.get.size // self.pgsize + 63) // 64
                args.get.bitmap.pgsize = self.pgsize
                args.get.bitmap.size = words * 8
                args.get.bitmap.data = <void *> (<char *> view.buf + done // self.pgsize // 8)
                result = self.call(DIRTY_PAGES, &args)
                if result < 0:
                    self.fail(result, "read_dirty", iova, size)
                done += args.get.size
                if done >= length:
                    break
        finally:
            PyBuffer_Release(&view)

    def unmap_dirty(self, iova, size, bitmap):
        """Unmap, and store the dirty bits that the range had; return the bytes removed.

        Parameters
        ----------
        iova, size : int
            Bytes, at most ``max_map_size``.
        bitmap : writable buffer
            As for read_dirty.

        Notes
        -----
        Tracking must be on.  Source: VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP.
        """
        cdef unmap_request args
        cdef Py_buffer view
        cdef long result
        memset(&args, 0, sizeof(args))
        args.head.argsz = sizeof(args)
        args.head.flags = UNMAP_DIRTY
        args.head.iova = u64("unmap_dirty", iova)
        args.head.size = u64("unmap_dirty", size)
        PyObject_GetBuffer(bitmap, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            args.bitmap.pgsize = self.pgsize
            args.bitmap.size = (args.head.size // self.pgsize + 63) // 64 * 8
            args.bitmap.data = view.buf
            if args.bitmap.size > <uint64_t> view.len:
                raise_errno(EINVAL, "unmap_dirty", iova, size, f"the bitmap has {view.len} bytes, fewer than the range needs")
            result = self.call(UNMAP_DMA, &args)
        finally:
            PyBuffer_Release(&view)
        if result < 0:
            self.fail(result, "unmap_dirty", iova, size)
        return args.head.size
