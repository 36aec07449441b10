"""RangeMap and VaddrIndex: what each operation does, and what it refuses."""
import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from vfiodma._core.rangemap import RangeMap, VaddrIndex
from vfiodma.errors import InvalidArgumentError, NotMappedError, OverlapError

TOP = 2**64 - 1
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def ranges(request, monkeypatch):
    monkeypatch.setenv("VFIODMA_CPU", request.param)
    ranges = RangeMap()
    if ranges.level != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    return ranges


def test_address_inside_a_range_translates_to_value_plus_offset(ranges):
    ranges.insert(0x1000, 0x2000, 0x7F0000000000)
    assert ranges.translate(0x1000) == 0x7F0000000000
    assert ranges.translate(0x2FFF) == 0x7F0000001FFF
    assert 0x2FFF in ranges
    assert 0xFFF not in ranges and 0x3000 not in ranges


def test_miss_raises_enoent_or_returns_the_default(ranges):
    with pytest.raises(NotMappedError) as caught:
        ranges.translate(0x3000)
    assert (caught.value.errno, caught.value.iova) == (errno.ENOENT, 0x3000)
    assert ranges.get(0x3000) is None
    assert ranges.get(0x3000, 7) == 7


def test_find_and_lower_return_the_entry(ranges):
    ranges.insert(0x1000, 0x1000, 1)
    ranges.insert(0x4000, 0x1000, 2)
    assert ranges.find(0x1FFF) == (0x1000, 0x1000, 1)
    assert ranges.find(0x2000) is None
    assert ranges.lower(0x1FFF) == (0x1000, 0x1000, 1)
    assert ranges.lower(0x2000) == (0x4000, 0x1000, 2)
    assert ranges.lower(0x5000) is None


def test_range_may_end_at_the_last_address(ranges):
    ranges.insert(TOP - 0xFFF, 0x1000, 5)
    ranges.insert(0, TOP - 0xFFF, 6)
    assert ranges.translate(TOP) == 5 + 0xFFF
    assert ranges.overlaps(TOP, 1)
    assert list(ranges) == [(0, TOP - 0xFFF, 6), (TOP - 0xFFF, 0x1000, 5)]
    ranges.remove(0)
    assert not ranges.overlaps(0, TOP - 0xFFF)


@pytest.mark.parametrize(("start", "size"), [
    (0x1000, 0), (TOP, 2), (-1, 1), (1, -1), (2**64, 1), (0, 2**64), (0x1000, TOP)])
def test_impossible_range_is_einval_and_changes_nothing(ranges, start, size):
    for operation in (lambda: ranges.insert(start, size, 0), lambda: ranges.overlaps(start, size)):
        with pytest.raises(InvalidArgumentError) as caught:
            operation()
        assert caught.value.errno == errno.EINVAL
    assert len(ranges) == 0


@pytest.mark.parametrize("wrong", ["1", 1.0, None, b"1"])
def test_wrong_type_is_a_type_error(ranges, wrong):
    calls = (ranges.insert, (wrong, 1, 1)), (ranges.translate, (wrong,)), (ranges.remove, (wrong,))
    for operation, arguments in calls:
        with pytest.raises(TypeError):
            operation(*arguments)


def test_numpy_integers_are_integers(ranges):
    ranges.insert(np.uint64(TOP), np.int32(1), np.uint64(3))
    assert ranges.translate(np.uint64(TOP)) == 3
    with pytest.raises(InvalidArgumentError):
        ranges.translate(np.int64(-1))


@pytest.mark.parametrize(("start", "size"), [(0x1000, 1), (0x1FFF, 1), (0, 0x1001), (0x1800, 0x100), (0, 0x10000)])
def test_overlap_is_eexist_and_names_what_is_there(ranges, start, size):
    ranges.insert(0x1000, 0x1000, 0)
    with pytest.raises(OverlapError) as caught:
        ranges.insert(start, size, 1)
    assert (caught.value.errno, caught.value.iova, caught.value.size) == (errno.EEXIST, start, size)
    assert "[0x1000, 0x1fff]" in caught.value.hint
    assert list(ranges) == [(0x1000, 0x1000, 0)]


def test_remove_takes_the_exact_start_only(ranges):
    ranges.insert(0x1000, 0x1000, 7)
    with pytest.raises(NotMappedError):
        ranges.remove(0x1800)
    assert ranges.remove(0x1000) == 7
    assert len(ranges) == 0


def test_set_value_replaces_the_value(ranges):
    ranges.insert(0x1000, 0x1000, 7)
    ranges.set_value(0x1000, 9)
    assert ranges.translate(0x1001) == 10
    with pytest.raises(NotMappedError):
        ranges.set_value(0x1001, 9)


def test_translation_wraps_modulo_2_to_the_64(ranges):
    ranges.insert(0, 16, TOP)
    assert ranges.translate(1) == 0


def rows(n, stride=0x3000, size=0x2000):
    return np.array([(i * stride, size, i << 20) for i in range(n)], np.uint64).reshape(n, 3)


@pytest.mark.parametrize("n", [0, 1, 18, 19, 1000, 5000])
def test_build_gives_back_its_rows(ranges, n):
    ranges.build(rows(n))
    assert ranges.check() == 0 and len(ranges) == n
    assert np.array_equal(ranges.to_array(), rows(n))
    assert list(ranges) == [tuple(row) for row in rows(n).tolist()]


def test_build_refuses_what_is_not_ascending_and_disjoint(ranges):
    good = rows(100)
    for change in (good[::-1].copy(), np.repeat(good, 2, axis=0), np.where([0, 1, 0], np.uint64(0), good),
                   np.where([0, 1, 0], np.uint64(TOP), good)):
        with pytest.raises(InvalidArgumentError):
            ranges.build(change)
        assert len(ranges) == 0 and ranges.check() == 0


def test_build_needs_an_empty_map(ranges):
    ranges.insert(0, 1, 0)
    with pytest.raises(OverlapError):
        ranges.build(rows(3))
    ranges.clear()
    ranges.build(rows(3))
    assert len(ranges) == 3


def test_build_refuses_another_shape_or_type(ranges):
    with pytest.raises(TypeError, match="shape"):
        ranges.build(np.zeros((3, 2), np.uint64))
    with pytest.raises(TypeError, match="uint64"):
        ranges.build(np.zeros((3, 3)))
    with pytest.raises((TypeError, ValueError, BufferError)):
        ranges.build(rows(10)[::2])


@pytest.mark.parametrize("n", [0, 1, 3, 15, 16, 17, 64, 65, 1000])
@pytest.mark.parametrize("pattern", ["random", "sequential", "backwards"])
def test_translate_many_agrees_with_translate(ranges, n, pattern):
    ranges.build(rows(500))
    keys = np.random.default_rng(n).integers(0, 500 * 0x3000, n, np.uint64)
    if pattern != "random":
        keys = np.arange(n, dtype=np.uint64)[::1 if pattern == "sequential" else -1] * np.uint64(0x1000)
    expected = [ranges.get(int(key), 3) for key in keys]
    assert ranges.translate_many(keys.copy(), miss=3).tolist() == expected
    out = np.empty_like(keys)
    assert ranges.translate_many(keys.copy(), out, 3) is out
    assert out.tolist() == expected
    keys = keys.copy()
    ranges.translate_many(keys, keys, 3)
    assert keys.tolist() == expected


def test_translate_many_of_an_empty_map_misses(ranges):
    assert (ranges.translate_many(np.arange(100, dtype=np.uint64)) == TOP).all()


def test_translate_many_refuses_buffers_that_do_not_fit(ranges):
    keys = np.arange(4, dtype=np.uint64)
    for wrong in (np.arange(4), keys.astype(">u8"), keys.astype(np.uint32), bytes(32)):
        with pytest.raises(TypeError):
            ranges.translate_many(wrong)
    with pytest.raises(ValueError, match="3 elements"):
        ranges.translate_many(keys, keys[:3])
    keys.setflags(write=False)
    assert len(ranges.translate_many(keys)) == 4
    with pytest.raises((ValueError, BufferError)):
        ranges.translate_many(keys, keys)


def test_iteration_survives_changes(ranges):
    ranges.build(rows(300))
    seen = []
    for start, _, _ in ranges:
        seen.append(start)
        ranges.remove(start)
    assert seen == [i * 0x3000 for i in range(300)] and len(ranges) == 0


def test_memory_is_within_64_bytes_an_entry(ranges):
    ranges.build(rows(50_000))
    assert (sys.getsizeof(ranges) - 2**21) / 50_000 < 64     # the pool grows by up to 2 MiB


def test_readers_in_threads_see_only_whole_entries(ranges):
    """Even slots stay, odd slots come and go; a value tells which slot it belongs to."""
    for slot in range(0, 2000, 2):
        ranges.insert(slot * 16, 16, slot << 32)
    keys = np.random.default_rng(5).integers(0, 2000 * 16, 5000, np.uint64)
    wrong, stop = [], threading.Event()

    def read():
        while not stop.is_set():
            got = ranges.translate_many(keys)
            slots = keys // 16
            good = got == (slots << np.uint64(32)) + keys % 16
            if not (good | ((slots % 2 == 1) & (got == TOP))).all():
                wrong.append(got)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers:
        thread.start()
    for turn in range(20):
        for slot in range(1 + turn % 2 * 400, 1000, 2):
            ranges.insert(slot * 16, 16, slot << 32)
        for slot in range(1 + turn % 2 * 400, 1000, 2):
            ranges.remove(slot * 16)
    stop.set()
    for thread in readers:
        thread.join()
    assert not wrong and ranges.check() == 0


def test_vaddr_index_finds_every_mapping_of_an_address():
    index = VaddrIndex()
    index.insert(0x1000, 0x3000, 0xA000)
    index.insert(0x2000, 0x1000, 0xF000)
    index.insert(0x2000, 0x1000, 0xE000)
    assert index.find(0x2800) == [(0x1000, 0x3000, 0xA000), (0x2000, 0x1000, 0xE000), (0x2000, 0x1000, 0xF000)]
    assert index.iovas(0x2800) == [0xB800, 0xE800, 0xF800]
    assert index.iovas(0x3000) == [0xC000] and index.iovas(0x4000) == []
    index.remove(0x2000, 0xE000)
    assert index.iovas(0x2000) == [0xB000, 0xF000] and len(index) == 2


def test_vaddr_index_refuses_twice_the_same_and_what_is_not_there():
    index = VaddrIndex()
    index.insert(0x1000, 0x1000, 0xA000)
    with pytest.raises(OverlapError):
        index.insert(0x1000, 0x2000, 0xA000)
    with pytest.raises(NotMappedError):
        index.remove(0x1000, 0xB000)
    with pytest.raises(InvalidArgumentError):
        index.insert(0x1000, 0, 0)
    index.clear()
    assert len(index) == 0 and index.find(0x1000) == []


def test_vaddr_index_returns_more_than_fit_in_its_first_buffer():
    index = VaddrIndex()
    for i in range(100):
        index.insert(TOP - i, i + 1, i << 16)
    assert len(index.find(TOP)) == 100 and index.check() == 0


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler")
def test_c_functions_can_be_cimported(tmp_path):
    (tmp_path / "user.pyx").write_text(
        "from vfiodma._core.rangemap cimport RangeMap, rangemap, rangemap_free, rangemap_insert, rangemap_new, "
        "rangemap_count, vaddrindex_new, vaddrindex_free\n"
        "def count():\n"
        "    cdef rangemap *ranges = rangemap_new()\n"
        "    rangemap_insert(ranges, 0, 9, 1)\n"
        "    n = rangemap_count(ranges)\n"
        "    rangemap_free(ranges)\n"
        "    vaddrindex_free(vaddrindex_new())\n"
        "    return n\n")
    (tmp_path / "setup.py").write_text(
        "from Cython.Build import cythonize\nfrom setuptools import Extension, setup\n"
        f"csrc = {str(ROOT / 'csrc')!r}\n"
        "user = Extension('user', ['user.pyx', csrc + '/rangemap.c', csrc + '/vaddrindex.c'], include_dirs=[csrc],\n"
        "                 extra_compile_args=['-D_GNU_SOURCE', '-w'])\n"
        "setup(ext_modules=cythonize([user], language_level=3))\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for arguments in (["setup.py", "-q", "build_ext", "--inplace"], ["-c", "import user; assert user.count() == 1"]):
        subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True, env=environment)
