"""Byte transports: everything or an error, never a wait without an end."""
import errno
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any, Protocol

from .._core.errno import error
from ..errors import MigrationError

_MAX_PARTS = 512        # of one sendmsg(2); IOV_MAX is 1024


class Transport(Protocol):
    """What a stream needs to be carried."""

    def send(self, parts: Sequence[Any]) -> None:
        """Send all bytes of all parts, in order."""

    def receive_into(self, view: memoryview) -> None:
        """Fill the view."""

    def close(self) -> None:
        """Give the connection up; idempotent."""


class SocketTransport:
    """A connected stream socket (UNIX or TCP).

    Parameters
    ----------
    sock : socket.socket
        Owned, and closed with this object.
    timeout : float
        Seconds that one part of a frame may take before the peer counts as lost.

    Notes
    -----
    A lost or silent peer is MigrationError (with the errno of the socket, or ETIMEDOUT); a stream that ends too early
    is ProtocolError.  The GIL is released while waiting and copying.
    """

    def __init__(self, sock: socket.socket, timeout: float = 30.0) -> None:
        if not 0 < timeout < 1 << 31:
            raise error(errno.EINVAL, "transport", hint="timeout is a positive number of seconds")
        self._sock = sock
        self.timeout = timeout
        # The kernel keeps the time of a receive: one system call for a whole body, however it arrives.
        sock.setblocking(True)
        seconds, rest = divmod(max(round(timeout * 1e6), 1), 1_000_000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", seconds, rest))
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)

    def send(self, parts: Sequence[Any]) -> None:
        """Send all bytes of all parts."""
        views = [view for view in (memoryview(part).cast("B") for part in parts if memoryview(part).nbytes)]
        deadline = time.monotonic() + self.timeout
        while views:
            try:
                sent = self._sock.sendmsg(views[:_MAX_PARTS], (), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0 or not self._writable.poll(left * 1e3):
                    raise self._silent("send") from None
                continue
            except OSError as exc:
                raise self._lost(exc, "send") from None
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def receive_into(self, view: memoryview) -> None:
        """Fill the view."""
        view = view.cast("B")
        size = len(view)
        deadline = time.monotonic() + self.timeout
        while view:
            try:
                got = self._sock.recv_into(view, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                raise self._silent("receive") from None
            except OSError as exc:
                raise self._lost(exc, "receive") from None
            if not got:
                where = "before it was complete" if len(view) == size else f"in a frame, {len(view)} bytes too early"
                raise error(errno.EPROTO, "receive", hint=f"the peer closed the stream {where}")
            view = view[got:]
            if view and time.monotonic() >= deadline:
                raise self._silent("receive")

    def _silent(self, doing: str) -> OSError:
        return MigrationError(errno.ETIMEDOUT, operation=doing, hint=f"the peer did not move for {self.timeout:g} s")

    def _lost(self, exc: OSError, doing: str) -> OSError:
        # EPIPE, which programs take for a reader of their output that went away, is the same as ECONNRESET here.
        number = errno.ECONNRESET if exc.errno in (None, errno.EPIPE) else exc.errno
        return MigrationError(number, operation=doing, hint="the connection to the peer is lost")

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._sock.close()
