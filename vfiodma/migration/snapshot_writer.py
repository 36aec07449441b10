"""Writing a snapshot: a new file that takes the name over, or changes to a file, of which the old state stays valid."""
import contextlib
import errno
import fcntl
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from .._core.bitmap import DirtyBitmap
from .._core.copy import PageStage
from .._core.errno import error
from ..errors import SnapshotError, VfioError
from . import snapshot_format as file_format
from .layout import Block, MemoryLayout, split_runs
from .snapshot_file import File, Snapshot, Table, block_sums, describe, read_head, read_table
from .snapshot_format import Header

_STAGE_BYTES = 2 << 20      # as of the stream: hashed and written while it is in the caches
_SLICE_BITS = 1 << 22       # looked at in one go: bounds the memory of their runs


class SnapshotWriter:
    """Write a snapshot in several steps: any number of ``write``, then ``commit``.

    Parameters
    ----------
    path : path-like
        Nothing is there under this name before ``commit``, or what was there before.
    layout : MemoryLayout
        Closed by the caller.
    since : Snapshot, optional
        Save the changes since this snapshot into its file, which ``path`` is.  By default everything is saved, into a
        new file that takes the name over.
    on_progress : callable, optional
        Called with (pages done, pages to do) of a ``write``.
    note_sent : callable, optional
        Told (block, runs, bytes) of everything that is saved: ``DirtyTracker.note_sent``.

    Raises
    ------
    SnapshotError
        From every method, with the errno of the file system.  ESTALE: the file is not ``since``; EBUSY: somebody else
        saves or loads it.

    Notes
    -----
    Content is staged, hashed and written; the hash is of the bytes written.  A page that changed goes to the one of its
    two places that the older snapshot does not use, and the header, one sector, is written after everything else is on
    the disk.  So up to that there is the older snapshot, and from then on the newer one, whatever happens.  ``with``
    gives up what was not committed.
    """

    def __init__(self, path: str | os.PathLike[str], layout: MemoryLayout, *, since: Snapshot | None = None,
                 on_progress: Callable[[int, int], object] | None = None,
                 note_sent: Callable[[int, Any, Any], object] | None = None) -> None:
        import numpy as np

        self.path = os.fspath(path)
        self._layout = layout
        self._since = since
        self._on_progress = on_progress or (lambda *_: None)
        self._note_sent = note_sent
        self._file = self._create() if since is None else File(self.path, os.O_RDWR)
        self._open, self._failed = True, False
        self._touched = DirtyBitmap(layout.nbits, layout.pgsize)
        self.written = 0        #: bytes of pages, so far
        try:
            if since is None:
                if layout.pgsize < 4096:
                    raise error(errno.EINVAL, "snapshot", None, layout.pgsize, "pages have at least 4096 bytes")
                self._where = file_format.places(layout.pgsize, layout.shape)
                self._header = Header(layout.pgsize, len(layout.blocks), 0, 0, 0, 0, self._where.capacity,
                                      os.urandom(16), os.urandom(file_format.KEY_SIZE))
                self._table = Table(self._where)
                self._file.resize(self._where.file_size)
            else:
                self._file.lock(fcntl.LOCK_EX)
                self._header, self._where = read_head(self._file)
                if (self._header.id, self._header.generation) != (since.id, since.generation):
                    raise SnapshotError(errno.ESTALE, operation="snapshot", hint=f"{self.path} was saved anew since")
                if (self._where.pgsize, self._where.shape) != (layout.pgsize, layout.shape):
                    raise error(errno.EINVAL, "snapshot", hint="the memory has other blocks than the snapshot")
                self._table = read_table(self._file, self._header, self._where)[0]
            self._old_second = self._table.in_second.copy()
            self._old_first = self._table.present() & ~self._old_second
            self._held = np.zeros_like(self._old_first)     # pages that an earlier write() of this save wrote
            self._sums = block_sums(self._header, self._table, layout)
            self._stage: Any = np.empty(max(_STAGE_BYTES, layout.pgsize), np.uint8)
        except BaseException:
            self.abort()
            raise

    def write(self, dirty: DirtyBitmap | None = None) -> int:
        """Write pages, by default all; return how many.  A page that is written twice has its last content.

        After a failure there is only ``abort``.
        """
        if not self._open or self._failed:
            raise error(errno.EBADF, "snapshot", hint="the snapshot was committed or given up")
        if dirty is None:
            dirty = DirtyBitmap(self._layout.nbits, self._layout.pgsize)
            for block in self._layout.blocks:
                dirty.set(block.first_bit, block.npages)
        first = DirtyBitmap(self._layout.nbits, self._layout.pgsize)
        first.merge(dirty)
        self._touched.merge(first)
        todo, done = first.count(), 0
        second = DirtyBitmap(self._layout.nbits, self._layout.pgsize)
        second.merge(first)
        first.andnot(DirtyBitmap.frombuffer(self._old_first, self._layout.nbits, self._layout.pgsize))
        second.andnot(first)
        if self.written and self._since is None:
            self._held |= self._table.present()
        self._failed = True
        for area, pages in zip(self._where.areas, (first, second), strict=True):
            for number, block in enumerate(self._layout.blocks):
                for count in self._write_block(block, pages, area + self._where.blocks[number][2]):
                    done += count
                    self._on_progress(done, todo)
        self._failed = False
        return done

    def flush(self) -> None:
        """Bring what was written to the disk, so that ``commit`` has less to do."""
        self._file.sync()

    def commit(self, states: Mapping[str, bytes] | None = None) -> Snapshot:
        """Make it the snapshot, with named states.  Returns when it is on the disk; the writer is closed."""
        if not self._open or self._failed:
            raise error(errno.EBADF, "snapshot", hint="the snapshot was committed or given up")
        states = states or {}
        encoded = file_format.encode_states(states)
        present = self._table.present()
        touched = self._words(self._touched)
        table = self._table
        table.in_second = present & ((touched & self._old_first) | (self._old_second & ~touched))
        self._failed = True
        old, generation = self._header, self._header.generation + 1
        at, summed = self._where.table_offset(generation), 0
        part: Any
        for part in (file_format.encode_table_head(self._where, encoded), table.in_second.astype("<u8", copy=False),
                     table.sums.astype("<u8", copy=False)):
            self._file.write(at, part)
            at += memoryview(part).nbytes
            summed = zlib.crc32(part, summed)
        header = old._replace(nstates=len(states), states_size=len(encoded), table_sum=summed, generation=generation)
        self._publish(header, old)
        self._open = False
        if self._since is None:
            self._punch(self._held & ~present, None)
        else:
            self._punch(touched & ~(present & ~table.in_second), touched & ~table.in_second)
        self._file.close()
        return describe(header, self._where, table, states)._replace(written=self.written)

    def abort(self) -> None:
        """Give up: what was there before stays, and nothing else.  Idempotent; no effect after ``commit``."""
        if not self._open:
            return
        self._open = False
        if self._since is None:
            with contextlib.suppress(OSError):
                os.unlink(self._file.path)
        elif hasattr(self, "_sums"):
            touched = self._words(self._touched)
            self._punch(touched & ~self._old_first, touched & ~self._old_second)
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    # Inside

    def _create(self) -> File:
        """A new file beside the old one: one process saves there at a time, and a file left by a kill is reused."""
        while True:
            # Neither through somebody's link to another file, nor into a file that somebody else can read.
            file = File(self.path + ".part", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
            if os.fstat(file.fd).st_uid != os.geteuid():
                file.close()
                raise SnapshotError(errno.EPERM, operation="open", hint=f"{file.path} is another user's")
            try:
                file.lock(fcntl.LOCK_EX)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fd), os.stat(file.path)):
                        with file.failing("open"):
                            os.fchmod(file.fd, 0o600)
                        file.resize(0)
                        return file
            except BaseException as exc:
                if getattr(exc, "errno", None) != errno.EBUSY:      # else it is another save's
                    with contextlib.suppress(OSError):
                        os.unlink(file.path)
                file.close()
                raise
            file.close()        # it was given its name, or given up, before it was locked

    def _write_block(self, block: Block, pages: DirtyBitmap, offset: int) -> Iterator[int]:
        for start in range(0, block.npages, _SLICE_BITS):
            count = min(_SLICE_BITS, block.npages - start)
            runs = pages[block.first_bit + start:block.first_bit + start + count].runs()
            if not len(runs):
                continue
            runs[:, 0] += start
            stage = PageStage(block.view, runs, self._stage, self._layout.pgsize)
            try:
                while stage.next():
                    if stage.zero_pages:
                        self._tell_zeros(block, stage.zeros)
                        self._sums[block.number].clear(stage.zeros)
                    if stage.kept_pages:
                        content = self._stage[:stage.kept_pages * self._layout.pgsize]
                        if self._note_sent is not None:
                            self._note_sent(block.number, stage.kept, content)
                        self._file.write_pages(self._sums[block.number], offset, stage.kept, content)
                        self.written += len(content)
                    yield stage.kept_pages + stage.zero_pages
            finally:
                stage.release()     # a traceback must not hold the memory

    def _tell_zeros(self, block: Block, runs: Any) -> None:
        if self._note_sent is None:
            return
        for part in split_runs(runs, len(self._stage) // self._layout.pgsize):
            self._note_sent(block.number, part, bytes(int(part[:, 1].sum()) * self._layout.pgsize))

    def _publish(self, header: Header, old: Header) -> None:
        if self._since is None:
            self._file.write(0, file_format.encode_header(header))
            self._file.sync()
            self._file.rename(self.path)
            try:
                self._file.sync_directory()
            except SnapshotError as exc:
                # It has the name; whether it still has it after a crash of the machine, nobody can tell.
                exc.hint += " is the new snapshot, if the machine does not crash"
                self._open = False
                self._file.close()
                raise
            return
        self._file.sync()
        try:
            self._file.write(0, file_format.encode_header(header))
            self._file.sync()
        except SnapshotError:
            with contextlib.suppress(SnapshotError):
                self._file.write(0, file_format.encode_header(old))
                self._file.sync()
            raise

    def _punch(self, *unused: Any) -> None:
        """Give back the space of pages at places that the valid table does not name, in each area, if possible."""
        for area, words in zip(self._where.areas, unused, strict=True):
            if words is None:
                continue
            pages = DirtyBitmap.frombuffer(words, self._layout.nbits, self._layout.pgsize)
            for block, (_, _, offset) in zip(self._layout.blocks, self._where.blocks, strict=True):
                with contextlib.suppress(VfioError):
                    self._sums[block.number].punch(
                        self._file.fd, area + offset, pages[block.first_bit:block.first_bit + block.npages].runs())

    @staticmethod
    def _words(bitmap: Any) -> Any:
        import numpy as np

        return np.frombuffer(memoryview(bitmap), np.uint64)
