"""The running kernel as a VfioSystem: system calls, and sysfs to find devices."""
import errno
import mmap
import os
from typing import Any

from ._core.errno import error
from ._core.kernel import Descriptor
from .errors import NoDeviceError, VfioError
from .hostinfo import device_location, holds_group, is_vfio
from .types import DeviceLocation, Prot

_MODULES = {"/dev/vfio/vfio": "vfio-pci (and vfio_iommu_type1)",
            "/dev/iommu": "iommufd (the kernel needs CONFIG_IOMMUFD)"}


def _hint(path: str, code: int) -> str:
    """Say what to do about a node that can't be opened."""
    if code in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        if path in _MODULES:
            return f"{path} is missing: modprobe {_MODULES[path]}"
        return f"{path} is missing: bind the group's devices to vfio-pci (driverctl set-override ADDRESS vfio-pci)"
    if code in (errno.EACCES, errno.EPERM):
        return f"{path} is not for this user: chown it, or add a udev rule for it" + (
            "; a no-IOMMU group needs CAP_SYS_RAWIO" if "noiommu" in path else "")
    if code == errno.EBUSY:
        return f"{path} is open already, in this process or another: a group has one user at a time"
    return path


def _typed(exc: OSError, operation: str, hint: str = "") -> VfioError:
    if exc.errno == errno.ENOENT:           # a node, not a mapping
        return NoDeviceError(errno.ENOENT, operation=operation, hint=hint)
    return error(exc.errno or errno.EIO, operation, hint=hint)


class KernelVfio:
    """The VFIO of the running kernel, with the methods of VfioSystem.

    Notes
    -----
    Holds nothing: descriptors belong to the caller.  Every call releases the GIL.  Source: open(2), ioctl(2), pread(2),
    pwrite(2), read(2), write(2), mmap(2).
    """

    #: Typed ioctls need no detour through this object.
    real = True

    def open(self, path: str) -> int:
        """Open a node; O_RDWR | O_CLOEXEC."""
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise _typed(exc, "open", _hint(path, exc.errno or 0)) from None

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """Do ioctl(2); interrupted calls are repeated."""
        return Descriptor(None, fd).ioctl(request, arg)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Read registers."""
        try:
            return os.pread(fd, size, offset)
        except OSError as exc:
            raise _typed(exc, "pread", f"file offset {offset:#x}") from None

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        """Write registers; return the bytes written."""
        try:
            return os.pwrite(fd, data, offset)
        except OSError as exc:
            raise _typed(exc, "pwrite", f"file offset {offset:#x}") from None

    def read(self, fd: int, size: int) -> bytes:
        """Do read(2)."""
        try:
            return os.read(fd, size)
        except OSError as exc:
            raise _typed(exc, "read") from None

    def write(self, fd: int, data: Any) -> int:
        """Do write(2); return the bytes written."""
        try:
            return os.write(fd, data)
        except OSError as exc:
            raise _typed(exc, "write") from None

    def mmap(self, fd: int, size: int, offset: int, prot: int = Prot.RW) -> mmap.mmap:
        """Map registers, shared."""
        try:
            # The bits of Prot are those of PROT_READ and PROT_WRITE.
            return mmap.mmap(fd, size, mmap.MAP_SHARED, int(prot), offset=offset)
        except OSError as exc:
            raise _typed(exc, "mmap", f"file offset {offset:#x}") from None

    def dup(self, fd: int) -> int:
        """Return a further descriptor of the same open file."""
        try:
            return os.dup(fd)
        except OSError as exc:
            raise _typed(exc, "dup") from None

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        try:
            os.close(fd)
        except OSError as exc:
            raise _typed(exc, "close") from None

    def find_device(self, address: str) -> DeviceLocation:
        """Find a PCI device through sysfs."""
        return device_location(address)


def refuse_unbound(location: DeviceLocation, *, noiommu: bool) -> None:
    """Raise where a device can't be opened as it stands, with what to do about it.

    Raises
    ------
    NoDeviceError
        ENODEV: it is not bound to a VFIO driver.
    BusyError
        EBUSY: another device of its group is in a host driver's hands.
    DmaPermissionError
        EPERM: no IOMMU stands in front of it, and ``noiommu`` was not given.
    """
    if location.noiommu and not noiommu:
        raise error(errno.EPERM, "open_device", hint=f"{location.address} is in a no-IOMMU group: it can reach all of "
                    "memory; pass noiommu=True to take that risk")
    if not is_vfio(location.driver):
        now = f"bound to {location.driver}" if location.driver else "not bound to a driver"
        raise error(errno.ENODEV, "open_device", hint=f"{location.address} is {now}: bind it to vfio-pci "
                    f"(driverctl set-override {location.address} vfio-pci)")
    taken = [f"{address} ({driver})" for address, driver in location.siblings if holds_group(driver)]
    if taken:
        raise error(errno.EBUSY, "open_device", hint=f"group {location.group} of {location.address} is not viable: "
                    f"unbind, or bind to vfio-pci, its other devices: {', '.join(taken)}")
