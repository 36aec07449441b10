"""Type1Container over a software VFIO, and over systems that fail, interrupt or answer oddly."""
import errno
import os
import struct

import numpy as np
import pytest

from vfiodma import GuestMemory, IoAddressSpace, SoftwareGroup, SoftwareVfio, VfioError, open_backend
from vfiodma.backends.type1 import Type1Container
from vfiodma.errors import BusyError, DmaLimitError, DmaPermissionError, InvalidArgumentError, NoDeviceError
from vfiodma.types import DeviceLocation, IovaRange
from vfiodma.uapi import vfio as abi

ADDRESS = "0000:00:10.0"
PAGE = 4096


class Recorder:
    """A VfioSystem around another one: notes what is open, and lets a test change answers."""

    def __init__(self, inner):
        self.inner = inner
        self.opened = []
        self.calls = []
        self.fail = {}              # request -> errnos or KeyboardInterrupt, for each call to come (0 = do it)
        self.location = None

    def open(self, path):
        fd = self.inner.open(path)
        self.opened.append(fd)
        return fd

    def close(self, fd):
        self.inner.close(fd)
        self.opened.remove(fd)

    def ioctl(self, fd, request, arg=0):
        self.calls.append(request)
        planned = self.fail.get(request)
        code = planned.pop(0) if planned else 0
        if code is KeyboardInterrupt:
            raise code
        if code:
            raise OSError(code, os.strerror(code))
        return self.inner.ioctl(fd, request, arg)

    def find_device(self, address):
        return self.location or self.inner.find_device(address)


@pytest.fixture
def system():
    recorder = Recorder(SoftwareVfio(memlock_limit=None, groups=[
        SoftwareGroup(3, [ADDRESS]), SoftwareGroup(4, ["0000:01:01.0", "0000:01:02.0"])]))
    yield recorder
    assert recorder.opened == [], "descriptors were left open"


@pytest.fixture
def container(system):
    with Type1Container([ADDRESS], system=system) as opened:
        yield opened


@pytest.fixture
def memory():
    with GuestMemory.memfd(64 * PAGE) as guest:
        yield guest


def vaddr(memory):
    return memory.regions[0].vaddr


def test_is_what_the_address_space_needs(container, memory):
    with IoAddressSpace(container) as ioas:
        mapping = ioas.map(memory)
        assert ioas.translate(mapping.iova) == mapping.vaddr
        assert ioas.unmap(mapping.iova) == mapping.size


def test_tells_ranges_page_sizes_and_features(container):
    found = container.capabilities()
    assert found.features == {"map_many", "unmap_all", "vaddr", "dirty"}
    assert (found.pgsizes, found.dma_avail, found.max_dirty_bitmap_size) == (0x40201000, 65535, 1 << 28)
    assert container.iova_ranges() == (IovaRange(0, 0xFEDFFFFF), IovaRange(0xFEF00000, (1 << 39) - 1))


def test_a_v1_container_has_no_dirty_tracking(system):
    with Type1Container([ADDRESS], system=system, iommu_type=abi.VFIO_TYPE1_IOMMU) as container:
        assert "dirty" not in container.capabilities().features


def test_an_old_kernel_offers_what_it_has():
    vfio = SoftwareVfio(kernel="5.4", groups=[SoftwareGroup(3, [ADDRESS])])
    with Type1Container([ADDRESS], system=vfio) as container:
        assert container.capabilities().features == {"map_many"}


def test_the_info_buffer_grows_to_what_the_kernel_asks_for():
    reserved = [(n << 20, (n << 20) + 0xFFF) for n in range(1, 200)]
    vfio = SoftwareVfio(groups=[SoftwareGroup(3, [ADDRESS], reserved=reserved)])
    with Type1Container([ADDRESS], system=vfio) as container:
        assert len(container.iova_ranges()) == 200


def test_two_devices_of_one_group_and_another_group_share_a_container(system):
    with Type1Container([ADDRESS, "0000:01:01.0", "0000:01:02.0"], system=system) as container:
        assert len(system.opened) == 3
        for address in (ADDRESS, "0000:01:01.0", "0000:01:02.0"):
            system.inner.close(container.open_device_fd(address))


def test_a_device_of_no_group_of_the_container_is_enodev(container):
    with pytest.raises(NoDeviceError) as caught:
        container.open_device_fd("0000:01:01.0")
    assert caught.value.errno == errno.ENODEV and "0000:01:01.0" in str(caught.value)


def test_closing_twice_is_fine_and_later_calls_are_ebadf(system):
    container = Type1Container([ADDRESS], system=system)
    container.close()
    container.close()
    with pytest.raises(VfioError) as caught:
        container.map_dma(0, 0x1000, PAGE, 3)
    assert caught.value.errno == errno.EBADF


# ---- opening

@pytest.mark.parametrize("request_number", [abi.VFIO_GROUP_GET_STATUS, abi.VFIO_GROUP_SET_CONTAINER, abi.VFIO_SET_IOMMU,
                                            abi.VFIO_IOMMU_GET_INFO])
@pytest.mark.parametrize("code", [errno.EPERM, errno.ENODEV, errno.EBUSY, errno.EINVAL, errno.ENOMEM])
def test_a_failure_while_opening_leaves_nothing_open(system, request_number, code):
    system.fail[request_number] = [code]
    with pytest.raises(VfioError) as caught:
        Type1Container([ADDRESS], system=system)
    assert caught.value.errno == code


def location(**changes):
    return DeviceLocation(ADDRESS, 3, "/dev/vfio/3", None, False, "vfio-pci", ())._replace(**changes)


@pytest.mark.parametrize(("changes", "error", "advice"), [
    ({"driver": None}, NoDeviceError, "not bound to a driver: bind it to vfio-pci"),
    ({"driver": "e1000e"}, NoDeviceError, "bound to e1000e: bind it to vfio-pci"),
    ({"siblings": (("0000:01:02.0", "nvme"),)}, BusyError, "0000:01:02.0 (nvme)"),
    ({"noiommu": True}, DmaPermissionError, "noiommu=True"),
])
def test_a_device_that_is_not_ready_is_refused_with_what_to_do(system, changes, error, advice):
    system.location = location(**changes)
    with pytest.raises(error, match=".*") as caught:
        Type1Container([ADDRESS], system=system)
    assert advice in str(caught.value)
    assert not system.calls


def test_siblings_without_driver_or_bound_to_vfio_are_no_hindrance(system):
    system.location = location(siblings=(("a", None), ("b", "vfio-pci"), ("c", "pcieport"), ("d", "pci-stub")))
    Type1Container([ADDRESS], system=system).close()


@pytest.mark.parametrize("driver", ["mlx5_vfio_pci", "hisi_acc_vfio_pci", "nvgrace_gpu_vfio_pci"])
def test_the_vfio_drivers_of_single_devices_are_as_good_as_vfio_pci(system, driver):
    system.location = location(driver=driver, siblings=(("0000:01:02.0", driver),))
    Type1Container([ADDRESS], system=system).close()


def test_a_group_that_is_open_is_ebusy(system, container):
    with pytest.raises(BusyError):
        Type1Container([ADDRESS], system=system)


def test_naming_no_device_is_refused(system):
    with pytest.raises(InvalidArgumentError):
        Type1Container([], system=system)
    with pytest.raises(TypeError):
        Type1Container(ADDRESS, system=system)


def test_groups_can_be_named_by_number(system):
    with Type1Container(groups=[4], system=system) as container:
        system.inner.close(container.open_device_fd("0000:01:02.0"))


def test_open_backend_knows_it(system):
    with open_backend("type1", devices=[ADDRESS], system=system) as container:
        assert isinstance(container, Type1Container)


def test_a_name_that_is_no_device_of_this_host_is_enodev():
    for address in ("0000:99:1f.7", "../../etc", ""):
        with pytest.raises(NoDeviceError):
            Type1Container([address])


# ---- large mappings

def test_a_mapping_too_large_for_one_is_made_of_several(system, container, memory):
    container.max_map_size = 16 * PAGE
    container.map_dma(0x100000, vaddr(memory), 60 * PAGE, 3)
    assert container.capabilities().dma_avail == 65535 - 4
    assert container.unmap_dma(0x100000, 60 * PAGE) == 60 * PAGE


@pytest.mark.parametrize("succeed", range(4))
def test_pieces_are_undone_when_one_of_them_fails(system, container, memory, succeed):
    container.max_map_size = 16 * PAGE
    system.fail[abi.VFIO_IOMMU_MAP_DMA] = [0] * succeed + [errno.ENOSPC]
    with pytest.raises(DmaLimitError) as caught:
        container.map_dma(0x100000, vaddr(memory), 64 * PAGE, 3)
    assert (caught.value.iova, caught.value.size) == (0x100000, 64 * PAGE)
    assert container.capabilities().dma_avail == 65535


def test_a_signal_between_pieces_or_entries_undoes_those_before(system, container, memory):
    rows = np.array([[0x100000 + i * PAGE, vaddr(memory) + i * PAGE, PAGE, 3] for i in range(8)], np.uint64)
    container.max_map_size = 16 * PAGE
    for call in (lambda: container.map_dma(0x100000, vaddr(memory), 64 * PAGE, 3), lambda: container.map_many(rows)):
        system.fail[abi.VFIO_IOMMU_MAP_DMA] = [0, 0, KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            call()
        assert container.capabilities().dma_avail == 65535
    container.map_many(rows)
    container.invalidate_vaddr()
    system.fail[abi.VFIO_IOMMU_MAP_DMA] = [0, 0, KeyboardInterrupt]
    with pytest.raises(KeyboardInterrupt):
        container.update_vaddr_many(rows[:, :3].copy())
    container.update_vaddr_many(rows[:, :3].copy())             # all are invalid still


def test_pieces_that_would_wrap_are_einval_before_anything_is_mapped(system, container, memory):
    container.max_map_size = 16 * PAGE
    with pytest.raises(InvalidArgumentError):
        container.map_dma((1 << 64) - 32 * PAGE, vaddr(memory), 64 * PAGE, 3)
    assert abi.VFIO_IOMMU_MAP_DMA not in system.calls


def test_vaddrs_of_pieces_are_updated_and_undone_together(system, container, memory):
    container.max_map_size = 16 * PAGE
    container.map_dma(0x100000, vaddr(memory), 64 * PAGE, 3)
    assert container.invalidate_vaddr() == 64 * PAGE
    system.fail[abi.VFIO_IOMMU_MAP_DMA] = [0, 0, errno.EINVAL]
    with pytest.raises(InvalidArgumentError):
        container.update_vaddr(0x100000, vaddr(memory), 64 * PAGE)
    container.update_vaddr(0x100000, vaddr(memory), 64 * PAGE)          # all of them are invalid again, so this works


def test_a_large_dirty_bitmap_is_read_in_pieces(system, container, memory):
    container.max_map_size = 64 * PAGE
    container.map_dma(0x100000, vaddr(memory), 64 * PAGE, 3)
    container.map_dma(0x140000, vaddr(memory), 64 * PAGE, 3)
    container.start_dirty()
    words = np.zeros(2, np.uint64)
    before = system.calls.count(abi.VFIO_IOMMU_DIRTY_PAGES)
    container.read_dirty(0x100000, 128 * PAGE, words)
    assert system.calls.count(abi.VFIO_IOMMU_DIRTY_PAGES) == before + 2
    assert list(words) == [2**64 - 1] * 2


# ---- lists

def test_map_many_is_all_or_nothing_and_names_the_entry(container, memory):
    good = [[0x100000 + i * PAGE, vaddr(memory) + i * PAGE, PAGE, 3] for i in range(8)]
    bad = np.array([*good[:5], [0x100000, vaddr(memory), PAGE, 3], *good[5:]], np.uint64)
    with pytest.raises(VfioError, match="entry 5") as caught:
        container.map_many(bad)
    assert caught.value.errno == errno.EEXIST and caught.value.iova == 0x100000
    assert container.capabilities().dma_avail == 65535
    container.map_many(np.array(good, np.uint64))
    assert container.unmap_all() == 8 * PAGE


def test_update_vaddr_many_is_all_or_nothing(container, memory):
    rows = np.array([[0x100000 + i * PAGE, vaddr(memory) + i * PAGE, PAGE, 3] for i in range(8)], np.uint64)
    container.map_many(rows)
    container.invalidate_vaddr()
    wrong = rows[:, :3].copy()
    wrong[6, 2] = 2 * PAGE
    with pytest.raises(InvalidArgumentError, match="entry 6"):
        container.update_vaddr_many(wrong)
    container.update_vaddr_many(rows[:, :3].copy())


# ---- dirty bits

def test_dirty_bits_come_with_the_unmap(container, memory):
    container.map_dma(0x100000, vaddr(memory), 10 * PAGE, 3)
    container.start_dirty()
    words = np.zeros(1, np.uint64)
    assert container.unmap_dirty(0x100000, 10 * PAGE, words) == 10 * PAGE
    assert int(words[0]) == (1 << 10) - 1


@pytest.mark.parametrize("method", ["read_dirty", "unmap_dirty"])
def test_a_bitmap_too_small_is_refused_before_the_kernel_is_asked(system, container, memory, method):
    container.map_dma(0x100000, vaddr(memory), 64 * PAGE, 3)
    container.start_dirty()
    count = len(system.calls)
    with pytest.raises(InvalidArgumentError):
        getattr(container, method)(0x100000, 64 * PAGE, bytearray(7))
    assert len(system.calls) == count


def test_dirty_sources_report_what_the_container_knows(container, memory):
    container.map_dma(0x100000, vaddr(memory), 4 * PAGE, 3)
    source, = container.dirty_sources()
    source.start([(0x100000, 4 * PAGE)], PAGE)
    words = np.array([0b10000], np.uint64)
    assert source.harvest(0x100000, 4 * PAGE, words) == 4
    assert int(words[0]) == 0b11111
    source.stop()
    with pytest.raises(InvalidArgumentError):
        source.start([(0x100000, 4 * PAGE)], 2 * PAGE)


# ---- bad arguments

@pytest.mark.parametrize("prot", [4, 7, 1 << 40])
def test_prot_is_checked_before_it_can_become_another_flag(system, container, memory, prot):
    with pytest.raises(InvalidArgumentError):
        container.map_dma(0x100000, vaddr(memory), PAGE, prot)
    assert abi.VFIO_IOMMU_MAP_DMA not in system.calls


@pytest.mark.parametrize("arguments", [(-1, 0, PAGE, 3), (0, -1, PAGE, 3), (0, 0, 1 << 64, 3), (1 << 64, 0, PAGE, 3)])
def test_numbers_outside_of_64_bits_are_einval(container, arguments):
    with pytest.raises(InvalidArgumentError):
        container.map_dma(*arguments)


def test_groups_that_left_are_told_apart_from_a_wrong_argument(system, container, memory):
    group = system.opened[1]
    system.inner.ioctl(group, abi.VFIO_GROUP_UNSET_CONTAINER)
    with pytest.raises(InvalidArgumentError, match="lost its groups"):
        container.map_dma(0x100000, vaddr(memory), PAGE, 3)


def test_info_structs_of_odd_chains_do_not_hang():
    from vfiodma.uapi.caps import capability_chain
    data = bytearray(64)
    struct.pack_into("=HHI", data, 24, 1, 1, 32)
    struct.pack_into("=HHI", data, 32, 2, 1, 24)
    assert [number for number, _, _ in capability_chain(bytes(data), 24)] == [1, 2]
    struct.pack_into("=HHI", data, 32, 2, 1, 1 << 31)
    assert [number for number, _, _ in capability_chain(bytes(data), 24)] == [1, 2]
