"""The guest is as docs/kernel-lab.md says: devices, groups, and a container that ctypes and fcntl can set up."""
import ctypes
import errno
import fcntl
import mmap
import os
import pathlib

import pytest

pytestmark = pytest.mark.short

PCI = pathlib.Path("/sys/bus/pci/devices")
EDU = ["0000:00:10.0", "0000:00:11.0", "0000:01:01.0", "0000:01:02.0"]
OTHERS = ["0000:00:14.0", "0000:00:15.0"]

VFIO_GET_API_VERSION, VFIO_CHECK_EXTENSION, VFIO_SET_IOMMU = 0x3B64, 0x3B65, 0x3B66
VFIO_GROUP_GET_STATUS, VFIO_GROUP_SET_CONTAINER = 0x3B67, 0x3B68
VFIO_IOMMU_MAP_DMA, VFIO_IOMMU_UNMAP_DMA = 0x3B71, 0x3B72
TYPE1V2 = 3


class Map(ctypes.Structure):
    _fields_ = [("argsz", ctypes.c_uint32), ("flags", ctypes.c_uint32),
                ("vaddr", ctypes.c_uint64), ("iova", ctypes.c_uint64), ("size", ctypes.c_uint64)]


class Unmap(ctypes.Structure):
    _fields_ = [("argsz", ctypes.c_uint32), ("flags", ctypes.c_uint32),
                ("iova", ctypes.c_uint64), ("size", ctypes.c_uint64)]


def group_of(address):
    return (PCI / address / "iommu_group").resolve().name


@pytest.mark.mock
def test_the_environment_tells_the_running_kernel():
    assert os.environ["KERNEL_LAB"] == os.uname().release
    assert os.geteuid() == 0


@pytest.mark.parametrize("address", EDU + OTHERS)
def test_devices_are_bound_to_vfio_pci(address):
    assert (PCI / address / "driver").resolve().name == "vfio-pci"


def test_edu_devices_have_their_ids():
    for address in EDU:
        ids = [(PCI / address / name).read_text().strip() for name in ("vendor", "device")]
        assert ids == ["0x1234", "0x11e8"]


def test_the_bridge_makes_one_group_of_two_devices():
    groups = [group_of(address) for address in EDU]
    assert groups[2] == groups[3] and len(set(groups)) == 3
    for group in groups:
        assert pathlib.Path(f"/dev/vfio/{group}").is_char_device()


def test_a_container_with_a_group_maps_memory():
    container = os.open("/dev/vfio/vfio", os.O_RDWR | os.O_CLOEXEC)
    group = os.open(f"/dev/vfio/{group_of(EDU[0])}", os.O_RDWR | os.O_CLOEXEC)
    try:
        assert fcntl.ioctl(container, VFIO_GET_API_VERSION) == 0
        assert fcntl.ioctl(container, VFIO_CHECK_EXTENSION, TYPE1V2) == 1
        status = bytearray((8).to_bytes(4, "little") + bytes(4))
        fcntl.ioctl(group, VFIO_GROUP_GET_STATUS, status)
        assert status[4] & 1, "the group is viable"
        fcntl.ioctl(group, VFIO_GROUP_SET_CONTAINER, container.to_bytes(4, "little"))
        fcntl.ioctl(container, VFIO_SET_IOMMU, TYPE1V2)
        with mmap.mmap(-1, 1 << 16) as memory:
            start = ctypes.c_char.from_buffer(memory)
            request = Map(ctypes.sizeof(Map), 3, ctypes.addressof(start), 0x100000, len(memory))
            fcntl.ioctl(container, VFIO_IOMMU_MAP_DMA, request)
            with pytest.raises(OSError) as caught:
                fcntl.ioctl(container, VFIO_IOMMU_MAP_DMA, request)
            assert caught.value.errno == errno.EEXIST
            unmap = Unmap(ctypes.sizeof(Unmap), 0, 0x100000, len(memory))
            fcntl.ioctl(container, VFIO_IOMMU_UNMAP_DMA, unmap)
            assert unmap.size == len(memory)
            del start
    finally:
        os.close(group)
        os.close(container)


def test_the_repository_can_be_written_to_and_stays_as_it_is():
    """Writes go to the overlay in memory; the host's files are safe."""
    probe = pathlib.Path(__file__).with_name("written-in-a-guest")
    probe.write_text("")
    assert probe.exists()
