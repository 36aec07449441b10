"""Peers that stall or are slow, disks that are full, memory that is not there, versions of the future, company.

A stall before and inside every frame, in both directions; each write of both journals on a full disk (a tmpfs of its
own); ten migrations side by side.  The counts are the same in every profile.
"""
import contextlib
import ctypes
import errno
import os
import resource
import signal
import socket
import tempfile
import threading
import time
import zlib
from pathlib import Path

import pytest
from migration_doubles import PGSIZE, Hooked, LogTracker, Machine, Replay, content_of, each_round, guest
from migration_machines import PAGE, Child, Gate, SoftMachine, empty_guest, small_guest

from vfiodma import GuestMemory
from vfiodma.errors import HandoverError, MigrationError, ProtocolError, VfioError
from vfiodma.migration import PageReceiver, PrecopySource, SocketTransport, stream
from vfiodma.migration.handover import Journal, SourceState
from vfiodma.migration.layout import MemoryLayout
from vfiodma.migration.stream import Kind, Phase

CONTENT = [bytes(512) + b"a" * 3072 + bytes(512), b"b" * 4096]
SHORT = 0.15        # seconds until a peer is given up


class Served(threading.Thread):
    """A destination in a thread: what it came to is in ``phase`` or ``failure``."""

    def __init__(self, transport, target, **options):
        super().__init__()
        self.transport, self.phase, self.failure = transport, None, None
        self.receiver = PageReceiver(transport, lambda hello: target, **options)
        self.start()

    def run(self):
        try:
            self.phase = self.receiver.serve()
        except OSError as exc:
            self.failure = exc
        finally:
            self.receiver.close()

    def end(self):
        self.join(20)
        assert not self.is_alive()


def migrate(transport, memory, machine, on_event=None):
    """The source's part, over the small pages of the doubles, with a write after each round; return the source."""
    with MemoryLayout(memory, PGSIZE) as layout:
        tracker = LogTracker(layout)

        def write(done):
            if not done.final:
                memory.write(0, bytes([done.epoch + 1]) * PGSIZE)
                tracker.log.mark(0)

        source = PrecopySource(transport, downtime_limit=1e-9, max_rounds=2, on_event=on_event or each_round(write))
        try:
            source.introduce(memory, PGSIZE)
            source.migrate(layout, tracker, machine, {"iovas": b"mappings"})
            source.release()
        except OSError as exc:
            exc.source = source
            raise
        return source


@pytest.fixture
def memories():
    with guest(CONTENT) as memory, guest([bytes(4096), bytes(4096)]) as target:
        yield memory, target


# Stalls


class Stalled(Exception):
    """This side does no more, and keeps its line open."""


class Staller(SocketTransport):
    """Stalls at a frame that it sends: before it, or after half of it."""

    def __init__(self, sock, at, half, stall, timeout=10.0):
        super().__init__(sock, timeout)
        self.at, self.half, self.stall, self.count = at, half, stall, 0

    def send(self, parts):
        data = b"".join(bytes(part) for part in parts)
        if self.count == self.at:
            if self.half:
                super().send([data[:len(data) // 2]])
            self.stall()
        self.count += 1
        super().send([data])


def counted(memories):
    """Return the number of frames each way of a migration without faults."""
    here, there = socket.socketpair()
    ways = [Staller(here, None, False, None), Staller(there, None, False, None)]
    served = Served(ways[1], memories[1])
    with contextlib.closing(ways[0]):
        migrate(ways[0], memories[0], Machine())
        served.end()
    assert served.phase is Phase.OWNER and content_of(memories[0]) == content_of(memories[1])
    return [way.count for way in ways]


def test_a_source_that_stalls_at_any_frame_is_given_up_in_time_and_gives_nothing(memories):
    frames, cases = counted(memories)[0], 0

    def stall():
        raise Stalled

    for at in range(frames):
        for half in (False, True):
            here, there = socket.socketpair()
            served = Served(SocketTransport(there, SHORT), memories[1])
            machine = Machine()
            with contextlib.closing(Staller(here, at, half, stall)) as transport:
                with pytest.raises((Stalled, MigrationError)):     # the latter where this machine was slow
                    migrate(transport, memories[0], machine)
                served.end()
            assert served.phase is None and served.failure.errno == errno.ETIMEDOUT, (at, half)
            assert not served.receiver.handover.may_run
            cases += 1
    print(f"stalled at {frames} frames of the source: {cases} cases")
    assert cases == 2 * frames > 20


def test_a_destination_that_stalls_at_any_answer_is_given_up_in_time_and_the_guest_is_safe(memories):
    answers, cases, doubts = counted(memories)[1], 0, 0
    for at in range(answers):
        for half in (False, True):
            here, there = socket.socketpair()
            go_on = threading.Event()
            served = Served(Staller(there, at, half, go_on.wait), memories[1])
            machine = Machine()
            with contextlib.closing(SocketTransport(here, SHORT)) as transport:
                with pytest.raises(MigrationError) as caught:
                    migrate(transport, memories[0], machine)
            go_on.set()
            served.end()
            source = caught.value.source
            if isinstance(caught.value, HandoverError):     # RUN was said: who owns it must be asked
                doubts += 1
                assert caught.value.errno == errno.EINPROGRESS and caught.value.__cause__.errno == errno.ETIMEDOUT
                assert not source.handover.may_run and machine.calls[-1] != "resume"
            else:
                assert caught.value.errno == errno.ETIMEDOUT and source.handover.may_run
                assert machine.calls in ([], ["stop", "state", "resume"]) and not served.receiver.handover.may_run
            cases += 1
    print(f"stalled at {answers} answers: {cases} cases, {doubts} in doubt")
    assert cases == 2 * answers and doubts


@pytest.mark.parametrize("checksum", ["auto", "none"])
def test_a_destination_that_reads_no_more_is_given_up_in_time(checksum):
    with guest([os.urandom(1 << 20)]) as memory, guest([bytes(1 << 20)]) as target:
        here, there = socket.socketpair()
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        go_on, machine = threading.Event(), Machine()

        class Deaf(SocketTransport):
            def receive_into(self, view):
                if len(view) > 1 << 16:
                    go_on.wait()
                super().receive_into(view)

            def receive_parts(self, views):
                go_on.wait()
                super().receive_parts(views)

        served = Served(Deaf(there), target, checksum=checksum)
        with contextlib.closing(SocketTransport(here, SHORT)) as transport, MemoryLayout(memory, PAGE) as layout:
            source = PrecopySource(transport, checksum=checksum)
            source.introduce(memory)
            with pytest.raises(MigrationError) as caught:
                source.migrate(layout, LogTracker(layout), machine)
        go_on.set()
        served.end()
        assert caught.value.errno == errno.ETIMEDOUT and source.handover.may_run and machine.calls == []
        assert source.ledger.pending.count() == 256 and served.phase is None


@pytest.mark.parametrize("slow", ["source", "destination", "both"])
def test_a_slow_peer_is_waited_for(memories, slow):
    def nap(*_):
        time.sleep(SHORT / 10)

    here, there = socket.socketpair()
    sides = [Hooked(sock, nap if slow in (side, "both") else lambda _: None, timeout=50 * SHORT)
             for side, sock in (("source", here), ("destination", there))]
    served = Served(sides[1], memories[1])
    with contextlib.closing(sides[0]):
        migrate(sides[0], memories[0], Machine())
        served.end()
    assert served.phase is Phase.OWNER and content_of(memories[0]) == content_of(memories[1])


# Full disks


CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18


def tiny_disk(folder):
    """In a child: mount a file system of 64 KiB that nobody else sees; OSError where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    for call in (lambda: libc.unshare(CLONE_NEWNS), lambda: libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None),
                 lambda: libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, b"size=64k")):
        if call():
            raise OSError(ctypes.get_errno(), "no mount namespace")


class FullAt(Journal):
    """Its disk is full from the n-th write on, until it is freed."""

    def __init__(self, folder, name, at):
        super().__init__(folder / name)
        self.ballast, self.at, self.count = folder / f"{name}.ballast", at, 0

    def write(self, **record):
        if self.count == self.at:
            with contextlib.suppress(OSError), open(self.ballast, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(PAGE))
        self.count += 1
        super().write(**record)

    def free(self):
        self.ballast.unlink(missing_ok=True)
        self.at = None


def on_a_full_disk(work):
    """Run ``work(folder)`` in a child that has a tiny disk."""
    with tempfile.TemporaryDirectory() as folder:
        def run():
            try:
                tiny_disk(folder)
            except OSError:
                os._exit(77)
            work(Path(folder))

        child = Child(run)
        child.go()
        status = child.wait()
        child.close()
    if status == 77:
        pytest.skip("mounting a file system of one's own is not allowed here")
    assert status == 0


def parties(folder, memories, source_at=None, destination_at=None):
    """Return source, destination and machine; only one of the two is on the disk that gets full."""
    here, there = socket.socketpair()
    served = Served(SocketTransport(there, 5), memories[1],
                    journal=Journal() if destination_at is None else FullAt(folder, "destination", destination_at))
    source = PrecopySource(SocketTransport(here, 5), downtime_limit=1e-9, max_rounds=1,
                           journal=FullAt(folder, "source", source_at))
    return source, served, Machine()


def test_a_destination_that_can_not_write_that_a_stream_began_refuses_it(memories):
    def work(folder):
        source, served, _ = parties(folder, memories, destination_at=0)
        with pytest.raises(MigrationError, match="No space left") as caught:
            source.introduce(memories[0], PGSIZE)
        assert caught.value.peer_errno == errno.ENOSPC and source.handover.may_run
        served.end()
        assert served.failure.errno == errno.ENOSPC and served.receiver.handover.phase is Phase.RECEIVING

    on_a_full_disk(work)


def test_a_destination_that_can_not_write_that_it_owns_the_guest_does_not_and_may_later(memories):
    def work(folder):
        source, served, machine = parties(folder, memories, destination_at=1)
        with MemoryLayout(memories[0], PGSIZE) as layout:
            source.introduce(memories[0], PGSIZE)
            source.migrate(layout, LogTracker(layout), machine)
        with pytest.raises(HandoverError) as caught:
            source.release()
        assert caught.value.__cause__.peer_errno == errno.ENOSPC and not source.handover.may_run
        served.end()
        receiver = served.receiver
        assert receiver.handover.phase is Phase.COMPLETE and Journal(folder / "destination").read()["phase"] != "OWNER"
        receiver.handover._journal.free()
        here, there = socket.socketpair()
        receiver.reconnect(SocketTransport(there, 5))
        again = threading.Thread(target=receiver.settle)
        again.start()
        source.settle(SocketTransport(here, 5))
        again.join()
        assert receiver.handover.may_run and source.handover.state is SourceState.GIVEN
        assert "resume" not in machine.calls and content_of(memories[0]) == content_of(memories[1])

    on_a_full_disk(work)


def test_a_source_that_can_not_write_that_it_gives_the_guest_keeps_it(memories):
    def work(folder):
        source, served, machine = parties(folder, memories, source_at=0)
        with MemoryLayout(memories[0], PGSIZE) as layout:
            source.introduce(memories[0], PGSIZE)
            source.migrate(layout, LogTracker(layout), machine)
        with pytest.raises(MigrationError, match="journal can't be written: the guest runs on here") as caught:
            source.release()
        assert caught.value.errno == errno.ENOSPC and not isinstance(caught.value, HandoverError)
        assert source.handover.may_run and machine.calls[-1] == "resume"
        served.end()
        assert served.phase is Phase.ABORTED

    on_a_full_disk(work)


def test_a_source_that_can_not_write_that_the_guest_is_given_settles_later(memories):
    def work(folder):
        source, served, machine = parties(folder, memories, source_at=1)
        with MemoryLayout(memories[0], PGSIZE) as layout:
            source.introduce(memories[0], PGSIZE)
            source.migrate(layout, LogTracker(layout), machine)
        with pytest.raises(HandoverError) as caught:
            source.release()
        assert caught.value.errno == errno.EINPROGRESS and caught.value.__cause__.errno == errno.ENOSPC
        served.end()
        assert served.phase is Phase.OWNER and not source.handover.may_run and "resume" not in machine.calls
        source._journal.free()
        here, there = socket.socketpair()
        served.receiver.reconnect(SocketTransport(there, 5))
        again = threading.Thread(target=served.receiver.settle)
        again.start()
        source.settle(SocketTransport(here, 5))
        again.join()
        assert source.handover.state is SourceState.GIVEN and Journal(folder / "source").read()["state"] == "given"

    on_a_full_disk(work)


# Memory that is not there


def test_a_destination_without_memory_says_so_and_nothing_is_touched():
    def receive():
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * PAGE
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
        receiver = PageReceiver(SocketTransport(there), lambda hello: GuestMemory.memfd(hello.blocks[0][1]))
        with pytest.raises(VfioError) as caught:
            receiver.serve()
        assert caught.value.errno == errno.ENOMEM

    here, there = socket.socketpair()
    child = Child(receive)
    there.close()
    child.go()
    connections = []
    with GuestMemory.memfd(1 << 30) as memory, contextlib.closing(SocketTransport(here)) as transport:
        source = PrecopySource(transport, connect=lambda: connections.append(1))
        with pytest.raises(MigrationError, match="Cannot allocate memory") as caught:
            source.introduce(memory)
    assert caught.value.peer_errno == errno.ENOMEM and source.handover.may_run and not connections
    assert child.wait() == 0
    child.close()


@pytest.mark.parametrize("checksum", ["auto", "none"])
def test_a_destination_whose_memory_goes_away_meanwhile_dies_or_gives_up_and_the_source_runs_on(memories, checksum):
    def receive():
        target = guest([bytes(PAGE), bytes(PAGE)])

        def shrink(*_):
            os.ftruncate(target.regions[1].fd, 0)       # a page that can't be had any more is SIGBUS

        receiver = PageReceiver(SocketTransport(there), lambda hello: target, checksum=checksum, on_state=shrink)
        receiver.serve()

    here, there = socket.socketpair()
    child, machine = Child(receive), Machine()
    there.close()
    child.go()
    with contextlib.closing(SocketTransport(here)) as transport, MemoryLayout(memories[0], PAGE) as layout:
        source = PrecopySource(transport, checksum=checksum)
        source.introduce(memories[0], PAGE)
        with pytest.raises(MigrationError) as caught:
            source.migrate(layout, LogTracker(layout), machine, {"iovas": b"mappings"})
    assert caught.value.errno in (errno.ECONNRESET, errno.ECONNABORTED, errno.EPROTO)
    assert source.handover.may_run and source.ledger.pending.count() == 2
    assert child.wait() in (-signal.SIGBUS, 3)
    child.close()


# Versions


def of_version(frame, version):
    head = bytearray(frame[:stream.HEADER_SIZE])
    head[4] = version
    head[-4:] = zlib.crc32(head[:-4]).to_bytes(4, "little")
    return bytes(head) + bytes(frame[stream.HEADER_SIZE:])


class OtherVersion(SocketTransport):
    def __init__(self, sock, version, first):
        super().__init__(sock, 5)
        self.version, self.left = version, first

    def send(self, parts):
        data = b"".join(bytes(part) for part in parts)
        self.left -= 1
        super().send([of_version(data, self.version) if self.left < 0 else data])


def test_another_version_is_refused_in_words_on_both_sides(memories):
    cases = 0
    for version in (0, 1, stream.VERSION - 1, stream.VERSION + 1, 255):
        for first, from_source in ((0, True), (3, True), (0, False), (1, False)):
            here, there = socket.socketpair()
            served = Served(SocketTransport(there, 5) if from_source else OtherVersion(there, version, first),
                            memories[1])
            machine = Machine()
            for gpa, region in memories[1]:
                memories[1].write(gpa, bytes(region.size))
            with contextlib.closing(OtherVersion(here, version, first) if from_source else SocketTransport(here, 5)) \
                    as transport, pytest.raises(MigrationError, match=f"version {version} of the stream") as caught:
                migrate(transport, memories[0], machine)
            served.end()
            assert caught.value.source.handover.may_run and "stop" not in machine.calls
            assert not served.receiver.handover.may_run
            if not first and from_source:
                assert isinstance(served.failure, ProtocolError) and served.receiver.layout is None
                assert content_of(memories[1]) == [bytes(4096), bytes(4096)]
            cases += 1
    assert cases == 20


def test_a_file_of_another_version_is_refused_before_memory_is_asked_for():
    body = stream.encode_hello(stream.Hello(PGSIZE, bytes(16), ((0, 4096),)))
    frame = stream.encode_header(stream.Header(Kind.HELLO, 0, 0, 0, 0, 0, len(body), zlib.crc32(body))) + body
    asked = []
    with pytest.raises(ProtocolError, match=f"version {stream.VERSION + 1} of the stream, this side version"):
        PageReceiver(Replay(of_version(frame, stream.VERSION + 1)), asked.append).receive()
    assert not asked


# Company, and memory that is written all the time


def move(seed, devices, pause, options, takes):
    """Move one guest whose devices write all the time; return the number of rounds."""
    gate, states, ended = Gate(), {}, []
    with small_guest(seed) as memory, empty_guest() as target, SoftMachine(
            memory, devices=devices, seed=seed, pause=pause) as machine:
        def receive():
            with PageReceiver(gate.accept(), lambda hello: target, accept=gate.accept, on_state=states.__setitem__,
                              **takes) as receiver:
                ended.append(receiver.serve())

        thread = threading.Thread(target=receive)
        thread.start()
        try:
            with PrecopySource(gate.connect(), connect=gate.connect, downtime_limit=1e-9, max_rounds=4,
                               **options) as source:
                source.introduce(memory)
                result = source.migrate(machine.layout, machine.tracker, machine, {"iovas": b"mappings"})
                source.release()
                source._channel.close()
        finally:
            thread.join(30)
            gate.close()
        assert ended == [Phase.OWNER] and not machine.running
        assert content_of(memory) == content_of(target) and states["sha256"] == machine.layout.digest()
        return len(result.rounds)


WAYS = [{}, {"compression": "auto"}, {"checksum": "crc32"}, {"channels": 2, "compression": "zstd"}, {"channels": 3}]


def test_ten_migrations_side_by_side():
    results, failures = {}, []

    def one(number):
        try:
            results[number] = move(number, 2, 0.0005, WAYS[number % len(WAYS)], {})
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and not failures, failures
    assert sorted(results) == list(range(10)) and set(results.values()) == {5}


@pytest.mark.parametrize("way", [*WAYS, {"checksum": "none"}, {"checksum": "none", "channels": 3}], ids=str)
def test_pages_that_change_while_they_are_sent_raise_no_alarm_and_arrive_as_they_were_last(way):
    takes = {"checksum": "none"} if way.get("checksum") == "none" else {}
    for seed in range(5):
        assert move(100 + seed, 1, 0.0, way, takes) == 5


@pytest.mark.parametrize("way", [*WAYS, {"checksum": "none"}], ids=str)
def test_zero_pages_over_old_content_are_zero_at_the_destination(way):
    """Every page of the guest was sent with content, and becomes zero in a later round."""
    gate, ended = Gate(), []
    with guest([b"\x77" * PAGE * 24, b"\x77" * PAGE * 9]) as memory, empty_guest(stale=0) as target, \
            contextlib.closing(SoftMachine(memory)) as machine:
        def on_round(done):
            if done.epoch == 1:
                for mapping in machine.mappings:
                    machine.ports[0].write(mapping.iova, bytes(mapping.size))

        def receive():
            with PageReceiver(gate.accept(), lambda hello: target, accept=gate.accept, fresh=True,
                              checksum=way.get("checksum", "auto")) as receiver:
                ended.append(receiver.serve())

        thread = threading.Thread(target=receive)
        thread.start()
        try:
            with PrecopySource(gate.connect(), connect=gate.connect, downtime_limit=1e-9, max_rounds=3,
                               on_event=each_round(on_round), **way) as source:
                source.introduce(memory)
                result = source.migrate(machine.layout, machine.tracker, machine)
                source.release()
                source._channel.close()
        finally:
            thread.join(30)
            gate.close()
        assert ended == [Phase.OWNER]
        assert result.rounds[0].pages == 33 and sum(done.zero_pages for done in result.rounds) == 33
        assert not any(map(any, content_of(target)))
