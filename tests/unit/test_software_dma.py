"""DMA of software devices: ordinary ones through the software IOMMU, emulated ones through the container."""
import ctypes
import errno
import fcntl
import gc
import mmap
import os
import signal
import threading

import numpy as np
import pytest

from vfiodma import GuestMemory, SoftwareGroup, open_backend
from vfiodma.devices.edu import EduDevice
from vfiodma.errors import BusyError, ClosedError, InvalidArgumentError, MemoryFaultError, VfioError

PAGE = 4096
IOVA = 0x1000000
ADDRESS = "0000:00:10.0"
F_ADD_SEALS, F_SEAL_SHRINK = 1033, 2


def address_of(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Memory:
    """A memfd mapped once, or private memory; can be unmapped under a device."""

    def __init__(self, size, kind="memfd", sealed=False):
        self.fd = -1
        if kind == "memfd":
            self.fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, size)
            if sealed:
                fcntl.fcntl(self.fd, F_ADD_SEALS, F_SEAL_SHRINK)
            self.map = mmap.mmap(self.fd, size)
        else:
            self.map = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.vaddr = address_of(self.map)
        self.size = size

    def unmap(self):
        libc = ctypes.CDLL(None)
        assert libc.munmap(ctypes.c_void_p(self.vaddr), ctypes.c_size_t(self.size)) == 0
        # The object must never end: it would unmap what is at these addresses by then.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.map))


@pytest.fixture
def backend():
    with open_backend("software", groups=[SoftwareGroup(0, [EduDevice(ADDRESS)])], memlock_limit=None) as backend:
        yield backend


@pytest.fixture
def port(backend):
    return backend.ports[ADDRESS]


@pytest.mark.parametrize("kind", ["memfd", "private"])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_device_writes_and_reads_mapped_memory(backend, port, kind, sealed):
    memory = Memory(4 * PAGE, kind, sealed)
    backend.map_dma(IOVA, memory.vaddr, 4 * PAGE, 3)
    port.write(IOVA + PAGE - 2, b"over the edge")
    assert memory.map[PAGE - 2:PAGE + 11] == b"over the edge"
    assert port.read(IOVA + PAGE - 2, 13) == b"over the edge"
    assert port.fault_count == 0


@pytest.mark.parametrize("prot, may_read, may_write", [(1, True, False), (2, False, True), (3, True, True)])
def test_a_device_has_only_the_access_that_was_mapped(backend, port, prot, may_read, may_write):
    memory = Memory(PAGE)
    backend.map_dma(IOVA, memory.vaddr, PAGE, prot)
    for allowed, access in ((may_read, lambda: port.read(IOVA, 1)), (may_write, lambda: port.write(IOVA, b"x"))):
        if allowed:
            access()
        else:
            with pytest.raises(MemoryFaultError, match="not permitted"):
                access()


def test_write_only_memory_can_be_read_up_to_6_12():
    with open_backend("software", kernel="6.12", groups=[SoftwareGroup(0, [ADDRESS])], memlock_limit=None) as backend:
        memory = Memory(PAGE)
        backend.map_dma(IOVA, memory.vaddr, PAGE, 2)
        assert backend.ports[ADDRESS].read(IOVA, 2) == b"\0\0"


def test_a_fault_is_recorded_with_device_place_and_reason_and_moves_nothing_past_it(backend, port):
    memory = Memory(PAGE)
    backend.map_dma(IOVA, memory.vaddr, PAGE, 3)
    with pytest.raises(MemoryFaultError) as caught:
        port.write(IOVA + PAGE - 4, b"12345678")
    assert (caught.value.errno, caught.value.iova, caught.value.size) == (errno.EFAULT, IOVA + PAGE, 4)
    assert memory.map[-4:] == b"1234"
    assert list(port.faults) == [(ADDRESS, IOVA + PAGE, 4, True, "not mapped")]
    assert backend.faults == list(port.faults)


def test_memfd_dma_goes_on_after_the_owner_unmapped_the_address(backend, port):
    memory = Memory(4 * PAGE)
    backend.map_dma(IOVA, memory.vaddr, 4 * PAGE, 3)
    again = mmap.mmap(memory.fd, 4 * PAGE)
    assert backend.invalidate_vaddr() == 4 * PAGE
    memory.unmap()
    port.write(IOVA + 5, b"still here")
    assert again[5:15] == b"still here"
    backend.update_vaddr(IOVA, address_of(again), 4 * PAGE)
    assert port.read(IOVA + 5, 10) == b"still here"


def test_private_memory_that_is_gone_is_a_fault_not_a_crash(backend, port):
    memory = Memory(2 * PAGE, "private")
    backend.map_dma(IOVA, memory.vaddr, 2 * PAGE, 3)
    memory.unmap()
    for access in (lambda: port.read(IOVA, 8), lambda: port.write(IOVA, b"x")):
        with pytest.raises(MemoryFaultError, match="memory is gone"):
            access()


def test_a_file_that_shrank_under_the_device_is_a_fault_not_a_crash(backend, port):
    memory = Memory(4 * PAGE)
    backend.map_dma(IOVA, memory.vaddr, 4 * PAGE, 3)
    os.ftruncate(memory.fd, PAGE)
    port.write(IOVA, b"kept")
    with pytest.raises(MemoryFaultError, match="memory is gone"):
        port.write(IOVA + 2 * PAGE, b"x")


def test_memory_of_several_mappings_of_the_process_is_one_mapping_for_the_device(backend, port):
    memory = Memory(4 * PAGE)
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    where = libc.mmap(ctypes.c_void_p(memory.vaddr + PAGE), ctypes.c_size_t(PAGE), 3, 0x32, -1, 0)     # private, fixed
    assert where == memory.vaddr + PAGE
    backend.map_dma(IOVA, memory.vaddr, 4 * PAGE, 3)
    data = bytes(range(256)) * 64
    port.write(IOVA, data)
    assert ctypes.string_at(memory.vaddr, 4 * PAGE) == data == port.read(IOVA, 4 * PAGE)


def test_a_vaddr_update_does_not_move_dma(backend, port):
    memory, other = Memory(PAGE), Memory(PAGE)
    backend.map_dma(IOVA, memory.vaddr, PAGE, 3)
    backend.invalidate_vaddr()
    backend.update_vaddr(IOVA, other.vaddr, PAGE)
    port.write(IOVA, b"pinned")
    assert memory.map[:6] == b"pinned" and other.map[:6] == bytes(6)


def test_dma_after_unmap_faults(backend, port):
    memory = Memory(PAGE)
    backend.map_dma(IOVA, memory.vaddr, PAGE, 3)
    backend.unmap_dma(IOVA, PAGE)
    with pytest.raises(MemoryFaultError, match="not mapped"):
        port.write(IOVA, b"x")


def test_the_log_reports_exactly_the_written_pages_once(backend, port):
    memory = Memory(256 * PAGE)
    backend.map_dma(IOVA, memory.vaddr, 256 * PAGE, 3)
    port.start_logging([(IOVA, 128 * PAGE), (IOVA + 192 * PAGE, 64 * PAGE)])
    port.write(IOVA + 3 * PAGE + 100, bytes(2 * PAGE))          # pages 3, 4, 5
    port.write(IOVA + 130 * PAGE, b"not logged")
    port.write(IOVA + 200 * PAGE, b"x")
    words = np.zeros(4, np.uint64)
    assert port.harvest(IOVA, 256 * PAGE, words) == 4
    assert np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist() == [3, 4, 5, 200]
    assert port.harvest(IOVA, 256 * PAGE, words) == 0


def test_a_partial_harvest_keeps_the_rest(backend, port):
    memory = Memory(64 * PAGE)
    backend.map_dma(IOVA, memory.vaddr, 64 * PAGE, 3)
    port.start_logging([(IOVA, 64 * PAGE)])
    port.write(IOVA, bytes(64 * PAGE))
    words = np.zeros(1, np.uint64)
    assert port.harvest(IOVA + 10 * PAGE, 5 * PAGE, words) == 5
    assert words[0] == 0b11111
    assert port.harvest(IOVA, 64 * PAGE, words) == 59


@pytest.mark.parametrize("ranges, pgsize, code", [
    ([], PAGE, errno.EINVAL), ([(IOVA, PAGE)], 100, errno.EINVAL), ([(IOVA, PAGE)], 2048, errno.EINVAL),
    ([(IOVA + 1, PAGE)], PAGE, errno.EINVAL), ([(IOVA, 0)], PAGE, errno.EINVAL),
    ([(IOVA, 2 * PAGE), (IOVA + PAGE, PAGE)], PAGE, errno.EINVAL), ([(2**64 - PAGE, PAGE)], PAGE, errno.EOVERFLOW),
    ([(i * 2 * PAGE, PAGE) for i in range(257)], PAGE, errno.E2BIG), ([(-PAGE, PAGE)], PAGE, errno.EINVAL)])
def test_a_bad_log_request_is_refused_with_its_errno(port, ranges, pgsize, code):
    with pytest.raises(InvalidArgumentError) as caught:
        port.start_logging(ranges, pgsize)
    assert caught.value.errno == code
    assert not port.logging


def test_a_log_can_be_started_once_and_must_run_to_be_read(port):
    port.start_logging([(IOVA, PAGE)])
    with pytest.raises(InvalidArgumentError):
        port.start_logging([(IOVA, PAGE)])
    port.stop_logging()
    port.stop_logging()
    with pytest.raises(InvalidArgumentError, match="off"):
        port.harvest(IOVA, PAGE, bytearray(8))


def test_dirty_sources_join_ranges_until_a_device_can_take_them(backend, port):
    source, = backend.dirty_sources()
    source.start([(IOVA + i * 3 * PAGE, PAGE) for i in range(1000)], PAGE)
    memory = Memory(PAGE)
    backend.map_dma(IOVA + 2997 * PAGE, memory.vaddr, PAGE, 3)
    port.write(IOVA + 2997 * PAGE, b"x")
    assert source.harvest(IOVA, 3000 * PAGE, bytearray(3000 // 8 + 8)) == 1
    source.stop()


def test_write_many_counts_and_records_the_rows_that_fault(backend, port):
    memory = Memory(2 * PAGE)
    backend.map_dma(IOVA, memory.vaddr, 2 * PAGE, 3)
    rows = np.arange(4 * 16, dtype=np.uint8).reshape(4, 16)
    iovas = np.array([IOVA, 0, IOVA + PAGE, IOVA + 2 * PAGE - 8], np.uint64)
    assert port.write_many(iovas, rows) == 2
    assert memory.map[:16] == bytes(rows[0]) and memory.map[PAGE:PAGE + 16] == bytes(rows[2])
    assert memory.map[-8:] == bytes(rows[3][:8])
    assert [fault.iova for fault in port.faults] == [0, IOVA + 2 * PAGE]


@pytest.mark.parametrize("iovas, rows", [(np.zeros(2, np.uint64), np.zeros((3, 8), np.uint8)),
                                         (np.zeros(2, np.int32), np.zeros((2, 8), np.uint8)),
                                         (np.zeros(2, np.uint64), np.zeros(16, np.uint8))])
def test_write_many_refuses_arrays_of_other_shapes(port, iovas, rows):
    with pytest.raises(TypeError):
        port.write_many(iovas, rows)


def test_a_closed_device_can_do_no_dma(backend):
    port = backend.ports[ADDRESS]
    backend.close()
    backend.close()
    with pytest.raises(ClosedError):
        port.read(IOVA, 1)


def test_mapping_and_unmapping_beside_dma_never_tears_or_crashes(backend, port):
    memory = Memory(64 * PAGE, sealed=True)
    stop = threading.Event()
    rows = np.ones((16, 64), np.uint8)
    iovas = np.arange(16, dtype=np.uint64) * PAGE * 4 + IOVA

    def device():
        while not stop.is_set():
            port.write_many(iovas, rows)

    threads = [threading.Thread(target=device) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(1500):
        backend.map_dma(IOVA, memory.vaddr, 64 * PAGE, 3)
        if i % 3 == 0:
            backend.invalidate_vaddr()
            backend.update_vaddr(IOVA, memory.vaddr, 64 * PAGE)
        assert backend.unmap_dma(IOVA, 64 * PAGE) == 64 * PAGE
    stop.set()
    for thread in threads:
        thread.join()
    assert backend.capabilities().dma_avail == 65535


# ---- emulated devices

class Mediated:
    """A mediated device that gives its pins back when asked; `stubborn` ones do not."""

    def __init__(self, address="mdev", stubborn=False):
        self.address = address
        self.stubborn = stubborn
        self.asked = []

    def connect(self, port):
        self.port = port

    def disconnect(self):
        self.port = None

    def dma_unmap(self, iova, size):
        self.asked.append((iova, size))
        if not self.stubborn:
            self.port.unpin_pages(iova, size // PAGE)


@pytest.fixture
def mediated():
    device = Mediated()
    with open_backend("software", groups=[SoftwareGroup(5, [device], emulated=True)], memlock_limit=None) as backend:
        device.backend = backend
        yield device


def dirty(backend, npages):
    words = np.zeros((npages + 63) // 64, np.uint64)
    backend.read_dirty(IOVA, npages * PAGE, words)
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


def test_an_emulated_write_marks_exactly_its_pages(mediated):
    backend, memory = mediated.backend, Memory(16 * PAGE)
    backend.map_dma(IOVA, memory.vaddr, 16 * PAGE, 3)
    backend.start_dirty()
    assert dirty(backend, 16) == []
    mediated.port.write(IOVA + 3 * PAGE - 1, b"xy")
    assert dirty(backend, 16) == [2, 3]
    assert dirty(backend, 16) == []
    source, = backend.dirty_sources()
    source.start([(IOVA, 16 * PAGE)], PAGE)
    mediated.port.write(IOVA, b"x")
    into = np.array([0b100], np.uint64)
    assert source.harvest(IOVA, 16 * PAGE, into) == 1
    assert into[0] == 0b101


def test_pinned_pages_are_dirty_on_every_query_while_pinned(mediated):
    backend, memory = mediated.backend, Memory(16 * PAGE)
    backend.map_dma(IOVA, memory.vaddr, 16 * PAGE, 3)
    backend.start_dirty()
    mediated.port.pin_pages(IOVA + 4 * PAGE, 2, 3)
    mediated.port.pin_pages(IOVA + 5 * PAGE, 1, 3)
    assert dirty(backend, 16) == [4, 5] == dirty(backend, 16)
    mediated.port.unpin_pages(IOVA + 4 * PAGE, 2)
    assert dirty(backend, 16) == [4, 5]         # what was pinned at the last query is still reported once
    assert dirty(backend, 16) == [5]            # pinned twice, let go once
    mediated.port.unpin_pages(IOVA + 5 * PAGE, 1)
    dirty(backend, 16)
    assert dirty(backend, 16) == []


def test_an_unmap_asks_for_pinned_pages_back(mediated):
    backend, memory = mediated.backend, Memory(4 * PAGE)
    backend.map_dma(IOVA, memory.vaddr, 4 * PAGE, 3)
    mediated.port.pin_pages(IOVA, 4, 1)
    assert backend.unmap_dma(IOVA, 4 * PAGE) == 4 * PAGE
    assert mediated.asked == [(IOVA, 4 * PAGE)]
    assert backend.capabilities().dma_avail == 65535


def test_a_device_that_keeps_its_pins_makes_the_unmap_fail_busy(mediated):
    backend, memory = mediated.backend, Memory(PAGE)
    mediated.stubborn = True
    backend.map_dma(IOVA, memory.vaddr, PAGE, 3)
    mediated.port.pin_pages(IOVA, 1, 1)
    with pytest.raises(BusyError):
        backend.unmap_dma(IOVA, PAGE)
    assert len(backend.type1.mappings()) == 1
    mediated.port.unpin_pages(IOVA, 1)
    assert backend.unmap_dma(IOVA, PAGE) == PAGE


@pytest.mark.parametrize("iova, npages, prot, code", [
    (IOVA, 0, 3, errno.EINVAL), (IOVA, 513, 3, errno.E2BIG), (IOVA + 16 * PAGE, 1, 3, errno.EINVAL),
    (IOVA, 17, 1, errno.EINVAL), (IOVA, 1, 2, errno.EPERM), (2**64 - PAGE, 2, 1, errno.EOVERFLOW)])
def test_a_bad_pin_is_refused_and_leaves_nothing_pinned(mediated, iova, npages, prot, code):
    backend, memory = mediated.backend, Memory(16 * PAGE)
    backend.map_dma(IOVA, memory.vaddr, 16 * PAGE, 1)
    backend.start_dirty()
    before = backend.system.locked_pages()
    with pytest.raises(VfioError) as caught:
        mediated.port.pin_pages(iova, npages, prot)
    assert caught.value.errno == code
    assert backend.system.locked_pages() == before
    backend.read_dirty(IOVA, 16 * PAGE, bytearray(8))
    assert dirty(backend, 16) == []


def test_pins_count_as_locked_pages_only_where_no_iommu_has_them_counted(mediated):
    backend, memory = mediated.backend, Memory(4 * PAGE)
    before = backend.system.locked_pages()
    backend.map_dma(IOVA, memory.vaddr, 4 * PAGE, 3)
    assert backend.system.locked_pages() == before
    mediated.port.pin_pages(IOVA, 2, 3)
    mediated.port.pin_pages(IOVA, 1, 3)
    assert backend.system.locked_pages() == before + 2
    mediated.port.unpin_pages(IOVA, 2)
    assert backend.system.locked_pages() == before + 1
    mediated.port.unpin_pages(IOVA, 1)
    assert backend.system.locked_pages() == before


def test_vaddr_update_is_refused_while_an_emulated_group_is_attached(mediated):
    assert "vaddr" not in mediated.backend.capabilities().features
    with pytest.raises(BusyError):
        mediated.backend.invalidate_vaddr()


def test_emulated_dma_follows_permissions_and_reports_faults(mediated):
    backend, memory = mediated.backend, Memory(PAGE)
    backend.map_dma(IOVA, memory.vaddr, PAGE, 1)
    assert mediated.port.read(IOVA, 3) == bytes(3)
    with pytest.raises(MemoryFaultError, match="not permitted"):
        mediated.port.write(IOVA, b"x")
    with pytest.raises(VfioError) as caught:
        backend.dma_write(IOVA, b"x")
    assert caught.value.errno == errno.EPERM
    memory.unmap()
    with pytest.raises(MemoryFaultError, match="memory is gone"):
        mediated.port.read(IOVA, 1)


def test_the_edu_device_moves_bytes_both_ways_and_computes():
    edu = EduDevice(ADDRESS)
    with open_backend("software", groups=[SoftwareGroup(0, [edu])], memlock_limit=None) as backend:
        memory = Memory(2 * PAGE)
        memory.map[:5] = b"hello"
        backend.map_dma(IOVA, memory.vaddr, 2 * PAGE, 3)
        write = lambda register, value: edu.region_write(0, register, value.to_bytes(8, "little"))  # noqa: E731
        edu.region_write(7, 4, b"\x06\x00")
        for register, value in ((0x80, IOVA), (0x88, 0x40000), (0x90, 5), (0x98, 1)):
            write(register, value)
        for register, value in ((0x80, 0x40000), (0x88, IOVA + PAGE), (0x90, 5), (0x98, 7)):
            write(register, value)
        assert memory.map[PAGE:PAGE + 5] == b"hello"
        assert int.from_bytes(edu.region_read(0, 0x24, 4), "little") == 0x100
        edu.region_write(0, 0x08, (5).to_bytes(4, "little"))
        assert int.from_bytes(edu.region_read(0, 0x08, 4), "little") == 120
        assert edu.region_read(0, 0, 4) == (0x010000ED).to_bytes(4, "little")


@pytest.fixture
def waiting():
    """A 5.12 container whose only vaddr is invalid, and a thread that reads it through an emulated device."""
    device = Mediated()
    with open_backend("software", kernel="5.12", groups=[SoftwareGroup(5, [device], emulated=True)],
                      memlock_limit=None) as backend:
        memory = Memory(PAGE)
        memory.map[:5] = b"hello"
        backend.map_dma(IOVA, memory.vaddr, PAGE, 3)
        backend.type1.invalidate_vaddr()
        results = []

        def read():
            try:
                results.append(device.port.read(IOVA, 5))
            except VfioError as failure:
                results.append(failure.hint)

        thread = threading.Thread(target=read)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        yield backend, memory, thread, results
        thread.join(10)
        assert not thread.is_alive()


def test_on_5_12_emulated_dma_waits_for_a_new_vaddr(waiting):
    backend, memory, thread, results = waiting
    backend.update_vaddr(IOVA, memory.vaddr, PAGE)
    thread.join(10)
    assert results == [b"hello"]


def test_on_5_12_emulated_dma_ends_its_wait_when_the_mapping_goes(waiting):
    backend, _, thread, results = waiting
    backend.unmap_dma(IOVA, PAGE)
    thread.join(10)
    assert "not mapped" in results[0]


def test_on_5_12_emulated_dma_ends_its_wait_when_the_container_is_closed(waiting):
    backend, _, thread, results = waiting
    backend.type1.container_closed()
    thread.join(10)
    assert "memory is gone" in results[0]


def test_from_6_1_vaddrs_stay_valid_while_an_emulated_group_is_attached():
    """Vaddrs can't be invalidated at all while an emulated group is attached."""
    device = Mediated()
    groups = [SoftwareGroup(1, [ADDRESS]), SoftwareGroup(5, [device], emulated=True)]
    with open_backend("software", kernel="6.1", groups=groups, memlock_limit=None) as backend:
        memory = Memory(PAGE)
        backend.map_dma(IOVA, memory.vaddr, PAGE, 3)
        with pytest.raises(BusyError):
            backend.invalidate_vaddr()


def test_dma_does_not_go_round_the_end_of_the_address_space():
    groups = [SoftwareGroup(0, [ADDRESS], aperture=(0, 2**64 - 1), reserved=[])]
    with open_backend("software", groups=groups, memlock_limit=None) as backend:
        port, memory = backend.ports[ADDRESS], Memory(2 * PAGE)
        backend.map_dma(2**64 - PAGE, memory.vaddr, PAGE, 3)
        backend.map_dma(0, memory.vaddr + PAGE, PAGE, 3)
        with pytest.raises(MemoryFaultError, match="not mapped"):
            port.write(2**64 - 4, b"12345678")
        assert memory.map[PAGE - 4:PAGE] == b"1234" and memory.map[PAGE:PAGE + 4] == bytes(4)


def test_a_bitmap_that_is_too_small_or_a_range_off_the_page_grid_is_refused(port):
    port.start_logging([(IOVA, 128 * PAGE)])
    for iova, size, room in ((IOVA, 128 * PAGE, 8), (IOVA + 1, PAGE, 8), (IOVA, 0, 8), (IOVA, PAGE + 1, 8)):
        with pytest.raises(InvalidArgumentError):
            port.harvest(iova, size, bytearray(room))


def test_a_device_that_fails_to_connect_leaves_no_descriptor():
    class Broken(Mediated):
        def connect(self, port):
            raise RuntimeError("no")

    gc.collect()            # what other tests dropped
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RuntimeError):
        open_backend("software", groups=[SoftwareGroup(5, [Broken()], emulated=True)])
    assert len(os.listdir("/proc/self/fd")) == before


def test_on_5_12_a_wait_ends_with_what_a_signal_handler_raises():
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with GuestMemory.memfd(PAGE) as memory, open_backend(
            "software", kernel="5.12", groups=[SoftwareGroup(5, ["0000:00:10.0"], emulated=True)]) as backend:
        backend.map_dma(0, memory.regions[0].vaddr, PAGE, 3)
        backend.invalidate_vaddr()
        before = signal.signal(signal.SIGALRM, stop)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Stop):
                backend.dma_read(0, 16)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        backend.update_vaddr(0, memory.regions[0].vaddr, PAGE)
        assert backend.dma_read(0, 16) == bytes(16)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_unmap_callback_that_raises_does_not_keep_the_others_from_letting_go():
    class Device:
        def __init__(self, address, fails):
            self.address, self.fails = address, fails

        def connect(self, port):
            self.port = port

        def disconnect(self):
            pass

        def region_size(self, index):
            return 0

        def dma_unmap(self, iova, size):
            if self.fails:
                raise OSError("this device is broken")
            self.port.unpin_pages(iova, 1)

    devices = [Device("a", True), Device("b", False)]
    with GuestMemory.memfd(PAGE) as memory, open_backend(
            "software", groups=[SoftwareGroup(5, devices, emulated=True)]) as backend:
        backend.map_dma(0, memory.regions[0].vaddr, PAGE, 3)
        devices[1].port.pin_pages(0, 1, 3)
        assert backend.unmap_dma(0, PAGE) == PAGE


def test_a_log_is_extended_without_losing_what_it_has(backend, port):
    memory = Memory(64 * PAGE)
    backend.map_dma(IOVA, memory.vaddr, 64 * PAGE, 3)
    with pytest.raises(InvalidArgumentError, match="start it"):
        port.extend_logging(IOVA, PAGE)
    port.start_logging([(IOVA + 8 * PAGE, 8 * PAGE), (IOVA + 32 * PAGE, 8 * PAGE)])
    port.write(IOVA + 9 * PAGE, b"x")
    port.extend_logging(IOVA, 36 * PAGE)                # around and between what is logged already
    for page in (0, 7, 16, 31, 33, 40):
        port.write(IOVA + page * PAGE, b"x")
    words = np.zeros(1, np.uint64)
    assert port.harvest(IOVA, 64 * PAGE, words) == 6
    assert [page for page in range(64) if int(words[0]) >> page & 1] == [0, 7, 9, 16, 31, 33]
    with pytest.raises(InvalidArgumentError):
        port.extend_logging(IOVA + 1, PAGE)
    for i in range(252):
        port.extend_logging(IOVA + (100 + 2 * i) * PAGE, PAGE)
    with pytest.raises(InvalidArgumentError) as caught:
        port.extend_logging(IOVA + 5000 * PAGE, PAGE)
    assert caught.value.errno == errno.E2BIG
    port.stop_logging()
    assert not port.logging
    backend.unmap_all()
