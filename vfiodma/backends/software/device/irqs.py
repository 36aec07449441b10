"""VFIO_DEVICE_GET_IRQ_INFO and SET_IRQS, and the way of a device's interrupts to the eventfds of its user."""
import errno
import struct
import threading
from typing import TYPE_CHECKING, Any

from ...._core.errno import error
from ...._core.memory import read_memory, write_memory
from ....uapi import vfio as abi
from .arguments import Eventfd, read_struct
from .watch import Watch

if TYPE_CHECKING:
    from .state import DeviceState

_INDEXES = abi.VFIO_PCI_NUM_IRQS
_INTX, _MSI, _MSIX = abi.VFIO_PCI_INTX_IRQ_INDEX, abi.VFIO_PCI_MSI_IRQ_INDEX, abi.VFIO_PCI_MSIX_IRQ_INDEX
_ERR, _REQ = abi.VFIO_PCI_ERR_IRQ_INDEX, abi.VFIO_PCI_REQ_IRQ_INDEX
_NONE, _BOOL, _EVENTFD = abi.VFIO_IRQ_SET_DATA_NONE, abi.VFIO_IRQ_SET_DATA_BOOL, abi.VFIO_IRQ_SET_DATA_EVENTFD
_MASK, _UNMASK, _TRIGGER = (abi.VFIO_IRQ_SET_ACTION_MASK, abi.VFIO_IRQ_SET_ACTION_UNMASK,
                            abi.VFIO_IRQ_SET_ACTION_TRIGGER)
_DATA_BITS, _ACTION_BITS = abi.VFIO_IRQ_SET_DATA_TYPE_MASK, abi.VFIO_IRQ_SET_ACTION_TYPE_MASK
_SIZES = {_NONE: 0, _BOOL: 1, _EVENTFD: 4}
_HEAD = struct.Struct("=IIIII")
_MAX = 0xFFFFFFFF

Values = tuple[int, ...] | None     # of DATA_BOOL or DATA_EVENTFD; None with DATA_NONE


def _invalid(hint: str) -> Exception:
    return error(errno.EINVAL, "device_set_irqs", hint=hint)


def get_irq_info(state: "DeviceState", arg: int) -> int:
    """Answer GET_IRQ_INFO."""
    layout = abi.vfio_irq_info
    values = read_struct(layout, layout.size, arg, "device_get_irq_info")
    index, device = values["index"], state.device
    if index >= _INDEXES or (index == _ERR and not device.irq_count(index)):
        raise error(errno.EINVAL, "device_get_irq_info", hint=f"interrupt index {index} does not exist")
    flags = abi.VFIO_IRQ_INFO_EVENTFD
    if index == _INTX:
        flags |= abi.VFIO_IRQ_INFO_MASKABLE | abi.VFIO_IRQ_INFO_AUTOMASKED
    elif index != _MSIX or not state.irqs.dynamic_msix:
        flags |= abi.VFIO_IRQ_INFO_NORESIZE
    write_memory(arg, layout.pack(**values | {"flags": flags, "count": device.irq_count(index)}))
    return 0


def set_irqs(state: "DeviceState", arg: int) -> int:
    """Do SET_IRQS: check the head, copy the data, act."""
    argsz, flags, index, start, count = _HEAD.unpack(read_memory(arg, _HEAD.size))
    if argsz < _HEAD.size or index >= _INDEXES or count >= _MAX - start or flags & ~(_DATA_BITS | _ACTION_BITS):
        raise _invalid("argsz, index, range or flags")
    have = state.device.irq_count(index)
    if start >= have or start + count > have:
        raise _invalid(f"index {index} has {have} interrupts")
    size = _SIZES.get(flags & _DATA_BITS)
    if size is None:
        raise _invalid("exactly one of DATA_NONE, DATA_BOOL, DATA_EVENTFD")
    if argsz - _HEAD.size < count * size:
        raise _invalid(f"argsz has no room for {count} values")
    values: Values = None
    if size:
        data = read_memory(arg + _HEAD.size, count * size)
        values = struct.unpack(f"={count}{'B' if size == 1 else 'i'}", data)
    state.irqs.set(flags & _ACTION_BITS, index, start, count, values, bool(flags & _EVENTFD))
    return 0


class Irqs:
    """The interrupts of an open device.

    A device raises them with ``trigger`` and ``lower`` from any thread, holding any lock of its own.
    """

    def __init__(self, device: Any, watch: Watch, *, dynamic_msix: bool, sparse: bool) -> None:
        self._sparse = sparse               # from 6.4 on: vectors that are not enabled are passed by, not refused
        self.dynamic_msix = dynamic_msix
        self._device = device
        self._watch = watch
        self._lock = threading.RLock()
        self._kind: int | None = None                       # INTX, MSI or MSIX when one of them is enabled
        self._vectors: list[Eventfd | None] = []            # of that kind
        self._single: dict[int, Eventfd | None] = {_ERR: None, _REQ: None}
        self._level = self._masked = self._disabled = False     # of INTx: the line, VFIO's mask, the command register
        self._unmask: tuple[int, Eventfd] | None = None     # an eventfd that unmasks INTx, and its watch
        self._actions = {
            (_INTX, _MASK): self._mask_intx, (_INTX, _UNMASK): self._unmask_intx, (_INTX, _TRIGGER): self._set_intx,
            (_MSI, _TRIGGER): self._set_msi, (_MSIX, _TRIGGER): self._set_msi,
            (_ERR, _TRIGGER): self._set_single, (_REQ, _TRIGGER): self._set_single,
        }

    # ---- for the device

    def enabled(self, index: int) -> int:
        """Return how many vectors of an index the user has enabled."""
        with self._lock:
            if index in self._single:
                return int(self._single[index] is not None)
            return len(self._vectors) if self._kind == index else 0

    def trigger(self, index: int, vector: int = 0) -> None:
        """Raise an interrupt.  INTx is a level: it stays raised until ``lower``, also where nobody listens yet."""
        with self._lock:
            if index == _INTX:
                self._level = True
                self._fire_intx()
            elif index in self._single:
                self._signal(self._single[index])
            elif self._kind == index and vector < len(self._vectors):
                self._signal(self._vectors[vector])

    def lower(self) -> None:
        """Take INTx back."""
        with self._lock:
            self._level = False

    @staticmethod
    def _signal(eventfd: Eventfd | None) -> None:
        if eventfd is not None:
            eventfd.signal()

    # ---- INTx

    def _send_intx(self) -> None:
        if self._kind == _INTX and not self._disabled:
            self._signal(self._vectors[0])

    def _fire_intx(self) -> None:
        """Where the line is up, its handler masks it and signals; without an eventfd there is no handler."""
        if self._kind == _INTX and self._level and not self._masked and self._vectors[0] is not None:
            self._masked = True
            self._send_intx()

    def _do_unmask(self) -> None:
        if self._kind == _INTX and self._masked and not self._disabled:
            self._masked = self._level
            if self._level:
                self._send_intx()

    def _unmask_by_eventfd(self, eventfd: Eventfd) -> None:
        with self._lock:
            if self._unmask is not None and self._unmask[1] is eventfd:
                self._do_unmask()

    def disable_intx(self, disabled: bool) -> None:
        """The command register switches INTx off or on: masked, as if the user had asked for it."""
        with self._lock:
            if disabled == self._disabled:
                return
            self._disabled = disabled
            if disabled:
                self._masked = self._masked or self._kind == _INTX
            else:
                self._do_unmask()

    def _needs_intx(self, start: int, count: int) -> None:
        if self._kind != _INTX or start or count != 1:
            raise _invalid("INTx must be enabled, and has one interrupt")

    def _mask_intx(self, index: int, start: int, count: int, values: Values, eventfds: bool) -> None:
        self._needs_intx(start, count)
        if eventfds:
            raise error(errno.ENOTTY, "device_set_irqs", hint="masking by an eventfd does not exist")
        if values is None or values[0]:
            self._masked = True

    def _unmask_intx(self, index: int, start: int, count: int, values: Values, eventfds: bool) -> None:
        self._needs_intx(start, count)
        if not eventfds:
            if values is None or values[0]:
                self._do_unmask()
            return
        assert values is not None
        if values[0] < 0:
            self._forget_unmask()
            return
        eventfd = Eventfd(values[0], "device_set_irqs")
        if self._unmask is not None:
            eventfd.close()
            raise error(errno.EBUSY, "device_set_irqs", hint="an eventfd for unmasking is set: remove it first (-1)")
        self._unmask = self._watch.add(eventfd.fd, lambda: self._unmask_by_eventfd(eventfd)), eventfd

    def _forget_unmask(self) -> None:
        if self._unmask is not None:
            (number, eventfd), self._unmask = self._unmask, None
            self._watch.remove(number, wait=False)      # a late call finds that it is no longer the one
            eventfd.close()

    def _set_intx(self, index: int, start: int, count: int, values: Values, eventfds: bool) -> None:
        if self._kind == _INTX and not count and values is None:
            self._disable()
            return
        if self._kind not in (_INTX, None) or start or count != 1:
            raise _invalid("INTx has one interrupt, and excludes MSI and MSI-X")
        if not eventfds:
            if self._kind is None:
                raise _invalid("INTx is not enabled")
            if values is None or values[0]:
                self._send_intx()
            return
        assert values is not None
        eventfd = Eventfd(values[0], "device_set_irqs") if values[0] >= 0 else None
        if self._kind is None:
            self._kind, self._vectors, self._masked = _INTX, [None], self._disabled
        self._replace(0, eventfd)
        self._fire_intx()

    # ---- MSI and MSI-X

    def _set_msi(self, index: int, start: int, count: int, values: Values, eventfds: bool) -> None:
        if self._kind == index and not count and values is None:
            self._disable()
            return
        if self._kind not in (index, None):
            raise _invalid(f"interrupts of index {self._kind} are enabled")
        if eventfds:
            assert values is not None
            self._set_vectors(index, start, values)
            return
        if self._kind != index or (start + count > len(self._vectors) and not self._sparse):
            raise _invalid("not enabled, or fewer vectors are")
        for i, eventfd in enumerate(self._vectors[start:start + count]):
            if values is None or values[i]:
                self._signal(eventfd)

    def _set_vectors(self, index: int, start: int, values: tuple[int, ...]) -> None:
        fresh = self._kind is None
        if fresh:
            if start + len(values) == 0:
                raise error(errno.ERANGE, "device_set_irqs", hint="no vectors to enable")
            self._kind, self._vectors = index, [None] * (start + len(values))
        vector = start
        try:
            if not self._sparse and (start >= len(self._vectors) or start + len(values) > len(self._vectors)):
                raise _invalid(f"{len(self._vectors)} vectors are enabled")
            for vector, fd in enumerate(values, start):
                self._set_vector(index, vector, fd)
        except OSError:
            for other in range(start, min(vector, len(self._vectors))):
                self._replace(other, None)
            if fresh:
                self._disable()
            raise

    def _set_vector(self, index: int, vector: int, fd: int) -> None:
        if vector < len(self._vectors):
            self._replace(vector, None)
        if fd < 0:
            return
        if vector >= len(self._vectors):
            if index != _MSIX or not self.dynamic_msix:
                raise _invalid(f"{len(self._vectors)} vectors are enabled")
            self._vectors += [None] * (vector + 1 - len(self._vectors))
        self._replace(vector, Eventfd(fd, "device_set_irqs"))

    # ---- ERR and REQ

    def _set_single(self, index: int, start: int, count: int, values: Values, eventfds: bool) -> None:
        old = self._single[index]
        if start or count > 1:
            raise _invalid("one interrupt")
        if values is None:
            if old is None:
                raise _invalid("no eventfd is set")
            if count:
                old.signal()
            else:
                self._single[index] = None
                old.close()
            return
        if not count:
            raise _invalid("a value is needed")
        if not eventfds:
            if values[0]:
                self._signal(old)
            return
        if values[0] < -1:
            if self._sparse:
                raise _invalid("-1 takes the eventfd away")
            return
        self._single[index] = Eventfd(values[0], "device_set_irqs") if values[0] >= 0 else None
        if old is not None:
            old.close()

    # ---- all

    def set(self, action: int, index: int, start: int, count: int, values: Values, eventfds: bool) -> None:
        """Do a checked SET_IRQS."""
        with self._lock:
            act = self._actions.get((index, action))
            if act is None:
                raise error(errno.ENOTTY, "device_set_irqs", hint=f"index {index} has no action {action:#x}")
            act(index, start, count, values, eventfds)

    def _replace(self, vector: int, eventfd: Eventfd | None) -> None:
        old, self._vectors[vector] = self._vectors[vector], eventfd
        if old is not None:
            old.close()

    def _disable(self) -> None:
        self._forget_unmask()
        for vector in range(len(self._vectors)):
            self._replace(vector, None)
        self._kind, self._vectors, self._masked = None, [], False

    def close(self) -> None:
        """Let every eventfd go."""
        with self._lock:
            self._disable()
            for index, eventfd in self._single.items():
                if eventfd is not None:
                    eventfd.close()
                self._single[index] = None
