"""One epoch's dirty pages, as frames."""
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._core.bitmap import DirtyBitmap
from .._core.copy import PageStage
from . import stream
from .channel import FrameChannel
from .layout import Block, MemoryLayout, split_runs
from .stream import Checksum, Kind, Totals

if TYPE_CHECKING:
    from .layout import Runs

#: Runs of pages of a frame, at most: what one system call takes with little work.
_MAX_RUNS = 1 << 12
#: Content of a frame that is staged: smaller ones cost more calls, larger ones leave the caches before they are sent.
_STAGE_BYTES = 2 << 20


class PageSender:
    """Send dirty pages of a layout over a channel.

    Parameters
    ----------
    channel : FrameChannel
        Its checksum is agreed on.
    layout : MemoryLayout
        Where pages are.
    note_sent : callable, optional
        Told (block, runs, bytes) of everything that is sent, zero pages included: ``DirtyTracker.note_sent``.
    on_progress : callable, optional
        Called with (epoch, pages done, pages in all) after each chunk.

    Notes
    -----
    A chunk is copied first, and only the copy is summed and sent: devices go on writing into the memory, and a checksum
    of live memory would raise false alarms.  Without checksums, and where nobody has to be told the bytes, pages go
    from memory to the socket; a page that is written meanwhile arrives torn, and is sent again because it is dirty.
    """

    def __init__(self, channel: FrameChannel, layout: MemoryLayout,
                 note_sent: Callable[[int, Any, Any], object] | None = None,
                 on_progress: Callable[[int, int, int], object] | None = None) -> None:
        import numpy as np

        self._channel = channel
        self._layout = layout
        self._note_sent = note_sent
        self._on_progress = on_progress or (lambda *_: None)
        self._direct = channel.checksum is Checksum.NONE and note_sent is None
        size = stream.CHUNK_BYTES if self._direct else max(_STAGE_BYTES, layout.pgsize)
        self._chunk = size // layout.pgsize
        self._stage: Any = None if self._direct else np.empty(size, np.uint8)
        self._zeros = bytes(size) if note_sent else b""

    def send(self, dirty: DirtyBitmap, epoch: int) -> Totals:
        """Send all pages of a bitmap; return what was sent."""
        frames, pages, zeros, todo = 0, 0, 0, dirty.count()
        for block in self._layout.blocks:
            runs = dirty[block.first_bit:block.first_bit + block.npages].runs()
            chunk = PageStage(block.view, runs, self._stage, self._layout.pgsize, self._chunk,
                              stream.ZEROS_BYTES // self._layout.pgsize, _MAX_RUNS)
            try:
                while chunk.next():
                    if chunk.zero_pages:
                        self._send_zeros(block, chunk.zeros, epoch)
                    if chunk.kept_pages:
                        self._send_pages(block, chunk.kept, chunk.kept_pages, epoch)
                    frames += (chunk.zero_pages > 0) + (chunk.kept_pages > 0)
                    pages, zeros = pages + chunk.kept_pages, zeros + chunk.zero_pages
                    self._on_progress(epoch, pages + zeros, todo)
            finally:
                chunk.release()     # a traceback must not hold the memory
        return Totals(frames, pages, zeros)

    def _send_zeros(self, block: Block, runs: "Runs", epoch: int) -> None:
        if self._note_sent is not None:
            for part in split_runs(runs, self._chunk):
                self._note_sent(block.number, part, self._zeros[:int(part[:, 1].sum()) * self._layout.pgsize])
        self._send_runs(Kind.ZEROS, block, runs, epoch)

    def _send_pages(self, block: Block, runs: "Runs", npages: int, epoch: int) -> None:
        pgsize = self._layout.pgsize
        if self._direct:
            content = [block.view[first * pgsize:(first + count) * pgsize] for first, count in runs.tolist()]
        else:
            content = [self._stage[:npages * pgsize]]
            if self._note_sent is not None:
                self._note_sent(block.number, runs, content[0])
        try:
            self._send_runs(Kind.PAGES, block, runs, epoch, content)
        finally:
            if self._direct:
                for view in content:
                    view.release()

    def _send_runs(self, kind: Kind, block: Block, runs: "Runs", epoch: int, content: list[Any] | None = None) -> None:
        # Little-endian on every machine; no copy where it is already.
        self._channel.send(kind, runs.astype("<u8", copy=False), content=content or (), block=block.number, epoch=epoch,
                           nruns=len(runs))
