"""A hardware page table, and the dirty bits in it."""
import errno
from collections.abc import Sequence
from typing import Any

from ..._core.errno import error
from ..._core.iommufd import HwptIoctls


class Hwpt(HwptIoctls):
    """A hardware page table of an address space, for devices behind one IOMMU.

    Notes
    -----
    The methods that deal with dirty bits are those of HwptIoctls.  Source: struct iommu_hwpt_alloc.
    """

    def destroy(self) -> None:
        """Destroy the page table; EBUSY while a device is attached to it."""
        if self.id:
            self.ioas.iommufd.destroy(self.id)
            self.forget_id()


class HwptSource:
    """The dirty bits of a page table as a DirtySource: pages that a device really wrote.

    Parameters
    ----------
    hwpt : Hwpt
        Allocated with dirty tracking.
    """

    name = "IOMMU page table"
    survives_unmap = False              #: the bits of a mapping go with it

    def __init__(self, hwpt: Hwpt) -> None:
        self.hwpt = hwpt
        self._pgsize = 4096

    def start(self, ranges: Sequence[tuple[int, int]], pgsize: int) -> None:
        """Start tracking, of the whole address space."""
        if pgsize < 1 or pgsize & (pgsize - 1):
            raise error(errno.EINVAL, "start_dirty", hint=f"the page size is a power of two, not {pgsize}")
        self._pgsize = pgsize
        self.hwpt.set_dirty_tracking(True)

    def extend(self, iova: int, size: int) -> None:
        """Do nothing: new mappings are tracked as they are made."""

    def harvest(self, iova: int, size: int, into: Any) -> int:
        """OR the pages written since the last harvest into ``into``; the range must not split a mapping."""
        return self.hwpt.harvest(iova, size, into, pgsize=self._pgsize)

    def stop(self) -> None:
        """Stop tracking."""
        self.hwpt.set_dirty_tracking(False)
