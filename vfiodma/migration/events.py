"""What a migration tells while it runs."""
import math
from dataclasses import dataclass, field
from typing import Any

from .convergence import DowntimeBreakdown, Forecast


@dataclass
class Progress:
    """A chunk of pages went out."""

    epoch: int
    pages: int          #: done in this epoch, zero pages included
    total: int          #: of this epoch


@dataclass
class Round:
    """One epoch of the stream was acknowledged."""

    epoch: int
    pages: int                  #: sent with content
    zero_pages: int             #: sent as runs only
    bytes: int                  #: on the wire
    seconds: float
    dirty_pages: int            #: unique pages written meanwhile, which are left
    bandwidth: float            #: bytes/s on the wire
    predicted_downtime: float | None    #: seconds, if the devices had been stopped after it; None for the last
    final: bool = False
    band: tuple[float, float] | None = None     #: seconds; where 9 of 10 such downtimes should be
    limit: float = 0.0              #: seconds of downtime allowed; it may rise from round to round
    dirty_rate: float = 0.0         #: bytes/s written into pages that were clean
    reason: str = ""                #: why another round follows, or none


@dataclass
class Stage:
    """A part of the migration begins.

    "introduce", "rounds", "prepare", "stopped", "moved", "release", "given"; with post-copy "pushing" after that.
    """

    name: str


@dataclass
class Broken:
    """The connection broke; what is in flight will be sent again."""

    error: Exception


@dataclass
class Resumed:
    """The stream goes on over another connection."""

    epochs: int         #: that the destination has in memory
    again: int          #: pages that were in flight and are pending again


@dataclass
class Throttled:
    """The machine was told to slow down."""

    share: float        #: of its speed that it gives up: 0 = none, 0.99 = nearly all


@dataclass
class PostcopyBegun:
    """The guest is the destination's, and so many pages of it are not."""

    pages: int
    reason: str


@dataclass
class PostcopyProgress:
    """Pages went out after the hand-over; about once a second."""

    left: int           #: pages
    faults: int         #: pages that somebody waited for, so far


@dataclass
class PostcopyDone:
    """Every page is where the guest is."""

    pages: int = 0                  #: sent with content, after the hand-over
    zero_pages: int = 0
    bytes: int = 0                  #: on the wire
    seconds: float = 0.0
    faults: int = 0                 #: pages that somebody waited for
    fault_median: float = 0.0       #: seconds from the fault to the page, as the destination's helper sees it
    fault_max: float = 0.0
    breaks: int = 0                 #: connections that were lost meanwhile


@dataclass
class MigrationResult:
    """What a migration took; the last of its events."""

    rounds: list[Round] = field(default_factory=list)
    downtime: float = 0.0           #: seconds from stopping the devices to the destination's last acknowledgement
    predicted_downtime: float = 0.0
    band: tuple[float, float] = (0.0, 0.0)
    limit: float = 0.0              #: seconds; of the last decision
    breakdown: DowntimeBreakdown = field(default_factory=DowntimeBreakdown)
    converged: bool = True          #: False: rounds or time were over and the limit was out of reach
    bytes: int = 0
    seconds: float = 0.0
    breaks: int = 0                 #: connections that were lost on the way
    postcopy: PostcopyDone | None = None    #: where the guest was given away before all memory had come


Event = (Progress | Round | Stage | Broken | Resumed | Throttled | Forecast | PostcopyBegun | PostcopyProgress
         | PostcopyDone | MigrationResult)


def finite(value: Any) -> Any:
    """Return a value as JSON can have it: None in place of a number that is infinite, or none."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(event: Event) -> dict[str, Any]:
    """Return an event as a dict for JSON, its kind under ``"event"``; an infinite number is None."""
    from dataclasses import asdict

    values = {name: value if isinstance(value, int | float | str | list | tuple | dict | None) else str(value)
              for name, value in (asdict(event) if not isinstance(event, Broken) else {"error": event.error}).items()}
    return {"event": type(event).__name__.lower(), **finite(values)}
