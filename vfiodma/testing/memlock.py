"""A limit of locked memory, for a while."""
import contextlib
import ctypes
import resource
from collections.abc import Iterator

from ..hostinfo import CAP_IPC_LOCK

_VERSION_3 = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


def locked_bytes() -> int:
    """Return what this process has locked, by the kernel's count."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmLck:"))


@contextlib.contextmanager
def locked_memory_limit(more: int) -> Iterator[None]:
    """Let this thread lock ``more`` bytes than now, without CAP_IPC_LOCK, inside the block.

    Notes
    -----
    The limit is the process's, the capability the thread's.  Source: capset(2), getrlimit(2).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(_VERSION_3, 0), (_Sets * 2)()
    if libc.capget(ctypes.byref(header), sets):
        raise OSError(ctypes.get_errno(), "capget")
    before = sets[0].effective
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = locked_bytes() + more
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    sets[0].effective = before & ~(1 << CAP_IPC_LOCK)
    try:
        if libc.capset(ctypes.byref(header), sets):
            raise OSError(ctypes.get_errno(), "capset")
        yield
    finally:
        sets[0].effective = before
        libc.capset(ctypes.byref(header), sets)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
