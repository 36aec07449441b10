"""Every kernel against a naive loop over bits, at any offset and length, on each CPU variant that this machine has."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiodma import DirtyBitmap, DirtyLog
from vfiodma._core.bitmap import cpu_variant
from vfiodma.errors import InvalidArgumentError


def variants():
    before, found = cpu_variant(), []
    for name in ("scalar", "neon", "avx2", "avx512"):
        try:
            found.append(cpu_variant(name))
        except InvalidArgumentError:
            pass
    cpu_variant(before)
    return found


@pytest.fixture(params=variants(), autouse=True, scope="module")
def variant(request):
    before = cpu_variant()
    yield cpu_variant(request.param)
    cpu_variant(before)


DENSITIES = st.sampled_from([0, 0.001, 0.02, 0.3, 0.97, 1])


@st.composite
def bits(draw, limit=40_000):
    """Random bits of random density, flipped inside some ranges, so that there are long runs as well."""
    n = draw(st.one_of(st.integers(1, 200), st.integers(1, limit)))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    array = rng.random(n) < draw(DENSITIES)
    for first, length in draw(st.lists(st.tuples(st.integers(0, n), st.integers(0, n)), max_size=3)):
        array[first:first + length] ^= True
    return array


def bitmap_of(array, pgsize=4096):
    """A bitmap of the bits, with everything after the last one set."""
    words = np.full(-(-len(array) // 64), 2**64 - 1, np.uint64)
    packed = np.packbits(np.append(array, np.ones(-len(array) % 64, bool)), bitorder="little")
    words[:] = packed.view(np.uint64)
    return DirtyBitmap.frombuffer(words, len(array), pgsize)


def bits_of(bitmap):
    return np.unpackbits(np.asarray(bitmap).view(np.uint8), bitorder="little")[:bitmap.npages].astype(bool)


def runs_of(array):
    edges = np.flatnonzero(np.diff(np.concatenate([[False], array, [False]]).astype(int)))
    return np.stack([edges[::2], edges[1::2] - edges[::2]], axis=1)


@given(bits(), st.data())
def test_harvest_at_any_offset_ors_clears_and_counts(array, data):
    offset, after = data.draw(st.integers(0, 300)), data.draw(st.integers(0, 130))
    source, into = bitmap_of(array), bitmap_of(np.random.default_rng(offset).random(offset + len(array) + after) < 0.2)
    tail = np.asarray(source)[-1] & ~np.uint64((1 << ((len(array) - 1) % 64 + 1)) - 1)
    want = bits_of(into)
    want[offset:offset + len(array)] |= array
    assert source.harvest(into, offset) == array.sum()
    assert (bits_of(into) == want).all()
    assert not source.any() and np.asarray(source)[-1] == tail


@given(bits(), st.integers(0, 10))
def test_indices_runs_and_counts_are_those_of_a_loop(array, spare):
    bitmap = bitmap_of(array)
    runs = runs_of(array)
    assert bitmap.count() == array.sum() and bitmap.any() == array.any()
    assert (bitmap.indices() == np.flatnonzero(array)).all()
    assert bitmap.runs().shape == runs.shape and (bitmap.runs() == runs).all()
    out = np.full((len(runs) + spare, 2), 7, np.uint64)
    assert np.shares_memory(bitmap.runs(out), out) or not len(runs)
    assert (out[:len(runs)] == runs).all() and (out[len(runs):] == 7).all()
    out = np.full(int(array.sum()) + spare, 7, np.uint64)
    bitmap.indices(out)
    assert (out[:array.sum()] == np.flatnonzero(array)).all() and (out[array.sum():] == 7).all()


@given(bits(), st.integers(0, 12))
def test_larger_pages_are_dirty_when_a_part_of_them_is(array, shift):
    scaled = bitmap_of(array).scale(4096 << shift)
    padded = np.append(array, np.zeros(-len(array) % (1 << shift), bool))
    assert scaled.pgsize == 4096 << shift
    assert (bits_of(scaled) == padded.reshape(-1, 1 << shift).any(axis=1)).all()


@given(bits(limit=3000), st.integers(0, 8))
def test_smaller_pages_are_dirty_when_their_page_was(array, shift):
    scaled = bitmap_of(array, pgsize=4096 << shift).scale(4096)
    assert (bits_of(scaled) == np.repeat(array, 1 << shift)).all()
    assert (bits_of(scaled.scale(4096 << shift)) == array).all()


@given(bits(), bits())
def test_merge_and_andnot_are_or_and_difference(a, b):
    n = min(len(a), len(b))
    a, b = a[:n], b[:n]
    for operation, want in ((DirtyBitmap.merge, a | b), (DirtyBitmap.andnot, a & ~b)):
        left, right = bitmap_of(a), bitmap_of(b)
        operation(left, right)
        assert (bits_of(left) == want).all() and (bits_of(right) == b).all()


@given(bits(), st.data())
def test_log_keeps_what_a_harvest_of_a_part_leaves(array, data):
    log = DirtyLog(len(array))
    log.mark_many(np.flatnonzero(array).astype(np.uint64))
    got, left = np.zeros(len(array), bool), array.copy()
    for _ in range(3):
        first = data.draw(st.integers(0, len(array) - 1))
        n = data.draw(st.integers(1, len(array) - first))
        offset = data.draw(st.integers(0, 100))
        into = DirtyBitmap(n + offset)
        assert log.harvest(into, offset, first=first, npages=n) == left[first:first + n].sum()
        assert (bits_of(into)[offset:] == left[first:first + n]).all()
        got[first:first + n] |= left[first:first + n]
        left[first:first + n] = False
    rest = DirtyBitmap(len(array))
    assert log.harvest(rest) == left.sum()
    assert ((got | bits_of(rest)) == array).all()
