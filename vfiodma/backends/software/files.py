"""What stands behind the descriptors of the software VFIO: containers, groups, devices."""
import errno
import os
from typing import Any

from ..._core.dma import DmaPath, DmaPort, Type1Path
from ..._core.errno import error
from ..._core.memory import read_memory, write_memory
from ..._core.type1 import VERSIONS, IommuGroup, Type1, extension
from ...errors import VfioError
from ...hostinfo import has_capability
from ...uapi import vfio as abi
from .device import close_device, device_ioctl, device_mmap, device_pread, device_pwrite, open_device
from .eeh import Endpoint
from .spapr import SpaprDriver
from .spapr import extension as spapr_extension

_PAGE = 4096
_CAP_SYS_RAWIO = 17


def need_rawio(operation):
    """EPERM without CAP_SYS_RAWIO: a device without an IOMMU reaches all memory."""
    if not has_capability(_CAP_SYS_RAWIO):
        raise error(errno.EPERM, operation, hint="a device without an IOMMU reaches all memory: needs CAP_SYS_RAWIO")


class NoIommu:
    """The driver of a container whose devices have no IOMMU: nothing can be mapped."""

    emulated = False

    def __init__(self, allowed):
        self._allowed = allowed

    def ioctl(self, request, arg):
        if request == abi.VFIO_CHECK_EXTENSION:
            return int(self._allowed and arg == abi.VFIO_NOIOMMU_IOMMU)
        raise error(errno.ENOTTY, "container_ioctl", hint="a no-IOMMU container maps nothing")

    def attach(self, _):
        pass

    detach = attach

    def close(self):
        pass

    container_closed = close


class ContainerFile:
    """An open container: its groups and, once SET_IOMMU was done, its Type1 instance."""

    def __init__(self, vfio):
        self.vfio = vfio
        self.groups = []
        self.type1: Any = None
        self.fd_open = True

    def closed(self):
        pass                            # it lives on while groups are in it

    def descriptor_closed(self):
        type1 = self.type1
        if type1 is not None:
            type1.container_closed()

    def ioctl(self, request, arg):
        if request == abi.VFIO_GET_API_VERSION:
            return abi.VFIO_API_VERSION
        type1 = self.type1
        if request == abi.VFIO_SET_IOMMU:
            return self.set_iommu(arg)
        if type1 is not None:
            return type1.ioctl(request, arg)
        if request == abi.VFIO_CHECK_EXTENSION:
            return self.check_extension(arg)
        raise error(errno.EINVAL, "container_ioctl", hint="no IOMMU driver is set: attach a group, then SET_IOMMU")

    @property
    def noiommu(self):
        """Whether its groups have no IOMMU; all of them, or none."""
        return any(group.config.noiommu for group in self.groups)

    def check_extension(self, number):
        """Answer before SET_IOMMU: groups decide who is asked."""
        if number == abi.VFIO_NOIOMMU_IOMMU or self.noiommu:
            suits = self.noiommu or not self.groups
            return int(suits and self.vfio.noiommu and number == abi.VFIO_NOIOMMU_IOMMU)
        return self.driver_extension(number)

    def driver_extension(self, number):
        """What the platform's driver answers when it is not set yet."""
        return extension(self.vfio.kernel, number)

    def open_noiommu(self, kind):
        """Return the driver of groups without an IOMMU."""
        if kind != abi.VFIO_NOIOMMU_IOMMU:
            raise error(errno.ENODEV, "set_iommu", hint="groups without an IOMMU take type 8 (no-IOMMU) only")
        need_rawio("set_iommu")
        return NoIommu(self.vfio.noiommu)

    @staticmethod
    def refused_extensions(version):
        """What the driver claims as an extension before SET_IOMMU, and then refuses to be opened as."""
        if version < VERSIONS["5.12"]:
            return ()
        return (abi.VFIO_UNMAP_ALL, abi.VFIO_UPDATE_VADDR) if version < VERSIONS["6.1"] else (abi.VFIO_UNMAP_ALL,)

    def set_iommu(self, kind):
        version = VERSIONS[self.vfio.kernel]
        with self.vfio._lock:
            if not self.groups or self.type1 is not None:
                raise error(errno.EINVAL, "set_iommu", hint="needs a group in the container, and can be done once")
            if self.noiommu:
                self.type1 = self.open_noiommu(kind)
                return 0
            if kind in self.refused_extensions(version):
                raise error(errno.EINVAL, "set_iommu", hint="an extension, not an IOMMU type")
            nesting = kind == abi.VFIO_TYPE1_NESTING_IOMMU and version <= VERSIONS["6.12"]
            if not nesting and kind not in (abi.VFIO_TYPE1_IOMMU, abi.VFIO_TYPE1v2_IOMMU):
                raise error(errno.ENODEV, "set_iommu", hint="types are 1 (Type1) and 3 (Type1v2)")
            v2 = kind != abi.VFIO_TYPE1_IOMMU
            type1 = Type1(self.vfio.kernel, v2, self.vfio.dma_entry_limit, self.vfio._memlock_limit, nesting,
                          self.vfio.pasids, self.unbound)
            try:
                for group in reversed(self.groups):         # the kernel keeps the newest first
                    type1.attach(group.iommu)
            except VfioError:
                type1.close()
                for group in self.groups:
                    group.renew_iommu()
                raise
            self.type1 = type1
        return 0

    def add(self, group):
        if self.type1 is not None:
            self.type1.attach(group.iommu)
        self.groups.append(group)
        group.container = self

    def remove(self, group):
        self.groups.remove(group)
        group.container = None
        if self.type1 is not None:
            self.type1.detach(group.iommu)
            if not self.groups:
                self.type1.close()
                self.type1 = None

    def unbound(self):
        """Page tables may have been unbound: what their devices asked for is not needed any more."""
        for group in self.groups:
            group.drain()

    @property
    def ready(self):
        """Whether devices of its groups can be opened."""
        return self.type1 is not None

    def connect(self, group, device):
        """Return the way to memory of a device that is opened."""
        if group.config.noiommu:
            return DmaPath()            # it leads to physical memory, which is not modelled
        path = Type1Path(self.type1, group.iommu)
        if group.iommu.emulated and hasattr(device, "dma_unmap"):
            self.type1.add_unmap_listener(device.dma_unmap)
        return path

    def disconnect(self, group, device, path):
        """The device is closed."""
        if group.iommu.emulated and hasattr(device, "dma_unmap"):
            self.type1.remove_unmap_listener(device.dma_unmap)


class SpaprContainerFile(ContainerFile):
    """A container on a PowerNV platform: the SPAPR TCE driver is the only one."""

    def __init__(self, vfio):
        super().__init__(vfio)
        self.driver: Any = None

    def ioctl(self, request, arg):
        if request == abi.VFIO_GET_API_VERSION:
            return abi.VFIO_API_VERSION
        with self.vfio._lock:
            if request == abi.VFIO_SET_IOMMU:
                return self.set_iommu(arg)
            if self.driver is not None:
                return self.driver.ioctl(request, arg)
            if request == abi.VFIO_CHECK_EXTENSION:
                return self.check_extension(arg)
        raise error(errno.EINVAL, "container_ioctl", hint="no IOMMU driver is set: attach a group, then SET_IOMMU")

    def driver_extension(self, number):
        return spapr_extension(self.vfio, number)

    def set_iommu(self, kind):
        if not self.groups or self.driver is not None:
            raise error(errno.EINVAL, "set_iommu", hint="needs a group in the container, and can be done once")
        if self.noiommu:
            self.driver = self.open_noiommu(kind)
            return 0
        if kind not in (abi.VFIO_SPAPR_TCE_IOMMU, abi.VFIO_SPAPR_TCE_v2_IOMMU):
            code = errno.EINVAL if spapr_extension(self.vfio, kind) else errno.ENODEV
            raise error(code, "set_iommu", hint="types are 2 (SPAPR TCE) and 7 (SPAPR TCE version 2)")
        driver = SpaprDriver(self.vfio, kind == abi.VFIO_SPAPR_TCE_v2_IOMMU)
        try:
            for group in reversed(self.groups):         # the kernel keeps the newest first
                driver.attach(group)
        except VfioError:
            driver.abandon()
            raise
        self.driver = driver
        return 0

    def add(self, group):
        if self.driver is not None:
            self.driver.attach(group)
        self.groups.append(group)
        group.container = self

    def remove(self, group):
        self.groups.remove(group)
        group.container = None
        if self.driver is not None:
            self.driver.detach(group)
            if not self.groups:
                self.driver.close()
                self.driver = None

    @property
    def ready(self):
        return self.driver is not None

    def connect(self, group, device):
        return DmaPath() if group.config.noiommu else self.driver.paths[group]

    def disconnect(self, group, device, path):
        pass


class Group:
    """A group while it exists; it stays in its container as long as it or one of its devices is open."""

    def __init__(self, vfio, config):
        self.vfio = vfio
        self.config = config
        self.container: Any = None      # a ContainerFile or an IommufdFile
        self.fd_open = False
        self.open_devices = {}          # address -> number of descriptors
        self.ports = {}
        self.states = {}                # address -> DeviceState of an open device
        self.paths = {}
        self.cdevs = {}                 # address -> the CdevFile that has the device bound
        self.endpoint = None
        if vfio.platform == "powernv" and config.eeh and not config.emulated and not config.noiommu:
            self.endpoint = Endpoint()
        self.renew_iommu()

    def renew_iommu(self):
        config = self.config
        if config.emulated:
            self.iommu = IommuGroup(config.number, (0, 0), (), 0, True, True, True, True)
        else:
            self.iommu = IommuGroup(config.number, config.aperture, config.reserved, config.pgsizes, False,
                                    config.coherent, config.msi_isolated, config.nestable,
                                    all(getattr(device, "bus", abi.VFIO_DEVICE_FLAGS_PCI) == abi.VFIO_DEVICE_FLAGS_PCI
                                        for device in config.devices))

    def drain(self, pasid=None):
        """Answer page requests whose table is gone, and all those for ``pasid``."""
        for port in list(self.ports.values()):
            if port.fault_sink is not None:
                port.fault_sink.drain(pasid)

    @property
    def in_use(self):
        return self.fd_open or bool(self.open_devices)

    def ioctl(self, request, arg):
        with self.vfio._lock:
            if request == abi.VFIO_GROUP_GET_STATUS:
                return self.get_status(arg)
            if request == abi.VFIO_GROUP_SET_CONTAINER:
                return self.set_container(int.from_bytes(read_memory(arg, 4), "little", signed=True))
            if request == abi.VFIO_GROUP_UNSET_CONTAINER:
                return self.unset_container()
            if request == abi.VFIO_GROUP_GET_DEVICE_FD:
                return self.get_device_fd(self._read_name(arg))
        raise error(errno.ENOTTY, "group_ioctl", hint=f"request {request:#x}")

    def get_status(self, arg):
        layout = abi.vfio_group_status
        argsz = layout.unpack(read_memory(arg, layout.size))["argsz"]
        if argsz < layout.size:
            raise error(errno.EINVAL, "group_get_status", hint=f"argsz must be at least {layout.size}")
        flags = abi.VFIO_GROUP_FLAGS_VIABLE | (abi.VFIO_GROUP_FLAGS_CONTAINER_SET if self.container else 0)
        write_memory(arg, layout.pack(argsz=argsz, flags=flags))
        return 0

    def set_container(self, fd):
        container = self.vfio._files.get(fd)
        if container is None:
            try:
                os.fstat(fd)
            except OSError:
                raise error(errno.EBADF, "group_set_container", hint=f"descriptor {fd} is not open") from None
        if self.container is not None:
            raise error(errno.EINVAL, "group_set_container", hint="the group has a container")
        if not hasattr(container, "connect"):
            code = errno.EINVAL if VERSIONS[self.vfio.kernel] <= VERSIONS["6.1"] else errno.EBADFD
            raise error(code, "group_set_container", hint=f"descriptor {fd} is not a container")
        if self.config.noiommu:
            need_rawio("group_set_container")
        if isinstance(container, ContainerFile):
            if container.groups and container.noiommu != self.config.noiommu:
                raise error(errno.EPERM, "group_set_container",
                            hint="groups with and without an IOMMU do not go together")
        elif self.config.noiommu:
            raise error(errno.EPERM, "group_set_container", hint="an iommufd takes no group without an IOMMU")
        container.add(self)
        return 0

    def unset_container(self):
        if self.container is None:
            raise error(errno.EINVAL, "group_unset_container", hint="the group has no container")
        if self.open_devices:
            raise error(errno.EBUSY, "group_unset_container", hint="close the group's devices first")
        self.container.remove(self)
        return 0

    def _read_name(self, arg):
        """Copy a C string of at most a page, NUL included, as strndup_user() does."""
        name = b""
        while b"\0" not in name:
            if len(name) >= _PAGE:
                raise error(errno.EINVAL, "group_get_device_fd", hint="the name is longer than a page")
            at = arg + len(name)
            name += read_memory(at, min(_PAGE - at % _PAGE, _PAGE - len(name)))
        return name.split(b"\0")[0].decode(errors="replace")

    def get_device_fd(self, address):
        device = next((device for device in self.config.devices if device.address == address), None)
        if device is None:
            raise error(errno.ENODEV, "group_get_device_fd", hint=f"no device {address} in group {self.config.number}")
        if self.container is None or not self.container.ready:
            raise error(errno.EINVAL, "group_get_device_fd", hint="the group needs a container with an IOMMU set")
        fd = self.vfio._new_fd(DeviceFile(self, device))
        if address not in self.ports:
            try:
                self._connect(device)
            except BaseException:
                self.vfio._forget_fd(fd)
                raise
        self.open_devices[address] = self.open_devices.get(address, 0) + 1
        return fd

    def _connect(self, device):
        path = self.container.connect(self, device)
        port = DmaPort(path, device.address)
        try:
            open_device(self, device, port)
        except BaseException:
            port.disconnect()
            self.container.disconnect(self, device, path)
            raise
        self.ports[device.address] = port
        self.paths[device.address] = path

    def close_device(self, device):
        self.open_devices[device.address] -= 1
        if self.open_devices[device.address]:
            return
        del self.open_devices[device.address]
        try:
            close_device(self, device)
        finally:
            port = self.ports.pop(device.address)
            port.disconnect()
            if port.fault_sink is not None:
                port.fault_sink.drain()
            self.container.disconnect(self, device, self.paths.pop(device.address))
            self.leave_if_unused()

    def closed(self):
        self.leave_if_unused()

    def leave_if_unused(self):
        if not self.in_use and self.container is not None:
            self.container.remove(self)


class DeviceFile:
    """One descriptor of a device."""

    iommufd: Any = None                 # what a node is bound to

    def __init__(self, group, device):
        self.group = group
        self.device = device

    @property
    def state(self):
        return self.group.states[self.device.address]

    def ioctl(self, request, arg):
        return device_ioctl(self, request, arg)

    @property
    def frozen(self):
        """Whether EEH lets no register access through."""
        endpoint = self.group.endpoint
        return endpoint is not None and endpoint.state not in (
            abi.VFIO_EEH_PE_STATE_NORMAL, abi.VFIO_EEH_PE_STATE_STOPPED_DMA)

    def pread(self, size, offset):
        if self.frozen:
            return b"\xff" * size       # what reads of a frozen endpoint give
        return device_pread(self, size, offset)

    def pwrite(self, data, offset):
        if self.frozen:
            return len(data)
        return device_pwrite(self, data, offset)

    def mmap(self, size, offset, prot):
        return device_mmap(self, size, offset, prot)

    def closed(self):
        self.group.close_device(self.device)
