"""map_many: all entries, or none."""
import errno
from typing import Any

import numpy as np
import pytest

from ...errors import VfioError
from ...types import Prot
from ..rig import Rig
from .base import Checks, needs


def rows_of(rig: Rig, count: int, first: int = 0) -> Any:
    """Return entries of one page each, every second page."""
    return np.array([[rig.at(first + 2 * n), rig.vaddr(n % 32), rig.pgsize, Prot.RW] for n in range(count)], np.uint64)


class ListChecks(Checks):
    """map_many is map_dma of each entry, undone as a whole."""

    def test_a_list_is_mapped(self, rig: Rig) -> None:
        needs(rig, "map_many")
        rig.backend.map_many(rows_of(rig, 100))
        rig.book.update({rig.at(2 * n): rig.pgsize for n in range(100)})
        rig.check_count()
        for page in (0, 1, 98, 99, 197, 198, 199):
            rig.check_page(rig.at(page))

    def test_an_empty_list_maps_nothing(self, rig: Rig) -> None:
        needs(rig, "map_many")
        rig.backend.map_many(np.empty((0, 4), np.uint64))
        rig.check()

    @pytest.mark.parametrize("index", [0, 1, 17, 31])
    @pytest.mark.parametrize("wrong", ["overlap", "itself", "misaligned", "empty", "rights", "memory"])
    def test_one_bad_entry_undoes_the_others(self, rig: Rig, wrong: str, index: int) -> None:
        needs(rig, "map_many")
        rows, codes = rows_of(rig, 32), {errno.EINVAL}
        rig.map(63)                             # after all of them
        if wrong == "overlap":
            rows[index, 0], codes = rig.at(63), {errno.EEXIST}
        elif wrong == "itself":
            rows[index, 0], codes = rows[(index or 32) - 1, 0], {errno.EEXIST}
        elif wrong == "misaligned":
            rows[index, 0] += np.uint64(1)
        elif wrong == "empty":
            rows[index, 2] = 0
        elif wrong == "rights":
            rows[index, 3], codes = 8, {errno.EINVAL, errno.EOPNOTSUPP}
        elif self.pins_memory:
            rows[index, 1], codes = rig.pgsize, {errno.EFAULT}
        else:
            pytest.skip("this backend does not look at memory when it is mapped")
        rig.refused(codes, rig.backend.map_many, rows)
        rig.check()
        for page in (0, 2, 34, 62):
            rig.check_page(rig.at(page))

    @pytest.mark.parametrize("rows", [np.zeros((3, 3), np.uint64), np.zeros(8, np.uint64), np.zeros((2, 4), np.uint32),
                                      b"12345678", 5, None])
    def test_something_else_than_entries_is_refused(self, rig: Rig, rows: Any) -> None:
        needs(rig, "map_many")
        with pytest.raises((TypeError, ValueError, VfioError)):
            rig.backend.map_many(rows)
        rig.check_count()
