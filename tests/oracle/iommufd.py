"""What an iommufd should answer: plain lists and sets, one page at a time, written from the documented rules alone.

Every operation returns (errno or 0, what it tells).  It knows nothing of memory but which pages of an arena can be
pinned, and for writing; `Arena` says so.
"""
import errno as E

PAGE = 4096
TOP = 1 << 64
FULL = TOP - 1
HUGE = 2 << 20


class Arena:
    """Process memory that a test has laid out: page numbers (address // PAGE) that are readable, and writable."""

    def __init__(self, readable, writable):
        self.readable, self.writable = set(readable), set(writable)

    def can_pin(self, page, write):
        return page in (self.writable if write else self.readable)


class Pages:
    """One piece of user memory, however many areas show it: first page, and how often each page is held."""

    def __init__(self, page, writable):
        self.page, self.writable = page, writable
        self.held = {}


class Area:
    def __init__(self, iova, length, pages, offset, prot, small):
        self.iova, self.length, self.pages, self.offset = iova, length, pages, offset
        self.prot, self.small = prot, small

    @property
    def last(self):
        return self.iova + self.length - 1

    def numbers(self):
        """Indices of its pages in the pages object."""
        return range(self.offset // PAGE, (self.offset + self.length - 1) // PAGE + 1)


class Space:
    def __init__(self):
        self.areas = []                 # ascending
        self.allowed = []
        self.reserved = []              # (start, last, owner)
        self.small = False
        self.tables = []

    @property
    def alignment(self):
        return max([PAGE if self.small else 1, *(table.granule for table in self.tables)])

    def hit(self, start, last):
        return [area for area in self.areas if area.iova <= last and start <= area.last]

    def is_reserved(self, start, last):
        return any(first <= last and start <= end for first, end, _ in self.reserved)

    def holes(self):
        """Ranges that are not reserved."""
        found, at = [], 0
        for first, end, _ in sorted((*entry[:2], 0) for entry in self.reserved):
            if first > at:
                found.append((at, first - 1))
            at = max(at, end + 1)
        return found + ([(at, FULL)] if at <= FULL else [])


class Table:
    """A page table."""

    def __init__(self, space, unit, automatic, tracks=False):
        self.space, self.unit, self.automatic, self.tracks = space, unit, automatic, tracks
        self.granule = unit.granule
        self.tracking = False
        self.dirty = set()              # IOVAs of dirty granules
        self.devices = []


class Unit:
    """The IOMMU of a group: aperture, smallest page, reserved regions."""

    def __init__(self, aperture, granule, reserved, tracks, block=0):
        self.aperture, self.granule, self.reserved, self.tracks, self.block = aperture, granule, reserved, tracks, block


class Device:
    def __init__(self, unit):
        self.unit = unit                # devices of one group share it
        self.table = None


class Iommufd:
    """All of one /dev/iommu.  `limit`: pages that may be held, or None."""

    def __init__(self, arena, newest, limit):
        self.arena, self.newest, self.limit = arena, newest, limit
        self.objects = {}               # id -> Space, Table or Device
        self.compat = None

    # ---- objects

    def add(self, thing):
        number = next(i for i in range(1, len(self.objects) + 2) if i not in self.objects)
        self.objects[number] = thing
        return number

    def id_of(self, thing):
        return next(number for number, other in self.objects.items() if other is thing)

    def get(self, number, kind):
        thing = self.objects.get(number)
        return thing if isinstance(thing, kind) else None

    def alloc(self):
        return 0, self.add(Space())

    def destroy(self, number):
        thing = self.objects.get(number)
        if thing is None:
            return E.ENOENT, None
        if isinstance(thing, Device) or (isinstance(thing, Space) and thing.tables) \
                or (isinstance(thing, Table) and thing.devices):
            return E.EBUSY, None
        if isinstance(thing, Table):
            self.drop_table(thing)
        else:
            for area in thing.areas:
                self.let_go(thing, area)
            del self.objects[number]
            if self.compat is thing:
                self.compat = None
        return 0, None

    # ---- holding memory

    def charged(self):
        everything = {id(area.pages): area.pages for space in self.objects.values() if isinstance(space, Space)
                      for area in space.areas}
        return sum(len(pages.held) for pages in everything.values())

    def hold(self, area, already=0):
        """Pin an area's pages; `already` counts what others that are not in a space yet hold."""
        new = 0
        for n in area.numbers():
            if n not in area.pages.held:
                if not self.arena.can_pin(area.pages.page + n, area.pages.writable):
                    return E.EFAULT
                new += 1
        if self.limit is not None and new + self.charged() + already > self.limit:
            return E.ENOMEM
        for n in area.numbers():
            area.pages.held[n] = area.pages.held.get(n, 0) + 1
        return 0

    @staticmethod
    def drop(area):
        for n in area.numbers():
            area.pages.held[n] -= 1
            if not area.pages.held[n]:
                del area.pages.held[n]

    def let_go(self, space, area):
        if space.tables:
            self.drop(area)
        for table in space.tables:
            table.dirty -= set(range(area.iova, area.last + 1, table.granule))

    # ---- map

    def choose(self, space, address, length):
        """The automatic IOVA, or -errno."""
        if length >= FULL // 2:
            return -E.EOVERFLOW
        align = 1
        while align < length:
            align *= 2
        if address:
            align = min(align, address & -address)
        align = min(align, HUGE)
        if align < space.alignment:
            return -E.EINVAL
        spans = [list(span) for span in sorted(space.allowed)] or [[0, FULL]]
        for i in range(len(spans) - 1, 0, -1):
            if spans[i - 1][1] + 1 == spans[i][0]:
                spans[i - 1][1] = spans.pop(i)[1]
        used = sorted([(area.iova, area.last) for area in space.areas] + [entry[:2] for entry in space.reserved])
        for first, last in spans:
            first, last = max(first, PAGE), min(last, FULL - PAGE)
            if first > last:
                continue
            first = (first + align - 1) // align * align | address % PAGE
            if first >= last or last - first < length - 1:
                continue
            at = first
            for start, end in [*used, (last + 1, FULL)]:
                hole_last = min(start - 1, last)
                if hole_last >= at:
                    place = (at + align - 1) // align * align | address % PAGE
                    if place < hole_last and hole_last - place >= length - 1:
                        return place
                at = max(at, end + 1)
        return -E.ENOSPC

    def place(self, space, parts, length, iova, prot, fixed):
        """Make areas of [(pages, offset, length)]."""
        if not length or length % space.alignment:
            return E.EINVAL, None
        if fixed:
            if iova % space.alignment:
                return E.EINVAL, None
            if iova + length > TOP:
                return E.EOVERFLOW, None
            if space.is_reserved(iova, iova + length - 1):
                return E.EINVAL, None
            if space.hit(iova, iova + length - 1):
                return E.EEXIST, None
        else:
            iova = self.choose(space, parts[0][0].page * PAGE + parts[0][1], length)
            if iova < 0:
                return -iova, None
        for pages, offset, _ in parts:
            if prot & 2 and not pages.writable:
                return E.EPERM, None
            if offset % PAGE % space.alignment:
                return E.EINVAL, None
        at, areas = iova, []
        for pages, offset, size in parts:
            areas.append(Area(at, size, pages, offset, prot, space.small))
            at += size
        if space.tables:
            done = []
            for area in areas:
                # What an earlier one of them holds is charged too, though no space shows it yet.
                shown = {id(a.pages) for s in self.objects.values() if isinstance(s, Space) for a in s.areas}
                extra = {id(a.pages): a.pages for a in done if id(a.pages) not in shown}
                err = self.hold(area, sum(len(pages.held) for pages in extra.values()))
                if err:
                    for other in done:
                        self.drop(other)
                    return err, None
                done.append(area)
        space.areas = sorted(space.areas + areas, key=lambda area: area.iova)
        return 0, iova

    def map(self, number, flags, address, length, iova):
        if flags & ~7:
            return E.EOPNOTSUPP, None
        if FULL in (iova, length):
            return E.EOVERFLOW, None
        if not flags & 6:
            return E.EINVAL, None
        space = self.get(number, Space)
        return self.map_user(space, address, length, iova, flags & 6, flags & 1) if space else (E.ENOENT, None)

    def map_user(self, space, address, length, iova, prot, fixed):
        checks = [(address + length >= TOP, E.EOVERFLOW), (not 0 < length <= FULL - PAGE, E.EINVAL)]
        for wrong, err in checks if self.newest else reversed(checks):
            if wrong:
                return err, None
        pages = Pages(address // PAGE, bool(prot & 2))
        return self.place(space, [(pages, address % PAGE, length)], length, iova, prot, fixed)

    def copy(self, target, source, flags, length, target_iova, source_iova):
        if flags & ~7:
            return E.EOPNOTSUPP, None
        if FULL in (length, source_iova, target_iova):
            return E.EOVERFLOW, None
        if not flags & 6:
            return E.EINVAL, None
        space = self.get(source, Space)
        if not space:
            return E.ENOENT, None
        if not length:
            return E.EINVAL, None
        if source_iova + length > TOP:
            return E.EOVERFLOW, None
        at, parts = source_iova, []
        for area in space.hit(source_iova, source_iova + length - 1):
            if area.iova > at:
                return E.ENOENT, None
            end = min(area.last, source_iova + length - 1)
            parts.append((area.pages, area.offset + at - area.iova, end - at + 1))
            at = end + 1
        if at != source_iova + length:
            return E.ENOENT, None
        space = self.get(target, Space)
        if not space:
            return E.ENOENT, None
        return self.place(space, parts, length, target_iova, flags & 6, flags & 1)

    # ---- unmap

    def remove(self, space, start, last):
        """(errno, bytes removed)"""
        removed = 0
        for area in space.hit(start, last):
            if area.iova < start or area.last > last:
                return E.ENOENT, removed
            self.let_go(space, area)
            space.areas.remove(area)
            removed += area.length
        return 0, removed

    def unmap(self, number, iova, length):
        space = self.get(number, Space)
        if not space:
            return E.ENOENT, None
        if (iova, length) == (0, FULL):
            return self.remove(space, 0, FULL)
        if FULL in (iova, length):
            return E.EOVERFLOW, None
        if not length:
            return E.EINVAL, None
        if iova + length > TOP:
            return E.EOVERFLOW, None
        err, removed = self.remove(space, iova, iova + length - 1)
        return err or (0 if removed else E.ENOENT), removed

    # ---- the VFIO dialect

    def set_compat(self, number):
        space = self.get(number, Space)
        if not space:
            return E.ENOENT, None
        self.compat = space
        return 0, None

    def compat_set_iommu(self, kind):
        if kind not in (1, 3):
            return E.EINVAL, None
        if not self.compat:
            return E.ENODEV, None
        return self.huge_pages(self.id_of(self.compat), 0) if kind == 1 else (0, None)

    def compat_map(self, flags, address, iova, length):
        if flags & ~3:
            return E.EINVAL, None
        if not self.compat:
            return E.ENODEV, None
        prot = (4 if flags & 1 else 0) | (flags & 2)
        return self.map_user(self.compat, address, length, iova, prot, True)[0], None

    def cut(self, space, at):
        """Make an area end at `at`."""
        area = next(iter(space.hit(at, at)), None)
        if area is None or area.last == at:
            return 0
        length = at - area.iova + 1
        if (at + 1) % space.alignment or (area.offset + length) % PAGE % space.alignment:
            return E.EINVAL
        if space.tables and not space.small:
            return E.EINVAL
        rest = Area(at + 1, area.length - length, area.pages, area.offset + length, area.prot, area.small)
        if space.tables:
            self.drop(area)
        area.length = length
        if space.tables:
            # What was held stays: no limit or fault can come in between.
            for part in (area, rest):
                for n in part.numbers():
                    part.pages.held[n] = part.pages.held.get(n, 0) + 1
        space.areas = sorted([*space.areas, rest], key=lambda entry: entry.iova)
        return 0

    def compat_unmap(self, flags, iova, length):
        """(errno, the size that is written back, or None)"""
        if flags & ~2:
            return E.EINVAL, None
        if not self.compat:
            return E.ENODEV, None
        if flags:
            return (E.EINVAL, None) if iova or length else self.remove(self.compat, 0, FULL)
        if self.compat.small:
            err = self.cut(self.compat, (iova + length - 1) % TOP)
            if not err and iova:
                err = self.cut(self.compat, iova - 1)
            if err:
                return err, None
        if not length:
            return E.EINVAL, 0
        if iova + length > TOP:
            return E.EOVERFLOW, 0
        return self.remove(self.compat, iova, iova + length - 1)

    # ---- ranges and options

    def allow(self, number, ranges):
        space = self.get(number, Space)
        if not space:
            return E.ENOENT, None
        for i, (start, last) in enumerate(ranges):
            if start >= last or any(a <= last and start <= b for a, b in ranges[:i]):
                return E.EINVAL, None
        if any(space.is_reserved(*given) for given in ranges):
            return E.EADDRINUSE, None
        space.allowed = list(ranges)
        return 0, None

    def ranges(self, number):
        space = self.get(number, Space)
        return (0, (space.holes(), space.alignment)) if space else (E.ENOENT, None)

    def huge_pages(self, number, value):
        space = self.get(number, Space)
        if not space:
            return E.ENOENT, None
        if value > 1:
            return E.EINVAL, None
        if value == 0 and not space.small:
            if space.tables and space.areas:
                return E.EINVAL, None
            if self.breaks(space, PAGE):
                return E.EADDRINUSE, None
        space.small = not value
        return 0, None

    @staticmethod
    def breaks(space, alignment):
        return alignment > space.alignment and any(
            (area.iova | area.length | area.offset % PAGE) % alignment for area in space.areas)

    # ---- page tables

    def reserve(self, space, ranges, owner):
        for start, last in ranges:
            if space.hit(start, last) or any(a <= last and start <= b for a, b in space.allowed):
                self.unreserve(space, owner)
                return E.EADDRINUSE
            space.reserved.append((start, last, owner))
        return 0

    @staticmethod
    def unreserve(space, owner):
        space.reserved = [entry for entry in space.reserved if entry[2] is not owner]

    def fill(self, table):
        space, (first, last) = table.space, table.unit.aperture
        if table.granule > PAGE:
            return E.EINVAL
        if self.breaks(space, table.granule):
            return E.EADDRINUSE
        outside = ([(0, first - 1)] if first else []) + ([(last + 1, FULL)] if last != FULL else [])
        err = self.reserve(space, outside, table)
        if err:
            return err
        if not space.tables:
            done = []
            for area in space.areas:
                err = self.hold(area)
                if err:
                    for other in done:
                        self.drop(other)
                    self.unreserve(space, table)
                    return err
                done.append(area)
        space.tables.append(table)
        return 0

    def drop_table(self, table):
        space = table.space
        del self.objects[self.id_of(table)]
        if table in space.tables:
            space.tables.remove(table)
            self.unreserve(space, table)
            if not space.tables:
                for area in space.areas:
                    self.drop(area)

    def bind(self, device):
        return self.add(device)

    def group(self, device):
        return [other for other in self.objects.values() if isinstance(other, Device) and other.unit is device.unit]

    def enter(self, device, table):
        """Attach a device that is nowhere, or move its group."""
        if device.table is table:
            return 0
        moved = [other for other in self.group(device) if other.table] if device.table else [device]
        if not device.table and any(other.table not in (None, table) for other in self.group(device)):
            return E.EINVAL
        old = device.table
        if not old or old.space is not table.space:
            for i, other in enumerate(moved):
                err = self.reserve(table.space, other.unit.reserved, other)
                if err:
                    for undone in moved[:i]:
                        self.unreserve(table.space, undone)
                    return err
        if table.unit is not device.unit and (
                table.unit.aperture != device.unit.aperture or table.granule != device.unit.granule
                or (table.tracks and not device.unit.tracks)):
            if not old or old.space is not table.space:
                for other in moved:
                    self.unreserve(table.space, other)
            return E.EINVAL
        for other in moved:
            if old and old.space is not table.space:
                self.unreserve(old.space, other)
            if old:
                old.devices.remove(other)
            table.devices.append(other)
            other.table = table
        if old and old.automatic and not old.devices:
            self.drop_table(old)
        return 0

    def attach(self, device, number):
        target = self.objects.get(number)
        if target is None:
            return E.ENOENT, None
        if isinstance(target, Device):
            return E.EINVAL, None
        if isinstance(target, Table):
            err = self.enter(device, target)
            return err, None if err else self.id_of(target)
        for table in [table for table in target.tables if table.automatic]:
            err = self.enter(device, table)
            if err != E.EINVAL:
                return err, None if err else self.id_of(table)
        table = Table(target, device.unit, False)
        self.add(table)
        if device.table:
            err = self.fill(table) or self.enter(device, table)
        else:
            err = self.enter(device, table)
            if not err:
                err = self.fill(table)
                if err:
                    self.detach(device)
        if err:
            self.drop_table(table)
            return err, None
        table.automatic = True
        return 0, self.id_of(table)

    def detach(self, device):
        table = device.table
        if table:
            device.table = None
            table.devices.remove(device)
            self.unreserve(table.space, device)
            if table.automatic and not table.devices:
                self.drop_table(table)
        return 0, None

    def hwpt_alloc(self, device_number, number, flags):
        device, space = self.get(device_number, Device), self.get(number, Space)
        if not device:
            return E.ENOENT, None
        if not space:
            # On a page table this would be a nested one, which needs data.
            return (E.EOPNOTSUPP if self.get(number, Table) else E.EINVAL), None
        if flags & ~(10 if self.newest else 2) or (flags & 2 and not device.unit.tracks):
            return E.EOPNOTSUPP, None
        table = Table(space, device.unit, False, bool(flags & 2))
        self.add(table)
        err = self.fill(table)
        if err:
            self.drop_table(table)
            return err, None
        return 0, self.id_of(table)

    # ---- dirty tracking

    def set_dirty(self, number, on):
        table = self.get(number, Table)
        if not table:
            return E.ENOENT, None
        if not table.tracks:
            return E.EOPNOTSUPP, None
        if on:
            table.dirty.clear()
        table.tracking = bool(on)
        return 0, None

    def write(self, device, iova, size):
        """A device writes; returns the bytes that arrive."""
        done = 0
        while done < size and device.table:
            area = next(iter(device.table.space.hit(iova + done, iova + done)), None)
            if area is None or not area.prot & 2:
                break
            part = min(size - done, area.last - (iova + done) + 1)
            if device.table.tracking:
                first = (iova + done) // device.table.granule * device.table.granule
                device.table.dirty |= set(range(first, iova + done + part, device.table.granule))
            done += part
        return done

    def get_dirty(self, number, iova, length, page_size, clear):
        """(errno, set of bit numbers)"""
        table = self.get(number, Table)
        if not table:
            return E.ENOENT, None
        if not length and not self.newest:
            return E.EINVAL, None
        if iova and (length - 1) % TOP + iova > FULL:
            return E.EOVERFLOW, None
        last = (iova + length - 1) % TOP
        if iova % table.space.alignment or (last + 1) % table.space.alignment or not page_size:
            return E.EINVAL, None
        if iova & (page_size - 1) or (last + 1) & (page_size - 1):
            return E.EINVAL, None
        if not table.tracks:
            return E.EOPNOTSUPP, None
        generic = table.unit.block and self.newest
        if not table.tracking and not generic:
            return 0, set()
        bits, at, shift = set(), iova, (page_size & -page_size).bit_length() - 1
        while at <= last:
            area = next(iter(table.space.hit(at, at)), None)
            if area is None:
                break
            end = min(area.last, last)
            for start, size in self.entries(table, area, generic):
                pages = range(start, start + size, table.granule)
                if start > end or start + size <= at or not any(page in table.dirty for page in pages):
                    continue
                low, high = max(start, at), min(start + size - 1, end)
                if size > table.granule and (low, high) == (start, start + size - 1):
                    high -= table.granule
                if clear:
                    table.dirty -= set(pages)
                bits |= set(range((low - iova) >> shift, ((high - iova) >> shift) + 1))
            at = end + 1
        return 0, bits

    @staticmethod
    def entries(table, area, generic):
        """(IOVA, size) of the page-table entries of an area, blocks of contiguous ones as one."""
        block = min(table.unit.block, PAGE) if area.small else table.unit.block
        if not generic or block <= table.granule or (area.iova ^ (area.pages.page * PAGE + area.offset)) % block:
            block = table.granule
        at = area.iova
        while at <= area.last:
            size = block if at % block == 0 and at + block - 1 <= area.last else table.granule
            yield at, size
            at += size
