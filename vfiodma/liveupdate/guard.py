"""Making sure that the other process can do nothing any more, before this one takes its mappings back."""
import contextlib
import os
import select
import signal
from typing import Self

from .packets import Peer


class Guard:
    """A process that may have to be stopped.

    Parameters
    ----------
    peer : Peer or None
        As the kernel told it with a message; None, or this process itself, can't be stopped.

    Notes
    -----
    Source: pidfd_open(2): a number that is used again can't be meant by mistake.
    """

    def __init__(self, peer: Peer | None) -> None:
        self._fd, self._gone = -1, False
        if peer is not None and peer.pid != os.getpid():
            try:
                self._fd = os.pidfd_open(peer.pid)
            except ProcessLookupError:
                self._gone = True
            except OSError:
                pass                        # an old kernel, or no descriptor left: it can't be stopped

    def stop(self, seconds: float = 10.0) -> bool:
        """Kill it and wait until it is gone; return whether it is."""
        if self._fd < 0:
            return self._gone
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(seconds * 1e3))

    def close(self) -> None:
        """Forget about it; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
