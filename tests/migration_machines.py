"""Guests with devices that write by DMA all the time, lines between processes, and processes that are to be killed."""
import contextlib
import errno
import itertools
import os
import random
import select
import signal
import socket
import threading

from migration_doubles import guest
from transport_ends import accepted_end, bound_socket, connected_end

from vfiodma import DirtyBitmap, DirtyTracker, IoAddressSpace, SoftwareGroup, open_backend
from vfiodma.devices.dma_writer import DmaWriter
from vfiodma.errors import MigrationError
from vfiodma.migration.layout import MemoryLayout

PAGE = 4096
PAGES = 24, 9       # of each region of a guest: neither is a multiple of 64


def small_guest(fill):
    """Return two regions: content that can be compressed, content that can't, and pages of zeros."""
    rng = random.Random(fill)
    kinds = [lambda: bytes(PAGE), lambda: bytes([rng.randrange(256)]) * PAGE, lambda: rng.randbytes(PAGE)]
    return guest([b"".join(rng.choice(kinds)() for _ in range(pages)) for pages in PAGES])


def empty_guest(stale=0xee):
    """Return memory of the same shape with old content in it."""
    return guest([bytes([stale]) * PAGE * pages for pages in PAGES])


class SnapshotTracker(DirtyTracker):
    """Remembers, when tracking ends, what memory was and what nobody had harvested yet."""

    image, left = None, None

    def __init__(self, machine, **options):
        super().__init__(machine.ioas, machine.layout, **options)
        self._machine = machine
        self._on = False

    def start(self):
        super().start()
        self._on = True

    def stop(self):
        if self._on:
            self._on = False
            with self._machine.still():
                self.left = DirtyBitmap(self.layout.nbits, self.layout.pgsize)
                self.harvest(self.left)
                self.image = [bytes(block.view) for block in self.layout.blocks]
        super().stop()


def missing_pages(layout, tracker, ledger, target):
    """Return pages that the destination has otherwise than the source had when tracking ended, and no ledger knows."""
    assert not ledger.in_flight.any()
    lost = []
    for block, image, (gpa, region) in zip(layout.blocks, tracker.image, target, strict=True):
        got = target.read(gpa, region.size)
        for page in range(block.npages):
            place, bit = slice(page * PAGE, (page + 1) * PAGE), block.first_bit + page
            if image[place] != got[place] and not ledger.pending.test(bit) and not tracker.left.test(bit):
                lost.append(bit)
    return lost


class SoftMachine:
    """A machine whose devices write into all of its memory by DMA, a thread each, until it is stopped.

    Its state is the SHA-256 of its memory as it stands still, so that a destination can compare.
    """

    def __init__(self, memory, devices=1, seed=0, pgsize=PAGE, pause=0.0003, **options):
        self._stack = contextlib.ExitStack()
        self.calls = []
        self._pause, self._seed = pause, seed
        self._threads, self._halt = [], threading.Event()
        writers = [DmaWriter(f"0000:00:10.{number}") for number in range(devices)]
        backend = open_backend("software", groups=[SoftwareGroup(0, writers)], memlock_limit=None)
        self._stack.callback(backend.close)
        self.ioas = self._stack.enter_context(IoAddressSpace(backend))
        self.mappings = self.ioas.map_memory(memory)
        self.ports = list(backend.ports.values())
        self.layout = self._stack.enter_context(MemoryLayout(memory, pgsize))
        self.tracker = SnapshotTracker(self, **{"cpu_writes": "off", **options})
        self.failures = []

    def _write(self, port, rng):
        try:
            while not self._halt.wait(self._pause):
                for _ in range(3):
                    mapping = rng.choice(self.mappings)
                    size = rng.choice([1, 700, PAGE, 3 * PAGE])
                    at = rng.randrange(mapping.size - size + 1)
                    if rng.random() < 0.2:      # whole pages become zero again
                        at, size = at // PAGE * PAGE, max(size, PAGE) // PAGE * PAGE
                        port.write(mapping.iova + at, bytes(size))
                    else:
                        port.write(mapping.iova + at, bytes([rng.randrange(256)]) * size)
        except BaseException as exc:
            self.failures.append(exc)

    @property
    def running(self):
        return bool(self._threads)

    def start(self):
        self._halt.clear()
        self._threads = [threading.Thread(target=self._write, args=(port, random.Random(f"{self._seed} {number}")),
                                          daemon=True) for number, port in enumerate(self.ports)]
        for thread in self._threads:
            thread.start()

    def halt(self):
        self._halt.set()
        for thread in self._threads:
            thread.join()
        self._threads = []

    @contextlib.contextmanager
    def still(self):
        """Nothing is written meanwhile."""
        running = self.running
        self.halt()
        yield
        if running:
            self.start()

    def stop(self):
        self.calls.append("stop")
        self.halt()

    def resume(self):
        self.calls.append("resume")
        self.start()

    def state(self):
        return {"sha256": self.layout.digest()}

    def close(self):
        self.halt()
        self.tracker.stop()
        self._stack.close()
        assert not self.failures

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.close()


class Doom:
    """When a process ends itself by SIGKILL: at a byte, before a call of its transport, or of its journal's."""

    def __init__(self, kind="never", at=0):
        self.kind, self.at = kind, at
        self._count = itertools.count()
        self.moved = 0

    def step(self, kind):
        if kind == self.kind and next(self._count) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def move(self, count):
        """Return how many of the bytes still go."""
        self.moved += count
        return count - max(0, self.moved - self.at) if self.kind == "byte" else count

    def guard_journal(self):
        """Count what the journal does to the file system."""
        def counted(really):
            def call(*arguments):
                self.step("journal")
                return really(*arguments)
            return call

        os.fsync, os.replace = counted(os.fsync), counted(os.replace)


def mortal(transport, doom):
    """Make a transport of a process that is to be killed end it where doom says."""
    send, receive_into = transport.send, transport.receive_into

    def last_send(parts):
        doom.step("call")
        data = b"".join(bytes(part) for part in parts)
        left = doom.move(len(data))
        send([data[:left]])
        if left < len(data):
            os.kill(os.getpid(), signal.SIGKILL)

    def last_receive(view):
        receive_into(view)
        if doom.move(len(view)) < len(view):
            os.kill(os.getpid(), signal.SIGKILL)
        doom.step("call")

    transport.send, transport.receive_into = last_send, last_receive
    return transport


class Gate:
    """A socket that listens, for as long as one process has it; connecting to it needs its name only.

    ``kind`` and ``files`` are those of transport_ends: what the connections are, or what comes over them.
    """

    def __init__(self, kind="unix", files=None):
        self._kind, self._files = kind, files
        self._sock = bound_socket(kind)
        self.name = self._sock.getsockname()

    def accept(self, timeout=10.0, doom=None, unless=()):
        """Return a connection; none comes any more once a descriptor of ``unless`` is readable."""
        ready = select.select([self._sock, *unless], [], [], timeout)[0]
        if self._sock not in ready:
            raise MigrationError(errno.ETIMEDOUT, operation="accept", hint="nobody came")
        transport = accepted_end(self._kind, self._sock.accept()[0], self._files)
        return mortal(transport, doom) if doom else transport

    def connect(self, doom=None):
        sock = socket.socket(self._sock.family)
        try:
            sock.connect(self.name)
            transport = connected_end(self._kind, sock, self._files)
        except OSError as exc:
            sock.close()
            raise MigrationError(exc.errno, operation="connect") from None
        return mortal(transport, doom) if doom else transport

    def close(self):
        self._sock.close()


class Child:
    """A forked process that waits for ``go``, works, and ends with 0, or 3 after an OSError.

    ``without`` are gates that are not its own: as long as it has them, who connects to them waits.
    """

    def __init__(self, work, without=()):
        wait, self._tell = os.pipe()
        self.status = None
        self._lock = threading.Lock()
        self._told = False
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                for gate in without:
                    gate.close()
                if os.read(wait, 1) == b"g":
                    work()
                status = 0
            except OSError as exc:
                status = 3
                if os.environ.get("VFIODMA_TEST_TRACE"):
                    import traceback
                    traceback.print_exception(exc)
            except BaseException as exc:
                import traceback
                traceback.print_exception(exc)
            finally:
                os._exit(status)
        os.close(wait)
        self.pidfd = os.pidfd_open(self.pid)

    def go(self):
        if not self._told:
            self._told = True
            os.write(self._tell, b"g")

    @property
    def alive(self):
        return self.status is None and not select.select([self.pidfd], [], [], 0)[0]

    def kill(self):
        """From any thread; no effect on one that has ended."""
        with self._lock:
            if self.status is None:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def wait(self, timeout=20.0):
        """Return its exit status, or minus the signal."""
        if not self._told:
            self._told = True
            os.write(self._tell, b"x")
        if self.status is None:
            if not select.select([self.pidfd], [], [], timeout)[0]:
                self.kill()
                raise AssertionError("a process of the test hangs")
            with self._lock:
                self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def close(self):
        with contextlib.suppress(AssertionError):
            self.wait(0.5)
        if self.status is None:
            self.wait()
        if self._tell >= 0:
            os.close(self._tell)
            os.close(self.pidfd)
            self._tell = -1
