"""Compression of chunks: what pays is sent compressed, and nothing that comes compressed is believed."""
import random
import struct
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from migration_doubles import PGSIZE, Replay, content_of, guest

from vfiodma.errors import InvalidArgumentError, MissingExtraError, ProtocolError
from vfiodma.migration import PageReceiver, compression, stream
from vfiodma.migration.compression import Codec
from vfiodma.migration.stream import COMPRESSED, FINAL, Checksum, Compression, Header, Hello, Kind, Totals

zstandard = pytest.importorskip("zstandard")
pytest.importorskip("lz4")
BOTH = pytest.mark.parametrize("kind", [Compression.ZSTD, Compression.LZ4])
TEXT = b"the quick brown fox jumps over the lazy dog " * 50_000


@BOTH
@pytest.mark.parametrize("size", [512, 4096, 65536, 200_000, 2 << 20])
def test_what_pays_comes_back_and_what_does_not_is_left_alone(kind, size):
    codec = Codec(kind)
    packed = codec.compress(TEXT[:size])
    assert len(packed) < size * 0.9
    assert Codec(kind).expand(packed, size) == TEXT[:size]
    assert codec.compress(random.Random(1).randbytes(size)) is None


@BOTH
def test_what_pays_in_the_sample_only_is_left_alone(kind):
    content = bytearray(random.Random(2).randbytes(1 << 20))
    step = (len(content) - (16 << 10)) // 3
    for at in range(0, len(content) - (16 << 10) + 1, step):
        content[at:at + (16 << 10)] = bytes(16 << 10)
    assert Codec(kind).compress(content) is None


@BOTH
@given(data=st.data())
def test_whatever_comes_is_pages_or_an_error(kind, data):
    size = 8 * PGSIZE
    good = Codec(kind).compress(TEXT[:size])
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    bad = bytes(bad[:data.draw(st.integers(0, len(bad)))] if data.draw(st.booleans()) else bad)
    try:
        assert len(Codec(kind).expand(bad, size)) == size
    except ProtocolError:
        pass


@BOTH
def test_more_or_less_than_the_pages_is_refused_before_there_is_memory_for_it(kind):
    codec = Codec(kind)
    packed = codec.compress(TEXT[:8192])
    for size in (8191, 8193, 4096, 16384):
        with pytest.raises(ProtocolError):
            codec.expand(packed, size)
    for trash in (b"", b"\0", b"\xff" * 100, packed[:-1], packed + b"more"):
        with pytest.raises(ProtocolError):
            codec.expand(trash, 8192)


def test_frames_that_promise_a_lot_of_memory_are_refused():
    codec = Codec(Compression.ZSTD)
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(64 << 20))
    unknown = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(8192))
    # 2 GiB of window, and the right size of content.
    window = zstandard.FRAME_HEADER + bytes([0x40, 21 << 3]) + struct.pack("<H", 8192 - 256) + b"\x03\0\0" + b"x"
    skippable = struct.pack("<II", 0x184D2A50, 8192) + bytes(8192)
    two = zstandard.ZstdCompressor().compress(bytes(4096)) * 2
    for data in (bomb, unknown, window, skippable, two):
        with pytest.raises(ProtocolError):
            codec.expand(data, 8192)


def test_the_libraries_are_named_where_they_are_missing(monkeypatch):
    assert compression.offer("none") is Compression.NONE
    assert compression.offer("auto") == Compression.ZSTD | Compression.LZ4
    assert compression.offer("zstd") is Compression.ZSTD and compression.offer("lz4") is Compression.LZ4
    for module in ("zstandard", "lz4.block"):
        monkeypatch.setitem(sys.modules, module, None)
    assert compression.offer("auto") == Compression.NONE
    with pytest.raises(MissingExtraError, match=r"zstandard is not installed: pip install 'vfiodma\[migrate\]'"):
        compression.offer("zstd")
    with pytest.raises(MissingExtraError, match="lz4 is not installed"):
        compression.offer("lz4")
    with pytest.raises(InvalidArgumentError, match="gzip"):
        compression.offer("gzip")


def test_both_sides_agree_on_one_or_on_none():
    zstd, lz4, none = Compression.ZSTD, Compression.LZ4, Compression.NONE
    assert compression.agree(zstd | lz4, zstd | lz4) is zstd
    assert compression.agree(zstd | lz4, lz4) is lz4
    assert compression.agree(zstd, lz4) is none and compression.agree(none, zstd) is none
    assert compression.agree(Compression(1 << 9 | 2), zstd | lz4) is lz4


class Stream:
    """Frames of a source that offers zstd, with right checksums."""

    def __init__(self, compressions=Compression.ZSTD):
        self.data, self.sequence = b"", 0
        self.add(Kind.HELLO, stream.encode_hello(Hello(PGSIZE, bytes(16), ((0, 4096),), compressions=compressions)))

    def add(self, kind, body=b"", nruns=0, **fields):
        header = Header(kind, **{"block": 0, "flags": 0, "epoch": 0} | fields, sequence=self.sequence, nruns=nruns,
                        length=len(body), body_sum=zlib.crc32(body))
        self.data += stream.encode_header(header) + body
        self.sequence += 1
        return self

    def pages(self, count, content, **fields):
        return self.add(Kind.PAGES, struct.pack("<QQ", 0, count) + content, 1, flags=COMPRESSED, **fields)


PACKED = zstandard.ZstdCompressor().compress(b"F" * 4096)


@pytest.mark.parametrize("forged, words", [
    (Stream(Compression.NONE).pages(8, PACKED), "not agreed on"),
    (Stream().pages(8, b""), "0 bytes for 8 pages"),
    (Stream().pages(8, b"F" * 4096), "4096 bytes for 8 pages"),
    (Stream().pages(8, b"F" * 4095), "can't be taken apart"),
    (Stream().pages(7, PACKED), "can't be taken apart"),
    (Stream().pages(8, PACKED + b"!"), "can't be taken apart"),
    (Stream().pages(8, PACKED[:-1]), "can't be taken apart"),
    (Stream().pages(8, zstandard.ZstdCompressor().compress(bytes(1 << 30))[:4000]), "can't be taken apart"),
    (Stream().add(Kind.ZEROS, struct.pack("<QQ", 0, 8), 1, flags=COMPRESSED), "unknown flags"),
])
def test_compressed_pages_that_lie_are_refused_before_memory_is_touched(forged, words):
    with guest([b"\xee" * 4096]) as target:
        receiver = PageReceiver(Replay(forged.data), lambda hello: target, checksum="crc32")
        with pytest.raises(ProtocolError, match=words):
            receiver.receive()
        receiver.close()
        assert content_of(target) == [b"\xee" * 4096]


def test_compressed_pages_arrive_and_flipped_bytes_do_not():
    forged = Stream().pages(8, PACKED).add(Kind.END, stream.encode_totals(Totals(1, 8, 0)), flags=FINAL)

    def replay(data, target):
        receiver = PageReceiver(Replay(data), lambda hello: target, checksum="crc32")
        try:
            receiver.receive()
        finally:
            receiver.close()

    with guest([b"\xee" * 4096]) as target:
        data = bytearray(forged.data)
        for at in range(len(data)):
            data[at] ^= 1 << at % 8
            with pytest.raises(ProtocolError):
                replay(data, target)
            assert set(content_of(target)[0]) <= {0xEE} or content_of(target)[0] == b"F" * 4096
            data[at] ^= 1 << at % 8
        replay(data, target)
        assert content_of(target) == [b"F" * 4096]
    assert Checksum.CRC32 in Hello(PGSIZE, bytes(16), ()).checksums
