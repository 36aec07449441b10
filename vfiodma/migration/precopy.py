"""The source's side: rounds over what is dirty while devices run, then the rest while they stand still."""
import contextlib
import errno
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .._core.bitmap import DirtyBitmap
from .._core.errno import error
from ..errors import MigrationError, VfioError
from ..memory import GuestMemory
from . import stream
from .channel import FrameChannel, gave_up
from .convergence import Convergence, Step
from .layout import MemoryLayout
from .ledger import Ledger
from .sender import PageSender
from .stream import Hello, Kind


class Tracker(Protocol):
    """Where dirty pages come from: DirtyTracker, or anything like it."""

    def start(self) -> None:
        """Start; called before the first page is sent."""

    def harvest(self, into: DirtyBitmap) -> int:
        """OR what was written since the last call into the bitmap."""

    def stop(self) -> None:
        """Stop; idempotent."""


class Machine(Protocol):
    """What is migrated: whoever writes into the memory."""

    def stop(self) -> None:
        """Return when nothing is written any more."""

    def resume(self) -> None:
        """Go on after a stop: the migration failed."""

    def state(self) -> Mapping[str, bytes]:
        """Return the named states that the destination needs; called after ``stop``."""


@dataclass
class Round:
    """One epoch of the stream."""

    epoch: int
    pages: int                  #: sent with content
    zero_pages: int             #: sent as runs only
    bytes: int                  #: on the wire
    seconds: float
    dirty_pages: int            #: unique pages written meanwhile, which are left
    bandwidth: float            #: bytes/s on the wire
    predicted_downtime: float | None    #: seconds, if the devices had been stopped after it; None for the last
    final: bool = False


@dataclass
class MigrationResult:
    """What a migration took."""

    rounds: list[Round] = field(default_factory=list)
    downtime: float = 0.0           #: seconds from stopping the devices to the destination's last acknowledgement
    predicted_downtime: float = 0.0
    converged: bool = True          #: False: max_rounds were over and the limit was out of reach
    bytes: int = 0
    seconds: float = 0.0


class PrecopySource:
    """Move guest memory to a PageReceiver while devices write into it.

    Parameters
    ----------
    transport : Transport
        Closed by the caller.
    downtime_limit : float
        Seconds that the devices may stand still.
    max_rounds : int
        Rounds with running devices, at most.
    checksum : {"auto", "xxh3", "crc32", "none"}
        What protects the bytes on their way: by default xxh3 where both sides have the library ``xxhash``, else CRC-32.
        "none" must be asked for on both sides, and is for transports that protect bytes themselves.
    on_round, on_progress : callable, optional
        Called with each finished Round; with (epoch, pages done, pages in all) after each chunk.

    Notes
    -----
    ``introduce``, ``migrate``, then ``verify`` and ``release``.  Up to ``release`` this side owns the guest: a failure
    resumes the devices, puts the pages in flight back into ``ledger.pending`` and raises MigrationError.
    """

    def __init__(self, transport: Any, *, downtime_limit: float = 0.3, max_rounds: int = 16,
                 checksum: str = "auto",
                 on_round: Callable[[Round], object] | None = None,
                 on_progress: Callable[[int, int, int], object] | None = None) -> None:
        if downtime_limit <= 0 or max_rounds < 1:
            raise error(errno.EINVAL, "migrate", hint="downtime_limit is above 0, max_rounds at least 1")
        self._channel = FrameChannel(transport)
        self._offer = stream.offer(checksum)
        self.convergence = Convergence(downtime_limit, max_rounds)
        self._on_round = on_round or (lambda _: None)
        self._on_progress = on_progress or (lambda *_: None)
        self._hello: Hello | None = None
        self.ledger: Ledger | None = None
        self._sender: PageSender | None = None

    def introduce(self, memory: GuestMemory, pgsize: int = 4096) -> None:
        """Tell the destination what will come, so that it can get memory ready."""
        with MemoryLayout(memory, pgsize) as layout, self._failing("introduce"):
            self._hello = Hello(pgsize, os.urandom(16), layout.shape, self._offer, os.urandom(16))
            self._channel.send(Kind.HELLO, stream.encode_hello(self._hello))
            self._channel.checksum = stream.decode_ready(self._channel.answer(Kind.READY), self._hello).checksum

    def migrate(self, layout: MemoryLayout, tracker: Tracker, machine: Machine,
                states: Mapping[str, bytes] | None = None) -> MigrationResult:
        """Move everything; the devices stand still afterwards, here and there.

        Parameters
        ----------
        layout : MemoryLayout
            Of the memory, as it was introduced.
        tracker : Tracker
            Started and stopped here.
        machine : Machine
            The devices.
        states : mapping of str to bytes, optional
            Named states that go first.

        Raises
        ------
        MigrationError
            It failed; the devices run on here.
        """
        if self._hello is None or (layout.pgsize, layout.shape) != (self._hello.pgsize, self._hello.blocks):
            raise error(errno.EINVAL, "migrate", hint="the memory is not the one that was introduced")
        self.ledger = Ledger(layout.nbits, layout.pgsize)
        result, began, stopped = MigrationResult(), time.perf_counter(), False
        try:
            with self._failing("migrate"):
                tracker.start()
                # A tracker that compares memory with what was sent must be told what that was.
                note_sent = getattr(tracker, "note_sent", None) if getattr(tracker, "compares", False) else None
                self._sender = PageSender([self._channel], layout, note_sent=note_sent, on_progress=self._on_progress)
                for block in layout.blocks:
                    self.ledger.pending.set(block.first_bit, block.npages)
                step = Step.CONTINUE
                while step is Step.CONTINUE:
                    result.rounds.append(self._round(layout, tracker, states or {}))
                    step = self._decide(layout, result.rounds[-1])
                    states = None
                result.predicted_downtime = self.convergence.predicted
                result.converged = step is Step.SWITCH
                down, stopped = time.perf_counter(), True
                machine.stop()
                tracker.harvest(self.ledger.pending)
                result.rounds.append(self._round(layout, None, machine.state()))
                result.downtime = time.perf_counter() - down
                self._on_round(result.rounds[-1])
        except BaseException:
            self.ledger.put_back()
            if stopped:
                machine.resume()
            raise
        finally:
            tracker.stop()
        result.bytes, result.seconds = self._channel.bytes_sent, time.perf_counter() - began
        return result

    def verify(self, layout: MemoryLayout) -> tuple[bytes, bytes]:
        """Return the SHA-256 of all memory here and there, taken at the same time."""
        with self._failing("verify"):
            self._channel.send(Kind.VERIFY)
            here = layout.digest()
            there = bytes(self._channel.answer(Kind.DIGEST))
            if len(there) != stream.DIGEST_SIZE:
                raise stream.damaged("a digest of a wrong length")
            return here, there

    def release(self) -> None:
        """Hand the guest over: from here on the destination owns it."""
        with self._failing("release"):
            self._channel.send(Kind.RUN)
            self._channel.answer(Kind.STARTED)

    # Inside

    def _round(self, layout: MemoryLayout, tracker: Tracker | None, states: Mapping[str, bytes]) -> Round:
        """Send an epoch; without a tracker it is the final one."""
        assert self.ledger is not None and self._sender is not None
        epoch, before, began = self.convergence.rounds, self._channel.bytes_sent, time.perf_counter()
        for name, data in states.items():
            self._channel.send(Kind.STATE, stream.encode_state(name, data), epoch=epoch)
        totals = self._sender.send(self.ledger.take(), epoch)
        sent = time.perf_counter()
        self._channel.send(Kind.END, stream.encode_totals(totals), epoch=epoch, flags=0 if tracker else stream.FINAL)
        if stream.decode_totals(self._channel.answer(Kind.ACK, epoch)) != totals:
            raise stream.damaged(f"the acknowledgement of epoch {epoch} has other totals")
        self.ledger.retire()
        acked = time.perf_counter()
        if tracker is not None:
            tracker.harvest(self.ledger.pending)
        nbytes, seconds = self._channel.bytes_sent - before, acked - began
        dirty = self.ledger.pending.count()
        if tracker is not None:
            self.convergence.observe(nbytes, seconds, time.perf_counter() - sent, dirty * layout.pgsize)
        return Round(epoch, totals.pages, totals.zero_pages, nbytes, seconds, dirty, nbytes / seconds, None,
                     final=tracker is None)

    def _decide(self, layout: MemoryLayout, done: Round) -> Step:
        step = self.convergence.decide(done.dirty_pages * layout.pgsize)
        done.predicted_downtime = self.convergence.predicted
        self._on_round(done)
        return step

    @contextlib.contextmanager
    def _failing(self, operation: str) -> Any:
        """Turn a loss of the peer into MigrationError, with the peer's own words where it left some."""
        try:
            yield
        except VfioError as exc:
            if exc.errno == errno.ECONNRESET:
                with contextlib.suppress(VfioError):
                    _, body = self._channel.receive(Kind.ERROR)
                    exc.hint = gave_up(body)
            if isinstance(exc, MigrationError):
                raise
            raise MigrationError(exc.errno, exc.strerror, operation=exc.operation or operation, iova=exc.iova,
                                 size=exc.size, hint=exc.hint) from exc
