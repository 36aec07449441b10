"""Address spaces over mappings that are there already, and containers that are given away."""
import contextlib
import os

import numpy as np
import pytest
from fake_backend import FakeBackend

from vfiodma import GuestMemory, IoAddressSpace, SoftwareGroup, SoftwareVfio, open_backend
from vfiodma._core.maprows import check_rows, place_rows, split_entries
from vfiodma.backends import adopt_backend
from vfiodma.backends.iommufd import IommufdContainer
from vfiodma.backends.type1 import Type1Container
from vfiodma.errors import BusyError, ClosedError, OverlapError, ProtocolError, UnsupportedError, VfioError
from vfiodma.liveupdate import preflight

PAGE = 4096


class Given(FakeBackend):
    """Another process mapped it all; it can be let go."""

    let = False

    def let_go(self):
        self.let = True


def entries(memory, count, tag=3):
    at = np.arange(count, dtype=np.uint64) * np.uint64(PAGE)
    return np.column_stack((at * np.uint64(2), at + np.uint64(memory.region.vaddr), np.full(count, PAGE, np.uint64),
                            np.full(count, tag, np.uint64)))


def test_nothing_is_mapped_and_everything_works():
    backend = Given()
    with GuestMemory.memfd(8 * PAGE) as memory:
        rows = entries(memory, 4)
        rows[3, 3] = 4 | 1
        backend.mapped = {iova: (vaddr, size, prot & 3) for iova, vaddr, size, prot in rows.tolist()}
        before = dict(backend.mapped)
        with IoAddressSpace.adopt(backend, rows, keep=memory.region, close_backend=True) as ioas:
            assert backend.mapped == before and len(ioas) == 4
            assert ioas.translate(2 * PAGE + 5) == memory.region.vaddr + PAGE + 5
            assert ioas.iovas_of(memory.region.vaddr) == [0]
            assert [m.iova for m in ioas.mappings(mmio=True)] == [6 * PAGE]
            with pytest.raises(BusyError):
                memory.close()
            with pytest.raises(OverlapError):
                ioas.map(memory, 0)
            assert ioas.map(memory, size=PAGE, align=PAGE).iova in (PAGE, 3 * PAGE, 5 * PAGE, 7 * PAGE)
            ioas.unmap(2 * PAGE)
            ioas.unmap_all()
        assert backend.mapped == {} and backend.closed


def test_entries_that_can_not_be_are_refused_and_memory_is_let_go():
    with GuestMemory.memfd(8 * PAGE) as memory:
        for change in (lambda rows: rows[::-1], lambda rows: np.vstack((rows, rows[:1])),
                       lambda rows: rows + np.array([1 << 40, 0, 0, 0], np.uint64),
                       lambda rows: rows & ~np.array([0, 0, 0, 3], np.uint64),
                       lambda rows: rows | np.array([0, 0, 0, 8], np.uint64)):
            rows = np.ascontiguousarray(change(entries(memory, 4)))
            with pytest.raises(VfioError):
                IoAddressSpace.adopt(Given(), rows, keep=memory.region)
            memory.region.remap().close()


def test_nothing_at_all_can_be_adopted():
    with IoAddressSpace.adopt(Given(), (), close_backend=True) as ioas:
        assert len(ioas) == 0


def test_letting_go_unmaps_nothing_and_frees_the_memory():
    backend, told = Given(), []
    ioas = IoAddressSpace(backend, close_backend=True)
    memory = GuestMemory.memfd(4 * PAGE)
    ioas.map(memory, 0)
    ioas.add_listener(unmapped=told.append)
    with ioas.pin(0, PAGE), pytest.raises(BusyError):
        ioas.let_go()
    ioas.let_go()
    assert ioas.closed and backend.let and backend.mapped and not told and not backend.closed
    memory.close()
    ioas.close()
    assert backend.mapped
    with pytest.raises(ClosedError):
        ioas.let_go()


def test_rows_are_buffers_of_uint64_of_the_right_shape():
    rows = np.array([[0, 0, PAGE, 3]], np.uint64)
    sizes = np.array([PAGE], np.uint64)
    assert check_rows(rows, sizes, PAGE) == (PAGE, PAGE)
    assert place_rows(rows, np.array([0x7000], np.uint64)).tolist() == [[0, 0x7000, PAGE, 3]]
    for wrong in (rows.astype(np.int64), rows[:, :3].copy(), rows[0], b"abc", None):
        for call in (lambda w: check_rows(w, sizes, PAGE), lambda w: place_rows(w, sizes), split_entries):
            with pytest.raises((TypeError, ValueError, BufferError)):
                call(wrong)
    with pytest.raises(ProtocolError, match="mapping 0 leads to no region"):
        check_rows(rows, sizes[:0], PAGE)


# ---- containers

def test_a_software_container_says_that_it_can_not_go():
    system = SoftwareVfio("7.2", [SoftwareGroup(0, ["0000:00:10.0"])], memlock_limit=None)
    with Type1Container(["0000:00:10.0"], system=system) as container, pytest.raises(UnsupportedError):
        container.hand_over()
    with IommufdContainer(["0000:00:10.0"], system=system) as container, pytest.raises(UnsupportedError):
        container.hand_over()


@pytest.mark.parametrize("name, state", [
    ("type1", {"groups": ["/dev/vfio/0"], "members": {}, "held": 0, "iommu_type": 3}), ("type1", {}), ("type1", None),
    ("type1", {"groups": ["/dev/vfio/0"], "members": {"x": "/dev/vfio/1"}, "held": 0, "iommu_type": 3}),
    ("type1", {"groups": [], "members": {}, "held": 1, "iommu_type": 3}),
    ("type1", {"groups": ["a"], "members": {}, "held": "1", "iommu_type": 3}), ("iommufd", {}), ("iommufd", None),
    ("iommufd", {"devices": {"x": 1}, "ioas": 1, "hwpts": [], "pgsizes": 4096}),
    ("iommufd", {"devices": {"x": "y"}, "ioas": 1, "hwpts": [], "pgsizes": 4096}),
    ("iommufd", {"devices": {"x": 1, "z": 2}, "ioas": 1, "hwpts": [], "pgsizes": 4096}),
    ("iommufd", {"devices": {"x": 1}, "ioas": 1, "hwpts": [[1]], "pgsizes": 4096})])
def test_what_is_no_container_is_not_adopted_and_its_descriptors_are_closed(name, state):
    fds = [os.memfd_create("x"), os.memfd_create("y")]
    with pytest.raises(VfioError):
        adopt_backend(name, state, fds)
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)


def test_an_unknown_backend_is_not_adopted():
    with pytest.raises(ProtocolError, match="can't be adopted"):
        adopt_backend("other", {}, [])


# ---- memory mapped by file

@pytest.fixture
def container():
    system = SoftwareVfio("7.2", [SoftwareGroup(0, ["0000:00:10.0"])], memlock_limit=None)
    with IommufdContainer(["0000:00:10.0"], system=system) as opened:
        yield opened


def test_shared_memory_is_mapped_by_file_where_the_kernel_can(container):
    with GuestMemory.memfd(8 * PAGE) as memory, GuestMemory.memfd(PAGE) as second, IoAddressSpace(container) as ioas:
        ioas.map(memory, 0)
        ioas.map(memory.region[2 * PAGE:4 * PAGE], 0x100000, offset=PAGE, size=PAGE)
        both = GuestMemory()
        for at, region in enumerate((second.region.remap(), second.region.remap())):
            both.add(region, at * PAGE)
        ioas.map_memory(both, 0x200000)
        container.change_process()                      # EINVAL if one of them were mapped by address
        memory.write(3 * PAGE, b"behind")
        second.write(0, b"second")
        ioas.unmap(0)
        assert ioas.read(0x100000, 6) == b"behind" and ioas.read(0x201000, 6) == b"second"
        with contextlib.closing(GuestMemory.anonymous(PAGE)) as other:
            ioas.map(other, 0x300000)
            with pytest.raises(VfioError):
                container.change_process()
            report = preflight(ioas, memory)
            assert "mapped by file" in [finding.topic for finding in report.findings if not finding.ok]
            ioas.unmap(0x300000)
        container.change_process()
        ioas.unmap_all()
        both.close()


def test_a_mapping_by_file_that_fails_leaves_nothing(container):
    with GuestMemory.memfd(4 * PAGE) as memory, IoAddressSpace(container) as ioas:
        with GuestMemory() as both:
            both.add(memory.region.remap(), 0)
            both.add(memory.region.remap(), 1 << 63)            # out of the IOMMU's reach
            with pytest.raises(VfioError):
                ioas.map_memory(both)
        assert len(ioas) == 0 and container.areas() == [] and not ioas.allocator.allocations()


def test_memory_is_mapped_by_address_where_the_kernel_knows_no_files():
    for options in ({"kernel": "6.12"}, {"kernel": "7.2", "by_file": False}):
        kernel, system = options.pop("kernel"), None
        system = SoftwareVfio(kernel, [SoftwareGroup(0, ["0000:00:10.0"])], memlock_limit=None)
        with open_backend("iommufd", devices=["0000:00:10.0"], system=system, **options) as backend, \
                GuestMemory.memfd(PAGE) as memory, IoAddressSpace(backend) as ioas:
            ioas.map(memory, 0)
            assert "map_file" not in ioas.capabilities.features
            with pytest.raises(VfioError):
                backend.change_process()
            ioas.unmap_all()


def test_areas_that_another_process_mapped_are_noted(container):
    rows = np.array([[0, 0, PAGE, 3], [4 * PAGE, 0, 2 * PAGE, 3]], np.uint64)
    container.note_areas(rows)
    assert container.areas() == [(0, PAGE), (4 * PAGE, 2 * PAGE)]
    with pytest.raises(VfioError):
        container.note_areas(rows[1:])
