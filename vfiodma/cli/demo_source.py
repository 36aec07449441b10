"""The source process of ``vfiodma demo``: memory, devices, a live vaddr update, pre-copy, and the comparison."""
import contextlib
import errno
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ..errors import MigrationError
from ..liveupdate import VaddrHandoff
from ..memory import GuestMemory
from ..migration import DirtyTracker, PrecopySource, Round, SocketTransport
from ..migration.events import Event, Progress
from ..migration.layout import MemoryLayout
from .guest import Guest, Workload, fill, image_files

_LEAD = 0.1                 # seconds that devices write before the vaddr update
TIMEOUT = 60.0              # seconds without a byte from the other process


@dataclass(frozen=True)
class Settings(Workload):
    """What to do."""

    downtime_limit: float
    max_rounds: int


class Reporter(Protocol):
    """Who is told how it goes."""

    def stage(self, text: str) -> None:
        """Something begins."""

    def done(self, text: str) -> None:
        """It ended."""

    def progress(self, done: int, total: int) -> None:
        """It is under way."""

    def round(self, done: Round, limit: float) -> None:
        """A round ended."""


@contextlib.contextmanager
def destination(settings: Settings) -> Iterator[tuple[subprocess.Popen, SocketTransport]]:
    """Start the other process, connected over a UNIX socket; end it with the block."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    transport = SocketTransport(here, TIMEOUT)
    try:
        with there:
            command = [sys.executable, "-m", "vfiodma.cli.demo_destination", str(there.fileno()), str(settings.size)]
            child = subprocess.Popen(command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL,
                                     stdout=subprocess.PIPE, text=True,
                                     process_group=0)       # Ctrl-C is for this process, which ends the other one
        with child:
            try:
                yield child, transport
            except KeyboardInterrupt:
                child.kill()
                raise
            finally:
                transport.close()
                try:
                    child.wait(5)
                except subprocess.TimeoutExpired:
                    child.kill()
    finally:
        transport.close()


def run(settings: Settings, report: Reporter) -> dict[str, Any]:
    """Do it all; return the summary.  ``equal`` in it tells whether both memories are the same.

    Raises
    ------
    MigrationError
        The migration failed: there is no summary of a part.
    """
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        child, transport = stack.enter_context(destination(settings))
        memory = GuestMemory.memfd(settings.size, "vfiodma-demo")
        held = [memory]                                 # the vaddr update replaces it
        stack.callback(lambda: held[0].close())

        def on_event(event: Event) -> None:
            if isinstance(event, Progress):
                report.progress(event.pages, event.total)
            elif isinstance(event, Round):
                report.round(event, settings.downtime_limit)
                if not event.final:     # the VMM writes as well
                    ioas.write(pieces[0][0], f"round {event.epoch}\n".encode())

        source = PrecopySource(transport, downtime_limit=settings.downtime_limit, max_rounds=settings.max_rounds,
                               on_event=on_event)
        source.introduce(memory)                        # early: the destination gets its memory ready meanwhile

        files = image_files(settings.image)
        report.stage("filling memory")
        fill(memory, files, report)
        report.done(f"memory filled from {files[0]}" + (f" and {len(files) - 1} libraries" if files[1:] else ""))

        guest = stack.enter_context(Guest(settings, memory))
        ioas, pieces, writers = guest.ioas, guest.pieces, guest.writers
        writers.resume()
        report.done(f"{len(pieces)} mappings made, {settings.devices} devices write")
        time.sleep(_LEAD)

        before = writers.writes
        memory, times = VaddrHandoff(ioas, memory).move()
        held[0] = memory
        meanwhile = writers.writes - before
        report.done(f"vaddr update: {times.mappings} mappings, {times.total * 1e3:.2f} ms in all, "
                    f"{times.engine * 1e3:.2f} ms without mmap and munmap; {meanwhile} DMA writes went on meanwhile")

        layout = stack.enter_context(MemoryLayout(memory, ioas.pgsize))
        report.stage("moving memory")
        result = source.migrate(layout, DirtyTracker(ioas, layout), writers, guest.states)
        report.stage("comparing memory")
        here, there = source.verify(layout)
        summary = {
            "equal": here == there, "sha256": {"source": here.hex(), "destination": there.hex()},
            "size": settings.size, "pgsize": ioas.pgsize, "devices": settings.devices, "rate": settings.rate,
            "working_set": settings.working_set, "seed": settings.seed,
            "rounds": [asdict(done) for done in result.rounds],
            "bytes": result.bytes, "seconds": result.seconds, "throughput": result.bytes / result.seconds,
            "downtime": result.downtime, "downtime_limit": settings.downtime_limit,
            "predicted_downtime": result.predicted_downtime, "converged": result.converged,
            "within_limit": result.downtime <= settings.downtime_limit,
            "vaddr_update": {**times._asdict(), "engine": times.engine, "total": times.total, "dma_writes": meanwhile},
            "dma": guest.dma,
            "destination": None,
        }
        if summary["equal"]:
            report.stage("devices go on at the destination")
            source.release()
            assert child.stdout is not None
            line = child.stdout.readline()
            if child.wait(TIMEOUT) or not line:
                raise MigrationError(errno.EPROTO, operation="run", hint="the destination did not run on: see above")
            summary["destination"] = json.loads(line)
        summary["total_seconds"] = time.perf_counter() - began
        return summary
