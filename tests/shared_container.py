"""A container that two processes can hold: its state is a memfd, as a kernel's is behind a descriptor.

It has the rules of Type1 for vaddr updates: a mapping is valid or not, belongs to a process, and an update goes one by
one.  ``step`` is called before each change, for tests that end a process there.
"""
import errno
import mmap
import os

from vfiodma._core.errno import error
from vfiodma.types import Capabilities, IovaRange

_COLUMNS = 6                    # iova, vaddr, size, prot, valid, owner
_SIZE = 1 << 20


def no_step():
    pass


class SharedContainer:
    step = staticmethod(no_step)

    def __init__(self, fd=None):
        self.fd = fd
        if fd is None:
            self.fd = os.memfd_create("container")
            os.ftruncate(self.fd, _SIZE)
        self.memory = mmap.mmap(self.fd, _SIZE)
        self.words = memoryview(self.memory).cast("Q")
        self.closed = False

    # ---- hand-over

    def hand_over(self):
        return {"double": True}, [self.fd]

    @classmethod
    def adopt(cls, name, state, fds):
        assert name == "shared" and state == {"double": True} and len(fds) == 1
        return cls(fds[0])

    def let_go(self):
        if not self.closed:
            self.closed = True
            self.words.release()
            self.memory.close()
            os.close(self.fd)

    # ---- mappings

    def rows(self):
        """Return [iova, vaddr, size, prot, valid, owner] of each mapping."""
        count = self.words[0]
        return [list(self.words[1 + at * _COLUMNS:1 + (at + 1) * _COLUMNS]) for at in range(count)]

    def _at(self, iova, size, operation):
        for at, row in enumerate(self.rows()):
            if row[0] == iova:
                if row[2] != size:
                    raise error(errno.EINVAL, operation, iova, size)
                return 1 + at * _COLUMNS
        raise error(errno.ENOENT, operation, iova, size)

    def capabilities(self):
        return Capabilities("shared", 4096, frozenset({"vaddr", "unmap_all"}))

    def iova_ranges(self):
        return [IovaRange(0, (1 << 48) - 1)]

    def map_dma(self, iova, vaddr, size, prot):
        at = 1 + self.words[0] * _COLUMNS
        for column, value in enumerate((iova, vaddr, size, prot, 1, os.getpid())):
            self.words[at + column] = value
        self.words[0] += 1

    def unmap_dma(self, iova, size):
        at, count = self._at(iova, size, "unmap_dma"), self.words[0]
        end = 1 + (count - 1) * _COLUMNS
        self.words[at:at + _COLUMNS] = self.words[end:end + _COLUMNS]
        self.words[0] = count - 1
        return size

    def unmap_all(self):
        size = sum(row[2] for row in self.rows())
        self.words[0] = 0
        return size

    def invalidate_vaddr(self, iova=0, size=None):
        self.step()
        if size is not None:
            at = self._at(iova, size, "invalidate_vaddr")
            if not self.words[at + 4]:
                raise error(errno.EINVAL, "invalidate_vaddr", iova, size)
            self.words[at + 4] = 0
            return size
        rows = self.rows()
        if not all(row[4] for row in rows):
            raise error(errno.EINVAL, "invalidate_vaddr")
        for at in range(len(rows)):
            self.words[1 + at * _COLUMNS + 4] = 0
        return sum(row[2] for row in rows)

    def update_vaddr(self, iova, vaddr, size):
        self.step()
        at = self._at(iova, size, "update_vaddr")
        if self.words[at + 4]:
            raise error(errno.EINVAL, "update_vaddr", iova, size)
        self.words[at + 1], self.words[at + 4], self.words[at + 5] = vaddr, 1, os.getpid()

    def update_vaddr_many(self, entries):
        done = []
        try:
            for iova, vaddr, size in entries.tolist():
                self.update_vaddr(iova, vaddr, size)
                done.append((iova, size))
        except BaseException:
            for iova, size in done:
                self.invalidate_vaddr(iova, size)
            raise

    def close(self):
        if not self.closed:
            self.unmap_all()
            self.let_go()
