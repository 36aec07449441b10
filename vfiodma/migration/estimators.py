"""What the rounds of a migration tell about the link, the guest's writes and the downtime.  Numbers only, no I/O."""
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields

#: Samples kept: older ones tell nothing about the link and the guest of now.
_KEPT = 12
#: Weight of a sample for each round that came after it.
_FADE = 0.7
#: A zero page is read on one side only, and is not on the wire: this share of the work of a page with content.
_ZERO_WORK = 1 / 8
#: Relative error from which a sample counts as an outlier.
_OUTLIER = 0.2
#: A round that is smaller than what is asked about by this factor does not tell how fast sending is at best.
_SIMILAR = 8
_LARGEST = 1e30
_SMALLEST = 1e-9


def clean(value: float) -> float:
    """Return a number that can be calculated with: 0 for NaN and what is negative, 1e30 at most."""
    return min(value, _LARGEST) if value > 0 else 0.0


@dataclass(frozen=True)
class DowntimeBreakdown:
    """Where a downtime goes, or went; all in seconds.

    The parts follow one another.  What an engine does at the same time counts once, in the part that is waited for.
    """

    stop: float = 0.0               #: until devices and CPUs stand still
    scan: float = 0.0               #: the last harvest of dirty pages
    send: float = 0.0               #: pages: until the last byte is handed over
    device_state: float = 0.0       #: reading and sending the state of devices
    acknowledgement: float = 0.0    #: until the destination said that it has it all
    apply: float = 0.0              #: until the destination has put device states into place
    start: float = 0.0              #: until the guest runs there

    @property
    def total(self) -> float:
        """Seconds in all."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Prediction:
    """The downtime if devices were stopped now."""

    breakdown: DowntimeBreakdown
    low: float                      #: seconds; the band that measured downtimes should be in: 9 of 10 on a calm host
    high: float
    bytes: int                      #: pages that will be sent, in bytes of memory

    @property
    def total(self) -> float:
        """Seconds; infinity while no bandwidth is known."""
        return self.breakdown.total


@dataclass(frozen=True)
class Sample:
    """What was measured in one round with running devices."""

    nbytes: int                     #: on the wire
    seconds: float                  #: from the first byte to the last that was handed over
    dirty_bytes: int                #: in unique pages that were written in ``interval``: what is left to move
    interval: float = 0.0           #: seconds from the harvest before to this one; 0 = the sum of the others
    content_bytes: int | None = None    #: of memory, in pages sent with content; None = nbytes
    zero_bytes: int = 0             #: of memory, in pages sent as zeros
    acknowledgement: float = 0.0    #: seconds from the last byte to the acknowledgement
    scan: float = 0.0               #: seconds of the harvest
    waited: float = 0.0             #: of ``seconds``, those in which the sender stood ready without a CPU


@dataclass
class Costs:
    """What a downtime takes besides memory: known or guessed by the engine, which may change it between rounds."""

    stop: float = 0.0005            #: seconds that devices and CPUs take to stand still
    device_bytes: int = 0           #: state that is left for the downtime, in bytes: of the devices' PRE_COPY estimates
    device_rate: float = 0.0        #: bytes/s of reading and sending it; 0 = that of the link
    device_state: float = 0.0       #: seconds of it that do not depend on the bytes
    apply: float = 0.0              #: seconds
    start: float = 0.0              #: seconds

    def learn(self, measured: DowntimeBreakdown) -> None:
        """Take over the parts of a measured downtime that the rounds before do not show: for the next migration."""
        self.stop, self.apply, self.start = clean(measured.stop), clean(measured.apply), clean(measured.start)
        if not self.device_bytes:
            self.device_state = clean(measured.device_state)


class Link:
    """Seconds as a function of bytes: fixed costs and bandwidth.

    A line through the rounds, fitted to relative errors, so that short rounds tell the fixed costs and long ones the
    bandwidth.  Later rounds count for more, and rounds of about the size that is asked about; outliers count for less.
    """

    def __init__(self) -> None:
        self.bandwidth = 0.0        #: bytes/s on the wire, with weights that halve every round; 0 = unknown
        self._samples: deque[tuple[float, float]] = deque(maxlen=_KEPT)
        self._alone: deque[float] = deque(maxlen=_KEPT)         # seconds of these without the waits for a CPU
        self._bytes = self._seconds = 0.0

    def observe(self, nbytes: float, seconds: float, zero_bytes: float = 0.0, waited: float = 0.0) -> None:
        """Take in what a round sent, in bytes on the wire, the seconds it took, and how many of them without a CPU."""
        seconds = max(clean(seconds), _SMALLEST)
        work = clean(nbytes) + clean(zero_bytes) * _ZERO_WORK
        self._bytes = self._bytes / 2 + clean(nbytes)
        self._seconds = self._seconds / 2 + seconds
        # Rounds that sent nothing tell nothing.
        self.bandwidth = self._bytes / self._seconds
        if work:
            self._samples.append((work, seconds))
            self._alone.append(max(seconds - clean(waited), seconds / 8))

    def seconds(self, nbytes: float, *, quiet: bool = False) -> float:
        """Return how long ``nbytes`` would take: infinity while nothing is known, 0 for nothing.

        ``quiet``: while devices stand still.  Running ones compete with the sender for CPUs and memory, in some rounds
        more than in others: the two fastest rounds, without the time in which the sender stood ready but had no CPU,
        tell how it is without them.
        """
        nbytes = clean(nbytes)
        if not nbytes:
            return 0.0
        if not self._samples:
            return math.inf
        fixed, per_byte = self._line(nbytes)
        line = fixed + nbytes * per_byte
        if not quiet:
            return line
        fastest = sorted(alone / work for (work, _), alone in zip(self._samples, self._alone, strict=True)
                         if work > nbytes / _SIMILAR)[:2]
        return min(line, max(fixed, nbytes * math.sqrt(fastest[0] * fastest[-1]))) if fastest else line

    def _line(self, near: float) -> tuple[float, float]:
        """Return (seconds, seconds a byte) of the line for sizes about ``near``."""
        newest = len(self._samples) - 1
        weights = [_FADE ** (newest - index) / (1 + (math.log(work) - math.log(near)) ** 2)
                   for index, (work, _) in enumerate(self._samples)]
        fixed, per_byte = _fit_line(self._samples, weights)
        for _ in range(2):
            errors = [abs((fixed + per_byte * work) / seconds - 1) for work, seconds in self._samples]
            trust = [min(1.0, _OUTLIER / max(error, _SMALLEST)) for error in errors]
            fixed, per_byte = _fit_line(self._samples, [w * t for w, t in zip(weights, trust, strict=True)])
        return fixed, per_byte


def _fit_line(samples: deque[tuple[float, float]], weights: list[float]) -> tuple[float, float]:
    """Fit y = a + b x with a >= 0, b > 0 to the relative errors."""
    # In units of the largest x and y: bytes and seconds are far apart.
    x_unit, y_unit = max(x for x, _ in samples), max(y for _, y in samples)
    s00 = s01 = s11 = s0 = s1 = 0.0
    for (x, y), weight in zip(samples, weights, strict=True):
        one, slope = y_unit / y, (x / x_unit) * (y_unit / y)
        s00, s01, s11 = s00 + weight * one * one, s01 + weight * one * slope, s11 + weight * slope * slope
        s0, s1 = s0 + weight * one, s1 + weight * slope
    det = s00 * s11 - s01 * s01
    if det > 1e-9 * s00 * s11:
        a, b = (s0 * s11 - s1 * s01) / det, (s1 * s00 - s0 * s01) / det
        if a >= 0 and b > 0:
            return a * y_unit, b * y_unit / x_unit
    return 0.0, max(s1 / s11, _SMALLEST) * y_unit / x_unit if s11 > 0 else y_unit / x_unit


class WorkingSet:
    """Unique bytes written as a function of time: ``W (1 - exp(-r t / W))``.

    For short times memory is written at the rate r; pages that are written again count once, so that no interval,
    however long, has more than the working set W.  Both are fitted to the rounds seen.

    Attributes
    ----------
    rate : float
        r, bytes/s.
    size : float
        W, bytes; infinity while intervals show no saturation.
    """

    def __init__(self) -> None:
        self.rate = 0.0
        self.size = math.inf
        self._points: deque[tuple[float, float]] = deque(maxlen=_KEPT)

    def observe(self, seconds: float, unique_bytes: float) -> None:
        """Take in what was written in an interval."""
        unique_bytes = clean(unique_bytes)
        self._points.append((max(clean(seconds), _SMALLEST), unique_bytes if unique_bytes >= 1 else 0.0))
        self._fit()

    @property
    def settled(self) -> bool:
        """Whether intervals of more than one length were seen, so that rate and size can be told apart."""
        lengths = [seconds for seconds, _ in self._points]
        return bool(lengths) and max(lengths) > 1.5 * min(lengths)

    def curve(self, seconds: float) -> float:
        """Return the fitted function at ``seconds``."""
        seconds = clean(seconds)
        if self.size == math.inf:
            return self.rate * seconds
        return self.size * -math.expm1(-min(self.rate * seconds / self.size, 700.0))

    def unique(self, seconds: float) -> float:
        """Return the bytes that will have been written at least once after ``seconds``."""
        seconds = clean(seconds)
        if not seconds or not self._points:
            return 0.0
        # The nearest interval that was seen corrects the curve: guests have several working sets, the curve has one.
        near, seen = min(self._points, key=lambda point: (abs(math.log(point[0]) - math.log(seconds)), -point[0]))
        there = self.curve(near)
        found = self.curve(seconds) * (seen / there if there > 0 else 1.0)
        return min(found, seen * seconds / near) if seconds > near else min(found, seen)

    def added(self, seconds: float) -> float:
        """Return the bytes that ``seconds`` more would add to the last interval."""
        if not self._points:
            return 0.0
        last, seen = self._points[-1]
        there = self.curve(last)
        share = min(1.0, seen / there) if there > 0 else 1.0
        return max(0.0, self.curve(last + clean(seconds)) - there) * share

    def _fit(self) -> None:
        points = [(seconds, unique, _FADE ** age)
                  for age, (seconds, unique) in enumerate(reversed(self._points)) if unique]
        if not points or not self._points[-1][1]:
            self.rate, self.size = 0.0, math.inf
            return
        most = max(unique for _, unique, _ in points)
        self.size, self.rate, best = math.inf, *_fit_rate(math.inf, points)
        for step in range(16):
            size = most * (1.001 + 0.02 * (1.7 ** step - 1))
            rate, error = _fit_rate(size, points)
            if error < best * 0.999 - 1e-9:     # the larger set unless a smaller one explains more: steps go up
                self.size, self.rate, best = size, rate, error


def _fit_rate(size: float, points: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Return the rate for a working set, and the squared error of the logarithms."""
    if size == math.inf:
        weight = sum(point[2] for point in points)
        mean = sum(w * math.log(unique / seconds) for seconds, unique, w in points) / weight
        return math.exp(mean), sum(w * (math.log(unique / seconds) - mean) ** 2 for seconds, unique, w in points)
    # A saturated interval tells the least rate only: begin at the largest, then go downhill.
    rate = max(-size / seconds * math.log1p(-unique / size) for seconds, unique, _ in points)
    error = math.inf
    for _ in range(4):
        slopes = squares = now = 0.0
        for seconds, unique, weight in points:
            x = min(rate * seconds / size, 700.0)
            written = -math.expm1(-x)
            off = math.log(unique) - math.log(size) - math.log(max(written, 1e-300))
            slope = x * math.exp(-x) / max(written, 1e-300)
            slopes, squares, now = slopes + weight * slope * off, squares + weight * slope ** 2, now + weight * off ** 2
        if now >= error:
            break
        best, error = rate, now
        rate *= math.exp(max(-2.0, min(2.0, slopes / squares if squares > 1e-12 else 0.0)))
    return best, error


class Wait:
    """Seconds that hardly depend on the amount: the mean of the last rounds, later ones and usual ones first."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=_KEPT)

    def observe(self, seconds: float) -> None:
        """Take in what a round took."""
        self._seen.append(clean(seconds))

    @property
    def seconds(self) -> float:
        """What the next will take; 0 while nothing is known."""
        if not self._seen:
            return 0.0
        middle = sorted(self._seen)[len(self._seen) // 2]
        weights = [_FADE ** age for age in range(len(self._seen) - 1, -1, -1)]
        # One late wake-up among short waits says nothing about the next wait.
        usual = [min(seen, 3 * middle) for seen in self._seen]
        return sum(weight * seen for weight, seen in zip(weights, usual, strict=True)) / sum(weights)


class Spread:
    """How far predictions are off, as a share: learned from those of rounds, which the next round proves or not."""

    def __init__(self, guess: float) -> None:
        self._guess = clean(guess)
        self._off: deque[float] = deque(maxlen=_KEPT)

    def observe(self, predicted: float, measured: float) -> None:
        """Compare what a round took with what was predicted for it."""
        if 0 < predicted < math.inf and 0 < measured < math.inf:
            self._off.append(max(-1.0, min(1.0, math.log(measured) - math.log(predicted))))

    @property
    def share(self) -> float:
        """A prediction p means p / (1 + share) to p (1 + share)."""
        weights = [_FADE ** age for age in range(len(self._off) - 1, -1, -1)]
        # 1.65 standard deviations of a normal error leave out one of ten.
        squares = sum(weight * (1.65 * off) ** 2 for weight, off in zip(weights, self._off, strict=True))
        return math.sqrt((self._guess ** 2 + squares) / (1 + sum(weights)))


def next_rounds(left: float, seconds_of: Callable[[float], float], unique: Callable[[float], float], most: int,
                floor: float) -> list[tuple[float, float]]:
    """Play rounds: return (seconds, bytes left) of each.

    They end when what is left shrinks by less than 4 %, or takes less than ``floor`` seconds, or ``most`` are over.
    """
    rounds: list[tuple[float, float]] = []
    while len(rounds) < most:
        seconds = seconds_of(left)
        before, left = left, unique(seconds)
        rounds.append((seconds, left))
        if left >= before * 0.96 or not math.isfinite(seconds) or seconds_of(left) <= floor:
            break
    return rounds
