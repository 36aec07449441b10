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
        if iova <= row.iova and row.last <= last:
            return log.harvest(into, (row.iova - iova) // self.pgsize)
        # The mapping sticks out of the range: marks outside of it go back.
        found = DirtyBitmap(row.size // self.pgsize, self.pgsize)
        log.harvest(found)
        low = max(0, (iova - row.iova) // self.pgsize)
        end = min(row.size, last + 1 - row.iova) // self.pgsize
        shift = (row.iova - iova) // self.pgsize
        count = 0
        for first, npages in found.runs().tolist():
            stop = first + npages
            for begin, until, inside in ((first, min(stop, low), False), (max(first, low), min(stop, end), True),
                                         (max(first, end), stop, False)):
                if begin < until and inside:
                    into.set(begin + shift, until - begin)
                    count += until - begin
                elif begin < until:
                    log.mark(begin, until - begin)
        return count
