"""A guest with a working edu device moves: memory by rounds, the device in the middle of a transfer, and goes on."""
import contextlib
import errno
import socket
import threading
import time

import pytest
from migration_doubles import Peer

from vfiodma import GuestMemory, IoAddressSpace, SoftwareGroup, SoftwareVfio, VfioDevice
from vfiodma._core.errno import error
from vfiodma.devices import EduDevice, EduDriver, IrqIndex
from vfiodma.devices.edu_driver import DMA_DONE
from vfiodma.errors import MigrationError
from vfiodma.migration import DeviceSinks, DeviceStates, DirtyTracker, PrecopySource, SocketTransport
from vfiodma.migration.layout import MemoryLayout

ADDRESS = "0000:00:10.0"
SIZE = 4 << 20
IOVA = 0x100000
SLOTS = 256                     # of 4 KiB, used round and round


class Host:
    """A machine: memory, an edu device, its driver."""

    def __init__(self, stack, fill=b""):
        self.memory = stack.enter_context(GuestMemory.memfd(SIZE))
        self.memory.write(0, fill)
        self.edu = EduDevice(ADDRESS, migratable=True, transfer_time=0.02)
        system = SoftwareVfio(groups=[SoftwareGroup(0, [self.edu])], memlock_limit=None)
        container = stack.enter_context(system.container())
        self.device = stack.enter_context(VfioDevice.open(container, ADDRESS))
        self.ioas = stack.enter_context(IoAddressSpace(container))
        self.ioas.map(self.memory, IOVA)


class Guest:
    """The guest's program: has the device copy slot after slot; its own state is a number and whether it waits."""

    def __init__(self, host, number=0, waits=False):
        self.host, self.number, self.waits = host, number, waits
        self.driver = EduDriver(host.device)
        self.driver.use_interrupts(IrqIndex.MSI)
        self._stop, self._thread, self.failure = threading.Event(), None, None

    def start(self):
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self):
        self._stop.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def _run(self):
        try:
            while True:
                if not self.waits:
                    self.begin()
                if not self.finish():
                    return          # in the middle: the other machine's guest waits on
        except Exception as exc:
            self.failure = exc

    def begin(self):
        bar = self.host.device.regions[0]
        self.host.edu.buffer[:8] = self.number.to_bytes(8, "little")
        for register, value in ((0x80, 0x40000), (0x88, IOVA + self.number % SLOTS * 4096), (0x90, 4096), (0x98, 7)):
            bar.write_u32(register, value)
        self.waits = True

    def finish(self):
        """Wait for the transfer; return False when the guest is stopped before."""
        while self.driver.interrupt_status & DMA_DONE == 0:
            if self._stop.wait(0.001):
                return False
        self.driver.acknowledge(DMA_DONE)
        self.number, self.waits = self.number + 1, False
        return True


class SourceMachine:
    """The guest's CPU, for the engine."""

    def __init__(self, guest):
        self.guest, self.stop, self.resume = guest, guest.stop, guest.start

    def state(self):
        return {"program": self.guest.number.to_bytes(8, "little") + bytes([self.guest.waits])}


@contextlib.contextmanager
def hosts():
    with contextlib.ExitStack() as stack:
        yield Host(stack, bytes(range(1, 256)) * 4000), Host(stack)


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def move(old, new, guest, sinks, taken):
    here, there = socket.socketpair()
    peer = Peer(there, new.memory, verify=True, fresh=True, devices=sinks, on_state=taken.__setitem__)
    transport = SocketTransport(here, 20)
    try:
        with MemoryLayout(old.memory, old.ioas.pgsize) as layout, DeviceStates([old.device], chunk=700) as states:
            source = PrecopySource(transport, downtime_limit=1e-9, max_rounds=4)
            source.introduce(old.memory)
            source.migrate(layout, DirtyTracker(old.ioas, layout), SourceMachine(guest), devices=states)
            assert len(set(source.verify(layout))) == 1
            source.release()
    finally:
        transport.close()
        peer.join()


def refuse(data):
    raise error(errno.EIO, "edu_load")


def check_slots(memory, numbers):
    """Every transfer left its number in its slot, and the rest of the buffer behind it."""
    for number in range(max(0, numbers - SLOTS), numbers):
        slot = memory.read(number % SLOTS * 4096, 4096)
        assert slot[:8] == number.to_bytes(8, "little") and slot[8:] == b"\xa5" * 4088


def test_an_edu_device_that_does_dma_moves_and_its_driver_goes_on():
    with hosts() as (old, new):
        guest, taken = Guest(old), {}
        old.edu.buffer[:] = b"\xa5" * 4096
        assert guest.driver.factorial(10) == 3628800
        guest.start()
        wait_for(lambda: guest.number > 3)
        with DeviceSinks([new.device]) as sinks:
            there = Guest(new)                  # its interrupts are enabled before the device runs
            move(old, new, guest, sinks, taken)
            there.number, there.waits = int.from_bytes(taken["program"][:8], "little"), bool(taken["program"][8])
            assert there.number == guest.number and there.waits
            content = new.memory.read(0, SIZE)
            assert content == old.memory.read(0, SIZE)
            sinks.run()
        before = there.number
        there.start()
        wait_for(lambda: there.number > before + 3)
        there.stop()
        there._stop.clear()
        assert there.finish()
        check_slots(new.memory, there.number)
        assert old.memory.read(0, SIZE) == content      # the source's device stands still for good
        assert there.driver.factorial(5) == 120
        assert there.driver.invert(0x0F0F0F0F) == 0xF0F0F0F0
        new.memory.write(3 << 20, b"moved once more")
        there.driver.copy(IOVA + (3 << 20), IOVA + (3 << 20) + 0x1000, 15)
        assert new.memory.read((3 << 20) + 0x1000, 15) == b"moved once more"


def test_a_migration_that_fails_at_the_end_leaves_guest_and_device_running():
    with hosts() as (old, new):
        guest = Guest(old)
        old.edu.buffer[:] = b"\xa5" * 4096
        guest.start()
        wait_for(lambda: guest.number)
        with DeviceSinks([new.device]) as sinks:
            new.edu.migration.load = refuse
            with pytest.raises(MigrationError, match="it does not go to STOP"):
                move(old, new, guest, sinks, {})
        before = guest.number
        wait_for(lambda: guest.number > before + 2)
        guest.stop()
        guest._stop.clear()
        assert guest.finish()
        check_slots(old.memory, guest.number)
        assert new.device.migration.state.name == "RUNNING"


def test_a_guest_runs_on_when_its_device_can_not_be_helped():
    with hosts() as (old, new):
        guest = Guest(old)
        guest.start()
        old.edu.migration.final = lambda: refuse(b"")
        old.device.reset = lambda: refuse(b"")
        with DeviceSinks([new.device]) as sinks, pytest.raises(MigrationError, match="can't be reset") as caught:
            move(old, new, guest, sinks, {})
        assert "left in ERROR" in str(caught.value.__context__)
        assert guest._thread.is_alive()
        guest.stop()
        del old.device.reset
        old.device.reset()
