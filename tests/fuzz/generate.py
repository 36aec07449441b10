"""Random scripts from a seed.  What is likely mapped is followed, so that most steps hit something.

Left out, because the model differs there by design (docs/software-backend.md): containers shared with a forked child;
device DMA (private memory unmapped under it); mediated devices, which a stock kernel does not have.  mlock() only while
the process has CAP_IPC_LOCK: the host's mlock() does not know of the pages the model has charged.
"""
import random
import struct

from .script import (
    ANON,
    ANON_READONLY,
    ARG,
    BIG,
    BIG_PAGES,
    BITMAP,
    BITMAP_AREA,
    BITMAP_SIZE,
    CAPABILITY,
    CLOSE,
    DATA,
    DATA_PAGES,
    DESCRIPTOR,
    ENTRY_LIMIT,
    IOCTL,
    MADVISE,
    MEMFD,
    MEMFD_PRIVATE,
    MLOCK,
    MMAP,
    MPROTECT,
    MUNMAP,
    NONE,
    OPEN,
    PAGE,
    READONLY,
    RLIMIT,
    SHARED_ANON,
    TOUCH,
    VALUE,
    Step,
)

TOP = 1 << 64
BASE = 0x100000
USER_END = 0x7ffffffff000
POOL_PAGES = [0, 1, 2, 3, 4, 5, 8, 31, 60, 62, 63, 64, 65, 66, 70, 100, 126, 127, 128]
POOL_COUNTS = [1, 1, 2, 2, 3, 4, 8, 16, 60, 64, 65, 70]
EDGES = [0, PAGE, 0xfedfc000, 0xfedff000, 0xfee00000, 0xfeeff000, 0xfef00000, 0xfffff000, 1 << 32, (1 << 39) - 4 * PAGE,
         (1 << 39) - PAGE, 1 << 39, 1 << 47, 1 << 63, TOP - 4 * PAGE, TOP - PAGE]
C0, C1, G0, G1, G2, G0_AGAIN, D0, NULL = 0, 1, 2, 3, 4, 5, 6, 11
DEVICES = [(G0, b"0000:00:10.0\0"), (G1, b"0000:00:11.0\0"), (G2, b"0000:01:01.0\0"), (G2, b"0000:01:02.0\0")]
GET_STATUS, SET_CONTAINER, UNSET_CONTAINER, GET_DEVICE_FD = (0x3b00 + number for number in (103, 104, 105, 106))
CHECK_EXTENSION, SET_IOMMU, GET_INFO = (0x3b00 + number for number in (101, 102, 112))
MAP_DMA, UNMAP_DMA, DIRTY_PAGES = (0x3b00 + number for number in (113, 114, 117))
UNKNOWN = [0, *(0x3b00 + number for number in (99, 107, 108, 109, 111, 115, 116, 118, 119, 255))]
ARGSZ_OF_INFO = [0, 15, 16, 17, 19, 20, 23, 24, 25, 56, 72, 76, 84, 100, 107, 108, 112, 116, 119, 120, 121, 1024, PAGE,
                 (1 << 32) - 1]
TYPES = [0, 1, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1 << 32, 1 << 32 | 3, TOP - 1]
BAD_PLACES = [0, 8, PAGE, ARG + PAGE, USER_END - 8, USER_END, 1 << 63, TOP - 1, TOP - 32]
BAD_BITMAPS = [0, BITMAP_AREA + 8, BITMAP_AREA + 3, BITMAP_AREA + BITMAP_SIZE - 8, BITMAP_AREA + BITMAP_SIZE - 12,
               BITMAP_AREA + BITMAP_SIZE, DATA + 56 * PAGE, DATA + 64 * PAGE, USER_END - 8, USER_END, TOP - 8]
BAD_VADDRS = [0, PAGE, BITMAP_AREA, ARG, DATA - PAGE, USER_END - PAGE, USER_END, 1 << 63, TOP - PAGE]


class Container:
    def __init__(self):
        self.groups = []
        self.driver = 0
        self.maps = []              # (iova, size)
        self.invalid = []
        self.tracking = False

    def forget(self):
        self.driver, self.maps, self.invalid, self.tracking = 0, [], [], False


class Generator:
    def __init__(self, seed, length):
        self.random = random.Random(seed)
        self.length = length
        self.steps = []
        self.open = set()
        self.containers = {C0: Container(), C1: Container()}
        self.capable = True
        self.devices = 0.3 if self.chance(0.1) else 0       # opening a device is slow
        self.limited = self.chance(0.3)

    def chance(self, probability):
        return self.random.random() < probability

    def pick(self, *choices):
        return self.random.choice(choices)

    def add(self, *args, **kwargs):
        self.steps.append(Step(*args, **kwargs))

    # -- where an argument stands

    def argument(self, slot, request, data, flags=0, b=0):
        """Add an ioctl with a struct; seldom at a bad place."""
        where = ARG
        if self.chance(0.05):
            kind = self.random.randrange(5)
            if kind == 0:
                flags |= READONLY
            elif kind == 1:
                where = self.random.choice(BAD_PLACES)
            elif kind == 2:
                where = DATA + 64 * PAGE
            else:
                where = ARG + PAGE - self.random.randrange(1, 97)       # it ends after so many bytes
        elif self.chance(0.1):
            where = ARG + self.pick(1, 4, 8, 100, PAGE - len(data))
        self.add(IOCTL, slot, flags, request, where, b, data)

    def argsz(self, right):
        if self.chance(0.93):
            return right
        return self.pick(0, 1, right - 8, right - 1, right + 1, right + 8, PAGE, (1 << 32) - 1)

    def flags(self, value, width=3):
        return value if self.chance(0.97) else value ^ (1 << self.pick(*range(width + 2), 31))

    def skew(self, value):
        return value if self.chance(0.97) else (value + self.pick(1, 0x200, 0x800, 0xfff, -1)) % TOP

    # -- setting up

    def set_up(self):
        c, groups = C0, self.random.sample([G0, G1, G2], self.pick(1, 1, 1, 2, 3))
        if len(groups) < 3 and self.chance(0.15):       # another container beside it
            other = self.pick(*(group for group in (G0, G1, G2) if group not in groups))
            self.open_slot(C1)
            self.open_slot(other)
            self.set_container(other, C1)
            self.set_iommu(C1, self.pick(1, 3))
        first = groups[:self.random.randint(1, len(groups))]
        self.open_slot(c)
        for group in first:
            self.open_slot(group)
            self.set_container(group, c)
        if self.chance(0.05):
            self.set_iommu(c, self.random.choice(TYPES))
        self.set_iommu(c, self.pick(1, 3, 3, 3))
        if self.limited:
            self.limit()
        if self.chance(0.4):
            self.dirty(c, 1)
        for group in groups[len(first):]:
            if self.chance(0.5):
                self.map_some(c)
            self.open_slot(group)
            self.set_container(group, c)

    def open_slot(self, slot):
        kind = {C0: 0, C1: 0, G0: 1, G1: 2, G2: 3, G0_AGAIN: 1}[slot]
        self.add(OPEN, slot, a=kind)
        if slot != G0_AGAIN or G0 not in self.open:
            self.open.add(slot)

    def close_slot(self, slot):
        self.add(CLOSE, slot)
        self.open.discard(slot)
        if slot in (G0, G1, G2):
            self.leave(slot)

    def leave(self, group):
        for container in self.containers.values():
            if group in container.groups:
                container.groups.remove(group)
                if not container.groups:
                    container.forget()

    def set_container(self, group, container):
        self.argument(group, SET_CONTAINER, bytes([container, 0, 0, 0]), DESCRIPTOR)
        if group in self.open and container in self.open and container in self.containers and \
                not any(group in c.groups for c in self.containers.values()):
            self.containers[container].groups.append(group)

    def set_iommu(self, container, kind):
        self.add(IOCTL, container, VALUE, SET_IOMMU, kind)
        state = self.containers[container]
        if state.groups and not state.driver and kind in (1, 3):
            state.driver = kind

    def group_step(self):
        r = self.random.random()
        group, container = self.pick(G0, G1, G2), self.pick(C0, C0, C0, C1)
        if r < 0.3:
            closed = [slot for slot in (C0, C1, G0, G1, G2) if slot not in self.open]
            self.open_slot(self.random.choice(closed) if closed and self.chance(0.9) else self.pick(G0_AGAIN, G0))
        elif r < 0.4:
            self.close_slot(self.pick(G0, G0, G1, G1, G2, G2, C1, C0))
        elif r < 0.7:
            target = self.pick(*[container] * 12, G1, D0, NULL)
            if target == NULL and self.chance(0.5):
                self.argument(group, SET_CONTAINER, struct.pack("<i", self.pick(-1, 9999, 1 << 30)))
            else:
                self.set_container(group, target)
        elif r < 0.8:
            self.argument(group, GET_STATUS, struct.pack("<II", self.argsz(8), 0x55)[:self.pick(8, 8, 8, 4)])
        elif r < 0.9:
            self.add(IOCTL, group, VALUE, UNSET_CONTAINER, 0)
            self.leave(group)
        elif r < 0.95:
            self.set_iommu(container, self.random.choice(TYPES))
        else:
            self.unknown(group)

    def device_step(self):
        if self.chance(0.3):
            self.add(CLOSE, D0 + self.random.randrange(4))
            return
        index = self.random.randrange(4)
        group, name = DEVICES[index]
        if self.chance(0.1):
            group = self.pick(G0, G1, G2)
        if self.chance(0.1):
            name = self.pick(b"", b"\0", name[:-2] + b"\0", b"0000:00:99.0\0", b"0000:00:14.0\0", name + b"x")
        self.argument(group, GET_DEVICE_FD, name, b=D0 + index)

    def unknown(self, slot):
        self.add(IOCTL, slot, VALUE, self.random.choice(UNKNOWN), self.pick(0, ARG))

    # -- ranges

    def pool(self):
        if self.chance(0.85):
            return BASE + self.random.choice(POOL_PAGES) * PAGE, self.random.choice(POOL_COUNTS) * PAGE
        return (self.random.choice(EDGES) + self.random.randrange(3) * PAGE) % TOP, self.pick(1, 1, 2, 4, 8) * PAGE

    def range(self, state):
        """A range for an unmap or a bitmap: a mapping, several, more or less than one."""
        if not state.maps or self.chance(0.15):
            iova, size = self.pool()
            if self.chance(0.1):
                size = self.pick(1 << 20, 1 << 39, TOP - iova, (TOP - iova) % TOP, TOP - PAGE, (1 << 39) - iova)
            return iova, size % TOP
        iova, size = self.random.choice(state.maps)
        last = iova + size
        if self.chance(0.3):
            other, length = self.random.choice(state.maps)
            iova, last = min(iova, other), max(last, other + length)
        if self.chance(0.25):
            iova -= self.pick(1, -1, 2, -3, 3, 62) * PAGE
        if self.chance(0.25):
            last += self.pick(1, -1, 2, -3, 3, 62) * PAGE
        return iova % TOP, (last - iova) % TOP

    def vaddr(self, size):
        pages = size // PAGE
        r = self.random.random()
        if r < 0.5 and pages <= 32:
            return DATA + self.random.randint(0, 32 - pages) * PAGE
        if r < 0.85 and pages <= 64:
            return DATA + self.random.randrange(DATA_PAGES) * PAGE
        if r < 0.97:
            return BIG + self.random.randrange(max(BIG_PAGES - pages, 1)) * PAGE
        return self.pick(*BAD_VADDRS, (TOP - size) % TOP)

    # -- Type1

    def map_some(self, c):
        state = self.containers[c]
        iova, size = self.pool()
        if self.chance(0.5):            # somewhere free
            for _ in range(8):
                if not any(iova < other + length and other < iova + size for other, length in state.maps):
                    break
                iova, size = self.pool()
        if self.chance(0.02):
            size = self.pick(0, 0x200000, 1 << 30, 1 << 38, 1 << 39, TOP - PAGE, (TOP - iova) % TOP)
        prot = self.pick(3, 3, 3, 3, 1, 1, 2)
        vaddr = self.vaddr(size)
        place = self.skew(vaddr), self.skew(iova), self.skew(size)
        data = struct.pack("<IIQQQ", self.argsz(32), self.flags(prot), *place)
        self.argument(c, MAP_DMA, data)
        if state.driver and size < 1 << 21 and DATA <= vaddr < BIG + BIG_PAGES * PAGE:
            state.maps.append((iova, size))

    def unmap(self, c):
        state = self.containers[c]
        iova, size = self.range(state)
        flags = 0
        bitmap = b""
        fill = 0
        if self.chance(0.08):
            flags, iova, size = (2, 0, 0) if self.chance(0.9) else (2, iova, size)
            state.maps.clear()
        elif self.chance(0.5 if state.tracking else 0.05):
            flags = 1
            bitmap, fill = self.bitmap(size), self.pick(0, 0, 0x5a, 0xff)
        head = struct.pack("<IIQQ", self.argsz(24 + len(bitmap)), self.flags(flags), self.skew(iova), self.skew(size))
        self.argument(c, UNMAP_DMA, head + bitmap, BITMAP if bitmap else 0, fill)
        if self.chance(0.8):
            state.maps = [(other, length) for other, length in state.maps if not iova <= other < iova + size]

    def bitmap(self, size):
        pages = size // PAGE
        need = (pages + 63) // 64 * 8
        pgsize, length, where = PAGE, need, BITMAP_AREA
        if self.chance(0.07):
            pgsize = self.pick(0, 1, 0x800, 0x1001, 0x2000, 0x200000, 1 << 30, 1 << 63, TOP - 1)
        if self.chance(0.15):
            length = self.pick(0, 1, 8, 16, need - 8, need - 1, need + 1, need + 8, 1 << 28, (1 << 28) + 1, TOP - 1)
        if self.chance(0.12):
            where = self.random.choice(BAD_BITMAPS)
        return struct.pack("<QQQ", pgsize, length % TOP, where)

    def dirty(self, c, flags):
        state = self.containers[c]
        if flags == 4:
            iova, size = self.range(state)
            head = struct.pack("<IIQQ", self.argsz(48), self.flags(4), self.skew(iova), self.skew(size))
            self.argument(c, DIRTY_PAGES, head + self.bitmap(size), BITMAP, self.pick(0, 0, 0x5a, 0xff))
            return
        self.argument(c, DIRTY_PAGES, struct.pack("<II", self.argsz(8), self.flags(flags)))
        if state.driver == 3 and flags in (1, 2):
            state.tracking = flags == 1

    def vaddr_step(self, c):
        state = self.containers[c]
        if state.invalid and self.chance(0.7):
            iova, size = state.invalid[self.random.randrange(len(state.invalid))]
            if self.chance(0.85):
                state.invalid.remove((iova, size))
            if self.chance(0.15):
                iova, size = self.range(state)
            data = struct.pack("<IIQQQ", self.argsz(32), self.flags(4), self.vaddr(size), iova, size)
            self.argument(c, MAP_DMA, data)
            return
        flags, iova, size = (6, 0, 0) if self.chance(0.25) else (4, *self.range(state))
        self.argument(c, UNMAP_DMA, struct.pack("<IIQQ", self.argsz(24), self.flags(flags), iova, size))
        state.invalid = [(other, length) for other, length in state.maps if flags == 6 or iova <= other < iova + size]

    def info(self, c):
        argsz = self.pick(*ARGSZ_OF_INFO, self.random.randrange(160))
        self.argument(c, GET_INFO, struct.pack("<I", argsz))

    # -- memory and limits

    def memory_step(self):
        pages = self.pick(1, 1, 2, 4, 8)
        at = DATA + self.random.randrange(DATA_PAGES - pages + 1) * PAGE
        kind = self.random.randrange(8)
        if kind == 0:
            self.add(MUNMAP, a=at, b=pages * PAGE)
        elif kind <= 2:
            self.add(MPROTECT, request=self.pick(0, 1, 3, 3), a=at, b=pages * PAGE)
        elif kind <= 4:
            self.add(TOUCH, request=self.pick(0, 1), a=at, b=pages * PAGE)
        elif kind == 5:
            kind = self.pick(ANON, ANON, ANON_READONLY, SHARED_ANON, MEMFD, MEMFD_PRIVATE, NONE)
            self.add(MMAP, request=kind, a=at, b=pages * PAGE)
        elif kind == 6:
            self.add(MADVISE, request=4, a=at, b=pages * PAGE)
        elif self.capable:
            self.add(MLOCK, a=at, b=pages * PAGE)

    def limit(self):
        if self.chance(0.5):
            self.capable = not self.capable
            self.add(CAPABILITY, request=int(self.capable))
        else:
            pages = self.pick(0, 1, 2, 3, 4, 7, 8, 16, 17, 64, 65, 128, 2048)
            self.add(RLIMIT, a=pages * PAGE + self.pick(0, 0, 0, 1, 4095))

    # -- all

    def generate(self):
        if self.chance(0.03):
            self.add(ENTRY_LIMIT, a=self.pick(0, 1, 2, 3, 5))
        if self.chance(0.95):
            self.set_up()
        steps = [(28, self.map_some), (18, self.unmap), (10, lambda c: self.dirty(c, 4)), (9, self.vaddr_step),
                 (6, self.info), (4, lambda c: self.dirty(c, self.pick(1, 1, 2, 0, 3, 5, 6, 7, 8))),
                 (2, lambda c: self.add(IOCTL, c, VALUE, CHECK_EXTENSION, self.pick(*range(12), 1 << 32 | 1, TOP - 1))),
                 (1, lambda c: self.add(IOCTL, c, VALUE, 0x3b00 + 100, 0)), (1, self.unknown)]
        weights, actions = zip(*steps, strict=True)
        while len(self.steps) < self.length:
            r = self.random.random()
            if r < 0.1:
                self.group_step()
            elif r < 0.17:
                self.memory_step()
            elif r < 0.2 and self.limited or not self.containers[C0].driver and r < 0.25:
                self.limit() if self.limited else self.set_up()
            elif r < 0.2 + self.devices:
                self.device_step()
            else:
                ready = [c for c in (C0, C1) if self.containers[c].driver]
                c = self.random.choice(ready) if ready and self.chance(0.95) else self.pick(C0, C1)
                self.random.choices(actions, weights)[0](c)
        return self.steps[:self.length]


def generate(seed, index, length=30):
    """Return the script number ``index`` of ``seed``: always the same."""
    return Generator(f"{seed}/{index}", length).generate()
