"""This thread's CAP_IPC_LOCK, which lifts the limit of locked memory."""
import contextlib
import ctypes

CAP_IPC_LOCK = 14
libc = ctypes.CDLL(None, use_errno=True)


def set_ipc_lock(on):
    """Give it up, or take it back; return whether it was there."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    before = data[0] >> CAP_IPC_LOCK & 1
    data[0] = data[0] | 1 << CAP_IPC_LOCK if on else data[0] & ~(1 << CAP_IPC_LOCK)
    libc.capset(header, data)
    return bool(before)


@contextlib.contextmanager
def without_ipc_lock():
    before = set_ipc_lock(False)
    try:
        yield
    finally:
        set_ipc_lock(before)
