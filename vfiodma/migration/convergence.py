"""When to stop the devices.  Numbers only: no I/O, no clock; docs/convergence.md has the formulae."""
import enum
import errno
import math
from collections import deque
from dataclasses import dataclass, replace

from .._core.errno import error
from .estimators import (
    Costs,
    DowntimeBreakdown,
    Link,
    Prediction,
    Sample,
    Spread,
    Wait,
    WorkingSet,
    clean,
    next_rounds,
)

__all__ = ["Convergence", "Costs", "Decision", "DowntimeBreakdown", "Forecast", "Policy", "Prediction", "Sample",
           "Step", "forecast"]

_HISTORY = 1000             # rounds of which what was left is remembered
_FORECAST_ROUNDS = 100


class Step(enum.Enum):
    """What to do after a round."""

    CONTINUE = "continue"       #: another round
    SWITCH = "switch"           #: stop the devices: the limit will be kept
    FORCED = "forced"           #: no rounds or no time are left; stop the devices although the limit will be missed
    CANCEL = "cancel"           #: no time is left, and the guest is to stay where it is


@dataclass(frozen=True)
class Policy:
    """What is wanted of a migration.

    Parameters
    ----------
    downtime_limit : float
        Seconds that the guest may stand still.
    max_rounds : int
        Rounds with running devices, at most.
    downtime_max : float
        The limit rises to this, by the same factor each step, while it is out of reach; 0 = it stays.
    ramp_steps : int
        Steps from ``downtime_limit`` to ``downtime_max``.
    ramp_rounds : int
        Rounds above the limit before each step; a stall is a step at once.
    ramp_seconds : float
        In place of ``ramp_rounds``, seconds from step to step; 0 = by rounds.
    timeout : float
        Seconds from the start of the migration to the end of the last round with running devices; 0 = any.
    on_timeout : {"force", "cancel", "ignore"}
        What happens then, and after ``max_rounds``, when the limit is out of reach: the guest is stopped all the same,
        the migration is given up, or (after the timeout only; after ``max_rounds`` it means "force") nothing.
    stall_share, stall_rounds : float, int
        A stall: in so many rounds the least that was left fell by less than this share.
    near_minimum : float
        What is left counts as the minimum when it is at most this share above it.
    margin : float
        How far predictions are off, as a share, before anything shows it.
    floor : float
        Seconds; below this downtime another round is not worth it.
    shrink : float
        A round is worth another one when it left at most this share of the bytes before.
    throttle_max : float
        How far guests may be slowed down, 0 (not at all) to 0.99.
    throttle_share : float
        Slow down when memory is written faster than this share of the bandwidth, twice in a row.
    throttle_first, throttle_step : float
        The first throttle, and what each step adds.
    """

    downtime_limit: float = 0.3
    max_rounds: int = 16
    downtime_max: float = 0.0
    ramp_steps: int = 8
    ramp_rounds: int = 2
    ramp_seconds: float = 0.0
    timeout: float = 0.0
    on_timeout: str = "force"
    stall_share: float = 0.04
    stall_rounds: int = 4
    near_minimum: float = 0.05
    margin: float = 0.25
    floor: float = 0.005
    shrink: float = 0.6
    throttle_max: float = 0.0
    throttle_share: float = 0.5
    throttle_first: float = 0.2
    throttle_step: float = 0.1

    def __post_init__(self) -> None:
        wrong = [name for name in ("downtime_limit", "max_rounds", "ramp_steps", "ramp_rounds", "stall_rounds",
                                   "throttle_share") if not 0 < getattr(self, name) < math.inf]
        wrong += [name for name in ("downtime_max", "ramp_seconds", "timeout", "stall_share", "near_minimum", "margin",
                                    "floor", "shrink", "throttle_max", "throttle_first", "throttle_step")
                  if not 0 <= getattr(self, name) < math.inf]
        if wrong:
            raise error(errno.EINVAL, "migrate", hint=f"{wrong[0]} can't be {getattr(self, wrong[0])}")
        if self.on_timeout not in ("force", "cancel", "ignore"):
            raise error(errno.EINVAL, "migrate", hint='on_timeout is "force", "cancel" or "ignore"')
        if 0 < self.downtime_max < self.downtime_limit:
            raise error(errno.EINVAL, "migrate", hint="downtime_max is at least downtime_limit, or 0")
        if self.throttle_max > 0.99:
            raise error(errno.EINVAL, "migrate", hint="throttle_max is 0.99 at most: a guest that stands still is down")

    @property
    def last_limit(self) -> float:
        """The limit at the end of the ramp."""
        return max(self.downtime_limit, self.downtime_max)

    def limit(self, step: int) -> float:
        """Return the limit after ``step`` steps of the ramp."""
        share = min(step, self.ramp_steps) / self.ramp_steps
        return self.downtime_limit * (self.last_limit / self.downtime_limit) ** share


@dataclass(frozen=True)
class Decision:
    """What to do after a round, and why."""

    step: Step
    reason: str                 #: for people
    limit: float                #: seconds; the ramp may have raised it
    prediction: Prediction
    throttle: float             #: share by which the guest is to be slowed down, 0 to 0.99
    stalled: bool               #: what is left does not fall any more


@dataclass(frozen=True)
class Forecast:
    """Whether a migration will keep its limit, with the numbers."""

    converges: bool | None      #: None: it can't be said yet, the intervals seen are all of about one length
    bandwidth: float            #: bytes/s
    dirty_rate: float           #: bytes/s at which memory is written, pages written again counted once
    working_set: float          #: bytes; infinity when no bound is known
    rounds: int                 #: until what is left does not fall any more
    seconds: float              #: of these rounds
    left: int                   #: bytes for the downtime, at best
    downtime: float             #: seconds, at best
    limit: float                #: seconds
    text: str                   #: for people

    def __str__(self) -> str:
        return self.text


class Convergence:
    """Estimates over the rounds, and the decision after each.

    Parameters
    ----------
    policy : Policy
        What is wanted.
    costs : Costs
        What a downtime takes besides memory; may be changed between rounds.

    Attributes
    ----------
    rounds : int
        Taken in.
    left : int
        Bytes to move, after the last round.
    link : Link
    working_set : WorkingSet
    throttle : float
        Advised, 0 to 0.99.

    Notes
    -----
    ``observe`` each round, then ``decide``.  Whatever numbers come in, no result is NaN or negative.  Not thread-safe.
    """

    def __init__(self, policy: Policy | None = None, costs: Costs | None = None) -> None:
        self.policy = policy or Policy()
        self.costs = costs or Costs()
        self.rounds = 0
        self.left = 0
        self.throttle = 0.0
        self.link, self.working_set = Link(), WorkingSet()
        self._scan, self._acknowledgement, self._spread = Wait(), Wait(), Spread(self.policy.margin)
        self._density = 1.0                     # bytes on the wire for a byte of a dirty page
        self._history: deque[int] = deque(maxlen=_HISTORY)
        self._ramp = self._above = self._too_fast = 0
        self._ramped_at = 0.0
        self._stall_from = 0                    # the round from which a stall is looked for

    @property
    def bandwidth(self) -> float:
        """Bytes/s on the wire; 0 while unknown."""
        return self.link.bandwidth

    @property
    def dirty_rate(self) -> float:
        """Bytes/s written into pages that the last round had not seen written."""
        return self.working_set.rate

    @property
    def limit(self) -> float:
        """Seconds of downtime allowed now."""
        return self.policy.limit(self._ramp)

    def observe(self, sample: Sample) -> None:
        """Take a round in."""
        took = clean(sample.seconds) + clean(sample.acknowledgement)
        if self.rounds:
            expected = self._round_seconds(self.left)
            self._spread.observe(expected - self._scan.seconds, took)
        self.rounds += 1
        content = clean(sample.nbytes if sample.content_bytes is None else sample.content_bytes)
        self.link.observe(sample.nbytes, sample.seconds, sample.zero_bytes, sample.waited)
        if content:     # the first round says little of how dirty pages compress, the later ones do
            self._density = min(1.0, clean(sample.nbytes) / content) if content > 0 else 1.0
        self._scan.observe(sample.scan)
        self._acknowledgement.observe(sample.acknowledgement)
        interval = clean(sample.interval) or took + clean(sample.scan)
        # A guest slowed down by a half writes in two seconds what it wrote in one.
        self.working_set.observe(interval * (1 - self.throttle), sample.dirty_bytes)
        self.left = int(clean(sample.dirty_bytes))
        self._history.append(self.left)

    def observe_writes(self, seconds: float, dirty_bytes: int) -> None:
        """Take in an interval that was measured beside the rounds: the unique bytes written in ``seconds``.

        A short one, before the start or within the long first round, tells the rate that the first round hides.
        """
        self.working_set.observe(clean(seconds) * (1 - self.throttle), dirty_bytes)

    def predict(self) -> Prediction:
        """Return the downtime if the devices were stopped now."""
        costs = self.costs
        # Devices stop one after the other.
        late = self.working_set.added(clean(costs.stop) / 2 * (1 - self.throttle))
        nbytes = self.left + int(late)
        state = clean(costs.device_state)
        if costs.device_bytes > 0:
            rate = clean(costs.device_rate) or self.link.bandwidth
            state += clean(costs.device_bytes) / rate if rate else math.inf
        parts = DowntimeBreakdown(
            stop=clean(costs.stop), scan=self._scan.seconds, send=self.link.seconds(nbytes * self._density, quiet=True),
            device_state=state, acknowledgement=self._acknowledgement.seconds, apply=clean(costs.apply),
            start=clean(costs.start))
        share = 1 + self._spread.share
        # What slowed rounds down may not have been the guest: then it is there in the downtime as well.
        slow = replace(parts, send=self.link.seconds(nbytes * self._density))
        return Prediction(parts, parts.total / share, slow.total * share, nbytes)

    def expired(self, elapsed: float) -> bool:
        """Whether the time is over, ``elapsed`` seconds after the start: for engines that can break off a round."""
        return 0 < self.policy.timeout <= elapsed and self.policy.on_timeout != "ignore"

    def decide(self, elapsed: float = 0.0) -> Decision:
        """Decide, ``elapsed`` seconds after the start of the migration.

        The limit is not the goal: while rounds shrink fast, one more costs little and shortens the downtime.
        """
        elapsed = clean(elapsed)
        prediction, stalled = self.predict(), self._stalled()
        self._raise_limit(prediction, elapsed, stalled)
        limit = self.limit
        within = prediction.total <= limit
        surely = prediction.high <= limit
        self._advise_throttle(within)
        step, reason = Step.CONTINUE, "another round leaves less"
        if within and (surely or stalled or self._at_minimum()):
            if not self._worth_another(prediction) or self.rounds >= self.policy.max_rounds or self.expired(elapsed):
                step, reason = Step.SWITCH, "the limit will be kept" if surely else "less will not be left"
        elif within and (self.rounds >= self.policy.max_rounds or self.expired(elapsed)):
            step, reason = Step.SWITCH, "the limit will be kept, just"
        elif self.expired(elapsed) or self.rounds >= self.policy.max_rounds:
            step = Step.CANCEL if self.policy.on_timeout == "cancel" else Step.FORCED
            reason = "the time is over" if self.expired(elapsed) else "the rounds are over"
        elif stalled and self._at_minimum() and self._nearly_over(elapsed):
            step, reason = Step.FORCED, "a local minimum, and hardly any rounds or time are left"
        elif stalled:
            reason = "stalled: what is left does not fall"
        return Decision(step, reason, limit, prediction, self.throttle, stalled)

    def forecast(self) -> Forecast:
        """Say whether the limit, at the end of its ramp, will be kept; after a round at least.

        Raises
        ------
        InvalidArgumentError
            EINVAL: no round was taken in.
        """
        if not self.rounds:
            raise error(errno.EINVAL, "forecast", hint="observe a round first, or call convergence.forecast()")
        work = 1 - self.throttle
        # Intervals of one length do not tell a guest that writes slowly from one that writes the same pages quickly.
        worst = self.left if not self.working_set.settled else 0
        rounds = next_rounds(self.left, self._round_seconds, lambda t: self.working_set.unique(t * work),
                             max(1, min(_FORECAST_ROUNDS, self.policy.max_rounds - self.rounds)), self.policy.floor)
        left = min(self.left, *(left for _, left in rounds))
        parts = replace(self.predict().breakdown, send=self.link.seconds(left * self._density, quiet=True))
        bandwidth = self.link.bandwidth / self._density if self._density else 0.0
        fixed = parts.total - parts.send
        return _forecast(bandwidth, self.working_set.rate * work, self.working_set.size, rounds, left, parts.total,
                         fixed, self.policy.last_limit, fixed + self.link.seconds(worst * self._density, quiet=True))

    # Inside

    def _round_seconds(self, nbytes: float) -> float:
        return self.link.seconds(nbytes * self._density) + self._acknowledgement.seconds + self._scan.seconds

    def _worth_another(self, prediction: Prediction) -> bool:
        """Whether rounds shrink so fast that one more pays off below the limit."""
        shrink = self.policy.shrink
        if prediction.total <= self.policy.floor or len(self._history) > 1 and self.left > self._history[-2] * shrink:
            return False
        seconds = self._round_seconds(self.left)
        return self.working_set.unique(seconds * (1 - self.throttle)) <= self.left * shrink

    def _stalled(self) -> bool:
        """Whether the least that was left fell by less than ``stall_share`` in the last rounds."""
        window = self.policy.stall_rounds
        seen = list(self._history)[max(0, self._stall_from - (self.rounds - len(self._history))):]
        return len(seen) > window and min(seen) > min(seen[:-window]) * (1 - self.policy.stall_share)

    def _at_minimum(self) -> bool:
        return len(self._history) > self.policy.stall_rounds and \
            self.left <= min(self._history) * (1 + self.policy.near_minimum)

    def _nearly_over(self, elapsed: float) -> bool:
        """Whether an eighth of the rounds or of the time is left: enough to find the minimum of an oscillation."""
        policy = self.policy
        if policy.on_timeout == "cancel":
            return False
        return self.rounds >= policy.max_rounds - policy.max_rounds // 8 or \
            0 < policy.timeout * 7 / 8 <= elapsed and policy.on_timeout == "force"

    def _raise_limit(self, prediction: Prediction, elapsed: float, stalled: bool) -> None:
        """One step of the ramp when it is due."""
        policy = self.policy
        if policy.downtime_max <= policy.downtime_limit or prediction.high <= self.limit:
            self._above = 0
            return
        self._above += 1
        if policy.ramp_seconds:
            steps = int((elapsed - self._ramped_at) / policy.ramp_seconds)
            due = min(max(steps, 0), policy.ramp_steps)
        else:
            due = int(self._above > policy.ramp_rounds or stalled)
        if due:
            self._ramp, self._above = min(self._ramp + due, policy.ramp_steps), 0
            self._ramped_at = elapsed

    def _advise_throttle(self, within: bool) -> None:
        """Slow the guest down one step when it writes too fast twice in a row."""
        policy = self.policy
        if not policy.throttle_max or within:
            self._too_fast = 0
            return
        seconds = self._round_seconds(self.left)
        written = self.working_set.unique(seconds * (1 - self.throttle)) * self._density
        fast = 0 < seconds < math.inf and written > policy.throttle_share * self.link.bandwidth * seconds
        self._too_fast = self._too_fast + 1 if fast else 0
        if self._too_fast >= 2 and self.throttle < policy.throttle_max:
            self.throttle = min(policy.throttle_max, self.throttle + (
                policy.throttle_step if self.throttle else policy.throttle_first))
            self._too_fast, self._stall_from = 0, self.rounds       # it has to show what it does first


def forecast(size: float, bandwidth: float, dirty_rate: float, working_set: float = math.inf, *,
             downtime_limit: float = 0.3, fixed: float = 0.0, max_rounds: int = _FORECAST_ROUNDS) -> Forecast:
    """Say before the start whether a migration will keep its limit.

    Parameters
    ----------
    size : float
        Bytes of memory.
    bandwidth, dirty_rate : float
        Bytes/s of the link, and of the guest's writes at first.
    working_set : float
        Bytes that are written over and over; the size of memory is the bound that is always known.
    downtime_limit : float
        Seconds.
    fixed : float
        Seconds of a downtime that do not depend on memory.
    max_rounds : int
        Rounds with running devices, at most.

    Examples
    --------
    >>> print(forecast(64e9, 2.1e9, 3.1e9))
    will not converge: dirty 3.1 GB/s > link 2.1 GB/s; 37.9 GB would be left, 18.0 s of downtime, the limit is 300 ms
    >>> print(forecast(64e9, 2.1e9, 3.1e9, working_set=0.2e9))
    will converge: 6 rounds in 30.8 s, then 56 ms of downtime, the limit is 300 ms; dirty 3.1 GB/s, link 2.1 GB/s
    """
    size, bandwidth, dirty_rate, fixed = clean(size), clean(bandwidth), clean(dirty_rate), clean(fixed)
    bound = min(clean(working_set), size)
    guest = WorkingSet()
    guest.rate, guest.size = dirty_rate, max(bound, 1.0)

    def seconds_of(nbytes: float) -> float:
        return nbytes / bandwidth if bandwidth else math.inf if nbytes else 0.0

    rounds = next_rounds(size, seconds_of, guest.curve, max(1, max_rounds), Policy.floor)
    left = min(left for _, left in rounds)
    return _forecast(bandwidth, dirty_rate, bound, rounds, left, fixed + seconds_of(left), fixed, clean(downtime_limit))


def _forecast(bandwidth: float, dirty_rate: float, working_set: float, rounds: list[tuple[float, float]], left: float,
              downtime: float, fixed: float, limit: float, worst: float = 0.0) -> Forecast:
    seconds = sum(seconds for seconds, _ in rounds)
    converges = None if downtime <= limit < worst else downtime <= limit
    rates = f"dirty {_bytes(dirty_rate)}/s, link {_bytes(bandwidth)}/s"
    if converges is None:
        text = f"open: {_seconds(downtime)} to {_seconds(worst)} of downtime, the limit is {_seconds(limit)}; " \
               f"dirty at least {_bytes(dirty_rate)}/s, link {_bytes(bandwidth)}/s"
    elif converges:
        text = f"will converge: {len(rounds)} rounds in {_seconds(seconds)}, then {_seconds(downtime)} of downtime, " \
               f"the limit is {_seconds(limit)}; {rates}"
    else:
        if fixed > limit:
            why = f"{_seconds(fixed)} of a downtime do not depend on memory"
        elif dirty_rate > bandwidth:
            why = rates.replace(", link", " > link")
        else:
            why = rates
        text = f"will not converge: {why}; {_bytes(left)} would be left, {_seconds(downtime)} of downtime, " \
               f"the limit is {_seconds(limit)}"
    return Forecast(converges, bandwidth, dirty_rate, working_set, len(rounds), seconds, int(clean(left)), downtime,
                    limit, text)


def _bytes(value: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.1f} {name}"
    return f"{value:.0f} B"


def _seconds(value: float) -> str:
    if not math.isfinite(value):
        return "endless"
    return f"{value:.1f} s" if value >= 1 else f"{value * 1e3:.{0 if value >= 0.01 else 1}f} ms"
