"""IovaAllocator: what each option promises, and that every refusal is typed and changes nothing."""
import errno
import os
import pathlib
import subprocess
import threading

import pytest

from vfiodma._core.iova import IovaAllocator
from vfiodma.errors import InvalidArgumentError, IovaSpaceError, NotMappedError, OverlapError
from vfiodma.types import IovaRange

K4, M2, G1 = 1 << 12, 1 << 21, 1 << 30
EVERYTHING = [(0, 2**64 - 1)]
ROOT = pathlib.Path(__file__).parents[2]


def failed(call, kind, code):
    with pytest.raises(kind) as info:
        call()
    assert info.value.errno == code
    return str(info.value)


def test_iova_zero_is_reserved_only_on_request():
    allocator = IovaAllocator([(0, M2 - 1)])
    assert allocator.allocate(K4) == K4
    allocator.reserve(0, K4)
    assert allocator.stats().free == M2 - 2 * K4
    allocator.free(0)
    assert allocator.allocate(K4, hint=0) == 2 * K4
    assert min(r.start for r in allocator.allocations()) == K4
    while True:
        try:
            assert allocator.allocate(K4)
        except IovaSpaceError:
            break
    assert allocator.stats().free == K4


def test_reserve_across_iova_zero_gives_everything_back():
    allocator = IovaAllocator([(0, G1 - 1)])
    allocator.reserve(0, M2)
    assert allocator.allocate(K4) == M2
    allocator.free(0)
    allocator.free(M2)
    assert allocator.stats().free == G1 and allocator.stats().gaps == 1


@pytest.mark.parametrize("size, expected", [(K4, K4), (M2 - K4, K4), (M2, M2), (G1 - K4, M2), (G1, G1), (3 * G1, G1)])
def test_default_alignment_is_the_largest_page_size_that_fits(size, expected):
    allocator = IovaAllocator([(K4, 2**40 - 1)])
    assert allocator.allocate(size) == max(expected, K4)


def test_default_alignment_follows_pgsizes():
    amd = IovaAllocator([(K4, 2**40 - 1)], pgsizes=0xFFFFFFFFFFFFF000)
    assert amd.allocate(6 * M2) == 4 * M2
    big_pages = IovaAllocator([(0, 2**40 - 1)], pgsizes=1 << 34)
    assert big_pages.allocate(1 << 34) == 1 << 34
    arm = IovaAllocator([(0, 2**40 - 1)], pgsizes=0x20010000)
    assert (arm.pgsize, arm.allocate(1 << 29), arm.allocate(1 << 16)) == (1 << 16, 1 << 29, 1 << 16)


def test_exactly_aligned_hole_is_found_top_and_bottom():
    for top_down in (False, True):
        allocator = IovaAllocator([(M2, 2 * M2 - 1), (3 * M2 + K4, 4 * M2 + K4 - 1)])
        assert allocator.allocate(M2, top_down=top_down) == M2


def test_last_page_of_the_address_space_is_usable():
    allocator = IovaAllocator(EVERYTHING)
    assert allocator.allocate(K4, top_down=True) == 2**64 - K4
    assert allocator.allocate(G1, top_down=True) == 2**64 - 2 * G1
    allocator.free(2**64 - K4)
    allocator.reserve(2**64 - K4, K4)
    assert allocator.allocate(K4, limit=2**64 - 1) == K4


def test_limit_is_inclusive_and_does_not_count_the_guard():
    allocator = IovaAllocator([(0, G1 - 1)])
    allocator.reserve(0, M2 - K4)
    assert "alignment" in failed(lambda: allocator.allocate(K4, limit=M2 - 2), IovaSpaceError, errno.ENOSPC)
    assert allocator.allocate(K4, limit=M2 - 1, guard=M2) == M2 - K4
    assert allocator.allocate(K4) == 2 * M2
    assert allocator.allocate(K4, limit=8 * M2 - 1, guard=M2, top_down=True) == 8 * M2 - K4
    failed(lambda: allocator.allocate(K4, limit=100), IovaSpaceError, errno.ENOSPC)


def test_guard_is_nobody_elses():
    allocator = IovaAllocator([(K4, 8 * K4 - 1)])
    assert [allocator.allocate(K4, guard=K4) for _ in range(3)] == [K4, 3 * K4, 5 * K4]
    failed(lambda: allocator.reserve(2 * K4, K4), OverlapError, errno.EEXIST)
    failed(lambda: allocator.allocate(K4, guard=K4), IovaSpaceError, errno.ENOSPC)
    assert allocator.allocations()[0] == IovaRange(K4, 2 * K4 - 1)
    allocator.free(K4)
    assert allocator.allocate(2 * K4) == K4


def test_hint_is_used_when_it_can_be():
    allocator = IovaAllocator([(0, G1 - 1)])
    assert allocator.allocate(K4, hint=5 * K4) == 5 * K4
    assert allocator.allocate(K4, hint=5 * K4) == K4
    assert allocator.allocate(M2, hint=M2 + K4) == M2 + K4
    assert allocator.allocate(M2, hint=M2 * 7 + K4, align=M2) == 3 * M2
    assert allocator.allocate(K4, hint=12345) == 2 * K4
    assert allocator.allocate(K4, hint=8 * M2, limit=8 * M2 + K4 - 2) == 3 * K4
    assert allocator.allocate(K4, hint=2**64 - K4) == 4 * K4


def test_reserved_windows_and_odd_borders_are_left_out():
    allocator = IovaAllocator([(1, 0xFEEFFFFE)], reserved=[(0x2001, 0x2001), (0xFEE00000, 0xFEEFFFFF)])
    assert allocator.ranges == [(0x1000, 0x1FFF), (0x3000, 0xFEDFFFFF)]
    failed(lambda: allocator.reserve(0x2000, K4), InvalidArgumentError, errno.EINVAL)
    failed(lambda: allocator.reserve(0x1000, 3 * K4), InvalidArgumentError, errno.EINVAL)
    allocator.allocate(K4)
    failed(lambda: allocator.reserve(0x1000, 3 * K4), OverlapError, errno.EEXIST)


def test_ephemeral_allocations_never_split_the_lasting_space():
    allocator = IovaAllocator([(0, 16 * G1 - 1)])
    lasting, ephemeral = [], []
    for _ in range(2000):
        lasting.append(allocator.allocate(K4))
        ephemeral.append(allocator.allocate(3 * K4, ephemeral=True))
    assert lasting == list(range(K4, 2001 * K4, K4))
    assert min(ephemeral) >= 16 * G1 - 12 * M2
    assert allocator.stats().chunks == 12
    for iova in ephemeral:
        allocator.free(iova)
    assert allocator.stats().chunks == 0 and allocator.stats().gaps == 1
    allocator._check()


def test_chunks_yield_to_reserve_and_to_want():
    allocator = IovaAllocator([(0, 4 * M2 - 1)])
    first = allocator.allocate(K4, ephemeral=True)
    assert first == 3 * M2
    allocator.reserve(4 * M2 - K4, K4)
    assert allocator.stats().chunks == 0
    second = allocator.allocate(K4, ephemeral=True)
    assert second == 2 * M2
    rest = [allocator.allocate(M2 - K4, align=K4) for _ in range(3)]
    assert allocator.stats().chunks == 0
    for iova in (first, second, 4 * M2 - K4, *rest):
        allocator.free(iova)
    assert allocator.stats().free == 4 * M2 and allocator.stats().gaps == 1
    allocator._check()


def test_what_no_longer_fits_is_reported_and_not_lost():
    allocator = IovaAllocator([(0, G1 - 1)])
    low, high = allocator.allocate(M2), allocator.allocate(M2, top_down=True)
    across = allocator.allocate(M2, hint=G1 // 2 - K4)
    assert allocator.set_ranges([(0, G1 // 2 - 1)]) == [(across, across + M2 - 1), (high, high + M2 - 1)]
    assert allocator.allocations() == [(a, a + M2 - 1) for a in (low, across, high)]
    failed(lambda: allocator.reserve(high, K4), OverlapError, errno.EEXIST)
    allocator.free(high)
    failed(lambda: allocator.reserve(high, K4), InvalidArgumentError, errno.EINVAL)
    allocator.free(across)
    assert allocator.allocate(K4, top_down=True) == G1 // 2 - K4
    assert allocator.set_ranges([(0, G1 - 1)]) == []
    assert allocator.allocate(K4, top_down=True) == G1 - K4
    allocator._check()


def test_set_ranges_keeps_or_replaces_reserved_windows():
    allocator = IovaAllocator([(0, G1 - 1)], reserved=[(M2, 2 * M2 - 1)])
    allocator.set_ranges([(0, 4 * M2 - 1)])
    assert allocator.ranges == [(0, M2 - 1), (2 * M2, 4 * M2 - 1)]
    allocator.set_ranges([(0, 4 * M2 - 1)], [])
    assert allocator.ranges == [(0, 4 * M2 - 1)]
    failed(lambda: allocator.set_ranges([(5, 4)], [(0, K4)]), InvalidArgumentError, errno.EINVAL)
    assert allocator.ranges == [(0, 4 * M2 - 1)]


def test_no_space_says_what_there_is_and_what_to_do():
    allocator = IovaAllocator([(K4, 2 * M2 - 1)])
    allocator.reserve(M2 + K4, K4)
    text = failed(lambda: allocator.allocate(M2), IovaSpaceError, errno.ENOSPC)
    assert "[Errno 28] allocate size 0x200000" in text
    assert "0x1fe000 bytes at alignment 0x200000" not in text and "0x1000 bytes at alignment 0x200000" in text
    assert "0x200000 at any; pass align=0x1000 to take it" in text
    assert allocator.allocate(M2, align=K4) == K4


@pytest.mark.parametrize("call", [
    lambda a: a.allocate(0), lambda a: a.allocate(K4 + 1), lambda a: a.allocate(-K4), lambda a: a.allocate(2**64),
    lambda a: a.allocate(K4, align=0), lambda a: a.allocate(K4, align=3 * K4), lambda a: a.allocate(K4, align=2 * G1),
    lambda a: a.allocate(K4, guard=1), lambda a: a.allocate(K4, guard=-K4), lambda a: a.allocate(K4, limit=-1),
    lambda a: a.allocate(K4, limit=2**64), lambda a: a.allocate(K4, hint=-1), lambda a: a.reserve(1, K4),
    lambda a: a.reserve(K4, 0), lambda a: a.reserve(K4, 1), lambda a: a.reserve(2**64 - K4, 2 * K4),
    lambda a: a.reserve(-K4, K4), lambda a: a.reserve(2**64, K4), lambda a: a.free(-1), lambda a: a.reserve(2 * G1, K4),
    lambda a: a.set_ranges([(0, 2**64)]), lambda a: IovaAllocator([(4, 3)]), lambda a: IovaAllocator([], pgsizes=0),
    lambda a: IovaAllocator([], pgsizes=0x40000800)])
def test_impossible_arguments_are_einval_and_change_nothing(call):
    allocator = IovaAllocator([(0, G1 - 1)])
    before = allocator.stats()
    failed(lambda: call(allocator), InvalidArgumentError, errno.EINVAL)
    assert allocator.stats() == before


@pytest.mark.parametrize("call", [
    lambda a: a.allocate("4096"), lambda a: a.allocate(4096.0), lambda a: a.allocate(None), lambda a: a.free("0"),
    lambda a: a.reserve(0.5, K4), lambda a: a.allocate(K4, K4), lambda a: a.set_ranges(5), lambda a: a.set_ranges([5])])
def test_wrong_types_are_type_errors(call):
    with pytest.raises(TypeError):
        call(IovaAllocator([(0, G1 - 1)]))


def test_freeing_what_is_not_there_is_enoent():
    allocator = IovaAllocator([(0, G1 - 1)])
    iova = allocator.allocate(2 * K4)
    for wrong in (0, iova + K4, iova + 1, 2**64 - 1):
        failed(lambda wrong=wrong: allocator.free(wrong), NotMappedError, errno.ENOENT)
    allocator.free(iova)
    failed(lambda: allocator.free(iova), NotMappedError, errno.ENOENT)


def test_other_alignments_are_exact_among_many_holes():
    """More holes that are large enough and never aligned than the bounded search looks at."""
    allocator = IovaAllocator([(0, G1 - 1)])
    allocator.reserve(0, G1)
    allocator.free(0)
    for i in range(512):                # holes of 31 pages from page 1 of each 32: no room for 16 on a multiple of 32
        allocator.reserve(i * 32 * K4, K4)
    allocator.reserve(512 * 32 * K4, G1 - 512 * 32 * K4)
    failed(lambda: allocator.allocate(16 * K4, align=32 * K4), IovaSpaceError, errno.ENOSPC)
    for top_down in (False, True):
        allocator.free(300 * 32 * K4)
        assert allocator.allocate(16 * K4, align=32 * K4, top_down=top_down) == 300 * 32 * K4
        allocator.free(300 * 32 * K4)
        allocator.reserve(300 * 32 * K4, K4)
    allocator._check()


def test_threads_never_get_the_same_place():
    allocator = IovaAllocator([(0, G1 - 1)])
    kept, errors = [], []

    def churn(seed):
        mine = []
        try:
            for i in range(3000):
                mine.append(allocator.allocate(K4 * (1 + (i + seed) % 3), ephemeral=i % 5 == 0, guard=K4 * (i % 2)))
                if i % 3:
                    allocator.free(mine.pop(i * 7 % len(mine)))
        except BaseException as error:
            errors.append(error)
        kept.append(mine)

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    alive = [iova for mine in kept for iova in mine]
    assert len(alive) == len(set(alive)) == len(allocator)
    allocator._check()
    for iova in alive:
        allocator.free(iova)
    assert allocator.stats().free == G1
    allocator._check()


SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.parametrize("flags", [["-O3"], SANITIZED], ids=["O3", "sanitized"])
@pytest.mark.parametrize("name, kernel, seeds, steps", [("gaps", "gaps", 4, 6000), ("iovaspace", "rangemap", 20, 1500)])
def test_in_c(tmp_path, name, kernel, seeds, steps, flags):
    program = tmp_path / name
    built = subprocess.run(
        [os.environ.get("CC", "cc"), "-std=c11", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", *flags,
         f"-I{ROOT}/csrc", f"{ROOT}/tests/c/{name}.c", f"{ROOT}/csrc/{kernel}.c", "-pthread",
         "-o", str(program)],
        capture_output=True, text=True)
    if built.returncode and "sanitize" in built.stderr:
        pytest.skip("no sanitizers here")
    assert not built.returncode, built.stderr
    seed = int.from_bytes(os.urandom(3), "little")
    run = subprocess.run([program, str(seed), str(seeds), str(steps)], capture_output=True, text=True, timeout=60)
    print(run.stdout)
    assert not run.returncode, run.stdout + run.stderr
