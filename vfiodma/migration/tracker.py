"""DirtyTracker: what every device and the process itself wrote, in one bitmap over guest memory."""
import contextlib
import errno
from typing import Any, NamedTuple

from .._core.bitmap import DirtyBitmap
from .._core.errno import error
from ..address_space import IoAddressSpace, Listener
from ..types import Mapping, Prot
from .layout import MemoryLayout


class _Window(NamedTuple):
    """A mapping and where its first page is in the bitmap."""

    iova: int
    size: int
    first_bit: int


class DirtyTracker:
    """Harvest every source of dirtiness of an address space: each device's own, and the pages that were marked.

    Parameters
    ----------
    ioas : IoAddressSpace
        Its backend names the sources (``dirty_sources()``).
    layout : MemoryLayout
        Where the memory of its mappings is in the bitmap.

    Notes
    -----
    Mappings must not come or go while tracking: such a change is refused (EBUSY), because its writes could be missed.
    Vaddr updates are no such change.  Source: VFIO_DEVICE_FEATURE_DMA_LOGGING_START in include/uapi/linux/vfio.h.
    """

    def __init__(self, ioas: IoAddressSpace, layout: MemoryLayout) -> None:
        self._ioas = ioas
        self.layout = layout
        self._sources: list[Any] = []
        self._windows: list[_Window] = []
        self._listener: Listener | None = None

    def start(self) -> None:
        """Start all sources; everything written before may be unknown to them.

        Raises
        ------
        UnsupportedError
            EOPNOTSUPP: the backend knows of no writes.
        """
        if self._listener is not None:
            return
        sources = getattr(self._ioas.backend, "dirty_sources", None)
        if sources is None:
            raise error(errno.EOPNOTSUPP, "start_dirty", hint="the backend can't tell which pages devices write")
        self._listener = self._ioas.add_listener(mapped=self._refuse, unmapping=self._refuse)
        try:
            writable = [mapping for mapping in self._ioas.mappings(mmio=False) if mapping.prot & Prot.WRITE]
            self._windows = [self._window(mapping) for mapping in writable]
            for source in sources() if self._windows else ():
                source.start([(window.iova, window.size) for window in self._windows], self.layout.pgsize)
                self._sources.append(source)
        except BaseException:
            self.stop()
            raise

    def harvest(self, into: DirtyBitmap) -> int:
        """OR everything written since the last harvest into a bitmap of ``layout.nbits``; return the bits found."""
        found = 0
        for iova, size, first_bit in self._windows:
            aligned = first_bit % 64 == 0
            npages = size // self.layout.pgsize
            target = into[first_bit:first_bit + npages] if aligned else DirtyBitmap(npages, self.layout.pgsize)
            for source in self._sources:
                found += source.harvest(iova, size, target)
            found += self._ioas.harvest_marked(iova, size, target)
            if not aligned:
                target.harvest(into, first_bit)
        return found

    def stop(self) -> None:
        """Stop all sources; idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None:
            self._ioas.remove_listener(listener)
        with contextlib.ExitStack() as steps:
            while self._sources:
                steps.callback(self._sources.pop().stop)
        self._windows = []

    def _window(self, mapping: Mapping) -> _Window:
        for block in self.layout.blocks:
            offset = mapping.vaddr - block.region.vaddr
            if offset >= 0 and offset + mapping.size <= block.region.size:
                return _Window(mapping.iova, mapping.size, block.first_bit + offset // self.layout.pgsize)
        raise error(errno.EINVAL, "start_dirty", mapping.iova, mapping.size,
                    f"the memory at {mapping.vaddr:#x} is not part of what is migrated")

    @staticmethod
    def _refuse(mapping: Mapping) -> None:
        raise error(errno.EBUSY, "track_dirty", mapping.iova, mapping.size, "mappings are fixed during a migration")
