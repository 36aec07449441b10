"""Migrations over TCP, TLS, pipes and descriptors that are cut, and strangers at a port of TLS.

TCP and TLS go over a wire that is cut at a byte of either direction, by the end of the stream or by a reset: in the
handshake, at the boundary of a record, inside records; none of these ends has a close_notify.  Pipes and descriptors
have nobody to connect to again: the source runs on, or asks over other ones.  VFIODMA_PROFILE=deep cuts at far more
places.
"""
import contextlib
import errno
import itertools
import os
import socket
import threading
import time

import pytest
from migration_doubles import PGSIZE, LogTracker, Machine, content_of, each_round, guest
from resuming_line import Line
from transport_ends import Wire, have_openssl, make_certificates, record_ends

from vfiodma.errors import HandoverError, MigrationError, VfioError
from vfiodma.migration import PageReceiver, PrecopySource
from vfiodma.migration.events import Broken, Resumed
from vfiodma.migration.handover import SourceState
from vfiodma.migration.joining import accept_good
from vfiodma.migration.layout import MemoryLayout
from vfiodma.migration.stream import Phase
from vfiodma.migration.transport import connect, listen

DEEP = os.environ.get("VFIODMA_PROFILE") == "deep"
RANDOM = bytes((7 * at * at + at // 3) % 251 for at in range(2048))
CONTENT = [bytes(512) + b"a" * 2560 + RANDOM[:512] + bytes(512), RANDOM + b"b" * 2048]
ROUNDS, ALL = 2, 1 << 30

# The module ssl drops, unclosed, a socket that is reset just before it wraps it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    if not have_openssl():
        pytest.skip("needs openssl")
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=["tcp", "tls"])
def kind(request):
    if request.param == "tls":
        return "tls", request.getfixturevalue("certificates")
    return "tcp", {"source": None, "destination": None}


class WireLine(Line):
    """A destination that listens for TCP or TLS, and a wire to it."""

    def __init__(self, kind, target, cuts=(), **options):
        self.kind, self.files = kind
        self.closing = False
        self.listener = listen(f"{self.kind}://localhost:0" if self.kind == "tls" else "tcp://127.0.0.1:0", timeout=5,
                               tls=self.files["destination"])
        self.wire = Wire(("127.0.0.1", int(self.listener.url.rpartition(":")[2])), cuts)
        super().__init__(target, (), **options)

    def accept(self, seconds=5.0):
        until = time.monotonic() + seconds
        while not self.closing and time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                try:
                    return self.listener.accept(0.05)
                except MigrationError as exc:
                    if exc.errno != errno.ETIMEDOUT:
                        raise
        raise MigrationError(errno.ETIMEDOUT, operation="accept", hint="nobody came")

    def first(self):
        return accept_good(self.accept, time.monotonic() + 5)

    def connect(self):
        host = "localhost" if self.kind == "tls" else "127.0.0.1"
        transport = connect(f"{self.kind}://{host}:{self.wire.address[1]}", timeout=5, tls=self.files["source"])
        self.opened.append(transport)
        return transport

    def close(self):
        self.closing = True
        self.wire.close()
        try:
            super().close()
        finally:
            self.listener.close()


def writing(memory, tracker):
    """An ``on_event`` that writes pages in each round with running devices."""
    def write(done):
        if not done.final:
            for page, data in ((0, bytes([done.epoch + 1]) * PGSIZE), (3, bytes(PGSIZE))):
                memory.write(page * PGSIZE, data)
                tracker.log.mark(page)
    return each_round(write)


def run(kind, cuts, channels=1, line_type=WireLine):
    """Migrate over lines that are cut; return how often it broke after the stream began, and the lines."""
    machine, events, states = Machine({"device": b"state"}), [], {}
    with guest(CONTENT) as memory, guest([b"\xee" * 4096] * 2) as target, MemoryLayout(memory, PGSIZE) as layout:
        line = line_type(kind, target, cuts, on_state=states.__setitem__)
        tracker = LogTracker(layout)
        write = writing(memory, tracker)

        def on_event(event):
            events.append(event)
            write(event)

        try:
            for _ in range(5):          # before the stream there is nothing to resume
                with contextlib.suppress(MigrationError), contextlib.ExitStack() as failed:
                    transport = failed.enter_context(contextlib.closing(line.connect()))
                    source = PrecopySource(transport, downtime_limit=1e-9, max_rounds=ROUNDS, channels=channels,
                                           connect=line.connect, reconnect_timeout=10, on_event=on_event)
                    source.introduce(memory, PGSIZE)
                    failed.pop_all()
                    break
            with source:
                source.migrate(layout, tracker, machine, {"iovas": b"mappings"})
                source.release()
        finally:
            line.close()
        assert source.handover.state is SourceState.GIVEN and not source.handover.may_run
        assert line.receiver.handover.phase is Phase.OWNER and line.runs == 1
        assert content_of(memory) == content_of(target)
        assert states == {"iovas": b"mappings", "device": b"state"}
        assert machine.calls.count("stop") == machine.calls.count("resume") + 1
        broken = sum(isinstance(event, Broken) for event in events)
        assert broken == sum(isinstance(event, Resumed) for event in events)
        return broken, line.wire.lines


def thin_out(places, most):
    """Some of the places, from first to last."""
    places = sorted(places)
    return places if len(places) <= most else [places[at * (len(places) - 1) // (most - 1)] for at in range(most)]


@pytest.mark.parametrize("channels", [1, 2])
def test_a_wire_cut_at_any_byte_of_either_direction_costs_an_epoch_at_most(kind, channels):
    broken, lines = run(kind, (), channels)
    assert not broken and len(lines) == channels
    cuts = resumed = ends_of_records = 0
    resets = itertools.cycle([False, True])
    for number, line in enumerate(lines):
        for direction, data in enumerate(line):
            ends = record_ends(data) if kind[0] == "tls" else []
            ends_of_records += len(ends)
            places = thin_out({0, *(place for end in ends for place in (end - 1, end, end + 1))}, ALL if DEEP else 4)
            places += thin_out(range(0, len(data), 17), ALL if DEEP else 6 - len(places))
            for at in places:
                if at < len(data):
                    broken, _ = run(kind, [None] * number + [(direction, at, next(resets))], channels)
                    assert broken <= 1
                    cuts += 1
                    resumed += broken
    print(f"{kind[0]}, {channels} channels: {sum(len(data) for line in lines for data in line)} bytes, "
          f"{ends_of_records} records, {cuts} cuts: resumed {resumed}, before the stream {cuts - resumed}")
    assert cuts > 8 * channels and resumed


def test_a_wire_cut_again_and_again_still_gets_there(kind):
    for seed in range(40 if DEEP else 2):
        cuts = [(at % 2, 100 + seed * 7 % 200 if at % 2 else 2000 + (seed * 977 + at * 1409) % 3000, at % 3 == 0)
                for at in range(5)]
        broken, _ = run(kind, cuts)
        assert broken


# Strangers

def silent(address, files):
    return socket.create_connection(address)


def plain(address, files):
    sock = socket.create_connection(address)
    sock.sendall(b"VDMA" * 100)
    return sock


def half(address, files):
    sock = socket.create_connection(address)
    sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32))       # a ClientHello begins so
    return sock


def certified(name):
    def stranger(address, files):
        transport = None
        with contextlib.suppress(MigrationError):       # only the other side knows, in TLS 1.3
            transport = connect(f"tls://localhost:{address[1]}", timeout=5, tls=files[name])
        return transport
    return stranger


STRANGERS = {"silent": silent, "plain": plain, "half": half, "wrong authority": certified("stranger"),
             "expired": certified("expired")}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_at_a_port_of_tls_hold_up_nobody(stranger, certificates):
    """One comes before each connection of a source with three channels, of which the first is cut."""
    came = []

    class Beset(WireLine):
        def connect(self):
            came.append(STRANGERS[stranger](("127.0.0.1", int(self.listener.url.rpartition(":")[2])), self.files))
            return super().connect()

    began = time.monotonic()
    try:
        broken, _ = run(("tls", certificates), [(0, 1700, False)], 3, Beset)        # behind HELLO, before RUN
    finally:
        for end in filter(None, came):
            end.close()
    assert broken == 1 and len(came) >= 6
    assert time.monotonic() - began < 4      # the time-out of one of them is 5 s


# Descriptors

def ends(kind):
    """Return transports of both sides: pipes or sockets that somebody else made."""
    if kind == "pipe":
        (there, write), (read, back) = os.pipe(), os.pipe()
        urls = [f"fd:{read},{write}", f"fd:{there},{back}"]
    else:
        urls = [f"fd:{sock.detach()}" for sock in socket.socketpair()]
    return [connect(url, timeout=5) for url in urls]


def cut_after(transport, left):
    """Close the transport after so many more bytes, either way; return a list with the number of bytes so far."""
    moved, send, receive_into = [0], transport.send, transport.receive_into

    def cut(count):
        moved[0] += count
        return left is not None and moved[0] > left

    def cutting_send(parts):
        data = b"".join(bytes(part) for part in parts)
        if cut(len(data)):
            with contextlib.suppress(VfioError):
                send([data[:len(data) - (moved[0] - left)]])
            transport.close()
            raise MigrationError(errno.ECONNRESET, operation="send", hint="cut by the test")
        send([data])

    def cutting_receive(view):
        receive_into(view)
        if cut(len(view)):
            transport.close()
            raise MigrationError(errno.ECONNRESET, operation="receive", hint="cut by the test")

    transport.send, transport.receive_into = cutting_send, cutting_receive
    return moved


def serve(receiver, failures):
    try:
        receiver.serve()
    except VfioError as exc:
        failures.append(exc)


def run_descriptors(kind, at):
    """Migrate over descriptors that are closed after ``at`` bytes; return how it ended, and the bytes."""
    machine, failures = Machine({"device": b"state"}), []
    here, there = ends(kind)
    with guest(CONTENT) as memory, guest([b"\xee" * 4096] * 2) as target, MemoryLayout(memory, PGSIZE) as layout, \
            PageReceiver(there, lambda hello: target) as receiver:
        moved, tracker = cut_after(here, at), LogTracker(layout)
        thread = threading.Thread(target=serve, args=(receiver, failures))
        thread.start()
        source = PrecopySource(here, downtime_limit=1e-9, max_rounds=ROUNDS, on_event=writing(memory, tracker))
        try:
            source.introduce(memory, PGSIZE)
            source.migrate(layout, tracker, machine, {"iovas": b"mappings"})
            source.release()
            outcome = "given"
        except HandoverError as exc:
            assert exc.errno == errno.EINPROGRESS and not source.handover.may_run and "resume" not in machine.calls
            outcome = "asked"
        except MigrationError:
            outcome = "kept"
        here.close()
        thread.join(10)
        assert not thread.is_alive()
        there.close()
        phase = receiver.handover.phase
        if outcome == "kept":
            assert failures and phase in (Phase.RECEIVING, Phase.COMPLETE) and source.handover.may_run
            assert machine.calls.count("stop") == machine.calls.count("resume")
            for block, (gpa, region) in zip(layout.blocks, target, strict=True):
                got = target.read(gpa, region.size)
                for page in range(block.npages) if source.ledger else ():
                    place = slice(page * PGSIZE, (page + 1) * PGSIZE)
                    assert bytes(block.view[place]) == got[place] or source.ledger.pending.test(block.first_bit + page)
            assert receiver.handover.abort() is Phase.ABORTED
            return outcome, moved[0]
        if outcome == "asked":      # over other ones
            assert phase in (Phase.COMPLETE, Phase.OWNER)
            here, there = ends(kind)
            receiver.reconnect(there)
            thread = threading.Thread(target=receiver.settle)
            thread.start()
            source.settle(here)
            thread.join(10)
            here.close()
            there.close()
        assert source.handover.state is SourceState.GIVEN and receiver.handover.phase is Phase.OWNER
        assert content_of(memory) == content_of(target)
        return outcome, moved[0]


@pytest.mark.parametrize("kind", ["pipe", "fd"])
def test_descriptors_closed_at_any_byte_leave_one_owner(kind):
    outcome, total = run_descriptors(kind, None)
    assert outcome == "given"
    places = {*range(0, total, 1 if DEEP else total // 24), *range(total - 88, total, 1 if DEEP else 11)}
    outcomes = [run_descriptors(kind, at)[0] for at in sorted(places)]
    print(f"{kind}: {total} bytes, {len(outcomes)} cuts: kept {outcomes.count('kept')}, "
          f"asked over others {outcomes.count('asked')}")
    assert outcomes.count("kept") + outcomes.count("asked") == len(places) and {"kept", "asked"} <= set(outcomes)
