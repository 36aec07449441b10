"""SPAPR TCE of the software VFIO against its oracle: random calls at the raw door, every answer and byte compared.

A failing example prints the whole script with what the oracle answered.
"""
import random

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from oracle import KERNELS
from oracle.memory import PAGE, USER_END
from oracle.spapr_twin import BIG, SpaprTwin
from oracle.twin import DATA_PAGES, Memory

MEMORY = Memory()
TOP = 1 << 64
SECOND = 1 << 59
#: 256 KiB of the data are made of 64 KiB pages.
BIG_FIRST = -(-MEMORY.data // BIG) * BIG
BIG_MEMORY = (BIG_FIRST, BIG_FIRST + 4 * BIG)

GROUPS = st.sampled_from(["g0", "g0", "g1", "g2", "g3"])
CONTAINERS = st.sampled_from(["c0", "c0", "c0", "c1"])
GOOD = st.sampled_from([{}, {"tce32_size": 1 << 20}, {"tce32_size": 1 << 22, "pgsizes": 0x11000}])
PLATFORMS = st.one_of(GOOD, GOOD, GOOD,
                      st.fixed_dictionaries({
                          "tce32_size": st.sampled_from([2 << 30, 1 << 20, 1 << 12, 0, 3 << 20]),
                          "pgsizes": st.sampled_from([0x1011000, 0x11000, 0x10000, 0x13000, 1 << 63]),
                          "max_windows": st.sampled_from([2, 2, 1, 0]), "levels": st.sampled_from([5, 2, 1]),
                          "ownership": st.sampled_from([True, True, True, False])}))
CONFIGS = st.fixed_dictionaries({"tce": st.one_of([PLATFORMS] * 6 + [st.just(False)]),
                                 "eeh": st.sampled_from([True] * 8 + [False])})

PAGES = st.sampled_from([0, 1, 2, 3, 4, 5, 15, 16, 17, 32])
COUNTS = st.sampled_from([0, 1, 1, 1, 2, 2, 3, 4, 8, 16, 17])
SKEW = st.sampled_from([0] * 12 + [1, 0x200, 0x1000, 0x8000])
#: What is wrong with an argument: its argsz, more than the struct's; its flags; bytes up to the end of memory.
SPOILS = st.sampled_from([None] * 20 + [("argsz", -1), ("argsz", -12), ("argsz", 64), ("flags", 1), ("flags", 4),
                                        ("flags", 1 << 31), ("room", -1), ("room", -8), ("room", 0)])
VADDRS = st.one_of(
    st.integers(0, 40).map(lambda page: MEMORY.data + page * PAGE),
    st.integers(0, 4).map(lambda page: BIG_FIRST + page * BIG),
    st.integers(0, 3).map(lambda page: MEMORY.readonly + page * PAGE),
    st.sampled_from([0, MEMORY.data + (DATA_PAGES - 1) * PAGE, USER_END - PAGE, TOP - PAGE, TOP - 2 * PAGE]))
SIZES = st.sampled_from([1 << 12, 1 << 16, *[1 << 20] * 4, *[1 << 26] * 4, 1 << 30, 1 << 36, 1 << 48, 1 << 55, 1 << 63,
                         0, 3 << 20])
WINDOW_PLACE = st.sampled_from([0, 0, 0, 0, SECOND, SECOND, 1 << 31, SECOND - PAGE, TOP - PAGE])


class SpaprModel(RuleBasedStateMachine):
    twin = None

    @initialize(kernel=st.sampled_from(["7.2", *KERNELS]), g0=CONFIGS, g1=CONFIGS, g2=CONFIGS,
                same=st.sampled_from([True, True, True, False]),
                version=st.sampled_from([7, 7, 7, 2]), members=st.lists(GROUPS, min_size=1, max_size=3, unique=True))
    def start(self, kernel, g0, g1, g2, same, version, members):
        self.twin = SpaprTwin(MEMORY, kernel, {0: g0, 1: g0 if same else g1, 2: g2, 3: {"emulated": True}}, BIG_MEMORY)
        for name in ("c0", "c1", "g0", "g1", "g2", "g3"):
            self.twin.open(name)
        for name in members:
            self.twin.set_container(name, "c0")
        self.twin.set_iommu("c0", version)
        self.version = version
        self.ready("c0")

    def teardown(self):
        if self.twin:
            note("\n".join(self.twin.script))
            self.twin.finish()

    def has(self, name):
        return name in self.twin.fds

    def ready(self, container):
        """See that the container is open and, if a group can, has a driver; return its instance."""
        twin = self.twin
        if not self.has(container):
            twin.open(container)
        for group in ("g0", "g1", "g2"):
            if twin.instance(container):
                break
            if not self.has(group):
                twin.open(group)
            if self.has(group) and not twin.oracle.groups[group[1:]].container:
                twin.set_container(group, container)
                twin.set_iommu(container, self.version)
        return twin.instance(container)

    # -- groups and containers

    @rule(name=st.sampled_from(["c0", "c1", "g0", "g1", "g2", "g3", "d0", "d1", "d2"]), really=st.integers(0, 3))
    def open_or_close(self, name, really):
        if self.has(name) and (really == 0 or name[0] == "d"):
            self.twin.close(name)
        elif name[0] != "d" and not self.has(name):
            self.twin.open(name)

    @rule(group=GROUPS, container=st.sampled_from(["c0", "c0", "c0", "c1", -1, 0]))
    def set_container(self, group, container):
        if self.has(group) and (isinstance(container, int) or self.has(container)):
            self.twin.set_container(group, container)

    @rule(group=GROUPS)
    def unset_container(self, group):
        if self.has(group):
            self.twin.unset_container(group)

    @rule(container=CONTAINERS, kind=st.sampled_from([2, 7, 7, 5, 0, 1, 3, 8, TOP - 1]))
    def set_iommu(self, container, kind):
        if self.has(container):
            self.twin.set_iommu(container, kind)

    @rule(container=CONTAINERS, number=st.one_of(st.integers(0, 12), st.sampled_from([1 << 32 | 2, TOP - 1])),
          command=st.sampled_from([99, 100, 111, 117, 118, 122, 130, 115, 116, 119]))
    def ask(self, container, number, command):
        if self.has(container):
            self.twin.check_extension(container, number)
            self.twin.plain(container, command, 0)

    @rule(group=st.sampled_from(["g0", "g1", "g2"]))
    def open_device(self, group):
        if self.has(group) and not self.has("d" + group[1:]):
            self.twin.get_device(group)

    # -- the driver

    @rule(container=CONTAINERS, argsz=st.sampled_from([16, 32, 32, 15, 31, 0, 64]),
          room=st.sampled_from([None] * 9 + [-1, -8, 0]))
    def info(self, container, argsz, room):
        if self.has(container):
            self.twin.tce(container, "GET_INFO", "=IIIIQII", argsz, 7, 7, 7, 7, 7, 7,
                          tail=None if room is None else max(0, min(argsz, 32) + room))

    @rule(container=CONTAINERS, on=st.sampled_from([True, True, False]))
    def enable(self, container, on):
        if self.has(container):
            self.twin.plain(container, 115 if on else 116, 0)

    @rule(container=CONTAINERS, vaddr=VADDRS, npages=COUNTS, unit=st.sampled_from([PAGE, PAGE, BIG]), skew=SKEW,
          spoil=SPOILS)
    def register(self, container, vaddr, npages, unit, skew, spoil):
        if self.has(container) and npages * unit <= 64 * PAGE:
            self.tce(container, "REGISTER", "=IIQQ", 24, spoil, 0, vaddr + (skew & 0x200),
                     npages * unit | skew & 1)

    @rule(container=CONTAINERS, index=st.integers(0, 5), vaddr=VADDRS, spoil=SPOILS,
          known=st.sampled_from([True, True, True, False]), skew=SKEW)
    def unregister(self, container, index, vaddr, spoil, known, skew):
        if not self.has(container):
            return
        registry = self.twin.oracle.registry
        if known and registry:
            region = registry[index % len(registry)]
            vaddr, size = region.vaddr, region.size
        else:
            size = PAGE
        self.tce(container, "UNREGISTER", "=IIQQ", 24, spoil, 0, vaddr, size + skew)

    def tce(self, container, command, form, size, spoil, flags, *values):
        """Call; ``size`` is the struct's."""
        what, by = spoil or ("", 0)
        return self.twin.tce(container, command, form, max(0, size + by * (what == "argsz")),
                             flags | by if what == "flags" else flags, *values,
                             tail=max(0, size + by) if what == "room" else None)

    @rule(container=CONTAINERS, shift=st.one_of(st.sampled_from([12, 12, 13, 16, 16, 24]), st.integers(0, 70)),
          size=SIZES, levels=st.sampled_from([*[1] * 5, 2, 3, 4, 5, 0, 6]), spoil=SPOILS)
    def create(self, container, shift, size, levels, spoil):
        if self.has(container):
            self.tce(container, "CREATE", "=IIIIQIIQ", 40, spoil, 0, shift, 5, size, levels, 6, 7)

    @rule(container=CONTAINERS, start=WINDOW_PLACE, more=st.sampled_from([0, 0, 1, PAGE]), spoil=SPOILS)
    def remove(self, container, start, more, spoil):
        if self.has(container):
            self.tce(container, "REMOVE", "=IIQ", 16, spoil, 0, (start + more) % TOP)

    def place(self, container, start, page, from_end):
        """Return (iova, page size) of a place in the window at or around ``start``."""
        instance = self.has(container) and self.twin.instance(container)
        window = instance and instance.find(start)
        unit = window.page if window else PAGE
        if window and from_end:
            return window.start + window.size - page * unit, unit
        return (start + page * unit) % TOP, unit

    @rule(container=CONTAINERS, start=WINDOW_PLACE, page=PAGES, from_end=st.sampled_from([False] * 6 + [True]),
          npages=COUNTS, vaddr=VADDRS, skew=SKEW, where=st.integers(0, 2), spoil=SPOILS,
          flags=st.sampled_from([3, 3, 3, 3, 1, 2, 0, 4, 7]))
    def map(self, container, start, page, from_end, npages, vaddr, skew, where, spoil, flags):
        if self.has(container):
            iova, unit = self.place(container, start, page, from_end)
            skews = [skew if n == where else 0 for n in range(3)]
            if npages * unit <= DATA_PAGES * PAGE or npages < 3:
                self.tce(container, "MAP", "=IIQQQ", 32, spoil, flags, (vaddr + skews[0]) % TOP,
                         (iova + skews[1]) % TOP, npages * unit + skews[2])

    @rule(container=CONTAINERS, start=WINDOW_PLACE, page=PAGES, from_end=st.sampled_from([False] * 6 + [True]),
          npages=COUNTS, skew=SKEW, where=st.integers(0, 1), spoil=SPOILS)
    def unmap(self, container, start, page, from_end, npages, skew, where, spoil):
        if self.has(container):
            iova, unit = self.place(container, start, page, from_end)
            skews = [skew if n == where else 0 for n in range(2)]
            self.tce(container, "UNMAP", "=IIQQ", 24, spoil, 0, (iova + skews[0]) % TOP,
                     npages * unit + skews[1])

    @rule(seed=st.integers(0, 2**32 - 1), steps=st.integers(5, 40))
    def burst(self, seed, steps):
        """Calls that mostly succeed, so that rich states come up often."""
        rng = random.Random(seed)
        twin = self.twin
        for _ in range(steps):
            instance = self.ready("c0")
            if not instance:
                return
            windows = [window for window in instance.tables if window]
            choice = rng.randrange(8)
            if choice == 0 and self.version == 2:
                twin.plain("c0", 115, 0)
            elif choice == 0:
                area, unit, room = rng.choice([(MEMORY.data, PAGE, 40), (BIG_FIRST, BIG, 4)])
                count = rng.randrange(1, room + 1)
                twin.tce("c0", "REGISTER", "=IIQQ", 24, 0, area + rng.randrange(room - count + 1) * unit, count * unit)
            elif choice == 1 and self.version == 7:
                twin.tce("c0", "CREATE", "=IIIIQIIQ", 40, 0, rng.choice([12, 16]), 0, 1 << rng.choice([20, 26, 32]),
                         rng.choice([1, 2, 3]), 0, 0)
            elif choice == 2 and instance.registered:
                region = rng.choice(instance.registered)
                twin.tce("c0", "UNREGISTER", "=IIQQ", 24, 0, region.vaddr, region.size)
            elif choice < 6 and (windows or instance.pending):
                window = rng.choice(windows) if windows else None
                page, start = (window.page, window.start) if window else (PAGE, 0)
                vaddr, size = MEMORY.data, 40 * PAGE
                if self.version == 7 and self.twin.oracle.registry:
                    region = rng.choice(self.twin.oracle.registry)
                    vaddr, size = region.vaddr, region.size
                npages = rng.randrange(1, 5) if size // page else 1
                twin.map_tce("c0", start + rng.randrange(20) * page, vaddr + rng.randrange(max(1, size // page)) * page,
                             npages * page, rng.choice([1, 3, 3]))
            elif choice == 6 and windows:
                window = rng.choice(windows)
                twin.tce("c0", "UNMAP", "=IIQQ", 24, 0, window.start + rng.randrange(20) * window.page,
                         rng.randrange(1, 20) * window.page)
            elif choice == 7:
                self.access(rng.choice(["g0", "g1", "g2"]), rng)

    def access(self, group, rng):
        """DMA of the group's device, mostly to what is mapped."""
        if not self.has("d" + group[1:]):
            if not self.has(group) or not self.twin.oracle.groups[group[1:]].container:
                return
            self.twin.get_device(group)
            if not self.has("d" + group[1:]):
                return
        instance = self.twin.oracle.groups[group[1:]].container.type1
        mapped = [(window, index) for window in instance.tables if window for index in window.entries]
        iova = rng.choice([0, SECOND])
        if mapped:
            window, index = rng.choice(sorted(mapped, key=lambda each: (each[0].start, each[1])))
            iova = window.start + index * window.page
        size = rng.choice([1, 100, 4096, 9000])
        iova += rng.choice([0, 1, 4000])
        self.twin.dma(group, iova, size, rng.randbytes(size) if rng.randrange(2) else None)

    @rule(group=st.sampled_from(["g0", "g1", "g2"]), seed=st.integers(0, 1 << 20))
    def device_access(self, group, seed):
        self.access(group, random.Random(seed))

    # -- EEH

    @rule(container=CONTAINERS, op=st.one_of(st.integers(0, 10), st.sampled_from([4, 4, 4, 9, 9, TOP >> 33])),
          argsz=st.sampled_from([12, 40, 40, 40, 40, 40, 11, 39, 0]), flags=st.sampled_from([0] * 9 + [1, 1 << 31]),
          kind=st.sampled_from([0, 0, 1, 2]),
          function=st.one_of(st.integers(0, 21), st.just(1 << 31)), room=st.sampled_from([None] * 9 + [12, 11, 39, 40]))
    def eeh(self, container, op, argsz, flags, kind, function, room):
        if self.has(container):
            self.twin.tce(container, "EEH", "=IIIIIIQQ", argsz, flags, op, 0, kind, function, 1 << 40, 0xff, tail=room)

    @rule(group=st.sampled_from(["g0", "g1", "g2"]), changes=st.fixed_dictionaries({}, optional={
        "enabled": st.booleans(), "parent_isolated": st.booleans(), "removed": st.booleans(), "failing": st.booleans(),
        "supported": st.booleans(), "injectable": st.sampled_from([set(), {0, 19}, set(range(20))])}))
    def platform(self, group, changes):
        if self.twin.oracle.groups[group[1:]].pe:
            self.twin.platform(group, **changes)

    # -- limits

    @rule(pages=st.sampled_from([0, 1, 4, 20, 520, 2048, 2048, 8192]), privileged=st.sampled_from([True, True, False]))
    def limits(self, pages, privileged):
        self.twin.limit(pages)
        self.twin.privilege(privileged)

    @invariant()
    def nothing_differs(self):
        if self.twin:
            self.twin.check()


TestSpapr = SpaprModel.TestCase
