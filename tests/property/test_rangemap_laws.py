"""Laws of the range map that hold for any set of disjoint ranges."""
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vfiodma._core.rangemap import RangeMap


@st.composite
def disjoint(draw):
    """Ascending, disjoint rows of (start, size, value), anywhere in the address space."""
    cuts = sorted(draw(st.sets(st.integers(0, 2**64 - 1) | st.integers(0, 200), max_size=120)))
    values = draw(st.integers(0, 2**64 - 1))
    return [(start, last - start + 1, (values + i) % 2**64) for i, (start, last) in
            enumerate(zip(cuts[::2], cuts[1::2], strict=False))]


@given(disjoint(), st.randoms(use_true_random=False))
def test_order_of_insertion_does_not_matter(rows, random):
    built, inserted = RangeMap(), RangeMap()
    built.build(np.array(rows, np.uint64).reshape(-1, 3))
    for row in random.sample(rows, len(rows)):
        inserted.insert(*row)
    assert list(built) == list(inserted) == rows
    assert built.check() == inserted.check() == 0


@given(disjoint(), st.lists(st.integers(0, 2**64 - 1), max_size=50))
def test_batch_is_the_same_as_one_by_one(rows, keys):
    ranges = RangeMap()
    ranges.build(np.array(rows, np.uint64).reshape(-1, 3))
    keys += [edge for start, size, _ in rows for edge in (start, start + size - 1, min(start + size, 2**64 - 1))]
    got = ranges.translate_many(np.array(keys, np.uint64), miss=1).tolist()
    assert got == [ranges.get(key, 1) for key in keys]


@given(disjoint(), st.randoms(use_true_random=False))
def test_removing_everything_leaves_nothing(rows, random):
    ranges = RangeMap()
    for row in rows:
        ranges.insert(*row)
    for start, _, value in random.sample(rows, len(rows)):
        assert ranges.remove(start) == value
        assert ranges.get(start) is None
    assert len(ranges) == 0 and not ranges.overlaps(0, 2**64 - 1) and ranges.check() == 0
