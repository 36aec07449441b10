"""Plain values that cross every layer."""
import enum
from dataclasses import dataclass, field
from typing import NamedTuple


class Prot(enum.IntFlag):
    """What a device may do with mapped memory (VFIO_DMA_MAP_FLAG_READ and _WRITE)."""

    READ = 1
    WRITE = 2
    RW = 3


class IovaRange(NamedTuple):
    """A range of I/O virtual addresses; both ends are part of it, so that a range may end at 2**64 - 1."""

    start: int
    last: int

    @property
    def size(self) -> int:
        """Bytes in the range."""
        return self.last - self.start + 1


class Mapping(NamedTuple):
    """A mapping as it stands in the table: ``[iova, iova + size)`` leads to ``[vaddr, vaddr + size)``."""

    iova: int
    vaddr: int
    size: int
    prot: Prot


class DeviceLocation(NamedTuple):
    """Where a device stands: its IOMMU group and the nodes that lead to it."""

    address: str                                #: "0000:00:10.0"
    group: int                                  #: number of its IOMMU group
    group_path: str                             #: "/dev/vfio/7", "/dev/vfio/noiommu-7"
    cdev: str | None                            #: "/dev/vfio/devices/vfio0"; None = the kernel has none
    noiommu: bool                               #: no IOMMU stands between the device and memory
    driver: str | None                          #: None = no driver is bound
    siblings: tuple[tuple[str, str | None], ...]    #: (address, driver) of the group's other devices


class DmaFault(NamedTuple):
    """A DMA access that the software IOMMU refused; nothing was moved past the faulting page."""

    device: str
    iova: int
    size: int
    write: bool
    reason: str


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do.  Ask for a feature, never for a backend's name."""

    backend: str
    pgsizes: int                        #: bitmap of page sizes, bit n = 2**n bytes
    features: frozenset[str] = field(default_factory=frozenset)   #: "dirty", "vaddr", "map_many", "map_file", ...
    dma_avail: int | None = None        #: mappings left; None = not reported
    dma_entry_limit: int | None = None  #: mappings in all; None = not known
    max_dirty_bitmap_size: int = 0      #: bytes

    @property
    def min_pgsize(self) -> int:
        """The smallest page size, in bytes."""
        return self.pgsizes & -self.pgsizes
