"""The destination's side: takes frames apart, trusts nothing, and acknowledges what is in memory."""
import contextlib
import errno
from collections.abc import Callable
from typing import Any, Self

from .._core.copy import PageBoard
from ..errors import VfioError
from ..memory import GuestMemory
from . import stream
from .channel import FrameChannel
from .intake import ChannelIntake, open_boards, take_epoch
from .layout import MemoryLayout
from .stream import Hello, Kind, Ready, Totals, damaged


class PageReceiver:
    """Receive guest memory from a PrecopySource.

    Parameters
    ----------
    transport : Transport
        Closed by the caller.
    make_memory : callable
        Called with a Hello; returns the GuestMemory to fill, or raises VfioError to refuse.
    fresh : bool
        The memory holds nothing but zeros, so that zero pages need no writing the first time.
    checksum : {"auto", "xxh3", "crc32", "none"}
        What this side takes; as of PrecopySource.
    on_state : callable, optional
        Called with (name, bytes) of each state.
    on_switch : callable, optional
        Called when all memory is there, before the last acknowledgement: make ready to run.

    Attributes
    ----------
    complete : bool
        All memory was received.  False after any failure: what is in memory then is of no use.
    epoch : int
        Number of acknowledged epochs.

    Notes
    -----
    ``receive``, ``answer_verify``, ``await_release``.  Every frame is received whole and checked (checksum, order,
    bounds, sizes, counts, duplicates) before memory is touched; without checksums, content is received into memory once
    everything else was checked.  A failure is told to the source and raised:
    ProtocolError (EPROTO) for a stream that is truncated or damaged, MigrationError for a source that went away.
    """

    def __init__(self, transport: Any, make_memory: Callable[[Hello], GuestMemory], *, fresh: bool = False,
                 checksum: str = "auto",
                 on_state: Callable[[str, bytes], object] | None = None,
                 on_switch: Callable[[], object] | None = None) -> None:
        self._channel = FrameChannel(transport)
        self._make_memory = make_memory
        self._fresh = fresh
        self._takes = stream.offer(checksum)
        self._boards: list[PageBoard] = []
        self._intakes: list[ChannelIntake] = []
        self._on_state = on_state or (lambda *_: None)
        self._on_switch = on_switch or (lambda: None)
        self.layout: MemoryLayout | None = None
        self.complete = False
        self.epoch = 0
        self._state_bytes = 0

    def receive(self) -> None:
        """Receive everything up to the final epoch, and acknowledge it."""
        with self._telling():
            layout = self._receive_hello()
            while not self.complete:
                final = self._receive_epoch(layout)
                if final:
                    self._on_switch()
                self._channel.send(Kind.ACK, stream.encode_totals(self._totals), epoch=self.epoch)
                self.epoch += 1
                self.complete = final

    def answer_verify(self) -> bytes:
        """Wait for the source's request, and answer it with the SHA-256 of all memory, which is returned."""
        with self._telling():
            self._need_complete()
            self._channel.receive(Kind.VERIFY)
            assert self.layout is not None
            digest = self.layout.digest()
            self._channel.send(Kind.DIGEST, digest)
            return digest

    def await_release(self) -> None:
        """Wait until the source has given the guest away; from here on it is ours."""
        with self._telling():
            self._need_complete()
            self._channel.receive(Kind.RUN)
            self._channel.send(Kind.STARTED)

    def close(self) -> None:
        """Let the memory go; idempotent."""
        for board in self._boards:
            board.release()
        if self.layout is not None:
            self.layout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Inside

    def _receive_hello(self) -> MemoryLayout:
        header, body = self._channel.receive(Kind.HELLO)
        hello = stream.decode_hello(body)
        if header.epoch:
            raise damaged("HELLO belongs to no epoch")
        checksum = stream.agree(hello.checksums, self._takes)
        self.layout = MemoryLayout(self._make_memory(hello), hello.pgsize)
        if self.layout.shape != hello.blocks:
            raise damaged("the memory here has another shape than the source's")
        self._boards = open_boards(self.layout, self._fresh)
        self._channel.send(Kind.READY, stream.encode_ready(hello.stream_id, Ready(checksum)))
        self._channel.checksum = checksum
        self._intakes = [ChannelIntake(self._channel, self._boards, hello.pgsize)]
        return self.layout

    def _receive_epoch(self, layout: MemoryLayout) -> bool:
        """Receive frames up to END; return whether it was the final one."""
        if self.epoch > stream.MAX_EPOCH:
            raise damaged("too many epochs")
        final = False

        def control() -> Totals:
            nonlocal final
            while True:
                header, body = self._channel.receive(Kind.STATE, Kind.PAGES, Kind.ZEROS, Kind.END)
                if header.epoch != self.epoch:
                    raise damaged(f"a frame of epoch {header.epoch} in epoch {self.epoch}")
                if header.kind is Kind.END:
                    final = bool(header.flags & stream.FINAL)
                    return stream.decode_totals(body)
                if header.kind is Kind.STATE:
                    self._receive_state(body)
                else:
                    self._intakes[0].take(header, body)

        self._totals = take_epoch(self._intakes, self.epoch, control)
        if not self.epoch and self._totals.pages + self._totals.zero_pages != layout.npages:
            raise damaged("the first epoch did not bring all memory")
        return final

    def _receive_state(self, body: memoryview) -> None:
        self._state_bytes += len(body)
        if self._state_bytes > stream.MAX_STATES:
            raise damaged(f"states of more than {stream.MAX_STATES} bytes")
        self._on_state(*stream.decode_state(body))

    def _need_complete(self) -> None:
        if not self.complete:
            raise VfioError(errno.EINVAL, operation="verify", hint="the memory is not complete")

    @contextlib.contextmanager
    def _telling(self) -> Any:
        """Tell the source why it ends here."""
        try:
            yield
        except BaseException as exc:
            self.complete = False
            with contextlib.suppress(OSError):
                self._channel.send(Kind.ERROR, str(exc).encode()[:stream.LIMITS[Kind.ERROR]])
            raise
