"""The source process of ``vfiodma demo``: memory, devices, a live vaddr update, pre-copy, and the comparison."""
import contextlib
import errno
import itertools
import json
import mmap
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from .. import SoftwareGroup, open_backend
from ..address_space import IoAddressSpace
from ..devices.dma_writer import DmaWriter
from ..errors import MigrationError
from ..liveupdate import VaddrHandoff
from ..memory import GuestMemory
from ..migration import DirtyTracker, PrecopySource, Round, SocketTransport
from ..migration.events import Event, Progress
from ..migration.layout import MemoryLayout

_MAPPINGS = 8
_PORTION = 4 << 20
_LEAD = 0.1                 # seconds that devices write before the vaddr update
TIMEOUT = 60.0              # seconds without a byte from the other process


@dataclass(frozen=True)
class Settings:
    """What to do; sizes in bytes, rates in bytes a second."""

    size: int
    image: Path | None
    devices: int
    rate: int
    working_set: int
    downtime_limit: float
    max_rounds: int
    seed: int


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


class Writers:
    """The demo's devices, as the machine that is migrated."""

    def __init__(self, devices: list[DmaWriter]) -> None:
        self.devices = devices

    def resume(self) -> None:
        """Let all write."""
        for device in self.devices:
            device.start()

    def stop(self) -> None:
        """Stop all, side by side."""
        for device in self.devices:
            device.halt()
        for device in self.devices:
            device.stop()

    def state(self) -> Mapping[str, bytes]:
        """Return each device's state."""
        return {device.address: device.state() for device in self.devices}

    @property
    def writes(self) -> int:
        """Blocks written by all."""
        return sum(device.writes for device in self.devices)


def addresses(count: int) -> list[str]:
    """Return PCI addresses for devices."""
    return [f"0000:00:{16 + index // 8:02x}.{index % 8}" for index in range(count)]


def image_files(image: Path | None) -> list[Path]:
    """Return the files to fill memory from: the one given, or the Python that runs this and what it has loaded."""
    if image is not None:
        return [image]
    maps = Path("/proc/self/maps").read_text()
    libraries = sorted({Path(name) for name in re.findall(r"(/\S+\.so\S*)$", maps, re.MULTILINE)})
    return [Path(os.path.realpath(sys.executable)), *(path for path in libraries if path.is_file())]


def contents(files: list[Path]) -> Iterator[bytes]:
    """Yield the files' bytes in portions, over and over."""
    if sum(path.stat().st_size for path in files) < _PORTION:
        content = b"".join(path.read_bytes() for path in files)
        if content:
            yield from itertools.repeat(content * (_PORTION // len(content) + 1))
    while True:
        empty = True
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while portion := file.read(_PORTION):
                    empty = False
                    yield portion
        if empty:
            raise MigrationError(errno.ENODATA, operation="fill", hint=f"{files[0]} has no bytes to fill memory with")


def fill(memory: GuestMemory, files: list[Path], report: Reporter) -> None:
    """Fill memory from files."""
    region, at = memory.region, 0
    assert region.fd is not None
    for portion in contents(files):
        with memoryview(portion) as view:
            done = 0
            while done < len(view) and at < region.size:
                # Through the file: the kernel writes new pages without zeroing them first.
                written = os.pwrite(region.fd, view[done:done + region.size - at], at)
                done, at = done + written, at + written
        report.progress(at, region.size)
        if at == region.size:
            return


def map_in_pieces(ioas: IoAddressSpace, memory: GuestMemory) -> list[tuple[int, int, int]]:
    """Map memory as several mappings with holes between them; return (iova, gpa, size) of each."""
    region = memory.region
    unit = 2 << 20 if region.size >= _MAPPINGS * (2 << 20) else mmap.PAGESIZE
    edges = sorted({region.size * index // _MAPPINGS // unit * unit for index in range(_MAPPINGS)} | {region.size})
    return [(ioas.map(region, offset=low, size=high - low, guard=mmap.PAGESIZE).iova, low, high - low)
            for low, high in zip(edges, edges[1:], strict=False)]


def working_set(pieces: list[tuple[int, int, int]], start: int, size: int) -> list[tuple[int, int]]:
    """Return the (iova, size) ranges of a part of guest memory, which may go round its end."""
    total = sum(piece[2] for piece in pieces)
    parts = [(start, min(start + size, total)), (0, start + size - total)]
    ranges = []
    for low, high in parts:
        for iova, gpa, length in pieces:
            first, end = max(low, gpa), min(high, gpa + length)
            if first < end:
                ranges.append((iova + first - gpa, end - first))
    return ranges


@contextlib.contextmanager
def destination(settings: Settings) -> Iterator[tuple[subprocess.Popen, SocketTransport]]:
    """Start the other process, connected over a UNIX socket; end it with the block."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    transport = SocketTransport(here, TIMEOUT)
    try:
        with there:
            command = [sys.executable, "-m", "vfiodma.cli.demo_destination", str(there.fileno()), str(settings.size)]
            child = subprocess.Popen(command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL,
                                     stdout=subprocess.PIPE, text=True)
        with child:
            try:
                yield child, transport
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
        ioas: IoAddressSpace

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

        writers = Writers([DmaWriter(address, rate=settings.rate, seed=settings.seed + index)
                           for index, address in enumerate(addresses(settings.devices))])
        # The model locks nothing, so no limit of locked memory applies.
        backend: Any = open_backend("software", groups=[SoftwareGroup(1, writers.devices)], memlock_limit=None)
        stack.callback(backend.close)
        ioas = stack.enter_context(IoAddressSpace(backend))
        pieces = map_in_pieces(ioas, memory)
        for index, device in enumerate(writers.devices):
            device.working_set = working_set(pieces, settings.size * index // settings.devices // 4096 * 4096,
                                             settings.working_set)
        stack.callback(writers.stop)
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
        plan = json.dumps({"mappings": pieces, "devices": [device.address for device in writers.devices]})
        result = source.migrate(layout, DirtyTracker(ioas, layout), writers, {"address space": plan.encode()})
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
            "dma": {"writes": writers.writes, "bytes": sum(device.bytes_written for device in writers.devices),
                    "faults": sum(device.faulted for device in writers.devices)},
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
