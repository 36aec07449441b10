"""Dirty bitmaps beside NumPy, and a log with a summary beside the scan of a flat bitmap.

Figures are the best of interleaved rounds, so that what else runs on the machine hits both alike.  `ratio` is peer time
divided by own time: more is better, `limit` is the least that is wanted.
"""
import time

import numpy as np
import pytest

from vfiodma import DirtyBitmap, DirtyLog
from vfiodma._core.bitmap import cpu_variant

MIB_1, MIB_32 = 1 << 23, 1 << 28           # pages of a bitmap of that size: a guest of 32 GiB, of 1 TiB
SIZES = pytest.mark.parametrize("npages", [MIB_1, MIB_32], ids=["1MiB", "32MiB"])


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(benchmark, own, peer, limit, name, prepare=lambda: None, rounds=12):
    """Run both in turn, each after `prepare`; the benchmark's own table shows `own` alone."""
    times = []
    for _ in range(rounds):
        prepare()
        first = timed(own)
        prepare()
        times.append((first, timed(peer)))
    best, other = map(min, zip(*times, strict=True))

    def setup():
        prepare()
        return (), {}

    benchmark.pedantic(own, setup=setup, rounds=3)
    benchmark.extra_info.update(us=best * 1e6, peer=name, peer_us=other * 1e6, ratio=other / best, limit=limit,
                                cpu=cpu_variant())


def random_words(npages, density):
    """1 MiB of random bits, repeated."""
    bits = np.random.default_rng(1).random(MIB_1) < density
    return np.tile(np.packbits(bits, bitorder="little").view(np.uint64), npages // MIB_1)


def filled(npages, density):
    bitmap = DirtyBitmap(npages)
    np.asarray(bitmap)[:] = random_words(npages, density)
    return bitmap


@SIZES
def test_count(benchmark, npages):
    bitmap = filled(npages, 0.5)
    words = np.asarray(bitmap)
    compare(benchmark, bitmap.count, lambda: int(np.bitwise_count(words).sum()), 2, "numpy bitwise_count")


@SIZES
def test_merge(benchmark, npages):
    to, bitmap = filled(npages, 0.01), filled(npages, 0.5)
    a, b = np.asarray(to), np.asarray(bitmap)
    compare(benchmark, lambda: to.merge(bitmap), lambda: np.bitwise_or(a, b, out=a), 1, "numpy bitwise_or", rounds=30)


@SIZES
@pytest.mark.parametrize("shift", [0, 13])
@pytest.mark.parametrize("density", [0, 0.01, 0.5])
def test_harvest(benchmark, npages, density, shift):
    bitmap, into = DirtyBitmap(npages), DirtyBitmap(npages + 64)
    into.clear()
    words, dirty, to = np.asarray(bitmap), random_words(npages, density), np.asarray(into)
    work = np.empty(npages // 64, np.uint64)

    def prepare():
        words[:] = dirty

    def peer():                             # without the count, which NumPy would need another pass for
        if not shift:
            np.bitwise_or(to[:-1], words, out=to[:-1])
        else:
            np.left_shift(words, np.uint64(shift), out=work)
            np.bitwise_or(to[:-1], work, out=to[:-1])
            np.right_shift(words, np.uint64(64 - shift), out=work)
            np.bitwise_or(to[1:], work, out=to[1:])
        words[:] = 0

    compare(benchmark, lambda: bitmap.harvest(into, shift), peer, 1, "numpy or + clear, no count", prepare)


@pytest.mark.parametrize("density", [0, 0.0001, 0.01, 0.1])
@pytest.mark.parametrize("what", ["indices", "runs"])
def test_extract(benchmark, what, density):
    bitmap = filled(MIB_1, density)
    octets = np.asarray(bitmap).view(np.uint8)
    own = getattr(bitmap, what)
    out = np.empty_like(own())
    if what == "indices":
        def peer():
            return np.flatnonzero(np.unpackbits(octets, bitorder="little"))
    else:
        def peer():
            return np.flatnonzero(np.diff(np.unpackbits(octets, bitorder="little"), prepend=0, append=0))
    compare(benchmark, lambda: own(out), peer, 20 if density == 0.01 else 1, "numpy unpackbits", rounds=4)


@pytest.mark.parametrize("larger", [True, False], ids=["4K-to-64K", "64K-to-4K"])
def test_scale(benchmark, larger):
    bitmap = filled(MIB_1, 0.01) if larger else DirtyBitmap.frombuffer(filled(MIB_1, 0.01), MIB_1 // 16, 65536)
    words = np.asarray(bitmap)
    if larger:
        def peer():
            return np.packbits(words.view(np.uint16) != 0, bitorder="little")
    else:
        def peer():
            return np.repeat(np.unpackbits(words.view(np.uint8), bitorder="little"), 16)
    compare(benchmark, lambda: bitmap.scale(65536 if larger else 4096), peer, 1, "numpy", rounds=6)


@pytest.mark.parametrize("dirty", [0, 1000, 100_000])
def test_log_of_1_tib_guest(benchmark, dirty):
    """Few pages among 2^28: the summary is read, not the bitmap."""
    log, flat, into = DirtyLog(MIB_32), DirtyBitmap(MIB_32), DirtyBitmap(MIB_32)
    into.clear()
    flat.clear()
    pages = np.random.default_rng(2).integers(0, MIB_32, dirty, np.uint64)
    listed = pages.tolist()

    def prepare():
        log.mark_many(pages)
        for page in listed:
            flat.set(page)

    for _ in range(2):                      # both buffers have their memory
        prepare()
        log.harvest(into)
    compare(benchmark, lambda: log.harvest(into), lambda: flat.harvest(into), 1, "flat scan", prepare)


@pytest.mark.parametrize("clusters", [0, 5120], ids=["clean", "1percent-clustered"])
def test_harvest_end_to_end_of_1_tib_guest(benchmark, clusters):
    """From the marks of the devices to the runs of pages to copy; `ratio` is the limit of 40 ms divided by the time."""
    log, into = DirtyLog(MIB_32), DirtyBitmap(MIB_32)
    into.clear()
    starts = np.random.default_rng(3).integers(0, MIB_32 - 512, clusters).tolist()
    out = np.empty((clusters + 1, 2), np.uint64)

    def prepare():
        into.clear()
        for start in starts:
            log.mark(start, 512)

    def own():
        log.harvest(into)
        into.runs(out)

    for _ in range(2):
        prepare()
        own()
    compare(benchmark, own, lambda: time.sleep(0.04), 1, "40 ms", prepare, rounds=8)


@pytest.mark.parametrize("what", ["hot", "random"])
def test_mark(benchmark, what):
    """Marks of an array of pages, beside NumPy setting a byte for each."""
    log, into = DirtyLog(MIB_1), DirtyBitmap(MIB_1)
    pages = np.random.default_rng(4).integers(0, MIB_1 if what == "random" else 64, 100_000, np.uint64)
    flags = np.zeros(MIB_1, np.bool_)

    def prepare():
        log.harvest(into)

    def peer():
        flags[pages] = True

    compare(benchmark, lambda: log.mark_many(pages), peer, 0.2, "numpy, a byte a page, not atomic", prepare)
