"""Regions of types of their own: vendors', EDID, channel I/O, NVLink2; with what a driver sees of them."""
import errno
import os
import struct

import pytest
from software_card import Card
from software_device import fails, opened

from vfiodma import SoftwareGroup, VfioDevice, open_backend
from vfiodma.devices import EduDevice
from vfiodma.devices import model_regions as models
from vfiodma.protocols import SoftwareDevice
from vfiodma.uapi import vfio as abi

ADDRESS, PAGE = "0000:00:14.0", 4096
VENDOR = abi.VFIO_REGION_TYPE_PCI_VENDOR_TYPE


def edid(name=b"screen", blocks=1):
    data = b""
    for block in range(blocks):
        body = (b"\0" + b"\xff" * 6 + b"\0" + name if not block else b"\2" + name).ljust(127, b"\0")
        data += body + bytes([-sum(body) % 256])
    return data


@pytest.fixture
def using():
    """Return a function that opens a card with regions."""
    open_now = []

    def use(*regions, device=None):
        both = models.DeviceWithRegions(device or Card(ADDRESS), regions)
        container = open_backend("software", groups=[SoftwareGroup(0, [both])], memlock_limit=None)
        open_now.extend([container, VfioDevice.open(container, ADDRESS)])
        return open_now[-1]

    yield use
    for thing in reversed(open_now):
        thing.close()


# ---- the device around them

def test_a_device_keeps_all_it_had(using):
    inner = EduDevice(ADDRESS, migratable=True)
    both = models.DeviceWithRegions(inner, [models.EdidRegion()])
    assert isinstance(both, SoftwareDevice) and both.migration is inner.migration and both.can_reset
    with pytest.raises(AttributeError):
        _ = both.query_plane
    device = using(models.EdidRegion(), models.nvlink2_ram(PAGE, 0), device=inner)
    assert device.info.num_regions == 11 and device.regions[0].read_u32(0) == 0x010000ED
    assert device.regions[9].info.type == (abi.VFIO_REGION_TYPE_GFX, abi.VFIO_REGION_SUBTYPE_GFX_EDID)


def test_regions_follow_those_that_the_device_has():
    first = models.DeviceWithRegions(Card(ADDRESS), [models.EdidRegion()])
    assert list(models.DeviceWithRegions(first, [models.EdidRegion()]).extra) == [10]


# ---- vendors

@pytest.mark.parametrize("subtype", [abi.VFIO_REGION_SUBTYPE_INTEL_IGD_OPREGION,
                                     abi.VFIO_REGION_SUBTYPE_INTEL_IGD_HOST_CFG,
                                     abi.VFIO_REGION_SUBTYPE_INTEL_IGD_LPC_CFG])
def test_a_vendors_region_is_found_and_read_only(using, subtype):
    device = using(*models.intel_gpu_regions(*[b"IntelGraphicsMem"] * 3))
    region = device.regions.find(VENDOR | 0x8086, subtype)
    assert region.info.type.vendor == 0x8086 and region.info.flags == 1 | 8
    assert region.read(5, 8) == b"Graphics"
    place = region.info.offset
    with fails(errno.EINVAL):
        device.system.pwrite(device.fd, b"x", place)
    assert device.system.pread(device.fd, 100, place + 10) == b"icsMem"     # short at the end
    with fails(errno.EINVAL):
        device.system.pread(device.fd, 1, place + 16)


def test_only_sparse_areas_can_be_mapped(using):
    areas = [(0, PAGE), (2 * PAGE, 2 * PAGE)]
    device = using(models.ModelRegion(VENDOR | 0x1234, 1, 5 * PAGE, flags=7, sparse_areas=areas))
    region = device.regions[9]
    assert region.info.sparse_areas == tuple(areas)
    with region.mmap() as mapped:
        assert [(offset, memoryview(view).nbytes) for offset, view in mapped] == areas
        mapped.view(3 * PAGE, 4)[:] = b"here"
    assert region.read(3 * PAGE, 4) == b"here"
    for offset, size in ((PAGE, PAGE), (0, 2 * PAGE), (3 * PAGE, 2 * PAGE), (4 * PAGE, PAGE)):
        with fails(errno.EINVAL):
            device.system.mmap(device.fd, size, region.info.offset + offset, 3)


# ---- NVLink2

def test_nvlink_regions_tell_target_and_speed(using):
    device = using(models.nvlink2_ram(3 * PAGE, 0x6000_0000_0000), models.nvlink2_atsd(0x6000_0000_0000, 9))
    ram = device.regions.find(VENDOR | models.NVIDIA, abi.VFIO_REGION_SUBTYPE_NVIDIA_NVLINK2_RAM)
    atsd = device.regions.find(VENDOR | models.IBM, abi.VFIO_REGION_SUBTYPE_IBM_NVLINK2_ATSD)
    assert [ram.size, ram.info.nvlink2_target, ram.info.nvlink2_speed] == [3 * PAGE, 0x6000_0000_0000, None]
    assert [atsd.size, atsd.info.nvlink2_target, atsd.info.nvlink2_speed] == [PAGE, 0x6000_0000_0000, 9]
    assert [capability.id for capability in atsd.info.capabilities] == [2, 4, 5]
    with ram.mmap() as mapped:
        mapped.view(0, 4)[:] = b"data"
    assert ram.read(0, 4) == b"data"


# ---- EDID

def test_a_monitor_is_connected_by_the_update_protocol(using):
    seen = []
    device = using(models.EdidRegion(256, (1920, 1080), on_link=seen.append))
    monitor = device.graphics.edid()
    assert (monitor.max_size, monitor.max_resolution, monitor.on, monitor.read()) == (256, (1920, 1080), False, b"")
    monitor.update(edid())
    assert monitor.on and monitor.read() == edid()
    monitor.update(edid(b"larger", 2))
    assert monitor.on and monitor.read() == edid(b"larger", 2)
    monitor.turn_off()
    assert not monitor.on and monitor.read() == edid(b"larger", 2)
    monitor.turn_on()
    assert seen == [edid(), None, edid(b"larger", 2), None, edid(b"larger", 2)]
    device.reset()
    assert seen[-1] is None and not monitor.on


@pytest.mark.parametrize("bad", [b"", edid()[:-1], bytes(128), edid()[:-1] + b"\xee", edid() + bytes(127)])
def test_a_monitor_with_a_bad_edid_stays_off(using, bad):
    monitor = using(models.EdidRegion()).graphics.edid()
    monitor.update(edid())
    with fails(errno.EINVAL):
        monitor.update(bad)
    assert not monitor.on


def test_an_edid_that_is_too_long_changes_nothing(using):
    monitor = using(models.EdidRegion(128)).graphics.edid()
    monitor.update(edid())
    with fails(errno.EINVAL):
        monitor.update(edid(blocks=2))
    assert monitor.on and monitor.read() == edid()


@pytest.mark.parametrize("offset, data, code", [
    (0, bytes(4), errno.EPERM), (4, bytes(4), errno.EPERM), (12, bytes(4), errno.EPERM), (16, bytes(4), errno.EPERM),
    (8, bytes(2), errno.EINVAL), (8, bytes(8), errno.EINVAL), (9, bytes(4), errno.EINVAL), (24, bytes(4), errno.EINVAL),
    (8, struct.pack("=I", 513), errno.EINVAL), (20, struct.pack("=I", 0), errno.EINVAL),
    (20, struct.pack("=I", 3), errno.EINVAL), (2048, b"x", errno.EINVAL), (2048 + 512, b"x", errno.EINVAL)])
def test_writes_of_the_edid_region_that_are_refused(using, offset, data, code):
    region = using(models.EdidRegion()).regions[9]
    before = region.read_u32(8), region.read_u32(20)
    with fails(code):
        region._device.system.pwrite(region._device.fd, data, region.info.offset + offset)
    assert (region.read_u32(8), region.read_u32(20)) == before


def test_the_edid_of_a_monitor_that_is_on_is_fixed(using):
    device = using(models.EdidRegion())
    monitor = device.graphics.edid()
    monitor.update(edid())
    for offset, data in ((8, bytes(4)), (2048, b"x")):
        with fails(errno.EBUSY):
            monitor.region.write(offset, data)
    assert monitor.on and monitor.read() == edid()


def test_a_device_without_a_monitor(using):
    with fails(errno.ENODEV):
        using().graphics.edid()


# ---- channel I/O

def test_channel_commands_are_done_and_answer(using):
    done, answer = [], [0]

    def do(command):
        done.append(command)
        return answer[0]

    region = using(models.CcwCommandRegion(do)).regions.find(abi.VFIO_REGION_TYPE_CCW,
                                                              abi.VFIO_REGION_SUBTYPE_CCW_ASYNC_CMD)
    region.write_u32(0, 1)
    region.write(0, struct.pack("=II", 2, 0))
    assert done == [1, 2] and region.read_u32(4) == 0
    answer[0] = -errno.EBUSY
    with fails(errno.EBUSY):
        region.write_u32(0, 1)
    assert struct.unpack("=i", region.read(4, 4)) == (-errno.EBUSY,)
    with fails(errno.EINVAL):
        region.write_u32(0, 3)
    assert done == [1, 2, 1]


def test_a_subchannel_tells_its_state_when_it_is_asked(using):
    state = [b"first"]
    device = using(models.CcwSchibRegion(lambda: state[0]))
    region = device.regions.find(abi.VFIO_REGION_TYPE_CCW, abi.VFIO_REGION_SUBTYPE_CCW_SCHIB)
    assert region.read(0, region.size) == b"first".ljust(52, b"\0")
    state[0] = b"later"
    assert region.read(0, 5) == b"later"
    with fails(errno.EINVAL):
        device.system.pwrite(device.fd, b"x", region.info.offset)


def test_report_words_are_read_once_in_their_order(using):
    pending = []
    model = models.CcwCrwRegion(lambda: pending.append(1))
    region = using(model).regions.find(abi.VFIO_REGION_TYPE_CCW, abi.VFIO_REGION_SUBTYPE_CCW_CRW)
    assert region.read_u64(0) == 0
    model.report(5)
    model.report(6)
    assert len(pending) == 2
    assert [region.read_u64(0) for _ in range(3)] == [5, 6, 0] and len(pending) == 3


# ---- devices that are not on PCI

FLAGS = [abi.VFIO_DEVICE_FLAGS_PLATFORM, abi.VFIO_DEVICE_FLAGS_AMBA, abi.VFIO_DEVICE_FLAGS_CCW,
         abi.VFIO_DEVICE_FLAGS_AP, abi.VFIO_DEVICE_FLAGS_FSL_MC, abi.VFIO_DEVICE_FLAGS_CDX]
TRIGGER_EVENTFD = abi.VFIO_IRQ_SET_ACTION_TRIGGER | abi.VFIO_IRQ_SET_DATA_EVENTFD


@pytest.mark.parametrize("bus", FLAGS)
def test_a_device_tells_its_bus_and_has_no_ioctls_of_pci(bus):
    model = models.ChannelDevice(ADDRESS)
    model.bus = bus
    with opened(model) as raw, VfioDevice.open(raw.container, ADDRESS) as device:
        assert device.info.flags == bus | abi.VFIO_DEVICE_FLAGS_RESET
        for request in (abi.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, abi.VFIO_DEVICE_PCI_HOT_RESET,
                        abi.VFIO_DEVICE_IOEVENTFD, abi.VFIO_DEVICE_QUERY_GFX_PLANE, abi.VFIO_DEVICE_FEATURE):
            with fails(errno.ENOTTY):
                raw.ioctl(request, bytes(64))


def test_a_subchannel_has_its_regions_and_interrupts():
    crw = models.CcwCrwRegion()
    model = models.ChannelDevice(ADDRESS)
    both = models.DeviceWithRegions(model, [models.CcwSchibRegion(lambda: b"schib"), crw])
    with opened(both) as raw, VfioDevice.open(raw.container, ADDRESS) as device:
        assert device.info.num_regions == abi.VFIO_CCW_NUM_REGIONS + 2
        assert device.info.num_irqs == abi.VFIO_CCW_NUM_IRQS == 3
        assert device.regions.find(abi.VFIO_REGION_TYPE_CCW, abi.VFIO_REGION_SUBTYPE_CCW_CRW).info.index == 2
        area = device.regions[abi.VFIO_CCW_CONFIG_REGION_INDEX]
        area.write(10, b"orb")
        assert area.read(10, 3) == b"orb" and area.size == 636
        device.reset()
        assert area.read(10, 3) == bytes(3)
        with fails(errno.EINVAL):
            device.regions[3]


@pytest.mark.parametrize("index", [abi.VFIO_CCW_IO_IRQ_INDEX, abi.VFIO_CCW_CRW_IRQ_INDEX, abi.VFIO_CCW_REQ_IRQ_INDEX])
def test_each_interrupt_goes_to_its_own_eventfd(index):
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    with opened(models.ChannelDevice(ADDRESS)) as raw:
        info = raw.ioctl(abi.VFIO_DEVICE_GET_IRQ_INFO, struct.pack("=IIII", 16, 0, index, 0))
        assert struct.unpack("=IIII", info) == (16, abi.VFIO_IRQ_INFO_EVENTFD, index, 1)
        raw.set_irqs(TRIGGER_EVENTFD, index, 0, 1, struct.pack("=i", fd))
        assert [raw.device.irqs.enabled(other) for other in range(3)] == [int(other == index) for other in range(3)]
        raw.device.irqs.trigger(index)
        raw.device.irqs.trigger((index + 1) % 3)
        raw.set_irqs(abi.VFIO_IRQ_SET_ACTION_TRIGGER | abi.VFIO_IRQ_SET_DATA_NONE, index, 0, 1)
        raw.set_irqs(abi.VFIO_IRQ_SET_ACTION_TRIGGER | abi.VFIO_IRQ_SET_DATA_BOOL, index, 0, 1, b"\1")
        raw.set_irqs(abi.VFIO_IRQ_SET_ACTION_TRIGGER | abi.VFIO_IRQ_SET_DATA_BOOL, index, 0, 1, b"\0")
        assert os.eventfd_read(fd) == 3
        raw.set_irqs(TRIGGER_EVENTFD, index, 0, 1, struct.pack("=i", -1))
        raw.device.irqs.trigger(index)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
    os.close(fd)


@pytest.mark.parametrize("flags, index, start, count, data, code", [
    (36, 3, 0, 1, bytes(4), errno.EINVAL), (36, 0, 1, 1, bytes(4), errno.EINVAL), (36, 0, 0, 2, bytes(8), errno.EINVAL),
    (36, 0, 0, 0, b"", errno.EINVAL), (36, 0, 0, 1, bytes(3), errno.EINVAL), (33 | 64, 0, 0, 1, b"", errno.EINVAL),
    (35, 0, 0, 1, bytes(4), errno.EINVAL), (9, 0, 0, 1, b"", errno.EINVAL), (17, 0, 0, 1, b"", errno.EINVAL),
    (36, 0, 0, 1, b"\xfe\xff\xff\xff", errno.EINVAL), (36, 0, 0, 1, struct.pack("=i", 1 << 20), errno.EBADF)])
def test_what_such_interrupts_refuse(flags, index, start, count, data, code):
    with opened(models.ChannelDevice(ADDRESS)) as raw:
        with fails(code):
            raw.set_irqs(flags, index, start, count, data)
        assert not raw.device.irqs.enabled(0)
