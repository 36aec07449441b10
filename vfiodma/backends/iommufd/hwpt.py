"""A hardware page table, the dirty bits in it, and page tables of guests on top of it."""
import ctypes
import errno
from collections.abc import Sequence
from typing import Any

from ..._core.errno import error
from ..._core.iommufd import HwptIoctls
from ...errors import fits
from ...uapi import iommufd as abi
from .page_faults import FaultQueue


class Hwpt(HwptIoctls):
    """A hardware page table of an address space, for devices behind one IOMMU.

    Notes
    -----
    The methods that deal with dirty bits are those of HwptIoctls.  Source: struct iommu_hwpt_alloc.
    """

    def nested(self, dev_id: int, root: int, *, address_width: int = 48, supervisor: bool = False,
               extended_accessed: bool = False, write_protect: bool = False, pasids: bool = False,
               fault_queue: FaultQueue | None = None) -> "NestedHwpt":
        """Put a page table of the guest on top: devices attached to it go through both.

        Parameters
        ----------
        dev_id : int
            ``IommufdDevice.id``.
        root : int
            Guest-physical address of its highest level, in VT-d's format of the first stage.
        address_width : {48, 57}
            Bits of an address that it translates: 4 or 5 levels.
        supervisor, extended_accessed, write_protect : bool
            SRE: requests with privilege are allowed; EAFE; WPE: write protection holds for them as well.
        pasids : bool
            See ``Iommufd.alloc_hwpt``.
        fault_queue : FaultQueue, optional
            Where devices ask for missing pages.  Without one such an access fails.

        Raises
        ------
        VfioError
            EINVAL: this table is no nesting parent; EOPNOTSUPP; ENOENT.  Width and flags are checked when a device is
            attached (EINVAL there; ENODEV: it can't ask for pages).

        Notes
        -----
        Source: IOMMU_HWPT_ALLOC with struct iommu_hwpt_vtd_s1.
        """
        s1 = (supervisor * abi.IOMMU_VTD_S1_SRE | extended_accessed * abi.IOMMU_VTD_S1_EAFE
              | write_protect * abi.IOMMU_VTD_S1_WPE)
        with fits("hwpt_nested"):
            data = abi.iommu_hwpt_vtd_s1.pack(flags=s1, pgtbl_addr=root, addr_width=address_width)
        memory = ctypes.create_string_buffer(data, len(data))
        flags = (abi.IOMMU_HWPT_ALLOC_PASID if pasids else 0) | (abi.IOMMU_HWPT_FAULT_ID_VALID if fault_queue else 0)
        answer = self.ioas.iommufd.command(
            abi.IOMMU_HWPT_ALLOC, abi.iommu_hwpt_alloc, "hwpt_nested", flags=flags, dev_id=dev_id, pt_id=self.id,
            data_type=abi.IOMMU_HWPT_DATA_VTD_S1, data_len=len(data), data_uptr=ctypes.addressof(memory),
            fault_id=fault_queue.id if fault_queue else 0)
        return NestedHwpt(self, answer["out_hwpt_id"])

    def destroy(self) -> None:
        """Destroy the page table; EBUSY while a device is attached to it, or a nested one is on top."""
        if self.id:
            self.ioas.iommufd.destroy(self.id)
            self.forget_id()


class NestedHwpt:
    """A page table of a guest on top of one of the hardware; made by ``Hwpt.nested``.

    Attributes
    ----------
    parent : Hwpt
    id : int
        Its number in the iommufd; 0 = destroyed.
    """

    def __init__(self, parent: Hwpt, id: int) -> None:
        self.parent = parent
        self.id = id

    def invalidate(self, entries: Sequence[tuple[int, int, bool]] | None = None) -> None:
        """Drop cached translations, with one ioctl.

        Parameters
        ----------
        entries : sequence of (address, npages, leaf)
            Ranges of 4 KiB pages; ``leaf``: only leaf entries have changed.  None: everything.

        Raises
        ------
        InvalidArgumentError
            EINVAL: an address is no multiple of 4096.  The entries before it are done: the text names it.

        Notes
        -----
        Source: IOMMU_HWPT_INVALIDATE with struct iommu_hwpt_vtd_s1_invalidate.
        """
        iommufd, layout = self.parent.ioas.iommufd, abi.iommu_hwpt_invalidate
        known = ((0, (1 << 64) - 1, False),) if entries is None else tuple(entries)
        with fits("hwpt_invalidate"):
            raw = b"".join(abi.iommu_hwpt_vtd_s1_invalidate.pack(
                addr=address, npages=npages, flags=abi.IOMMU_VTD_INV_FLAGS_LEAF if leaf else 0)
                for address, npages, leaf in known)
        if not raw:
            return
        memory = ctypes.create_string_buffer(raw, len(raw))
        data = bytearray(layout.pack(
            size=layout.size, hwpt_id=self.id, data_uptr=ctypes.addressof(memory),
            data_type=abi.IOMMU_HWPT_INVALIDATE_DATA_VTD_S1, entry_len=abi.iommu_hwpt_vtd_s1_invalidate.size,
            entry_num=len(known)))
        try:
            iommufd.ioctl(abi.IOMMU_HWPT_INVALIDATE, data, "hwpt_invalidate")
        except OSError as exc:
            done = layout.unpack(data)["entry_num"]
            address, npages, _ = known[min(done, len(known) - 1)]
            raise error(exc.errno or errno.EIO, "hwpt_invalidate", address, npages * 4096,
                        f"entry {done} of {len(known)}; those before it are done") from None

    def destroy(self) -> None:
        """Destroy it; EBUSY while a device is attached to it.  Idempotent."""
        if self.id:
            self.parent.ioas.iommufd.destroy(self.id)
            self.id = 0


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
