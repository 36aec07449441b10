"""The demo's device: what it writes, where, and that it stops."""
import contextlib
import time

import pytest

from vfiodma import DirtyBitmap, GuestMemory, IoAddressSpace, SoftwareGroup, open_backend
from vfiodma.devices.dma_writer import DmaWriter
from vfiodma.errors import ClosedError
from vfiodma.protocols import SoftwareDevice

PAGE = 4096
SIZE = 256 * PAGE


@pytest.fixture
def writing():
    device = DmaWriter("0000:00:10.0", rate=64 << 20, seed=3)
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(GuestMemory.memfd(SIZE))
        backend = open_backend("software", groups=[SoftwareGroup(0, [device])], memlock_limit=None)
        stack.callback(backend.close)
        ioas = stack.enter_context(IoAddressSpace(backend))
        iova = ioas.map(memory).iova
        yield device, memory, iova, next(iter(backend.ports.values()))
        device.stop()


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_it_is_a_software_device():
    assert isinstance(DmaWriter("0000:00:10.0"), SoftwareDevice)


def test_it_writes_inside_its_working_set_only(writing):
    device, memory, iova, port = writing
    device.working_set = [(iova + 16 * PAGE, 8 * PAGE), (iova + 100 * PAGE, PAGE)]
    port.start_logging([(iova, SIZE)])
    device.start()
    wait_for(lambda: device.writes > 500)
    device.stop()
    dirty = DirtyBitmap(256)
    port.harvest(iova, SIZE, dirty)
    assert set(dirty.indices().tolist()) == {*range(16, 24), 100}
    assert device.faulted == 0 and device.bytes_written == device.writes * PAGE


def test_after_stop_nothing_is_written_and_start_goes_on(writing):
    device, memory, iova, _ = writing
    device.working_set = [(iova, SIZE)]
    device.start()
    wait_for(lambda: device.writes)
    device.stop()
    before, writes = memory.read(0, SIZE), device.writes
    time.sleep(0.02)
    assert memory.read(0, SIZE) == before and device.writes == writes
    device.start()
    wait_for(lambda: device.writes > writes)


def test_another_device_goes_on_where_it_stopped(writing):
    device, _, iova, _ = writing
    device.working_set = [(iova, SIZE)]
    device.start()
    wait_for(lambda: device.writes)
    device.stop()
    other = DmaWriter(device.address)
    other.set_state(device.state())
    assert other.state() == device.state()
    assert (other.rate, other.writes, other.working_set) == (device.rate, device.writes, device.working_set)


def test_places_that_are_not_mapped_count_as_faults(writing):
    device, _, iova, port = writing
    device.working_set = [(iova + SIZE, 4 * PAGE)]
    device.start()
    wait_for(lambda: device.faulted)
    device.stop()
    assert device.faulted == device.writes and port.fault_count


def test_what_ends_its_thread_is_raised_by_stop(writing):
    device, _, iova, _ = writing
    device.working_set = []
    device.start()
    with pytest.raises(IndexError):
        wait_for(lambda: not device._thread.is_alive())
        device.stop()
    device.stop()


def test_a_device_that_is_not_open_does_not_start():
    with pytest.raises(ClosedError):
        DmaWriter("0000:00:10.0").start()
