"""VFIO_DEVICE_GET_REGION_INFO, and the registers themselves: pread, pwrite, mmap."""
import errno
import struct
from typing import TYPE_CHECKING, Any

from ...._core.errno import error
from ...._core.memory import write_memory
from ....uapi import vfio as abi
from .arguments import chain, read_struct

if TYPE_CHECKING:
    from .state import DeviceState

_ROM, _CONFIG, _VGA = abi.VFIO_PCI_ROM_REGION_INDEX, abi.VFIO_PCI_CONFIG_REGION_INDEX, abi.VFIO_PCI_VGA_REGION_INDEX
_STANDARD = abi.VFIO_PCI_NUM_REGIONS
_READ, _WRITE, _MMAP = abi.VFIO_REGION_INFO_FLAG_READ, abi.VFIO_REGION_INFO_FLAG_WRITE, abi.VFIO_REGION_INFO_FLAG_MMAP
OFFSET_SHIFT = 40               # a region's place in the descriptor's file is its index << 40
_PAGE = 4096
_COMMAND, _MEMORY_ENABLED, _INTX_DISABLED = 4, 2, 1 << 10
_PROT_WRITE = 2


# ---- GET_REGION_INFO

def _flags(state: "DeviceState", index: int) -> int:
    if not state.device.region_size(index):
        return 0
    if hasattr(state.device, "region_flags"):
        return state.device.region_flags(index)
    return _READ if index == _ROM and state.on_pci else _READ | _WRITE


def _exists(state: "DeviceState", index: int) -> bool:
    return index < state.region_count and (
        index != _VGA or not state.on_pci or bool(state.device.region_size(_VGA)))


def get_region_info(state: "DeviceState", arg: int) -> int:
    """Answer GET_REGION_INFO; capabilities come from the device's ``region_caps`` and its MSI-X table."""
    layout = abi.vfio_region_info
    values = read_struct(layout, layout.size, arg, "device_get_region_info")
    index = values["index"]
    if not _exists(state, index):
        raise error(errno.EINVAL, "device_get_region_info", hint=f"region {index} does not exist")
    flags = _flags(state, index)
    capabilities = list(state.device.region_caps(index)) if hasattr(state.device, "region_caps") else []
    if flags & _MMAP and state.msix_table and index == state.msix_table[0]:
        capabilities.append((abi.VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, 1, b""))
    values |= {"flags": flags, "size": state.device.region_size(index), "offset": index << OFFSET_SHIFT}
    if packed := chain(layout.size, capabilities):      # without any, cap_offset stays as the caller had it
        values["flags"] |= abi.VFIO_REGION_INFO_FLAG_CAPS
        values["cap_offset"] = 0
        if values["argsz"] < layout.size + len(packed):
            values["argsz"] = layout.size + len(packed)
        else:
            write_memory(arg + layout.size, packed)
            values["cap_offset"] = layout.size
    write_memory(arg, layout.pack(**values))
    return 0


def type_capability(kind: int, subtype: int) -> tuple[int, int, bytes]:
    """Return what ``region_caps`` of a device-specific region begins with."""
    return abi.VFIO_REGION_INFO_CAP_TYPE, 1, struct.pack("=II", kind, subtype)


def sparse_capability(areas: list[tuple[int, int]]) -> tuple[int, int, bytes]:
    """Return the capability that says which (offset, size) of a region may be mapped."""
    data = struct.pack("=II", len(areas), 0) + b"".join(struct.pack("=QQ", *area) for area in areas)
    return abi.VFIO_REGION_INFO_CAP_SPARSE_MMAP, 1, data


# ---- access

def _place(state: "DeviceState", offset: int, size: int, write: bool) -> tuple[int, int, int]:
    """Split a file offset into region, offset in it and size, cut at the region's end."""
    index, at = offset >> OFFSET_SHIFT, offset & ((1 << OFFSET_SHIFT) - 1)
    if offset < 0 or not _exists(state, index) or write and index == _ROM and state.on_pci:
        raise error(errno.EINVAL, "device_access", size=size, hint=f"file offset {offset:#x} is in no region")
    end = state.device.region_size(index)
    if index == _CONFIG and state.on_pci:
        if at + size > end:
            raise error(errno.EFAULT, "device_access", size=size, hint=f"the configuration space has {end} bytes")
    elif at >= end:
        raise error(errno.EINVAL, "device_access", size=size, hint=f"file offset {offset:#x} is in no region")
    elif (index >= _STANDARD or not state.on_pci) and not _flags(state, index) & (_WRITE if write else _READ):
        raise error(errno.EINVAL, "device_access", size=size,
                    hint=f"region {index} can not be {'written' if write else 'read'}")
    elif state.on_pci and index < _ROM and not _memory_enabled(state):
        raise error(errno.EIO, "device_access", size=size, hint="memory access is off in the command register")
    return index, at, min(size, end - at)


def _sparse_areas(state: "DeviceState", index: int) -> list[tuple[int, int]] | None:
    """Return (offset, size) of what can be mapped of a region, None where that is all of it."""
    for number, _, data in state.device.region_caps(index) if hasattr(state.device, "region_caps") else ():
        if number == abi.VFIO_REGION_INFO_CAP_SPARSE_MMAP:
            return list(struct.iter_unpack("=QQ", data[8:]))
    return None


def _memory_enabled(state: "DeviceState") -> bool:
    device = state.device
    if device.region_size(_CONFIG) < 64:
        return True                         # a device without a configuration space has no such switch
    return bool(device.region_read(_CONFIG, _COMMAND, 1)[0] & _MEMORY_ENABLED) or not state.has_command


def _pieces(state: "DeviceState", index: int, at: int, size: int):
    """Cut an access to a BAR into those that the kernel does; yields (offset, width, whether it is the MSI-X table)."""
    table = state.msix_table if state.msix_table and state.msix_table[0] == index else (index, 0, 0)
    low, high = table[1], table[1] + table[2]
    widest, end = (8 if state.wide_access else 4), at + size
    while at < end:
        if low <= at < high:
            width = min(end, high) - at
            yield at, width, True
        else:
            room = (min(end, low) if at < low else end) - at
            width = next(width for width in (8, 4, 2, 1) if width <= min(room, widest) and at % width == 0)
            yield at, width, False
        at += width


def pread(state: "DeviceState", size: int, offset: int) -> bytes:
    """Read registers at a file offset; short at the end of a BAR."""
    if size < 0:
        raise error(errno.EINVAL, "device_pread", size=size, hint="a negative size")
    if not size:
        return b""
    index, at, size = _place(state, offset, size, False)
    read = state.device.region_read
    if index > _ROM - 1 or not state.on_pci:
        return read(index, at, size)
    return b"".join(b"\xff" * width if table else read(index, place, width)
                    for place, width, table in _pieces(state, index, at, size))


def pwrite(state: "DeviceState", data: bytes, offset: int) -> int:
    """Write registers at a file offset; return the bytes written."""
    if not data:
        return 0
    index, at, size = _place(state, offset, len(data), True)
    write = state.device.region_write
    if index > _ROM - 1 or not state.on_pci:
        write(index, at, data[:size])
        if state.on_pci and index == _CONFIG and at < _COMMAND + 2 and at + size > _COMMAND:
            command = int.from_bytes(state.device.region_read(_CONFIG, _COMMAND, 2), "little")
            state.irqs.disable_intx(bool(command & _INTX_DISABLED))
        return size
    for place, width, table in _pieces(state, index, at, size):
        if not table:
            write(index, place, data[place - at:place - at + width])
    return size


def mmap(state: "DeviceState", size: int, offset: int, prot: int) -> memoryview:
    """Map registers: a view of the device's own memory."""
    index, at = offset >> OFFSET_SHIFT, offset & ((1 << OFFSET_SHIFT) - 1)
    if size <= 0 or offset < 0 or offset % _PAGE or not _exists(state, index) \
            or (state.on_pci and index in (_ROM, _CONFIG, _VGA)) or not _flags(state, index) & _MMAP:
        raise error(errno.EINVAL, "device_mmap", size=size, hint=f"nothing at file offset {offset:#x} can be mapped")
    length = -(-state.device.region_size(index) // _PAGE) * _PAGE
    if at + -(-size // _PAGE) * _PAGE > length:
        raise error(errno.EINVAL, "device_mmap", size=size, hint=f"region {index} has {length:#x} bytes")
    areas = _sparse_areas(state, index)
    if areas is not None and not any(start <= at and at + size <= start + length for start, length in areas):
        raise error(errno.EINVAL, "device_mmap", size=size, hint=f"only areas of region {index} can be mapped: {areas}")
    device: Any = state.device
    view = memoryview(device.region_mmap(index, at, size)).cast("B")
    return view if prot & _PROT_WRITE else view.toreadonly()
