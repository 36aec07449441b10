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


def test_starting_and_stopping_twice_is_fine(setting):
    ioas, layout, ports, iovas = setting
    tracker = DirtyTracker(ioas, layout)
    tracker.start()
    tracker.start()
    tracker.stop()
    tracker.stop()
    assert not any(port.logging for port in ports)


def test_what_was_written_through_a_mapping_that_goes_is_still_told(setting):
    ioas, layout, ports, iovas = setting
    tracker = DirtyTracker(ioas, layout, cpu_writes="off")
    tracker.start()
    ports[0].write(iovas[1] + 3 * PAGE, b"x")
    ioas.mark_dirty(iovas[1] + 5 * PAGE, 1)
    ioas.unmap(iovas[1])
    assert harvested(tracker, layout) == [73, 75]
    assert harvested(tracker, layout) == []
    tracker.stop()


def test_a_mapping_that_comes_while_tracking_is_never_missed(setting):
    ioas, layout, ports, iovas = setting
    tracker = DirtyTracker(ioas, layout, cpu_writes="off")
    tracker.start()
    iova = ioas.map(layout.blocks[1].region, offset=8 * PAGE, size=4 * PAGE).iova
    first = layout.blocks[1].first_bit + 8
    ports[1].write(iova + PAGE, b"x")
    assert harvested(tracker, layout) == [first + 1]
    ports[1].write(iova + 2 * PAGE, b"x")
    ports[0].write(iovas[0], b"x")
    ioas.unmap(iova)
    assert harvested(tracker, layout) == [0, first + 2]
    assert harvested(tracker, layout) == []
    tracker.stop()


def test_a_mapping_whose_rights_change_is_tracked_from_then_on(setting):
    ioas, layout, ports, iovas = setting
    tracker = DirtyTracker(ioas, layout, cpu_writes="off")
    tracker.start()
    ioas.unmap(iovas[2])
    ioas.map(layout.blocks[1].region, iovas[2])
    ports[0].write(iovas[2] + 7 * PAGE, b"x")
    assert layout.blocks[1].first_bit + 7 in harvested(tracker, layout)
    tracker.stop()


def test_memory_outside_cannot_be_mapped_for_writing_meanwhile(setting):
    ioas, layout, ports, iovas = setting
    tracker = DirtyTracker(ioas, layout)
    tracker.start()
    with GuestMemory.memfd(PAGE) as other:
        with pytest.raises(InvalidArgumentError, match="not part of what is migrated"):
            ioas.map(other)
        ioas.unmap(ioas.map(other, prot=Prot.READ).iova)
    assert len(ioas) == 3
    tracker.stop()


class Source:
    """A DirtySource with a page size of its own, filled by the test."""

    def __init__(self, pgsize, survives_unmap=True, extends=True):
        self.name, self.pgsize, self.survives_unmap = "fake", pgsize, survives_unmap
        self.dirty, self.ranges = set(), None
        if extends:
            self.extend = lambda iova, size: self.ranges.append((iova, size))

    def start(self, ranges, pgsize):
        assert pgsize == self.pgsize and all(not (iova | size) % pgsize for iova, size in ranges)
        self.ranges = list(ranges)

    def harvest(self, iova, size, into):
        found = [page for page in self.dirty if iova <= page * self.pgsize < iova + size]
        for page in found:
            into.set(page - iova // self.pgsize)
            self.dirty.discard(page)
        return len(found)

    def stop(self):
        self.ranges = None


@pytest.mark.parametrize("pgsize", [PAGE, 2 * PAGE, 64 * PAGE])
def test_sources_have_page_sizes_of_their_own(setting, monkeypatch, pgsize):
    ioas, layout, ports, iovas = setting
    source = Source(pgsize)
    monkeypatch.setattr(ioas.backend, "dirty_sources", lambda: [source])
    tracker = DirtyTracker(ioas, layout, cpu_writes="off")
    tracker.start()
    page = (iovas[0] + 9 * PAGE) // pgsize
    source.dirty.add(page)
    inside = range(max(0, page * pgsize - iovas[0]) // PAGE, (page * pgsize + pgsize - iovas[0]) // PAGE)
    found = harvested(tracker, layout)
    assert [bit for bit in found if bit < 70] == [bit for bit in inside if bit < 70]
    tracker.stop()


def test_a_page_of_a_source_that_two_mappings_share_is_told_for_both_when_one_goes(setting, monkeypatch):
    ioas, layout, ports, iovas = setting
    source = Source(64 * PAGE)
    monkeypatch.setattr(ioas.backend, "dirty_sources", lambda: [source])
    assert iovas[1] % source.pgsize and iovas[1] == iovas[0] + 70 * PAGE
    tracker = DirtyTracker(ioas, layout, cpu_writes="off")
    tracker.start()
    page = iovas[1] // source.pgsize
    source.dirty.add(page)
    ioas.unmap(iovas[1])
    first = (page * source.pgsize - iovas[0]) // PAGE
    assert first < 70 and harvested(tracker, layout) == list(range(first, first + 64))
    tracker.stop()


def test_a_mapping_of_less_than_a_page_of_the_bitmap_is_refused_and_not_missed(setting):
    ioas, layout, ports, iovas = setting
    with MemoryLayout(layout_memory(layout), 8 * PAGE) as coarse:
        tracker = DirtyTracker(ioas, coarse, cpu_writes="off")
        with pytest.raises(InvalidArgumentError, match="whole pages of 32768"):
            tracker.start()
        for iova in iovas[:2]:
            ioas.unmap(iova)
        tracker.start()
        with pytest.raises(InvalidArgumentError, match="whole pages of 32768"):
            ioas.map(coarse.blocks[0].region, size=PAGE)
        iova = ioas.map(coarse.blocks[0].region, size=16 * PAGE).iova
        ioas.mark_dirty(iova + 9 * PAGE, 1)
        bitmap = DirtyBitmap(coarse.nbits, 8 * PAGE)
        assert tracker.harvest(bitmap) == 1 and bitmap.test(1)
        tracker.stop()


def layout_memory(layout):
    """The (gpa, region) pairs of a layout, for another one of them."""
    return [(block.gpa, block.region) for block in layout.blocks]


def test_sources_may_be_given(setting):
    ioas, layout, ports, iovas = setting
    source = Source(PAGE)
    tracker = DirtyTracker(ioas, layout, sources=[source], cpu_writes="off")
    tracker.start()
    ports[0].write(iovas[0], b"x")
    source.dirty.add(iovas[0] // PAGE + 4)
    assert harvested(tracker, layout) == [4]
    tracker.stop()


def test_a_source_that_forgets_at_an_unmap_counts_the_mapping_as_written(setting, monkeypatch):
    ioas, layout, ports, iovas = setting
    source = Source(PAGE, survives_unmap=False)
    monkeypatch.setattr(ioas.backend, "dirty_sources", lambda: [source])
    tracker = DirtyTracker(ioas, layout, cpu_writes="off")
    tracker.start()
    ioas.unmap(iovas[1])
    assert harvested(tracker, layout) == list(range(70, 200))
    tracker.stop()


def test_a_source_that_cannot_take_in_a_mapping_counts_it_as_written_every_time(setting, monkeypatch):
    ioas, layout, ports, iovas = setting
    source = Source(PAGE, extends=False)
    monkeypatch.setattr(ioas.backend, "dirty_sources", lambda: [source])
    tracker = DirtyTracker(ioas, layout, cpu_writes="off")
    tracker.start()
    iova = ioas.map(layout.blocks[1].region, size=3 * PAGE).iova
    first = layout.blocks[1].first_bit
    assert harvested(tracker, layout) == harvested(tracker, layout) == [first, first + 1, first + 2]
    ioas.unmap(iova)
    assert harvested(tracker, layout) == [first, first + 1, first + 2]
    assert harvested(tracker, layout) == []
    tracker.stop()


def test_an_unmap_that_fails_leaves_tracking_as_it_was(setting):
    ioas, layout, ports, iovas = setting
    tracker = DirtyTracker(ioas, layout, cpu_writes="off")
    tracker.start()

    def refuse(mapping):
        raise BusyError(16, operation="test")
    listener = ioas.add_listener(unmapping=refuse)
    ports[0].write(iovas[0], b"x")
    with pytest.raises(BusyError):
        ioas.unmap(iovas[0])
    assert harvested(tracker, layout) == [0]
    ioas.remove_listener(listener)
    ports[0].write(iovas[0] + PAGE, b"x")
    assert harvested(tracker, layout) == [1]
    tracker.stop()


# ---- writes of the process itself

@pytest.mark.parametrize("how", ["watch", "compare"])
def test_writes_of_the_process_are_found(setting, how):
    ioas, layout, ports, iovas = setting
    tracker = DirtyTracker(ioas, layout, cpu_writes=how)
    try:
        tracker.start()
    except UnsupportedError as exc:
        pytest.skip(str(exc))
    assert tracker.compares == (how == "compare")
    for block in layout.blocks:
        tracker.note_sent(block.number, np.array([[0, block.npages]], np.uint64), block.view)
    harvested(tracker, layout)
    view = memoryview(layout.blocks[1].view)
    view[11 * PAGE + 5] = 1
    view[199 * PAGE] = 7
    first = layout.blocks[1].first_bit
    assert harvested(tracker, layout) == [first + 11, first + 199]
    if how == "watch":
        assert harvested(tracker, layout) == []
    tracker.stop()


def test_comparing_takes_what_was_sent_as_the_measure(setting):
    """A page that changes, is sent, and changes back is not what the destination has."""
    ioas, layout, ports, iovas = setting
    tracker = DirtyTracker(ioas, layout, cpu_writes="compare")
    tracker.start()
    block = layout.blocks[0]
    tracker.note_sent(0, np.array([[0, block.npages]], np.uint64), bytes(block.view))
    assert harvested(tracker, layout)[0] == layout.blocks[1].first_bit       # never sent, so it differs
    tracker.note_sent(0, np.array([[4, 1]], np.uint64), b"\1" * PAGE)
    assert harvested(tracker, layout)[0] == 4
    tracker.stop()


def test_memory_mapped_anew_while_it_is_watched_counts_as_written(setting):
    import ctypes
    ioas, layout, ports, iovas = setting
    tracker = DirtyTracker(ioas, layout, cpu_writes="watch")
    try:
        tracker.start()
    except UnsupportedError as exc:
        pytest.skip(str(exc))
    region = layout.blocks[0].region
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    assert libc.mmap(region.vaddr, region.size, 3, 0x11, region.fd, 0) == region.vaddr      # MAP_SHARED | MAP_FIXED
    assert harvested(tracker, layout) == list(range(200))
    layout.blocks[0].view[0] = 1
    assert harvested(tracker, layout) == [0]
    tracker.stop()


def test_an_unknown_way_to_find_writes_is_refused(setting):
    ioas, layout, ports, iovas = setting
    with pytest.raises(InvalidArgumentError):
        DirtyTracker(ioas, layout, cpu_writes="magic")


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
