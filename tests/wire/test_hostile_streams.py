"""The receiver against streams that were damaged on the way, or made up: an error each time, and never a wrong byte."""
import contextlib
import random
import struct
import zlib

import pytest
from migration_doubles import PGSIZE, Replay, content_of, guest, record

from vfiodma.errors import MigrationError, ProtocolError, VfioError
from vfiodma.migration import PageReceiver, stream
from vfiodma.migration.stream import FINAL, Header, Hello, Kind, Totals

OLD = b"\xee" * 4096        # what is in the destination's memory before
# Two regions, 8 pages each: content, zeros between, and writes after the first round, one of them of zeros.
BEFORE = [bytes(512) + bytes(range(256)) * 6 + bytes(1024) + b"x" * 1024, bytes(4096)]
WRITES = [(0, 1, b"N" * 512), (1, 7, b"M" * 512), (0, 7, bytes(512))]


@pytest.fixture(scope="module", params=["auto", "crc32"])
def frames(request):
    with guest(BEFORE) as memory, guest([OLD, OLD]) as target:
        recorded = record(memory, target, WRITES, checksum=request.param)
        assert content_of(target) == content_of(memory)
    return recorded


@pytest.fixture(scope="module")
def target():
    with guest([OLD, OLD]) as memory:
        yield memory


def replay(data, target, checksum="auto"):
    """Let a receiver take a stream in; return it."""
    for gpa, region in target:
        target.write(gpa, OLD[:region.size])
    receiver = PageReceiver(Replay(data), lambda hello: target, checksum=checksum)
    try:
        receiver.receive()
        receiver.settle()
    finally:
        receiver.close()
    return receiver


def after_writes():
    regions = [bytearray(content) for content in BEFORE]
    for block, page, data in WRITES:
        regions[block][page * PGSIZE:(page + 1) * PGSIZE] = data
    return [bytes(region) for region in regions]


def only_sent_pages(target):
    """Whether every page of the target is an old one, or one that the source had at some time."""
    for got, before, after in zip(content_of(target), BEFORE, after_writes(), strict=True):
        for at in range(0, len(got), PGSIZE):
            if got[at:at + PGSIZE] not in (OLD[:PGSIZE], before[at:at + PGSIZE], after[at:at + PGSIZE]):
                return False
    return True


def kinds(frames):
    return [stream.decode_header(frame[:stream.HEADER_SIZE]).kind for frame in frames]


def test_the_recorded_stream_brings_everything(frames, target):
    receiver = replay(b"".join(frames), target)
    assert receiver.complete
    assert content_of(target) == after_writes()
    assert {Kind.HELLO, Kind.STATE, Kind.PAGES, Kind.ZEROS, Kind.END, Kind.VERIFY, Kind.RUN} <= set(kinds(frames))


def test_every_flipped_byte_is_an_error_and_no_wrong_byte_gets_into_memory(frames, target):
    data = bytearray(b"".join(frames))
    for at in range(len(data)):
        data[at] ^= 1 << at % 8
        with pytest.raises(ProtocolError):
            replay(data, target)
        assert only_sent_pages(target), at
        data[at] ^= 1 << at % 8


def test_truncation_at_every_length_is_an_error(frames, target):
    data = b"".join(frames)
    for length in range(len(data)):
        receiver = PageReceiver(Replay(data[:length]), lambda hello: target)
        with pytest.raises(ProtocolError):
            try:
                receiver.receive()
                receiver.settle()
            finally:
                receiver.close()
        assert not receiver.handover.may_run


def test_without_checksums_a_flipped_byte_outside_of_content_is_an_error():
    with guest(BEFORE) as memory, guest([OLD, OLD]) as target:
        frames = record(memory, target, WRITES, checksum="none")
        assert content_of(target) == content_of(memory)
        at = 0
        data = bytearray(b"".join(frames))
        for frame in frames:
            header = stream.decode_header(frame[:stream.HEADER_SIZE])
            content = stream.HEADER_SIZE + header.nruns * stream.RUN_SIZE if header.kind is Kind.PAGES else len(frame)
            for offset in range(content):
                data[at + offset] ^= 1 << offset % 8
                with pytest.raises(ProtocolError):
                    replay(data, target, "none")
                assert only_sent_pages(target)
                data[at + offset] ^= 1 << offset % 8
            at += len(frame)
        replay(data, target, "none")
        assert content_of(target) == after_writes()
        for length in range(0, len(data), 7):
            with pytest.raises(ProtocolError):
                replay(data[:length], target, "none")
        with pytest.raises(ProtocolError, match="no checksum in common: the source offers none, the destination takes"):
            replay(data, target)


@pytest.mark.parametrize("change", ["repeat", "drop", "swap"])
def test_frames_repeated_dropped_or_swapped_are_an_error(frames, target, change):
    for at in range(len(frames)):
        order = list(frames)
        if change == "repeat":
            order.insert(at, order[at])
        elif change == "drop":
            del order[at]
        elif at + 1 < len(order):
            order[at:at + 2] = order[at + 1], order[at]
        else:
            continue
        if b"".join(order) == b"".join(frames) + frames[-1]:
            continue        # RUN once more: nobody listens any more
        with pytest.raises(ProtocolError):
            replay(b"".join(order), target)
        assert only_sent_pages(target)


def test_garbage_is_an_error(target):
    rng = random.Random(20)
    for length in [0, 1, 43, 44, 45, 100, 5000] * 40:
        with pytest.raises(ProtocolError):
            replay(rng.randbytes(length), target)
        assert content_of(target) == [OLD, OLD]


def test_garbage_after_a_good_start_is_an_error(frames, target):
    rng = random.Random(21)
    for count in range(1, len(frames)):
        for _ in range(5):
            with pytest.raises(ProtocolError):
                replay(b"".join(frames[:count]) + rng.randbytes(rng.randrange(40, 3000)), target)
            assert only_sent_pages(target)


class Forger:
    """Makes streams whose checksums and numbers are right."""

    def __init__(self, shape=((0, 4096), (4096 + (1 << 20), 4096)), pgsize=PGSIZE):
        self.sequence = 0
        self.data = b""
        self.add(Kind.HELLO, stream.encode_hello(Hello(pgsize, bytes(16), shape)))

    def add(self, kind, body=b"", nruns=0, **fields):
        fields = {"block": 0, "flags": 0, "epoch": 0, "sequence": self.sequence} | fields
        header = Header(kind, nruns=nruns, length=len(body), body_sum=zlib.crc32(body), **fields)
        self.data += stream.encode_header(header) + body
        self.sequence += 1
        return self

    def pages(self, runs, content=None, kind=Kind.PAGES, **fields):
        count = sum(count for _, count in runs)
        content = b"F" * (PGSIZE * count if count < 100 else 0) if content is None else content
        body = b"".join(struct.pack("<QQ", *run) for run in runs) + (content if kind is Kind.PAGES else b"")
        return self.add(kind, body, len(runs), **fields)

    def zeros(self, runs, **fields):
        return self.pages(runs, kind=Kind.ZEROS, **fields)

    def end(self, *totals, **fields):
        return self.add(Kind.END, stream.encode_totals(Totals(*totals)), **fields)


TOP = (1 << 64) - 1


@pytest.mark.parametrize("forged, words", [
    (Forger().pages([(8, 1)]), "ends behind"),
    (Forger().pages([(7, 2)]), "ends behind"),
    (Forger().pages([(1 << 63, 1)]), "ends behind"),
    (Forger().pages([(2, TOP)], b""), "ends behind"),
    (Forger().pages([(TOP, 2)]), "ends behind"),
    (Forger().pages([(0, 0)]), "empty run"),
    (Forger().pages([(0, 2), (1, 1)]), "overlap"),
    (Forger().pages([(3, 1), (1, 1)]), "not ascending"),
    (Forger().pages([(0, 2)], b"F" * PGSIZE), "bytes for 2 pages"),
    (Forger().pages([(0, 1)], b"F" * (PGSIZE + 1)), "bytes for 1 pages"),
    (Forger().pages([]), "without runs"),
    (Forger().zeros([]), "without runs"),
    (Forger().zeros([(0, TOP)]), "ends behind"),
    (Forger().add(Kind.ZEROS, bytes(16) + b"more", 1), "empty run|bytes for"),
    (Forger().add(Kind.ZEROS, struct.pack("<QQ", 0, 1) + b"more", 1), "4 bytes for 1 pages"),
    (Forger().pages([(0, 1)], block=2), "no block 2"),
    (Forger().pages([(0, 1)], epoch=1), "epoch 1 in epoch 0"),
    (Forger().pages([(0, 2)]).pages([(1, 1)]), "came twice"),
    (Forger().pages([(0, 2)]).zeros([(1, 1)]), "came twice"),
    (Forger().end(0, 0, 0), "did not bring all memory"),
    (Forger().pages([(0, 8)]).end(1, 8, 0), "did not bring all memory"),
    (Forger().pages([(0, 8)]).pages([(0, 8)], block=1).end(2, 15, 0), "other totals"),
    (Forger().pages([(0, 8)]).pages([(0, 8)], block=1).end(2, 16, 0).add(Kind.RUN), "RUN came where"),
    (Forger().add(Kind.END, b"short"), "totals of 5 bytes"),
    (Forger().add(Kind.STATE, b"\x09\0abc"), "too short"),
    (Forger().add(Kind.HELLO, stream.encode_hello(Hello(PGSIZE, bytes(16), ((0, 4096),)))), "HELLO came where"),
    (Forger().add(Kind.ACK, bytes(24)), "ACK came where"),
    (Forger(((0, 4096),)), "another shape"),
    (Forger(((0, 4096), (1 << 30, 4096))), "another shape"),
    (Forger().add(Kind.STATE, b"\x01\0a" + bytes(16 << 20)), "too long for STATE"),
    (Forger().pages([(0, 1)], sequence=5), "frame 5 came, 1 was next"),
])
def test_a_stream_that_lies_with_right_checksums_is_refused_before_it_touches_memory(forged, words, target):
    with pytest.raises(ProtocolError, match=words):
        replay(forged.data, target)
    untouched = OLD[:PGSIZE], b"F" * PGSIZE
    assert all(content[at:at + PGSIZE] in untouched for content in content_of(target) for at in range(0, 4096, PGSIZE))


def test_states_without_end_are_refused(target):
    forged = Forger()
    body = b"\x01\0a" + bytes((16 << 20) - 3)
    for _ in range(5):
        forged.add(Kind.STATE, body)
    with pytest.raises(ProtocolError, match="states of more than"):
        replay(forged.data, target)


def test_memory_that_the_destination_refuses_is_told_to_the_source():
    transport = Replay(Forger(((0, 1 << 62),)).data)

    def refuse(hello):
        raise VfioError(12, operation="make_memory", hint="too much")

    with pytest.raises(VfioError, match="too much"):
        PageReceiver(transport, refuse).receive()
    header = stream.decode_header(transport.answers[-1][:stream.HEADER_SIZE])
    assert header.kind is Kind.ERROR and b"too much" in transport.answers[-1]


def test_a_zero_page_clears_old_content_even_in_fresh_memory_that_was_written_since(target):
    forged = Forger().pages([(0, 8)]).pages([(0, 8)], block=1).end(2, 16, 0)
    forged.zeros([(1, 2), (7, 1)], epoch=1).end(1, 0, 3, epoch=1, flags=FINAL)
    with guest([bytes(4096), bytes(4096)]) as fresh:
        receiver = PageReceiver(Replay(forged.data), lambda hello: fresh, fresh=True)
        receiver.receive()
        receiver.close()
        first, second = content_of(fresh)
    page = b"F" * PGSIZE
    assert first == page + 2 * bytes(PGSIZE) + 4 * page + bytes(PGSIZE)
    assert second == 8 * page


def test_zero_pages_of_the_first_round_clear_memory_that_is_not_fresh(target):
    forged = Forger().zeros([(0, 8)]).zeros([(0, 8)], block=1).end(2, 0, 16, flags=FINAL)
    for gpa, _ in target:
        target.write(gpa, OLD)
    with contextlib.closing(PageReceiver(Replay(forged.data), lambda hello: target)) as receiver:
        receiver.receive()
    assert content_of(target) == [bytes(4096), bytes(4096)]


def test_an_incomplete_receiver_answers_no_digest(target):
    with contextlib.closing(PageReceiver(Replay(b""), lambda hello: target)) as receiver:
        with pytest.raises(VfioError, match="not complete"):
            receiver.settle()


def test_the_source_refuses_answers_of_another_kind_or_stream(target):
    from vfiodma.migration import PrecopySource
    reply = Replay(Forger().data)
    with pytest.raises(MigrationError, match="HELLO came where"):
        PrecopySource(reply).introduce(target, PGSIZE)
    body = stream.encode_ready(bytes(16), stream.Ready(stream.Checksum.CRC32))
    answer = stream.encode_header(Header(Kind.READY, 0, 0, 0, 0, 0, len(body), zlib.crc32(body))) + body
    with pytest.raises(MigrationError, match="another stream"):
        PrecopySource(Replay(answer)).introduce(target, PGSIZE)


def test_a_stream_does_not_go_on_with_pages_of_another_size(target):
    hello = stream.Hello(PGSIZE, bytes(16), ((0, 4096),), token=bytes(16))

    def greeting(hello):
        body = stream.encode_hello(hello)
        return stream.encode_header(Header(Kind.HELLO, 0, 0, 0, 0, 0, len(body), zlib.crc32(body))) + body

    with guest([bytes(4096)]) as memory, contextlib.closing(
            PageReceiver(Replay(greeting(hello)), lambda _: memory)) as receiver:
        with pytest.raises(ProtocolError, match="ended too early"):
            receiver.receive()
        receiver.reconnect(Replay(greeting(hello._replace(resume=True, pgsize=2 * PGSIZE))))
        with pytest.raises(ProtocolError, match="another stream"):
            receiver.receive()


@pytest.mark.parametrize("cut", [1, PGSIZE, 4096 - 1])
def test_another_stream_does_not_find_a_part_of_the_first_ones_pages(cut):
    none = stream.Checksum.NONE

    def frames(number, *kinds):
        hello, data = stream.Hello(PGSIZE, bytes([number]) * 16, ((0, 4096),), none), b""
        kinds = ((Kind.HELLO, stream.encode_hello(hello), 0, 0, None), *kinds)
        for sequence, (kind, body, nruns, flags, summed) in enumerate(kinds):
            data += stream.encode_header(Header(kind, 0, flags, 0, sequence, nruns, len(body),
                                                zlib.crc32(body[:summed]))) + body
        return data

    runs = struct.pack("<QQ", 0, 4096 // PGSIZE)
    first = frames(1, (Kind.PAGES, runs + b"x" * 4096, 1, 0, 16))
    second = frames(2, (Kind.ZEROS, runs, 1, 0, None),
                    (Kind.END, stream.encode_totals(Totals(1, 0, 4096 // PGSIZE)), 0, FINAL, None))

    class Partly(Replay):       # what arrived of a part is in memory, as with recvmsg(2)
        def receive_into(self, view):
            rest = self.data[self.at:]
            view[:len(rest)] = rest[:len(view)]
            super().receive_into(view)

    with guest([bytes(4096)]) as memory, contextlib.closing(PageReceiver(
            Partly(first[:cut - 4096]), lambda _: memory, fresh=True, prefault=False, checksum="none")) as receiver:
        with pytest.raises(ProtocolError, match="ended too early"):
            receiver.receive()
        receiver.reconnect(Replay(second))
        with contextlib.suppress(ProtocolError):
            receiver.receive()
        assert not receiver.complete or content_of(memory) == [bytes(4096)]
