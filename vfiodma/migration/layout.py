"""Guest memory as migration sees it: numbered blocks, one bit a page, and arithmetic on runs of pages."""
import errno
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from .._core.errno import error
from ..memory import GuestMemory, MemoryRegion

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Pages = npt.NDArray[np.uint64]      #: (n,) numbers of pages
    Runs = npt.NDArray[np.uint64]       #: (n, 2) first page and number of pages


class Block(NamedTuple):
    """A region of guest memory."""

    number: int
    gpa: int
    npages: int
    first_bit: int              #: of its page 0 in the migration's bitmaps; a multiple of 64
    region: MemoryRegion
    view: memoryview            #: its bytes; keeps the region open


class MemoryLayout:
    """The blocks of a guest memory, device memory left out.

    Parameters
    ----------
    memory : GuestMemory
        Can't be closed before this object.
    pgsize : int
        Bytes of a page.
    """

    def __init__(self, memory: GuestMemory, pgsize: int) -> None:
        self.pgsize = pgsize
        self.blocks: list[Block] = []
        self.nbits = 0          #: of a bitmap; blocks start at whole words, bits between them stay 0
        for gpa, region in memory:
            if region.mmio:
                continue
            if region.size % pgsize or gpa % pgsize:
                raise error(errno.EINVAL, "migrate", gpa, region.size, f"regions are multiples of {pgsize:#x}")
            npages = region.size // pgsize
            self.blocks.append(Block(len(self.blocks), gpa, npages, self.nbits, region, region.view()))
            self.nbits += (npages + 63) // 64 * 64
        if not self.blocks:
            raise error(errno.EINVAL, "migrate", hint="there is no memory to move")

    @property
    def shape(self) -> tuple[tuple[int, int], ...]:
        """(gpa, bytes) of each block."""
        return tuple((block.gpa, block.npages * self.pgsize) for block in self.blocks)

    @property
    def npages(self) -> int:
        """Pages of all blocks."""
        return sum(block.npages for block in self.blocks)

    def digest(self) -> bytes:
        """Return the SHA-256 of all memory; the GIL is released."""
        digest = hashlib.sha256()
        for block in self.blocks:
            digest.update(block.view)
        return digest.digest()

    def close(self) -> None:
        """Let the memory go; idempotent."""
        for block in self.blocks:
            block.view.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def split_runs(runs: "Runs", npages: int) -> "Iterator[Runs]":
    """Cut runs into portions of ``npages`` pages; the last may have fewer."""
    import numpy as np

    ends = np.cumsum(runs[:, 1])
    starts = ends - runs[:, 1]
    for low in range(0, int(ends[-1]) if len(runs) else 0, npages):
        high = min(low + npages, int(ends[-1]))
        first, stop = int(np.searchsorted(ends, low, "right")), int(np.searchsorted(starts, high, "left"))
        part = runs[first:stop].copy()
        part[-1, 1] -= ends[stop - 1] - np.uint64(high)
        skip = np.uint64(low) - starts[first]
        part[0, 0] += skip
        part[0, 1] -= skip
        yield part


def pages_of(runs: "Runs") -> "Pages":
    """Return the number of every page of the runs."""
    import numpy as np

    before = np.cumsum(runs[:, 1]) - runs[:, 1]
    numbers = np.arange(int(runs[:, 1].sum()), dtype=np.uint64)
    return numbers + np.repeat(runs[:, 0] - before, runs[:, 1].astype(np.int64))


def runs_of(pages: "Pages") -> "Runs":
    """Return ascending pages as runs."""
    import numpy as np

    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    edges = np.concatenate(([0], breaks, [len(pages)])) if len(pages) else np.zeros(1, np.int64)
    return np.column_stack((pages[edges[:-1]], np.diff(edges).astype(np.uint64)))


def check_runs(runs: "Runs", npages: int) -> str:
    """Return what is wrong with runs from outside: empty, unordered, overlapping, out of bounds; "" if nothing is.

    Overflow is not possible: the count is compared with what is left behind the first page.
    """
    first, count = runs[:, 0], runs[:, 1]
    limit: Any = first.dtype.type(npages)
    if (count == 0).any():
        return "an empty run"
    if (first >= limit).any() or (count > limit - first).any():
        return f"a run ends behind the block's {npages} pages"
    if (first[1:] < first[:-1] + count[:-1]).any():
        return "runs that are not ascending or overlap"
    return ""
