"""DirtyBitmap and DirtyLog against Python sets, on each CPU variant that this machine has."""
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vfiodma import DirtyBitmap, DirtyLog
from vfiodma._core.bitmap import cpu_variant
from vfiodma.errors import InvalidArgumentError, VfioError


class BitmapMachine(RuleBasedStateMachine):
    """Three bitmaps of one shape, one of them a slice of a larger one whose other bits must stay; and a log."""

    variant = "scalar"

    @initialize(npages=st.integers(1, 1500), before=st.integers(0, 3))
    def build(self, npages, before):
        cpu_variant(self.variant)
        self.npages = npages
        self.around = DirtyBitmap(before * 64 + npages + 70)
        self.around.set(0, self.around.npages)
        full = bytearray(b"\xff") * ((npages + 63) // 64 * 8)
        self.bitmaps = [DirtyBitmap(npages), DirtyBitmap.frombuffer(full, npages),
                        self.around[before * 64:before * 64 + npages]]
        self.models = [set(), set(range(npages)), set(range(npages))]
        self.outside = {*range(before * 64), *range(before * 64 + npages, self.around.npages)}
        self.before = before * 64
        self.log, self.marks = DirtyLog(npages), set()

    def pages(self, data, slack=0):
        first = data.draw(st.integers(0, self.npages - 1 + slack))
        return first, data.draw(st.integers(1, max(1, self.npages - first) + slack))

    which = st.integers(0, 2)

    @rule(i=which, data=st.data())
    def set(self, i, data):
        first, n = self.pages(data)
        self.bitmaps[i].set(first, n)
        self.models[i].update(range(first, first + n))

    @rule(i=which, data=st.data())
    def clear(self, i, data):
        first, n = self.pages(data)
        self.bitmaps[i].clear(first, n)
        self.models[i].difference_update(range(first, first + n))

    @rule(i=which)
    def clear_all(self, i):
        self.bitmaps[i].clear()
        self.models[i].clear()

    @rule(i=which, data=st.data())
    def out_of_range(self, i, data):
        first, n = self.pages(data, slack=3)
        if first + n > self.npages:
            for refused in (self.bitmaps[i].set, self.bitmaps[i].clear, self.log.mark):
                with pytest.raises(InvalidArgumentError):
                    refused(first, n)

    @rule(i=which, k=which)
    def merge(self, i, k):
        self.bitmaps[i].merge(self.bitmaps[k])
        self.models[i] |= self.models[k]

    @rule(i=which, k=which)
    def andnot(self, i, k):
        self.bitmaps[i].andnot(self.bitmaps[k])
        self.models[i] = self.models[i] - self.models[k]

    @rule(i=which, k=which)
    def harvest(self, i, k):
        if i == k:
            with pytest.raises(VfioError):
                self.bitmaps[i].harvest(self.bitmaps[k])
            return
        assert self.bitmaps[i].harvest(self.bitmaps[k]) == len(self.models[i])
        self.models[k] |= self.models[i]
        self.models[i] = set()

    @rule(i=which, at=st.integers(0, 200))
    def harvest_elsewhere(self, i, at):
        into = DirtyBitmap(self.npages + 200)
        into.set(0)
        assert self.bitmaps[i].harvest(into, at) == len(self.models[i])
        assert set(into.indices().tolist()) == {0} | {page + at for page in self.models[i]}
        self.models[i] = set()

    @rule(data=st.data())
    def mark(self, data):
        first, n = self.pages(data)
        self.log.mark(first, n)
        self.marks.update(range(first, first + n))

    @rule(data=st.data())
    def mark_many(self, data):
        pages = data.draw(st.lists(st.integers(0, self.npages - 1), max_size=20))
        self.log.mark_many(np.array(pages, np.uint64))
        self.marks.update(pages)

    @rule(i=which, data=st.data(), whole=st.booleans())
    def harvest_log(self, i, data, whole):
        first, n = (0, self.npages) if whole else self.pages(data)
        at = data.draw(st.integers(0, self.npages - n))
        taken = {page for page in self.marks if first <= page < first + n}
        assert self.log.harvest(self.bitmaps[i], at, first=first, npages=n) == len(taken)
        self.models[i] |= {page - first + at for page in taken}
        self.marks -= taken

    @rule(i=which, shift=st.integers(-4, 8))
    def scale(self, i, shift):
        scaled = self.bitmaps[i].scale(1 << (12 + shift))
        if shift >= 0:
            want = {page >> shift for page in self.models[i]}
        else:
            want = {(page << -shift) + k for page in self.models[i] for k in range(1 << -shift)}
        assert scaled.npages == (-(-self.npages >> shift) if shift >= 0 else self.npages << -shift)
        assert set(scaled.indices().tolist()) == want

    @precondition(lambda self: hasattr(self, "bitmaps"))
    @invariant()
    def bitmaps_are_their_models(self):
        for bitmap, model in zip(self.bitmaps, self.models, strict=True):
            assert bitmap.indices().tolist() == sorted(model)
            assert bitmap.count() == len(model) and bitmap.any() == bool(model)
            pages = [page for first, n in bitmap.runs().tolist() for page in range(first, first + n)]
            assert pages == sorted(model)
            assert all(bitmap.test(page) == (page in model) for page in (0, self.npages // 2, self.npages - 1))

    @precondition(lambda self: hasattr(self, "bitmaps"))
    @invariant()
    def bits_around_the_slice_stay(self):
        around = set(self.around.indices().tolist())
        assert around == self.outside | {page + self.before for page in self.models[2]}


def case_of(name):
    try:
        cpu_variant(name)
    except InvalidArgumentError:
        return None
    return type(f"BitmapMachine_{name}", (BitmapMachine,), {"variant": name}).TestCase


_before = cpu_variant()
TestScalar, TestNeon, TestAvx2, TestAvx512 = map(case_of, ("scalar", "neon", "avx2", "avx512"))
cpu_variant(_before)


@pytest.fixture(autouse=True)
def variant_is_restored():
    before = cpu_variant()
    yield
    cpu_variant(before)
