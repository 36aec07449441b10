"""Byte transports: everything or an error, never a wait without an end."""
import contextlib
import errno
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ..._core.errno import error
from ...errors import MigrationError, VfioError

_MAX_PARTS = 512        # of one sendmsg(2) or writev(2); IOV_MAX is 1024
#: Bytes on their way through a UNIX socket, at least: by default so few that one side stands still while the other one
#: looks at what it has.  More would make a page wait that post-copy wants now.  The kernel books twice as much.
_UNIX_BYTES = 256 << 10


class Transport(Protocol):
    """What a stream needs to be carried."""

    def send(self, parts: Sequence[Any]) -> None:
        """Send all bytes of all parts, in order."""

    def receive_into(self, view: memoryview) -> None:
        """Fill the view."""

    def receive_parts(self, views: Sequence[memoryview]) -> None:
        """Fill all views, one after another."""

    def wait_readable(self, timeout: float | None = None) -> bool:
        """Wait until there is something to receive, the end included; False where nothing came in time (seconds)."""

    def interrupt(self, *, receiving: bool = True, sending: bool = True) -> None:
        """From any thread: nothing is received, or sent, any more; who does or tries to gets ECANCELED.  Idempotent."""

    def close(self) -> None:
        """Give the connection up; idempotent.  Not while another thread is in a call."""


class ByteTransport:
    """What all transports have in common: whole parts, time-outs, and errors.

    Parameters
    ----------
    timeout : float
        Seconds that one part of a frame may take before the peer counts as lost.

    Notes
    -----
    A lost or silent peer is MigrationError (with the errno of the system call, or ETIMEDOUT); a stream that ends too
    early is ProtocolError.  The GIL is released while waiting and copying.  For one thread, all but ``interrupt``.
    """

    def __init__(self, timeout: float) -> None:
        self.check_timeout(timeout)
        self.timeout = timeout
        self._stopped: set[str] = set()     # "send", "receive"

    @staticmethod
    def check_timeout(timeout: float) -> None:
        """Refuse what is no number of seconds with an end."""
        if not 0 < timeout < 1 << 31:
            raise error(errno.EINVAL, "transport", hint="timeout is a positive number of seconds")

    def close(self) -> None:
        """Close the connection; idempotent."""
        raise NotImplementedError

    def leave(self) -> None:
        """Close it in this process: a child goes on with the connection."""
        self.close()

    def send(self, parts: Sequence[Any]) -> None:
        """Send all bytes of all parts."""
        self._move(parts, "send")

    def receive_into(self, view: memoryview) -> None:
        """Fill the view."""
        self._move([view], "receive")

    def receive_parts(self, views: Sequence[memoryview]) -> None:
        """Fill all views."""
        self._move(views, "receive")

    def wait_readable(self, timeout: float | None = None) -> bool:
        """Wait until there is something to receive, the end included; False where nothing came in time (seconds)."""
        return "receive" in self._stopped or self._wait_readable(self.timeout if timeout is None else timeout)

    def interrupt(self, *, receiving: bool = True, sending: bool = True) -> None:
        """From any thread: nothing is received, or sent, any more; who does or tries to gets ECANCELED.  Idempotent."""
        self._stopped |= {doing for doing, stop in (("receive", receiving), ("send", sending)) if stop}
        self._wake(receiving, sending)

    def _move(self, parts: Sequence[Any], doing: str) -> None:
        """Repeat a system call until all bytes of all parts moved."""
        views = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]
        portion: list[memoryview] = []
        first, moved, began = 0, False, time.monotonic()
        try:
            while first < len(views):
                if doing in self._stopped:
                    raise self._interrupted(doing)
                portion = views[first:first + _MAX_PARTS]
                count = self._send_some(portion) if doing == "send" else self._receive_some(portion)
                if not count and doing not in self._stopped:
                    where = "in a frame, too early" if moved else "before it was complete"
                    raise error(errno.EPROTO, doing, hint=f"the peer closed the stream {where}")
                moved = True
                while first < len(views) and count >= len(views[first]):
                    count -= len(views[first])
                    first += 1
                if count:
                    views[first] = views[first][count:]
                if first < len(views) and time.monotonic() - began >= self.timeout:
                    raise self._silent(doing)
        except VfioError:
            raise
        except OSError as exc:
            exc.__traceback__ = None        # nobody who looks at it may hold guest memory
            if doing in self._stopped:
                raise self._interrupted(doing) from None
            if isinstance(exc, BlockingIOError | TimeoutError):
                raise self._silent(doing) from None
            raise self._lost(exc, doing) from None
        finally:
            views.clear()
            portion.clear()

    def _send_some(self, views: list[memoryview]) -> int:
        raise NotImplementedError

    def _receive_some(self, views: list[memoryview]) -> int:
        raise NotImplementedError

    def _wait_readable(self, timeout: float) -> bool:
        raise NotImplementedError

    def _wake(self, receiving: bool, sending: bool) -> None:
        """End the system calls of other threads."""
        raise NotImplementedError

    def _silent(self, doing: str) -> OSError:
        return MigrationError(errno.ETIMEDOUT, operation=doing, hint=f"the peer did not move for {self.timeout:g} s")

    def _interrupted(self, doing: str) -> OSError:
        return MigrationError(errno.ECANCELED, operation=doing, hint="this side gave the connection up")

    def _lost(self, exc: OSError, doing: str) -> OSError:
        # EPIPE, which programs take for a reader of their output that went away, is the same as ECONNRESET here.
        number = errno.ECONNRESET if exc.errno in (None, errno.EPIPE) else exc.errno
        return MigrationError(number, operation=doing, hint="the connection to the peer is lost")


class SocketTransport(ByteTransport):
    """A connected stream socket (UNIX or TCP).

    Parameters
    ----------
    sock : socket.socket
        Owned, and closed with this object.
    timeout : float
        Seconds that one part of a frame may take before the peer counts as lost.
    """

    def __init__(self, sock: socket.socket, timeout: float = 30.0) -> None:
        super().__init__(timeout)
        self._sock = sock
        # The kernel keeps the time: one system call for a whole body, however it arrives or leaves.
        sock.setblocking(True)
        limit = struct.pack("@ll", *divmod(max(round(timeout * 1e6), 1), 1_000_000))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        # TCP finds out by itself.
        if sock.family == socket.AF_UNIX and sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < 2 * _UNIX_BYTES:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BYTES)

    @contextlib.contextmanager
    def lent(self) -> Iterator[socket.socket]:
        """Lend the socket, between two frames, to somebody who sends something else over it."""
        try:
            yield self._sock
        finally:
            self._sock.setblocking(True)
            if self._sock.family == socket.AF_UNIX:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)

    def _send_some(self, views: list[memoryview]) -> int:
        return self._sock.sendmsg(views, (), socket.MSG_NOSIGNAL)

    def _receive_some(self, views: list[memoryview]) -> int:
        return self._sock.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]

    def _wait_readable(self, timeout: float) -> bool:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(timeout * 1e3))

    def _wake(self, receiving: bool, sending: bool) -> None:
        how = socket.SHUT_RDWR if receiving and sending else socket.SHUT_RD if receiving else socket.SHUT_WR
        with contextlib.suppress(OSError):
            self._sock.shutdown(how)

    def filenos(self) -> list[int]:
        """Return the descriptors that it needs."""
        return [self._sock.fileno()]

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._sock.close()
