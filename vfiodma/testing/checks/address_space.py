"""An IoAddressSpace on the backend."""
import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ...address_space import IoAddressSpace
from ...errors import ForkedError, OverlapError, VfioError
from ...memory import GuestMemory, MemoryRegion
from ...types import Prot
from ..faults import EveryFailure
from ..rig import PAGES, Rig
from .base import Checks

_LARGE = 65536


def state(ioas: IoAddressSpace) -> Any:
    """Return all that a failed call must leave as it was."""
    return ioas.mappings(), ioas.allocator.allocations(), ioas.backend.capabilities().dma_avail


def _steps(ioas: IoAddressSpace, memory: MemoryRegion) -> list[Callable[[], Any]]:
    page, base = ioas.pgsize, ioas.allocator.allocate(8 * ioas.pgsize)
    ioas.allocator.free(base)
    rows = [[base + n * page, memory.vaddr, page, Prot.RW] for n in range(4)]
    return [lambda: ioas.map_many(rows), lambda: ioas.map(memory, size=4 * page), lambda: ioas.unmap(base, 2 * page),
            lambda: ioas.unmap_all()]


class AddressSpaceChecks(Checks):
    """Allocate, map, translate, roll back, fork."""

    @pytest.fixture
    def ioas(self, backend: Any) -> Iterator[IoAddressSpace]:
        """An address space on the backend."""
        with IoAddressSpace(backend, close_backend=True) as ioas:
            yield ioas

    @pytest.fixture
    def memory(self) -> Iterator[MemoryRegion]:
        """Memory that begins at a page of any size up to 64 KiB, closed after the backend."""
        with GuestMemory.memfd((PAGES + 1) * _LARGE) as memory:
            skip = -memory.region.vaddr % _LARGE
            with memory.region[skip:skip + PAGES * _LARGE] as region:
                yield region

    def test_a_mapping_is_found_by_both_addresses(self, memory: MemoryRegion, ioas: IoAddressSpace) -> None:
        mapping = ioas.map(memory)
        assert mapping.iova % ioas.pgsize == 0 and mapping.size == memory.size
        for offset in (0, 1, memory.size - 1):
            assert ioas.translate(mapping.iova + offset) == mapping.vaddr + offset
        assert ioas.iovas_of(mapping.vaddr + 5) == [mapping.iova + 5]
        ioas.write(mapping.iova + 3, b"through")
        with memory.view() as view:
            assert bytes(view[3:10]) == b"through" == ioas.read(mapping.iova + 3, 7)
        assert ioas.unmap(mapping.iova) == mapping.size
        assert ioas.get(mapping.iova) is None

    def test_allocated_iovas_lie_in_the_ranges(self, memory: MemoryRegion, ioas: IoAddressSpace) -> None:
        ranges = ioas.backend.iova_ranges() or [(0, (1 << 64) - 1)]
        for turn in range(24):
            mapping = ioas.map(memory, size=ioas.pgsize * (1 + turn % 5), top_down=bool(turn % 2))
            assert any(start <= mapping.iova and mapping.iova + mapping.size - 1 <= last for start, last in ranges)
        assert ioas.unmap_all() == sum(ioas.pgsize * (1 + turn % 5) for turn in range(24))

    def test_a_fixed_iova_is_taken_once(self, memory: MemoryRegion, ioas: IoAddressSpace) -> None:
        mapping = ioas.map(memory, size=4 * ioas.pgsize)
        before = state(ioas)
        with pytest.raises(OverlapError):
            ioas.map(memory, mapping.iova + ioas.pgsize, size=ioas.pgsize)
        assert state(ioas) == before

    def test_memory_that_can_not_be_mapped_leaves_nothing(self, ioas: IoAddressSpace) -> None:
        if not self.pins_memory:
            pytest.skip("this backend does not look at memory when it is mapped")
        before = state(ioas)
        with pytest.raises(VfioError) as caught:
            ioas.map(ioas.pgsize, size=ioas.pgsize)             # an address where nothing is
        assert caught.value.errno == errno.EFAULT
        assert state(ioas) == before

    def test_a_list_with_a_bad_entry_is_rolled_back(self, backend: Any, ioas: IoAddressSpace) -> None:
        rig = Rig(backend)
        try:
            rows = [[rig.at(2 * n), rig.vaddr(n), rig.pgsize, Prot.RW] for n in range(16)]
            before = state(ioas)
            with pytest.raises(VfioError):
                ioas.map_many([*rows, [rig.at(8), rig.vaddr(), rig.pgsize, Prot.RW]])
            if self.pins_memory:
                with pytest.raises(VfioError):
                    ioas.map_many([*rows, [rig.at(99), rig.pgsize, rig.pgsize, Prot.RW]])
            assert state(ioas) == before
            ioas.map_many(rows)
            assert ioas.unmap_all() == 16 * rig.pgsize
        finally:
            ioas.close()
            rig.close()

    def test_whichever_call_fails_everything_is_undone(self, memory: MemoryRegion) -> None:
        for fail in EveryFailure():
            backend = fail.wrap(self.open_backend())
            with IoAddressSpace(backend, close_backend=True) as ioas:
                for step in _steps(ioas, memory):
                    before = state(ioas)
                    with fail.expected() as expected:
                        step()
                    if expected.failed:
                        assert state(ioas) == before
                        step()                  # only one call failed
                backend.fail_at = None          # closing is no part of it
        assert fail.rounds >= 4

    def test_a_device_reaches_what_is_mapped(self, memory: MemoryRegion, ioas: IoAddressSpace) -> None:
        with self.dma_of(ioas.backend) as dma:
            page, limit = ioas.pgsize, min(dma.dma_limit, 1 << 64) - 1
            source = ioas.map(memory, size=page, prot=Prot.READ, limit=limit)
            target = ioas.map(memory, offset=_LARGE, size=page, limit=limit)
            data = os.urandom(100)
            with memory.view() as view:
                view[10:110] = data
                dma.copy(source.iova + 10, target.iova + 20, 100)
                found = bytes(view[_LARGE + 20:_LARGE + 120])
                ioas.unmap(target.iova)
                view[_LARGE:_LARGE + 9] = b"untouched"
                dma.copy(source.iova + 10, target.iova, 100)
                late = bytes(view[_LARGE:_LARGE + 9])
        assert found == data and late == b"untouched"

    def test_a_forked_child_has_no_part_in_it(self, memory: MemoryRegion, ioas: IoAddressSpace) -> None:
        mapping = ioas.map(memory, size=4 * ioas.pgsize)
        before = state(ioas)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                try:
                    ioas.map(memory, size=ioas.pgsize)
                except ForkedError:
                    ioas.close()                # of the child's object: the parent's goes on
                    code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert state(ioas) == before
        assert ioas.unmap(mapping.iova) == 4 * ioas.pgsize
