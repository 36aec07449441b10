"""What the checks hold a backend with: memory, a place for mappings, and a book of what must be mapped."""
import errno
from collections.abc import Callable, Collection
from typing import Any

from ..errors import VfioError
from ..memory import GuestMemory
from ..types import Prot

PAGES = 64                              #: pages of memory
_LOWEST = 1 << 20
_ROOM = 1024                            # pages that the checks use, from `iova` on


class Rig:
    """A backend, memory of ``PAGES`` pages, and the mappings that the backend must have.

    Attributes
    ----------
    backend : Backend
    pgsize : int
        Bytes of its smallest page; "page" below is one of these.
    iova : int
        Page ``n`` of the checks is at ``iova + n * pgsize``.
    memory : GuestMemory
        Shared memory; page ``n`` of it is at ``vaddr(n)``.
    book : dict of int to int
        iova and size of what is mapped.
    """

    def __init__(self, backend: Any) -> None:
        capabilities = backend.capabilities()
        self.backend = backend
        self.features = capabilities.features
        self.pgsize = capabilities.min_pgsize
        self.entries = capabilities.dma_avail
        self.memory = GuestMemory.memfd((PAGES + 1) * max(self.pgsize, 4096))
        self._skip = -self.memory.region.vaddr % self.pgsize
        self.iova = self._place()
        self.book: dict[int, int] = {}
        self.closed = False

    def _place(self) -> int:
        for start, last in self.backend.iova_ranges() or [(0, (1 << 64) - 1)]:
            at = -(-max(start, _LOWEST) // self.pgsize) * self.pgsize
            if at + _ROOM * self.pgsize - 1 <= last:
                return at
        raise AssertionError("no IOVA range has room for the checks")

    def at(self, page: int) -> int:
        """Return the iova of a page."""
        return self.iova + page * self.pgsize

    def vaddr(self, page: int = 0) -> int:
        """Return the address of a page of the memory."""
        return self.memory.region.vaddr + self._skip + page * self.pgsize

    def read(self, page: int, size: int, offset: int = 0) -> bytes:
        """Read the memory, as the process sees it."""
        return self.memory.read(self._skip + page * self.pgsize + offset, size)

    def write(self, page: int, data: bytes, offset: int = 0) -> None:
        """Write the memory as the process does."""
        self.memory.write(self._skip + page * self.pgsize + offset, data)

    def map(self, page: int, npages: int = 1, *, prot: int = Prot.RW, memory: int = 0) -> int:
        """Map pages of the memory, from page ``memory`` on; return the iova."""
        iova, size = self.at(page), npages * self.pgsize
        self.backend.map_dma(iova, self.vaddr(memory), size, prot)
        self.book[iova] = size
        return iova

    def unmap(self, page: int, npages: int = 1) -> None:
        """Remove all mappings inside of pages; their bytes must be what the backend says it removed."""
        iova, size = self.at(page), npages * self.pgsize
        inside = [start for start in self.book if iova <= start < iova + size]
        assert self.backend.unmap_dma(iova, size) == sum(self.book.pop(start) for start in inside)

    def refused(self, errnos: int | Collection[int], call: Callable[..., Any], *args: Any, **kwargs: Any) -> VfioError:
        """Call; it must fail with one of the errnos, typed, and change nothing.  Return the error."""
        expected = {errnos} if isinstance(errnos, int) else set(errnos)
        try:
            result = call(*args, **kwargs)
        except VfioError as exc:
            names = [errno.errorcode[code] for code in expected]
            assert exc.errno in expected, f"{exc!r} where one of {names} was to come"
            assert type(exc) is not VfioError or exc.errno not in _TYPED, f"{exc!r} has no class of its own"
            assert exc.operation, "the error must name the operation"
            if call in (self.backend.map_dma, self.backend.unmap_dma):
                assert exc.operation == call.__name__
            if call in (self.backend.map_dma, self.backend.unmap_dma) and all(0 <= arg < 1 << 64 for arg in args):
                assert (exc.iova, exc.size) == (args[0], args[-2] if len(args) > 2 else args[1])
            # A traceback would keep objects of the check alive.
            exc.__traceback__ = None
            self.check_count()
            return exc
        raise AssertionError(f"{call.__name__}{args} was not refused, but returned {result!r}")

    def check_count(self) -> None:
        """Compare the number of mappings, where the backend tells."""
        if self.entries is not None:
            assert self.entries - self.backend.capabilities().dma_avail == len(self.book)

    def check(self) -> None:
        """Compare the ends of every mapping, and the pages beside it, with the book.  Changes nothing."""
        self.check_count()
        for iova, size in self.book.items():
            for page in {iova, iova + size - self.pgsize}:
                self.check_page(page)
            for page in (iova - self.pgsize, iova + size):
                if self.iova <= page < self.at(_ROOM):
                    self.check_page(page)

    def is_mapped(self, iova: int) -> bool:
        """Tell whether the book has the page."""
        return any(start <= iova < start + size for start, size in self.book.items())

    def check_page(self, iova: int) -> None:
        """Compare one page with the book, by mapping it: EEXIST tells that it is."""
        if self.is_mapped(iova):
            self.refused(errno.EEXIST, self.backend.map_dma, iova, self.vaddr(), self.pgsize, Prot.READ)
        elif not self._full():
            self.backend.map_dma(iova, self.vaddr(), self.pgsize, Prot.READ)
            assert self.backend.unmap_dma(iova, self.pgsize) == self.pgsize

    def _full(self) -> bool:
        return self.backend.capabilities().dma_avail == 0

    def finish(self) -> None:
        """Remove what is mapped, each with its size; nothing must be left then.  Does nothing after close_backend()."""
        if self.closed:
            return
        for iova in sorted(self.book):
            assert self.backend.unmap_dma(iova, self.book[iova]) == self.book.pop(iova)
        assert self.backend.unmap_dma(self.iova, _ROOM * self.pgsize) == 0
        self.check_count()

    def close_backend(self) -> None:
        """Close the backend, which forgets its mappings."""
        self.closed = True
        self.book.clear()
        self.backend.close()

    def close(self) -> None:
        """Close the backend, and then let go of the memory."""
        self.close_backend()
        self.memory.close()


_TYPED = {errno.EINVAL, errno.EOVERFLOW, errno.EEXIST, errno.ENOENT, errno.ENOSPC, errno.ENOMEM, errno.EFAULT,
          errno.EPERM, errno.EACCES, errno.EBUSY, errno.ENODEV, errno.ENOTTY, errno.EOPNOTSUPP, errno.EBADF}
