"""Writes of the process, found by write protection (WriteWatch) or by comparing hashes (PageHashes)."""
import contextlib
import ctypes
import mmap
import os
import random

import numpy as np
import pytest

from vfiodma import DirtyBitmap, GuestMemory
from vfiodma._core.userfault import PageHashes, WriteWatch
from vfiodma.errors import ClosedError, DmaPermissionError, InvalidArgumentError, UnsupportedError

PAGE = 4096
NPAGES = 512 * 3


def watch(vaddr, size, pgsize=PAGE):
    try:
        return WriteWatch(vaddr, size, pgsize)
    except (UnsupportedError, DmaPermissionError) as exc:
        pytest.skip(str(exc))


@contextlib.contextmanager
def anonymous():
    area = mmap.mmap(-1, NPAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    yield ctypes.addressof(ctypes.c_char.from_buffer(area))


@contextlib.contextmanager
def huge_anonymous():
    area = mmap.mmap(-1, NPAGES * PAGE + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    vaddr = ctypes.addressof(ctypes.c_char.from_buffer(area))
    yield -(-vaddr // (2 << 20)) * (2 << 20)


@contextlib.contextmanager
def shared():
    with GuestMemory.memfd(NPAGES * PAGE) as memory:
        yield memory.region.vaddr


@pytest.fixture
def vaddr():
    with shared() as address:
        yield address


@pytest.mark.parametrize("make", [anonymous, huge_anonymous, shared])
@pytest.mark.parametrize("populated", [False, True])
def test_exactly_the_written_pages_are_found_and_only_once(make, populated):
    with make() as vaddr:
        check_exactness(vaddr, populated)


def check_exactness(vaddr, populated):
    if populated:
        ctypes.memset(vaddr, 1, NPAGES * PAGE)
    watched = watch(vaddr, NPAGES * PAGE)
    bitmap = DirtyBitmap(NPAGES)
    assert watched.harvest(bitmap) == 0
    rng = random.Random(7)
    for _ in range(5):
        pages = sorted(rng.sample(range(NPAGES), 40))
        for page in pages:
            ctypes.memset(vaddr + page * PAGE + rng.randrange(PAGE), 5, 1)
        ctypes.string_at(vaddr, NPAGES * PAGE)              # reading is not writing
        assert watched.harvest(bitmap) == len(pages)
        assert bitmap.indices().tolist() == pages
        bitmap.clear()
    assert watched.harvest(bitmap) == 0 and not bitmap.any()
    watched.stop()


def test_bits_may_stand_for_larger_pages(vaddr):
    watched = watch(vaddr, NPAGES * PAGE, 4 * PAGE)
    bitmap = DirtyBitmap(NPAGES // 4, 4 * PAGE)
    for page in (0, 2, 3, 9):
        ctypes.memset(vaddr + page * PAGE, 5, 1)
    assert watched.harvest(bitmap) == 2
    assert bitmap.indices().tolist() == [0, 2]
    watched.stop()


def test_writes_by_system_calls_count(vaddr):
    watched = watch(vaddr, NPAGES * PAGE)
    bitmap = DirtyBitmap(NPAGES)
    with open("/dev/zero", "rb", buffering=0) as zero:
        view = (ctypes.c_char * 10).from_address(vaddr + 77 * PAGE)
        zero.readinto(view)
    assert watched.harvest(bitmap) == 1 and bitmap.test(77)
    watched.stop()


def test_a_page_that_changes_while_it_is_harvested_is_in_this_report_or_the_next(vaddr):
    import threading
    watched = watch(vaddr, NPAGES * PAGE)
    words = (ctypes.c_uint64 * (NPAGES * PAGE // 8)).from_address(vaddr)
    counters = np.frombuffer(words, np.uint64).reshape(NPAGES, -1)[:, 0]
    seen = np.zeros(NPAGES, np.uint64)
    stop = threading.Event()

    def write():
        rng = np.random.default_rng(1)
        while not stop.is_set():
            counters[rng.integers(0, NPAGES, 50)] += np.uint64(1)

    thread = threading.Thread(target=write)
    thread.start()
    bitmap = DirtyBitmap(NPAGES)
    for turn in range(60):
        if turn == 50:
            stop.set()
            thread.join()
        watched.harvest(bitmap)
        dirty = bitmap.indices().astype(np.int64)
        seen[dirty] = counters[dirty]
        bitmap.clear()
    assert np.array_equal(seen, counters)
    watched.stop()


def test_watching_what_is_not_mapped_is_refused():
    area = mmap.mmap(-1, PAGE)
    vaddr = ctypes.addressof(view := ctypes.c_char.from_buffer(area))
    watch(vaddr, PAGE).stop()
    del view
    area.close()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Exception) as caught:
        WriteWatch(vaddr & ~((1 << 40) - 1), PAGE)
    assert isinstance(caught.value, OSError)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("at", "size", "pgsize"), [
    (1, PAGE, PAGE), (PAGE, 1, PAGE), (PAGE, 0, PAGE), (PAGE, PAGE, 100), (PAGE, PAGE, 2 * PAGE),
    ((1 << 64) - PAGE, 2 * PAGE, PAGE), (-1, PAGE, PAGE)])
def test_places_that_are_no_pages_are_refused(at, size, pgsize):
    with pytest.raises(InvalidArgumentError):
        WriteWatch(at, size, pgsize)


def test_a_bitmap_too_small_and_a_watch_that_stopped_are_refused(vaddr):
    watched = watch(vaddr, NPAGES * PAGE)
    with pytest.raises(InvalidArgumentError):
        watched.harvest(bytearray(NPAGES // 8 - 1))
    watched.stop()
    watched.stop()
    with pytest.raises(ClosedError):
        watched.harvest(DirtyBitmap(NPAGES))


# ---- hashes

def test_hashes_find_every_single_changed_byte():
    memory = bytearray(os.urandom(8 * PAGE))
    hashes = PageHashes(memory)
    hashes.note(np.array([[0, 8]], np.uint64), memory)
    bitmap = DirtyBitmap(8)
    rng = random.Random(3)
    for at in [0, PAGE - 1, PAGE, 8 * PAGE - 1, *rng.sample(range(8 * PAGE), 400)]:
        before, memory[at] = memory[at], memory[at] ^ (1 << rng.randrange(8))
        assert hashes.harvest(bitmap) == 1 and bitmap.test(at // PAGE)
        memory[at] = before
        bitmap.clear()
    assert hashes.harvest(bitmap) == 0


def test_words_that_change_places_do_not_go_unnoticed():
    memory = bytearray(np.arange(PAGE // 8, dtype=np.uint64).tobytes())
    hashes = PageHashes(memory)
    words = np.frombuffer(memory, np.uint64)
    hashes.note(np.array([[0, 1]], np.uint64), bytes(memory))
    for distance in (1, 2, 3, 4, 7, 8, 16, 64, 256):
        words[[5, 5 + distance]] = words[[5 + distance, 5]]
        assert hashes.harvest(DirtyBitmap(1)) == 1
        words[[5, 5 + distance]] = words[[5 + distance, 5]]
    assert hashes.harvest(DirtyBitmap(1)) == 0


def test_pages_never_noted_differ():
    hashes = PageHashes(bytearray(4 * PAGE))
    hashes.note(np.array([[1, 2]], np.uint64), bytes(2 * PAGE))
    bitmap = DirtyBitmap(4)
    assert hashes.harvest(bitmap) == 2 and bitmap.indices().tolist() == [0, 3]


@pytest.mark.parametrize(("runs", "size"), [
    ([[4, 1]], PAGE), ([[0, 5]], 5 * PAGE), ([[2**64 - 1, 2]], PAGE), ([[0, 1]], 7), ([[3, 2**64 - 1]], PAGE)])
def test_runs_outside_or_of_another_size_are_refused(runs, size):
    hashes = PageHashes(bytearray(4 * PAGE))
    with pytest.raises(InvalidArgumentError):
        hashes.note(np.array(runs, np.uint64), bytes(size))
