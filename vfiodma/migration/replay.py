"""What a migration would have been like: a dirty trace played against a bandwidth."""
import errno
import math
from dataclasses import dataclass

from .._core.errno import error
from .convergence import Convergence, Costs, Decision, DowntimeBreakdown, Forecast, Policy, Sample, Step
from .estimators import clean
from .events import MigrationResult, Round
from .trace import Trace


@dataclass(frozen=True)
class Replay:
    """How it went."""

    bandwidth: float            #: bytes/s
    step: Step                  #: of the last decision
    reason: str
    result: MigrationResult     #: without the last round where the migration was cancelled
    throttle: float             #: at the end
    laps: float                 #: how often the trace was played: above 1 it began again
    forecast: Forecast          #: after the first round

    @property
    def within_limit(self) -> bool:
        """Whether the guest moved, and stood still no longer than allowed."""
        return self.step is not Step.CANCEL and self.result.downtime <= self.result.limit


def replay(trace: Trace, bandwidth: float, policy: Policy | None = None, costs: Costs | None = None, *,
           latency: float = 0.0002, scan: float | None = None, start: float = 0.0) -> Replay:
    """Migrate a traced guest over a link that moves ``bandwidth`` bytes a second.

    The same ``Convergence`` decides as in a migration; what is dirty after each round comes from the trace.

    Parameters
    ----------
    bandwidth : float
        Bytes/s of pages.
    policy, costs : Policy, Costs
        As of a migration.
    latency : float
        Seconds of each acknowledgement.
    scan : float, optional
        Seconds of each harvest; by default 0.3 ms for a GiB.
    start : float
        Where in the trace it begins, in seconds.

    Raises
    ------
    InvalidArgumentError
        EINVAL: no bandwidth, or a time that is none.
    """
    if not 0 < bandwidth < math.inf or not 0 <= latency < math.inf or not 0 <= start < math.inf:
        raise error(errno.EINVAL, "replay", hint="bandwidth is above 0, latency and start are not negative")
    convergence = Convergence(policy, costs)
    costs, size = convergence.costs, trace.npages * trace.pgsize
    scan = 0.0003 * size / (1 << 30) if scan is None else clean(scan)
    result, at, elapsed, npages = MigrationResult(), start, 0.0, trace.npages
    found: Forecast | None = None
    decision: Decision | None = None
    while decision is None or decision.step is Step.CONTINUE:
        nbytes = npages * trace.pgsize
        send = nbytes / bandwidth
        interval = send + latency + scan
        before, at = at, at + interval * (1 - convergence.throttle)
        sent, npages = npages, trace.unique(before, at)
        elapsed += interval
        convergence.observe(Sample(nbytes, send, npages * trace.pgsize, interval, acknowledgement=latency, scan=scan))
        decision = convergence.decide(elapsed)
        found = found or convergence.forecast()
        result.rounds.append(Round(len(result.rounds), sent, 0, nbytes, interval, npages, nbytes / interval,
                                   decision.prediction.total, False, _band(decision), decision.limit,
                                   convergence.dirty_rate, decision.reason))
    assert found is not None
    parts = DowntimeBreakdown()
    if decision.step is not Step.CANCEL:
        # Devices write until they stand still, one after the other.
        stop = clean(costs.stop)
        npages = max(npages, trace.unique(before, at + stop / 2 * (1 - convergence.throttle)))
        predicted, nbytes = decision.prediction.breakdown, npages * trace.pgsize
        parts = DowntimeBreakdown(stop, scan, nbytes / bandwidth, predicted.device_state, latency,
                                  predicted.apply, predicted.start)
        elapsed += parts.total
        seconds = parts.send + parts.acknowledgement
        result.rounds.append(Round(len(result.rounds), npages, 0, nbytes, seconds, 0,
                                   nbytes / seconds if seconds else 0.0, None, final=True))
        result.downtime = parts.total
    result.predicted_downtime, result.band = decision.prediction.total, _band(decision)
    result.limit, result.breakdown = decision.limit, parts
    result.converged = decision.step is Step.SWITCH
    result.bytes, result.seconds = sum(done.bytes for done in result.rounds), elapsed
    return Replay(bandwidth, decision.step, decision.reason, result, convergence.throttle,
                  (at - start) / trace.seconds, found)


def _band(decision: Decision) -> tuple[float, float]:
    return decision.prediction.low, decision.prediction.high
