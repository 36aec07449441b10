"""Nested tables of iommufd against a model: attachments, what is cached, what devices read and write."""
import ctypes
import errno
import mmap
import struct

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vfiodma import SoftwareGroup, SoftwareVfio
from vfiodma.backends.iommufd import Iommufd
from vfiodma.errors import MemoryFaultError, VfioError

PAGE, PRESENT, WRITE, USER, DIRTY, GLOBAL = 4096, 1, 2, 4, 0x40, 0x100
DEVICES = "0000:00:10.0", "0000:00:11.0"
ROOTS = 1, 5                                    # two tables of four levels, in pages 1 to 8
LOW, HIGH, END = 16, 48, 64                     # virtual pages LOW ... HIGH-1; guest memory is END pages

virtual = st.integers(LOW, HIGH - 1)
ways = st.sampled_from([(device, pasid) for device in (0, 1) for pasid in (None, 3, 4)])
entries = st.tuples(st.integers(LOW, END + 1), st.sampled_from([0, PRESENT, PRESENT | USER, PRESENT | USER | WRITE,
                                                                 PRESENT | USER | WRITE | GLOBAL]))


class Table:
    """What the model knows of a nested page table."""

    def __init__(self, hwpt, root):
        self.hwpt, self.root = hwpt, root
        self.cache = {}                         # virtual page -> (guest page, writable, dirty)


class NestedTables(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.system = SoftwareVfio("7.2", [SoftwareGroup(i, [address], nestable=True)
                                           for i, address in enumerate(DEVICES)], memlock_limit=None)
        self.iommufd = Iommufd(self.system)
        self.devices = [self.iommufd.bind(address) for address in DEVICES]
        self.ports = [self.system._groups[i].ports[address] for i, address in enumerate(DEVICES)]
        self.ioas = self.iommufd.alloc_ioas()
        self.area = mmap.mmap(-1, END * PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.area))
        self.ioas.map_dma(0, self.address, 32 * PAGE, 3)
        self.ioas.map_dma(32 * PAGE, self.address + 32 * PAGE, 32 * PAGE, 3)
        self.upper = True                       # the second half is mapped
        for root in ROOTS:
            for level in range(3):
                self.entry(root + level, 0, (root + level + 1) * PAGE | PRESENT | WRITE | USER)
        self.parent = self.iommufd.alloc_hwpt(self.ioas, self.devices[0].id, nest_parent=True, pasids=True)
        self.tables = []
        self.attached = {}                      # (device, PASID) -> Table, or None: the parent

    def teardown(self):
        self.iommufd.close()

    def entry(self, page, index, value=None):
        if value is not None:
            struct.pack_into("=Q", self.area, page * PAGE + index * 8, value)
        return struct.unpack_from("=Q", self.area, page * PAGE + index * 8)[0]

    # ---- the model

    def walk(self, table, page, write):
        """The guest page behind a virtual one, or None; as a device that accesses it."""
        known = table.cache.get(page)
        if known and (not write or (known[1] and known[2])):
            return known[0]
        leaf = self.entry(table.root + 3, page)
        if not leaf & PRESENT or not leaf & USER or write and not leaf & WRITE:
            return None
        table.cache[page] = leaf >> 12, bool(leaf & WRITE), bool(leaf & DIRTY) or write
        return leaf >> 12

    def target(self, way, page, write):
        if way not in self.attached:
            return None
        table = self.attached[way]
        page = page if table is None else self.walk(table, page, write)
        return page if page is not None and page < (END if self.upper else END // 2) else None

    # ---- what is done

    @rule(root=st.sampled_from(ROOTS), page=virtual, entry=entries)
    def change_an_entry(self, root, page, entry):
        self.entry(root + 3, page, entry[0] * PAGE | entry[1])

    @rule(root=st.sampled_from(ROOTS))
    @precondition(lambda self: len(self.tables) < 4)
    def allocate(self, root):
        hwpt = self.parent.nested(self.devices[0].id, root * PAGE, pasids=True)
        self.tables.append(Table(hwpt, root))

    @rule(which=st.integers(0, 3))
    def destroy(self, which):
        if which >= len(self.tables):
            return
        table = self.tables[which]
        try:
            table.hwpt.destroy()
        except VfioError as exc:
            assert exc.errno == errno.EBUSY and table in self.attached.values()
        else:
            assert table not in self.attached.values()
            self.tables.remove(table)

    @rule(way=ways, which=st.integers(-1, 3))
    def attach(self, way, which):
        if which >= len(self.tables):
            return
        table = self.tables[which] if which >= 0 else None
        self.devices[way[0]].attach(table.hwpt if table else self.parent, way[1])
        if self.attached.get(way, table) is not table:
            self.left(way)
        self.attached[way] = table

    @rule(way=ways)
    def detach(self, way):
        self.devices[way[0]].detach(way[1])
        self.left(way)
        self.attached.pop(way, None)

    def left(self, way):
        table = self.attached.get(way)
        if table:
            table.cache.clear()

    @rule(way=ways, page=virtual)
    def read(self, way, page):
        wanted = self.target(way, page, False)
        try:
            got = self.ports[way[0]].read(page * PAGE + 8, 8, pasid=way[1])
        except MemoryFaultError:
            assert wanted is None
        else:
            assert wanted is not None and got == self.area[wanted * PAGE + 8:wanted * PAGE + 16]

    @rule(way=ways, page=virtual, value=st.integers(0, 2**64 - 1))
    def write(self, way, page, value):
        before = self.area[LOW * PAGE:]
        wanted = self.target(way, page, True)
        data = struct.pack("=Q", value)
        try:
            self.ports[way[0]].write(page * PAGE + 8, data, pasid=way[1])
        except MemoryFaultError:
            assert wanted is None and self.area[LOW * PAGE:] == before
        else:
            assert wanted is not None
            at = (wanted - LOW) * PAGE + 8
            assert self.area[LOW * PAGE:] == before[:at] + data + before[at + 8:]

    @rule(which=st.integers(0, 3), ranges=st.lists(st.tuples(virtual, st.integers(0, 20), st.booleans()), max_size=4))
    def invalidate(self, which, ranges):
        if which >= len(self.tables):
            return
        table = self.tables[which]
        table.hwpt.invalidate([(page * PAGE, n, leaf) for page, n, leaf in ranges])
        for page, n, _ in ranges:
            table.cache = {at: known for at, known in table.cache.items() if not page <= at < page + n}

    @rule(which=st.integers(0, 3))
    def invalidate_all(self, which):
        if which < len(self.tables):
            self.tables[which].hwpt.invalidate()
            self.tables[which].cache.clear()

    @rule()
    def unmap_or_map_the_upper_half(self):
        if self.upper:
            self.ioas.unmap_dma(32 * PAGE, 32 * PAGE)
        else:
            self.ioas.map_dma(32 * PAGE, self.address + 32 * PAGE, 32 * PAGE, 3)
        self.upper = not self.upper

    @invariant()
    def as_much_is_cached(self):
        context = self.system._files[self.iommufd.fd].context
        for table in self.tables:
            assert context.cached(table.hwpt.id)[0] == len(table.cache)


TestNestedTables = NestedTables.TestCase
