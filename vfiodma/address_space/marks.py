"""Pages that the process itself wrote: no device and no IOMMU knows of them, so the address space keeps the log."""
from .._core.bitmap import DirtyBitmap, DirtyLog
from .table import Row


class Marks:
    """A dirty log for each mapping that was written, made with the first mark."""

    def __init__(self, pgsize: int) -> None:
        self.pgsize = pgsize
        self._logs: dict[int, DirtyLog] = {}

    def mark(self, row: Row, iova: int, last: int) -> None:
        """Mark the pages that a range of bytes touches in a mapping."""
        log = self._logs.get(row.iova)
        if log is None:
            log = self._logs[row.iova] = DirtyLog(row.size // self.pgsize, self.pgsize)
        first = (max(iova, row.iova) - row.iova) // self.pgsize
        log.mark(first, (min(last, row.last) - row.iova) // self.pgsize - first + 1)

    def forget(self, row: Row) -> None:
        """Drop the log of a mapping."""
        self._logs.pop(row.iova, None)

    def harvest(self, row: Row, iova: int, last: int, into: DirtyBitmap) -> int:
        """OR the marks of a mapping within a range into a bitmap whose bit 0 is ``iova``; clear and count them."""
        log = self._logs.get(row.iova)
        if log is None:
            return 0
        first, end = max(iova, row.iova), min(last, row.last) + 1
        return log.harvest(into, (first - iova) // self.pgsize, first=(first - row.iova) // self.pgsize,
                           npages=(end - first) // self.pgsize)
