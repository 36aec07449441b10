"""The typed iommufd over the software one: real rules, DMA by software devices, both kinds of page tables."""
import ctypes
import errno
import threading

import numpy as np
import pytest

from vfiodma import (
    DirtyBitmap,
    DirtyTracker,
    GuestMemory,
    IoAddressSpace,
    SoftwareGroup,
    SoftwareVfio,
    open_backend,
)
from vfiodma.backends.iommufd import Iommufd, IommufdContainer
from vfiodma.backends.type1 import Type1Container
from vfiodma.errors import (
    BusyError,
    InvalidArgumentError,
    MemoryFaultError,
    NotMappedError,
    OverlapError,
    UnsupportedError,
    VfioError,
)
from vfiodma.migration.layout import MemoryLayout
from vfiodma.types import IovaRange, Prot

PAGE = 4096
FIRST, SECOND, THIRD = "0000:00:10.0", "0000:01:01.0", "0000:01:02.0"
BLOCK = 16 * PAGE


class Writer:
    """A device that does DMA when a test says so."""

    def __init__(self, address):
        self.address = address
        self.port = None

    def connect(self, port):
        self.port = port

    def disconnect(self):
        self.port = None

    def region_size(self, index):
        return 0

    irq_count = region_size

    def reset(self):
        pass


@pytest.fixture(params=["6.12", "7.2"])
def kernel(request):
    return request.param


def make(kernel, **options):
    vfio = SoftwareVfio(kernel, memlock_limit=None, groups=[
        SoftwareGroup(3, [Writer(FIRST)], **options), SoftwareGroup(4, [Writer(SECOND), Writer(THIRD)], **options)])
    return vfio, vfio._groups[3].config.devices[0]


@pytest.fixture
def memory():
    with GuestMemory.memfd(272 * PAGE) as guest:
        yield guest


def vaddr(memory):
    """An address in it that blocks of contiguous entries can begin at; 256 pages follow."""
    return -(-memory.regions[0].vaddr // BLOCK) * BLOCK


def bits(words):
    return {i for i in range(64 * len(words)) if int(words[i // 64]) >> i % 64 & 1}


def test_the_container_over_both_kernels(kernel, memory):
    system, device = make(kernel)
    with open_backend("iommufd", devices=[FIRST, SECOND, THIRD], system=system) as container:
        assert container.capabilities().features - {"map_file"} == {"map_many", "unmap_all", "dirty"}
        assert ("map_file" in container.capabilities().features) == (kernel == "7.2")
        assert container.iova_ranges() == (IovaRange(0, 0xFEDFFFFF), IovaRange(0xFEF00000, (1 << 39) - 1))
        at = vaddr(memory)
        container.map_dma(0x10000, at, 4 * PAGE, 3)
        device.port.write(0x11000, b"device")
        assert ctypes.string_at(at + PAGE, 6) == b"device"
        with pytest.raises(OverlapError):
            container.map_dma(0x12000, at, PAGE, 3)
        with pytest.raises(InvalidArgumentError):
            container.map_dma(0xFEE00000, at, PAGE, 3)
        with pytest.raises(MemoryFaultError):
            container.map_dma(0x90000, 0x1000, PAGE, 3)
        with pytest.raises(NotMappedError):
            container.unmap_dma(0x10000, PAGE)
        assert container.unmap_dma(0, 1 << 30) == 4 * PAGE
        assert container.unmap_dma(0, 1 << 30) == 0
        with pytest.raises(VfioError):
            device.port.write(0x11000, b"device")
    assert system._files == {}


def test_a_duplicate_outlives_the_container_but_reaches_nothing(kernel, memory):
    system, device = make(kernel)
    container = IommufdContainer([FIRST], system=system)
    fd = container.open_device_fd(FIRST)
    container.map_dma(0x10000, vaddr(memory), PAGE, 3)
    container.close()
    assert device.port is not None
    with pytest.raises(VfioError):
        device.port.write(0x10000, b"x")
    with pytest.raises(VfioError):
        IommufdContainer([FIRST], system=system)
    system.close(fd)
    assert device.port is None and system._files == {}
    IommufdContainer([FIRST], system=system).close()


def test_a_device_is_in_one_container_at_a_time(kernel):
    system, _ = make(kernel)
    with IommufdContainer([SECOND], system=system):
        before = dict(system._files)
        for refused in (lambda: IommufdContainer([FIRST, SECOND], system=system),
                        lambda: IommufdContainer([THIRD], system=system)):      # of a group that is taken
            with pytest.raises(VfioError) as caught:
                refused()
            assert caught.value.hint and system._files == before
    with Type1Container([SECOND], system=system), pytest.raises(BusyError):
        IommufdContainer([SECOND], system=system)
    assert system._files == {}


def test_emulated_devices_are_in_an_address_space_too(kernel, memory):
    system = SoftwareVfio(kernel, groups=[SoftwareGroup(5, [Writer(FIRST)], emulated=True)])
    with IommufdContainer(["/dev/vfio/devices/vfio0"], system=system) as container:
        assert "dirty" not in container.capabilities().features and container.capabilities().min_pgsize == PAGE
        container.map_dma(0x10000, vaddr(memory), PAGE, 3)
        system._groups[5].config.devices[0].port.write(0x10000, b"emulated")
        assert container.unmap_all() == PAGE


def test_the_address_space_tracks_what_devices_write(kernel, memory):
    system, device = make(kernel)
    with IoAddressSpace(IommufdContainer([FIRST], system=system), close_backend=True) as ioas:
        mapping = ioas.map(memory)
        with MemoryLayout(memory, PAGE) as layout:
            tracker = DirtyTracker(ioas, layout)
            tracker.start()
            for page in (0, 77, 255):
                device.port.write(mapping.iova + page * PAGE + 5, b"dirty")
            bitmap = DirtyBitmap(layout.nbits, PAGE)
            tracker.harvest(bitmap)
            assert bitmap.indices().tolist() == [0, 77, 255]
            device.port.write(mapping.iova + 5 * PAGE, b"written, then unmapped")
            ioas.unmap(mapping.iova)
            bitmap.clear()
            tracker.harvest(bitmap)
            assert 5 in bitmap.indices().tolist()
            tracker.stop()


def test_without_tracking_hardware_the_tracker_says_so(kernel, memory):
    system, _ = make(kernel, dirty_tracking=False)
    with IoAddressSpace(IommufdContainer([FIRST], system=system), close_backend=True) as ioas:
        ioas.map(memory)
        with MemoryLayout(memory, PAGE) as layout, pytest.raises(UnsupportedError):
            DirtyTracker(ioas, layout).start()


def harvest_after(device, container, iova, npages, written):
    container.start_dirty()
    for page in written:
        device.port.write(iova + page * PAGE, b"x")
    words = np.zeros((npages + 63) // 64, np.uint64)
    container.read_dirty(iova, npages * PAGE, words)
    container.stop_dirty()
    return bits(words)


@pytest.mark.parametrize("written", [(0,), (15,), (63,), (255,), (14, 15, 16), range(0, 256, 7), range(256)])
def test_no_written_page_is_missing_with_tables_that_lose_the_last_of_a_block(kernel, memory, written):
    system, device = make(kernel, lost_last_page=BLOCK)
    with IommufdContainer([FIRST], system=system) as container:
        assert container.hwpts[0].loses_last_page == (kernel == "7.2")
        container.map_dma(0x100000, vaddr(memory), 256 * PAGE, 3)
        found = harvest_after(device, container, 0x100000, 256, written)
        blocks = {page // 16 for page in written}
        assert set(written) <= found
        assert found <= {page for page in range(256) if page // 16 in blocks}, "and no more than their blocks"


def test_the_repair_is_what_saves_the_page(memory):
    system, device = make("7.2", lost_last_page=BLOCK)
    with IommufdContainer([FIRST], system=system, loses_last_page=False) as container:
        container.map_dma(0x100000, vaddr(memory), 256 * PAGE, 3)
        assert 15 not in harvest_after(device, container, 0x100000, 256, [15])


def test_small_pages_make_bits_exact(memory):
    system, device = make("7.2")
    with IommufdContainer([FIRST], system=system, huge_pages=False) as container:
        container.map_dma(0x200000, vaddr(memory), 256 * PAGE, 3)
        assert harvest_after(device, container, 0x200000, 256, [3, 200]) == {3, 200}


def test_iovas_are_chosen_within_reach(kernel, memory):
    system, _ = make(kernel)
    with IommufdContainer([FIRST], system=system) as container:
        assert container.map_auto(vaddr(memory), PAGE) == PAGE
        container.allow_iovas([(0x500000, 0x5FFFFF)])
        assert container.map_auto(vaddr(memory), PAGE, Prot.READ) == 0x500000
        with pytest.raises(OverlapError) as caught:
            container.allow_iovas([(1 << 39, 1 << 40)])
        assert caught.value.errno == errno.EADDRINUSE


def test_mapping_before_attaching_shows_its_errors_at_the_attach(kernel):
    system, _ = make(kernel)
    with Iommufd(system) as iommufd, iommufd.bind(FIRST) as device:
        ioas = iommufd.alloc_ioas()
        ioas.map_dma(0xFEE00000, 0x1000, PAGE, 3)
        with pytest.raises(OverlapError):
            device.attach(ioas)
        ioas.unmap_all()
        ioas.map_dma(0, 0x1000, PAGE, 3)
        with pytest.raises(MemoryFaultError):
            device.attach(ioas)
        ioas.unmap_all()
        device.attach(ioas)
        with pytest.raises(BusyError):
            ioas.destroy()


def test_copies_have_areas_of_their_own(kernel, memory):
    system, _ = make(kernel)
    with IommufdContainer([FIRST], system=system) as container:
        container.map_dma(0x10000, vaddr(memory), 4 * PAGE, 3)
        container.map_dma(0x14000, vaddr(memory) + 4 * PAGE, 4 * PAGE, 1)
        other = container.iommufd.alloc_ioas()
        assert other.copy(container, 0x11000, 5 * PAGE, Prot.READ, 0x80000) == 0x80000
        assert other.areas() == [(0x80000, 3 * PAGE), (0x83000, 2 * PAGE)]
        assert other.unmap_dma(0x83000, 2 * PAGE) == 2 * PAGE and other.unmap_all() == 3 * PAGE
        with pytest.raises(NotMappedError):
            other.copy(container, 0x16000, 4 * PAGE, Prot.READ)


def test_files_are_mapped_where_the_kernel_can(kernel, memory):
    system, _ = make(kernel)
    with IommufdContainer([FIRST], system=system) as container:
        fd = memory.regions[0].fd
        if kernel == "6.12":
            with pytest.raises(UnsupportedError):
                container.map_file(fd, 0, PAGE)
        else:
            assert container.map_file(fd, PAGE, 2 * PAGE, Prot.RW, 0x40000) == 0x40000
            container.change_process()
            assert container.unmap_all() == 2 * PAGE


def test_many_reserved_ranges_are_all_told(kernel):
    reserved = [(n << 20, (n << 20) + 0xFFF) for n in range(1, 120)]
    system = SoftwareVfio(kernel, groups=[SoftwareGroup(3, [FIRST], reserved=reserved)])
    with IommufdContainer([FIRST], system=system) as container:
        assert len(container.iova_ranges()) == 120


def test_the_container_that_iommufd_emulates_attaches_its_devices_at_once(kernel, memory):
    system, _ = make(kernel)
    with Type1Container([FIRST], system=system, node="/dev/iommu") as container:
        found = container.capabilities()
        assert found.features == {"map_many", "unmap_all"} and found.dma_avail is None and found.dma_entry_limit is None
        assert container.iova_ranges()[0] == IovaRange(0, 0xFEDFFFFF)
        with pytest.raises(InvalidArgumentError):
            container.map_dma(0xFEE00000, vaddr(memory), PAGE, 3)
        with pytest.raises(InvalidArgumentError):
            container.map_dma(0x10000, vaddr(memory), PAGE, 0)
        container.map_dma(0x10000, vaddr(memory), 4 * PAGE, 3)
        with pytest.raises(NotMappedError):
            container.unmap_dma(0x10000, PAGE)
        assert container.unmap_dma(0x20000, PAGE) == 0
        system.close(container.open_device_fd(FIRST))
    assert system._files == {}


def test_threads_map_and_unmap_side_by_side(memory):
    system, _ = make("7.2")
    failures = []

    def work(number, container):
        try:
            base = number << 24
            for i in range(200):
                container.map_many(np.array([[base + n * PAGE, vaddr(memory), PAGE, 1] for n in range(8)], np.uint64))
                assert container.unmap_dma(base, (i % 8 + 1) * PAGE) == (i % 8 + 1) * PAGE
                container.unmap_dma(base, 8 * PAGE)
        except BaseException as exc:
            failures.append(exc)

    with IommufdContainer([FIRST], system=system) as container:
        threads = [threading.Thread(target=work, args=(number, container)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == [] and container.areas() == [] and container.unmap_all() == 0
