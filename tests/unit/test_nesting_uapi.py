"""What the headers of nesting name, one by one: every fault reason with its causes, every flag, every code's effect."""
import ctypes
import errno
import itertools
import mmap
import select
import struct
import threading

import numpy as np
import pytest
from test_nesting_op import ACCESSED, DIRTY, PAGE, PRESENT, RIGS, RWU, USER, WRITE, Rig, invalidation, refused

from vfiodma.errors import MemoryFaultError
from vfiodma.uapi import iommu
from vfiodma.uapi import vfio as abi

READ_PERM, WRITE_PERM = iommu.IOMMU_FAULT_PERM_READ, iommu.IOMMU_FAULT_PERM_WRITE
HOLE = 100                              # a page outside of the second stage, inside of the guest's width
READ_ONLY = 64                          # a page that devices can't write
GONE = 65                               # a page whose memory is unmapped
BEYOND = 1 << 39                        # the guest's width
HUGE = 0x80

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@pytest.fixture
def rig():
    rig = Rig()
    rig.tables()
    assert rig.vfio.pasids.allocate() == 1
    yield rig
    RIGS.remove(rig)
    rig.close()


def events(rig, fd):
    """Take the records: (kind, fields)."""
    raw, found = rig.vfio.read(fd, 64 * iommu.iommu_fault.size), []
    for at in range(0, len(raw), iommu.iommu_fault.size):
        record = raw[at:at + iommu.iommu_fault.size]
        assert record[4:8] == bytes(4)
        kind, = struct.unpack_from("=I", record)
        request = kind == iommu.IOMMU_FAULT_PAGE_REQ
        layout = iommu.iommu_fault_page_request if request else iommu.iommu_fault_unrecoverable
        found.append((kind, layout.unpack(record[8:8 + layout.size])))
    return found


def address_of(*indexes, offset=0):
    """The address whose walk takes these entries, from the highest level."""
    return sum(index << 12 + 9 * level for level, index in enumerate(reversed(indexes))) + offset


def gpa(page, index=0):
    return page * PAGE + index * 8


# ---- every unrecoverable reason.  A case: (cause, PASID, address, perm, gpa of the entry to blame or None).
# A cause sets entries of the tables in pages 1 (highest level) to 4.

WAY = [((1, 0), 2), ((2, 0), 3), ((3, 0), 4), ((4, 16), 16)]        # of a good walk: entries and where they lead
CASES = {
    iommu.IOMMU_FAULT_REASON_BAD_PASID_ENTRY: [({}, 2, 16 * PAGE, READ_PERM, None),
                                               ({}, (1 << 20) - 1, 16 * PAGE, WRITE_PERM, None)],
    iommu.IOMMU_FAULT_REASON_PASID_INVALID: [({}, 0, 16 * PAGE, READ_PERM, None),
                                             ({}, 1 << 20, 16 * PAGE, READ_PERM, None),
                                             ({}, (1 << 32) - 1, 0, WRITE_PERM, None)],
    iommu.IOMMU_FAULT_REASON_WALK_EABT: [
        ({(1, 8): HOLE * PAGE | RWU}, 1, address_of(8, 1, 2, 3), READ_PERM, gpa(HOLE, 1)),
        ({(2, 8): HOLE * PAGE | RWU}, 1, address_of(0, 8, 2, 3), READ_PERM, gpa(HOLE, 2)),
        ({(3, 8): HOLE * PAGE | RWU}, 1, address_of(0, 0, 8, 3), WRITE_PERM, gpa(HOLE, 3)),
        ({(3, 8): GONE * PAGE | RWU}, 1, address_of(0, 0, 8, 3), READ_PERM, gpa(GONE, 3)),
    ],
    iommu.IOMMU_FAULT_REASON_PTE_FETCH: [
        *[({(page, 8): 0}, 1, address_of(*[0] * (page - 1), *[8] * (5 - page)), READ_PERM, gpa(page, 8))
          for page in (1, 2, 3, 4)],
        ({(4, 8): 16 * PAGE | WRITE | USER}, 1, address_of(0, 0, 0, 8), READ_PERM, gpa(4, 8)),      # only P is missing
        ({(1, 8): 2 * PAGE | HUGE | RWU}, 1, address_of(8, 0, 0, 16), READ_PERM, gpa(1, 8)),        # reserved bits
        ({(2, 8): 1 << 29 | HUGE | RWU}, 1, address_of(0, 8, 0, 16), READ_PERM, gpa(2, 8)),
        ({(2, 8): 1 << 13 | HUGE | RWU}, 1, address_of(0, 8, 0, 16), READ_PERM, gpa(2, 8)),
        ({(3, 8): 1 << 20 | HUGE | RWU}, 1, address_of(0, 0, 8, 16), READ_PERM, gpa(3, 8)),
        ({(3, 8): 1 << 13 | HUGE | RWU}, 1, address_of(0, 0, 8, 16), READ_PERM, gpa(3, 8)),
        ({(4, 8): HOLE * PAGE | RWU}, 1, address_of(0, 0, 0, 8), READ_PERM, None),      # the page itself
    ],
    iommu.IOMMU_FAULT_REASON_PERMISSION: [
        *[({at: to * PAGE | PRESENT | USER}, 1, 16 * PAGE, WRITE_PERM, gpa(4, 16)) for at, to in WAY],      # read-only
        *[({at: to * PAGE | PRESENT | WRITE}, 1, 16 * PAGE, READ_PERM, gpa(4, 16)) for at, to in WAY],  # a supervisor's
        ({(4, 8): READ_ONLY * PAGE | RWU}, 1, 8 * PAGE, WRITE_PERM, None),      # the second stage's
        ({}, 1, 16 * PAGE, READ_PERM | iommu.IOMMU_FAULT_PERM_PRIV, None),      # supervisors are not allowed
        ({}, 1, 16 * PAGE, WRITE_PERM | iommu.IOMMU_FAULT_PERM_PRIV, None),
    ],
    iommu.IOMMU_FAULT_REASON_ACCESS: [
        ({(3, 8): READ_ONLY * PAGE | RWU, (READ_ONLY, 3): 16 * PAGE | RWU}, 1, address_of(0, 0, 8, 3), READ_PERM,
         gpa(READ_ONLY, 3)),
        ({(3, 8): READ_ONLY * PAGE | RWU, (READ_ONLY, 3): 16 * PAGE | RWU | ACCESSED}, 1, address_of(0, 0, 8, 3),
         WRITE_PERM, gpa(READ_ONLY, 3)),                                # the dirty flag
    ],
    iommu.IOMMU_FAULT_REASON_OOR_ADDRESS: [
        *[({(page, 8): BEYOND | RWU}, 1, address_of(*[0] * (page - 1), *[8] * (5 - page)), READ_PERM, gpa(page, 8))
          for page in (1, 2, 3, 4)],
        *[({}, 1, address, READ_PERM, None) for address in (1 << 47, (1 << 64) - (1 << 48), 1 << 63)],
    ],
    iommu.IOMMU_FAULT_REASON_UNKNOWN: [({(4, 8): GONE * PAGE | RWU}, 1, 8 * PAGE, READ_PERM, None),
                                       ({(4, 8): GONE * PAGE | RWU}, 1, 8 * PAGE, WRITE_PERM, None)],
}


def access(rig, address, pasid, perm):
    privileged = bool(perm & iommu.IOMMU_FAULT_PERM_PRIV)
    if perm & WRITE_PERM:
        rig.port.write(address, b"\0", pasid=pasid, privileged=privileged)
        return None
    return rig.port.read(address, 4, pasid=pasid, privileged=privileged)


def second_stage_with_bad_pages(rig):
    """Map a page that devices can only read, and one whose memory goes away."""
    area = mmap.mmap(-1, PAGE)
    rig.map(READ_ONLY * PAGE, ctypes.addressof(ctypes.c_char.from_buffer(area)), PAGE, flags=1)
    gone = libc.mmap(None, PAGE, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    rig.map(GONE * PAGE, gone, PAGE)
    libc.munmap(gone, PAGE)
    return area


@pytest.mark.parametrize("reason, case", [(reason, case) for reason, cases in CASES.items() for case in cases])
def test_a_fault_has_its_reason_and_says_what_it_knows(rig, reason, case):
    entries, pasid, address, perm, blamed = case
    area = second_stage_with_bad_pages(rig)
    for (page, index), value in entries.items():
        where = index * 8 if page == READ_ONLY else gpa(page, index)
        struct.pack_into("=Q", area if page == READ_ONLY else rig.area, where, value)
    rig.bind()
    fd = rig.vfio.open_fault_queue(rig.device, page_requests=False)
    with pytest.raises(MemoryFaultError):
        access(rig, address, pasid, perm)
    (kind, event), = events(rig, fd)
    assert kind == iommu.IOMMU_FAULT_DMA_UNRECOV
    assert (event["reason"], event["pasid"], event["addr"], event["perm"]) == (reason, pasid, address, perm)
    known = iommu.IOMMU_FAULT_UNRECOV_PASID_VALID | iommu.IOMMU_FAULT_UNRECOV_ADDR_VALID
    assert event["flags"] == known | (0 if blamed is None else iommu.IOMMU_FAULT_UNRECOV_FETCH_ADDR_VALID)
    assert event["fetch_addr"] == (blamed or 0)


def test_a_root_outside_of_the_second_stage_aborts_the_walk(rig):
    rig.bind(gpgd=HOLE * PAGE)
    fd = rig.vfio.open_fault_queue(rig.device)
    assert refused(rig.port.read, address_of(5, 0, 0, 0), 4, pasid=1) == errno.EFAULT
    (_, event), = events(rig, fd)
    assert (event["reason"], event["fetch_addr"]) == (iommu.IOMMU_FAULT_REASON_WALK_EABT, gpa(HOLE, 5))


def test_without_nesting_there_is_no_pasid_table_to_fetch_from():
    rig = Rig(kind=3)
    fd = rig.vfio.open_fault_queue(rig.device)
    assert refused(rig.port.read, 16 * PAGE, 4, pasid=1) == errno.EFAULT
    (kind, event), = events(rig, fd)
    assert (kind, event["reason"]) == (iommu.IOMMU_FAULT_DMA_UNRECOV, iommu.IOMMU_FAULT_REASON_PASID_FETCH)
    RIGS.remove(rig)
    rig.close()


def test_every_reason_of_the_header_is_in_a_test():
    header = {value for name, value in vars(iommu).items() if name.startswith("IOMMU_FAULT_REASON_")}
    assert header == {*CASES, iommu.IOMMU_FAULT_REASON_PASID_FETCH}


def test_tables_that_lead_to_themselves_have_an_end(rig):
    rig.entry(1, 0, PAGE | RWU)                     # one entry on every level, and the page as well
    rig.bind()
    rig.port.write(8, b"\1" * 8, pasid=1)
    assert rig.entry(1, 0) & (ACCESSED | DIRTY) == ACCESSED | DIRTY
    assert rig.entry(1, 1) == int.from_bytes(b"\1" * 8, "little")
    for page, other in itertools.product((1, 2, 3, 4), repeat=2):
        rig.entry(page, 8, other * PAGE | RWU)
        rig.port.read(address_of(8, 8, 8, 8), 4, pasid=1)


# ---- page requests

def answer(rig, fd, group, code, **changes):
    fields = {"argsz": iommu.iommu_page_response.size, "version": iommu.IOMMU_PAGE_RESP_VERSION_1,
              "flags": iommu.IOMMU_PAGE_RESP_PASID_VALID, "pasid": 1, "grpid": group, "code": code, **changes}
    return rig.vfio.write(fd, iommu.iommu_page_response.pack(**fields))


def start(rig, call):
    """Run a call in another thread; what comes of it is in the list."""
    got = []

    def run():
        try:
            got.append(call())
        except MemoryFaultError as exc:
            got.append(exc.errno)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, got


@pytest.mark.parametrize("write", [False, True])
def test_after_success_the_device_tries_again(rig, write):
    rig.bind()
    fd = rig.vfio.open_fault_queue(rig.device)
    rig.entry(4, 8, 0)
    perm = WRITE_PERM if write else READ_PERM
    thread, got = start(rig, lambda: access(rig, 8 * PAGE + 5, 1, perm))
    assert select.select([fd], [], [], 10)[0]
    (kind, request), = events(rig, fd)
    assert kind == iommu.IOMMU_FAULT_PAGE_REQ and (request["addr"], request["perm"]) == (8 * PAGE, perm)
    assert request["flags"] == (iommu.IOMMU_FAULT_PAGE_REQUEST_PASID_VALID | iommu.IOMMU_FAULT_PAGE_REQUEST_LAST_PAGE
                                | iommu.IOMMU_FAULT_PAGE_RESPONSE_NEEDS_PASID)
    rig.entry(4, 8, 16 * PAGE | RWU)
    answer(rig, fd, request["grpid"], iommu.IOMMU_PAGE_RESP_SUCCESS)
    thread.join(10)
    assert got == [None if write else bytes(4)] and not events(rig, fd)


def test_success_without_a_repair_is_asked_again(rig):
    rig.bind()
    fd = rig.vfio.open_fault_queue(rig.device)
    rig.entry(4, 8, 0)
    thread, got = start(rig, lambda: rig.port.read(8 * PAGE, 4, pasid=1))
    for code in (iommu.IOMMU_PAGE_RESP_SUCCESS, iommu.IOMMU_PAGE_RESP_SUCCESS, iommu.IOMMU_PAGE_RESP_INVALID):
        assert select.select([fd], [], [], 10)[0]
        (_, request), = events(rig, fd)
        answer(rig, fd, request["grpid"], code)
    thread.join(10)
    assert got == [errno.EFAULT]


@pytest.mark.parametrize("code, asks_on", [(iommu.IOMMU_PAGE_RESP_INVALID, True),
                                           (iommu.IOMMU_PAGE_RESP_FAILURE, False)])
def test_invalid_ends_the_access_and_failure_the_asking(rig, code, asks_on):
    rig.bind()
    fd = rig.vfio.open_fault_queue(rig.device)
    sink = rig.port.fault_sink
    rig.entry(4, 8, 0)
    thread, got = start(rig, lambda: rig.port.read(8 * PAGE, 4, pasid=1))
    assert select.select([fd], [], [], 10)[0]
    answer(rig, fd, events(rig, fd)[0][1]["grpid"], code)
    thread.join(10)
    (kind, event), = events(rig, fd)
    assert got == [errno.EFAULT]
    assert (kind, event["reason"]) == (iommu.IOMMU_FAULT_DMA_UNRECOV, iommu.IOMMU_FAULT_REASON_PTE_FETCH)
    if asks_on:
        sink.request_pages(1, [PAGE], READ_PERM)
        assert [kind for kind, _ in events(rig, fd)] == [iommu.IOMMU_FAULT_PAGE_REQ]
    else:
        assert refused(sink.request_pages, 1, [PAGE], READ_PERM) == errno.EINVAL and not events(rig, fd)


def test_a_group_of_requests_is_answered_as_one(rig):
    rig.bind()
    fd = rig.vfio.open_fault_queue(rig.device)
    sink = rig.port.fault_sink
    perm = READ_PERM | iommu.IOMMU_FAULT_PERM_EXEC | iommu.IOMMU_FAULT_PERM_PRIV
    group = sink.request_pages(1, [5 * PAGE, 6 * PAGE], perm, (1, 1 << 63))
    requests = [request for _, request in events(rig, fd)]
    assert [request["addr"] for request in requests] == [5 * PAGE, 6 * PAGE]
    assert {(request["grpid"], request["perm"], request["private_data"]) for request in requests} == {
        (group, perm, (1, 1 << 63))}
    assert [bool(request["flags"] & iommu.IOMMU_FAULT_PAGE_REQUEST_LAST_PAGE) for request in requests] == [False, True]
    assert all(request["flags"] & iommu.IOMMU_FAULT_PAGE_REQUEST_PRIV_DATA for request in requests)
    answer(rig, fd, group, iommu.IOMMU_PAGE_RESP_SUCCESS)
    assert sink.answer(group) == iommu.IOMMU_PAGE_RESP_SUCCESS
    plain = sink.request_pages(1, [5 * PAGE], READ_PERM)
    (_, request), = events(rig, fd)
    assert not request["flags"] & iommu.IOMMU_FAULT_PAGE_REQUEST_PRIV_DATA and request["private_data"] == (0, 0)
    assert request["grpid"] == plain


def test_of_an_answer_version_flags_pasid_and_group_count_and_argsz_does_not(rig):
    rig.bind()
    fd = rig.vfio.open_fault_queue(rig.device)
    sink = rig.port.fault_sink
    group = sink.request_pages(1, [PAGE], READ_PERM)
    for wrong in ({"version": iommu.IOMMU_PAGE_RESP_VERSION_1 + 1}, {"version": 0}, {"flags": 0}, {"flags": 2},
                  {"flags": iommu.IOMMU_PAGE_RESP_PASID_VALID | 2}, {"pasid": 0}, {"grpid": group ^ 1},
                  {"grpid": 1 << 31}):
        assert refused(answer, rig, fd, group, iommu.IOMMU_PAGE_RESP_SUCCESS, **wrong) == errno.EINVAL
    assert answer(rig, fd, group, 0xFFFFFFFF, argsz=0) == iommu.iommu_page_response.size     # nor is the code
    assert sink.answer(group) == 0xFFFFFFFF
    assert refused(answer, rig, fd, group, iommu.IOMMU_PAGE_RESP_SUCCESS) == errno.EINVAL


# ---- what a bind asks for

def test_supervisors_need_sre_and_then_see_more_than_users(rig):
    rig.entry(4, 8, 16 * PAGE | PRESENT)            # a supervisor's, read-only
    rig.bind(vtd=iommu.IOMMU_SVA_VTD_GPASID_SRE)
    assert rig.port.read(8 * PAGE, 4, pasid=1, privileged=True) == b"p016"
    rig.port.write(8 * PAGE, b"sup.", pasid=1, privileged=True)         # without write protection of supervisors
    assert refused(rig.port.read, 8 * PAGE, 4, pasid=1) == errno.EFAULT
    assert rig.port.read(16 * PAGE, 4, pasid=1) == rig.port.read(16 * PAGE, 4, pasid=1, privileged=True) == b"sup."
    rig.bind(1)
    rig.bind(vtd=0)
    assert refused(rig.port.read, 16 * PAGE, 4, pasid=1, privileged=True) == errno.EFAULT


def test_eafe_sets_the_extended_accessed_flag_in_every_entry(rig):
    extended = 1 << 10
    rig.bind(vtd=0)
    rig.port.read(16 * PAGE, 4, pasid=1)
    used = [(1, 0), (2, 0), (3, 0), (4, 16)]
    assert not any(rig.entry(*at) & extended for at in used) and all(rig.entry(*at) & ACCESSED for at in used)
    rig.bind(1)
    rig.bind(vtd=iommu.IOMMU_SVA_VTD_GPASID_EAFE)
    rig.port.read(16 * PAGE, 4, pasid=1)
    assert all(rig.entry(*at) & extended for at in used)


@pytest.mark.parametrize("flags", [0, iommu.IOMMU_SVA_GPASID_VAL])
@pytest.mark.parametrize("gpasid", [0, 5, 1 << 20, (1 << 64) - 1])
def test_the_guest_s_own_number_of_a_pasid_means_nothing_here(rig, flags, gpasid):
    assert rig.bind(flags=flags, gpasid=gpasid) == 0
    assert rig.port.read(16 * PAGE, 4, pasid=1) == b"p016"
    if gpasid not in (0, 1):
        assert refused(rig.port.read, 16 * PAGE, 4, pasid=gpasid) == errno.EFAULT


def test_other_flags_of_a_bind_are_refused(rig):
    for bit in range(1, 64):
        assert refused(rig.bind, flags=1 << bit) == errno.EINVAL
    allowed = iommu.IOMMU_SVA_VTD_GPASID_SRE | iommu.IOMMU_SVA_VTD_GPASID_EAFE
    for bit in range(64):
        if not allowed >> bit & 1:
            assert refused(rig.bind, vtd=1 << bit) == errno.EINVAL
    for size in (0, 55, 56, 71):
        assert refused(rig.bind, argsz=size) == errno.EINVAL
    for size in (73, 4096, (1 << 32) - 1):
        assert rig.bind(argsz=size) == 0 and rig.bind(1, argsz=size) == 0       # a later version's


def test_the_operation_is_the_low_half_of_the_flags(rig):
    mask = abi.VFIO_NESTING_OP_MASK
    assert mask == 0xFFFF
    for flags in (*range(3, 40), mask, mask + 1, mask + 1 | abi.VFIO_IOMMU_NESTING_OP_CACHE_INVLD, 1 << 31):
        assert refused(rig.nesting, flags, bytes(72)) == errno.EINVAL
    assert rig.nesting(abi.VFIO_IOMMU_NESTING_OP_UNBIND_PGTBL, bytes(72)) == 0
    assert rig.nesting(abi.VFIO_IOMMU_NESTING_OP_CACHE_INVLD, bytes(56)) == 0
    assert refused(rig.nesting, abi.VFIO_IOMMU_NESTING_OP_BIND_PGTBL, bytes(72)) == errno.EINVAL


# ---- invalidation by PASID and architecture's id

ADDRESS, BY_PASID = iommu.IOMMU_INV_GRANU_ADDR, iommu.IOMMU_INV_GRANU_PASID


@pytest.mark.parametrize("granularity, flags, pasid, drops", [
    (ADDRESS, iommu.IOMMU_INV_ADDR_FLAGS_PASID, 1, True),
    (ADDRESS, iommu.IOMMU_INV_ADDR_FLAGS_PASID | iommu.IOMMU_INV_ADDR_FLAGS_ARCHID, 1, True),
    (ADDRESS, iommu.IOMMU_INV_ADDR_FLAGS_PASID | iommu.IOMMU_INV_ADDR_FLAGS_LEAF, 1, True),
    (ADDRESS, iommu.IOMMU_INV_ADDR_FLAGS_ARCHID, 1, False),         # no PASID counts as 0
    (ADDRESS, iommu.IOMMU_INV_ADDR_FLAGS_PASID, 1 << 20, False),
    (ADDRESS, iommu.IOMMU_INV_ADDR_FLAGS_PASID, 1 << 32 | 1, False),
    (BY_PASID, iommu.IOMMU_INV_PASID_FLAGS_PASID, 1, True),
    (BY_PASID, iommu.IOMMU_INV_PASID_FLAGS_PASID | iommu.IOMMU_INV_PASID_FLAGS_ARCHID, 1, True),
    (BY_PASID, iommu.IOMMU_INV_PASID_FLAGS_ARCHID, 1, False), (BY_PASID, 0, 1, False),
    (BY_PASID, iommu.IOMMU_INV_PASID_FLAGS_PASID, 1 << 20, False),
    (BY_PASID, iommu.IOMMU_INV_PASID_FLAGS_PASID, 1 << 32 | 1, False),
])
def test_an_invalidation_is_of_the_pasid_that_its_flags_make_valid(rig, granularity, flags, pasid, drops):
    rig.bind()
    assert rig.port.read(16 * PAGE, 4, pasid=1) == b"p016"
    rig.entry(4, 16, 20 * PAGE | RWU)
    data = invalidation(granularity=granularity, flags=flags, pasid=pasid, addr=16 * PAGE)
    assert rig.nesting(abi.VFIO_IOMMU_NESTING_OP_CACHE_INVLD, data) == 0
    assert rig.port.read(16 * PAGE, 4, pasid=1) == (b"p020" if drops else b"p016")


def test_execution_counts_as_reading(rig):
    rig.bind()
    path = rig.vfio._groups[0].paths["0000:00:10.0"]
    rig.entry(4, 8, 16 * PAGE | PRESENT | USER)
    for perm, found in ((iommu.IOMMU_FAULT_PERM_EXEC, True), (READ_PERM, True), (WRITE_PERM, False)):
        assert (int(path.translate_many(np.array([8 * PAGE], np.uint64), 1, perm)[0]) != 2**64 - 1) is found
