"""gather, scatter and zero_pages: against NumPy's indexing, and what they refuse."""
import mmap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiodma import DirtyBitmap
from vfiodma._core.copy import gather, scatter, zero_pages
from vfiodma.errors import DmaPermissionError, InvalidArgumentError

PGSIZE = 64
RNG = np.random.default_rng(7)


def runs_of(*pairs):
    return np.array(pairs, np.uint64).reshape(-1, 2)


def pages_of(runs):
    return np.concatenate([np.arange(first, first + count) for first, count in runs.tolist()] or [np.empty(0, int)])


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 30)), max_size=20), st.integers(0, 1 << 30), st.booleans())
def test_gather_is_indexing_by_page_and_scatter_its_reverse(pairs, seed, by_address):
    runs = runs_of(*[(first, min(count, 100 - first)) for first, count in pairs])
    memory = np.random.default_rng(seed).integers(0, 256, (100, PGSIZE), np.uint8)
    pages = pages_of(runs)
    out = np.zeros((len(pages) + 1, PGSIZE), np.uint8)
    assert gather(memory.ctypes.data if by_address else memory, runs, out, PGSIZE) == len(pages) * PGSIZE
    assert (out[:-1] == memory[pages]).all() and not out[-1].any()
    back, model = np.zeros_like(memory), np.zeros_like(memory)
    model[pages] = memory[pages]
    assert scatter(out, runs, back.ctypes.data if by_address else back, PGSIZE) == len(pages) * PGSIZE
    assert (back == model).all()


@pytest.mark.parametrize("skew", [0, 1, 16])
def test_large_copies_that_bypass_the_cache_are_exact(skew):
    npages, ndirty = 6000, 5000
    memory = RNG.integers(0, 256, (npages, 4096), np.uint8)
    dirty = DirtyBitmap(npages)
    for page in RNG.permutation(npages)[:ndirty].tolist():
        dirty.set(page)
    pages = dirty.indices().astype(int)
    room = np.zeros(ndirty * 4096 + skew, np.uint8)
    assert gather(memory, dirty.runs(), room[skew:]) == ndirty * 4096
    assert (room[skew:].reshape(-1, 4096) == memory[pages]).all()
    back = np.zeros_like(memory)
    assert scatter(room[skew:], dirty.runs(), back) == ndirty * 4096
    assert (back[pages] == memory[pages]).all()


@pytest.mark.parametrize("runs", [runs_of((100, 1)), runs_of((99, 2)), runs_of((0, 1), (3, 0)), runs_of((2**64 - 1, 1)),
                                  runs_of((1, 2**64 - 1)), runs_of((0, 60), (0, 60))])
def test_runs_outside_the_memory_or_the_buffer_copy_nothing(runs):
    memory, line = np.ones(100 * PGSIZE, np.uint8), np.full(100 * PGSIZE, 7, np.uint8)
    with pytest.raises(InvalidArgumentError):
        gather(memory, runs, line, PGSIZE)
    assert (line == 7).all()
    with pytest.raises(InvalidArgumentError):
        scatter(line, runs, memory, PGSIZE)
    assert (memory == 1).all()


def test_address_near_the_end_of_the_address_space_is_refused():
    line = np.zeros(PGSIZE * 4, np.uint8)
    for address in (2**64 - PGSIZE, 2**64 - 1):
        with pytest.raises(InvalidArgumentError):
            gather(address, runs_of((1, 1)), line, PGSIZE)
    for address in (-1, 2**64):
        with pytest.raises(InvalidArgumentError):
            gather(address, runs_of((0, 1)), line, PGSIZE)


def test_numpy_integer_is_an_address():
    memory, line = np.arange(PGSIZE, dtype=np.uint8), np.zeros(PGSIZE, np.uint8)
    gather(np.uint64(memory.ctypes.data), runs_of((0, 1)), line, PGSIZE)
    assert (line == memory).all()


def test_overlapping_memory_is_refused():
    memory = np.arange(10 * PGSIZE, dtype=np.uint8)
    before = memory.copy()
    for runs in (runs_of((0, 5)), runs_of((3, 2)), runs_of((4, 2))):
        with pytest.raises(InvalidArgumentError, match="overlap"):
            gather(memory, runs, memory[4 * PGSIZE:], PGSIZE)
        assert (memory == before).all()
    assert gather(memory, runs_of((0, 2)), memory[4 * PGSIZE:], PGSIZE) == 2 * PGSIZE


def test_read_only_targets_and_wrong_types_are_refused():
    memory = bytearray(4 * PGSIZE)
    with pytest.raises(DmaPermissionError):
        gather(memory, runs_of((0, 1)), bytes(PGSIZE), PGSIZE)
    with pytest.raises(DmaPermissionError):
        scatter(memory, runs_of((0, 1)), bytes(PGSIZE), PGSIZE)
    for bad in ("text", None, 1.5):
        with pytest.raises(TypeError):
            gather(bad, runs_of((0, 1)), memory, PGSIZE)
        with pytest.raises(TypeError):
            gather(memory, bad, bytearray(PGSIZE), PGSIZE)
    with pytest.raises(TypeError):
        gather(memory, np.zeros((1, 2), np.int64), bytearray(PGSIZE), PGSIZE)
    for bad in (np.zeros((1, 3), np.uint64), np.zeros(2, np.uint64), np.zeros((2, 4), np.uint64)[:, ::2]):
        with pytest.raises(InvalidArgumentError):
            gather(memory, bad, bytearray(PGSIZE), PGSIZE)
    for bad in (0, -1, 3, 100, 2**64):
        with pytest.raises(InvalidArgumentError):
            gather(memory, runs_of((0, 1)), bytearray(PGSIZE), bad)


def test_buffers_are_released_after_success_and_failure():
    memory, line = bytearray(4 * PGSIZE), bytearray(PGSIZE)
    gather(memory, runs_of((3, 1)), line, PGSIZE)
    with pytest.raises(InvalidArgumentError):
        gather(memory, runs_of((4, 1)), line, PGSIZE)
    memory.append(0)
    line.append(0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, PGSIZE - 1)), max_size=50))
def test_zero_pages_finds_exactly_the_pages_without_a_set_byte(pages):
    memory = np.zeros((len(pages), PGSIZE), np.uint8)
    for page, (touched, at) in enumerate(pages):
        memory[page, at] = touched
    zero = zero_pages(memory, PGSIZE)
    assert zero.dtype == np.bool_ and zero.tolist() == [not touched for touched, _ in pages]
    out = np.full(len(pages) + 2, 9, np.uint8)
    assert zero_pages(memory, PGSIZE, out).tolist() == zero.tolist()
    assert out[len(pages):].tolist() == [9, 9]


def test_zero_pages_of_mapped_memory_and_its_refusals():
    with mmap.mmap(-1, 3 * 4096) as memory:
        memory[4096 + 4095] = 1
        assert zero_pages(memory).tolist() == [True, False, True]
        with pytest.raises(InvalidArgumentError):
            zero_pages(memoryview(memory)[:5000])
        with pytest.raises(InvalidArgumentError):
            zero_pages(memory, out=bytearray(2))
        with pytest.raises(InvalidArgumentError):
            zero_pages(memory, out=memoryview(memory)[:3])
        with pytest.raises(DmaPermissionError):
            zero_pages(memory, out=bytes(3))
        with pytest.raises(TypeError):
            zero_pages(memory, out=np.zeros(3))
