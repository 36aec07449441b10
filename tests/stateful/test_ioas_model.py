"""The software iommufd against the oracle: random calls over the raw door, answers and what they leave compared."""
import ctypes
import errno
import mmap
import struct

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from ipc_lock import set_ipc_lock
from oracle.iommufd import FULL, PAGE, TOP, Arena, Device, Iommufd, Space, Table, Unit

from vfiodma import SoftwareGroup, SoftwareVfio

libc = ctypes.CDLL(None, use_errno=True)


class Memory:
    """64 pages: the last 16 are gone, the 8 before them are read-only."""

    def __init__(self):
        self.map = mmap.mmap(-1, 64 * PAGE)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        assert libc.mprotect(ctypes.c_void_p(self.base + 40 * PAGE), 8 * PAGE, 1) == 0
        assert libc.mprotect(ctypes.c_void_p(self.base + 48 * PAGE), 16 * PAGE, 0) == 0
        first = self.base // PAGE
        self.arena = Arena(range(first, first + 48), range(first, first + 40))


MEMORY = Memory()
SMALL_APERTURE = (8 * PAGE, 0x3FFFFF)
#: Addresses of devices by group, what their IOMMUs are like for the oracle, and for the model.
GROUPS = [
    (["0000:00:10.0"], Unit((0, (1 << 39) - 1), PAGE, [(0xFEE00000, 0xFEEFFFFF)], True), {}),
    (["0000:00:11.0", "0000:00:12.0"], Unit(SMALL_APERTURE, PAGE, [(40 * PAGE, 44 * PAGE - 1)], True, 4 * PAGE),
     {"aperture": SMALL_APERTURE, "reserved": [(40 * PAGE, 44 * PAGE - 1)], "pgsizes": PAGE,
      "lost_last_page": 4 * PAGE}),
    (["0000:00:13.0"], Unit((0, FULL), 512, [], False),
     {"aperture": (0, FULL), "reserved": [], "pgsizes": 512, "dirty_tracking": False}),
]


#: Which of the ids of a kind: the n-th, modulo; from 20 on any number.
SPACES = TABLES = OBJECTS = st.sampled_from([*range(6)] * 4 + [20, 21, 25])
IOVAS = st.one_of(st.integers(0, 48).map(lambda n: n * PAGE), st.integers(0, 20).map(lambda n: n * 512),
                  st.sampled_from([0xFEE00000, 0xFEDFF000, 1 << 39, TOP - 2 * PAGE, TOP - 1, TOP - PAGE]))
LENGTHS = st.one_of(st.sampled_from([PAGE, PAGE, 2 * PAGE, 4 * PAGE, 8 * PAGE, 12 * PAGE]),
                    st.sampled_from([0, 1, 512, 2048, 3 * 512, FULL, 1 << 63, 1 << 62, FULL - PAGE]))
ADDRESSES = st.one_of(st.integers(0, 50).map(lambda n: MEMORY.base + n * PAGE),
                      st.integers(0, 16).map(lambda n: MEMORY.base + n * 512),
                      st.sampled_from([0, TOP - PAGE, TOP - 2 * PAGE, MEMORY.base + 1]))
FLAGS = st.sampled_from([7, 7, 7, 6, 6, 6, 5, 4, 2, 3, 0, 8])
RANGES = st.lists(st.tuples(IOVAS, LENGTHS).map(lambda pair: (pair[0], (pair[0] + pair[1] - 1) % TOP)), max_size=3)
PAGE_SIZES = st.sampled_from([PAGE, PAGE, 512, 2048, 4 * PAGE, 0, 3 * PAGE])
DEVICES = st.sampled_from([address for addresses, _, _ in GROUPS for address in addresses])


class IoasModel(RuleBasedStateMachine):
    vfio = None

    @initialize(kernel=st.sampled_from(["6.12", "7.2"]), limit=st.sampled_from([None, 6, 24]))
    def start(self, kernel, limit):
        self.capable = set_ipc_lock(False)
        groups = [SoftwareGroup(i, addresses, **options) for i, (addresses, _, options) in enumerate(GROUPS)]
        self.vfio = SoftwareVfio(kernel=kernel, groups=groups,
                                 memlock_limit=None if limit is None else limit * PAGE)
        self.fd = self.vfio.open("/dev/iommu")
        self.oracle = Iommufd(MEMORY.arena, kernel == "7.2", limit)
        self.buffer = ctypes.create_string_buffer(4096)
        self.list = ctypes.create_string_buffer(4096)
        self.nodes, self.devices, self.ports = {}, {}, {}
        for number, (addresses, unit, _) in enumerate(GROUPS):
            for address in addresses:
                node = self.vfio.open(self.vfio.find_device(address).cdev)
                data = self.call(118, struct.pack("=IIiIQ", 24, 0, self.fd, 0, 0), node)[1]
                self.nodes[address] = node
                self.devices[address] = Device(unit)
                assert struct.unpack_from("=I", data, 12)[0] == self.oracle.bind(self.devices[address])
                self.ports[address] = self.vfio._groups[number].ports[address]
        self.alloc()
        self.alloc()

    def teardown(self):
        if self.vfio:
            for node in self.nodes.values():
                self.vfio.close(node)
            self.vfio.close(self.fd)
            set_ipc_lock(self.capable)

    def call(self, number, data, fd=None):
        """Do an ioctl; return (errno or 0, the bytes of its argument after it)."""
        ctypes.memmove(self.buffer, data, len(data))
        try:
            self.vfio.ioctl(self.fd if fd is None else fd, 0x3B00 + number, ctypes.addressof(self.buffer))
            return 0, self.buffer.raw[:len(data)]
        except OSError as failure:
            return failure.errno, self.buffer.raw[:len(data)]

    def pick(self, kind, n):
        """The id that a drawn number stands for."""
        numbers = [number for number, thing in sorted(self.oracle.objects.items()) if isinstance(thing, kind)]
        return numbers[n % len(numbers)] if n < 20 and numbers else n % 20

    def compare(self, got, expected, told=lambda data: None):
        err, value = expected
        note(f"  oracle: {errno.errorcode.get(err, err)} {value}")
        assert errno.errorcode.get(got[0], got[0]) == errno.errorcode.get(err, err)
        if not err:
            assert told(got[1]) == value

    @staticmethod
    def field(layout, offset):
        return lambda data: struct.unpack_from(layout, data, offset)[0]

    # ---- address spaces

    @rule()
    def alloc(self):
        self.compare(self.call(0x81, struct.pack("=III", 12, 0, 0)), self.oracle.alloc(), self.field("=I", 8))

    @rule(n=OBJECTS)
    def destroy(self, n):
        number = self.pick((Space, Table, Device), n)
        self.compare(self.call(0x80, struct.pack("=II", 8, number)), self.oracle.destroy(number))

    @rule(n=SPACES, flags=FLAGS, address=ADDRESSES, length=LENGTHS, iova=IOVAS)
    def map(self, n, flags, address, length, iova):
        number = self.pick(Space, n)
        got = self.call(0x85, struct.pack("=IIIIQQQ", 40, flags, number, 0, address, length, iova))
        self.compare(got, self.oracle.map(number, flags, address, length, iova), self.field("=Q", 32))

    @rule(n=st.integers(0, 5), flags=st.sampled_from([7, 7, 6, 5]), page=st.integers(0, 42), count=st.integers(1, 8),
          at=st.integers(8, 48))
    def map_pages(self, n, flags, page, count, at):
        self.map(n, flags, MEMORY.base + page * PAGE, count * PAGE, at * PAGE)

    @rule(n=SPACES, source=SPACES, flags=FLAGS, length=LENGTHS, iova=IOVAS, source_iova=IOVAS)
    def copy(self, n, source, flags, length, iova, source_iova):
        number, source = self.pick(Space, n), self.pick(Space, source)
        got = self.call(0x83, struct.pack("=IIIIQQQ", 40, flags, number, source, length, iova, source_iova))
        self.compare(got, self.oracle.copy(number, source, flags, length, iova, source_iova), self.field("=Q", 24))

    @rule(n=st.integers(0, 5), source=st.integers(0, 5), flags=st.sampled_from([4, 5, 6, 7]), pick=st.integers(0, 5),
          cut=st.integers(0, 3), more=st.sampled_from([0, 0, 0, PAGE]), iova=IOVAS)
    def copy_area(self, n, source, flags, pick, cut, more, iova):
        space = self.oracle.objects.get(self.pick(Space, source))
        if getattr(space, "areas", None):
            area = space.areas[pick % len(space.areas)]
            skip = cut * PAGE if area.length > cut * PAGE else 0
            self.copy(n, source, flags, area.length - skip + more, iova, area.iova + skip)

    @rule(n=SPACES, iova=IOVAS, length=LENGTHS)
    def unmap(self, n, iova, length):
        number = self.pick(Space, n)
        got = self.call(0x86, struct.pack("=IIQQ", 24, number, iova, length))
        self.compare(got, self.oracle.unmap(number, iova, length), self.field("=Q", 16))

    @rule(n=SPACES)
    def unmap_all(self, n):
        self.unmap(n, 0, FULL)

    @rule(n=st.integers(0, 5), pick=st.integers(0, 5), less=st.sampled_from([0, 0, 0, 0, 512]))
    def unmap_area(self, n, pick, less):
        space = self.oracle.objects.get(self.pick(Space, n))
        if getattr(space, "areas", None):
            area = space.areas[pick % len(space.areas)]
            self.unmap(n, area.iova, max(area.length - less, 1))

    @rule(n=SPACES, ranges=RANGES)
    def allow(self, n, ranges):
        number = self.pick(Space, n)
        self.list[:16 * len(ranges)] = b"".join(struct.pack("=QQ", *given) for given in ranges)
        got = self.call(0x82, struct.pack("=IIIIQ", 24, number, len(ranges), 0, ctypes.addressof(self.list)))
        self.compare(got, self.oracle.allow(number, ranges))

    @rule(n=SPACES, value=st.sampled_from([0, 0, 1, 2]))
    def huge_pages(self, n, value):
        number = self.pick(Space, n)
        got = self.call(0x87, struct.pack("=IIHHIQ", 24, 1, 0, 0, number, value))
        self.compare(got, self.oracle.huge_pages(number, value))

    # ---- the VFIO dialect

    @rule(n=SPACES)
    def set_compat(self, n):
        number = self.pick(Space, n)
        self.compare(self.call(0x88, struct.pack("=IIHH", 12, number, 1, 0)), self.oracle.set_compat(number))

    @rule(kind=st.sampled_from([1, 1, 3, 6]))
    def compat_set_iommu(self, kind):
        try:
            got = 0, self.vfio.ioctl(self.fd, 0x3B00 + 102, kind)
        except OSError as failure:
            got = failure.errno, 0
        self.compare(got, self.oracle.compat_set_iommu(kind))

    @rule(flags=st.sampled_from([3, 3, 3, 1, 0, 4]), address=ADDRESSES, iova=IOVAS, length=LENGTHS)
    def compat_map(self, flags, address, iova, length):
        got = self.call(113, struct.pack("=IIQQQ", 32, flags, address, iova, length))
        self.compare(got, self.oracle.compat_map(flags, address, iova, length))

    @rule(flags=st.sampled_from([0, 0, 0, 2, 1]), iova=IOVAS, length=LENGTHS)
    def compat_unmap(self, flags, iova, length):
        before = struct.pack("=IIQQ", 24, flags, iova, length)
        err, data = self.call(114, before)
        expected, size = self.oracle.compat_unmap(flags, iova, length)
        self.compare((err, data), (expected, size), self.field("=Q", 16))
        assert struct.unpack_from("=Q", data, 16)[0] == (length if size is None else size)

    @rule(pick=st.integers(0, 5), start=st.sampled_from([0, 0, PAGE, 512]), end=st.sampled_from([0, 0, PAGE, 512]))
    def compat_unmap_part(self, pick, start, end):
        space = self.oracle.compat
        if space and space.areas:
            area = space.areas[pick % len(space.areas)]
            self.compat_unmap(0, (area.iova + start) % TOP, (area.length - start - end) % TOP)

    # ---- devices and page tables

    @rule(address=DEVICES, n=OBJECTS, kind=st.sampled_from([Space, Table, Device]))
    def attach(self, address, n, kind):
        number = self.pick(kind, n)
        got = self.call(119, struct.pack("=IIII", 16, 0, number, 0), self.nodes[address])
        self.compare(got, self.oracle.attach(self.devices[address], number), self.field("=I", 8))

    @rule(address=DEVICES)
    def detach(self, address):
        self.compare(self.call(120, struct.pack("=III", 12, 0, 0), self.nodes[address]),
                     self.oracle.detach(self.devices[address]))

    @rule(device=OBJECTS, n=SPACES, flags=st.sampled_from([0, 2, 2, 2, 8, 16]))
    def hwpt_alloc(self, device, n, flags):
        device, number = self.pick(Device, device), self.pick(Space, n)
        got = self.call(0x89, struct.pack("=12I", 48, flags, device, number, *[0] * 8))
        self.compare(got, self.oracle.hwpt_alloc(device, number, flags), self.field("=I", 16))

    # ---- dirty tracking

    @rule(n=TABLES, on=st.sampled_from([1, 1, 0]))
    def set_dirty(self, n, on):
        number = self.pick(Table, n)
        self.compare(self.call(0x8B, struct.pack("=4I", 16, on, number, 0)), self.oracle.set_dirty(number, on))

    @rule(address=DEVICES, iova=IOVAS, size=st.sampled_from([1, 8, PAGE, 5000, 4 * PAGE]))
    def write(self, address, iova, size):
        expected = self.oracle.write(self.devices[address], iova, min(size, TOP - iova))
        port, faults = self.ports[address], self.ports[address].fault_count
        try:
            port.write(iova, bytes([size % 251]) * size)
        except OSError as failure:
            assert failure.errno == errno.EFAULT
            assert port.faults[-1].iova == (iova + expected) % TOP
        assert (port.fault_count > faults) == (expected < size)

    @rule(address=DEVICES, pick=st.integers(0, 5), at=st.integers(0, 8), size=st.sampled_from([1, PAGE, 6000]))
    def write_area(self, address, pick, at, size):
        table = self.devices[address].table
        if table and table.space.areas:
            area = table.space.areas[pick % len(table.space.areas)]
            self.write(address, area.iova + min(at * PAGE, area.length - 1), size)

    @rule(n=TABLES, iova=IOVAS, length=LENGTHS.filter(lambda size: size < 1 << 20), page_size=PAGE_SIZES,
          clear=st.booleans())
    def get_dirty(self, n, iova, length, page_size, clear):
        number = self.pick(Table, n)
        ctypes.memset(self.list, 0, 4096)
        got = self.call(0x8C, struct.pack("=4I4Q", 48, number, int(not clear), 0, iova, length, page_size,
                                          ctypes.addressof(self.list)))
        expected = self.oracle.get_dirty(number, iova, length, page_size, clear)
        word = int.from_bytes(self.list.raw, "little")
        self.compare(got, expected, lambda data: {i for i in range(word.bit_length()) if word >> i & 1})

    @rule(n=st.integers(0, 5), pick=st.integers(0, 5), skip=st.sampled_from([0, 0, PAGE]), clear=st.booleans(),
          page_size=st.sampled_from([PAGE, 512, 1024]))
    def get_dirty_area(self, n, pick, skip, clear, page_size):
        table = self.oracle.get(self.pick(Table, n), Table)
        if table and table.space.areas:
            area = table.space.areas[pick % len(table.space.areas)]
            if skip < area.length < 1 << 20:
                self.get_dirty(n, area.iova + skip, area.length - skip, page_size, clear)

    @rule(address=DEVICES, n=st.integers(0, 5), page=st.integers(0, 24), count=st.integers(4, 8),
          pages=st.integers(0, 7))
    def track(self, address, n, page, count, pages):
        """The whole way: a table with tracking, a device on it, memory, a write, a report."""
        def place(kind, thing):
            return [other for _, other in sorted(self.oracle.objects.items()) if isinstance(other, kind)].index(thing)

        before = list(self.oracle.objects.values())
        self.hwpt_alloc(place(Device, self.devices[address]), n, 2)
        for table in [thing for thing in self.oracle.objects.values() if thing not in before]:
            self.attach(address, place(Table, table), Table)
            self.set_dirty(place(Table, table), 1)
            self.map_pages(n, 7, page, count, page + 8)
            self.write(address, (page + 8 + pages) * PAGE, 4097)
            self.get_dirty(place(Table, table), (page + 8) * PAGE, count * PAGE, PAGE, False)

    # ---- what is left behind

    @invariant()
    def ranges_agree(self):
        if not self.vfio:
            return
        for number in range(1, 9):
            got = self.call(0x84, struct.pack("=IIIIQQ", 32, number, 64, 0, ctypes.addressof(self.list), 0))

            def told(data):
                count = struct.unpack_from("=I", data, 8)[0]
                return ([struct.unpack_from("=QQ", self.list.raw, 16 * i) for i in range(count)],
                        struct.unpack_from("=Q", data, 24)[0])
            self.compare(got, self.oracle.ranges(number), told)


TestIoasModel = IoasModel.TestCase
