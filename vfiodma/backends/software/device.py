"""What vfio-pci answers on the descriptor of a software device: information, registers, reset."""
import errno
from typing import Any

from ..._core.errno import error
from ..._core.memory import read_memory, write_memory
from ...protocols import SoftwareDevice
from ...uapi import vfio as abi
from ...uapi.layout import Layout

_REGIONS, _IRQS = abi.VFIO_PCI_NUM_REGIONS, abi.VFIO_PCI_NUM_IRQS
_ROM, _CONFIG, _VGA = abi.VFIO_PCI_ROM_REGION_INDEX, abi.VFIO_PCI_CONFIG_REGION_INDEX, abi.VFIO_PCI_VGA_REGION_INDEX
_OFFSET_SHIFT = 40              # a region's place in the descriptor's file is its index << 40
_INTX_FLAGS = abi.VFIO_IRQ_INFO_EVENTFD | abi.VFIO_IRQ_INFO_MASKABLE | abi.VFIO_IRQ_INFO_AUTOMASKED
_OTHER_FLAGS = abi.VFIO_IRQ_INFO_EVENTFD | abi.VFIO_IRQ_INFO_NORESIZE


class PlainDevice:
    """A PCI function with a configuration space and nothing else: what a bare address in a group stands for."""

    def __init__(self, address):
        self.address = address
        self._config = bytearray(256)

    def connect(self, port):
        self.port = port

    def disconnect(self):
        self.port = None

    def region_size(self, index):
        return len(self._config) if index == _CONFIG else 0

    def region_read(self, index, offset, size):
        return bytes(self._config[offset:offset + size])

    def region_write(self, index, offset, data):
        if offset == 4:         # only the command register keeps what is written
            self._config[4:6] = data[:2].ljust(2, b"\0")

    def irq_count(self, index):
        return 1 if index in (0, 4) else 0

    def reset(self):
        self._config[4:6] = bytes(2)


def _read(layout: Layout, size: int, arg: int, operation: str) -> dict[str, Any]:
    """Read the first `size` bytes of a struct and check its argsz."""
    values = layout.unpack(read_memory(arg, size).ljust(layout.size, b"\0"))
    if values["argsz"] < size:
        raise error(errno.EINVAL, operation, hint=f"argsz must be at least {size}")
    return values


def _get_info(arg):
    values = _read(abi.vfio_device_info, 16, arg, "device_get_info")
    values |= {"flags": abi.VFIO_DEVICE_FLAGS_RESET | abi.VFIO_DEVICE_FLAGS_PCI, "num_regions": _REGIONS,
               "num_irqs": _IRQS, "cap_offset": 0, "pad": 0}
    write_memory(arg, abi.vfio_device_info.pack(**values)[:min(values["argsz"], abi.vfio_device_info.size)])


def _get_region_info(device, arg):
    layout = abi.vfio_region_info
    values = _read(layout, layout.size, arg, "device_get_region_info")
    index = values["index"]
    if index >= _REGIONS or index == _VGA:
        raise error(errno.EINVAL, "device_get_region_info", hint=f"region {index} does not exist")
    size = device.region_size(index)
    flags = abi.VFIO_REGION_INFO_FLAG_READ | (0 if index == _ROM else abi.VFIO_REGION_INFO_FLAG_WRITE)
    values |= {"flags": flags if size else 0, "cap_offset": 0, "size": size, "offset": index << _OFFSET_SHIFT}
    write_memory(arg, layout.pack(**values))


def _get_irq_info(device, arg):
    layout = abi.vfio_irq_info
    values = _read(layout, layout.size, arg, "device_get_irq_info")
    index = values["index"]
    if index >= _IRQS or (index == abi.VFIO_PCI_ERR_IRQ_INDEX and not device.irq_count(index)):
        raise error(errno.EINVAL, "device_get_irq_info", hint=f"interrupt index {index} does not exist")
    values |= {"flags": _OTHER_FLAGS if index else _INTX_FLAGS, "count": device.irq_count(index)}
    write_memory(arg, layout.pack(**values))


def device_ioctl(device: SoftwareDevice, request: int, arg: int) -> int:
    """Do an ioctl on a device's descriptor.

    Raises
    ------
    VfioError
        With the errno of vfio-pci; ENOTTY for what a software device does not have.

    Notes
    -----
    Source: the vfio-pci rules for GET_INFO, GET_REGION_INFO, GET_IRQ_INFO and RESET.
    """
    if request == abi.VFIO_DEVICE_GET_INFO:
        _get_info(arg)
    elif request == abi.VFIO_DEVICE_GET_REGION_INFO:
        _get_region_info(device, arg)
    elif request == abi.VFIO_DEVICE_GET_IRQ_INFO:
        _get_irq_info(device, arg)
    elif request == abi.VFIO_DEVICE_RESET:
        device.reset()
    else:
        raise error(errno.ENOTTY, "device_ioctl", hint=f"request {request:#x}")
    return 0


def _place(device, size, offset):
    """Split a file offset into region, offset in it and size, cut at the region's end."""
    index, at = offset >> _OFFSET_SHIFT, offset & ((1 << _OFFSET_SHIFT) - 1)
    if offset < 0 or index >= _REGIONS or not device.region_size(index) or at >= device.region_size(index):
        raise error(errno.EINVAL, "device_access", size=size, hint=f"file offset {offset:#x} is in no region")
    return index, at, min(size, device.region_size(index) - at)


def device_pread(device: SoftwareDevice, size: int, offset: int) -> bytes:
    """Read registers at a file offset; short at a region's end, EINVAL outside of every region."""
    return device.region_read(*_place(device, size, offset))


def device_pwrite(device: SoftwareDevice, data: bytes, offset: int) -> int:
    """Write registers at a file offset; return the bytes written."""
    index, at, size = _place(device, len(data), offset)
    if index == _ROM:
        raise error(errno.EINVAL, "device_access", size=len(data), hint="the ROM is read-only")
    device.region_write(index, at, bytes(data[:size]))
    return size
