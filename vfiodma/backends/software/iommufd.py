"""What stands behind /dev/iommu and /dev/vfio/devices: iommufds, devices that are bound to them, fault queues."""
import errno
import os
import struct
from typing import Any

from ..._core.dma import DmaPort
from ..._core.errno import error
from ..._core.ioas_context import IommufdAccess, IommufdContext, IommufdDevice
from ..._core.memory import read_memory, write_memory
from ..._core.type1 import VERSIONS
from ...uapi import iommufd as abi
from ...uapi import vfio
from .device import close_device, open_device
from .files import DeviceFile
from .page_requests import FaultQueueFile, PageRequester

# Capability registers of an emulated VT-d unit, and the bits of what it may lack.
_VTD_CAP, _VTD_ECAP = 0x00D2008C22260286, 0xF00F4A
_VTD_ECAP_DIRTY = 1 << 45
_VTD_CAP_NESTING = 1 << 56 | 1 << 60                # 1 GiB pages and 5 levels in the first stage
#: Nesting, page requests, supervisor requests, extended accessed flag, PASIDs, scalable mode, both stages.
_VTD_ECAP_NESTING = 1 << 26 | 1 << 29 | 1 << 31 | 1 << 34 | 19 << 35 | 1 << 40 | 1 << 43 | 1 << 46 | 1 << 47


_PASID_CAPABILITIES = abi.IOMMU_HW_CAP_PCI_PASID_EXEC | abi.IOMMU_HW_CAP_PCI_PASID_PRIV


def bind(context, group, device):
    """Bind a device of a group to an iommufd; return its way to memory.

    Raises
    ------
    VfioError
        EINVAL: its IOMMU does not enforce cache coherency; EPERM: interrupts are not isolated.
    """
    if group.iommu.emulated:
        return IommufdAccess(context, getattr(device, "dma_unmap", None))
    config = group.config
    capabilities = abi.IOMMU_HW_CAP_DIRTY_TRACKING if config.dirty_tracking else 0
    asks_pages = config.page_request_timeout is not None
    if VERSIONS[context.kernel] >= VERSIONS["7.2"]:
        capabilities |= 0 if asks_pages else abi.IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED
        capabilities |= _PASID_CAPABILITIES if config.nestable and not config.lost_last_page else 0
    if config.lost_last_page:
        kind, data = abi.IOMMU_HW_INFO_TYPE_AMD, bytes(abi.iommu_hw_info_amd.size)
    else:
        ecap = (_VTD_ECAP | (_VTD_ECAP_DIRTY if config.dirty_tracking else 0)
                | (_VTD_ECAP_NESTING if config.nestable else 0))
        kind = abi.IOMMU_HW_INFO_TYPE_INTEL_VTD
        cap = _VTD_CAP | (_VTD_CAP_NESTING if config.nestable else 0)
        data = abi.iommu_hw_info_vtd.pack(flags=1, cap_reg=cap, ecap_reg=ecap)
    return IommufdDevice(context, group.iommu, hw_type=kind, hw_data=data, hw_capabilities=capabilities,
                         can_track=config.dirty_tracking, asks_pages=asks_pages,
                         block=config.lost_last_page if VERSIONS[context.kernel] >= VERSIONS["7.2"] else 0)


class IommufdFile:
    """An open /dev/iommu, or a /dev/vfio/vfio that iommufd serves.  Bound devices and groups hold it open."""

    ready = True                        # a group's devices can be opened at once: there is no SET_IOMMU to wait for

    def __init__(self, system, per_process=False):
        self.system = system
        self.context = IommufdContext(system.kernel, system._memlock_limit, per_process)
        self.fd_open = True
        self.holders = 0
        self.queues = {}                # id -> FaultQueueFile, also one whose descriptor is closed

    def hold(self):
        self.holders += 1

    def release(self):
        self.holders -= 1
        self.close_if_unused()

    def closed(self):
        self.close_if_unused()

    def close_if_unused(self):
        if not self.fd_open and not self.holders:
            self.context.close()

    def ioctl(self, request, arg):
        result = self.context.ioctl(request, arg)
        return self.fault_queue_alloc(arg) if result is None else result

    def fault_queue_alloc(self, arg):
        with self.system._lock:
            number = self.context.add_fault_queue()
            try:
                queue = FaultQueueFile(self, number)
                fd = self.system._new_fd(queue)
            except OSError:
                self.context.close_fault_queue(number, destroy=True)
                raise
            try:
                write_memory(arg, struct.pack("=4I", int.from_bytes(read_memory(arg, 4), "little"), 0, number, fd))
            except OSError:
                self.system._forget_fd(fd)
                self.context.close_fault_queue(number, destroy=True)
                raise
            self.queues[number] = queue
            self.hold()
        return 0

    def drop_requests(self):
        """Devices were attached or detached: requests of attachments that are gone are invalid."""
        for queue in list(self.queues.values()):
            queue.drop_gone()

    # ---- as the container of groups

    def add(self, group):
        self.context.compat_ioas()
        self.hold()
        group.container = self

    def remove(self, group):
        group.container = None
        self.release()

    def connect(self, group, device):
        """Bind a device and attach it to the address space of the VFIO dialect."""
        number = self.context.vfio_ioas_id
        if number is None:
            raise error(errno.ENODEV, "group_get_device_fd", hint="its compatible address space was destroyed")
        path = bind(self.context, group, device)
        try:
            path.attach(number)
        except BaseException:
            path.unbind()
            raise
        return path

    def disconnect(self, group, device, path):
        path.unbind()
        self.drop_requests()


class CdevFile(DeviceFile):
    """A device's own node.  It does nothing before BIND_IOMMUFD."""

    def __init__(self, group, device):
        super().__init__(group, device)
        self.iommufd: Any = None        # all three once it is bound
        self.path: Any = None
        self.port: Any = None

    def ioctl(self, request, arg):
        system = self.group.vfio
        with system._lock:
            if request == vfio.VFIO_DEVICE_BIND_IOMMUFD:
                return self.bind(arg)
            self.needs_iommufd("device_ioctl")
            if request == vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT:
                return self.attach(arg)
            if request == vfio.VFIO_DEVICE_DETACH_IOMMUFD_PT:
                return self.detach(arg)
        return super().ioctl(request, arg)

    def needs_iommufd(self, operation):
        if self.iommufd is None:
            raise error(errno.EINVAL, operation, hint="the device is not bound: DEVICE_BIND_IOMMUFD comes first")

    def pread(self, size, offset):
        self.needs_iommufd("pread")
        return super().pread(size, offset)

    def pwrite(self, data, offset):
        self.needs_iommufd("pwrite")
        return super().pwrite(data, offset)

    def mmap(self, size, offset, prot):
        self.needs_iommufd("mmap")
        return super().mmap(size, offset, prot)

    @property
    def _has_7_2(self):
        return VERSIONS[self.group.vfio.kernel] >= VERSIONS["7.2"]

    def _read_bind(self, arg):
        """Read the struct as the kernel of this version does; return (flags, descriptor, address of the token)."""
        argsz = int.from_bytes(read_memory(arg, 4), "little")
        if argsz < 16:
            raise error(errno.EINVAL, "bind_iommufd", hint="argsz is at least 16")
        known = vfio.vfio_device_bind_iommufd.size
        at = arg + known
        while self._has_7_2 and at < arg + argsz:
            piece = read_memory(at, min(4096 - at % 4096, arg + argsz - at))     # a byte before a fault counts
            if any(piece):
                raise error(errno.E2BIG, "bind_iommufd", hint=f"bytes after {known} are not known, and must be 0")
            at += len(piece)
        raw = read_memory(arg, min(argsz, known) if self._has_7_2 else 16)
        flags, fd, _, token = struct.unpack_from("=IiIQ", raw.ljust(known, b"\0"), 4)
        return flags, fd, token

    def bind(self, arg):
        flags, fd, token = self._read_bind(arg)
        group, system = self.group, self.group.vfio
        if fd < 0 or flags & ~(vfio.VFIO_DEVICE_BIND_FLAG_TOKEN if self._has_7_2 else 0):
            raise error(errno.EINVAL, "bind_iommufd", hint="unknown flags, or no descriptor")
        if group.in_use:
            raise error(errno.EBUSY, "bind_iommufd", hint=f"group {group.config.number} is open")
        if self.iommufd is not None or self.device.address in group.cdevs:
            raise error(errno.EINVAL, "bind_iommufd", hint="the device is bound: a node can be used by one descriptor")
        if flags:
            read_memory(token, 16)
            raise error(errno.EINVAL, "bind_iommufd", hint="the device has no token")
        iommufd = system._files.get(fd)
        if iommufd is None:
            try:
                os.fstat(fd)
            except OSError:
                raise error(errno.EBADF, "bind_iommufd", hint=f"descriptor {fd} is not open") from None
        if not isinstance(iommufd, IommufdFile):
            raise error(errno.EBADFD, "bind_iommufd", hint=f"descriptor {fd} is not an iommufd")
        if any(other.iommufd is not iommufd for other in group.cdevs.values()):
            raise error(errno.EPERM, "bind_iommufd", hint="a device of the group is bound to another iommufd")
        path = bind(iommufd.context, group, self.device)
        port = DmaPort(path, self.device.address)
        if isinstance(path, IommufdDevice) and group.config.page_request_timeout is not None:
            port.fault_sink = PageRequester(iommufd, path, group.config.page_request_timeout)
        try:
            open_device(group, self.device, port)
            write_memory(arg + 12, struct.pack("=I", path.id))
        except BaseException:
            if self.device.address in group.states:
                close_device(group, self.device)
            port.disconnect()
            path.unbind()
            raise
        iommufd.hold()
        self.iommufd, self.path, self.port = iommufd, path, port
        group.cdevs[self.device.address] = self
        group.ports[self.device.address] = port
        return 0

    def _read(self, arg, size, operation):
        """Read the struct; return its bytes and the PASID it is about, or None."""
        argsz, flags = struct.unpack_from("=II", data := read_memory(arg, size))
        if argsz < size or flags & ~(1 if self._has_7_2 else 0):
            raise error(errno.EINVAL, operation, hint=f"argsz is at least {size}, flags are 0")
        if flags:
            if argsz < size + 4:
                raise error(errno.EINVAL, operation, hint=f"argsz is at least {size + 4} with a PASID")
            pasid, = struct.unpack("=I", read_memory(arg + size, 4))
            if not isinstance(self.path, IommufdDevice):
                raise error(errno.EOPNOTSUPP, operation, hint="a mediated device has no PASIDs")
        return data, pasid if flags else None

    def attach(self, arg):
        data, pasid = self._read(arg, 12, "attach_iommufd_pt")
        if pasid is not None and pasid >= 1 << 31:
            raise error(errno.ENOSPC, "attach_iommufd_pt", hint="the kernel counts PASIDs up to 2**31 - 1")
        table = struct.unpack_from("=I", data, 8)[0]
        number = self.path.attach(table) if pasid is None else self.path.attach_pasid(pasid, table)
        try:
            write_memory(arg + 8, struct.pack("=I", number))
        except OSError:
            self._leave(pasid)
            raise
        finally:
            self.iommufd.drop_requests()
        return 0

    def _leave(self, pasid):
        if pasid is None:
            self.path.detach()
        else:
            self.path.detach_pasid(pasid)

    def detach(self, arg):
        self._leave(self._read(arg, 8, "detach_iommufd_pt")[1])     # a PASID that is not attached is left in peace
        self.iommufd.drop_requests()
        return 0

    def closed(self):
        if self.iommufd is None:
            return
        iommufd, self.iommufd = self.iommufd, None
        del self.group.cdevs[self.device.address]
        del self.group.ports[self.device.address]
        try:
            close_device(self.group, self.device)
        finally:
            self.port.disconnect()
            self.path.unbind()
            iommufd.drop_requests()
            iommufd.release()
