"""Memory and VFIO devices together, by the engine: also over a line that is cut."""
import contextlib
import random

import pytest
from migration_doubles import Machine, content_of
from resuming_line import Line

from vfiodma import GuestMemory, IoAddressSpace, SoftwareGroup, SoftwareVfio, VfioDevice
from vfiodma.devices import EduDevice, EduDriver
from vfiodma.errors import UnsupportedError
from vfiodma.migration import DirtyTracker, PrecopySource
from vfiodma.migration.convergence import Policy
from vfiodma.migration.device_group import DeviceSinks, DeviceStates
from vfiodma.migration.layout import MemoryLayout
from vfiodma.migration.stream import Phase

SIZE = 256 << 10
ADDRESSES = ["0000:00:10.0", "0000:00:11.0"]
IOVA = 0x100000


class Host:
    """Devices of one side, on memory of its own."""

    def __init__(self, **options):
        self.parts = contextlib.ExitStack()
        self.memory = self.parts.enter_context(GuestMemory.memfd(SIZE))
        self.chips = [EduDevice(address, migratable=True, **options) for address in ADDRESSES]
        system = SoftwareVfio(groups=[SoftwareGroup(index, [chip]) for index, chip in enumerate(self.chips)],
                              memlock_limit=None)
        container = self.parts.enter_context(system.container())
        self.devices = [self.parts.enter_context(VfioDevice.open(container, address)) for address in ADDRESSES]
        self.ioas = self.parts.enter_context(IoAddressSpace(container))
        self.ioas.map(self.memory, IOVA)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.parts.close()


def move(here, there, cuts, **options):
    with DeviceSinks(there.devices) as sinks, MemoryLayout(here.memory, 4096) as layout:
        line = Line(there.memory, cuts, devices=sinks)
        try:
            drivers = [EduDriver(device) for device in here.devices]

            def on_event(event):
                if type(event).__name__ == "Round" and not event.final:
                    for number, driver in enumerate(drivers):
                        here.ioas.write(IOVA + 8192 * number, bytes([event.epoch + 1, number]) * 512)
                        driver.copy(IOVA + 8192 * number, IOVA + 8192 * number + 4096, 1024)
                        driver.factorial(3 + number)

            with PrecopySource(line.connect(), connect=line.connect, policy=Policy(1e-9, max_rounds=3),
                               on_event=on_event, **options) as source:
                source.introduce(here.memory)
                machine = Machine()
                result = source.migrate(layout, DirtyTracker(here.ioas, layout), machine,
                                        devices=DeviceStates(here.devices))
                source.release()
        finally:
            line.close()
        assert line.receiver.handover.phase is Phase.OWNER
        sinks.run()
    assert content_of(here.memory) == content_of(there.memory)
    assert [bytes(chip.buffer) for chip in here.chips] == [bytes(chip.buffer) for chip in there.chips]
    for number, device in enumerate(there.devices):
        assert device.regions[0].read_u32(0x08) == (6, 24)[number]
        driver = EduDriver(device)      # and it goes on
        assert driver.factorial(5) == 120
        driver.dma_from_device(IOVA + 65536, 1024)
        assert there.memory.read(65536, 1024) == bytes(there.chips[number].buffer[:1024])
    return result


def test_devices_and_memory_arrive_together():
    with Host() as here, Host() as there:
        result = move(here, there, [])
        assert result.breakdown.total == pytest.approx(result.downtime, rel=0.2)
        assert result.breakdown.device_state > 0 and result.breaks == 0


@pytest.mark.parametrize("seed", range(6))
def test_a_broken_line_begins_device_states_anew(seed):
    rng = random.Random(seed)
    print("seed", seed)
    with Host() as here, Host() as there:
        result = move(here, there, [rng.randrange(3000, 45000) for _ in range(3)])
        assert result.breaks


def test_a_device_that_can_not_be_migrated_is_told_before_anything_moves():
    with Host() as here, Host() as there, MemoryLayout(here.memory, 4096) as layout:
        plain = EduDevice("0000:00:12.0")
        system = SoftwareVfio(groups=[SoftwareGroup(0, [plain])], memlock_limit=None)
        line = Line(there.memory, [])
        try:
            with system.container() as container, VfioDevice.open(container, plain.address) as device:
                machine = Machine()
                source = PrecopySource(line.connect())
                source.introduce(here.memory)
                with pytest.raises(UnsupportedError, match="can't be migrated"):
                    source.migrate(layout, DirtyTracker(here.ioas, layout), machine, devices=DeviceStates([device]))
                assert machine.calls == [] and source.handover.may_run
        finally:
            line.close()
