"""What DirtyBitmap and DirtyLog refuse, who owns the memory, and marks from many threads."""
import gc
import os
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

from vfiodma import DirtyBitmap, DirtyLog
from vfiodma._core.bitmap import cpu_variant
from vfiodma.errors import DmaPermissionError, InvalidArgumentError, LockedMemoryError, VfioError

OUTSIDE = [-1, 2**64, 2**70, -2**64]
WRONG = [None, "1", 1.0, b"1", [1]]


@pytest.fixture
def bitmap():
    bitmap = DirtyBitmap(1000)
    bitmap.set(10, 100)
    return bitmap


@pytest.mark.parametrize("make", [DirtyBitmap, DirtyLog, lambda *args: DirtyBitmap.frombuffer(bytearray(64), *args)])
def test_wrong_sizes_are_refused(make):
    for npages in [*OUTSIDE, 0]:
        with pytest.raises(InvalidArgumentError):
            make(npages)
    for pgsize in [*OUTSIDE, 0, 3, 4095, 2**63 + 1]:
        with pytest.raises(InvalidArgumentError):
            make(64, pgsize)
    for wrong in WRONG:
        with pytest.raises(TypeError):
            make(wrong)
        with pytest.raises(TypeError):
            make(64, wrong)


@pytest.mark.parametrize("make", [DirtyBitmap, DirtyLog])
def test_more_pages_than_memory_is_enomem(make):
    for npages in (2**60, 2**63, 2**64 - 1):
        with pytest.raises(LockedMemoryError) as caught:
            make(npages)
        assert isinstance(caught.value, MemoryError)


@pytest.mark.parametrize("name", ["set", "clear"])
def test_pages_outside_change_nothing(bitmap, name):
    operation, before = getattr(bitmap, name), bytes(bitmap)
    for number in OUTSIDE:
        with pytest.raises(InvalidArgumentError):
            operation(number)
        with pytest.raises(InvalidArgumentError):
            operation(0, number)
    for first, n in [(1000, 1), (999, 2), (0, 1001), (0, 0), (1, 2**64 - 1), (2**64 - 1, 1), (2**64 - 1, 2**64 - 1)]:
        with pytest.raises(InvalidArgumentError):
            operation(first, n)
    for wrong in WRONG:
        with pytest.raises(TypeError):
            operation(wrong)
    assert bytes(bitmap) == before


def test_test_refuses_pages_outside(bitmap):
    assert bitmap.test(10) is True and bitmap.test(999) is False
    for page in [*OUTSIDE, 1000, 2**64 - 1]:
        with pytest.raises(InvalidArgumentError):
            bitmap.test(page)
    for wrong in WRONG:
        with pytest.raises(TypeError):
            bitmap.test(wrong)


def test_numpy_integers_are_numbers_of_pages(bitmap):
    bitmap.set(np.uint64(500), np.int32(2))
    assert bitmap.test(np.uint8(110)) is False and bitmap.count() == 102


@pytest.mark.parametrize("operation", [DirtyBitmap.merge, DirtyBitmap.andnot])
def test_merge_refuses_other_shapes_and_overlapping_memory(bitmap, operation):
    before = bytes(bitmap)
    for other in (DirtyBitmap(999), DirtyBitmap(1001), DirtyBitmap(1000, 8192)):
        with pytest.raises(InvalidArgumentError):
            operation(bitmap, other)
    with pytest.raises(InvalidArgumentError, match="overlap"):
        operation(bitmap[0:640], bitmap[64:704])
    for wrong in (None, 1, bytes(128), bitmap.indices()):
        with pytest.raises(TypeError):
            operation(bitmap, wrong)
    assert bytes(bitmap) == before


def test_harvest_refuses_what_does_not_fit_and_moves_nothing(bitmap):
    into, before = DirtyBitmap(1064), bytes(bitmap)
    for offset in [*OUTSIDE, 65, 1064, 2**64 - 1]:
        with pytest.raises(InvalidArgumentError):
            bitmap.harvest(into, offset)
    for bad in (DirtyBitmap(999), DirtyBitmap(1000, 65536), bitmap, bitmap[:], bytearray(124),
                np.zeros(40, np.uint64)[::2]):
        with pytest.raises(InvalidArgumentError):
            bitmap.harvest(bad)
    for read_only in (bytes(128), DirtyBitmap.frombuffer(bytes(128), 1000)):
        with pytest.raises(DmaPermissionError):
            bitmap.harvest(read_only)
    for wrong in (None, 1, "text", [0] * 16):
        with pytest.raises(TypeError):
            bitmap.harvest(wrong)
    assert bytes(bitmap) == before and not into.any()
    assert bitmap.harvest(into, 64) == 100 and into.runs().tolist() == [[74, 100]]


def test_slices_share_memory_and_start_at_words(bitmap):
    part = bitmap[64:101]
    assert (part.npages, part.pgsize, part.count()) == (37, 4096, 37)
    part.clear()
    assert bitmap.runs().tolist() == [[10, 54], [101, 9]]
    assert bitmap[960:].npages == 40 and bitmap[:].count() == bitmap.count()
    for a, b in [(1, 64), (63, 1000), (64, 64), (128, 64), (1000, None), (5000, 6000)]:
        with pytest.raises(InvalidArgumentError):
            bitmap[a:b]
    with pytest.raises(InvalidArgumentError):
        bitmap[0:128:2]
    for wrong in (0, None, "a", (slice(0, 64), 0)):
        with pytest.raises(TypeError):
            bitmap[wrong]


def test_read_only_buffers_are_read_only_bitmaps():
    bitmap = DirtyBitmap.frombuffer(b"\x01" * 16, 100)
    assert bitmap.readonly and bitmap[64:].readonly and bitmap.count() == 13
    other = DirtyBitmap(100)
    for change in (lambda: bitmap.set(1), bitmap.clear, lambda: bitmap[64:].set(0), lambda: bitmap.merge(other),
                   lambda: bitmap.andnot(other), lambda: bitmap.harvest(other)):
        with pytest.raises(DmaPermissionError):
            change()
    assert memoryview(bitmap).readonly
    assert not np.asarray(bitmap).flags.writeable


def test_frombuffer_refuses_small_misaligned_and_strided_memory():
    memory = np.zeros(100, np.uint8)
    skew = -memory.ctypes.data % 8
    for bad, npages in [(memory[skew:skew + 8], 65), (memory[skew + 1:], 64), (memory[::2], 64), (bytearray(7), 1),
                        (bytearray(8), 2**64 - 1)]:
        with pytest.raises(InvalidArgumentError):
            DirtyBitmap.frombuffer(bad, npages)
    for wrong in (None, 1, "text"):
        with pytest.raises(TypeError):
            DirtyBitmap.frombuffer(wrong, 64)


def test_buffer_is_writable_words_that_keep_the_bitmap_alive(bitmap):
    view = memoryview(bitmap)
    assert (view.format, view.itemsize, view.shape, view.readonly) == ("Q", 8, (16,), False)
    assert view.nbytes == bitmap.nbytes == 128
    words = np.asarray(bitmap)
    words[15] = 1 << 39
    assert bitmap.test(999)
    del bitmap, view
    gc.collect()
    assert np.bitwise_count(words).sum() == 101


def test_frombuffer_and_slices_keep_their_owner_and_release_it():
    class Memory(bytearray):
        pass

    memory = Memory(64)
    alive = weakref.ref(memory)
    part = DirtyBitmap.frombuffer(memory, 512)[64:]
    with pytest.raises(BufferError):
        memory.append(1)
    del memory
    part.set(0)
    assert alive() is not None
    del part
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("name, columns", [("runs", 2), ("indices", 1)])
def test_out_arrays_are_checked_before_anything_is_written(bitmap, name, columns):
    operation = getattr(bitmap, name)
    rows = len(operation())
    short = np.full((rows - 1, 2) if columns == 2 else rows - 1, 7, np.uint64)
    with pytest.raises(InvalidArgumentError):
        operation(short)
    assert (short == 7).all()
    for bad in (np.zeros((rows, 3), np.uint64), np.zeros((2 * rows, 2 * columns), np.uint64)[::2, ::2]):
        with pytest.raises(InvalidArgumentError):
            operation(bad)
    for wrong in (np.zeros((rows, columns), np.int64), np.zeros((rows, columns)), 1, "text", bytearray(2000)):
        with pytest.raises(TypeError):
            operation(wrong)
    locked = np.zeros((rows, 2) if columns == 2 else rows, np.uint64)
    locked.flags.writeable = False
    with pytest.raises(DmaPermissionError):
        operation(locked)


def test_indices_into_the_bitmap_itself_are_refused():
    bitmap = DirtyBitmap(1000)
    bitmap.set(3)
    with pytest.raises(InvalidArgumentError, match="overlap"):
        bitmap.indices(np.asarray(bitmap))


def test_scale_refuses_page_sizes_that_are_none(bitmap):
    for pgsize in [*OUTSIDE, 0, 3, 5000]:
        with pytest.raises(InvalidArgumentError):
            bitmap.scale(pgsize)
    with pytest.raises(InvalidArgumentError):
        DirtyBitmap(1 << 20, 1 << 63).scale(1)
    assert bitmap.scale(1 << 63).npages == 1
    same = bitmap.scale(4096)
    same.clear()
    assert bitmap.count() == 100


def test_log_refuses_what_is_not_inside():
    log, into = DirtyLog(1000), DirtyBitmap(1000)
    for first, n in [(1000, 1), (0, 1001), (0, 0), (-1, 1), (0, 2**64), (1, 2**64 - 1)]:
        with pytest.raises(InvalidArgumentError):
            log.mark(first, n)
        with pytest.raises(InvalidArgumentError):
            log.harvest(into, first=first, npages=n)
    with pytest.raises(InvalidArgumentError):
        log.mark_many(np.array([1, 1000], np.uint64))
    with pytest.raises(TypeError):
        log.mark_many([1, 2])
    with pytest.raises(TypeError):
        log.mark("1")
    assert log.harvest(into) == 0 and not into.any()
    log.mark(999)
    for bad in (DirtyBitmap(999), DirtyBitmap(1000, 8192)):
        with pytest.raises(InvalidArgumentError):
            log.harvest(bad)
    with pytest.raises(DmaPermissionError):
        log.harvest(bytes(128))
    with pytest.raises(InvalidArgumentError):
        log.harvest(into, 1)
    assert log.harvest(into) == 1 and into.test(999)


def test_no_mark_of_any_thread_is_lost_while_another_harvests():
    npages, rounds, nthreads = 100_000, 40, 4
    log, total = DirtyLog(npages), DirtyBitmap(npages)
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)
    pages = [np.random.default_rng((seed, i)).integers(0, npages, (rounds, 5000), np.uint64) for i in range(nthreads)]
    handed_over = []

    def mark(own):
        for row in own:
            log.mark_many(row)
            log.mark(int(row[0]), 1)

    threads = [threading.Thread(target=mark, args=(own,)) for own in pages]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        part = DirtyBitmap(npages)
        handed_over.append(log.harvest(part))
        assert part.count() == handed_over[-1]
        total.merge(part)
    for thread in threads:
        thread.join()
    handed_over.append(log.harvest(total))
    assert (total.indices() == np.unique(np.concatenate([own.ravel() for own in pages]))).all()
    assert log.harvest(total) == 0


def test_log_works_in_the_child_of_a_fork():
    log = DirtyLog(100)
    stop = threading.Event()

    def keep_marking():
        while not stop.is_set():
            log.mark_many(np.arange(100, dtype=np.uint64))

    thread = threading.Thread(target=keep_marking)
    thread.start()
    try:
        for _ in range(5):
            child = os.fork()
            if not child:
                fresh = DirtyLog(100)
                fresh.mark(7)
                os._exit(0 if fresh.harvest(DirtyBitmap(100)) == 1 else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()


def test_cpu_variant_is_lowered_by_the_environment():
    program = "from vfiodma._core.bitmap import cpu_variant; print(cpu_variant())"
    names = ["scalar", cpu_variant(), "unknown"]
    got = [subprocess.run([sys.executable, "-c", program], env={**os.environ, "VFIODMA_CPU": name}, check=True,
                          capture_output=True, text=True).stdout.strip() for name in names]
    assert got[:2] == names[:2] and got[2] in ("scalar", "neon", "avx2", "avx512")
    with pytest.raises(InvalidArgumentError):
        cpu_variant("z80")
    with pytest.raises(TypeError):
        cpu_variant(3)


def test_every_refusal_is_a_vfio_error_with_operation_and_errno(bitmap):
    with pytest.raises(VfioError) as caught:
        bitmap.set(1000)
    assert (caught.value.operation, caught.value.errno) == ("set", 34)
    assert "1000 pages" in str(caught.value)
