"""Address spaces that go from one process to another with their mappings."""
from typing import Any, Self

from ..protocols import Backend
from .arguments import TOP, hold, release


class Adoptable:
    """The part of IoAddressSpace for both processes."""

    @classmethod
    def adopt(cls, backend: Backend, entries: Any, *, keep: Any = None, close_backend: bool = False) -> Self:
        """Make an address space of a backend that has these mappings already: nothing is mapped.

        Parameters
        ----------
        backend : Backend
            A container that was adopted from another process.
        entries : (n, 4) buffer of uint64
            iova, vaddr in this process, size, and Prot (plus 4 for device memory) of each mapping, ascending by iova.
        keep : object, optional
            As for :meth:`map_many`.

        Raises
        ------
        VfioError
            EINVAL, EEXIST: outside of the IOVA ranges, or overlapping.  Nothing was changed then.

        Notes
        -----
        Whether the backend really has them can't be asked; vaddrs that are invalid are for the caller to update.
        """
        space: Any = cls(backend)       # type: ignore[call-arg]
        kept = hold(keep)
        try:
            if len(entries):
                rows: Any = memoryview(entries).tolist()
                for iova, _, size, _ in rows:
                    space.allocator.reserve(iova, size)
                space._table.adopt(entries, kept)
                if hasattr(backend, "note_areas"):
                    backend.note_areas(entries)
        except BaseException:
            release(kept)
            space._retire("closed")
            raise
        space._close_backend = close_backend
        return space

    def let_go(self: Any) -> None:
        """Forget every mapping and close the backend's descriptors, but unmap nothing: another process has it all.

        Memory that was kept is let go, listeners are not told.  The address space is closed then.
        """
        with self._change("let_go"):
            self._pins.wait("let_go", 0, TOP, 0.0, self._check)
            self._retire("closed")
            self._listeners.clear()
            self._table.forget_all()
            self.backend.let_go()
