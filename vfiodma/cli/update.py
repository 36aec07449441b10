"""``vfiodma update``: a live update on the software backend, under devices that write all the time."""
import contextlib
import hashlib
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from .. import SoftwareGroup, open_backend
from ..address_space import IoAddressSpace
from ..devices.dma_writer import DmaWriter
from ..liveupdate import HandoffTimes, VaddrHandoff, receive_memory, send_memory
from ..memory import GuestMemory
from .demo import Seed, check_size, parse_size
from .guest import Writers, addresses
from .probe import amount

_PAGE = 4096
_LEAD = 0.2                     # seconds that devices write before each update
_BATCH = 1024
_STEPS = ("invalidate", "remap", "unmap", "restore")


def update(
    size: Annotated[int, typer.Option(parser=check_size, metavar="SIZE", help="Guest memory.")] = "256M",     # type: ignore[assignment]
    mappings: Annotated[int, typer.Option(min=1, max=1 << 20, help="Pieces that it is mapped in.")] = 10_000,
    devices: Annotated[int, typer.Option(min=1, max=64, help="Devices that write.")] = 2,
    rate: Annotated[int, typer.Option(parser=parse_size, metavar="SIZE", help="Bytes a second of each.")] = "32M",    # type: ignore[assignment]
    times: Annotated[int, typer.Option(min=1, max=1000, help="Updates, one after another.")] = 5,
    seed: Seed = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Move memory to other addresses under devices that write, and hand it to another process; compare every byte."""
    if size < max(mappings, devices) * _PAGE:
        raise typer.BadParameter(f"{amount(size)} are {size // _PAGE} pages: too few for {mappings} mappings",
                                 param_hint="--mappings")
    summary = run(size, mappings, devices, rate, times, secrets.randbelow(1 << 32) if seed is None else seed)
    with contextlib.suppress(BrokenPipeError):
        if as_json:
            print(json.dumps(summary, indent=2), flush=True)
        else:
            _show(summary)
    if not (summary["equal"] and summary["hand_over"]["equal"]):
        _fail("the memory is not what the devices wrote: bytes were lost or changed on the way")
    if summary["dma"]["faults"]:
        _fail("devices had DMA faults")


def run(size: int, mappings: int, devices: int, rate: int, times: int, seed: int) -> dict[str, Any]:
    """Do it all; return the summary."""
    share = size // devices // _PAGE * _PAGE
    writers = [DmaWriter(address, working_set=[(index * share, share)], rate=rate, seed=seed + index)
               for index, address in enumerate(addresses(devices))]
    machine, updates = Writers(writers), []
    with contextlib.ExitStack() as stack:
        sock, child = stack.enter_context(_other_process())
        memory = GuestMemory.memfd(size, "vfiodma-update")
        held = [memory]                                 # each update replaces it
        stack.callback(lambda: held[0].close())
        backend = open_backend("software", groups=[SoftwareGroup(0, writers)], memlock_limit=None,
                               dma_entry_limit=mappings + 1)
        ioas = stack.enter_context(IoAddressSpace(backend, close_backend=True))
        _map(ioas, memory, mappings)
        machine.resume()
        stack.callback(machine.stop)
        for _ in range(times):
            time.sleep(_LEAD)
            before = machine.writes
            memory, took = VaddrHandoff(ioas, memory).move()
            held[0] = memory
            updates.append((took, machine.writes - before))
        time.sleep(_LEAD)
        machine.stop()
        equal = _is_what_was_written(memory, writers)
        return {
            "equal": equal, "size": size, "mappings": mappings, "devices": devices, "rate": rate, "seed": seed,
            "updates": [_figures(took, writes) for took, writes in updates],
            "median": {"engine": statistics.median(took.engine for took, _ in updates),
                       "total": statistics.median(took.total for took, _ in updates)},
            "dma": {"writes": machine.writes, "bytes": sum(writer.bytes_written for writer in writers),
                    "faults": sum(writer.faulted for writer in writers)},
            "hand_over": _hand_over(sock, child, memory),
        }


def _map(ioas: IoAddressSpace, memory: GuestMemory, mappings: int) -> None:
    import numpy as np

    pages = memory.size // _PAGE
    ends = np.arange(mappings + 1, dtype=np.uint64) * np.uint64(pages) // np.uint64(mappings) * np.uint64(_PAGE)
    ioas.map_many(np.column_stack((ends[:-1], ends[:-1] + np.uint64(memory.region.vaddr), np.diff(ends),
                                   np.full(mappings, 3, np.uint64))), keep=memory.region)


def _figures(took: HandoffTimes, writes: int) -> dict[str, Any]:
    return {**took._asdict(), "engine": took.engine, "total": took.total, "dma_writes": writes}


def _is_what_was_written(memory: GuestMemory, writers: list[DmaWriter]) -> bool:
    """Repeat every write, from the devices' seeds, into other memory, and compare all of it."""
    import numpy as np

    expected = np.zeros(memory.size, np.uint8)
    for writer in writers:
        for first in range(0, writer.writes, _BATCH):
            iovas, contents = writer.blocks(first, min(_BATCH, writer.writes - first))
            for iova, content in zip(iovas.tolist(), contents, strict=True):
                expected[iova:iova + len(content)] = content
    with memory.region.view() as view:
        return bool(np.array_equal(np.frombuffer(view, np.uint8), expected))


# ---- the other process

@contextlib.contextmanager
def _other_process() -> Iterator[tuple[socket.socket, "subprocess.Popen[bytes]"]]:
    """Start the process that the memory is handed to; it is ready when it has sent a byte."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            code = f"from vfiodma.cli.update import other_process; other_process({theirs.fileno()})"
            path = [entry for entry in sys.path if entry] + [os.getcwd()]
            child = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                                     env={**os.environ, "PYTHONPATH": os.pathsep.join(path)}, stdout=subprocess.PIPE,
                                     process_group=0)       # Ctrl-C is for this process, which ends the other one
        with child:
            try:
                yield ours, child
            except BaseException:
                child.kill()
                raise


def other_process(fd: int) -> None:
    """Receive the memory, say so, and print the digest of what is in it."""
    with socket.socket(fileno=fd) as sock:
        sock.sendall(b"r")
        with receive_memory(sock, timeout=600) as memory:
            sock.sendall(b"m")
            print(_digest(memory), flush=True)


def _digest(memory: GuestMemory) -> str:
    with memory.region.view() as view:
        return hashlib.sha256(view).hexdigest()


def _hand_over(sock: socket.socket, child: "subprocess.Popen[bytes]", memory: GuestMemory) -> dict[str, Any]:
    sock.settimeout(60)
    if sock.recv(1) != b"r":
        _fail("the other process did not start: see above")
    start = time.perf_counter()
    send_memory(sock, memory)
    arrived = sock.recv(1)
    seconds = time.perf_counter() - start
    assert child.stdout is not None
    return {"seconds": seconds, "equal": arrived == b"m" and child.stdout.read().decode().strip() == _digest(memory)}


# ---- showing it

def _show(summary: dict[str, Any]) -> None:
    print(f"{summary['mappings']} mappings of {amount(summary['size'])}, {summary['devices']} devices write; "
          "each step in ms")
    print("".join(f"{name:>13}" for name in (*_STEPS, "engine", "total", "DMA writes")))
    for took in summary["updates"]:
        steps = [f"{took[name] * 1e3:13.3f}" for name in (*_STEPS, "engine", "total")]
        print("".join(steps) + f"{took['dma_writes']:13}")
    median, hand_over, dma = summary["median"], summary["hand_over"], summary["dma"]
    print(f"black-out, median    {median['total'] * 1e3:.3f} ms, of which {median['engine'] * 1e3:.3f} ms are the "
          "engine's: the rest is mmap and munmap")
    print(f"DMA                  {dma['writes']} writes, {amount(dma['bytes'])}, {dma['faults']} faults")
    print(f"to another process   {hand_over['seconds'] * 1e3:.3f} ms, by descriptor: nothing is copied")
    if summary["equal"] and hand_over["equal"]:
        print("equal: every byte that the devices wrote is there, in both processes")


def _fail(why: str) -> None:
    print(f"vfiodma update: {why}", file=sys.stderr)
    raise typer.Exit(1)
