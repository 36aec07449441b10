"""The wire format: golden bytes, limits, and the arithmetic on runs."""
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiodma.errors import InvalidArgumentError, ProtocolError, UnsupportedError
from vfiodma.migration import stream
from vfiodma.migration.channel import FrameChannel
from vfiodma.migration.layout import split_runs
from vfiodma.migration.stream import Checksum, Compression, Header, Hello, Kind, Phase, Ready, Totals

GOLDEN_PAGES = bytes.fromhex(
    "56444d41" "03" "03" "0002" "00000000" "05000000" "0900000000000000" "02000000" "20080000" "efcdab8978563412")


class Pipe:
    """A transport that keeps what is sent, and delivers it."""

    def __init__(self):
        self.data = bytearray()

    def send(self, parts):
        for part in parts:
            self.data += memoryview(part).cast("B")

    def receive_into(self, view):
        view[:] = self.data[:len(view)]
        del self.data[:len(view)]


def test_a_header_has_these_bytes():
    header = Header(Kind.PAGES, 0x200, 0, 5, 9, 2, 0x820, 0x1234567889abcdef)
    data = stream.encode_header(header)
    assert data[:-4] == GOLDEN_PAGES
    assert data[-4:] == struct.pack("<I", zlib.crc32(GOLDEN_PAGES))
    assert len(data) == stream.HEADER_SIZE == 44
    assert stream.decode_header(data) == header


def test_hello_has_these_bytes():
    hello = Hello(4096, bytes(range(16)), ((0, 0x100000), (0x100000000, 0x2000)),
                  Checksum.CRC32 | Checksum.XXH3, bytes(range(16, 32)), Compression.ZSTD, 2, True, 5)
    body = stream.encode_hello(hello)
    assert body.hex() == ("00100000" "02000000" "000102030405060708090a0b0c0d0e0f" "101112131415161718191a1b1c1d1e1f"
                          "03000000" "01000000" "0200" "0100" "05000000"
                          "0000000000000000" "0000100000000000" "0000000001000000" "0020000000000000")
    assert stream.decode_hello(body) == hello


def test_a_whole_frame_has_these_bytes():
    pipe = Pipe()
    FrameChannel(pipe).send(Kind.ACK, stream.encode_totals(Totals(1, 2, 3)), epoch=4)
    body = bytes.fromhex("0100000000000000" "0200000000000000" "0300000000000000")
    head = bytes.fromhex("56444d41" "03" "11" "0000" "00000000" "04000000" "0000000000000000" "00000000" "18000000")
    head += struct.pack("<Q", zlib.crc32(body))
    assert bytes(pipe.data) == head + struct.pack("<I", zlib.crc32(head)) + body


def test_totals_and_state_come_back():
    assert stream.decode_totals(stream.encode_totals(Totals(1, 2, 3))) == Totals(1, 2, 3)
    assert stream.decode_state(stream.encode_state("0000:00:10.0", b"\0\xff")) == ("0000:00:10.0", b"\0\xff")


@pytest.mark.parametrize("change, words", [
    ({"magic": b"QEVM"}, "wrong magic"),
    ({"version": 1}, "speaks version 1 of the stream, this side version 3"),
    ({"version": 4}, "speaks version 4"),
    ({"version": 255}, "speaks version 255"),
    ({"kind": 99}, "no frame of kind"),
    ({"length": 0xFFFFFFFF}, "too long for PAGES"),
    ({"nruns": 1 << 17}, "runs do not fit"),
    ({"nruns": 3, "length": 47}, "runs do not fit"),
    ({"flags": 1}, "unknown flags"),
    ({"kind": Kind.END, "block": 0, "nruns": 0, "length": 24, "flags": 2}, "unknown flags"),
    ({"kind": Kind.END, "nruns": 1, "length": 24}, "no runs"),
    ({"kind": Kind.STATE, "block": 3, "nruns": 0}, "no runs and no block"),
])
def test_a_header_that_lies_is_refused_even_with_a_right_checksum(change, words):
    values = {"magic": b"VDMA", "version": 3, "kind": Kind.PAGES, "block": 0, "flags": 0, "epoch": 0, "sequence": 0,
              "nruns": 1, "length": 4112, "crc": 0} | change
    packed = struct.pack("<4sBBHIIQIIQ", *values.values())
    with pytest.raises(ProtocolError, match=words):
        stream.decode_header(packed + struct.pack("<I", zlib.crc32(packed)))


@pytest.mark.parametrize("at", range(44))
def test_every_flipped_byte_of_a_header_is_noticed(at):
    data = bytearray(stream.encode_header(Header(Kind.PAGES, 0, 0, 5, 9, 2, 0x820, 0x1234567889abcdef)))
    data[at] ^= 0x40
    with pytest.raises(ProtocolError):
        stream.decode_header(data)


@pytest.mark.parametrize("blocks, pgsize", [
    ([], 4096), ([(0, 0)], 4096), ([(0, 100)], 4096), ([(1, 4096)], 4096), ([(0, 8192), (4096, 4096)], 4096),
    ([(4096, 4096), (0, 4096)], 4096), ([((1 << 64) - 4096, 8192)], 4096), ([(0, 4096)], 3000), ([(0, 4096)], 0),
    ([(0, 64 << 20)], 32 << 20),
])
def test_a_hello_that_can_not_be_is_refused(blocks, pgsize):
    with pytest.raises(ProtocolError):
        stream.decode_hello(stream.encode_hello(Hello(pgsize, bytes(16), tuple(blocks))))


def hello_bytes(pgsize=4096, count=1, checksums=1, channels=1, flags=0, epochs=0):
    return struct.pack("<II16s16sIIHHI", pgsize, count, b"", b"", checksums, 0, channels, flags, epochs) + struct.pack(
        "<QQ", 0, 4096)


@pytest.mark.parametrize("body", [b"", bytes(31), bytes(56), hello_bytes(count=2), hello_bytes(count=1 << 31),
                                  hello_bytes(channels=0), hello_bytes(channels=65), hello_bytes(flags=2),
                                  hello_bytes(flags=16), hello_bytes(flags=12), hello_bytes(flags=6),
                                  hello_bytes(epochs=1),
                                  hello_bytes(flags=1, epochs=1 << 16)])
def test_a_hello_of_a_wrong_length_or_with_wrong_numbers_is_refused(body):
    with pytest.raises(ProtocolError):
        stream.decode_hello(body)


@pytest.mark.parametrize("body", [b"", b"\x05", b"\x05\0abcd", b"\x02\0\xff\xfe"])
def test_a_state_without_its_name_is_refused(body):
    with pytest.raises(ProtocolError):
        stream.decode_state(body)


def test_a_channel_notices_frames_that_are_repeated_or_not_due():
    pipe = Pipe()
    sender, receiver = FrameChannel(pipe), FrameChannel(pipe)
    sender.send(Kind.RUN)
    again = bytes(pipe.data)
    receiver.receive(Kind.RUN)
    pipe.data += again
    with pytest.raises(ProtocolError, match="frame 0 came, 1 was next"):
        receiver.receive(Kind.RUN)
    sender.send(Kind.VERIFY)
    with pytest.raises(ProtocolError, match="VERIFY came where only RUN may"):
        receiver.receive(Kind.RUN)


RUNS = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 70)), max_size=20).map(
    lambda steps: np.array([(sum(g + c for g, c in steps[:i]) + steps[i][0], steps[i][1]) for i in range(len(steps))],
                           np.uint64).reshape(-1, 2))


def plain(runs):
    return [page for first, count in runs.tolist() for page in range(first, first + count)]


@given(RUNS, st.integers(1, 40))
def test_split_runs_gives_the_same_pages_in_full_portions(runs, npages):
    parts = list(split_runs(runs, npages))
    assert [page for part in parts for page in plain(part)] == plain(runs)
    assert all(int(part[:, 1].sum()) == npages for part in parts[:-1])
    assert all((part[:, 1] > 0).all() for part in parts)


def test_ready_has_these_bytes():
    hello = Hello(4096, bytes(range(16)), ((0, 4096),), Checksum.XXH3 | Checksum.CRC32)
    ready = Ready(Checksum.XXH3, Compression.LZ4, 3, Phase.COMPLETE, 7)
    hello = hello._replace(compressions=Compression.LZ4 | Compression.ZSTD, channels=4, resume=True)
    body = stream.encode_ready(hello.stream_id, ready)
    assert body.hex() == "000102030405060708090a0b0c0d0e0f" "02000000" "02000000" "0300" "0100" "07000000"
    assert stream.decode_ready(body, hello) == ready


def ready_bytes(stream_id=bytes(16), checksum=1, compression=0, channels=1, phase=0, epochs=0):
    return struct.pack("<16sIIHHI", stream_id, checksum, compression, channels, phase, epochs)


def test_only_who_knows_stream_and_token_may_join_it():
    hello = Hello(4096, bytes(range(16)), ((0, 4096),), token=bytes(range(16, 32)), channels=3)
    body = stream.encode_join(hello, 2)
    assert body.hex() == "000102030405060708090a0b0c0d0e0f" "101112131415161718191a1b1c1d1e1f" "0200" "0000"
    assert stream.decode_join(body, hello) == 2
    for wrong in (body[:-1], body + b"0", bytes(16) + body[16:], body[:16] + bytes(16) + body[32:], body[:34] + b"11",
                  stream.encode_join(hello, 0), stream.encode_join(hello, 3)):
        with pytest.raises(ProtocolError):
            stream.decode_join(wrong, hello)


@pytest.mark.parametrize("body, words", [
    (ready_bytes(stream_id=b"other"), "another stream"),
    (ready_bytes(checksum=0), "not offered"),
    (ready_bytes(checksum=2), "not offered"),
    (ready_bytes(checksum=3), "not offered"),
    (ready_bytes(checksum=8), "not offered"),
    (ready_bytes(compression=1), "not offered"),
    (ready_bytes(channels=0), "0 channels of 1"),
    (ready_bytes(channels=2), "2 channels of 1"),
    (ready_bytes(phase=1), "phase 1"),
    (ready_bytes(phase=9), "phase 9"),
    (ready_bytes(epochs=1), "after 1 epochs"),
    (bytes(16), "READY of 16 bytes"),
])
def test_a_ready_with_what_was_not_offered_is_refused(body, words):
    with pytest.raises(ProtocolError, match=words):
        stream.decode_ready(body, Hello(4096, bytes(16), ((0, 4096),)))


def test_the_best_checksum_of_both_sides_is_taken_and_none_only_when_both_ask():
    crc, xxh3, none = Checksum.CRC32, Checksum.XXH3, Checksum.NONE
    assert stream.agree(crc | xxh3, crc | xxh3) is xxh3
    assert stream.agree(crc | xxh3, crc) is stream.agree(crc, crc | xxh3) is crc
    assert stream.agree(none, none) is none
    assert stream.agree(Checksum(1 << 20 | 1), crc | xxh3) is crc
    for offered, taken in [(none, crc | xxh3), (crc | xxh3, none), (xxh3, crc), (Checksum(0), crc)]:
        with pytest.raises(ProtocolError, match="no checksum in common"):
            stream.agree(offered, taken)
    assert not stream.offer("auto") & none


def test_without_the_library_crc32_is_offered_and_xxh3_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(stream, "xxhash", None)
    assert stream.offer("auto") is Checksum.CRC32
    with pytest.raises(UnsupportedError, match="xxhash"):
        stream.offer("xxh3")
    with pytest.raises(InvalidArgumentError, match="md5"):
        stream.offer("md5")


def test_xxh3_is_that_of_the_library_over_all_parts():
    xxhash = pytest.importorskip("xxhash")
    assert stream.body_sum(Checksum.XXH3, []) == 0x2d06800538d394c2
    for parts in ([b"abc"], [b"a", b"bc"], [b"a" * 1000, np.arange(3, dtype=np.uint64)]):
        assert stream.body_sum(Checksum.XXH3, parts) == xxhash.xxh3_64_intdigest(b"".join(map(bytes, parts)))


def test_without_checksums_content_is_not_summed_and_everything_else_is():
    pipe = Pipe()
    channel = FrameChannel(pipe)
    channel.checksum = Checksum.NONE
    channel.send(Kind.PAGES, struct.pack("<QQ", 0, 1), content=[b"x" * 512], nruns=1)
    pipe.data[-1] ^= 1
    header, body = channel.receive(Kind.PAGES)
    assert bytes(body) == struct.pack("<QQ", 0, 1) and header.length == 528
    assert bytes(pipe.data) == b"x" * 511 + b"y"
    channel.send(Kind.ACK, bytes(24))
    del pipe.data[:512]
    pipe.data[-1] ^= 1
    with pytest.raises(ProtocolError, match="checksum"):
        channel.receive(Kind.ACK)
