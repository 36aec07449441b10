"""RangeMap and VaddrIndex against plain Python dictionaries, their invariants checked after every step."""
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vfiodma._core.rangemap import RangeMap, VaddrIndex
from vfiodma.errors import InvalidArgumentError, NotMappedError, OverlapError

TOP = 2**64 - 1
# Close together, so that things meet; at both ends of the address space.
addresses = st.integers(0, 400) | st.integers(0, 400).map(lambda i: TOP - i)
sizes = st.integers(1, 8) | st.integers(1, 300) | st.just(TOP)
values = st.integers(0, TOP)


class RangeMapModel(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.ranges, self.model = RangeMap(), {}        # start: (last, value)

    @initialize(level=st.sampled_from(["scalar", "avx2", "avx512"]))
    def choose_level(self, level):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VFIODMA_CPU", level)
            self.ranges = RangeMap()

    def containing(self, key):
        return next(((start, last, value) for start, (last, value) in self.model.items() if start <= key <= last), None)

    def overlapping(self, start, last):
        return any(s <= last and start <= e for s, (e, _) in self.model.items())

    @rule(start=addresses, size=sizes, value=values)
    def insert(self, start, size, value):
        last = start + size - 1
        if last > TOP:
            with pytest.raises(InvalidArgumentError):
                self.ranges.insert(start, size, value)
        elif self.overlapping(start, last):
            with pytest.raises(OverlapError):
                self.ranges.insert(start, size, value)
        else:
            self.ranges.insert(start, size, value)
            self.model[start] = last, value

    @rule(start=addresses, n=st.integers(1, 120), size=st.integers(1, 3), gap=st.integers(0, 2), value=values)
    def insert_row(self, start, n, size, gap, value):
        """Enough at once to split leaves."""
        for i in range(n):
            at = start + i * (size + gap)
            if at + size - 1 <= TOP and not self.overlapping(at, at + size - 1):
                self.ranges.insert(at, size, value)
                self.model[at] = at + size - 1, value

    @rule(start=addresses)
    def remove(self, start):
        if start in self.model:
            assert self.ranges.remove(start) == self.model.pop(start)[1]
        else:
            with pytest.raises(NotMappedError):
                self.ranges.remove(start)

    @rule(start=addresses, keep=st.integers(1, 30))
    def thin_out(self, start, keep):
        """Remove all but every keep-th entry from some address on: separators are left behind, then leaves join."""
        for i, at in enumerate([s for s in sorted(self.model) if s >= start]):
            if i % keep or keep == 1:
                assert self.ranges.remove(at) == self.model.pop(at)[1]

    @rule(start=addresses, value=values)
    def set_value(self, start, value):
        if start in self.model:
            self.ranges.set_value(start, value)
            self.model[start] = self.model[start][0], value
        else:
            with pytest.raises(NotMappedError):
                self.ranges.set_value(start, value)

    @rule()
    def rebuild(self):
        rows = self.ranges.to_array()
        self.ranges.clear()
        assert len(self.ranges) == 0 and self.ranges.lower(0) is None
        self.ranges.build(rows)

    @rule(keys=st.lists(addresses, max_size=70), miss=values)
    def look_up(self, keys, miss):
        expected = []
        for key in keys:
            entry = self.containing(key)
            found = (entry[0], entry[1] - entry[0] + 1, entry[2]) if entry else None
            assert self.ranges.find(key) == found
            expected.append((entry[2] + key - entry[0]) % 2**64 if entry else None)
            assert self.ranges.get(key) == expected[-1]
            above = min((s for s, (last, _) in self.model.items() if last >= key), default=None)
            lower = self.ranges.lower(key)
            assert (lower and lower[0]) == above
        got = self.ranges.translate_many(np.array(keys, np.uint64), miss=miss)
        assert got.tolist() == [miss if value is None else value for value in expected]

    @rule(start=addresses, size=sizes)
    def overlaps(self, start, size):
        if start + size - 1 <= TOP:
            assert self.ranges.overlaps(start, size) == self.overlapping(start, start + size - 1)

    @invariant()
    def tree_holds(self):
        assert self.ranges.check() == 0
        assert list(self.ranges) == [(s, last - s + 1, v) for s, (last, v) in sorted(self.model.items())]


class VaddrIndexModel(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.index, self.model = VaddrIndex(), {}       # (vaddr, iova): size

    iovas = st.integers(0, 3)

    @rule(vaddr=addresses, size=sizes, iova=iovas)
    def insert(self, vaddr, size, iova):
        if max(vaddr, iova) + size - 1 > TOP:
            with pytest.raises(InvalidArgumentError):
                self.index.insert(vaddr, size, iova)
        elif (vaddr, iova) in self.model:
            with pytest.raises(OverlapError):
                self.index.insert(vaddr, size, iova)
        else:
            self.index.insert(vaddr, size, iova)
            self.model[vaddr, iova] = size

    @rule(first=st.integers(0, 400), n=st.integers(1, 60), size=st.integers(1, 80), iova=iovas)
    def insert_row(self, first, n, size, iova):
        for vaddr in range(first, first + n):
            self.insert(vaddr, size, iova)

    @rule(vaddr=addresses, iova=iovas)
    def remove(self, vaddr, iova):
        if (vaddr, iova) in self.model:
            self.index.remove(vaddr, iova)
            del self.model[vaddr, iova]
        else:
            with pytest.raises(NotMappedError):
                self.index.remove(vaddr, iova)

    @rule(first=st.integers(0, 400), n=st.integers(1, 100), step=st.integers(1, 3))
    def remove_row(self, first, n, step):
        for vaddr in range(first, first + n, step):
            for iova in range(4):
                self.remove(vaddr, iova)

    @rule(address=addresses)
    def find(self, address):
        expected = [(vaddr, size, iova) for (vaddr, iova), size in sorted(self.model.items())
                    if vaddr <= address < vaddr + size]
        assert self.index.find(address) == expected
        assert self.index.iovas(address) == [iova + address - vaddr for vaddr, _, iova in expected]

    @invariant()
    def tree_holds(self):
        assert self.index.check() == 0 and len(self.index) == len(self.model)


TestRangeMap = RangeMapModel.TestCase
TestVaddrIndex = VaddrIndexModel.TestCase
