"""Both ends of a migration that switches to post-copy, and threads that touch memory while it comes."""
import contextlib
import ctypes
import itertools
import random
import socket
import threading

import pytest
from migration_doubles import LogTracker, Machine

from vfiodma import DirtyBitmap, GuestMemory
from vfiodma._core.userfault import MissingPages
from vfiodma.errors import DmaPermissionError, MigrationError, UnsupportedError, VfioError
from vfiodma.migration import Migration, PageReceiver, Round, SocketTransport
from vfiodma.migration.events import PostcopyBegun
from vfiodma.migration.postcopy_source import Postcopy
from vfiodma.migration.transport import listen

PAGE = 4096
PAGES = 700, 65
GPAS = 0, 1 << 32


def skip_unless_permitted():
    """Skip the test where this user has no userfaultfd."""
    try:
        with GuestMemory.memfd(PAGE) as memory:
            MissingPages(memory.region.vaddr, PAGE, DirtyBitmap(1)).close()
    except (DmaPermissionError, UnsupportedError) as exc:
        pytest.skip(str(exc))


def make_memory(anonymous=True):
    """Return memory of a memfd and an anonymous region; a child process has only memfds."""
    memory = GuestMemory()
    for number, (gpa, pages) in enumerate(zip(GPAS, PAGES, strict=True)):
        make = GuestMemory.anonymous if number and anonymous else GuestMemory.memfd
        memory.add(make(pages * PAGE).region, gpa)
    return memory


def filled(seed=1, share=0.7, anonymous=True):
    """Return memory with random pages, and zeros between them."""
    chance, memory = random.Random(seed), make_memory(anonymous)
    for gpa, pages in zip(GPAS, PAGES, strict=True):
        for page in range(pages):
            if chance.random() < share:
                memory.write(gpa + page * PAGE, chance.randbytes(PAGE))
    return memory


def touch(vaddr):
    """Read 8 bytes without the GIL."""
    out = ctypes.create_string_buffer(8)
    ctypes.memmove(out, vaddr, 8)
    return out.raw


class Toucher(threading.Thread):
    """Reads pages in random order, and compares with the source."""

    def __init__(self, memory, source, seed):
        super().__init__(daemon=True)
        self.pages = [(here.vaddr + page * PAGE, gpa + page * PAGE)
                      for gpa, here in memory for page in range(here.size // PAGE)]
        random.Random(seed).shuffle(self.pages)
        self.source, self.wrong = source, 0
        self.start()

    def run(self):
        for vaddr, gpa in self.pages:
            self.wrong += touch(vaddr) != self.source.read(gpa, 8)


class Line(SocketTransport):
    """A connection of one end that is gone when it is closed, although the helper was forked with it."""

    def __init__(self, url):
        self.sock = socket.socket(socket.AF_UNIX)
        try:
            self.sock.connect(url.removeprefix("unix:"))
        except OSError as exc:
            self.sock.close()
            raise MigrationError(exc.errno) from None
        super().__init__(self.sock, 10.0)

    def close(self):
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        super().close()


class Cut(Line):
    """A connection that is gone in the middle of a frame."""

    def __init__(self, url, frames):
        super().__init__(url)
        self.frames = frames

    def send(self, parts):
        self.frames -= 1
        if self.frames == 0:
            whole = b"".join(bytes(part) for part in parts)
            super().send([whole[:len(whole) // 2]])
            self.sock.shutdown(socket.SHUT_RDWR)
        super().send(parts)


class Pair:
    """A migration in a thread, and its destination; ``writes`` pages are written after each round.

    ``cuts`` are the frames after which connections break, one after another.
    """

    def __init__(self, path, source, writes=20, seed=1, postcopy=None, cuts=(), receiver=None, hook=None,
                 **options):
        self.source, self.memory, self.events, self.machine = source, make_memory(), [], Machine({"device": b"state"})
        self.states, self.failure, self.result, self.tracker = {}, None, None, None
        self.raised = None
        self.chance, self.writes = random.Random(seed), writes
        self.url = f"unix:{path}/guest{next(_NUMBERS)}"
        self.listener = listen(self.url, timeout=10.0)
        self.cuts, self.hook = list(cuts), hook or (lambda pair, event: None)
        self.pushing = threading.Event()
        self.migration = Migration(self.connect, source, self.machine, tracker=self.track, on_event=self.on_event,
                                   postcopy=Postcopy(1, when_needed=False) if postcopy is None else postcopy,
                                   **({"downtime_limit": 1e-9, "reconnect_timeout": 10.0} | options))
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        self.receiver = PageReceiver(self.listener.accept(10), lambda _: self.memory, accept=self.listener.accept,
                                     fresh=True, on_state=self.states.__setitem__,
                                     **({"postcopy": True} | (receiver or {})))

    def connect(self):
        frames = self.cuts.pop(0) if self.cuts else None
        return Line(self.url) if frames is None else Cut(self.url, frames)

    def track(self, layout):
        self.tracker, self.layout = LogTracker(layout), layout
        return self.tracker

    def on_event(self, event):
        self.events.append(event)
        if isinstance(event, PostcopyBegun):
            self.pushing.set()
        self.hook(self, event)
        if isinstance(event, Round) and not event.final:
            self.write(self.writes)

    def write(self, count):
        for _ in range(count):
            block = self.chance.choice(self.layout.blocks)
            page = self.chance.randrange(block.npages)
            self.source.write(block.gpa + page * PAGE, self.chance.choice([bytes(PAGE), self.chance.randbytes(PAGE)]))
            self.tracker.log.mark(block.first_bit + page)

    def run(self):
        try:
            self.result = self.migration.run()
        except VfioError as exc:
            self.failure = exc
        except InterruptedError as exc:     # of the hook
            self.raised = exc

    def finish(self):
        """Let both sides end, and compare."""
        done = self.receiver.finish(20)
        self.thread.join(20)
        assert not self.thread.is_alive()
        if self.failure is not None:
            raise self.failure
        assert [self.memory.read(gpa, region.size) for gpa, region in self.memory] == \
            [self.source.read(gpa, region.size) for gpa, region in self.source]
        assert self.receiver.missing == 0
        return done

    def close(self):
        self.thread.join(20)
        self.receiver.close(abandon=True)
        self.receiver._channel.close()
        self.listener.close()
        self.memory.close()
        if self.migration.source is not None:
            self.migration.source.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


_NUMBERS = itertools.count()
