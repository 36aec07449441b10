"""The image equals the source at pause for any interleaving of what devices, VMM, lines and users do.

Real objects: devices of the software backend, an IoAddressSpace, a DirtyTracker with all its sources, PrecopySource and
PageReceiver over sockets.  What happens is injected between two frames, in the thread that sends them: DMA, writes of
the CPU, map, unmap, remap (to another iova, or the same memory at another vaddr), re-protect, a line that is cut,
cancel.  A migration that ends early loses no page that its ledger did not know; another one follows.
"""
import collections
import contextlib
import errno
import queue
import socket
import threading
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from migration_doubles import Hooked, content_of, guest
from migration_machines import PAGE, SnapshotTracker, missing_pages

from vfiodma import IoAddressSpace, Prot, SoftwareGroup, open_backend
from vfiodma.devices.dma_writer import DmaWriter
from vfiodma.errors import HandoverError, MigrationError, VfioError
from vfiodma.migration import PageReceiver, PrecopySource, SocketTransport, sender, stream
from vfiodma.migration.handover import SourceState
from vfiodma.migration.layout import MemoryLayout
from vfiodma.migration.stream import Kind, Phase

PAGES = 13, 6           # of each region: neither is a multiple of 64, so that blocks begin inside no word
PLACES = 40             # pages of iova space that mappings are put into
NUMBER = st.integers(0, 1 << 16)
LENGTH = st.sampled_from([1, 100, PAGE, PAGE + 1, 3 * PAGE])
VALUE = st.sampled_from([0, 0, 1, 7, 255])
DMA = st.tuples(st.just("dma"), NUMBER, NUMBER, LENGTH, VALUE)
STEP = DMA | DMA | st.one_of(
    st.tuples(st.just("cpu"), NUMBER, NUMBER, LENGTH, VALUE),
    st.tuples(st.just("vmm"), NUMBER, NUMBER, LENGTH, VALUE),
    st.tuples(st.just("map"), NUMBER, NUMBER, NUMBER, st.sampled_from([Prot.RW, Prot.RW, Prot.READ])),
    st.tuples(st.just("unmap"), NUMBER),
    st.tuples(st.just("remap"), NUMBER, NUMBER, st.sampled_from([Prot.RW, Prot.RW, Prot.READ])),
    st.tuples(st.just("protect"), NUMBER),
    st.tuples(st.just("move"), NUMBER),
)
END = st.sampled_from(["cut before", "cut after", "cut after", "cancel"])
#: What happens before which frame, counted over all connections and migrations.
SCHEDULE = st.dictionaries(st.integers(2, 30), st.lists(STEP, min_size=1, max_size=6), min_size=2, max_size=15)
ENDS = st.dictionaries(st.integers(2, 30) | st.sampled_from(["last END", "RUN"]), END, max_size=3)
DONE = collections.Counter()


class Line(Hooked):
    """Is cut before this frame, or when it is out."""

    after, what = False, ""

    def cut(self, after):
        self.after = after
        if not after:
            self._sock.shutdown(socket.SHUT_RDWR)

    def send(self, parts):
        header = stream.decode_header(bytes(parts[0]))
        self.what = "last END" if header.kind is Kind.END and header.flags else header.kind.name
        super().send(parts)
        if self.after:
            self._sock.shutdown(socket.SHUT_RDWR)


class World:
    """A machine, and a destination that listens."""

    def __init__(self, schedule, ends, cpu_writes, stack):
        self.schedule, self.ends = schedule, ends
        self.memory = stack.enter_context(guest([bytes([9]) * PAGE * count for count in PAGES]))
        self.layout = stack.enter_context(MemoryLayout(self.memory, PAGE))
        self.copies = [stack.enter_context(block.region.remap()) for block in self.layout.blocks]
        devices = [DmaWriter(f"0000:00:10.{number}") for number in range(2)]
        backend = open_backend("software", groups=[SoftwareGroup(0, devices)], memlock_limit=None)
        stack.callback(backend.close)
        self.ioas = stack.enter_context(IoAddressSpace(backend))
        self.ports = list(backend.ports.values())
        self.cpu_writes = cpu_writes
        self.mapped = {}            # iova page -> (region, first page, pages, prot)
        self.moved = set()          # of these, which have the vaddr of a copy
        self.frame = self.cuts = 0
        self.migrating, self.running, self.source, self.transport = False, True, None, None
        self.waiting = queue.Queue()
        for place, part in ((3, (0, 0, 8)), (20, (0, 8, 5)), (30, (1, 0, 6))):
            self._map(place, (*part, Prot.RW))

    # Steps

    def do(self, step):
        with contextlib.suppress(VfioError):
            getattr(self, step[0])(*step[1:])
            DONE[step[0]] += 1

    def _map(self, place, what):
        region, first, count, prot = what
        self.ioas.map(self.layout.blocks[region].region, place * PAGE, offset=first * PAGE, size=count * PAGE,
                      prot=prot)
        self.mapped[place] = what

    def _pick(self, number):
        return sorted(self.mapped)[number % len(self.mapped)] if self.mapped else None

    def _unmap(self, place):
        self.ioas.unmap(place * PAGE)
        self.moved.discard(place)
        return self.mapped.pop(place)

    def dma(self, number, at, length, value):
        """Any device writes anywhere near a mapping; what is not mapped, or read-only, faults."""
        place = self._pick(number) or 0
        count = self.mapped[place][2] if self.mapped else 1
        self.ports[number % 2].write(place * PAGE + at % (count * PAGE), bytes([value]) * length)

    def cpu(self, number, at, length, value):
        if self.cpu_writes != "off":
            block = self.layout.blocks[number % 2]
            at %= block.region.size
            self.memory.write(block.gpa + at, bytes([value]) * min(length, block.region.size - at))

    def vmm(self, number, at, length, value):
        place = self._pick(number)
        if place is not None:
            self.ioas.write(place * PAGE + at % (self.mapped[place][2] * PAGE), bytes([value]) * length)

    def map(self, number, place, size, prot):
        region = number % 2
        first = number // 2 % PAGES[region]
        self._map(place % PLACES, (region, first, 1 + size % (PAGES[region] - first), prot))

    def unmap(self, number):
        place = self._pick(number)
        if place is not None:
            self._unmap(place)

    def remap(self, number, elsewhere, prot):
        place = self._pick(number)
        if place is not None:
            self._map(elsewhere % PLACES, (*self._unmap(place)[:3], prot))

    def protect(self, number):
        place = self._pick(number)
        if place is not None:
            *what, prot = self._unmap(place)
            self._map(place, (*what, Prot.RW if prot == Prot.READ else Prot.READ))

    def move(self, number):
        """The same memory at another address of the process."""
        place = self._pick(number)
        if place is not None:
            region, first, count, _ = self.mapped[place]
            self.ioas.invalidate_vaddr(place * PAGE, count * PAGE)
            self.moved ^= {place}
            where = self.copies[region] if place in self.moved else self.layout.blocks[region].region
            self.ioas.update_vaddr(place * PAGE, where, offset=first * PAGE)

    # The migration around it

    def before_frame(self, _):
        self.frame += 1
        if not self.migrating:
            return
        if self.running:
            for step in self.schedule.pop(self.frame, ()):
                self.do(step)
        end = self.ends.pop(self.frame, None) or self.ends.pop(self.transport.what, None)
        if end == "cancel":
            self.source.cancel()
        elif end is not None:
            self.cuts += 1
            self.transport.cut(after=end == "cut after")

    def connect(self):
        here, there = socket.socketpair()
        self.waiting.put(there)
        self.transport = Line(here, self.before_frame)
        return self.transport

    def accept(self, timeout):
        sock = self.waiting.get()
        if sock is None:
            self.listening = False
            raise MigrationError(errno.ETIMEDOUT, operation="accept")
        return SocketTransport(sock, 10)

    @contextlib.contextmanager
    def still(self):
        yield

    def stop(self):
        for step in self.schedule.pop("stop", ()):      # what devices do while they are being stopped
            self.do(step)
        self.running = False

    def resume(self):
        self.running = True

    def state(self):
        return {"sha256": self.layout.digest()}

    def back_home(self):
        """The memory of a layout is tracked, not copies of it."""
        for place in sorted(self.moved):
            self.move(sorted(self.mapped).index(place))

    def _release(self, source):
        """Hand the guest over; ask again and again where the answer got lost."""
        try:
            return source.release()
        except HandoverError:
            for _ in range(5):
                with contextlib.suppress(HandoverError), contextlib.closing(self.connect()) as transport:
                    return source.settle(transport)
            raise

    def migrate(self, target, rounds, resumes, compression, fresh):
        """Return whether it got there; else nothing was forgotten, and the machine runs."""
        states, ended = {}, []

        def serve():
            with contextlib.closing(receiver):
                try:
                    ended.append(receiver.serve())
                except VfioError as exc:
                    ended.append(exc)
                while self.listening:           # an answer may have got lost
                    with contextlib.suppress(VfioError):
                        receiver.linger(10)

        self.waiting, self.listening = queue.Queue(), True
        transport = self.connect()
        receiver = PageReceiver(self.accept(10), lambda hello: target, accept=self.accept, fresh=fresh,
                                on_state=states.__setitem__)
        thread = threading.Thread(target=serve)
        thread.start()
        tracker = SnapshotTracker(self, cpu_writes=self.cpu_writes)
        source = self.source = PrecopySource(
            transport, downtime_limit=1e-9, max_rounds=rounds, connect=self.connect if resumes else None,
            compression=compression)
        with contextlib.closing(transport), source:
            try:
                source.introduce(self.memory)
                self.back_home()
                self.migrating = True
                source.migrate(self.layout, tracker, self)
                assert not source.ledger.pending.any() and not source.ledger.in_flight.any()
                self._release(source)
                got_there = True
            except MigrationError:
                got_there = False
                assert source.handover.may_run and self.running
            finally:
                self.migrating = False
                transport.close()
                self.waiting.put(None)
                thread.join(30)
                assert not thread.is_alive()
        if got_there:
            assert ended == [Phase.OWNER] and not self.running
            assert source.handover.state is SourceState.GIVEN
            assert content_of(target) == content_of(self.memory)
            assert states["sha256"] == self.layout.digest()
        else:
            assert receiver.handover.phase is not Phase.OWNER
            assert missing_pages(self.layout, tracker, source.ledger, target) == []
            if tracker.left is not None:        # the ledger has it all
                assert all(map(source.ledger.pending.test, tracker.left.indices().tolist()))
        return got_there


def run(schedule, at_stop, ends, rounds, resumes, compression, cpu_writes, fresh):
    with contextlib.ExitStack() as stack, mock.patch.object(sender, "_STAGE_BYTES", 3 * PAGE):
        world = World({**schedule, "stop": at_stop}, dict(ends), cpu_writes, stack)
        for _ in range(len(ends) + 1):
            with guest([(b"\0" if fresh else b"\xee") * PAGE * count for count in PAGES]) as target:
                if world.migrate(target, rounds, resumes, compression, fresh):
                    DONE["migrated"] += 1
                    break
                DONE["ended early"] += 1
        else:
            raise AssertionError("no migration got there")
        DONE["lines cut"] += world.cuts
        DONE["frames"] += world.frame


@settings(max_examples=3 * settings().max_examples)
@given(SCHEDULE, st.lists(STEP, max_size=4), ENDS, st.integers(1, 4), st.booleans(),
       st.sampled_from(["none", "zstd", "lz4"]), st.sampled_from(["off", "auto", "compare"]), st.booleans())
def test_the_image_equals_the_source_at_pause(schedule, at_stop, ends, rounds, resumes, compression, cpu_writes, fresh):
    run(schedule, at_stop, ends, rounds, resumes, compression, cpu_writes, fresh)


def test_all_that_may_happen_happened():
    print(dict(DONE))
    assert all(DONE[step] > 20 for step in ("dma", "cpu", "vmm", "map", "unmap", "remap", "protect", "move", "migrated",
                                            "lines cut", "ended early"))
