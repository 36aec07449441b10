"""The walker beside a slow one written from the rules alone, on random small tables, with and without stale entries."""
import ctypes
import fcntl
import mmap
import os
import random
import struct

import numpy as np
import pytest

from vfiodma import SoftwareGroup, SoftwareVfio
from vfiodma.nesting import GuestPageTable, Invalidation, NestedDomain
from vfiodma.uapi import vfio as abi

PAGE = 4096
PAGES = 16                      # of guest memory; table and data at once
HOLE = 9                        # not in the second stage
READ_ONLY = 10                  # in the second stage for reading
WIDTH = 39
DEEP = os.environ.get("VFIODMA_PROFILE") == "deep"
ROUNDS = 400 if DEEP else 40
WALKS = 10_000_000 if DEEP else 60_000          # of random bytes
FAULT = None
F_ADD_SEALS, F_SEAL_SHRINK = 1033, 2


class Oracle:
    """What a walk does to memory and what comes out, page by page and bit by bit."""

    def __init__(self, memory, table):
        self.memory, self.table = memory, table

    def load(self, gpa):
        page = gpa // PAGE
        return None if page >= PAGES or page == HOLE else struct.unpack_from("=Q", self.memory, gpa)[0]

    def walk(self, address, perm):
        levels = 5 if self.table.address_width == 57 else 4
        signed = address - (1 << 64) if address >> 63 else address
        if not -(1 << self.table.address_width - 1) <= signed < 1 << self.table.address_width - 1:
            return FAULT
        write, privileged = bool(perm & 2), bool(perm & 8)
        if privileged and not self.table.supervisor:
            return FAULT
        at, used, writable, user = self.table.root, [], True, True
        for level in range(levels, 0, -1):
            gpa = at + 8 * (address >> 12 + 9 * (level - 1) & 511)
            entry = self.load(gpa)
            if entry is None or not entry & 1:
                return FAULT
            target = entry & 0x000FFFFFFFFFF000
            if target >= 1 << WIDTH:
                return FAULT
            used.append((gpa, entry))
            writable, user = writable and bool(entry & 2), user and bool(entry & 4)
            span = PAGE << 9 * (level - 1)
            if level == 1 or entry & 0x80:
                if level > 3 or level > 1 and target % span & ~0x1000:
                    return FAULT
                break
            at = target
        if not privileged and (not user or write and not writable):
            return FAULT
        changes = [(gpa, entry, entry | 0x20 | (0x400 if self.table.extended_accessed else 0)
                    | (0x40 if write and gpa == used[-1][0] and number == len(used) - 1 else 0))
                   for number, (gpa, entry) in enumerate(used)]
        if len({gpa for gpa, *_ in changes}) < len(changes):
            return "loop"
        for gpa, before, after in changes:
            if before != after:
                if gpa // PAGE == READ_ONLY:
                    return FAULT
                struct.pack_into("=Q", self.memory, gpa, after)
        final = target - target % span + address % span
        return FAULT if final // PAGE >= PAGES or final // PAGE == HOLE else final


def random_entry(source):
    if source.random() < 0.05:
        return source.getrandbits(64)
    bits = (source.random() < 0.95) | (source.random() < 0.8) << 1 | (source.random() < 0.9) << 2
    bits |= source.choice([0, 0, 0x20, 0x60, 0x100]) | (0x80 if source.random() < 0.1 else 0)
    return source.randrange(PAGES + 1) * PAGE | bits


def memory(direct):
    """Memory that devices reach directly, as it can't shrink; or by checked copies."""
    if not direct:
        return mmap.mmap(-1, PAGES * PAGE)
    fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGES * PAGE)
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
    area = mmap.mmap(fd, PAGES * PAGE)
    os.close(fd)
    return area


@pytest.fixture(params=[False, True], ids=["checked", "direct"])
def guest(request):
    area = memory(request.param)
    system = SoftwareVfio("vsva", [SoftwareGroup(0, ["0000:00:10.0"], nestable=True)], memlock_limit=None)
    container = system.container(iommu_type=abi.VFIO_TYPE1_NESTING_IOMMU)
    vaddr = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for page in range(PAGES):
        if page != HOLE:
            container.map_dma(page * PAGE, vaddr + page * PAGE, PAGE, 1 if page == READ_ONLY else 3)
    system.pasids.allocate()
    yield area, vaddr, container, NestedDomain(system, container.fd)
    container.close()


def test_walks_are_those_of_the_oracle(guest):
    area, vaddr, container, domain = guest
    path = container.paths["0000:00:10.0"]
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    source = random.Random(seed)
    found = loops = 0
    for _ in range(ROUNDS):
        for word in range(PAGES * 512):
            if word % 512 < 4 or source.random() < 0.01:
                struct.pack_into("=Q", area, word * 8, random_entry(source))
        table = GuestPageTable(source.randrange(PAGES) * PAGE, source.choice([48, 57]), source.random() < 0.5,
                               source.random() < 0.5)
        domain.bind(1, table)
        model = bytearray(area[:])
        oracle = Oracle(model, table)
        for _ in range(60):
            levels = 5 if table.address_width == 57 else 4
            address = sum(source.randrange(4) << 12 + 9 * level for level in range(levels))
            address |= source.randrange(PAGE)
            if source.random() < 0.05:
                address = source.getrandbits(64)
            perm = source.choice([1, 2, 3, 9, 10])
            expected = oracle.walk(address, perm)
            got = int(path.translate_many(np.array([address], np.uint64), 1, perm)[0])
            domain.invalidate([Invalidation(1), Invalidation(1, address & ~4095)])
            if expected == "loop":
                # One entry on two levels: its flags change under the walk.  It ends, one way or another.
                loops += 1
                model[:] = area[:]
                continue
            assert got == (2**64 - 1 if expected is FAULT else vaddr + expected), (seed, hex(address), perm, table)
            assert area[:] == model
            found += expected is not FAULT
        domain.unbind(1)
    assert found > ROUNDS


def test_random_bytes_as_tables_lead_into_the_guest_s_memory_or_nowhere(guest):
    area, vaddr, container, domain = guest
    path = container.paths["0000:00:10.0"]
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    source = np.random.default_rng(seed)
    words, found, batch = np.frombuffer(area, np.uint64), 0, 1000
    for _ in range(WALKS // 2 // batch):            # half with each kind of memory
        words[:] = source.integers(0, 2**64, len(words), np.uint64)
        entries = source.random(len(words)) < 0.9   # most lead to a page of the guest
        flags = source.choice(np.array([7, 7, 0x27, 0x27, 0x67, 0x127, 0x87, 5, 3, 0], np.uint64), len(words))
        words[entries] = (source.integers(0, PAGES + 1, len(words), np.uint64) << np.uint64(12) | flags)[entries]
        width = int(source.choice([48, 57]))
        domain.bind(1, GuestPageTable(int(source.integers(PAGES)) * PAGE, width, bool(source.integers(2)),
                                      bool(source.integers(2))))
        addresses = source.integers(0, 2**64, batch, np.uint64)
        canonical = source.random(batch) < 0.95
        addresses[canonical] = (addresses[canonical].view(np.int64) >> np.int64(64 - width)).view(np.uint64)
        addresses[1::2] = addresses[::2] + source.integers(0, 64, batch // 2, np.uint64)       # some come again
        pasid, perm = int(source.choice([1, 1, 1, 0, 2, 1 << 20])), int(source.integers(16))
        result = path.translate_many(addresses, pasid, perm)
        hits = result != np.uint64(2**64 - 1)
        assert hits.sum() == 0 or pasid == 1, seed
        offsets = result[hits] - np.uint64(vaddr)
        assert (offsets < PAGES * PAGE).all() and (offsets // PAGE != HOLE).all(), seed
        assert (offsets % PAGE == addresses[hits] % PAGE).all(), seed
        found += int(hits.sum())
        domain.invalidate([Invalidation(1), Invalidation(1, int(addresses[0]) & ~4095, 77)])
        domain.unbind(1)
    print("found", found, "of", WALKS // 2)
    assert found
