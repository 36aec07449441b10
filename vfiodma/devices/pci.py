"""A device of the running kernel or of a software VFIO, from its user's side."""
import contextlib
import enum
import errno
import itertools
import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

from .._core.errno import error
from .._core.kernel import Descriptor
from .._core.type1 import generation
from ..errors import ForkedError, VfioError
from ..protocols import OpensDevices, VfioSystem
from ..uapi import vfio as abi
from .capabilities import Capability, ask, decode_chain
from .config import ConfigSpace
from .dma_log import DmaLog
from .features import Features
from .graphics import Graphics
from .interrupts import Interrupts
from .ioevents import IoEvents
from .migration import Migration
from .regions import RegionInfo, Regions
from .reset import HotResetInfo, hot_reset, hot_reset_info, reset


class DeviceFlags(enum.IntFlag):
    """What a device is and can (VFIO_DEVICE_FLAGS_*)."""

    RESET = abi.VFIO_DEVICE_FLAGS_RESET
    PCI = abi.VFIO_DEVICE_FLAGS_PCI
    PLATFORM = abi.VFIO_DEVICE_FLAGS_PLATFORM
    AMBA = abi.VFIO_DEVICE_FLAGS_AMBA
    CCW = abi.VFIO_DEVICE_FLAGS_CCW
    AP = abi.VFIO_DEVICE_FLAGS_AP
    FSL_MC = abi.VFIO_DEVICE_FLAGS_FSL_MC
    CAPS = abi.VFIO_DEVICE_FLAGS_CAPS
    CDX = abi.VFIO_DEVICE_FLAGS_CDX


class AtomicCompletion(enum.IntFlag):
    """Widths of atomic operations that the root port completes."""

    BITS_32 = abi.VFIO_PCI_ATOMIC_COMP32
    BITS_64 = abi.VFIO_PCI_ATOMIC_COMP64
    BITS_128 = abi.VFIO_PCI_ATOMIC_COMP128


class DeviceInfo(NamedTuple):
    """What VFIO_DEVICE_GET_INFO tells."""

    flags: DeviceFlags
    num_regions: int                            #: of vfio-pci 9, and those of the device's own types
    num_irqs: int                               #: interrupt indexes
    atomic_completion: AtomicCompletion | None  #: None = not reported
    capabilities: tuple[Capability, ...]        #: all of them, also those that are not decoded


def _decode(data: bytes) -> DeviceInfo:
    head = abi.vfio_device_info.unpack(data)
    first = head["cap_offset"] if head["flags"] & abi.VFIO_DEVICE_FLAGS_CAPS else 0
    capabilities = decode_chain(data, first)
    atomic = None
    for capability in capabilities:
        if capability.id == abi.VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP:
            atomic = AtomicCompletion(capability.unpack(abi.vfio_device_info_cap_pci_atomic_comp)["flags"])
    return DeviceInfo(DeviceFlags(head["flags"]), head["num_regions"], head["num_irqs"], atomic, capabilities)


class VfioDevice(Descriptor):
    """An open device.

    Parameters
    ----------
    system : VfioSystem or None
        Whose descriptor it is; None = the running kernel.
    fd : int
        The device's descriptor: this object closes it, also when the device does not answer.
    address : str
        For texts.

    Attributes
    ----------
    info : DeviceInfo
        Flags, numbers of regions and interrupt indexes, capabilities.

    Raises
    ------
    VfioError
        Of every method, with the kernel's errno and what to do.  ClosedError (EBADF) after close, ForkedError in the
        child of a fork.

    Notes
    -----
    Thread-safe.  Closing undoes everything of this descriptor: interrupts are disabled and their eventfds closed,
    registers unmapped, ioeventfds and DMA logging ended.  Forgetting to close is a ResourceWarning.  In the child of a
    fork closing gives up the child's copy of the descriptor and leaves the parent's interrupts alone.
    Source: VFIO_DEVICE_GET_INFO.
    """

    def __init__(self, system: VfioSystem | None, fd: int, address: str = "") -> None:
        if system is None:
            from ..kernel import KernelVfio
            system = KernelVfio()
        self._children: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()
        self._generation = generation()
        self._region_infos: dict[int, RegionInfo] = {}
        self.address = address
        super().__init__(system, fd)
        try:
            self.info = _decode(ask(self, abi.VFIO_DEVICE_GET_INFO, abi.vfio_device_info, "device_get_info"))
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, container: OpensDevices, address: str) -> Self:
        """Open a device of a container that holds its group.

        Raises
        ------
        VfioError
            ENODEV where the container has no such device, EBUSY, EPERM.
        """
        return cls(container.system, container.open_device_fd(address), address)

    def __repr__(self) -> str:
        return f"<VfioDevice {self.address or self.fd}{'' if self.fd >= 0 else ', closed'}>"

    # ---- the door for the device's parts

    @property
    def forked(self) -> bool:
        """Whether this is the child of a fork, where the device may not be used."""
        return self._generation != generation()

    def check(self, operation: str) -> int:
        """Return the descriptor; raise when the device is closed, or was opened before a fork."""
        if self._generation != generation():
            raise ForkedError(errno.EBADF, "opened before a fork", operation=operation,
                              hint="a forked child opens devices of its own")
        if self.fd < 0:
            raise error(errno.EBADF, operation, hint=f"device {self.address} is closed")
        return self.fd

    def control(self, request: int, data: Any, operation: str, hints: Mapping[int, str] | None = None) -> int:
        """Do an ioctl; ``hints`` are what to do, by errno."""
        self.check(operation)
        try:
            return self.ioctl(request, data, operation)
        except VfioError as exc:
            exc.hint = (hints or {}).get(exc.errno or 0) or exc.hint
            raise

    def adopt(self, child: Any) -> None:
        """Have close() close an object before the device; only weakly referenced."""
        self._children[next(self._numbers)] = child

    def children(self, kind: type) -> list[Any]:
        """The adopted objects of a class that are still alive."""
        return [child for child in list(self._children.values()) if isinstance(child, kind)]

    # ---- its parts

    @property
    def regions(self) -> Regions:
        """Registers by region index; see Regions."""
        return Regions(self, self._region_infos)

    @property
    def config(self) -> ConfigSpace:
        """The PCI configuration space."""
        return ConfigSpace(self.regions[abi.VFIO_PCI_CONFIG_REGION_INDEX])

    @property
    def interrupts(self) -> Interrupts:
        """INTx, MSI, MSI-X, error and request interrupts."""
        return Interrupts(self)

    @property
    def features(self) -> Features:
        """VFIO_DEVICE_FEATURE: probing, power, tokens."""
        return Features(self)

    @property
    def migration(self) -> Migration:
        """The device's own migration state."""
        return Migration(self)

    @property
    def dma_log(self) -> DmaLog:
        """The device's own log of what it writes."""
        return DmaLog(self)

    @property
    def graphics(self) -> Graphics:
        """The planes of a display."""
        return Graphics(self)

    @property
    def ioevents(self) -> IoEvents:
        """Register writes that the kernel does when an eventfd fires."""
        return IoEvents(self)

    # ---- resets

    def reset(self) -> None:
        """Bring the device back to its power-on state; see vfiodma.devices.reset."""
        reset(self)

    def hot_reset_info(self) -> HotResetInfo:
        """Return which devices a reset of the bus or slot takes along."""
        return hot_reset_info(self)

    def hot_reset(self, group_fds: Iterable[int] = ()) -> None:
        """Reset the bus or slot with all devices of hot_reset_info()."""
        hot_reset(self, group_fds)

    # ---- the end

    def close(self) -> None:
        """Close what belongs to the device, then the device.  Idempotent."""
        with contextlib.ExitStack() as steps:       # a child that fails to close keeps nobody else open
            steps.callback(self._close_fd)
            for child in self._children.values():
                steps.callback(child.close)

    def let_go(self) -> None:
        """Close the descriptor and undo nothing: another process has a duplicate, and goes on with the device.

        Interrupts stay enabled, with the eventfds that the other process has too; what is migrated stays so.
        """
        self._close_fd()
        self.close()            # the parts find a closed device: nothing is disabled

    def _close_fd(self) -> None:
        with contextlib.suppress(ForkedError):      # a software device: the parent closes it
            super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0 and hasattr(self, "_generation"):
            text = f"{self!r} was not closed"
            self.close()
            if not self.forked:
                warnings.warn(text, ResourceWarning, source=self, stacklevel=1)


