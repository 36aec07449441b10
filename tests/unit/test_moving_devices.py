"""Devices are moved in the middle of their work: transfers under way, interrupts that are due, the next block."""
import contextlib
import os
import time

import numpy as np
import pytest
from migrating_devices import addresses, finish, send

from vfiodma import GuestMemory, IoAddressSpace, SoftwareGroup, SoftwareVfio, VfioDevice
from vfiodma.devices import DmaWriter, EduDevice, IrqIndex
from vfiodma.devices.migration import MigrationState
from vfiodma.errors import ClosedError
from vfiodma.migration.device_group import DeviceSinks, DeviceStates

SIZE = 1 << 20
ADDRESS, = addresses(1)
IOVA = 0x10000


class Boards:
    """Puts software devices on memory, each in a machine of its own."""

    def __init__(self, memory):
        self.memory = memory
        self.machines = {}

    def __call__(self, device):
        stack = contextlib.ExitStack()
        system = SoftwareVfio(groups=[SoftwareGroup(0, [device])], memlock_limit=None)
        container = stack.enter_context(system.container())
        opened = stack.enter_context(VfioDevice.open(container, device.address))
        stack.enter_context(IoAddressSpace(container)).map(self.memory, IOVA)
        self.machines[opened] = stack
        return opened

    def end(self, opened):
        self.machines.pop(opened).close()


@pytest.fixture
def board(memory):
    boards = Boards(memory)
    yield boards
    for opened in list(boards.machines):
        boards.end(opened)


@pytest.fixture
def memory():
    with GuestMemory.memfd(SIZE) as memory:
        yield memory


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def fired(vectors):
    try:
        return os.eventfd_read(vectors[0].fd)
    except BlockingIOError:
        return 0


# ---- edu

def begin_transfer(device, size, command=7):
    device.config.bus_master = True
    for register, value in ((0x80, 0x40000), (0x88, IOVA), (0x90, size), (0x98, command)):
        device.regions[0].write_u64(register, value)


def test_a_transfer_under_way_stands_still_and_goes_on_at_the_destination(board, memory):
    here, there = (EduDevice(ADDRESS, migratable=True, transfer_time=0.5) for _ in range(2))
    old, new = board(here), board(there)
    here.buffer[:] = content = bytes(range(1, 241)) * 17 + bytes(range(1, 17))
    source, sinks = DeviceStates([old]), DeviceSinks([new])
    with new.interrupts(IrqIndex.MSI) as vectors:
        sinks.prepare()
        source.start()
        begin_transfer(old, 4096)
        send(source, sinks)
        wait_for(lambda: memory.read(0, 1) != b"\0")
        source.quiesce()
        moved = memory.read(0, 4096).rstrip(b"\0")
        assert content.startswith(moved)
        time.sleep(0.1)
        assert memory.read(0, 4096).rstrip(b"\0") == moved
        assert old.regions[0].read_u32(0x98) & 1
        for frame in source.final_chunks():
            sinks.take(*frame)
        sinks.load()
        assert memory.read(0, 4096).rstrip(b"\0") == moved
        sinks.run()
        assert vectors.wait(20)
        assert memory.read(0, 4096) == content
        assert new.regions[0].read_u32(0x24) == 0x100 and new.regions[0].read_u32(0x98) == 6


def test_a_transfer_goes_on_where_migration_failed(board, memory):
    device = EduDevice(ADDRESS, migratable=True, transfer_time=0.1)
    old = board(device)
    device.buffer[:] = b"\x5a" * 4096
    source = DeviceStates([old])
    begin_transfer(old, 4096, 3)
    for _ in range(3):
        source.start()
        source.quiesce()
        source.resume()
    wait_for(lambda: not old.regions[0].read_u32(0x98) & 1)
    assert memory.read(0, 4096) == b"\x5a" * 4096


def test_a_reset_and_the_end_of_the_device_end_a_transfer(board, memory):
    device = EduDevice(ADDRESS, migratable=True, transfer_time=0.2)
    old = board(device)
    device.buffer[:] = b"\x5a" * 4096
    begin_transfer(old, 4096, 3)
    old.reset()
    begin_transfer(old, 4096, 3)
    board.end(old)
    wait_for(lambda: device._dma._thread is None)
    assert b"\x5a" not in memory.read(0, 4096)


@pytest.mark.parametrize("kind", [IrqIndex.INTX, IrqIndex.MSI])
def test_an_interrupt_that_came_while_it_stood_still_fires_at_the_destination(board, memory, kind):
    old, new = (board(EduDevice(ADDRESS, migratable=True)) for _ in range(2))
    old.config.bus_master = True
    source, sinks = DeviceStates([old]), DeviceSinks([new])
    with old.interrupts(kind) as here, new.interrupts(kind) as there:
        sinks.prepare()
        source.start()
        source.devices[0].quiesce()
        old.regions[0].write_u32(0x60, 1)
        assert fired(here) == 1                 # P2P states answer
        old.regions[0].write_u32(0x64, 1)
        source.devices[0].stop()
        old.regions[0].write_u32(0x60, 2)
        assert fired(here) == 0
        old.migration.set_state(MigrationState.RUNNING)
        assert fired(here) == (kind == IrqIndex.MSI)    # INTx was masked when it fired, and nobody unmasked it
        old.regions[0].write_u32(0x64, 2)
        source.start()
        source.quiesce()
        old.regions[0].write_u32(0x60, 4)
        for frame in source.final_chunks():     # the registers were read already
            sinks.take(*frame)
        sinks.load()
        sinks.run()
        assert fired(there) == 0 and fired(here) == 0


def test_an_interrupt_that_is_due_is_part_of_the_state(board, memory):
    old, new = (board(EduDevice(ADDRESS, migratable=True)) for _ in range(2))
    old.config.bus_master = True
    with old.interrupts(IrqIndex.MSI) as here, new.interrupts(IrqIndex.MSI) as there:
        old.migration.set_state(MigrationState.STOP)
        old.regions[0].write_u32(0x60, 2)
        state = old.migration.set_state(MigrationState.STOP_COPY).readall()
        with new.migration.set_state(MigrationState.RESUMING) as sink:
            sink.write(state)
            new.migration.set_state(MigrationState.STOP)
            assert fired(there) == 0
        new.migration.set_state(MigrationState.RUNNING)
        assert fired(there) == 1 and fired(here) == 0


def test_only_what_changed_is_dirty_and_a_device_may_begin_anew(board, memory):
    device = EduDevice(ADDRESS, migratable=True)
    old = board(device)
    source = DeviceStates([old])
    source.start()
    whole = source.pending().initial_bytes
    assert whole == old.migration.data_size() - 12      # but for the end
    list(source.chunks())
    device.buffer[0], device.buffer[300], device.buffer[301] = 1, 2, 3
    assert source.pending()[:2] == (0, 2 * (256 + 12))
    list(source.chunks())
    device.migration.begin_anew()
    assert source.pending()[:2] == (whole, 0)
    source.resume()


# ---- the writer

def replay(device, into):
    """Return what memory holds after all blocks up to now, computed from the numbers alone."""
    image = np.frombuffer(bytearray(into), np.uint8)
    for first in range(0, device.writes, 512):
        iovas, rows = device.blocks(first, min(512, device.writes - first))
        for iova, row in zip(iovas.tolist(), rows, strict=True):
            image[iova - IOVA:iova - IOVA + len(row)] = row
    return image.tobytes()


def test_a_writer_goes_on_with_the_next_block_on_every_machine(board, memory):
    ranges = [(IOVA + 4096, 1 << 16), (IOVA + (1 << 18), 1 << 17)]
    device = DmaWriter(ADDRESS, working_set=ranges, rate=32 << 20, seed=7)
    opened = board(device)
    device.start()
    for _ in range(3):
        target = DmaWriter(ADDRESS)
        new = board(target)
        source, sinks = DeviceStates([opened]), DeviceSinks([new])
        sinks.prepare()
        source.start()
        send(source, sinks)
        before = device.writes
        wait_for(lambda device=device, before=before: device.writes > before)
        device.rate = 16 << 20                  # settings may change meanwhile
        source.quiesce()
        writes, content = device.writes, memory.read(0, SIZE)
        for frame in source.final_chunks():
            sinks.take(*frame)
        sinks.load()
        time.sleep(0.02)
        assert memory.read(0, SIZE) == content and target.writes == writes
        assert (target.seed, target.rate, target.working_set) == (7, 16 << 20, device.working_set)
        board.end(opened)                       # what closes while it stands still writes nothing
        assert memory.read(0, SIZE) == content
        sinks.run()
        device, opened = target, new
        wait_for(lambda device=device, writes=writes: device.writes > writes)
    device.stop()
    assert device.faulted == 0
    assert memory.read(0, SIZE) == replay(device, bytes(SIZE))


def test_a_writer_that_was_not_started_does_not_start_at_the_destination(board, memory):
    device, target = DmaWriter(ADDRESS, working_set=[(IOVA, 1 << 16)], rate=32 << 20), DmaWriter(ADDRESS)
    old, new = board(device), board(target)
    source, sinks = DeviceStates([old]), DeviceSinks([new])
    sinks.prepare()
    source.start()
    finish(source, sinks)
    time.sleep(0.02)
    assert not target.started and not target.writes


def test_a_reset_stops_a_writer(board, memory):
    device = DmaWriter(ADDRESS, working_set=[(IOVA, 1 << 16)], rate=32 << 20)
    opened = board(device)
    device.start()
    wait_for(lambda: device.writes)
    opened.reset()
    assert not device.started and not device.writes
    board.end(opened)
    with pytest.raises(ClosedError):
        device.start()
