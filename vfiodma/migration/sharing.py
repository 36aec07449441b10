"""Memory that goes to another process of the same host as descriptors, without being copied."""
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .._core.bitmap import DirtyBitmap
from .._core.errno import error
from ..errors import MigrationError, VfioError
from ..liveupdate import receive_memory, send_memory
from ..memory import GuestMemory
from .transport import SocketTransport


@contextmanager
def _socket(transport: Any) -> Iterator[Any]:
    if not isinstance(transport, SocketTransport):
        raise error(errno.EOPNOTSUPP, "share_memory", hint="memory is shared over unix: only, on one host")
    try:
        with transport.lent() as sock:
            yield sock
    except MigrationError:
        raise
    except VfioError as exc:
        raise MigrationError(exc.errno, operation="share_memory", hint=exc.hint or exc.strerror) from exc


def share(transport: Any, memory: GuestMemory) -> None:
    """Send memory to the destination.

    Raises
    ------
    MigrationError
        EOPNOTSUPP: a region without a descriptor; EINVAL: no UNIX socket; EPERM: the peer is another user.
    UnsupportedError
        EOPNOTSUPP: no socket at all.
    """
    with _socket(transport) as sock:
        send_memory(sock, memory, timeout=transport.timeout)


def take(transport: Any) -> GuestMemory:
    """Receive what ``share`` sent, mapped; the caller closes it."""
    with _socket(transport) as sock:
        return receive_memory(sock, timeout=transport.timeout)


class NothingToTrack:
    """The tracker of shared memory: what is written is there already."""

    def start(self) -> None:
        """Do nothing."""

    def harvest(self, into: DirtyBitmap) -> int:
        """Find nothing."""
        return 0

    def stop(self) -> None:
        """Do nothing."""
