"""A container's own dirty bitmap as a DirtySource."""
import errno
from collections.abc import Sequence
from typing import Any

from ._core.errno import error


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
        view = numpy.frombuffer(into, numpy.uint64, len(words))
        view |= words
        return int(numpy.bitwise_count(words).sum())

    def stop(self) -> None:
        """Stop tracking."""
        self.container.stop_dirty()
