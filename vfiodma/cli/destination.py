"""The destination of a guest as cli/guest.py makes it: memory, address space and devices as they come into being."""
import contextlib
import errno
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

from .. import SoftwareGroup, open_backend
from .._core.bitmap import DirtyBitmap
from .._core.errno import error
from ..address_space import IoAddressSpace
from ..devices.dma_writer import DmaWriter
from ..errors import VfioError
from ..memory import GuestMemory
from ..migration import DirtyTracker, PageReceiver
from ..migration.stream import Hello, damaged
from .guest import Writers

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
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as exc:
        if isinstance(exc, VfioError):
            raise
        raise damaged(f"the state of {name} makes no sense: {exc!r}") from None


class Destination:
    """Memory, address space and devices as they come into being.

    Parameters
    ----------
    size : int
        Bytes of memory that will be taken: so many, or with ``at_most`` fewer as well.
    """

    def __init__(self, size: int, *, at_most: bool = False) -> None:
        self._size, self._at_most = size, at_most
        self._states: dict[str, bytes] = {}
        self._mapping: Background | None = None
        self._parts = contextlib.ExitStack()
        self.writers = Writers([])

    def make_memory(self, hello: Hello) -> GuestMemory:
        """Get memory."""
        size = hello.blocks[0][1]
        fits = size == self._size or (self._at_most and size < self._size)
        if hello.blocks != ((0, size),) or not fits:
            raise error(errno.EINVAL, "make_memory", hint=f"{self._size} bytes at 0 {'at most ' * self._at_most}were "
                        "announced on the command line")
        self._forget()
        self.memory = self._parts.enter_context(GuestMemory.memfd(size, "vfiodma-guest"))
        return self.memory

    def take_memory(self, memory: GuestMemory) -> None:
        """Take over the source's own memory."""
        self._forget()
        self.memory = self._parts.enter_context(memory)

    def _forget(self) -> None:
        """Let go of what another stream brought, of which no page came."""
        self.close()
        self._states, self._mapping, self.writers = {}, None, Writers([])

    def take_state(self, name: str, data: bytes) -> None:
        """Keep a state; with that of the address space, map in the background."""
        if name == "address space" and self._mapping is None:
            self._mapping = Background(self._map, data)
        else:
            self._states[name] = data

    def _map(self, data: bytes) -> None:
        """Put devices on the memory, at the addresses they know."""
        with understanding("the address space"):
            plan = json.loads(data)
            if not all(address.isprintable() for address in plan["devices"]):
                raise ValueError("the name of a device is not printable")
            self.writers = Writers([DmaWriter(address) for address in plan["devices"]])
            backend = open_backend("software", groups=[SoftwareGroup(1, self.writers.devices)], memlock_limit=None)
            self._parts.callback(backend.close)
            self.ioas = self._parts.enter_context(IoAddressSpace(backend))
            for iova, gpa, size in plan["mappings"]:
                self.ioas.map(self.memory.region, iova, offset=gpa, size=size)

    def prepare(self) -> None:
        """Wait until the memory is there and mapped."""
        if self._mapping is None:
            raise error(errno.EPROTO, "migration_stream", hint="the address space's mappings did not come")
        self._mapping.finish()

    def get_ready(self) -> None:
        """Give the devices their states; they do not run yet."""
        self.prepare()
        for device in self.writers.devices:
            if device.address not in self._states:
                raise error(errno.EPROTO, "migration_stream", hint=f"the state of {device.address} did not come")
            device.set_state(self._states[device.address])

    def close(self) -> None:
        """Let everything go."""
        if self._mapping is not None:
            self._mapping.join()
        self._parts.close()

    def run_on(self, receiver: PageReceiver, seconds: float = _RUN_FOR) -> dict[str, Any]:
        """Let the devices go on for a while; return what they did."""
        assert receiver.layout is not None
        before, faulted = self.writers.writes, sum(device.faulted for device in self.writers.devices)
        # Memory that pages are still placed into can't be watched as well.
        tracker = DirtyTracker(self.ioas, receiver.layout, cpu_writes="off" if receiver.switched else "auto")
        dirty = DirtyBitmap(receiver.layout.nbits, receiver.layout.pgsize)
        tracker.start()
        self.writers.resume()
        time.sleep(seconds)
        self.writers.stop()
        tracker.harvest(dirty)
        tracker.stop()
        return {"writes": self.writers.writes - before, "dirty_pages": dirty.count(), "seconds": seconds,
                "faults": sum(device.faulted for device in self.writers.devices) - faulted}
