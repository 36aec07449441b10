"""What VFIO keeps for an open device, for all of its descriptors together."""
import threading
from typing import Any

from ...._core.type1 import VERSIONS
from ....protocols import DmaPort, SoftwareDevice
from ....uapi import vfio as abi
from .arguments import Eventfd
from .ioeventfd import IoEventfds
from .irqs import Irqs
from .migration import Migration
from .simple_irqs import SimpleSink
from .watch import Watch

_CONFIG, _COMMAND = abi.VFIO_PCI_CONFIG_REGION_INDEX, 4
_MEMORY, _MASTER = 2, 4
_HEADER_END = 0x40


class DeviceState:
    """An open device: interrupts, ioeventfds, migration and logging of all its descriptors, from the first to the last.

    Parameters
    ----------
    group : Group
        Its group among those of the software VFIO.
    device : SoftwareDevice
    port : DmaPort
        The device's way to memory.
    """

    def __init__(self, group: Any, device: SoftwareDevice, port: DmaPort) -> None:
        optional: Any = device
        self.group = group
        self.device: Any = device
        self.port: Any = port
        self.version = VERSIONS[group.vfio.kernel]
        self.bus: int = getattr(device, "bus", abi.VFIO_DEVICE_FLAGS_PCI)
        self.on_pci = self.bus == abi.VFIO_DEVICE_FLAGS_PCI
        self.irq_indexes: int = abi.VFIO_PCI_NUM_IRQS if self.on_pci else optional.irq_indexes
        self.simple_irqs: dict[int, Eventfd] = {}           # by index, where it is not on PCI
        self.lock = threading.RLock()       # of what is here, but not of `irqs`, which devices call into
        self.watch = Watch(f"eventfds of {device.address}")
        self.msix_table: tuple[int, int, int] | None = getattr(device, "msix_table", None)
        self.can_reset = getattr(device, "can_reset", True)
        self.irqs = Irqs(device, self.watch, dynamic_msix=self.msix_table is not None and self.at_least("6.12"),
                         sparse=self.at_least("6.12"))
        self.ioeventfds = IoEventfds(self)
        self.migration: Migration | None = Migration(self, optional.migration) if hasattr(device, "migration") \
            and optional.migration is not None and self.at_least("6.1") else None
        self.asleep = False                 # LOW_POWER_ENTRY was done
        self.wakeup: Any = None             # the Eventfd that tells of the device's waking
        self.log_page_size = 0              # of the DMA log, with the (iova, size) that it covers
        self.log_ranges: list[tuple[int, int]] = []
        self.has_command = False
        self._enable()
        if hasattr(device, "set_irq_sink"):
            optional.set_irq_sink(self.irqs if self.on_pci else SimpleSink(self))

    def at_least(self, kernel: str) -> bool:
        """Whether the kernel is that one or a newer one."""
        return self.version >= VERSIONS[kernel]

    @property
    def wide_access(self) -> bool:
        """Whether registers can be accessed by 8 bytes."""
        return self.at_least("6.12")

    @property
    def region_count(self) -> int:
        """Regions, device-specific ones included."""
        return max(abi.VFIO_PCI_NUM_REGIONS if self.on_pci else 0, getattr(self.device, "region_count", 0))

    def _enable(self) -> None:
        """Enable memory access, disable bus mastering: what opening a device begins with."""
        device = self.device
        if not self.on_pci or not hasattr(device, "region_size") or device.region_size(_CONFIG) < _HEADER_END:
            return                          # an emulated device may be nothing but a source of DMA
        command = int.from_bytes(device.region_read(_CONFIG, _COMMAND, 2), "little")
        memory = _MEMORY if any(device.region_size(bar) for bar in range(6)) else 0
        device.region_write(_CONFIG, _COMMAND, ((command | memory) & ~_MASTER).to_bytes(2, "little"))
        self.has_command = bool(device.region_read(_CONFIG, _COMMAND, 1)[0] & _MEMORY)

    def wake(self) -> None:
        """An access wakes a device that sleeps with a wake-up eventfd."""
        if self.wakeup is not None:
            with self.lock:
                if self.wakeup is not None:
                    self.wakeup.signal()
                    self.leave_low_power()

    def leave_low_power(self) -> None:
        """The device is awake."""
        self.asleep = False
        if self.wakeup is not None:
            self.wakeup.close()
            self.wakeup = None

    def reset(self) -> None:
        """Reset the device as the kernel does: its configuration is saved before and restored after."""
        device, size = self.device, min(self.device.region_size(_CONFIG), _HEADER_END) if self.on_pci else 0
        saved = device.region_read(_CONFIG, 0, size) if size else b""
        device.reset()
        for offset in (*range(8, size, 4), _COMMAND) if size else ():
            width = 2 if offset == _COMMAND else 4
            if device.region_read(_CONFIG, offset, width) != saved[offset:offset + width]:
                device.region_write(_CONFIG, offset, saved[offset:offset + width])
        if self.migration is not None:
            self.migration.reset()

    def close(self) -> None:
        """The last descriptor is gone: DMA is cut off, and everything that was set up goes."""
        if self.has_command:
            command = self.device.region_read(_CONFIG, _COMMAND, 2)
            self.device.region_write(_CONFIG, _COMMAND, bytes([command[0] & ~_MASTER, command[1]]))
        if hasattr(self.device, "set_irq_sink"):
            self.device.set_irq_sink(None)
        self.ioeventfds.close()
        self.irqs.close()
        with self.lock:
            while self.simple_irqs:
                self.simple_irqs.popitem()[1].close()
        self.watch.close()
        self.leave_low_power()


def open_device(group: Any, device: SoftwareDevice, port: DmaPort) -> None:
    """The first descriptor of a device was opened: connect it, and keep its state with its group."""
    device.connect(port)
    try:
        group.states[device.address] = DeviceState(group, device, port)
    except BaseException:
        device.disconnect()
        raise


def close_device(group: Any, device: SoftwareDevice) -> None:
    """Its last descriptor is gone."""
    state = group.states.pop(device.address)
    try:
        state.close()
    finally:
        device.disconnect()
        if state.migration is not None:     # it runs again, but does no DMA any more
            state.migration.close()
