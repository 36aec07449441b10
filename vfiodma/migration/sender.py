"""One epoch's dirty pages, as frames on one or several channels."""
import errno
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .._core.bitmap import DirtyBitmap
from .._core.copy import PageStage
from ..errors import MigrationError
from . import stream
from .bandwidth import BandwidthLimit
from .channel import FrameChannel, page_buffer
from .compression import Codec
from .layout import Block, MemoryLayout, split_runs
from .stream import COMPRESSED, HEADER_SIZE, RUN_SIZE, Checksum, Compression, Kind, Totals
from .together import together

if TYPE_CHECKING:
    from .layout import Runs

#: Runs of pages of a frame, at most: what one system call takes with little work.
_MAX_RUNS = 1 << 12
#: Content of a frame that is staged: smaller ones cost more calls, larger ones leave the caches before they are sent.
_STAGE_BYTES = 2 << 20
#: Chunks that a channel takes at once, of those that several share.
_PORTION_CHUNKS = 4
#: Bits of a bitmap that are looked at in one go: bounds the memory of their runs.
_SLICE_BITS = 1 << 22
_NAP = 0.02     # seconds between looks at a pause


class PageSender:
    """Send dirty pages of a layout over channels, each page over one of them.

    Parameters
    ----------
    channels : sequence of FrameChannel
        Their checksums are agreed on.  The first is driven by the caller's thread, each other one by its own.
    layout : MemoryLayout
        Where pages are.
    compression : Compression
        What READY said.
    limit : BandwidthLimit, optional
        Of all channels together.
    stop : callable, optional
        Asked before each frame, by several threads; once it returns true, every channel stops between two frames, and
        ``send`` raises MigrationError (ECANCELED).
    hold : callable, optional
        Asked like ``stop``: while it returns true, no further channel sends anything.  The first one is held up by
        ``on_progress``.
    cut : callable, optional
        Asked before each portion: once it returns true, ``send`` ends early, with barriers and totals of what was sent;
        ``rest`` has the other pages.
    note_sent : callable, optional
        Told (block, runs, bytes) of everything that is sent, zero pages included: ``DirtyTracker.note_sent``.
    on_progress : callable, optional
        Called in the caller's thread with (epoch, pages done on all channels, pages in all).

    Attributes
    ----------
    rest : DirtyBitmap or None
        Pages that the last ``send`` did not send, where it was cut.

    Notes
    -----
    A chunk is copied first, and only the copy is compressed, summed and sent: devices go on writing into the memory,
    and a checksum of live memory would raise false alarms.  Without checksums and compression, and where nobody has to
    be told the bytes, pages go from memory to the socket; a page that is written meanwhile arrives torn, and is sent
    again because it is dirty.
    """

    def __init__(self, channels: Sequence[FrameChannel], layout: MemoryLayout, *,
                 compression: Compression = Compression.NONE, limit: BandwidthLimit | None = None,
                 stop: Callable[[], bool] | None = None, hold: Callable[[], bool] | None = None,
                 cut: Callable[[], bool] | None = None,
                 note_sent: Callable[[int, Any, Any], object] | None = None,
                 on_progress: Callable[[int, int, int], object] | None = None) -> None:
        self.channels = channels
        self.layout = layout
        self.limit = limit or BandwidthLimit()
        self._stop = stop or (lambda: False)
        self._hold = hold or (lambda: False)
        self._cut = cut
        self.rest: DirtyBitmap | None = None
        self._on_progress = on_progress or (lambda *_: None)
        self._lock = threading.Lock()
        self._failed = False
        self._done = 0
        self._senders = [_ChannelSender(self, channel, compression, note_sent and self._noting(note_sent))
                         for channel in channels]

    @property
    def bytes_sent(self) -> int:
        """Bytes on the wire, on all channels, so far."""
        return sum(channel.bytes_sent for channel in self.channels)

    def send(self, dirty: DirtyBitmap, epoch: int) -> Totals:
        """Send all pages of a bitmap, and a barrier on each further channel; return what was sent.

        Raises
        ------
        MigrationError
            A channel failed: all are given up, but channel 0 can receive what the destination says.  ECANCELED: stopped
            between frames; all channels are as they were, in the middle of the epoch.
        """
        todo, self._done, self._failed, self.rest = dirty.count(), 0, False, None
        portions = self._portions(dirty)
        works = [partial(sender.send, portions, epoch) for sender in self._senders]
        works[0] = partial(works[0], lambda: self._on_progress(epoch, self._done, todo))
        return Totals(*map(sum, zip(*together(works, self._give_up), strict=True)))

    def send_runs(self, block: Block, runs: "Runs", epoch: int) -> Totals:
        """Send some pages over the first channel."""
        totals = Totals(0, 0, 0)
        for sent in self._senders[0].send_portion(block, runs, epoch):
            totals = Totals(*map(sum, zip(totals, sent, strict=True)))
        return totals

    def interrupt(self) -> None:
        """From any thread: end ``send`` at once, also where the destination does not move; nothing can be sent then."""
        for channel in self.channels:
            channel.transport.interrupt(receiving=False)

    # Inside

    def _give_up(self, exc: BaseException) -> None:
        self._failed = True
        if getattr(exc, "errno", None) != errno.ECANCELED:      # else all stop by themselves, between frames
            self.interrupt()

    def check(self, first: bool) -> None:
        """Raise where this epoch is not to be sent any more; wait while a further channel is to be still."""
        while not self._failed and not self._stop():
            if first or not self._hold():
                return
            time.sleep(_NAP)
        raise MigrationError(errno.ECANCELED, operation="migrate", hint="it was cancelled; the guest runs on here")

    def add_done(self, pages: int) -> None:
        """Count pages that were sent."""
        with self._lock:
            self._done += pages

    def _noting(self, note_sent: Callable[[int, Any, Any], object]) -> Callable[[int, Any, Any], object]:
        def note(block: int, runs: Any, content: Any) -> None:
            with self._lock:
                note_sent(block, runs, content)
        return note

    def _portions(self, dirty: DirtyBitmap) -> Callable[[], "tuple[Block, Runs] | None"]:
        """Return a function, for any thread, that hands out dirty pages, each once."""
        shared = len(self.channels) > 1 or self._cut is not None
        npages = self._senders[0].chunk * _PORTION_CHUNKS

        def generate() -> "Iterator[tuple[Block, Runs]]":
            for block in self.layout.blocks:
                for first in range(0, block.npages, _SLICE_BITS):
                    count = min(_SLICE_BITS, block.npages - first)
                    runs = dirty[block.first_bit + first:block.first_bit + first + count].runs()
                    runs[:, 0] += first
                    for part in split_runs(runs, npages) if shared else [runs] if len(runs) else []:
                        yield block, part

        portions = generate()

        def take() -> "tuple[Block, Runs] | None":
            with self._lock:
                if self.rest is not None:
                    return None
                if (portion := next(portions, None)) is not None and self._cut is not None and self._cut():
                    block, runs = portion
                    self.rest = DirtyBitmap(self.layout.nbits, self.layout.pgsize)
                    self.rest.merge(dirty)
                    self.rest.clear(0, block.first_bit + int(runs[0, 0]))
                    return None
                return portion
        return take


class _ChannelSender:
    """What one channel, and its thread, needs to send pages."""

    def __init__(self, owner: PageSender, channel: FrameChannel, compression: Compression,
                 note_sent: Callable[[int, Any, Any], object] | None) -> None:
        import numpy as np

        self._owner = owner
        self._channel = channel
        self._pgsize = owner.layout.pgsize
        self._note_sent = note_sent
        self._codec = Codec(compression) if compression else None
        self._direct = channel.checksum is Checksum.NONE and note_sent is None and not compression
        size = stream.DIRECT_BYTES if self._direct else max(_STAGE_BYTES, self._pgsize)
        self.chunk = size // self._pgsize
        self._stage: Any = None if self._direct else np.frombuffer(page_buffer(size), np.uint8)
        self._zeros = bytes(size) if note_sent else b""
        self._first = channel is owner.channels[0]
        self._check = partial(owner.check, self._first)

    def send(self, portions: "Callable[[], tuple[Block, Runs] | None]", epoch: int,
             on_progress: Callable[[], object] = lambda: None) -> Totals:
        """Send portions until there are no more, then the barrier of a further channel."""
        totals = Totals(0, 0, 0)
        while (portion := portions()) is not None:
            for sent in self.send_portion(*portion, epoch):
                totals = Totals(*map(sum, zip(totals, sent, strict=True)))
                self._owner.add_done(sent.pages + sent.zero_pages)
                on_progress()
        self._check()
        if not self._first:
            self._channel.send(Kind.BARRIER, stream.encode_totals(totals), epoch=epoch)
        return totals

    def send_portion(self, block: Block, runs: "Runs", epoch: int) -> Iterator[Totals]:
        burst = self._owner.limit.burst
        most = self.chunk if burst is None else max(1, min(self.chunk, burst // self._pgsize))
        chunk = PageStage(block.view, runs, self._stage, self._pgsize, most, stream.ZEROS_BYTES // self._pgsize,
                          _MAX_RUNS)
        try:
            while chunk.next():
                if chunk.zero_pages:
                    self._send_zeros(block, chunk.zeros, epoch)
                if chunk.kept_pages:
                    self._send_pages(block, chunk.kept, chunk.kept_pages, epoch)
                yield Totals((chunk.zero_pages > 0) + (chunk.kept_pages > 0), chunk.kept_pages, chunk.zero_pages)
        finally:
            chunk.release()     # a traceback must not hold the memory

    def _send_zeros(self, block: Block, runs: "Runs", epoch: int) -> None:
        if self._note_sent is not None:
            for part in split_runs(runs, self.chunk):
                self._note_sent(block.number, part, self._zeros[:int(part[:, 1].sum()) * self._pgsize])
        self._send_runs(Kind.ZEROS, block, runs, epoch)

    def _send_pages(self, block: Block, runs: "Runs", npages: int, epoch: int) -> None:
        if self._direct:
            content = [block.view[first * self._pgsize:(first + count) * self._pgsize]
                       for first, count in runs.tolist()]
            try:
                self._send_runs(Kind.PAGES, block, runs, epoch, content)
            finally:
                for view in content:
                    view.release()
            return
        staged = self._stage[:npages * self._pgsize]
        if self._note_sent is not None:
            self._note_sent(block.number, runs, staged)
        packed = self._codec and self._codec.compress(staged)
        self._send_runs(Kind.PAGES, block, runs, epoch, [packed or staged], COMPRESSED if packed else 0)

    def _send_runs(self, kind: Kind, block: Block, runs: "Runs", epoch: int, content: Sequence[Any] = (),
                   flags: int = 0) -> None:
        self._check()
        self._owner.limit.spend(HEADER_SIZE + len(runs) * RUN_SIZE + sum(memoryview(part).nbytes for part in content),
                                self._check)
        # Little-endian on every machine; no copy where it is already.
        self._channel.send(kind, runs.astype("<u8", copy=False), content=content, block=block.number, epoch=epoch,
                           nruns=len(runs), flags=flags)
