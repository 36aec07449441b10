"""The ledger: which pages the destination does not have for certain."""
from .._core.bitmap import DirtyBitmap


class Ledger:
    """Two bitmaps, *pending* and *in flight*: a page leaves only when the receiver has acknowledged its epoch.

    A failure puts what was in flight back, so that a broken migration forgets nothing.

    Parameters
    ----------
    nbits, pgsize : int
        Of the bitmaps.
    """

    def __init__(self, nbits: int, pgsize: int) -> None:
        self.pending = DirtyBitmap(nbits, pgsize)
        self.in_flight = DirtyBitmap(nbits, pgsize)

    def take(self) -> DirtyBitmap:
        """Put everything pending into flight and return it; nothing may be in flight."""
        self.pending.harvest(self.in_flight)
        return self.in_flight

    def retire(self) -> None:
        """The epoch was acknowledged."""
        self.in_flight.clear()

    def put_back(self) -> None:
        """The epoch failed: everything in flight is pending again."""
        self.in_flight.harvest(self.pending)
