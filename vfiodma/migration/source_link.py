"""A source's connection to its destination: greeting it, connecting again, and the journal of whose the guest is."""
import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

from .._core.errno import error
from ..errors import HandoverError, MigrationError, VfioError
from . import stream
from .channel import FrameChannel, gave_up
from .events import Event
from .handover import Journal, SourceHandover, SourceState
from .joining import close_channels, connect_channels
from .stream import Compression, Hello, Kind, Ready

_BACKOFF = 0.05, 2.0        # seconds between attempts to connect again: the first, the longest


class SourceLink:
    """What PrecopySource has of connections; its parameters are described there.

    Attributes
    ----------
    handover : SourceHandover
        Whose the guest is.
    """

    def __init__(self, transport: Any, connect: Callable[[], Any] | None, reconnect_timeout: float,
                 journal: Journal | None, on_event: Callable[[Event], object] | None) -> None:
        if reconnect_timeout < 0:
            raise error(errno.EINVAL, "migrate", hint="reconnect_timeout is not negative")
        self._channel = FrameChannel(transport)
        self._further: list[FrameChannel] = []
        self._connect, self._reconnect_timeout = connect, reconnect_timeout
        self._opened: list[Any] = []        # transports of connect()
        self._compression = Compression.NONE
        self._on_event = on_event or (lambda _: None)
        self._epoch = 0                     # number of acknowledged ones
        self._bytes = 0                     # sent over connections that are closed
        self._journal = journal or Journal()
        self._hello = self._earlier()
        self.handover = self._taking(self._hello) if self._hello else SourceHandover(Journal(), "")

    def close(self) -> None:
        """Close the connections that ``connect`` opened; idempotent."""
        close_channels(self._further)
        while self._opened:
            self._opened.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # To be told by who migrates

    def _check_wanted(self) -> None:
        """Raise where the migration was cancelled, and may be."""

    def _nap(self, seconds: float) -> None:
        """Wait before the next attempt to connect."""
        time.sleep(seconds)

    # The journal

    @contextlib.contextmanager
    def _written(self, consequence: str) -> Any:
        """Turn a failure of the file system into MigrationError."""
        try:
            yield
        except VfioError:
            raise
        except OSError as exc:
            raise MigrationError(exc.errno or errno.EIO, operation="release",
                                 hint=f"the journal can't be written: {consequence}") from exc

    def _taking(self, hello: Hello) -> SourceHandover:
        """What the journal says of a stream, and will say."""
        return SourceHandover(self._journal, hello.stream_id.hex(), hello=stream.encode_hello(hello).hex())

    def _earlier(self) -> Hello | None:
        """Return the stream that an earlier process gave its guest away in, if one did."""
        record = self._journal.read()
        if not record:
            return None
        try:
            SourceState(record["state"])
            return stream.decode_hello(bytes.fromhex(record["hello"]))
        except (LookupError, TypeError, ValueError, VfioError):
            raise error(errno.EBADMSG, "journal", hint=f"{self._journal.path} is no record of a source") from None

    # Connections

    def _greet(self, hello: Hello) -> Ready:
        self._channel.send(Kind.HELLO, stream.encode_hello(hello))
        ready = stream.decode_ready(self._channel.answer(Kind.READY)[1], hello)
        self._channel.checksum, self._compression = ready.checksum, ready.compression
        if self._connect is not None:
            self._further = connect_channels(self._connect, self._channel.transport, hello, ready)
        return ready

    def _connected(self, transport: Any) -> None:
        self._bytes += self._sent()
        close_channels(self._further)
        self._channel, self._further = FrameChannel(transport), []

    def _sent(self) -> int:
        """Bytes sent over the connections that are open."""
        return sum(channel.bytes_sent for channel in (self._channel, *self._further))

    def _again(self) -> Ready:
        """Greet the destination over a new connection, and compare what both know."""
        assert self._hello is not None
        asks, given = self.handover.state is SourceState.COMMITTING, self.handover.state is SourceState.GIVEN
        channels = 1 if given else self._hello.channels
        return self._greet(self._hello._replace(resume=True, epochs=self._epoch, asks=asks, channels=channels))

    def _connections(self, failure: MigrationError) -> Iterator[None]:
        """A new connection for each turn, until the time is over: then the failure is raised."""
        if self._connect is None:
            raise failure
        until, wait = time.monotonic() + self._reconnect_timeout, _BACKOFF[0]
        close_channels([self._channel, *self._further])     # the destination is to notice as well
        while True:
            self._check_wanted()
            with contextlib.suppress(VfioError):
                transport = self._connect()
                SourceLink.close(self)
                self._opened.append(transport)
                self._connected(transport)
                yield
            if time.monotonic() >= until:
                raise failure
            self._nap(wait)
            wait = min(wait * 2, _BACKOFF[1])

    def _in_doubt(self) -> HandoverError:
        return HandoverError(errno.EINPROGRESS, operation="release",
                             hint="the destination was told that it owns the guest, and did not answer: the guest "
                                  "stands still here until settle() has asked")

    def _tell_abort(self) -> None:
        """Tell the destination that it will never run the guest; that it hears it is not needed."""
        with contextlib.suppress(VfioError):
            self._channel.send(Kind.ABORT)
            self._channel.answer(Kind.ABORTED)

    @contextlib.contextmanager
    def _failing(self, operation: str) -> Any:
        """Turn a loss of the peer into MigrationError, with the peer's own words where it left some."""
        try:
            yield
        except VfioError as exc:
            if exc.errno in (errno.ECONNRESET, errno.EPIPE):
                told = None
                with contextlib.suppress(VfioError):
                    self._channel.transport.interrupt(receiving=False)     # it may still wait for more
                    told = gave_up(self._channel.receive(Kind.ERROR)[1])
                if told is not None:
                    raise told from exc
            if isinstance(exc, MigrationError):
                raise
            raise MigrationError(exc.errno, exc.strerror, operation=exc.operation or operation, iova=exc.iova,
                                 size=exc.size, hint=exc.hint) from exc
