"""The kernel's iommufd through the typed objects: real devices behind VT-d.

Runs as root in a guest of the kernel lab whose kernel has iommufd; is skipped elsewhere.
"""
import ctypes
import errno
import os
import struct
import subprocess
import threading
import time

import numpy as np
import pytest

from vfiodma import GuestMemory, IoAddressSpace, open_backend
from vfiodma.backends.iommufd import Iommufd, IommufdContainer
from vfiodma.backends.type1 import Type1Container
from vfiodma.errors import (
    InvalidArgumentError,
    NoDeviceError,
    NotMappedError,
    OverlapError,
    UnsupportedError,
    VfioError,
)
from vfiodma.types import Prot

pytestmark = pytest.mark.skipif("KERNEL_LAB" not in os.environ or not os.path.exists("/dev/iommu"),
                                reason="runs in a kernel-lab guest with iommufd")

# Linux 6.12 has the self-test IOMMU only without a real one: boot it with intel_iommu=off.
needs_devices = pytest.mark.skipif(not os.path.exists("/sys/bus/pci/devices/0000:00:14.0/iommu_group"),
                                   reason="no IOMMU stands before the devices")

PAGE = 4096
EDU, EDU2, NIC, NVME = "0000:00:10.0", "0000:00:11.0", "0000:00:14.0", "0000:00:15.0"
SHARED = ("0000:01:01.0", "0000:01:02.0")           # one IOMMU group
RELEASE = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2]))


@pytest.fixture
def memory():
    with GuestMemory.memfd(64 * PAGE) as guest:
        yield guest


def vaddr(memory):
    return memory.regions[0].vaddr


def open_count():
    return len(os.listdir("/proc/self/fd"))


# ---- the backend

@needs_devices
def test_tells_what_the_device_reaches():
    with open_backend("iommufd", devices=[NIC]) as container:
        found = container.capabilities()
        assert found.backend == "iommufd" and found.min_pgsize == PAGE
        assert {"map_many", "unmap_all"} <= found.features
        assert ("dirty" in found.features) == container.devices[NIC].hw_info().dirty_tracking
        ranges = container.iova_ranges()
        assert ranges[0].start == 0 and ranges[-1].last == (1 << 39) - 1
        assert not any(r.start <= 0xFEE00000 <= r.last for r in ranges), "the interrupt range is reserved"


@needs_devices
def test_maps_unmaps_and_refuses_like_the_kernel(memory):
    with IommufdContainer([NIC]) as container:
        at = vaddr(memory)
        container.map_dma(0x10000, at, 4 * PAGE, 3)
        container.map_dma(0x20000, at, 4 * PAGE, 1)
        with pytest.raises(OverlapError) as caught:
            container.map_dma(0x13000, at, PAGE, 3)
        assert caught.value.errno == errno.EEXIST
        for iova, size in [(0x14001, PAGE), (0x14000, 100), (0x14000, 0), (0xFEE00000, PAGE), (1 << 39, PAGE)]:
            with pytest.raises(VfioError) as caught:
                container.map_dma(iova, at, size, 3)
            assert caught.value.errno == errno.EINVAL, (hex(iova), size)
        with pytest.raises(NotMappedError):
            container.unmap_dma(0x11000, PAGE)
        with pytest.raises(NotMappedError):
            container.unmap_dma(0x10000, 0x12000)               # cuts the second one: the first one stays
        assert container.unmap_dma(0x10000, 0x14000) == 8 * PAGE
        assert container.unmap_dma(0x10000, 0x14000) == 0
        assert container.unmap_all() == 0


@needs_devices
def test_a_list_is_mapped_whole_or_not_at_all(memory):
    at = vaddr(memory)
    rows = np.array([[0x10000 + i * PAGE, at + i * PAGE, PAGE, 3] for i in range(64)], np.uint64)
    with IommufdContainer([NIC]) as container:
        container.map_many(rows)
        assert container.unmap_all() == 64 * PAGE
        rows[63, 1] = 0x1000                # nothing is there
        with pytest.raises(VfioError) as caught:
            container.map_many(rows)
        assert caught.value.errno == errno.EFAULT and "entry 63" in str(caught.value)
        assert container.areas() == [] and container.unmap_all() == 0


@needs_devices
def test_the_address_space_works_on_it(memory):
    with IoAddressSpace(IommufdContainer([NIC, NVME]), close_backend=True) as ioas:
        mapping = ioas.map(memory)
        assert ioas.translate(mapping.iova) == mapping.vaddr
        assert ioas.unmap(mapping.iova) == mapping.size


@needs_devices
def test_wrong_memory_shows_at_the_attach_when_mapped_before():
    with Iommufd() as iommufd, iommufd.bind(NIC) as device:
        ioas = iommufd.alloc_ioas()
        ioas.map_dma(0x100000, 0x1000, PAGE, 3)
        with pytest.raises(VfioError) as caught:
            device.attach(ioas)
        assert caught.value.errno == errno.EFAULT
        assert ioas.unmap_all() == PAGE
        device.attach(ioas)


@needs_devices
def test_an_iova_out_of_reach_is_refused_at_the_attach(memory):
    with Iommufd() as iommufd, iommufd.bind(NIC) as device:
        ioas = iommufd.alloc_ioas()
        ioas.map_dma(1 << 40, vaddr(memory), PAGE, 3)
        with pytest.raises(OverlapError) as caught:
            device.attach(ioas)
        assert caught.value.errno == errno.EADDRINUSE and "attach before mapping" in str(caught.value)
        ioas.unmap_all()
        ioas.allow_iovas([(1 << 40, (1 << 40) + 0xFFFF)])
        with pytest.raises(OverlapError):
            device.attach(ioas)
        ioas.allow_iovas([])
        device.attach(ioas)


@needs_devices
def test_the_kernel_chooses_iovas_within_what_is_allowed(memory):
    with IommufdContainer([NIC]) as container:
        container.allow_iovas([(0x400000, 0x7FFFFF)])
        assert container.map_auto(vaddr(memory), 4 * PAGE) == 0x400000
        with pytest.raises(VfioError) as caught:
            container.map_auto(vaddr(memory), 2 << 30, Prot.READ)
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OverlapError):
            container.allow_iovas([(1 << 40, (1 << 40) + PAGE)])
        assert len(container.iova_ranges()) == 2, "the allowed list is no matter of iova_ranges()"


@needs_devices
def test_a_copy_shares_pages(memory):
    with IommufdContainer([NIC]) as container:
        container.map_dma(0x10000, vaddr(memory), 4 * PAGE, 3)
        container.map_dma(0x14000, vaddr(memory), 4 * PAGE, 1)
        other = container.iommufd.alloc_ioas()
        assert other.copy(container, 0x12000, 4 * PAGE, Prot.READ, 0x50000) == 0x50000
        assert other.areas() == [(0x50000, 2 * PAGE), (0x52000, 2 * PAGE)]
        with pytest.raises(NotMappedError):
            other.unmap_dma(0x51000, PAGE)
        with pytest.raises(NotMappedError):
            other.copy(container, 0x16000, 4 * PAGE, Prot.READ)
        assert other.unmap_dma(0x52000, 2 * PAGE) == 2 * PAGE
        assert other.unmap_all() == 2 * PAGE
        other.destroy()
        with pytest.raises(NotMappedError):
            other.unmap_all()


@needs_devices
def test_a_file_stays_mapped_without_the_process(memory):
    with IommufdContainer([NIC]) as container:
        fd = os.memfd_create("guest")
        os.ftruncate(fd, 8 * PAGE)
        try:
            if RELEASE < (6, 14):
                with pytest.raises(UnsupportedError):
                    container.map_file(fd, 0, 8 * PAGE)
                return
            iova = container.map_file(fd, PAGE, 4 * PAGE, Prot.RW, 0x30000)
            assert iova == 0x30000
            container.change_process()
            container.map_dma(0x10000, vaddr(memory), PAGE, 3)
            with pytest.raises(InvalidArgumentError):
                container.change_process()
        finally:
            os.close(fd)
        assert container.unmap_dma(0x30000, 4 * PAGE) == 4 * PAGE


def test_options():
    with Iommufd(rlimit_mode="process") as iommufd:
        assert iommufd.rlimit_mode == "process"
        ioas = iommufd.alloc_ioas()
        assert ioas.huge_pages
        ioas.huge_pages = False
        assert not ioas.huge_pages and ioas.iova_alignment() == PAGE
        assert iommufd.vfio_ioas() is None
        iommufd.set_vfio_ioas(ioas)
        assert iommufd.vfio_ioas() == ioas.id
        iommufd.set_vfio_ioas(None)


# ---- devices

@needs_devices
def test_a_device_changes_its_table_and_leaves(memory):
    with Iommufd() as iommufd, iommufd.bind(EDU) as device:
        first, second = iommufd.alloc_ioas(), iommufd.alloc_ioas()
        automatic = device.attach(first)
        assert device.attach(second) != automatic
        hwpt = iommufd.alloc_hwpt(second, device.id)
        assert device.attach(hwpt) == hwpt.id
        with pytest.raises(VfioError) as caught:
            hwpt.destroy()
        assert caught.value.errno == errno.EBUSY
        device.detach()
        device.detach()
        hwpt.destroy()
        first.destroy()
        second.destroy()


@needs_devices
def test_devices_of_one_group_share_a_container(memory):
    with IommufdContainer(SHARED) as container:
        container.map_dma(0x10000, vaddr(memory), PAGE, 3)
        fds = [container.open_device_fd(address) for address in SHARED]
        for fd in fds:
            container.system.close(fd)


@needs_devices
def test_busy_devices_are_refused_with_what_to_do_and_nothing_stays_open():
    before = open_count()
    with IommufdContainer([NIC]):
        inside = open_count()
        with pytest.raises(VfioError) as caught:
            IommufdContainer([NVME, NIC])
        assert caught.value.errno in (errno.EINVAL, errno.EBUSY) and caught.value.hint
        assert open_count() == inside
    with Type1Container([NIC]), pytest.raises(VfioError) as caught:
        IommufdContainer([NIC])
    assert caught.value.errno == errno.EBUSY and "group" in caught.value.hint
    with IommufdContainer([NIC, NVME]):
        pass
    assert open_count() == before


class Edu:
    """The DMA engine of QEMU's edu device through pread and pwrite."""

    def __init__(self, system, fd):
        self.system, self.fd = system, fd
        command = int.from_bytes(system.pread(fd, 2, (7 << 40) + 4), "little")
        system.pwrite(fd, struct.pack("<H", command | 6), (7 << 40) + 4)

    def move(self, source, target, size, to_memory):
        for offset, value in ((0x80, source), (0x88, target), (0x90, size)):
            self.system.pwrite(self.fd, struct.pack("<Q", value), offset)
        self.system.pwrite(self.fd, struct.pack("<I", 1 | 2 * to_memory), 0x98)
        end = time.monotonic() + 20
        while self.system.pread(self.fd, 4, 0x98)[0] & 1:
            assert time.monotonic() < end
            time.sleep(0.02)


@needs_devices
def test_bytes_arrive_where_they_are_mapped_and_nowhere_after_unmap(memory):
    region = memory.regions[0]
    view = (ctypes.c_char * region.size).from_address(region.vaddr)
    with IommufdContainer([EDU]) as container:
        fd = container.open_device_fd(EDU)
        try:
            edu = Edu(container.system, fd)
            container.map_dma(0x100000, region.vaddr, 2 * PAGE, 3)
            view[:8] = b"out+back"
            edu.move(0x100000, 0x40000, 8, False)
            edu.move(0x40000, 0x101000, 8, True)
            assert view[PAGE:PAGE + 8] == b"out+back"
            container.unmap_dma(0x100000, 2 * PAGE)
            view[PAGE:PAGE + 8] = b"untouched"[:8]
            edu.move(0x40000, 0x101000, 8, True)
            assert view[PAGE:PAGE + 8] == b"untouche"
            container.map_dma(0x100000, region.vaddr, 2 * PAGE, 3)
            container.close()
            view[PAGE:PAGE + 8] = b"detached"
            edu.move(0x40000, 0x101000, 8, True)            # through the duplicate that is still open
            assert view[PAGE:PAGE + 8] == b"detached"
        finally:
            container.system.close(fd)
        del view


def test_mediated_devices_are_bound_by_their_node(memory):
    if subprocess.run(["modprobe", "-q", "mtty"]).returncode:
        pytest.skip("this kernel has no sample mediated devices")
    uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    types = "/sys/devices/virtual/mtty/mtty/mdev_supported_types"
    with open(f"{types}/{sorted(os.listdir(types))[0]}/create", "w") as file:
        file.write(uuid)
    place = f"/sys/bus/mdev/devices/{uuid}"
    try:
        node, = os.listdir(f"{place}/vfio-dev")
        with IommufdContainer([f"/dev/vfio/devices/{node}"]) as container:
            assert "dirty" not in container.capabilities().features
            container.map_dma(0x10000, vaddr(memory), PAGE, 3)
            container.system.close(container.open_device_fd(f"/dev/vfio/devices/{node}"))
            assert container.unmap_all() == PAGE
    finally:
        with open(f"{place}/remove", "w") as file:
            file.write("1")


@needs_devices
def test_threads_map_and_unmap_side_by_side(memory):
    at, failures = vaddr(memory), []

    def work(number, container):
        try:
            for i in range(150):
                base = (number << 24) + 0x100000
                container.map_dma(base, at, 8 * PAGE, 3)
                container.map_many(np.array([[base + (n + 16) * PAGE, at, PAGE, 1] for n in range(8)], np.uint64))
                assert container.unmap_dma(base, 8 * PAGE if i % 2 else 24 * PAGE) == (8 if i % 2 else 16) * PAGE
                if i % 2:
                    assert container.unmap_dma(base, 32 * PAGE) == 8 * PAGE
        except BaseException as exc:
            failures.append(exc)

    with IommufdContainer([NIC]) as container:
        threads = [threading.Thread(target=work, args=(number, container)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == [] and container.areas() == []
        assert container.unmap_all() == 0


@needs_devices
def test_a_device_that_is_taken_away_leaves_when_the_container_closes(memory):
    driver = "/sys/bus/pci/drivers/vfio-pci/"

    def tell(name):
        with open(driver + name, "w") as file:
            file.write(NVME)

    container = IommufdContainer([NVME])
    try:
        container.map_dma(0x10000, vaddr(memory), PAGE, 3)
        unbinding = threading.Thread(target=tell, args=("unbind",))
        unbinding.start()
        unbinding.join(0.5)
        assert unbinding.is_alive(), "the kernel waits for the descriptor"
        container.map_dma(0x20000, vaddr(memory), PAGE, 3)
    finally:
        container.close()
    unbinding.join(60)
    assert not unbinding.is_alive()
    with pytest.raises(NoDeviceError) as caught:
        IommufdContainer([NVME])
    assert "not bound to a driver" in str(caught.value)
    tell("bind")
    IommufdContainer([NVME]).close()


# ---- the container that iommufd emulates

@needs_devices
@pytest.mark.parametrize("node", ["/dev/iommu", "/dev/vfio/vfio"])
def test_the_container_of_old_works_on_iommufd(node, memory):
    if not os.path.exists(node):
        pytest.skip(f"no {node}")
    with Type1Container([NIC], node=node) as container:
        found = container.capabilities()
        assert {"map_many", "unmap_all"} <= found.features
        assert found.min_pgsize == PAGE
        assert not any(r.start <= 0xFEE00000 <= r.last for r in container.iova_ranges()), "devices are attached by now"
        with pytest.raises(VfioError) as caught:
            container.map_dma(0xFEE00000, vaddr(memory), PAGE, 3)
        assert caught.value.errno == errno.EINVAL
        assert (found.dma_entry_limit is None) == (node == "/dev/iommu")
        container.map_dma(0x10000, vaddr(memory), 4 * PAGE, 3)
        with pytest.raises(VfioError) as caught:
            container.map_dma(0x11000, vaddr(memory), PAGE, 3)
        assert caught.value.errno == errno.EEXIST
        with pytest.raises(VfioError):
            container.unmap_dma(0x11000, PAGE)
        assert container.unmap_dma(0x10000, 4 * PAGE) == 4 * PAGE
        assert container.unmap_all() == 0
        container.system.close(container.open_device_fd(NIC))
    with IoAddressSpace(Type1Container([NIC], node=node), close_backend=True) as ioas:
        assert ioas.map(memory).size == 64 * PAGE


def test_the_kernel_did_not_complain():
    text = subprocess.run(["dmesg"], capture_output=True, text=True).stdout
    assert "WARNING:" not in text and "BUG:" not in text
