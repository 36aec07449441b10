"""The typed side of nesting over iommufd: tables by PASID, invalidations of any range, page requests as objects."""
import contextlib
import errno
import select
import struct
import threading

import pytest

from vfiodma import GuestMemory, SoftwareGroup, SoftwareVfio
from vfiodma.backends.iommufd import HwptSource, Iommufd
from vfiodma.errors import (
    BusyError,
    InvalidArgumentError,
    MemoryFaultError,
    NotMappedError,
    UnsupportedError,
    VfioError,
)
from vfiodma.nesting import (
    GuestPageTable,
    Invalidation,
    IommufdNestedDomain,
    PageFaults,
    PageRequest,
    PageResponse,
)

PAGE, RWU = 4096, 7
DEVICE, SIBLING = "0000:00:10.0", "0000:00:10.1"
TABLE = GuestPageTable(PAGE)


class Guest:
    """A guest of 64 pages; its table's root is page 1, virtual page n of 16 ... 31 is page n."""

    def __init__(self, stack, kernel="7.2", **group):
        options = {"nestable": True, "page_request_timeout": 10.0, **group}
        self.system = SoftwareVfio(kernel, [SoftwareGroup(0, [DEVICE, SIBLING], **options)], memlock_limit=None)
        memory = stack.enter_context(GuestMemory.memfd(64 * PAGE))
        self.view = stack.enter_context(memory.region.view())
        self.iommufd = stack.enter_context(Iommufd(self.system))
        self.devices = [self.iommufd.bind(address) for address in (DEVICE, SIBLING)]
        self.ioas = self.iommufd.alloc_ioas()
        self.ioas.map_dma(0, memory.region.vaddr, 64 * PAGE, 3)
        self.port, self.sibling = (self.system._groups[0].ports[address] for address in (DEVICE, SIBLING))
        for page in (1, 2, 3):
            self.entry(page, 0, (page + 1) * PAGE | RWU)
        for page in range(16, 32):
            self.entry(4, page, page * PAGE | RWU)
            self.view[page * PAGE:page * PAGE + 4] = b"p%03d" % page

    def entry(self, page, index, value):
        struct.pack_into("=Q", self.view, page * PAGE + index * 8, value)


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def guest(stack):
    return Guest(stack)


def test_tables_of_pasids_come_and_go(guest):
    with IommufdNestedDomain(guest.devices, guest.ioas) as domain:
        info = domain.info()
        assert (info.format, info.features, info.address_width, info.pasid_bits) == (1, 3, 39, 20)
        assert guest.port.read(16 * PAGE, 4) == b"p016"         # without a PASID: the second stage alone
        domain.bind(7, TABLE)
        domain.bind(9, GuestPageTable(PAGE, supervisor=True, extended_accessed=True))
        assert guest.port.read(17 * PAGE, 4, pasid=7) == guest.sibling.read(17 * PAGE, 4, pasid=9) == b"p017"
        assert guest.port.read(17 * PAGE, 4, pasid=9, privileged=True) == b"p017"
        with pytest.raises(BusyError):
            domain.bind(7, TABLE)
        assert guest.port.read(17 * PAGE, 4, pasid=7) == b"p017"
        for pasid, table in ((1 << 20, TABLE), (0, TABLE), (8, GuestPageTable(PAGE, address_width=39))):
            with pytest.raises(InvalidArgumentError):
                domain.bind(pasid, table)
        domain.unbind(7)
        domain.unbind(7)
        with pytest.raises(MemoryFaultError):
            guest.port.read(17 * PAGE, 4, pasid=7)
    domain.close()
    assert domain.parent.id == 0
    with pytest.raises(MemoryFaultError):
        guest.port.read(16 * PAGE, 4)
    guest.ioas.destroy()


@pytest.mark.parametrize("kernel", ["6.12", "7.2"])
def test_requests_without_a_pasid_can_have_a_table(stack, kernel):
    guest = Guest(stack, kernel)
    with IommufdNestedDomain(guest.devices, guest.ioas, pasids=False, dirty_tracking=True) as domain:
        domain.bind(None, TABLE)
        guest.entry(4, 16, 21 * PAGE | RWU)
        assert guest.sibling.read(16 * PAGE, 4) == b"p021"
        domain.unbind(None)
        assert guest.sibling.read(16 * PAGE, 4) == b"p016"


def test_what_kernels_and_iommus_lack_is_told(stack):
    old = Guest(stack, "6.12")
    with pytest.raises(UnsupportedError):
        IommufdNestedDomain(old.devices, old.ioas)
    plain = Guest(stack, nestable=False)
    with pytest.raises(UnsupportedError):
        IommufdNestedDomain(plain.devices, plain.ioas)
    amd = Guest(stack, lost_last_page=8192)
    with IommufdNestedDomain(amd.devices, amd.ioas) as domain:
        assert domain.info() is None
        with pytest.raises(UnsupportedError):
            domain.bind(5, TABLE)
    with pytest.raises(InvalidArgumentError):
        IommufdNestedDomain([], old.ioas)


def test_a_device_that_can_not_be_attached_leaves_all_as_they_were(guest):
    with IommufdNestedDomain(guest.devices, guest.ioas) as domain:
        guest.devices[1].close()
        with pytest.raises(VfioError):
            domain.bind(7, TABLE)
        with pytest.raises(MemoryFaultError):
            guest.port.read(16 * PAGE, 4, pasid=7)
        assert guest.port.read(16 * PAGE, 4) == b"p016"


def test_devices_behind_another_iommu_are_refused(stack):
    system = SoftwareVfio("7.2", [SoftwareGroup(0, [DEVICE], nestable=True),
                                  SoftwareGroup(1, [SIBLING], nestable=True, dirty_tracking=False)], memlock_limit=None)
    iommufd = stack.enter_context(Iommufd(system))
    devices = [iommufd.bind(address) for address in (DEVICE, SIBLING)]
    ioas = iommufd.alloc_ioas()
    with pytest.raises(InvalidArgumentError):
        IommufdNestedDomain(devices, ioas, dirty_tracking=True)
    ioas.destroy()                                              # nothing uses it


def test_an_invalidation_covers_its_range_and_nothing_else(guest):
    with IommufdNestedDomain(guest.devices, guest.ioas) as domain:
        domain.bind(1, TABLE)
        domain.bind(2, TABLE)
        for page in range(16, 32):
            for pasid in (1, 2):
                guest.port.read(page * PAGE, 4, pasid=pasid)
            guest.entry(4, page, (page ^ 1) * PAGE | RWU)
        domain.invalidate([Invalidation(1, 19 * PAGE, 6, leaf=True), Invalidation(1, 30 * PAGE), Invalidation(3),
                           Invalidation(2, 16 * PAGE)])
        def fresh(pasid):
            return [page for page in range(16, 32)
                    if guest.port.read(page * PAGE, 4, pasid=pasid) == b"p%03d" % (page ^ 1)]
        assert fresh(1) == [19, 20, 21, 22, 23, 24, 30] and fresh(2) == [16]
        domain.invalidate([Invalidation(1)])
        assert fresh(1) == list(range(16, 32)) and fresh(2) == [16]
        domain.invalidate([])


def test_a_bad_entry_is_named_and_those_before_it_are_done(guest):
    parent = guest.iommufd.alloc_hwpt(guest.ioas, guest.devices[0].id, nest_parent=True)
    table = parent.nested(guest.devices[0].id, PAGE)
    for device in guest.devices:
        device.attach(table)
    guest.port.read(16 * PAGE, 4)
    guest.entry(4, 16, 20 * PAGE | RWU)
    with pytest.raises(InvalidArgumentError, match="entry 1 of 3") as caught:
        table.invalidate([(16 * PAGE, 1, False), (5, 1, False), (0, 1, False)])
    assert caught.value.iova == 5
    assert guest.port.read(16 * PAGE, 4) == b"p020"
    table.invalidate([])
    table.invalidate()
    with pytest.raises(BusyError):
        table.destroy()
    with pytest.raises(InvalidArgumentError, match="nest_parent"):
        guest.iommufd.alloc_hwpt(guest.ioas, guest.devices[0].id).nested(guest.devices[0].id, PAGE)


def test_page_requests_are_answered_by_group(guest):
    with PageFaults(guest.iommufd.alloc_fault_queue()) as faults, IommufdNestedDomain(
            guest.devices, guest.ioas, fault_queue=faults) as domain:
        domain.bind(1, TABLE)
        assert faults.read() == [] and not select.select([faults], [], [], 0)[0]
        got = []
        thread = threading.Thread(target=lambda: got.append(guest.port.read(PAGE, 4, pasid=1)))
        thread.start()
        assert select.select([faults], [], [], 10)[0]
        request, = faults.read()
        assert request == PageRequest(request.group, 1, PAGE, 1, True, device=guest.devices[0].id)
        guest.entry(4, 1, 20 * PAGE | RWU)
        with pytest.raises(InvalidArgumentError):
            faults.respond(request, PageResponse.FAILURE)
        faults.respond(request)
        thread.join()
        assert got == [b"p020"]
        with pytest.raises(InvalidArgumentError):
            faults.respond(request, PageResponse.INVALID)
        with pytest.raises(BusyError):
            guest.iommufd.destroy(faults.queue.id)
    assert faults.fileno() == -1
    faults.close()
    with pytest.raises(VfioError) as closed:
        faults.read()
    assert closed.value.errno == errno.EBADF
    with pytest.raises(NotMappedError):
        guest.iommufd.destroy(99)


def test_the_second_stage_is_a_source_of_dirty_pages(guest):
    with IommufdNestedDomain(guest.devices, guest.ioas, dirty_tracking=True) as domain:
        domain.bind(1, TABLE)
        source = HwptSource(domain.parent)
        source.start([(0, 64 * PAGE)], PAGE)
        guest.entry(4, 16, 40 * PAGE | RWU)
        guest.port.write(16 * PAGE, b"x", pasid=1)
        words = bytearray(8)
        assert source.harvest(0, 64 * PAGE, words) == 5
        # The page, and the tables in which the walk has set flags.
        assert int.from_bytes(words, "little") == 1 << 40 | 0b11110
        source.stop()


def test_a_closed_iommufd_takes_tables_and_queues_along(guest):
    faults = PageFaults(guest.iommufd.alloc_fault_queue())
    domain = IommufdNestedDomain(guest.devices, guest.ioas, fault_queue=faults)
    domain.bind(1, TABLE)
    guest.iommufd.close()
    domain.close()
    faults.close()
    domain.unbind(1)


def test_devices_that_ask_for_no_pages_take_no_queue(stack):
    guest = Guest(stack, page_request_timeout=None)
    with PageFaults(guest.iommufd.alloc_fault_queue()) as faults, IommufdNestedDomain(
            guest.devices, guest.ioas, fault_queue=faults) as domain:
        with pytest.raises(VfioError, match="PRI") as caught:
            domain.bind(1, TABLE)
        assert caught.value.errno == errno.ENODEV


def test_numbers_that_fit_nowhere_are_refused_and_leave_all_as_it_was(guest):
    with IommufdNestedDomain(guest.devices, guest.ioas) as domain:
        domain.bind(5, TABLE)
        for pasid, table in ((-1, TABLE), (1 << 32, TABLE), (1 << 20, TABLE), (0, TABLE), (3, GuestPageTable(-1)),
                             (3, GuestPageTable(1 << 64)), (3, GuestPageTable(PAGE, address_width=1 << 32))):
            with pytest.raises(InvalidArgumentError):
                domain.bind(pasid, table)
        assert guest.port.read(16 * PAGE, 4, pasid=5) == b"p016"
        guest.entry(4, 16, 17 * PAGE | RWU)
        for address, npages in (-PAGE, 1), (1 << 64, 1), (PAGE, -1), (PAGE, 1 << 64):
            with pytest.raises(InvalidArgumentError):
                domain.invalidate([Invalidation(5), Invalidation(5, address, npages)])
        assert guest.port.read(16 * PAGE, 4, pasid=5) == b"p016"
        domain.bind(3, TABLE)


@pytest.mark.parametrize("addresses", [[], [-1], [1 << 64]])
def test_a_device_that_asks_for_no_address_does_not_block_the_queue(guest, addresses):
    with PageFaults(guest.iommufd.alloc_fault_queue()) as faults, \
            IommufdNestedDomain(guest.devices, guest.ioas, fault_queue=faults) as domain:
        domain.bind(5, TABLE)
        with pytest.raises(InvalidArgumentError):
            guest.port.fault_sink.request_pages(5, addresses, 1)
        assert faults.read() == []
        assert not select.select([faults], [], [], 0)[0]
