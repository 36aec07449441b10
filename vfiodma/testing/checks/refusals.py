"""What a backend must refuse, with which errno, and with nothing changed."""
import errno
import os
from typing import Any

import pytest

from ...errors import MemoryFaultError, OverlapError, VfioError
from ...memory import GuestMemory, MemoryRegion
from ...types import Prot
from ..rig import Rig
from .base import Checks

_TOP = 1 << 64


def _fd(region: MemoryRegion) -> int:
    assert region.fd is not None
    return region.fd


class RefusalChecks(Checks):
    """Bad arguments: typed, explained, and without effect."""

    @pytest.mark.parametrize(("page", "npages"), [(4, 4), (4, 1), (7, 1), (5, 2), (3, 2), (7, 2), (3, 6), (0, 12)])
    def test_overlap_is_eexist(self, rig: Rig, page: int, npages: int) -> None:
        rig.map(4, 4)
        found = rig.refused(errno.EEXIST, rig.backend.map_dma, rig.at(page), rig.vaddr(), npages * rig.pgsize, Prot.RW)
        assert isinstance(found, OverlapError) and isinstance(found, FileExistsError)
        rig.check()

    @pytest.mark.parametrize(("iova", "vaddr", "size"), [
        (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, -1), (-1, 0, 0), (8, 8, 8), (0, 0, "half")])
    def test_misaligned_mappings_are_einval(self, rig: Rig, iova: int, vaddr: int, size: Any) -> None:
        size = rig.pgsize // 2 if size == "half" else rig.pgsize + size
        rig.refused(errno.EINVAL, rig.backend.map_dma, rig.at(0) + iova, rig.vaddr() + vaddr, size, Prot.RW)
        rig.check_page(rig.at(0))

    @pytest.mark.parametrize(("iova", "size"), [(1, 0), (1, -1), (0, -1), (0, 1), (-1, 2)])
    def test_misaligned_unmaps_are_refused_or_remove_what_is_inside(self, rig: Rig, iova: int, size: int) -> None:
        rig.map(0, 2)
        rig.map(8)
        try:
            removed = rig.backend.unmap_dma(rig.at(0) + iova, 2 * rig.pgsize + size)
        except VfioError as exc:
            assert exc.errno in (errno.EINVAL, errno.ENOENT)
        else:
            assert removed == rig.book.pop(rig.at(0)) and iova <= 0 <= iova + size
        rig.check()

    def test_sizes_of_zero_are_einval(self, rig: Rig) -> None:
        rig.map(0)
        rig.refused(errno.EINVAL, rig.backend.map_dma, rig.at(1), rig.vaddr(), 0, Prot.RW)
        rig.refused(errno.EINVAL, rig.backend.unmap_dma, rig.at(0), 0)
        rig.check()

    def test_ranges_that_wrap_are_refused(self, rig: Rig) -> None:
        codes, page = {errno.EINVAL, errno.EOVERFLOW}, rig.pgsize
        rig.refused(codes, rig.backend.map_dma, _TOP - page, rig.vaddr(), 2 * page, Prot.RW)
        rig.refused(codes, rig.backend.map_dma, rig.at(0), _TOP - page, 2 * page, Prot.RW)
        rig.refused(codes, rig.backend.map_dma, rig.at(0), rig.vaddr(), _TOP - page, Prot.RW)
        rig.map(0)
        rig.refused(codes, rig.backend.unmap_dma, _TOP - page, 2 * page)
        rig.refused(codes, rig.backend.unmap_dma, rig.at(0), _TOP - page)
        rig.check()

    @pytest.mark.parametrize("arguments", [
        (-1, 0, 0, 0), (0, -1, 0, 0), (0, 0, -1, 0), (_TOP, 0, 0, 0), (0, _TOP, 0, 0), (0, 0, _TOP, 0)])
    def test_numbers_beyond_64_bits_are_einval(self, rig: Rig, arguments: tuple[int, ...]) -> None:
        good = rig.at(0), rig.vaddr(), rig.pgsize, int(Prot.RW)
        chosen = [bad or value for bad, value in zip(arguments, good, strict=True)]
        rig.refused({errno.EINVAL, errno.EOVERFLOW}, rig.backend.map_dma, *chosen)

    @pytest.mark.parametrize("prot", [0, 4, 5, 7, 8, 1 << 31, 1 << 32, -1])
    def test_other_rights_are_einval(self, rig: Rig, prot: int) -> None:
        rig.refused({errno.EINVAL, errno.EOVERFLOW, errno.EOPNOTSUPP}, rig.backend.map_dma, rig.at(0), rig.vaddr(),
                    rig.pgsize, prot)
        rig.check_page(rig.at(0))

    @pytest.mark.parametrize("position", range(4))
    @pytest.mark.parametrize("wrong", ["text", None, 1.5])
    def test_wrong_types_are_typeerror(self, rig: Rig, position: int, wrong: Any) -> None:
        arguments: list[Any] = [rig.at(0), rig.vaddr(), rig.pgsize, Prot.RW]
        arguments[position] = wrong
        with pytest.raises(TypeError):
            rig.backend.map_dma(*arguments)
        rig.check_count()

    def test_memory_that_is_not_there_is_efault(self, rig: Rig) -> None:
        self._require_pinning()
        rig.map(8)
        for vaddr in (rig.pgsize, 1 << 46):
            found = rig.refused(errno.EFAULT, rig.backend.map_dma, rig.at(0), vaddr, rig.pgsize, Prot.RW)
            assert isinstance(found, MemoryFaultError)
        rig.check_page(rig.at(0))
        rig.check()

    def test_memory_that_ends_early_is_efault_as_a_whole(self, rig: Rig) -> None:
        self._require_pinning()
        with GuestMemory.memfd(18 * rig.pgsize, seal=False) as memory:
            start = -(-memory.region.vaddr // rig.pgsize) * rig.pgsize
            os.ftruncate(_fd(memory.region), 9 * rig.pgsize)
            rig.refused(errno.EFAULT, rig.backend.map_dma, rig.at(0), start, 16 * rig.pgsize, Prot.RW)
        rig.check_page(rig.at(0))
        rig.check_page(rig.at(15))

    def test_memory_that_can_only_be_read_is_not_mapped_for_writing(self, rig: Rig) -> None:
        self._require_pinning()
        region = rig.memory.region
        with MemoryRegion.from_fd(_fd(region), region.size, prot=Prot.READ) as readable:
            vaddr = -(-readable.vaddr // rig.pgsize) * rig.pgsize
            for prot in (Prot.WRITE, Prot.RW):
                rig.refused(errno.EFAULT, rig.backend.map_dma, rig.at(0), vaddr, rig.pgsize, prot)
            if not self.maps_readable_memory:
                rig.refused(errno.EFAULT, rig.backend.map_dma, rig.at(0), vaddr, rig.pgsize, Prot.READ)
                return
            rig.backend.map_dma(rig.at(0), vaddr, rig.pgsize, Prot.READ)
            assert rig.backend.unmap_dma(rig.at(0), rig.pgsize) == rig.pgsize

    def _require_pinning(self) -> None:
        if not self.pins_memory:
            pytest.skip("this backend does not look at memory when it is mapped")

    @pytest.mark.parametrize(("page", "npages"), [(4, 1), (5, 2), (7, 1), (2, 4), (6, 4), (2, 3)])
    def test_a_splitting_unmap_removes_whole_mappings_or_nothing(self, rig: Rig, page: int, npages: int) -> None:
        rig.map(4, 4)
        rig.map(12)
        try:
            removed = rig.backend.unmap_dma(rig.at(page), npages * rig.pgsize)
        except VfioError as exc:
            assert exc.errno in (errno.EINVAL, errno.ENOENT)
            assert (exc.operation, exc.iova, exc.size) == ("unmap_dma", rig.at(page), npages * rig.pgsize)
        else:
            assert removed in (0, 4 * rig.pgsize)
            if removed:
                del rig.book[rig.at(4)]
        rig.check()
