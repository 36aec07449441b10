"""Arguments of a device's ioctls: structs with argsz, capability chains, eventfds."""
import errno
import os
import select
import struct
from collections.abc import Iterable
from typing import Any

from ...._core.errno import error
from ...._core.memory import read_memory
from ....uapi.layout import Layout


def read_struct(layout: Layout, minimum: int, arg: int, operation: str) -> dict[str, Any]:
    """Read the first ``minimum`` bytes of a struct and check its argsz; what follows reads as 0."""
    values = layout.unpack(read_memory(arg, minimum).ljust(layout.size, b"\0"))
    if values["argsz"] < minimum:
        raise error(errno.EINVAL, operation, hint=f"argsz must be at least {minimum}")
    return values


def chain(start: int, capabilities: Iterable[tuple[int, int, bytes]]) -> bytes:
    """Pack capabilities (id, version, bytes after the header) as they follow a struct of ``start`` bytes."""
    packed, items = b"", list(capabilities)
    for i, (number, version, data) in enumerate(items):
        size = (8 + len(data) + 7) // 8 * 8
        following = start + len(packed) + size if i < len(items) - 1 else 0
        packed += struct.pack("=HHI", number, version, following) + data.ljust(size - 8, b"\0")
    return packed


class Eventfd:
    """An eventfd of the caller, held as the kernel holds it: the caller may close its descriptor.

    Raises
    ------
    VfioError
        EBADF: not an open descriptor; EINVAL: not an eventfd.
    """

    def __init__(self, fd: int, operation: str) -> None:
        try:
            self.fd = os.dup(fd)
        except OSError as exc:      # EMFILE: holding it takes a descriptor here
            raise error(exc.errno or errno.EBADF, operation, hint=f"descriptor {fd}: {exc.strerror}") from None
        if os.readlink(f"/proc/self/fd/{self.fd}") != "anon_inode:[eventfd]":
            self.close()
            raise error(errno.EINVAL, operation, hint=f"descriptor {fd} is not an eventfd")
        self._room = select.poll()
        self._room.register(self.fd, select.POLLOUT)

    def signal(self) -> None:
        """Add 1.  Never blocks: a counter that is full stays full."""
        if self._room.poll(0):
            os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)
