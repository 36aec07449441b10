"""How often a migration keeps its downtime limit, and how well the downtime was predicted.

Two processes, a UNIX socket, a guest of ``--size`` whose software devices write ``--rate`` bytes a second at random
places of a working set.  The destination's memory is in its page tables beforehand.  The same two processes migrate
``--runs`` times: the source keeps the guest each time (``abort``), and devices run on.  The last run compares all
bytes.

    python benchmarks/downtime.py --size 4G --runs 100

A run that missed the limit is shown with its parts, and with the time that the threads in question stood ready while
something else had their CPU ("waited", from the kernel's schedstat), and what a
virtual machine's host took from its CPUs (in steps of 10 ms, from /proc/stat).
"""
import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vfiodma import DirtyTracker, GuestMemory, IoAddressSpace, PageReceiver, PrecopySource, SoftwareGroup, open_backend
from vfiodma.cli.demo import parse_size
from vfiodma.cli.guest import Writers, addresses, contents, image_files
from vfiodma.devices.dma_writer import DmaWriter
from vfiodma.errors import MigrationError
from vfiodma.migration import SocketTransport
from vfiodma.migration.convergence import DowntimeBreakdown
from vfiodma.migration.events import Stage
from vfiodma.migration.layout import MemoryLayout
from vfiodma.migration.stream import Phase

PARTS = [part.name for part in fields(DowntimeBreakdown)]
TIMEOUT = 60.0


def fill(memory: GuestMemory) -> None:
    """Fill memory with the bytes of programs; all of it is in the page tables afterwards."""
    at = 0
    with memory.region.view() as view:
        for portion in contents(image_files(None)):
            part = portion[:memory.size - at]
            view[at:at + len(part)] = part
            at += len(part)
            if at == memory.size:
                return


def serve(fd: int, size: int, runs: int, checksum: str) -> None:
    """The destination: the same memory takes one migration after another."""
    with GuestMemory.memfd(size) as memory, contextlib.closing(
            SocketTransport(socket.socket(fileno=fd), TIMEOUT)) as transport:
        with memory.region.view() as view:
            for at in range(0, size, 64 << 20):         # present, and not zero: nothing may be taken for fresh
                view[at:at + (64 << 20)] = b"\xa5" * min(64 << 20, size - at)
        transport.send([b"r"])
        for _ in range(runs):
            with PageReceiver(transport, lambda hello: memory, checksum=checksum) as receiver:
                receiver.receive()
                with contextlib.suppress(MigrationError):
                    if receiver.settle() is not Phase.ABORTED:
                        raise RuntimeError("the guest was to stay where it was")


def waits(pids: list[int]) -> dict[Path, float]:
    """Return the seconds that each thread of processes stood ready without a CPU."""
    found = {}
    for pid in pids:
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):      # it ended
                found[path] = int(path.read_text().split()[1]) / 1e9
    return found


def stolen() -> float:
    """Return the seconds that the host of this virtual machine took from its CPUs; 0 if unknown."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path("/proc/stat").read_text().split("\n", 1)[0].split()[8]) / os.sysconf("SC_CLK_TCK")
    return 0.0


def pressure() -> float:
    """Return the share of the last 10 seconds in which something on this machine waited for a CPU; 0 if unknown."""
    with contextlib.suppress(OSError):
        return float(Path("/proc/pressure/cpu").read_text().split("avg10=")[1].split()[0]) / 100
    return 0.0


class Guest:
    """Memory, devices that write into it, and a destination process that takes it again and again."""

    def __init__(self, size: int, rate: float, working_set: int, devices: int, limit: float, runs: int,
                 checksum: str = "auto") -> None:
        self._parts = contextlib.ExitStack()
        self.limit, self._checksum = limit, checksum
        here, there = socket.socketpair()
        self._transport = self._parts.enter_context(contextlib.closing(SocketTransport(here, TIMEOUT)))
        with there:
            self._child = subprocess.Popen(
                [sys.executable, __file__, "--serve", str(there.fileno()), "--size", str(size), "--runs", str(runs),
                 "--checksum", checksum], pass_fds=[there.fileno()])
        self._parts.callback(self._child.wait)
        self.memory = self._parts.enter_context(GuestMemory.memfd(size))
        fill(self.memory)
        self.writers = Writers([DmaWriter(address, rate=rate / devices, seed=index)
                                for index, address in enumerate(addresses(devices))])
        backend: Any = open_backend("software", groups=[SoftwareGroup(1, self.writers.devices)], memlock_limit=None)
        self._parts.callback(backend.close)
        self.ioas = self._parts.enter_context(IoAddressSpace(backend))
        iova = self.ioas.map(self.memory).iova
        share = working_set // devices
        for index, device in enumerate(self.writers.devices):
            device.working_set = [(iova + size // devices * index, share)]
        self._parts.callback(self.writers.stop)
        self.writers.resume()
        self.layout = self._parts.enter_context(MemoryLayout(self.memory, self.ioas.pgsize))
        self._transport.receive_into(memoryview(bytearray(1)))

    def close(self) -> None:
        """End the destination, and let everything go."""
        self._parts.close()

    def migrate(self, *, verify: bool) -> dict[str, Any]:
        """Migrate once; the guest stays, and runs on."""
        pids, before, taken = [os.getpid(), self._child.pid], {}, 0.0
        wrote = [0, 0.0]

        def on_event(event: object) -> None:
            nonlocal before, taken
            if isinstance(event, Stage) and event.name == "stopped":
                wrote[:] = [self.writers.writes - moving, time.perf_counter() - began]
                before, taken = waits(pids), stolen()

        moving, began = self.writers.writes, time.perf_counter()
        tracker = DirtyTracker(self.ioas, self.layout, cpu_writes="off")    # nobody else writes here
        with PrecopySource(self._transport, downtime_limit=self.limit, checksum=self._checksum,
                           on_event=on_event) as source:
            source.introduce(self.memory)
            result = source.migrate(self.layout, tracker, self.writers)
            taken = stolen() - taken
            delay = sum(seconds - before.get(path, 0.0) for path, seconds in waits(pids).items())
            if verify:
                here, there = source.verify(self.layout)
                if here != there:
                    raise RuntimeError("the memory of both processes differs")
            source.abort()
        last = result.rounds[-1]
        return {"downtime": result.downtime, "predicted": result.predicted_downtime, "band": result.band,
                "parts": asdict(result.breakdown), "rounds": len(result.rounds), "bytes": last.bytes,
                "final_pages": last.pages + last.zero_pages, "seconds": result.seconds, "converged": result.converged,
                "rate": wrote[0] * self.writers.devices[0].block / wrote[1], "waited": delay, "stolen": taken,
                "pressure": pressure()}


def spread(values: list[float]) -> list[float]:
    """Return the least, the median, the 95th percentile and the most."""
    ordered = sorted(values)
    return [ordered[0], statistics.median(ordered), ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)],
            ordered[-1]]


def why(run: dict[str, Any], usual: dict[str, float]) -> str:
    """Say which part of a run that missed its limit took longer than usual, and what the scheduler says to it."""
    name = max(PARTS, key=lambda part: run["parts"][part] - usual[part])
    text = f"{name} took {run['parts'][name] * 1e3:.1f} ms, usually {usual[name] * 1e3:.1f}"
    if not run["converged"]:
        text += "; the limit was known to be out of reach"
    return f"{text}; threads of both processes waited {run['waited'] * 1e3:.1f} ms for a CPU meanwhile, " \
           f"the host took {run['stolen'] * 1e3:.0f} ms"


def summarize(runs: list[dict[str, Any]], limit: float) -> dict[str, Any]:
    """Return how many runs kept the limit, why others did not, and how far predictions were off."""
    usual = {part: statistics.median(run["parts"][part] for run in runs) for part in PARTS}
    errors = [abs(run["predicted"] - run["downtime"]) / run["downtime"] for run in runs]
    return {"runs": len(runs), "limit_ms": limit * 1e3, "kept": sum(run["downtime"] <= limit for run in runs),
            "downtime_ms": [1e3 * value for value in spread([run["downtime"] for run in runs])],
            "predicted_ms": [1e3 * value for value in spread([run["predicted"] for run in runs])],
            "prediction_error": spread(errors),
            "signed_error": statistics.median((run["predicted"] - run["downtime"]) / run["downtime"] for run in runs),
            "in_band": sum(run["band"][0] <= run["downtime"] <= run["band"][1] for run in runs),
            "parts_ms": {part: 1e3 * value for part, value in usual.items()},
            "rounds": statistics.median(run["rounds"] for run in runs),
            "final_pages": statistics.median(run["final_pages"] for run in runs),
            "seconds": statistics.median(run["seconds"] for run in runs),
            "gb_s_written": statistics.median(run["rate"] for run in runs) / 1e9,
            "cpu_pressure": statistics.median(run["pressure"] for run in runs),
            "misses": [why(run, usual) for run in runs if run["downtime"] > limit]}


def measure(runs: int, **options: Any) -> Iterator[dict[str, Any]]:
    """Migrate again and again; yield what each run took.  The last one compares all memory."""
    guest = Guest(runs=runs, **options)
    try:
        for number in range(runs):
            yield guest.migrate(verify=number == runs - 1)
    finally:
        guest.close()


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=parse_size, default=1 << 30)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rate", type=parse_size, default=1 << 30, help="bytes a second of all devices")
    parser.add_argument("--working-set", type=parse_size, default=64 << 20, help="of all devices")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--limit", type=float, default=30.0, help="milliseconds")
    parser.add_argument("--checksum", default="auto")
    parser.add_argument("--json", action="store_true", help="one object a run, then the summary")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        return serve(options.serve, options.size, options.runs, options.checksum)
    limit, runs = options.limit / 1e3, []
    for run in measure(options.runs, size=options.size, rate=options.rate, working_set=options.working_set,
                       devices=options.devices, limit=limit, checksum=options.checksum):
        runs.append(run)
        if options.json:
            print(json.dumps(run), flush=True)
    summary = summarize(runs, limit)
    if options.json:
        print(json.dumps(summary))
        return
    for name, value in summary.items():
        if name == "misses":
            print(*(f"missed: {text}" for text in value), sep="\n")
        else:
            rows = value.items() if isinstance(value, dict) else [("", value)]
            for part, figures in rows:
                text = figures if isinstance(figures, list) else [figures]
                print(f"{name + ' ' + part if part else name:<32}", *(f"{figure:>10.4g}" for figure in text))


if __name__ == "__main__":
    main()
