"""DirtyTracker over the software backend: every source, in one bitmap over guest memory."""
import contextlib

import numpy as np
import pytest

from vfiodma import DirtyBitmap, DirtyTracker, GuestMemory, IoAddressSpace, Prot, SoftwareGroup, open_backend
from vfiodma.devices.dma_writer import DmaWriter
from vfiodma.errors import BusyError, InvalidArgumentError, UnsupportedError
from vfiodma.migration.layout import MemoryLayout

PAGE = 4096
SIZE = 200 * PAGE


@pytest.fixture
def setting():
    """Two regions, the first mapped in two pieces that begin at no whole word, one of them read-only; two devices."""
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(GuestMemory())
        for gpa in (0, 1 << 30):
            memory.add(GuestMemory.memfd(SIZE).region, gpa)
        devices = [DmaWriter("0000:00:10.0"), DmaWriter("0000:00:10.1")]
        backend = open_backend("software", groups=[SoftwareGroup(0, devices)], memlock_limit=None)
        stack.callback(backend.close)
        ioas = stack.enter_context(IoAddressSpace(backend))
        first, second = memory.regions
        iovas = [ioas.map(first, offset=0, size=70 * PAGE).iova, ioas.map(first, offset=70 * PAGE).iova,
                 ioas.map(second, prot=Prot.READ).iova]
        layout = stack.enter_context(MemoryLayout(memory, PAGE))
        yield ioas, layout, list(backend.ports.values()), iovas


def harvested(tracker, layout):
    bitmap = DirtyBitmap(layout.nbits, PAGE)
    tracker.harvest(bitmap)
    return bitmap.indices().tolist()


def test_writes_of_every_device_and_of_the_process_are_in_one_bitmap(setting):
    ioas, layout, ports, iovas = setting
    tracker = DirtyTracker(ioas, layout)
    tracker.start()
    ports[0].write(iovas[0] + 69 * PAGE, b"x")
    ports[1].write(iovas[1] + PAGE - 1, b"xy")
    ioas.write(iovas[1] + 5 * PAGE, b"from the VMM")
    assert harvested(tracker, layout) == [69, 70, 71, 75]
    assert harvested(tracker, layout) == []
    tracker.stop()


def test_a_vaddr_update_does_not_disturb_tracking(setting):
    ioas, layout, ports, iovas = setting
    tracker = DirtyTracker(ioas, layout)
    tracker.start()
    ioas.invalidate_vaddr()
    ports[0].write(iovas[0], b"x")
    assert harvested(tracker, layout) == [0]
    for iova, region, offset in zip(iovas, [0, 0, 1], [0, 70 * PAGE, 0], strict=True):
        ioas.update_vaddr(iova, layout.blocks[region].region, offset=offset)
    tracker.stop()


def test_mappings_do_not_change_while_tracking(setting):
    ioas, layout, ports, iovas = setting
    tracker = DirtyTracker(ioas, layout)
    tracker.start()
    tracker.start()
    with pytest.raises(BusyError, match="fixed during a migration"):
        ioas.map(layout.blocks[0].region, size=PAGE)
    with pytest.raises(BusyError, match="fixed during a migration"):
        ioas.unmap(iovas[0])
    assert len(ioas) == 3
    tracker.stop()
    tracker.stop()
    ioas.unmap(iovas[2])


def test_memory_that_is_not_migrated_is_refused_and_nothing_is_left_on(setting):
    ioas, layout, ports, iovas = setting
    with GuestMemory.memfd(PAGE) as other:
        iova = ioas.map(other).iova
        with pytest.raises(InvalidArgumentError, match="not part of what is migrated"):
            DirtyTracker(ioas, layout).start()
        assert not any(port.logging for port in ports)
        ioas.unmap(iova)


def test_a_backend_without_sources_is_refused():
    class Backend:
        def capabilities(self):
            from vfiodma import Capabilities
            return Capabilities("plain", 0x1000)

        def iova_ranges(self):
            return []

    with GuestMemory.memfd(PAGE) as memory, MemoryLayout(memory, PAGE) as layout, IoAddressSpace(Backend()) as ioas:
        with pytest.raises(UnsupportedError, match="which pages devices write"):
            DirtyTracker(ioas, layout).start()


def test_device_memory_is_left_out():
    with GuestMemory.memfd(2 * PAGE) as memory:
        memory.add(GuestMemory.device(memory.region.fd, PAGE).region, 1 << 32)
        with MemoryLayout(memory, PAGE) as layout:
            assert layout.shape == ((0, 2 * PAGE),)
            assert np.array_equal(np.frombuffer(layout.blocks[0].view, np.uint8), np.zeros(2 * PAGE, np.uint8))
