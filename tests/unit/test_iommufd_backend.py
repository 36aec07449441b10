"""The typed iommufd over a small stand-in of the kernel's, which a test can make fail at any call."""
import ctypes
import errno

import numpy as np
import pytest

from vfiodma import open_backend
from vfiodma.backends.iommufd import HwInfo, Hwpt, HwptSource, Iommufd, IommufdContainer
from vfiodma.errors import (
    BusyError,
    ClosedError,
    DmaPermissionError,
    InvalidArgumentError,
    NoDeviceError,
    NotMappedError,
    OverlapError,
    UnsupportedError,
    VfioError,
)
from vfiodma.types import DeviceLocation, IovaRange
from vfiodma.uapi import iommufd as abi
from vfiodma.uapi import vfio

PAGE = 4096
EVERYTHING = (1 << 64) - 1
FIRST, SECOND = "0000:00:10.0", "0000:00:11.0"
SHAPES = {
    abi.IOMMU_DESTROY: abi.iommu_destroy, abi.IOMMU_IOAS_ALLOC: abi.iommu_ioas_alloc,
    abi.IOMMU_IOAS_ALLOW_IOVAS: abi.iommu_ioas_allow_iovas, abi.IOMMU_IOAS_COPY: abi.iommu_ioas_copy,
    abi.IOMMU_IOAS_IOVA_RANGES: abi.iommu_ioas_iova_ranges, abi.IOMMU_IOAS_MAP: abi.iommu_ioas_map,
    abi.IOMMU_IOAS_MAP_FILE: abi.iommu_ioas_map_file, abi.IOMMU_IOAS_UNMAP: abi.iommu_ioas_unmap,
    abi.IOMMU_OPTION: abi.iommu_option, abi.IOMMU_VFIO_IOAS: abi.iommu_vfio_ioas,
    abi.IOMMU_HWPT_ALLOC: abi.iommu_hwpt_alloc, abi.IOMMU_GET_HW_INFO: abi.iommu_hw_info,
    abi.IOMMU_HWPT_SET_DIRTY_TRACKING: abi.iommu_hwpt_set_dirty_tracking,
    abi.IOMMU_HWPT_GET_DIRTY_BITMAP: abi.iommu_hwpt_get_dirty_bitmap,
    abi.IOMMU_IOAS_CHANGE_PROCESS: abi.iommu_ioas_change_process,
    vfio.VFIO_DEVICE_BIND_IOMMUFD: vfio.vfio_device_bind_iommufd.at("6.12"),
    vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT: vfio.vfio_device_attach_iommufd_pt.at("6.12"),
    vfio.VFIO_DEVICE_DETACH_IOMMUFD_PT: vfio.vfio_device_detach_iommufd_pt.at("6.12"),
}


class StandIn:
    """A VfioSystem with one IOMMU: maps intervals, chooses IOVAs upwards, keeps dirty pages in a set."""

    kernel = "7.2"

    def __init__(self):
        self.opened = {}            # descriptor -> path
        self.calls = []             # (request, fields)
        self.fail = {}              # request -> errnos of the calls to come (0 = do it)
        self.areas = {}             # iova -> size
        self.ranges = [(0, EVERYTHING)]
        self.capabilities = abi.IOMMU_HW_CAP_DIRTY_TRACKING
        self.hw_type = abi.IOMMU_HW_INFO_TYPE_AMD
        self.hw_data = bytes(16)
        self.dirty = set()          # pages
        self.refused_tables = {}    # address -> pt_ids of another IOMMU
        self.ids = 0
        self.locations = {address: DeviceLocation(address, i, f"/dev/vfio/{i}", f"/dev/vfio/devices/vfio{i}", False,
                                                  "vfio-pci", ()) for i, address in enumerate((FIRST, SECOND))}

    def open(self, path):
        self._plan(path)
        fd = max(self.opened, default=100) + 1
        self.opened[fd] = path
        return fd

    def dup(self, fd):
        self.opened[max(self.opened) + 1] = self.opened[fd]
        return max(self.opened)

    def close(self, fd):
        del self.opened[fd]

    def find_device(self, address):
        return self.locations[address]

    def _plan(self, key):
        planned = self.fail.get(key)
        code = planned.pop(0) if planned else 0
        if code:
            raise VfioError(code)

    def ioctl(self, fd, request, arg=0):
        assert fd in self.opened
        self.fd = fd
        shape = SHAPES[request]
        size = int.from_bytes(ctypes.string_at(arg, 4), "little")
        assert size == shape.size, shape
        fields = shape.unpack(ctypes.string_at(arg, size))
        self.calls.append((request, dict(fields)))
        self._plan(request)
        try:
            getattr(self, "do_" + shape.name.split()[0])(fields)
        finally:
            fields = {name: value for name, value in fields.items() if name not in ("in_data_type", "__reserved")}
            ctypes.memmove(arg, shape.pack(**fields), size)
        return 0

    def new_id(self):
        self.ids += 1
        return self.ids

    def names(self):
        return [SHAPES[request].name.split()[0] for request, _ in self.calls]

    # ---- commands

    def do_iommu_destroy(self, f):
        pass

    do_iommu_ioas_allow_iovas = do_iommu_hwpt_set_dirty_tracking = do_iommu_ioas_change_process = do_iommu_destroy
    do_vfio_device_detach_iommufd_pt = do_iommu_destroy

    def do_iommu_ioas_alloc(self, f):
        f["out_ioas_id"] = self.new_id()

    def do_iommu_ioas_iova_ranges(self, f):
        given, f["num_iovas"], f["out_iova_alignment"] = f["num_iovas"], len(self.ranges), PAGE
        for i, pair in enumerate(self.ranges[:given]):
            ctypes.memmove(f["allowed_iovas"] + 16 * i, abi.iommu_iova_range.pack(start=pair[0], last=pair[1]), 16)
        if given < len(self.ranges):
            raise VfioError(errno.EMSGSIZE)

    def do_iommu_ioas_map(self, f):
        if f["length"] % PAGE or not f["length"]:
            raise VfioError(errno.EINVAL)
        if not f["flags"] & abi.IOMMU_IOAS_MAP_FIXED_IOVA:
            f["iova"] = max((start + size for start, size in self.areas.items()), default=PAGE)
        if any(f["iova"] < start + size and start < f["iova"] + f["length"] for start, size in self.areas.items()):
            raise VfioError(errno.EEXIST)
        self.areas[f["iova"]] = f["length"]

    do_iommu_ioas_map_file = do_iommu_ioas_map

    def do_iommu_ioas_copy(self, f):
        f["dst_iova"] = 0x900000

    def do_iommu_ioas_unmap(self, f):
        inside = [start for start, size in self.areas.items()
                  if f["iova"] <= start and start + size <= f["iova"] + f["length"]]
        if not inside and f["length"] != EVERYTHING:
            raise VfioError(errno.ENOENT)
        f["length"] = sum(self.areas.pop(start) for start in inside)

    def do_iommu_option(self, f):
        if f["op"] == abi.IOMMU_OPTION_OP_GET:
            f["val64"] = 1

    def do_iommu_vfio_ioas(self, f):
        if f["op"] == abi.IOMMU_VFIO_IOAS_GET:
            raise VfioError(errno.ENODEV)

    def do_iommu_hwpt_alloc(self, f):
        f["out_hwpt_id"] = self.new_id()

    def do_iommu_hw_info(self, f):
        ctypes.memmove(f["data_uptr"], self.hw_data, min(f["data_len"], len(self.hw_data)))
        f.update(data_len=len(self.hw_data), out_data_type=self.hw_type, out_capabilities=self.capabilities)

    def do_iommu_hwpt_get_dirty_bitmap(self, f):
        """As Linux does it: it stops at a hole, and says nothing."""
        at, last, page = f["iova"], f["iova"] + f["length"], f["page_size"]
        while at < last and any(start <= at < start + size for start, size in self.areas.items()):
            if at in self.dirty:
                bit = (at - f["iova"]) // page
                word = ctypes.c_uint64.from_address(f["data"] + bit // 64 * 8)
                word.value |= 1 << bit % 64
                if not f["flags"]:
                    self.dirty.discard(at)
            at += PAGE

    def do_vfio_device_bind_iommufd(self, f):
        f["out_devid"] = self.new_id()

    def do_vfio_device_attach_iommufd_pt(self, f):
        address = next(a for a, location in self.locations.items() if location.cdev == self.opened[self.fd])
        if f["pt_id"] in self.refused_tables.get(address, ()):
            raise VfioError(errno.EINVAL)


@pytest.fixture
def system():
    stand_in = StandIn()
    yield stand_in
    assert stand_in.opened == {}, "descriptors were left open"


@pytest.fixture
def container(system):
    with IommufdContainer([FIRST], system=system) as opened:
        yield opened


def rows(*entries):
    return np.array(entries, np.uint64)


# ---- opening and closing

def test_opens_by_name_and_tells_what_it_can(system):
    with open_backend("iommufd", devices=[FIRST], system=system) as container:
        found = container.capabilities()
        assert found.backend == "iommufd" and found.features == {"map_many", "unmap_all", "dirty", "map_file"}
        assert found.min_pgsize == PAGE and found.dma_avail is None
        assert container.iova_ranges() == (IovaRange(0, EVERYTHING),)


def test_a_device_is_attached_before_anything_can_be_mapped(system):
    with IommufdContainer([FIRST, SECOND], system=system):
        names = system.names()
    assert names.index("iommu_ioas_alloc") < names.index("iommu_hwpt_alloc")
    assert names.count("vfio_device_attach_iommufd_pt") == 2 and names.count("iommu_hwpt_alloc") == 1


def test_a_device_behind_another_iommu_gets_a_table_of_its_own(system):
    system.refused_tables[SECOND] = [4]         # ids 1 and 2: devices; 3: address space; 4: table of the first device
    with IommufdContainer([FIRST, SECOND], system=system) as container:
        assert [hwpt.id for hwpt in container.hwpts] == [4, 5]
    asked = [fields["pt_id"] for request, fields in system.calls if request == vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT]
    assert asked == [4, 4, 5]


def test_without_hardware_that_tracks_there_is_no_dirty_tracking(system):
    system.capabilities = 0
    with IommufdContainer([FIRST], system=system) as container:
        assert "dirty" not in container.capabilities().features and container.hwpts == ()
        for call in (container.start_dirty, container.dirty_sources,
                     lambda: container.read_dirty(0, PAGE, np.zeros(1, np.uint64))):
            with pytest.raises(UnsupportedError):
                call()
        container.stop_dirty()
    assert "iommu_hwpt_alloc" not in system.names()


def test_closing_goes_from_the_leaves_to_the_root_and_can_be_repeated(system):
    container = IommufdContainer([FIRST], system=system)
    container.map_dma(0x10000, 0x1000, PAGE, 3)
    system.calls.clear()
    container.close()
    container.close()
    destroyed = [fields["id"] for request, fields in system.calls if request == abi.IOMMU_DESTROY]
    assert destroyed == [3, 2], "the page table, then the address space"
    assert system.names()[0] == "vfio_device_detach_iommufd_pt"
    with pytest.raises(VfioError):
        container.map_dma(0x10000, 0x1000, PAGE, 3)
    with pytest.raises(NoDeviceError):
        container.open_device_fd(FIRST)


def test_closing_goes_on_when_the_device_is_gone(system):
    container = IommufdContainer([FIRST], system=system)
    system.fail = {request: [errno.ENODEV] * 9 for request in
                   (vfio.VFIO_DEVICE_DETACH_IOMMUFD_PT, abi.IOMMU_DESTROY)}
    container.close()


@pytest.mark.parametrize("request_number", ["/dev/iommu", "/dev/vfio/devices/vfio1", vfio.VFIO_DEVICE_BIND_IOMMUFD,
                                            abi.IOMMU_IOAS_ALLOC, abi.IOMMU_OPTION, abi.IOMMU_GET_HW_INFO,
                                            abi.IOMMU_HWPT_ALLOC, vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT,
                                            abi.IOMMU_IOAS_IOVA_RANGES])
@pytest.mark.parametrize("code", [errno.EBUSY, errno.EPERM, errno.EADDRINUSE, errno.ENOMEM])
def test_a_failure_while_opening_leaves_nothing_open(system, request_number, code):
    system.fail[request_number] = [code]
    with pytest.raises(VfioError) as caught:
        IommufdContainer([FIRST, SECOND], system=system, huge_pages=False)
    assert caught.value.errno == code


@pytest.mark.parametrize(("changes", "kind", "advice"), [
    ({"cdev": None}, UnsupportedError, "CONFIG_VFIO_DEVICE_CDEV"),
    ({"driver": "e1000e"}, NoDeviceError, "bind it to vfio-pci"),
    ({"siblings": ((SECOND, "nvme"),)}, BusyError, f"{SECOND} (nvme)"),
    ({"noiommu": True}, DmaPermissionError, 'backend "type1" does'),
])
def test_a_device_that_is_not_ready_is_refused_with_what_to_do(system, changes, kind, advice):
    system.locations[FIRST] = system.locations[FIRST]._replace(**changes)
    with pytest.raises(kind) as caught:
        IommufdContainer([FIRST], system=system)
    assert advice in str(caught.value)


@pytest.mark.parametrize(("request_number", "code", "kind", "advice"), [
    (vfio.VFIO_DEVICE_BIND_IOMMUFD, errno.EBUSY, BusyError, "/dev/vfio/<group>"),
    (vfio.VFIO_DEVICE_BIND_IOMMUFD, errno.EINVAL, InvalidArgumentError, "bound already"),
    (vfio.VFIO_DEVICE_BIND_IOMMUFD, errno.EBADFD, ClosedError, ""),
    (vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, errno.EADDRINUSE, OverlapError, "attach before mapping"),
])
def test_errors_tell_what_to_do(system, request_number, code, kind, advice):
    system.fail[request_number] = [code]
    with pytest.raises(kind) as caught:
        IommufdContainer([FIRST], system=system)
    assert caught.value.errno == code and advice in caught.value.hint


def test_devices_are_named_in_a_list(system):
    with pytest.raises(TypeError):
        IommufdContainer(FIRST, system=system)
    with pytest.raises(InvalidArgumentError):
        IommufdContainer([], system=system)


def test_a_device_descriptor_is_a_duplicate(system, container):
    fd = container.open_device_fd(FIRST)
    assert fd != container.devices[FIRST].fd and system.opened[fd] == "/dev/vfio/devices/vfio0"
    system.close(fd)
    with pytest.raises(NoDeviceError):
        container.open_device_fd(SECOND)


# ---- ranges, options

def test_ranges_of_any_number_are_told_whole(system, container):
    system.ranges = [(n << 20, (n << 20) + 0xFFF) for n in range(500)]
    assert container.iova_ranges() == tuple(IovaRange(*pair) for pair in system.ranges)


def test_emsgsize_that_asks_for_no_more_is_an_error(system, container):
    system.fail[abi.IOMMU_IOAS_IOVA_RANGES] = [errno.EMSGSIZE]
    with pytest.raises(InvalidArgumentError):
        container.iova_ranges()


def test_hardware_data_of_any_length_is_told_whole(system, container):
    system.hw_data = bytes(range(200))
    assert container.iommufd.hw_info(1).data == system.hw_data


@pytest.mark.parametrize(("kernel", "hw_type", "expected"), [
    ("7.2", abi.IOMMU_HW_INFO_TYPE_AMD, True), ("7.2", abi.IOMMU_HW_INFO_TYPE_NONE, True),
    ("7.2", abi.IOMMU_HW_INFO_TYPE_INTEL_VTD, False), ("7.2", abi.IOMMU_HW_INFO_TYPE_ARM_SMMUV3, False),
    ("6.12", abi.IOMMU_HW_INFO_TYPE_AMD, False), ("6.13-rc1+deb", abi.IOMMU_HW_INFO_TYPE_AMD, True)])
def test_kernels_and_tables_that_may_lose_pages(system, kernel, hw_type, expected):
    system.kernel = kernel
    with Iommufd(system) as iommufd:
        assert iommufd.may_lose_last_page(HwInfo(hw_type, b"", 1, 0)) == expected


def test_options_go_to_the_object(system):
    with Iommufd(system, rlimit_mode="process") as iommufd:
        assert system.calls[-1][1]["val64"] == 1 and iommufd.rlimit_mode == "process"
        ioas = iommufd.alloc_ioas()
        ioas.huge_pages = False
        fields = system.calls[-1][1]
        assert (fields["option_id"], fields["object_id"], fields["val64"]) == (abi.IOMMU_OPTION_HUGE_PAGES, ioas.id, 0)
        assert ioas.huge_pages and iommufd.vfio_ioas() is None
        iommufd.set_vfio_ioas(ioas)
        iommufd.set_vfio_ioas(None)
    with pytest.raises(ValueError):
        Iommufd(system, rlimit_mode="both")


def test_allowed_ranges_are_passed_on(system, container):
    container.allow_iovas([(0x1000, 0x1FFF), (0x3000, 0x3FFF)])
    assert system.calls[-1][1]["num_iovas"] == 2
    container.allow_iovas([])
    assert system.calls[-1][1]["num_iovas"] == 0
    system.fail[abi.IOMMU_IOAS_ALLOW_IOVAS] = [errno.EADDRINUSE]
    with pytest.raises(OverlapError) as caught:
        container.allow_iovas([(0, 1)])
    assert "iova_ranges()" in caught.value.hint


# ---- mapping

def test_access_rights_and_addresses_reach_the_kernel(system, container):
    for prot, flags in ((1, abi.IOMMU_IOAS_MAP_READABLE), (2, abi.IOMMU_IOAS_MAP_WRITEABLE), (3, 6)):
        container.map_dma(prot * 0x10000, 0x7000, 2 * PAGE, prot)
        fields = system.calls[-1][1]
        assert fields["flags"] == flags | abi.IOMMU_IOAS_MAP_FIXED_IOVA
        assert (fields["user_va"], fields["length"], fields["iova"]) == (0x7000, 2 * PAGE, prot * 0x10000)
    assert container.areas() == [(n * 0x10000, 2 * PAGE) for n in (1, 2, 3)]


@pytest.mark.parametrize("prot", [0, 4, 8, 7])
def test_other_rights_are_refused(container, prot):
    for call in (lambda: container.map_dma(0, 0, PAGE, prot), lambda: container.map_auto(0, PAGE, prot),
                 lambda: container.map_file(3, 0, PAGE, prot), lambda: container.copy(container, 0, PAGE, prot),
                 lambda: container.map_many(rows([0, 0, PAGE, prot]))):
        with pytest.raises(InvalidArgumentError):
            call()


def test_the_kernel_chooses(system, container):
    assert container.map_auto(0x7000, PAGE) == PAGE
    assert not system.calls[-1][1]["flags"] & abi.IOMMU_IOAS_MAP_FIXED_IOVA
    assert container.map_file(5, PAGE, PAGE, 1) == 2 * PAGE
    assert container.map_file(5, 0, PAGE, 3, 0x40000) == 0x40000
    assert container.areas() == [(PAGE, PAGE), (2 * PAGE, PAGE), (0x40000, PAGE)]


def test_a_list_is_mapped_whole_or_not_at_all(system, container):
    table = rows(*([0x10000 + i * PAGE, i * PAGE, PAGE, 3] for i in range(20)))
    system.fail[abi.IOMMU_IOAS_MAP] = [0] * 13 + [errno.ENOMEM]
    with pytest.raises(VfioError) as caught:
        container.map_many(table)
    assert caught.value.errno == errno.ENOMEM
    assert "entry 13" in caught.value.hint and "RLIMIT_MEMLOCK" in caught.value.hint
    assert system.areas == {} and container.areas() == []
    container.map_many(table)
    assert len(system.areas) == 20 and container.unmap_all() == 20 * PAGE


def test_a_list_is_undone_when_a_signal_interrupts_it(system, container):
    original, count = system.do_iommu_ioas_map, []

    def interrupted(fields):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        original(fields)
    system.do_iommu_ioas_map = interrupted
    with pytest.raises(KeyboardInterrupt):
        container.map_many(rows(*([i * PAGE, 0, PAGE, 3] for i in range(9))))
    assert system.areas == {} and container.areas() == []


def test_an_unmap_that_would_split_a_mapping_changes_nothing(system, container):
    container.map_many(rows([0x10000, 0, PAGE, 3], [0x11000, 0, 2 * PAGE, 3], [0x20000, 0, PAGE, 3]))
    before = dict(system.areas)
    for iova, size in ((0x10000, 2 * PAGE), (0x12000, PAGE), (0x12000, 0x10000), (0x11000, PAGE)):
        with pytest.raises(NotMappedError) as caught:
            container.unmap_dma(iova, size)
        assert "0x11000...0x12fff" in caught.value.hint
    assert system.areas == before and len(container.areas()) == 3
    assert container.unmap_dma(0x10000, 0x11000) == 4 * PAGE
    assert container.unmap_dma(0x10000, 0x11000) == 0


@pytest.mark.parametrize("span", [(0x10000, 2 * PAGE), (0, 0x100000)])
def test_a_failed_unmap_keeps_what_is_known_of_the_areas(system, container, span):
    container.map_many(rows([0x10000, 0, 2 * PAGE, 3], [0x20000, 0, PAGE, 3]))
    system.fail[abi.IOMMU_IOAS_UNMAP] = [errno.EBUSY, errno.EDEADLK]
    with pytest.raises(BusyError):
        container.unmap_dma(*span)
    with pytest.raises(BusyError):
        container.unmap_all()
    assert container.areas() == [(0x10000, 2 * PAGE), (0x20000, PAGE)]


def test_what_another_thread_maps_right_after_an_unmap_of_everything_stays_known(system, container):
    container.map_many(rows([0x10000, 0, PAGE, 3], [EVERYTHING - PAGE + 1, 0, PAGE, 3]))
    original = system.do_iommu_ioas_unmap

    def overtaken(fields):
        answer = original(fields)
        container.map_dma(0x20000, 0, PAGE, 3)
        return answer
    system.do_iommu_ioas_unmap = overtaken
    container.unmap_all()
    assert container.areas() == [(0x20000, PAGE)]


def test_areas_that_others_unmapped_are_forgotten_when_their_place_is_taken(system, container):
    container.map_many(rows([0x10000, 0, 2 * PAGE, 3], [0x12000, 0, PAGE, 3], [0x20000, 0, PAGE, 3]))
    system.areas.clear()
    container.map_dma(0x11000, 0, 4 * PAGE, 3)
    assert container.areas() == [(0x11000, 4 * PAGE), (0x20000, PAGE)]


def test_wrong_sizes_go_to_the_kernel_and_leave_the_notes_alone(system, container):
    container.map_dma(0, 0, PAGE, 3)
    for iova, size in ((0, 0), (EVERYTHING, 2)):
        system.fail[abi.IOMMU_IOAS_UNMAP] = [errno.EINVAL]
        with pytest.raises(InvalidArgumentError):
            container.unmap_dma(iova, size)
    for bad in (-1, 1 << 64):
        with pytest.raises(InvalidArgumentError):
            container.map_dma(bad, 0, PAGE, 3)
    with pytest.raises(TypeError):
        container.map_dma("0", 0, PAGE, 3)
    assert container.areas() == [(0, PAGE)]


def test_a_copy_has_the_areas_of_its_source(container):
    container.map_many(rows([0x10000, 0, 2 * PAGE, 3], [0x12000, 0, 2 * PAGE, 3]))
    other = container.iommufd.alloc_ioas()
    assert other.copy(container, 0x11000, 2 * PAGE) == 0x900000
    assert other.areas() == [(0x900000, PAGE), (0x901000, PAGE)]


def test_copies_stay_within_one_iommufd(system, container):
    with Iommufd(system) as another, pytest.raises(InvalidArgumentError):
        another.alloc_ioas().copy(container, 0, PAGE)


def test_a_destroyed_space_is_not_mistaken_for_a_later_one(system, container):
    ioas = container.iommufd.alloc_ioas()
    ioas.destroy()
    ioas.destroy()
    system.fail[abi.IOMMU_IOAS_MAP] = [errno.ENOENT]
    with pytest.raises(NotMappedError) as caught:
        ioas.map_dma(0, 0, PAGE, 3)
    assert system.calls[-1][1]["ioas_id"] == 0 and "destroyed" in caught.value.hint


# ---- dirty bits

def write(system, *pages):
    system.dirty |= {page * PAGE for page in pages}


def bits(words):
    return {i for i in range(64 * len(words)) if int(words[i // 64]) >> i % 64 & 1}


def test_tracking_is_switched_on_every_table_or_on_none(system):
    with IommufdContainer([FIRST], system=system) as container:
        container.hwpts += Hwpt(container, 77),
        system.fail[abi.IOMMU_HWPT_SET_DIRTY_TRACKING] = [0, errno.EOPNOTSUPP]
        with pytest.raises(UnsupportedError):
            container.start_dirty()
        switched = [(f["hwpt_id"], f["flags"]) for request, f in system.calls
                    if request == abi.IOMMU_HWPT_SET_DIRTY_TRACKING]
        assert switched == [(container.hwpts[0].id, 1), (77, 1), (container.hwpts[0].id, 0)]


@pytest.fixture
def tracked(container):
    container.start_dirty()
    return container


def test_starting_again_keeps_the_bits_and_stopping_forgets_nothing_unsaid(system, container):
    with pytest.raises(InvalidArgumentError) as caught:
        container.read_dirty(0, PAGE, np.zeros(1, np.uint64))
    assert "tracking is off" in caught.value.hint
    container.start_dirty()
    container.start_dirty()
    assert system.names().count("iommu_hwpt_set_dirty_tracking") == 1
    container.stop_dirty()
    container.start_dirty()
    assert [f["flags"] for request, f in system.calls if request == abi.IOMMU_HWPT_SET_DIRTY_TRACKING] == [1, 0, 1]


def test_holes_hide_nothing(system, tracked):
    tracked.hwpts[0].loses_last_page = False
    tracked.map_many(rows([3 * PAGE, 0, 5 * PAGE, 3], [8 * PAGE, 0, PAGE, 3], [100 * PAGE, 0, 30 * PAGE, 3]))
    write(system, 3, 8, 101, 127, 128)
    words = np.zeros(4, np.uint64)
    tracked.read_dirty(0, 256 * PAGE, words)
    assert bits(words) == {3, 8, 101, 127, 128} and system.dirty == set()
    reads = [f for request, f in system.calls if request == abi.IOMMU_HWPT_GET_DIRTY_BITMAP]
    assert [(f["iova"], f["length"]) for f in reads] == [(3 * PAGE, 6 * PAGE), (100 * PAGE, 30 * PAGE)]


def test_the_page_after_each_run_is_added_within_its_area(system, tracked):
    hwpt = tracked.hwpts[0]
    assert hwpt.loses_last_page, "7.2 with AMD's tables"
    tracked.map_many(rows([0, 0, 64 * PAGE, 3], [64 * PAGE, 0, 66 * PAGE, 3]))
    write(system, 0, 5, 6, 63, 127, 129)
    words = np.zeros(3, np.uint64)
    assert hwpt.harvest(0, 192 * PAGE, words) == 9
    assert bits(words) == {0, 1, 5, 6, 7, 63, 127, 128, 129}, "64 and 130 belong to somebody else"


def test_what_the_bitmap_held_before_is_kept_and_not_widened(system, tracked):
    tracked.map_dma(0, 0, 64 * PAGE, 3)
    words = np.array([1 << 20], np.uint64)
    tracked.hwpts[0].harvest(0, 64 * PAGE, words)
    assert bits(words) == {20}


def test_the_repair_can_be_switched_off(system):
    with IommufdContainer([FIRST], system=system, loses_last_page=False) as container:
        assert not container.hwpts[0].loses_last_page


@pytest.mark.parametrize(("iova", "size", "nbytes", "pgsize"), [
    (0, 64 * PAGE, 7, PAGE), (0, 64 * PAGE, 0, PAGE), (0, 65 * PAGE, 8, PAGE), (0, 0, 8, PAGE), (0, 32 * PAGE, 8, PAGE),
    (PAGE, 64 * PAGE, 8, PAGE), (1, 64 * PAGE, 8, PAGE), (0, 6000, 8, 3000), (0, 64 * PAGE, 8, 0),
    ((1 << 64) - PAGE, 2 * PAGE, 8, PAGE)])
def test_a_read_that_can_not_be_right_loses_no_bits(system, tracked, iova, size, nbytes, pgsize):
    tracked.map_dma(0, 0, 64 * PAGE, 3)
    write(system, 7)
    with pytest.raises(InvalidArgumentError):
        tracked.hwpts[0].harvest(iova, size, bytearray(nbytes), pgsize=pgsize)
    if not (iova == 0 and size == 32 * PAGE) and iova != PAGE:      # the bare call may cut an area
        with pytest.raises(InvalidArgumentError):
            tracked.hwpts[0].get_dirty_bitmap(iova, size, bytearray(nbytes), pgsize=pgsize)
    with pytest.raises((BufferError, ValueError, TypeError)):
        tracked.hwpts[0].harvest(0, 64 * PAGE, bytes(8))
    assert system.dirty == {7 * PAGE} and abi.IOMMU_HWPT_GET_DIRTY_BITMAP not in [call for call, _ in system.calls]


def test_a_failed_read_keeps_what_was_found(system, tracked):
    tracked.hwpts[0].loses_last_page = False
    tracked.map_many(rows([0, 0, PAGE, 3], [8 * PAGE, 0, PAGE, 3]))
    write(system, 0, 8)
    system.fail[abi.IOMMU_HWPT_GET_DIRTY_BITMAP] = [0, errno.ENOMEM]
    words = np.zeros(1, np.uint64)
    with pytest.raises(VfioError):
        tracked.read_dirty(0, 64 * PAGE, words)
    assert bits(words) == {0}
    tracked.read_dirty(0, 64 * PAGE, words)
    assert bits(words) == {0, 8}


def test_the_bare_call_reads_with_and_without_clearing(system, container):
    container.map_dma(0, 0, 64 * PAGE, 3)
    write(system, 9)
    words = np.zeros(1, np.uint64)
    container.hwpts[0].get_dirty_bitmap(0, 64 * PAGE, words, clear=False)
    assert bits(words) == {9} and system.dirty
    container.hwpts[0].get_dirty_bitmap(0, 64 * PAGE, words)
    assert not system.dirty


def test_a_source_has_the_page_size_it_was_started_with(system, container):
    container.hwpts[0].loses_last_page = False
    container.map_dma(0, 0, 64 * PAGE, 3)
    source, = container.dirty_sources()
    assert isinstance(source, HwptSource) and not source.survives_unmap
    source.start([(0, 64 * PAGE)], 4 * PAGE)
    write(system, 4, 5, 63)
    words = np.zeros(1, np.uint64)
    assert source.harvest(0, 64 * PAGE, words) == 2 and bits(words) == {1, 15}
    source.extend(64 * PAGE, PAGE)
    source.stop()
    with pytest.raises(InvalidArgumentError):
        source.start([], 3000)


def test_nothing_is_asked_of_a_closed_descriptor(system):
    iommufd = Iommufd(system)
    ioas = iommufd.alloc_ioas()
    iommufd.close()
    with pytest.raises(ClosedError):
        ioas.map_dma(0, 0, PAGE, 3)
    with pytest.raises(ClosedError):
        iommufd.alloc_ioas()
