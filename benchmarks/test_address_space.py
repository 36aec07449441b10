"""IoAddressSpace from Python: translate beside a bare call, map and unmap beside the backend's own part of it."""
import gc
import statistics
import time

import numpy as np
import pytest

from vfiodma import SoftwareGroup, open_address_space
from vfiodma.backends import open_backend
from vfiodma.memory import GuestMemory

PAGE = 4096


def per_call_ns(call, arguments, rounds=25):
    """Median nanoseconds of call(argument), loop included."""
    gc.disable()
    try:
        times = []
        for _ in range(rounds):
            start = time.perf_counter_ns()
            for argument in arguments:
                call(argument)
            times.append((time.perf_counter_ns() - start) / len(arguments))
    finally:
        gc.enable()
    return statistics.median(times)


@pytest.fixture(scope="module")
def memory():
    with GuestMemory.memfd(1 << 20) as memory:
        yield memory


def options(count):
    """A container without a domain, where nothing is pinned: what is left is the engine."""
    return {"groups": [SoftwareGroup(1, ["0000:00:10.0"], emulated=True)], "dma_entry_limit": count + 1}


def filled(count, memory):
    ioas = open_address_space("software", **options(count))
    vaddr = memory.region.vaddr
    ioas.map_many([(0x100000 + 2 * i * PAGE, vaddr + i % 256 * PAGE, PAGE, 3) for i in range(count)])
    return ioas


def test_translate_at_1k(benchmark, memory):
    with filled(1000, memory) as ioas:
        iovas = [m.iova + 8 for m in ioas.mappings()]
        peer = per_call_ns((0).__add__, iovas)         # int -> int, implemented in C
        own = per_call_ns(ioas.translate, iovas)
        benchmark(ioas.translate, iovas[500])
    benchmark.extra_info.update(own_ns=own, peer="int.__add__", peer_ns=peer, ratio=own / peer, limit=2.0)


@pytest.mark.parametrize("count", [1000, 65_000])
def test_map_and_unmap_beside_the_backend_alone(benchmark, memory, count):
    vaddr = memory.region.vaddr
    with filled(count, memory) as ioas:
        def pair():
            ioas.unmap(ioas.map(vaddr, size=PAGE).iova)
        benchmark(pair)
        own = per_call_ns(lambda _: pair(), range(500))
    backend = open_backend("software", **options(count))
    try:
        def bare(_):
            backend.map_dma(0x1000, vaddr, PAGE, 3)
            backend.unmap_dma(0x1000, PAGE)
        peer = per_call_ns(bare, range(500))
    finally:
        backend.close()
    # What is added: arguments, allocator, table, way back, roll-back, pins.
    benchmark.extra_info.update(pair_ns=own, peer="backend.map_dma + unmap_dma", peer_ns=peer, added_ns=own - peer,
                                added_limit_ns=20_000)


def test_map_many_beside_one_by_one(benchmark, memory):
    count, vaddr = 5000, memory.region.vaddr
    rows = np.array([(0x100000 + 2 * i * PAGE, vaddr + i % 256 * PAGE, PAGE, 3) for i in range(count)], np.uint64)

    def one_by_one(ioas):
        for iova, address, size, prot in rows.tolist():
            ioas.map(address, iova, size=size, prot=prot)

    def timed(call):
        with open_address_space("software", **options(count)) as ioas:
            start = time.perf_counter_ns()
            call(ioas)
            return (time.perf_counter_ns() - start) / count
    peer = statistics.median(timed(one_by_one) for _ in range(5))
    own = statistics.median(timed(lambda ioas: ioas.map_many(rows)) for _ in range(5))
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(own_ns=own, peer="map() in a loop", peer_ns=peer, ratio=peer / own, limit=1.5,
                                entries=count)
