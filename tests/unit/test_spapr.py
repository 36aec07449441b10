"""The SPAPR TCE driver of the software VFIO, rule by rule; and its typed API."""
import ctypes
import errno
import mmap
import struct
import weakref

import pytest
from ipc_lock import without_ipc_lock

from vfiodma import GuestMemory, IoAddressSpace, SoftwareGroup, SoftwareVfio, VfioDevice
from vfiodma.backends.software.spapr import TceGroup, table_bytes
from vfiodma.backends.spapr import EehOp, EehState, SpaprContainer, Window
from vfiodma.devices import EduDevice
from vfiodma.errors import InvalidArgumentError, IovaSpaceError, VfioError
from vfiodma.types import IovaRange
from vfiodma.uapi import vfio as abi

PAGE = 4096
BASE = (abi.VFIO_TYPE << 8) + abi.VFIO_BASE
GET_INFO, MAP, UNMAP = abi.VFIO_IOMMU_SPAPR_TCE_GET_INFO, abi.VFIO_IOMMU_MAP_DMA, abi.VFIO_IOMMU_UNMAP_DMA
ENABLE, DISABLE, EEH = abi.VFIO_IOMMU_ENABLE, abi.VFIO_IOMMU_DISABLE, abi.VFIO_EEH_PE_OP
REGISTER, UNREGISTER = abi.VFIO_IOMMU_SPAPR_REGISTER_MEMORY, abi.VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY
CREATE, REMOVE = abi.VFIO_IOMMU_SPAPR_TCE_CREATE, abi.VFIO_IOMMU_SPAPR_TCE_REMOVE
READ, WRITE = 1, 2


class Raw:
    """A container at the raw door; each method returns the ioctl's result or an errno's name."""

    def __init__(self, version=2, kernel="7.2", groups=1, memlock=None, **tce):
        self.vfio = SoftwareVfio(kernel, [SoftwareGroup(n, [f"0000:00:1{n}.0"], tce=TceGroup(**tce))
                                          for n in range(groups)], platform="powernv", memlock_limit=memlock)
        self.fd = self.vfio.open("/dev/vfio/vfio")
        self.groups = [self.vfio.open(f"/dev/vfio/{n}") for n in range(groups)]
        self.join(0)
        self.set_iommu = self.call(BASE + 2, {1: abi.VFIO_SPAPR_TCE_IOMMU, 2: abi.VFIO_SPAPR_TCE_v2_IOMMU}[version])

    def join(self, n):
        return self.call(BASE + 4, struct.pack("i", self.fd), fd=self.groups[n])

    def call(self, request, arg=0, fd=None):
        if isinstance(arg, bytes):
            self.buffer = ctypes.create_string_buffer(arg, max(len(arg), 1))
            arg = ctypes.addressof(self.buffer)
        try:
            return self.vfio.ioctl(self.fd if fd is None else fd, request, arg)
        except VfioError as exc:
            return errno.errorcode[exc.errno]

    def map(self, iova, vaddr, size, flags=3, argsz=32):
        return self.call(MAP, struct.pack("=IIQQQ", argsz, flags, vaddr, iova, size))

    def unmap(self, iova, size, flags=0, argsz=24):
        return self.call(UNMAP, struct.pack("=IIQQ", argsz, flags, iova, size))

    def register(self, vaddr, size, flags=0, argsz=24, request=REGISTER):
        layout = abi.vfio_iommu_spapr_register_memory
        return self.call(request, layout.pack(argsz=argsz, flags=flags, vaddr=vaddr, size=size))

    def unregister(self, vaddr, size, **options):
        return self.register(vaddr, size, request=UNREGISTER, **options)

    def create(self, shift=12, size=1 << 24, levels=1, argsz=40, flags=0):
        layout = abi.vfio_iommu_spapr_tce_create
        result = self.call(CREATE, layout.pack(argsz=argsz, flags=flags, page_shift=shift, window_size=size,
                                               levels=levels, start_addr=0x77))
        return layout.unpack(self.buffer.raw[:layout.size])["start_addr"] if result == 0 else result

    def remove(self, start, argsz=16, flags=0):
        layout = abi.vfio_iommu_spapr_tce_remove
        return self.call(REMOVE, layout.pack(argsz=argsz, flags=flags, start_addr=start))

    def eeh(self, op, argsz=12, flags=0, err=(0, 0, 0, 0)):
        layout = abi.vfio_eeh_pe_op
        fields = dict(zip(abi.vfio_eeh_pe_err.unpack(bytes(abi.vfio_eeh_pe_err.size)), err, strict=True))
        return self.call(EEH, layout.pack(argsz=argsz, flags=flags, op=op, err=fields))

    def close(self):
        for fd in list(self.vfio._files):
            self.vfio.close(fd)


@pytest.fixture
def memory():
    with mmap.mmap(-1, 64 * PAGE, mmap.MAP_SHARED) as area:
        yield ctypes.addressof(ctypes.c_char.from_buffer(area))


@pytest.fixture
def raw():
    opened = []

    def open_raw(*args, **options):
        opened.append(Raw(*args, **options))
        return opened[-1]

    before = SoftwareVfio().locked_pages()
    yield open_raw
    for each in opened:
        each.close()
    assert SoftwareVfio().locked_pages() == before


def test_extensions_are_those_of_power(raw):
    r = raw()
    assert [n for n in range(16) if r.call(BASE + 1, n)] == [2, 5, 7]
    other = r.vfio.open("/dev/vfio/vfio")
    assert [n for n in range(16) if r.call(BASE + 1, n, fd=other)] == [2, 5, 7]
    assert r.call(BASE + 2, 7) == "EINVAL"      # once
    assert raw().call(ENABLE) == "ENOTTY"


@pytest.mark.parametrize("version", [1, 2])
def test_what_the_other_version_has_is_enotty(raw, version):
    r = raw(version)
    own = {1: {ENABLE, DISABLE}, 2: {REGISTER, UNREGISTER, CREATE, REMOVE}}
    for request in range(BASE + 9, BASE + 30):
        if request in own[3 - version] or request not in own[version] | {GET_INFO, MAP, UNMAP, EEH}:
            assert r.call(request, bytes(64)) == "ENOTTY"


def test_types_of_other_platforms_are_not_there(raw):
    r = raw()
    fd = r.vfio.open("/dev/vfio/vfio")
    assert r.call(BASE + 2, 3, fd=fd) == "EINVAL"       # no group
    lone = raw(2)
    lone.call(BASE + 5, 0, fd=lone.groups[0])
    assert lone.join(0) == 0
    assert lone.call(BASE + 2, 3) == "ENODEV" and lone.call(BASE + 2, 7) == 0


def test_groups_attach_by_the_rules_of_the_version(raw):
    assert raw(1).set_iommu == raw(2).set_iommu == 0
    assert raw(2, groups=2).join(1) == 0
    assert raw(1, groups=2).join(1) == "EBUSY"
    assert raw(2, max_windows=0).set_iommu == "EINVAL"
    assert raw(1, max_windows=0).set_iommu == 0
    # Up to 6.1 a platform has one version only.
    assert raw(1, "6.1").set_iommu == "EPERM" and raw(2, "6.1").set_iommu == 0
    assert raw(1, "6.1", ownership=False).set_iommu == 0 and raw(2, "6.1", ownership=False).set_iommu == "EPERM"


def test_info_has_windows_in_version_2_only(raw):
    ddw = abi.VFIO_IOMMU_SPAPR_INFO_DDW
    for version, expected in ((2, (ddw, 0, 2 << 30, 0x1011000, 2, 5)), (1, (0, 0, 2 << 30, 0, 0, 0))):
        r = raw(version)
        assert r.call(GET_INFO, struct.pack("=I", 32) + bytes(28)) == 0
        told = abi.vfio_iommu_spapr_tce_info.unpack(r.buffer.raw[:32])
        assert (told["flags"], told["dma32_window_start"], told["dma32_window_size"], *told["ddw"].values()) == expected
        assert r.call(GET_INFO, struct.pack("=I", 16) + b"\xaa" * 28) == 0
        assert r.buffer.raw[16:32] == b"\xaa" * 16
        assert r.call(GET_INFO, struct.pack("=I", 15) + bytes(28)) == "EINVAL"
        assert r.call(GET_INFO, 8) == "EFAULT"


def test_version_1_charges_its_window_when_it_is_enabled(raw, memory):
    r = raw(1, memlock=8 << 20, tce32_size=4 << 20)
    before = r.vfio.locked_pages()
    assert r.map(0, memory, PAGE) == "EPERM" and r.unmap(0, PAGE) == "EPERM"
    assert r.call(ENABLE) == 0 and r.call(ENABLE) == "EBUSY"
    assert r.vfio.locked_pages() - before == 1024
    assert r.map(0, memory, PAGE) == 0
    assert r.call(DISABLE) == r.call(DISABLE) == 0
    assert r.map(PAGE, memory, PAGE) == "EPERM"
    assert raw(1, tce32_size=0).call(ENABLE) == "EPERM"


def test_memory_is_registered_as_a_whole_once(raw, memory):
    r = raw()
    size = 16 * PAGE
    assert r.unregister(memory, size) == "EPERM"
    assert r.register(memory, size, argsz=23) == r.register(memory, size, flags=1) == "EINVAL"
    assert r.register(memory + 1, size) == r.register(memory, size + 1) == "EINVAL"
    assert r.register((1 << 64) - PAGE, 2 * PAGE) == "EINVAL"
    assert r.register(1 << 30, size) == "EFAULT"
    assert r.register(memory, size) == 0 and r.register(memory, size) == "EBUSY"
    assert r.register(memory + PAGE, PAGE) == r.register(memory, 2 * size) == "EINVAL"
    assert r.unregister(memory, PAGE) == "ENOENT" and r.unregister(memory, size) == 0
    assert r.unregister(memory, size) == "ENOENT"


def test_memory_that_is_mapped_stays_registered(raw, memory):
    r = raw()
    assert r.map(0, memory, PAGE) == "EPERM"            # nothing was registered: not enabled
    assert r.register(memory, 4 * PAGE) == 0
    assert r.map(0, memory, 4 * PAGE) == 0
    assert r.unregister(memory, 4 * PAGE) == "EBUSY"
    assert r.unmap(0, 3 * PAGE) == 0 and r.unregister(memory, 4 * PAGE) == "EBUSY"
    assert r.unmap(0, 4 * PAGE) == 0 and r.unregister(memory, 4 * PAGE) == 0
    assert r.map(0, memory, PAGE) == "EINVAL"           # enabled for good, but no longer registered


def test_two_containers_share_a_region(raw, memory):
    r = raw(groups=2)
    fd = r.vfio.open("/dev/vfio/vfio")
    assert r.call(BASE + 4, struct.pack("i", fd), fd=r.groups[1]) == 0 and r.call(BASE + 2, 7, fd=fd) == 0
    before = r.vfio.locked_pages()
    argument = struct.pack("=IIQQ", 24, 0, memory, 4 * PAGE)
    assert r.register(memory, 4 * PAGE) == 0 and r.call(REGISTER, argument, fd=fd) == 0
    assert r.vfio.locked_pages() - before == 4
    assert r.unregister(memory, 4 * PAGE) == 0
    assert r.vfio.locked_pages() - before == 4
    assert r.call(UNREGISTER, argument, fd=fd) == 0 and r.vfio.locked_pages() == before


def test_memory_that_another_container_registered_stays_while_it_is_mapped(memory):
    chip = EduDevice("0000:00:10.0")
    vfio = SoftwareVfio(groups=[SoftwareGroup(0, [chip]), SoftwareGroup(1, ["0000:00:11.0"])], platform="powernv",
                        memlock_limit=None)
    other = SpaprContainer(["0000:00:11.0"], system=vfio)
    other.register_memory(memory, 4 * PAGE)
    with SpaprContainer([chip.address], system=vfio) as container, VfioDevice.open(container, chip.address):
        container.register_memory(memory + 8 * PAGE, PAGE)
        container._registered.insert(memory, 4 * PAGE, 0)   # as the driver sees it: the process's
        container.map_dma(0, memory, 4 * PAGE, READ | WRITE)
        other.close()
        port = vfio._groups[0].ports[chip.address]
        port.write(PAGE, b"still there")
        assert port.read(PAGE, 11) == b"still there" == ctypes.string_at(memory + PAGE, 11)
        container.unmap_dma(0, 4 * PAGE)


def test_windows_are_made_and_removed(raw, memory):
    r = raw()
    assert r.create(argsz=39) == r.create(flags=1) == "EINVAL"
    assert r.create(16, 1 << 30) == 1 << 59             # the pending default window took slot 0
    assert r.create() == "ENOSPC"
    assert r.remove(5) == 0                             # any address of it
    assert r.create(13) == r.create(levels=0) == r.create(levels=6) == r.create(size=3 << 20) == "EINVAL"
    assert r.create(size=0) == "EINVAL"
    assert r.create(24, 1 << 36) == 0
    assert r.remove(1 << 40) == "EINVAL"
    assert r.remove(0) == r.remove(1 << 59) == 0 and r.remove(0) == "EINVAL"
    fresh = raw()
    assert fresh.remove(0) == 0 and fresh.create(16, 1 << 30) == 0      # the default window is not made then
    assert fresh.create(12, 1 << 55, 1) == "EINVAL"                     # more bits than a table may have


def test_a_default_window_that_could_not_be_made_is_tried_again(raw):
    r = raw(memlock=0)
    with without_ipc_lock():
        assert r.create(16, 1 << 30) == r.create(16, 1 << 30) == "ENOMEM"
        r.vfio._memlock_limit = 64 << 20
        assert r.create(16, 1 << 30) == 1 << 59             # the default window is 0


@pytest.mark.parametrize(("platform", "code"), [
    ({"tce32_size": 0}, "EINVAL"), ({"tce32_size": 3 << 20}, "EINVAL"), ({"pgsizes": 0x11000000}, "EINVAL"),
    ({"ownership": False}, "EPERM")])
def test_a_default_window_follows_the_rules_of_every_window(raw, memory, platform, code):
    r = raw(**platform)
    assert r.register(memory, PAGE) == 0 and r.map(0, memory, PAGE) == r.unmap(0, PAGE) == code
    assert r.remove(0) == 0 and r.map(0, memory, PAGE) == "ENXIO"


def test_up_to_linux_6_1_version_1_adopts_the_table_of_the_platform(raw, memory):
    r = raw(1, "6.1", ownership=False, tce32_size=3 << 20)
    before = r.vfio.locked_pages()
    assert r.call(ENABLE) == 0 and r.map(0, memory, PAGE) == 0
    assert r.vfio.locked_pages() - before == 768            # the window, and no table
    assert raw(1, "6.1", ownership=False, groups=2).join(1) == "EBUSY"


def test_eeh_is_an_extension_where_it_is_on(raw):
    r = raw()
    assert r.call(BASE + 1, abi.VFIO_EEH) == 1
    r.vfio._groups[0].endpoint.enabled = False
    assert r.call(BASE + 1, abi.VFIO_EEH) == r.call(BASE + 1, (1 << 64) - 5) == 0


def test_a_fault_without_an_endpoint_freezes_nothing(memory):
    vfio = SoftwareVfio(groups=[SoftwareGroup(0, ["0000:00:10.0"], eeh=False)], platform="powernv", memlock_limit=None)
    with SpaprContainer(["0000:00:10.0"], system=vfio) as container, VfioDevice.open(container, "0000:00:10.0"):
        container.map_dma(0, memory, PAGE, READ | WRITE)
        port = vfio._groups[0].ports["0000:00:10.0"]
        with pytest.raises(VfioError):
            port.read(PAGE, 1)
        assert port.read(0, 4) == bytes(4)


def test_a_table_is_charged_as_locked_memory(raw):
    r = raw(memlock=None)
    before = r.vfio.locked_pages()
    assert r.remove(0) == 0 and r.create(16, 1 << 32, 2) == 0
    assert r.vfio.locked_pages() - before == table_bytes(1 << 32, 16, 2) // PAGE
    assert r.remove(0) == 0 and r.vfio.locked_pages() == before


def test_a_window_of_any_size_takes_memory_for_what_is_mapped(raw, memory):
    r = raw()
    assert r.remove(0) == 0 and r.create(12, 1 << 52, 5) == "EINVAL"        # five levels have too many bits
    assert r.create(12, 1 << 52, 4) == 0 and r.register(memory, 16 * PAGE) == 0
    for iova in (0, (1 << 51) - 8 * PAGE, (1 << 52) - 16 * PAGE):
        assert r.map(iova, memory, 16 * PAGE) == 0
    assert r.unmap(0, 1 << 52) == 0 and r.unregister(memory, 16 * PAGE) == 0
    assert r.remove((1 << 52) - 1) == 0


def test_memory_goes_when_it_is_neither_registered_nor_mapped(raw, memory):
    r = raw(groups=2)
    fd = r.vfio.open("/dev/vfio/vfio")
    assert r.call(BASE + 4, struct.pack("i", fd), fd=r.groups[1]) == 0 and r.call(BASE + 2, 7, fd=fd) == 0
    assert r.register(memory, 4 * PAGE) == 0 and r.map(0, memory, 4 * PAGE) == 0
    assert r.call(REGISTER, struct.pack("=IIQQ", 24, 0, memory + 8 * PAGE, PAGE), fd=fd) == 0
    region = weakref.ref(r.vfio._registered.shared[memory, 4 * PAGE][0])
    assert r.call(MAP, struct.pack("=IIQQQ", 32, 3, memory, 0, PAGE), fd=fd) == 0       # the process's
    assert r.map(0, memory + 8 * PAGE, PAGE) == 0                           # replaces one entry
    assert r.unmap(PAGE, 3 * PAGE) == 0 and r.unregister(memory, 4 * PAGE) == "EBUSY"
    assert r.call(UNMAP, struct.pack("=IIQQ", 24, 0, 0, PAGE), fd=fd) == 0
    assert r.unregister(memory, 4 * PAGE) == 0 and region() is None


def test_maps_check_in_the_order_of_the_driver(raw, memory):
    r = raw()
    assert r.register(memory, 16 * PAGE) == 0
    assert r.map(0, memory, PAGE, argsz=31) == r.map(0, memory, PAGE, flags=4) == "EINVAL"
    assert r.map(3 << 30, memory, PAGE) == "ENXIO"
    assert r.map(0, memory + 1, PAGE) == r.map(0, memory, PAGE + 1) == r.map(0, memory, PAGE, flags=0) == "EINVAL"
    assert r.map(1, memory, PAGE) == 1                  # no errno, nothing mapped
    assert r.map((2 << 30) - PAGE, memory, 2 * PAGE) == "EINVAL"
    assert r.map(0, memory, 0) == 0
    assert r.map(0, memory + 15 * PAGE, 2 * PAGE) == "EINVAL"
    assert r.map(0, memory, PAGE) == r.map(0, memory + PAGE, PAGE) == 0     # replaced, no EEXIST
    assert r.call(MAP, 8) == "EFAULT"


def test_unmaps_check_in_the_order_of_the_driver(raw, memory):
    r = raw()
    assert r.register(memory, 16 * PAGE) == 0 and r.map(0, memory, 4 * PAGE) == 0
    assert r.unmap(0, PAGE, flags=1) == r.unmap(0, PAGE, argsz=23) == "EINVAL"
    assert r.unmap(3 << 30, PAGE) == "ENXIO" and r.unmap(0, 100) == "EINVAL"
    assert r.unmap(1, PAGE) == 1 and r.unmap((2 << 30) - PAGE, 2 * PAGE) == 1
    assert r.unmap(PAGE, PAGE) == 0                     # any pages, no bisect rule
    assert r.unmap(PAGE, 8 * PAGE) == 0                 # empty ones are passed over
    assert struct.unpack_from("=Q", r.buffer.raw, 16) == (8 * PAGE,)        # size is not written back


def test_a_failed_map_clears_what_it_had_written(raw, memory):
    r = raw()
    tables = r.vfio._files[r.fd].driver.tables
    assert r.register(memory, 4 * PAGE) == r.register(memory + 8 * PAGE, 4 * PAGE) == 0
    assert r.map(0, memory + 8 * PAGE, 4 * PAGE) == r.map(4 * PAGE, memory, PAGE) == 0
    assert r.map(0, memory, 6 * PAGE) == "EINVAL"       # pages 4 and 5 are not registered
    assert [tables.entry(0, i)[1] for i in range(6)] == [0, 0, 0, 0, 3, 0]
    assert r.unregister(memory + 8 * PAGE, 4 * PAGE) == 0


def test_a_region_allows_pages_that_its_alignment_and_its_memory_allow(raw, memory):
    r = raw()
    assert r.remove(0) == 0 and r.create(16, 1 << 30) == 0
    aligned = -(-memory // 65536) * 65536
    assert r.register(aligned, 65536) == 0
    assert r.map(0, aligned, 65536) == "EINVAL"         # made of pages of 4 KiB


def test_devices_reach_mapped_memory_and_a_fault_freezes_the_endpoint(memory):
    chip = EduDevice("0000:00:10.0")
    vfio = SoftwareVfio(groups=[SoftwareGroup(0, [chip])], platform="powernv", memlock_limit=None)
    with SpaprContainer([chip.address], system=vfio) as container, VfioDevice.open(container, chip.address) as device:
        container.map_dma(0x10000, memory, 4 * PAGE, READ | WRITE)
        container.map_dma(0x20000, memory, PAGE, READ)
        port = vfio._groups[0].ports[chip.address]
        port.write(0x10ff0, b"over a page boundary")
        assert ctypes.string_at(memory + 0xff0, 20) == b"over a page boundary" == port.read(0x10ff0, 20)
        assert container.eeh_state is EehState.NORMAL and device.regions[0].read_u32(0) != 0xffffffff
        with pytest.raises(VfioError):
            port.write(0x20000, b"read only")
        assert container.eeh_state is EehState.STOPPED and device.regions[0].read_u32(0) == 0xffffffff
        with pytest.raises(VfioError):
            port.read(0x10000, 1)
        container.eeh(EehOp.UNFREEZE_IO)
        assert container.eeh_state is EehState.STOPPED_DMA and device.regions[0].read_u32(0) != 0xffffffff
        with pytest.raises(VfioError):
            port.read(0x10000, 1)
        container.eeh(EehOp.UNFREEZE_DMA)
        assert container.eeh_state is EehState.NORMAL and port.read(0x10ff0, 4) == b"over"
        container.inject_error(19)
        assert container.eeh_state is EehState.STOPPED
        for reset in (EehOp.RESET_HOT, EehOp.RESET_FUNDAMENTAL):
            container.eeh(reset)
            assert container.eeh_state is EehState.RESET
        container.eeh(EehOp.RESET_DEACTIVATE)
        container.eeh(EehOp.CONFIGURE)
        assert container.eeh_state is EehState.NORMAL


def test_eeh_operations_and_states_are_those_of_the_header(raw):
    r = raw()
    state = abi.VFIO_EEH_PE_GET_STATE
    steps = [(abi.VFIO_EEH_PE_DISABLE, abi.VFIO_EEH_PE_STATE_NORMAL),
             (abi.VFIO_EEH_PE_RESET_HOT, abi.VFIO_EEH_PE_STATE_RESET),
             (abi.VFIO_EEH_PE_RESET_DEACTIVATE, abi.VFIO_EEH_PE_STATE_NORMAL),
             (abi.VFIO_EEH_PE_RESET_FUNDAMENTAL, abi.VFIO_EEH_PE_STATE_RESET),
             (abi.VFIO_EEH_PE_ENABLE, abi.VFIO_EEH_PE_STATE_NORMAL),
             (abi.VFIO_EEH_PE_INJECT_ERR, abi.VFIO_EEH_PE_STATE_STOPPED),
             (abi.VFIO_EEH_PE_CONFIGURE, abi.VFIO_EEH_PE_STATE_STOPPED),
             (abi.VFIO_EEH_PE_UNFREEZE_IO, abi.VFIO_EEH_PE_STATE_STOPPED_DMA),
             (abi.VFIO_EEH_PE_UNFREEZE_DMA, abi.VFIO_EEH_PE_STATE_NORMAL),
             (abi.VFIO_EEH_PE_INJECT_ERR, abi.VFIO_EEH_PE_STATE_STOPPED),
             (abi.VFIO_EEH_PE_UNFREEZE_DMA, abi.VFIO_EEH_PE_STATE_UNAVAIL)]
    for op, after in steps:
        assert r.eeh(op, argsz=40) == 0 and r.eeh(state) == after, (op, after)


def test_eeh_operations_and_their_errors(raw):
    r = raw(groups=2)
    assert r.join(1) == 0
    assert r.eeh(4) == 0
    assert r.eeh(0, argsz=11) == r.eeh(0, flags=1) == r.eeh(10) == "EINVAL"
    assert r.eeh(9) == r.eeh(9, argsz=40, err=(0, 20, 0, 0)) == "EINVAL"
    assert r.eeh(9, argsz=40, err=(2, 0, 0, 0)) == "ERANGE"
    newest, first = r.vfio._groups[1].endpoint, r.vfio._groups[0].endpoint
    newest.injectable = frozenset()
    assert r.eeh(9, argsz=40) == "ENXIO"
    first.freeze()
    assert r.eeh(4) == 2                                # goes on to the first that is not normal
    newest.parent_isolated = True
    assert r.eeh(4) == 5 and r.eeh(1) == 0
    newest.removed = True
    assert r.eeh(4) == 0                                # what the parent does is its own affair then
    newest.parent_isolated = newest.enabled = False
    assert r.eeh(1) == "EIO" and r.eeh(0) == 0
    newest.enabled, newest.failing = True, True
    assert [r.eeh(op) for op in range(9)] == [0, *["EIO"] * 3, 0, *["EIO"] * 4] and r.eeh(9, argsz=40) == "ENXIO"
    newest.injectable = {0}
    assert r.eeh(9, argsz=40) == "EIO"
    newest.supported = False
    assert [r.eeh(op) for op in (2, 3)] == ["ENOENT"] * 2 and r.eeh(9, argsz=40) == "ENOENT"
    assert r.call(EEH, 8) == "EFAULT"
    r.vfio._groups[1].endpoint = None
    assert r.eeh(4) == "ENODEV"


def test_an_address_space_works_over_windows():
    vfio = SoftwareVfio(groups=[SoftwareGroup(0, ["0000:00:10.0"])], platform="powernv", memlock_limit=None)
    with GuestMemory.memfd(1 << 20) as memory:
        container = SpaprContainer(["0000:00:10.0"], system=vfio)
        with IoAddressSpace(container, close_backend=True) as ioas:
            mapping = ioas.map(memory)
            assert mapping.iova < 2 << 30
            with pytest.raises(VfioError):
                ioas.map(memory, 3 << 30)
            ioas.unmap(mapping.iova)
            assert container.windows == [Window(0, 2 << 30, 12, 1)]
            for shift, size in ((13, 1 << 30), (16, 12345)):
                with pytest.raises(InvalidArgumentError, match="page_shift is one of 12, 16, 24, size a power of two"):
                    container.create_window(shift, size)
            second = container.create_window(16, 1 << 40, 2)
            assert second.start == 1 << 59 and len(container.iova_ranges()) == 2
            with pytest.raises(VfioError, match="2 of 2 windows: remove one"):
                container.create_window(16, 1 << 30)
            container.remove_window(second.start)
            with pytest.raises(InvalidArgumentError):
                container.remove_window(second.start)


def test_the_allocator_goes_over_all_windows_and_learns_of_new_ones():
    vfio = SoftwareVfio(groups=[SoftwareGroup(0, ["0000:00:10.0"], tce=TceGroup(tce32_size=2 << 20))],
                        platform="powernv", memlock_limit=None)
    with GuestMemory.memfd(1 << 20) as memory, SpaprContainer(["0000:00:10.0"], system=vfio) as container, \
            IoAddressSpace(container) as ioas:
        first = ioas.map(memory)
        with pytest.raises(IovaSpaceError):
            ioas.map(memory)                                # the default window is full
        window = container.create_window(12, 1 << 30, 2)
        assert ioas.refresh_ranges() == [] and ioas.iova_ranges == [IovaRange(0, (2 << 20) - 1),
                                                                    IovaRange(1 << 59, (1 << 59) + (1 << 30) - 1)]
        second = ioas.map(memory)
        assert first.iova < 2 << 20 and second.iova >= 1 << 59
        assert ioas.translate(second.iova + 5) == memory.region.vaddr + 5
        container.remove_window(window.start)
        assert ioas.refresh_ranges() == [IovaRange(second.iova, second.iova + (1 << 20) - 1)]
        with pytest.raises(IovaSpaceError):
            ioas.map(memory)
        registered = vfio.locked_pages()
        assert ioas.unmap(second.iova) == 1 << 20           # its window is gone: there is nothing left to clear
        assert vfio.locked_pages() == registered and len(ioas) == 1
        ioas.unmap(first.iova)
        assert vfio.locked_pages() == registered - 256


def test_a_removed_windows_mappings_make_room_for_new_ones(memory):
    vfio = SoftwareVfio(groups=[SoftwareGroup(0, ["0000:00:10.0"])], platform="powernv", memlock_limit=None)
    with SpaprContainer(["0000:00:10.0"], system=vfio) as container:
        container.map_dma(0, memory, 4 * PAGE, READ)
        container.map_dma(4 * PAGE, memory, 4 * PAGE, READ)
        container.remove_window(0)
        container.create_window(12, 1 << 20)
        container.map_dma(2 * PAGE, memory, 4 * PAGE, READ)     # over two that are gone
        with pytest.raises(VfioError, match="something is mapped there"):
            container.map_dma(5 * PAGE, memory, PAGE, READ)
        assert container.unmap_all() == 4 * PAGE and not vfio._registered.shared


def test_mappings_share_the_memory_that_they_overlap_in(memory):
    vfio = SoftwareVfio(groups=[SoftwareGroup(0, ["0000:00:10.0"])], platform="powernv", memlock_limit=None)
    with SpaprContainer(["0000:00:10.0"], system=vfio) as container:
        container.register_memory(memory + 6 * PAGE, PAGE)
        before = vfio.locked_pages()
        container.map_dma(0, memory + 2 * PAGE, 2 * PAGE, READ)
        container.map_dma(32 * PAGE, memory, 8 * PAGE, READ)    # around what is registered, in three pieces more
        assert vfio.locked_pages() - before >= 7
        assert sorted(vfio._registered.shared) == [(memory + at * PAGE, n * PAGE) for at, n in
                                                   ((0, 2), (2, 2), (4, 2), (6, 1), (7, 1))]
        container.unmap_dma(0, 2 * PAGE)
        assert container.unmap_dma(32 * PAGE, 8 * PAGE) == 8 * PAGE
        assert sorted(vfio._registered.shared) == [(memory + 6 * PAGE, PAGE)]
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(memory + 60 * PAGE), PAGE, 0)
        with pytest.raises(VfioError) as caught:
            container.map_dma(0, memory + 4 * PAGE, 60 * PAGE, READ)
        assert (caught.value.operation, caught.value.errno, caught.value.size) == ("map_dma", errno.EFAULT, 60 * PAGE)
        assert sorted(vfio._registered.shared) == [(memory + 6 * PAGE, PAGE)]


def test_the_typed_container_undoes_what_fails_and_knows_its_mappings(memory):
    vfio = SoftwareVfio(groups=[SoftwareGroup(0, ["0000:00:10.0"])], platform="powernv", memlock_limit=None)
    with SpaprContainer(["0000:00:10.0"], system=vfio) as container:
        before = vfio.locked_pages()
        for iova, vaddr, size in ((1, memory, PAGE), (0, memory + 1, PAGE), (3 << 30, memory, PAGE)):
            with pytest.raises(VfioError):
                container.map_dma(iova, vaddr, size, 3)
        assert vfio.locked_pages() - before in (0, table_bytes(2 << 30, 12, 1) // PAGE)
        container.register_memory(memory, 8 * PAGE)
        container.map_dma(0, memory, 4 * PAGE, 3)
        with pytest.raises(VfioError, match="something is mapped there"):
            container.map_dma(PAGE, memory, PAGE, 3)
        with pytest.raises(InvalidArgumentError, match="cut"):
            container.unmap_dma(0, PAGE)
        assert container.unmap_all() == 4 * PAGE and container.unmap_all() == 0
        container.unregister_memory(memory, 8 * PAGE)
    for wrong in ({"version": 3}, {"devices": []}, {"devices": ["0000:99:00.0"]}):
        with pytest.raises(VfioError):
            SpaprContainer(**{"devices": ["0000:00:10.0"], "system": vfio, **wrong})


def test_memory_that_several_mappings_lead_to_is_registered_up_to_the_last(memory):
    vfio = SoftwareVfio(groups=[SoftwareGroup(0, ["0000:00:10.0"])], platform="powernv", memlock_limit=None)
    with SpaprContainer(["0000:00:10.0"], system=vfio) as container:
        for iova in range(0, 3 * PAGE, PAGE):
            container.map_dma(iova, memory, PAGE, READ)
        registered = vfio.locked_pages()
        for iova in (PAGE, 0):
            assert container.unmap_dma(iova, PAGE) == PAGE and vfio.locked_pages() == registered
        assert container.unmap_all() == PAGE and vfio.locked_pages() == registered - 1
        container.map_dma(0, memory, 4 * PAGE, READ)        # nothing is left that would overlap
