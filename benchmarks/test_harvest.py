"""A round's harvest of a 1 TiB guest: 2**28 pages, bitmaps of 32 MiB, all sources merged, then runs.

The guest is a sparse file that nobody touches, mapped into a container without a domain, so that nothing is pinned;
what is measured is DirtyTracker.harvest() over three sources: a device's log (DirtyLog, as behind the software
devices), an IOMMU's bitmap (a flat DirtyBitmap, as a kernel hands it over; its system call is not part), and the VMM's
own marks.  Watching the process's own writes is left out: it costs by the memory that is present.

Times are of the thread's CPU, which a loaded machine changes little; wall clock stands beside them.
"""
import contextlib
import statistics
import time

import numpy as np
import pytest

from vfiodma import DirtyBitmap, DirtyLog, DirtyTracker, GuestMemory, IoAddressSpace, SoftwareGroup, open_backend
from vfiodma.migration.layout import MemoryLayout

TIB = 1 << 40
NPAGES = TIB // 4096
SLICE = 1 << 22
BASE = 1 << 40              # iova of the guest's first byte


class Source:
    """A DirtySource over a DirtyLog or a DirtyBitmap."""

    def __init__(self, bits):
        self.bits = bits

    def start(self, ranges, pgsize):
        """It is always on."""

    def harvest(self, iova, size, into):
        """The whole guest at once, as it is one mapping."""
        assert (iova, size) == (BASE, TIB)
        return self.bits.harvest(into)

    def stop(self):
        """It is always on."""


class Stopwatch:
    """Milliseconds of CPU and by the wall clock, a call at a time."""

    def __init__(self):
        self.cpu, self.wall = [], []

    def __call__(self, function, *arguments):
        wall, cpu = time.perf_counter(), time.thread_time()
        function(*arguments)
        self.cpu.append((time.thread_time() - cpu) * 1e3)
        self.wall.append((time.perf_counter() - wall) * 1e3)

    @property
    def median(self):
        """Of the CPU's."""
        return statistics.median(self.cpu)


def note(benchmark, own, limit, peer_name, peer, **more):
    """The limit is one of milliseconds."""
    benchmark.pedantic(lambda: None)
    ratio = statistics.median(other / taken for taken, other in zip(own.cpu, peer.cpu, strict=True))
    benchmark.extra_info.update(
        cpu_ms=round(own.median, 2), least=round(min(own.cpu), 2), most=round(max(own.cpu), 2), limit_ms=limit or "-",
        wall_ms=round(statistics.median(own.wall), 2), peer=peer_name, peer_ms=round(peer.median, 2),
        ratio=round(ratio, 3), **more)


@pytest.fixture(scope="module")
def guest():
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(GuestMemory.memfd(TIB))
        backend = open_backend("software", groups=[SoftwareGroup(0, [], emulated=True)], memlock_limit=None)
        stack.callback(backend.close)
        ioas = stack.enter_context(IoAddressSpace(backend))
        ioas.map(memory, iova=BASE)
        layout = stack.enter_context(MemoryLayout(memory, 4096))
        log, bitmap = DirtyLog(NPAGES), DirtyBitmap(NPAGES)
        tracker = DirtyTracker(ioas, layout, sources=[Source(log), Source(bitmap)], cpu_writes="off")
        tracker.start()
        stack.callback(tracker.stop)
        yield ioas, tracker, log, bitmap, DirtyBitmap(layout.nbits)


def words(kind):
    """The 32 MiB of a bitmap: nothing; 1 % in clusters of about 190 pages; each page with 50 %."""
    rng = np.random.default_rng(5)
    bits = np.zeros(NPAGES // 64, np.uint64)
    if kind == "clustered":
        for first in rng.integers(0, len(bits) - 3, NPAGES // 100 // 192).tolist():
            bits[first:first + 3] = np.uint64(2**64 - 1)
    elif kind == "random":
        bits[:] = rng.integers(0, 1 << 64, len(bits), np.uint64)
    return bits


@pytest.mark.parametrize("kind, limit", [("clean", 12.0), ("clustered", 12.0), ("random", None)])
def test_harvest_of_a_1_tib_guest(benchmark, guest, kind, limit):
    """The peer is NumPy's OR of the three bitmaps, which neither counts nor clears them."""
    ioas, tracker, log, bitmap, into = guest
    dirty = words(kind)
    pages = np.flatnonzero(np.unpackbits(dirty.view(np.uint8), bitorder="little")).astype(np.uint64) \
        if kind == "clustered" else None
    other, out, own, peer, counted = dirty.copy(), np.empty_like(dirty), Stopwatch(), Stopwatch(), Stopwatch()

    def prepare():
        np.frombuffer(bitmap, np.uint64)[:] = dirty
        np.frombuffer(into, np.uint64)[:] = 0
        if pages is not None:
            log.mark_many(pages)
        elif kind == "random":
            for first in range(0, NPAGES, NPAGES // 64):        # a log takes no bitmap: it is half full in long runs
                log.mark(first, NPAGES // 128)
        if kind != "clean":
            for first in range(0, NPAGES, NPAGES // 16):
                ioas.mark_dirty(BASE + first * 4096, 64 * 4096)

    def numpy_or():
        np.bitwise_or(dirty, other, out=out)
        np.bitwise_or(out, dirty, out=out)

    for _ in range(9):
        prepare()
        own(tracker.harvest, into)
        counted(into.count)
        peer(numpy_or)
    assert into.count() >= int(np.bitwise_count(dirty).sum())
    note(benchmark, own, limit, "NumPy's OR of three bitmaps", peer, count_ms=round(counted.median, 2))


@pytest.mark.parametrize("kind, limit", [("clean", None), ("clustered", None), ("random", 75.0)])
def test_runs_of_a_1_tib_guest(benchmark, kind, limit):
    """In slices of 4 Mi pages, as a sender takes them: 67 million runs at once would be 1 GiB.  Peer: popcount."""
    dirty = DirtyBitmap(NPAGES)
    np.frombuffer(dirty, np.uint64)[:] = words(kind)
    out = np.ones((SLICE // 2 + 1, 2), np.uint64)
    own, peer, found = Stopwatch(), Stopwatch(), 0

    def runs():
        nonlocal found
        found = sum(len(dirty[first:first + SLICE].runs(out)) for first in range(0, NPAGES, SLICE))

    for _ in range(9):
        own(runs)
        peer(dirty.count)
    note(benchmark, own, limit, "popcount", peer, runs=found)
