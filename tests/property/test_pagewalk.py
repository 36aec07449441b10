"""The walker beside a slow one written from the rules alone, on random small tables, with and without stale entries."""
import ctypes
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
ROUNDS = 400 if os.environ.get("VFIODMA_PROFILE") == "deep" else 40
FAULT = None


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


@pytest.fixture
def guest():
    area = mmap.mmap(-1, PAGES * PAGE)
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
