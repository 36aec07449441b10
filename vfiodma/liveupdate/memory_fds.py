"""Guest memory for another process of this host: descriptors and a table of regions, not one byte is copied."""
import errno
import socket

from .._core.errno import error
from ..memory import GuestMemory
from .packets import Kind, Link
from .table import map_regions, pack_regions, records_of, unpack_regions


def send_memory(sock: socket.socket, memory: GuestMemory, *, timeout: float = 10.0) -> None:
    """Send guest memory to another process of this host, without copying it.

    Parameters
    ----------
    sock : socket.socket
        A connected UNIX stream socket; stays the caller's.
    memory : GuestMemory
        Of memfd, hugetlb or file regions.  Both processes have it then: who may write is for them to agree.
    timeout : float
        Seconds.

    Raises
    ------
    UnsupportedError
        EOPNOTSUPP: a region is anonymous.
    MigrationError
        ETIMEDOUT, ECONNRESET: the peer does not take it.
    DmaPermissionError
        EPERM: the peer is another user.

    Notes
    -----
    Source: unix(7), SCM_RIGHTS.

    Examples
    --------
    >>> import socket
    >>> from vfiodma import GuestMemory
    >>> from vfiodma.liveupdate import receive_memory, send_memory
    >>> one, other = socket.socketpair()
    >>> with one, other, GuestMemory.memfd(1 << 20) as memory:
    ...     send_memory(one, memory)
    ...     with receive_memory(other) as same:
    ...         memory.write(0x1000, b"not copied")
    ...         same.read(0x1000, 10)
    b'not copied'
    """
    records = records_of(memory, "send_memory")
    fds = [region.fd for region in memory.regions if region.fd is not None]
    Link(sock, timeout).send(Kind.MEMORY, pack_regions(records), fds)


def receive_memory(sock: socket.socket, *, timeout: float = 10.0) -> GuestMemory:
    """Receive what :func:`send_memory` sent, mapped; the caller closes it.

    Raises
    ------
    ProtocolError
        EPROTO: not such a message, regions that overlap, or a file that is shorter than its region.
    MigrationError
        ETIMEDOUT, ECONNRESET: nothing came; EMFILE: too many descriptors.
    DmaPermissionError
        EPERM: the peer is another user.

    Notes
    -----
    A memory that is not sealed (a file, or ``GuestMemory.memfd(..., seal=False)``) can still be shortened by the peer.
    """
    link = Link(sock, timeout)
    _, body, fds = link.receive(Kind.MEMORY)
    with fds:
        records = unpack_regions(body)
        if len(records) != len(fds):
            raise error(errno.EPROTO, "receive_memory", hint=f"{len(fds)} descriptors for {len(records)} regions")
        return map_regions(records, [fds[index] for index in range(len(fds))])
