"""Migration, DMA logging and displays, on the kernel's sample devices (mtty, mdpy, mbochs); and devices of iommufd."""
import contextlib
import errno
import os
import subprocess
import uuid
from pathlib import Path

import pytest
from device_checks import EDU

from vfiodma import DirtyBitmap, GuestMemory, IoAddressSpace, Type1Container, VfioDevice, open_backend
from vfiodma.devices import DeviceLogSource, EduDriver
from vfiodma.devices.graphics import PlaneAccess
from vfiodma.devices.interrupts import IrqIndex
from vfiodma.devices.migration import MigrationFlags, MigrationState
from vfiodma.devices.regions import RegionType
from vfiodma.errors import (
    InvalidArgumentError,
    LockedMemoryError,
    NoDeviceError,
    NotMappedError,
    UnsupportedError,
    VfioError,
)
from vfiodma.protocols import DirtySource

pytestmark = pytest.mark.skipif("KERNEL_LAB" not in os.environ or not os.path.exists("/dev/iommu"),
                                reason="runs in a kernel-lab guest with iommufd, which has the sample devices")
needs_devices = pytest.mark.skipif(not os.path.exists(f"/sys/bus/pci/devices/{EDU}/iommu_group"),
                                   reason="no IOMMU stands before the devices")
S = MigrationState
RELEASE = tuple(map(int, os.uname().release.split("-")[0].split("+")[0].split(".")[:2]))
BEHIND_THE_BRIDGE = ["0000:01:01.0", "0000:01:02.0"]


@contextlib.contextmanager
def sample(module, kind):
    """Make a sample device and open it."""
    assert subprocess.run(["modprobe", module]).returncode == 0
    name = str(uuid.uuid4())
    Path(f"/sys/class/mdev_bus/{module}/mdev_supported_types/{kind}/create").write_text(name)
    try:
        group = int(os.path.basename(os.readlink(f"/sys/bus/mdev/devices/{name}/iommu_group")))
        with Type1Container(groups=[group]) as container, VfioDevice.open(container, name) as device:
            yield device
    finally:
        Path(f"/sys/bus/mdev/devices/{name}/remove").write_text("1")


@pytest.fixture
def uart():
    with sample("mtty", "mtty-1") as device:
        yield device


def test_a_migratable_device_says_what_it_can(uart):
    assert uart.migration.flags == MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY
    assert uart.migration.state is S.RUNNING
    assert uart.migration.data_size() > 0


def test_the_state_of_a_device_moves_to_another(uart):
    scratch = 7
    with sample("mtty", "mtty-1") as target:
        uart.regions[0].write_u8(scratch, 0x5A)
        before = target.regions[0].read_u8(scratch)
        with uart.migration.set_state(S.STOP_COPY) as stream:
            data = stream.readall()
            assert data and stream.read(1) == b""
            assert not stream.writable()
        assert uart.migration.state is S.STOP_COPY
        with target.migration.set_state(S.RESUMING) as stream:
            assert stream.write(data) == len(data)
            assert not stream.readable()
            assert target.migration.set_state(S.RUNNING) is None
        assert target.migration.state is S.RUNNING and before != 0x5A
        assert target.regions[0].read_u8(scratch) == 0x5A


def test_pre_copy_goes_on_in_stop_copy_with_one_stream(uart):
    migration = uart.migration
    with migration.set_state(S.PRE_COPY) as stream:
        info = stream.precopy_info()
        assert info.initial_bytes > 0
        first = stream.read(info.initial_bytes)
        assert len(first) == info.initial_bytes
        assert stream.precopy_info().initial_bytes == 0
        assert migration.set_state(S.STOP_COPY) is None
        with pytest.raises(InvalidArgumentError, match="PRE_COPY"):
            stream.precopy_info()
        assert stream.readall()
        migration.set_state(S.STOP)
        with pytest.raises(VfioError, match="left the state|No such device|closed"):
            stream.read(1)


def test_reinit_is_reported_where_the_kernel_can(uart):
    if RELEASE >= (7, 0):
        uart.migration.report_reinit()
        with uart.migration.set_state(S.PRE_COPY) as stream:
            assert stream.precopy_info().reinit is False
    else:
        with pytest.raises(UnsupportedError):
            uart.migration.report_reinit()


def test_impossible_transitions_leave_the_state(uart):
    migration = uart.migration
    with pytest.raises(InvalidArgumentError, match="ERROR"):
        migration.set_state(S.ERROR)
    with pytest.raises(InvalidArgumentError, match="MigrationState"):
        migration.set_state(8)
    assert migration.state is S.RUNNING
    stream = migration.set_state(S.STOP_COPY)
    with pytest.raises(InvalidArgumentError):
        migration.set_state(S.PRE_COPY)
    assert migration.state is S.STOP_COPY
    stream.close()
    migration.set_state(S.RUNNING)


def test_incomplete_data_does_not_resume(uart):
    with uart.migration.set_state(S.RESUMING) as stream:
        stream.write(b"\0" * 4)
        with pytest.raises(VfioError, match="not complete|Invalid"):
            uart.migration.set_state(S.RUNNING)
    uart.reset()
    assert uart.migration.state is S.RUNNING


def test_every_state_is_reached_and_told(uart):
    migration = uart.migration
    for state in (S.RUNNING_P2P, S.STOP, S.RUNNING, S.PRE_COPY_P2P, S.PRE_COPY, S.RUNNING):
        with migration.set_state(state) or contextlib.nullcontext():
            assert migration.state is state


def test_a_device_log_is_started_read_and_stopped(uart):
    source = DeviceLogSource(uart)
    assert isinstance(source, DirtySource)
    assert uart.dma_log.supported
    source.start([(0x1000 * i, 0x1000) for i in range(0, 1200, 3)], 4096)       # joined to 256
    bitmap = DirtyBitmap(64)
    assert source.harvest(0, 64 * 4096, bitmap) == 0 and not bitmap.any()
    source.stop()


@pytest.mark.parametrize("ranges, code", [
    ([], errno.EINVAL), ([(0, 0x1000)] * 257, errno.E2BIG), ([(1, 4096)], errno.EINVAL),
    ([(0, 8192), (4096, 4096)], errno.EINVAL), ([((1 << 64) - 4096, 4096)], errno.EOVERFLOW),
    ([(1 << 64, 4096)], errno.EINVAL), ([(-4096, 4096)], errno.EINVAL)])
def test_bad_ranges_of_a_log_are_refused(uart, ranges, code):
    with pytest.raises(InvalidArgumentError) as caught:
        uart.dma_log.start(ranges)
    assert caught.value.errno == code


def test_bad_reports_of_a_log_are_refused(uart):
    uart.dma_log.start([(0, 0x10000)])
    with pytest.raises(InvalidArgumentError, match="power of two"):
        uart.dma_log.report(0, 0x10000, bytearray(8), 2048)
    with pytest.raises(InvalidArgumentError, match="bitmap"):
        uart.dma_log.report(0, 65 * 4096, bytearray(8))
    with pytest.raises(InvalidArgumentError):
        uart.dma_log.report((1 << 64) - 4096, 8192, bytearray(8))
    uart.dma_log.report(0, 0x10000, bytearray(8))
    uart.dma_log.stop()


def test_interrupts_of_a_device_that_is_not_vfio_pci(uart):
    with uart.interrupts(IrqIndex.INTX) as vectors:
        vectors.unmask()
        vectors.mask()
    assert {info.index for info in uart.interrupts} == {IrqIndex.INTX, IrqIndex.MSI}


def test_a_display_in_a_region():
    with sample("mdpy", "mdpy-vga") as device:
        assert device.graphics.probe(PlaneAccess.REGION) and not device.graphics.probe(PlaneAccess.DMABUF)
        plane = device.graphics.query(PlaneAccess.REGION)
        assert plane.enabled and (plane.width, plane.height, plane.stride) == (640, 480, 640 * 4)
        assert plane.dmabuf_id is None and plane.size >= 640 * 480 * 4
        with pytest.raises(InvalidArgumentError):
            device.graphics.query(PlaneAccess.DMABUF)
        with device.regions[0].mmap() as screen:
            screen.view(0, 4)[:] = b"\1\2\3\4"
            assert bytes(screen.view(0, 4)) == b"\1\2\3\4"


def test_a_display_in_dma_bufs():
    with sample("mbochs", "mbochs-small") as device:
        graphics = device.graphics
        assert graphics.probe(PlaneAccess.DMABUF) and not graphics.probe(PlaneAccess.REGION)
        assert not graphics.query(PlaneAccess.DMABUF).enabled
        for index, value in ((1, 640), (2, 480), (3, 32), (6, 640), (4, 0x41)):     # resolution, depth, stride, on
            device.regions[2].write_u16(0x500 + 2 * index, value)
        with pytest.raises(LockedMemoryError, match="again"):       # this driver makes the dma-buf, but forgets it once
            graphics.query(PlaneAccess.DMABUF)
        plane = graphics.query(PlaneAccess.DMABUF)
        assert plane.enabled and (plane.width, plane.height) == (640, 480) and plane.region_index is None
        os.close(graphics.dmabuf(plane.dmabuf_id))
        with pytest.raises(NotMappedError, match="query it again"):
            graphics.dmabuf(plane.dmabuf_id + 1000)
        edid = device.regions.find(1, 1)
        assert edid.info.type == RegionType(1, 1) and edid.info.type.vendor is None
        assert len(edid.info.capabilities[0].data) == 16


@needs_devices
def test_a_device_without_a_display():
    with Type1Container([EDU]) as container, VfioDevice.open(container, EDU) as device:
        assert not device.graphics.probe(PlaneAccess.REGION)
        with pytest.raises(UnsupportedError, match="no display"):
            device.graphics.query(PlaneAccess.REGION)
        with pytest.raises(UnsupportedError):
            device.graphics.dmabuf(0)


# ---- devices that were opened through their own nodes

@needs_devices
def test_a_device_node_is_driven_as_one_of_a_group():
    with open_backend("iommufd", devices=[EDU]) as container, VfioDevice.open(container, EDU) as device:
        driver = EduDriver(device)
        with GuestMemory.memfd(4096) as memory, IoAddressSpace(container) as ioas, driver.use_interrupts(IrqIndex.MSI):
            memory.write(0, b"bytes")
            ioas.map(memory, 0x100000)
            driver.copy(0x100000, 0x100800, 5)
            assert memory.read(0x800, 5) == b"bytes"
        with pytest.raises(NoDeviceError):
            device.hot_reset_info()


@needs_devices
def test_a_hot_reset_of_device_nodes_needs_no_groups():
    with open_backend("iommufd", devices=BEHIND_THE_BRIDGE) as container, \
            VfioDevice.open(container, BEHIND_THE_BRIDGE[0]) as device:
        info = device.hot_reset_info()
        assert info.by_devid and info.owned
        assert [entry.address for entry in info.devices] == BEHIND_THE_BRIDGE
        assert all(entry.devid > 0 and entry.group is None for entry in info.devices)
        with pytest.raises(InvalidArgumentError, match="none for a device"):
            device.hot_reset([0])
        device.hot_reset()


@needs_devices
def test_a_hot_reset_names_devices_that_are_not_owned():
    with open_backend("iommufd", devices=BEHIND_THE_BRIDGE[:1]) as container, \
            VfioDevice.open(container, BEHIND_THE_BRIDGE[0]) as device:
        info = device.hot_reset_info()
        assert info.devices[0].devid > 0 and info.devices[1].devid == 0 and info.owned     # owned: of the same group
