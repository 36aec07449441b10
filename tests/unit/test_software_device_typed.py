"""The typed device side over software devices: what needs more than an `edu` device has by itself."""
import mmap
import os

import pytest
from software_card import Card

from vfiodma import DirtyBitmap, GuestMemory, IoAddressSpace, SoftwareGroup, open_backend
from vfiodma.devices import DeviceLogSource, EduDevice, EduDriver, VfioDevice
from vfiodma.devices.interrupts import IrqIndex
from vfiodma.devices.migration import MigrationFlags, MigrationState
from vfiodma.errors import InvalidArgumentError, NoDeviceError, UnsupportedError
from vfiodma.protocols import DirtySource, IrqSink, MigratableDevice, SoftwareDevice

S = MigrationState
ADDRESS, OTHER = "0000:01:01.0", "0000:01:02.0"
IOVA, PAGE = 0x100000, mmap.PAGESIZE


@pytest.fixture
def container():
    devices = [EduDevice(address, migratable=True, reset_scope="bus 1") for address in (ADDRESS, OTHER)]
    groups = [SoftwareGroup(i, [device]) for i, device in enumerate([*devices, Card("0000:00:14.0")])]
    with open_backend("software", groups=groups, memlock_limit=None) as container:
        yield container


@pytest.fixture
def device(container):
    with VfioDevice.open(container, ADDRESS) as device:
        yield device


def test_what_a_device_offers_satisfies_the_protocols():
    edu = EduDevice(ADDRESS, migratable=True)
    sinks = []
    card = Card(set_irq_sink=sinks.append)
    with open_backend("software", groups=[SoftwareGroup(0, [edu, card])], memlock_limit=None):
        assert isinstance(sinks[0], IrqSink)
    assert isinstance(edu, SoftwareDevice) and isinstance(card, SoftwareDevice)
    assert isinstance(edu.migration, MigratableDevice)


def test_a_bus_is_reset_with_all_of_its_devices(container, device):
    info = device.hot_reset_info()
    assert {entry.address for entry in info.devices} == {ADDRESS, OTHER}
    device.regions[0].write_u32(0x04, 1)
    with pytest.raises(InvalidArgumentError):
        device.hot_reset(container.group_fds()[:1])
    device.hot_reset(container.group_fds()[:2])
    assert device.regions[0].read_u32(0x04) == 0
    with VfioDevice.open(container, "0000:00:14.0") as card:
        with pytest.raises(NoDeviceError):
            card.hot_reset_info()


def test_the_log_of_a_device_is_a_dirty_source(container, device):
    with GuestMemory.memfd(16 * PAGE) as memory, IoAddressSpace(container) as ioas:
        ioas.map(memory, IOVA)
        source = DeviceLogSource(device)
        assert isinstance(source, DirtySource) and device.dma_log.supported
        source.start([(IOVA, 16 * PAGE)], PAGE)
        with EduDriver(device) as edu:
            edu.dma_from_device(IOVA + 3 * PAGE, 100)
            edu.dma_from_device(IOVA + 9 * PAGE - 1, 2)
            edu.dma_to_device(IOVA + 12 * PAGE, 100)
        bitmap = DirtyBitmap(16)
        source.harvest(IOVA, 16 * PAGE, bitmap)
        assert [page for page in range(16) if bitmap.test(page)] == [3, 8, 9]
        source.stop()


def test_a_device_is_saved_while_it_runs(device):
    migration = device.migration
    assert migration.flags == MigrationFlags(7) and migration.state is S.RUNNING and migration.data_size() > 4096
    with migration.set_state(S.PRE_COPY) as stream:
        info = stream.precopy_info()
        assert len(stream.read(info.initial_bytes)) == info.initial_bytes
        assert stream.read(1) is None
        assert migration.set_state(S.STOP_COPY) is None
        assert stream.readall()
    device.reset()
    assert migration.state is S.RUNNING


def test_a_device_that_stops_does_no_dma_and_finishes_it_later(container, device):
    with GuestMemory.memfd(PAGE) as memory, IoAddressSpace(container) as ioas, EduDriver(device) as edu:
        ioas.map(memory, IOVA)
        memory.write(0, b"content")
        edu.dma_to_device(IOVA, 7)
        device.migration.set_state(S.STOP)
        bar = device.regions[0]
        for register, value in ((0x80, 0x40000), (0x88, IOVA + 64), (0x90, 7), (0x98, 3)):
            bar.write_u32(register, value)
        assert memory.read(64, 7) == bytes(7)
        device.migration.set_state(S.RUNNING)
        assert memory.read(64, 7) == b"content"


def test_an_interrupt_is_raised_by_the_device_that_was_loaded(container, device):
    with VfioDevice.open(container, OTHER) as other:
        device.regions[0].write_u32(0x60, 5)
        with device.migration.set_state(S.STOP_COPY) as stream:
            data = stream.readall()
        with other.interrupts(IrqIndex.INTX) as vectors:
            with other.migration.set_state(S.RESUMING) as stream:
                stream.write(data)
                other.migration.set_state(S.RUNNING)
            assert vectors.wait(5) == 1
            assert other.regions[0].read_u32(0x24) == 5


def test_low_power_and_its_wakeup(device):
    wakeup = os.eventfd(0, os.EFD_NONBLOCK)
    device.features.enter_low_power(wakeup)
    device.features.exit_low_power()
    assert os.eventfd_read(wakeup) == 1         # the request to leave has woken it
    device.features.enter_low_power()
    device.features.exit_low_power()
    with pytest.raises(UnsupportedError):
        device.features.set_bus_master(True)
    os.close(wakeup)
