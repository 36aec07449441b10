"""How fast pages may go out."""
import errno
import threading
import time
from collections.abc import Callable

from .._core.errno import error

_BURST = 0.05       # seconds of the rate that may go at once
_NAP = 0.05         # seconds, at most, until a new rate or a cancel is noticed


class BandwidthLimit:
    """A token bucket, shared by all channels of a migration.

    Parameters
    ----------
    rate : float or None
        Bytes/s on the wire; None: no limit.

    Notes
    -----
    ``rate`` may be set while pages are sent, by any thread.  Frames are made small enough to go every 50 ms, but are a
    page at least: a rate that sends less than a page within the peer's time-out is one that the peer gives up on.
    """

    def __init__(self, rate: float | None = None) -> None:
        self._lock = threading.Lock()
        self._tokens = 0.0
        self._last = time.monotonic()
        self.rate = rate

    @property
    def rate(self) -> float | None:
        """Bytes/s; None: no limit."""
        return self._rate

    @rate.setter
    def rate(self, rate: float | None) -> None:
        if rate is not None and not 0 < rate < float("inf"):
            raise error(errno.EINVAL, "bandwidth_limit", hint="bytes/s above 0, or None for no limit")
        with self._lock:
            self._rate = rate
            self._tokens = min(self._tokens, 0.0) if rate else 0.0

    @property
    def burst(self) -> int | None:
        """Bytes that a frame should have, at most."""
        rate = self._rate
        return None if rate is None else int(rate * _BURST)

    def spend(self, nbytes: int, check: Callable[[], object],
              wait_for: Callable[[float], object] | None = None) -> None:
        """Wait until so many bytes may go; ``check`` is called at least every 50 ms, and may raise.

        ``wait_for`` waits so many seconds, or until there is something to check; by default it sleeps.
        """
        while (wait := self._try(nbytes)) > 0:
            check()
            (wait_for or time.sleep)(min(wait, _NAP))

    def _try(self, nbytes: int) -> float:
        """Take the bytes, if the bucket is not in debt; else return how long it will be."""
        with self._lock:
            if self._rate is None:
                return 0.0
            now = time.monotonic()
            self._tokens = min(self._tokens + (now - self._last) * self._rate, self._rate * _BURST)
            self._last = now
            if self._tokens < 0:
                return -self._tokens / self._rate
            self._tokens -= nbytes
            return 0.0
