"""A software device that writes into memory all the time, at a set rate, over a working set."""
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ClosedError
from ..protocols import DmaPort
from .dma_writer_migration import DmaWriterMigration

_TICK = 0.005               # seconds between batches
_MAX_ROWS = 1024            # of a batch
_SLICE_ROWS = 128           # that are written between two looks at the order to stop
_PAGE = 4096
_STEP = 512                 # blocks begin at multiples of this
_ZERO_EVERY = 8             # one block of so many is zeros, a whole page


def _mixed(seed: int, numbers: Any) -> Any:
    """Return 64 random-looking bits for each number (u64), the same ones each time."""
    bits = (numbers + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ bits >> np.uint64(shift)) * np.uint64(factor)
    return bits ^ bits >> np.uint64(31)


class DmaWriter:
    """A device without registers whose only work is DMA: blocks of ``block`` bytes at random places of its working set.

    Every block has its number in its first 8 bytes, except that one in eight is a page of zeros.  Place and content of
    a block follow from ``seed`` and its number, so that a device that was migrated goes on as if nothing had been.

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
        Blocks and bytes since the device was made or reset, and blocks that faulted.
    started : bool
        It writes whenever its migration state lets it.
    migration : DmaWriterMigration
        All states of VFIO migration.

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
        self.seed = seed
        self.writes = self.faulted = 0
        self.started = False
        self.migration = DmaWriterMigration(self)
        self._held = False
        self._port: DmaPort | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._lock = threading.RLock()      # of what starts and ends the thread

    def reset(self) -> None:
        """Stop, and begin again with the first block."""
        self.stop()
        self.writes = self.faulted = 0

    @property
    def bytes_written(self) -> int:
        """Bytes of all blocks."""
        return self.writes * self.block

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
        with self._lock:
            self.started = True
            self._go()

    def _go(self) -> None:
        if self.started and not self._held and self._thread is None and self._port is not None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name=f"DMA of {self.address}", daemon=True)
            self._thread.start()

    def halt(self) -> None:
        """Ask it to stop; ``stop`` waits for it."""
        self._stop.set()

    def _end(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self.halt()
            thread.join()

    def stop(self) -> None:
        """Return when no DMA is under way and none will follow; raise what ended the thread, if something did."""
        with self._lock:
            self.started = False
            self._end()
            if self._error is not None:
                failure, self._error = self._error, None
                raise failure

    def hold(self, held: bool) -> None:
        """Stand still, or go on if it was started: what its migration asks for."""
        with self._lock:
            self._held = held
            if held:
                self._end()
            else:
                self._go()

    def state(self) -> bytes:
        """Return what another device needs to go on where this one stopped; call it after ``stop``."""
        return self.migration.whole()

    def set_state(self, state: bytes) -> None:
        """Take over what ``state`` returned; errors as of ``migration.load``."""
        self.migration.load(state)

    def _run(self) -> None:
        try:
            self._write_batches()
        except Exception as exc:        # told by stop()
            self._error = exc

    def blocks(self, first: int, count: int) -> tuple[Any, Any]:
        """Return the iovas (u64) and the contents (u8, a row each) of blocks by number."""
        return self._pattern()(first, count)

    def _pattern(self) -> Any:
        """Return the function behind ``blocks``; its results are good until the next call."""
        starts = np.array([iova for iova, _ in self.working_set], np.uint64)
        # Places where a block fits, by range; `ends` numbers them through.
        places = np.array([max(0, size - self.block) // _STEP + 1 for _, size in self.working_set], np.int64)
        ends, seed = np.cumsum(places), self.seed
        total, before = np.uint64(ends[-1]), ends - places
        rows = np.random.default_rng(seed).integers(0, 256, (_MAX_ROWS, self.block), np.uint8)
        batch = np.empty_like(rows)

        def make(first: int, count: int) -> tuple[Any, Any]:
            numbers = np.arange(first, first + count, dtype=np.uint64)
            bits = _mixed(seed, numbers)
            place = (bits % total).astype(np.int64)
            index = np.searchsorted(ends, place, "right")
            iovas = starts[index] + ((place - before[index]) * _STEP).astype(np.uint64)
            out, at = batch[:count], first % _MAX_ROWS
            # Each block has other bytes all over, not just another number.
            masks = ((bits >> np.uint64(32)) % np.uint64(255)).astype(np.uint8)[:, None] + np.uint8(1)
            split = min(count, _MAX_ROWS - at)
            np.bitwise_xor(rows[at:at + split], masks[:split], out=out[:split])
            np.bitwise_xor(rows[:count - split], masks[split:], out=out[split:])
            out[:, :8] = numbers.astype("<u8").view(np.uint8).reshape(count, 8)
            zeros = slice(-first % _ZERO_EVERY, None, _ZERO_EVERY)
            iovas[zeros] &= ~np.uint64(_PAGE - 1)
            out[zeros] = 0
            return iovas, out
        return make

    def _write_batches(self) -> None:
        port: Any = self._port
        make = self._pattern()
        began, done = time.perf_counter(), 0
        while not self._stop.wait(_TICK):
            # What the rate owes by now; a device that fell behind (a busy CPU) does not catch up beyond one batch.
            owed = int((time.perf_counter() - began) * self.rate / self.block) - done
            count = min(owed, _MAX_ROWS)
            if count <= 0:
                continue
            done += owed
            while count > 0 and not self._stop.is_set():        # a stop waits for one slice, not for the batch
                part = min(count, _SLICE_ROWS)
                self.faulted += port.write_many(*make(self.writes, part))
                self.writes += part
                count -= part
