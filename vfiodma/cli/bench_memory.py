"""Memory to a forked process over a UNIX socket: by the stream, and by the plainest program that could do it."""
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from .._core.bitmap import DirtyBitmap
from .._core.memory import populate
from ..errors import MigrationError
from ..memory import GuestMemory
from ..migration import PageReceiver, PrecopySource, SocketTransport
from ..migration.layout import MemoryLayout

_CHUNK = 1 << 20
_TIMEOUT = 30.0


def populated(memory: GuestMemory) -> GuestMemory:
    """Return memory whose pages are all in this process's page tables."""
    with memory.region.view() as view:
        populate(view, 0, memory.size)
    return memory


@contextlib.contextmanager
def in_child(work: Callable[[socket.socket], object]) -> Iterator[socket.socket]:
    """Fork a process that works with the other end of a socket; its failure is one here."""
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            here.close()
            work(there)
            status = 0
        finally:
            os._exit(status)
    there.close()
    try:
        yield here
    finally:
        here.close()
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise MigrationError(71, operation="bench", hint="the receiving process failed")


class StandingStill:
    """A machine, and its tracker, that writes nothing."""

    def start(self) -> None:
        """Nothing to start."""

    def harvest(self, into: DirtyBitmap) -> int:
        """Nothing was written."""
        return 0

    def stop(self) -> None:
        """Nothing to stop."""

    def resume(self) -> None:
        """Nothing to go on."""

    def state(self) -> dict[str, bytes]:
        """No devices."""
        return {}


def stream(memory: GuestMemory, target: GuestMemory, checksum: str, channels: int = 1) -> float:
    """Return the seconds of a whole migration into memory that is in the destination's page tables."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")                   # Linux: the kernel finds a name, which is no file
        listener.listen(channels)
        listener.settimeout(_TIMEOUT)

        def accept(seconds: float) -> SocketTransport:
            return SocketTransport(listener.accept()[0])

        def connect() -> SocketTransport:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(listener.getsockname())
            return SocketTransport(sock)

        def receive(sock: socket.socket) -> None:
            with PageReceiver(SocketTransport(sock), lambda hello: populated(target), checksum=checksum,
                              accept=accept if channels > 1 else None) as receiver:
                receiver.receive()

        with in_child(receive) as sock, MemoryLayout(memory, 4096) as layout, PrecopySource(
                SocketTransport(sock), checksum=checksum, channels=channels,
                connect=connect if channels > 1 else None) as source:
            source.introduce(memory)
            still = StandingStill()
            return source.migrate(layout, still, still).seconds


def plain(memory: GuestMemory, target: GuestMemory, send: Callable[[socket.socket, Any], object],
          receive: Callable[[socket.socket, Any], object]) -> float:
    """Return the seconds from the first byte to the answer to the last.

    Parameters
    ----------
    memory, target : GuestMemory
        Of one size.
    send, receive : callable
        Called with a socket and a memoryview; move all of its bytes.
    """
    def work(sock: socket.socket) -> None:
        with populated(target).region.view() as view:
            sock.send(b"r")
            receive(sock, view)
        sock.send(b"k")

    with in_child(work) as sock, memory.region.view() as view:
        sock.recv(1)
        began = time.perf_counter()
        send(sock, view)
        sock.recv(1)
        return time.perf_counter() - began


def send_all(sock: socket.socket, view: memoryview) -> None:
    """Send 1 MiB a call."""
    for at in range(0, len(view), _CHUNK):
        sock.sendall(view[at:at + _CHUNK])


def receive_all(sock: socket.socket, view: memoryview) -> None:
    """Receive up to 1 MiB a call."""
    at = 0
    while at < len(view):
        at += sock.recv_into(view[at:at + _CHUNK])
