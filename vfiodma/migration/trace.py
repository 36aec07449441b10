"""Dirty traces: which pages were written in which interval, recorded from any tracker."""
import errno
import math
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from .._core.bitmap import DirtyBitmap
from .._core.errno import error
from .estimators import WorkingSet

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_MOST_PAGES = 1 << 52       # page numbers stay exact in every type on the way
_MOST_BLOCKS = 1 << 16
_SPANS = 12                 # lengths of time that the working set is fitted to


class Layout(Protocol):
    """What is needed of a MemoryLayout."""

    pgsize: int
    nbits: int

    @property
    def shape(self) -> tuple[tuple[int, int], ...]:
        """(gpa, bytes) of each block."""


class Harvester(Protocol):
    """What is needed of a DirtyTracker."""

    def start(self) -> None:
        """Start; idempotent."""

    def harvest(self, into: DirtyBitmap) -> int:
        """OR what was written since the last call into the bitmap."""

    def stop(self) -> None:
        """Stop; idempotent."""


class Trace:
    """A time series of dirty sets over a guest's memory.

    Parameters
    ----------
    pgsize : int
        Bytes of a page, a power of two.
    blocks : sequence of (int, int)
        (gpa, bytes) of each block of memory.
    times : array of float64, shape (n,)
        Ends of the intervals, in seconds from the start, ascending.
    offsets : array of int64, shape (n + 1,)
        Interval i has the runs ``offsets[i]`` to ``offsets[i + 1]``.
    runs : array of int64, shape (m, 3)
        Block, first page in it, number of pages.  Runs of an interval may overlap: pages count once.

    Raises
    ------
    InvalidArgumentError
        EINVAL: the parts do not fit one another.
    """

    def __init__(self, pgsize: int, blocks: Any, times: Any, offsets: Any, runs: Any) -> None:
        import numpy as np

        self.pgsize = pgsize
        self.blocks = tuple((int(gpa), int(size)) for gpa, size in blocks)
        self.times = np.asarray(times, np.float64)
        self.offsets = np.asarray(offsets, np.int64)
        self.runs = np.asarray(runs, np.int64).reshape(-1, 3)
        why = self._wrong()
        if why:
            raise error(errno.EINVAL, "trace", hint=why)

    def _wrong(self) -> str:
        import numpy as np

        if not 512 <= self.pgsize <= 1 << 40 or self.pgsize & (self.pgsize - 1):
            return f"the page size {self.pgsize} is not a power of two from 512 on"
        if not 0 < len(self.blocks) <= _MOST_BLOCKS:
            return f"{len(self.blocks)} blocks of memory: 1 to {_MOST_BLOCKS} are possible"
        if any(gpa < 0 or size <= 0 or (gpa | size) % self.pgsize for gpa, size in self.blocks):
            return "blocks of memory are whole pages"
        if self.npages > _MOST_PAGES:
            return f"{self.npages} pages of memory are too many"
        if self.times.ndim != 1 or not len(self.times):
            return "there is no interval"
        if not (np.isfinite(self.times).all() and self.times[0] > 0 and (np.diff(self.times) > 0).all()):
            return "the times do not ascend from 0"
        if self.offsets.shape != (len(self.times) + 1,) or self.offsets[0] or self.offsets[-1] != len(self.runs) \
                or (np.diff(self.offsets) < 0).any():
            return "the intervals do not share the runs out"
        block, first, count = self.runs.T
        if ((block < 0) | (block >= len(self.blocks))).any():
            return "a run is in a block that is not there"
        room = np.array([size // self.pgsize for _, size in self.blocks], np.int64)[block] - first
        if ((first < 0) | (count < 1) | (count > room)).any():
            return "a run is outside of its block"
        return ""

    @property
    def npages(self) -> int:
        """Pages of the memory."""
        return sum(size for _, size in self.blocks) // self.pgsize

    @property
    def seconds(self) -> float:
        """Length of the recording."""
        return float(self.times[-1])

    def __len__(self) -> int:
        return len(self.times)

    @cached_property
    def pages(self) -> "npt.NDArray[np.int64]":
        """Unique pages of each interval."""
        import numpy as np

        return np.array([self._count([index]) for index in range(len(self))], np.int64)

    @cached_property
    def working_set(self) -> WorkingSet:
        """Unique bytes as a function of time, fitted to spans of 1, 2, 4, ... intervals, four of each length."""
        import numpy as np

        found = WorkingSet()
        spans = [1 << power for power in range(_SPANS) if 1 << power <= len(self)]
        for span in reversed(spans):        # the shortest count most: rounds end in them
            lows = np.unique(np.linspace(0, len(self) - span, 4).astype(int)).tolist()
            seconds = sum(self._end(low + span - 1) - self._end(low - 1) for low in lows) / len(lows)
            pages = sum(self._count(range(low, low + span)) for low in lows) / len(lows)
            found.observe(seconds, pages * self.pgsize)
        return found

    def unique(self, begin: float, end: float) -> int:
        """Return the pages written between two times, each counted once.

        Of intervals that are only partly between them, a share is counted that follows the working set's curve.  After
        its end the recording begins again.
        """
        if end - begin >= self.seconds:
            return self._count(range(len(self)))
        begin, end = begin % self.seconds, begin % self.seconds + (end - begin)
        parts = self._parts(begin, min(end, self.seconds))
        if end > self.seconds:
            parts |= self._parts(0.0, end - self.seconds)
        whole = [index for index, share in parts.items() if share >= 1]
        sure = found = self._count(whole)
        for index, share in parts.items():
            if share < 1:
                found += round((self._count([*whole, index]) - sure) * self._bent(index, share))
        return found

    # Inside

    def _end(self, index: int) -> float:
        return float(self.times[index]) if index >= 0 else 0.0

    def _parts(self, begin: float, end: float) -> dict[int, float]:
        """The intervals between two times, and which share of each."""
        import numpy as np

        low, high = (int(index) for index in np.searchsorted(self.times, [begin, end], ("right")))
        parts = {}
        for index in range(low, min(high, len(self) - 1) + 1):
            start, stop = self._end(index - 1), self._end(index)
            share = (min(end, stop) - max(begin, start)) / (stop - start)
            if share > 0:
                parts[index] = share
        return parts

    def _bent(self, index: int, share: float) -> float:
        """The share of an interval's pages that a share of its time has."""
        seconds = self._end(index) - self._end(index - 1)
        whole = self.working_set.curve(seconds)
        return min(1.0, self.working_set.curve(seconds * share) / whole) if whole > 0 else share

    def _count(self, intervals: Any) -> int:
        """Pages of the union of intervals."""
        import numpy as np

        parts = [self.runs[self.offsets[index]:self.offsets[index + 1]] for index in intervals]
        runs = np.concatenate(parts) if parts else self.runs[:0]
        if not len(runs):
            return 0
        bases = np.cumsum([0, *(size // self.pgsize for _, size in self.blocks[:-1])])
        first = bases[runs[:, 0]] + runs[:, 1]
        order = np.argsort(first, kind="stable")
        first = first[order]
        end = first + runs[order, 2]
        reached = np.maximum.accumulate(end)
        first[1:] = np.maximum(first[1:], reached[:-1])
        return int(np.maximum(end - first, 0).sum())


class TraceRecorder:
    """Wraps a tracker, and writes down every harvest.

    Parameters
    ----------
    tracker : DirtyTracker
        Stays the caller's.
    layout : MemoryLayout
        Of the guest's memory.
    clock : callable
        Seconds from any beginning.

    Notes
    -----
    ``record`` harvests at intervals.  It is a tracker as well: given to a migration, it writes its rounds down.
    """

    def __init__(self, tracker: Harvester, layout: Layout, clock: Callable[[], float] = time.perf_counter) -> None:
        self._tracker, self._layout, self._clock = tracker, layout, clock
        self._dirty = DirtyBitmap(layout.nbits, layout.pgsize)
        self._began: float | None = None
        self._times: list[float] = []
        self._runs: list[Any] = []

    def start(self) -> None:
        """Start the tracker; what was written before is not part of the trace."""
        self._tracker.start()
        if self._began is None:
            self._tracker.harvest(self._dirty)
            self._dirty.clear()
            self._began = self._clock()

    def harvest(self, into: DirtyBitmap) -> int:
        """Harvest as the tracker does, and write down what was found."""
        self._tracker.harvest(self._dirty)
        now = self._clock() - (self._began or 0.0)
        self._times.append(max(now, math.nextafter(self._times[-1] if self._times else 0.0, math.inf)))
        self._runs.append(self._runs_by_block())
        return self._dirty.harvest(into)

    def stop(self) -> None:
        """Stop the tracker; idempotent."""
        self._tracker.stop()

    @property
    def compares(self) -> bool:
        """As the tracker's."""
        return bool(getattr(self._tracker, "compares", False))

    def note_sent(self, block: int, runs: Any, content: Any) -> None:
        """Pass on what was sent."""
        note_sent: Any = getattr(self._tracker, "note_sent", None)
        if note_sent is not None:
            note_sent(block, runs, content)

    def record(self, seconds: float, interval: float, wait: Callable[[float], object] = time.sleep,
               on_sample: Callable[[float, int], object] | None = None) -> Trace:
        """Start, harvest every ``interval`` seconds for ``seconds``, stop, and return the trace.

        ``on_sample`` is told the time and the bits found after each harvest.
        """
        if not 0 < interval < math.inf or not 0 < seconds < math.inf:
            raise error(errno.EINVAL, "record", hint="seconds and interval are above 0")
        scrap = DirtyBitmap(self._layout.nbits, self._layout.pgsize)
        try:
            self.start()
            assert self._began is not None
            due = interval
            while True:
                now = self._clock() - self._began
                wait(max(0.0, min(due, seconds) - now))
                found = self.harvest(scrap)
                scrap.clear()
                if on_sample is not None:
                    on_sample(self._times[-1], found)
                if self._times[-1] >= seconds:
                    break
                # Late harvests are not made up for.
                due = max(due + interval, self._times[-1] + interval / 2)
        finally:
            self.stop()
        return self.trace()

    def trace(self) -> Trace:
        """Return what was written down so far."""
        import numpy as np

        offsets = np.cumsum([0, *(len(runs) for runs in self._runs)])
        runs = np.concatenate([np.empty((0, 3), np.int64), *self._runs])
        return Trace(self._layout.pgsize, self._layout.shape, self._times, offsets, runs)

    def _runs_by_block(self) -> "npt.NDArray[np.int64]":
        import numpy as np

        parts, first_bit = [np.empty((0, 3), np.int64)], 0
        for number, (_, size) in enumerate(self._layout.shape):
            npages = size // self._layout.pgsize
            runs = self._dirty[first_bit:first_bit + npages].runs().astype(np.int64)
            parts.append(np.column_stack([np.full(len(runs), number, np.int64), runs]))
            first_bit += (npages + 63) // 64 * 64
        return np.concatenate(parts)
