"""Memory through the stream beside a plain socket pair; a vaddr update; a round's bitmap work."""
import contextlib
import ctypes
import os
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest
import qemu_pair

from vfiodma import (
    DirtyBitmap,
    DirtyTracker,
    GuestMemory,
    IoAddressSpace,
    SoftwareGroup,
    VaddrHandoff,
    open_backend,
)
from vfiodma.cli import bench_memory
from vfiodma.cli.bench_memory import stream
from vfiodma.devices.dma_writer import DmaWriter
from vfiodma.migration.layout import MemoryLayout

ROOT = Path(__file__).resolve().parent.parent
SIZE = int(os.environ.get("VFIODMA_BENCH_GUEST", str(256 << 20)))


def fill(memory):
    words = np.random.default_rng(1).integers(1, 1 << 63, SIZE // 8, np.uint64)
    with memory.region.view() as view:
        view[:] = words.view(np.uint8).data


@pytest.fixture(scope="module")
def peer():
    """The peer's two functions, in C."""
    library = ROOT / "build/peers/plain_socket.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*os.environ.get("CC", "cc").split(), "-std=gnu11", "-O3", "-shared", "-fPIC", "-o", library,
                    ROOT / "benchmarks/peers/plain_socket.c"], check=True)
    functions = ctypes.CDLL(str(library))
    for function in (functions.plain_send, functions.plain_receive):
        function.argtypes = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
    return functions


def plain(peer, memory, target):
    """The peer: seconds from the first byte to the answer to the last."""
    def send(sock, view):
        assert peer.plain_send(sock.fileno(), memory.region.vaddr, SIZE) == 0

    def receive(sock, view):
        assert peer.plain_receive(sock.fileno(), target.region.vaddr, SIZE) == 0

    return bench_memory.plain(memory, target, send, receive)


@pytest.fixture(scope="module")
def memories():
    with GuestMemory.memfd(SIZE) as memory, GuestMemory.memfd(SIZE) as target:
        fill(memory)
        fill(target)
        yield memory, target


@pytest.mark.parametrize("checksum, limit", [("none", 0.85), ("xxh3", 0.6), ("crc32", 0.2)])
def test_whole_memory_over_a_unix_socket_destination_prefaulted(benchmark, memories, peer, checksum, limit):
    """Limits are shares of the peer's speed."""
    if checksum == "xxh3":
        pytest.importorskip("xxhash")
    memory, target = memories
    target.write(0, bytes(SIZE))
    peers, owns = [], []
    for _ in range(9):
        peers.append(plain(peer, memory, target))
        owns.append(stream(memory, target, checksum))
    assert target.read(0, SIZE) == memory.read(0, SIZE)
    own, other = (SIZE / statistics.median(times) / 1e9 for times in (owns, peers))
    ratio = statistics.median(other / own for other, own in zip(peers, owns, strict=True))
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(own_gb_s=round(own, 2), peer="a C program's 1 MiB writes and reads",
                                peer_gb_s=round(other, 2), ratio=round(ratio, 2), limit=limit)


@pytest.mark.parametrize("checksum", ["none", "xxh3"])
def test_whole_memory_beside_qemu(benchmark, memories, checksum):
    """The same two files are the RAM of two QEMUs, paused and without a system, and guest memory here."""
    if why := qemu_pair.missing():
        pytest.skip(why)
    if checksum == "xxh3":
        pytest.importorskip("xxhash")
    memory, target = memories
    fds = memory.region.fd, target.region.fd
    taken = {name: [] for name in ("own", "own_2_channels", "qemu", "qemu_multifd")}
    for _ in range(5):
        for name, channels in ("own", 1), ("own_2_channels", 2):
            taken[name].append(stream(memory, target, checksum, channels))
        for name, channels in ("qemu", 0), ("qemu_multifd", 2):
            taken[name].append(qemu_pair.migrate(*fds, SIZE, channels=channels)["total-time"] / 1e3)
    assert target.read(0, SIZE) == memory.read(0, SIZE)
    own, peer = ([min(pair) for pair in zip(taken[one], taken[other], strict=True)]
                 for one, other in (("own", "own_2_channels"), ("qemu", "qemu_multifd")))
    ratios = [other / one for one, other in zip(own, peer, strict=True)]
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(
        {f"{name}_gbit_s": round(SIZE * 8 / statistics.median(times) / 1e9, 1) for name, times in taken.items()},
        peer="QEMU, TCG, destination preallocated; the better of one and two channels on both sides",
        ratio=round(statistics.median(ratios), 2), least=round(min(ratios), 2), most=round(max(ratios), 2), limit=1.0)


@pytest.mark.parametrize("mappings", [8, 10_000])
def test_vaddr_update(benchmark, mappings):
    """Invalidate and restore, mmap and munmap left out."""
    with contextlib.ExitStack() as stack:
        backend = open_backend("software", groups=[SoftwareGroup(0, ["0000:00:10.0"])], memlock_limit=None)
        stack.callback(backend.close)
        memory = GuestMemory.memfd(mappings * 8192)
        ioas = stack.enter_context(IoAddressSpace(backend))
        vaddr = memory.region.vaddr
        rows = [(0x100000 + at * 16384, vaddr + at * 8192, 4096, 3) for at in range(mappings)]
        ioas.map_many(rows, keep=memory.region)
        times = []

        def update():
            nonlocal memory
            memory, taken = VaddrHandoff(ioas, memory).move()
            times.append(taken.engine)

        benchmark.pedantic(update, rounds=7)
        benchmark.extra_info["engine_us"] = round(sorted(times)[3] * 1e6)
        ioas.unmap_all()
        memory.close()


def test_harvest_and_runs_of_a_round(benchmark):
    """Two devices' logs and the process's own marks over 1 GiB, 1 % written at random places."""
    npages = 1 << 18
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(GuestMemory.memfd(npages * 4096))
        devices = [DmaWriter("0000:00:10.0"), DmaWriter("0000:00:10.1")]
        backend = open_backend("software", groups=[SoftwareGroup(0, devices)], memlock_limit=None)
        stack.callback(backend.close)
        ioas = stack.enter_context(IoAddressSpace(backend))
        iova = ioas.map(memory).iova
        layout = stack.enter_context(MemoryLayout(memory, 4096))
        tracker = DirtyTracker(ioas, layout)
        tracker.start()
        stack.callback(tracker.stop)
        bitmap = DirtyBitmap(layout.nbits)
        places = np.random.default_rng(2).integers(0, npages, (2, npages // 200)).astype(np.uint64) * 4096 + iova

        def write():
            bitmap.clear()
            for port, iovas in zip(backend.ports.values(), places, strict=True):
                port.write_many(iovas, np.ones((len(iovas), 8), np.uint8))

        def harvest():
            tracker.harvest(bitmap)
            return bitmap.runs()

        benchmark.pedantic(harvest, setup=write, rounds=20)
        benchmark.extra_info["median_us"] = round(benchmark.stats["median"] * 1e6)
