"""Interrupts of a device, delivered through eventfds."""
import contextlib
import enum
import errno
import os
import select
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from .._core.errno import error
from ..errors import InvalidArgumentError, UnsupportedError, VfioError
from ..uapi import vfio as abi
from .arguments import new_eventfd, pack_fds

if TYPE_CHECKING:
    from .pci import VfioDevice

_NONE, _BOOL, _EVENTFD = abi.VFIO_IRQ_SET_DATA_NONE, abi.VFIO_IRQ_SET_DATA_BOOL, abi.VFIO_IRQ_SET_DATA_EVENTFD
_MASK, _UNMASK = abi.VFIO_IRQ_SET_ACTION_MASK, abi.VFIO_IRQ_SET_ACTION_UNMASK
_TRIGGER = abi.VFIO_IRQ_SET_ACTION_TRIGGER


class IrqIndex(enum.IntEnum):
    """The interrupt types of a PCI device; other buses have CcwIrq, ApIrq, or numbers of the device's own."""

    INTX = abi.VFIO_PCI_INTX_IRQ_INDEX      #: the wire; masked by the kernel whenever it fires
    MSI = abi.VFIO_PCI_MSI_IRQ_INDEX
    MSIX = abi.VFIO_PCI_MSIX_IRQ_INDEX
    ERR = abi.VFIO_PCI_ERR_IRQ_INDEX        #: an uncorrectable PCI Express error
    REQ = abi.VFIO_PCI_REQ_IRQ_INDEX        #: the host wants the device back: close it soon


class CcwIrq(enum.IntEnum):
    """The interrupt types of a subchannel (channel I/O)."""

    IO = abi.VFIO_CCW_IO_IRQ_INDEX
    CRW = abi.VFIO_CCW_CRW_IRQ_INDEX        #: report words wait in their region
    REQ = abi.VFIO_CCW_REQ_IRQ_INDEX        #: the host wants the device back


class ApIrq(enum.IntEnum):
    """The interrupt types of a matrix of crypto adapters."""

    REQ = abi.VFIO_AP_REQ_IRQ_INDEX         #: the host wants the device back
    CFG_CHG = abi.VFIO_AP_CFG_CHG_IRQ_INDEX     #: adapters or domains came or went


_KINDS: tuple[tuple[int, type[enum.IntEnum]], ...] = (
    (abi.VFIO_DEVICE_FLAGS_PCI, IrqIndex), (abi.VFIO_DEVICE_FLAGS_CCW, CcwIrq), (abi.VFIO_DEVICE_FLAGS_AP, ApIrq))
#: Buses where no data means a signal whatever the count is: only the eventfd -1 switches off.
_ALWAYS_ON = abi.VFIO_DEVICE_FLAGS_CCW | abi.VFIO_DEVICE_FLAGS_AP


class IrqFlags(enum.IntFlag):
    """What an interrupt type can (VFIO_IRQ_INFO_*)."""

    EVENTFD = abi.VFIO_IRQ_INFO_EVENTFD
    MASKABLE = abi.VFIO_IRQ_INFO_MASKABLE
    AUTOMASKED = abi.VFIO_IRQ_INFO_AUTOMASKED   #: masked when it fires, until unmask()
    NORESIZE = abi.VFIO_IRQ_INFO_NORESIZE       #: vectors can't be added while it is enabled


@dataclass(frozen=True, slots=True)
class IrqInfo:
    """What VFIO_DEVICE_GET_IRQ_INFO tells."""

    index: int
    count: int          #: vectors, 0 = the device has none
    flags: IrqFlags


class Interrupt:
    """An eventfd that fires with an interrupt.

    Attributes
    ----------
    number : int
        The vector.
    fd : int
        The eventfd, non-blocking, for select, poll and asyncio; -1 when closed.
    """

    def __init__(self, number: int, fd: int | None = None) -> None:
        self.number = number
        self.fd = new_eventfd("irq_enable") if fd is None else fd

    def fileno(self) -> int:
        """Return the eventfd."""
        return self.fd

    def poll(self) -> int:
        """Return how often it fired since the last time, without waiting."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0
        except OSError as exc:
            raise error(exc.errno or errno.EIO, "interrupt_wait", hint="the interrupt is closed") from None

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it fires; return how often it fired since the last time.

        Parameters
        ----------
        timeout : float, optional
            Seconds; None = as long as it takes.

        Raises
        ------
        TimedOutError
            ETIMEDOUT.

        Notes
        -----
        The GIL is released while it waits.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        poller: select.poll | None = None
        while not (count := self.poll()):
            if poller is None:
                poller = select.poll()
                poller.register(self.fd, select.POLLIN)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not poller.poll(None if left is None else left * 1000) and left is not None:
                raise error(errno.ETIMEDOUT, "interrupt_wait", hint=f"vector {self.number} did not fire in {timeout} s")
        return count

    def close(self) -> None:
        """Close the eventfd; the kernel keeps its own reference."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Vectors:
    """Vectors of one interrupt type while they are enabled: a sequence of Interrupt.  Made by ``Interrupts.enable``."""

    def __init__(self, device: "VfioDevice", kind: int, count: int) -> None:
        self.kind = kind
        self._device = device
        self._vectors: list[Interrupt] = []
        try:
            self._vectors.extend(Interrupt(number) for number in range(count))
            self._set(_EVENTFD | _TRIGGER, "irq_enable", 0, count,
                      pack_fds("irq_enable", [vector.fd for vector in self._vectors]))
        except BaseException:
            self._close_eventfds()
            raise

    @classmethod
    def taken_over(cls, device: "VfioDevice", kind: int, eventfds: Sequence[int]) -> Self:
        """Return vectors that are enabled already, with these eventfds, which belong to it."""
        vectors = cls.__new__(cls)
        vectors.kind, vectors._device = kind, device
        vectors._vectors = [Interrupt(number, fd) for number, fd in enumerate(eventfds)]
        return vectors

    def __repr__(self) -> str:
        return f"<{len(self)} vectors of {_name(self._device, self.kind)} of {self._device!r}>"

    def __len__(self) -> int:
        return len(self._vectors)

    def __getitem__(self, number: int) -> Interrupt:
        return self._vectors[number]

    def __iter__(self) -> Iterator[Interrupt]:
        return iter(self._vectors)

    def _set(self, flags: int, operation: str, start: int, count: int, data: bytes = b"") -> None:
        set_irqs(self._device, self.kind, flags, operation, start, count, data)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the first vector; see Interrupt.wait."""
        if not self._vectors:
            raise error(errno.EBADF, "interrupt_wait", hint=f"{_name(self._device, self.kind)} was disabled")
        return self._vectors[0].wait(timeout)

    def trigger(self, start: int = 0, count: int | None = None) -> None:
        """Make vectors fire as if the device had interrupted (all from ``start`` when no count is given)."""
        self._set(_NONE | _TRIGGER, "irq_trigger", start, len(self) - start if count is None else count)

    def trigger_where(self, chosen: Sequence[bool], start: int = 0) -> None:
        """Make those vectors fire, from ``start``, whose element is true."""
        self._set(_BOOL | _TRIGGER, "irq_trigger", start, len(chosen), bytes(map(bool, chosen)))

    def mask(self) -> None:
        """Hold INTx back; UnsupportedError (ENOTTY) for types that can't be masked."""
        self._set(_NONE | _MASK, "irq_mask", 0, 1)

    def unmask(self) -> None:
        """Let INTx through again, after the device was told that it is served; one that is still raised fires again."""
        self._set(_NONE | _UNMASK, "irq_unmask", 0, 1)

    def unmask_on(self, eventfd: int | None) -> None:
        """Have INTx unmasked whenever an eventfd fires; None ends that."""
        self._set(_EVENTFD | _UNMASK, "irq_unmask", 0, 1, pack_fds("irq_unmask", [eventfd]))

    def assign(self, start: int, eventfds: Sequence[int | None]) -> None:
        """Have the vectors from ``start`` signal other eventfds; None = nothing.

        Parameters
        ----------
        start : int
            The first vector; beyond the enabled ones only where the flags do not say NORESIZE.
        eventfds : sequence of int or None
            They stay the caller's.

        Raises
        ------
        VfioError
            EBADF, EINVAL: one of them is no eventfd; none of the vectors signals anything any more then.
        """
        self._set(_EVENTFD | _TRIGGER, "irq_assign", start, len(eventfds), pack_fds("irq_assign", eventfds))

    def restore(self) -> None:
        """Have every vector signal its own eventfd again."""
        self.assign(0, [vector.fd for vector in self._vectors])

    def _close_eventfds(self) -> None:
        for vector in self._vectors:
            vector.close()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return not self._vectors

    def close(self) -> None:
        """Disable the interrupts and close the eventfds.  Idempotent."""
        if self._vectors:
            with contextlib.suppress(VfioError):    # a closed or vanished device, or the child of a fork
                _switch_off(self._device, self.kind)
            self._close_eventfds()
            self._vectors = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_vectors", None) and self._vectors[0].fd >= 0:
            text = f"{self!r} were not closed"
            self.close()
            if not self._device.forked:
                warnings.warn(text, ResourceWarning, source=self, stacklevel=1)


def _name(device: "VfioDevice", kind: int) -> str:
    kinds = next((kinds for flag, kinds in _KINDS if device.info.flags & flag), None)
    return kinds(kind).name if kinds and kind in kinds.__members__.values() else f"interrupt index {kind}"


def _switch_off(device: "VfioDevice", kind: int) -> None:
    if device.info.flags & _ALWAYS_ON:
        set_irqs(device, kind, _EVENTFD | _TRIGGER, "irq_disable", 0, 1, pack_fds("irq_disable", [None]))
    else:
        set_irqs(device, kind, _NONE | _TRIGGER, "irq_disable", 0, 0)


def set_irqs(device: "VfioDevice", kind: int, flags: int, operation: str, start: int, count: int,
             data: bytes = b"") -> None:
    """Do VFIO_DEVICE_SET_IRQS.

    Parameters
    ----------
    kind : int
        Interrupt index.
    flags : int
        One VFIO_IRQ_SET_DATA_* and one VFIO_IRQ_SET_ACTION_*.
    start, count : int
        Vectors.
    data : bytes
        ``count`` bytes, or ``count`` s32 eventfds.
    """
    if min(kind, start, count) < 0 or max(kind, start, count) >= 1 << 32:
        raise error(errno.EINVAL, operation, hint="interrupt types and vectors are numbers from 0")
    layout = abi.vfio_irq_set
    head = layout.pack(argsz=layout.size + len(data), flags=flags, index=kind, start=start, count=count)
    name, on_pci = _name(device, kind), device.info.flags & abi.VFIO_DEVICE_FLAGS_PCI
    active = [other.kind for other in device.children(Vectors)
              if on_pci and not other.closed and other.kind != kind and other.kind <= IrqIndex.MSIX]
    available = device.control(abi.VFIO_DEVICE_SET_IRQS, bytearray(head + data), operation, {
        errno.EINVAL: f"{_name(device, active[0])} is enabled, and INTx, MSI and MSI-X exclude one another: close that"
                      if active and kind <= IrqIndex.MSIX else
                      f"{name} is not enabled, has no such vector, or another type was enabled through another "
                      "descriptor of the device; or a number is no eventfd",
        errno.ENOTTY: f"{name} can't do that; see interrupts.info({name}).flags",
        errno.EBADF: "an eventfd is closed",
        errno.EBUSY: "the host's interrupt line can't be shared: use MSI",
    })
    if available:               # nothing was enabled: the kernel says how many it could have
        raise error(errno.ENOSPC, operation, hint=f"the host has {available} vectors left for {name}, not {count}")


class Interrupts:
    """The interrupts of a device.

    Examples
    --------
    ::

        with device.interrupts(IrqIndex.MSI) as vectors:
            ...
            vectors[0].wait(timeout=1)

    Notes
    -----
    Source: VFIO_DEVICE_GET_IRQ_INFO, VFIO_DEVICE_SET_IRQS.
    """

    __slots__ = ("_device",)

    def __init__(self, device: "VfioDevice") -> None:
        self._device = device

    def info(self, kind: int) -> IrqInfo:
        """Ask for an interrupt type.

        Raises
        ------
        VfioError
            EINVAL: the device has no such type (ERR of conventional PCI).
        """
        layout = abi.vfio_irq_info
        if not 0 <= kind < 1 << 32:
            raise error(errno.EINVAL, "device_get_irq_info", hint=f"the device has no {_name(self._device, kind)}")
        data = bytearray(layout.pack(argsz=layout.size, index=kind))
        self._device.control(abi.VFIO_DEVICE_GET_IRQ_INFO, data, "device_get_irq_info",
                             {errno.EINVAL: f"the device has no {_name(self._device, kind)}"})
        values = layout.unpack(data)
        return IrqInfo(kind, values["count"], IrqFlags(values["flags"]))

    def __iter__(self) -> Iterator[IrqInfo]:
        """Iterate over the types that the device has."""
        for kind in range(self._device.info.num_irqs):
            with contextlib.suppress(InvalidArgumentError):
                info = self.info(kind)
                if info.count:
                    yield info

    def enable(self, kind: int, count: int = 1) -> Vectors:
        """Enable the first vectors of a type, each with an eventfd of its own.

        Parameters
        ----------
        kind : int
            IrqIndex, CcwIrq, ApIrq or a number.
        count : int
            Vectors.

        Returns
        -------
        Vectors
            A context manager; closing it, or the device, disables them.

        Raises
        ------
        VfioError
            EINVAL: too many vectors, or another type is enabled (INTx, MSI and MSI-X exclude one another); EBUSY:
            this one is enabled already.
        """
        info, name = self.info(kind), _name(self._device, kind)
        if not 0 < count <= info.count:
            raise error(errno.EINVAL, "irq_enable", hint=f"{name} has {info.count} vectors, not {count}")
        if any(not vectors.closed and vectors.kind == kind for vectors in self._device.children(Vectors)):
            raise error(errno.EBUSY, "irq_enable", hint=f"{name} is enabled already: close that first")
        vectors = Vectors(self._device, kind, count)
        self._device.adopt(vectors)
        return vectors

    __call__ = enable

    def take_over(self, kind: int, eventfds: Sequence[int]) -> Vectors:
        """Return the vectors that another process enabled, before a live update, with the eventfds that it sent along.

        Parameters
        ----------
        kind : int
            IrqIndex, CcwIrq, ApIrq or a number.
        eventfds : sequence of int
            Of the vectors from the first on; they belong to the result.

        Notes
        -----
        Nothing is asked of the device: an interrupt of the meantime stands in its eventfd.
        """
        vectors = Vectors.taken_over(self._device, kind, eventfds)
        self._device.adopt(vectors)
        return vectors

    def disable(self, kind: int) -> None:
        """Disable a type, whoever enabled it; no effect when it is off."""
        mine = [vectors for vectors in self._device.children(Vectors) if vectors.kind == kind]
        for vectors in mine:
            vectors.close()
        if not mine:
            with contextlib.suppress(InvalidArgumentError, UnsupportedError):
                _switch_off(self._device, kind)
