"""Guest memory as migration sees it: numbered blocks, one bit a page, and arithmetic on runs of pages."""
import copy
import errno
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Self

from .._core.errno import error
from ..memory import GuestMemory, MemoryRegion

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

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

    def again(self) -> "MemoryLayout":
        """Return another layout of the same blocks, which keeps the memory open by itself."""
        other = copy.copy(self)
        other.blocks = [block._replace(view=block.region.view()) for block in self.blocks]
        return other

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
