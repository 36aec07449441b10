"""The destination's side: takes frames apart, trusts nothing, and acknowledges what is in memory."""
import contextlib
import errno
from collections.abc import Callable
from typing import Any, Self

from .._core.copy import PageBoard, PageIntake
from ..errors import VfioError
from ..memory import GuestMemory
from . import stream
from .channel import FrameChannel
from .layout import MemoryLayout
from .stream import Checksum, Header, Hello, Kind, Ready, Totals, damaged


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
        self._intake = PageIntake(stream.MAX_RUNS)
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
        self._boards = [PageBoard(block.view, hello.pgsize, self._fresh) for block in self.layout.blocks]
        self._channel.send(Kind.READY, stream.encode_ready(hello.stream_id, Ready(checksum)))
        self._channel.checksum = checksum
        return self.layout

    def _receive_epoch(self, layout: MemoryLayout) -> bool:
        """Receive frames up to END; return whether it was the final one."""
        if self.epoch > stream.MAX_EPOCH:
            raise damaged("too many epochs")
        self._totals = Totals(0, 0, 0)
        while True:
            header, body = self._channel.receive(Kind.STATE, Kind.PAGES, Kind.ZEROS, Kind.END)
            if header.epoch != self.epoch:
                raise damaged(f"a frame of epoch {header.epoch} in epoch {self.epoch}")
            if header.kind is Kind.END:
                if stream.decode_totals(body) != self._totals:
                    raise damaged(f"epoch {self.epoch} ends with other totals than were received")
                if not self.epoch and self._totals.pages + self._totals.zero_pages != layout.npages:
                    raise damaged("the first epoch did not bring all memory")
                return bool(header.flags & stream.FINAL)
            if header.kind is Kind.STATE:
                self._state_bytes += len(body)
                if self._state_bytes > stream.MAX_STATES:
                    raise damaged(f"states of more than {stream.MAX_STATES} bytes")
                self._on_state(*stream.decode_state(body))
                continue
            if header.block >= len(layout.blocks):
                raise damaged(f"there is no block {header.block}")
            self._receive_pages(self._boards[header.block], layout.pgsize, header, body)

    def _receive_pages(self, board: PageBoard, pgsize: int, header: Header, body: memoryview) -> None:
        intake = self._intake
        most = stream.CHUNK_BYTES if header.kind is Kind.PAGES else stream.ZEROS_BYTES
        try:
            count = intake.admit(board, body, header.nruns, self.epoch, most // pgsize)
        except VfioError as exc:
            exc.hint = f"{header.kind.name} {exc.hint}"
            raise
        size = header.length - header.nruns * stream.RUN_SIZE
        if size != (count * pgsize if header.kind is Kind.PAGES else 0):
            raise damaged(f"{header.kind.name} with {size} bytes for {count} pages")
        # From here on the frame is good.
        frames, pages, zero_pages = self._totals
        if header.kind is Kind.ZEROS:
            intake.clear()
            self._totals = Totals(frames + 1, pages, zero_pages + count)
            return
        if self._channel.checksum is Checksum.NONE:
            views = intake.views()
            try:
                self._channel.receive_content(views)
            finally:
                for view in views:      # a traceback must not hold the memory
                    view.release()
            intake.done()
        else:
            intake.put(body[header.nruns * stream.RUN_SIZE:])
        self._totals = Totals(frames + 1, pages + count, zero_pages)

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
