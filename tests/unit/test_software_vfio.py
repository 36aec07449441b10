"""The raw door of the software VFIO beyond the recorded scenarios: descriptors, forks, threads, bad arguments."""
import ctypes
import errno
import gc
import mmap
import os
import struct
import threading

import numpy as np
import pytest

from vfiodma import GuestMemory, SoftwareGroup, SoftwareVfio, open_backend
from vfiodma._core.type1 import locked_pages
from vfiodma.errors import ClosedError, ForkedError, InvalidArgumentError, UnsupportedError, VfioError
from vfiodma.types import IovaRange
from vfiodma.uapi import vfio as abi

PAGE = 4096
IOVA = 0x1000000
KERNELS = ["5.4", "5.12", "6.1", "6.12", "7.2"]


@pytest.fixture
def memory():
    area = mmap.mmap(-1, 64 * PAGE)
    yield ctypes.addressof(ctypes.c_char.from_buffer(area))


def opened(vfio, number=0, kind=3):
    """Open a container with a group; return both descriptors."""
    container, group = vfio.open("/dev/vfio/vfio"), vfio.open(f"/dev/vfio/{number}")
    fd = ctypes.c_int(container)
    vfio.ioctl(group, abi.VFIO_GROUP_SET_CONTAINER, ctypes.addressof(fd))
    vfio.ioctl(container, abi.VFIO_SET_IOMMU, kind)
    return container, group


def failure(call, *args):
    with pytest.raises(OSError) as caught:
        call(*args)
    return caught.value.errno


def in_child(check):
    """Run `check` in a forked child; its exceptions fail the test."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            check()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("path", ["/dev/vfio/7", "/dev/vfio/", "/dev/vfio/00", "/dev/vfio/x", "/dev/null", "",
                                  "/dev/vfio/\u0661"])
def test_only_the_container_and_its_groups_can_be_opened(path):
    assert failure(SoftwareVfio().open, path) == errno.ENOENT


def test_descriptors_are_real_unique_and_closed_by_close():
    vfio = SoftwareVfio()
    fds = [vfio.open("/dev/vfio/vfio") for _ in range(3)]
    assert len(set(fds)) == 3
    for fd in fds:
        os.fstat(fd)
        assert not os.get_inheritable(fd)
        vfio.close(fd)
        assert failure(os.fstat, fd) == errno.EBADF
        assert failure(vfio.close, fd) == errno.EBADF


@pytest.mark.parametrize("fd", [-1, 0, 10**9, "x", None])
def test_a_foreign_descriptor_is_ebadf(fd):
    vfio = SoftwareVfio()
    for call in (lambda: vfio.ioctl(fd, abi.VFIO_GET_API_VERSION), lambda: vfio.close(fd), lambda: vfio.pread(fd, 1, 0),
                 lambda: vfio.pwrite(fd, b"", 0)):
        assert failure(call) == errno.EBADF


def test_a_real_descriptor_that_is_not_a_container_is_ebadfd():
    vfio = SoftwareVfio()
    group = vfio.open("/dev/vfio/0")
    with open("/dev/null") as null:
        fd = ctypes.c_int(null.fileno())
        assert failure(vfio.ioctl, group, abi.VFIO_GROUP_SET_CONTAINER, ctypes.addressof(fd)) == errno.EBADFD
    fd = ctypes.c_int(null_fd := 987654)
    assert null_fd and failure(vfio.ioctl, group, abi.VFIO_GROUP_SET_CONTAINER, ctypes.addressof(fd)) == errno.EBADF


@pytest.mark.parametrize("address", [0, 1, 0x10000, 0x7FFFFFFFF000, 1 << 47, 1 << 63, (1 << 64) - 1])
def test_a_bad_argument_address_is_efault_everywhere(address):
    vfio = SoftwareVfio()
    container, group = opened(vfio)
    for request in (abi.VFIO_IOMMU_GET_INFO, abi.VFIO_IOMMU_MAP_DMA, abi.VFIO_IOMMU_UNMAP_DMA,
                    abi.VFIO_IOMMU_DIRTY_PAGES):
        assert failure(vfio.ioctl, container, request, address) == errno.EFAULT
    for request in (abi.VFIO_GROUP_GET_STATUS, abi.VFIO_GROUP_SET_CONTAINER, abi.VFIO_GROUP_GET_DEVICE_FD):
        assert failure(vfio.ioctl, group, request, address) == errno.EFAULT


@pytest.mark.parametrize("argument", ["x", None, 1.5, b""])
def test_an_argument_that_is_no_integer_is_a_type_error(argument):
    vfio = SoftwareVfio()
    container, _ = opened(vfio)
    with pytest.raises(TypeError):
        vfio.ioctl(container, abi.VFIO_IOMMU_GET_INFO, argument)


def test_a_device_name_may_not_be_longer_than_a_page():
    vfio = SoftwareVfio()
    _, group = opened(vfio)
    name = ctypes.create_string_buffer(b"a" * 2 * PAGE)
    assert failure(vfio.ioctl, group, abi.VFIO_GROUP_GET_DEVICE_FD, ctypes.addressof(name)) == errno.EINVAL
    name = ctypes.create_string_buffer(b"0000:00:11.0")
    assert failure(vfio.ioctl, group, abi.VFIO_GROUP_GET_DEVICE_FD, ctypes.addressof(name)) == errno.ENODEV


def test_a_plain_device_answers_as_vfio_pci():
    vfio = SoftwareVfio()
    container, group = opened(vfio)
    name = ctypes.create_string_buffer(b"0000:00:10.0")
    device = vfio.ioctl(group, abi.VFIO_GROUP_GET_DEVICE_FD, ctypes.addressof(name))
    second = vfio.ioctl(group, abi.VFIO_GROUP_GET_DEVICE_FD, ctypes.addressof(name))
    info = (ctypes.c_uint32 * 6)(24)
    vfio.ioctl(device, abi.VFIO_DEVICE_GET_INFO, ctypes.addressof(info))
    assert list(info) == [24, 3, 9, 5, 0, 0]
    region = ctypes.create_string_buffer(struct.pack("IIII", 32, 0, 7, 77).ljust(32, b"\xaa"), 32)
    vfio.ioctl(device, abi.VFIO_DEVICE_GET_REGION_INFO, ctypes.addressof(region))
    assert struct.unpack("IIIIQQ", region.raw) == (32, 3, 7, 77, 256, 7 << 40)      # cap_offset is left alone
    for index in (8, 9, 2**32 - 1):
        region.raw = struct.pack("III", 32, 0, index).ljust(32, b"\0")
        assert failure(vfio.ioctl, device, abi.VFIO_DEVICE_GET_REGION_INFO, ctypes.addressof(region)) == errno.EINVAL
    assert vfio.pwrite(device, b"\x06\x00", (7 << 40) + 4) == 2
    assert vfio.pread(second, 2, (7 << 40) + 4) == b"\x06\x00"
    assert vfio.pread(device, 56, (7 << 40) + 200) == bytes(56)
    assert failure(vfio.pread, device, 57, (7 << 40) + 200) == errno.EFAULT
    assert failure(vfio.pread, device, 1, 0) == errno.EINVAL
    assert failure(vfio.pread, container, 1, 0) == errno.EINVAL
    assert vfio.ioctl(device, abi.VFIO_DEVICE_RESET) == 0
    assert vfio.pread(device, 2, (7 << 40) + 4) == b"\x06\0"       # the configuration survives a reset
    assert failure(vfio.ioctl, device, abi.VFIO_DEVICE_FEATURE, 0) == errno.EFAULT
    vfio.close(device)
    assert failure(vfio.ioctl, group, abi.VFIO_GROUP_UNSET_CONTAINER) == errno.EBUSY
    vfio.close(second)
    assert vfio.ioctl(group, abi.VFIO_GROUP_UNSET_CONTAINER) == 0


def test_an_object_with_nothing_open_works_in_a_forked_child(memory):
    vfio = SoftwareVfio(memlock_limit=None)
    container, group = opened(vfio)
    vfio.close(container)
    vfio.close(group)

    def child():
        opened(vfio)
        assert vfio.locked_pages() == 0

    in_child(child)
    opened(vfio)


def test_what_was_opened_before_a_fork_fails_clearly_in_the_child(memory):
    vfio = SoftwareVfio(memlock_limit=None)
    container, group = opened(vfio)
    with open_backend("software", memlock_limit=None) as backend:
        backend.map_dma(IOVA, memory, PAGE, 3)

        def child():
            for call in (lambda: vfio.ioctl(container, abi.VFIO_IOMMU_GET_INFO, 0),
                         lambda: vfio.open("/dev/vfio/vfio"), lambda: vfio.close(group),
                         lambda: backend.map_dma(0, memory, PAGE, 3), lambda: backend.unmap_all()):
                with pytest.raises(ForkedError, match="opened before a fork"):
                    call()
            backend.close()

        in_child(child)
        assert backend.unmap_all() == PAGE


def test_locked_pages_are_charged_to_the_process_that_mapped(memory):
    with open_backend("software", memlock_limit=None) as backend:
        before = backend.system.locked_pages()
        backend.map_dma(IOVA, memory, 8 * PAGE, 3)
        assert backend.system.locked_pages() == before + 8

        def child():
            assert SoftwareVfio().locked_pages() == 0

        in_child(child)
    assert SoftwareVfio().locked_pages() == before


def test_many_threads_map_and_unmap_without_losing_count(memory):
    with open_backend("software", memlock_limit=None) as backend:
        def worker(first):
            for i in range(300):
                iova = IOVA + (first * 1000 + i) * PAGE
                backend.map_dma(iova, memory, PAGE, 3)
                if i % 2:
                    assert backend.unmap_dma(iova, PAGE) == PAGE

        threads = [threading.Thread(target=worker, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert backend.capabilities().dma_avail == 65535 - 600
        assert len(backend.type1.mappings()) == 600


def test_groups_join_and_leave_beside_maps(memory):
    """Attach and detach take the same lock as map and unmap."""
    vfio = SoftwareVfio(groups=[SoftwareGroup(0, ["a"]), SoftwareGroup(1, ["b"])], memlock_limit=None)
    container, _ = opened(vfio)
    second = vfio.open("/dev/vfio/1")
    fd = ctypes.c_int(container)
    stop = threading.Event()
    argument = ctypes.create_string_buffer(struct.pack("IIQQQ", 32, 3, memory, IOVA, PAGE))
    unmap = ctypes.create_string_buffer(struct.pack("IIQQ", 24, 0, IOVA, PAGE))

    def mapper():
        while not stop.is_set():
            vfio.ioctl(container, abi.VFIO_IOMMU_MAP_DMA, ctypes.addressof(argument))
            vfio.ioctl(container, abi.VFIO_IOMMU_UNMAP_DMA, ctypes.addressof(unmap))

    thread = threading.Thread(target=mapper)
    thread.start()
    for _ in range(300):
        vfio.ioctl(second, abi.VFIO_GROUP_SET_CONTAINER, ctypes.addressof(fd))
        vfio.ioctl(second, abi.VFIO_GROUP_UNSET_CONTAINER)
    stop.set()
    thread.join()


def test_map_many_is_all_or_nothing(memory):
    with open_backend("software", memlock_limit=None) as backend:
        rows = np.array([[IOVA + i * PAGE, memory + i * PAGE, PAGE, 3] for i in range(64)], np.uint64)
        rows[40, 1] = 0x1000
        with pytest.raises(VfioError, match="entry 40") as caught:
            backend.map_many(rows)
        assert (caught.value.errno, caught.value.iova) == (errno.EFAULT, IOVA + 40 * PAGE)
        assert len(backend.type1.mappings()) == 0 and backend.system.locked_pages() == 0
        rows[40, 1] = memory
        backend.map_many(rows)
        assert len(backend.type1.mappings()) == 64


def test_update_vaddr_many_is_all_or_nothing(memory):
    with open_backend("software", memlock_limit=None) as backend:
        backend.map_many(np.array([[IOVA + i * PAGE, memory + i * PAGE, PAGE, 3] for i in range(8)], np.uint64))
        backend.invalidate_vaddr()
        rows = np.array([[IOVA + i * PAGE, memory, PAGE] for i in range(9)], np.uint64)
        with pytest.raises(VfioError, match="entry 8") as caught:
            backend.update_vaddr_many(rows)
        assert caught.value.errno == errno.ENOENT
        table = backend.type1.mappings()
        assert not table[:, 4].any() and table[:, 1].tolist() == [memory + i * PAGE for i in range(8)]
        backend.update_vaddr_many(rows[:8])
        assert backend.type1.mappings()[:, 4].all()


BAD = [(IOVA + 1, 0, PAGE, 3), (IOVA, 1, PAGE, 3), (IOVA, 0, PAGE - 1, 3), (IOVA, 0, 0, 3), (-1, 0, PAGE, 3),
       (1 << 64, 0, PAGE, 3), (IOVA, 0, 1 << 64, 3), (2**64 - PAGE, 0, 2 * PAGE, 3), (IOVA, 0, PAGE, 0),
       (IOVA, 0, PAGE, 4), (0xFEE00000, 0, PAGE, 3)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("iova, offset, size, prot", BAD)
def test_a_bad_map_is_a_typed_error_and_changes_nothing(memory, kernel, iova, offset, size, prot):
    with open_backend("software", kernel=kernel, memlock_limit=None) as backend:
        backend.map_dma(0x2000000, memory, PAGE, 3)
        before = backend.type1.mappings().tolist(), backend.capabilities(), backend.system.locked_pages()
        with pytest.raises(InvalidArgumentError) as caught:
            backend.map_dma(iova, memory + offset, size, prot)
        assert caught.value.operation == "map_dma" and caught.value.errno in (errno.EINVAL, errno.EOVERFLOW)
        assert before == (backend.type1.mappings().tolist(), backend.capabilities(), backend.system.locked_pages())


@pytest.mark.parametrize("arguments", [("x", 0, PAGE, 3), (0, None, PAGE, 3), (0, 0, 1.5, 3), (0, 0, PAGE, "rw")])
def test_arguments_of_other_types_are_type_errors(arguments):
    with open_backend("software") as backend, pytest.raises(TypeError):
        backend.map_dma(*arguments)


def test_old_kernels_lack_what_they_lacked(memory):
    with open_backend("software", kernel="5.4", memlock_limit=None) as backend:
        assert backend.capabilities().features == {"map_many", "dma"}
        for call in (backend.start_dirty, backend.stop_dirty, backend.invalidate_vaddr):
            with pytest.raises(UnsupportedError):
                call()
        backend.map_dma(IOVA, memory, PAGE, 3)
        assert backend.unmap_all() == PAGE


def test_errors_name_the_limit_and_how_to_raise_it(memory):
    with open_backend("software", dma_entry_limit=1, memlock_limit=2 * PAGE) as backend:
        backend.map_dma(IOVA, memory, PAGE, 3)
        with pytest.raises(OSError, match="dma_entry_limit") as caught:
            backend.map_dma(IOVA + PAGE, memory, PAGE, 3)
        assert caught.value.errno == errno.ENOSPC


def test_a_container_ends_with_its_last_group(memory):
    vfio = SoftwareVfio(memlock_limit=None)
    backend = vfio.container()
    backend.map_dma(IOVA, memory, PAGE, 3)
    backend.close()
    assert vfio.locked_pages() == 0
    with pytest.raises(ClosedError):
        backend.map_dma(IOVA, memory, PAGE, 3)
    with vfio.container() as again:
        assert again.capabilities().dma_avail == 65535


@pytest.mark.parametrize("options", [{"kernel": "4.4"}, {"kernel": 7.2}, {"dma_entry_limit": -1},
                                     {"dma_entry_limit": 2**32}, {"memlock_limit": "x"}, {"memlock_limit": -5},
                                     {"groups": [SoftwareGroup(1, []), SoftwareGroup(1, [])]}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError):
        SoftwareVfio(**options)


@pytest.mark.parametrize("options", [{"aperture": (5, 4)}, {"aperture": (0, 2**64)}, {"reserved": [(-1, 5)]},
                                     {"pgsizes": 0}])
def test_bad_groups_are_refused(options):
    with pytest.raises(ValueError):
        SoftwareGroup(0, [], **options)


def test_an_instance_outlives_the_object_that_made_its_groups():
    type1 = open_backend("software", memlock_limit=None).type1
    gc.collect()
    type1.close()
    assert type1.dead


def test_an_error_while_ranges_are_listed_leaves_the_instance_usable(monkeypatch):
    with open_backend("software", memlock_limit=None) as backend:
        with monkeypatch.context() as patch:
            patch.setattr(IovaRange, "__init__", lambda *_: backend.type1.unmap_all() and None or 1 / 0)
            with pytest.raises(ZeroDivisionError):
                backend.iova_ranges()
        assert backend.iova_ranges()


def test_groups_without_a_common_page_size_can_not_share_a_container(memory):
    groups = [SoftwareGroup(0, [], pgsizes=0x1000), SoftwareGroup(1, [], pgsizes=0x200000)]
    assert failure(lambda: open_backend("software", groups=groups)) == errno.EINVAL


@pytest.mark.parametrize("fails", ["connect", "disconnect"])
def test_a_device_that_raises_leaves_nothing_behind(fails):
    class Device:
        address = "mdev-0"

        def connect(self, port):
            if fails == "connect":
                raise RuntimeError(fails)

        def disconnect(self):
            if fails == "disconnect":
                raise RuntimeError(fails)

        def dma_unmap(self, iova, size):
            pass

    vfio = SoftwareVfio(groups=[SoftwareGroup(0, [Device()], emulated=True)])
    container, group = opened(vfio)
    name = ctypes.create_string_buffer(b"mdev-0")
    with pytest.raises(RuntimeError):
        vfio.close(vfio.ioctl(group, abi.VFIO_GROUP_GET_DEVICE_FD, ctypes.addressof(name)))
    assert vfio.ioctl(group, abi.VFIO_GROUP_UNSET_CONTAINER) == 0
    vfio.close(group)
    vfio.close(container)


def test_huge_numbers_are_refused_or_clamped_not_overflown():
    assert failure(SoftwareVfio().open, "/dev/vfio/" + "1" * 5000) == errno.ENOENT
    with pytest.raises(ValueError, match="number"):
        SoftwareGroup(2**40, [])
    open_backend("software", memlock_limit=2**64).close()


def test_a_dropped_software_vfio_leaves_no_descriptor_and_no_locked_memory():
    def use():
        vfio = SoftwareVfio("7.2", memlock_limit=None)
        container = vfio.container()
        with GuestMemory.memfd(PAGE) as memory:
            container.map_dma(0, memory.region.vaddr, PAGE, 3)
            del container
        vfio.open("/dev/iommu")

    gc.collect()
    before, locked = set(os.listdir("/proc/self/fd")), locked_pages()
    use()
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before and locked_pages() == locked


def test_groups_that_are_none_are_refused_in_words():
    with pytest.raises(TypeError, match="SoftwareGroup"):
        SoftwareVfio(groups=["0000:00:10.0"])
