"""When to stop the devices: bandwidth, dirty rate, predicted downtime.  Numbers only, no I/O."""
import enum
from dataclasses import dataclass


class Step(enum.Enum):
    """What to do after a round."""

    CONTINUE = "continue"       #: another round
    SWITCH = "switch"           #: stop the devices: the limit will be kept
    FORCED = "forced"           #: no rounds are left; stop the devices although the limit will be missed


@dataclass
class Convergence:
    """Estimates over the rounds, and the decision.

    Bandwidth is bytes over seconds with weights that halve every round, so that a short round, which is mostly waiting,
    counts for little.

    Attributes
    ----------
    downtime_limit : float
        Seconds.
    max_rounds : int
        Rounds with running devices.
    stopping : float
        Seconds that devices take to stop and to hand over their state: a guess, part of every prediction.
    margin : float
        The prediction must keep the limit even when it is this share too low.
    floor : float
        Seconds; below this another round is not worth it.
    shrink : float
        A round is worth another one when it left at most this share of the pages before.
    """

    downtime_limit: float = 0.3
    max_rounds: int = 16
    stopping: float = 0.002
    margin: float = 0.25
    floor: float = 0.005
    shrink: float = 0.6
    rounds: int = 0
    bandwidth: float = 0.0          #: bytes/s; 0 = not measured yet
    dirty_rate: float = 0.0         #: bytes/s of unique pages, in the last round
    overhead: float = 0.0           #: seconds of harvest and acknowledgement, of the last round
    predicted: float = float("inf")     #: downtime in seconds, if the devices were stopped now
    _bytes: float = 0.0
    _seconds: float = 0.0
    _left: int | None = None

    def observe(self, nbytes: int, seconds: float, overhead: float, dirty_bytes: int) -> None:
        """Take a round in.

        Parameters
        ----------
        nbytes : int
            Sent.
        seconds : float
            From the first byte to the acknowledgement.
        overhead : float
            Seconds that do not depend on the amount: harvest, acknowledgement.
        dirty_bytes : int
            In unique pages that were written meanwhile.
        """
        self.rounds += 1
        self._bytes = self._bytes / 2 + nbytes
        self._seconds = self._seconds / 2 + max(seconds, 1e-9)
        self.bandwidth = self._bytes / self._seconds
        self.dirty_rate = dirty_bytes / max(seconds, 1e-9)
        self.overhead = overhead

    def predict(self, nbytes: int) -> float:
        """Return the seconds of downtime for moving ``nbytes``."""
        if not nbytes:
            return self.stopping + self.overhead
        return self.stopping + self.overhead + nbytes / self.bandwidth if self.bandwidth else float("inf")

    def decide(self, left: int) -> Step:
        """Decide with ``left`` bytes still to move.

        The limit is not the goal: while rounds shrink fast, one more costs little and shortens the downtime.
        """
        before, self._left = self._left, left
        self.predicted = self.predict(left)
        fits = self.predicted * (1 + self.margin) <= self.downtime_limit
        if self.rounds >= self.max_rounds:
            return Step.SWITCH if fits else Step.FORCED
        shrinking = before is None or left <= before * self.shrink
        worth_it = shrinking and self.predicted > self.floor
        return Step.SWITCH if fits and not worth_it else Step.CONTINUE

    @property
    def hopeless(self) -> bool:
        """Whether memory is written faster than it can be moved, so that rounds can't shrink."""
        return 0 < self.bandwidth <= self.dirty_rate
