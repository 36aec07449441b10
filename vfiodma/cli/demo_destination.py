"""The destination process of ``vfiodma demo``: receives the memory, then lets its own devices go on in it.

Started by the source: ``python -m vfiodma.cli.demo_destination FD SIZE``; FD is a connected UNIX socket.  At the end it
prints one JSON object.  A failure is a message on standard error and status 1.
"""
import contextlib
import ctypes
import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from .. import SoftwareGroup, open_backend
from .._core.bitmap import DirtyBitmap
from .._core.errno import error
from ..address_space import IoAddressSpace
from ..devices.dma_writer import DmaWriter
from ..errors import MigrationError, VfioError
from ..memory import GuestMemory
from ..migration import DirtyTracker, PageReceiver, SocketTransport
from ..migration.stream import Hello, Phase, damaged
from .demo_source import TIMEOUT, Writers

_MADV_POPULATE_WRITE = 23
_PORTION = 64 << 20
_RUN_FOR = 0.25             # seconds that the devices run on


class Background(threading.Thread):
    """A thread whose failure is raised where it is joined."""

    def __init__(self, work: Any, *arguments: Any) -> None:
        super().__init__(daemon=True)
        self._work, self._arguments = work, arguments
        self._failure: Exception | None = None
        self.start()

    def run(self) -> None:
        """Do the work."""
        try:
            self._work(*self._arguments)
        except Exception as exc:
            self._failure = exc

    def finish(self) -> None:
        """Wait, and raise what went wrong."""
        self.join()
        if self._failure is not None:
            raise self._failure


@contextlib.contextmanager
def understanding(name: str) -> Iterator[None]:
    """Turn the errors of a state that makes no sense into one of the stream."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError) as exc:
        if isinstance(exc, VfioError):
            raise
        raise damaged(f"the state of {name} makes no sense: {exc!r}") from None


class Destination:
    """Memory, address space and devices as they come into being."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._stop = threading.Event()
        self._states: dict[str, bytes] = {}
        self._populating: Background | None = None
        self._mapping: Background | None = None
        self._parts = contextlib.ExitStack()
        self.writers = Writers([])

    def make_memory(self, hello: Hello) -> GuestMemory:
        """Get memory, and let it be populated in the background: the first touch is what takes longest."""
        if hello.blocks != ((0, self._size),):
            raise error(errno.EINVAL, "make_memory", hint=f"{self._size} bytes at 0 were announced on the command line")
        self.memory = self._parts.enter_context(GuestMemory.memfd(self._size, "vfiodma-demo"))
        self._populating = Background(self._populate)
        return self.memory

    def _populate(self) -> None:
        libc, region = ctypes.CDLL(None), self.memory.region
        for at in range(0, region.size, _PORTION):
            # Fails before Linux 5.14: then pages are populated when they come.
            if self._stop.is_set() or libc.madvise(ctypes.c_void_p(region.vaddr + at),
                                                   ctypes.c_size_t(min(_PORTION, region.size - at)),
                                                   _MADV_POPULATE_WRITE):
                return

    def take_state(self, name: str, data: bytes) -> None:
        """Keep a state; with that of the address space, map in the background."""
        if name == "address space" and self._mapping is None:
            self._mapping = Background(self._map, data)
        else:
            self._states[name] = data

    def _map(self, data: bytes) -> None:
        """Put devices on the memory, at the addresses they know."""
        assert self._populating is not None
        self._populating.finish()
        with understanding("the address space"):
            plan = json.loads(data)
            self.writers = Writers([DmaWriter(address) for address in plan["devices"]])
            backend = open_backend("software", groups=[SoftwareGroup(1, self.writers.devices)], memlock_limit=None)
            self._parts.callback(backend.close)
            self.ioas = self._parts.enter_context(IoAddressSpace(backend))
            for iova, gpa, size in plan["mappings"]:
                self.ioas.map(self.memory.region, iova, offset=gpa, size=size)

    def get_ready(self) -> None:
        """Give the devices their states; they do not run yet."""
        if self._mapping is None:
            raise error(errno.EPROTO, "migration_stream", hint="the address space's mappings did not come")
        self._mapping.finish()
        for device in self.writers.devices:
            if device.address not in self._states:
                raise error(errno.EPROTO, "migration_stream", hint=f"the state of {device.address} did not come")
            device.set_state(self._states[device.address])

    def close(self) -> None:
        """Let everything go."""
        self._stop.set()
        for thread in (self._populating, self._mapping):
            if thread is not None:
                thread.join()
        self._parts.close()

    def run_on(self, receiver: PageReceiver) -> dict[str, Any]:
        """Let the devices go on for a while; return what they did."""
        assert receiver.layout is not None
        before, faulted = self.writers.writes, sum(device.faulted for device in self.writers.devices)
        tracker = DirtyTracker(self.ioas, receiver.layout)
        dirty = DirtyBitmap(receiver.layout.nbits, receiver.layout.pgsize)
        tracker.start()
        self.writers.resume()
        time.sleep(_RUN_FOR)
        self.writers.stop()
        tracker.harvest(dirty)
        tracker.stop()
        return {"writes": self.writers.writes - before, "dirty_pages": dirty.count(), "seconds": _RUN_FOR,
                "faults": sum(device.faulted for device in self.writers.devices) - faulted}


def main(fd: int, size: int) -> dict[str, Any]:
    """Receive over a socket, and run on when the source says so."""
    with contextlib.ExitStack() as stack:
        transport = SocketTransport(socket.socket(fileno=fd), TIMEOUT)
        stack.callback(transport.close)
        here = Destination(size)
        stack.callback(here.close)
        receiver = PageReceiver(transport, here.make_memory, fresh=True, on_state=here.take_state,
                                on_switch=here.get_ready)
        stack.enter_context(receiver)
        receiver.receive()
        if receiver.settle() is not Phase.OWNER:
            raise MigrationError(errno.ECANCELED, operation="run", hint="the source keeps the guest")
        return {"pid": os.getpid(), "sha256": receiver.digest.hex(), **here.run_on(receiver)}


if __name__ == "__main__":
    try:
        print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))), flush=True)
    except VfioError as exc:
        print(f"vfiodma demo, destination: {exc}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
