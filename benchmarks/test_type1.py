"""The Type1 model: a map from Python beside what any Python program pays for an ioctl, and vaddr updates in bulk."""
import ctypes
import fcntl
import mmap
import os
import resource
import statistics
import struct
import time

import numpy as np
import pytest
from sortedcontainers import SortedDict

from vfiodma import SoftwareGroup, open_backend

PAGE = 4096
FIONREAD = 0x541B
libc = ctypes.CDLL(None, use_errno=True)


def per_call(function, *, number, rounds=7):
    """Median time of a call, in seconds; `function(number)` makes that many."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function(number)
        times.append((time.perf_counter() - start) / number)
    return statistics.median(times)


def container(**options):
    """A container without a domain: an emulated group, so that nothing is pinned."""
    return open_backend("software", groups=[SoftwareGroup(0, [], emulated=True)], memlock_limit=None, **options)


@pytest.fixture
def pipe():
    read, write = os.pipe()
    yield read
    os.close(read)
    os.close(write)


def ioctl_pair(fd, number):
    """What a Python program does before any kernel work: fill the struct, enter the kernel."""
    buffer = bytearray(32)
    for _ in range(number):
        struct.pack_into("IIQQQ", buffer, 0, 32, 3, 0x10000, 0x1000000, PAGE)
        fcntl.ioctl(fd, FIONREAD, buffer)


@pytest.mark.parametrize("entries", [1 << 10, 60_000])
def test_map_dma_without_a_domain(benchmark, pipe, entries):
    backend = container()
    base = np.empty((entries, 4), np.uint64)
    base[:] = [0, 0x10000, PAGE, 3]
    base[:, 0] = np.arange(entries, dtype=np.uint64) * 4 * PAGE
    backend.map_many(base)
    free = [int(iova) + 2 * PAGE for iova in np.random.default_rng(1).permutation(base[:, 0])[:512]]
    map_dma = backend.map_dma

    def maps():
        for iova in free:
            map_dma(iova, 0x10000, PAGE, 3)

    def undo():
        for iova in free:
            backend.unmap_dma(iova, PAGE)
        return (), {}

    backend.map_many(np.array([[iova, 0x10000, PAGE, 3] for iova in free], np.uint64))
    benchmark.pedantic(maps, setup=undo, rounds=40)
    ours = benchmark.stats.stats.median / len(free)

    table = SortedDict((int(iova), PAGE) for iova in base[:, 0])

    def sorted_dict(number):
        for iova in free:                       # overlap test and insertion, as a map does
            i = table.bisect_right(iova) - 1
            if i >= 0 and table.peekitem(i)[0] + PAGE > iova:
                raise AssertionError
            table[iova] = PAGE
        for iova in free:
            del table[iova]

    peer = per_call(lambda number: ioctl_pair(pipe, number), number=20_000)
    start = time.perf_counter()
    sorted_dict(1)
    dictionary = (time.perf_counter() - start) / len(free)
    benchmark.extra_info.update(ns=ours * 1e9, pack_and_ioctl_ns=peer * 1e9, times_faster=peer / ours, at_least=4.0,
                                than="struct.pack_into + fcntl.ioctl", sorted_dict_insert_and_remove=dictionary / ours)
    backend.close()


def test_map_many_sorted(benchmark):
    backend = container()
    n = 60_000
    rows = np.empty((n, 4), np.uint64)
    rows[:] = [0, 0x10000, PAGE, 3]
    rows[:, 0] = np.arange(n, dtype=np.uint64) * 2 * PAGE
    benchmark.pedantic(backend.map_many, (rows,), setup=lambda: (backend.unmap_all(), None)[1], rounds=20)
    benchmark.extra_info.update(ns_an_entry=benchmark.stats.stats.median / n * 1e9)
    backend.close()


def test_pinning_map_beside_its_bare_system_calls(benchmark):
    """A map into a container with a domain populates memory and reads limits: shown beside those calls alone."""
    with open_backend("software", memlock_limit=None) as backend:
        memory = mmap.mmap(-1, 64 * PAGE)
        vaddr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

        def pairs():
            for i in range(64):
                backend.map_dma(i * PAGE, vaddr + i * PAGE, PAGE, 3)
            backend.unmap_all()

        def populate(number):
            for _ in range(number):
                libc.madvise(vaddr, PAGE, 23)

        def limit(number):
            for _ in range(number):
                resource.getrlimit(resource.RLIMIT_MEMLOCK)

        benchmark(pairs)
        benchmark.extra_info.update(
            map_and_unmap_ns=benchmark.stats.stats.median / 64 * 1e9,
            populate_from_python_ns=per_call(populate, number=5000) * 1e9,
            getrlimit_from_python_ns=per_call(limit, number=5000) * 1e9)


@pytest.mark.parametrize("entries", [10_000, 60_000, 1_000_000])
def test_vaddr_update_of_every_mapping(benchmark, entries):
    """The limit of entries is raised where it has to be; 4,096 pages of memory are mapped over and over."""
    with open_backend("software", memlock_limit=None, dma_entry_limit=max(65_535, entries)) as backend:
        fd = os.memfd_create("bench")
        os.ftruncate(fd, 4096 * PAGE)
        memory = mmap.mmap(fd, 4096 * PAGE)
        vaddr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        rows = np.empty((entries, 4), np.uint64)
        rows[:, 0] = (1 << 32) + np.arange(entries, dtype=np.uint64) * 2 * PAGE     # above the window of interrupts
        rows[:, 1] = vaddr + np.arange(entries, dtype=np.uint64) % 4096 * PAGE
        rows[:, 2:] = [PAGE, 3]
        backend.map_many(rows)
        updates = np.ascontiguousarray(rows[:, :3])

        def update():
            backend.invalidate_vaddr()
            backend.update_vaddr_many(updates)

        benchmark.pedantic(update, rounds=20, warmup_rounds=2)
        memmove = per_call(lambda number: [updates.copy() for _ in range(number)], number=10)
        benchmark.extra_info.update(us=benchmark.stats.stats.median * 1e6, times_a_copy_of_the_table=(
            benchmark.stats.stats.median / memmove), least_us=benchmark.stats.stats.min * 1e6, at_most_us={
                10_000: 1000, 1_000_000: 5000}.get(entries, "-"))
        os.close(fd)


def test_device_writes_beside_memcpy(benchmark):
    """Pages written by a device through the software IOMMU with its log on, beside numpy's copy of the same rows."""
    with open_backend("software", memlock_limit=None) as backend:
        size = 256 << 20
        fd = os.memfd_create("bench", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, 1033, 2)
        memory = mmap.mmap(fd, size)
        vaddr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        backend.map_dma(0, vaddr, size, 3)
        port, = backend.ports.values()
        port.start_logging([(0, size)])
        rng = np.random.default_rng(2)
        pages = rng.integers(0, size // PAGE, 1024, dtype=np.uint64)
        rows = np.ones((1024, PAGE), np.uint8)
        iovas = pages * np.uint64(PAGE)
        target = np.frombuffer(memory, np.uint8).reshape(-1, PAGE)
        benchmark(port.write_many, iovas, rows)

        def numpy_copy(number, target=target):
            for _ in range(number):
                target[pages] = rows

        copy = per_call(numpy_copy, number=5)
        benchmark.extra_info.update(GB_s=rows.nbytes / benchmark.stats.stats.median / 1e9,
                                    of_numpy_copy=copy / benchmark.stats.stats.median)
        os.close(fd)
