"""The wire format: golden bytes, limits, and the arithmetic on runs."""
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiodma.errors import ProtocolError
from vfiodma.migration import stream
from vfiodma.migration.layout import check_runs, pages_of, runs_of, split_runs
from vfiodma.migration.stream import FrameChannel, Header, Hello, Kind, Totals

GOLDEN_PAGES = bytes.fromhex(
    "56444d41" "01" "03" "0002" "00000000" "05000000" "0900000000000000" "02000000" "20080000" "78563412")


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
    header = Header(Kind.PAGES, 0x200, 0, 5, 9, 2, 0x820, 0x12345678)
    data = stream.encode_header(header)
    assert data[:-4] == GOLDEN_PAGES
    assert data[-4:] == struct.pack("<I", zlib.crc32(GOLDEN_PAGES))
    assert len(data) == stream.HEADER_SIZE == 40
    assert stream.decode_header(data) == header


def test_hello_has_these_bytes():
    hello = Hello(4096, bytes(range(16)), ((0, 0x100000), (0x100000000, 0x2000)))
    body = stream.encode_hello(hello)
    assert body.hex() == ("00100000" "02000000" "000102030405060708090a0b0c0d0e0f"
                          "0000000000000000" "0000100000000000" "0000000001000000" "0020000000000000")
    assert stream.decode_hello(body) == hello


def test_a_whole_frame_has_these_bytes():
    pipe = Pipe()
    FrameChannel(pipe).send(Kind.ACK, stream.encode_totals(Totals(1, 2, 3)), epoch=4)
    body = bytes.fromhex("0100000000000000" "0200000000000000" "0300000000000000")
    head = bytes.fromhex("56444d41" "01" "11" "0000" "00000000" "04000000" "0000000000000000" "00000000" "18000000")
    head += struct.pack("<I", zlib.crc32(body))
    assert bytes(pipe.data) == head + struct.pack("<I", zlib.crc32(head)) + body


def test_totals_and_state_come_back():
    assert stream.decode_totals(stream.encode_totals(Totals(1, 2, 3))) == Totals(1, 2, 3)
    assert stream.decode_state(stream.encode_state("0000:00:10.0", b"\0\xff")) == ("0000:00:10.0", b"\0\xff")


@pytest.mark.parametrize("change, words", [
    ({"magic": b"QEVM"}, "wrong magic"),
    ({"version": 2}, "speaks version 2"),
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
    values = {"magic": b"VDMA", "version": 1, "kind": Kind.PAGES, "block": 0, "flags": 0, "epoch": 0, "sequence": 0,
              "nruns": 1, "length": 4112, "crc": 0} | change
    packed = struct.pack("<4sBBHIIQIII", *values.values())
    with pytest.raises(ProtocolError, match=words):
        stream.decode_header(packed + struct.pack("<I", zlib.crc32(packed)))


@pytest.mark.parametrize("at", range(40))
def test_every_flipped_byte_of_a_header_is_noticed(at):
    data = bytearray(stream.encode_header(Header(Kind.PAGES, 0, 0, 5, 9, 2, 0x820, 0x12345678)))
    data[at] ^= 0x40
    with pytest.raises(ProtocolError):
        stream.decode_header(data)


@pytest.mark.parametrize("blocks, pgsize", [
    ([], 4096), ([(0, 0)], 4096), ([(0, 100)], 4096), ([(1, 4096)], 4096), ([(0, 8192), (4096, 4096)], 4096),
    ([(4096, 4096), (0, 4096)], 4096), ([((1 << 64) - 4096, 8192)], 4096), ([(0, 4096)], 3000), ([(0, 4096)], 0),
    ([(0, 4 << 20)], 2 << 20),
])
def test_a_hello_that_can_not_be_is_refused(blocks, pgsize):
    with pytest.raises(ProtocolError):
        stream.decode_hello(stream.encode_hello(Hello(pgsize, bytes(16), tuple(blocks))))


@pytest.mark.parametrize("body", [b"", bytes(23), bytes(24), struct.pack("<II16s", 4096, 2, b"") + bytes(16),
                                  struct.pack("<II16s", 4096, 1 << 31, b"") + bytes(16)])
def test_a_hello_of_a_wrong_length_is_refused(body):
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


@given(RUNS)
def test_runs_and_pages_are_two_views_of_the_same(runs):
    pages = pages_of(runs)
    assert pages.tolist() == plain(runs)
    assert runs_of(pages).tolist() == runs.tolist()


@given(RUNS, st.integers(1, 40))
def test_split_runs_gives_the_same_pages_in_full_portions(runs, npages):
    parts = list(split_runs(runs, npages))
    assert [page for part in parts for page in plain(part)] == plain(runs)
    assert all(int(part[:, 1].sum()) == npages for part in parts[:-1])
    assert all((part[:, 1] > 0).all() for part in parts)


@pytest.mark.parametrize("runs", [[(0, 0)], [(10, 1)], [(9, 2)], [(0, 2), (1, 1)], [(3, 1), (1, 1)],
                                  [(1 << 63, 1 << 63)], [(1, (1 << 64) - 1)], [((1 << 64) - 1, 2)]])
def test_runs_from_outside_are_checked_without_overflow(runs):
    assert check_runs(np.array(runs, np.uint64), 10)


def test_good_runs_pass():
    assert check_runs(np.array([(0, 3), (3, 1), (9, 1)], np.uint64), 10) == ""
