"""Limits: of mappings, of locked memory."""
import errno

import numpy as np
import pytest

from ...errors import DmaLimitError, LockedMemoryError
from ...types import Prot
from ..memlock import locked_memory_limit
from ..rig import Rig
from .base import Checks, needs

_MOST = 70000                   # more entries than this are not used up by a test


class LimitChecks(Checks):
    """Beyond a limit nothing is mapped, and below it everything is again."""

    def test_the_number_of_mappings_left_is_told(self, rig: Rig) -> None:
        if rig.entries is None:
            pytest.skip("this backend does not tell how many mappings are left")
        for count in range(1, 5):
            rig.map(count)
            assert rig.backend.capabilities().dma_avail == rig.entries - count

    def test_one_mapping_too_many_is_enospc(self, rig: Rig) -> None:
        if rig.entries is None or rig.entries > _MOST:
            pytest.skip("this backend has no limit of mappings, or a high one")
        needs(rig, "map_many")
        start, last = max(rig.backend.iova_ranges() or [(0, (1 << 64) - 1)], key=lambda pair: pair[1] - pair[0])
        base = max(rig.iova, -(-start // rig.pgsize) * rig.pgsize)
        if base + 2 * rig.pgsize * rig.entries > last:
            pytest.skip("there are more mappings than places")
        rows = np.empty((rig.entries, 4), np.uint64)
        rows[:, 0] = base + np.arange(rig.entries, dtype=np.uint64) * np.uint64(2 * rig.pgsize)
        rows[:, 1:] = rig.vaddr(), rig.pgsize, Prot.RW
        rig.backend.map_many(rows)
        final = int(rows[-1, 0])
        assert rig.backend.capabilities().dma_avail == 0
        with pytest.raises(DmaLimitError) as caught:
            rig.backend.map_dma(base + rig.pgsize, rig.vaddr(), rig.pgsize, Prot.RW)
        assert caught.value.errno == errno.ENOSPC and caught.value.hint
        assert rig.backend.unmap_dma(final, rig.pgsize) == rig.pgsize
        rig.backend.map_dma(base + rig.pgsize, rig.vaddr(), rig.pgsize, Prot.RW)
        assert rig.backend.unmap_dma(base, final - base) == rig.entries * rig.pgsize

    def test_more_locked_memory_than_allowed_is_enomem(self, rig: Rig) -> None:
        if not self.charges_locked_memory:
            pytest.skip("this backend does not charge for locked memory")
        rig.map(0)
        with locked_memory_limit(4 * rig.pgsize):
            found = rig.refused(errno.ENOMEM, rig.backend.map_dma, rig.at(8), rig.vaddr(), 32 * rig.pgsize, Prot.RW)
            assert isinstance(found, LockedMemoryError) and isinstance(found, MemoryError)
            assert "RLIMIT_MEMLOCK" in str(found)
            rig.check_page(rig.at(8))
            for turn in range(4):               # what was not mapped is not charged
                rig.map(8, 2, memory=turn)
                rig.unmap(8, 2)
        rig.map(8, 32)
        rig.check()
