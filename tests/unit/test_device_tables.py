"""ioeventfds and planes of a display: every combination of arguments against the table of errnos."""
import ctypes
import errno
import itertools
import os
import struct

import pytest
from software_card import Card
from software_device import opened

from vfiodma.errors import VfioError
from vfiodma.uapi import vfio as abi

WIDTHS = (abi.VFIO_DEVICE_IOEVENTFD_8, abi.VFIO_DEVICE_IOEVENTFD_16, abi.VFIO_DEVICE_IOEVENTFD_32,
          abi.VFIO_DEVICE_IOEVENTFD_64)
TABLE = (3, 0x1000, 0x100)          # BAR, offset, size of the MSI-X table
CLOSED_FD = 1 << 20
PROBE, DMABUF, REGION = abi.VFIO_GFX_PLANE_TYPE_PROBE, abi.VFIO_GFX_PLANE_TYPE_DMABUF, abi.VFIO_GFX_PLANE_TYPE_REGION


def code(call, *arguments):
    try:
        call(*arguments)
    except VfioError as exc:
        return exc.errno
    return 0


def wanted(kernel, there, argsz, flags, bar, at, data, fd, sizes):
    """Return the errno of an ioeventfd; ``there`` has those that exist, and is changed."""
    if argsz < 28 or flags & ~abi.VFIO_DEVICE_IOEVENTFD_SIZE_MASK or flags not in WIDTHS or fd < -1:
        return errno.EINVAL
    if bar > 5 or at + flags > sizes[bar]:
        return errno.EINVAL
    if bar == TABLE[0] and at + flags > TABLE[1] and at < TABLE[1] + TABLE[2]:
        return errno.EINVAL
    if flags == 8 and kernel == "7.2":
        return errno.EINVAL
    key = (bar, at, data, flags)
    if key in there:
        if fd != -1:
            return errno.EEXIST
        there.remove(key)
        return 0
    if fd == -1:
        return errno.ENODEV
    if fd == CLOSED_FD:
        return errno.EBADF
    if fd == 0:                         # no eventfd
        return errno.EINVAL
    there.add(key)
    return 0


@pytest.mark.parametrize("kernel", ["6.1", "7.2"])
def test_ioeventfds_are_added_found_and_removed_by_place_data_and_width(kernel):
    eventfd, there = os.eventfd(0, os.EFD_NONBLOCK), set()
    with opened(Card(msix_table=TABLE), kernel=kernel) as card:
        sizes = [card.device.region_size(bar) for bar in range(6)]
        for flags, bar, at, (argsz, fd), data in itertools.product(
                range(20), (0, 1, 3, 5, 6, 7), (0, 4, 0xff8, 0xffc, 0xfff, 0x1000, 0x10ff, 0x1100, sizes[0] - 8,
                                                sizes[0] - 1),
                ((28, eventfd), (32, eventfd), (27, eventfd), (28, -2), (28, CLOSED_FD), (28, 0), (28, -1), (28, -1)),
                (0, 1)):
            place = bar << 40 | at
            got = code(card.ioctl, abi.VFIO_DEVICE_IOEVENTFD, struct.pack("=IIQQi", argsz, flags, place, data, fd))
            assert got == wanted(kernel, there, argsz, flags, bar, at, data, fd, sizes), (flags, bar, at, argsz, fd)
        assert not there and not card.device.accesses
        assert code(card.vfio.ioctl, card.fd, abi.VFIO_DEVICE_IOEVENTFD, 8) == errno.EFAULT
    os.close(eventfd)


def test_writes_of_one_place_differ_in_data_and_width():
    eventfd, other = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    with opened(Card(msix_table=TABLE), kernel="6.12") as card:
        for flags, data in itertools.product(WIDTHS, (1, 2)):
            for fd, result in ((eventfd, 0), (eventfd, errno.EEXIST), (other, errno.EEXIST)):
                argument = struct.pack("=IIQQi", 28, flags, 8, data, fd)
                assert code(card.ioctl, abi.VFIO_DEVICE_IOEVENTFD, argument) == result
        for result in (0, errno.ENODEV):
            for flags, data in itertools.product(WIDTHS, (1, 2)):
                argument = struct.pack("=IIQQi", 28, flags, 8, data, -1)
                assert code(card.ioctl, abi.VFIO_DEVICE_IOEVENTFD, argument) == result
    os.close(eventfd)
    os.close(other)


class Display(Card):
    """Planes that can be shown in the ways that ``plane_access`` tells."""

    def __init__(self, access):
        super().__init__()
        self.plane_access = access

    def query_plane(self, kind, access):
        return {"width": 640, "height": 480, "x_hot": 3} if kind == 0 else None

    def plane_dmabuf(self, number):
        return os.dup(1) if number == 7 else None


@pytest.mark.parametrize("access", [0, DMABUF, REGION, DMABUF | REGION])
def test_planes_are_probed_and_queried_by_every_flag(access):
    layout = abi.vfio_device_gfx_plane_info
    with opened(Display(access)) as card:
        for flags in [*range(16), 1 << 31, 1 << 31 | DMABUF]:
            way = flags & ~PROBE
            good = way in (DMABUF, REGION) and way & access
            for argsz, kind in itertools.product((0, 59, 60, 64, 80), (0, 1, 2, 9)):
                data = layout.pack(argsz=argsz, flags=flags, drm_plane_type=kind, width=99, x_hot=99)
                expected = 0 if argsz >= 60 and good else errno.EINVAL
                buffer = ctypes.create_string_buffer(data, 64)
                assert code(card.vfio.ioctl, card.fd, abi.VFIO_DEVICE_QUERY_GFX_PLANE,
                            ctypes.addressof(buffer)) == expected, (flags, argsz, kind)
                plane = layout.unpack(buffer.raw)
                if expected or flags & PROBE:
                    assert buffer.raw == data           # nothing is written
                elif kind == 0:
                    assert [plane[name] for name in ("width", "height", "x_hot", "y_hot")] == [640, 480, 3, 0xffffffff]
                else:                                   # a plane that is off
                    assert (plane["drm_format"], plane["size"], plane["width"], plane["height"]) == (0, 0, 0, 0)
                    assert plane["x_hot"] == plane["y_hot"] == 0xffffffff
        assert code(card.vfio.ioctl, card.fd, abi.VFIO_DEVICE_QUERY_GFX_PLANE, 8) == errno.EFAULT


def test_a_dmabuf_is_opened_by_its_number():
    with opened(Display(DMABUF)) as card:
        for number, result in ((0, errno.ENOENT), (7, 0), (0xffffffff, errno.ENOENT)):
            assert code(card.ioctl, abi.VFIO_DEVICE_GET_GFX_DMABUF, struct.pack("=I", number)) == result
        os.close(card.result)
        assert code(card.vfio.ioctl, card.fd, abi.VFIO_DEVICE_GET_GFX_DMABUF, 8) == errno.EFAULT
