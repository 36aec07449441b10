"""A software device that writes into memory all the time, at a set rate, over a working set."""
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ClosedError
from ..protocols import DmaPort

_TICK = 0.005               # seconds between batches
_MAX_ROWS = 1024            # of a batch
_PAGE = 4096
_STEP = 512                 # blocks begin at multiples of this
_ZERO_EVERY = 8             # one block of so many is zeros, a whole page


class DmaWriter:
    """A device without registers whose only work is DMA: blocks of ``block`` bytes at random places of its working set.

    Every block has a number of its own in its first 8 bytes; one in eight is a page of zeros.

    Parameters
    ----------
    address : str
        Its PCI address.
    working_set : sequence of (iova, size)
        Where it writes, in bytes; set before ``start``.
    rate : float
        Bytes a second; 0 = nothing.
    seed : int
        Of places and contents.
    block : int
        Bytes of a write, a multiple of 512.

    Attributes
    ----------
    writes, bytes_written, faulted : int
        Blocks and bytes since the device was made, and blocks that faulted.

    Notes
    -----
    ``start`` and ``stop`` may be called again and again; after ``stop`` no DMA is under way.  The thread releases the
    GIL while it writes.
    """

    def __init__(self, address: str, *, working_set: Sequence[tuple[int, int]] = (), rate: float = 0.0, seed: int = 0,
                 block: int = _PAGE) -> None:
        self.address = address
        self.working_set = list(working_set)
        self.rate = rate
        self.block = block
        self._seed = seed
        self._port: DmaPort | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self.reset()

    def reset(self) -> None:
        """Begin again with the seed."""
        self._random = np.random.default_rng(self._seed)
        self.writes = self.bytes_written = self.faulted = 0

    def connect(self, port: DmaPort) -> None:
        """Take the way to memory."""
        self._port = port

    def disconnect(self) -> None:
        """Stop, and let go of the way to memory."""
        self.stop()
        self._port = None

    def region_size(self, index: int) -> int:
        """Return 0: it has no registers."""
        return 0

    def region_read(self, index: int, offset: int, size: int) -> bytes:
        """Answer as a bus without a device does."""
        return b"\xff" * size

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Do nothing."""

    def irq_count(self, index: int) -> int:
        """Return 0: it interrupts nobody."""
        return 0

    def start(self) -> None:
        """Begin to write."""
        if self._port is None:
            raise ClosedError(9, operation="start", hint="the device is not open")
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name=f"DMA of {self.address}", daemon=True)
            self._thread.start()

    def halt(self) -> None:
        """Ask it to stop; ``stop`` waits for it."""
        self._stop.set()

    def stop(self) -> None:
        """Return when no DMA is under way and none will follow; raise what ended the thread, if something did."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self.halt()
            thread.join()
        if self._error is not None:
            failure, self._error = self._error, None
            raise failure

    def state(self) -> bytes:
        """Return what another device needs to go on where this one stopped; call it after ``stop``."""
        return json.dumps({"working_set": self.working_set, "rate": self.rate, "block": self.block,
                           "writes": self.writes, "bytes_written": self.bytes_written,
                           "random": self._random.bit_generator.state}).encode()

    def set_state(self, state: bytes) -> None:
        """Take over what ``state`` returned."""
        values = json.loads(state)
        self.working_set = [(iova, size) for iova, size in values["working_set"]]
        self.rate, self.block = values["rate"], values["block"]
        self.writes, self.bytes_written = values["writes"], values["bytes_written"]
        self._random.bit_generator.state = values["random"]

    def _run(self) -> None:
        try:
            self._write_batches()
        except Exception as exc:        # told by stop()
            self._error = exc

    def _write_batches(self) -> None:
        port: Any = self._port
        starts = np.array([iova for iova, _ in self.working_set], np.uint64)
        # Places where a block fits, by range; `ends` numbers them through.
        places = np.array([max(0, size - self.block) // _STEP + 1 for _, size in self.working_set], np.int64)
        ends = np.cumsum(places)
        rows = self._random.integers(0, 256, (_MAX_ROWS, self.block), np.uint8)
        began, done = time.perf_counter(), 0
        while not self._stop.wait(_TICK):
            # What the rate owes by now; a device that fell behind (a busy CPU) does not catch up beyond one batch.
            owed = int((time.perf_counter() - began) * self.rate / self.block) - done
            count = min(owed, _MAX_ROWS)
            if count <= 0:
                continue
            done += owed
            place = self._random.integers(0, int(ends[-1]), count)
            index = np.searchsorted(ends, place, "right")
            iovas = starts[index] + ((place - (ends - places)[index]) * _STEP).astype(np.uint64)
            batch = rows[:count]
            batch[:, :8] = np.arange(self.writes, self.writes + count, dtype="<u8").view(np.uint8).reshape(count, 8)
            # Each batch has other bytes all over, not just other numbers.
            batch ^= self._random.integers(1, 256, dtype=np.uint8)
            iovas[::_ZERO_EVERY] &= ~np.uint64(_PAGE - 1)
            kept, batch[::_ZERO_EVERY] = batch[::_ZERO_EVERY].copy(), 0
            self.faulted += port.write_many(iovas, batch)
            batch[::_ZERO_EVERY] = kept
            self.writes += count
            self.bytes_written += count * self.block
