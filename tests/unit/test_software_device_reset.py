"""Resets of software devices: one, or all of a bus, by groups and by nodes."""
import ctypes
import errno
import os
import struct

import pytest
from software_card import Card
from software_device import fails, opened

from vfiodma import SoftwareGroup, SoftwareVfio
from vfiodma.devices.edu import EduDevice
from vfiodma.uapi import vfio as abi

NOT_OWNED = 0xFFFFFFFF


def test_a_reset_keeps_the_configuration():
    with opened(Card()) as device:
        device.vfio.pwrite(device.fd, b"\x06\0", 7 << 40 | 4)
        device.vfio.pwrite(device.fd, b"\x11\x22\x33\x44", 7 << 40 | 0x10)
        device.ioctl(abi.VFIO_DEVICE_RESET)
        assert device.device.resets == 1
        assert device.vfio.pread(device.fd, 2, 7 << 40 | 4) == b"\x06\0"
        assert device.vfio.pread(device.fd, 4, 7 << 40 | 0x10) == b"\x11\x22\x33\x44"


class Bus:
    """Two groups whose devices share a bus, one with a bus of its own."""

    def __init__(self, kernel="7.2"):
        self.cards = [Card(f"0000:02:0{i}.{i}", reset_scope="bus 2") for i in range(3)]
        self.alone = Card("0000:05:00.0", reset_scope="bus 5")
        self.fixed = Card("0000:00:01.0")
        self.vfio = SoftwareVfio(kernel=kernel, memlock_limit=None, groups=[
            SoftwareGroup(1, self.cards[:2]), SoftwareGroup(2, self.cards[2:]),
            SoftwareGroup(5, [self.alone, self.fixed])])

    def call(self, fd, request, data):
        buffer = ctypes.create_string_buffer(data, len(data))
        self.vfio.ioctl(fd, request, ctypes.addressof(buffer))
        return buffer.raw

    def info(self, fd, room=8):
        size = 12 + 8 * room
        data = self.call(fd, abi.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, struct.pack("=I", size).ljust(size, b"\0"))
        _, flags, count = struct.unpack_from("=III", data)
        return flags, [struct.unpack_from("=IHBB", data, 12 + 8 * i) for i in range(count)]

    def reset(self, fd, *fds, count=None, flags=0):
        count = len(fds) if count is None else count
        data = struct.pack(f"=III{len(fds)}i", 12 + 4 * len(fds), flags, count, *fds)
        self.call(fd, abi.VFIO_DEVICE_PCI_HOT_RESET, data)


@pytest.fixture(params=["6.1", "7.2"])
def bus(request):
    bus = Bus(request.param)
    vfio = bus.vfio
    bus.container = vfio.open("/dev/vfio/vfio")
    bus.groups = [vfio.open(f"/dev/vfio/{number}") for number in (1, 2, 5)]
    word = struct.pack("=i", bus.container)
    for group in bus.groups:
        bus.call(group, abi.VFIO_GROUP_SET_CONTAINER, word)
    vfio.ioctl(bus.container, abi.VFIO_SET_IOMMU, 3)
    bus.open = lambda group, address: _open(bus, group, address)
    yield bus
    for fd in list(vfio._files):
        vfio.close(fd)


def _open(bus, group, address):
    name = ctypes.create_string_buffer(address.encode())
    return bus.vfio.ioctl(bus.groups[group], abi.VFIO_GROUP_GET_DEVICE_FD, ctypes.addressof(name))


def test_all_devices_of_the_bus_are_listed_with_their_groups(bus):
    fd = bus.open(0, "0000:02:00.0")
    expected = [(1, 0, 2, 0), (1, 0, 2, 1 << 3 | 1), (2, 0, 2, 2 << 3 | 2)]
    assert bus.info(fd) == (0, expected) == bus.info(fd, 3)
    buffer = ctypes.create_string_buffer(struct.pack("=III", 12 + 16, 99, 99), 28)
    with fails(errno.ENOSPC):
        bus.vfio.ioctl(fd, abi.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, ctypes.addressof(buffer))
    assert struct.unpack_from("=III", buffer.raw) == (28, 0, 3)


def test_all_groups_are_needed_and_all_devices_are_reset(bus):
    fd = bus.open(0, "0000:02:01.1")
    one, two, three = bus.groups
    for fds in ((one,), (two,), (one, three)):
        with fails(errno.EINVAL):
            bus.reset(fd, *fds)
    assert [card.resets for card in bus.cards] == [0, 0, 0]
    bus.reset(fd, two, one)
    bus.reset(fd, one, two, one)
    assert [card.resets for card in bus.cards] == [2, 2, 2] and bus.alone.resets == 0


def test_descriptors_of_other_things_are_refused(bus):
    fd = bus.open(0, "0000:02:00.0")
    plain = os.open("/dev/null", os.O_RDONLY)
    one, two, _ = bus.groups
    for bad in (plain, fd, bus.container):
        with fails(errno.EINVAL):
            bus.reset(fd, one, bad)
    os.close(plain)
    for bad in (1 << 20, -1):
        with fails(errno.EBADF):
            bus.reset(fd, one, two, bad)
    with fails(errno.EINVAL):
        bus.reset(fd, one, two, one, two)           # more than there are devices
    with fails(errno.EINVAL):
        bus.reset(fd)
    with fails(errno.EINVAL):
        bus.reset(fd, one, two, flags=1)


def test_a_device_whose_bus_can_not_be_reset(bus):
    fd = bus.open(2, "0000:00:01.0")
    with fails(errno.ENODEV):
        bus.info(fd)
    with fails(errno.ENODEV):
        bus.reset(fd, bus.groups[2])
    with fails(errno.ENODEV if bus.vfio.kernel == "6.1" else errno.EINVAL):
        bus.reset(fd)


# ---- nodes

@pytest.fixture
def nodes():
    bus = Bus()
    vfio = bus.vfio
    bus.iommufds = [vfio.open("/dev/iommu"), vfio.open("/dev/iommu")]
    yield bus
    for fd in list(vfio._files):
        vfio.close(fd)


def bind(bus, number, iommufd=0):
    fd = bus.vfio.open(f"/dev/vfio/devices/vfio{number}")
    data = bus.call(fd, abi.VFIO_DEVICE_BIND_IOMMUFD, struct.pack("=IIiIQ", 24, 0, bus.iommufds[iommufd], 0, 0))
    return fd, struct.unpack_from("=I", data, 12)[0]


def test_a_node_tells_who_owns_what(nodes):
    fd, devid = bind(nodes, 0)
    flags, entries = nodes.info(fd)
    assert flags == abi.VFIO_PCI_HOT_RESET_FLAG_DEV_ID
    assert [entry[0] for entry in entries] == [devid, 0, NOT_OWNED]         # the second is of the first one's group
    with fails(errno.EINVAL):
        nodes.reset(fd)
    _, other = bind(nodes, 2)
    flags, entries = nodes.info(fd)
    assert flags == abi.VFIO_PCI_HOT_RESET_FLAG_DEV_ID | abi.VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED
    assert [entry[0] for entry in entries] == [devid, 0, other]
    nodes.reset(fd)
    assert [card.resets for card in nodes.cards] == [1, 1, 1]


def test_a_device_of_another_iommufd_stands_against_a_reset(nodes):
    fd, devid = bind(nodes, 0)
    bind(nodes, 2, 1)
    flags, entries = nodes.info(fd)
    assert flags == abi.VFIO_PCI_HOT_RESET_FLAG_DEV_ID and entries[2][0] == NOT_OWNED
    with fails(errno.EINVAL):
        nodes.reset(fd)
    with fails(errno.EINVAL):
        nodes.reset(fd, nodes.iommufds[0])


def test_interrupts_of_a_node_go_with_it(nodes):
    fd, _ = bind(nodes, 0)
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    nodes.call(fd, abi.VFIO_DEVICE_SET_IRQS, struct.pack("=IIIIIi", 24, 36, 1, 0, 1, eventfd))
    nodes.cards[0].sink.trigger(1)
    assert os.eventfd_read(eventfd) == 1
    os.close(eventfd)
    nodes.vfio.close(fd)
    assert nodes.cards[0].sink is None


def test_a_migratable_edu_device_can_be_reset_and_keeps_its_bar():
    with opened(EduDevice("0000:00:10.0", migratable=True)) as device:
        vfio, fd = device.vfio, device.fd
        vfio.pwrite(fd, struct.pack("=I", 0xFEA00000), 7 << 40 | 0x10)
        vfio.pwrite(fd, struct.pack("=I", 7), 0x04)
        device.ioctl(abi.VFIO_DEVICE_RESET)
        assert vfio.pread(fd, 4, 7 << 40 | 0x10) == struct.pack("=I", 0xFEA00000)
        assert vfio.pread(fd, 4, 0x04) == bytes(4)


def test_a_device_that_fails_to_open_is_disconnected():
    def refuse(sink):
        if sink is not None:
            raise RuntimeError("no interrupts today")
    card = Card(set_irq_sink=refuse)
    vfio = SoftwareVfio(groups=[SoftwareGroup(0, [card])], memlock_limit=None)
    with pytest.raises(RuntimeError):
        vfio.container()
    assert card.port is None and not vfio._files
    iommufd, fd = vfio.open("/dev/iommu"), vfio.open("/dev/vfio/devices/vfio0")
    request = ctypes.create_string_buffer(struct.pack("=IIiIQ", 24, 0, iommufd, 0, 0))
    with pytest.raises(RuntimeError):
        vfio.ioctl(fd, abi.VFIO_DEVICE_BIND_IOMMUFD, ctypes.addressof(request))
    assert card.port is None
    vfio.close(fd)
    vfio.close(iommufd)
