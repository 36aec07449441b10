"""Two things measured in turn: what else runs on the machine hits both alike, so that ratios can be trusted."""
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """Times of two things, taken in turn.

    Attributes
    ----------
    name, peer : str
        What was measured, and beside what.
    own, other : list of float
        Seconds of each turn.
    amount : float
        Operations, or bytes where ``unit`` is a rate, of a turn.
    unit : {"ns", "us", "ms", "GB/s"}
        Of the figures.
    limit : float, optional
        The least ratio that is wanted.
    """

    name: str
    peer: str
    own: list[float]
    other: list[float]
    amount: float = 1.0
    unit: str = "ns"
    limit: float | None = None

    @property
    def ratios(self) -> list[float]:
        """How many times faster than the peer, of each turn; ascending."""
        return sorted(other / own for own, other in zip(self.own, self.other, strict=True))

    @property
    def ratio(self) -> float:
        """The median."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """Between these are the middle half of the ratios."""
        ratios = self.ratios
        return ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]

    def figure(self, times: list[float]) -> float:
        """Return the median in ``unit``."""
        median = statistics.median(times)
        if self.unit == "GB/s":
            return self.amount / median / 1e9
        return median / self.amount * {"ns": 1e9, "us": 1e6, "ms": 1e3}[self.unit]

    def summary(self) -> dict[str, Any]:
        """Return it all, as it goes to JSON and into a benchmark's notes."""
        low, high = self.spread
        return {"name": self.name, "own": self.figure(self.own), "peer": self.peer, "peer_figure":
                self.figure(self.other), "unit": self.unit, "ratio": self.ratio, "ratio_low": low, "ratio_high": high,
                "limit": self.limit, "turns": len(self.own)}


def in_turn(own: Callable[[], float], other: Callable[[], float], turns: int) -> tuple[list[float], list[float]]:
    """Call two functions that return seconds in turn, one turn of each unmeasured first; return the seconds of both."""
    own(), other()
    times = [(own(), other()) for _ in range(turns)]
    return [pair[0] for pair in times], [pair[1] for pair in times]
