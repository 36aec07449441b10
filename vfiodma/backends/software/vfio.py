"""The raw door: VFIO in this process, as a C program sees it."""
import contextlib
import errno
import os
import threading

from ..._core.errno import error
from ..._core.nesting import PasidSpace
from ..._core.type1 import VERSIONS, generation, locked_pages
from ...errors import ForkedError, VfioError
from ...types import DeviceLocation
from ...uapi import vfio as abi
from .container import SoftwareContainer
from .faults import FaultQueueFile
from .files import ContainerFile, DeviceFile, Group, SpaprContainerFile, need_rawio
from .group import SoftwareGroup
from .iommufd import CdevFile, IommufdFile
from .registered import Registered

_MEMLOCK_PROCESS, _MEMLOCK_UNLIMITED = -1, -2


class SoftwareVfio:
    """VFIO in this process, as a C program sees it.

    Parameters
    ----------
    kernel : {"5.4", "5.12", "6.1", "6.12", "7.2", "vsva"}
        Whose behaviour to reproduce; "vsva" is 5.12 with the series that nests page tables of a guest.
    groups : sequence of SoftwareGroup, optional
        What stands in /dev/vfio; by default group 0 with the plain device 0000:00:10.0.
    dma_entry_limit : int
        Mappings a container may hold (module parameter of vfio_iommu_type1).  Writable; counts for containers opened
        later.
    memlock_limit : "process", None or int
        Limit of locked memory: the process's RLIMIT_MEMLOCK, as the kernel does; none; or a number of bytes.  Nothing
        is really locked, so None is safe where the limit itself is not of interest.
    iommufd : bool, optional
        Whether there is /dev/iommu and, for each device, /dev/vfio/devices/vfioN; by default on "6.12" and "7.2", which
        are the kernels that can have it.
    platform : {"x86", "powernv"}
        Of "powernv" the IOMMU driver is SPAPR TCE, version 1 and 2, and groups have EEH; there is no iommufd.
    noiommu : bool
        Module parameter enable_unsafe_noiommu_mode: there may be groups without an IOMMU.
    vfio_container : {"type1", "iommufd"}
        Who serves /dev/vfio/vfio.  In either case a group takes an iommufd for a container.

    Attributes
    ----------
    pasids : PasidSpace
        The PASIDs that page tables can be bound to; ``allocate`` and ``free`` stand for /dev/ioasid.

    Notes
    -----
    Thread-safe.  Descriptors are real numbers, closed with ``close`` of this object.  An object with nothing open may
    be used in a forked child; what was opened before a fork fails there with ForkedError (EBADF).
    """

    def __init__(self, kernel="7.2", groups=None, *, dma_entry_limit=65535, memlock_limit="process",
                 iommufd=None, vfio_container="type1", platform="x86", noiommu=False):
        if kernel not in VERSIONS:
            raise ValueError(f"kernel is one of {', '.join(VERSIONS)}, not {kernel!r}")
        groups = [SoftwareGroup(0, ["0000:00:10.0"])] if groups is None else list(groups)
        for group in groups:
            if not isinstance(group, SoftwareGroup):
                raise TypeError(f"groups are SoftwareGroup(number, devices), not {group!r}")
        if len({group.number for group in groups}) != len(groups):
            raise ValueError("two groups have the same number")
        if any(group.noiommu for group in groups) and not noiommu:
            raise ValueError("a group without an IOMMU needs noiommu=True")
        self.noiommu = bool(noiommu)
        if platform not in ("x86", "powernv"):
            raise ValueError(f'platform is "x86" or "powernv", not {platform!r}')
        self.platform = platform
        self._registered = Registered()
        can_iommufd = VERSIONS[kernel] >= VERSIONS["6.12"] and platform == "x86"
        self._has_iommufd = can_iommufd if iommufd is None else bool(iommufd)
        if self._has_iommufd and not can_iommufd:
            raise ValueError(f"the model of {kernel} has no iommufd; 6.12 and 7.2 have, on x86")
        if vfio_container not in ("type1", "iommufd") or vfio_container == "iommufd" and not self._has_iommufd:
            raise ValueError('vfio_container is "type1" or, where there is an iommufd, "iommufd"')
        self._container_of_iommufd = vfio_container == "iommufd"
        self.kernel = kernel
        self.dma_entry_limit = dma_entry_limit
        self._memlock_limit = {"process": _MEMLOCK_PROCESS, None: _MEMLOCK_UNLIMITED}.get(memlock_limit, memlock_limit)
        if not isinstance(self._memlock_limit, int) or self._memlock_limit < _MEMLOCK_UNLIMITED:
            raise ValueError('memlock_limit is "process", None or a number of bytes')
        self._memlock_limit = min(self._memlock_limit, (1 << 63) - 1)
        self._lock = threading.RLock()
        self._groups = {group.number: Group(self, group) for group in groups}
        self._files = {}
        self.pasids = PasidSpace(self._pasid_freed)
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
        fd = os.dup(file.event) if hasattr(file, "event") else os.pidfd_open(os.getpid())
        self._files[fd] = file
        return fd

    def _forget_fd(self, fd):
        del self._files[fd]
        os.close(fd)

    def __del__(self):
        # Nobody is left who could close them: containers lead back to this object.
        for fd in getattr(self, "_files", ()):
            with contextlib.suppress(OSError):
                os.close(fd)

    def open(self, path):
        """Open /dev/vfio/vfio, /dev/vfio/<group>, /dev/iommu or /dev/vfio/devices/vfio<N>; return a descriptor.

        Raises
        ------
        VfioError
            ENOENT for any other path, EBUSY for a group that is open (a device descriptor keeps it open) or has a
            device that is bound to an iommufd.
        """
        self._check_process("open")
        path = os.fspath(path)
        with self._lock:
            if path == "/dev/vfio/vfio":
                if self.platform == "powernv":
                    return self._new_fd(SpaprContainerFile(self))
                return self._new_fd(IommufdFile(self, True) if self._container_of_iommufd else ContainerFile(self))
            if self._has_iommufd and path == "/dev/iommu":
                return self._new_fd(IommufdFile(self))
            folder, _, name = path.rpartition("/")
            if folder == "/dev/vfio/devices" and self._has_iommufd:
                return self._open_cdev(name)
            group = next((group for group in self._groups.values() if group.config.node == path), None)
            if group is None or folder != "/dev/vfio":
                raise VfioError(errno.ENOENT, operation="open", hint=f"{path}: there is /dev/vfio/vfio and "
                                f"/dev/vfio/ with {', '.join(map(str, self._groups)) or 'no group'}")
            if group.config.noiommu:
                need_rawio("open")
            if group.in_use or group.cdevs:
                raise error(errno.EBUSY, "open", hint=f"group {name} is open, or a device of it is bound to an iommufd")
            fd = self._new_fd(group)
            group.fd_open = True
            return fd

    def _open_cdev(self, name):
        devices = [(group, device) for group in self._groups.values() for device in group.config.devices]
        for index, (group, device) in enumerate(devices):
            if name == f"vfio{index}":
                return self._new_fd(CdevFile(group, device))
        raise VfioError(errno.ENOENT, operation="open",
                        hint=f"/dev/vfio/devices/{name}: there are {len(devices)} devices")

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
        if not hasattr(file, "pread"):
            raise error(errno.EINVAL, "pread", hint="only a device can be read")
        return file.pread(size, offset)

    def pwrite(self, fd, data, offset):
        """Write a device's registers; return the bytes written."""
        file = self._file(fd, "pwrite")
        if not hasattr(file, "pwrite"):
            raise error(errno.EINVAL, "pwrite", hint="only a device can be written")
        return file.pwrite(bytes(data), offset)

    def mmap(self, fd, size, offset, prot=3):
        """Map a device's registers; return a view of the device's own memory, readonly without PROT_WRITE.

        Raises
        ------
        VfioError
            EINVAL: the region can't be mapped, or not there; ENODEV: no device.
        """
        file = self._file(fd, "mmap")
        if not hasattr(file, "mmap"):
            raise error(errno.ENODEV, "mmap", hint="only a device can be mapped")
        return file.mmap(size, offset, prot)

    def read(self, fd, size):
        """Read migration data (b"" at the end, ENOMSG when a running device has no more for now), or faults."""
        file = self._file(fd, "read")
        if not hasattr(file, "read"):
            raise error(errno.EINVAL, "read", hint="only migration data is read without an offset")
        return file.read(size)

    def write(self, fd, data):
        """Write migration data, or answers to page requests; return the bytes taken."""
        file = self._file(fd, "write")
        if not hasattr(file, "write"):
            raise error(errno.EINVAL, "write", hint="only migration data is written without an offset")
        return file.write(bytes(data))

    def open_fault_queue(self, device_fd, *, page_requests=True, timeout=10.0):
        """Open the fault queue of an open device: faults of its accesses with a PASID, and the pages it asks for.

        Parameters
        ----------
        device_fd : int
            The device's descriptor.
        page_requests : bool
            Whether the device asks for missing pages, waiting for the answer; else such an access is a fault.
        timeout : float
            Seconds that it waits; then the access is a fault.

        Returns
        -------
        int
            A descriptor that polls readable while records wait.  ``read`` of this object takes records (struct
            iommu_fault), ``write`` answers groups of page requests (struct iommu_page_response).

        Raises
        ------
        VfioError
            EBUSY: the device has one; EINVAL: no device's descriptor.
        """
        with self._lock:
            file = self._file(device_fd, "open_fault_queue")
            port = file.group.ports.get(file.device.address) if isinstance(file, DeviceFile) else None
            if port is None:
                raise error(errno.EINVAL, "open_fault_queue", hint="only an open device has faults")
            if port.fault_sink is not None:
                raise error(errno.EBUSY, "open_fault_queue", hint="the device has a fault queue")
            queue = FaultQueueFile(port, page_requests, timeout)
            try:
                return self._new_fd(queue)
            except OSError:
                queue.closed()
                raise

    def _pasid_freed(self, pasid):
        for group in list(self._groups.values()):
            group.drain(pasid)

    def dup(self, fd):
        """Return a further descriptor of the same open file."""
        with self._lock:
            return self._new_fd(self._file(fd, "dup"))

    def close(self, fd):
        """Close a descriptor.  What it stands for is closed with its last duplicate.

        A container lives on while groups are in it, a group while a device of it is open, an iommufd while a group or a
        device uses it.
        """
        with self._lock:
            file = self._file(fd, "close")
            if sum(other is file for other in list(self._files.values())) > 1:     # others come without the lock
                self._forget_fd(fd)
                return
        if isinstance(file, ContainerFile):
            file.descriptor_closed()        # without the lock: an attach may hold it, waiting for a vaddr
        with self._lock:
            file = self._file(fd, "close")
            self._forget_fd(fd)
            file.fd_open = False
            file.closed()

    def locked_pages(self):
        """Pages that count against the process's limit: its VmLck plus what software containers charged to it."""
        return locked_pages()

    def find_device(self, address):
        """Return the DeviceLocation of a device; cdevs are numbered over all devices, group by group.

        Raises
        ------
        NoDeviceError
            ENODEV.
        """
        places = [(group.config, device) for group in self._groups.values() for device in group.config.devices]
        for index, (config, device) in enumerate(places):
            if device.address == address:
                siblings = tuple((other.address, "vfio-pci") for other in config.devices if other is not device)
                cdev = f"/dev/vfio/devices/{'noiommu-' if config.noiommu else ''}vfio{index}"
                return DeviceLocation(address, config.number, config.node, cdev, config.noiommu, "vfio-pci", siblings)
        raise error(errno.ENODEV, "find_device", hint=f"there is no device {address!r}; there are: "
                    + ", ".join(device.address for _, device in places))

    # ---- the typed door

    def container(self, *, iommu_type=abi.VFIO_TYPE1v2_IOMMU, groups=None):
        """Open a container with groups (None: all of them) and their devices; return a SoftwareContainer."""
        return SoftwareContainer(self, iommu_type, sorted(self._groups) if groups is None else groups)
