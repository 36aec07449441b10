"""VFIO_DEVICE_IOEVENTFD: eventfds that write registers."""
import errno
import struct
from typing import TYPE_CHECKING, NamedTuple

from ...._core.errno import error
from ...._core.memory import read_memory
from ....uapi import vfio as abi
from .arguments import Eventfd
from .regions import OFFSET_SHIFT, pwrite

if TYPE_CHECKING:
    from .state import DeviceState

_HEAD = struct.Struct("=IIQQi")
_LIMIT = 1000                       # VFIO_PCI_IOEVENTFD_MAX
_WIDTHS = (abi.VFIO_DEVICE_IOEVENTFD_8, abi.VFIO_DEVICE_IOEVENTFD_16, abi.VFIO_DEVICE_IOEVENTFD_32,
           abi.VFIO_DEVICE_IOEVENTFD_64)        # each flag is the width in bytes
_LAST_BAR = abi.VFIO_PCI_BAR5_REGION_INDEX


class _Key(NamedTuple):
    """What tells one ioeventfd from another."""

    offset: int                     # in the file
    data: int
    width: int


def _invalid(hint: str) -> Exception:
    return error(errno.EINVAL, "device_ioeventfd", hint=hint)


class IoEventfds:
    """The ioeventfds of an open device."""

    def __init__(self, state: "DeviceState") -> None:
        self._state = state
        self._all: dict[_Key, tuple[int, Eventfd]] = {}

    def _check(self, flags: int, offset: int) -> None:
        state, width = self._state, flags
        bar, at = offset >> OFFSET_SHIFT, offset & ((1 << OFFSET_SHIFT) - 1)
        if bar > _LAST_BAR:
            raise _invalid("only in a BAR")
        if at + width > state.device.region_size(bar):
            raise _invalid(f"BAR {bar} has {state.device.region_size(bar):#x} bytes")
        if state.msix_table and bar == state.msix_table[0]:
            _, start, size = state.msix_table
            if at + width > start and at < start + size:
                raise _invalid("not in the MSI-X table")
        if width == 8 and state.at_least("7.2"):
            raise _invalid("8 bytes are not possible on this kernel")

    def ioctl(self, arg: int) -> int:
        """Add an ioeventfd, or remove one (fd -1)."""
        argsz, flags, offset, data, fd = _HEAD.unpack(read_memory(arg, _HEAD.size))
        if argsz < _HEAD.size:
            raise _invalid(f"argsz must be at least {_HEAD.size}")
        if flags not in _WIDTHS or fd < -1:
            raise _invalid("exactly one width, and a descriptor or -1")
        self._check(flags, offset)
        key = _Key(offset, data, flags)
        with self._state.lock:
            if key in self._all:
                if fd >= 0:
                    raise error(errno.EEXIST, "device_ioeventfd", hint="this write has an eventfd")
                self._remove(key)
            elif fd < 0:
                raise error(errno.ENODEV, "device_ioeventfd", hint="there is no such ioeventfd to remove")
            elif len(self._all) >= _LIMIT:
                raise error(errno.ENOSPC, "device_ioeventfd", hint=f"a device has at most {_LIMIT}")
            else:
                eventfd = Eventfd(fd, "device_ioeventfd")
                self._all[key] = self._state.watch.add(eventfd.fd, lambda: self._write(key)), eventfd
        return 0

    def _write(self, key: _Key) -> None:
        try:
            pwrite(self._state, (key.data & (1 << 8 * key.width) - 1).to_bytes(key.width, "little"), key.offset)
        except OSError:
            pass                    # memory access is off: the kernel drops the write too

    def _remove(self, key: _Key) -> None:
        number, eventfd = self._all.pop(key)
        self._state.watch.remove(number, wait=True)
        eventfd.close()

    def close(self) -> None:
        """Remove all."""
        with self._state.lock:
            for key in list(self._all):
                self._remove(key)
