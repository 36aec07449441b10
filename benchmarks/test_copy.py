"""Copying dirty pages beside memcpy of as many bytes, NumPy's indexing, and a loop of slices.

`ratio` is peer time divided by own time, best of interleaved rounds: more is better, `limit` is the least that is
wanted.
"""
import time

import numpy as np
import pytest

from vfiodma._core.copy import gather, scatter, zero_pages

PAGES = 1 << 16                             # 256 MiB


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(benchmark, own, peer, limit, name, nbytes, rounds=5):
    times = [(timed(own), timed(peer)) for _ in range(rounds)]
    best, other = map(min, zip(*times, strict=True))
    benchmark.pedantic(own, rounds=2)
    benchmark.extra_info.update(ms=best * 1e3, gb_s=nbytes / best / 1e9, peer=name, peer_gb_s=nbytes / other / 1e9,
                                ratio=other / best, limit=limit)


@pytest.fixture(scope="module")
def memory():
    memory = np.empty((PAGES, 4096), np.uint8)
    memory[:] = np.arange(1, PAGES + 1, dtype=np.uint32).view(np.uint8).reshape(-1, 4)[:, :1]
    return memory


@pytest.fixture(scope="module")
def line():
    line = np.empty((PAGES, 4096), np.uint8)
    line[:] = 0
    return line


def random_runs(density, length):
    """Runs of `length` pages, each followed by a gap, that make up `density` of the memory; in random order."""
    slots = PAGES // length
    chosen = np.sort(np.random.default_rng(5).permutation(slots)[:int(slots * density)])
    return np.stack([chosen * length, np.full(len(chosen), length)], axis=1).astype(np.uint64)


@pytest.mark.parametrize("density, length", [(0.01, 1), (0.1, 1), (0.5, 1), (0.5, 32), (1, 1)])
@pytest.mark.parametrize("way", ["gather", "scatter"])
def test_pages_beside_memcpy(benchmark, memory, line, way, density, length):
    runs = random_runs(density, length)
    npages = int(runs[:, 1].sum())
    flat, whole = line.reshape(-1)[:npages * 4096], memory.reshape(-1)[:npages * 4096]
    if way == "gather":
        own, peer = lambda: gather(memory, runs, flat), lambda: np.copyto(flat, whole)
    else:
        own, peer = lambda: scatter(flat, runs, memory), lambda: np.copyto(whole, flat)
    # A page here and there costs cache and TLB misses that one memcpy does not have.
    compare(benchmark, own, peer, 0.6 if density == 1 else 0.2, "memcpy", flat.nbytes)


@pytest.mark.parametrize("density", [0.1, 1])
def test_gather_beside_numpy_take(benchmark, memory, line, density):
    runs = random_runs(density, 1)
    pages = runs[:, 0].astype(np.intp)
    out = line[:len(pages)]
    compare(benchmark, lambda: gather(memory, runs, out), lambda: np.take(memory, pages, 0, out, "clip"), 1,
            "numpy take", out.nbytes)


def test_gather_beside_a_loop_of_slices(benchmark, memory, line):
    runs = random_runs(0.1, 1)
    source, out = memoryview(memory.reshape(-1)), memoryview(line.reshape(-1))

    def peer():
        at = 0
        for first, count in runs.tolist():
            size = count * 4096
            out[at:at + size] = source[first * 4096:first * 4096 + size]
            at += size

    compare(benchmark, lambda: gather(memory, runs, line), peer, 1, "loop of slices", len(runs) * 4096)


@pytest.mark.parametrize("kind", ["zero", "data"])
def test_zero_pages(benchmark, line, kind):
    pages = line[:PAGES // 8]
    pages[:] = 0
    if kind == "data":
        pages[:, 0] = 1
    words = pages.view(np.uint64)
    compare(benchmark, lambda: zero_pages(pages), lambda: ~words.any(axis=1), 1, "numpy any", pages.nbytes)
