"""IoAddressSpace on the software backend against a dict of mappings; every refused call leaves everything as it was."""
import errno
import mmap
import sys
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vfiodma import SoftwareGroup, errors
from vfiodma._core.bitmap import DirtyBitmap
from vfiodma.address_space import open_address_space
from vfiodma.memory import GuestMemory
from vfiodma.types import Prot

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))
from fake_backend import state  # noqa: E402

PAGE = mmap.PAGESIZE
NPAGES = 16                     # of the memory
WINDOW = (0x100000, 24)         # fixed mappings fall into these pages, so that they often collide
ENTRY_LIMIT = 12
ADDRESS = "0000:00:10.0"

pages = st.integers(0, NPAGES - 1)
lengths = st.integers(1, 4)
spots = st.integers(0, WINDOW[1] - 1).map(lambda page: WINDOW[0] + page * PAGE)
prots = st.sampled_from([Prot.READ, Prot.WRITE, Prot.RW])


class AddressSpaceMachine(RuleBasedStateMachine):
    """The model: iova -> (offset into the memory, size, prot), the bytes, the marks, and which vaddrs are invalid."""

    def __init__(self):
        super().__init__()
        self.memory = GuestMemory.memfd(NPAGES * PAGE)
        self.old = []                   # memory that moved away and may be closed
        group = SoftwareGroup(1, [ADDRESS], aperture=(0, (1 << 30) - 1))
        self.ioas = open_address_space("software", groups=[group], dma_entry_limit=ENTRY_LIMIT, memlock_limit=None)
        self.port = self.ioas.backend.ports[ADDRESS]
        self.model = {}
        self.invalid = set()
        self.marks = set()              # page numbers of iovas
        self.bytes = bytearray(NPAGES * PAGE)

    def teardown(self):
        self.ioas.close()
        for memory in (*self.old, self.memory):
            memory.close()

    # What the model knows

    def overlapping(self, iova, size):
        return [start for start, (_, length, _) in self.model.items() if start < iova + size and iova < start + length]

    def at(self, iova):
        for start, (offset, size, prot) in self.model.items():
            if start <= iova < start + size:
                return start, offset + iova - start, prot
        return None

    def expect(self, number, call):
        """Call, and compare the outcome with the errno that the model expects (None = success)."""
        before = state(self.ioas) if number else None
        try:
            result = call()
        except errors.VfioError as exc:
            assert exc.errno == number, f"{exc}, expected {number and errno.errorcode[number]}"
            exc.__traceback__ = None
            assert state(self.ioas) == before
            return None
        assert number is None, f"no error, expected {errno.errorcode[number]}"
        return result

    def drop(self, starts):
        for start in starts:
            _, size, _ = self.model.pop(start)
            self.invalid.discard(start)
            self.marks -= set(range(start // PAGE, (start + size) // PAGE))

    # Changes

    @rule(page=pages, npages=lengths, iova=st.none() | spots, prot=prots)
    def map(self, page, npages, iova, prot):
        size = min(npages, NPAGES - page) * PAGE
        number = None
        if iova is not None and self.overlapping(iova, size):
            number = errno.EEXIST
        elif len(self.model) == ENTRY_LIMIT:
            number = errno.ENOSPC
        mapping = self.expect(
            number, lambda: self.ioas.map(self.memory, iova, offset=page * PAGE, size=size, prot=prot))
        if mapping is not None:
            assert not self.overlapping(mapping.iova, size) and mapping.iova
            self.model[mapping.iova] = page * PAGE, size, prot

    @rule(rows=st.lists(st.tuples(spots, pages, lengths, prots), max_size=5))
    def map_many(self, rows):
        rows = [(iova, page * PAGE, min(npages, NPAGES - page) * PAGE, prot) for iova, page, npages, prot in rows]
        new, number = {}, None
        for iova, offset, size, prot in rows:
            if self.overlapping(iova, size) or any(s < iova + size and iova < s + n for s, (_, n, _) in new.items()):
                number = errno.EEXIST
                break
            new[iova] = offset, size, prot
        if number is None and len(self.model) + len(new) > ENTRY_LIMIT:
            number = errno.ENOSPC
        base = self.memory.region.vaddr
        self.expect(number, lambda: self.ioas.map_many(
            [(iova, base + offset, size, prot) for iova, offset, size, prot in rows], keep=self.memory.region))
        if number is None:
            self.model.update(new)

    @rule(iova=spots, npages=st.none() | st.integers(1, 8))
    def unmap(self, iova, npages):
        if npages is None:
            starts = [iova] if iova in self.model else []
            number = None if starts else errno.ENOENT
        else:
            size = npages * PAGE
            starts = sorted(self.overlapping(iova, size))
            covered = sum(self.at(iova + i * PAGE) is not None for i in range(npages))
            total = sum(self.model[start][1] for start in starts)
            number = errno.ENOENT if covered < npages else errno.EINVAL if total != size else None
        expected = sum(self.model[start][1] for start in starts)
        assert self.expect(number, lambda: self.ioas.unmap(iova, npages and npages * PAGE)) in (None, expected)
        if number is None:
            self.drop(starts)

    @precondition(lambda self: len(self.model) > 6)
    @rule()
    def unmap_all(self):
        assert self.ioas.unmap_all() == sum(size for _, size, _ in self.model.values())
        self.drop(list(self.model))

    # Access: by the address space, and by a device

    def outcome(self, iova, size, prot):
        for address in range(iova, iova + size):
            found = self.at(address)
            if found is None:
                return errno.ENOENT
        touched = self.overlapping(iova, size)
        for start in sorted(touched):
            if prot & ~self.model[start][2]:
                return errno.EPERM
            if start in self.invalid:
                return errno.ENOENT
        return None

    @rule(iova=spots, into=st.integers(0, PAGE - 1), data=st.binary(min_size=1, max_size=64))
    def write(self, iova, into, data):
        iova += into
        number = self.outcome(iova, len(data), Prot.WRITE)
        self.expect(number, lambda: self.ioas.write(iova, data))
        if number is None:
            for i, byte in enumerate(data):
                self.bytes[self.at(iova + i)[1]] = byte
            self.marks |= set(range(iova // PAGE, (iova + len(data) - 1) // PAGE + 1))

    @rule(iova=spots, into=st.integers(0, PAGE - 1), size=st.integers(1, 64))
    def read(self, iova, into, size):
        iova += into
        data = self.expect(self.outcome(iova, size, Prot.READ), lambda: self.ioas.read(iova, size))
        if data is not None:
            assert data == bytes(self.bytes[self.at(iova + i)[1]] for i in range(size))

    @rule(iova=spots, byte=st.integers(0, 255))
    def device_writes(self, iova, byte):
        found = self.at(iova)
        try:
            self.port.write(iova, bytes([byte]))
        except errors.VfioError:
            assert found is None or not found[2] & Prot.WRITE
        else:
            self.bytes[found[1]] = byte        # also while the vaddr is invalid: DMA goes on

    @rule(iova=spots, npages=st.integers(1, 8))
    def harvest(self, iova, npages):
        into = DirtyBitmap(npages, PAGE)
        first = iova // PAGE
        expected = sorted(page - first for page in self.marks if first <= page < first + npages)
        assert self.ioas.harvest_marked(iova, npages * PAGE, into) == len(expected)
        assert into.indices().tolist() == expected
        self.marks -= set(range(first, first + npages))

    # Live update

    @rule()
    def move_everything(self):
        """Invalidate what is valid, map the memory elsewhere, restore; the old address goes."""
        if not self.invalid:
            self.ioas.invalidate_vaddr()
        else:
            for start in set(self.model) - self.invalid:
                self.ioas.invalidate_vaddr(start, self.model[start][1])
        moved = self.memory.remap()
        self.memory.close()
        self.memory = moved
        for start, (offset, size, prot) in self.model.items():
            mapping = self.ioas.update_vaddr(start, moved, offset=offset)
            assert mapping == (start, moved.region.vaddr + offset, size, prot)
        self.invalid.clear()

    @rule(iova=spots)
    def invalidate_one(self, iova):
        size = self.model[iova][1] if iova in self.model else PAGE
        number = None
        if iova not in self.model:
            number = errno.ENOENT if self.at(iova) is None else errno.EINVAL
        elif iova in self.invalid:
            number = errno.EINVAL
        self.expect(number, lambda: self.ioas.invalidate_vaddr(iova, size))
        if number is None:
            self.invalid.add(iova)

    @rule(iova=spots)
    def update_one(self, iova):
        number = errno.ENOENT if iova not in self.model else None if iova in self.invalid else errno.EINVAL
        offset = self.model[iova][0] if iova in self.model else 0
        self.expect(number, lambda: self.ioas.update_vaddr(iova, self.memory, offset=offset))
        if number is None:
            self.invalid.discard(iova)

    # What always holds

    @invariant()
    def mappings_are_the_models(self):
        base = self.memory.region.vaddr
        assert [(m.iova, m.size, m.prot) for m in self.ioas.mappings()] == [
            (iova, size, prot) for iova, (_, size, prot) in sorted(self.model.items())]
        assert [(r.start, r.size) for r in self.ioas.allocator.allocations()] == [
            (iova, size) for iova, (_, size, _) in sorted(self.model.items())]
        assert self.ioas.capabilities.dma_avail == ENTRY_LIMIT - len(self.model)
        for iova, (offset, size, _) in self.model.items():
            if iova in self.invalid:
                assert self.ioas.get(iova) is None
            else:
                assert self.ioas.get(iova + size - 1) == base + offset + size - 1
                assert iova in self.ioas.iovas_of(base + offset)

    @invariant()
    def memory_holds_the_bytes(self):
        with self.memory.region.view() as view:
            assert view == self.bytes


TestAddressSpace = AddressSpaceMachine.TestCase
