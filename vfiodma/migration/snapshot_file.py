"""The file behind a snapshot: its table in memory, locks, and system calls that fail with SnapshotError."""
import contextlib
import errno
import fcntl
import os
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from .._core.pagefile import PageSums
from ..errors import SnapshotError
from . import snapshot_format as file_format
from .layout import MemoryLayout
from .snapshot_format import HEADER_SIZE, Header, Places, damaged

_PIECE = 1 << 17        # words of a table that are read in one go


class Snapshot(NamedTuple):
    """What a snapshot file holds."""

    id: bytes                               #: of the file; another one after each full save
    generation: int                         #: counts the saves into it
    pgsize: int
    blocks: tuple[tuple[int, int], ...]     #: (gpa, bytes)
    pages: int                              #: with content
    states: dict[str, int]                  #: names and bytes
    written: int = 0                        #: bytes of pages that this save wrote


class Table:
    """The table in memory: which area a page is in, and its hash."""

    def __init__(self, where: Places) -> None:
        import numpy as np

        self.in_second = np.zeros(where.nbits // 64, np.uint64)
        self.sums = np.zeros(where.nbits, np.uint64)

    def present(self) -> Any:
        """The pages that are not zero, as the words of a bitmap."""
        import numpy as np

        words = np.empty(len(self.sums) // 8, np.uint8)
        for at in range(0, len(self.sums), _PIECE):     # bounds the memory in between
            part = self.sums[at:at + _PIECE] != 0
            words[at // 8:at // 8 + len(part) // 8] = np.packbits(part, bitorder="little")
        return words.view("<u8").astype(np.uint64, copy=False)


class File:
    """A file of a snapshot: every access goes through here, and fails with SnapshotError."""

    def __init__(self, path: str, flags: int) -> None:
        self.path = path
        with self.failing("open"):
            self.fd = os.open(path, flags | os.O_CLOEXEC, 0o600)

    @contextlib.contextmanager
    def failing(self, operation: str) -> Iterator[None]:
        try:
            yield
        except SnapshotError:
            raise
        except (OSError, MemoryError) as exc:
            number = getattr(exc, "errno", None) or errno.ENOMEM
            raise SnapshotError(number, operation=operation, size=getattr(exc, "size", None), hint=self.path) from exc

    def lock(self, how: int) -> None:
        """Hold the file against other processes, as long as it is open or mapped."""
        try:
            with self.failing("lock"):
                fcntl.flock(self.fd, how | fcntl.LOCK_NB)
        except SnapshotError as exc:
            if exc.errno != errno.EWOULDBLOCK:
                raise
            raise SnapshotError(errno.EBUSY, operation="lock",
                                hint=f"{self.path} is being saved or loaded, or it is mapped by a lazy load") from None

    def write(self, offset: int, data: Any) -> None:
        with self.failing("write"), memoryview(data).cast("B") as view:
            done = 0
            while done < len(view):
                done += os.pwrite(self.fd, view[done:], offset + done)

    def write_pages(self, sums: PageSums, offset: int, runs: Any, content: Any) -> None:
        with self.failing("write"):
            sums.write(self.fd, offset, runs, content)

    def resize(self, size: int) -> None:
        with self.failing("truncate"):
            os.ftruncate(self.fd, size)

    def sync(self) -> None:
        with self.failing("sync"):
            os.fsync(self.fd)

    def rename(self, path: str) -> None:
        with self.failing("rename"):
            os.rename(self.path, path)
        self.path = path

    def sync_directory(self) -> None:
        with self.failing("sync"):
            fd = os.open(os.path.dirname(os.path.abspath(self.path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def read(self, offset: int, size: int) -> memoryview:
        with self.failing("read"):
            data = memoryview(bytearray(size))
            done = 0
            while done < size:
                got = os.preadv(self.fd, [data[done:]], offset + done)
                if not got:
                    raise damaged(f"{self.path} ends at {offset + done} bytes: it was truncated")
                done += got
            return data

    def close(self) -> None:
        os.close(self.fd)


def read_head(file: File) -> tuple[Header, Places]:
    """Header and blocks, checked; nothing large has been allocated yet."""
    size = os.fstat(file.fd).st_size
    header = file_format.decode_header(bytes(file.read(0, min(size, HEADER_SIZE))))
    offset = file_format.FIRST_TABLE + header.generation % 2 * header.capacity
    blocks = file.read(offset, file_format.blocks_size(header))
    where = file_format.decode_blocks(blocks, header)
    if where.file_size != size:
        raise damaged(f"{file.path} has {size} bytes instead of {where.file_size}: it was truncated, or extended")
    return header, where


def read_table(file: File, header: Header, where: Places) -> tuple[Table, dict[str, bytes]]:
    """The table, checked.  What it takes of memory is bounded by what the file has on the disk: holes take none."""
    import numpy as np

    parts = file_format.table_size(header, where)
    offset = where.table_offset(header.generation)
    head = file.read(offset, parts[0])
    offset, summed = offset + parts[0], zlib.crc32(head)
    with file.failing("read"):
        table = Table(where)        # not touched yet
    for words in (table.in_second, table.sums):
        for at in range(0, len(words), _PIECE):
            part = words[at:at + _PIECE]
            piece = file.read(offset + at * 8, part.nbytes)
            summed = zlib.crc32(piece, summed)
            found = np.frombuffer(piece, "<u8")
            if found.any():
                part[:] = found
        offset += words.nbytes
    if summed != header.table_sum:
        raise damaged("the table's checksum is wrong")
    blocks = file_format.blocks_size(header)
    states = file_format.decode_states(head[blocks:blocks + header.states_size], header)
    if (table.in_second & ~table.present()).any():
        raise damaged("the table has pages of zeros in the second area")
    return table, states


def block_sums(header: Header, table: Table, layout: MemoryLayout) -> list[PageSums]:
    return [PageSums(header.key, table.sums[block.first_bit:block.first_bit + block.npages], layout.pgsize)
            for block in layout.blocks]


def describe(header: Header, where: Places, table: Table, states: Mapping[str, bytes]) -> Snapshot:
    import numpy as np

    return Snapshot(header.id, header.generation, header.pgsize, where.shape, int(np.count_nonzero(table.sums)),
                    {name: len(data) for name, data in states.items()})


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[tuple[File, Header, Places, Table, dict[str, bytes]]]:
    file = File(os.fspath(path), os.O_RDONLY)
    try:
        file.lock(fcntl.LOCK_SH)
        header, where = read_head(file)
        table, states = read_table(file, header, where)
        yield file, header, where, table, states
    finally:
        file.close()
