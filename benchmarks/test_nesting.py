"""Two-stage translation beside one stage, and what a cached translation takes.

Times are the thread's CPU time; each round is measured beside its peer, and the ratio is the median of the rounds'.
"""
import ctypes
import fcntl
import mmap
import os
import statistics
import time

import numpy as np
import pytest

from vfiodma import SoftwareGroup, SoftwareVfio
from vfiodma.nesting import GuestPageTable, Invalidation, NestedDomain
from vfiodma.uapi import vfio as abi

PAGE = 4096
PAGES = 1_000_000               # of the guest's address space
DATA = 4096                     # pages of memory that they lead to
COUNT = 100_000                 # translations a round
LEVELS = 4
RWUA = 0x27
F_ADD_SEALS, F_SEAL_SHRINK = 1033, 2


class Guest:
    """A million virtual pages in tables of 4 levels, over memory that is mapped page by page, or at once."""

    def __init__(self, at_once):
        leaves = -(-PAGES // 512)
        middle = -(-leaves // 512)
        self.npages = DATA + 2 + middle + leaves
        fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, self.npages * PAGE)
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
        self.fd, self.area = fd, mmap.mmap(fd, self.npages * PAGE)
        words = np.frombuffer(self.area, np.uint64)
        tables = words[DATA * 512:]
        tables[0] = (DATA + 1) * PAGE | RWUA
        tables[512:512 + middle] = (DATA + 2 + np.arange(middle, dtype=np.uint64)) * PAGE | RWUA
        tables[1024:1024 + leaves] = (DATA + 2 + middle + np.arange(leaves, dtype=np.uint64)) * PAGE | RWUA
        tables[(2 + middle) * 512:][:PAGES] = np.random.default_rng(1).integers(0, DATA, PAGES, np.uint64) * PAGE | RWUA
        self.vaddr = ctypes.addressof(ctypes.c_char.from_buffer(self.area))
        self.system = SoftwareVfio("vsva", [SoftwareGroup(0, ["0000:00:10.0"], nestable=True)], memlock_limit=None)
        self.container = self.system.container(iommu_type=abi.VFIO_TYPE1_NESTING_IOMMU)
        rows = np.empty((1 if at_once else self.npages, 4), np.uint64)
        rows[:] = [0, 0, self.npages * PAGE if at_once else PAGE, 3]
        rows[:, 0] = np.arange(len(rows), dtype=np.uint64) * PAGE
        rows[:, 1] = rows[:, 0] + self.vaddr
        self.container.map_many(rows)
        self.domain = NestedDomain(self.system, self.container.fd)
        self.pasid = self.system.pasids.allocate()
        self.domain.bind(self.pasid, GuestPageTable(DATA * PAGE))
        self.path = self.container.paths["0000:00:10.0"]


@pytest.fixture(scope="module", params=["page by page", "at once"])
def guest(request):
    guest = Guest(request.param == "at once")
    yield guest
    guest.container.close()
    os.close(guest.fd)


def beside(benchmark, call, peer, rounds, before=lambda: None):
    """Measure a call, each round beside its peer; return nanoseconds of both for a translation, and the ratio."""
    peers = []

    def setup():
        before()
        start = time.thread_time()
        peer()
        peers.append(time.thread_time() - start)

    benchmark.pedantic(call, setup=setup, rounds=rounds)
    times = benchmark.stats.stats.data
    ratio = statistics.median(ours / theirs for ours, theirs in zip(times, peers, strict=True))
    return statistics.median(times) / COUNT * 1e9, statistics.median(peers) / COUNT * 1e9, ratio


def addresses(count, pages, seed=2):
    return np.random.default_rng(seed).integers(0, pages, count, np.uint64) * PAGE


@pytest.mark.benchmark(timer=time.thread_time)
def test_cold_walk_of_random_addresses(benchmark, guest):
    walked = np.random.default_rng(3).permutation(PAGES)[:COUNT].astype(np.uint64) * PAGE
    plain = addresses(COUNT, guest.npages)
    walk, lookup, ratio = beside(benchmark, lambda: guest.path.translate_many(walked, guest.pasid),
                                 lambda: guest.path.translate_many(plain), 9,
                                 lambda: guest.domain.invalidate([Invalidation(guest.pasid)]))
    benchmark.extra_info.update(level_per_lookup=ratio / LEVELS, limit=4.0, walk_ns=walk, lookup_ns=lookup)
    assert guest.container.ports["0000:00:10.0"].fault_count == 0


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("pages", [DATA, PAGES])
def test_warm_translation(benchmark, guest, pages):
    walked, plain = addresses(COUNT, pages), addresses(COUNT, guest.npages)
    guest.path.translate_many(walked, guest.pasid)
    warm, lookup, ratio = beside(benchmark, lambda: guest.path.translate_many(walked, guest.pasid),
                                 lambda: guest.path.translate_many(plain), 21)
    benchmark.extra_info.update(per_lookup=ratio, limit=2.0, warm_ns=warm, lookup_ns=lookup)


def test_a_million_pages_walked(benchmark, guest):
    everything = np.arange(PAGES, dtype=np.uint64) * PAGE
    guest.domain.invalidate([Invalidation(guest.pasid)])
    found = benchmark.pedantic(lambda: guest.path.translate_many(everything, guest.pasid), rounds=1)
    assert (found != np.uint64(2**64 - 1)).all()
    cached, size = guest.path.cached
    assert cached == PAGES
    benchmark.extra_info.update(bytes_a_translation=size / cached, limit=64)
