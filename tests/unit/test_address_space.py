"""IoAddressSpace on a fake backend: every change is whole or not at all."""
import errno
import gc
import mmap
import os
import threading
import time
import warnings

import numpy as np
import pytest
from fake_backend import Failure, FakeBackend, recorder, refused, state

from vfiodma import errors
from vfiodma._core.bitmap import DirtyBitmap
from vfiodma.address_space import IoAddressSpace
from vfiodma.memory import GuestMemory
from vfiodma.types import IovaRange, Mapping, Prot

PAGE = mmap.PAGESIZE
BASE = 0x100000


# Mapping

def test_mapping_goes_to_the_backend_and_can_be_translated(ioas, backend, memory):
    mapping = ioas.map(memory)
    assert mapping == Mapping(mapping.iova, memory.region.vaddr, 8 * PAGE, Prot.RW)
    assert backend.mapped == {mapping.iova: (memory.region.vaddr, 8 * PAGE, 3)}
    assert ioas.translate(mapping.iova + 5) == memory.region.vaddr + 5
    assert ioas.get(mapping.iova + 8 * PAGE) is None and ioas.get(0, "none") == "none"
    assert ioas.find(mapping.iova + 1) == mapping and ioas.mappings() == [mapping] == list(ioas)
    assert ioas.unmap(mapping.iova) == 8 * PAGE
    assert not backend.mapped and not ioas.mappings() and mapping.iova not in ioas


def test_miss_is_enoent_with_operation_and_iova(ioas):
    for call in (ioas.translate, ioas.find, ioas.unmap):
        exc = refused(errno.ENOENT, call, BASE)
        assert isinstance(exc, errors.NotMappedError) and isinstance(exc, LookupError) and exc.iova == BASE


def test_part_of_memory_is_mapped_at_a_fixed_address_with_its_permission(ioas, memory):
    mapping = ioas.map(memory, BASE, prot=Prot.READ, offset=PAGE, size=2 * PAGE)
    assert mapping == (BASE, memory.region.vaddr + PAGE, 2 * PAGE, Prot.READ)


def test_placement_is_the_allocators(ioas, memory):
    assert ioas.map(memory, size=PAGE, offset=0, limit=0xFFFF, top_down=True).iova == 0xF000
    assert ioas.map(memory, size=PAGE, align=1 << 21).iova % (1 << 21) == 0
    with pytest.raises(TypeError, match="align"):
        ioas.map(memory, BASE, align=PAGE)


def test_buffers_are_locked_and_kept_alive_until_unmapped(ioas):
    block = mmap.mmap(-1, 2 * PAGE)
    mapping = ioas.map(block)
    with pytest.raises(BufferError):
        block.resize(PAGE)
    with pytest.raises(BufferError):
        block.close()
    del block
    gc.collect()
    ioas.write(mapping.iova, b"alive")
    assert ioas.read(mapping.iova, 5) == b"alive"
    ioas.unmap(mapping.iova)


def test_region_can_be_closed_only_when_unmapped(ioas, memory):
    mapping = ioas.map(memory)
    refused(errno.EBUSY, memory.close)
    ioas.unmap(mapping.iova)
    memory.close()


def test_memory_is_free_after_a_refused_map(ioas, memory):
    refused(errno.EINVAL, ioas.map, memory, BASE + 1)
    refused(errno.EINVAL, ioas.map, memory, offset=1)
    memory.close()


def test_numpy_arrays_and_addresses_map(ioas, memory):
    block = np.frombuffer(mmap.mmap(-1, 2 * PAGE), np.uint64)
    assert ioas.map(block).vaddr == block.ctypes.data
    assert ioas.map(memory.region.vaddr, size=PAGE, offset=PAGE).vaddr == memory.region.vaddr + PAGE
    refused(errno.EINVAL, ioas.map, block[::2])
    ioas.unmap_all()


def test_read_only_memory_is_mapped_for_reading_only(ioas):
    block = mmap.mmap(-1, PAGE, prot=mmap.PROT_READ)
    refused(errno.EFAULT, ioas.map, block)
    assert ioas.map(block, prot=Prot.READ).prot == Prot.READ
    ioas.unmap_all()
    block.close()


def test_guest_memory_is_mapped_by_guest_address_all_or_none(ioas, backend):
    with GuestMemory() as memory:
        memory.add(GuestMemory.memfd(PAGE).region, 0)
        memory.add(GuestMemory.memfd(2 * PAGE).region, BASE)
        assert [(m.iova, m.size) for m in ioas.map_memory(memory)] == [(0, PAGE), (BASE, 2 * PAGE)]
        before = state(ioas)
        refused(errno.EEXIST, ioas.map_memory, memory, BASE)
        assert state(ioas) == before
        ioas.unmap_all()
        assert not backend.mapped


def test_device_memory_is_mapped_and_told_apart(ioas, memory):
    with GuestMemory.device(memory.region.fd, PAGE) as bar:
        ioas.map(bar, 0x10000)
        ioas.map(memory, BASE)
        ioas.map(memory, BASE * 2, mmio=True)
        assert [m.iova for m in ioas.mappings(mmio=False)] == [BASE]
        assert [m.iova for m in ioas.mappings(mmio=True)] == [0x10000, BASE * 2]
        ioas.unmap_all()


@pytest.mark.parametrize("features", [("map_many",), ()])
def test_many_are_mapped_in_one_call_or_one_by_one(features, memory):
    backend = FakeBackend(features)
    vaddr = memory.region.vaddr
    with IoAddressSpace(backend) as ioas:
        rows = [(BASE + 2 * i * PAGE, vaddr + i * PAGE, PAGE, 1 + i % 3) for i in range(8)]
        ioas.map_many(np.array(rows, np.uint64), keep=memory.region)
        assert ioas.mappings() == [(i, v, s, Prot(p)) for i, v, s, p in rows]
        refused(errno.EBUSY, memory.close)
        before = state(ioas)
        assert refused(errno.EEXIST, ioas.map_many, [(0x10000, vaddr, PAGE, 3), rows[5]]).iova == rows[5][0]
        assert state(ioas) == before
        assert ioas.unmap_all() == 8 * PAGE
    memory.close()


def test_no_rows_map_nothing(ioas):
    ioas.map_many([])
    ioas.map_many(np.empty((0, 4), np.uint64))
    assert not len(ioas)


# Unmapping

def test_range_of_whole_mappings_is_unmapped_at_once(ioas, memory):
    for i in range(4):
        ioas.map(memory, BASE + i * PAGE, offset=i * PAGE, size=PAGE)
    assert ioas.unmap(BASE + PAGE, 2 * PAGE) == 2 * PAGE
    assert [m.iova for m in ioas.mappings()] == [BASE, BASE + 3 * PAGE]


def test_unmap_shorter_or_longer_than_the_mappings_is_an_error(ioas, memory):
    ioas.map(memory, BASE, size=4 * PAGE)
    before = state(ioas)
    for iova, size, number in ((BASE, PAGE, errno.EINVAL), (BASE + PAGE, 3 * PAGE, errno.EINVAL),
                               (BASE, 5 * PAGE, errno.ENOENT), (BASE - PAGE, 5 * PAGE, errno.ENOENT),
                               (BASE + 1, 4 * PAGE, errno.EINVAL), (BASE + PAGE, None, errno.ENOENT)):
        refused(number, ioas.unmap, iova, size)
        assert state(ioas) == before


def test_backend_that_unmaps_less_is_an_error(ioas, backend, memory):
    ioas.map(memory, BASE)
    backend.unmap_dma = lambda iova, size: 0
    refused(errno.EIO, ioas.unmap, BASE)


def test_backend_without_unmap_all_is_emptied_one_by_one(memory):
    backend = FakeBackend(())
    with IoAddressSpace(backend) as ioas:
        for i in range(3):
            ioas.map(memory, BASE * (i + 1))
        assert ioas.unmap_all() == 24 * PAGE and not backend.mapped


# Access

def test_access_crosses_mappings_that_touch(ioas, memory):
    ioas.map(memory, BASE, offset=4 * PAGE, size=PAGE)
    ioas.map(memory, BASE + PAGE, offset=0, size=PAGE)
    ioas.write(BASE + PAGE - 2, b"abcd")
    assert ioas.read(BASE + PAGE - 2, 4) == b"abcd"
    assert memory.read(5 * PAGE - 2, 2) + memory.read(0, 2) == b"abcd"
    with ioas.pin(BASE, 2 * PAGE) as segments:
        assert segments == [(memory.region.vaddr + 4 * PAGE, PAGE), (memory.region.vaddr, PAGE)]


def test_neighbours_in_memory_are_joined(ioas, memory):
    for i in range(3):
        ioas.map(memory, BASE + i * PAGE, offset=i * PAGE, size=PAGE)
    assert ioas.sgl(BASE + 10, 2 * PAGE) == [(memory.region.vaddr + 10, 2 * PAGE)]
    assert refused(errno.ENOENT, ioas.sgl, BASE, 4 * PAGE).iova == BASE + 3 * PAGE


def test_permission_is_checked_before_anything_moves(ioas, memory):
    ioas.map(memory, BASE, size=PAGE)
    ioas.map(memory, BASE + PAGE, offset=PAGE, size=PAGE, prot=Prot.READ)
    ioas.map(memory, BASE + 2 * PAGE, offset=2 * PAGE, size=PAGE, prot=Prot.WRITE)
    exc = refused(errno.EPERM, ioas.write, BASE + PAGE - 1, b"xy")
    assert isinstance(exc, errors.DmaPermissionError) and (exc.iova, exc.size) == (BASE + PAGE - 1, 2)
    refused(errno.EPERM, ioas.read, BASE + 2 * PAGE, 1)
    assert memory.read(0, 8 * PAGE) == bytes(8 * PAGE)


def test_memory_that_vanished_is_a_fault(ioas):
    block = GuestMemory.anonymous(PAGE)
    ioas.map(block.region.vaddr, BASE, size=PAGE)
    block.close()
    for call in (lambda: ioas.read(BASE, 4), lambda: ioas.write(BASE, b"data")):
        exc = refused(errno.EFAULT, call)
        assert isinstance(exc, errors.MemoryFaultError) and (exc.iova, exc.size) == (BASE, 4)


def test_batch_translation_marks_misses(ioas, memory):
    ioas.map(memory, BASE)
    out = ioas.translate_many(np.array([BASE + 1, 0], np.uint64))
    assert out.tolist() == [memory.region.vaddr + 1, 2**64 - 1]


def test_way_back_finds_every_iova(ioas, memory):
    ioas.map(memory, BASE)
    ioas.map(memory, BASE * 4, offset=PAGE, size=PAGE)
    assert ioas.iovas_of(memory.region.vaddr + PAGE + 7) == [BASE + PAGE + 7, BASE * 4 + 7]
    ioas.unmap(BASE)
    assert ioas.iovas_of(memory.region.vaddr + PAGE) == [BASE * 4] and ioas.iovas_of(memory.region.vaddr) == []


# Marks

def marked(ioas, iova, size):
    into = DirtyBitmap(size // PAGE, PAGE)
    count = ioas.harvest_marked(iova, size, into)
    pages = into.indices().tolist()
    assert count == len(pages)
    return pages


def test_writes_are_marked_once_and_harvested_once(ioas, memory):
    ioas.map(memory, BASE)
    ioas.write(BASE + PAGE - 1, b"xy")
    ioas.mark_dirty(BASE + 4 * PAGE + 5, 1)
    assert marked(ioas, BASE - PAGE, 10 * PAGE) == [1, 2, 5]
    assert marked(ioas, BASE, 8 * PAGE) == []


def test_part_of_a_mapping_is_harvested_alone(ioas, memory):
    ioas.map(memory, BASE)
    ioas.mark_dirty(BASE, 8 * PAGE)
    assert marked(ioas, BASE + 2 * PAGE, 3 * PAGE) == [0, 1, 2]
    assert marked(ioas, BASE, 8 * PAGE) == [0, 1, 5, 6, 7]


def test_mark_outside_is_refused_and_marks_nothing(ioas, memory):
    ioas.map(memory, BASE, size=PAGE)
    assert refused(errno.ENOENT, ioas.mark_dirty, BASE, PAGE + 1).iova == BASE + PAGE
    assert marked(ioas, BASE, PAGE) == []


def test_marks_go_with_the_mapping(ioas, memory):
    ioas.map(memory, BASE)
    ioas.mark_dirty(BASE, 1)
    ioas.unmap(BASE)
    ioas.map(memory, BASE)
    assert marked(ioas, BASE, 8 * PAGE) == []


@pytest.mark.parametrize("into", [DirtyBitmap(7, PAGE), DirtyBitmap(8, 2 * PAGE), bytes(8), bytearray(4)])
def test_bitmap_that_does_not_suit_keeps_the_marks(into, ioas, memory):
    ioas.map(memory, BASE)
    ioas.mark_dirty(BASE, 1)
    with pytest.raises((errors.VfioError, BufferError, TypeError, ValueError)):
        ioas.harvest_marked(BASE, 8 * PAGE, into)
    assert marked(ioas, BASE, 8 * PAGE) == [0]


def test_plain_words_take_a_harvest(ioas, memory):
    ioas.map(memory, BASE)
    ioas.mark_dirty(BASE + PAGE, 1)
    words = np.zeros(1, np.uint64)
    assert ioas.harvest_marked(BASE, 8 * PAGE, words) == 1 and words[0] == 2


# Pins

def test_pinned_range_stays_mapped(ioas, memory):
    ioas.map(memory, BASE)
    with ioas.pin(BASE + PAGE, PAGE) as segments:
        assert segments == [(memory.region.vaddr + PAGE, PAGE)]
        before = state(ioas)
        for call in (lambda: ioas.unmap(BASE), ioas.unmap_all, ioas.invalidate_vaddr, ioas.close,
                     lambda: ioas.unmap(BASE, timeout=0.01)):
            assert isinstance(refused(errno.EBUSY, call), errors.BusyError)
            assert state(ioas) == before
    ioas.unmap(BASE)


def test_unmap_waits_for_a_pin(ioas, memory):
    ioas.map(memory, BASE)
    pinned, done = threading.Event(), []

    def hold():
        with ioas.pin(BASE, PAGE):
            pinned.set()
            time.sleep(0.05)
            done.append("unpinned")
    thread = threading.Thread(target=hold)
    thread.start()
    pinned.wait()
    ioas.unmap(BASE, timeout=None)
    assert done == ["unpinned"]
    thread.join()


def test_unmap_that_waited_looks_again(ioas, memory):
    ioas.map(memory, BASE)
    outcome = []
    with ioas.pin(BASE, PAGE):
        threads = [threading.Thread(target=lambda: outcome.append(attempt())) for _ in range(2)]

        def attempt():
            try:
                return ioas.unmap(BASE, timeout=None)
            except errors.NotMappedError:
                return "gone"
        for thread in threads:
            thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert sorted(outcome, key=str) == [8 * PAGE, "gone"]


def test_threads_that_map_unmap_and_access_see_whole_mappings(ioas, memory):
    stop, failures = threading.Event(), []

    def change(number):
        for _ in range(100):
            mapping = ioas.map(memory, offset=number * PAGE, size=PAGE)
            ioas.write(mapping.iova, bytes([number + 1]) * PAGE)
            if ioas.read(mapping.iova, PAGE) != bytes([number + 1]) * PAGE:
                failures.append(number)
            ioas.unmap(mapping.iova)

    def look():
        while not stop.is_set():
            for mapping in ioas.mappings():
                vaddr = ioas.get(mapping.iova)
                if vaddr is not None and not memory.region.vaddr <= vaddr <= memory.region.last:
                    failures.append(vaddr)
    threads = [threading.Thread(target=change, args=(number,)) for number in range(4)]
    watcher = threading.Thread(target=look)
    for thread in (*threads, watcher):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    watcher.join()
    assert not failures and not ioas.mappings()


# Listeners

def test_listeners_are_called_in_order(ioas, memory):
    seen = []
    ioas.map(memory, PAGE)
    ioas.add_listener(**recorder(seen, "a"), replay=True)
    second = ioas.add_listener(**recorder(seen, "b"))
    ioas.map(memory, BASE)
    ioas.unmap(BASE)
    assert seen == [("a", "mapped", PAGE), ("a", "mapped", BASE), ("b", "mapped", BASE),
                    ("a", "unmapping", BASE), ("b", "unmapping", BASE),
                    ("a", "unmapped", BASE), ("b", "unmapped", BASE)]
    ioas.remove_listener(second)
    with pytest.raises(ValueError):
        ioas.remove_listener(second)
    ioas.close()
    assert seen[-1] == ("a", "unmapped", PAGE)


def test_listener_that_refuses_a_map_undoes_it_and_tells_the_others(ioas, memory):
    seen = []
    ioas.add_listener(**recorder(seen, "a"))
    ioas.add_listener(**recorder(seen, "b", fail={"mapped"}))
    ioas.add_listener(**recorder(seen, "c"))
    before = state(ioas)
    with pytest.raises(Failure) as caught:
        ioas.map(memory, BASE)
    del caught
    assert seen == [("a", "mapped", BASE), ("b", "mapped", BASE), ("a", "unmapped", BASE)] and state(ioas) == before


def test_listener_that_refuses_an_unmap_stops_it_and_tells_the_others(ioas, memory):
    seen = []
    ioas.map(memory, BASE)
    ioas.add_listener(**recorder(seen, "a"))
    ioas.add_listener(**recorder(seen, "b", fail={"unmapping"}))
    before = state(ioas)
    with pytest.raises(Failure):
        ioas.unmap(BASE)
    assert seen == [("a", "unmapping", BASE), ("b", "unmapping", BASE), ("a", "mapped", BASE)]
    assert state(ioas) == before


def test_listener_can_look_but_not_change(ioas, memory):
    seen = []

    def meddle(mapping):
        seen.append(ioas.translate(mapping.iova))
        for call in (ioas.unmap_all, ioas.close, lambda: ioas.map(memory), ioas.invalidate_vaddr):
            refused(errno.EBUSY, call)
    ioas.add_listener(mapped=meddle)
    ioas.map(memory, BASE)
    assert seen == [memory.region.vaddr] and len(ioas) == 1


# Live update

def test_invalid_vaddr_is_not_translated_until_updated(ioas, backend, memory):
    ioas.map(memory, BASE, prot=Prot.READ)
    assert ioas.invalidate_vaddr() == 8 * PAGE
    refused(errno.ENOENT, ioas.translate, BASE)
    refused(errno.ENOENT, ioas.read, BASE, 1)
    assert ioas.iovas_of(memory.region.vaddr) == [] and ioas.find(BASE).vaddr == memory.region.vaddr
    refused(errno.EINVAL, ioas.invalidate_vaddr, BASE, 8 * PAGE)
    moved = memory.remap()
    memory.close()
    assert ioas.update_vaddr(BASE, moved) == (BASE, moved.region.vaddr, 8 * PAGE, Prot.READ)
    assert backend.mapped[BASE] == (moved.region.vaddr, 8 * PAGE, 1) and ioas.translate(BASE) == moved.region.vaddr
    refused(errno.EBUSY, moved.close)
    refused(errno.EINVAL, ioas.update_vaddr, BASE, moved)
    refused(errno.ENOENT, ioas.update_vaddr, BASE + PAGE, moved)
    ioas.unmap(BASE)
    moved.close()


def test_many_vaddrs_are_updated_at_once(ioas, memory):
    for i in range(4):
        ioas.map(memory, BASE + i * BASE, offset=i * PAGE, size=PAGE)
    assert ioas.invalidate_vaddr(BASE, PAGE) == PAGE
    ioas.invalidate_vaddr(2 * BASE, PAGE)
    with memory.remap() as moved:
        rows = [(BASE + i * BASE, moved.region.vaddr + i * PAGE, PAGE) for i in range(2)]
        before = state(ioas)
        refused(errno.EINVAL, ioas.update_vaddr_many, [*rows, (3 * BASE, moved.region.vaddr, PAGE)])
        assert state(ioas) == before
        ioas.update_vaddr_many(np.array(rows, np.uint64), keep=moved.region)
        assert ioas.translate(2 * BASE) == moved.region.vaddr + PAGE
        ioas.unmap_all()


def test_invalid_mappings_can_be_unmapped(ioas, backend, memory):
    ioas.map(memory, BASE)
    ioas.invalidate_vaddr()
    assert ioas.unmap(BASE) == 8 * PAGE and not backend.mapped
    ioas.map(memory, BASE)


def test_backend_without_vaddr_update_is_unsupported(memory):
    with IoAddressSpace(FakeBackend(())) as ioas:
        refused(errno.EOPNOTSUPP, ioas.invalidate_vaddr)
        refused(errno.EOPNOTSUPP, ioas.update_vaddr, BASE, memory)


# Limits

def test_limit_of_mappings_is_named(memory):
    with IoAddressSpace(FakeBackend((), dma_avail=1)) as ioas:
        assert ioas.cost(memory, memory).problems and not ioas.cost(memory, memory).fits
        ioas.map(memory)
        exc = refused(errno.ENOSPC, ioas.map, memory)
        assert isinstance(exc, errors.DmaLimitError) and "dma_entry_limit" in str(exc) and len(ioas) == 1


def test_limit_of_locked_memory_is_named(ioas, backend, memory, monkeypatch):
    from vfiodma import hostinfo
    from vfiodma._core.errno import error

    def full(*_):
        raise error(errno.ENOMEM, "map_dma")
    monkeypatch.setattr(hostinfo, "locked_memory", lambda: hostinfo.LockedMemory(8192, 16384, 4096, False))
    backend.map_dma = full
    text = str(refused(errno.ENOMEM, ioas.map, memory))
    for part in ("RLIMIT_MEMLOCK is 8192 bytes", "4096 of them", "16384", "ulimit -l", "limits.conf", "LimitMEMLOCK"):
        assert part in text
    cost = ioas.cost(memory)
    assert not cost.fits and cost.locked_pages == 8 and cost.locked.available == 4096


def test_cost_counts_entries_and_pages_but_no_device_memory(ioas, memory):
    with GuestMemory.device(memory.region.fd, PAGE) as bar:
        cost = ioas.cost(memory, bar, 5 * PAGE, bytearray(3))
        assert (cost.entries, cost.size, cost.locked_pages) == (4, 14 * PAGE + 3, 14)
    refused(errno.EINVAL, ioas.cost, 0)


def test_ranges_that_shrink_report_what_no_longer_fits(ioas, backend, memory):
    ioas.map(memory, BASE)
    ioas.map(memory, BASE << 8)
    backend.ranges = [IovaRange(0, BASE * 2)]
    assert [(r.start, r.last) for r in ioas.refresh_ranges()] == [(BASE << 8, (BASE << 8) + 8 * PAGE - 1)]
    assert ioas.iova_ranges[-1].last < BASE * 2 and len(ioas) == 2


# Lifetime

def test_close_unmaps_releases_and_is_idempotent(memory):
    backend = FakeBackend()
    ioas = IoAddressSpace(backend, close_backend=True)
    ioas.map(memory)
    ioas.close()
    ioas.close()
    assert not backend.mapped and backend.closed and ioas.closed
    memory.close()


CLOSED_CALLS = [lambda s: s.translate(0), lambda s: s.get(0), lambda s: s.map(bytearray(PAGE)), lambda s: s.unmap(0),
                lambda s: s.unmap_all(), lambda s: s.read(0, 1), lambda s: s.write(0, b"x"), lambda s: s.mappings(),
                lambda s: s.find(0), lambda s: s.sgl(0, 1), lambda s: s.cost(1), lambda s: s.refresh_ranges(),
                lambda s: s.invalidate_vaddr(), lambda s: s.mark_dirty(0, 1), lambda s: s.capabilities,
                lambda s: s.pin(0, 1).__enter__(), lambda s: s.__enter__(), lambda s: s.iovas_of(0),
                lambda s: s.translate_many(np.zeros(1, np.uint64)), lambda s: s.map_many([]),
                lambda s: s.add_listener()]


@pytest.mark.parametrize("call", CLOSED_CALLS)
def test_use_after_close_is_ebadf(call):
    ioas = IoAddressSpace(FakeBackend())
    ioas.close()
    assert isinstance(refused(errno.EBADF, call, ioas), errors.ClosedError)


def test_use_in_a_forked_child_is_an_error_of_its_own(ioas, memory):
    ioas.map(memory, BASE)
    pid = os.fork()
    if not pid:
        status = 1
        try:
            for call in CLOSED_CALLS:
                assert isinstance(refused(errno.EBADF, call, ioas), errors.ForkedError)
            ioas.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert ioas.translate(BASE) == memory.region.vaddr


def test_forgotten_address_space_warns_and_closes():
    backend = FakeBackend()
    ioas = IoAddressSpace(backend, close_backend=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        del ioas
        gc.collect()
    assert [w.category for w in seen] == [ResourceWarning] and backend.closed


def test_closing_with_a_listener_that_fails_still_closes(memory):
    def fail(mapping):
        raise Failure
    backend = FakeBackend()
    ioas = IoAddressSpace(backend, close_backend=True)
    ioas.map(memory, BASE)
    ioas.add_listener(unmapped=fail)
    with pytest.raises(Failure) as caught:
        ioas.close()
    del caught
    assert ioas.closed and backend.closed and not backend.mapped
    memory.close()


def test_backend_that_fails_to_unmap_at_close_lets_the_memory_go(memory):
    backend = FakeBackend()
    ioas = IoAddressSpace(backend, close_backend=True)
    ioas.map(memory, BASE)

    def fail():
        raise Failure
    backend.unmap_all = fail
    with pytest.raises(Failure) as caught:
        ioas.close()
    del caught
    assert backend.closed
    memory.close()
