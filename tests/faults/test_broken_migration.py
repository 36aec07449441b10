"""Either side killed at any frame, lines cut, peers that stall: an error in time, and the source keeps the guest."""
import contextlib
import errno
import os
import signal
import socket
import time

import pytest
from migration_doubles import PGSIZE, Hooked, LogTracker, Machine, Peer, content_of, each_round, guest

from vfiodma.errors import MigrationError, ProtocolError, VfioError
from vfiodma.migration import PageReceiver, PrecopySource, SocketTransport
from vfiodma.migration.layout import MemoryLayout

CONTENT = [bytes(512) + b"a" * 3072 + bytes(512), b"b" * 4096]
ROUNDS = 3


@pytest.fixture
def memory():
    with guest(CONTENT) as memory:
        yield memory


@pytest.fixture
def target():
    with guest([bytes(4096), bytes(4096)]) as memory:
        yield memory


def migrate(transport, memory, machine, tracker=None):
    """The source's whole part, with writes between the rounds."""
    with MemoryLayout(memory, PGSIZE) as layout:
        tracker = tracker or LogTracker(layout)

        def on_round(done):
            if not done.final:
                memory.write(0, bytes([done.epoch + 1]) * PGSIZE)
                tracker.log.mark(0)

        source = PrecopySource(transport, downtime_limit=1e-9, max_rounds=ROUNDS, on_event=each_round(on_round))
        try:
            source.introduce(memory, PGSIZE)
            source.migrate(layout, tracker, machine)
            here, there = source.verify(layout)
            assert here == there
            source.release()
        except BaseException as exc:
            exc.source = source
            raise
        return source


def count_frames(memory, target):
    here, there = socket.socketpair()
    peer = Peer(there, target, verify=True)
    transport = Hooked(here, lambda _: None)
    with contextlib.closing(transport):
        migrate(transport, memory, Machine())
    peer.join()
    assert peer.failure is None
    return transport.count


def in_child(sockets, work):
    """Run in a forked process that closes the other end first; return its id."""
    mine, other = sockets
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            other.close()
            work(mine)
            status = 0
        except OSError:
            pass
        finally:
            os._exit(status)
    mine.close()
    return pid


def kill_oneself(at):
    def before(frame):
        if frame == at:
            os.kill(os.getpid(), signal.SIGKILL)
    return before


def test_a_sender_killed_at_any_frame_is_an_error_at_the_receiver(memory, target):
    frames = count_frames(memory, target)
    assert frames > 10
    for at in range(frames):
        here, there = socket.socketpair()
        pid = in_child((here, there), lambda sock, at=at: migrate(Hooked(sock, kill_oneself(at)), memory, Machine()))
        receiver = PageReceiver(SocketTransport(there, 10), lambda hello: target)
        began = time.monotonic()
        with pytest.raises((ProtocolError, MigrationError)), contextlib.closing(receiver), there:
            receiver.receive()
            receiver.settle()
        assert not receiver.handover.may_run
        assert time.monotonic() - began < 5
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def receive_all(transport, target):
    receiver = PageReceiver(transport, lambda hello: target)
    receiver.receive()
    receiver.settle()


def test_a_receiver_killed_at_any_answer_leaves_the_source_running(memory, target):
    answers = 1 + (ROUNDS + 1) + 1 + 1      # READY, ACKs, DIGEST, STARTED
    for at in range(answers):
        here, there = socket.socketpair()
        pid = in_child((there, here), lambda sock, at=at: receive_all(Hooked(sock, kill_oneself(at)), target))
        machine = Machine()
        with pytest.raises(MigrationError), here:
            migrate(SocketTransport(here, 10), memory, machine)
        if at <= ROUNDS + 1:
            assert machine.calls in ([], ["stop", "state", "resume"]), at
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


class Cut(Exception):
    pass


def test_a_line_cut_at_any_frame_forgets_no_page(memory, target):
    frames = count_frames(memory, target)
    for at in range(1, frames - 2):         # up to the last END; VERIFY and RUN follow
        for gpa, region in target:
            target.write(gpa, b"?" * region.size)
        here, there = socket.socketpair()
        peer = Peer(there, target)

        def cut(frame, at=at, here=here):
            if frame == at:
                here.shutdown(socket.SHUT_RDWR)

        machine = Machine()
        with MemoryLayout(memory, PGSIZE) as layout:
            tracker = LogTracker(layout)
            with contextlib.closing(Hooked(here, cut)) as transport, pytest.raises(MigrationError) as caught:
                migrate(transport, memory, machine, tracker)
            peer.join()
            assert tracker.stopped
            ledger = caught.value.source.ledger
            tracker.log.harvest(ledger.pending)
            assert not ledger.in_flight.any()
            for block, got, want in zip(layout.blocks, content_of(target), content_of(memory), strict=True):
                for page in range(block.npages):
                    place = slice(page * PGSIZE, (page + 1) * PGSIZE)
                    assert got[place] == want[place] or ledger.pending.test(block.first_bit + page), (at, page)
        assert machine.calls.count("stop") == machine.calls.count("resume")
        assert not peer.receiver.handover.may_run and isinstance(peer.failure, VfioError)


@pytest.mark.parametrize("sent", [0, 10, 44])
def test_a_source_that_stalls_is_given_up_in_time(target, sent):
    here, there = socket.socketpair()
    here.sendall(b"VDMA\x02\x01"[:sent].ljust(sent, b"\0"))
    receiver = PageReceiver(SocketTransport(there, 0.2), lambda hello: target)
    began = time.monotonic()
    with here, there, pytest.raises((MigrationError, ProtocolError)) as caught:
        receiver.receive()
    assert time.monotonic() - began < 2
    assert caught.value.errno == (errno.ETIMEDOUT if sent < 44 else errno.EPROTO)


def test_a_source_that_drips_bytes_is_given_up_as_well(target):
    here, there = socket.socketpair()
    pid = in_child((here, there), lambda sock: [(sock.send(b"V"), time.sleep(0.05)) for _ in range(60)])
    with there, pytest.raises(MigrationError, match="did not move for 0.3 s") as caught:
        PageReceiver(SocketTransport(there, 0.3), lambda hello: target).receive()
    assert caught.value.errno == errno.ETIMEDOUT
    os.waitpid(pid, 0)


def test_a_destination_that_stalls_is_given_up_in_time(memory):
    here, there = socket.socketpair()
    with here, there, pytest.raises(MigrationError) as caught:
        PrecopySource(SocketTransport(here, 0.2)).introduce(memory, PGSIZE)
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_destination_that_reads_nothing_is_given_up_in_time():
    here, there = socket.socketpair()
    with here, there, pytest.raises(MigrationError) as caught:
        SocketTransport(here, 0.2).send([bytes(64 << 20)])
    assert caught.value.errno == errno.ETIMEDOUT


def test_the_source_learns_why_the_destination_gave_up(memory, target):
    def no_room(*_):
        raise VfioError(errno.ENOMEM, operation="restore", hint="no room for the device")

    here, there = socket.socketpair()
    peer = Peer(there, target, on_switch=no_room)
    machine = Machine()
    with contextlib.closing(SocketTransport(here, 10)) as transport:
        with pytest.raises(MigrationError, match="no room for the device"):
            migrate(transport, memory, machine)
    peer.join()
    assert machine.calls == ["stop", "state", "resume"]
    assert not peer.receiver.complete


def test_other_memory_than_was_introduced_is_refused(memory, target):
    here, there = socket.socketpair()
    peer = Peer(there, target)
    with contextlib.closing(SocketTransport(here, 10)) as transport, guest([bytes(8192)]) as other:
        source = PrecopySource(transport)
        with MemoryLayout(other, PGSIZE) as layout, pytest.raises(VfioError, match="not the one that was introduced"):
            source.migrate(layout, LogTracker(layout), Machine())
        source.introduce(memory, PGSIZE)
        with MemoryLayout(other, PGSIZE) as layout, pytest.raises(VfioError, match="not the one that was introduced"):
            source.migrate(layout, LogTracker(layout), Machine())
    peer.join()


def test_an_interrupt_resumes_the_machine(memory, target):
    here, there = socket.socketpair()
    peer = Peer(there, target)
    machine = Machine()
    machine.state = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with contextlib.closing(SocketTransport(here, 10)) as transport, pytest.raises(KeyboardInterrupt):
        migrate(transport, memory, machine)
    peer.join()
    assert machine.calls == ["stop", "resume"]
