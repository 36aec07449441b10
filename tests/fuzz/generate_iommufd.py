"""Random scripts for /dev/iommu, device nodes, and groups on an iommufd.

Left out besides what generate.py leaves out: GET_HW_INFO (it tells the machine's registers); page faults (no IOMMU
of the lab nests) and virtual IOMMUs (not modelled); the self-test command and the numbers below it (a kernel with it
copies their size first); CHECK_EXTENSION of no-iommu (a build option); MAP_FILE of a group's descriptor (while the
group's container is the same iommufd the two hold each other, and a real kernel keeps the group for ever).
"""
import struct

from .generate import (
    BAD_PLACES,
    C0,
    C1,
    CHECK_EXTENSION,
    D0,
    DESCRIPTOR,
    G0,
    G1,
    G2,
    NULL,
    POOL_COUNTS,
    TOP,
    Generator,
)
from .script import ARG, BITMAP, BITMAP_AREA, BITMAP_SIZE, CLOSE, DATA, IOCTL, OPEN, PAGE, VALUE

DESTROY, ALLOC, ALLOW, COPY, RANGES, MAP, UNMAP, OPTION, VFIO_IOAS, HWPT_ALLOC = range(0x3b80, 0x3b8a)
SET_DIRTY, GET_DIRTY, INVALIDATE, MAP_FILE, CHANGE_PROCESS = 0x3b8b, 0x3b8c, 0x3b8d, 0x3b8f, 0x3b92
BIND, ATTACH, DETACH = 0x3b76, 0x3b77, 0x3b78
MEMFD_SLOT = 10
UNKNOWN = [0x3b00 + number for number in (0x40, 0x7f, 0xa1, 0xff)]
EXTENSIONS = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11]


class Iommufd(Generator):
    def __init__(self, seed, length):
        super().__init__(seed, length)
        self.maps = []              # (ioas, iova, size)
        self.objects = {}           # id -> "ioas", "device" or "hwpt", as far as things went well
        self.bound = {}             # device -> id

    def new(self, kind):
        number = next(n for n in range(1, 100) if n not in self.objects)
        self.objects[number] = kind
        return number

    def id(self, kind="ioas"):
        """An object of a kind, most likely."""
        known = [number for number, other in self.objects.items() if other == kind]
        if known and self.chance(0.9):
            return self.random.choice(known)
        return self.pick(0, 1, 2, 3, 4, 5, 6, 99, (1 << 32) - 1)

    def reserved(self):
        return 0 if self.chance(0.985) else 1

    def call(self, slot, request, layout, *values, flags=0, b=0):
        """Add an ioctl whose struct begins with its size, which is not always right."""
        size = struct.calcsize("<" + layout) + 4
        data = struct.pack("<I" + layout, self.argsz(size), *values)
        if request in (MAP_FILE, CHANGE_PROCESS):
            # 6.12 has neither; whether it looks at the argument all the same depends on its having the self-test.
            self.add(IOCTL, slot, flags, request, ARG, b, data)
        else:
            self.argument(slot, request, data, flags, b)

    # -- objects

    def set_up(self):
        self.add(OPEN, C0, a=4)
        self.open.add(C0)
        for _ in range(self.pick(1, 1, 2)):
            self.alloc(C0)
        if self.limited:
            self.limit()
        if self.chance(0.3):
            self.option(C0)
        if self.chance(0.6):
            if self.chance(0.4):
                self.map(C0)
            for index in self.random.sample(range(4), self.pick(1, 1, 2)):
                self.open_device(index)
                self.bind(index)
                self.attach(index)

    def fd(self):
        return C0 if self.chance(0.95) else self.pick(C1, G0, D0, NULL)

    def alloc(self, c):
        self.new("ioas")
        self.call(c, ALLOC, "II", self.reserved(), 0x55555555)

    def destroy(self, c):
        number = self.id(self.pick("ioas", "hwpt", "device"))
        if self.objects.get(number) == "ioas" and list(self.objects.values()).count("ioas") > 1:
            del self.objects[number]
        self.call(c, DESTROY, "I", number)

    def option(self, c):
        number = self.pick(0, 1, 1, 1)
        self.call(c, OPTION, "IHHIQ", number if self.chance(0.95) else 2, self.pick(0, 0, 0, 1, 1, 2), self.reserved(),
                  (self.id() if self.chance(0.9) else 0) if number else self.pick(0, 0, 0, 1), self.pick(0, 0, 1, 1, 2))

    def vfio_ioas(self, c):
        self.call(c, VFIO_IOAS, "IHH", self.id(), self.pick(0, 0, 1, 1, 1, 2, 3), self.reserved())

    # -- devices

    def open_device(self, index):
        self.add(OPEN, D0 + index, a=5 + index)
        self.open.add(D0 + index)

    def bind(self, index):
        self.call(D0 + index, BIND, "IIIQ", self.reserved(), self.pick(*[C0] * 12, C1, NULL, 10), 0x55555555,
                  self.pick(0, ARG),
                  flags=DESCRIPTOR | 2 << 4)
        if index not in self.bound and D0 + index in self.open:
            self.bound[index] = self.new("device")

    def attach(self, index):
        number = self.id(self.pick("ioas", "ioas", "ioas", "hwpt"))
        pasid = self.chance(0.05)
        self.call(D0 + index, ATTACH, "II" + "I" * pasid, pasid or self.reserved(), number, *[5] * pasid)
        if self.objects.get(number) == "ioas" and "hwpt" not in self.objects.values():
            self.new("hwpt")

    def node_step(self):
        kind = self.random.randrange(10)
        ready = [index for index in range(4) if kind >= 2 and D0 + index in self.open]
        index = self.random.choice(ready or range(4))
        if kind < 2:
            self.open_device(index)
        elif kind < 4:
            self.bind(index)
        elif kind < 7:
            self.attach(index)
        elif kind < 9:
            pasid = self.chance(0.05)
            self.call(D0 + index, DETACH, "I" + "I" * pasid, pasid or self.reserved(), *[5] * pasid)
        else:
            self.add(CLOSE, D0 + index)
            self.open.discard(D0 + index)
            self.objects.pop(self.bound.pop(index, None), None)

    def hwpt(self, c):
        table = self.id(self.pick("ioas", "ioas", "hwpt"))
        self.call(c, HWPT_ALLOC, "IIIIIIIQII", self.pick(0, 0, 0, 0, 1, 2, 3, 16), self.id("device"), table, 0x55555555,
                  self.reserved(), self.pick(0, 0, 0, 0, 1, 77), self.pick(0, 0, 0, 8, 24), 0, 0, 0)

    def track(self, c):
        number = self.id("hwpt")
        if self.chance(0.2):
            self.call(c, INVALIDATE, "IQIIII", number, 0, self.pick(0, 0, 1), self.pick(0, 24, 24, PAGE + 1),
                      self.pick(0, 0, 1, (1 << 19) + 1), self.reserved())
            return
        if self.chance(0.4):
            self.call(c, SET_DIRTY, "III", self.pick(0, 1, 1, 2), number, 0)
            return
        _, iova, size = self.area()
        page = self.pick(PAGE, PAGE, PAGE, 0, 0x800, 3000, 1 << 21)
        self.call(c, GET_DIRTY, "IIIQQQQ", number, self.pick(0, 0, 1, 2), self.reserved(), self.skew(iova),
                  self.skew(size), page, BITMAP_AREA, flags=BITMAP, b=self.pick(0, 0x5a))

    # -- areas

    def area(self):
        """An area, or something near one."""
        if not self.maps or self.chance(0.15):
            return self.id(), *self.pool()
        number, iova, size = self.random.choice(self.maps)
        if self.chance(0.2):
            iova, size = iova + self.pick(1, -1, 2) * PAGE, size + self.pick(0, 1, -1, 60) * PAGE
        return number, iova % TOP, size % TOP

    def prot(self):
        return self.pick(6, 6, 6, 6, 4, 4, 2, 0) if self.chance(0.97) else self.pick(8, 14, 1 << 31)

    def sizes(self, size):
        """Sub-page and odd values are fine without a domain."""
        if self.chance(0.9):
            return size
        return self.pick(0, 1, 0x800, 0x801, size + 1, size - 1, TOP - 1, TOP - PAGE, TOP - 2 * PAGE) % TOP

    def map(self, c):
        number = self.id()
        iova, size = self.pool()
        fixed = self.chance(0.6)
        vaddr = self.vaddr(size)
        length = self.sizes(size)
        if self.chance(0.08):
            file = self.pick(MEMFD_SLOT, MEMFD_SLOT, MEMFD_SLOT, NULL, 5)
            start = self.pick(0, PAGE, 64 * PAGE, 511 * PAGE, 512 * PAGE, 0x800, TOP - PAGE)
            self.call(c, MAP_FILE, "IIIQQQ", fixed | self.prot(), number, file, start, length, self.skew(iova),
                      flags=DESCRIPTOR | 3 << 4)
        else:
            self.call(c, MAP, "IIIQQQ", fixed | self.prot(), number, self.reserved(), self.skew(vaddr), length,
                      self.skew(iova))
        if fixed:
            self.maps.append((number, iova, size))
        elif self.chance(0.5):      # likely where it went
            self.maps.append((number, self.pick(1, 2, 3, 4, 5, 8, 16) * PAGE, size))

    def copy(self, c):
        source, iova, size = self.area()
        target, fixed = self.id(), self.chance(0.7)
        where = self.pool()[0]
        self.call(c, COPY, "IIIQQQ", fixed | self.prot(), target, source, self.sizes(size), self.skew(where),
                  self.skew(iova))
        if fixed:
            self.maps.append((target, where, size))

    def unmap_area(self, c):
        number, iova, size = self.area()
        if self.chance(0.08):
            iova, size = 0, TOP - 1
        self.call(c, UNMAP, "IQQ", number, self.skew(iova), self.skew(size))
        if self.chance(0.7):
            self.maps = [m for m in self.maps if m[0] != number or not iova <= m[1] < iova + size]

    def ranges(self, c):
        where = BITMAP_AREA
        if self.chance(0.1):
            where = self.pick(BITMAP_AREA + BITMAP_SIZE - 16, BITMAP_AREA + BITMAP_SIZE - 8, *BAD_PLACES)
        self.call(c, RANGES, "IIIQQ", self.id(), self.pick(0, 1, 2, 3, 8), self.reserved(), where, 0x5555555555555555,
                  flags=BITMAP, b=0x55)

    def allow(self, c):
        count = self.pick(0, 1, 1, 1, 2)
        ranges = b""
        for _ in range(count):
            start = self.pool()[0]
            last = start + self.pick(*POOL_COUNTS, 1 << 20) * PAGE - 1
            ranges += struct.pack("<QQ", self.skew(start), self.skew(last) % TOP if self.chance(0.97) else start)
        data = struct.pack("<IIIIQ", self.argsz(24), self.id(), count, self.reserved(), ARG + 24) + ranges
        self.add(IOCTL, c, 0, ALLOW, ARG, 0, data)

    def compat(self, c):
        """What a VFIO program does on it."""
        c = c if c in self.containers else C0
        self.random.choice([
            lambda: self.map_some(c), lambda: self.map_some(c), lambda: self.unmap(c), lambda: self.unmap(c),
            lambda: self.info(c),
            lambda: self.add(IOCTL, c, VALUE, CHECK_EXTENSION, self.pick(*EXTENSIONS)),
            lambda: self.set_iommu(c, self.pick(0, 1, 3, 3, 6)), lambda: self.set_compat_container()])()

    def set_compat_container(self):
        group = self.pick(G0, G1, G2)
        self.open_slot(group)
        self.set_container(group, C0)

    def generate(self):
        compat = self.chance(0.25)
        if self.chance(0.97):
            self.set_up()
        if compat:
            self.set_compat_container()
            self.containers[C0].driver = 3
        steps = [(30, self.map), (12, self.copy), (16, self.unmap_area), (7, self.ranges), (5, self.allow),
                 (5, self.option), (3, self.alloc), (4, self.destroy), (3, self.vfio_ioas), (3, self.hwpt),
                 (2, self.track),
                 (25 if compat else 2, self.compat),
                 (1, lambda c: self.call(c, CHANGE_PROCESS, "I", self.reserved())),
                 (1, lambda c: self.add(IOCTL, c, VALUE, self.random.choice(UNKNOWN), self.pick(0, ARG, DATA)))]
        weights, actions = zip(*steps, strict=True)
        while len(self.steps) < self.length:
            r = self.random.random()
            if r < 0.12:
                self.node_step()
            elif r < 0.17:
                self.memory_step()
            elif r < 0.2 and self.limited:
                self.limit()
            elif r < 0.22:
                self.group_step()
            else:
                self.random.choices(actions, weights)[0](self.fd())
        return self.steps[:self.length]


def generate(seed, index, length=30):
    """Return the script number ``index`` of ``seed``: always the same."""
    return Iommufd(f"iommufd/{seed}/{index}", length).generate()
