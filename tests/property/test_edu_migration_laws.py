"""An edu device that was moved behaves as one that was not: the same calls, the same answers, memory and interrupts."""
import contextlib
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from migrating_devices import addresses, finish, send

from vfiodma import GuestMemory, IoAddressSpace, SoftwareGroup, SoftwareVfio, VfioDevice
from vfiodma.devices import EduDevice, IrqIndex
from vfiodma.devices.migration import MigrationState
from vfiodma.errors import MigrationError, ProtocolError
from vfiodma.migration.device_group import DeviceSinks, DeviceStates

SIZE = 1 << 14
BUFFER = 0x40000
REGISTERS = (0x04, 0x08, 0x20, 0x24, 0x80, 0x88, 0x90, 0x98)
VALUES = st.sampled_from([0, 1, 5, 0x80, 0x100, 0xFFFFFFFF])
#: (register, value), or (source, target, count, command) of a transfer.
WRITE = st.tuples(st.sampled_from([0x04, 0x08, 0x20, 0x60, 0x64]), VALUES)
PLACE = st.one_of(st.integers(0, SIZE + 4096), st.integers(BUFFER, BUFFER + 4096))
TRANSFER = st.tuples(PLACE, PLACE, st.sampled_from([0, 1, 16, 256, 1000, 4096, 5000]), st.sampled_from([1, 3, 5, 7, 0]))
CONFIG = st.tuples(st.sampled_from(["master", "line"]), st.booleans())
HOP = st.lists(WRITE | TRANSFER, max_size=3)        # done in between, while the device is in PRE_COPY
STEP = st.one_of(WRITE, TRANSFER, TRANSFER, CONFIG, HOP)


class Board:
    """An edu device in a machine of its own; several machines may share their memory."""

    def __init__(self, memory, kind, flags=7):
        self.edu = EduDevice(addresses(1)[0], migratable=True)
        self.edu.migration.flags = flags
        self.stack = contextlib.ExitStack()
        system = SoftwareVfio(groups=[SoftwareGroup(0, [self.edu])], memlock_limit=None)
        container = self.stack.enter_context(system.container())
        self.device = self.stack.enter_context(VfioDevice.open(container, self.edu.address))
        self.stack.enter_context(IoAddressSpace(container)).map(memory, 0x1000)
        self.vectors = None if kind is None else self.stack.enter_context(self.device.interrupts(kind))
        self.fired = 0

    def do(self, step):
        bar = self.device.regions[0]
        if step[0] == "master":
            self.device.config.bus_master = step[1]
        elif step[0] == "line":
            self.device.regions[7].write_u8(0x3C, 9 if step[1] else 4)
        elif len(step) == 2:
            bar.write_u32(*step)
        else:
            for register, value in zip((0x80, 0x88, 0x90, 0x98), step, strict=True):
                bar.write_u64(register, value)

    def interrupts(self):
        """Count those that came, as a handler would; INTx is unmasked when its reasons are gone."""
        if self.vectors is not None:
            try:
                self.fired += os.eventfd_read(self.vectors[0].fd)
            except BlockingIOError:
                return self.fired
            if self.vectors.kind == IrqIndex.INTX:
                self.device.regions[0].write_u32(0x64, 0xFFFFFFFF)
                self.vectors.unmask()
        return self.fired

    def look(self):
        bar, config = self.device.regions[0], self.device.regions[7]
        return ([bar.read_u64(at) if at >= 0x80 else bar.read_u32(at) for at in REGISTERS],
                config.read(0, 256), bytes(self.edu.buffer))


@given(st.sampled_from([None, IrqIndex.INTX, IrqIndex.MSI]), st.sampled_from([1, 3, 5, 7]),
       st.lists(STEP, min_size=1, max_size=25))
def test_a_moved_device_and_one_that_stayed_are_the_same(kind, flags, steps):
    with GuestMemory.memfd(SIZE) as memory, GuestMemory.memfd(SIZE) as twin_memory, contextlib.ExitStack() as stack:
        for each in (memory, twin_memory):
            each.write(0, bytes(range(256)) * (SIZE // 256))
        stayed, moved = Board(twin_memory, kind), Board(memory, kind, flags)
        stack.callback(stayed.stack.close)
        stack.callback(lambda: moved.stack.close())
        for board in (stayed, moved):
            board.device.config.bus_master = True
        for step in steps:
            if not isinstance(step, list):
                for board in (stayed, moved):
                    board.do(step)
            else:
                target = Board(memory, kind, flags)
                source, sinks = DeviceStates([moved.device], chunk=100), DeviceSinks([target.device])
                sinks.prepare()
                source.start()
                for inner in step:
                    send(source, sinks)
                    for board in (stayed, moved):
                        board.do(inner)
                target.fired = moved.interrupts()
                stayed.interrupts()
                finish(source, sinks)
                moved.stack.close()
                moved = target
            assert stayed.look() == moved.look()
            assert stayed.interrupts() == moved.interrupts()
            assert memory.read(0, SIZE) == twin_memory.read(0, SIZE)


@given(st.sampled_from([MigrationState.RUNNING_P2P, MigrationState.STOP]), st.lists(WRITE, max_size=8))
def test_what_comes_while_it_is_held_up_is_done_later(state, writes):
    """Registers answer in every state; interrupts wait for P2P, DMA for RUNNING."""
    with GuestMemory.memfd(SIZE) as memory:
        board = Board(memory, IrqIndex.MSI)
        with board.stack:
            board.device.config.bus_master = True
            board.edu.buffer[:5] = b"there"
            board.device.migration.set_state(state)
            for write in writes:
                board.do(write)
            raised = [value for register, value in writes if register == 0x60 and value]
            board.do((BUFFER, 0x1000, 5, 7))
            assert memory.read(0, 5) == bytes(5)
            if state is MigrationState.STOP:
                assert board.interrupts() == 0
            else:
                assert board.interrupts() >= len(raised)
            board.device.migration.set_state(MigrationState.RUNNING)
            assert memory.read(0, 5) == b"there"
            assert board.interrupts() >= 1 and board.device.regions[0].read_u32(0x24) & 0x100


#: A frame's name is a device's or another one; its bytes are a chunk with one thing changed, or anything.
CHUNK = st.tuples(st.sampled_from([1, 1, 1, 0, 2]), st.sampled_from([0, 0, 1, 2]),
                  st.sampled_from([0, 0, 0, 1, 2, 65535]), st.integers(0, 40),
                  st.sampled_from([0, 0, 0, 1, 5, 1 << 63]) | st.integers(0, 60), st.binary(max_size=40))


@given(st.lists(st.one_of(CHUNK, st.binary(max_size=64)), max_size=12))
def test_whatever_comes_is_refused_or_taken_and_the_device_can_be_used_afterwards(frames):
    with GuestMemory.memfd(SIZE) as memory:
        board = Board(memory, None)
        with board.stack:
            with DeviceSinks([board.device], limit=100) as sinks:
                sinks.prepare()
                for frame in frames:
                    if isinstance(frame, tuple):
                        *numbers, offset, content = frame
                        version, flags, attempt, count = numbers
                        count = len(content) if count < 30 else count
                        frame = struct.pack("<BBHIQ", version, flags, attempt, count, offset) + content
                    with contextlib.suppress(ProtocolError):
                        sinks.take("device:" + board.edu.address, frame)
                with pytest.raises((ProtocolError, MigrationError)):    # it is never a whole edu device
                    sinks.load()
            assert board.device.migration.state is MigrationState.RUNNING
            board.do((0x08, 5))
            assert board.device.regions[0].read_u32(0x08) == 120
