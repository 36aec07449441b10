"""The software VFIO: containers, groups and devices in this process, with the answers of a chosen Linux kernel.

Two doors lead to the same logic (vfiodma._core.type1):

* SoftwareVfio, what a C program sees: open a path, ioctl with numbers and addresses, close;
* SoftwareContainer, typed: the backend that IoAddressSpace works on.
"""
import errno
import os
import struct
import threading

from .._core.dma import DmaPort
from .._core.errno import error
from .._core.memory import read_memory, write_memory
from .._core.type1 import VERSIONS, IommuGroup, Type1, extension, generation, locked_pages
from ..errors import ForkedError, VfioError
from ..types import Capabilities
from ..uapi import vfio as abi
from .vfio_pci import PlainDevice, device_ioctl, device_pread, device_pwrite

_PAGE = 4096
_MAX_DIRTY_BITMAP = 268435456
_MEMLOCK_PROCESS, _MEMLOCK_UNLIMITED = -1, -2


class SoftwareGroup:
    """An IOMMU group of the software backend.

    Parameters
    ----------
    number : int
        The N of /dev/vfio/N.
    devices : sequence
        PCI addresses ("0000:00:10.0": a plain device) or objects of the SoftwareDevice protocol.
    aperture : (int, int)
        First and last IOVA that the IOMMU translates.
    reserved : sequence of (int, int)
        First and last IOVA of regions that can't be mapped; by default the MSI window of x86.
    pgsizes : int
        Bitmap of IOMMU page sizes.
    emulated : bool
        A group of mediated devices: no IOMMU, hence no aperture.
    coherent : bool
        The IOMMU enforces cache coherency (extension DMA_CC).
    msi_isolated : bool
        Without it, attaching is EPERM.
    nestable : bool
        The IOMMU can nest (SET_IOMMU 6, up to Linux 6.12).
    """

    def __init__(self, number, devices, *, aperture=(0, (1 << 39) - 1), reserved=((0xFEE00000, 0xFEEFFFFF),), pgsizes=0x40201000,
                 emulated=False, coherent=True, msi_isolated=True, nestable=False):
        if not isinstance(number, int) or number < 0:
            raise ValueError("a group's number is a non-negative integer")
        if not emulated:
            if not 0 <= aperture[0] <= aperture[1] < 1 << 64:
                raise ValueError("aperture is (first, last) with 0 <= first <= last < 2**64")
            if any(not 0 <= first <= last < 1 << 64 for first, last in reserved):
                raise ValueError("a reserved region is (first, last) with 0 <= first <= last < 2**64")
            if not 0 < pgsizes < 1 << 64:
                raise ValueError("pgsizes is a bitmap of page sizes")
        self.number = number
        self.devices = [PlainDevice(device) if isinstance(device, str) else device for device in devices]
        self.aperture = tuple(aperture)
        self.reserved = tuple(tuple(region) for region in reserved)
        self.pgsizes = pgsizes
        self.emulated = emulated
        self.coherent = coherent
        self.msi_isolated = msi_isolated
        self.nestable = nestable

    def __repr__(self):
        kind = "emulated" if self.emulated else f"aperture {self.aperture[0]:#x}-{self.aperture[1]:#x}"
        return f"SoftwareGroup({self.number}, {[device.address for device in self.devices]}, {kind})"


class _Container:
    """An open container: its groups and, once SET_IOMMU was done, its Type1 instance."""

    def __init__(self, vfio):
        self.vfio = vfio
        self.groups = []
        self.type1 = None
        self.entry_limit = vfio.dma_entry_limit     # the driver reads it when it is opened; kept for messages
        self.fd_open = True

    def ioctl(self, request, arg):
        if request == abi.VFIO_GET_API_VERSION:
            return 0
        type1 = self.type1
        if request == abi.VFIO_SET_IOMMU:
            return self.set_iommu(arg)
        if type1 is not None:
            return type1.ioctl(request, arg)
        if request == abi.VFIO_CHECK_EXTENSION:
            return extension(self.vfio.kernel, arg)
        raise error(errno.EINVAL, "container_ioctl", hint="no IOMMU driver is set: attach a group, then SET_IOMMU")

    def set_iommu(self, kind):
        version = VERSIONS[self.vfio.kernel]
        with self.vfio._lock:
            if not self.groups or self.type1 is not None:
                raise error(errno.EINVAL, "set_iommu", hint="needs a group in the container, and can be done once")
            if kind == abi.VFIO_TYPE1_NESTING_IOMMU and version <= VERSIONS["6.12"]:
                if any(not group.iommu.emulated and not group.iommu.nestable for group in self.groups):
                    raise error(errno.EINVAL, "set_iommu", hint="this IOMMU can't nest")
            elif kind == abi.VFIO_UNMAP_ALL and version >= VERSIONS["5.12"] or kind == abi.VFIO_UPDATE_VADDR and version == VERSIONS["5.12"]:
                raise error(errno.EINVAL, "set_iommu", hint="an extension, not an IOMMU type")
            elif kind not in (abi.VFIO_TYPE1_IOMMU, abi.VFIO_TYPE1v2_IOMMU):
                raise error(errno.ENODEV, "set_iommu", hint="types are 1 (Type1) and 3 (Type1v2)")
            type1 = Type1(self.vfio.kernel, kind != abi.VFIO_TYPE1_IOMMU, self.vfio.dma_entry_limit, self.vfio._memlock_limit)
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


class _Group:
    """A group while it exists; it stays in its container as long as it or one of its devices is open."""

    def __init__(self, vfio, config):
        self.vfio = vfio
        self.config = config
        self.container = None
        self.fd_open = False
        self.open_devices = {}          # address -> number of descriptors
        self.ports = {}
        self.renew_iommu()

    def renew_iommu(self):
        config = self.config
        if config.emulated:
            self.iommu = IommuGroup(config.number, (0, 0), (), 0, True, True, True, True)
        else:
            self.iommu = IommuGroup(config.number, config.aperture, config.reserved, config.pgsizes, False, config.coherent,
                                    config.msi_isolated, config.nestable)

    @property
    def in_use(self):
        return self.fd_open or bool(self.open_devices)

    def ioctl(self, request, arg):
        with self.vfio._lock:
            if request == abi.VFIO_GROUP_GET_STATUS:
                return self.get_status(arg)
            if request == abi.VFIO_GROUP_SET_CONTAINER:
                return self.set_container(struct.unpack("i", read_memory(arg, 4))[0])
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
        if not isinstance(container, _Container):
            raise error(errno.EINVAL if VERSIONS[self.vfio.kernel] <= VERSIONS["6.1"] else errno.EBADFD, "group_set_container",
                        hint=f"descriptor {fd} is not a container")
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
        if self.container is None or self.container.type1 is None:
            raise error(errno.EINVAL, "group_get_device_fd", hint="the group needs a container with an IOMMU set")
        if address not in self.ports:
            port = DmaPort(self.container.type1, self.iommu, address)
            if self.iommu.emulated and hasattr(device, "dma_unmap"):
                self.container.type1.add_unmap_listener(device.dma_unmap)
            device.connect(port)
            self.ports[address] = port
        fd = self.vfio._new_fd(_DeviceFile(self, device))
        self.open_devices[address] = self.open_devices.get(address, 0) + 1
        return fd

    def close_device(self, device):
        self.open_devices[device.address] -= 1
        if self.open_devices[device.address]:
            return
        del self.open_devices[device.address]
        device.disconnect()
        self.ports.pop(device.address).disconnect()
        if self.iommu.emulated and hasattr(device, "dma_unmap"):
            self.container.type1.remove_unmap_listener(device.dma_unmap)
        self.leave_if_unused()

    def leave_if_unused(self):
        if not self.in_use and self.container is not None:
            self.container.remove(self)


class _DeviceFile:
    """One descriptor of a device."""

    def __init__(self, group, device):
        self.group = group
        self.device = device

    def ioctl(self, request, arg):
        return device_ioctl(self.device, request, arg)


class SoftwareVfio:
    """VFIO in this process, as a C program sees it.

    Parameters
    ----------
    kernel : {"5.4", "5.12", "6.1", "6.12", "7.2"}
        Whose behaviour to reproduce.
    groups : sequence of SoftwareGroup, optional
        What stands in /dev/vfio; by default group 0 with the plain device 0000:00:10.0.
    dma_entry_limit : int
        Mappings a container may hold (module parameter of vfio_iommu_type1).  Writable; counts for containers set up later.
    memlock_limit : "process", None or int
        Limit of locked memory: the process's RLIMIT_MEMLOCK, as the kernel does; none; or a number of bytes.  Nothing is really
        locked, so None is safe where the limit itself is not of interest.

    Notes
    -----
    Thread-safe.  Descriptors are real numbers, closed with ``close`` of this object.  An object with nothing open may be used
    in a forked child; what was opened before a fork fails there with ForkedError (EBADF).
    """

    def __init__(self, kernel="7.2", groups=None, *, dma_entry_limit=65535, memlock_limit="process"):
        if kernel not in VERSIONS:
            raise ValueError(f"kernel is one of {', '.join(VERSIONS)}, not {kernel!r}")
        groups = [SoftwareGroup(0, ["0000:00:10.0"])] if groups is None else list(groups)
        if len({group.number for group in groups}) != len(groups):
            raise ValueError("two groups have the same number")
        self.kernel = kernel
        self.dma_entry_limit = dma_entry_limit
        self._memlock_limit = {"process": _MEMLOCK_PROCESS, None: _MEMLOCK_UNLIMITED}.get(memlock_limit, memlock_limit)
        if not isinstance(self._memlock_limit, int) or self._memlock_limit < _MEMLOCK_UNLIMITED:
            raise ValueError('memlock_limit is "process", None or a number of bytes')
        self._lock = threading.RLock()
        self._groups = {group.number: _Group(self, group) for group in groups}
        self._files = {}
        self._generation = generation()

    @property
    def dma_entry_limit(self):
        """Mappings that a container set up from now on may hold."""
        return self._dma_entry_limit

    @dma_entry_limit.setter
    def dma_entry_limit(self, value):
        if not isinstance(value, int) or not 0 <= value < 1 << 32:
            raise ValueError("dma_entry_limit is a number below 2**32")
        self._dma_entry_limit = value

    # ---- descriptors

    def _check_process(self, operation):
        if self._generation != generation():
            if self._files:
                raise ForkedError(errno.EBADF, "opened before a fork", operation=operation,
                                  hint="a forked child makes its own SoftwareVfio, or forks before anything is open")
            self._lock = threading.RLock()
            self._generation = generation()

    def _file(self, fd, operation):
        self._check_process(operation)
        try:
            return self._files[fd]
        except (KeyError, TypeError):
            raise error(errno.EBADF, operation, hint=f"{fd!r} is not an open descriptor of this object") from None

    def _new_fd(self, file):
        # A descriptor that does nothing: read and write are EINVAL, mmap ENODEV, lseek ESPIPE, as on a container.
        fd = os.pidfd_open(os.getpid())
        self._files[fd] = file
        return fd

    def open(self, path):
        """Open /dev/vfio/vfio or /dev/vfio/<group>; return a descriptor.

        Raises
        ------
        VfioError
            ENOENT for any other path, EBUSY for a group that is open (a device descriptor keeps it open).
        """
        self._check_process("open")
        path = os.fspath(path)
        with self._lock:
            if path == "/dev/vfio/vfio":
                return self._new_fd(_Container(self))
            folder, _, name = path.rpartition("/")
            group = self._groups.get(int(name)) if folder == "/dev/vfio" and name.isascii() and name.isdigit() else None
            if group is None or str(group.config.number) != name:
                raise VfioError(errno.ENOENT, operation="open", hint=f"{path}: there is /dev/vfio/vfio and "
                                f"/dev/vfio/ with {', '.join(map(str, self._groups)) or 'no group'}")
            if group.in_use:
                raise error(errno.EBUSY, "open", hint=f"group {name} is open")
            fd = self._new_fd(group)
            group.fd_open = True
            return fd

    def ioctl(self, fd, request, arg=0):
        """Do ioctl(2) on one of the descriptors.

        Parameters
        ----------
        fd, request : int
        arg : int
            What ioctl(2) would get: a value, or an address in this process, read and written with fault checking.

        Returns
        -------
        int

        Raises
        ------
        VfioError
            An OSError with the kernel's errno.
        """
        return self._file(fd, "ioctl").ioctl(request & 0xFFFFFFFF, arg & 0xFFFFFFFFFFFFFFFF)

    def pread(self, fd, size, offset):
        """Read a device's registers; the offset comes from DEVICE_GET_REGION_INFO."""
        file = self._file(fd, "pread")
        if not isinstance(file, _DeviceFile):
            raise error(errno.EINVAL, "pread", hint="only a device can be read")
        return device_pread(file.device, size, offset)

    def pwrite(self, fd, data, offset):
        """Write a device's registers; return the bytes written."""
        file = self._file(fd, "pwrite")
        if not isinstance(file, _DeviceFile):
            raise error(errno.EINVAL, "pwrite", hint="only a device can be written")
        return device_pwrite(file.device, bytes(data), offset)

    def close(self, fd):
        """Close a descriptor.  A container lives on while groups are in it, a group while one of its devices is open."""
        with self._lock:
            file = self._file(fd, "close")
            del self._files[fd]
            os.close(fd)
            if isinstance(file, _DeviceFile):
                file.group.close_device(file.device)
            else:
                file.fd_open = False
                if isinstance(file, _Group):
                    file.leave_if_unused()

    def locked_pages(self):
        """Pages that count against the process's limit: its VmLck plus what software containers have charged to it."""
        return locked_pages()

    # ---- the typed door

    def container(self, *, iommu_type=abi.VFIO_TYPE1v2_IOMMU, groups=None):
        """Open a container with groups (None: all of them) and their devices; return a SoftwareContainer."""
        return SoftwareContainer(self, iommu_type, sorted(self._groups) if groups is None else groups)


class SoftwareContainer:
    """A container of the software VFIO with everything set up: the backend of an IoAddressSpace.

    Satisfies Backend, SupportsMapMany, SupportsVaddrUpdate, SupportsDirtyTracking, SupportsDma and HasDirtySources; its methods
    are those of the Type1 instance itself.
    """

    def __init__(self, vfio, iommu_type, groups):
        self.vfio = vfio
        self._fds = []
        self._container = None
        try:
            container_fd = self._open("/dev/vfio/vfio")
            self._container = vfio._files[container_fd]
            self._groups = [vfio._files[self._open(f"/dev/vfio/{number}")] for number in groups]
            for group in self._groups:
                group.set_container(container_fd)
            self._container.set_iommu(iommu_type)
            for group in self._groups:
                for device in group.config.devices:
                    self._fds.append(group.get_device_fd(device.address))
        except BaseException:
            self.close()
            raise
        type1 = self.type1 = self._container.type1
        for name in ("map_dma", "map_many", "unmap_dma", "unmap_all", "invalidate_vaddr", "update_vaddr", "update_vaddr_many",
                     "start_dirty", "read_dirty", "stop_dirty", "dma_read", "dma_write", "iova_ranges"):
            setattr(self, name, getattr(type1, name))

    def _open(self, path):
        self._fds.append(self.vfio.open(path))
        return self._fds[-1]

    def capabilities(self):
        """Return what the container can do now; see Capabilities."""
        type1 = self.type1
        features = {"map_many", "dma"}
        if VERSIONS[type1.kernel] >= VERSIONS["5.12"]:
            features.add("unmap_all")
            if type1.v2:
                features.add("dirty")
            if not type1.has_emulated:
                features.add("vaddr")
        return Capabilities("software", type1.pgsizes, frozenset(features), type1.dma_avail, type1.entry_limit, _MAX_DIRTY_BITMAP)

    @property
    def ports(self):
        """The DMA ports of the devices, by address."""
        return {address: port for group in self._groups for address, port in group.ports.items()}

    def dirty_sources(self):
        """Return the most exact source of each device: its own DMA log, or the container's bitmap for emulated ones."""
        sources = [PortSource(port) for group in self._groups if not group.iommu.emulated for port in group.ports.values()]
        if self.type1.has_emulated:
            sources.append(ContainerSource(self.type1))
        return sources

    @property
    def faults(self):
        """The recorded DMA faults of all devices, as DmaFault."""
        return [fault for port in self.ports.values() for fault in port.faults]

    def close(self):
        """Close devices, groups and the container; every mapping goes.  Idempotent."""
        while self._fds:
            fd = self._fds.pop()
            try:
                self.vfio.close(fd)
            except ForkedError:
                pass                # the child of a fork has nothing to close: the parent does

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class PortSource:
    """A device's own DMA log as a DirtySource: exact, page by page."""

    def __init__(self, port):
        self.port = port
        self.name = f"DMA log of {port.device}"

    def start(self, ranges, pgsize):
        """Start the log; neighbouring ranges are joined first, as devices take few."""
        self.port.start_logging(_joined(ranges), pgsize)

    def harvest(self, iova, size, into):
        """OR the pages written since the last harvest into ``into``."""
        return self.port.harvest(iova, size, into)

    def stop(self):
        """Stop the log."""
        self.port.stop_logging()


def _joined(ranges, most=256):
    """Join touching ranges, then the closest ones, until at most ``most`` are left."""
    joined = []
    for iova, size in sorted(ranges):
        if joined and joined[-1][0] + joined[-1][1] == iova:
            joined[-1][1] += size
        else:
            joined.append([iova, size])
    if len(joined) > most:
        gaps = sorted(range(1, len(joined)), key=lambda i: joined[i][0] - joined[i - 1][0] - joined[i - 1][1])
        for i in sorted(gaps[:len(joined) - most], reverse=True):
            joined[i - 1][1] = joined[i][0] + joined[i][1] - joined[i - 1][0]
            del joined[i]
    return [tuple(item) for item in joined]


class ContainerSource:
    """The container's bitmap as a DirtySource: exact for emulated devices."""

    name = "container bitmap"

    def __init__(self, type1):
        self.type1 = type1

    def start(self, ranges, pgsize):
        """Start tracking; the bitmap's page size is the container's smallest."""
        smallest = self.type1.pgsizes & -self.type1.pgsizes
        if pgsize != smallest:
            raise error(errno.EINVAL, "start_dirty", hint=f"the container tracks pages of {smallest} bytes")
        self.type1.start_dirty()

    def harvest(self, iova, size, into):
        """OR the pages written since the last harvest into ``into``."""
        import numpy
        smallest = self.type1.pgsizes & -self.type1.pgsizes
        words = numpy.zeros((size // smallest + 63) // 64, numpy.uint64)
        self.type1.read_dirty(iova, size, words)
        view = numpy.frombuffer(into, numpy.uint64, len(words))
        view |= words
        return int(numpy.bitwise_count(words).sum())

    def stop(self):
        """Stop tracking."""
        self.type1.stop_dirty()


def open(*, groups=None, iommu_type=abi.VFIO_TYPE1v2_IOMMU, **options):
    """Make a SoftwareVfio and open a container with all of its groups; options are those of SoftwareVfio."""
    return SoftwareVfio(groups=groups, **options).container(iommu_type=iommu_type)
