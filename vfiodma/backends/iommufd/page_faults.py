"""A queue of page faults: devices ask for pages that a table lacks, and wait for the answer."""
import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from ..._core.errno import error
from ...errors import fits
from ...uapi import iommufd as abi

if TYPE_CHECKING:
    from .context import Iommufd

_AT_ONCE = 1024         # faults in one read; an IOMMU's queue has no longer groups


class PageFault(NamedTuple):
    """A page that a device asks for; the faults of one ``cookie`` are answered together."""

    cookie: int
    dev_id: int             #: number of the device in the iommufd
    pasid: int | None
    group: int              #: the device's own number for the group
    address: int
    perm: int               #: 1 read, 2 write, 4 execute, 8 privileged
    last: bool              #: of its group


class FaultQueue:
    """A queue of page faults; made by ``Iommufd.alloc_fault_queue``.

    Attributes
    ----------
    id : int
        Its number in the iommufd; 0 = closed.

    Notes
    -----
    ``fileno()`` can be given to select, poll and asyncio: it is readable while faults wait.  Thread-safe.
    Source: IOMMU_FAULT_QUEUE_ALLOC.
    """

    def __init__(self, iommufd: "Iommufd") -> None:
        self._iommufd = iommufd
        answer = iommufd.command(abi.IOMMU_FAULT_QUEUE_ALLOC, abi.iommu_fault_alloc, "fault_queue_alloc")
        self.id: int = answer["out_fault_id"]
        self._fd: int = answer["out_fault_fd"]

    def fileno(self) -> int:
        """Return the descriptor; -1 when closed."""
        return self._fd

    def _open(self, operation: str) -> int:
        if self._fd < 0:
            raise error(errno.EBADF, operation, hint="the queue is closed")
        return self._fd

    def read(self) -> list[PageFault]:
        """Take the faults that wait, oldest group first; an empty list when none does.  Never blocks."""
        layout = abi.iommu_hwpt_pgfault
        raw = self._iommufd.system.read(self._open("fault_queue_read"), _AT_ONCE * layout.size)
        found = (layout.unpack(raw[at:at + layout.size]) for at in range(0, len(raw), layout.size))
        return [PageFault(fault["cookie"], fault["dev_id"],
                          fault["pasid"] if fault["flags"] & abi.IOMMU_PGFAULT_FLAGS_PASID_VALID else None,
                          fault["grpid"], fault["addr"], fault["perm"],
                          bool(fault["flags"] & abi.IOMMU_PGFAULT_FLAGS_LAST_PAGE)) for fault in found]

    def respond(self, answers: Iterable[tuple[int, bool]]) -> int:
        """Answer groups: (cookie, whether the pages are there now); return how many were answered.

        Fewer than given: the next one's cookie is not known, as its device is detached or it was answered.

        Raises
        ------
        InvalidArgumentError
            EINVAL: that of the first one is not known.
        """
        layout = abi.iommu_hwpt_page_response
        with fits("fault_queue_write"):
            data = b"".join(layout.pack(cookie=cookie, code=abi.IOMMUFD_PAGE_RESP_SUCCESS if valid
                                        else abi.IOMMUFD_PAGE_RESP_INVALID) for cookie, valid in answers)
        return self._iommufd.system.write(self._open("fault_queue_write"), data) // layout.size

    def close(self) -> None:
        """Close the descriptor and destroy the queue; EBUSY while a page table uses it: call it again.  Idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._iommufd.system.close(fd)
        if self.id and self._iommufd.fd >= 0:
            self._iommufd.destroy(self.id)
        self.id = 0

    def __enter__(self) -> "FaultQueue":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
