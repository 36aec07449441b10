"""The layout of a snapshot file, version 1 (docs/snapshots.md): header, table, sizes and their checks.  No I/O here."""
import errno
import struct
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from ..errors import SnapshotError
from .stream import MAX_BLOCKS, MAX_STATES

MAGIC = b"VFIOSNAP"
VERSION = 1
HEADER_SIZE = 512       # a sector: written whole or not at all
FIRST_TABLE = 4096
ALIGNMENT = 1 << 20     # of content, and of each block in it
KEY_SIZE = 64
MAX_PGSIZE = 1 << 30

_HEADER = struct.Struct("<8sIIIIIIQQ16s64s")
_WORD = struct.Struct("<I")
_BLOCK = struct.Struct("<QQQ")
_STATE = struct.Struct("<HQ")


class Header(NamedTuple):
    """The first 512 bytes."""

    pgsize: int
    nblocks: int
    nstates: int
    states_size: int        #: bytes
    table_sum: int          #: CRC-32 of the valid table
    generation: int         #: counts the saves into this file; the parity says which table is valid
    capacity: int           #: bytes of each of the two tables, at most
    id: bytes               #: of the file; another one after each full save
    key: bytes              #: of the pages' hashes


class Places(NamedTuple):
    """Where everything is that follows from the blocks."""

    pgsize: int
    blocks: tuple[tuple[int, int, int], ...]        #: (gpa, bytes, offset within an area)
    capacity: int
    nbits: int              #: of bitmaps; a block starts at a whole word

    @property
    def shape(self) -> tuple[tuple[int, int], ...]:
        """(gpa, bytes) of each block."""
        return tuple((gpa, size) for gpa, size, _ in self.blocks)

    @property
    def area_size(self) -> int:
        """Bytes of each of the two areas of content."""
        _, size, offset = self.blocks[-1]
        return _aligned(offset + size, ALIGNMENT)

    @property
    def areas(self) -> tuple[int, int]:
        """Where the areas begin."""
        first = _aligned(FIRST_TABLE + 2 * self.capacity, ALIGNMENT)
        return first, first + self.area_size

    @property
    def file_size(self) -> int:
        """Bytes, holes included."""
        return self.areas[1] + self.area_size

    def table_offset(self, generation: int) -> int:
        """Return where the table of a generation is."""
        return FIRST_TABLE + generation % 2 * self.capacity


def _aligned(value: int, to: int) -> int:
    return -(-value // to) * to


def damaged(why: str) -> SnapshotError:
    """Return the error of a file that is not what it must be."""
    return SnapshotError(errno.EBADMSG, operation="snapshot", hint=why)


def places(pgsize: int, shape: tuple[tuple[int, int], ...]) -> Places:
    """Return the places of a new file for blocks of (gpa, bytes)."""
    blocks, offset, nbits = [], 0, 0
    for gpa, size in shape:
        blocks.append((gpa, size, offset))
        offset = _aligned(offset + size, ALIGNMENT)
        nbits += _aligned(size // pgsize, 64)
    capacity = _aligned(len(blocks) * _BLOCK.size + MAX_STATES + 8 + nbits // 8 + nbits * 8, 4096)
    return Places(pgsize, tuple(blocks), capacity, nbits)


def encode_header(header: Header) -> bytes:
    """Return the 512 bytes."""
    packed = _HEADER.pack(MAGIC, VERSION, header.pgsize, header.nblocks, header.nstates, header.states_size,
                          header.table_sum, header.generation, header.capacity, header.id, header.key)
    packed = packed.ljust(HEADER_SIZE - _WORD.size, b"\0")
    return packed + _WORD.pack(zlib.crc32(packed))


def decode_header(data: bytes) -> Header:
    """Check 512 bytes by themselves.

    Raises
    ------
    SnapshotError
        EBADMSG: no snapshot, one that was not completed, or damaged.  EPROTONOSUPPORT: of another version.
    """
    if len(data) != HEADER_SIZE or not data.startswith(MAGIC):
        raise damaged("it was never completed" if len(data) == HEADER_SIZE and not any(data) else "this is no snapshot")
    if _WORD.unpack(data[-_WORD.size:])[0] != zlib.crc32(data[:-_WORD.size]):
        raise damaged("the header's checksum is wrong")
    _, version, *values = _HEADER.unpack_from(data)
    if version != VERSION:
        raise SnapshotError(errno.EPROTONOSUPPORT, operation="snapshot",
                            hint=f"the file has version {version}, this release reads version {VERSION}")
    header = Header(*values)
    if header.pgsize < 4096 or header.pgsize & (header.pgsize - 1) or header.pgsize > MAX_PGSIZE:
        raise damaged(f"a page size of {header.pgsize} bytes")
    if not 0 < header.nblocks <= MAX_BLOCKS or header.states_size > MAX_STATES:
        raise damaged(f"{header.nblocks} blocks, {header.states_size} bytes of states")
    if header.nstates * _STATE.size > header.states_size or header.capacity > 1 << 62:
        raise damaged(f"{header.nstates} states in {header.states_size} bytes")
    return header


def blocks_size(header: Header) -> int:
    """Return the bytes of the list of blocks, with which the table begins."""
    return header.nblocks * _BLOCK.size


def decode_blocks(data: bytes | memoryview, header: Header) -> Places:
    """Check the list of blocks."""
    blocks = tuple(_BLOCK.iter_unpack(data))
    end = 0
    for gpa, size, _ in blocks:
        if not size or (gpa | size) % header.pgsize or gpa < end or gpa + size > 1 << 64 or size > 1 << 62:
            raise damaged(f"a block of {size:#x} bytes at {gpa:#x}")
        end = gpa + size
    found = places(header.pgsize, tuple((gpa, size) for gpa, size, _ in blocks))
    if found.blocks != blocks or found.capacity != header.capacity or found.file_size > 1 << 63:
        raise damaged("blocks are not where they belong")
    return found


def encode_table_head(where: Places, states: bytes) -> bytes:
    """Return what the table begins with: blocks and states, padded; the bitmap and the hashes follow."""
    head = b"".join(_BLOCK.pack(*block) for block in where.blocks) + states
    return head.ljust(_aligned(len(head), 8), b"\0")


def encode_states(states: Mapping[str, bytes]) -> bytes:
    """Return named states, one after another."""
    parts: list[bytes] = []
    for name, data in states.items():
        encoded = name.encode()
        if len(encoded) >= 1 << 16:
            raise SnapshotError(errno.EINVAL, operation="snapshot", hint="the name of a state is too long")
        parts += [_STATE.pack(len(encoded), len(data)), encoded, data]
    packed = b"".join(parts)
    if len(packed) > MAX_STATES:
        raise SnapshotError(errno.EFBIG, operation="snapshot", size=len(packed),
                            hint=f"the states of a snapshot have {MAX_STATES} bytes at most")
    return packed


def decode_states(data: memoryview, header: Header) -> dict[str, bytes]:
    """Return the states."""
    states: dict[str, bytes] = {}
    at = 0
    for _ in range(header.nstates):
        if len(data) - at < _STATE.size:
            raise damaged("the states end too early")
        length, size = _STATE.unpack_from(data, at)
        at += _STATE.size
        if size > len(data) - at - length:
            raise damaged("a state ends behind the table")
        try:
            name = bytes(data[at:at + length]).decode()
        except UnicodeDecodeError:
            raise damaged("the name of a state is not UTF-8") from None
        if name in states:
            raise damaged(f"two states {name!r}")
        at += length + size
        states[name] = bytes(data[at - size:at])
    if at != len(data):
        raise damaged("something follows the states")
    return states


def table_size(header: Header, where: Places) -> tuple[int, int, int]:
    """Return the bytes of blocks and states with their padding, of the bitmap, and of the hashes."""
    return (_aligned(header.nblocks * _BLOCK.size + header.states_size, 8), where.nbits // 8, where.nbits * 8)
