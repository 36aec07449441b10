"""The table of mappings.

Ordered maps keep it, so that a mapping costs no Python object.  ``translations`` (iova -> vaddr) holds what can be
translated and is read without a lock; ``invalid`` (iova -> last vaddr) holds mappings between invalidate_vaddr() and
update_vaddr(); ``tags`` holds every mapping's permissions and the number of what keeps its memory.  A mapping is in
``tags`` and in exactly one of the other two; ``reverse`` (vaddr -> iova) knows those in ``translations``.  Whoever
changes the table holds the address space's lock.
"""
import contextlib
import errno
from collections.abc import Callable
from typing import Any, NamedTuple

from .._core.errno import error
from .._core.maprows import rejoin_rows, split_entries
from .._core.rangemap import RangeMap, VaddrIndex
from ..errors import NotMappedError
from ..types import Mapping, Prot

_TOP = (1 << 64) - 1
# A tag: prot in bits 0-1, device memory in bit 2, the number of the keeper above.
_PROT, _MMIO, _KEEPER_SHIFT = 3, 4, 3
_PROTS = [Prot(bits) for bits in range(4)]


class Row(NamedTuple):
    """A mapping with what the table knows besides; ``keeper`` and ``file`` are only there for rows on their way in."""

    iova: int
    vaddr: int
    size: int
    prot: int
    mmio: bool = False
    keeper: Any = None
    file: tuple[int, int] | None = None     #: descriptor and offset, for backends that map shared memory by its file

    @property
    def last(self) -> int:
        """Last iova."""
        return self.iova + self.size - 1

    @property
    def mapping(self) -> Mapping:
        """The public form."""
        return Mapping(self.iova, self.vaddr, self.size, _PROTS[self.prot])


class MappingTable:
    """Every mapping of an address space; ``release`` is called with each keeper that no mapping needs any more."""

    def __init__(self, release: Callable[[Any], None]) -> None:
        self.translations, self.invalid, self.tags = RangeMap(), RangeMap(), RangeMap()
        self._reverse: VaddrIndex | None = VaddrIndex()     # None: made again when somebody asks
        self._release = release
        # What keeps memory: [it, mappings that need it].  Numbers below the floor mean the common one, the floor itself
        # means none: so everything changes its keeper without a step for each mapping.
        self._keepers: dict[int, list[Any]] = {}
        self._common: list[Any] | None = None
        self._floor = self._newest = 0

    def __len__(self) -> int:
        return len(self.tags)

    @property
    def reverse(self) -> VaddrIndex:
        """vaddr -> iova of what is translated."""
        if self._reverse is None:
            fresh = VaddrIndex()
            for iova, size, vaddr in self.translations.to_array().tolist():
                fresh.insert(vaddr, size, iova)
            self._reverse = fresh
        return self._reverse

    def to_array(self) -> Any:
        """Return (n, 4) rows of iova, vaddr, size, prot, by iova; invalid mappings show their last vaddr."""
        import numpy as np

        tags, parts = self.tags.to_array(), [self.translations.to_array(), self.invalid.to_array()]
        places = np.concatenate(parts) if len(parts[1]) else parts[0]
        if len(parts[1]):
            places = places[np.argsort(places[:, 0], kind="stable")]
        return np.column_stack((places[:, 0], places[:, 2], places[:, 1], tags[:, 2] & np.uint64(_PROT)))

    def rows(self, iova: int = 0, last: int = _TOP) -> list[Row]:
        """Collect the mappings that touch a range, ascending."""
        rows = []
        while iova <= last and (entry := self.tags.lower(iova)) is not None and entry[0] <= last:
            start, size, tag = entry
            vaddr = self.translations.get(start)
            if vaddr is None:
                vaddr = self.invalid.translate(start)
            rows.append(Row(start, vaddr, size, tag & _PROT, bool(tag & _MMIO)))
            iova = start + size
        return rows

    def covering(self, operation: str, iova: int, last: int) -> list[Row]:
        """Collect the mappings of a range without holes; ENOENT tells where the first hole begins."""
        rows, expected = self.rows(iova, last), iova
        for row in rows:
            if row.iova > expected:
                break
            expected = row.last + 1
        if expected <= last:
            raise error(errno.ENOENT, operation, expected, last - expected + 1, "nothing is mapped there")
        return rows

    def starting(self, operation: str, iova: int) -> Row:
        """Return the mapping that starts at an address."""
        rows = self.rows(iova, iova)
        if not rows or rows[0].iova != iova:
            raise error(errno.ENOENT, operation, iova, None, "no mapping starts there")
        return rows[0]

    def whole(self, operation: str, iova: int, last: int | None) -> list[Row]:
        """Collect whole mappings that cover a range; without ``last``, the one that starts at ``iova``."""
        if last is None:
            return [self.starting(operation, iova)]
        rows = self.covering(operation, iova, last)
        if rows[0].iova != iova or rows[-1].last != last:
            raise error(errno.EINVAL, operation, iova, last - iova + 1, "the range cuts a mapping")
        return rows

    def segments(self, operation: str, iova: int, last: int, prot: int = 0) -> list[tuple[int, int]]:
        """Return (vaddr, size) of the memory behind a range, neighbours joined; EPERM where ``prot`` is not allowed."""
        segments: list[tuple[int, int]] = []
        for row in self.covering(operation, iova, last):
            if missing := prot & ~row.prot:
                raise error(errno.EPERM, operation, iova, last - iova + 1,
                            f"the mapping at {row.iova:#x} does not allow {Prot(missing).name}")
            if self.is_invalid(row):
                raise error(errno.ENOENT, operation, row.iova, row.size, "its vaddr is invalid until update_vaddr()")
            begin, end = max(iova, row.iova), min(last, row.last)
            vaddr, size = row.vaddr + begin - row.iova, end - begin + 1
            if segments and sum(segments[-1]) == vaddr:
                segments[-1] = segments[-1][0], segments[-1][1] + size
            else:
                segments.append((vaddr, size))
        return segments

    def waiting(self, operation: str, iova: int, size: int | None = None) -> Row:
        """Return the mapping that starts at an address and waits for its vaddr."""
        row = self.starting(operation, iova)
        if not self.is_invalid(row):
            raise error(errno.EINVAL, operation, iova, row.size, "its vaddr is valid: invalidate it first")
        if size is not None and size != row.size:
            raise error(errno.EINVAL, operation, iova, size, f"the mapping has the size {row.size:#x}")
        return row

    def is_invalid(self, row: Row) -> bool:
        """Whether a mapping waits for its new vaddr."""
        return bool(len(self.invalid)) and row.iova in self.invalid

    def add(self, row: Row) -> None:
        """Enter a new mapping; :meth:`remove` takes back what a failure left."""
        self.tags.insert(row.iova, row.size, row.prot | _MMIO * row.mmio | self._floor << _KEEPER_SHIFT)
        self.translations.insert(row.iova, row.size, row.vaddr)
        if self._reverse is not None:
            self._reverse.insert(row.vaddr, row.size, row.iova)
        self.keep(row, row.keeper)

    def remove(self, row: Row) -> None:
        """Take a mapping out, of whatever parts it is in."""
        self.keep(row, None)
        self._stop_translating(row)
        for part in (self.invalid, self.tags):
            if row.iova in part:
                part.remove(row.iova)

    def invalidate(self, row: Row, vaddr: int | None = None) -> None:
        """Stop translating a mapping, remember its vaddr (or the one given), and let its memory go."""
        self._stop_translating(row)
        if row.iova not in self.invalid:
            self.invalid.insert(row.iova, row.size, row.vaddr if vaddr is None else vaddr)
        self.keep(row, None)

    def _stop_translating(self, row: Row) -> None:
        if row.iova in self.translations:
            self.translations.remove(row.iova)
            with contextlib.suppress(NotMappedError):       # a failure may have come between the two
                if self._reverse is not None:
                    self._reverse.remove(row.vaddr, row.iova)

    def restore(self, row: Row) -> None:
        """Translate an invalid mapping again, to its new address; :meth:`invalidate` takes back what a failure left."""
        self.translations.insert(row.iova, row.size, row.vaddr)
        if self._reverse is not None:
            self._reverse.insert(row.vaddr, row.size, row.iova)
        self.invalid.remove(row.iova)
        self.keep(row, row.keeper)

    def keep(self, row: Row, keeper: Any) -> None:
        """Give a mapping a new keeper; release the old one when no mapping needs it any more."""
        entry = self.tags.find(row.iova)
        if entry is None:
            return
        old, new = entry[2] >> _KEEPER_SHIFT, self._floor
        if keeper is not None:
            # Mappings made together share their keeper, and come one after the other.
            shared = self._newest in self._keepers and self._keepers[self._newest][0] is keeper
            new = self._newest if shared else self._newest + 1
        if new != old:
            self.tags.set_value(row.iova, entry[2] & (_PROT | _MMIO) | new << _KEEPER_SHIFT)
        if keeper is not None:
            self._newest = new
            self._keepers.setdefault(new, [keeper, 0])[1] += 1
        holder = self.holder(old)
        if holder is not None:
            holder[1] -= 1
            if not holder[1]:
                if holder is self._common:
                    self._common = None
                self._keepers.pop(old, None)
                self._release(holder[0])

    def holder(self, number: int) -> list[Any] | None:
        """Return [what is kept, mappings that need it] of a tag's number."""
        return self._common if number < self._floor else self._keepers.get(number)

    # Everything at once

    def adopt(self, entries: Any, keeper: Any) -> None:
        """Fill an empty table from (n, 4) rows of iova, vaddr, size, mmio << 2 | prot, by iova; n > 0."""
        number = 0 if keeper is None else 1
        translations, tags, _ = split_entries(entries, number << _KEEPER_SHIFT)
        self.translations.build(translations)
        self.tags.build(tags)
        self._reverse = None
        if number:
            self._newest = number
            self._keepers[number] = [keeper, len(tags)]

    def copy_translations(self) -> RangeMap:
        """Return a copy of everything that is translated."""
        copy = RangeMap()
        copy.build(self.translations.to_array())
        return copy

    def invalidate_all(self, waiting: RangeMap) -> None:
        """Stop translating; every vaddr is valid, and ``waiting`` is copy_translations()."""
        self.invalid = waiting
        self.translations.clear()
        self._reverse = None
        self._keep_all(None)

    def forget_all(self) -> None:
        """Empty the table and release every keeper."""
        for part in (self.translations, self.invalid, self.tags):
            part.clear()
        self._reverse = None
        self._keep_all(None)

    def match_invalid(self, entries: Any) -> Any:
        """Return what restore_all() takes, if (n, 3) rows of iova, vaddr, size are all mappings and all are invalid."""
        import numpy as np

        if len(entries) != len(self.invalid) or len(self.translations) or not len(entries):
            return None
        waiting = self.invalid.to_array()
        found = rejoin_rows(entries, waiting)
        if found is None:               # out of order, or others
            rows = np.ascontiguousarray(entries[np.argsort(entries[:, 0], kind="stable")])
            found = rejoin_rows(rows, waiting)
        return found

    def restore_all(self, translations: Any, keeper: Any) -> None:
        """Translate all invalid mappings again, to where match_invalid() says."""
        self.translations.build(translations)       # the step that can fail comes first
        self.invalid = RangeMap()
        self._reverse = None
        self._keep_all(keeper)

    def _keep_all(self, keeper: Any) -> None:
        """Give every mapping the same new keeper, and release all old ones."""
        old, common = self._keepers, self._common
        self._keepers, self._common = {}, None if keeper is None else [keeper, len(self.tags)]
        self._floor = self._newest = self._newest + 1
        for kept, _ in (*old.values(), *([common] if common else ())):
            self._release(kept)
