"""Laws of address spaces and guest memory that hold for every layout."""
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiodma._core.bitmap import DirtyBitmap
from vfiodma.address_space import IoAddressSpace
from vfiodma.memory import GuestMemory

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))
from fake_backend import FakeBackend  # noqa: E402

PAGE = mmap.PAGESIZE
NPAGES = 12
BASE = 0x100000


@pytest.fixture(scope="module")
def memory():
    with GuestMemory.memfd(NPAGES * PAGE) as memory:
        memory.write(0, np.random.default_rng(1).bytes(NPAGES * PAGE))
        yield memory


# A layout: which page of the memory is at each page of the IOVA window, None = a hole.  Runs become one mapping each.
layouts = st.lists(st.none() | st.integers(0, NPAGES - 1), min_size=1, max_size=24)


def lay_out(ioas, memory, layout):
    for i, page in enumerate(layout):
        if page is not None:
            ioas.map(memory, BASE + i * PAGE, offset=page * PAGE, size=PAGE)


@given(layout=layouts, data=st.data())
def test_pieces_of_a_range_are_its_bytes(memory, layout, data):
    with IoAddressSpace(FakeBackend()) as ioas:
        lay_out(ioas, memory, layout)
        first = data.draw(st.integers(0, len(layout) * PAGE - 1))
        size = data.draw(st.integers(1, len(layout) * PAGE - first))
        touched = layout[first // PAGE:(first + size - 1) // PAGE + 1]
        if None in touched:
            with pytest.raises(LookupError) as caught:
                ioas.sgl(BASE + first, size)
            hole = (first // PAGE + touched.index(None)) * PAGE
            assert caught.value.iova == BASE + max(first, hole)
            return
        pieces = ioas.sgl(BASE + first, size)
        assert sum(length for _, length in pieces) == size
        assert all(sum(a) != b[0] for a, b in zip(pieces, pieces[1:], strict=False)), "neighbours are joined"
        whole = memory.read(0, NPAGES * PAGE)
        expected = b"".join(whole[page * PAGE:(page + 1) * PAGE] for page in touched)[first % PAGE:][:size]
        start = memory.region.vaddr
        assert b"".join(whole[vaddr - start:vaddr - start + length] for vaddr, length in pieces) == expected
        assert ioas.read(BASE + first, size) == expected


@given(layout=layouts)
def test_translation_and_the_way_back_agree(memory, layout):
    with IoAddressSpace(FakeBackend()) as ioas:
        lay_out(ioas, memory, layout)
        iovas = np.arange(len(layout), dtype=np.uint64) * PAGE + BASE + 7
        batch = ioas.translate_many(iovas).tolist()
        for iova, vaddr, page in zip(iovas.tolist(), batch, layout, strict=True):
            assert ioas.get(iova) == (None if page is None else vaddr)
            if page is not None:
                assert vaddr == memory.region.vaddr + page * PAGE + 7 == ioas.translate(iova)
                assert ioas.iovas_of(vaddr) == [BASE + i * PAGE + 7 for i, other in enumerate(layout) if other == page]


@given(marks=st.lists(st.tuples(st.integers(0, NPAGES * PAGE - 1), st.integers(1, 3 * PAGE)), max_size=8),
       cuts=st.sets(st.integers(1, NPAGES - 1)))
def test_marks_come_out_once_however_the_range_is_cut(memory, marks, cuts):
    with IoAddressSpace(FakeBackend()) as ioas:
        ioas.map(memory, BASE, size=8 * PAGE)
        ioas.map(memory, BASE + 8 * PAGE, offset=8 * PAGE)
        expected = set()
        for first, size in marks:
            size = min(size, NPAGES * PAGE - first)
            ioas.mark_dirty(BASE + first, size)
            expected |= set(range(first // PAGE, (first + size - 1) // PAGE + 1))
        borders = [0, *sorted(cuts), NPAGES]
        found = []
        for begin, end in zip(borders, borders[1:], strict=False):
            into = DirtyBitmap(end - begin, PAGE)
            assert ioas.harvest_marked(BASE + begin * PAGE, (end - begin) * PAGE, into) == into.count()
            found += [begin + page for page in into.indices().tolist()]
        assert found == sorted(expected)


@given(regions=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 3)), max_size=6),
       at=st.integers(0, 33 * PAGE), size=st.integers(0, 4 * PAGE))
def test_guest_memory_is_flat_where_regions_touch(regions, at, size):
    flat, present = bytearray(40 * PAGE), set()
    with GuestMemory() as memory:
        for page, npages in regions:
            mine = set(range(page, page + npages))
            region = GuestMemory.anonymous(npages * PAGE).region
            if mine & present:
                with pytest.raises(FileExistsError), region:
                    memory.add(region, page * PAGE)
                continue
            memory.add(region, page * PAGE)
            present |= mine
        data = bytes(i % 251 for i in range(size))
        if set(range(at // PAGE, (at + size + PAGE - 1) // PAGE if size else at // PAGE)) <= present:
            memory.write(at, data)
            flat[at:at + size] = data
            assert memory.read(at, size) == data
        else:
            with pytest.raises(LookupError):
                memory.write(at, data)
        assert all(memory.read(page * PAGE, PAGE) == flat[page * PAGE:(page + 1) * PAGE] for page in present)
