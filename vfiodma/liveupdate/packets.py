"""Messages between the two processes of a live update, with descriptors, over a UNIX stream socket.

A message is a header, a body of bounded length and, where the header announces some, batches of descriptors: one byte
each with at most 250 of them, as the kernel takes no more than 253 at a time.
"""
import contextlib
import enum
import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

from .._core.errno import error
from ..errors import MigrationError, peer_words

MAGIC = b"vfioLiUp"
VERSION = 1
MAX_BODY = 1 << 20              # of JSON: names and numbers, not mappings
MAX_FDS = 4096
_HEADER = struct.Struct("<8sHHIII")         # magic, version, kind, bytes of the body, descriptors, 0
_BATCH = 250


class Kind(enum.IntEnum):
    """What a message says."""

    OFFER = 1       #: old: here is everything but the right to use it
    READY = 2       #: new: all of it is mapped and checked
    GO = 3          #: old: the vaddrs are invalid, take over; with the last state in a sealed memfd, if there is one
    DONE = 4        #: new: everything is restored
    YOURS = 5       #: old: everything is let go
    FAILED = 6      #: either: nothing of mine has changed, or it is undone; the body says why
    MEMORY = 7      #: guest memory, for a migration on one host


class Peer(NamedTuple):
    """Who is at the other end."""

    pid: int        #: 0 = not known: another PID namespace
    uid: int


class Fds:
    """Descriptors that are closed unless somebody takes them."""

    def __init__(self, fds: Sequence[int] = ()) -> None:
        self._fds: list[int] = list(fds)

    def __len__(self) -> int:
        return len(self._fds)

    def __getitem__(self, index: int) -> int:
        return self._fds[index]

    def add(self, fds: Sequence[int]) -> None:
        """Own some more."""
        self._fds += fds

    def take(self, first: int, count: int) -> list[int]:
        """Give descriptors away; the numbers of those after them stay the same."""
        taken = self._fds[first:first + count]
        self._fds[first:first + count] = [-1] * len(taken)
        return taken

    def close(self) -> None:
        """Close what nobody took; idempotent."""
        while self._fds:
            if (fd := self._fds.pop()) >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Link:
    """One end of the socket.

    Parameters
    ----------
    sock : socket.socket
        A connected UNIX stream socket; stays the caller's.
    timeout : float
        Seconds for each message.

    Raises
    ------
    InvalidArgumentError
        EINVAL: not such a socket.
    DmaPermissionError
        EPERM: the peer is another user.

    Notes
    -----
    Source: unix(7), SO_PEERCRED, SO_PASSCRED, SCM_RIGHTS.
    """

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise error(errno.EINVAL, "live_update", hint="a connected UNIX stream socket is needed")
        if not 0 < timeout < 1 << 31:
            raise error(errno.EINVAL, "live_update", hint="timeout is a positive number of seconds")
        self.sock, self.timeout = sock, timeout
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)       # for the PID of who really sends
        try:
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
        except OSError as exc:
            raise error(exc.errno or errno.ENOTCONN, "live_update", hint="the socket is not connected") from None
        self._check(Peer(*struct.unpack("iII", raw)[:2]))
        self.peer: Peer | None = None           #: who sent the last message with a body

    @staticmethod
    def _check(peer: Peer) -> None:
        if peer.uid != os.geteuid():
            raise error(errno.EPERM, "live_update",
                        hint=f"the peer runs as user {peer.uid}, this process as {os.geteuid()}: only the same user "
                             "may take over devices")

    def send(self, kind: Kind, body: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a message; the descriptors stay the caller's."""
        if len(body) > MAX_BODY or len(fds) > MAX_FDS:
            raise error(errno.EMSGSIZE, "live_update", hint=f"at most {MAX_FDS} descriptors, and {MAX_BODY} bytes")
        deadline = time.monotonic() + self.timeout
        data = memoryview(_HEADER.pack(MAGIC, VERSION, kind, len(body), len(fds), 0) + body)
        while data:
            data = data[self._try(deadline, partial(self.sock.send, data, socket.MSG_NOSIGNAL)):]
        for at in range(0, len(fds), _BATCH):
            batch = list(fds[at:at + _BATCH])
            self._try(deadline, partial(socket.send_fds, self.sock, [b"f"], batch, socket.MSG_NOSIGNAL))

    def hung_up(self) -> bool:
        """Whether the peer has closed its end, and sent nothing more."""
        try:
            return not self._try(time.monotonic(), partial(self.sock.recv, 1, socket.MSG_PEEK))
        except MigrationError as exc:
            return exc.errno != errno.ETIMEDOUT

    def receive(self, *kinds: Kind, for_ever: bool = False) -> tuple[Kind, bytes, Fds]:
        """Receive a message of one of these kinds; the caller owns the descriptors.

        Raises
        ------
        MigrationError
            ETIMEDOUT, ECONNRESET: no message; EMFILE: too many descriptors for this process; ECANCELED: the peer
            refuses, with its reason.
        ProtocolError
            EPROTO: not a message, or not one that may come now.
        """
        deadline = None if for_ever else time.monotonic() + self.timeout
        magic, version, kind, size, nfds, zero = _HEADER.unpack(self._bytes(deadline, _HEADER.size))
        if magic != MAGIC:
            raise error(errno.EPROTO, "live_update", hint="the peer speaks another protocol")
        if version != VERSION:
            raise error(errno.EPROTO, "live_update", hint=f"the peer speaks version {version}, this process {VERSION}")
        if size > MAX_BODY or nfds > MAX_FDS or zero:
            raise error(errno.EPROTO, "live_update", hint=f"a message of {size} bytes with {nfds} descriptors")
        body, fds = self._bytes(deadline, size), Fds()
        try:
            while len(fds) < nfds:
                self._descriptors(deadline, fds, min(nfds - len(fds), _BATCH))
            if kind == Kind.FAILED:
                raise MigrationError(errno.ECANCELED, operation="live_update",
                                     hint="the peer refuses: " + peer_words(body))
            if kind not in kinds:
                raise error(errno.EPROTO, "live_update", hint=f"message {kind} where "
                            f"{' or '.join(k.name for k in kinds)} was expected")
        except BaseException:
            fds.close()
            raise
        return Kind(kind), body, fds

    def _bytes(self, deadline: float | None, size: int) -> bytes:
        parts = []
        while size:
            # Room for credentials only: the kernel closes descriptors that come uncalled for.
            data, ancillary, flags, _ = self._try(deadline, partial(
                self.sock.recvmsg, size, socket.CMSG_SPACE(12), socket.MSG_CMSG_CLOEXEC))
            self._look(ancillary, Fds(), 0)
            if flags & socket.MSG_CTRUNC:
                raise error(errno.EPROTO, "live_update", hint="descriptors that were not announced")
            if not data:
                raise self._lost(errno.ECONNRESET)
            parts.append(data)
            size -= len(data)
        return b"".join(parts)

    def _descriptors(self, deadline: float | None, fds: Fds, count: int) -> None:
        space = socket.CMSG_SPACE(4 * _BATCH) + socket.CMSG_SPACE(12)
        data, ancillary, flags, _ = self._try(deadline, partial(self.sock.recvmsg, 1, space, socket.MSG_CMSG_CLOEXEC))
        before = len(fds)
        self._look(ancillary, fds, count)
        if flags & socket.MSG_CTRUNC:
            raise MigrationError(errno.EMFILE, operation="live_update", hint="the limit of open descriptors is "
                                 "reached: raise it with 'ulimit -n'")
        if not data:
            raise self._lost(errno.ECONNRESET)
        if len(fds) - before != count:
            raise error(errno.EPROTO, "live_update", hint=f"{len(fds) - before} descriptors, not {count} as announced")

    def _look(self, ancillary: list[tuple[int, int, bytes]], fds: Fds, count: int) -> None:
        """Take descriptors and credentials out of ancillary data."""
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.add(struct.unpack_from(f"{len(data) // 4}i", data))
            elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS) and len(data) >= 8:
                peer = Peer(*struct.unpack_from("iI", data))
                if peer.pid:                    # 0: sent before this end asked for credentials
                    self._check(peer)
                    self.peer = peer
        if len(fds) and not count:
            fds.close()
            raise error(errno.EPROTO, "live_update", hint="descriptors that were not announced")

    def _try(self, deadline: float | None, call: Callable[[], Any]) -> Any:
        # What is there already is taken even when this process was stopped for longer than the peer may be silent.
        before = self.sock.gettimeout()
        self.sock.settimeout(None if deadline is None else max(deadline - time.monotonic(), 0.0))
        try:
            return call()
        except (TimeoutError, BlockingIOError):
            raise self._lost(errno.ETIMEDOUT) from None
        except OSError as exc:
            raise self._lost(errno.ECONNRESET if exc.errno in (None, errno.EPIPE) else exc.errno) from None
        finally:
            self.sock.settimeout(before)

    def _lost(self, number: int) -> OSError:
        hint = f"the peer did not answer within {self.timeout:g} s" if number == errno.ETIMEDOUT else \
            "the connection to the peer is lost"
        return MigrationError(number, operation="live_update", hint=hint)
