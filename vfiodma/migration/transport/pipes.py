"""A pair of descriptors, one a direction: pipes, or whatever a parent process or ssh left open."""
import contextlib
import errno
import fcntl
import os
import select

from ...errors import MigrationError
from .polled import PolledTransport

_PIPE_BYTES = 1 << 20       # what an unprivileged process may ask for: fewer switches between the two sides


class PipeTransport(PolledTransport):
    """Two descriptors that can be polled.

    Parameters
    ----------
    read_fd, write_fd : int
        What comes in, and where to send; the same number twice for one that does both.  Owned: closed with this object.
        Their open file descriptions become non-blocking until then.
    timeout : float
        Seconds that one part of a frame may take before the peer counts as lost.

    Raises
    ------
    MigrationError
        EBADF: not open, or not in that direction.  The descriptors stay open, and the caller's.

    Notes
    -----
    Source: pipe(7), readv(2), poll(2).
    """

    def __init__(self, read_fd: int, write_fd: int, timeout: float = 30.0) -> None:
        self.check_timeout(timeout)
        blocking: dict[int, bool] = {}
        for fd, wrong in ((read_fd, os.O_WRONLY), (write_fd, os.O_RDONLY)):
            try:
                mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
            except OSError as exc:
                raise MigrationError(exc.errno or errno.EBADF, operation="transport",
                                     hint=f"descriptor {fd} is not open") from None
            if mode == wrong:
                raise MigrationError(errno.EBADF, operation="transport",
                                     hint=f"descriptor {fd} is open in the other direction only")
            blocking[fd] = os.get_blocking(fd)
        super().__init__(timeout)
        self._blocking, self._read_fd, self._write_fd = blocking, read_fd, write_fd
        for fd in blocking:
            os.set_blocking(fd, False)
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def _send_some(self, views: list[memoryview]) -> int:
        return self._when_ready("send", self._write_fd, lambda: os.writev(self._write_fd, views))

    def _receive_some(self, views: list[memoryview]) -> int:
        return self._when_ready("receive", self._read_fd, lambda: os.readv(self._read_fd, views))

    def _wait_readable(self, timeout: float) -> bool:
        return bool(self._poll("receive", self._read_fd, select.POLLIN, timeout))

    def filenos(self) -> list[int]:
        """Return the descriptors that it needs."""
        return [*super().filenos(), *self._blocking]

    def leave(self) -> None:
        """Close it in this process: a child goes on with the connection."""
        self._blocking = dict.fromkeys(self._blocking, False)       # the child's as well
        self.close()

    def close(self) -> None:
        """Close both descriptors; idempotent."""
        fds, self._blocking = self._blocking, {}
        self._read_fd = self._write_fd = -1     # the numbers may be other files' from here on
        for fd, blocking in fds.items():
            with contextlib.suppress(OSError):
                os.set_blocking(fd, blocking)
            os.close(fd)
        super().close()
