"""Snapshots: guest memory and states in a file with a fixed place for every page (docs/snapshots.md)."""
import errno
import os
from collections.abc import Callable, Mapping
from typing import Any

from .._core.bitmap import DirtyBitmap
from .._core.errno import error
from ..memory import GuestMemory
from .layout import MemoryLayout
from .machine import Machine, Tracker
from .snapshot_file import File, Snapshot, Table, block_sums, describe, opened
from .snapshot_format import Header, Places, damaged
from .snapshot_writer import SnapshotWriter

__all__ = ["Snapshot", "SnapshotWriter", "changed", "inspect", "load", "save", "save_live"]

_MAP_BYTES = 1 << 20        # runs from here on are mapped by a lazy load: each is an area of the process's


def save(memory: GuestMemory, path: str | os.PathLike[str], *, states: Mapping[str, bytes] | None = None,
         dirty: DirtyBitmap | None = None, since: Snapshot | None = None, pgsize: int = 4096,
         on_progress: Callable[[int, int], object] | None = None) -> Snapshot:
    """Save memory that nobody writes meanwhile, and named states.

    Parameters
    ----------
    memory : GuestMemory
        Device memory is left out.
    path : path-like
        Replaced when everything is on the disk, and not before.
    states : mapping of str to bytes, optional
        All of them, also where only changes are saved.
    dirty : DirtyBitmap, optional
        Save only these pages, numbered as by MemoryLayout; needs ``since``.
    since : Snapshot, optional
        What ``path`` holds, and ``dirty`` is relative to: what the save before returned.
    pgsize : int
        Bytes of a page, from 4096 on.
    on_progress : callable, optional
        Called with (pages done, pages to do).

    Raises
    ------
    SnapshotError
        With the errno of the file system; what ``path`` held is as it was, and ``dirty`` is still to be saved.

    Examples
    --------
    >>> import tempfile
    >>> from vfiodma import GuestMemory
    >>> from vfiodma.migration.snapshot import load, save
    >>> with tempfile.TemporaryDirectory() as folder, GuestMemory.memfd(1 << 20) as memory:
    ...     memory.write(0x1000, b"content")
    ...     saved = save(memory, f"{folder}/guest", states={"device": b"idle"})
    ...     again, states = load(f"{folder}/guest")
    ...     with again:
    ...         saved.pages, again.read(0x1000, 7), states
    (1, b'content', {'device': b'idle'})
    """
    if (dirty is None) != (since is None):
        raise error(errno.EINVAL, "snapshot", hint="`dirty` is relative to a snapshot: give both, dirty= and since=")
    with MemoryLayout(memory, pgsize if since is None else since.pgsize) as layout:
        if dirty is not None and len(dirty) != layout.nbits:
            raise error(errno.EINVAL, "snapshot", hint=f"a bitmap of {len(dirty)} bits for {layout.nbits}")
        with SnapshotWriter(path, layout, since=since, on_progress=on_progress) as writer:
            writer.write(dirty)
            return writer.commit(states)


def save_live(layout: MemoryLayout, path: str | os.PathLike[str], tracker: Tracker, machine: Machine, *,
              states: Mapping[str, bytes] | None = None, max_rounds: int = 8, stop_pages: int = 4096,
              on_progress: Callable[[int, int], object] | None = None) -> Snapshot:
    """Save memory while devices write into it; they stand still for the last round only, and run on afterwards.

    Parameters
    ----------
    layout : MemoryLayout
        Of the memory.
    path : path-like
        As of ``save``.
    tracker : DirtyTracker
        Over the layout; started and stopped here.
    machine : Machine
        ``stop()``, ``state()`` and ``resume()``, as of PrecopySource.
    states : mapping of str to bytes, optional
        Further states.
    max_rounds : int
        Rounds while devices run, at most.
    stop_pages : int
        The devices are stopped once a round leaves no more dirty pages, or no fewer than the round before.

    Notes
    -----
    The snapshot is of the moment at which the devices stood still.  They run on before it is brought to the disk, also
    where it fails.
    """
    dirty: DirtyBitmap | None = None
    note_sent = getattr(tracker, "note_sent", None)
    with SnapshotWriter(path, layout, on_progress=on_progress, note_sent=note_sent) as writer:
        try:
            tracker.start()
            before = layout.npages + 1
            for _ in range(max_rounds):
                writer.write(dirty)
                dirty = DirtyBitmap(layout.nbits, layout.pgsize)
                tracker.harvest(dirty)
                if (count := dirty.count()) <= stop_pages or count >= before:
                    break
                before = count
            writer.flush()
            try:
                machine.stop()
                if dirty is not None:       # else there was no round, and everything is still to be written
                    tracker.harvest(dirty)
                writer.write(dirty)
                held = {**(states or {}), **machine.state()}
            finally:
                machine.resume()
        finally:
            tracker.stop()
        return writer.commit(held)


def inspect(path: str | os.PathLike[str]) -> Snapshot:
    """Return what a snapshot holds, after all checks but those of the pages' content."""
    with opened(path) as (file, header, where, table, states):
        return describe(header, where, table, states)


def changed(memory: GuestMemory, path: str | os.PathLike[str]) -> tuple[Snapshot, DirtyBitmap]:
    """Compare memory with a snapshot by the pages' hashes, for a save of what changed where nobody tracked it.

    Returns
    -------
    Snapshot, DirtyBitmap
        What ``save`` takes as ``since`` and ``dirty``.  Pages of zeros count as changed; they cost nothing.

    Notes
    -----
    Reads all memory.  A changed page is taken for the same with a probability of 2**-64.
    """
    with opened(path) as (file, header, where, table, states), MemoryLayout(memory, header.pgsize) as layout:
        _check_shape(layout, where)
        dirty = DirtyBitmap(layout.nbits, layout.pgsize)
        for block, sums in zip(layout.blocks, block_sums(header, table, layout), strict=True):
            part: Any = dirty[block.first_bit:block.first_bit + block.npages]
            sums.differ(block.view, part)
        return describe(header, where, table, states), dirty


def load(path: str | os.PathLike[str], make_memory: Callable[[Snapshot], GuestMemory] | None = None, *,
         fresh: bool = False, lazy: bool = False) -> tuple[GuestMemory, dict[str, bytes]]:
    """Load a snapshot.

    Parameters
    ----------
    path : path-like
        It is not changed.
    make_memory : callable, optional
        Returns the memory to fill, which has the snapshot's blocks; by default memfds are made.
    fresh : bool
        The memory made holds nothing but zeros, so that pages of zeros need no writing.
    lazy : bool
        Map long runs of pages from the file, copy on write, instead of reading them: at once, and a page comes in when
        it is touched.  The file can't be saved into meanwhile (EBUSY; saving all of it anew under the same name can),
        must not be changed by others (SIGBUS where it is truncated), and content is not checked by its hashes.

    Returns
    -------
    GuestMemory, dict
        Owned by the caller; the states by name.

    Raises
    ------
    SnapshotError
        EBADMSG: damaged or truncated, or a page's hash is wrong.  EPROTONOSUPPORT: a newer version.  EBUSY: it is being
        saved.  No memory is left behind.
    """
    if lazy and make_memory is not None:
        raise error(errno.EINVAL, "snapshot", hint="a lazy load makes its memory itself")
    with opened(path) as (file, header, where, table, states):
        snapshot = describe(header, where, table, states)
        memory = make_memory(snapshot) if make_memory else _make_memory(snapshot, lazy)
        try:
            with MemoryLayout(memory, header.pgsize) as layout:
                _check_shape(layout, where)
                _fill(file, header, where, table, layout, fresh=fresh or make_memory is None, lazy=lazy)
        except BaseException:
            memory.close()
            raise
        return memory, states


def _check_shape(layout: MemoryLayout, where: Places) -> None:
    if layout.shape != where.shape:
        raise error(errno.EINVAL, "snapshot", hint="the memory has other blocks than the snapshot: "
                    + ", ".join(f"{size:#x} at {gpa:#x}" for gpa, size in where.shape))


def _make_memory(snapshot: Snapshot, lazy: bool) -> GuestMemory:
    memory = GuestMemory()
    try:
        for gpa, size in snapshot.blocks:
            part = GuestMemory.anonymous(size) if lazy else GuestMemory.memfd(size)
            memory.add(part.region, gpa)
    except BaseException:
        memory.close()
        raise
    return memory


def _fill(file: File, header: Header, where: Places, table: Table, layout: MemoryLayout, *, fresh: bool,
          lazy: bool) -> None:
    import numpy as np

    present = table.present()
    wrong: Any
    for block, sums, (_, _, offset) in zip(layout.blocks, block_sums(header, table, layout), where.blocks,
                                           strict=True):
        words = slice(block.first_bit // 64, -(-(block.first_bit + block.npages) // 64))
        here, second = present[words], table.in_second[words]
        for area, pages in zip(where.areas, (here & ~second, second), strict=True):
            runs = DirtyBitmap.frombuffer(pages, block.npages, header.pgsize).runs()
            long = runs[:, 1] >= _MAP_BYTES // header.pgsize if lazy else np.zeros(len(runs), bool)
            with file.failing("read"):
                sums.map(file.fd, area + offset, runs[long], block.view)
                sums.read(file.fd, area + offset, runs[~long], block.view)
        if not fresh:
            content = np.frombuffer(block.view, np.uint8)
            for first, count in DirtyBitmap.frombuffer(~here, block.npages, header.pgsize).runs().tolist():
                content[first * header.pgsize:(first + count) * header.pgsize] = 0
            del content
        if not lazy:
            wrong = np.zeros_like(here)
            sums.differ(block.view, wrong)
            if (wrong & here).any():
                page = DirtyBitmap.frombuffer(wrong & here, block.npages, header.pgsize).runs()[0, 0]
                raise damaged(f"the page at {block.gpa + int(page) * header.pgsize:#x} is not what was saved")
