"""What a device reaches: bytes arrive where they are mapped, and nowhere else."""
import errno
import os
from typing import Any

import pytest

from ...types import Prot
from ..rig import Rig
from .base import BackendDma, Checks

_SIZE = 64


class DmaChecks(Checks):
    """DMA by a device of the backend."""

    def test_bytes_arrive_where_they_are_mapped(self, rig: Rig, dma: Any) -> None:
        data = os.urandom(_SIZE)
        rig.map(0, memory=5)
        rig.map(40, 2, memory=11)
        rig.write(5, data, offset=100)
        dma.copy(rig.at(0) + 100, rig.at(41) + 7, _SIZE)
        assert rig.read(12, _SIZE, 7) == data
        assert not any(rig.read(11, rig.pgsize)) and not any(rig.read(12, rig.pgsize - 71, 71))

    def test_a_copy_crosses_from_one_mapping_to_its_neighbour(self, rig: Rig, dma: Any) -> None:
        data = os.urandom(_SIZE)
        for page, memory in [(0, 9), (1, 2), (2, 30), (3, 8)]:
            rig.map(page, memory=memory)
        rig.write(9, data[:20], offset=rig.pgsize - 20)
        rig.write(2, data[20:])
        dma.copy(rig.at(1) - 20, rig.at(3) - 50, _SIZE)
        assert rig.read(30, 50, rig.pgsize - 50) + rig.read(8, _SIZE - 50) == data

    def test_what_the_process_writes_later_is_seen(self, rig: Rig, dma: Any) -> None:
        rig.map(0, 2)
        for _ in range(2):
            data = os.urandom(_SIZE)
            rig.write(0, data)
            dma.copy(rig.at(0), rig.at(1), _SIZE)
            assert rig.read(1, _SIZE) == data

    def test_nothing_arrives_after_an_unmap(self, rig: Rig, dma: Any) -> None:
        rig.map(0)
        rig.map(8, 2, memory=8)
        rig.write(0, os.urandom(_SIZE))
        dma.copy(rig.at(0), rig.at(8), _SIZE)
        assert rig.read(8, _SIZE) == rig.read(0, _SIZE)
        rig.unmap(8, 2)
        rig.write(0, os.urandom(_SIZE))
        rig.write(8, b"untouched")
        dma.copy(rig.at(0), rig.at(8), _SIZE)
        assert rig.read(8, 9) == b"untouched"

    def test_nothing_is_read_after_an_unmap(self, rig: Rig, dma: Any) -> None:
        rig.map(1, memory=1)
        rig.map(8, memory=8)
        rig.unmap(8)
        secret = os.urandom(_SIZE)
        rig.write(8, secret)
        dma.copy(rig.at(8), rig.at(1), _SIZE)
        assert rig.read(1, _SIZE) != secret

    def test_a_mapping_for_reading_is_not_written(self, rig: Rig, dma: Any) -> None:
        rig.map(0)
        rig.map(8, memory=8, prot=Prot.READ)
        rig.map(9, memory=1)
        data = os.urandom(_SIZE)
        rig.write(0, os.urandom(_SIZE))
        rig.write(8, data)
        dma.copy(rig.at(0), rig.at(8), _SIZE)
        assert rig.read(8, _SIZE) == data
        dma.copy(rig.at(8), rig.at(9), _SIZE)
        assert rig.read(1, _SIZE) == data

    def test_a_mapping_for_writing_alone_is_written(self, rig: Rig, dma: Any) -> None:
        if isinstance(dma, BackendDma):
            pytest.skip("an emulated device writes to what it can read too")
        rig.map(0)
        rig.map(8, memory=8, prot=Prot.WRITE)
        rig.write(0, os.urandom(_SIZE))
        dma.copy(rig.at(0), rig.at(8), _SIZE)
        assert rig.read(8, _SIZE) == rig.read(0, _SIZE)

    def test_a_place_mapped_anew_leads_to_the_new_memory(self, rig: Rig, dma: Any) -> None:
        """No translation of before is left in the IOMMU."""
        rig.map(0)
        for memory in (8, 9):
            rig.map(8, memory=memory)
            rig.write(0, bytes([memory]) * _SIZE)
            dma.copy(rig.at(0), rig.at(8), _SIZE)
            rig.unmap(8)
        assert rig.read(8, _SIZE) == b"\x08" * _SIZE and rig.read(9, _SIZE) == b"\x09" * _SIZE

    def test_a_refused_mapping_is_not_reached(self, rig: Rig, dma: Any) -> None:
        rig.map(0, 2)
        rig.map(8, 1, memory=8)
        rig.write(0, os.urandom(_SIZE))
        rig.refused(errno.EEXIST, rig.backend.map_dma, rig.at(7), rig.vaddr(20), 2 * rig.pgsize, Prot.RW)
        dma.copy(rig.at(0), rig.at(7), _SIZE)
        dma.copy(rig.at(0), rig.at(8), _SIZE)
        assert not any(rig.read(20, 2 * rig.pgsize))
        assert rig.read(8, _SIZE) == rig.read(0, _SIZE)
