"""Devices of a running kernel: see ../../device_checks.py for the `edu` tests that the software device passes too."""
import contextlib
import errno
import os
import threading
import time
from pathlib import Path

import pytest
from device_checks import (
    EDU,
    IOVA,
    PAGE,
    DriverChecks,
    InterruptChecks,
    IoEventChecks,
    RegisterChecks,
)

from vfiodma import EduDriver, GuestMemory, IoAddressSpace, Type1Container, VfioDevice
from vfiodma.devices.features import Feature
from vfiodma.devices.interrupts import IrqFlags, IrqIndex
from vfiodma.devices.pci import DeviceFlags
from vfiodma.devices.regions import RegionFlags
from vfiodma.errors import BusyError, ClosedError, InvalidArgumentError, NoDeviceError, UnsupportedError

pytestmark = pytest.mark.skipif(not os.path.exists("/sys/bus/pci/devices/0000:00:10.0/iommu_group"),
                                reason="no IOMMU stands before the devices")

E1000E, NVME, UNPLUGGED = "0000:00:14.0", "0000:00:15.0", "0000:00:11.0"
BEHIND_THE_BRIDGE = ["0000:01:01.0", "0000:01:02.0"]
RELEASE = tuple(map(int, os.uname().release.split("-")[0].split("+")[0].split(".")[:2]))


@pytest.fixture
def container():
    with Type1Container([EDU]) as container:
        yield container


class TestRegisters(RegisterChecks):
    pass


@pytest.mark.short
class TestDriver(DriverChecks):
    pass


@pytest.mark.short
class TestInterrupts(InterruptChecks):
    pass


class TestIoEvents(IoEventChecks):
    def test_eight_bytes_are_possible_on_some_kernels(self, device):
        if RELEASE < (7, 0):
            device.ioevents.add(0, 0x80, 0, 8).close()
        else:
            with pytest.raises(InvalidArgumentError, match="8 bytes"):
                device.ioevents.add(0, 0x80, 0, 8)


@pytest.fixture
def network_card():
    with Type1Container([E1000E]) as container, VfioDevice.open(container, E1000E) as device:
        yield device


def test_registers_of_a_network_card_are_described(network_card):
    assert network_card.info.flags & DeviceFlags.RESET
    regions = network_card.regions
    assert [regions[index].size for index in range(9 - 1)] == [0x20000, 0x20000, 0x20, 0x4000, 0, 0, 0, 0x1000]
    assert regions[0].info.flags & RegionFlags.MMAP and not regions[2].info.flags & RegionFlags.MMAP
    table = regions[3].info
    assert table.msix_mappable and table.flags & RegionFlags.CAPS
    assert [(found.id, found.version, len(found.data)) for found in table.capabilities] == [(3, 1, 8)]


def test_capabilities_and_bars_of_a_network_card_are_found(network_card):
    config = network_card.config
    assert {capability.id for capability in config.capabilities()} == {0x01, 0x05, 0x10, 0x11}
    assert [(found.id, found.offset) for found in config.extended_capabilities()] == [(1, 0x100), (3, 0x140)]
    assert [(bar.index, bar.memory, bar.bits) for bar in config.bars()] == [
        (0, True, 32), (1, True, 32), (2, False, 32), (3, True, 32)]
    assert config.find_capability(0x11).offset == 0xA0


def test_mapped_registers_are_those_that_are_read(network_card):
    status, mac = 0x0008, 0x5400
    with network_card.regions[0].mmap() as registers:
        words = registers.view(0, 0x20000).cast("I")
        assert words[status // 4] == network_card.regions[0].read_u32(status)
        assert words[mac // 4] == network_card.regions[0].read_u32(mac) != 0
        words[mac // 4] = 0x12345678
        assert network_card.regions[0].read_u32(mac) == 0x12345678
        words.release()
    with pytest.raises(InvalidArgumentError, match="closed"):
        registers.view(0, 4)


def test_a_reset_brings_registers_back(network_card):
    before = network_card.regions[0].read_u32(0x5400)
    network_card.regions[0].write_u32(0x5400, 0x12345678)
    network_card.reset()
    assert network_card.regions[0].read_u32(0x5400) == before


def test_registers_can_not_be_read_while_memory_access_is_off(network_card):
    config = network_card.config
    assert config.memory_enabled
    config.memory_enabled = False
    with pytest.raises(OSError, match="memory_enabled") as caught:
        network_card.regions[0].read_u32(8)
    assert caught.value.errno == errno.EIO
    config.memory_enabled = True
    network_card.regions[0].read_u32(8)


def test_msix_vectors_fire_one_by_one(network_card):
    assert network_card.interrupts.info(IrqIndex.MSIX).count == 5
    with network_card.interrupts(IrqIndex.MSIX, 5) as vectors:
        vectors.trigger(3, 1)
        assert [vector.poll() for vector in vectors] == [0, 0, 0, 1, 0]
        vectors.trigger_where([True, False, True], 1)
        assert [vector.poll() for vector in vectors] == [0, 1, 0, 1, 0]
        vectors.trigger()
        assert [vector.wait(1) for vector in vectors] == [1] * 5


def test_msix_vectors_are_added_where_the_kernel_can(network_card):
    mine = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        with network_card.interrupts(IrqIndex.MSIX, 2) as vectors:
            if network_card.interrupts.info(IrqIndex.MSIX).flags & IrqFlags.NORESIZE:
                with pytest.raises(InvalidArgumentError):
                    vectors.assign(4, [mine])
            else:
                vectors.assign(4, [mine])
                vectors.trigger(4, 1)
                assert os.eventfd_read(mine) == 1
    finally:
        os.close(mine)


def test_a_bad_eventfd_undoes_its_range_only(network_card):
    with network_card.interrupts(IrqIndex.MSIX, 4) as vectors:
        with pytest.raises(ClosedError, match="eventfd"):
            vectors.assign(1, [vectors[3].fd, 1 << 20])
        vectors.trigger()
        assert [vector.poll() for vector in vectors] == [1, 0, 0, 1]
        vectors.restore()
        vectors.trigger()
        assert [vector.poll() for vector in vectors] == [1, 1, 1, 1]


def test_ioeventfds_stay_away_from_the_msix_table(network_card):
    with pytest.raises(InvalidArgumentError, match="MSI-X"):
        network_card.ioevents.add(3, 0, 0, 4)


def test_error_interrupts_of_pci_express_can_be_triggered(network_card):
    with network_card.interrupts(IrqIndex.ERR) as vectors:
        vectors.trigger()
        assert vectors.wait(1) == 1


def test_registers_are_exported_where_the_kernel_can(network_card):
    features = network_card.features
    if not features.probe(Feature.DMA_BUF):
        with pytest.raises(UnsupportedError, match="can't export"):
            features.export_dmabuf(0, [(0, PAGE)], os.O_CLOEXEC | os.O_RDWR)
        return
    fd = features.export_dmabuf(0, [(0, PAGE), (2 * PAGE, PAGE)], os.O_CLOEXEC | os.O_RDWR)
    assert os.readlink(f"/proc/self/fd/{fd}").startswith("/dmabuf")
    os.close(fd)
    for ranges in ([], [(0, 100)], [(0, 1 << 30)], [(-PAGE, PAGE)]):
        with pytest.raises(InvalidArgumentError):
            features.export_dmabuf(0, ranges, os.O_CLOEXEC | os.O_RDWR)


def test_a_storage_controller_tells_what_it_is():
    with Type1Container([NVME]) as container, VfioDevice.open(container, NVME) as device:
        assert device.config.class_code == 0x010802
        assert device.config.bars()[0].bits == 64
        capabilities = device.regions[0].read_u64(0)
        assert capabilities == device.regions[0].read_u32(0) | device.regions[0].read_u32(4) << 32
        assert device.regions[0].read_u32(8) >> 16 == 1              # version 1.x
        assert device.interrupts.info(IrqIndex.MSIX).count == 65


@pytest.fixture
def behind_the_bridge():
    with Type1Container(BEHIND_THE_BRIDGE) as container:
        yield container


def test_a_hot_reset_names_and_resets_all_behind_the_bridge(behind_the_bridge):
    with VfioDevice.open(behind_the_bridge, BEHIND_THE_BRIDGE[0]) as first, \
            VfioDevice.open(behind_the_bridge, BEHIND_THE_BRIDGE[1]) as second:
        info = first.hot_reset_info()
        assert [entry.address for entry in info.devices] == BEHIND_THE_BRIDGE
        assert len({entry.group for entry in info.devices}) == 1 and not info.by_devid
        first.hot_reset(behind_the_bridge.group_fds())
        for device in (first, second):
            driver = EduDriver(device)
            assert driver.version == (1, 0) and driver.invert(5) == 0xFFFFFFFA


def test_a_hot_reset_without_the_groups_is_refused(behind_the_bridge):
    with VfioDevice.open(behind_the_bridge, BEHIND_THE_BRIDGE[0]) as device:
        with pytest.raises(InvalidArgumentError, match="hot_reset_info"):
            device.hot_reset()
        with pytest.raises(ClosedError):
            device.hot_reset([1 << 20])
        with pytest.raises(InvalidArgumentError):
            device.hot_reset([device.fd])


def test_a_device_on_the_root_bus_has_no_hot_reset(container):
    with VfioDevice.open(container, EDU) as device:
        with pytest.raises(NoDeviceError):
            device.hot_reset_info()
        with pytest.raises(NoDeviceError):
            device.hot_reset(container.group_fds())
        with pytest.raises(InvalidArgumentError, match="can't be reset alone"):
            device.reset()


def test_devices_behind_a_bridge_share_mappings(behind_the_bridge):
    first, second = (EduDriver(VfioDevice.open(behind_the_bridge, address)) for address in BEHIND_THE_BRIDGE)
    with first.device, second.device, GuestMemory.memfd(PAGE) as memory, IoAddressSpace(behind_the_bridge) as ioas:
        memory.write(0, b"from both")
        ioas.map(memory, IOVA)
        first.copy(IOVA, IOVA + 100, 9)
        second.copy(IOVA + 100, IOVA + 200, 9)
        assert memory.read(200, 9) == b"from both"


def write_later(path, text):
    thread = threading.Thread(target=Path(path).write_text, args=(text,), daemon=True)
    thread.start()
    return thread


def plug_in(address):
    Path("/sys/bus/pci/rescan").write_text("1")
    Path(f"/sys/bus/pci/devices/{address}/driver_override").write_text("vfio-pci")
    if not Path(f"/sys/bus/pci/devices/{address}/driver").exists():
        Path("/sys/bus/pci/drivers_probe").write_text(address)


def locked_kilobytes():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmLck" in line)


def test_a_device_that_vanishes_asks_for_its_release_and_leaves_nothing():
    before = locked_kilobytes()
    with contextlib.ExitStack() as stack:
        stack.callback(plug_in, UNPLUGGED)
        with Type1Container([UNPLUGGED]) as container, GuestMemory.memfd(16 * PAGE) as memory, \
                VfioDevice.open(container, UNPLUGGED) as device:
            container.map_dma(IOVA, memory.region.vaddr, memory.size, 3)
            assert locked_kilobytes() == before + 64
            driver = EduDriver(device).use_interrupts(IrqIndex.MSI)
            mapped = device.regions[0].mmap()
            request = device.interrupts(IrqIndex.REQ)
            removal = write_later(f"/sys/bus/pci/devices/{UNPLUGGED}/remove", "1")
            assert request.wait(20) == 1                # the host wants it back
            assert removal.is_alive()                   # and waits
            assert driver.invert(1) == 0xFFFFFFFE       # meanwhile it works
            if RELEASE < (6, 12):                       # and can even be opened again
                VfioDevice.open(container, UNPLUGGED).close()
            else:
                with pytest.raises(NoDeviceError):
                    VfioDevice.open(container, UNPLUGGED)
            device.close()
            removal.join(30)
            assert not removal.is_alive() and not Path(f"/sys/bus/pci/devices/{UNPLUGGED}").exists()
            assert request.closed and len(mapped) == 0
            for call in (lambda: driver.version, device.reset, lambda: driver.dma_to_device(IOVA, 16),
                         lambda: device.interrupts(IrqIndex.MSI), lambda: device.config.command):
                with pytest.raises(ClosedError):
                    call()
            with pytest.raises(NoDeviceError):
                VfioDevice.open(container, UNPLUGGED)
            with pytest.raises(InvalidArgumentError, match="lost its groups"):
                container.map_dma(IOVA, memory.region.vaddr, memory.size, 3)
            assert locked_kilobytes() == before         # the kernel has let go of the memory
    with Type1Container([UNPLUGGED]) as container, VfioDevice.open(container, UNPLUGGED) as device:
        assert EduDriver(device).invert(1) == 0xFFFFFFFE


def test_a_view_of_registers_keeps_the_device_open_and_says_so(container):
    device = VfioDevice.open(container, EDU)
    mapped = device.regions[0].mmap()
    view = mapped.view(0, 4096)
    with pytest.warns(ResourceWarning, match="BAR 0"):
        device.close()
    assert len(mapped) == 0
    view.release()


def test_a_second_container_of_the_same_group_is_refused(container):
    with pytest.raises(BusyError):
        Type1Container([EDU])


def test_low_power_is_entered_and_left(container):
    with VfioDevice.open(container, EDU) as device:
        wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            device.features.enter_low_power()
            device.features.exit_low_power()
            device.features.enter_low_power(wakeup)
            time.sleep(0.1)
            device.features.exit_low_power()
        finally:
            os.close(wakeup)
        assert device.config.vendor_id == 0x1234
