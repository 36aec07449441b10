"""A container's own dirty bitmap as a DirtySource, and what sources share."""
import errno
from collections.abc import Sequence
from typing import Any

from ._core.errno import error


def fewest_ranges(ranges: Sequence[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """Join (iova, size) ranges that touch, and then those with the smallest gaps, until at most ``limit`` are left.

    >>> fewest_ranges([(0x5000, 0x1000), (0, 0x1000), (0x1000, 0x1000), (0x9000, 0x1000)], 2)
    [(0, 24576), (36864, 4096)]
    """
    ordered = sorted(ranges)
    gaps = sorted(((after[0] - sum(before), i) for i, (before, after)
                   in enumerate(zip(ordered, ordered[1:], strict=False), 1)), reverse=True)
    cuts = sorted(i for gap, i in gaps[:max(limit - 1, 0)] if gap > 0)
    joined = []
    for first, end in zip([0, *cuts], [*cuts, len(ordered)], strict=True):
        if first < end:
            joined.append((ordered[first][0], sum(ordered[end - 1]) - ordered[first][0]))
    return joined


def or_words(into: Any, words: Any) -> int:
    """OR an array of u64 words into a buffer of as many; return the bits that the words have."""
    import numpy
    view = numpy.frombuffer(into, numpy.uint64, len(words))
    view |= words
    return int(numpy.bitwise_count(words).sum())


class ContainerSource:
    """The bitmap that VFIO_IOMMU_DIRTY_PAGES harvests: exact for emulated devices, everything mapped for others.

    Parameters
    ----------
    container : SupportsDirtyTracking
    pgsize : int
        Bytes a bit stands for.
    """

    name = "container bitmap"
    survives_unmap = False              #: the bits of a mapping go with it

    def __init__(self, container: Any, pgsize: int) -> None:
        self.container = container
        self.pgsize = pgsize

    def start(self, ranges: Sequence[tuple[int, int]], pgsize: int) -> None:
        """Start tracking; the bitmap's page size is the container's smallest."""
        if pgsize != self.pgsize:
            raise error(errno.EINVAL, "start_dirty", hint=f"the container tracks pages of {self.pgsize} bytes")
        self.container.start_dirty()

    def harvest(self, iova: int, size: int, into: Any) -> int:
        """OR the pages written since the last harvest into ``into``."""
        import numpy
        words = numpy.zeros((size // self.pgsize + 63) // 64, numpy.uint64)
        self.container.read_dirty(iova, size, words)
        return or_words(into, words)

    def stop(self) -> None:
        """Stop tracking."""
        self.container.stop_dirty()
