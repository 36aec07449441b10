"""Post-copy: threads touch memory while it comes; whatever breaks, they see the source's bytes or wait."""
import ctypes
import errno
import os
import queue
import random
import socket
import threading

import numpy as np
import pytest

from vfiodma import GuestMemory
from vfiodma._core.userfault import MissingPages
from vfiodma.errors import BusyError, DmaPermissionError, OverlapError, ProtocolError, UnsupportedError, VfioError
from vfiodma.migration import SocketTransport
from vfiodma.migration.layout import MemoryLayout
from vfiodma.migration.postcopy import PostcopyReceiver, PostcopySource

PAGE = 4096
ALIVE = []      # a test that fails leaves threads behind that touch its memory
BLOCKS = ((0, 700), (1 << 32, 65))


@pytest.fixture(autouse=True)
def permitted():
    try:
        with GuestMemory.memfd(PAGE) as memory:
            MissingPages(memory.region.vaddr, PAGE).close(abandon=True)
    except (DmaPermissionError, UnsupportedError) as exc:
        pytest.skip(str(exc))


def make_memory(*_):
    memory = GuestMemory()
    for number, (gpa, pages) in enumerate(BLOCKS):
        make = GuestMemory.anonymous if number else GuestMemory.memfd
        memory.add(make(pages * PAGE).region, gpa)
    return memory


@pytest.fixture
def source():
    chance = random.Random(1)
    with make_memory() as memory:
        for gpa, pages in BLOCKS:
            for page in range(pages):
                if chance.random() < 0.7:
                    memory.write(gpa + page * PAGE, chance.randbytes(PAGE))
        yield memory


def touch(vaddr):
    """Read 8 bytes without the GIL."""
    out = ctypes.create_string_buffer(8)
    ctypes.memmove(out, vaddr, 8)
    return out.raw


class Toucher(threading.Thread):
    """Reads pages in random order, and compares with the source."""

    def __init__(self, memory, source, seed):
        super().__init__(daemon=True)
        self.pages = [(here.vaddr + page * PAGE, source.read(gpa + page * PAGE, 8))
                      for gpa, here in memory for page in range(here.size // PAGE)]
        random.Random(seed).shuffle(self.pages)
        self.wrong = 0
        self.start()

    def run(self):
        for vaddr, wanted in self.pages:
            self.wrong += touch(vaddr) != wanted


class Cut(SocketTransport):
    """A connection that is gone after some frames."""

    def __init__(self, sock, frames):
        super().__init__(sock, 10.0)
        self.sock, self.frames = sock, frames

    def send(self, parts):
        self.frames -= 1
        if self.frames == 0:
            whole = b"".join(bytes(part) for part in parts)
            super().send([whole[:len(whole) // 2]])
            self.sock.shutdown(socket.SHUT_RDWR)
        super().send(parts)


def move(source, cuts=()):
    """Run both ends in threads, and touch meanwhile; return the destination's memory and what the source knows."""
    waiting = queue.Queue()

    def pair(frames=None):
        ours, theirs = socket.socketpair()
        used.append(SocketTransport(theirs, 10.0))
        waiting.put(used[-1])
        used.append(SocketTransport(ours, 10.0) if frames is None else Cut(ours, frames))
        return used[-1]

    left, used = list(cuts), []

    def connect(seconds=None):
        return pair(left.pop(0) if left else None)

    states = {}
    with MemoryLayout(source, PAGE) as layout:
        sender = PostcopySource(connect(), layout, states={"device": b"state"}, connect=connect)
        results = []
        thread = threading.Thread(target=lambda: results.append(sender.run()), daemon=True)
        receiver = PostcopyReceiver(waiting.get(), make_memory, accept=lambda seconds: waiting.get(timeout=10),
                                    on_state=states.__setitem__)
        thread.start()
        memory = receiver.start()
        ALIVE.append(memory)
        touchers = [Toucher(memory, source, seed) for seed in range(3)]
        receiver.receive()
        for each in (thread, *touchers):
            each.join(20)
            assert not each.is_alive()
    assert receiver.left == 0 and states == {"device": b"state"} and results
    assert [toucher.wrong for toucher in touchers] == [0, 0, 0]
    receiver.close()
    ALIVE.remove(memory)
    for transport in used:
        transport.close()
    return memory, sender


def test_threads_see_the_bytes_of_the_source_while_they_come(source):
    memory, sender = move(source)
    with memory:
        assert [memory.read(gpa, region.size) for gpa, region in memory] == \
            [source.read(gpa, region.size) for gpa, region in source]
    assert sum(sender._totals[1:]) == 765       # each page once


@pytest.mark.parametrize("cuts", [(4,), (5, 3, 4), (6, 1, 2, 9)])
def test_a_broken_connection_makes_threads_wait_and_the_next_one_goes_on(source, cuts):
    memory, _ = move(source, cuts)
    with memory:
        assert [memory.read(gpa, region.size) for gpa, region in memory] == \
            [source.read(gpa, region.size) for gpa, region in source]


def test_another_process_serves_threads_that_hold_the_gil():
    ours, theirs = socket.socketpair()
    with GuestMemory.memfd(300 * PAGE) as source:       # a child has no anonymous memory of its parent
        source.write(0, random.Random(2).randbytes(200 * PAGE))
        sender = os.fork()
        if sender == 0:
            try:
                with MemoryLayout(source, PAGE) as layout:
                    PostcopySource(SocketTransport(ours, 10.0), layout).run()
            finally:
                os._exit(0)
        receiver = PostcopyReceiver(SocketTransport(theirs, 10.0), lambda _: GuestMemory.memfd(300 * PAGE))
        memory = receiver.start()
        server = os.fork()
        if server == 0:
            status = 1
            try:
                receiver.receive()
                status = 0
            finally:
                os._exit(status)
        assert memory.read(0, 300 * PAGE) == source.read(0, 300 * PAGE)
        assert os.waitpid(server, 0)[1] == 0 and os.waitpid(sender, 0)[1] == 0
        receiver.close(abandon=True)        # the child knows that nothing is left
        memory.close()
    ours.close()
    theirs.close()


def test_a_page_is_placed_once_and_only_into_fresh_memory():
    with GuestMemory.memfd(8 * PAGE) as memory:
        memory.write(6 * PAGE, b"touched")
        pages = MissingPages(memory.region.vaddr, memory.size)
        pages.place(np.array([[0, 2]], np.uint64), b"a" * 2 * PAGE)
        for runs in ([[1, 1]], [[2, 1], [2, 1]], [[7, 2]], [[8, 1]], [[1 << 63, 1 << 63]], [[3, 0]]):
            with pytest.raises(ProtocolError):
                pages.place(np.array(runs, np.uint64))
        with pytest.raises(ProtocolError):
            pages.place(np.array([[2, 2]], np.uint64), b"short")
        assert pages.left == 6
        with pytest.raises(OverlapError):
            pages.place(np.array([[5, 2]], np.uint64), b"b" * 2 * PAGE)
        assert pages.left == 5 and not pages.is_missing(5) and pages.is_missing(6)
        assert touch(memory.region.vaddr + 6 * PAGE)[:7] == b"touched"
        with pytest.raises(BusyError):
            pages.close()
        pages.close(abandon=True)
        with pytest.raises(VfioError) as failed:
            pages.next(0)
        assert failed.value.errno == errno.EBADF
