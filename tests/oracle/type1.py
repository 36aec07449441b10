"""One Type1 instance: the mappings of a container and its ioctls.

Source: type1.md 1, 4-12, 14, 16.  Argument structs are read from and written to user memory at ``arg``.
"""
import errno
import os
import struct

from . import ranges
from .dirty import DirtyWords
from .memory import PAGE, USER_END

TOP = (1 << 64) - 1
MAX_BITMAP_BYTES = 1 << 28
MAX_PAGES = (1 << 31) - 1
READ, WRITE, VADDR = 1, 2, 4                            # MAP_DMA
GET_DIRTY, ALL, UNMAP_VADDR = 1, 2, 4                   # UNMAP_DMA
START, STOP, GET_BITMAP = 1, 2, 4                       # DIRTY_PAGES
MAX_PINS = PAGE // 8


def fail(number):
    raise OSError(number, os.strerror(number))


class WouldBlock(Exception):
    """Old kernels wait here until every vaddr is valid again."""


class Mapping:
    def __init__(self, iova, vaddr, size, prot, process):
        self.iova, self.vaddr, self.size, self.prot = iova, vaddr, size, prot
        self.owner = process
        self.lock_cap = process.privileged()
        self.iommu_mapped = False
        self.vaddr_invalid = False
        self.charged = 0                                # pages
        self.pins = {}                                  # iova -> references
        self.free_pins = set()                          # those that cost nothing (the zero page)
        self.bits = None

    @property
    def last(self):
        return self.iova + self.size - 1


class Domain:
    """Groups behind one I/O page table."""

    def __init__(self, group):
        self.groups = [group]
        self.aperture = group.aperture
        self.pgsizes = group.pgsizes
        self.coherent = group.coherent

    def takes(self, group):
        """Groups share a domain when they see the same aperture, page sizes and coherency."""
        return (self.aperture, self.pgsizes, self.coherent) == (group.aperture, group.pgsizes, group.coherent)


class Type1:
    def __init__(self, machine, v2, nesting=False):
        self.machine, self.kernel, self.memory = machine, machine.kernel, machine.memory
        self.v2, self.nesting = v2, nesting
        self.mappings = []                              # ascending iova
        self.domains = []                               # newest first
        self.emulated = []
        self.iova_ranges = []
        self.pgsizes = ranges.page_sizes([], PAGE)
        self.avail = machine.dma_entry_limit
        self.tracking = False
        self.unpinned_scope = set()                     # groups that make everything dirty

    # -- the mappings

    @property
    def min_pg(self):
        return self.pgsizes & -self.pgsizes

    @property
    def invalid(self):
        return sum(m.vaddr_invalid for m in self.mappings)

    def lost(self, m):
        """A mapping that ends at 2**64 cannot be found by address in old kernels."""
        return m.last == TOP and not self.kernel.top_works

    def find(self, first, last):
        """Return the first mapping that overlaps, as the kernel's tree search sees it."""
        if last == TOP and not self.kernel.top_works:
            return None
        return next((m for m in self.mappings if m.iova <= last and first <= m.last and not self.lost(m)), None)

    def remove(self, m):
        self.drop_pins(m)
        self.charge(m, -m.charged)
        self.mappings.remove(m)
        self.avail += 1

    def remove_all(self):
        for m in list(self.mappings):
            self.remove(m)

    def charge(self, m, npages):
        m.charged += npages
        m.owner.charged += npages

    def over_limit(self, m, npages):
        return not m.lock_cap and m.owner.locked() + npages > m.owner.limit_pages()

    def pin(self, m):
        """Pin the whole mapping and charge it: 0 or errno, without a trace on failure."""
        count = 0
        for index in range(m.size // PAGE):
            error, zero = self.memory.pin(m.vaddr + index * PAGE, bool(m.prot & WRITE))
            if error:
                return error
            if m.iova + index * PAGE in m.pins or (zero and self.kernel.zero_page):
                continue
            if self.over_limit(m, count + 1):
                self.populate_batch(m, index)
                return errno.ENOMEM
            count += 1
        self.charge(m, count)
        return 0

    def populate_batch(self, m, index):
        """The rest of the batch that a page is of is populated with it."""
        batch = self.kernel.pin_batch
        for page in range(index + 1, min((index // batch + 1) * batch, m.size // PAGE)):
            if self.memory.pin(m.vaddr + page * PAGE, bool(m.prot & WRITE))[0]:
                break

    # -- GET_INFO

    def get_info(self, arg):
        argsz, = struct.unpack_from("I", self.memory.read(arg, 16))
        if argsz < 16:
            fail(errno.EINVAL)
        blobs = [blob for blob in map(self.capability, self.kernel.capabilities) if blob]
        chain, offset = b"", 24
        for index, (number, body) in enumerate(blobs):
            size = 8 + len(body)
            size += -size % self.kernel.capability_align
            following = 0 if index == len(blobs) - 1 else offset + size
            chain += (struct.pack("HHI", number, 1, following) + body).ljust(size, b"\0")
            offset += size
        cap_offset = 0
        if chain:
            if argsz < offset:
                argsz_out = offset
            else:
                argsz_out, cap_offset = argsz, 24
                self.memory.write(arg + 24, chain)
        else:
            argsz_out = argsz
        info = struct.pack("IIQII", argsz_out, 3 if chain else 1, self.pgsizes, cap_offset, 0)
        sizes = self.kernel.info_sizes
        # The size is chosen by the argsz that came in.
        size = min(argsz, 24) if sizes is None else max(size for size in sizes if size <= argsz)
        self.memory.write(arg, info[:size])
        return 0

    def capability(self, number):
        if number == 2:
            return number, struct.pack("IIQQ", 0, 0, self.min_pg, MAX_BITMAP_BYTES)
        if number == 3:
            return number, struct.pack("I", self.avail)
        if not self.iova_ranges:
            return None
        return number, struct.pack("II", len(self.iova_ranges), 0) + b"".join(
            struct.pack("QQ", *pair) for pair in self.iova_ranges)

    # -- MAP_DMA

    def map_dma(self, arg):
        argsz, flags, vaddr, iova, size = struct.unpack("IIQQQ", self.memory.read(arg, 32))
        prot = flags & (READ | WRITE)
        if argsz < 32 or flags & ~self.kernel.map_flags or size == 0:
            fail(errno.EINVAL)
        wraps = iova + size - 1 > TOP or vaddr + size - 1 > TOP
        if wraps and self.kernel.wrap == errno.EOVERFLOW:
            fail(errno.EOVERFLOW)
        if bool(prot) == bool(flags & VADDR) or (size | iova | vaddr) % self.min_pg or wraps:
            fail(errno.EINVAL)
        found = self.find(iova, iova + size - 1)
        if flags & VADDR:
            return self.update_vaddr(found, vaddr, iova, size)
        if found:
            fail(errno.EEXIST)
        if self.avail == 0:
            fail(errno.ENOSPC)
        if self.iova_ranges and not any(a <= iova and iova + size - 1 <= b for a, b in self.iova_ranges):
            fail(errno.EINVAL)
        m = Mapping(iova, vaddr, size, prot, self.machine.process)
        if self.domains:
            error = self.pin(m)
            if error:
                fail(error)
            m.iommu_mapped = True
        if self.tracking:
            if size // self.min_pg > MAX_PAGES:
                self.charge(m, -m.charged)
                fail(errno.EINVAL)
            m.bits = DirtyWords(size // self.min_pg)
        self.mappings.append(m)
        self.mappings.sort(key=lambda m: m.iova)
        self.avail -= 1
        return 0

    def update_vaddr(self, m, vaddr, iova, size):
        if m is None:
            fail(errno.ENOENT)
        if not m.vaddr_invalid or (m.iova, m.size) != (iova, size):
            fail(errno.EINVAL)
        caller = self.machine.process
        if self.kernel.owner_moves and caller is not m.owner:
            if not caller.privileged() and caller.locked() + m.charged > caller.limit_pages():
                fail(errno.ENOMEM)
            caller.charged += m.charged
            m.owner.charged -= m.charged
            m.owner, m.lock_cap = caller, caller.privileged()
        m.vaddr, m.vaddr_invalid = vaddr, False
        return 0

    # -- UNMAP_DMA

    def unmap_dma(self, arg):
        argsz, flags, iova, size = struct.unpack("IIQQ", self.memory.read(arg, 24))
        if argsz < 24 or flags & ~self.kernel.unmap_flags:
            fail(errno.EINVAL)
        data = pgsize = None
        if flags & GET_DIRTY:
            if flags & (ALL | UNMAP_VADDR) or argsz < 48:
                fail(errno.EINVAL)
            pgsize, bitmap_size, data = struct.unpack("QQQ", self.memory.read(arg + 24, 24))
            self.check_bitmap(size, pgsize, bitmap_size, data)
        if flags & UNMAP_VADDR and self.emulated and self.kernel.vaddr_needs_real:
            fail(errno.EBUSY)
        if iova % self.min_pg:
            fail(errno.EINVAL)
        if flags & ALL:
            if iova or size:
                fail(errno.EINVAL)
            last = TOP
        else:
            if size == 0 or size % self.min_pg:
                fail(errno.EINVAL)
            last = iova + size - 1
            if last > TOP:
                fail(self.kernel.wrap)
        if flags & GET_DIRTY and (not self.tracking or pgsize != self.min_pg):
            fail(errno.EINVAL)
        if self.v2 and not flags & ALL:
            self.check_bisect(iova, last)
        done = self.walk(flags, iova, last, data)
        self.memory.write(arg, struct.pack("IIQQ", argsz, flags, iova, done))
        return 0

    def check_bisect(self, iova, last):
        m = self.find(iova, iova)
        if m and m.iova < iova:
            fail(errno.EINVAL)
        m = self.find(last, last)
        if m and m.last > last:
            fail(errno.EINVAL)

    def walk(self, flags, iova, last, data):
        """Remove or invalidate the mappings of a range; return their bytes."""
        if flags & ALL:
            todo = list(self.mappings)
        elif last == TOP and not self.kernel.top_works:
            todo = []
        else:
            todo = [m for m in self.mappings if m.last >= iova and m.iova <= last and not self.lost(m)]
        done, marked = 0, []
        for m in todo:
            if not self.v2 and m.iova < iova:
                break
            if flags & UNMAP_VADDR:
                if m.vaddr_invalid:
                    for other in marked:
                        other.vaddr_invalid = False
                    fail(errno.EINVAL)
                m.vaddr_invalid = True
                marked.append(m)
            else:
                self.drop_pins(m)
                if flags & GET_DIRTY:
                    self.copy_out(m, data, iova)
                self.remove(m)
            done += m.size
        return done

    # -- DIRTY_PAGES

    def dirty_pages(self, arg):
        if not self.kernel.dirty:
            fail(errno.ENOTTY)
        if not self.v2:
            fail(errno.EACCES)
        argsz, flags = struct.unpack("II", self.memory.read(arg, 8))
        if argsz < 8 or flags not in (START, STOP, GET_BITMAP):
            fail(errno.EINVAL)
        if flags == START:
            if not self.tracking:
                if any(m.size // self.min_pg > MAX_PAGES for m in self.mappings):
                    fail(errno.EINVAL)
                self.tracking = True
                for m in self.mappings:
                    m.bits = DirtyWords(m.size // self.min_pg)
                    m.bits.reseed(self.pinned_bits(m))
        elif flags == STOP:
            self.tracking = False
            for m in self.mappings:
                m.bits = None
        else:
            self.get_bitmap(arg, argsz)
        return 0

    def get_bitmap(self, arg, argsz):
        if argsz - 8 < 40:
            fail(errno.EINVAL)
        iova, size, pgsize, bitmap_size, data = struct.unpack("QQQQQ", self.memory.read(arg + 8, 40))
        if size == 0:
            fail(errno.EINVAL)
        last = iova + size - 1
        if last > TOP or (last == TOP and not self.kernel.top_works):
            fail(self.kernel.wrap)
        self.check_bitmap(size, pgsize, bitmap_size, data)
        if pgsize != self.min_pg or iova % self.min_pg or size % self.min_pg or not self.tracking:
            fail(errno.EINVAL)
        self.check_bisect(iova, last)
        for m in self.mappings:
            if iova <= m.iova <= last:
                self.copy_out(m, data, iova)
                m.bits.reseed(self.pinned_bits(m))

    def check_bitmap(self, size, pgsize, bitmap_size, data):
        if data + bitmap_size > USER_END:
            fail(errno.EINVAL)
        npages = size // (pgsize & -pgsize) if pgsize else 0
        if npages == 0 or not 0 < bitmap_size <= MAX_BITMAP_BYTES or bitmap_size < (npages + 63) // 64 * 8:
            fail(errno.EINVAL)

    def pinned_bits(self, m):
        return [(iova - m.iova) // self.min_pg for iova in m.pins]

    def copy_out(self, m, data, base):
        if self.unpinned_scope and m.iommu_mapped:
            m.bits.set(0, m.bits.nbits)
        m.bits.copy_out(self.memory, data, (m.iova - base) // self.min_pg)

    def all_dirty(self):
        for m in self.mappings:
            m.bits.set(0, m.bits.nbits)

    # -- external pins and DMA of emulated groups

    def wait_for_vaddrs(self, mappings):
        if self.kernel.vaddr_busy:
            if self.invalid:
                fail(errno.EBUSY)
        elif any(m.vaddr_invalid for m in mappings):
            raise WouldBlock

    def pin_pages(self, group, iova, npages, prot):
        """A device of ``group`` pins; return the number of pages."""
        if npages == 0:
            fail(errno.EINVAL)
        if npages > MAX_PINS:
            fail(errno.E2BIG)
        if npages < 0:
            fail(errno.EINVAL)
        if not self.v2:
            fail(errno.EACCES)
        if self.kernel.pin_wrap_checked and iova + npages * PAGE - 1 > TOP:
            fail(errno.EOVERFLOW)
        pages = [(iova + index * PAGE) & TOP for index in range(npages)]
        self.wait_for_vaddrs(m for m in map(self.holder, pages) if m)
        done = []
        try:
            for page in pages:
                self.pin_page(page, prot)
                done.append(page)
        except OSError:
            for page in reversed(done):
                self.unpin_page(page)
            raise
        if group in self.unpinned_scope:
            self.unpinned_scope.remove(group)
        return npages

    def holder(self, page):
        return self.find(page, page)

    def pin_page(self, page, prot):
        m = self.holder(page)
        if m is None:
            fail(errno.EINVAL)
        if m.prot & prot != prot:
            fail(errno.EPERM)
        if page not in m.pins:
            # The page is pinned with the rights of the mapping, not with those asked for.
            error, zero = self.memory.pin(m.vaddr + page - m.iova, bool(m.prot & WRITE))
            if error:
                fail(error)
            if zero and self.kernel.zero_page:
                m.free_pins.add(page)
            elif not m.iommu_mapped:
                if self.over_limit(m, 1):
                    fail(errno.ENOMEM)
                self.charge(m, 1)
            m.pins[page] = 0
            if m.bits:
                m.bits.set((page - m.iova) // self.min_pg)
        m.pins[page] += 1

    def unpin_page(self, page):
        m = self.holder(page)
        if m is None or page not in m.pins:
            return
        m.pins[page] -= 1
        if m.pins[page] == 0:
            self.forget_pin(m, page)

    def forget_pin(self, m, page):
        del m.pins[page]
        if page not in m.free_pins and not m.iommu_mapped:
            self.charge(m, -1)
        m.free_pins.discard(page)

    def unpin_pages(self, iova, npages):
        for index in range(npages):
            self.unpin_page((iova + index * PAGE) & TOP)

    def drop_pins(self, m):
        """The devices' unmap callbacks: they unpin whatever they hold."""
        for page in list(m.pins):
            self.forget_pin(m, page)

    def dma_rw(self, iova, data=None, size=0):
        """Write ``data``, or read ``size`` bytes, as an emulated device does."""
        out, count = b"", len(data) if data is not None else size
        while count:
            m = self.holder(iova)
            self.wait_for_vaddrs([m] if m else [])
            if m is None:
                fail(errno.EINVAL)
            if m.prot & READ == 0 or (data is not None and m.prot & WRITE == 0):
                fail(errno.EPERM)
            chunk = min(count, m.last - iova + 1)
            vaddr = m.vaddr + iova - m.iova
            if data is not None:
                self.memory.write(vaddr, data[:chunk])
                data = data[chunk:]
                if m.bits:
                    first, last = ((at - m.iova) // self.min_pg for at in (iova, iova + chunk - 1))
                    m.bits.set(first, last - first + 1)
            else:
                out += self.memory.read(vaddr, chunk)
            iova, count = iova + chunk, count - chunk
        return out
