"""What an `edu` device does for its driver: the same tests for a real one in the lab and for the software one.

A test file derives from these classes and has a fixture ``container``, open, with the device at EDU.
"""
import errno
import os
import time

import pytest

from vfiodma import GuestMemory, IoAddressSpace
from vfiodma.devices.edu_driver import DMA_DONE, EduDriver
from vfiodma.devices.features import Feature, FeatureOps
from vfiodma.devices.interrupts import IrqFlags, IrqIndex, IrqInfo
from vfiodma.devices.ioevents import IoEvent
from vfiodma.devices.migration import MigrationFlags, MigrationState
from vfiodma.devices.pci import DeviceFlags, VfioDevice
from vfiodma.devices.regions import RegionFlags
from vfiodma.errors import (
    BusyError,
    ClosedError,
    ForkedError,
    InvalidArgumentError,
    NoDeviceError,
    TimedOutError,
    UnsupportedError,
)

EDU = "0000:00:10.0"
IOVA = 0x100000
PAGE = 4096


class WithEdu:
    @pytest.fixture
    def device(self, container):
        with VfioDevice.open(container, EDU) as device:
            yield device

    @pytest.fixture
    def edu(self, device):
        with EduDriver(device) as driver:
            yield driver


class RegisterChecks(WithEdu):
    def test_information_names_a_pci_device(self, device):
        assert device.info.flags & DeviceFlags.PCI
        assert device.info.num_regions >= 9
        assert device.info.num_irqs == 5

    def test_a_device_that_is_not_in_the_container_is_refused(self, container):
        with pytest.raises(NoDeviceError):
            VfioDevice.open(container, "0000:7f:00.0")

    def test_identity_is_in_the_configuration_space(self, device):
        config = device.config
        assert (config.vendor_id, config.device_id) == (0x1234, 0x11E8)
        assert (config.revision, config.class_code) == (0x10, 0x00FF00)
        assert config.header_type == 0 and config.size >= 256

    def test_bus_mastering_is_off_at_first_and_can_be_switched(self, device):
        config = device.config
        assert config.bus_master is False
        config.bus_master = True
        assert config.bus_master is True
        config.bus_master = False
        assert config.bus_master is False

    def test_capability_lists_end(self, device):
        standard = device.config.capabilities()
        assert len({capability.offset for capability in standard}) == len(standard)
        assert device.config.find_capability(0xEE) is None
        assert isinstance(device.config.extended_capabilities(), tuple)

    def test_the_registers_are_bar_0(self, device):
        bar = device.regions[0]
        assert (bar.name, bar.size, bar.info.index) == ("BAR 0", 1 << 20, 0)
        assert bar.info.flags & (RegionFlags.READ | RegionFlags.WRITE) == RegionFlags.READ | RegionFlags.WRITE
        assert bar.info.type is None and bar.info.sparse_areas is None

    def test_regions_that_are_implemented_can_be_listed(self, device):
        indexes = [region.info.index for region in device.regions]
        assert indexes[0] == 0 and 7 in indexes and 5 not in indexes
        assert device.regions[5].size == 0

    @pytest.mark.parametrize("index", [9, 1 << 31, 1 << 40, -1])
    def test_an_index_beyond_the_regions_is_invalid(self, device, index):
        with pytest.raises(InvalidArgumentError, match="no region"):
            device.regions[index]

    @pytest.mark.parametrize("offset, size", [(1 << 20, 4), ((1 << 20) - 2, 4), (-4, 4), (0, -1), (1 << 64, 4)])
    def test_access_outside_of_a_region_is_invalid(self, device, offset, size):
        with pytest.raises(InvalidArgumentError, match="outside of BAR 0|negative"):
            device.regions[0].read(offset, size)

    def test_a_number_that_does_not_fit_is_invalid(self, device):
        with pytest.raises(InvalidArgumentError, match="does not fit"):
            device.regions[0].write_u32(4, 1 << 32)
        with pytest.raises(InvalidArgumentError, match="does not fit"):
            device.regions[0].write_u8(4, -1)

    def test_an_unimplemented_region_can_be_neither_read_nor_mapped(self, device):
        with pytest.raises(InvalidArgumentError):
            device.regions[5].read_u32(0)
        with pytest.raises(InvalidArgumentError):
            device.regions[5].mmap()

    def test_every_width_reads_the_same_little_endian_bytes(self, device):
        config = device.regions[7]
        data = config.read(0, 8)
        assert config.read_u8(0) == data[0]
        assert config.read_u16(0) == 0x1234
        assert config.read_u32(0) == 0x11E81234
        assert config.read_u64(0) == int.from_bytes(data, "little")

    def test_a_closed_device_fails_with_a_typed_error(self, container):
        device = VfioDevice.open(container, EDU)
        bar, config, interrupts = device.regions[0], device.config, device.interrupts
        device.close()
        device.close()
        for call in (device.reset, device.hot_reset_info, lambda: bar.read_u32(0), lambda: bar.write_u32(4, 0),
                     lambda: config.vendor_id, lambda: interrupts.info(0), lambda: device.features.probe(1),
                     lambda: device.regions[1], lambda: device.migration.state):
            with pytest.raises(ClosedError, match="closed"):
                call()
        assert "closed" in repr(device)

    def test_forgetting_to_close_is_a_resource_warning(self, container):
        device = VfioDevice.open(container, EDU)
        with pytest.warns(ResourceWarning, match="0000:00:10.0"):
            del device

    def test_the_child_of_a_fork_may_only_close_it(self, device):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                assert device.forked
                for call in (lambda: device.config.vendor_id, lambda: device.interrupts.info(0), device.reset):
                    with pytest.raises(ForkedError):
                        call()
                device.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert device.config.vendor_id == 0x1234

    def test_a_device_can_be_opened_twice(self, container, device):
        with VfioDevice.open(container, EDU) as other:
            assert other.fd != device.fd
            assert other.config.vendor_id == device.config.vendor_id

    def test_features_that_a_device_lacks_are_probed_as_nothing(self, device):
        for feature in (Feature.MIGRATION, Feature.DMA_LOGGING_START, Feature.BUS_MASTER, 4000):
            assert device.features.probe(feature) == FeatureOps(0)
        assert device.migration.flags == MigrationFlags(0)
        assert device.dma_log.supported is False

    def test_missing_features_are_unsupported(self, device):
        with pytest.raises(UnsupportedError, match="MIG_DEVICE_STATE"):
            _ = device.migration.state
        with pytest.raises(UnsupportedError):
            device.migration.set_state(MigrationState.STOP)
        with pytest.raises(UnsupportedError):
            device.migration.data_size()
        with pytest.raises(UnsupportedError):
            device.dma_log.start([(0, PAGE)])
        with pytest.raises(UnsupportedError):
            device.dma_log.report(0, PAGE, bytearray(8))
        with pytest.raises(UnsupportedError):
            device.dma_log.stop()


class DriverChecks(WithEdu):
    def test_the_device_answers(self, edu):
        assert edu.version == (1, 0)
        assert edu.invert(0x12345678) == 0xEDCBA987

    @pytest.mark.parametrize("n, result", [(0, 1), (5, 120), (12, 479001600), (13, 1932053504)])
    def test_it_computes_factorials(self, edu, n, result):
        assert edu.factorial(n) == result

    def test_bytes_arrive_where_they_were_mapped_and_nowhere_after_unmap(self, container, edu):
        content = bytes(range(1, 201))
        with GuestMemory.memfd(4 * PAGE) as memory, IoAddressSpace(container) as ioas:
            memory.write(0, content)
            mapping = ioas.map(memory, IOVA)
            edu.dma_to_device(IOVA, len(content))
            edu.dma_from_device(IOVA + PAGE + 8, len(content))
            assert memory.read(PAGE, 8 + len(content) + 8) == bytes(8) + content + bytes(8)
            edu.copy(IOVA + PAGE + 8, IOVA + 3 * PAGE, 16)
            assert memory.read(3 * PAGE, 17) == content[:16] + b"\0"
            edu.dma_to_device(IOVA, len(content))
            ioas.unmap(mapping.iova)
            before = memory.read(0, 4 * PAGE)
            edu.dma_from_device(IOVA + 2 * PAGE, len(content))
            assert memory.read(0, 4 * PAGE) == before

    def test_more_than_its_buffer_goes_in_pieces(self, container, edu):
        content = bytes(i * 7 & 0xFF for i in range(5000))
        with GuestMemory.memfd(4 * PAGE) as memory, IoAddressSpace(container) as ioas:
            memory.write(0, content)
            ioas.map(memory, IOVA)
            edu.copy(IOVA, IOVA + 2 * PAGE, len(content))
            assert memory.read(2 * PAGE, len(content) + 1) == content + b"\0"

    def test_without_bus_mastering_nothing_moves(self, container, edu):
        with GuestMemory.memfd(PAGE) as memory, IoAddressSpace(container) as ioas:
            memory.write(0, b"content")
            ioas.map(memory, IOVA)
            edu.dma_to_device(IOVA, 7)
            edu.device.config.bus_master = False
            edu.dma_from_device(IOVA + 64, 7)
            assert memory.read(64, 7) == bytes(7)

    def test_dma_beyond_what_the_device_reaches_is_refused(self, edu):
        with pytest.raises(InvalidArgumentError, match="0x10000000"):
            edu.dma_to_device(1 << 28, 1)
        with pytest.raises(InvalidArgumentError):
            edu.dma_from_device((1 << 28) - 1, 2)


class InterruptChecks(WithEdu):
    def test_interrupt_types_are_described(self, device):
        intx = device.interrupts.info(IrqIndex.INTX)
        assert intx == IrqInfo(0, 1, IrqFlags.EVENTFD | IrqFlags.MASKABLE | IrqFlags.AUTOMASKED)
        assert device.interrupts.info(IrqIndex.MSI) == IrqInfo(1, 1, IrqFlags.EVENTFD | IrqFlags.NORESIZE)
        assert device.interrupts.info(IrqIndex.MSIX).count == 0
        assert [info.index for info in device.interrupts] == [IrqIndex.INTX, IrqIndex.MSI, IrqIndex.REQ]

    @pytest.mark.parametrize("kind", [IrqIndex.ERR, 5, 1 << 31, -1])
    def test_an_interrupt_type_that_the_device_lacks_is_invalid(self, device, kind):
        with pytest.raises(InvalidArgumentError, match="the device has no"):
            device.interrupts.info(kind)

    @pytest.mark.parametrize("kind", [IrqIndex.INTX, IrqIndex.MSI])
    def test_a_raised_interrupt_arrives(self, edu, kind):
        with edu.use_interrupts(kind):
            edu.raise_interrupt(0x5)
            edu.wait_interrupt(0x5)
            assert edu.interrupt_status == 0
            edu.raise_interrupt(0x2)
            edu.wait_interrupt(0x2)

    @pytest.mark.parametrize("kind", [IrqIndex.INTX, IrqIndex.MSI])
    def test_factorials_and_dma_end_with_an_interrupt(self, container, edu, kind):
        with GuestMemory.memfd(PAGE) as memory, IoAddressSpace(container) as ioas:
            ioas.map(memory, IOVA)
            memory.write(0, b"content")
            with edu.use_interrupts(kind):
                assert edu.factorial(10) == 3628800
                edu.dma_to_device(IOVA, 7)
                edu.dma_from_device(IOVA + 64, 7)
            assert memory.read(64, 8) == b"content\0"

    def test_no_interrupt_is_a_time_out(self, edu):
        with edu.use_interrupts(IrqIndex.MSI):
            edu.timeout = 0.05
            with pytest.raises(TimedOutError, match="did not fire"):
                edu.wait_interrupt(DMA_DONE)

    def test_intx_is_masked_until_it_is_unmasked(self, edu):
        with edu.device.interrupts(IrqIndex.INTX) as vectors:
            edu.raise_interrupt(1)
            assert vectors.wait(2) == 1
            edu.acknowledge()
            edu.raise_interrupt(1)
            with pytest.raises(TimedOutError):
                vectors.wait(0.1)
            vectors.unmask()
            assert vectors.wait(2) == 1
            edu.acknowledge()
            vectors.mask()
            vectors.unmask()
            with pytest.raises(TimedOutError):
                vectors.wait(0.1)

    def test_intx_is_unmasked_by_an_eventfd(self, edu):
        resume = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            with edu.device.interrupts(IrqIndex.INTX) as vectors:
                vectors.unmask_on(resume)
                edu.raise_interrupt(1)
                assert vectors.wait(2) == 1
                os.eventfd_write(resume, 1)         # still raised
                assert vectors.wait(2) == 1
                edu.acknowledge()
                vectors.unmask_on(None)
        finally:
            os.close(resume)

    @pytest.mark.parametrize("kind", [IrqIndex.INTX, IrqIndex.MSI, IrqIndex.REQ])
    def test_interrupts_can_be_triggered_without_the_device(self, device, kind):
        with device.interrupts(kind) as vectors:
            vectors.trigger()
            assert vectors.wait(2) == 1
            vectors.trigger_where([True])
            assert vectors.wait(2) == 1
            vectors.trigger_where([False])
            assert vectors[0].poll() == 0

    def test_msi_can_not_be_masked(self, device):
        with device.interrupts(IrqIndex.MSI) as vectors:
            with pytest.raises(UnsupportedError, match="MSI"):
                vectors.mask()
            with pytest.raises(UnsupportedError):
                vectors.unmask()

    def test_intx_and_msi_exclude_one_another(self, device):
        with device.interrupts(IrqIndex.INTX):
            with pytest.raises(InvalidArgumentError, match="INTX is enabled"):
                device.interrupts(IrqIndex.MSI)
        with device.interrupts(IrqIndex.MSI), device.interrupts(IrqIndex.REQ):
            with pytest.raises(InvalidArgumentError, match="MSI is enabled"):
                device.interrupts(IrqIndex.INTX)

    def test_a_type_is_enabled_once(self, device):
        with device.interrupts(IrqIndex.MSI):
            with pytest.raises(BusyError, match="enabled already"):
                device.interrupts(IrqIndex.MSI)
        device.interrupts(IrqIndex.MSI).close()

    def test_too_many_vectors_are_refused(self, device):
        for kind, count in ((IrqIndex.MSI, 2), (IrqIndex.INTX, 0), (IrqIndex.MSIX, 1), (IrqIndex.MSI, -1)):
            with pytest.raises(InvalidArgumentError, match="vectors"):
                device.interrupts(kind, count)

    def test_vectors_can_be_given_other_eventfds(self, device):
        mine = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            with device.interrupts(IrqIndex.MSI) as vectors:
                vectors.assign(0, [mine])
                vectors.trigger()
                assert os.eventfd_read(mine) == 1 and vectors[0].poll() == 0
                vectors.assign(0, [None])
                vectors.trigger()
                assert vectors[0].poll() == 0
                vectors.restore()
                vectors.trigger()
                assert vectors.wait(2) == 1
                with pytest.raises(ClosedError):
                    vectors.assign(0, [1 << 20])
                with pytest.raises(InvalidArgumentError):
                    vectors.assign(1, [mine])
        finally:
            os.close(mine)

    def test_a_child_of_a_fork_leaves_the_interrupts_alone(self, device):
        with device.interrupts(IrqIndex.MSI) as vectors:
            pid = os.fork()
            if not pid:
                device.close()
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            vectors.trigger()
            assert vectors.wait(2) == 1

    def test_forgotten_vectors_are_a_resource_warning(self, device):
        vectors = device.interrupts(IrqIndex.MSI)
        with pytest.warns(ResourceWarning, match="vectors of MSI"):
            del vectors
        device.interrupts(IrqIndex.MSI).close()

    def test_closing_the_device_closes_its_vectors(self, container):
        device = VfioDevice.open(container, EDU)
        vectors = device.interrupts(IrqIndex.MSI)
        device.close()
        assert vectors.closed
        with pytest.raises(ClosedError):
            vectors.wait(0)
        with VfioDevice.open(container, EDU) as device:
            device.interrupts(IrqIndex.INTX).close()


class IoEventChecks(WithEdu):
    def test_an_eventfd_writes_a_register(self, edu):
        bar = edu.device.regions[0]
        with edu.device.ioevents.add(0, 0x04, 0xF0F0F0F0, 4) as event:
            assert isinstance(event, IoEvent)
            event.fire()
            deadline = time.monotonic() + 5
            while bar.read_u32(0x04) != 0x0F0F0F0F and time.monotonic() < deadline:
                time.sleep(0.01)
            assert bar.read_u32(0x04) == 0x0F0F0F0F

    def test_impossible_ioeventfds_are_refused(self, device):
        add = device.ioevents.add
        for arguments in ((7, 4, 0, 4), (0, 1 << 20, 0, 4), (0, 4, 0, 3), (0, 4, 1 << 16, 2)):
            with pytest.raises(InvalidArgumentError):
                add(*arguments)
        with add(0, 4, 1, 4):
            with pytest.raises(FileExistsError) as caught:
                add(0, 4, 1, 4)
            assert caught.value.errno == errno.EEXIST
        add(0, 4, 1, 4).close()
