"""Information, regions and registers of software devices."""
import ctypes
import errno
import struct

import pytest
from software_card import Card
from software_device import fails, opened

from vfiodma.backends.software.device.regions import sparse_capability, type_capability
from vfiodma.devices.pci import VfioDevice
from vfiodma.uapi import vfio as abi

PAGE = 4096


def at(region, offset):
    return region << 40 | offset


def region_info(device, index, argsz=128):
    data = device.ioctl(abi.VFIO_DEVICE_GET_REGION_INFO, struct.pack("=IIII", argsz, 0, index, 99).ljust(160, b"\xaa"))
    return struct.unpack_from("=IIIIQQ", data), data


# ---- information

def info(device, argsz):
    data = device.ioctl(abi.VFIO_DEVICE_GET_INFO, struct.pack("=I", argsz).ljust(80, b"\xaa"))
    return struct.unpack_from("=IIIIII", data), data


@pytest.mark.parametrize("kernel", ["5.12", "6.1", "6.12", "7.2"])
def test_capabilities_of_a_device_are_a_chain(kernel):
    card = Card(info_caps=[(5, 1, struct.pack("=II", 3, 0)), (4, 2, b"abc")])
    with opened(card, kernel=kernel) as device:
        (argsz, flags, regions, irqs, cap_offset, _), data = info(device, 24 + 16 + 16)
        assert (argsz, flags, regions, irqs, cap_offset) == (56, 3 | abi.VFIO_DEVICE_FLAGS_CAPS, 9, 5, 24)
        second = struct.pack("=HHI", 4, 2, 0) + b"abc".ljust(8, b"\0")
        assert data[24:56] == struct.pack("=HHIII", 5, 1, 40, 3, 0) + second
        assert data[56:] == b"\xaa" * 24
        (argsz, flags, _, _, cap_offset, _), data = info(device, 55)
        assert (argsz, cap_offset) == (56, 0) and flags & abi.VFIO_DEVICE_FLAGS_CAPS
        assert data[24:] == b"\xaa" * 56


def test_5_4_knows_no_capabilities_of_a_device():
    with opened(Card(info_caps=[(5, 1, bytes(8))]), kernel="5.4") as device:
        (argsz, flags, *_), data = info(device, 64)
        assert (argsz, flags) == (64, 3) and data[16:] == b"\xaa" * 64


def test_a_device_without_reset_says_so():
    with opened(Card(can_reset=False)) as device:
        assert info(device, 24)[0][1] == abi.VFIO_DEVICE_FLAGS_PCI
        with fails(errno.EINVAL):
            device.ioctl(abi.VFIO_DEVICE_RESET)


# ---- regions

AREAS = [(0, PAGE), (3 * PAGE, PAGE)]


@pytest.fixture
def card():
    sizes = {0: 0x8000, 1: 2 * PAGE, 3: 0x4000, 6: 0x800, 7: 256, 9: 3 * PAGE, 10: 100}
    caps = {1: [sparse_capability(AREAS)], 9: [type_capability(0x80008086, 2), (77, 3, b"12345")],
            10: [type_capability(1, 1)]}
    card = Card(regions=sizes, flags={1: 7, 3: 7, 6: 1, 9: 7, 10: 3}, msix_table=(3, 0x1000, 0x100), region_count=11,
                region_caps=lambda index: caps.get(index, ()))
    with opened(card) as device:
        yield device


def test_capabilities_of_a_region_are_written_where_they_fit(card):
    (argsz, flags, index, cap_offset, size, offset), data = region_info(card, 9, 64)
    assert (argsz, flags, index, cap_offset, size, offset) == (64, 15, 9, 32, 3 * PAGE, 9 << 40)
    second = struct.pack("=HHI", 77, 3, 0) + b"12345\0\0\0"
    assert data[32:64] == struct.pack("=HHIII", 2, 1, 48, 0x80008086, 2) + second
    (argsz, flags, _, cap_offset, *_), data = region_info(card, 9, 63)
    assert (argsz, flags, cap_offset) == (64, 15, 0) and data[32:] == b"\xaa" * 128
    (argsz, flags, _, cap_offset, *_), _ = region_info(card, 0)
    assert (argsz, flags, cap_offset) == (128, 3, 99)           # no capabilities: left alone


def test_typed_regions_are_decoded_by_the_typed_side(card):
    with VfioDevice.open(card.container, card.device.address) as device:
        assert device.info.num_regions == 11
        assert device.regions[9].info.type == (0x80008086, 2) and device.regions[10].info.type == (1, 1)
        assert device.regions[1].info.sparse_areas == tuple(AREAS)
        assert device.regions[3].info.msix_mappable and not device.regions[0].info.msix_mappable
        assert device.regions[6].info.flags == abi.VFIO_REGION_INFO_FLAG_READ
        with device.regions[9].mmap() as mapped:
            mapped.areas[0][1][:4] = b"test"
        assert device.regions[9].read(0, 4) == b"test"


@pytest.mark.parametrize("index", [8, 11, 0xFFFFFFFF])
def test_regions_that_do_not_exist_are_invalid(card, index):
    with fails(errno.EINVAL):
        region_info(card, index)


def test_the_legacy_vga_region_exists_for_a_device_that_has_it():
    with opened(Card(regions={7: 256, 8: 0xC0000})) as device:
        assert region_info(device, 8)[0][4] == 0xC0000


# ---- registers

@pytest.mark.parametrize("kernel, wide", [("6.1", False), ("6.12", True), ("7.2", True)])
def test_a_bar_is_accessed_in_aligned_pieces(kernel, wide):
    with opened(Card(), kernel=kernel) as device:
        device.device.accesses.clear()
        device.vfio.pread(device.fd, 23, at(0, 1))
        eights = [(0, 8, 8), (0, 16, 8)] if wide else [(0, 8, 4), (0, 12, 4), (0, 16, 4), (0, 20, 4)]
        assert device.device.accesses == [(0, 1, 1), (0, 2, 2), (0, 4, 4), *eights]
        assert device.vfio.pwrite(device.fd, b"123456", at(0, 3)) == 6
        assert device.device.accesses[-3:] == [(0, 3, b"1"), (0, 4, b"2345"), (0, 8, b"6")]


def test_the_msix_table_is_not_accessible(card):
    card.device.memory[3][:] = b"\x11" * 0x4000
    assert card.vfio.pread(card.fd, 0x110, at(3, 0xFF8)) == b"\x11" * 8 + b"\xff" * 0x100 + b"\x11" * 8
    card.vfio.pwrite(card.fd, b"\x22" * 0x110, at(3, 0xFF8))
    assert card.device.memory[3][0xFF8:0x1108] == b"\x22" * 8 + b"\x11" * 0x100 + b"\x22" * 8


def test_access_ends_with_the_region(card):
    assert len(card.vfio.pread(card.fd, 100, at(0, 0x7FFE))) == 2
    assert card.vfio.pwrite(card.fd, b"12345", at(10, 98)) == 2
    for region, offset in ((0, 0x8000), (5, 0), (8, 0), (10, 100), (11, 0), (-1, 0)):
        with fails(errno.EINVAL):
            card.vfio.pread(card.fd, 1, at(region, offset))
    with fails(errno.EFAULT):
        card.vfio.pread(card.fd, 5, at(7, 252))
    with fails(errno.EINVAL):
        card.vfio.pwrite(card.fd, b"1", at(6, 0))
    assert card.vfio.pread(card.fd, 4, at(6, 0)) == bytes(4)


def test_a_size_below_zero_is_invalid_and_none_is_nothing(card):
    with fails(errno.EINVAL):
        card.vfio.pread(card.fd, -1, at(0, 0))
    assert card.vfio.pread(card.fd, 0, at(300, 0)) == b"" and card.vfio.pwrite(card.fd, b"", at(300, 0)) == 0


def test_bars_do_not_answer_while_memory_access_is_off(card):
    card.vfio.pwrite(card.fd, b"\0\0", at(7, 4))
    for call in (lambda: card.vfio.pread(card.fd, 4, at(0, 0)), lambda: card.vfio.pwrite(card.fd, b"1234", at(0, 0))):
        with fails(errno.EIO):
            call()
    assert card.vfio.pread(card.fd, 1, at(9, 0)) == b"\0"       # no BAR
    card.vfio.pwrite(card.fd, b"\2\0", at(7, 4))
    card.vfio.pread(card.fd, 4, at(0, 0))


# ---- mmap

def test_a_mapping_is_the_memory_of_the_device(card):
    view = card.vfio.mmap(card.fd, PAGE, at(9, PAGE), 3)
    view[:3] = b"abc"
    assert card.device.memory[9][PAGE:PAGE + 3] == b"abc" and len(view) == PAGE
    card.device.memory[9][PAGE] = 0x7A
    assert bytes(view[:3]) == b"zbc"
    with pytest.raises(TypeError):
        card.vfio.mmap(card.fd, PAGE, at(9, 0), 1)[0] = 1


@pytest.mark.parametrize("region, offset, size", [
    (0, 0, PAGE), (6, 0, PAGE), (7, 0, PAGE), (8, 0, PAGE), (10, 0, PAGE), (11, 0, PAGE), (9, 0, 0), (9, 100, PAGE),
    (9, 2 * PAGE, 2 * PAGE), (9, 3 * PAGE, PAGE), (9, 0, -PAGE)])
def test_what_can_not_be_mapped_is_invalid(card, region, offset, size):
    with fails(errno.EINVAL):
        card.vfio.mmap(card.fd, size, at(region, offset), 3)


def test_other_descriptors_can_not_be_mapped_or_read_as_streams(card):
    container = card.vfio.open("/dev/vfio/vfio")
    with fails(errno.ENODEV):
        card.vfio.mmap(container, PAGE, 0, 3)
    for fd in (container, card.fd):
        with fails(errno.EINVAL):
            card.vfio.read(fd, 1)
        with fails(errno.EINVAL):
            card.vfio.write(fd, b"x")
    card.vfio.close(container)


# ---- displays

class Display(Card):
    plane_access = abi.VFIO_GFX_PLANE_TYPE_DMABUF
    enabled = True

    def query_plane(self, kind, access):
        return {"drm_format": 0x34325258, "width": 64, "height": 32, "dmabuf_id": 5 + kind} if self.enabled else None

    def plane_dmabuf(self, number):
        return 123 if number == 5 else None


def gfx(device, flags, kind=0, argsz=64):
    data = device.ioctl(abi.VFIO_DEVICE_QUERY_GFX_PLANE, struct.pack("=III", argsz, flags, kind).ljust(64, b"\xaa"))
    return abi.vfio_device_gfx_plane_info.unpack(data)


def test_planes_are_probed_and_queried():
    with opened(Display()) as device:
        gfx(device, 3)
        for flags in (0, 1, 4, 5, 6, 7, 8, 10):
            with fails(errno.EINVAL):
                gfx(device, flags)
        with fails(errno.EINVAL):
            gfx(device, 2, argsz=59)
        plane = gfx(device, 2)
        assert (plane["drm_format"], plane["width"], plane["height"], plane["dmabuf_id"]) == (0x34325258, 64, 32, 5)
        assert plane["x_hot"] == plane["y_hot"] == 0xFFFFFFFF
        device.device.enabled = False
        plane = gfx(device, 2, 1)
        assert (plane["drm_format"], plane["width"], plane["size"], plane["drm_plane_type"]) == (0, 0, 0, 1)


def test_a_dmabuf_is_found_by_its_id():
    with opened(Display()) as device:
        number = ctypes.c_uint32(5)
        assert device.vfio.ioctl(device.fd, abi.VFIO_DEVICE_GET_GFX_DMABUF, ctypes.addressof(number)) == 123
        number.value = 6
        with fails(errno.ENOENT):
            device.vfio.ioctl(device.fd, abi.VFIO_DEVICE_GET_GFX_DMABUF, ctypes.addressof(number))
        with fails(errno.EFAULT):
            device.vfio.ioctl(device.fd, abi.VFIO_DEVICE_GET_GFX_DMABUF, 16)


def test_a_device_without_a_display_has_no_planes(card):
    with fails(errno.ENOTTY):
        gfx(card, 3)
    with fails(errno.ENOTTY):
        card.ioctl(abi.VFIO_DEVICE_GET_GFX_DMABUF, bytes(4))
