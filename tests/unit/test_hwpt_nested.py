"""Page tables of guests at the raw door of the software iommufd: allocation, attachment, invalidation, page faults."""
import contextlib
import ctypes
import errno
import mmap
import select
import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_software_iommufd import (
    DESTROY,
    DETACH,
    FAULT_QUEUE,
    GET_DIRTY,
    HW_INFO,
    HWPT_ALLOC,
    INVALIDATE,
    PAGE,
    SET_DIRTY,
    Door,
    port_of,
    refused,
)

from vfiodma import SoftwareGroup
from vfiodma.errors import MemoryFaultError
from vfiodma.uapi import iommufd as abi
from vfiodma.uapi import vfio

DEVICE, SECOND = "0000:00:10.0", "0000:00:11.0"
RWU, ACCESSED, DIRTY = 7, 0x20, 0x40
NEST_PARENT, DIRTY_TRACKING, FAULT_ID_VALID, PASID = 1, 2, 4, 8


class Nested(Door):
    """A guest of 64 pages; its table's root is page 1, virtual page n of 16 ... 31 is page n."""

    def __init__(self, kernel="7.2", timeout=5.0, **group):
        super().__init__(kernel=kernel, groups=[
            SoftwareGroup(0, [DEVICE], **{"nestable": True, "page_request_timeout": timeout, **group}),
            SoftwareGroup(1, [SECOND], dirty_tracking=False, page_request_timeout=None)])
        self.ioas = self.alloc()
        self.node, self.device = self.bind()
        self.area = mmap.mmap(-1, 64 * PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.area))
        self.map(self.ioas, 0, self.address, 64 * PAGE)
        for page in (1, 2, 3):
            self.entry(page, 0, (page + 1) * PAGE | RWU)
        for page in range(16, 32):
            self.entry(4, page, page * PAGE | RWU)
            self.area[page * PAGE:page * PAGE + 4] = b"p%03d" % page
        self.port = port_of(self)

    def entry(self, page, index, value=None):
        if value is not None:
            struct.pack_into("=Q", self.area, page * PAGE + index * 8, value)
        return struct.unpack_from("=Q", self.area, page * PAGE + index * 8)[0]

    def hwpt(self, pt, flags=0, kind=0, data=b"", *, length=None, device=None, queue=0, pointer=None, reserved=(0, 0)):
        buffer = ctypes.create_string_buffer(data, len(data) or 1)
        where = ctypes.addressof(buffer) if pointer is None else pointer
        return self.call(HWPT_ALLOC, "8IQII", 48, flags, self.device if device is None else device, pt, 0, reserved[0],
                         kind, len(data) if length is None else length, where if data or pointer else 0, queue,
                         reserved[1])[4]

    def parent(self, flags=NEST_PARENT):
        return self.hwpt(self.ioas, flags)

    def nested(self, parent, flags=0, *, table=PAGE, width=48, s1=0, queue=0):
        return self.hwpt(parent, flags, 1, s1_data(table, width, s1), queue=queue)

    def invalidate(self, hwpt, entries, kind=0, entry_len=24, n=None, pointer=None, reserved=0):
        """Return (errno or 0, entries done)."""
        data = b"".join(struct.pack("=QQII", *entry) for entry in entries)
        buffer = ctypes.create_string_buffer(data, len(data) or 1)
        where = ctypes.addressof(buffer) if pointer is None else pointer
        args = ctypes.create_string_buffer(struct.pack("=IIQIIII", 32, hwpt, where, kind, entry_len,
                                                       len(entries) if n is None else n, reserved), 32)
        code = 0
        try:
            self.vfio.ioctl(self.fd, INVALIDATE, ctypes.addressof(args))
        except OSError as exc:
            code = exc.errno
        return code, struct.unpack("=IIQIIII", args.raw)[5]

    def queue(self):
        return self.call(FAULT_QUEUE, "4I", 16, 0, 0, 0)[2:]

    def answer(self, fd, *responses):
        return self.vfio.write(fd, b"".join(struct.pack("=II", *response) for response in responses))

    def attach_pasid(self, pasid, number):
        return self.call(vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, "4I", 16, 1, number, pasid, fd=self.node)

    def detach(self, pasid=None):
        if pasid is None:
            self.call(DETACH, "II", 8, 0, fd=self.node)
        else:
            self.call(DETACH, "III", 12, 1, pasid, fd=self.node)


def s1_data(table=PAGE, width=48, flags=0, reserved=0):
    return struct.pack("=QQII", flags, table, width, reserved)


@pytest.fixture(params=["6.12", "7.2"])
def door(request):
    door = Nested(request.param)
    yield door
    for fd in sorted(door.vfio._files, reverse=True):
        door.vfio.close(fd)


@pytest.fixture
def attached(door):
    door.table = door.nested(door.parent())
    door.attach(door.node, door.table)
    return door


def faults(door, fd, n=64):
    raw = door.vfio.read(fd, n * 40)
    return [abi.iommu_hwpt_pgfault.unpack(raw[at:at + 40]) for at in range(0, len(raw), 40)]


def readable(fd):
    return bool(select.select([fd], [], [], 0)[0])


# ---- what there is

def test_the_registers_tell_of_nesting_and_pasids(door):
    def info(device):
        data = ctypes.create_string_buffer(24)
        answer = door.call(HW_INFO, "4IQIIQ", 40, 0, device, 24, ctypes.addressof(data), 0, 0, 0)
        return abi.iommu_hw_info_vtd.unpack(data.raw), answer
    registers, answer = info(door.device)
    assert registers["ecap_reg"] >> 26 & 1 and registers["cap_reg"] >> 56 & 1 and registers["cap_reg"] >> 60 & 1
    newest = door.vfio.kernel == "7.2"
    assert (answer[6] & 0xff, answer[7]) == ((20, 7) if newest else (0, 1))
    registers, answer = info(door.bind(SECOND)[1])
    assert not registers["ecap_reg"] >> 26 & 1 and (answer[6], answer[7]) == (0, 8 if newest else 0)


# ---- HWPT_ALLOC

def test_every_refusal_of_a_nested_table(door):
    parent, plain = door.parent(), door.hwpt(door.ioas)
    nested = door.nested(parent)
    newest = door.vfio.kernel == "7.2"
    _, other = door.bind(SECOND)
    queue, events = door.queue()
    table = s1_data()
    assert len(table) == abi.iommu_hwpt_vtd_s1.size
    for code, call in [
        (errno.EOPNOTSUPP, {"reserved": (1, 0)}), (0, {"reserved": (0, 1)}),
        (errno.EINVAL, {"kind": 0}), (errno.EINVAL, {"length": 0}),
        (errno.ENOENT, {"device": 99}), (errno.ENOENT, {"device": door.ioas}),
        (errno.EINVAL, {"pt": 99}), (errno.EINVAL, {"pt": door.device}), (errno.EINVAL, {"pt": nested}),
        (errno.EINVAL, {"pt": queue}), (errno.EINVAL, {"pt": plain}), (errno.EOPNOTSUPP, {"pt": door.ioas}),
        (errno.EOPNOTSUPP, {"flags": NEST_PARENT}), (errno.EOPNOTSUPP, {"flags": DIRTY_TRACKING}),
        (errno.EOPNOTSUPP, {"flags": 16}), (0 if newest else errno.EOPNOTSUPP, {"flags": PASID}),
        (errno.EOPNOTSUPP, {"kind": 2}), (errno.EOPNOTSUPP, {"kind": 0xDEAD}),
        (errno.EOPNOTSUPP, {"device": other}), (errno.EINVAL, {"device": other, "pt": plain}),
        (errno.EINVAL, {"length": 23}), (errno.EINVAL, {"length": 25}), (errno.EINVAL, {"length": 1 << 31}),
        (errno.EFAULT, {"pointer": 16}), (errno.EFAULT, {"pointer": -1 & 0xFFFFFFFFFFFFFFFF}),
        (errno.ENOENT, {"flags": FAULT_ID_VALID}), (errno.ENOENT, {"flags": FAULT_ID_VALID, "queue": door.ioas}),
        (errno.EFAULT, {"flags": FAULT_ID_VALID, "pointer": 16}),
        (0, {"flags": FAULT_ID_VALID, "queue": queue}), (0, {"queue": 99}),
        # What the structure says is looked at when a device is attached.
        (0, {"data": s1_data(1 << 63, 7, 0xFFFF, 5)}),
    ]:
        wanted = {"pt": parent, "flags": 0, "kind": 1, "data": table, **call}
        pt, flags, kind, data = (wanted.pop(name) for name in ("pt", "flags", "kind", "data"))
        if code:
            refused(code, door.hwpt, pt, flags, kind, data, **wanted)
        else:
            door.call(DESTROY, "II", 8, door.hwpt(pt, flags, kind, data, **wanted))
    refused(errno.EOPNOTSUPP, door.hwpt, parent)
    # Nothing is left behind by what was refused.
    door.vfio.close(events)
    for number in (queue, nested, plain, parent):
        door.call(DESTROY, "II", 8, number)


def test_parents_need_an_iommu_that_nests(door):
    _, other = door.bind(SECOND)
    refused(errno.EOPNOTSUPP, door.hwpt, door.ioas, NEST_PARENT, device=other)
    refused(errno.EOPNOTSUPP, door.hwpt, door.ioas, NEST_PARENT | FAULT_ID_VALID)
    door.hwpt(door.ioas, NEST_PARENT | DIRTY_TRACKING)


def test_an_automatic_table_is_no_parent(door):
    automatic = door.attach(door.node, door.ioas)
    refused(errno.EINVAL, door.nested, automatic)


def test_users_keep_objects_alive(door):
    queue, fd = door.queue()
    parent = door.parent()
    nested = door.nested(parent, FAULT_ID_VALID, queue=queue)
    refused(errno.EBUSY, door.call, DESTROY, "II", 8, parent)
    door.vfio.close(fd)
    refused(errno.EBUSY, door.call, DESTROY, "II", 8, queue)
    door.attach(door.node, nested)
    refused(errno.EBUSY, door.call, DESTROY, "II", 8, nested)
    door.detach()
    for number in (nested, parent, queue):
        door.call(DESTROY, "II", 8, number)
        refused(errno.ENOENT, door.call, DESTROY, "II", 8, number)


def test_a_nested_table_has_no_dirty_bits_of_its_own(door):
    nested = door.nested(door.parent(NEST_PARENT | DIRTY_TRACKING))
    refused(errno.ENOENT, door.call, SET_DIRTY, "IIII", 16, 1, nested, 0)


def test_an_id_that_cannot_be_told_was_never_given(door):
    parent = door.parent()
    memory = mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    table = ctypes.create_string_buffer(s1_data(), 24)
    memory[:48] = struct.pack("=8IQII", 48, 0, door.device, parent, 0, 0, 1, 24, ctypes.addressof(table), 0, 0)
    assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), PAGE, mmap.PROT_READ)
    refused(errno.EFAULT, door.vfio.ioctl, door.fd, HWPT_ALLOC, address)
    door.call(DESTROY, "II", 8, parent)


# ---- attaching

@pytest.mark.parametrize("bad", [{"width": 39}, {"width": 0}, {"width": 64}])
def test_a_wrong_width_shows_when_a_device_is_attached(door, bad):
    parent = door.parent()
    nested = door.nested(parent, **bad)
    refused(errno.EINVAL, door.attach, door.node, nested)
    door.attach(door.node, parent)
    refused(errno.EINVAL, door.attach, door.node, nested)
    assert door.port.read(16 * PAGE, 4) == b"p016"          # it stayed where it was
    door.attach(door.node, door.nested(parent, s1=7))
    assert door.port.read(16 * PAGE, 4) == b"p016"


def test_a_table_with_a_fault_queue_needs_a_device_that_asks_for_pages(door):
    queue, _ = door.queue()
    mute = Nested(door.vfio.kernel, timeout=None)
    number, _ = mute.queue()
    refused(errno.ENODEV, mute.attach, mute.node, mute.nested(mute.parent(), FAULT_ID_VALID, queue=number))
    door.attach(door.node, door.nested(door.parent(), FAULT_ID_VALID, queue=queue))


def test_another_iommu_can_not_walk_it(door):
    node, _ = door.bind(SECOND)
    refused(errno.EINVAL, door.attach, node, door.nested(door.parent(NEST_PARENT | DIRTY_TRACKING)))
    refused(errno.EINVAL, door.attach, node, door.nested(door.parent()))


def test_dma_goes_through_both_stages(attached):
    assert attached.port.read(17 * PAGE - 2, 6) == b"\0\0p017"
    attached.port.write(20 * PAGE, b"dma!")
    assert attached.area[20 * PAGE:20 * PAGE + 4] == b"dma!"
    for page in (1, 2, 3):
        assert attached.entry(page, 0) & (ACCESSED | DIRTY) == ACCESSED
    assert attached.entry(4, 20) & DIRTY and not attached.entry(4, 17) & DIRTY
    for address in (PAGE, 40 * PAGE, 1 << 47):
        with pytest.raises(MemoryFaultError):
            attached.port.read(address, 1)
    with pytest.raises(MemoryFaultError):                   # supervisor requests need SRE
        attached.port.read(16 * PAGE, 1, privileged=True)
    attached.attach(attached.node, attached.ioas)           # replaced: the guest's table counts no more
    assert attached.port.read(PAGE, 8) == struct.pack("=Q", attached.entry(1, 0))
    attached.detach()
    with pytest.raises(MemoryFaultError):
        attached.port.read(16 * PAGE, 1)


def test_rows_go_through_both_stages(attached):
    import numpy as np
    where = np.array([16, 1, 18], np.uint64) * PAGE
    assert attached.port.write_many(where, np.full((3, 4), ord("w"), np.uint8)) == 1
    assert attached.area[18 * PAGE:18 * PAGE + 4] == b"wwww" == attached.area[16 * PAGE:16 * PAGE + 4]


def test_five_levels_and_a_second_stage_with_holes(door):
    door.entry(5, 3, PAGE | RWU)
    table = door.nested(door.parent(), table=5 * PAGE, width=57)
    door.attach(door.node, table)
    assert door.port.read(3 << 48 | 18 * PAGE, 4) == b"p018"
    door.entry(4, 40, 100 * PAGE | RWU)                     # beyond what the parent maps
    with pytest.raises(MemoryFaultError):
        door.port.read(3 << 48 | 40 * PAGE, 4)
    door.unmap(door.ioas, 0, 64 * PAGE)
    with pytest.raises(MemoryFaultError):
        door.port.read(3 << 48 | 18 * PAGE, 4)


def test_a_table_in_memory_that_devices_only_write_is_not_walked_from_7_2(door):
    tables = mmap.mmap(-1, 4 * PAGE)
    door.map(door.ioas, 1 << 30, ctypes.addressof(ctypes.c_char.from_buffer(tables)), 4 * PAGE, flags=3)
    for page in range(3):
        struct.pack_into("=Q", tables, page * PAGE, (1 << 30) + (page + 1) * PAGE | RWU)
    struct.pack_into("=Q", tables, 3 * PAGE + 16 * 8, 16 * PAGE | RWU)
    door.attach(door.node, door.nested(door.parent(), table=1 << 30))
    if door.vfio.kernel == "6.12":      # every entry of its second stage is readable
        assert door.port.read(16 * PAGE, 4) == b"p016"
        return
    with pytest.raises(MemoryFaultError, match="walk aborted"):
        door.port.read(16 * PAGE, 4)
    assert not any(struct.unpack_from("=Q", tables, page * PAGE)[0] & ACCESSED for page in range(3))


def test_the_parent_notes_what_is_written_through_the_guests_table(door):
    parent = door.parent(NEST_PARENT | DIRTY_TRACKING)
    door.call(SET_DIRTY, "IIII", 16, 1, parent, 0)
    door.attach(door.node, door.nested(parent))
    door.entry(4, 16, 21 * PAGE | RWU)
    door.port.write(16 * PAGE, b"x")
    words = ctypes.c_uint64()
    door.call(GET_DIRTY, "IIIIQQQQ", 48, parent, 0, 0, 0, 64 * PAGE, PAGE, ctypes.addressof(words))
    # Page 21, and the tables whose accessed and dirty flags the walk has set.
    assert words.value == 1 << 21 | 0b11110


# ---- HWPT_INVALIDATE

def test_a_translation_stays_until_it_is_invalidated(attached):
    door = attached
    for page in range(16, 32):
        door.port.read(page * PAGE, 4)
        door.entry(4, page, (page ^ 1) * PAGE | RWU)
    assert door.invalidate(door.table, [(19 * PAGE, 6, 1, 0), (30 * PAGE, 0, 0, 0)]) == (0, 2)
    fresh = [page for page in range(16, 32) if door.port.read(page * PAGE, 4) == b"p%03d" % (page ^ 1)]
    assert fresh == [19, 20, 21, 22, 23, 24]
    assert door.vfio._files[door.fd].context.cached(door.table)[0] == 16
    assert door.invalidate(door.table, [(0, 2**64 - 1, 0, 0)]) == (0, 1)
    assert door.port.read(16 * PAGE, 4) == b"p017"
    door.entry(4, 16, 20 * PAGE | RWU)
    door.detach()
    door.attach(door.node, door.table)                      # nothing is kept for a device that is gone
    assert door.port.read(16 * PAGE, 4) == b"p020"


def test_every_refusal_of_an_invalidation(attached):
    door, good = attached, (16 * PAGE, 1, 0, 0)
    parent = next(number for number in range(1, 9) if number not in (door.ioas, door.device, door.table))
    everything = 2**64 - 1
    for answer, entries, call in [
        ((0, 0), [], {}), ((0, 0), [], {"entry_len": 0}), ((0, 0), [], {"entry_len": 7}),
        ((errno.EOPNOTSUPP, 0), [good], {"reserved": 1}),
        ((errno.EINVAL, 0), [good], {"pointer": 0}), ((errno.EINVAL, 0), [good], {"entry_len": 0}),
        ((errno.EINVAL, 0), [good], {"entry_len": 23}), ((errno.EINVAL, 0), [good], {"entry_len": 25}),
        ((errno.EINVAL, 0), [good], {"entry_len": PAGE + 1}), ((errno.EINVAL, 0), [good], {"n": (1 << 19) + 1}),
        ((errno.EINVAL, 0), [], {"kind": 1}), ((errno.EINVAL, 0), [good], {"kind": 0xDEADBEEF}),
        ((errno.EFAULT, 0), [good], {"pointer": 16}),
        ((errno.EOPNOTSUPP, 1), [good, (16 * PAGE, 1, 2, 0), good], {}),
        ((errno.EOPNOTSUPP, 2), [good, good, (16 * PAGE, 1, 0, 9)], {}),
        ((errno.EINVAL, 1), [good, (16 * PAGE + 8, 1, 0, 0)], {}), ((errno.EINVAL, 0), [(PAGE, everything, 0, 0)], {}),
        ((0, 3), [(0, everything, 1, 0), (1 << 56, 1 << 50, 0, 0), (2**64 - PAGE, 1, 0, 0)], {}),
        ((0, 1), [(PAGE, everything - 1, 0, 0)], {}),
    ]:
        assert door.invalidate(door.table, entries, **call) == answer, (entries, call)
    other = errno.EINVAL if door.vfio.kernel == "7.2" else errno.ENOENT
    for number in (parent, door.ioas, door.device):
        assert door.invalidate(number, [good]) == (other, 0)
    assert door.invalidate(99, [good]) == (errno.ENOENT, 0)


def test_an_array_that_ends_in_a_hole_is_done_up_to_there(attached):
    memory = mmap.mmap(-1, 2 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + PAGE), PAGE, 0)
    assert attached.invalidate(attached.table, [], n=5, pointer=address + PAGE - 50) == (errno.EFAULT, 2)


# ---- page faults

class Access(threading.Thread):
    """A read of a device in a thread of its own."""

    def __init__(self, door, address=PAGE, pasid=None):
        super().__init__()
        self.door, self.address, self.pasid, self.got = door, address, pasid, None
        self.start()

    def run(self):
        try:
            self.got = self.door.port.read(self.address, 4, pasid=self.pasid)
        except MemoryFaultError:
            self.got = "fault"

    def result(self):
        self.join(10)
        return self.got


@pytest.fixture
def asking(door):
    door.number, door.events = door.queue()
    door.table = door.nested(door.parent(), FAULT_ID_VALID, queue=door.number)
    door.attach(door.node, door.table)
    return door


def wait_readable(fd):
    assert select.select([fd], [], [], 10)[0]


def test_a_missing_page_is_asked_for_and_the_access_goes_on(asking):
    assert not readable(asking.events) and select.select([], [asking.events], [], 0)[1]
    access = Access(asking)
    wait_readable(asking.events)
    fault, = faults(asking, asking.events)
    assert fault == {"flags": 2, "dev_id": asking.device, "pasid": 0, "grpid": fault["grpid"], "perm": 1,
                     "__reserved": 0, "addr": PAGE, "length": 0, "cookie": 1}
    assert not readable(asking.events)
    asking.entry(4, 1, 20 * PAGE | RWU)
    assert asking.answer(asking.events, (1, 0)) == 8
    assert access.result() == b"p020"


def test_an_invalid_page_is_a_fault(asking):
    access = Access(asking)
    wait_readable(asking.events)
    assert faults(asking, asking.events)[0]["cookie"] == 1
    refused(errno.EINVAL, asking.answer, asking.events, (1, 2))         # FAILURE is no code of iommufd
    assert asking.answer(asking.events, (1, 1)) == 8
    assert access.result() == "fault"
    refused(errno.EINVAL, asking.answer, asking.events, (1, 0))


def test_cookies_are_the_lowest_free_numbers_and_a_bad_answer_stops(asking):
    accesses = []
    for page in (1, 2, 3):
        accesses.append(Access(asking, page * PAGE))
        wait_readable(asking.events)
        assert [fault["cookie"] for fault in faults(asking, asking.events)] == [page]
    assert asking.answer(asking.events, (2, 1), (9, 0), (1, 0)) == 8
    assert accesses[1].result() == "fault"
    accesses.append(Access(asking, 5 * PAGE))
    wait_readable(asking.events)
    assert faults(asking, asking.events)[0]["cookie"] == 2
    assert asking.answer(asking.events, (3, 1), (1, 1), (2, 1)) == 24
    assert [access.result() for access in accesses] == ["fault"] * 4


def test_an_answer_with_cookie_0_makes_it_a_cookie(asking):
    for expected in (1, 0):
        refused(errno.EINVAL, asking.answer, asking.events, (0, 0))
        access = Access(asking)
        wait_readable(asking.events)
        assert faults(asking, asking.events)[0]["cookie"] == expected
        asking.answer(asking.events, (expected, 1))
        assert access.result() == "fault"


def test_sizes_that_are_no_multiples(asking):
    for size in (1, 20, 41, 79):
        refused(errno.ESPIPE, asking.vfio.read, asking.events, size)
    for size in (1, 7, 9):
        refused(errno.ESPIPE, asking.vfio.write, asking.events, bytes(size))
    assert asking.vfio.read(asking.events, 0) == b"" and asking.vfio.write(asking.events, b"") == 0


def test_a_group_is_delivered_whole(asking):
    requester = asking.port.fault_sink
    group = threading.Thread(target=requester.request_pages, args=(0, [PAGE, 2 * PAGE, 3 * PAGE], 2))
    group.start()
    wait_readable(asking.events)
    for size in (0, 80):
        refused(errno.EINVAL, asking.vfio.read, asking.events, size)
    found = faults(asking, asking.events)
    assert [(fault["flags"], fault["addr"], fault["cookie"]) for fault in found] == [
        (0, PAGE, 1), (0, 2 * PAGE, 1), (2, 3 * PAGE, 1)]
    asking.answer(asking.events, (1, 0))
    group.join()


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("how", ["detach", "replace", "close"])
def test_a_device_that_leaves_gets_invalid(asking, how, read):
    access = Access(asking)
    wait_readable(asking.events)
    if read:
        assert len(faults(asking, asking.events)) == 1
    if how == "detach":
        asking.detach()
    elif how == "replace":
        asking.attach(asking.node, asking.parent())
    else:
        asking.vfio.close(asking.node)
    assert access.result() == "fault"
    assert not readable(asking.events)
    refused(errno.EINVAL, asking.answer, asking.events, (1, 0))


def test_time_is_up_but_the_answer_is_taken():
    door = Nested(timeout=0.05)
    number, fd = door.queue()
    door.attach(door.node, door.nested(door.parent(), FAULT_ID_VALID, queue=number))
    assert Access(door).result() == "fault"
    assert readable(fd) and faults(door, fd)[0]["cookie"] == 1
    assert door.answer(fd, (1, 0)) == 8


def test_nobody_reads_a_queue_whose_descriptor_is_closed():
    door = Nested(timeout=0.05)
    number, fd = door.queue()
    door.attach(door.node, door.nested(door.parent(), FAULT_ID_VALID, queue=number))
    door.vfio.close(fd)
    assert Access(door).result() == "fault"
    refused(errno.EBUSY, door.call, DESTROY, "II", 8, number)


def test_a_table_of_the_hardware_can_have_a_queue_from_7_2():
    door = Nested()
    number, fd = door.queue()
    door.attach(door.node, door.hwpt(door.ioas, FAULT_ID_VALID, queue=number))
    access = Access(door, 200 * PAGE)
    wait_readable(fd)
    fault, = faults(door, fd)
    assert fault["addr"] == 200 * PAGE
    door.map(door.ioas, 200 * PAGE, door.address + 16 * PAGE, PAGE)
    door.answer(fd, (fault["cookie"], 0))
    assert access.result() == b"p016"


# ---- PASIDs

def test_pasids_have_tables_of_their_own():
    door = Nested()
    parent = door.parent()
    number, fd = door.queue()
    table = door.nested(parent, PASID | FAULT_ID_VALID, queue=number)
    plain = door.nested(parent)
    refused(errno.EINVAL, door.attach_pasid, 5, plain)
    refused(errno.EINVAL, door.attach_pasid, 5, door.ioas)
    refused(errno.ENOENT, door.attach_pasid, 5, 99)
    refused(errno.EINVAL, door.attach_pasid, 1 << 20, table)
    refused(errno.EINVAL, door.attach_pasid, 0, table)
    refused(errno.ENOSPC, door.attach_pasid, 1 << 31, table)
    door.attach_pasid(5, table)
    assert door.port.read(16 * PAGE, 4, pasid=5) == b"p016"
    for pasid in (None, 6, 1 << 20):
        with pytest.raises(MemoryFaultError):
            door.port.read(16 * PAGE, 4, pasid=pasid)
    refused(errno.EBUSY, door.call, DESTROY, "II", 8, table)
    refused(errno.EINVAL, door.attach, door.node, plain)    # one without PASIDs beside one with them
    door.attach(door.node, door.hwpt(door.ioas, PASID))
    assert door.port.read(PAGE, 8) == struct.pack("=Q", door.entry(1, 0))

    access = Access(door, pasid=5)
    wait_readable(fd)
    fault, = faults(door, fd)
    assert (fault["flags"], fault["pasid"], fault["addr"]) == (3, 5, PAGE)
    door.entry(4, 1, 21 * PAGE | RWU)
    door.answer(fd, (1, 0))
    assert access.result() == b"p021"

    access = Access(door, 2 * PAGE, pasid=5)
    wait_readable(fd)
    door.detach(5)
    assert access.result() == "fault"
    door.detach(5)
    door.call(DESTROY, "II", 8, table)
    door.detach()
    refused(errno.EBUSY, door.call, DESTROY, "II", 8, parent)
    door.attach_pasid(7, door.nested(parent, PASID))
    door.vfio.close(door.node)                              # goes with its PASIDs
    door.call(DESTROY, "II", 8, plain)


def test_devices_go_on_while_tables_change_under_them():
    door = Nested()
    parent = door.parent()
    tables = [parent, door.nested(parent), door.nested(parent, s1=3)]
    door.attach(door.node, parent)
    failures, done = [], threading.Event()
    door.entry(4, 16, 16 * PAGE | RWU)

    def hammer(number):
        try:
            while not done.is_set():
                # Page 16 is page 16 in every table; there is no moment without one.
                assert door.port.read(16 * PAGE, 4) == b"p016"
                door.port.write((20 + number) * PAGE, b"w" * 5000)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for i in range(150):
        door.attach(door.node, tables[i % 3])
        door.invalidate(tables[1 + i % 2], [(16 * PAGE, i % 9, 0, 0)])
        extra = door.nested(parent)
        if i % 5 == 0:
            door.attach(door.node, extra)
            door.attach(door.node, parent)
        door.call(DESTROY, "II", 8, extra)
    done.set()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_wide_invalidations_are_bounded(attached):
    attached.port.read(16 * PAGE, 4)
    assert attached.invalidate(attached.table, [(1 << 40, 257, 0, 0)] * 60) == (0, 60)
    assert attached.vfio._files[attached.fd].context.cached(attached.table)[0] == 1
    assert attached.invalidate(attached.table, [(1 << 40, 257, 0, 0)] * 70) == (0, 70)
    assert attached.vfio._files[attached.fd].context.cached(attached.table)[0] == 0


def test_mediated_devices_have_none():
    door = Door(kernel="7.2", groups=[SoftwareGroup(0, [DEVICE], emulated=True)])
    node, _ = door.bind()
    ioas = door.alloc()
    for pasid in (1, 1 << 31):
        refused(errno.EOPNOTSUPP, door.call, vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, "4I", 16, 1, ioas, pasid, fd=node)
        refused(errno.EOPNOTSUPP, door.call, DETACH, "III", 12, 1, pasid, fd=node)


def test_an_iommufd_that_is_closed_with_everything_in_use_frees_it():
    door = Nested()
    queue, _ = door.queue()
    door.attach(door.node, door.hwpt(door.ioas, FAULT_ID_VALID, queue=queue))
    door.nested(door.parent(), FAULT_ID_VALID, queue=queue)
    for fd in sorted(door.vfio._files):
        door.vfio.close(fd)


def test_a_time_is_a_number_of_seconds():
    with pytest.raises(ValueError):
        SoftwareGroup(0, [DEVICE], page_request_timeout=-1)


# ---- bad input

words = st.one_of(st.sampled_from([0, 1, 2, 3, 4, 5, 24, 48, 57, 0xDEAD, 1 << 19]), st.integers(0, (1 << 32) - 1))
structures = st.one_of(
    st.tuples(st.just(HWPT_ALLOC), st.lists(words, min_size=11, max_size=11)),
    st.tuples(st.just(INVALIDATE), st.lists(words, min_size=7, max_size=7)),
    st.tuples(st.just(FAULT_QUEUE), st.lists(words, min_size=3, max_size=3)),
    st.tuples(st.just(DESTROY), st.lists(words, min_size=1, max_size=1)))


@given(calls=st.lists(structures, max_size=25), answers=st.binary(max_size=64), sizes=st.lists(st.integers(0, 200)),
       page=st.binary(min_size=64, max_size=64))
def test_random_structures_and_tables_are_refused_or_done(calls, answers, sizes, page):
    door = Nested(timeout=0.0)
    queue, fd = door.queue()
    table = door.nested(door.parent(), FAULT_ID_VALID, queue=queue)
    door.attach(door.node, table)
    data = ctypes.create_string_buffer(256)
    for request, values in calls:
        values = list(values)
        if request == HWPT_ALLOC:
            values[7:9] = struct.unpack("=II", struct.pack("=Q", ctypes.addressof(data)))
        if request == INVALIDATE:
            values[1:3] = struct.unpack("=II", struct.pack("=Q", ctypes.addressof(data)))
            values[5] %= 10
        try:
            door.call(request, f"{len(values) + 1}I", 4 * len(values) + 4, *values)
        except OSError as exc:
            assert exc.errno in errno.errorcode
    door.area[4 * PAGE + 16 * 8:4 * PAGE + 24 * 8] = page
    for number in range(14, 26):
        with contextlib.suppress(MemoryFaultError):
            door.port.write(number * PAGE, b"x", pasid=None)
    for size in sizes:
        with contextlib.suppress(OSError):
            assert len(door.vfio.read(fd, size)) <= size
    with contextlib.suppress(OSError):
        door.vfio.write(fd, answers)
    for fd in sorted(door.vfio._files, reverse=True):
        door.vfio.close(fd)
