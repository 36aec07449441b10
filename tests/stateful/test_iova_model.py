"""The allocator against plain intervals: every option, every answer, every invariant after every step."""
import errno

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from vfiodma._core.iova import IovaAllocator
from vfiodma.errors import InvalidArgumentError, IovaSpaceError, NotMappedError, OverlapError

K4, M2, G1 = 1 << 12, 1 << 21, 1 << 30
TOP = 1 << 64


def minus(intervals, taken):
    """The intervals [start, end) without those in `taken`."""
    for low, high in sorted(taken):
        intervals = [piece for start, end in intervals
                     for piece in ((start, min(end, low)), (max(start, high), end)) if piece[0] < piece[1]]
    return intervals


def joined(intervals):
    out = []
    for start, end in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def places(intervals, size, align, guard, limit):
    """The lowest place in each hole, then the highest in each."""
    lows, highs = [], []
    for start, end in intervals:
        low = -(-start // align) * align
        if low + size + guard <= end and low + size - 1 <= limit:
            lows.append(low)
            highs.append((min(end - guard, limit + 1) - size) // align * align)
    return lows, highs


class Oracle:
    def __init__(self):
        self.valid = []
        self.used = {}          # start -> (size, guard)

    def set_ranges(self, ranges, reserved):
        inward = [(-(-start // K4) * K4, (last + 1) // K4 * K4) for start, last in ranges]
        outward = [(start // K4 * K4, -(-(last + 1) // K4) * K4) for start, last in reserved]
        self.valid = minus(joined([(a, b) for a, b in inward if a < b]), outward)

    def taken(self):
        return [(start, start + size + guard) for start, (size, guard) in self.used.items()]

    def free(self):
        return minus(self.valid, self.taken())

    def inside(self, start, size):
        return any(low <= start and start + size <= high for low, high in self.valid)

    def stranded(self):
        return [(start, start + size - 1) for start, (size, _) in sorted(self.used.items())
                if not self.inside(start, size)]


sizes = st.one_of(
    st.integers(1, 6).map(lambda n: n * K4), st.integers(1, 3).map(lambda n: n * M2), st.just(G1),
    st.integers(500, 530).map(lambda n: n * K4), st.sampled_from([M2 - K4, M2 + K4, G1 - K4, G1 + M2]))
aligns = st.one_of(st.none(), st.sampled_from([1, K4, 2 * K4, 16 * K4, M2 // 2, M2, 2 * M2, G1 // 2, G1]))
near = st.one_of(st.sampled_from([0, M2, 2 * M2, G1, 4 * G1, TOP - M2]), st.integers(0, 40).map(lambda n: n * M2 // 8))
addresses = st.builds(lambda base, n: max(0, min(base + n * K4, TOP - K4)), near, st.integers(-6, 6))
limits = st.one_of(st.none(), st.none(), st.builds(lambda a, n: max(0, min(a + n, TOP - 1)), addresses,
                                                   st.sampled_from([-1, -1, 0, K4 - 1])))
extents = st.builds(lambda start, size: (start, min(start + size, TOP) - 1), addresses, sizes)
layouts = st.one_of(
    st.sampled_from([
        [(0, TOP - 1)], [(0, 4 * M2 - 1)], [(0, 0xFEDFFFFF), (0xFEF00000, (1 << 39) - 1)],
        [(K4, 5 * M2 - 1), (TOP - M2, TOP - 1)], [(0, 3 * G1 - 1)], []]),
    st.lists(extents, min_size=1, max_size=4))


class AllocatorMachine(RuleBasedStateMachine):
    live = Bundle("live")

    @initialize(ranges=layouts, reserved=st.lists(extents, max_size=2))
    def start(self, ranges, reserved):
        self.oracle = Oracle()
        self.reserved = reserved
        self.oracle.set_ranges(ranges, reserved)
        self.allocator = IovaAllocator(ranges, reserved=reserved)

    @rule(target=live, size=sizes, align=aligns, limit=limits, hint=st.one_of(st.none(), st.none(), addresses),
          top_down=st.booleans(), guard=st.sampled_from([0, 0, K4, 3 * K4]), ephemeral=st.booleans(),
          repeat=st.sampled_from([1, 1, 3, 12]))
    def allocate(self, size, align, limit, hint, top_down, guard, ephemeral, repeat):
        out = []
        for _ in range(repeat):
            where = self.allocate_one(size, align, limit, hint, top_down, guard, ephemeral)
            if where is None:
                break
            out.append(where)
        return multiple(*out)

    def allocate_one(self, size, align, limit, hint, top_down, guard, ephemeral):
        effective = max(align, K4) if align else next(a for a in (G1, M2, K4) if a <= size)
        highest = TOP - 1 if limit is None else limit
        free = minus(self.oracle.free(), [(0, K4)])
        chunks = [(chunk.start, chunk.last + 1) for chunk in self.allocator._chunks()]
        apart = minus(free, chunks)

        def find(holes):
            lows, highs = places(holes, size, effective, guard, highest)
            return (max(highs) if top_down else min(lows)) if lows else None

        anywhere = find(free)
        hinted = hint is not None and hint % (max(align, K4) if align else K4) == 0 and hint + size - 1 <= highest \
            and any(low <= hint and hint + size + guard <= high for low, high in free)
        try:
            where = self.allocator.allocate(size, align=align, limit=limit, hint=hint, top_down=top_down, guard=guard,
                                            ephemeral=ephemeral)
        except IovaSpaceError as error:
            assert error.errno == errno.ENOSPC and "the largest hole" in str(error)
            assert anywhere is None and not hinted
            return None
        if hinted:
            assert where == hint
        elif not ephemeral:
            lasting = find(apart)
            assert where == (anywhere if lasting is None else lasting)
        else:
            assert where % effective == 0 and where + size - 1 <= highest
            assert any(low <= where and where + size + guard <= high for low, high in free)
            chunk = -(-(size + guard) // M2) * M2
            if places(apart, chunk, max(effective, M2), 0, highest)[0]:
                assert any(c.start <= where and where + size + guard - 1 <= c.last for c in self.allocator._chunks())
        self.oracle.used[where] = size, guard
        return where

    @rule(target=live, where=addresses, size=sizes)
    def reserve(self, where, size):
        oracle = self.oracle
        wraps = where + size > TOP
        overlaps = any(low < where + size and where < high for low, high in oracle.taken())
        try:
            self.allocator.reserve(where, size)
        except OverlapError as error:
            assert error.errno == errno.EEXIST and overlaps
            return multiple()
        except InvalidArgumentError as error:
            assert error.errno == errno.EINVAL and (wraps or not overlaps and not oracle.inside(where, size))
            return multiple()
        assert not wraps and not overlaps and oracle.inside(where, size)
        oracle.used[where] = size, 0
        return where

    @rule(where=live)
    def free(self, where):
        if self.oracle.used.pop(where, None):
            self.allocator.free(where)
        else:
            with pytest.raises(NotMappedError):
                self.allocator.free(where)

    @rule(ranges=layouts, reserved=st.one_of(st.none(), st.lists(extents, max_size=2)))
    def set_ranges(self, ranges, reserved):
        if reserved is not None:
            self.reserved = reserved
        self.oracle.set_ranges(ranges, self.reserved)
        assert self.allocator.set_ranges(ranges, reserved) == self.oracle.stranded()

    @invariant()
    def agrees(self):
        if not hasattr(self, "oracle"):
            return
        oracle, allocator = self.oracle, self.allocator
        allocator._check()
        assert allocator.allocations() == [(a, a + size - 1) for a, (size, _) in sorted(oracle.used.items())]
        assert [(r.start, r.last + 1) for r in allocator.ranges] == oracle.valid
        stats, free = allocator.stats(), oracle.free()
        assert stats.total == sum(b - a for a, b in oracle.valid)
        assert stats.free == sum(b - a for a, b in free) == stats.total - stats.used
        assert stats.allocations == len(allocator) == len(oracle.used)
        if not stats.chunks:
            holes = minus(free, [(0, K4)])
            assert stats.gaps == len(holes)
            for align, largest in stats.largest.items():
                assert largest == max([b - -(-a // align) * align for a, b in holes] + [0])

    def teardown(self):
        if hasattr(self, "oracle"):
            for where in self.oracle.used:
                self.allocator.free(where)
            self.allocator._check()
            stats = self.allocator.stats()
            assert (stats.used, stats.chunks) == (0, 0)


TestAllocator = AllocatorMachine.TestCase
