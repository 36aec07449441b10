"""Two-stage translation beside one stage, and what a cached translation takes."""
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
LEVELS = 4
RWUA = 0x27
F_ADD_SEALS, F_SEAL_SHRINK = 1033, 2


class Guest:
    """A million virtual pages in tables of 4 levels, over memory that is mapped page by page."""

    def __init__(self):
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
        rows = np.empty((self.npages, 4), np.uint64)
        rows[:] = [0, 0, PAGE, 3]
        rows[:, 0] = np.arange(self.npages, dtype=np.uint64) * PAGE
        rows[:, 1] = rows[:, 0] + self.vaddr
        self.container.map_many(rows)
        self.domain = NestedDomain(self.system, self.container.fd)
        self.pasid = self.system.pasids.allocate()
        self.domain.bind(self.pasid, GuestPageTable(DATA * PAGE))
        self.path = self.container.paths["0000:00:10.0"]


@pytest.fixture(scope="module")
def guest():
    guest = Guest()
    yield guest
    guest.container.close()
    os.close(guest.fd)


def seconds(call, rounds=5, before=lambda: None):
    times = []
    for _ in range(rounds):
        before()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def addresses(count, pages, seed=2):
    return np.random.default_rng(seed).integers(0, pages, count, np.uint64) * PAGE


def test_cold_walk_of_random_addresses(benchmark, guest):
    walked = np.random.default_rng(3).permutation(PAGES)[:100_000].astype(np.uint64) * PAGE
    plain = addresses(100_000, guest.npages)
    one = seconds(lambda: guest.path.translate_many(plain))

    def forget():
        guest.domain.invalidate([Invalidation(guest.pasid)])
        return (), {}

    benchmark.pedantic(lambda: guest.path.translate_many(walked, guest.pasid), setup=forget, rounds=5)
    ratio = benchmark.stats.stats.median / LEVELS / one
    benchmark.extra_info.update(level_per_lookup=ratio, limit=4.0, walk_ns=benchmark.stats.stats.median * 1e4,
                                lookup_ns=one * 1e4)
    assert guest.container.ports["0000:00:10.0"].fault_count == 0


@pytest.mark.parametrize("pages", [DATA, PAGES])
def test_warm_translation(benchmark, guest, pages):
    walked, plain = addresses(100_000, pages), addresses(100_000, guest.npages)
    guest.path.translate_many(walked, guest.pasid)
    one = seconds(lambda: guest.path.translate_many(plain), 9)
    benchmark.pedantic(lambda: guest.path.translate_many(walked, guest.pasid), rounds=9)
    benchmark.extra_info.update(per_lookup=benchmark.stats.stats.median / one, limit=2.0,
                                warm_ns=benchmark.stats.stats.median * 1e4, lookup_ns=one * 1e4)


def test_a_million_pages_walked(benchmark, guest):
    everything = np.arange(PAGES, dtype=np.uint64) * PAGE
    guest.domain.invalidate([Invalidation(guest.pasid)])
    found = benchmark.pedantic(lambda: guest.path.translate_many(everything, guest.pasid), rounds=1)
    assert (found != np.uint64(2**64 - 1)).all()
    cached, size = guest.path.cached
    assert cached == PAGES
    benchmark.extra_info.update(bytes_a_translation=size / cached, limit=64)
