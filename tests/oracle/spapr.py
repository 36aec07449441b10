"""The SPAPR TCE driver of POWER, version 1 and 2, with its windows, registered memory and EEH.

Written section by section from spapr.md.  It has the machine of container.py, whose
driver is replaced.
"""
import errno
import struct

from .container import Group, Machine
from .memory import PAGE
from .type1 import fail

GET_INFO, MAP, UNMAP, ENABLE, DISABLE, REGISTER, UNREGISTER, CREATE, REMOVE, EEH = range(112, 122)
V1, EEH_EXTENSION, V2 = 2, 5, 7
SECOND_WINDOW = 1 << 59


class TceGroup(Group):
    """A group of a POWER machine; ``tce`` is what its platform tells, or None."""

    def __init__(self, number, devices, tce=None, eeh=True, emulated=False):
        super().__init__(number, devices, emulated=emulated)
        self.tce = None if tce is False else Table(**(tce or {}))
        self.pe = Endpoint() if eeh and not emulated else None


class Table:
    """What the platform tells of a group (section 1, table_group)."""

    def __init__(self, tce32_size=2 << 30, pgsizes=0x1011000, max_windows=2, levels=5, ownership=True):
        self.size32, self.pgsizes, self.windows, self.levels = tce32_size, pgsizes, max_windows, levels
        self.ops = ownership


class Endpoint:
    """Section 8: the state of a partitionable endpoint."""

    def __init__(self):
        self.on = True                      # EEH is enabled
        self.mmio = self.dma = True
        self.reset = False
        self.parent_isolated = self.removed = False
        self.failing = False                # every operation of the platform is EIO
        self.supported = True               # the platform has operations
        self.injectable = set(range(20))

    def state(self):
        if self.parent_isolated and not self.removed:
            return 5
        if self.reset:
            return 1
        return {(True, True): 0, (False, False): 2, (False, True): 4, (True, False): 5}[self.dma, self.mmio]

    def platform(self):
        if self.failing:
            fail(errno.EIO)

    def operate(self, op, argsz, read):
        if op == 1 and not self.on:
            fail(errno.EIO)
        if op in (2, 3, 4, 5, 6, 7) and not self.supported:
            fail(errno.ENOENT)
        if op == 4:
            return self.state()
        if op == 9:
            return self.inject(argsz, read)
        if op:
            self.platform()
        if op == 1:
            self.mmio, self.dma, self.reset = True, True, False
        elif op == 2:
            self.mmio = True
        elif op == 3:
            self.dma = True
        elif op == 5:
            self.mmio, self.dma, self.reset = True, True, False
        elif op in (6, 7):
            self.mmio, self.dma, self.reset = False, False, True
        return 0

    def inject(self, argsz, read):
        if argsz < 40:
            fail(errno.EINVAL)
        kind, function, _, _ = struct.unpack("=IIQQ", read(40)[16:])
        if function > 19:
            fail(errno.EINVAL)
        if not self.supported:
            fail(errno.ENOENT)
        if kind > 1:
            fail(errno.ERANGE)
        if function not in self.injectable:
            fail(errno.ENXIO)
        self.platform()
        self.mmio = self.dma = False
        return 0


class Region:
    """Registered memory of the process (section 5)."""

    def __init__(self, vaddr, size, shift):
        self.vaddr, self.size, self.shift, self.users = vaddr, size, shift, 0

    def overlaps(self, vaddr, size):
        return self.vaddr < vaddr + size and vaddr < self.vaddr + self.size


class Window:
    def __init__(self, start, size, shift, levels, charged):
        self.start, self.size, self.shift, self.levels, self.charged = start, size, shift, levels, charged
        self.entries = {}                   # index -> (vaddr, prot, Region or None)

    @property
    def page(self):
        return 1 << self.shift

    def contains(self, iova):
        return self.start <= iova < self.start + self.size


def up(value, unit):
    return -(-value // unit) * unit


class Spapr:
    """The driver's instance in a container."""

    def __init__(self, machine, v2):
        self.machine, self.v2 = machine, v2
        self.memory, self.process = machine.memory, machine.process
        self.old = machine.kernel.name in ("5.4", "5.12", "6.1")
        self.groups = []                    # newest first
        self.tables = [None, None]
        self.enabled = self.pending = self.owned = False
        self.registered = []                # of this container
        self.upfront = 0                    # pages that ENABLE charged
        self.lost = 0                       # pages of tables that failed after their charge

    # -- section 2

    def attach(self, group):
        if group.emulated:
            fail(errno.EINVAL)
        tce = group.tce
        if tce is None:
            fail(errno.ENODEV)
        if self.old:
            if self.groups and not tce.ops:
                fail(errno.EBUSY)
            if self.groups and self.groups[0].tce.ops != tce.ops:
                fail(errno.EPERM)
            if tce.ops != self.v2:
                fail(errno.EPERM)
        else:
            if self.v2 and tce.windows == 0:
                fail(errno.EINVAL)
            if not self.v2 and self.groups:
                fail(errno.EBUSY)
            if self.groups and self.groups[0].tce.ops != tce.ops:
                fail(errno.EPERM)
        if not self.groups and self.tables[0] is None:
            if self.old and not self.v2:
                if tce.size32:              # adopted: the platform's own table, nothing is charged
                    self.tables[0] = Window(0, tce.size32, 12, 1, 0)
            else:
                self.pending = True
        self.groups.insert(0, group)

    def detach(self, group):
        self.groups.remove(group)
        for window in filter(None, self.tables):
            window.entries.clear()

    def release(self):
        self.process.charged -= self.upfront + self.lost + sum(w.charged for w in self.tables if w)
        self.tables = [None, None]
        for region in list(self.registered):
            self.drop(region)

    # -- the ioctls

    def ioctl(self, command, arg):
        both = {GET_INFO: self.get_info, MAP: self.map, UNMAP: self.unmap, EEH: self.eeh}
        own = {REGISTER: self.register, UNREGISTER: self.unregister, CREATE: self.create, REMOVE: self.remove} \
            if self.v2 else {ENABLE: self.enable, DISABLE: self.disable}
        call = {**both, **own}.get(command)
        if call is None:
            fail(errno.ENOTTY)
        return call(arg)

    def first(self):
        if not self.groups:
            fail(errno.ENXIO)
        return self.groups[0].tce

    def take(self, arg, form, flags=0):
        values = struct.unpack(form, self.memory.read(arg, struct.calcsize(form)))
        if values[0] < struct.calcsize(form) or values[1] & ~flags:
            fail(errno.EINVAL)
        return values

    def charge(self, pages):
        if pages and not self.process.privileged() and self.process.locked() + pages > self.process.limit_pages():
            fail(errno.ENOMEM)
        self.process.charged += pages

    def get_info(self, arg):
        """Section 3."""
        tce = self.first()
        argsz, = struct.unpack("=I", self.memory.read(arg, 16)[:4])
        if argsz < 16:
            fail(errno.EINVAL)
        ddw = self.v2 and tce.windows > 0
        data = struct.pack("=IIII", argsz, int(ddw), 0, tce.size32)
        if argsz >= 32:
            data += struct.pack("=QII", tce.pgsizes, tce.windows, tce.levels) if ddw else bytes(16)
        self.memory.write(arg, data)
        return 0

    def enable(self, _):
        """Section 4."""
        if self.enabled:
            fail(errno.EBUSY)
        if not self.groups:
            fail(errno.ENODEV)
        if self.groups[0].tce.size32 == 0:
            fail(errno.EPERM)
        pages = self.groups[0].tce.size32 // PAGE
        self.charge(pages)
        self.upfront, self.enabled = pages, True
        return 0

    def disable(self, _):
        self.process.charged -= self.upfront
        self.upfront, self.enabled = 0, False
        return 0

    def region_argument(self, arg):
        _, _, vaddr, size = self.take(arg, "=IIQQ")
        return vaddr, size

    @staticmethod
    def check_alignment(vaddr, size):
        if vaddr % PAGE or size % PAGE or (vaddr + size) % (1 << 64) < vaddr:
            fail(errno.EINVAL)

    def register(self, arg):
        """Section 5."""
        self.owned = True
        vaddr, size = self.region_argument(arg)
        self.check_alignment(vaddr, size)
        registry = self.machine.registry
        region = next((r for r in registry if (r.vaddr, r.size) == (vaddr, size)), None)
        if region in self.registered:
            fail(errno.EBUSY)
        if region is None:
            pages = size // PAGE
            self.charge(pages)
            code = next((code for at in range(vaddr, vaddr + size, PAGE)
                         if (code := self.memory.pin(at, True)[0])), 0)
            if not code and any(r.overlaps(vaddr, size) for r in registry):
                code = errno.EINVAL
            if code:
                self.process.charged -= pages
                fail(code)
            region = Region(vaddr, size, self.region_shift(vaddr, size))
            registry.append(region)
        region.users += 1
        self.registered.append(region)
        self.enabled = True
        return 0

    def region_shift(self, vaddr, size):
        lowest = (vaddr | size) & -(vaddr | size)
        return min(lowest or PAGE, self.machine.backing(vaddr, size)).bit_length() - 1

    def unregister(self, arg):
        if not self.owned:
            fail(errno.EPERM)
        vaddr, size = self.region_argument(arg)
        self.check_alignment(vaddr, size)
        region = next((r for r in self.registered if (r.vaddr, r.size) == (vaddr, size)), None)
        if region is None:
            fail(errno.ENOENT)
        if region.users == 1 and self.machine.mapped(region):
            fail(errno.EBUSY)
        self.drop(region)
        return 0

    def drop(self, region):
        self.registered.remove(region)
        region.users -= 1
        if not region.users:
            self.machine.registry.remove(region)
            self.process.charged -= region.size // PAGE

    # -- section 6

    def make_window(self, shift, size, levels):
        tce = self.groups[0].tce
        slot = next((n for n, window in enumerate(self.tables) if window is None), None)
        if slot is None:
            fail(errno.ENOSPC)
        if not tce.pgsizes >> shift & 1:
            fail(errno.EINVAL)
        if not tce.ops:
            fail(errno.EPERM)
        if not 1 <= levels <= tce.levels or bin(size).count("1") != 1:
            fail(errno.EINVAL)
        exponent = size.bit_length() - 1 - shift
        if exponent < 0:                                # smaller than a page: the model's own rule
            fail(errno.EINVAL)
        each = -(-exponent // levels)
        direct = max(8 << each, PAGE)
        current, table = max(4096, 8 << exponent), 0
        for _ in range(levels):
            table += up(current, direct)
            current = max(current // direct * 8, direct)
        pages = 2 * table // PAGE
        self.charge(pages)
        if (max(each + 3, 12) - 3) * levels + shift >= 55:
            self.lost += pages
            fail(errno.EINVAL)
        self.tables[slot] = Window(SECOND_WINDOW if slot else 0, size, shift, levels, pages)
        return self.tables[slot]

    def make_default(self):
        if self.pending:
            self.make_window(12, self.groups[0].tce.size32, 1)
            self.pending = False

    def create(self, arg):
        self.owned = True
        self.first()
        argsz, flags, shift, pad, size, levels, pad2, _ = self.take(arg, "=IIIIQIIQ")
        self.make_default()
        window = self.make_window(shift, size, levels)
        self.memory.write(arg, struct.pack("=IIIIQIIQ", argsz, flags, shift, pad, size, levels, pad2, window.start))
        return 0

    def remove(self, arg):
        self.owned = True
        self.first()
        _, _, start = self.take(arg, "=IIQ")
        if self.pending and start == 0:
            self.pending = False
            return 0
        window = self.find(start)
        if window is None:
            fail(errno.EINVAL)
        if not self.groups[0].tce.ops:
            fail(errno.EPERM)
        self.process.charged -= window.charged
        self.tables[self.tables.index(window)] = None
        return 0

    def find(self, iova):
        return next((window for window in self.tables if window and window.contains(iova)), None)

    # -- section 7

    def map(self, arg):
        if not self.enabled:
            fail(errno.EPERM)
        _, flags, vaddr, iova, size = self.take(arg, "=IIQQQ", flags=3)
        self.make_default()
        window = self.find(iova)
        if window is None:
            fail(errno.ENXIO)
        if size % window.page or vaddr % window.page:
            fail(errno.EINVAL)
        if flags & 3 == 0:
            fail(errno.EINVAL)
        if iova % window.page:
            return 1
        if iova + size > window.start + window.size:    # refused by the model: the driver would run over the end
            fail(errno.EINVAL)
        first = (iova - window.start) // window.page
        for i in range(size // window.page):
            code, region = self.page(vaddr + i * window.page, window, flags)
            if code:
                for index in range(first, first + i):
                    window.entries.pop(index, None)
                fail(code)
            window.entries[first + i] = (vaddr + i * window.page, flags, region)
        return 0

    def page(self, vaddr, window, flags):
        """Return (errno, region) of one IOMMU page."""
        if self.v2:
            region = next((r for r in self.machine.registry if r.vaddr <= vaddr
                           and vaddr + window.page <= r.vaddr + r.size), None)
            return (0, region) if region and region.shift >= window.shift else (errno.EINVAL, None)
        if self.memory.pin(vaddr, bool(flags & 2))[0]:
            return errno.EFAULT, None
        return 0, None

    def unmap(self, arg):
        if not self.enabled:
            fail(errno.EPERM)
        _, _, iova, size = self.take(arg, "=IIQQ")
        self.make_default()
        window = self.find(iova)
        if window is None:
            fail(errno.ENXIO)
        if size % window.page:
            fail(errno.EINVAL)
        if iova % window.page or iova + size > window.start + window.size:
            return 1
        first = (iova - window.start) // window.page
        for index in [i for i in window.entries if first <= i < first + size // window.page]:
            del window.entries[index]
        return 0

    # -- section 8

    def eeh(self, arg):
        for group in self.groups:
            if group.pe is None:
                fail(errno.ENODEV)
            argsz, flags, op = struct.unpack("=III", self.memory.read(arg, 12))
            if argsz < 12 or flags:
                fail(errno.EINVAL)
            if op > 9:
                fail(errno.EINVAL)
            result = group.pe.operate(op, argsz, lambda size: self.memory.read(arg, size))
            if result:
                return result
        return 0

    # -- DMA of a device

    def dma(self, group, iova, size, data=None):
        """Read bytes, or write ``data``; a refused access stops the endpoint, and is None."""
        pe, out, at = group.pe, b"", iova
        if pe and not pe.dma:
            return None
        while at < iova + size:
            window = self.find(at)
            entry = window and window.entries.get((at - window.start) // window.page)
            if not entry or data is not None and not entry[1] & 2:
                if pe:
                    pe.dma = pe.mmio = False
                return None
            offset = at % window.page
            count = min(iova + size - at, window.page - offset)
            if data is None:
                out += self.memory.read(entry[0] + offset, count)
            else:
                self.memory.write(entry[0] + offset, data[at - iova:at - iova + count])
            at += count
        return out


class SpaprMachine(Machine):
    """A PowerNV host; ``backing(vaddr, size)`` tells the size of the pages that memory is made of."""

    def __init__(self, *arguments, backing=lambda vaddr, size: PAGE, **options):
        super().__init__(*arguments, **options)
        self.backing = backing
        self.registry = []                  # of the process

    def instances(self):
        return {id(c.type1): c.type1 for c in self.containers() if c.type1}.values()

    def containers(self):
        return [group.container for group in self.groups.values() if group.container]

    def mapped(self, region):
        return any(entry[2] is region for instance in self.instances() for window in instance.tables if window
                   for entry in window.entries.values())

    def container_ioctl(self, container, command, arg):
        if command == 100:
            return 0
        if command == 101:
            return self.check_extension(container.type1, arg)
        if command == 102:
            return self.set_iommu(container, arg)
        if container.type1 is None:
            fail(errno.EINVAL)
        return container.type1.ioctl(command, arg)

    def check_extension(self, _, arg):
        if arg == EEH_EXTENSION:
            return int(any(group.pe and group.pe.on for group in self.groups.values()))
        return int(arg in (V1, V2))

    def set_iommu(self, container, arg):
        if not container.groups or container.type1:
            fail(errno.EINVAL)
        if not self.check_extension(None, arg):
            fail(errno.ENODEV)
        if arg not in (V1, V2):
            fail(errno.EINVAL)
        instance = Spapr(self, arg == V2)
        for group in container.groups:
            instance.attach(group)
        container.type1 = instance
        return 0

    def join(self, instance, group):
        instance.attach(group)

    def part(self, instance, group):
        instance.detach(group)
        if not instance.groups:
            instance.release()
