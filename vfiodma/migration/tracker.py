"""DirtyTracker: what every device, the VMM and the process itself wrote, in one bitmap over guest memory."""
import contextlib
import errno
import logging
import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .._core.bitmap import DirtyBitmap
from .._core.errno import error
from .._core.userfault import PageHashes, WriteWatch
from ..address_space import IoAddressSpace, Listener
from ..errors import DmaPermissionError, UnsupportedError, VfioError
from ..protocols import DirtySource
from ..types import Mapping, Prot
from .layout import Block, MemoryLayout

_log = logging.getLogger(__name__)


class _Window(NamedTuple):
    """A mapping that devices can write, and where its first page is in the bitmap."""

    iova: int
    size: int
    first_bit: int


class _Source:
    """A DirtySource, what it covers, and its own page size."""

    def __init__(self, source: Any, pgsize: int) -> None:
        self.source = source
        self.pgsize = getattr(source, "pgsize", pgsize)
        self.survives_unmap = getattr(source, "survives_unmap", True)
        self.uncovered: set[_Window] = set()        # came later, and the source can't take them in
        self.on = False

    def start(self, windows: list[_Window]) -> None:
        self.source.start(self._ranges(windows), self.pgsize)
        self.on = True

    def extend(self, window: _Window) -> None:
        """Take in a window that comes while tracking; what a source can't learn of counts as written all the time."""
        extend = getattr(self.source, "extend", None)
        if not self.on:
            self.start([window])
        elif extend is None:
            self.uncovered.add(window)
        else:
            extend(*self._ranges([window])[0])

    def _ranges(self, windows: list[_Window]) -> list[tuple[int, int]]:
        """The windows as (iova, size) in whole pages of the source, ascending and disjoint."""
        ranges: list[tuple[int, int]] = []
        for window in sorted(windows):
            start = window.iova // self.pgsize * self.pgsize
            end = -(-(window.iova + window.size) // self.pgsize) * self.pgsize
            if ranges and start < (before := ranges[-1][0] + ranges[-1][1]):
                start, end = ranges.pop()[0], max(end, before)
            ranges.append((start, end - start))
        return ranges

    def harvest(self, windows: list[_Window], into: DirtyBitmap, neighbours: Iterable[_Window] = ()) -> int:
        """OR what was written in the windows into a bitmap over guest memory; ``neighbours`` are all other windows."""
        covered = [window for window in windows if window not in self.uncovered]
        found = sum(_set(into, window) for window in windows if window in self.uncovered)
        if self.pgsize == into.pgsize:
            return found + sum(self._harvest_window(window, into) for window in covered)
        # Pages of another size may belong to two windows: they are read once, then handed to both.
        others = [*covered, *(window for window in neighbours if window not in self.uncovered)]
        for iova, size in self._ranges(covered):
            own = DirtyBitmap(size // self.pgsize, self.pgsize)
            if not self.source.harvest(iova, size, own):
                continue
            scaled = own.scale(into.pgsize)
            for window in others:
                start, end = max(iova, window.iova), min(iova + size, window.iova + window.size)
                if start < end:
                    part = DirtyBitmap((end - start) // into.pgsize, into.pgsize)
                    for first, count in _runs(scaled, (start - iova) // into.pgsize, part.npages):
                        part.set(first, count)
                    found += part.harvest(into, window.first_bit + (start - window.iova) // into.pgsize)
        return found

    def _harvest_window(self, window: _Window, into: DirtyBitmap) -> int:
        npages = window.size // into.pgsize
        if window.first_bit % 64 == 0:
            return self.source.harvest(window.iova, window.size, into[window.first_bit:window.first_bit + npages])
        part = DirtyBitmap(npages, into.pgsize)
        self.source.harvest(window.iova, window.size, part)
        return part.harvest(into, window.first_bit)


def _set(into: DirtyBitmap, window: _Window) -> int:
    npages = window.size // into.pgsize
    into.set(window.first_bit, npages)
    return npages


def _runs(bitmap: DirtyBitmap, first: int, npages: int) -> list[tuple[int, int]]:
    """Runs within a part of a bitmap, counted from its first page."""
    found = []
    for start, count in bitmap.runs().tolist():
        low, high = max(start, first), min(start + count, first + npages)
        if low < high:
            found.append((low - first, high - low))
    return found


class _MemoryWrites:
    """What this process writes into one block of memory by itself."""

    def __init__(self, block: Block, pgsize: int, how: str) -> None:
        self.block = block
        self.pgsize = pgsize
        self.watch: WriteWatch | None = None
        self.hashes: PageHashes | None = None
        if how == "compare" or not self._watch(required=how == "watch"):
            self.hashes = PageHashes(block.view, pgsize)

    def _watch(self, *, required: bool) -> bool:
        region = self.block.region
        try:
            self.watch = WriteWatch(region.vaddr, region.size, self.pgsize)
        except (UnsupportedError, DmaPermissionError) as exc:
            if required:
                exc.hint += '; cpu_writes="compare" compares all memory every round instead'
                raise
            _log.warning("writes of this process can't be watched, all memory is compared every round: %s", exc)
        return self.watch is not None

    def harvest(self, into: DirtyBitmap) -> int:
        part = into[self.block.first_bit:self.block.first_bit + self.block.npages]
        if self.hashes is not None:
            return self.hashes.harvest(part)
        assert self.watch is not None
        try:
            return self.watch.harvest(part)
        except VfioError as exc:
            if exc.errno != errno.EPERM:
                raise
        # Mapped anew while it was watched: whatever was written before the watch stands again is unknown.
        self.watch.stop()
        self.watch = WriteWatch(self.block.region.vaddr, self.block.region.size, self.pgsize)
        part.set(0, self.block.npages)
        return self.block.npages

    def stop(self) -> None:
        if self.watch is not None:
            self.watch.stop()


class DirtyTracker:
    """Harvest every source of dirtiness of an address space into one bitmap over guest memory.

    The sources are each device's most exact one (its own log, or the IOMMU's; the backend names them), the pages that
    the VMM marked (``IoAddressSpace.mark_dirty``), and the writes of this process to the memory.

    Parameters
    ----------
    ioas : IoAddressSpace
        Its backend names the sources (``dirty_sources()``).
    layout : MemoryLayout
        Where the memory of its mappings is in the bitmap.
    sources : sequence of DirtySource, optional
        What knows the devices' writes, in place of what the backend names: for example the log of each real device
        (devices.DeviceLogSource), which is more exact than its container's bitmap.
    cpu_writes : {"auto", "watch", "compare", "off"}
        How writes of this process to the memory are found: by write protection (Linux 6.7), by comparing hashes of all
        memory with those of what was sent, the first of both that works, or not at all (whoever writes marks).

    Notes
    -----
    Mappings may come, go and change their rights meanwhile.  Where a new one leads is noted when it is mapped; what a
    device wrote through one that goes is read when its unmap is done, under the lock of the address space, so that
    nothing is missed.  A source that can't learn of a new mapping reports all of it as written, every time.  Memory
    outside of the layout can't be mapped for writing while tracking (EINVAL).
    Source: VFIO_DEVICE_FEATURE_DMA_LOGGING_START in include/uapi/linux/vfio.h; userfaultfd(2).
    """

    def __init__(self, ioas: IoAddressSpace, layout: MemoryLayout, *, sources: Sequence[DirtySource] | None = None,
                 cpu_writes: str = "auto") -> None:
        if cpu_writes not in ("auto", "watch", "compare", "off"):
            raise error(errno.EINVAL, "track_dirty", hint='cpu_writes is "auto", "watch", "compare" or "off"')
        self._ioas = ioas
        self.layout = layout
        self._given = sources
        self._cpu_writes = cpu_writes
        self._sources: list[_Source] = []
        self._memory: list[_MemoryWrites] = []
        self._windows: dict[int, _Window] = {}          # by iova
        self._left: DirtyBitmap | None = None           # of mappings that are gone, until the next harvest
        self._listener: Listener | None = None
        # Taken before the address space's; the listeners run under that one alone.
        self._lock = threading.RLock()

    def start(self) -> None:
        """Start all sources; everything written before may be unknown to them.  No effect when they are on.

        Raises
        ------
        UnsupportedError
            EOPNOTSUPP: the backend knows of no writes, or the kernel can't watch those of the process.
        InvalidArgumentError
            EINVAL: memory outside of the layout, or less than a page of it, is mapped for writing.
        """
        if self._listener is not None:
            return
        if self._given is None and not hasattr(self._ioas.backend, "dirty_sources"):
            raise error(errno.EOPNOTSUPP, "start_dirty", hint="the backend can't tell which pages devices write")
        with self._lock, self._ioas.unchanged("start_dirty"):
            self._listener = self._ioas.add_listener(mapped=self._mapped, unmapping=self._unmapping,
                                                     unmapped=self._unmapped)
            try:
                if self._cpu_writes != "off":
                    for block in self.layout.blocks:
                        self._memory.append(_MemoryWrites(block, self.layout.pgsize, self._cpu_writes))
                for mapping in self._ioas.mappings(mmio=False):
                    if mapping.prot & Prot.WRITE:
                        self._windows[mapping.iova] = self._window(mapping)
                for source in self._ioas.backend.dirty_sources() if self._given is None else self._given:
                    known = _Source(source, self._ioas.pgsize)
                    if self._windows:
                        known.start(list(self._windows.values()))
                    self._sources.append(known)
            except BaseException:
                self.stop()
                raise

    def harvest(self, into: DirtyBitmap) -> int:
        """OR everything written since the last harvest into a bitmap of ``layout.nbits``; return the bits found."""
        with self._lock, self._ioas.unchanged("harvest"):
            windows = list(self._windows.values())
            found = sum(source.harvest(windows, into) for source in self._sources if windows)
            found += sum(self._harvest_marked(window, into) for window in windows)
            if self._left is not None:
                left, self._left = self._left, None
                found += left.harvest(into)
            return found + sum(memory.harvest(into) for memory in self._memory)

    def note_sent(self, block: int, runs: Any, content: Any) -> None:
        """Take note of the bytes that were sent for runs of pages of a block; needed where ``compares`` is true."""
        hashes = self._memory[block].hashes if self._memory else None
        if hashes is not None:
            hashes.note(runs, content)

    @property
    def compares(self) -> bool:
        """Whether writes of the process are found by comparing with what was sent, which note_sent() must be told."""
        return any(memory.hashes is not None for memory in self._memory)

    def stop(self) -> None:
        """Stop all sources; idempotent."""
        with self._lock, contextlib.ExitStack() as steps:
            listener, self._listener = self._listener, None
            for memory in self._memory:
                steps.callback(memory.stop)
            for source in self._sources:
                steps.callback(source.source.stop)
            if listener is not None:
                steps.callback(self._ioas.remove_listener, listener)
            self._memory, self._sources, self._windows, self._left = [], [], {}, None

    # Inside: the listeners run under the address space's lock

    def _mapped(self, mapping: Mapping) -> None:
        if mapping.iova in self._windows or not mapping.prot & Prot.WRITE:
            return                                          # an unmap that failed is announced as mapped again
        if any(mmio.iova == mapping.iova for mmio in self._ioas.mappings(mapping.iova, 1, mmio=True)):
            return
        window = self._window(mapping)
        for source in self._sources:
            source.extend(window)
        self._windows[mapping.iova] = window

    def _unmapping(self, mapping: Mapping) -> None:
        window = self._windows.get(mapping.iova)
        if window is None:
            return
        left = self._left_over()
        self._harvest_marked(window, left)
        for source in self._sources:
            if not source.survives_unmap:                   # nobody can tell what is written from here to the unmap
                _set(left, window)

    def _unmapped(self, mapping: Mapping) -> None:
        window = self._windows.pop(mapping.iova, None)
        if window is None:
            return
        for source in self._sources:
            if source.survives_unmap:
                source.harvest([window], self._left_over(), self._windows.values())
            source.uncovered.discard(window)

    def _left_over(self) -> DirtyBitmap:
        if self._left is None:
            self._left = DirtyBitmap(self.layout.nbits, self.layout.pgsize)
        return self._left

    def _harvest_marked(self, window: _Window, into: DirtyBitmap) -> int:
        npages = window.size // self.layout.pgsize
        own = self._ioas.pgsize
        if window.first_bit % 64 == 0 and own == self.layout.pgsize:
            return self._ioas.harvest_marked(window.iova, window.size,
                                             into[window.first_bit:window.first_bit + npages])
        part = DirtyBitmap(window.size // own, own)
        if not self._ioas.harvest_marked(window.iova, window.size, part):
            return 0
        return part.scale(self.layout.pgsize).harvest(into, window.first_bit)

    def _window(self, mapping: Mapping) -> _Window:
        for block in self.layout.blocks:
            offset = mapping.vaddr - block.region.vaddr
            if offset >= 0 and offset + mapping.size <= block.region.size:
                if (offset | mapping.size) % self.layout.pgsize:
                    break
                return _Window(mapping.iova, mapping.size, block.first_bit + offset // self.layout.pgsize)
        raise error(errno.EINVAL, "track_dirty", mapping.iova, mapping.size,
                    f"the memory at {mapping.vaddr:#x} is not part of what is migrated, or not in whole pages of "
                    f"{self.layout.pgsize} bytes")
