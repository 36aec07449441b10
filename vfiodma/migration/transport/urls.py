"""Transports by URL: who connects, who listens, and what is refused for being open to everybody."""
import contextlib
import errno
import ipaddress
import os
import re
import select
import socket
import stat
import time
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

from ..._core.errno import error
from ...errors import MigrationError
from .pipes import PipeTransport
from .sockets import ByteTransport, SocketTransport
from .tls import TlsFiles, TlsTransport

_MOST_PATH = 107        # bytes of the name of a UNIX socket
_MOST_SHAKING = 64      # connections in the handshake of TLS: the oldest goes for a newer one


class _Url(NamedTuple):
    scheme: str     # unix, tcp, tls, fd, fds
    host: str       # or the path
    port: int       # or the descriptor
    output: int = -1    # of fds: the descriptor to send to


def _parse(url: str) -> _Url:
    """Take a URL apart; InvalidArgumentError where it is none of ours."""
    if not isinstance(url, str):
        raise TypeError(f"a URL is a str, not {type(url).__name__}")
    if url.startswith("unix:") and len(url) > 5 and "\0" not in url:
        if len(os.fsencode(url[5:])) > _MOST_PATH:
            raise MigrationError(errno.ENAMETOOLONG, operation="transport",
                                 hint=f"the path of a UNIX socket has at most {_MOST_PATH} bytes")
        return _Url("unix", url[5:], 0)
    if re.fullmatch("fd:[0-9]{1,9}", url):
        return _Url("fd", "", int(url[3:]))
    if re.fullmatch("fd:[0-9]{1,9},[0-9]{1,9}", url):
        return _Url("fds", "", *map(int, url[3:].split(",")))
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        extra = parts.path or parts.query or parts.fragment or parts.username is not None
        if parts.scheme in ("tcp", "tls") and parts.hostname and parts.port is not None and not extra:
            return _Url(parts.scheme, parts.hostname, parts.port)
    raise error(errno.EINVAL, "transport",
                hint=f"{url!r} is none of unix:/path, tcp://host:port, tls://host:port, fd:N, fd:IN,OUT")


def _check_tls(scheme: str, tls: TlsFiles | None) -> None:
    if (scheme == "tls") != (tls is not None):
        raise error(errno.EINVAL, "transport", hint="tls:// and certificates belong together" if scheme != "tls" else
                    "tls:// needs the certificates of this side: tls=TlsFiles(ca, certificate, key) "
                    "(--ca, --certificate, --key)")


def _check_open(address: str, insecure: bool) -> None:
    """Refuse plain bytes on a network."""
    if not insecure and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise MigrationError(errno.EPERM, operation="transport",
                             hint=f"guest memory would travel in the clear to or from {address}: use tls://, or "
                                  "insecure=True (--insecure)")


def _addresses(url: _Url, insecure: bool, flags: int = 0) -> list[tuple[socket.AddressFamily, Any]]:
    """Resolve once; what was checked is what is used."""
    try:
        found = socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM, flags=flags)
    except (socket.gaierror, UnicodeError) as exc:
        raise MigrationError(errno.EHOSTUNREACH, operation="transport",
                             hint=f"the address of {url.host} can't be found: {exc}") from None
    if url.scheme == "tcp":
        for *_, address in found:
            _check_open(str(address[0]), insecure)
    return [(family, address) for family, _, _, _, address in found]


def _tune(sock: socket.socket, timeout: float) -> None:
    """Small frames go at once, and a peer that vanished is noticed."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(round(timeout * 1e3), (1 << 31) - 1))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _failed(exc: OSError, what: str) -> MigrationError:
    number = errno.ETIMEDOUT if isinstance(exc, TimeoutError) else exc.errno or errno.EIO
    return MigrationError(number, operation="transport", hint=what)


def connect(url: str, *, timeout: float = 30.0, tls: TlsFiles | None = None,
            insecure: bool = False) -> ByteTransport:
    """Connect to the other side of a migration.

    Parameters
    ----------
    url : str
        ``unix:/path``, ``tcp://host:port`` (in the clear), ``tls://host:port``; ``fd:N``: a connected stream socket;
        ``fd:IN,OUT``: two pipes, or other descriptors that can be polled.  Descriptors are owned from here on.
    timeout : float
        Seconds to connect in, and that one part of a frame may take afterwards.
    tls : TlsFiles, optional
        Needed for ``tls://``: both sides prove themselves.
    insecure : bool
        Allow a network address that is not the loopback's in the clear.

    Raises
    ------
    InvalidArgumentError
        EINVAL: no such URL.
    MigrationError
        EPERM: in the clear over a network.  EHOSTUNREACH, ECONNREFUSED, ENOENT, ETIMEDOUT ...: nobody is there.
        ENAMETOOLONG: the path.  EKEYREJECTED: a certificate was refused.  ENOTSOCK, EPROTOTYPE, ENOTCONN, EBADF: not
        such a descriptor.
    """
    where = _parse(url)
    _check_tls(where.scheme, tls)
    ByteTransport.check_timeout(timeout)
    if where.scheme == "fd":
        return SocketTransport(_adopt(where.port, timeout, insecure), timeout)
    if where.scheme == "fds":
        for fd in (where.port, where.output):
            _check_descriptor(fd, insecure)
        return PipeTransport(where.port, where.output, timeout)
    targets: list[tuple[socket.AddressFamily, Any]]
    if where.scheme == "unix":
        targets = [(socket.AF_UNIX, where.host)]
    else:
        targets = _addresses(where, insecure)
    failure: OSError | None = None
    deadline = time.monotonic() + timeout
    for family, address in targets:
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as exc:
            failure = exc
            continue
        try:
            sock.settimeout(max(deadline - time.monotonic(), 1e-3))
            sock.connect(address)
            _tune(sock, timeout)
        except OSError as exc:
            sock.close()
            failure = exc
            continue
        if tls is not None:
            return TlsTransport(sock, tls, tls.server_name or where.host, timeout)
        return SocketTransport(sock, timeout)
    assert failure is not None
    raise _failed(failure, f"can't connect to {url}: is the destination listening there?") from None


def _adopt(fd: int, timeout: float, insecure: bool) -> socket.socket:
    """Make a socket of a descriptor; a descriptor that is refused stays open, and the caller's."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as exc:
        raise _failed(exc, f"descriptor {fd} is no socket") from None
    try:
        if sock.type != socket.SOCK_STREAM:
            raise MigrationError(errno.EPROTOTYPE, operation="transport", hint=f"descriptor {fd} is no stream socket")
        peer = sock.getpeername()
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            _check_open(str(peer[0]), insecure)
        _tune(sock, timeout)
    except OSError as exc:
        sock.detach()
        if isinstance(exc, MigrationError):
            raise
        raise _failed(exc, f"descriptor {fd} is not connected") from None
    return sock


def _check_descriptor(fd: int, insecure: bool) -> None:
    """Refuse a network's socket among descriptors; what is no good otherwise is PipeTransport's to refuse."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return
    except OSError:
        return
    try:
        other = os.dup(fd)
    except OSError as exc:
        raise _failed(exc, f"descriptor {fd} can't be looked at") from None
    with socket.socket(fileno=other) as sock:
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            try:
                peer = sock.getpeername()
            except OSError as exc:
                raise _failed(exc, f"descriptor {fd} is not connected") from None
            _check_open(str(peer[0]), insecure)


class Listener:
    """Waits for the source of a migration; made by ``listen``.

    Attributes
    ----------
    url : str
        What the source connects to: the port is filled in where it was 0.
    """

    def __init__(self, sock: socket.socket, url: _Url, timeout: float, tls: TlsFiles | None) -> None:
        self._sock = sock
        self._timeout = timeout
        self._tls = tls
        self._shaking: dict[int, tuple[TlsTransport, int, float]] = {}      # event awaited, when it is given up
        self._sock.setblocking(False)
        self._path: tuple[str, int] | None = None
        if url.scheme == "unix":
            self.url = f"unix:{url.host}"
            self._path = url.host, os.stat(url.host).st_ino
        else:
            host = f"[{url.host}]" if ":" in url.host else url.host
            self.url = f"{url.scheme}://{host}:{sock.getsockname()[1]}"

    def accept(self, timeout: float | None = None) -> ByteTransport:
        """Wait for one connection, by default as long as ``timeout`` of ``listen``.

        Raises
        ------
        MigrationError
            ETIMEDOUT: nobody came.  EKEYREJECTED, EPROTO, ECONNRESET: somebody without a good certificate, or without
            TLS, did; another call waits for the next one.  Who is slow in a handshake holds up nobody else.
        """
        limit = self._timeout if timeout is None else timeout
        ByteTransport.check_timeout(limit)
        until = time.monotonic() + limit
        while True:
            poll = select.poll()
            try:
                poll.register(self._sock, select.POLLIN)
                for fd, (_, event, _) in self._shaking.items():
                    poll.register(fd, event)
            except (OSError, ValueError):
                raise MigrationError(errno.EBADF, operation="transport", hint="the listener is closed") from None
            now = time.monotonic()
            ends = min([until, *(end for _, _, end in self._shaking.values())])
            ready = [fd for fd, _ in poll.poll(max(ends - now, 0) * 1e3)]
            for fd in [fd for fd in self._shaking if fd in ready]:
                if (tls := self._shake(fd)) is not None:
                    return tls
            if self._sock.fileno() in ready and (plain := self._accept()) is not None:
                return plain
            now = time.monotonic()
            for fd in [fd for fd, (_, _, end) in self._shaking.items() if now >= end]:
                self._shaking.pop(fd)[0].close()
            if now >= until:
                raise MigrationError(errno.ETIMEDOUT, operation="transport", hint="nobody connected")

    def _accept(self) -> SocketTransport | None:
        """Take one connection; with TLS its handshake goes on beside others'."""
        try:
            sock, _ = self._sock.accept()
        except BlockingIOError:         # it is gone already
            return None
        except OSError as exc:
            raise _failed(exc, str(exc)) from None
        try:
            _tune(sock, self._timeout)
        except OSError as exc:
            sock.close()
            raise _failed(exc, "the connection was lost at once") from None
        if self._tls is None:
            return SocketTransport(sock, self._timeout)
        while len(self._shaking) >= _MOST_SHAKING:
            self._shaking.pop(next(iter(self._shaking)))[0].close()
        tls = TlsTransport(sock, self._tls, None, self._timeout, handshake=False)
        self._shaking[tls.fileno()] = tls, select.POLLIN, time.monotonic() + self._timeout
        return None

    def _shake(self, fd: int) -> TlsTransport | None:
        tls, _, end = self._shaking.pop(fd)
        try:
            event = tls.shake()
        except BaseException:
            tls.close()
            raise
        if not event:
            return tls
        self._shaking[fd] = tls, event, end
        return None

    def filenos(self) -> list[int]:
        """Return the descriptors that it needs."""
        return [self._sock.fileno(), *(fd for tls, _, _ in self._shaking.values() for fd in tls.filenos())]

    def close(self) -> None:
        """Stop listening, and remove the UNIX socket's file; idempotent."""
        self._sock.close()
        while self._shaking:
            self._shaking.popitem()[1][0].close()
        path, self._path = self._path, None
        if path is not None:
            with contextlib.suppress(OSError):
                now = os.lstat(path[0])
                if stat.S_ISSOCK(now.st_mode) and now.st_ino == path[1]:
                    os.unlink(path[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def listen(url: str, *, timeout: float = 30.0, tls: TlsFiles | None = None, insecure: bool = False) -> Listener:
    """Listen where a migration's source will connect; parameters and errors as of ``connect``.

    A UNIX socket's file is made for its owner only, and must not be there yet (EADDRINUSE).  Port 0 is any free one.
    """
    where = _parse(url)
    _check_tls(where.scheme, tls)
    ByteTransport.check_timeout(timeout)
    if where.scheme in ("fd", "fds"):
        raise error(errno.EINVAL, "transport", hint="descriptors are connected already: connect() takes them")
    family: socket.AddressFamily
    address: Any
    if where.scheme == "unix":
        family, address = socket.AF_UNIX, where.host
    else:
        family, address = _addresses(where, insecure, socket.AI_PASSIVE)[0]
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as exc:
        raise _failed(exc, f"can't listen on {url}: {exc.strerror or exc}") from None
    try:
        if family == socket.AF_UNIX:
            os.fchmod(sock.fileno(), stat.S_IRUSR | stat.S_IWUSR)      # before bind(2): the file never is anybody's
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(1)
        return Listener(sock, where, timeout, tls)
    except OSError as exc:
        sock.close()
        hint = f"can't listen on {url}: {exc.strerror or exc}"
        if family == socket.AF_UNIX and exc.errno == errno.EADDRINUSE:
            hint += "; remove the file if nobody listens there any more"
        raise _failed(exc, hint) from None
