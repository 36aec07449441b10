"""Post-copy at the source: when to switch to it, and serving the pages that the destination lacks while it runs."""
import collections
import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._core.bitmap import DirtyBitmap
from .._core.errno import error
from . import stream
from .bandwidth import BandwidthLimit
from .channel import FrameChannel
from .convergence import Decision, Forecast, Policy, Step
from .events import Event, PostcopyDone, PostcopyProgress, Progress
from .layout import Block, MemoryLayout, split_runs
from .pagebits import send_bits, take_bits
from .sender import PageSender
from .stream import RUN_SIZE, Compression, Done, Header, Kind, Totals, damaged

if TYPE_CHECKING:
    from .layout import Runs

_CHUNK_BYTES = 256 << 10    # pushed at once: a wanted page waits for no more than this
_WINDOW = 1 << 13           # bits of a block that are looked at for the next chunks
_KEEPALIVE = 1.0            # seconds between signs of life while paused
_REPORT = 1.0               # seconds between events


@dataclass(frozen=True)
class Postcopy:
    """When a migration switches to post-copy; it can always be told to (``switch_to_postcopy``).

    Parameters
    ----------
    after_rounds : int, optional
        After so many rounds with running devices, unless the limit of the downtime is kept by then; 0: at once.
    when_needed : bool
        When the limit is out of reach: rounds or time are over, what is left is stalled, or the forecast after the
        second round says so.
    """

    after_rounds: int | None = None
    when_needed: bool = True

    def __post_init__(self) -> None:
        if self.after_rounds is not None and self.after_rounds < 0:
            raise error(errno.EINVAL, "postcopy", hint="after_rounds is not negative")

    def reason(self, decision: Decision, rounds: int, policy: Policy, forecast: Callable[[], Forecast]) -> str:
        """Return why to switch after a round; empty: go on as decided."""
        if decision.step is Step.SWITCH:
            return ""
        if self.after_rounds is not None and rounds >= self.after_rounds:
            return f"{rounds} rounds were wanted"
        if not self.when_needed:
            return ""
        if decision.step is not Step.CONTINUE or decision.stalled:
            return decision.reason
        if rounds > 1 and decision.throttle >= policy.throttle_max and (said := forecast()).converges is False:
            return str(said)
        return ""


class PagePusher:
    """Send what the destination lacks, what somebody waits for first.

    Parameters
    ----------
    layout : MemoryLayout
        Of memory that nobody writes any more; kept open until all was sent, or ``close``.
    left : DirtyBitmap
        What the destination lacks; changed here.
    epoch : int
        Of the frames.
    limit : BandwidthLimit
        Of what nobody waits for.
    paused : callable
        Whether only what somebody waits for is to be sent.
    on_event : callable
        Called with PostcopyProgress, and Progress.

    Attributes
    ----------
    missing : int
        Pages that were not sent yet.
    done : PostcopyDone
        So far.
    """

    def __init__(self, layout: MemoryLayout, left: DirtyBitmap, epoch: int, *, limit: BandwidthLimit,
                 compression: Compression, paused: Callable[[], bool], on_event: Callable[[Event], object]) -> None:
        self._layout, self._left, self._epoch = layout.again(), left, epoch
        self._limit, self._compression, self._paused, self._on_event = limit, compression, paused, on_event
        self._given = DirtyBitmap(layout.nbits, layout.pgsize)      # what may be asked for
        self._given.merge(left)
        self.missing = self._all = left.count()
        self.done = PostcopyDone()
        self._wanted: collections.deque[tuple[Block, Any]] = collections.deque()
        self._reported = 0.0

    def tell(self, channel: FrameChannel, epoch: int) -> None:
        """Tell the destination what comes later, in the last epoch before that."""
        send_bits(channel, Kind.LEFT, self._layout, self._left, epoch)

    def run(self, channel: FrameChannel, again: bool) -> Done:
        """Serve and push until the destination has everything.

        Parameters
        ----------
        again : bool
            The connection is another one: the destination says first what it lacks.

        Raises
        ------
        VfioError
            The connection broke; ``run`` over another one goes on.
        """
        self._wanted.clear()
        if again:
            self._hear_missing(channel)
        sender = PageSender([channel], self._layout, compression=self._compression)
        totals, before, owed = Totals(0, 0, 0), channel.bytes_sent, 0
        self._background = self._portions(self._layout.blocks[0], 0)
        try:
            while self.missing:
                while channel.transport.wait_readable(0):
                    self._hear(channel)
                if self._wanted:
                    block, runs = self._wanted.popleft()
                    if not self._left.test(block.first_bit + int(runs[0, 0])):
                        continue
                    self._background = self._portions(block, int(runs[-1, 0]))      # neighbours are wanted soon
                elif self._paused():
                    if not channel.transport.wait_readable(_KEEPALIVE):
                        channel.send(Kind.KEEPALIVE, epoch=self._epoch)
                    continue
                elif self._in_debt(owed, channel):
                    continue
                else:
                    owed = 0
                    block, runs = next(self._background)
                at = channel.bytes_sent
                sent = sender.send_runs(block, runs, self._epoch)
                owed += channel.bytes_sent - at
                totals = Totals(*map(sum, zip(totals, sent, strict=True)))
                for first, count in runs.tolist():
                    self._left.clear(block.first_bit + first, count)
                self.missing -= sent.pages + sent.zero_pages
                self.done.pages += sent.pages
                self.done.zero_pages += sent.zero_pages
                self._report()
            channel.send(Kind.END, stream.encode_totals(totals), epoch=self._epoch, flags=stream.FINAL)
            while (header := self._answer(channel, Kind.WANTED, Kind.DONE))[0].kind is Kind.WANTED:
                pass        # of pages that are on their way
            done = stream.decode_done(header[1])
            channel.send(Kind.KEEPALIVE, epoch=self._epoch)
            self.close()
            return done
        finally:
            self.done.bytes += channel.bytes_sent - before

    def close(self) -> None:
        """Let the memory go; idempotent."""
        self._layout.close()

    # Inside

    def _in_debt(self, owed: int, channel: FrameChannel) -> bool:
        """Whether the bandwidth limit says to wait; waits a while for the destination then."""

        class Asked(Exception):
            """It wants something."""

        def check() -> None:
            if channel.transport.wait_readable(0):
                raise Asked

        if not owed:
            return False
        try:
            self._limit.spend(owed, check, channel.transport.wait_readable)
        except Asked:
            return True
        return False

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._reported >= _REPORT or not self.missing:
            self._reported = now
            self._on_event(PostcopyProgress(self.missing, self.done.faults))
        self._on_event(Progress(self._epoch, self._all - self.missing, self._all))

    def _answer(self, channel: FrameChannel, *kinds: Kind) -> tuple[Header, memoryview]:
        return channel.answer(*kinds, epoch=self._epoch)

    def _hear_missing(self, channel: FrameChannel) -> None:
        """Learn anew what the destination lacks: what was on its way when a connection broke may be lost."""
        missing = DirtyBitmap(self._layout.nbits, self._layout.pgsize)
        while True:
            header, body = self._answer(channel, Kind.MISSING)
            if not len(body):
                break
            take_bits(header, body, self._layout, missing)
        known = missing.count()
        self._left.clear()
        self._left.merge(missing)
        missing.andnot(self._given)
        if missing.any():
            raise damaged(f"the destination lacks {missing.count()} pages that came before it owned the guest")
        self.missing = known

    def _hear(self, channel: FrameChannel) -> None:
        """Take in what somebody waits for."""
        import numpy as np

        header, body = self._answer(channel, Kind.WANTED)
        if header.block >= len(self._layout.blocks):
            raise damaged(f"there is no block {header.block}")
        block = self._layout.blocks[header.block]
        runs = np.frombuffer(body[:header.nruns * RUN_SIZE], "<u8").reshape(-1, 2).tolist()
        if not runs or len(body) != header.nruns * RUN_SIZE or sum(count for _, count in runs) > stream.WANTED_PAGES:
            raise damaged("WANTED without pages, or of too many")
        for first, count in runs:
            if not count or first + count > block.npages:
                raise damaged(f"WANTED of pages that are not in block {header.block}")
            for page in range(first, first + count):
                bit = block.first_bit + page
                if not self._given.test(bit):
                    raise damaged(f"page {page} of block {header.block} is wanted, which came before")
                self.done.faults += 1
                if self._left.test(bit):        # else it is on its way
                    self._wanted.append((block, np.array([(page, 1)], np.uint64)))

    def _portions(self, block: Block, page: int) -> "Iterator[tuple[Block, Runs]]":
        """Yield what is left in chunks, from a page on and around; good until something else is sent."""
        blocks = self._layout.blocks
        most = max(1, min(_CHUNK_BYTES, self._limit.burst or _CHUNK_BYTES) // self._layout.pgsize)
        start = page // _WINDOW * _WINDOW
        for each in (*blocks[block.number:], *blocks[:block.number + 1]):
            for first in range(start if each is block else 0, each.npages, _WINDOW):
                runs = self._left[each.first_bit + first:each.first_bit + min(first + _WINDOW, each.npages)].runs()
                if len(runs):
                    runs[:, 0] += first
                    for part in split_runs(runs, most):
                        yield each, part
            start = 0
