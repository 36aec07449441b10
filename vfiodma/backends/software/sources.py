"""Who knows what DMA has written: a device's own log."""


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
