"""Who knows what DMA has written: a device's own log."""
from ...sources import fewest_ranges

_MAX_RANGES = 256               # of one log, as the kernel's interface has it


class PortSource:
    """A device's own DMA log as a DirtySource: exact, page by page."""

    def __init__(self, port):
        self.port = port
        self.name = f"DMA log of {port.device}"

    def start(self, ranges, pgsize):
        """Start the log; neighbouring ranges are joined first, as devices take few."""
        self.port.start_logging(fewest_ranges(ranges, _MAX_RANGES), pgsize)

    def extend(self, iova, size):
        """Log a further range."""
        self.port.extend_logging(iova, size)

    def harvest(self, iova, size, into):
        """OR the pages written since the last harvest into ``into``."""
        return self.port.harvest(iova, size, into)

    def stop(self):
        """Stop the log."""
        self.port.stop_logging()
