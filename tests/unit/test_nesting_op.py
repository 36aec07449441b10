"""NESTING_OP of the vSVA series at the raw door: the capability, every errno and its order, binding, stale data."""
import ctypes
import errno
import mmap
import struct

import pytest

from vfiodma import SoftwareGroup, SoftwareVfio
from vfiodma.errors import MemoryFaultError, VfioError
from vfiodma.uapi import iommu
from vfiodma.uapi import vfio as abi

PAGE = 4096
PRESENT, WRITE, USER, ACCESSED, DIRTY = 1, 2, 4, 0x20, 0x40
RWU = PRESENT | WRITE | USER
DEVICE = "0000:00:10.0"
RIGS = []


@pytest.fixture(autouse=True)
def close_rigs():
    yield
    while RIGS:
        RIGS.pop().close()


class Rig:
    """A nesting container whose guest memory is [0, 64 pages), with the table of PASID 1's root in page 1."""

    def __init__(self, kernel="vsva", kind=6, groups=None, name=DEVICE):
        RIGS.append(self)
        self.vfio = SoftwareVfio(kernel, groups or [SoftwareGroup(0, [DEVICE], nestable=True)], memlock_limit=None)
        self.fd = self.vfio.open("/dev/vfio/vfio")
        self.group = self.vfio.open("/dev/vfio/0")
        self.set_container(self.group)
        self.vfio.ioctl(self.fd, abi.VFIO_SET_IOMMU, kind)
        text = ctypes.create_string_buffer(name.encode())
        self.device = self.vfio.ioctl(self.group, abi.VFIO_GROUP_GET_DEVICE_FD, ctypes.addressof(text))
        self.area = mmap.mmap(-1, 64 * PAGE)
        self.vaddr = ctypes.addressof(ctypes.c_char.from_buffer(self.area))
        self.map(0, self.vaddr, 64 * PAGE)
        self.port = self.vfio._groups[0].ports[name]

    def close(self):
        for fd in sorted(self.vfio._files, reverse=True):
            self.vfio.close(fd)

    def set_container(self, group):
        number = ctypes.c_int(self.fd)
        self.vfio.ioctl(group, abi.VFIO_GROUP_SET_CONTAINER, ctypes.addressof(number))

    def map(self, iova, vaddr, size, flags=3):
        self.call(abi.VFIO_IOMMU_MAP_DMA, struct.pack("=IIQQQ", 32, flags, vaddr, iova, size))

    def call(self, request, data):
        buffer = ctypes.create_string_buffer(data, len(data))
        result = self.vfio.ioctl(self.fd, request, ctypes.addressof(buffer))
        return result, buffer.raw

    def nesting(self, op, data, argsz=8):
        return self.call(abi.VFIO_IOMMU_NESTING_OP, struct.pack("=II", argsz, op) + data)[0]

    def bind(self, op=0, vtd=0, **changes):
        fields = {"argsz": 72, "version": 1, "format": 1, "addr_width": 48, "gpgd": PAGE, "hpasid": 1, **changes}
        data = iommu.iommu_gpasid_bind_data.pack(**fields)[:56]
        return self.nesting(op, data + iommu.iommu_gpasid_bind_data_vtd.pack(flags=vtd))

    def invalidate(self, **changes):
        return self.nesting(2, invalidation(**changes))

    def entry(self, page, index, value=None):
        if value is not None:
            struct.pack_into("=Q", self.area, page * PAGE + index * 8, value)
        return struct.unpack_from("=Q", self.area, page * PAGE + index * 8)[0]

    def tables(self):
        """Page 1 -> 2 -> 3 -> 4; virtual page n of 16 ... 31 is guest page n."""
        for page in (1, 2, 3):
            self.entry(page, 0, (page + 1) * PAGE | RWU)
        for page in range(16, 32):
            self.entry(4, page, page * PAGE | RWU)
            self.area[page * PAGE:page * PAGE + 4] = b"p%03d" % page


def invalidation(cache=1, granularity=2, version=1, argsz=56, padding=bytes(6), *, flags=1, pasid=1, addr=0,
                 size=PAGE, n=1):
    body = struct.pack("=IIQ", flags, 0, pasid) + bytes(24) if granularity == 1 else struct.pack(
        "=IIQQQQ", flags, 0, pasid, addr, size, n)
    return struct.pack("=IIBB", argsz, version, cache, granularity) + padding + body


@pytest.fixture
def rig():
    rig = Rig()
    rig.tables()
    assert rig.vfio.pasids.allocate() == 1
    return rig


def refused(call, *args, **kwargs):
    with pytest.raises(VfioError) as caught:
        call(*args, **kwargs)
    return caught.value.errno


@pytest.mark.parametrize("kernel", ["5.4", "5.12", "6.1", "6.12", "7.2"])
def test_mainline_has_no_nesting_op(kernel):
    rig = Rig(kernel, 3)
    assert refused(rig.bind) == errno.ENOTTY


def test_an_ordinary_container_of_the_series_has_the_ioctl_but_no_nesting():
    rig = Rig(kind=3)
    assert refused(rig.bind) == errno.EOPNOTSUPP
    assert refused(rig.nesting, 3, b"") == errno.EINVAL
    assert refused(rig.nesting, 0, b"", argsz=7) == errno.EINVAL
    assert refused(rig.nesting, 0x10000, b"") == errno.EINVAL
    assert refused(rig.vfio.ioctl, rig.fd, abi.VFIO_IOMMU_NESTING_OP, 0) == errno.EFAULT


def test_get_info_has_the_capability_last(rig):
    _, raw = rig.call(abi.VFIO_IOMMU_GET_INFO, struct.pack("=IIQII", 4096, 0, 0, 0, 0) + bytes(4072))
    found, at = {}, abi.vfio_iommu_type1_info.unpack(raw[:24])["cap_offset"]
    while at:
        number, version, following = struct.unpack_from("=HHI", raw, at)
        found[number] = version, at
        at = following
    assert list(found) == [2, 3, 1, 4]
    offset = found[4][1]
    assert found[4][0] == 1 and offset == 68 + 16 + 16 * 2
    info = iommu.iommu_nesting_info.unpack(raw[offset + 8:offset + 72])
    assert (info["argsz"], info["flags"], info["format"], info["features"]) == (64, 0, 1, 3)
    assert (info["addr_width"], info["pasid_bits"]) == (39, 20)
    vtd = iommu.iommu_nesting_info_vtd.unpack(raw[offset + 40:offset + 72])
    assert vtd["cap_reg"] & ~(1 << 56 | 1 << 60) == 0
    assert vtd["ecap_reg"] & ~(1 << 29 | 1 << 30 | 1 << 31 | 1 << 34 | 1 << 40) == 0
    # too short for it: only the size that is needed
    _, raw = rig.call(abi.VFIO_IOMMU_GET_INFO, struct.pack("=IIQII", offset + 71, 0, 0, 0, 0))
    assert struct.unpack_from("=I", raw)[0] == offset + 72 and struct.unpack_from("=I", raw, 16)[0] == 0


def test_a_nesting_container_takes_one_group():
    rig = Rig(groups=[SoftwareGroup(0, [DEVICE], nestable=True), SoftwareGroup(1, ["0000:00:11.0"], nestable=True)])
    assert refused(rig.set_container, rig.vfio.open("/dev/vfio/1")) == errno.EINVAL


@pytest.mark.parametrize("changes, code", [
    ({"argsz": 55}, errno.EINVAL), ({"argsz": 71}, errno.EINVAL), ({"version": 0}, errno.EINVAL),
    ({"version": 2}, errno.EINVAL),
    ({"format": 2}, errno.EINVAL), ({"format": 0}, errno.EINVAL), ({"flags": 2}, errno.EINVAL),
    ({"padding": b"\0\0\0\1\0\0\0\0"}, errno.EINVAL),
    ({"vtd": 64}, errno.EINVAL), ({"hpasid": 0}, errno.EINVAL), ({"hpasid": 1 << 20}, errno.EINVAL),
    ({"hpasid": 1 << 40 | 1}, errno.EINVAL), ({"hpasid": 2}, errno.ENOENT),
    ({"hpasid": 2, "addr_width": 3}, errno.ENOENT),
    ({"addr_width": 39}, errno.EINVAL), ({"gpgd": 1 << 39}, errno.EINVAL),
    *[({"vtd": bit}, errno.EINVAL) for bit in (4, 8, 16, 32)],
])
def test_bind_refuses(rig, changes, code):
    assert refused(rig.bind, **changes) == code
    assert rig.bind() == 0


def test_bind_reads_as_far_as_argsz_says(rig):
    page = mmap.mmap(-1, 2 * PAGE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(page)) + 2 * PAGE
    data = struct.pack("=II", 8, 0) + iommu.iommu_gpasid_bind_data.pack(argsz=72, version=1, format=1, hpasid=1)[:56]
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(end - PAGE), ctypes.c_size_t(PAGE), 0) == 0
    where = end - PAGE - 64
    ctypes.memmove(where, data, 64)
    assert refused(rig.vfio.ioctl, rig.fd, abi.VFIO_IOMMU_NESTING_OP, where) == errno.EFAULT
    ctypes.memmove(where + 8, struct.pack("=I", 56), 4)
    assert refused(rig.vfio.ioctl, rig.fd, abi.VFIO_IOMMU_NESTING_OP, where) == errno.EINVAL    # too short for VT-d


def test_a_double_bind_is_busy_and_takes_the_first_table_away(rig):
    rig.bind()
    assert rig.port.read(16 * PAGE, 4, pasid=1) == b"p016"
    assert refused(rig.bind, gpgd=2 * PAGE) == errno.EBUSY
    with pytest.raises(MemoryFaultError, match="PASID has no table"):
        rig.port.read(16 * PAGE, 4, pasid=1)
    assert rig.bind() == 0


def test_unbind_and_invalidate_return_0_whatever_they_get(rig):
    rig.bind()
    for op in (1, 2):
        assert rig.nesting(op, b"\xff" * 72) == 0 and rig.nesting(op, bytes(72)) == 0
    assert rig.bind(1, hpasid=7) == 0
    assert rig.port.read(16 * PAGE, 4, pasid=1) == b"p016"      # still bound
    assert rig.bind(1) == 0
    assert refused(rig.port.read, 16 * PAGE, 4, pasid=1) == errno.EFAULT


def test_dma_goes_through_both_stages_and_sets_accessed_and_dirty(rig):
    rig.bind()
    rig.entry(4, 17, 40 * PAGE | RWU)
    rig.area[40 * PAGE:40 * PAGE + 4] = b"over"
    assert rig.port.read(16 * PAGE + 4094, 6, pasid=1)[2:] == b"over"
    assert rig.entry(1, 0) & ACCESSED and rig.entry(4, 17) & (ACCESSED | DIRTY) == ACCESSED
    rig.port.write(17 * PAGE + 8, b"written", pasid=1)
    assert rig.area[40 * PAGE + 8:40 * PAGE + 15] == b"written" and rig.entry(4, 17) & DIRTY
    assert rig.port.read(40 * PAGE + 8, 7) == b"written"        # without PASID: the second stage alone


STALE, FRESH = b"p016", b"p020"


@pytest.mark.parametrize("fields, seen", [
    ({"addr": 16 * PAGE}, FRESH), ({"addr": 17 * PAGE}, STALE), ({"addr": 16 * PAGE, "pasid": 2}, STALE),
    ({"addr": 16 * PAGE, "flags": 0}, STALE), ({"addr": 16 * PAGE, "flags": 5}, FRESH),
    ({"addr": 19 * PAGE, "n": 3}, FRESH), ({"addr": 20 * PAGE, "n": 4}, STALE), ({"addr": 0, "size": 2 << 20}, FRESH),
    ({"addr": 16 * PAGE, "flags": 8}, STALE), ({"addr": 16 * PAGE, "cache": 4}, STALE),
    ({"addr": 16 * PAGE, "cache": 5}, STALE),
    ({"addr": 16 * PAGE, "cache": 2}, STALE), ({"addr": 16 * PAGE, "cache": 3}, FRESH),
    ({"addr": 16 * PAGE, "cache": 0}, STALE),
    ({"addr": 16 * PAGE, "version": 2}, STALE), ({"addr": 16 * PAGE, "argsz": 55}, STALE),
    ({"addr": 16 * PAGE, "cache": 9}, STALE),
    ({"addr": 16 * PAGE, "padding": b"\1" + bytes(5)}, STALE),
    ({"granularity": 1}, FRESH), ({"granularity": 1, "pasid": 2}, STALE), ({"granularity": 1, "flags": 0}, STALE),
    ({"granularity": 1, "cache": 7}, FRESH), ({"granularity": 1, "cache": 6}, STALE),
    ({"granularity": 1, "argsz": 31}, STALE),
    ({"granularity": 1, "flags": 4}, STALE), ({"granularity": 0}, STALE), ({"granularity": 0, "cache": 2}, STALE),
    ({"granularity": 3}, STALE),
])
def test_only_a_valid_invalidation_of_the_page_ends_stale_data(rig, fields, seen):
    rig.bind()
    assert rig.port.read(16 * PAGE, 4, pasid=1) == STALE
    rig.entry(4, 16, 20 * PAGE | RWU)
    assert rig.invalidate(**fields) == 0
    assert rig.port.read(16 * PAGE, 4, pasid=1) == seen


def test_global_pages_survive_an_invalidation_of_the_pasid(rig):
    rig.bind()
    rig.entry(4, 16, rig.entry(4, 16) | 0x100)
    assert rig.port.read(16 * PAGE, 4, pasid=1) == STALE
    rig.entry(4, 16, 20 * PAGE | RWU)
    rig.invalidate(granularity=1)
    assert rig.port.read(16 * PAGE, 4, pasid=1) == STALE
    rig.invalidate(addr=16 * PAGE)
    assert rig.port.read(16 * PAGE, 4, pasid=1) == FRESH


def test_malformed_tables_and_bad_pasids_are_faults(rig):
    rig.bind()
    rig.entry(4, 1, 0)                              # not present
    rig.entry(4, 2, 100 * PAGE | RWU)               # outside the second stage
    rig.entry(4, 3, 1 << 39 | RWU)                  # outside the guest's width
    rig.entry(4, 4, 16 * PAGE | PRESENT | USER)     # read-only
    rig.entry(3, 1, 1 * PAGE | RWU)                 # a loop: page 1 is a table of every level
    rig.entry(3, 2, 100 * PAGE | RWU)               # a table outside the second stage
    rig.entry(2, 1, 0x2000 | 0x80 | RWU)            # reserved bits of a 1 GiB page
    rig.entry(1, 1, 0x80 | RWU)                     # a page at the fourth level
    for address, write, pasid, reason in [
            (1 * PAGE, False, 1, "not mapped"), (2 * PAGE, False, 1, "not mapped"),
            (3 * PAGE, False, 1, "address out of range"), (4 * PAGE, True, 1, "not permitted"),
            (2 << 20, False, 1, None), (4 << 20, False, 1, "walk aborted"), (1 << 30, False, 1, "not mapped"),
            (1 << 39, False, 1, "not mapped"), (1 << 47, False, 1, "address out of range"),
            (0, False, 0, "PASID out of range"), (0, False, 1 << 20, "PASID out of range"),
            (0, False, 5, "PASID has no table")]:
        if reason is None:
            rig.port.read(address, 4, pasid=pasid)
            continue
        with pytest.raises(MemoryFaultError):
            if write:
                rig.port.write(address, b"x", pasid=pasid)
            else:
                rig.port.read(address, 4, pasid=pasid)
        assert rig.port.faults[-1].reason == reason


def test_without_nesting_there_is_no_pasid_table():
    rig = Rig(kind=3)
    with pytest.raises(MemoryFaultError):
        rig.port.read(0, 4, pasid=1)
    assert rig.port.faults[-1].reason == "PASID table"


def test_tables_that_can_not_be_written_have_no_accessed_flag(rig):
    rig.entry(1, 1, 64 * PAGE | RWU)
    area = mmap.mmap(-1, PAGE)
    rig.map(64 * PAGE, ctypes.addressof(ctypes.c_char.from_buffer(area)), PAGE, flags=1)
    struct.pack_into("=Q", area, 0, 3 * PAGE | RWU)
    rig.bind()
    with pytest.raises(MemoryFaultError):
        rig.port.read(1 << 39 | 16 * PAGE, 4, pasid=1)
    assert rig.port.faults[-1].reason == "accessed flag can't be set"
    struct.pack_into("=Q", area, 0, 3 * PAGE | RWU | ACCESSED)
    assert rig.port.read(1 << 39 | 16 * PAGE, 4, pasid=1) == b"p016"


def test_pasids_are_allocated_from_the_lowest(rig):
    pasids = rig.vfio.pasids
    assert [pasids.allocate(), pasids.allocate(5, 6), pasids.allocate(5, 6)] == [2, 5, 6]
    assert refused(pasids.allocate, 5, 6) == errno.EINVAL
    assert refused(pasids.allocate, 0, 6) == errno.EINVAL and refused(pasids.allocate, 1, 1 << 20) == errno.EINVAL
    pasids.free(5)
    assert refused(pasids.free, 5) == errno.EINVAL and pasids.allocate(5, 6) == 5


def test_the_last_group_takes_every_table_with_it(rig):
    rig.bind()
    assert rig.port.read(16 * PAGE, 4, pasid=1) == b"p016"
    rig.vfio.close(rig.device)
    rig.vfio.ioctl(rig.group, abi.VFIO_GROUP_UNSET_CONTAINER)
    rig.set_container(rig.group)
    rig.vfio.ioctl(rig.fd, abi.VFIO_SET_IOMMU, 6)
    rig.map(0, rig.vaddr, 64 * PAGE)
    assert rig.bind() == 0
