"""Mapping and unmapping as it should go."""
import errno
import itertools

import pytest

from ...types import Prot
from ..rig import PAGES, Rig
from .base import Checks, needs

_OUTSIDE = {errno.EINVAL, errno.EOVERFLOW}


class MappingChecks(Checks):
    """What is mapped is mapped, and what is unmapped is not."""

    @pytest.mark.parametrize("prot", [Prot.READ, Prot.WRITE, Prot.RW, 1, 2, 3])
    def test_a_page_is_mapped_and_unmapped(self, rig: Rig, prot: int) -> None:
        rig.map(0, prot=prot)
        rig.check()
        rig.unmap(0)
        rig.check_page(rig.at(0))

    def test_unmapping_nothing_removes_nothing(self, rig: Rig) -> None:
        assert rig.backend.unmap_dma(rig.at(0), rig.pgsize) == 0
        rig.map(4)
        assert rig.backend.unmap_dma(rig.at(0), 4 * rig.pgsize) == 0
        assert rig.backend.unmap_dma(rig.at(5), 4 * rig.pgsize) == 0
        rig.check()

    def test_one_unmap_removes_all_that_is_inside(self, rig: Rig) -> None:
        for page, npages in [(0, 1), (1, 2), (8, 4), (13, 1), (20, 1)]:
            rig.map(page, npages)
        rig.unmap(1, 13)
        assert sorted(rig.book) == [rig.at(0), rig.at(20)]
        rig.check()

    def test_all_of_the_memory_in_one_mapping(self, rig: Rig) -> None:
        rig.map(3, PAGES)
        rig.check()
        rig.unmap(3, PAGES)

    def test_the_same_memory_at_many_places(self, rig: Rig) -> None:
        for page in range(0, 32, 2):
            rig.map(page, 2, memory=page % 3)
        rig.check()
        rig.unmap(0, 32)

    def test_neighbours_stay_apart(self, rig: Rig) -> None:
        """Mappings that touch, even of memory that does, are each removed alone."""
        for page in range(4):
            rig.map(page, memory=page)
        rig.unmap(1)
        rig.check()
        rig.map(1, memory=1)
        rig.unmap(2, 2)
        rig.check()

    def test_a_hole_is_filled_exactly(self, rig: Rig) -> None:
        rig.map(0, 4)
        rig.map(8, 4)
        rig.map(4, 4)
        rig.check()

    def test_a_place_can_be_used_again_and_again(self, rig: Rig) -> None:
        for turn in range(20):
            rig.map(0, 1 + turn % 5, memory=turn)
            rig.unmap(0, 1 + turn % 5)

    def test_unmap_all_removes_everything(self, rig: Rig) -> None:
        needs(rig, "unmap_all")
        assert rig.backend.unmap_all() == 0
        for page in (0, 2, 3, 9):
            rig.map(page)
        assert rig.backend.unmap_all() == 4 * rig.pgsize
        rig.book.clear()
        rig.check_page(rig.at(3))
        assert rig.backend.unmap_all() == 0

    def test_ranges_can_be_used_to_their_ends(self, rig: Rig) -> None:
        ranges = rig.backend.iova_ranges()
        if not ranges:
            pytest.skip("this backend reports no ranges")
        for start, last in ranges:
            first = -(-start // rig.pgsize) * rig.pgsize
            final = (last + 1) // rig.pgsize * rig.pgsize - rig.pgsize
            for iova in dict.fromkeys((first, final)):
                rig.backend.map_dma(iova, rig.vaddr(), rig.pgsize, Prot.RW)
                rig.book[iova] = rig.pgsize
        rig.check()

    def test_nothing_is_mapped_between_and_behind_the_ranges(self, rig: Rig) -> None:
        ranges = list(rig.backend.iova_ranges())
        if not ranges:
            pytest.skip("this backend reports no ranges")
        holes = [(before.last + 1, after.start - 1) for before, after in itertools.pairwise(ranges)
                 if before.last + 1 < after.start]
        holes += [(0, ranges[0].start - 1)] * bool(ranges[0].start)
        holes += [(ranges[-1].last + 1, (1 << 64) - 1)] * (ranges[-1].last + 1 < 1 << 64)
        for start, last in holes:
            first = start // rig.pgsize * rig.pgsize
            final = (last + 1) // rig.pgsize * rig.pgsize - rig.pgsize
            for iova in dict.fromkeys((first, final)):
                rig.refused(_OUTSIDE, rig.backend.map_dma, iova, rig.vaddr(), rig.pgsize, Prot.RW)
            if first:
                rig.refused(_OUTSIDE, rig.backend.map_dma, first - rig.pgsize, rig.vaddr(), 2 * rig.pgsize, Prot.RW)
