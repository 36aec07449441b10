"""Addresses of the process that become invalid and are told anew."""
import errno

import numpy as np
import pytest

from ...errors import VfioError
from ...memory import GuestMemory
from ...types import Prot
from ..rig import Rig
from .base import Checks, needs

_WRONG = {errno.EINVAL, errno.ENOENT}


def _start(rig: Rig, moved: GuestMemory) -> int:
    """Return where page 0 of the memory is after it moved."""
    start = moved.region.vaddr + (rig.vaddr() - rig.memory.region.vaddr)
    if start % rig.pgsize:
        pytest.skip("the memory moved to where no page of the backend begins")
    return start


class VaddrChecks(Checks):
    """The feature "vaddr"."""

    def test_addresses_of_everything_are_invalidated_and_updated(self, rig: Rig) -> None:
        needs(rig, "vaddr")
        rig.map(0, 4)
        rig.map(8, 2, memory=8)
        assert rig.backend.invalidate_vaddr() == 6 * rig.pgsize
        rig.check_count()
        with rig.memory.remap() as moved:
            start = _start(rig, moved)
            rig.backend.update_vaddr(rig.at(0), start, 4 * rig.pgsize)
            rig.backend.update_vaddr(rig.at(8), start + 8 * rig.pgsize, 2 * rig.pgsize)
            rig.check()
            rig.finish()

    def test_a_range_is_invalidated_alone(self, rig: Rig) -> None:
        needs(rig, "vaddr")
        rig.map(0, 4)
        rig.map(8, 4)
        assert rig.backend.invalidate_vaddr(rig.at(8), 4 * rig.pgsize) == 4 * rig.pgsize
        rig.refused(_WRONG, rig.backend.update_vaddr, rig.at(0), rig.vaddr(), 4 * rig.pgsize)
        rig.backend.update_vaddr(rig.at(8), rig.vaddr(), 4 * rig.pgsize)

    def test_nothing_is_invalidated_twice(self, rig: Rig) -> None:
        needs(rig, "vaddr")
        rig.map(0)
        rig.map(2)
        rig.backend.invalidate_vaddr(rig.at(2), rig.pgsize)
        rig.refused(errno.EINVAL, rig.backend.invalidate_vaddr)
        rig.refused(_WRONG, rig.backend.update_vaddr, rig.at(0), rig.vaddr(), rig.pgsize)
        rig.backend.update_vaddr(rig.at(2), rig.vaddr(), rig.pgsize)

    def test_an_update_fits_a_mapping_exactly(self, rig: Rig) -> None:
        needs(rig, "vaddr")
        rig.map(4, 4)
        rig.backend.invalidate_vaddr()
        for page, npages in [(4, 3), (5, 3), (4, 5), (3, 5), (0, 1), (4, 0)]:
            rig.refused(_WRONG, rig.backend.update_vaddr, rig.at(page), rig.vaddr(), npages * rig.pgsize)
        rig.refused(errno.EINVAL, rig.backend.update_vaddr, rig.at(4), rig.vaddr() + 1, 4 * rig.pgsize)
        rig.backend.update_vaddr(rig.at(4), rig.vaddr(), 4 * rig.pgsize)
        rig.refused(_WRONG, rig.backend.update_vaddr, rig.at(4), rig.vaddr(), 4 * rig.pgsize)

    def test_a_mapping_can_go_while_it_is_invalid(self, rig: Rig) -> None:
        needs(rig, "vaddr")
        rig.map(0)
        rig.map(2)
        assert rig.backend.invalidate_vaddr() == 2 * rig.pgsize
        rig.unmap(0)
        rig.map(0)
        rig.backend.update_vaddr(rig.at(2), rig.vaddr(), rig.pgsize)
        rig.check()

    def test_a_list_of_updates_is_done_as_a_whole(self, rig: Rig) -> None:
        needs(rig, "vaddr")
        for n in range(16):
            rig.map(2 * n)
        rig.backend.invalidate_vaddr()
        rows = np.array([[rig.at(2 * n), rig.vaddr(n), rig.pgsize] for n in range(16)], np.uint64)
        wrong = rows.copy()
        wrong[9, 0] = rig.at(99)
        rig.refused(_WRONG, rig.backend.update_vaddr_many, wrong)
        rig.backend.update_vaddr_many(rows)
        assert rig.backend.invalidate_vaddr() == 16 * rig.pgsize, "all of them were valid again"
        rig.backend.update_vaddr_many(rows)

    def test_devices_reach_the_memory_all_the_while(self) -> None:
        backend = self.open_backend()
        rig = Rig(backend)
        try:
            needs(rig, "vaddr")
            with self.dma_of(backend) as dma, rig.memory.remap() as moved:
                start = _start(rig, moved)
                rig.map(0, 4)
                rig.write(0, b"before the move")
                backend.invalidate_vaddr()
                dma.copy(rig.at(0), rig.at(1), 15)
                backend.update_vaddr(rig.at(0), start, 4 * rig.pgsize)
                rig.write(2, b"after the move")
                dma.copy(rig.at(2), rig.at(3), 14)
                found = rig.read(1, 15), rig.read(3, 14)
                rig.finish()
            assert found == (b"before the move", b"after the move")
        finally:
            rig.close()

    def test_vaddrs_of_backends_without_the_feature_stay_valid(self, rig: Rig) -> None:
        if "vaddr" in rig.features:
            pytest.skip("this backend has it")
        rig.map(0, prot=Prot.READ)
        if hasattr(rig.backend, "invalidate_vaddr"):
            with pytest.raises(VfioError):
                rig.backend.invalidate_vaddr()
        rig.check()
