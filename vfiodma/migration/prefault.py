"""Pages for a destination's memory, got from the kernel in the background: first touch is what takes longest there."""
import contextlib
import errno
import os
import threading
from collections.abc import Sequence

from .._core.copy import PageBoard
from .._core.errno import error
from .._core.memory import populate
from ..errors import VfioError
from .layout import MemoryLayout

_STEP = 8 << 20         # bytes at a time: what a stop waits for, at most


class Prefault:
    """Populates the memory of a layout, from the lowest page on, in a thread; content stays as it is.

    Parameters
    ----------
    layout : MemoryLayout
        Its memory; not to be closed before ``stop``.
    boards : sequence of PageBoard
        Of its blocks: where pages came already, there is nothing to do.

    Attributes
    ----------
    populated : int
        Bytes that were populated.
    failure : VfioError or None
        Why it ended early: UnsupportedError before Linux 5.14, or no memory.  Nothing is lost but time.

    Notes
    -----
    Source: madvise(2), MADV_POPULATE_WRITE.  The thread runs at a lower priority than the receiver's.
    """

    def __init__(self, layout: MemoryLayout, boards: Sequence[PageBoard]) -> None:
        self._layout, self._boards = layout, boards
        self._stopping = threading.Event()
        self.populated = 0
        self.failure: VfioError | None = None
        self._thread = threading.Thread(target=self._run, name="vfiodma-prefault", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as exc:
            self.failure = error(errno.EAGAIN, "prefault", hint=str(exc))

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)      # Linux: of this thread
        try:
            for block, board in zip(self._layout.blocks, self._boards, strict=True):
                at, size = 0, len(block.view)
                # Pages come in ascending order: what is below the frontier is there.
                while (at := max(at, board.frontier * self._layout.pgsize)) < size:
                    if self._stopping.is_set():
                        return
                    step = min(_STEP - at % _STEP, size - at)
                    populate(block.view, at, step)
                    self.populated += step
                    at += step
        except VfioError as exc:
            self.failure = exc

    def join(self, timeout: float | None = None) -> None:
        """Wait until all is done."""
        if self._thread.is_alive():
            self._thread.join(timeout)

    def stop(self) -> None:
        """End; idempotent."""
        self._stopping.set()
        self.join()
