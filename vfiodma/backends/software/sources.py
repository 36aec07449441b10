"""Who knows what DMA has written: a device's own log, or the container's bitmap."""
import errno

from ..._core.errno import error


class PortSource:
    """A device's own DMA log as a DirtySource: exact, page by page."""

    def __init__(self, port):
        self.port = port
        self.name = f"DMA log of {port.device}"

    def start(self, ranges, pgsize):
        """Start the log; neighbouring ranges are joined first, as devices take few."""
        self.port.start_logging(_joined(ranges), pgsize)

    def harvest(self, iova, size, into):
        """OR the pages written since the last harvest into ``into``."""
        return self.port.harvest(iova, size, into)

    def stop(self):
        """Stop the log."""
        self.port.stop_logging()


def _joined(ranges, most=256):
    """Join touching ranges, then the closest ones, until at most ``most`` are left."""
    joined: list[list[int]] = []
    for iova, size in sorted(ranges):
        if joined and joined[-1][0] + joined[-1][1] == iova:
            joined[-1][1] += size
        else:
            joined.append([iova, size])
    if len(joined) > most:
        gaps = sorted(range(1, len(joined)), key=lambda i: joined[i][0] - joined[i - 1][0] - joined[i - 1][1])
        for i in sorted(gaps[:len(joined) - most], reverse=True):
            joined[i - 1][1] = joined[i][0] + joined[i][1] - joined[i - 1][0]
            del joined[i]
    return [tuple(item) for item in joined]


class ContainerSource:
    """The container's bitmap as a DirtySource: exact for emulated devices."""

    name = "container bitmap"

    def __init__(self, type1):
        self.type1 = type1

    def start(self, ranges, pgsize):
        """Start tracking; the bitmap's page size is the container's smallest."""
        smallest = self.type1.pgsizes & -self.type1.pgsizes
        if pgsize != smallest:
            raise error(errno.EINVAL, "start_dirty", hint=f"the container tracks pages of {smallest} bytes")
        self.type1.start_dirty()

    def harvest(self, iova, size, into):
        """OR the pages written since the last harvest into ``into``."""
        import numpy
        smallest = self.type1.pgsizes & -self.type1.pgsizes
        words = numpy.zeros((size // smallest + 63) // 64, numpy.uint64)
        self.type1.read_dirty(iova, size, words)
        view = numpy.frombuffer(into, numpy.uint64, len(words))
        view |= words
        return int(numpy.bitwise_count(words).sum())

    def stop(self):
        """Stop tracking."""
        self.type1.stop_dirty()
