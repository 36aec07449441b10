"""The table of what is handed over: memory regions and mappings, in a sealed memfd.

The file has a head, then the regions, then the mappings; all numbers are little-endian.  It is sealed before it is
sent, and refused unless it is: nobody can change it after it was checked, nor cut it off while it is read.
"""
import errno
import fcntl
import mmap
import os
import struct
import zlib
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from .._core.errno import error
from .._core.maprows import check_rows, place_rows
from ..memory import GuestMemory, MemoryRegion
from ..types import Prot

_MAGIC = b"vfioLuTb"
_VERSION = 1
_HEAD = struct.Struct("<8sIIQQQII")     # magic, version, regions, mappings, bytes mapped, bytes of the file, crc32, 0
_REGION = struct.Struct("<QQQQIIII")    # gpa, size, offset, pgsize, kind, prot, mmio, 0
ROW = 32                                # iova, offset into the region, size, region << 3 | mmio << 2 | prot
_KINDS = ("anonymous", "memfd", "hugetlb", "file", "device")
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
MAX_REGIONS = 1024
MAX_MAPPINGS = 1 << 24
MAX_STATE = 1 << 30


class RegionRecord(NamedTuple):
    """A region as it is sent; its descriptor travels beside it."""

    gpa: int
    size: int
    offset: int
    pgsize: int
    kind: str
    prot: int
    mmio: bool


class Table(NamedTuple):
    """What was read: regions, and mappings as (n, 4) rows of iova, offset, size, region << 3 | mmio << 2 | prot."""

    regions: list[RegionRecord]
    mappings: Any       #: () where there is none
    size: int           #: bytes mapped
    locked: int         #: bytes of them that are no device memory


def _bad(why: str) -> OSError:
    return error(errno.EPROTO, "live_update", hint=f"the table is wrong: {why}")


def records_of(memory: GuestMemory, operation: str = "live_update") -> list[RegionRecord]:
    """Describe the regions of a memory; EOPNOTSUPP for one without a descriptor."""
    records = []
    for gpa, region in memory:
        if region.fd is None:
            raise error(errno.EOPNOTSUPP, operation, gpa, region.size, "anonymous memory can't be handed to another "
                        "process: use memfd, hugetlb or file memory")
        records.append(RegionRecord(gpa, region.size, region.offset, region.pgsize, region.kind, int(region.prot),
                                    region.mmio))
    if not 0 < len(records) <= MAX_REGIONS:
        raise error(errno.EINVAL, operation, hint=f"a memory of 1 to {MAX_REGIONS} regions is needed")
    return records


def pack_regions(records: Sequence[RegionRecord]) -> bytes:
    """Return the records of regions."""
    return b"".join(_REGION.pack(r.gpa, r.size, r.offset, r.pgsize, _KINDS.index(r.kind), r.prot, r.mmio, 0)
                    for r in records)


def unpack_regions(data: Any) -> list[RegionRecord]:
    """Read and check records of regions."""
    if not 0 < len(data) <= MAX_REGIONS * _REGION.size or len(data) % _REGION.size:
        raise _bad(f"{len(data)} bytes of regions")
    records: list[RegionRecord] = []
    for gpa, size, offset, pgsize, kind, prot, mmio, zero in _REGION.iter_unpack(data):
        if not 0 < kind < len(_KINDS) or not 0 < prot <= 3 or mmio > 1 or zero:
            raise _bad(f"region {len(records)} is of an unknown kind")
        if pgsize < mmap.PAGESIZE or pgsize & (pgsize - 1) or not size or (size | offset) & (pgsize - 1) or \
                gpa & (mmap.PAGESIZE - 1) or size + offset >= 1 << 63 or gpa + size > 1 << 64:
            raise _bad(f"region {len(records)} has no such place or size")
        if records and gpa < records[-1].gpa + records[-1].size:
            raise _bad(f"region {len(records)} overlaps the one before it, or is out of order")
        records.append(RegionRecord(gpa, size, offset, pgsize, _KINDS[kind], prot, bool(mmio)))
    return records


def map_regions(records: Sequence[RegionRecord], fds: Sequence[int]) -> GuestMemory:
    """Map every region by its descriptor, once; the descriptors stay the caller's.

    Raises
    ------
    ProtocolError
        EPROTO: a file is shorter than its region.
    VfioError
        Of mmap(2).
    """
    memory = GuestMemory()
    try:
        for record, fd in zip(records, fds, strict=True):
            if record.kind != "device" and os.fstat(fd).st_size < record.offset + record.size:
                raise _bad(f"the file behind the region at gpa {record.gpa:#x} is shorter than the region")
            memory.add(MemoryRegion.from_fd(fd, record.size, offset=record.offset, prot=Prot(record.prot),
                                            kind=record.kind, pgsize=record.pgsize, mmio=record.mmio), record.gpa)
    except BaseException:
        memory.close()
        raise
    return memory


def write_table(records: Sequence[RegionRecord], mappings: Any) -> int:
    """Write a sealed memfd; return its descriptor, close-on-exec, which the caller closes.

    Parameters
    ----------
    records : sequence of RegionRecord
    mappings : (n, 4) array of uint64
        As in :class:`Table`, by iova.
    """
    body = pack_regions(records) + mappings.astype("<u8", copy=False).tobytes()
    size = _HEAD.size + len(body)
    head = _HEAD.pack(_MAGIC, _VERSION, len(records), len(mappings), int(mappings[:, 2].sum()), size,
                      zlib.crc32(body), 0)
    return sealed_memfd(head + body, "vfiodma-table")


def sealed_memfd(data: bytes, name: str) -> int:
    """Return the descriptor of a memfd that holds these bytes for good."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        done = 0
        while done < len(data):
            done += os.pwrite(fd, memoryview(data)[done:], done)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_sealed(fd: int, limit: int) -> mmap.mmap:
    """Map a sealed memfd for reading; EPROTO for anything else."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        size = os.fstat(fd).st_size
    except OSError:
        raise _bad("it is not a memfd") from None
    if seals & _SEALS != _SEALS:
        raise _bad("its file is not sealed")
    if not 0 < size <= limit:
        raise _bad(f"its file has {size} bytes")
    return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)


def read_state(fd: int) -> bytes:
    """Return what stands in a sealed memfd, of at most 1 GiB; EPROTO for anything else."""
    with read_sealed(fd, MAX_STATE) as file:
        return bytes(file)


def read_table(fd: int) -> Table:
    """Read and check a table; the descriptor stays the caller's.

    Raises
    ------
    ProtocolError
        EPROTO: not sealed, of another version, damaged, or a mapping that is misaligned, out of order, overlapping
        another, or outside of its region.
    """
    with read_sealed(fd, _HEAD.size + MAX_REGIONS * _REGION.size + MAX_MAPPINGS * ROW) as file:
        data = bytes(file)
    if len(data) < _HEAD.size:
        raise _bad("it is too short")
    magic, version, nregions, count, total, size, crc, zero = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise _bad("it is none")
    if version != _VERSION:
        raise error(errno.EPROTO, "live_update", hint=f"the table has version {version}, this process reads {_VERSION}")
    rows_at = _HEAD.size + nregions * _REGION.size
    if nregions > MAX_REGIONS or count > MAX_MAPPINGS or zero or not size == len(data) == rows_at + count * ROW:
        raise _bad(f"{len(data)} bytes for {nregions} regions and {count} mappings")
    if zlib.crc32(memoryview(data)[_HEAD.size:]) != crc:
        raise _bad("its checksum differs")
    records = unpack_regions(data[_HEAD.size:rows_at])
    if not count:
        return Table(records, (), 0, 0)
    rows = memoryview(data)[rows_at:].cast("Q", (count, 4))
    found, locked = check_rows(rows, array("Q", [record.size for record in records]), mmap.PAGESIZE)
    if found != total:
        raise _bad("the sum of its sizes differs")
    return Table(records, rows, found, locked)


def place(table: Table, memory: GuestMemory) -> Any:
    """Return (n, 4) entries of iova, vaddr, size, mmio << 2 | prot: where the mappings are in this process."""
    if not len(table.mappings):
        return ()
    return place_rows(table.mappings, array("Q", [region.vaddr for region in memory.regions]))
