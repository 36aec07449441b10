"""An I/O address space: what a device, or several, can reach."""
import ctypes
import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..._core.errno import error
from ..._core.iommufd import IoasIoctls
from ...errors import VfioError
from ...types import IovaRange
from ...uapi import iommufd as abi

if TYPE_CHECKING:
    from .context import Iommufd


class Ioas(IoasIoctls):
    """An I/O address space of an iommufd.

    Mapping before a device is attached pins and checks nothing: wrong memory and the limit of locked memory show when
    a device is attached, and an IOVA that the kernel chose then may be out of the device's reach (EADDRINUSE).

    Notes
    -----
    Thread-safe.  The methods that map are those of IoasIoctls.  Source: struct iommu_ioas_*.
    """

    iommufd: "Iommufd"

    def _ask_ranges(self) -> tuple[tuple[IovaRange, ...], int]:
        count = 16
        layout = abi.iommu_ioas_iova_ranges
        while True:
            found = (ctypes.c_uint64 * (2 * count))()
            data = bytearray(layout.pack(size=layout.size, ioas_id=self.id, num_iovas=count,
                                         allowed_iovas=ctypes.addressof(found)))
            try:
                self.iommufd.ioctl(abi.IOMMU_IOAS_IOVA_RANGES, data, "iova_ranges")
            except VfioError as exc:
                wanted = layout.unpack(data)["num_iovas"]
                if exc.errno != errno.EMSGSIZE or wanted <= count:
                    raise
                count = wanted
                continue
            answer = layout.unpack(data)
            values = found[:2 * answer["num_iovas"]]
            return tuple(map(IovaRange, values[::2], values[1::2])), answer["out_iova_alignment"]

    def iova_ranges(self) -> tuple[IovaRange, ...]:
        """Return the ranges that the attached devices reach, ascending; allow_iovas() does not change them."""
        return self._ask_ranges()[0]

    def iova_alignment(self) -> int:
        """Return the bytes that addresses and sizes are multiples of; 1 without a device."""
        return self._ask_ranges()[1]

    def allow_iovas(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Restrict what the kernel chooses as IOVAs, and what devices to be attached may take away.

        Parameters
        ----------
        ranges : iterable of (start, last)
            Replace the former ones; none = no restriction.  Fixed IOVAs may lie elsewhere.

        Raises
        ------
        VfioError
            EADDRINUSE: attached devices do not reach one of them; EINVAL.
        """
        flat = []
        for start, last in ranges:
            if not (0 <= start < 1 << 64 and 0 <= last < 1 << 64):
                raise error(errno.EINVAL, "allow_iovas", start, hint="a range is (start, last), both below 2**64")
            flat += [start, last]
        memory = (ctypes.c_uint64 * len(flat))(*flat)
        self.iommufd.command(abi.IOMMU_IOAS_ALLOW_IOVAS, abi.iommu_ioas_allow_iovas, "allow_iovas", ioas_id=self.id,
                             num_iovas=len(flat) // 2, allowed_iovas=ctypes.addressof(memory))

    @property
    def huge_pages(self) -> bool:
        """Whether the IOMMU may use large pages; set it before anything is mapped for a device."""
        return bool(self.iommufd.option(abi.IOMMU_OPTION_HUGE_PAGES, self.id))

    @huge_pages.setter
    def huge_pages(self, enable: bool) -> None:
        self.iommufd.set_option(abi.IOMMU_OPTION_HUGE_PAGES, int(enable), self.id)

    def change_process(self) -> None:
        """Move the charge for locked memory to this process; see Iommufd.change_process."""
        self.iommufd.change_process()

    def destroy(self) -> None:
        """Destroy the address space with all of its mappings; EBUSY while a page table or a device uses it."""
        if self.id:
            self.iommufd.destroy(self.id)
            self.forget_id()
