"""The guest of ``vfiodma demo`` and ``migrate send``: memory filled from files, and devices that write into it."""
import contextlib
import errno
import itertools
import json
import mmap
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from .. import SoftwareGroup, open_backend
from ..address_space import IoAddressSpace
from ..devices.dma_writer import DmaWriter
from ..errors import MigrationError
from ..memory import GuestMemory

_MAPPINGS = 8
_PORTION = 4 << 20


@dataclass(frozen=True)
class Workload:
    """What the guest is; sizes in bytes, rates in bytes a second."""

    size: int
    image: Path | None
    devices: int
    rate: int
    working_set: int
    seed: int


class Filling(Protocol):
    """Who is told how far the memory is filled."""

    def progress(self, done: int, total: int) -> None:
        """It is under way."""


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


def fill(memory: GuestMemory, files: list[Path], report: Filling) -> None:
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


class Guest:
    """Devices that write into memory by DMA.

    Parameters
    ----------
    workload : Workload
        What they do.
    memory : GuestMemory
        Stays the caller's; the mappings keep it open.

    Attributes
    ----------
    pieces : list of (int, int, int)
        iova, gpa and size of each mapping.
    """

    def __init__(self, workload: Workload, memory: GuestMemory) -> None:
        self.writers = Writers([DmaWriter(address, rate=workload.rate, seed=workload.seed + index)
                                for index, address in enumerate(addresses(workload.devices))])
        with contextlib.ExitStack() as parts:
            # The model locks nothing, so no limit of locked memory applies.
            backend: Any = open_backend("software", groups=[SoftwareGroup(1, self.writers.devices)],
                                        memlock_limit=None)
            parts.callback(backend.close)
            self.ioas = parts.enter_context(IoAddressSpace(backend))
            self.pieces = map_in_pieces(self.ioas, memory)
            for index, device in enumerate(self.writers.devices):
                device.working_set = working_set(self.pieces, workload.size * index // workload.devices // 4096 * 4096,
                                                 workload.working_set)
            parts.callback(self.writers.stop)
            self._parts = parts.pop_all()

    @property
    def states(self) -> dict[str, bytes]:
        """What the destination needs to map the memory and to have the same devices."""
        plan = {"mappings": self.pieces, "devices": [device.address for device in self.writers.devices]}
        return {"address space": json.dumps(plan).encode()}

    @property
    def dma(self) -> dict[str, int]:
        """What the devices did."""
        devices = self.writers.devices
        return {"writes": self.writers.writes, "bytes": sum(device.bytes_written for device in devices),
                "faults": sum(device.faulted for device in devices)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()
