"""Opening, what a backend tells of itself, closing."""
from typing import Any

import pytest

from ...errors import ClosedError
from ...types import Capabilities, Prot
from ..rig import Rig
from .base import Checks

_METHODS = {"map_many": ["map_many"], "unmap_all": ["unmap_all"], "dma": ["dma_read", "dma_write"],
            "vaddr": ["invalidate_vaddr", "update_vaddr", "update_vaddr_many"],
            "dirty": ["start_dirty", "read_dirty", "stop_dirty"]}


class LifecycleChecks(Checks):
    """A backend is opened, asked, closed."""

    def test_capabilities_make_sense(self, backend: Any) -> None:
        found = backend.capabilities()
        assert isinstance(found, Capabilities)
        assert found.backend
        assert found.pgsizes > 0 and found.min_pgsize & (found.min_pgsize - 1) == 0
        assert found.dma_avail is None or found.dma_avail > 0
        if found.dma_avail is not None and found.dma_entry_limit is not None:
            assert found.dma_avail <= found.dma_entry_limit
        assert found == backend.capabilities(), "asking changes nothing"

    def test_a_feature_comes_with_its_methods(self, backend: Any) -> None:
        for feature in backend.capabilities().features:
            for method in _METHODS.get(feature, ()):
                assert callable(getattr(backend, method)), f"{feature} without {method}"

    def test_iova_ranges_ascend_and_hold_pages(self, backend: Any) -> None:
        pgsize, end = backend.capabilities().min_pgsize, 0
        for start, last in backend.iova_ranges():
            assert end <= start <= last < 1 << 64
            assert last - start + 1 >= pgsize
            end = last + 1

    def test_closing_is_idempotent(self, backend: Any) -> None:
        backend.close()
        backend.close()

    def test_a_closed_backend_refuses_with_ebadf(self, rig: Rig) -> None:
        rig.map(0)
        rig.close_backend()
        for call, args in [(rig.backend.map_dma, (rig.at(1), rig.vaddr(), rig.pgsize, Prot.RW)),
                           (rig.backend.unmap_dma, (rig.at(0), rig.pgsize))]:
            with pytest.raises(ClosedError):
                call(*args)

    def test_closing_removes_every_mapping(self) -> None:
        for _ in range(2):
            backend = self.open_backend()
            rig = Rig(backend)
            try:
                rig.map(0, 8)
                rig.map(16)
            finally:
                rig.close()

    def test_the_end_of_a_with_block_closes(self) -> None:
        backend = self.open_backend()
        if not hasattr(backend, "__exit__"):
            backend.close()
            pytest.skip("this backend is no context manager")
        rig = Rig(backend)
        with backend:
            pass
        with pytest.raises(ClosedError):
            backend.map_dma(rig.at(0), rig.vaddr(), rig.pgsize, Prot.RW)
        rig.close()
