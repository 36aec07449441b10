"""Numbers on their way into the kernel's structures."""
import errno
import os
import struct
from collections.abc import Iterable

from .._core.errno import error


def pack_fds(operation: str, fds: Iterable[int | None]) -> bytes:
    """Return descriptors as s32, None as -1; EBADF for what can't be a descriptor."""
    numbers = [-1 if fd is None else fd for fd in fds]
    try:
        return struct.pack(f"={len(numbers)}i", *numbers)
    except struct.error:
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError("descriptors are numbers") from None
        raise error(errno.EBADF, operation, hint="a number is no descriptor") from None


def new_eventfd(operation: str) -> int:
    """Return a new eventfd, non-blocking and closed on exec."""
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as exc:
        raise error(exc.errno or errno.EIO, operation,
                    hint="this process can have no more descriptors: raise RLIMIT_NOFILE with 'ulimit -n'") from None


def check_u64(operation: str, *numbers: int) -> None:
    """Raise EINVAL unless the numbers are from 0 to 2**64 - 1."""
    if any(not 0 <= number < 1 << 64 for number in numbers):
        raise error(errno.EINVAL, operation, hint="addresses and sizes are from 0 to 2**64 - 1")
