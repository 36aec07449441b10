"""An iommufd in this process: the class that owns its state, with the raw door, and the devices that are bound to it.

Everything below the argument parsing runs without the interpreter; one lock a context makes it correct from many threads.
"""
import errno as _errno
import os

cimport cython
from cpython.exc cimport PyErr_WriteUnraisable
from libc.errno cimport EINVAL, ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from .dma cimport DmaPath, log_entry
from .errno cimport raise_errno
from .hwpt cimport (
    device_attach, device_bind, device_detach, device_dma, device_queue, device_unbind, hwpt_destroy, nested_dma,
    pasid_attach, pasid_detach,
)
from .hwpt_nested cimport nested_cache
from .ioas cimport ioas_free
from .ioas_access cimport (
    access_attach, access_bind, access_detach, access_pin, access_rw, access_unbind, access_unpin,
)
from .ioas_compat cimport compat_ioas
from .ioas_dirty cimport dirty_mark
from .ioas_ioctl cimport NEEDS_DESCRIPTOR, iommufd_ioctl
from .ioas_objects cimport object_add, object_remove
from .ioas_pages cimport forget_user_charges
from .ioas_state cimport (
    ACCESS, DEVICE, FAULT_QUEUE, HWPT, IOAS, NEST_NONE, NEST_SELFTEST, NEST_VTD, NESTED, OTHER, area_at, area_t, hwpt_t,
    ioas_t, object_of, queue_t,
)
from .nesting cimport pagewalk_fault
from .state cimport (
    PS, V7_2, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_trylock, pthread_mutex_unlock, pthread_rwlock_destroy, pthread_rwlock_init, pthread_rwlock_rdlock,
    pthread_rwlock_unlock, pthread_rwlockattr_init, pthread_rwlockattr_setkind_np, pthread_rwlockattr_t,
)
from .type1 cimport IommuGroup

from ..errors import ForkedError
from ..uapi import iommufd as _abi
from ..uapi import vfio as _vfio
from .type1 import VERSIONS, generation

cdef enum:
    HW_INFO_INTEL_VTD = 1
    HW_INFO_SELFTEST = 0xfeedbeef

_NAMES = {number: name.removeprefix("IOMMUFD_CMD_").lower() for name, number in vars(_abi).items()
          if name.startswith("IOMMUFD_CMD_") and name != "IOMMUFD_CMD_BASE"}
_HINTS = {
    _errno.EADDRINUSE: "mapped or allowed IOVAs are outside of what the device can use, or do not have its alignment",
    _errno.EEXIST: "an area overlaps it: unmap that first",
    _errno.EMSGSIZE: "there are more ranges than were asked for: num_iovas tells how many",
    _errno.ENOMEM: "the limit of locked memory (RLIMIT_MEMLOCK) does not allow more: raise it, or run with CAP_IPC_LOCK",
    _errno.EFAULT: "memory is not mapped in this process, or not with the permission needed",
    _errno.E2BIG: "the argument is longer than this kernel knows, and not zero there",
}


def forget_user_charges_in_child():
    """In a forked child: nothing is charged to the user by this process."""
    forget_user_charges()


os.register_at_fork(after_in_child=forget_user_charges_in_child)


cdef class IommufdContext:
    """What stands behind an open /dev/iommu.

    Parameters
    ----------
    kernel : {"6.12", "7.2"}
        Whose behaviour to reproduce.
    memlock_limit : int
        Bytes of locked memory; -1 = RLIMIT_MEMLOCK of the process, -2 = unlimited.
    per_process : bool
        Locked memory counts against the process, as Type1 does it, not against the user.

    Notes
    -----
    Thread-safe.  Usable only in the process that made it: in a forked child every call raises ForkedError.
    Source: drivers/iommu/iommufd behaviour of Linux 6.12 and 7.2.
    """

    def __cinit__(self, str kernel, int64_t memlock_limit, bint per_process=False):
        cdef pthread_rwlockattr_t attributes
        self.kernel = kernel
        self.generation = generation()
        self.listeners = []
        # Devices hammer the read side: without this, map and unmap would starve.
        pthread_rwlockattr_init(&attributes)
        pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP)
        pthread_rwlock_init(&self.c.iotlb, &attributes)
        pthread_mutex_init(&self.c.lock, NULL)
        self.initialised = True
        self.c.version = VERSIONS[kernel]
        self.c.memlock_limit = memlock_limit
        self.c.no_limit = memlock_limit == -2
        self.c.per_process = per_process
        self.c.owner = <void *> self

    def __dealloc__(self):
        # In a forked child the pinned memory is the parent's, and the lock may have been held.
        if self.initialised and self.generation == generation():
            self.free_objects()
            pthread_rwlock_destroy(&self.c.iotlb)
            pthread_mutex_destroy(&self.c.lock)
        free(self.c.objects)

    cdef void free_objects(self) noexcept nogil:
        """Leaf first.  Devices and accesses hold the context, so there are none."""
        cdef size_t i
        for i in range(self.c.room):
            if self.c.objects[i].kind == NESTED:
                hwpt_destroy(<hwpt_t *> self.c.objects[i].data)
        for i in range(self.c.room):
            if self.c.objects[i].kind == HWPT:
                hwpt_destroy(<hwpt_t *> self.c.objects[i].data)
        for i in range(self.c.room):
            if self.c.objects[i].kind == FAULT_QUEUE:
                free(self.c.objects[i].data)
                object_remove(&self.c, i)
            if self.c.objects[i].kind == IOAS:
                ioas_free(<ioas_t *> self.c.objects[i].data)
                object_remove(&self.c, i)
        self.c.vfio_ioas = NULL

    cdef bint has_devices(self) noexcept nogil:
        cdef size_t i
        for i in range(self.c.room):
            if self.c.objects[i].kind == DEVICE or self.c.objects[i].kind == ACCESS:
                return True
        return False

    # ---- the lock

    cdef int check_process(self, str operation) except -1:
        if self.generation != generation():
            raise ForkedError(_errno.EBADF, "opened before a fork", operation=operation, hint="open it again in this process")
        return 0

    cdef void take(self) noexcept:
        """Take the lock, never waiting for it with the GIL held: who has it may wait for the GIL, right here."""
        if pthread_mutex_trylock(&self.c.lock):
            with nogil:
                pthread_mutex_lock(&self.c.lock)

    cdef int enter(self, str operation) except -1:
        """Take the lock of a context that is open."""
        self.check_process(operation)
        self.take()
        if self.c.dead:
            self.leave()
            raise_errno(_errno.EBADF, operation, None, None, "the iommufd is closed")
        return 0

    cdef void leave(self) noexcept nogil:
        pthread_mutex_unlock(&self.c.lock)

    def _notify_unmap(self, iova, size):
        # All of them are told; what one raises is reported as unraisable, as there is nobody to catch it.
        for access in list(self.listeners):
            try:
                access.notify(iova, size)
            except BaseException:
                PyErr_WriteUnraisable(access)

    # ---- the raw door

    def ioctl(self, uint32_t request, uint64_t arg):
        """Do what ioctl(2) does on /dev/iommu.

        Parameters
        ----------
        request : int
            IOMMU_* or a VFIO container request.
        arg : int
            Address of the argument in this process, or its value.

        Returns
        -------
        int or None
            None: the request needs a descriptor, and the caller must do it (FAULT_QUEUE_ALLOC, arguments checked).

        Raises
        ------
        VfioError
            With the kernel's errno.

        Notes
        -----
        The GIL is released.
        """
        cdef long result
        self.enter("iommufd_ioctl")
        with nogil:
            result = iommufd_ioctl(&self.c, request, arg)
            self.leave()
        if result == NEEDS_DESCRIPTOR:
            return None
        if result < 0:
            name = _NAMES.get(request & 0xFF) or _vfio_name(request)
            raise_errno(-result, name, None, None, _HINTS.get(-result, ""))
        return result

    # ---- objects of others

    def add_object(self):
        """Draw an id for something that the caller keeps; destroying it by id is EBUSY until remove_object."""
        cdef uint32_t number
        cdef int err
        self.enter("add_object")
        err = object_add(&self.c, OTHER, <void *> self, &number)
        self.leave()
        if err:
            raise_errno(-err, "add_object")
        return number

    def remove_object(self, uint32_t number):
        """Give an id of add_object back."""
        self.enter("remove_object")
        if object_of(&self.c, number, OTHER):
            object_remove(&self.c, number)
        self.leave()

    def add_fault_queue(self):
        """Make a queue of page faults whose descriptor is open; return its id."""
        cdef queue_t *queue = <queue_t *> calloc(1, sizeof(queue_t))
        cdef int err = -ENOMEM
        self.enter("fault_queue_alloc")
        if queue:
            queue.open = True
            err = object_add(&self.c, FAULT_QUEUE, queue, &queue.id)
        self.leave()
        if err:
            free(queue)
            raise_errno(-err, "fault_queue_alloc")
        return queue.id

    def close_fault_queue(self, uint32_t number, bint destroy=False):
        """Note that a queue's descriptor is closed: it can be destroyed, or is right now."""
        cdef queue_t *queue
        self.enter("close_fault_queue")
        queue = <queue_t *> object_of(&self.c, number, FAULT_QUEUE)
        if queue:
            queue.open = False
            if destroy:
                object_remove(&self.c, number)
                free(queue)
        self.leave()

    def cached(self, uint32_t hwpt):
        """Translations in the cache of a nested page table, and the bytes that they take; None: there is no such table."""
        cdef hwpt_t *table
        self.enter("cached")
        table = <hwpt_t *> object_of(&self.c, hwpt, NESTED)
        found = nested_cache(table) if table else None
        self.leave()
        return found

    def compat_ioas(self):
        """Make the address space of the VFIO dialect unless there is one; return its id."""
        cdef uint32_t number = 0
        cdef int err
        self.enter("compat_ioas")
        err = compat_ioas(&self.c)
        if not err:
            number = self.c.vfio_ioas.id
        self.leave()
        if err:
            raise_errno(-err, "compat_ioas")
        return number

    @property
    def vfio_ioas_id(self):
        """Id of the address space of the VFIO dialect, or None."""
        self.enter("vfio_ioas_id")
        number = self.c.vfio_ioas.id if self.c.vfio_ioas else None
        self.leave()
        return number

    def mark_dirty(self, uint32_t hwpt, uint64_t iova, uint64_t size):
        """Set dirty bits of a page table as a write by a device does, in the area at ``iova``; return whether there is one."""
        cdef hwpt_t *table
        cdef area_t *area = NULL
        self.enter("mark_dirty")
        table = <hwpt_t *> object_of(&self.c, hwpt, HWPT)
        if table:
            pthread_rwlock_rdlock(&self.c.iotlb)
            area = area_at(table.ioas, iova)
            if area and size:
                dirty_mark(area, table, iova, min(size - 1, area.last - iova) + 1)
            pthread_rwlock_unlock(&self.c.iotlb)
        self.leave()
        return area != NULL

    def close(self):
        """Destroy every object, leaf first; where a device is still bound, when it goes.  Idempotent."""
        self.check_process("close")
        if self.c.dead:
            return
        self.enter("close")
        with nogil:
            # An unmap that waits for a device goes on with its address space, and a bound device may be in one: then the
            # last reference frees it.
            if not self.c.unmaps and not self.has_devices():
                self.free_objects()
            self.c.dead = True
            self.leave()


def _vfio_name(request):
    for name in ("GET_API_VERSION", "CHECK_EXTENSION", "SET_IOMMU", "IOMMU_GET_INFO", "IOMMU_MAP_DMA", "IOMMU_UNMAP_DMA"):
        if getattr(_vfio, "VFIO_" + name) == request:
            return name.removeprefix("IOMMU_").lower()
    return "iommufd_ioctl"


@cython.no_gc_clear             # the context must be there when the last reference goes
cdef class IommufdDevice(DmaPath):
    """An ordinary device that is bound to an iommufd.

    Parameters
    ----------
    context : IommufdContext
    group : IommuGroup
        What its IOMMU can do.
    hw_type, hw_data, hw_capabilities
        What GET_HW_INFO tells: type, bytes (at most 64), capability bits.
    can_track : bool
        The IOMMU can track dirty pages.
    block : int
        Bytes of the blocks of contiguous entries in its page tables, which lose the last page of a block; 0 = no such tables.
    asks_pages : bool
        The device has PRI: it can be attached to page tables with a fault queue.
    """

    def __cinit__(self, IommufdContext context not None, IommuGroup group not None, *, uint32_t hw_type=0, bytes hw_data=b"",
                  uint64_t hw_capabilities=0, bint can_track=False, uint64_t block=0, bint asks_pages=False):
        cdef int err
        if not group.group.msi_isolated:
            raise_errno(_errno.EPERM, "bind_iommufd", None, None, "interrupts are not isolated")
        if len(hw_data) > sizeof(self.device.hw_data):
            raise ValueError("hw_data is at most 64 bytes")
        self.group = group
        self.device.group = <void *> group
        self.device.reserved = group.group.reserved
        self.device.nreserved = group.group.nreserved
        self.device.aperture = group.group.aperture
        self.device.pgsizes = group.group.pgsizes
        self.device.coherent = group.group.coherent
        self.device.nestable = group.group.nestable
        self.device.can_track = can_track
        self.device.generic_table = block != 0
        self.device.block = block
        self.device.hw_type = hw_type
        self.device.hw_size = len(hw_data)
        memcpy(self.device.hw_data, <const unsigned char *> hw_data, len(hw_data))
        self.device.hw_capabilities = hw_capabilities
        self.device.asks_pages = asks_pages
        self.device.nest = NEST_SELFTEST if hw_type == HW_INFO_SELFTEST else NEST_NONE
        if hw_type == HW_INFO_INTEL_VTD and len(hw_data) == 24:
            self.device.nest = NEST_VTD
            memcpy(&self.device.cap, &self.device.hw_data[8], 8)
            memcpy(&self.device.ecap, &self.device.hw_data[16], 8)
            if context.c.version >= V7_2 and self.device.ecap >> 40 & 1:
                self.device.npasids = 1 << 20
        context.enter("bind_iommufd")
        err = device_bind(&context.c, &self.device)
        context.leave()
        if err:
            raise_errno(-err, "bind_iommufd")
        self.context = context

    def __dealloc__(self):
        if self.context is None or self.context.generation != generation():
            return
        self.context.take()
        if self.device.id:
            device_unbind(&self.context.c, &self.device)
        self.context.leave()

    @property
    def id(self):
        """Object id."""
        return self.device.id

    @property
    def hwpt_id(self):
        """Id of the page table that it is attached to, or None."""
        self.context.enter("hwpt_id")
        number = self.device.hwpt.id if self.device.hwpt else None
        self.context.leave()
        return number

    def attach(self, uint32_t pt_id):
        """Attach to an address space or a page table; return the id of the page table.

        Raises
        ------
        VfioError
            ENOENT, EINVAL (another kind of object, an IOMMU that does not fit, a device of the group elsewhere), EADDRINUSE
            (what is mapped or allowed is out of its reach), EFAULT, ENOMEM.
        """
        cdef int err
        self.context.enter("attach_iommufd_pt")
        with nogil:
            err = device_attach(&self.context.c, &self.device, &pt_id)
            self.context.leave()
        if err:
            raise_errno(-err, "attach_iommufd_pt", None, None, _HINTS.get(-err, ""))
        return pt_id

    def attach_pasid(self, uint32_t pasid, uint32_t pt_id):
        """Attach a PASID to a page table, or move it there; return the table's id.

        Raises
        ------
        VfioError
            ENOENT; EINVAL: no page table that was allocated for PASIDs, the device is in one that was not, it has no such
            PASID, or its IOMMU can't walk the table.
        """
        cdef int err
        self.context.enter("attach_iommufd_pt")
        with nogil:
            err = pasid_attach(&self.context.c, &self.device, pasid, pt_id)
            self.context.leave()
        if err:
            raise_errno(-err, "attach_iommufd_pt", None, None, "a PASID needs a device with PASIDs and a page table that was "
                        "allocated with IOMMU_HWPT_ALLOC_PASID" if err == -EINVAL else "")
        return pt_id

    def detach_pasid(self, uint32_t pasid):
        """Take a PASID out of its page table; no effect when it is in none."""
        self.context.enter("detach_iommufd_pt")
        with nogil:
            pasid_detach(&self.context.c, &self.device, pasid)
            self.context.leave()

    def fault_queue(self, uint32_t pasid):
        """Where the device asks for missing pages: (id of the queue or None, serial of the attachment or 0)."""
        cdef const queue_t *queue
        cdef uint64_t serial
        self.context.enter("fault_queue")
        queue = device_queue(&self.device, pasid, &serial)
        number = queue.id if queue else None
        self.context.leave()
        return number, serial

    def detach(self):
        """Leave the page table; no effect when it is in none."""
        self.context.enter("detach_iommufd_pt")
        with nogil:
            device_detach(&self.context.c, &self.device)
            self.context.leave()

    def unbind(self):
        """Leave the iommufd.  Idempotent."""
        self.context.enter("unbind_iommufd")
        with nogil:
            if self.device.id:
                device_unbind(&self.context.c, &self.device)
            self.context.leave()

    cdef int access(self, uint64_t iova, void *data, uint64_t size, bint write, uint64_t *done) noexcept nogil:
        return device_dma(&self.context.c, &self.device, iova, data, size, write, done)

    cdef bint nests(self) noexcept nogil:
        return self.device.nests

    cdef int nested(self, uint64_t pasid, uint64_t address, void *data, uint64_t size, unsigned access, uint64_t *gpa,
                    uint64_t *done, pagewalk_fault *fault) noexcept nogil:
        return nested_dma(&self.context.c, &self.device, pasid, address, data, size, access, gpa, done, fault,
                          log_entry, self.log)

    cdef int check_process(self, str operation) except -1:
        return self.context.check_process(operation)


@cython.no_gc_clear
cdef class IommufdAccess(DmaPath):
    """An emulated device that is bound to an iommufd.

    Parameters
    ----------
    context : IommufdContext
    callback : callable or None
        ``callback(iova, size)`` is called when an unmap needs pinned pages back, and must unpin them; without one the device
        can't pin.
    """

    def __cinit__(self, IommufdContext context not None, callback=None):
        cdef int err
        context.enter("bind_iommufd")
        err = access_bind(&context.c, &self.entry)
        context.leave()
        if err:
            raise_errno(-err, "bind_iommufd")
        self.context = context
        self.callback = callback

    def __dealloc__(self):
        if self.context is None or self.context.generation != generation():
            return
        self.context.take()
        if self.entry.id:
            access_unbind(&self.context.c, &self.entry)
        self.context.leave()

    @property
    def id(self):
        """Object id."""
        return self.entry.id

    def notify(self, iova, size):
        """Tell the device that pages must be given back."""
        self.callback(iova, size)

    def attach(self, uint32_t ioas_id):
        """Attach to an address space; return its id.  ENOENT, EADDRINUSE (areas that are not in whole pages)."""
        cdef int err
        self.context.enter("attach_iommufd_pt")
        err = access_attach(&self.context.c, &self.entry, ioas_id)
        self.context.leave()
        if err:
            raise_errno(-err, "attach_iommufd_pt", None, None, _HINTS.get(-err, ""))
        if self.callback is not None and self not in self.context.listeners:
            self.context.listeners.append(self)
        return ioas_id

    def detach(self):
        """Leave the address space, giving up what is pinned; no effect when it is in none."""
        if self in self.context.listeners:
            self.context.listeners.remove(self)
        self.context.enter("detach_iommufd_pt")
        with nogil:
            access_detach(&self.entry)
            self.context.leave()

    def unbind(self):
        """Leave the iommufd.  Idempotent."""
        if self in self.context.listeners:
            self.context.listeners.remove(self)
        self.context.enter("unbind_iommufd")
        with nogil:
            if self.entry.id:
                access_unbind(&self.context.c, &self.entry)
            self.context.leave()

    def pin_pages(self, uint64_t iova, uint64_t npages, int prot):
        """Pin whole pages; ``prot`` is READ 1 or WRITE 2, and only what is asked must be permitted.

        Raises
        ------
        VfioError
            EINVAL, EOVERFLOW, ENOENT (a hole), EPERM, EFAULT, ENOMEM.
        """
        cdef int err
        if self.callback is None or npages > <uint64_t> -1 // PS:
            raise_errno(EINVAL, "pin_pages", iova, None, "the device must listen to unmaps to pin pages")
        self.context.enter("pin_pages")
        with nogil:
            err = access_pin(&self.entry, iova - iova % PS, npages * PS, (prot & 2) != 0)
            self.context.leave()
        if err:
            raise_errno(-err, "pin_pages", iova, npages * PS, _HINTS.get(-err, ""))

    def unpin_pages(self, uint64_t iova, uint64_t npages):
        """Give up a pin of exactly this range."""
        self.context.enter("unpin_pages")
        access_unpin(&self.entry, iova - iova % PS, npages * PS)
        self.context.leave()

    cdef int access(self, uint64_t iova, void *data, uint64_t size, bint write, uint64_t *done) noexcept nogil:
        cdef int err
        pthread_mutex_lock(&self.context.c.lock)
        err = access_rw(&self.entry, iova, data, size, write)
        pthread_mutex_unlock(&self.context.c.lock)
        done[0] = 0 if err else size
        return err

    cdef int check_process(self, str operation) except -1:
        return self.context.check_process(operation)
