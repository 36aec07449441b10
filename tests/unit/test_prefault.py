"""Pages for the destination's memory in the background: all of it, and never a byte changed."""
import errno
import mmap
import os
import random
import struct
import threading

import pytest
from migration_doubles import guest

from vfiodma import GuestMemory
from vfiodma._core.memory import populate
from vfiodma.errors import DmaPermissionError, InvalidArgumentError, UnsupportedError
from vfiodma.migration import prefault
from vfiodma.migration.intake import open_boards
from vfiodma.migration.layout import MemoryLayout
from vfiodma.migration.prefault import Prefault

SIZE = 4 << 20


@pytest.fixture(autouse=True)
def needs_populate():
    with GuestMemory.memfd(4096) as memory, memory.region.view() as view:
        try:
            populate(view, 0, 4096)
        except UnsupportedError:
            pytest.skip("Linux before 5.14")


def present(region):
    """How many pages of a region are in this process's page tables."""
    with open("/proc/self/pagemap", "rb") as file:
        entries = os.pread(file.fileno(), region.size // mmap.PAGESIZE * 8, region.vaddr // mmap.PAGESIZE * 8)
    return sum(entry >> 63 for entry, in struct.iter_unpack("<Q", entries))


def test_all_memory_is_populated_and_content_stays():
    content = random.Random(3).randbytes(4096)
    with GuestMemory.memfd(SIZE) as memory:
        memory.write(12345, content)
        with MemoryLayout(memory, 4096) as layout:
            boards = open_boards(layout, True)
            work = Prefault(layout, boards)
            work.join(30)
            assert work.populated == SIZE and work.failure is None
            assert present(memory.region) == SIZE // mmap.PAGESIZE
            work.stop()
            work.stop()
            for board in boards:
                board.release()
        assert memory.read(12345, 4096) == content
        assert memory.read(0, 12345) == bytes(12345) and not any(memory.read(16441, 100_000))


def test_it_leaves_out_what_came_already_and_stops_when_it_is_told(monkeypatch):
    monkeypatch.setattr(prefault, "_STEP", 1 << 20)
    calls, go, entered = [], threading.Event(), threading.Event()

    def slow(view, at, size):
        calls.append((at, size))
        entered.set()
        assert go.wait(10)

    class Board:
        frontier = 0

    monkeypatch.setattr(prefault, "populate", slow)
    with GuestMemory.memfd(SIZE) as memory, MemoryLayout(memory, 4096) as layout:
        board = Board()
        work = Prefault(layout, [board])
        assert entered.wait(10)
        board.frontier = 600        # pages came up to here meanwhile
        go.set()
        work.join(10)
        assert calls == [(0, 1 << 20), (600 * 4096, (3 << 20) - 600 * 4096), (3 << 20, 1 << 20)]
        go.clear()
        entered.clear()
        board.frontier = 0
        work = Prefault(layout, [board])
        assert entered.wait(10)
        stopper = threading.Thread(target=work.stop)
        stopper.start()
        while not work._stopping.is_set():
            pass
        go.set()
        stopper.join(10)
        assert calls[3:] == [(0, 1 << 20)]


def test_a_kernel_without_it_costs_nothing_but_time(monkeypatch):
    def refuse(*_):
        raise UnsupportedError(errno.EOPNOTSUPP, operation="populate")

    monkeypatch.setattr(prefault, "populate", refuse)
    with GuestMemory.memfd(SIZE) as memory, MemoryLayout(memory, 4096) as layout:
        boards = open_boards(layout, True)
        work = Prefault(layout, boards)
        work.join(10)
        assert isinstance(work.failure, UnsupportedError) and work.populated == 0
        for board in boards:
            board.release()


def test_populate_refuses_what_is_not_whole_pages_inside():
    with guest([bytes(8192)]) as memory:
        with next(iter(memory))[1].view() as view:
            for offset, size in ((1, 4096), (0, 100)):
                with pytest.raises(InvalidArgumentError):
                    populate(view, offset, size)
            for offset, size in ((8192, 4096), (4096, 8192), (1 << 63, 4096), (4096, (1 << 64) - 4096)):
                with pytest.raises(InvalidArgumentError):
                    populate(view, offset, size)
            populate(view, 8192, 0)
            populate(view, 0, 8192)
            with pytest.raises((DmaPermissionError, BufferError)):
                populate(view.toreadonly(), 0, 4096)


def test_without_a_thread_nothing_is_lost_but_time(monkeypatch):
    def none_left(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    with GuestMemory.memfd(SIZE) as memory, MemoryLayout(memory, 4096) as layout:
        boards = open_boards(layout, True)
        work = Prefault(layout, boards)
        assert work.failure.errno == errno.EAGAIN and work.populated == 0
        work.join()
        work.stop()
        for board in boards:
            board.release()
