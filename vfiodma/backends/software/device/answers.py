"""What a call on a device's descriptor comes to: the table of ioctls."""
import errno
from collections.abc import Callable
from typing import Any

from ...._core.errno import error
from ....uapi import vfio as abi
from . import regions, simple_irqs
from .features import device_feature
from .gfx import get_dmabuf, query_plane
from .info import get_info
from .irqs import get_irq_info, set_irqs
from .regions import get_region_info
from .reset import get_hot_reset_info, hot_reset, reset

_TABLE = {
    abi.VFIO_DEVICE_GET_INFO: get_info,
    abi.VFIO_DEVICE_GET_REGION_INFO: get_region_info,
    abi.VFIO_DEVICE_GET_IRQ_INFO: get_irq_info,
    abi.VFIO_DEVICE_SET_IRQS: set_irqs,
    abi.VFIO_DEVICE_IOEVENTFD: lambda state, arg: state.ioeventfds.ioctl(arg),
    abi.VFIO_DEVICE_QUERY_GFX_PLANE: query_plane,
    abi.VFIO_DEVICE_GET_GFX_DMABUF: get_dmabuf,
}
_TABLE_NOT_PCI: dict[int, Callable[[Any, int], int]] = {
    abi.VFIO_DEVICE_GET_INFO: get_info,
    abi.VFIO_DEVICE_GET_REGION_INFO: get_region_info,
    abi.VFIO_DEVICE_GET_IRQ_INFO: simple_irqs.get_irq_info,
    abi.VFIO_DEVICE_SET_IRQS: simple_irqs.set_irqs,
    abi.VFIO_DEVICE_RESET: lambda state, arg: reset(state),
}


def device_ioctl(file: Any, request: int, arg: int) -> int:
    """Do an ioctl on a device's descriptor.

    Parameters
    ----------
    file : DeviceFile
        The open descriptor: ``state`` of its device, ``iommufd`` where it is a node that is bound to one.

    Raises
    ------
    VfioError
        With the errno of vfio-pci; ENOTTY for what does not exist.

    Notes
    -----
    Source: the vfio-pci rules for every request.
    """
    state = file.state
    state.wake()
    if not state.on_pci:
        if request not in _TABLE_NOT_PCI:
            raise error(errno.ENOTTY, "device_ioctl", hint=f"request {request:#x} of a device that is not on PCI")
        return _TABLE_NOT_PCI[request](state, arg)
    if request in _TABLE:
        return _TABLE[request](state, arg)
    if request == abi.VFIO_DEVICE_RESET:
        return reset(state)
    if request == abi.VFIO_DEVICE_FEATURE and state.at_least("5.12"):
        return device_feature(state, arg)
    if request == abi.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO:
        return get_hot_reset_info(state, arg, file.iommufd)
    if request == abi.VFIO_DEVICE_PCI_HOT_RESET:
        return hot_reset(state, arg, file.iommufd)
    raise error(errno.ENOTTY, "device_ioctl", hint=f"request {request:#x}")


def device_pread(file: Any, size: int, offset: int) -> bytes:
    """Read registers at a file offset; short at the end of a BAR."""
    file.state.wake()
    return regions.pread(file.state, size, offset)


def device_pwrite(file: Any, data: bytes, offset: int) -> int:
    """Write registers at a file offset; return the bytes written."""
    file.state.wake()
    return regions.pwrite(file.state, data, offset)


def device_mmap(file: Any, size: int, offset: int, prot: int) -> memoryview:
    """Map registers; return a view of the device's memory, readonly without PROT_WRITE."""
    return regions.mmap(file.state, size, offset, prot)
