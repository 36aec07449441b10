"""A snapshot beside plain write() and read() of the same bytes to the same file system."""
import os
import shutil
import statistics
import tempfile
import time

import numpy as np
import pytest

from vfiodma import DirtyBitmap, GuestMemory
from vfiodma.migration.snapshot import load, save

SIZE = 256 << 20
CHUNK = 2 << 20


@pytest.fixture
def folder():
    """Memory: what is measured is the work, not the disk."""
    path = tempfile.mkdtemp(dir="/dev/shm")
    yield path
    shutil.rmtree(path)


@pytest.fixture
def memory():
    with GuestMemory.memfd(SIZE) as memory:
        with memory.region.view() as view:
            content = np.frombuffer(view, np.uint8)
            content[:] = np.random.default_rng(1).integers(1, 256, SIZE, np.uint8)
            del content
        yield memory


def seconds(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def beside(benchmark, peer, most, ours, rounds=5):
    """Ratio of medians, each pair of runs one after the other."""
    peers = []
    benchmark.pedantic(ours, setup=lambda: peers.append(seconds(peer)), rounds=rounds, warmup_rounds=1)
    ratio = statistics.median(benchmark.stats.stats.data) / statistics.median(peers)
    benchmark.extra_info.update(ratio=round(ratio, 2), limit=most, peer_ms=round(statistics.median(peers) * 1e3, 1))
    assert ratio <= most


def test_save_beside_plain_writes(benchmark, folder, memory):
    def plain():
        with memory.region.view() as view, open(f"{folder}/plain.part", "wb", buffering=0) as file:
            for at in range(0, SIZE, CHUNK):
                file.write(view[at:at + CHUNK])
            os.fsync(file.fileno())
        os.rename(f"{folder}/plain.part", f"{folder}/plain")

    beside(benchmark, plain, 2.0, lambda: save(memory, f"{folder}/guest"))


def test_saving_one_percent_beside_saving_all(benchmark, folder, memory):
    held = save(memory, f"{folder}/guest")
    dirty = DirtyBitmap(SIZE >> 12)
    for first in range(0, SIZE >> 12, 6400):
        dirty.set(first, 64)

    def changes():
        nonlocal held
        held = save(memory, f"{folder}/guest", dirty=dirty, since=held)

    beside(benchmark, lambda: save(memory, f"{folder}/all"), 0.1, changes)


def test_load_beside_plain_reads(benchmark, folder, memory):
    save(memory, f"{folder}/guest")
    with memory.region.view() as view, open(f"{folder}/plain", "wb") as file:
        file.write(view)

    def plain():
        with GuestMemory.memfd(SIZE) as fresh, fresh.region.view() as view, open(f"{folder}/plain", "rb", 0) as file:
            for at in range(0, SIZE, CHUNK):
                file.readinto(view[at:at + CHUNK])

    beside(benchmark, plain, 2.0, lambda: load(f"{folder}/guest")[0].close())
