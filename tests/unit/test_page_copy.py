"""PageStage, PageBoard and PageIntake: the two ends of a migration's copying, against lists of pages."""
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiodma._core.copy import PageBoard, PageIntake, PageStage
from vfiodma.errors import DmaPermissionError, InvalidArgumentError, ProtocolError

PGSIZE = 512
NPAGES = 64


def runs_of(pages):
    runs = []
    for page in pages:
        if runs and sum(runs[-1]) == page:
            runs[-1][1] += 1
        else:
            runs.append([page, 1])
    return np.array(runs, np.uint64).reshape(-1, 2)


def pages_of(runs):
    return [page for first, count in np.asarray(runs).tolist() for page in range(first, first + count)]


def packed(*runs):
    return np.array(runs, "<u8").tobytes()


@given(st.sets(st.integers(0, NPAGES - 1)), st.sets(st.integers(0, NPAGES - 1)), st.integers(1, 9), st.integers(1, 9),
       st.integers(1, 5), st.booleans())
def test_chunks_bring_every_page_once_with_its_content_and_zero_pages_apart(dirty, zero, most, most_zeros,
                                                                                 max_runs, direct):
    memory = np.random.default_rng(1).integers(1, 256, (NPAGES, PGSIZE), np.uint8)
    for page in zero:
        memory[page] = 0
    stage = np.empty((most, PGSIZE), np.uint8)
    chunk = PageStage(memory, runs_of(sorted(dirty)), None if direct else stage, PGSIZE, most, most_zeros, max_runs)
    kept, zeros = [], []
    while chunk.next():
        assert 0 < chunk.kept_pages + chunk.zero_pages <= most_zeros
        assert chunk.kept_pages <= most and max(len(chunk.kept), len(chunk.zeros)) <= max_runs
        pages = pages_of(chunk.kept)
        assert len(pages) == chunk.kept_pages and len(pages_of(chunk.zeros)) == chunk.zero_pages
        assert direct or (stage[:len(pages)] == memory[pages]).all()
        assert chunk.kept.tolist() == runs_of(pages).tolist()
        kept += pages
        zeros += pages_of(chunk.zeros)
    assert kept == sorted(dirty - zero) and zeros == sorted(dirty & zero)
    assert not chunk.next()


def test_a_page_with_one_set_byte_anywhere_is_not_zero():
    for at in range(PGSIZE):
        memory = bytearray(PGSIZE)
        memory[at] = 1
        chunk = PageStage(memory, np.array([[0, 1]], np.uint64), bytearray(PGSIZE), PGSIZE)
        assert chunk.next() and (chunk.kept_pages, chunk.zero_pages) == (1, 0)


def test_a_stage_refuses_runs_outside_and_chunks_without_room():
    memory, stage = bytearray(4 * PGSIZE), bytearray(PGSIZE)
    for runs in ([[4, 1]], [[3, 2]], [[0, 0]], [[2**64 - 1, 2]]):
        with pytest.raises(InvalidArgumentError):
            PageStage(memory, np.array(runs, np.uint64), stage, PGSIZE)
    good = np.array([[0, 1]], np.uint64)
    for bad in ((None, PGSIZE), (bytearray(PGSIZE - 1), PGSIZE), (stage, PGSIZE, 0), (stage, PGSIZE, 1, 0),
                (stage, PGSIZE, 1, 1, 0)):
        with pytest.raises(InvalidArgumentError):
            PageStage(memory, good, *bad)
    with pytest.raises(TypeError):
        PageStage(memory, good.astype(np.int32), stage, PGSIZE)


@given(st.lists(st.tuples(st.sets(st.integers(0, NPAGES - 1), min_size=1), st.booleans()), max_size=6), st.booleans())
def test_pages_from_outside_end_where_they_belong(frames, fresh):
    memory = np.full((NPAGES, PGSIZE), 0 if fresh else 0xEE, np.uint8)
    expected = memory.copy()
    board, intakes = PageBoard(memory, PGSIZE, fresh), [PageIntake(), PageIntake()]
    for epoch, (pages, zero) in enumerate(frames):
        runs = runs_of(sorted(pages))
        content = np.random.default_rng(epoch).integers(0, 256, (len(pages), PGSIZE), np.uint8)
        expected[sorted(pages)] = 0 if zero else content
        intake = intakes[epoch % 2]
        assert intake.admit(board, runs.tobytes(), len(runs), epoch, NPAGES) == len(pages)
        if zero:
            intake.clear()
        elif epoch % 2:
            intake.put(content)
        else:
            at = 0
            flat = content.tobytes()
            for view in intake.views():
                view[:] = flat[at:at + len(view)]
                at += len(view)
            intake.done()
    assert (memory == expected).all()


@pytest.mark.parametrize("runs, words", [
    ([(0, 0)], "empty run"), ([(10, 1)], "ends behind"), ([(9, 2)], "ends behind"), ([(0, 2), (1, 1)], "overlap"),
    ([(3, 1), (1, 1)], "not ascending"), ([(1 << 63, 1 << 63)], "ends behind"), ([(1, (1 << 64) - 1)], "ends behind"),
    ([((1 << 64) - 1, 2)], "ends behind"), ([(0, 9)], "more than a chunk"), ([(0, 5), (6, 4)], "more than a chunk"),
    ([(0, 1), (3, 2)], "came twice in epoch 5"), ([], "without runs"),
])
def test_runs_from_outside_are_checked_without_overflow_and_before_memory_is_touched(runs, words):
    memory = bytearray(10 * PGSIZE)
    board, first, intake = PageBoard(memory, PGSIZE), PageIntake(), PageIntake()
    assert first.admit(board, packed((3, 1)), 1, 5, 8) == 1
    first.put(b"x" * PGSIZE)
    with pytest.raises(ProtocolError, match=words):
        intake.admit(board, packed(*runs), len(runs), 5, 8)
    assert intake.views() == []
    intake.clear()
    assert memory == bytes(3 * PGSIZE) + b"x" * PGSIZE + bytes(6 * PGSIZE)


def test_pages_of_runs_that_were_refused_may_come_once_more():
    board, intake = PageBoard(bytearray(8 * PGSIZE), PGSIZE), PageIntake()
    assert intake.admit(board, packed((4, 1)), 1, 0, 8) == 1
    with pytest.raises(ProtocolError, match="came twice"):
        intake.admit(board, packed((0, 2), (4, 2)), 2, 0, 8)
    assert intake.admit(board, packed((0, 4), (5, 3)), 2, 0, 8) == 7
    assert board.frontier == 8


def test_every_page_is_given_to_one_thread_at_most():
    npages, threads = 1 << 14, 4
    board = PageBoard(bytearray(npages * PGSIZE), PGSIZE, True)
    won = [[] for _ in range(threads)]

    def take(mine):
        intake = PageIntake(4)
        for page in range(npages):
            try:
                intake.admit(board, packed((page, 1)), 1, 0, 4)
            except ProtocolError:
                continue
            mine.append(page)
            intake.put(bytes([1 + len(mine) % 255]) * PGSIZE)

    workers = [threading.Thread(target=take, args=(mine,)) for mine in won]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(sum(won, [])) == list(range(npages))


def test_a_board_lets_go_of_memory_and_takes_nothing_afterwards():
    memory = bytearray(4 * PGSIZE)
    board, intake = PageBoard(memory, PGSIZE), PageIntake()
    intake.admit(board, packed((0, 1)), 1, 0, 4)
    with pytest.raises(InvalidArgumentError):
        intake.put(b"too short")
    with pytest.raises(BufferError):
        memory.append(0)
    board.release()
    board.release()
    memory.append(0)
    assert intake.views() == []
    intake.put(b"x" * PGSIZE)
    intake.clear()
    assert memory == bytes(4 * PGSIZE + 1)
    with pytest.raises(ProtocolError):
        intake.admit(board, packed((0, 1)), 1, 0, 4)
    with pytest.raises(InvalidArgumentError):
        intake.put(b"")
    with pytest.raises(DmaPermissionError):
        PageBoard(bytes(PGSIZE), PGSIZE)
    with pytest.raises(TypeError):
        intake.admit(None, packed((0, 1)), 1, 0, 4)
