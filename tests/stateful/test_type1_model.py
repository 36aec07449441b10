"""The software VFIO against the oracle: random scripts over the raw door, every answer and every byte compared.

A failing example prints the whole script with what the oracle answered.
"""
import random

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from oracle import KERNELS
from oracle.memory import PAGE, USER_END
from oracle.twin import DATA_PAGES, Memory, Twin

MEMORY = Memory()
TOP = 1 << 64
BASE = 0x100000
M4 = 0x400000

# A small pool of addresses, so that collisions are frequent; the bitmap's words begin at pages 0, 64 and 128 of it.
POOL_PAGES = [0, 1, 2, 3, 4, 5, 8, 31, 60, 62, 63, 64, 65, 66, 70, 100, 126, 127, 128]
POOL_COUNTS = [1, 1, 2, 2, 3, 4, 8, 60, 64, 65, 70]
PAGES, COUNTS = st.sampled_from(POOL_PAGES), st.sampled_from(POOL_COUNTS)
EDGES = [0, BASE, 0xfedfc000, 0xfee00000, 0xfffff000, 1 << 32, (1 << 39) - 4 * PAGE, 1 << 39, TOP - 4 * PAGE,
         TOP - PAGE]
SKEW = st.sampled_from([0] * 30 + [1, 0x200, 0x800])

APERTURES = [(0, (1 << 39) - 1), (0, (1 << 39) - 1), (0, 0xffffffff), (BASE, (1 << 39) - 1), (BASE + 4 * PAGE,
                                                                                              (1 << 48) - 1),
             (0, BASE + 64 * PAGE - 1), (0, TOP - 1), (M4, (1 << 39) - 1)]
RESERVED = [[], [(0xfee00000, 0xfeefffff)], [(0xfee00000, 0xfeefffff)], [(BASE + 5 * PAGE, BASE + 7 * PAGE - 1)],
            [(0, BASE - 1), (BASE + 100 * PAGE, BASE + 120 * PAGE - 1)], [((1 << 39) - 2 * PAGE, (1 << 39) - 1)]]
PGSIZES = [0x40201000, 0x40201000, 0x1000, 0x201000, 0xfffffffffffff000, 0x40201e00]

GROUPS = st.sampled_from(["g0", "g1", "g2", "g3", "g4"])
CONTAINERS = st.sampled_from(["c0", "c0", "c0", "c1"])

ordinary = st.one_of(st.just({"nestable": True}), st.fixed_dictionaries({
    "aperture": st.sampled_from(APERTURES), "reserved": st.sampled_from(RESERVED), "pgsizes": st.sampled_from(PGSIZES),
    "coherent": st.sampled_from([True, True, True, False]), "msi_isolated": st.sampled_from([True] * 7 + [False]),
    "nestable": st.sampled_from([True, True, False])}))

#: A range: ("pool", base, first page, pages), or ("mapping", index, pages more at the start, pages more at the end).
RANGES = st.one_of(
    st.tuples(st.just("pool"), st.just(BASE), PAGES, COUNTS),
    st.tuples(st.just("pool"), st.sampled_from(EDGES), st.integers(0, 4), st.sampled_from([1, 1, 2, 4, 8])),
    st.tuples(st.just("mapping"), st.integers(0, 5), st.sampled_from([0, 0, 0, 0, 1, -1, 3]),
              st.sampled_from([0, 0, 0, 0, 1, -1, 60])),
    st.tuples(st.just("mapping"), st.integers(0, 5), st.sampled_from([0, 0, 0, 0, 1, -1, 3]),
              st.sampled_from([0, 0, 0, 0, 1, -1, 60])))
FILLS = st.sampled_from([0, 0, 0x5a, 0xff])
VADDRS = st.one_of(
    st.integers(0, DATA_PAGES - 1).map(lambda page: MEMORY.data + page * PAGE),
    st.integers(0, 8).map(lambda page: MEMORY.data + page * PAGE),
    st.integers(0, 3).map(lambda page: MEMORY.readonly + page * PAGE),
    st.sampled_from([0, PAGE, USER_END - PAGE, USER_END, TOP - PAGE, TOP - 4 * PAGE]))


class Type1Model(RuleBasedStateMachine):
    twin = None

    @initialize(kernel=st.sampled_from(list(KERNELS)), g0=ordinary, g1=ordinary, g2=ordinary, same=st.booleans(),
                members=st.lists(GROUPS, min_size=1, max_size=4, unique=True), kind=st.sampled_from([3, 3, 3, 3, 3, 1,
                                                                                                     6]),
                entries=st.sampled_from([65535] * 6 + [1, 4]), early=st.booleans())
    def start(self, kernel, g0, g1, g2, same, members, kind, entries, early):
        emulated = {"emulated": True}
        self.twin = Twin(MEMORY, kernel, {0: g0, 1: g0 if same else g1, 2: g2, 3: emulated, 4: emulated})
        self.twin.entry_limit(entries)
        for name in ("c0", "c1", "g0", "g1", "g2", "g3", "g4"):
            self.twin.open(name)
        for name in members if early else members[:1]:
            self.twin.set_container(name, "c0")
        self.twin.set_iommu("c0", kind)
        for name in [] if early else members[1:]:
            self.twin.set_container(name, "c0")
        self.ready("c0")

    def teardown(self):
        if self.twin:
            note("\n".join(self.twin.script))
            self.twin.finish()

    def has(self, name):
        return name in self.twin.fds

    def ready(self, container):
        """See that the container is open and has a driver; return its instance."""
        twin = self.twin
        if not self.has(container):
            twin.open(container)
        for group in ("g0", "g3", "g1", "g4", "g2"):
            if twin.instance(container):
                break
            if not self.has(group):
                twin.open(group)
            if self.has(group):
                twin.set_container(group, container)
                twin.set_iommu(container, 3)
        return twin.instance(container)

    def mappings(self, container):
        type1 = self.has(container) and self.twin.instance(container)
        return type1.mappings if type1 else []

    def resolve(self, container, where):
        """Turn a drawn range into (iova, size); it may wrap or be empty."""
        kind, first, start, end = where
        if kind == "pool":
            return (first + start * PAGE) % TOP, end * PAGE
        mappings = self.mappings(container)
        if not mappings:
            return BASE, PAGE
        m = mappings[first % len(mappings)]
        iova = (m.iova - start * PAGE) % TOP
        return iova, (m.size + (start + end) * PAGE) % TOP

    # -- groups and containers

    @rule(name=st.sampled_from(["c0", "c1", "g0", "g1", "g2", "g3", "g4", "d0", "d1", "d2", "d3", "d4"]),
          really=st.integers(0, 3))
    def open_or_close(self, name, really):
        if self.has(name) and (really == 0 or name[0] == "d"):
            self.twin.close(name)
        elif name[0] != "d" and (name[0] == "g" or not self.has(name)):
            self.twin.open(name)

    @rule(group=GROUPS, container=st.sampled_from(["c0", "c0", "c0", "c0", "c1", "g", -1, 0, 12345]))
    def set_container(self, group, container):
        container = group if container == "g" else container
        if self.has(group) and (container not in ("c0", "c1") or self.has(container)):
            self.twin.set_container(group, container)

    @rule(group=GROUPS)
    def unset_container(self, group):
        if self.has(group):
            self.twin.unset_container(group)

    @rule(group=GROUPS, name=st.sampled_from([None, None, None, "", "0000:00:99.0", "x" * 4000]))
    def get_device(self, group, name):
        if self.has(group) and not self.has("d" + group[1:]):
            self.twin.get_device(group, name)

    @rule(container=CONTAINERS, kind=st.sampled_from([0, 1, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1 << 32, TOP - 1]))
    def set_iommu(self, container, kind):
        if self.has(container):
            self.twin.set_iommu(container, kind)

    @rule(container=CONTAINERS, group=GROUPS, what=st.integers(0, 2),
          number=st.one_of(st.integers(0, 11), st.sampled_from([1 << 32 | 1, TOP - 1])),
          command=st.sampled_from([99, 100, 107, 108, 109, 111, 115, 116, 118]))
    def ask(self, container, group, what, number, command):
        if what == 0 and self.has(container):
            self.twin.check_extension(container, number)
        elif what == 1 and self.has(group):
            self.twin.get_status(group, number % 12)
        elif what == 2:
            for name in (container, group):
                if self.has(name):
                    self.twin.plain(name, command, 0)

    # -- Type1

    @rule(container=CONTAINERS, argsz=st.integers(0, 160), tail=st.one_of(st.none(), st.integers(0, 160)))
    def get_info(self, container, argsz, tail):
        if self.has(container):
            self.twin.get_info(container, argsz, tail)

    @rule(container=CONTAINERS, where=RANGES, vaddr=VADDRS, skew=SKEW, argsz=st.sampled_from([32] * 12 + [0, 31, 33,
                                                                                                          4096]),
          flags=st.sampled_from([3, 3, 3, 3, 3, 1, 2, 4, 0, 7, 5, 8]), tail=st.sampled_from([None] * 12 + [31, 32, 8]))
    def map_dma(self, container, where, vaddr, skew, argsz, flags, tail):
        if self.has(container):
            iova, size = self.resolve(container, where)
            self.twin.map_dma(container, iova + skew if skew & 1 else iova, vaddr + (skew & 0x200),
                              size | skew & 0x800, flags,
                              argsz, tail)

    @rule(container=CONTAINERS, first=PAGES, npages=COUNTS, vaddr=st.integers(0, 90), flags=st.sampled_from([1, 2, 3,
                                                                                                             3]))
    def map_in_pool(self, container, first, npages, vaddr, flags):
        self.ready(container)
        self.twin.map_dma(container, BASE + first * PAGE, MEMORY.data + vaddr * PAGE, npages * PAGE, flags)

    @rule(container=CONTAINERS, index=st.integers(0, 5), vaddr=VADDRS, flags=st.sampled_from([4, 4, 6]))
    def move_vaddr(self, container, index, vaddr, flags):
        """Invalidate a mapping, or give an invalid one its new address."""
        mappings = self.mappings(container)
        invalid = [m for m in mappings if m.vaddr_invalid]
        if invalid:
            m = invalid[index % len(invalid)]
            self.twin.map_dma(container, m.iova, vaddr, m.size, 4)
        elif mappings:
            m = mappings[index % len(mappings)]
            self.twin.unmap_dma(container, *(0, 0) if flags & 2 else (m.iova, m.size), flags)

    @rule(container=CONTAINERS, where=RANGES, skew=SKEW, flags=st.sampled_from([0, 0, 0, 0, 0, 4, 4, 4, 6, 6, 8, 12]),
          argsz=st.sampled_from([None] * 12 + [0, 23, 25, 48]))
    def unmap_dma(self, container, where, skew, flags, argsz):
        if self.has(container):
            iova, size = self.resolve(container, where)
            if flags & 2 and skew == 0:
                iova = size = 0
            self.twin.unmap_dma(container, iova + skew if skew & 1 else iova, size | skew & 0x800, flags, argsz=argsz)

    @rule(container=CONTAINERS, really=st.integers(0, 3))
    def unmap_all(self, container, really):
        if self.has(container) and really == 0:
            self.twin.unmap_dma(container, 0, 0, 2)

    # -- dirty pages

    @rule(container=CONTAINERS, flags=st.sampled_from([1, 1, 1, 1, 1, 2, 0, 3, 4, 8]),
          argsz=st.sampled_from([8] * 9 + [0, 7, 9]))
    def dirty(self, container, flags, argsz):
        if self.ready(container):
            self.twin.dirty(container, flags, argsz)

    @staticmethod
    def descriptor(size, pgsize, bytes_more, place):
        npages = -(-size // PAGE) if size < TOP else 1
        data = MEMORY.bitmap + place if place < 1 << 20 else place
        return pgsize, max(0, -(-npages // 64) * 8 + bytes_more), data

    BITMAPS = st.tuples(st.sampled_from([PAGE] * 15 + [0, 1, 512, 2 * PAGE, 0x200000, 1 << 63]),
                        st.sampled_from([0] * 10 + [-1, -8, 1, 8, 1 << 28, TOP // 2]),
                        st.sampled_from([0] * 10 + [4, 8, 2 * PAGE - 8, 2 * PAGE - 4, USER_END - 8, USER_END, TOP - 8,
                                                    1 << 20]))

    @rule(container=CONTAINERS, where=RANGES, skew=SKEW, bitmap=BITMAPS, fill=FILLS,
          argsz=st.sampled_from([48] * 9 + [8, 47, 49]))
    def get_bitmap(self, container, where, skew, bitmap, fill, argsz):
        if self.has(container):
            iova, size = self.resolve(container, where)
            iova, size = iova + skew if skew & 1 else iova, size | skew & 0x800
            self.twin.get_bitmap(container, iova, size, self.descriptor(size, *bitmap), argsz, fill)

    @rule(container=CONTAINERS, back=st.sampled_from([0, 0, 1, 5, 63, 64, 70]), more=st.integers(0, 70), fill=FILLS)
    def get_bitmap_of_everything(self, container, back, more, fill):
        """A range around the mappings of the pool, beginning at any bit of a word."""
        if self.mappings(container) and not self.twin.instance(container).tracking:
            self.twin.dirty(container, 1)
        pool = [m for m in self.mappings(container) if BASE <= m.iova < BASE + 256 * PAGE]
        if pool:
            iova = pool[0].iova - back * PAGE
            size = pool[-1].last + 1 + more * PAGE - iova
            self.twin.get_bitmap(container, iova, size, self.descriptor(size, PAGE, 0, 0), fill=fill)

    @rule(container=CONTAINERS, where=RANGES, bitmap=BITMAPS, fill=FILLS, flags=st.sampled_from([1] * 9 + [3, 5]))
    def unmap_with_bitmap(self, container, where, bitmap, fill, flags):
        if self.has(container):
            iova, size = self.resolve(container, where)
            self.twin.unmap_dma(container, iova, size, flags, self.descriptor(size, *bitmap), fill=fill)

    # -- emulated devices

    def emulated_member(self, container):
        """The group whose device works on the container, or None."""
        if not self.has(container) or not self.twin.instance(container):
            return None
        waits = self.twin.kernel == "5.12" and any(m.vaddr_invalid for m in self.mappings(container))
        return None if waits else next((f"g{group.number}" for group in self.members(container)), None)

    def members(self, container):
        return self.twin.oracle.files[self.twin.fds[container][1]].groups

    @rule(container=CONTAINERS, where=RANGES, npages=st.sampled_from([1, 1, 1, 2, 3, 65, 0, 512, 513]),
          prot=st.sampled_from([1, 1, 2, 3]), unpin=st.sampled_from([False, False, True]))
    def pin_pages(self, container, where, npages, prot, unpin):
        group = self.emulated_member(container)
        if group and unpin:
            self.twin.unpin_pages(container, self.resolve(container, where)[0], npages)
        elif group:
            self.twin.pin_pages(container, group, self.resolve(container, where)[0], npages, prot)

    @rule(container=CONTAINERS, where=RANGES, offset=st.sampled_from([0, 1, 4095]), write=st.booleans(),
          size=st.sampled_from([1, 8, 4096, 4097, 9000]))
    def dma(self, container, where, offset, write, size):
        if self.emulated_member(container):
            iova = (self.resolve(container, where)[0] + offset) % TOP
            if write:
                self.twin.dma_write(container, iova, bytes([size & 0xff]) * size)
            else:
                self.twin.dma_read(container, iova, size)

    @rule(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 12))
    def burst(self, seed, steps):
        """Calls that mostly succeed, drawn uniformly, so that rich states come up often."""
        rng = random.Random(seed)
        for _ in range(steps):
            self.ready("c0")
            mappings = self.mappings("c0")
            m = rng.choice(mappings) if mappings else None
            choice = rng.randrange(10)
            if choice < 3 or m is None:
                self.twin.map_dma("c0", BASE + rng.choice(POOL_PAGES) * PAGE, MEMORY.data + rng.randrange(90) * PAGE,
                                  rng.choice(POOL_COUNTS) * PAGE, rng.choice([1, 2, 3, 3, 3]))
            elif choice == 3:
                self.twin.unmap_dma("c0", m.iova, m.size + rng.choice([0, 0, 64 * PAGE]), 0)
            elif choice == 4:
                self.move_vaddr("c0", rng.randrange(6), MEMORY.data + rng.randrange(90) * PAGE, 4)
            elif choice == 5:
                group = rng.choice(["g0", "g1", "g2", "g3", "g4"])
                if self.has(group) and rng.randrange(2):
                    self.twin.unset_container(group)
                elif self.has(group):
                    self.twin.set_container(group, "c0")
            elif choice == 6:
                self.get_bitmap_of_everything("c0", rng.choice([0, 1, 5, 63, 64, 70]), rng.randrange(70),
                                              rng.choice([0, 0, 0x5a, 0xff]))
            elif choice == 7 and self.emulated_member("c0"):
                group = rng.choice([f"g{group.number}" for group in self.members("c0")])
                self.twin.pin_pages("c0", group, m.iova + rng.randrange(m.size // PAGE) * PAGE, rng.choice([1, 1, 2,
                                                                                                            5]), 1)
            elif choice == 8 and self.emulated_member("c0"):
                page = rng.choice(list(m.pins)) if m.pins else m.iova
                self.twin.unpin_pages("c0", page, rng.choice([1, 1, 3]))
            elif choice == 9 and self.emulated_member("c0"):
                iova = m.iova + rng.randrange(m.size)
                self.twin.dma_write("c0", iova, rng.randbytes(rng.choice([1, 100, 4096, 9000])))
                self.twin.dma_read("c0", iova, rng.choice([1, 100, 4096]))

    # -- limits

    @rule(pages=st.sampled_from([0, 1, 4, 16, 64, 100, 2048, 2048, 2048]), privileged=st.sampled_from([True, True,
                                                                                                       False]),
          entries=st.sampled_from([65535, 65535, 65535, 0, 1, 3]))
    def limits(self, pages, privileged, entries):
        self.twin.limit(pages)
        self.twin.privilege(privileged)
        self.twin.entry_limit(entries)

    @invariant()
    @precondition(lambda self: self.twin is not None)
    def everything_agrees(self):
        self.twin.check()


TestType1Model = Type1Model.TestCase
