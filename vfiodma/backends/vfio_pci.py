"""What vfio-pci answers on the descriptor of a software device: information, registers, reset."""
import struct

from .._core.errno import error
from .._core.memory import read_memory, write_memory
from ..protocols import SoftwareDevice

_GET_INFO, _GET_REGION_INFO, _GET_IRQ_INFO, _RESET = 0x3B6B, 0x3B6C, 0x3B6D, 0x3B6F
_REGIONS, _IRQS = 9, 5
_ROM, _CONFIG, _VGA, _ERR_IRQ = 6, 7, 8, 3
_READ, _WRITE = 1, 2
_OFFSET_SHIFT = 40              # a region's place in the descriptor's file is its index << 40
_IRQ_FLAGS = (7, 9, 9, 9, 9)    # EVENTFD with MASKABLE and AUTOMASKED for INTx, with NORESIZE for the others


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


def _head(arg, size, operation):
    """Read the start of a struct and check its argsz."""
    data = read_memory(arg, size)
    if struct.unpack_from("I", data)[0] < size:
        raise error(22, operation, hint=f"argsz must be at least {size}")
    return data


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
    if request == _GET_INFO:
        argsz, = struct.unpack_from("I", _head(arg, 16, "device_get_info"))
        info = struct.pack("IIIIII", argsz, 3, _REGIONS, _IRQS, 0, 0)       # RESET and PCI
        write_memory(arg, info[:min(argsz, 24)])
    elif request == _GET_REGION_INFO:
        argsz, _, index = struct.unpack_from("III", _head(arg, 32, "device_get_region_info"))
        if index >= _REGIONS or index == _VGA:
            raise error(22, "device_get_region_info", hint=f"region {index} does not exist")
        size = device.region_size(index)
        flags = 0 if not size else _READ if index == _ROM else _READ | _WRITE
        write_memory(arg, struct.pack("IIIIQQ", argsz, flags, index, 0, size, index << _OFFSET_SHIFT))
    elif request == _GET_IRQ_INFO:
        argsz, _, index = struct.unpack_from("III", _head(arg, 16, "device_get_irq_info"))
        if index >= _IRQS or (index == _ERR_IRQ and not device.irq_count(index)):
            raise error(22, "device_get_irq_info", hint=f"interrupt index {index} does not exist")
        write_memory(arg, struct.pack("IIII", argsz, _IRQ_FLAGS[index], index, device.irq_count(index)))
    elif request == _RESET:
        device.reset()
    else:
        raise error(25, "device_ioctl", hint=f"request {request:#x}")
    return 0


def _place(device, size, offset):
    """Split a file offset into region, offset in it and size, cut at the region's end."""
    index, at = offset >> _OFFSET_SHIFT, offset & ((1 << _OFFSET_SHIFT) - 1)
    if offset < 0 or index >= _REGIONS or not device.region_size(index) or at >= device.region_size(index):
        raise error(22, "device_access", size=size, hint=f"file offset {offset:#x} is in no region")
    return index, at, min(size, device.region_size(index) - at)


def device_pread(device: SoftwareDevice, size: int, offset: int) -> bytes:
    """Read registers at a file offset; short at a region's end, EINVAL outside of every region."""
    return device.region_read(*_place(device, size, offset))


def device_pwrite(device: SoftwareDevice, data: bytes, offset: int) -> int:
    """Write registers at a file offset; return the bytes written."""
    index, at, size = _place(device, len(data), offset)
    if index == _ROM:
        raise error(22, "device_access", size=len(data), hint="the ROM is read-only")
    device.region_write(index, at, bytes(data[:size]))
    return size
