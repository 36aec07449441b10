"""Memory regions and guest memory: where the bytes are, who shares them, when they may go."""
import errno
import fcntl
import gc
import mmap
import os
import warnings

import pytest

from vfiodma import errors
from vfiodma.memory import GuestMemory, MemoryRegion
from vfiodma.types import Prot

PAGE = mmap.PAGESIZE
BAD_SIZES = [0, -PAGE, 1, PAGE + 1, 1 << 63, 1 << 64, 1 << 80]


def huge_page_error_or_memory(size):
    try:
        return GuestMemory.hugetlb(size)
    except errors.VfioError as exc:
        return exc


@pytest.mark.parametrize("make", [GuestMemory.anonymous, GuestMemory.memfd])
def test_bytes_written_by_guest_address_are_at_the_vaddr(make):
    from vfiodma._core.memory import read_memory
    with make(4 * PAGE) as memory:
        memory.write(PAGE - 2, b"abcd")
        assert read_memory(memory.region.vaddr + PAGE - 2, 4) == b"abcd"
        assert memory.read(PAGE - 2, 4) == b"abcd"


@pytest.mark.parametrize("size", BAD_SIZES)
@pytest.mark.parametrize("make", [GuestMemory.anonymous, GuestMemory.memfd, GuestMemory.hugetlb])
def test_size_that_is_not_whole_pages_is_refused(make, size):
    with pytest.raises(errors.InvalidArgumentError) as caught:
        make(size)
    assert caught.value.errno == errno.EINVAL and caught.value.size == size


@pytest.mark.parametrize("size", [None, "4096", 4096.0, True])
def test_size_of_wrong_type_is_a_type_error(size):
    with pytest.raises(TypeError):
        GuestMemory.anonymous(size)


def test_memfd_is_sealed_against_a_change_of_size_and_closed_on_exec():
    with GuestMemory.memfd(PAGE) as memory:
        fd = memory.region.fd
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW) == \
            fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    with GuestMemory.memfd(PAGE, seal=False) as memory:
        os.ftruncate(memory.region.fd, 2 * PAGE)


def test_remap_shows_the_same_bytes_at_another_address():
    with GuestMemory.memfd(2 * PAGE) as memory, memory.remap() as moved:
        assert moved.region.vaddr != memory.region.vaddr
        memory.write(5, b"same")
        assert moved.read(5, 4) == b"same"


def test_remap_of_a_slice_begins_at_its_offset():
    with GuestMemory.memfd(4 * PAGE) as memory:
        memory.write(2 * PAGE, b"third page")
        with memory.region[2 * PAGE:] as part, part.remap() as moved:
            assert part.vaddr == memory.region.vaddr + 2 * PAGE and moved.size == 2 * PAGE
            assert bytes(moved.view()[:10]) == b"third page"


def test_anonymous_memory_has_no_second_address():
    with GuestMemory.anonymous(PAGE) as memory, pytest.raises(errors.UnsupportedError) as caught:
        memory.remap()
    assert caught.value.errno == errno.EOPNOTSUPP


def test_region_stays_open_while_a_view_or_slice_of_it_lives():
    with GuestMemory.memfd(2 * PAGE) as memory:
        view = memory.region.view()
        part = memory.region[PAGE:]
        for _ in range(2):
            with pytest.raises(errors.BusyError) as caught:
                memory.close()
            assert caught.value.errno == errno.EBUSY and not memory.region.closed
            view.release()
        part.close()
        part.close()


def test_closed_region_is_ebadf_and_close_is_idempotent():
    region = GuestMemory.memfd(PAGE).region
    region.close()
    region.close()
    for use in (region.view, region.remap, lambda: region[0:PAGE]):
        with pytest.raises(errors.ClosedError) as caught:
            use()
        assert caught.value.errno == errno.EBADF


def test_close_gives_descriptors_back():
    def descriptors():
        return len(os.listdir("/proc/self/fd"))
    before = descriptors()
    with GuestMemory.memfd(PAGE) as memory, memory.remap():
        assert descriptors() > before
    assert descriptors() == before


def test_forgotten_region_warns():
    memory = GuestMemory.memfd(PAGE)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        del memory
        gc.collect()
    assert [w.category for w in seen] == [ResourceWarning]


def in_child(check):
    """Run a check in a forked child; return its exit status."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            status = 0 if check() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_fork_shares_shared_memory_and_leaves_anonymous_memory_out():
    from vfiodma._core.memory import read_memory
    with GuestMemory.memfd(PAGE) as shared, GuestMemory.anonymous(PAGE) as private:
        def write_and_look():
            shared.write(0, b"child")
            try:
                read_memory(private.region.vaddr, 1)
            except errors.MemoryFaultError:
                return True
            return False
        private.write(0, b"x")
        assert in_child(write_and_look) == 0
        assert shared.read(0, 5) == b"child"


def test_file_memory_is_the_file(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"\0" * (2 * PAGE + 100))
    with GuestMemory.file(path) as memory:
        assert memory.size == 2 * PAGE
        memory.write(PAGE, b"stored")
    assert path.read_bytes()[PAGE:PAGE + 6] == b"stored"
    with GuestMemory.file(path, PAGE, offset=PAGE, prot=Prot.READ) as memory:
        assert memory.read(0, 6) == b"stored" and memory.region.view().readonly
        with pytest.raises(errors.DmaPermissionError):
            memory.write(0, b"x")


def test_file_that_is_too_short_or_missing_is_refused(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"x")
    for size in (None, PAGE):
        with pytest.raises(errors.InvalidArgumentError):
            GuestMemory.file(path, size)
    with pytest.raises(FileNotFoundError):
        GuestMemory.file(tmp_path / "missing")


def test_hugetlb_works_or_names_the_sysctl():
    result = huge_page_error_or_memory(2 << 20)
    if isinstance(result, GuestMemory):
        with result as memory:
            memory.write(0, b"huge")
            assert memory.region.pgsize == 2 << 20
    else:
        assert "vm.nr_hugepages" in str(result) and result.errno == errno.ENOMEM


def test_hugetlb_error_tells_the_number_to_set():
    result = huge_page_error_or_memory(1 << 50)
    assert isinstance(result, errors.LockedMemoryError)
    assert f"{(1 << 50) // (2 << 20)} huge pages" in str(result) and "sysctl vm.nr_hugepages=" in str(result)


def test_device_memory_is_marked(tmp_path):
    with GuestMemory.memfd(PAGE) as bar, GuestMemory.device(bar.region.fd, PAGE) as memory:
        assert memory.region.mmio and memory.region.kind == "device" and memory.region[0:PAGE].mmio


def test_closed_descriptor_is_ebadf():
    with pytest.raises(errors.ClosedError) as caught:
        MemoryRegion.from_fd(1 << 30, PAGE)
    assert caught.value.errno == errno.EBADF


def test_layout_is_ordered_and_disjoint():
    memory = GuestMemory()
    low, high = GuestMemory.memfd(2 * PAGE).region, GuestMemory.memfd(PAGE).region
    with memory:
        memory.add(high, 1 << 32)
        memory.add(low, 0)
        assert [gpa for gpa, _ in memory] == [0, 1 << 32] and memory.size == 3 * PAGE
        spare = GuestMemory.memfd(2 * PAGE).region
        with spare:
            for gpa, number in ((PAGE, errno.EEXIST), ((1 << 32) - PAGE, errno.EEXIST), (1, errno.EINVAL),
                                (-PAGE, errno.EINVAL), ((1 << 64) - PAGE, errno.EINVAL)):
                with pytest.raises(errors.VfioError) as caught:
                    memory.add(spare, gpa)
                assert (caught.value.errno, caught.value.iova, caught.value.size) == (number, gpa, 2 * PAGE)
            assert len(memory) == 2
        assert memory.find((1 << 32) + 5) == (high, 5)
        with pytest.raises(errors.NotMappedError):
            memory.find(2 * PAGE)
    with pytest.raises(TypeError):
        memory.add(b"bytes", 0)


def test_access_crosses_adjacent_regions_and_stops_at_holes_before_writing():
    with GuestMemory() as memory:
        memory.add(GuestMemory.memfd(PAGE).region, 0)
        memory.add(GuestMemory.memfd(PAGE).region, PAGE)
        memory.write(PAGE - 3, b"crossing")
        assert memory.read(PAGE - 3, 8) == b"crossing"
        with pytest.raises(errors.NotMappedError):
            memory.write(2 * PAGE - 1, b"xy")
        assert memory.read(2 * PAGE - 1, 1) == b"\0"


def test_region_of_a_larger_layout_is_ambiguous():
    with GuestMemory() as memory, pytest.raises(errors.InvalidArgumentError):
        _ = memory.region
