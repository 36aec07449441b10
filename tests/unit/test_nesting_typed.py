"""The typed side of nesting: tables, invalidations of any range, faults as objects."""
import threading

import pytest
from test_nesting_op import PAGE, RIGS, RWU, Rig

from vfiodma.errors import BusyError, InvalidArgumentError, MemoryFaultError, NotMappedError, UnsupportedError
from vfiodma.nesting import (
    FaultQueue,
    FaultReason,
    GuestPageTable,
    Invalidation,
    NestedDomain,
    PageRequest,
    PageResponse,
    UnrecoverableFault,
    _pieces,
)

TABLE = GuestPageTable(PAGE)


@pytest.fixture
def rig():
    rig = Rig()
    rig.tables()
    assert rig.vfio.pasids.allocate() == 1
    yield rig
    RIGS.remove(rig)
    rig.close()


def test_information_binding_and_unbinding(rig):
    domain = NestedDomain(rig.vfio, rig.fd)
    info = domain.info()
    assert (info.format, info.features, info.address_width, info.pasid_bits) == (1, 3, 39, 20)
    with pytest.raises(NotMappedError):
        domain.bind(2, TABLE)
    domain.bind(1, TABLE, guest_pasid=5)
    assert rig.port.read(16 * PAGE, 4, pasid=1) == b"p016"
    with pytest.raises(BusyError):
        domain.bind(1, TABLE)
    domain.bind(1, GuestPageTable(PAGE, supervisor=True, extended_accessed=True))
    assert rig.port.read(16 * PAGE, 4, pasid=1, privileged=True) == b"p016"
    assert rig.entry(4, 16) & 0x400
    domain.unbind(1)
    domain.unbind(1)
    with pytest.raises(MemoryFaultError):
        rig.port.read(16 * PAGE, 4, pasid=1)
    with pytest.raises(InvalidArgumentError):
        domain.bind(1, GuestPageTable(PAGE, address_width=39))


def test_five_levels(rig):
    rig.entry(5, 3, PAGE | RWU)
    NestedDomain(rig.vfio, rig.fd).bind(1, GuestPageTable(5 * PAGE, address_width=57))
    assert rig.port.read(3 << 48 | 18 * PAGE, 4, pasid=1) == b"p018"


def test_mainline_kernels_are_told_apart():
    rig = Rig("6.12", 3)
    domain = NestedDomain(rig.vfio, rig.fd)
    assert domain.info() is None
    with pytest.raises(UnsupportedError):
        domain.bind(1, TABLE)
    RIGS.remove(rig)
    rig.close()


def test_an_invalidation_covers_its_range_and_nothing_else(rig):
    domain = NestedDomain(rig.vfio, rig.fd)
    domain.bind(1, TABLE)
    for page in range(16, 32):
        rig.port.read(page * PAGE, 4, pasid=1)
        rig.entry(4, page, (page ^ 1) * PAGE | RWU)
    domain.invalidate([Invalidation(1, 19 * PAGE, 6, leaf=True)])
    fresh = [page for page in range(16, 32) if rig.port.read(page * PAGE, 4, pasid=1) == b"p%03d" % (page ^ 1)]
    assert fresh == [19, 20, 21, 22, 23, 24]
    domain.invalidate([Invalidation(1)])
    assert rig.port.read(16 * PAGE, 4, pasid=1) == b"p017"


@pytest.mark.parametrize("page, npages", [(0, 1), (0, 1 << 20), (5, 11), (7, 1), (1, 1 << 30)])
def test_pieces_are_aligned_powers_of_two(page, npages):
    at = page
    for address, n in _pieces(page << 12, npages):
        assert address == at << 12 and n & n - 1 == 0 and at % n == 0
        at += n
    assert at == page + npages


def test_faults_and_page_requests_are_objects(rig):
    domain = NestedDomain(rig.vfio, rig.fd)
    domain.bind(1, TABLE)
    rig.entry(4, 1, 0)
    with FaultQueue(rig.vfio, rig.vfio.open_fault_queue(rig.device)) as queue:
        assert queue.read() == []
        with pytest.raises(MemoryFaultError):
            rig.port.read(16 * PAGE, 4, pasid=9)
        assert queue.read() == [UnrecoverableFault(FaultReason.BAD_PASID_ENTRY, 9, 16 * PAGE, 1)]

        asked = []

        def repair():
            while not asked:
                asked.extend(queue.read())
            rig.entry(4, 1, 20 * PAGE | RWU)
            queue.respond(asked[0], PageResponse.SUCCESS)

        thread = threading.Thread(target=repair)
        thread.start()
        assert rig.port.read(PAGE, 4, pasid=1) == b"p020"
        thread.join()
        assert asked == [PageRequest(asked[0].group, 1, PAGE, 1, True)]
        with pytest.raises(InvalidArgumentError):
            queue.respond(asked[0])
    queue.close()
    assert queue.fileno() == -1


@pytest.mark.parametrize("wrong", [{"pasid": -1}, {"pasid": 1 << 64}, {"address": -PAGE}, {"address": 1 << 64},
                                   {"npages": -1}, {"npages": 1 << 52}])
def test_an_invalidation_that_cannot_be_told_drops_nothing(rig, wrong):
    domain = NestedDomain(rig.vfio, rig.fd)
    domain.bind(1, TABLE)
    assert rig.port.read(16 * PAGE, 4, pasid=1) == b"p016"
    rig.entry(4, 16, 17 * PAGE | RWU)
    with pytest.raises(InvalidArgumentError):
        domain.invalidate([Invalidation(1, 16 * PAGE), Invalidation(**{"pasid": 1, "address": PAGE, **wrong})])
    assert rig.port.read(16 * PAGE, 4, pasid=1) == b"p016"
    domain.invalidate([Invalidation(1, 16 * PAGE)])
    assert rig.port.read(16 * PAGE, 4, pasid=1) == b"p017"


def test_numbers_that_fit_nowhere_are_refused(rig):
    domain = NestedDomain(rig.vfio, rig.fd)
    for pasid, root in (-1, PAGE), (1 << 64, PAGE), (1, -1), (1, 1 << 64):
        with pytest.raises(InvalidArgumentError):
            domain.bind(pasid, GuestPageTable(root))
    with pytest.raises(InvalidArgumentError):
        domain.unbind(-1)
    with FaultQueue(rig.vfio, rig.vfio.open_fault_queue(rig.device)) as queue:
        for group in -1, 1 << 32:
            with pytest.raises(InvalidArgumentError):
                queue.respond(PageRequest(group, 1, PAGE, 1, True))
        for pasid, address, perm in (1 << 32, 0, 1), (1, 1 << 64, 1), (1, 0, -1):
            with pytest.raises(InvalidArgumentError):
                rig.port.fault_sink.request_pages(pasid, [address], perm)
        assert queue.read() == []
