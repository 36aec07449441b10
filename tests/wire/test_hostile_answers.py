"""The source against answers that were damaged on the way: an error each time, the guest is here, nothing is forgotten.

Every bit is flipped, the answers end at every length, and each one is repeated, dropped, swapped
with the next, or lies with a right checksum.
"""
import contextlib
import socket
import threading
import zlib
from unittest import mock

import pytest
from migration_doubles import PGSIZE, LogTracker, Machine, Recorder, Replay, content_of, each_round, guest

from vfiodma.errors import HandoverError, MigrationError
from vfiodma.migration import PageReceiver, PrecopySource, SocketTransport, stream
from vfiodma.migration.handover import SourceState
from vfiodma.migration.layout import MemoryLayout
from vfiodma.migration.stream import Kind

BEFORE = [bytes(512) + bytes(range(256)) * 6 + bytes(1024) + b"x" * 1024, bytes(4096)]


def migrate(transport, memory, machine):
    """The source's part, the same each time; return the source and what ended it."""
    with MemoryLayout(memory, PGSIZE) as layout, mock.patch("vfiodma.migration.precopy.os.urandom", bytes):
        tracker = LogTracker(layout)
        source = PrecopySource(transport, downtime_limit=1e-9, max_rounds=2,
                               on_event=each_round(lambda done: tracker.log.mark(done.epoch)))
        try:
            source.introduce(memory, PGSIZE)
            source.migrate(layout, tracker, machine, {"iovas": b"mappings"})
            here, there = source.verify(layout)
            assert here == there
            source.release()
        except MigrationError as exc:
            return source, exc
        return source, None


@pytest.fixture(scope="module")
def memory():
    with guest(BEFORE) as memory:
        yield memory


@pytest.fixture(scope="module")
def answers(memory):
    """Return what a destination says, frame by frame."""
    here, there = socket.socketpair()
    with guest([bytes(4096)] * 2) as target, contextlib.closing(Recorder(there)) as recorder:
        receiver = PageReceiver(recorder, lambda hello: target)
        thread = threading.Thread(target=receiver.serve)
        thread.start()
        with contextlib.closing(SocketTransport(here, 5)) as transport:
            source, failure = migrate(transport, memory, Machine())
        thread.join()
        receiver.close()
        assert failure is None and content_of(memory) == content_of(target)
    kinds = [stream.decode_header(frame[:stream.HEADER_SIZE]).kind for frame in recorder.frames]
    assert kinds == [Kind.READY, Kind.ACK, Kind.PREPARED, Kind.ACK, Kind.ACK, Kind.DIGEST, Kind.STARTED]
    return recorder.frames


def refused(data, memory, asked):
    """Let a source hear damaged answers; whether it was left in doubt.  ``asked``: STARTED is damaged, not more."""
    machine = Machine({"device": b"state"})
    source, failure = migrate(Replay(data), memory, machine)
    assert failure is not None
    if source.ledger is not None:
        assert not source.ledger.in_flight.any()
        assert source._epoch or source.ledger.pending.count() == 16     # nothing was acknowledged
    if isinstance(failure, HandoverError):
        assert asked and source.handover.state is SourceState.COMMITTING and machine.calls[-1] == "state"
        return True
    assert source.handover.may_run and machine.calls in ([], ["stop", "state", "resume"])
    return False


def test_the_recorded_answers_are_taken(answers, memory):
    source, failure = migrate(Replay(b"".join(answers)), memory, Machine())
    assert failure is None and source.handover.state is SourceState.GIVEN


def test_every_flipped_byte_of_an_answer_is_an_error(answers, memory):
    data, doubts, cases = bytearray(b"".join(answers)), 0, 0
    last = len(data) - len(answers[-1])
    for at in range(len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            doubts += refused(data, memory, at >= last)
            data[at] ^= 1 << bit
            cases += 1
    print(f"{cases} flipped bits in {len(data)} bytes of answers, {doubts} left in doubt")
    assert cases == 8 * len(data) and doubts == 8 * len(answers[-1])


def test_answers_that_end_at_any_length_are_an_error(answers, memory):
    data = b"".join(answers)
    last = len(data) - len(answers[-1])
    doubts = sum(refused(data[:length], memory, length >= last) for length in range(len(data)))
    assert doubts == len(answers[-1])


@pytest.mark.parametrize("change", ["repeat", "drop", "swap"])
def test_answers_repeated_dropped_or_swapped_are_an_error(answers, memory, change):
    for at in range(len(answers) - (change != "drop")):
        order = list(answers)
        if change == "repeat":
            order.insert(at, order[at])
        elif change == "drop":
            del order[at]
        else:
            order[at:at + 2] = order[at + 1], order[at]
        refused(b"".join(order), memory, at >= len(answers) - 2)


def forged(frame, body=None, **fields):
    """Return a frame with other fields and right checksums."""
    header = stream.decode_header(frame[:stream.HEADER_SIZE])
    body = frame[stream.HEADER_SIZE:] if body is None else body
    return stream.encode_header(header._replace(length=len(body), **fields)) + body


def test_answers_that_lie_with_right_checksums_are_an_error(answers, memory):
    from vfiodma.migration.stream import Checksum, Totals, body_sum

    summed = Checksum.XXH3 if stream.xxhash else Checksum.CRC32
    hello = bytes(16)
    lies = {0: [stream.encode_ready(hello, stream.Ready(**fields)) for fields in (
        {"checksum": Checksum.NONE}, {"checksum": 3}, {"checksum": Checksum.CRC32, "channels": 2},
        {"checksum": Checksum.CRC32, "compression": 1}, {"checksum": Checksum.CRC32, "phase": 2},
        {"checksum": Checksum.CRC32, "epochs": 1})] + [b"", bytes(31), b"other" + bytes(27)],
        1: [stream.encode_totals(Totals(0, 0, 0)), stream.encode_totals(Totals(1, 1, 1)), b"short"],
        5: [b"", bytes(31)]}
    cases = 0
    for at, bodies in lies.items():
        for body in bodies:
            order = list(answers)
            order[at] = forged(order[at], body, body_sum=zlib.crc32(body) if not at else body_sum(summed, [body]))
            refused(b"".join(order), memory, False)
            cases += 1
    for at in range(1, len(answers)):
        for fields in ({"epoch": 77}, {"sequence": 77}):
            order = list(answers)
            order[at] = forged(order[at], **fields)
            refused(b"".join(order), memory, at == len(answers) - 1)
            cases += 1
    assert cases == 26
