"""The destination's side: takes frames apart, trusts nothing, and acknowledges what is in memory."""
import contextlib
import errno
import hmac
import time
from collections.abc import Callable
from typing import Any, Self

from .._core.bitmap import DirtyBitmap
from .._core.copy import PageBoard
from .._core.errno import error
from ..errors import MigrationError, VfioError
from ..memory import GuestMemory
from . import stream
from .channel import FrameChannel
from .compression import agree as agree_on_compression
from .compression import offer as offer_compression
from .device_group import DeviceSinks
from .events import Event, PostcopyDone
from .handover import DestinationHandover, Journal
from .intake import ChannelIntake, open_boards, take_epoch
from .joining import accept_channels, accept_good, close_channels
from .layout import MemoryLayout
from .pagebits import take_bits
from .postcopy_destination import MissingMemory, check_memory
from .prefault import Prefault
from .sharing import take
from .stream import Hello, Kind, Phase, Ready, Totals, damaged


class PageReceiver:
    """Receive guest memory from a PrecopySource, over one connection or, when it breaks, over several.

    Parameters
    ----------
    transport : Transport
        Closed by the caller.
    make_memory : callable
        Called with a Hello; returns the GuestMemory to fill, or raises VfioError to refuse.
    fresh : bool
        The memory holds nothing but zeros, so that zero pages need no writing the first time.
    prefault : bool, optional
        Get pages for all of the memory in the background, from the start on; by default where it is fresh.
    checksum : {"auto", "xxh3", "crc32", "none"}
        What this side takes; as of PrecopySource.
    compression : {"auto", "none", "zstd", "lz4"}
        What this side takes: by default all of which the library is installed.
    accept : callable, optional
        Called with seconds; returns the next connection, for further channels and after a break: ``Listener.accept``.
        With another callable, the helper of ``postcopy`` keeps all descriptors of this process until it ends.
    channels : int
        Channels that this side takes, at most; one without ``accept``.
    journal : Journal, optional
        Where it is written down whose the guest is, so that a restarted process knows; by default in this object only.
    devices : DeviceSinks, optional
        The VFIO devices that take over the state of the source's.  They stand still, loaded, when the memory is
        complete; ``devices.run()`` is the caller's, when the guest is owned.
    take_memory : callable, optional
        Called with the source's own GuestMemory, where it shares it (same host, ``unix:``), instead of ``make_memory``;
        it may refuse, and is to keep it.  Without it, such a source is refused.
    postcopy : bool
        Allow the source to give the guest away before all memory is there (docs/postcopy.md): then the guest runs, who
        touches a missing page waits, and ``finish`` waits for the rest.  Without it, a source that may want to is
        refused.  Not where devices of the kernel reach the memory (``refuse_kernel_devices``).
    on_postcopy : callable, optional
        Called with PostcopyProgress and PostcopyDone, in a thread of its own.
    on_state : callable, optional
        Called with (name, bytes) of each state; again with a newer one, when the source had to go on.
    on_prepare : callable, optional
        Called before the source stops its devices: what takes long and can be done before, is done now.
    on_switch : callable, optional
        Called when all memory is there, before the last acknowledgement: make ready to run.  Called again when the
        source had to go on after that.  With ``postcopy``, pages are missing or old then: don't look into memory.

    Attributes
    ----------
    handover : DestinationHandover
        ``handover.phase`` is how far it is, and whose the guest is.
    epoch : int
        Number of acknowledged epochs.
    digest : bytes
        SHA-256 of all memory, if the source asked for it.

    Notes
    -----
    ``receive``, then ``settle``; ``reconnect`` and the same again when the connection broke (``serve`` does that).
    Every frame is received whole and checked (checksum, order, bounds, sizes, counts, duplicates) before memory is
    touched; without checksums, content is received into memory once everything else was checked.  A failure is told to
    the source and raised: ProtocolError (EPROTO) for a stream that is truncated or damaged, MigrationError for a source
    that went away (ECONNRESET), is silent (ETIMEDOUT) or keeps the guest (ECANCELED).
    """

    def __init__(self, transport: Any, make_memory: Callable[[Hello], GuestMemory], *, fresh: bool = False,
                 prefault: bool | None = None, checksum: str = "auto", compression: str = "auto",
                 accept: Callable[[float], Any] | None = None, channels: int = 8, journal: Journal | None = None,
                 devices: DeviceSinks | None = None,
                 take_memory: Callable[[GuestMemory], object] | None = None,
                 postcopy: bool = False, on_postcopy: Callable[[Event], object] | None = None,
                 on_state: Callable[[str, bytes], object] | None = None,
                 on_prepare: Callable[[], object] | None = None,
                 on_switch: Callable[[], object] | None = None) -> None:
        self._make_memory = make_memory
        self._fresh = fresh
        self._prefaults = fresh if prefault is None else prefault
        self._prefault: Prefault | None = None
        self._takes = stream.offer(checksum)
        self._compressions = offer_compression(compression)
        self._accept = accept
        self._most_channels = channels if accept else 1
        self._further: list[FrameChannel] = []
        self._boards: list[PageBoard] = []
        self._intakes: list[ChannelIntake] = []
        self._devices, self._take_memory = devices, take_memory
        self._postcopy, self._on_postcopy = postcopy, on_postcopy
        self._left: DirtyBitmap | None = None       # what LEFT named
        self._missing: MissingMemory | None = None
        self._wait = 30.0
        self._on_state = on_state or (lambda *_: None)
        self._on_prepare = on_prepare or (lambda: None)
        self._on_switch = on_switch or (lambda: None)
        self._hello: Hello | None = None
        self.handover = DestinationHandover(journal or Journal())
        self.layout: MemoryLayout | None = None
        self.epoch = self._attempt = 0
        self._touched = False       # pages have come
        self._said = Phase.RECEIVING        # to the source, over this connection
        self.digest = b""
        self.reconnect(transport)

    @property
    def complete(self) -> bool:
        """All memory was received, or will be after the hand-over, from a source that stands still."""
        return self.handover.phase in (Phase.COMPLETE, Phase.OWNER)

    def reconnect(self, transport: Any) -> None:
        """Go on over another connection; ``receive`` or ``settle`` is next."""
        close_channels(self._further)
        self._channel = FrameChannel(transport)
        self._greeted = False

    def receive(self) -> None:
        """Receive everything up to the final epoch, and acknowledge it."""
        with self._telling():
            self._receive_hello()
            layout = self.layout
            if self.handover.phase is Phase.ABORTED or layout is None:
                raise MigrationError(errno.ECANCELED, operation="receive", hint="the guest was given up here")
            final = self.complete
            while not final:
                final = self._receive_epoch(layout)
                if final:
                    if self._devices is not None:
                        self._devices.load()
                    self._on_switch()
                    self._discard(layout)
                    self.handover.complete()
                self.epoch += 1
                self._channel.send(Kind.ACK, stream.encode_totals(self._totals), epoch=self.epoch - 1)
                self._said = Phase.COMPLETE if final else Phase.RECEIVING

    def settle(self) -> Phase:
        """Answer the source until it is decided whose the guest is.

        Returns
        -------
        Phase
            OWNER: the guest is to run here.  ABORTED: it never will.
        """
        with self._telling():
            if self.handover.phase is Phase.RECEIVING:
                raise error(errno.EINVAL, "settle", hint="the memory is not complete")
            if not self._greeted:
                self._receive_hello()
            # Also where another thread gave the guest up meanwhile: the source is to hear it.
            while self._said is Phase.COMPLETE:
                header, _ = self._channel.receive(Kind.VERIFY, Kind.RUN, Kind.ABORT)
                if header.kind is Kind.VERIFY:
                    if self._missing is not None:
                        raise damaged("VERIFY of memory that is to come later")
                    assert self.layout is not None
                    self.digest = self.layout.digest()
                    self._channel.send(Kind.DIGEST, self.digest)
                elif header.kind is Kind.ABORT:
                    self._abort()
                    self._said = Phase.ABORTED
                else:
                    missing = self._missing
                    if missing is not None:
                        missing.fork(self._channel, self._needed())
                    # Only what is written down may be said.
                    phase = self.handover.run()
                    if missing is not None and phase is Phase.OWNER:
                        self._leave()       # the connection is the helper's, which says STARTED
                        missing.go()
                    else:
                        self._channel.send(Kind.STARTED if phase is Phase.OWNER else Kind.ABORTED)
                    self._said = phase
            return self.handover.phase

    def serve(self, wait: float = 30.0, breaks: int = 8,
              on_break: Callable[[VfioError], object] | None = None) -> Phase:
        """Receive and settle, over as many connections as it takes.

        Parameters
        ----------
        wait : float
            Seconds for the source to come back, where ``accept`` was given.
        breaks : int
            That may follow each other without an epoch between them.  Strangers, who do not get as far as READY, are
            no breaks, and prolong no wait.
        on_break : callable, optional
            Called with the error of each connection that broke.

        Raises
        ------
        VfioError
            Of the last connection, or of ``accept``.  Then the guest does not run here, and may be given by a later
            connection still; ``handover.abort()`` makes sure that it never will.
        """
        left, epoch, until, self._wait = breaks, self.epoch, time.monotonic() + wait, wait
        try:
            while True:
                try:
                    if self.handover.phase is Phase.RECEIVING or not self._greeted:
                        self.receive()
                    return self.settle()
                except VfioError as exc:
                    if self.handover.phase is Phase.OWNER:      # written down: the answer to it got lost
                        return self.handover.phase
                    if self._greeted:
                        left = breaks if self.epoch != epoch else left - 1
                        epoch, until = self.epoch, time.monotonic() + wait
                    if self.handover.phase is Phase.ABORTED or left < 0 or self._accept is None:
                        raise
                    if on_break is not None:
                        on_break(exc)
                self._channel.close()       # the source is to notice as well
                self.reconnect(accept_good(self._accept, until))
        finally:
            self._channel.close()

    @property
    def switched(self) -> bool:
        """Whether the source has switched to post-copy: ``finish`` when the guest is owned."""
        return self._missing is not None

    @property
    def missing(self) -> int:
        """Pages of the guest that are not here yet, after a switch to post-copy."""
        return 0 if self._missing is None else self._missing.left

    def finish(self, timeout: float | None = None) -> PostcopyDone | None:
        """Wait until every page is here; None, at once, where the source did not switch to post-copy.

        Raises
        ------
        PostcopyError
            ``missing`` pages do not come: the source is gone, or silent (ECONNRESET, ETIMEDOUT, ...).  Who touches one
            waits on; ``finish`` again waits for the source to connect once more.  EOWNERDEAD: nobody can place them,
            and who touches one gets SIGBUS.
        """
        if self._missing is None:
            return None
        if self.handover.phase is not Phase.OWNER:
            raise error(errno.EINVAL, "postcopy", hint=f"the guest is {self.handover.phase.name} here: settle() first")
        return self._missing.finish(timeout)

    def linger(self, seconds: float) -> None:
        """Wait for a source that heard no answer to its RUN, and tell it whose the guest is; once.

        Raises
        ------
        MigrationError
            ETIMEDOUT: nobody came.
        """
        if self._accept is None:
            raise error(errno.EINVAL, "linger", hint="there is no accept= to get a connection from")
        with contextlib.closing(accept_good(self._accept, time.monotonic() + seconds)) as transport, self._telling():
            self.reconnect(transport)
            self._receive_hello()

    def close(self, *, abandon: bool = False) -> None:
        """Let the memory go, and close further channels; idempotent.

        Raises
        ------
        BusyError
            EBUSY: pages of a guest that runs here are missing: ``finish``.  With ``abandon`` they are zeros.
        """
        if self._missing is not None:
            self._missing.close(abandon or self.handover.phase is not Phase.OWNER)
        close_channels(self._further)
        self._release()

    def _release(self) -> None:
        if self._prefault is not None:
            self._prefault.stop()
        for board in self._boards:
            board.release()
        if self.layout is not None:
            self.layout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not self.missing or self._missing is None:
            self.close()
        else:       # the guest finds no zeros where pages are missing: it waits, as before
            self._missing.give_up()
            self._release()

    # Inside

    def _discard(self, layout: MemoryLayout) -> None:
        """Throw away what is to come later, so that who touches it waits."""
        if self._left is None:
            return
        if self._prefault is not None:
            self._prefault.stop()
        assert self._hello is not None
        self._missing = MissingMemory(
            layout, self._left, self.epoch + 1, compression=self._compression, wait=self._wait,
            reconnect=self._helper_channel if self._accept is not None else None, on_event=self._on_postcopy)

    def _needed(self) -> list[int] | None:
        """Descriptors of the connection and of ``accept``; None where it is not known which those are."""
        owners = [self._channel.transport, *([getattr(self._accept, "__self__", None)] if self._accept else [])]
        if not all(hasattr(owner, "filenos") for owner in owners):
            return None
        return [fd for owner in owners for fd in owner.filenos()]

    def _leave(self) -> None:
        for channel in (self._channel, *self._further):
            getattr(channel.transport, "leave", channel.close)()
        self._further = []

    def _undiscard(self) -> None:
        """The source keeps the guest, and sends the pages as pages again."""
        missing, self._missing = self._missing, None
        if missing is not None:
            missing.undo()

    def _helper_channel(self, seconds: float) -> FrameChannel:
        """In the helper process: take another connection of this stream."""
        assert self._accept is not None
        transport = self._accept(seconds)
        try:
            with self._telling():
                self.handover.phase = Phase.OWNER       # written down by the other process
                self.reconnect(transport)
                self._receive_hello()
        except BaseException:
            transport.close()
            raise
        return self._channel

    def _receive_hello(self) -> None:
        """Take in a new stream, or the old one over a new connection, and say how far it is."""
        header, body = self._channel.receive(Kind.HELLO)
        hello = stream.decode_hello(body)
        if header.epoch:
            raise damaged("HELLO belongs to no epoch")
        checksum = stream.agree(hello.checksums, self._takes)
        if self._hello is not None and not hello.resume and not self._touched:
            self._forget()      # of that stream no page has come
        if self._hello is not None:
            if not hello.resume or (hello.pgsize, hello.blocks) != (self._hello.pgsize, self._hello.blocks) or not (
                    hmac.compare_digest(hello.stream_id + hello.token, self._hello.stream_id + self._hello.token)):
                raise damaged("another stream has begun here")
        elif not hello.resume and not self.handover.stream:
            if not hello.shares:
                self._begin(hello)
            elif self._take_memory is None:
                raise error(errno.EOPNOTSUPP, "take_memory", hint="the source would share its memory, and nobody here "
                            "takes it (take_memory=)")
        elif not hello.resume or hello.stream_id.hex() != self.handover.stream:
            raise damaged("there is no such stream here that could go on")
        if self.handover.phase is Phase.COMPLETE and not hello.asks:
            self._undiscard()
            self.handover.receive()     # the source has run on: what is here is not all any more
        ready = Ready(checksum, agree_on_compression(hello.compressions, self._compressions),
                      1 if hello.asks else min(hello.channels, self._most_channels), self.handover.phase, self.epoch)
        self._channel.send(Kind.READY, stream.encode_ready(hello.stream_id, ready))
        self._said, self._compression = ready.phase, ready.compression
        self._channel.checksum = checksum
        if hello.shares and self._hello is None and not self.handover.stream:
            self._begin(hello)
        if self._accept is not None:
            self._further = accept_channels(self._accept, self._channel.transport, hello, ready)
        self._intakes = [ChannelIntake(channel, self._boards, hello.pgsize, ready.compression)
                         for channel in (self._channel, *self._further)]
        self._greeted = True

    def _forget(self) -> None:
        """Take another stream instead of the one that had begun."""
        self._release()
        if self._devices is not None:
            self._devices.abort()
        self._hello, self.layout, self._boards, self._prefault = None, None, [], None
        self.handover.stream = ""

    def _begin(self, hello: Hello) -> None:
        if hello.shares:
            memory = take(self._channel.transport)
            assert self._take_memory is not None
            self._take_memory(memory)
        else:
            if hello.postcopy and not self._postcopy:
                raise error(errno.EOPNOTSUPP, "postcopy", hint="the source may switch to post-copy, and nobody here "
                            "takes that (postcopy=True, --postcopy)")
            memory = self._make_memory(hello)
        layout = MemoryLayout(memory, hello.pgsize)
        if layout.shape != hello.blocks:
            layout.close()
            raise damaged("the memory here has another shape than the source's")
        try:
            if hello.postcopy:
                check_memory(layout)
            self.handover.begin(hello.stream_id.hex())
        except BaseException:
            layout.close()
            raise
        self.layout, self._hello = layout, hello
        self._boards = open_boards(layout, self._fresh)
        if self._devices is not None:
            self._devices.prepare()
        if self._prefaults and not hello.shares:
            self._prefault = Prefault(layout, self._boards)

    def _receive_epoch(self, layout: MemoryLayout) -> bool:
        """Receive frames up to END; return whether it was the final one."""
        if max(self.epoch, self._attempt) > stream.MAX_EPOCH:
            raise damaged("too many epochs")
        self._attempt += 1      # an epoch that broke comes again, with pages that were here before
        self._state_bytes, self._left = 0, None
        hello = self._hello
        assert hello is not None
        final, later, shared = False, False, hello.shares
        left = DirtyBitmap(layout.nbits, layout.pgsize) if hello.postcopy else None

        def control() -> Totals:
            nonlocal final, later
            kinds = [Kind.STATE, Kind.PAGES, Kind.ZEROS, Kind.END, Kind.PREPARE, Kind.KEEPALIVE, Kind.ABORT]
            while True:
                header, body = self._channel.receive(*kinds, *([Kind.LEFT] if left is not None else []))
                if header.kind is Kind.KEEPALIVE:
                    continue
                if header.kind is Kind.ABORT:
                    self._abort()
                    raise MigrationError(errno.ECANCELED, operation="receive", hint="the source keeps the guest")
                if header.epoch != self.epoch:
                    raise damaged(f"a frame of epoch {header.epoch} in epoch {self.epoch}")
                if header.kind is Kind.END:
                    final, later = bool(header.flags & stream.FINAL), bool(header.flags & stream.LATER)
                    return stream.decode_totals(body)
                if header.kind is Kind.PREPARE:
                    if self._prefault is not None and hello.postcopy:
                        self._prefault.stop()       # before the guest stands still
                    self._on_prepare()
                    self._channel.send(Kind.PREPARED, epoch=self.epoch)
                elif header.kind is Kind.STATE:
                    self._receive_state(body)
                elif header.kind is Kind.LEFT:
                    assert left is not None
                    take_bits(header, body, layout, left)
                else:
                    self._intakes[0].take(header, body)

        self.handover.receive()
        try:
            self._totals = take_epoch(self._intakes, self.epoch, self._attempt - 1, control)
        finally:
            self._touched = self._touched or shared or any(intake.touched for intake in self._intakes)
        if later != (left is not None and (later or left.any())):
            raise damaged("pages are to come later, which was not agreed on" if later else "LEFT without a hand-over")
        came = self._totals.pages + self._totals.zero_pages
        if later and left is not None:
            self._left = left
            came = min(came + left.count(), layout.npages)      # what came and was written since, is left as well
        if not self.epoch and not shared and came != layout.npages:
            raise damaged("the first epoch did not bring all memory")
        return final

    def _receive_state(self, body: memoryview) -> None:
        name, data = stream.decode_state(body)
        if self._devices is not None and self._devices.take(name, data):
            return
        self._state_bytes += len(body)
        if self._state_bytes > stream.MAX_STATES:
            raise damaged(f"states of more than {stream.MAX_STATES} bytes")
        self._on_state(name, data)

    def _abort(self) -> None:
        self.handover.abort()
        self._channel.send(Kind.ABORTED)

    @contextlib.contextmanager
    def _telling(self) -> Any:
        """Tell the source why it ends here."""
        try:
            yield
        except BaseException as exc:
            with contextlib.suppress(OSError):
                self._channel.send(Kind.ERROR, stream.encode_error(exc))
            raise
