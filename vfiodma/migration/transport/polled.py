"""Transports that poll a descriptor, and can be interrupted without harm to the connection."""
import contextlib
import errno
import os
import select
import ssl
from collections.abc import Callable

from ...errors import MigrationError
from .sockets import ByteTransport


class PolledTransport(ByteTransport):
    """Calls on non-blocking descriptors, repeated when they are ready."""

    def __init__(self, timeout: float) -> None:
        super().__init__(timeout)
        # Becomes readable, for good, when a direction is given up: one for each.
        self._wakers: dict[str, int] = {}
        try:
            for doing in ("receive", "send"):
                self._wakers[doing] = os.eventfd(0, os.EFD_CLOEXEC)
        except OSError as exc:
            PolledTransport.close(self)
            raise MigrationError(exc.errno or errno.EMFILE, operation="transport",
                                 hint="two more descriptors are needed") from None

    def _when_ready(self, doing: str, fd: int, call: Callable[[], int]) -> int:
        """Return what the call does, as soon as it would not block; TimeoutError, or BrokenPipeError for a wake-up."""
        while True:
            event = select.POLLIN if doing == "receive" else select.POLLOUT
            try:
                return call()
            except BlockingIOError:
                pass
            except ssl.SSLWantReadError:
                event = select.POLLIN
            except ssl.SSLWantWriteError:
                event = select.POLLOUT
            ready = self._poll(doing, fd, event, self.timeout)
            if not ready:
                raise TimeoutError
            if self._wakers[doing] in ready:
                raise BrokenPipeError

    def _poll(self, doing: str, fd: int, event: int, timeout: float) -> dict[int, int]:
        """Return the descriptors that are ready, that of a wake-up among them; none after the time-out."""
        poll = select.poll()
        poll.register(fd, event)
        poll.register(self._wakers[doing], select.POLLIN)
        return dict(poll.poll(timeout * 1e3))

    def _wake(self, receiving: bool, sending: bool) -> None:
        for doing, stop in (("receive", receiving), ("send", sending)):
            if stop and self._wakers:
                os.eventfd_write(self._wakers[doing], 1)

    def filenos(self) -> list[int]:
        """Return the descriptors that it needs."""
        return list(self._wakers.values())

    def close(self) -> None:
        """Close what is left; idempotent."""
        wakers, self._wakers = self._wakers, {}
        for fd in wakers.values():
            with contextlib.suppress(OSError):
                os.close(fd)
