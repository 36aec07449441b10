"""Interrupts of devices that are not on PCI: each index has one, which can only be triggered."""
import errno
import struct
from typing import TYPE_CHECKING

from ...._core.errno import error
from ...._core.memory import read_memory, write_memory
from ....uapi import vfio as abi
from .arguments import Eventfd, read_struct

if TYPE_CHECKING:
    from .state import DeviceState

_NONE, _BOOL, _EVENTFD = abi.VFIO_IRQ_SET_DATA_NONE, abi.VFIO_IRQ_SET_DATA_BOOL, abi.VFIO_IRQ_SET_DATA_EVENTFD
_CHANNEL = abi.VFIO_DEVICE_FLAGS_CCW | abi.VFIO_DEVICE_FLAGS_AP
_KNOWN = abi.VFIO_IRQ_SET_DATA_TYPE_MASK | abi.VFIO_IRQ_SET_ACTION_TYPE_MASK
_SIZES = {_NONE: 0, _BOOL: 1, _EVENTFD: 4}
_HEAD = struct.Struct("=IIIII")


def get_irq_info(state: "DeviceState", arg: int) -> int:
    """Answer GET_IRQ_INFO."""
    layout = abi.vfio_irq_info
    values = read_struct(layout, layout.size, arg, "device_get_irq_info")
    if values["index"] >= state.irq_indexes:
        raise error(errno.EINVAL, "device_get_irq_info", hint=f"the device has {state.irq_indexes} interrupt indexes")
    write_memory(arg, layout.pack(**values | {"flags": abi.VFIO_IRQ_INFO_EVENTFD, "count": 1}))
    return 0


def set_irqs(state: "DeviceState", arg: int) -> int:
    """Do SET_IRQS; every refusal but that of a bad eventfd is EINVAL.

    With no data and count 0 most buses switch off; channel I/O and adapters signal, whatever the count is.
    """
    argsz, flags, index, start, count = _HEAD.unpack(read_memory(arg, _HEAD.size))
    kind, action = flags & abi.VFIO_IRQ_SET_DATA_TYPE_MASK, flags & abi.VFIO_IRQ_SET_ACTION_TYPE_MASK
    size = _SIZES.get(kind, 0)
    if argsz < _HEAD.size + size * count or index >= state.irq_indexes or start or count > 1 or flags & ~_KNOWN \
            or kind not in _SIZES or action != abi.VFIO_IRQ_SET_ACTION_TRIGGER or (size and not count):
        raise error(errno.EINVAL, "device_set_irqs", hint="one interrupt an index, one kind of data, only TRIGGER")
    value = int.from_bytes(read_memory(arg + _HEAD.size, size), "little", signed=size == 4) if size else 1
    with state.lock:
        old = state.simple_irqs.get(index)
        if not count and not state.bus & _CHANNEL:      # with no data: switched off
            state.simple_irqs.pop(index, None)
            if old is not None:
                old.close()
            return 0
        if kind != _EVENTFD:
            if value and old is not None:
                old.signal()
            return 0
        if value < -1:
            raise error(errno.EINVAL, "device_set_irqs", hint="-1 takes the eventfd away")
        if value >= 0:
            state.simple_irqs[index] = Eventfd(value, "device_set_irqs")
        else:
            state.simple_irqs.pop(index, None)
        if old is not None:
            old.close()
    return 0


class SimpleSink:
    """What such a device raises its interrupts with."""

    def __init__(self, state: "DeviceState") -> None:
        self._state = state

    def enabled(self, index: int) -> int:
        """Return whether an index has an eventfd."""
        return int(index in self._state.simple_irqs)

    def trigger(self, index: int, vector: int = 0) -> None:
        """Raise an interrupt."""
        with self._state.lock:
            eventfd = self._state.simple_irqs.get(index)
            if eventfd is not None:
                eventfd.signal()

    def lower(self) -> None:
        """There are no levels."""
