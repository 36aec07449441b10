"""TLS with certificates on both sides."""
import contextlib
import errno
import os
import select
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Any

from ...errors import MigrationError, VfioError
from .polled import PolledTransport


@dataclass(frozen=True)
class TlsFiles:
    """Where the PEM files are that both sides prove themselves with."""

    ca: str | os.PathLike           #: certificates that the peer's must come from
    certificate: str | os.PathLike  #: this side's, with the chain
    key: str | os.PathLike          #: this side's private key, without a passphrase
    server_name: str | None = None  #: that the destination's certificate must have; by default the URL's host

    def context(self, *, server: bool) -> ssl.SSLContext:
        """Return a context that wants a certificate from the other side, whichever side this is."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(self.ca)
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except OSError as exc:      # SSLError is one
            number = errno.EINVAL if isinstance(exc, ssl.SSLError) else exc.errno or errno.EINVAL
            raise MigrationError(number, operation="tls", hint=f"the certificates can't be used: {exc}") from None
        return context


class TlsTransport(PolledTransport):
    """A connected stream socket, with TLS 1.3 over it.

    Parameters
    ----------
    sock : socket.socket
        Connected; owned, and closed with this object, also when the handshake fails.
    files : TlsFiles
        Both sides prove themselves.
    server_name : str or None
        The name that the peer's certificate must have; None on the side that accepted the connection.
    timeout : float
        As of SocketTransport; also of the handshake.
    handshake : bool
        Wait for its end; else ``shake`` is the caller's to call.

    Notes
    -----
    A certificate that one of the sides refuses is MigrationError with EKEYREJECTED.  The side that connected may learn
    of it only when it receives something.
    """

    def __init__(self, sock: socket.socket, files: TlsFiles, server_name: str | None, timeout: float = 30.0, *,
                 handshake: bool = True) -> None:
        try:
            super().__init__(timeout)
        except BaseException:
            sock.close()
            raise
        try:
            sock.setblocking(False)
            self._tls: Any = sock
            self._tls = files.context(server=server_name is None).wrap_socket(
                sock, server_side=server_name is None, server_hostname=server_name, do_handshake_on_connect=False)
            until = time.monotonic() + timeout
            while handshake and (event := self.shake()):
                if not self._poll("receive", self.fileno(), event, max(until - time.monotonic(), 0)):
                    raise self._silent("tls")
        except BaseException as exc:
            self.close()
            if isinstance(exc, OSError) and not isinstance(exc, VfioError):
                raise self._lost(exc, "tls") from None
            raise

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return int(self._tls.fileno())

    def filenos(self) -> list[int]:
        """Return the descriptors that it needs."""
        return [*super().filenos(), self.fileno()]

    def shake(self) -> int:
        """Go on with the handshake; return what has to be waited for (POLLIN, POLLOUT), or 0 when it is done."""
        try:
            self._tls.do_handshake()
            return 0
        except ssl.SSLWantReadError:
            return select.POLLIN
        except ssl.SSLWantWriteError:
            return select.POLLOUT
        except OSError as exc:
            raise self._lost(exc, "tls") from None

    def _send_some(self, views: list[memoryview]) -> int:
        return self._when_ready("send", self._tls.fileno(), lambda: self._tls.send(views[0]))

    def _receive_some(self, views: list[memoryview]) -> int:
        return self._when_ready("receive", self._tls.fileno(), lambda: self._tls.recv_into(views[0]))

    def _wake(self, receiving: bool, sending: bool) -> None:
        super()._wake(receiving, sending)
        if sending:     # of the socket below: the other side is to notice, and TLS may be in use by another thread
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._tls, socket.SHUT_WR)

    def _wait_readable(self, timeout: float) -> bool:
        return bool(self._tls.pending() or self._poll("receive", self._tls.fileno(), select.POLLIN, timeout))

    def _lost(self, exc: OSError, doing: str) -> OSError:
        if isinstance(exc, ssl.SSLEOFError | ssl.SSLZeroReturnError) or exc.errno == errno.ENOTCONN:
            exc = ConnectionResetError()
        if not isinstance(exc, ssl.SSLError):
            return super()._lost(exc, doing)
        reason = (exc.reason or str(exc)).upper()
        refused = "CERT" in reason or "UNKNOWN_CA" in reason
        why = getattr(exc, "verify_message", None) or exc.reason or exc
        return MigrationError(errno.EKEYREJECTED if refused else errno.EPROTO, operation=doing,
                              hint=f"{'a certificate was refused' if refused else 'TLS failed'}: {why}")

    def close(self) -> None:
        """Close the socket; idempotent."""
        with contextlib.suppress(OSError):
            self._tls.close()
        super().close()
