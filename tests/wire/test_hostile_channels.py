"""Several channels of which some bring damaged, lost, repeated or made-up frames: an error, and never a wrong byte."""
import errno
import os
import socket
import struct
import threading
import time
import zlib

import pytest
from migration_doubles import PGSIZE, LogTracker, Machine, Recorder, Replay, content_of, each_round, guest

from vfiodma.errors import MigrationError, ProtocolError
from vfiodma.migration import PageReceiver, PrecopySource, SocketTransport, stream
from vfiodma.migration.layout import MemoryLayout
from vfiodma.migration.stream import FINAL, Checksum, Header, Hello, Kind, Totals

OLD = b"\xee" * 4096
BEFORE = [bytes(512) + bytes(range(256)) * 6 + bytes(1024) + b"x" * 1024, b"y" * 2048 + bytes(2048)]
WRITES = [(0, 1, b"N" * 512), (1, 7, b"M" * 512), (0, 7, bytes(512))]
AFTER = [bytearray(content) for content in BEFORE]
for _block, _page, _data in WRITES:
    AFTER[_block][_page * PGSIZE:(_page + 1) * PGSIZE] = _data
CHANNELS = 3
STEP = 1 if os.environ.get("VFIODMA_PROFILE") == "deep" else 2      # bytes from one flip to the next


class SlowRecorder(Recorder):
    """Leaves time for the other channels to take pages."""

    def send(self, parts):
        time.sleep(0.01)
        super().send(parts)


def record(checksum, compression):
    """Return the frames of each channel of a migration that went well."""
    waiting, recorders = [], []

    def connect():
        here, there = socket.socketpair()
        waiting.append(SocketTransport(there, 10))
        recorders.append(SlowRecorder(here))
        return recorders[-1]

    def accept(timeout):
        deadline = time.monotonic() + timeout
        while not waiting:
            if time.monotonic() > deadline:
                raise MigrationError(errno.ETIMEDOUT)
            time.sleep(0.001)
        return waiting.pop(0)

    with guest(BEFORE) as memory, guest([OLD, OLD]) as target, MemoryLayout(memory, PGSIZE) as layout:
        control = connect()
        there = accept(1)
        receiver = PageReceiver(there, lambda hello: target, checksum=checksum, accept=accept)
        peer = threading.Thread(target=receiver.receive)
        peer.start()
        tracker = LogTracker(layout)

        def on_round(done):
            if done.epoch == 0:
                for block, page, data in WRITES:
                    memory.write(layout.blocks[block].gpa + page * PGSIZE, data)
                    tracker.log.mark(layout.blocks[block].first_bit + page)

        source = PrecopySource(control, downtime_limit=1e-9, max_rounds=2, checksum=checksum, compression=compression,
                               channels=CHANNELS, connect=connect, on_event=each_round(on_round))
        source.introduce(memory, PGSIZE)
        source.migrate(layout, tracker, Machine())
        peer.join()
        source.close()
        for transport in (control, there):
            transport.close()
        receiver.close()
        assert content_of(target) == AFTER
    return [recorder.frames for recorder in recorders]


@pytest.fixture(scope="module", params=[("auto", "none"), ("crc32", "auto"), ("none", "none")], ids=str)
def recorded(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vfiodma.migration.sender._STAGE_BYTES", PGSIZE)
        patch.setattr("vfiodma.migration.stream.DIRECT_BYTES", PGSIZE)
        for _ in range(20):
            channels = record(*request.param)
            if all(Kind.PAGES in kinds(frames) for frames in channels):
                return request.param[0], channels
    raise AssertionError("some channel never got pages")


@pytest.fixture(scope="module")
def target():
    with guest([OLD, OLD]) as memory:
        yield memory


def kinds(frames):
    return [header_of(frame).kind for frame in frames]


def header_of(frame):
    return stream.decode_header(frame[:stream.HEADER_SIZE])


def replay(channels, target, checksum):
    """Let a receiver take the streams in: what each channel says, one bytes object each."""
    for gpa, region in target:
        target.write(gpa, OLD[:region.size])
    further = [Replay(data) for data in channels[1:]]

    def accept(timeout):
        if not further:
            raise MigrationError(errno.EBADF, operation="transport", hint="nobody comes any more")
        return further.pop(0)

    receiver = PageReceiver(Replay(channels[0]), lambda hello: target, checksum=checksum, accept=accept)
    try:
        receiver.receive()
    finally:
        receiver.close()


def only_sent_pages(target):
    for got, before, after in zip(content_of(target), BEFORE, AFTER, strict=True):
        for at in range(0, len(got), PGSIZE):
            if got[at:at + PGSIZE] not in (OLD[:PGSIZE], before[at:at + PGSIZE], after[at:at + PGSIZE]):
                return False
    return True


def joined(channels):
    return [b"".join(frames) for frames in channels]


def test_the_recorded_channels_bring_everything_in_any_order_of_joining(recorded, target):
    checksum, channels = recorded
    streams = joined(channels)
    for order in ([0, 1, 2], [0, 2, 1]):
        replay([streams[at] for at in order], target, checksum)
        assert content_of(target) == AFTER
    assert [kinds(frames)[0] for frames in channels[1:]] == [Kind.JOIN] * 2
    assert all(kinds(frames).count(Kind.BARRIER) == 3 for frames in channels[1:])


def test_every_flipped_byte_of_a_further_channel_is_an_error(recorded, target):
    checksum, channels = recorded
    streams = [bytearray(data) for data in joined(channels)]
    for number in range(1, CHANNELS):
        data, at = streams[number], 0
        for frame in channels[number]:
            header = header_of(frame)
            unsummed = checksum == "none" and header.kind is Kind.PAGES
            end = stream.HEADER_SIZE + header.nruns * stream.RUN_SIZE if unsummed else len(frame)
            for offset in range(number % STEP, end, STEP):
                data[at + offset] ^= 1 << offset % 8
                with pytest.raises((ProtocolError, MigrationError)):
                    replay(streams, target, checksum)
                assert only_sent_pages(target)
                data[at + offset] ^= 1 << offset % 8
            at += len(frame)
    replay(streams, target, checksum)


def test_a_further_channel_cut_at_any_length_is_an_error(recorded, target):
    checksum, channels = recorded
    streams = joined(channels)
    for number in range(1, CHANNELS):
        for length in range(0, len(streams[number]), 3):
            cut = list(streams)
            cut[number] = cut[number][:length]
            with pytest.raises((ProtocolError, MigrationError)):
                replay(cut, target, checksum)
            assert checksum == "none" or only_sent_pages(target)


@pytest.mark.parametrize("change", ["repeat", "drop", "swap"])
def test_frames_of_a_further_channel_repeated_dropped_or_swapped_are_an_error(recorded, target, change):
    checksum, channels = recorded
    for number in range(1, CHANNELS):
        for at in range(len(channels[number]) - (change != "drop")):
            order = list(channels[number])
            if change == "repeat":
                order.insert(at, order[at])
            elif change == "drop":
                del order[at]
            else:
                order[at:at + 2] = order[at + 1], order[at]
            with pytest.raises((ProtocolError, MigrationError)):
                replay(joined([order if one == number else frames for one, frames in enumerate(channels)]), target,
                       checksum)
            assert checksum == "none" or only_sent_pages(target)


def test_frames_exchanged_between_channels_are_an_error_or_harmless(recorded, target):
    checksum, channels = recorded
    harmless = 0
    for one in range(CHANNELS):
        for other in range(one + 1, CHANNELS):
            for here in range(len(channels[one])):
                for there in range(len(channels[other])):
                    mixed = [list(frames) for frames in channels]
                    mixed[one][here], mixed[other][there] = mixed[other][there], mixed[one][here]
                    try:
                        replay(joined(mixed), target, checksum)
                    except (ProtocolError, MigrationError):
                        assert checksum == "none" or only_sent_pages(target)
                    else:
                        assert content_of(target) == AFTER      # the same place in two channels, and the same epoch
                        harmless += 1
    assert harmless < 60


class Forger:
    """Frames of one channel with right numbers and checksums."""

    def __init__(self):
        self.data, self.sequence = b"", 0

    def add(self, kind, body=b"", nruns=0, **fields):
        header = Header(kind, **{"block": 0, "flags": 0, "epoch": 0} | fields, sequence=self.sequence, nruns=nruns,
                        length=len(body), body_sum=zlib.crc32(body))
        self.data += stream.encode_header(header) + body
        self.sequence += 1
        return self

    def pages(self, first, count, **fields):
        return self.add(Kind.PAGES, struct.pack("<QQ", first, count) + b"F" * (PGSIZE * count), 1, **fields)

    def barrier(self, *totals, **fields):
        return self.add(Kind.BARRIER, stream.encode_totals(Totals(*totals)), **fields)

    def end(self, *totals, **fields):
        return self.add(Kind.END, stream.encode_totals(Totals(*totals)), **fields)


HELLO = Hello(PGSIZE, b"i" * 16, ((0, 4096), (4096 + (1 << 20), 4096)), Checksum.CRC32, b"t" * 16, channels=2)


def control():
    return Forger().add(Kind.HELLO, stream.encode_hello(HELLO))


def further(index=1, hello=HELLO):
    return Forger().add(Kind.JOIN, stream.encode_join(hello, index))


WHOLE = control().pages(0, 8).pages(0, 4, block=1).end(3, 16, 0, flags=FINAL)


@pytest.mark.parametrize("first, second, words", [
    (WHOLE, further().pages(3, 5, block=1).barrier(1, 5, 0), "came twice"),
    (WHOLE, further().pages(4, 4, block=1).pages(0, 1).barrier(2, 5, 0), "came twice"),
    (WHOLE, further().pages(4, 4, block=1).barrier(1, 3, 0), "other totals than it brought"),
    (WHOLE, further().pages(4, 3, block=1).barrier(1, 3, 0), "other totals than were received"),
    (WHOLE, further().pages(4, 4, block=2).barrier(1, 4, 0), "no block 2"),
    (WHOLE, further().pages(4, 4, block=1, epoch=1).barrier(1, 4, 0), "epoch 1 in epoch 0"),
    (WHOLE, further().pages(4, 4, block=1).barrier(1, 4, 0, epoch=1), "epoch 1 in epoch 0"),
    (WHOLE, further().pages(4, 4, block=1).end(1, 4, 0), "END came where"),
    (WHOLE, further().add(Kind.STATE, b"\x01\0a"), "STATE came where"),
    (WHOLE, further().add(Kind.RUN), "RUN came where"),
    (WHOLE, further().pages(4, 4, block=1), "too early"),
    (WHOLE, further(2, HELLO._replace(channels=3)), "nobody comes"),
    (WHOLE, further(0), "nobody comes"),
    (WHOLE, further(1, HELLO._replace(token=b"T" * 16)), "nobody comes"),
    (WHOLE, further(1, HELLO._replace(stream_id=b"I" * 16)), "nobody comes"),
    (WHOLE, Forger().pages(0, 8), "nobody comes"),
    (WHOLE, control(), "nobody comes"),
    (control().add(Kind.BARRIER, bytes(24)), further().barrier(0, 0, 0), "BARRIER came where"),
    (control().add(Kind.JOIN, stream.encode_join(HELLO, 1)), further().barrier(0, 0, 0), "JOIN came where"),
])
def test_channels_that_lie_with_right_checksums_are_refused(first, second, words, target):
    with pytest.raises((ProtocolError, MigrationError), match=words):
        replay([first.data, second.data], target, "crc32")
    untouched = OLD[:PGSIZE], b"F" * PGSIZE
    assert all(content[at:at + PGSIZE] in untouched for content in content_of(target) for at in range(0, 4096, PGSIZE))


def test_channels_that_do_not_lie_are_taken(target):
    replay([WHOLE.data, further().pages(4, 4, block=1).barrier(1, 4, 0).data], target, "crc32")
    assert content_of(target) == [b"F" * 4096] * 2
