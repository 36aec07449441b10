"""A backend without an IOMMU, and failures at the n-th step, for tests of what stands on a backend."""
import errno

from vfiodma import errors
from vfiodma._core.errno import error
from vfiodma.types import Capabilities, IovaRange

CHANGES = {"map_dma", "map_many", "unmap_dma", "unmap_all", "invalidate_vaddr", "update_vaddr", "update_vaddr_many",
           "allocate", "reserve", "insert", "set_value"}


class FakeBackend:
    """Keeps what it is told in a dict; refuses what a container refuses."""

    def __init__(self, features=("map_many", "vaddr", "unmap_all"), ranges=((0, (1 << 39) - 1),), dma_avail=None):
        self.features = set(features)
        self.ranges = [IovaRange(*pair) for pair in ranges]
        self.mapped = {}                # iova -> (vaddr, size, prot), vaddr None while invalid
        self.dma_avail = dma_avail
        self.closed = False

    def capabilities(self):
        return Capabilities("fake", 0x40201000, frozenset(self.features), self.dma_avail)

    def iova_ranges(self):
        return self.ranges

    def map_dma(self, iova, vaddr, size, prot):
        if self.dma_avail == 0:
            raise error(errno.ENOSPC, "map_dma", iova, size)
        assert not any(iova < start + length and start < iova + size for start, (_, length, _) in self.mapped.items())
        self.mapped[iova] = vaddr, size, int(prot)
        if self.dma_avail is not None:
            self.dma_avail -= 1

    def map_many(self, entries):
        for entry in entries.tolist():
            self.map_dma(*entry)

    def unmap_dma(self, iova, size):
        gone = [start for start in self.mapped if iova <= start < iova + size]
        removed = sum(self.mapped.pop(start)[1] for start in gone)
        if self.dma_avail is not None:
            self.dma_avail += len(gone)
        return removed

    def unmap_all(self):
        return self.unmap_dma(0, 1 << 64)

    def invalidate_vaddr(self, iova=0, size=None):
        rows = [start for start in self.mapped if size is None or iova <= start < iova + size]
        for start in rows:
            self.mapped[start] = None, *self.mapped[start][1:]
        return sum(self.mapped[start][1] for start in rows)

    def update_vaddr(self, iova, vaddr, size):
        assert self.mapped[iova][:2] == (None, size)
        self.mapped[iova] = vaddr, *self.mapped[iova][1:]

    def update_vaddr_many(self, entries):
        for entry in entries.tolist():
            self.update_vaddr(*entry)

    def close(self):
        self.closed = True


class Failure(Exception):
    """Made by the test, known to nobody."""


class FailNth:
    """Wraps objects so that the n-th change in all of them fails, once, before it happens."""

    def __init__(self):
        self.left = None

    def step(self):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.left = None
                raise Failure

    def wrap(self, inner):
        fail = self

        class Wrapped:
            def __getattr__(self, name):
                value = getattr(inner, name)
                if name not in CHANGES:
                    return value

                def call(*arguments, **options):
                    fail.step()
                    return value(*arguments, **options)
                return call

            def __len__(self):
                return len(inner)

            def __contains__(self, key):
                return key in inner

            def __iter__(self):
                return iter(inner)

        return Wrapped()

    def wrap_all(self, ioas):
        """Wrap every part of an address space that can fail."""
        ioas.backend = self.wrap(ioas.backend)
        ioas.allocator = self.wrap(ioas.allocator)
        assert ioas._table.reverse is ioas._table._reverse      # there, not still to be made
        for name in ("translations", "invalid", "tags", "_reverse"):
            setattr(ioas._table, name, self.wrap(getattr(ioas._table, name)))


def state(ioas):
    """Everything that a failed call must leave as it was."""
    table = ioas._table
    return (list(table.translations), list(table.invalid), [(row, count_keepers(table, row)) for row in table.rows()],
            [table.reverse.iovas(row.vaddr) for row in table.rows()], len(table.reverse), len(table._keepers),
            ioas.allocator.allocations(), ioas.allocator.stats(), len(ioas._pins), list(ioas._listeners),
            sorted(ioas._marks._logs), sorted(getattr(ioas.backend, "mapped", {}).items()), ioas.closed)


def count_keepers(table, row):
    holder = table.holder(table.tags.find(row.iova)[2] >> 3)
    return holder[1] if holder else None


def refused(number, call, *arguments, **options):
    """Call, and return the error, which has this errno."""
    try:
        call(*arguments, **options)
    except errors.VfioError as exc:
        assert exc.errno == number, exc
        exc.__traceback__ = None
        return exc
    raise AssertionError("no error")


def recorder(seen, name, fail=()):
    def listen(kind):
        def call(mapping):
            seen.append((name, kind, mapping.iova))
            if kind in fail:
                raise Failure
        return call
    return {kind: listen(kind) for kind in ("mapped", "unmapping", "unmapped")}
