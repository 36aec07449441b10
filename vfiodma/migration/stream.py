"""The wire format of a migration, version 3 (docs/stream.md): frames, their limits and checks.  No I/O in here.

A frame is a header of 44 bytes and a body.  All numbers are little-endian.  Checksums are over the bytes that are sent:
the header's over its first 40 bytes, which hold the body's.
"""
import enum
import errno
import hmac
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from .._core.errno import error
from ..errors import peer_words

try:
    import xxhash
except ImportError:         # both sides agree on CRC-32 then
    xxhash = None  # type: ignore[assignment]

MAGIC = b"VDMA"
VERSION = 3
#: Content of one frame, at most; bounds the buffers of both sides.
CHUNK_BYTES = 16 << 20
#: The same where it goes straight into memory, without a buffer: no checksum, no compression.
DIRECT_BYTES = 64 << 20
#: Memory that a frame of zero pages stands for, at most.
ZEROS_BYTES = 64 << 20
MAX_RUNS = 1 << 16
MAX_BLOCKS = 1 << 12
MAX_STATES = 64 << 20       # bytes of all states of a stream
MAX_NAME = 1 << 10          # bytes of the name of one
MAX_EPOCH = (1 << 16) - 2
MAX_CHANNELS = 64
FINAL = 1       #: flag of END: the devices are stopped, this was the last epoch
LATER = 2       #: flag of END, with FINAL: pages that LEFT named come when the guest runs at the destination
COMPRESSED = 2  #: flag of PAGES: the content is compressed as READY said
RESUME = 1      #: flag of HELLO: a stream that broke goes on
SHARE = 4       #: flag of HELLO: memory comes as descriptors, after READY
POSTCOPY = 8    #: flag of HELLO: the source may give the guest away before all memory has come
ASK = 2         #: flag of HELLO, with RESUME: only to hear whose the guest is, or to give it again

_HEADER = struct.Struct("<4sBBHIIQIIQI")
HEADER_SIZE = _HEADER.size
_WORD = struct.Struct("<I")
_HELLO = struct.Struct("<II16s16sIIHHI")
_READY = struct.Struct("<16sIIHHI")
_JOIN = struct.Struct("<16s16sHH")
_BLOCK = struct.Struct("<QQ")
_TOTALS = struct.Struct("<QQQ")
_BITS = struct.Struct("<Q")
_DONE = struct.Struct("<QQQQ")
RUN_SIZE = 16
BITS_BYTES = 1 << 20        # of a bitmap in one frame, at most
WANTED_PAGES = 256          # that the destination waits for at a time, at most: they fit into any pipe
DIGEST_SIZE = 32


class Kind(enum.IntEnum):
    """What a frame is for; from 16 on they go from the destination to the source."""

    HELLO = 1       #: page size and blocks of memory; or that a broken stream goes on
    STATE = 2       #: named bytes: a device's state, the address space's mappings
    PAGES = 3       #: runs of pages and their content
    ZEROS = 4       #: runs of pages that hold nothing but zeros
    END = 5         #: the epoch's totals
    VERIFY = 6      #: asks for a digest of all memory
    RUN = 7         #: the destination owns the guest from here on
    JOIN = 8        #: first on a further channel: which stream it belongs to
    BARRIER = 9     #: last of an epoch on a channel: its totals there
    PREPARE = 10    #: asks the destination to make ready for the last epoch
    ABORT = 11      #: the source keeps the guest for good
    KEEPALIVE = 12  #: a paused source lives; also: DONE was heard
    LEFT = 13       #: which pages of a block come later
    READY = 16      #: answers HELLO
    ACK = 17        #: answers END: everything up to here is in memory
    DIGEST = 18     #: answers VERIFY: SHA-256
    STARTED = 19    #: answers RUN
    JOINED = 20     #: answers JOIN
    PREPARED = 21   #: answers PREPARE
    ABORTED = 22    #: answers ABORT
    MISSING = 23    #: post-copy, over another connection: which pages the destination lacks; empty: that was all
    WANTED = 24     #: post-copy: pages that somebody waits for
    DONE = 25       #: post-copy: answers END: every page is in its place
    ERROR = 31      #: the destination gives this connection up: errno, and words in UTF-8


#: Largest body of each kind, in bytes.
LIMITS = {
    Kind.HELLO: _HELLO.size + MAX_BLOCKS * _BLOCK.size,
    Kind.STATE: 16 << 20,
    Kind.PAGES: MAX_RUNS * RUN_SIZE + DIRECT_BYTES,
    Kind.ZEROS: MAX_RUNS * RUN_SIZE,
    Kind.END: _TOTALS.size,
    Kind.VERIFY: 0,
    Kind.RUN: 0,
    Kind.JOIN: _JOIN.size,
    Kind.BARRIER: _TOTALS.size,
    Kind.PREPARE: 0,
    Kind.ABORT: 0,
    Kind.KEEPALIVE: 0,
    Kind.LEFT: _BITS.size + BITS_BYTES,
    Kind.READY: _READY.size,
    Kind.ACK: _TOTALS.size,
    Kind.DIGEST: DIGEST_SIZE,
    Kind.STARTED: 0,
    Kind.JOINED: 0,
    Kind.PREPARED: 0,
    Kind.ABORTED: 0,
    Kind.MISSING: _BITS.size + BITS_BYTES,
    Kind.WANTED: WANTED_PAGES * RUN_SIZE,
    Kind.DONE: _DONE.size,
    Kind.ERROR: 4096,
}


#: Flags that a frame of a kind may have.
_FLAGS = {Kind.END: FINAL | LATER, Kind.PAGES: COMPRESSED}


class Checksum(enum.IntFlag):
    """Of bodies; the source offers some, the destination picks one."""

    CRC32 = 1       #: zlib's
    XXH3 = 2        #: 64 bits, where the library ``xxhash`` is installed
    NONE = 4        #: none of the content of pages, CRC-32 of everything else


class Header(NamedTuple):
    """A frame's header, without magic, version and its own checksum."""

    kind: Kind
    block: int
    flags: int
    epoch: int
    sequence: int
    nruns: int
    length: int         #: bytes of the body
    body_sum: int


class Compression(enum.IntFlag):
    """Of the content of pages; the source offers some, the destination picks one or none."""

    NONE = 0
    ZSTD = 1
    LZ4 = 2


class Phase(enum.IntEnum):
    """How far the destination is, as READY says it."""

    RECEIVING = 0
    COMPLETE = 1    #: all is here, and nobody said yet whose the guest is
    OWNER = 2       #: the guest is the destination's, for good
    ABORTED = 3     #: the guest will never run here


class Hello(NamedTuple):
    """What is to be moved: blocks of (guest-physical address, bytes)."""

    pgsize: int
    stream_id: bytes
    blocks: tuple[tuple[int, int], ...]
    checksums: Checksum = Checksum.CRC32        #: that the source offers
    token: bytes = bytes(16)                    #: who knows it may resume the stream, or join it
    compressions: Compression = Compression.NONE
    channels: int = 1                           #: connections that the source would use
    resume: bool = False
    epochs: int = 0                             #: acknowledged, as far as the source knows
    asks: bool = False                          #: whose the guest is; no memory will come
    shares: bool = False                        #: the memory itself, with a process of the same host
    postcopy: bool = False                      #: the source may give the guest away before all memory has come


class Ready(NamedTuple):
    """What the destination picked, and how far it is."""

    checksum: Checksum
    compression: Compression = Compression.NONE
    channels: int = 1
    phase: Phase = Phase.RECEIVING
    epochs: int = 0                             #: that are in memory


class Totals(NamedTuple):
    """Of one epoch."""

    frames: int         #: PAGES and ZEROS
    pages: int          #: with content
    zero_pages: int


class Done(NamedTuple):
    """Of a post-copy, at the destination."""

    pages: int          #: placed, zero pages included
    faults: int         #: pages that somebody waited for
    median: int         #: ns from the fault to the page, of these
    longest: int        #: ns


def damaged(why: str) -> Exception:
    """Return the error of a stream that is not what it must be."""
    return error(errno.EPROTO, "migration_stream", hint=why)


def offer(name: str) -> Checksum:
    """Return the checksums that one side takes: "auto", "xxh3", "crc32" or "none"."""
    if name == "auto":
        return Checksum.CRC32 | Checksum.XXH3 if xxhash else Checksum.CRC32
    if name not in ("xxh3", "crc32", "none"):
        raise error(errno.EINVAL, "checksum", hint=f'a checksum is "auto", "xxh3", "crc32" or "none", not {name!r}')
    if name == "xxh3" and xxhash is None:
        raise error(errno.EOPNOTSUPP, "checksum", hint="xxh3 needs the package xxhash: pip install vfiodma[migrate]")
    return Checksum[name.upper()]


def agree(offered: Checksum, taken: Checksum) -> Checksum:
    """Return the best checksum of both sides."""
    for checksum in (Checksum.XXH3, Checksum.CRC32, Checksum.NONE):
        if offered & taken & checksum:
            return checksum
    raise damaged(f"no checksum in common: the source offers {describe(offered)}, the destination takes "
                  f"{describe(taken)}")


def describe(checksums: Checksum) -> str:
    """Return the names of checksums."""
    return ", ".join(str(known.name).lower() for known in Checksum if checksums & known) or "nothing known"


def body_sum(checksum: Checksum, parts: Sequence[Any]) -> int:
    """Return the checksum of bytes-like parts, one after another."""
    if checksum == Checksum.XXH3:
        if len(parts) == 1:
            return xxhash.xxh3_64_intdigest(parts[0])
        digest = xxhash.xxh3_64()
        for part in parts:
            digest.update(part)
        return digest.intdigest()
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def encode_header(header: Header) -> bytes:
    """Return the 44 bytes of a header."""
    packed = _HEADER.pack(MAGIC, VERSION, header.kind, header.block, header.flags, header.epoch, header.sequence,
                          header.nruns, header.length, header.body_sum, 0)
    return packed[:-4] + _WORD.pack(zlib.crc32(packed[:-4]))


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """Check 44 bytes by themselves: magic, version, checksum, kind, flags, sizes.

    Raises
    ------
    ProtocolError
        EPROTO: not a header of this version, or damaged.
    """
    magic, version, kind, block, flags, epoch, sequence, nruns, length, summed, header_crc = _HEADER.unpack(data)
    if magic != MAGIC:
        raise damaged(f"wrong magic {magic!r}: this is no migration stream, or it lost its place")
    if version != VERSION:
        raise damaged(f"the peer speaks version {version} of the stream, this side version {VERSION}")
    if header_crc != zlib.crc32(data[:-4]):
        raise damaged("a header's checksum is wrong: bytes changed on the way")
    if kind not in Kind._value2member_map_:
        raise damaged(f"there is no frame of kind {kind}")
    kind = Kind(kind)
    if length > LIMITS[kind]:
        raise damaged(f"a body of {length} bytes is too long for {kind.name} (limit {LIMITS[kind]})")
    if nruns > MAX_RUNS or nruns * RUN_SIZE > length:
        raise damaged(f"{nruns} runs do not fit into the frame")
    bits = kind in (Kind.LEFT, Kind.MISSING)
    if kind not in (Kind.PAGES, Kind.ZEROS, Kind.WANTED) and (nruns or (block and not bits)):
        raise damaged(f"{kind.name} has no runs{'' if bits else ' and no block'}")
    if flags & ~_FLAGS.get(kind, 0) or (kind == Kind.END and flags == LATER):
        raise damaged(f"unknown flags {flags:#x} in {kind.name}")
    return Header(kind, block, flags, epoch, sequence, nruns, length, summed)


def encode_hello(hello: Hello) -> bytes:
    """Return the body of HELLO."""
    flags = RESUME * hello.resume | ASK * hello.asks | SHARE * hello.shares | POSTCOPY * hello.postcopy
    return _HELLO.pack(hello.pgsize, len(hello.blocks), hello.stream_id, hello.token, hello.checksums,
                       hello.compressions, hello.channels, flags, hello.epochs) + b"".join(
                           _BLOCK.pack(*block) for block in hello.blocks)


def decode_hello(body: Any) -> Hello:
    """Check and return the body of HELLO; ProtocolError where it can't be."""
    if len(body) < _HELLO.size:
        raise damaged("HELLO is too short")
    pgsize, count, stream_id, token, checksums, compressions, channels, flags, epochs = _HELLO.unpack_from(body)
    if pgsize < 512 or pgsize & (pgsize - 1) or pgsize > CHUNK_BYTES:
        raise damaged(f"a page size of {pgsize} bytes")
    if not 0 < count <= MAX_BLOCKS or len(body) != _HELLO.size + count * _BLOCK.size:
        raise damaged(f"HELLO announces {count} blocks in {len(body)} bytes")
    if (not 0 < channels <= MAX_CHANNELS or flags & ~(SHARE | POSTCOPY) not in (0, RESUME, RESUME | ASK)
            or flags & (SHARE | POSTCOPY) == SHARE | POSTCOPY or epochs > MAX_EPOCH + 1
            or (epochs and not flags & RESUME)):
        raise damaged(f"HELLO with {channels} channels, flags {flags:#x} and {epochs} epochs")
    blocks = tuple(_BLOCK.iter_unpack(body[_HELLO.size:]))
    end = 0
    for gpa, size in blocks:
        if not size or (gpa | size) % pgsize or gpa < end or gpa + size > 1 << 64:
            raise damaged(f"a block of {size:#x} bytes at {gpa:#x}")
        end = gpa + size
    return Hello(pgsize, stream_id, blocks, Checksum(checksums), token, Compression(compressions), channels,
                 bool(flags & RESUME), epochs, bool(flags & ASK), bool(flags & SHARE), bool(flags & POSTCOPY))


def encode_ready(stream_id: bytes, ready: Ready) -> bytes:
    """Return the body of READY."""
    return _READY.pack(stream_id, ready.checksum, ready.compression, ready.channels, ready.phase, ready.epochs)


def decode_ready(body: Any, hello: Hello) -> Ready:
    """Check and return the answer to HELLO; ProtocolError where the destination picked what was not offered."""
    if len(body) != _READY.size:
        raise damaged(f"READY of {len(body)} bytes")
    stream_id, checksum, compression, channels, phase, epochs = _READY.unpack(body)
    if stream_id != hello.stream_id:
        raise damaged("READY for another stream")
    if checksum not in list(Checksum) or not checksum & hello.checksums:
        raise damaged(f"READY with checksum {checksum:#x}, which was not offered")
    if compression and (compression not in list(Compression) or not compression & hello.compressions):
        raise damaged(f"READY with compression {compression:#x}, which was not offered")
    if not 0 < channels <= hello.channels:
        raise damaged(f"READY with {channels} channels of {hello.channels}")
    if phase not in Phase._value2member_map_ or epochs > MAX_EPOCH + 1 or (not hello.resume and (phase or epochs)):
        raise damaged(f"READY in phase {phase} after {epochs} epochs")
    return Ready(Checksum(checksum), Compression(compression), channels, Phase(phase), epochs)


def encode_join(hello: Hello, index: int) -> bytes:
    """Return the body of JOIN, for channel ``index`` (from 1)."""
    return _JOIN.pack(hello.stream_id, hello.token, index, 0)


def decode_join(body: Any, hello: Hello) -> int:
    """Check JOIN against the stream that it wants to join; return the channel's index."""
    if len(body) != _JOIN.size:
        raise damaged(f"JOIN of {len(body)} bytes")
    stream_id, token, index, zero = _JOIN.unpack(body)
    if not hmac.compare_digest(stream_id + token, hello.stream_id + hello.token):
        raise damaged("JOIN for another stream")
    if not 0 < index < hello.channels or zero:
        raise damaged(f"JOIN of channel {index}, of {hello.channels}")
    return index


def encode_totals(totals: Totals) -> bytes:
    """Return the body of END or ACK."""
    return _TOTALS.pack(*totals)


def decode_totals(body: Any) -> Totals:
    """Return the body of END or ACK."""
    if len(body) != _TOTALS.size:
        raise damaged(f"totals of {len(body)} bytes")
    return Totals(*_TOTALS.unpack(body))


def encode_bits(first: int, words: Any) -> tuple[bytes, Any]:
    """Return the body of LEFT or MISSING: a part of a block's bitmap, from the page ``first`` on."""
    return _BITS.pack(first), words


def decode_bits(body: Any, npages: int) -> tuple[int, Any]:
    """Check a part of the bitmap of a block of ``npages`` pages; return its first page and its words."""
    if len(body) < _BITS.size + 8 or len(body) % 8:
        raise damaged(f"{len(body)} bytes of a bitmap")
    first, words = _BITS.unpack_from(body)[0], body[_BITS.size:]
    end = first + len(words) * 8
    if first % 64 or first >= npages or end > (npages + 63) // 64 * 64:
        raise damaged(f"a bitmap of the pages {first} to {end} of {npages}")
    if end > npages and int.from_bytes(words[-8:], "little") >> npages % 64:
        raise damaged(f"a bitmap with pages behind the {npages} of its block")
    return first, words


def encode_done(done: Done) -> bytes:
    """Return the body of DONE."""
    return _DONE.pack(*done)


def decode_done(body: Any) -> Done:
    """Return the body of DONE."""
    if len(body) != _DONE.size:
        raise damaged(f"DONE of {len(body)} bytes")
    return Done(*_DONE.unpack(body))


def encode_state(name: str, data: bytes) -> bytes:
    """Return the body of STATE."""
    return encode_state_name(name) + data


def encode_state_name(name: str) -> bytes:
    """Return what the body of STATE begins with; its bytes follow."""
    encoded = name.encode()
    if not name.isprintable() or len(encoded) > MAX_NAME:
        raise error(errno.EINVAL, "state", hint=f"the name of a state is printable, and has {MAX_NAME} bytes at most: "
                    f"{name[:MAX_NAME]!r}")
    return struct.pack("<H", len(encoded)) + encoded


def decode_state(body: Any) -> tuple[str, bytes]:
    """Return name and bytes of STATE."""
    if len(body) < 2 or len(body) < 2 + (length := struct.unpack_from("<H", body)[0]):
        raise damaged("STATE is too short for its name")
    try:
        name = bytes(body[2:2 + length]).decode()
    except UnicodeDecodeError:
        raise damaged("the name of a STATE is not UTF-8") from None
    if not name.isprintable() or length > MAX_NAME:
        raise damaged(f"the name of a STATE is not printable, or has more than {MAX_NAME} bytes")
    return name, bytes(body[2 + length:])


def encode_error(exc: BaseException) -> bytes:
    """Return the body of ERROR."""
    number = exc.errno if isinstance(exc, OSError) and exc.errno else errno.EIO
    return _WORD.pack(number) + str(exc).encode(errors="replace")[:LIMITS[Kind.ERROR] - _WORD.size]


def decode_error(body: Any) -> tuple[int, str]:
    """Return errno and words of ERROR."""
    if len(body) < _WORD.size:
        raise damaged("ERROR is too short")
    words = peer_words(bytes(body[_WORD.size:]))
    return _WORD.unpack_from(body)[0], f"the destination gave up: {words}"
