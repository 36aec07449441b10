"""The PCI configuration space of a device: identity, command register, BARs, capability lists."""
from dataclasses import dataclass
from typing import NamedTuple

from .regions import Region

_VENDOR, _DEVICE, _COMMAND, _STATUS, _REVISION, _CLASS, _HEADER_TYPE = 0x00, 0x02, 0x04, 0x06, 0x08, 0x09, 0x0E
_BARS, _SUBSYSTEM_VENDOR, _SUBSYSTEM, _CAPABILITIES, _INTERRUPT_PIN = 0x10, 0x2C, 0x2E, 0x34, 0x3D
_EXTENDED = 0x100
_HAS_CAPABILITIES = 0x10        # of the status register

_IO, _MEMORY, _BUS_MASTER, _INTX_DISABLE = 1 << 0, 1 << 1, 1 << 2, 1 << 10      # of the command register


class PciCapability(NamedTuple):
    """An entry of a capability list."""

    id: int
    offset: int         #: in the configuration space
    version: int = 0    #: of extended capabilities


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register."""

    index: int          #: region index
    address: int        #: on the bus, without the flag bits
    memory: bool        #: False: I/O ports
    bits: int           #: 32 or 64; a 64-bit one uses the next index as well
    prefetchable: bool


def _bit(mask: int, text: str) -> property:
    def read(self: "ConfigSpace") -> bool:
        return bool(self.command & mask)

    def write(self: "ConfigSpace", on: bool) -> None:
        command = self.command
        self.command = command | mask if on else command & ~mask

    return property(read, write, doc=text)


class ConfigSpace:
    """The configuration space, as VFIO lets the user see it: parts are virtual, and some writes have no effect.

    Parameters
    ----------
    region : Region
        The device's region 7.

    Notes
    -----
    Source: the PCI Local Bus and PCI Express specifications; vfio-pci's table of what may be written.
    """

    __slots__ = ("region",)

    def __init__(self, region: Region) -> None:
        self.region = region

    @property
    def size(self) -> int:
        """256, or 4096 bytes where extended capabilities can be reached."""
        return self.region.size

    @property
    def vendor_id(self) -> int:
        """Who made the device."""
        return self.region.read_u16(_VENDOR)

    @property
    def device_id(self) -> int:
        """Which of the vendor's devices."""
        return self.region.read_u16(_DEVICE)

    @property
    def subsystem_vendor_id(self) -> int:
        """Who made the board."""
        return self.region.read_u16(_SUBSYSTEM_VENDOR)

    @property
    def subsystem_id(self) -> int:
        """Which of the vendor's boards."""
        return self.region.read_u16(_SUBSYSTEM)

    @property
    def revision(self) -> int:
        """Revision of the device."""
        return self.region.read_u8(_REVISION)

    @property
    def class_code(self) -> int:
        """Base class, subclass and programming interface: 0x010802 is an NVMe controller."""
        return int.from_bytes(self.region.read(_CLASS, 3), "little")

    @property
    def header_type(self) -> int:
        """0 = a device, 1 = a bridge; bit 7: further functions."""
        return self.region.read_u8(_HEADER_TYPE)

    @property
    def interrupt_pin(self) -> int:
        """0 = no INTx, 1 to 4 = INTA to INTD."""
        return self.region.read_u8(_INTERRUPT_PIN)

    @property
    def status(self) -> int:
        """The status register."""
        return self.region.read_u16(_STATUS)

    @property
    def command(self) -> int:
        """The command register."""
        return self.region.read_u16(_COMMAND)

    @command.setter
    def command(self, value: int) -> None:
        self.region.write_u16(_COMMAND, value)

    io_enabled = _bit(_IO, "Whether the device answers at its I/O ports.")
    memory_enabled = _bit(_MEMORY, "Whether the device answers at its memory BARs; without it registers can't be read.")
    bus_master = _bit(_BUS_MASTER, "Whether the device may do DMA and send MSIs.  VFIO opens devices with it off.")
    intx_disabled = _bit(_INTX_DISABLE, "Whether the device may not raise INTx.")

    def bars(self) -> tuple[Bar, ...]:
        """Return the base address registers that are in use."""
        found = []
        count = 2 if self.header_type & 0x7F == 1 else 6
        index = 0
        while index < count:
            value = self.region.read_u32(_BARS + 4 * index)
            memory = not value & 1
            wide = memory and value & 6 == 4 and index + 1 < count
            address = value & (~0xF if memory else ~3)
            if wide:
                address |= self.region.read_u32(_BARS + 4 * index + 4) << 32
            if address:
                found.append(Bar(index, address, memory, 64 if wide else 32, memory and bool(value & 8)))
            index += 2 if wide else 1
        return tuple(found)

    def capabilities(self) -> tuple[PciCapability, ...]:
        """Return the standard capabilities (ids: 0x05 MSI, 0x10 PCI Express, 0x11 MSI-X), in the order of the list."""
        found: dict[int, PciCapability] = {}        # by offset: a list may loop
        at = self.region.read_u8(_CAPABILITIES) & ~3 if self.status & _HAS_CAPABILITIES else 0
        while at >= 0x40 and at not in found:
            found[at] = PciCapability(self.region.read_u8(at), at)
            at = self.region.read_u8(at + 1) & ~3
        return tuple(found.values())

    def extended_capabilities(self) -> tuple[PciCapability, ...]:
        """Return the extended capabilities (0x01 AER, 0x10 SR-IOV), in the order of the list."""
        found: dict[int, PciCapability] = {}
        at = _EXTENDED
        while _EXTENDED <= at <= self.size - 4 and at not in found:
            header = self.region.read_u32(at)
            if header in (0, 0xFFFFFFFF):
                break
            if header & 0xFFFF:             # id 0 hides one that the kernel keeps for itself
                found[at] = PciCapability(header & 0xFFFF, at, header >> 16 & 0xF)
            following = header >> 20 & ~3
            if following <= at and following in found:
                break
            at = following
        return tuple(found.values())

    def find_capability(self, id: int) -> PciCapability | None:
        """Return a standard capability, None where the device has none of that id."""
        return next((capability for capability in self.capabilities() if capability.id == id), None)
