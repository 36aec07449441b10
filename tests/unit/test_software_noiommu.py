"""Groups without an IOMMU in the software VFIO."""
import ctypes
import errno
import struct

import pytest

from vfiodma import SoftwareGroup, SoftwareVfio, Type1Container, VfioDevice
from vfiodma.backends.software import files
from vfiodma.errors import DmaPermissionError, VfioError
from vfiodma.uapi import vfio as abi


@pytest.fixture
def rawio(monkeypatch):
    """CAP_SYS_RAWIO, as the test wants it."""
    held = [True]
    monkeypatch.setattr(files, "has_capability", lambda number: number == 17 and held[0])
    return held


def machine():
    return SoftwareVfio(groups=[SoftwareGroup(0, ["0000:00:10.0"], noiommu=True), SoftwareGroup(1, ["0000:00:11.0"])],
                        noiommu=True, memlock_limit=None)


def code(call, *arguments):
    try:
        return call(*arguments)
    except VfioError as exc:
        return errno.errorcode[exc.errno]


def join(vfio, group, container):
    word = ctypes.c_int(container)
    return code(vfio.ioctl, group, abi.VFIO_GROUP_SET_CONTAINER, ctypes.addressof(word))


def extensions(vfio, fd):
    return [number for number in range(12) if vfio.ioctl(fd, abi.VFIO_CHECK_EXTENSION, number)]


def test_groups_without_an_iommu_need_the_option():
    with pytest.raises(ValueError, match="needs noiommu=True"):
        SoftwareVfio(groups=[SoftwareGroup(0, ["0000:00:10.0"], noiommu=True)])
    with pytest.raises(ValueError, match="not both"):
        SoftwareGroup(0, [], noiommu=True, emulated=True)


def test_the_extension_is_there_with_the_option_and_for_groups_that_suit(rawio):
    vfio, plain = machine(), SoftwareVfio(memlock_limit=None)
    fd = vfio.open("/dev/vfio/vfio")
    assert 8 in extensions(vfio, fd) and 3 in extensions(vfio, fd)
    assert 8 not in extensions(plain, plain.open("/dev/vfio/vfio"))
    group = vfio.open("/dev/vfio/noiommu-0")
    assert join(vfio, group, fd) == 0 and extensions(vfio, fd) == [8]
    assert code(vfio.ioctl, fd, abi.VFIO_SET_IOMMU, 3) == "ENODEV"
    assert vfio.ioctl(fd, abi.VFIO_SET_IOMMU, 8) == 0 and extensions(vfio, fd) == [8]
    assert code(vfio.ioctl, fd, abi.VFIO_SET_IOMMU, 8) == "EINVAL"
    other = vfio.open("/dev/vfio/vfio")
    assert join(vfio, vfio.open("/dev/vfio/1"), other) == 0
    assert 8 not in extensions(vfio, other) and code(vfio.ioctl, other, abi.VFIO_SET_IOMMU, 8) == "ENODEV"


def test_nothing_can_be_mapped_and_devices_are_there(rawio):
    vfio = machine()
    with Type1Container(["0000:00:10.0"], system=vfio, noiommu=True) as container:
        with pytest.raises(VfioError) as caught:
            container.map_dma(0, 0x1000, 4096, 3)
        assert caught.value.errno == errno.ENOTTY and "maps nothing" in str(caught.value)
        assert code(vfio.ioctl, container.fd, abi.VFIO_IOMMU_GET_INFO, 0) == "ENOTTY"
        with VfioDevice.open(container, "0000:00:10.0") as device:
            assert device.info is not None
            port = vfio._groups[0].ports["0000:00:10.0"]
            with pytest.raises(VfioError):
                port.write(0, b"x")


def test_without_the_capability_and_without_asking_it_is_refused(rawio):
    vfio = machine()
    with pytest.raises(DmaPermissionError, match="pass noiommu=True"):
        Type1Container(["0000:00:10.0"], system=vfio)
    fd, group = vfio.open("/dev/vfio/vfio"), vfio.open("/dev/vfio/noiommu-0")
    rawio[0] = False
    assert join(vfio, group, fd) == "EPERM"
    rawio[0] = True
    assert join(vfio, group, fd) == 0
    rawio[0] = False
    assert code(vfio.ioctl, fd, abi.VFIO_SET_IOMMU, 8) == "EPERM"
    vfio.close(group)
    assert code(vfio.open, "/dev/vfio/noiommu-0") == "EPERM"


def test_groups_with_and_without_an_iommu_do_not_mix(rawio):
    vfio = machine()
    fd, plain, real = vfio.open("/dev/vfio/vfio"), vfio.open("/dev/vfio/noiommu-0"), vfio.open("/dev/vfio/1")
    assert join(vfio, plain, fd) == 0 and join(vfio, real, fd) == "EPERM"
    assert vfio.ioctl(plain, abi.VFIO_GROUP_UNSET_CONTAINER) == 0
    assert join(vfio, real, fd) == 0 and join(vfio, plain, fd) == "EPERM"
    assert join(vfio, plain, vfio.open("/dev/iommu")) == "EPERM"
    assert vfio.ioctl(plain, abi.VFIO_GROUP_GET_STATUS, ctypes.addressof(ctypes.create_string_buffer(
        struct.pack("II", 8, 0)))) == 0
