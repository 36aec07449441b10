"""The typed side of a device against a system that answers from a script: what no device of the lab has."""
import ctypes
import errno
import os
import resource
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiodma import DirtyBitmap, DirtyTracker, GuestMemory, IoAddressSpace, open_backend
from vfiodma._core.errno import error
from vfiodma.devices import DeviceLogSource, Feature, FeatureOps, IrqIndex, VfioDevice
from vfiodma.devices.migration import MigrationState, PrecopyInfo
from vfiodma.devices.pci import AtomicCompletion, DeviceFlags
from vfiodma.devices.regions import RegionType
from vfiodma.errors import ClosedError, DmaLimitError, InvalidArgumentError, NoDeviceError, UnsupportedError, VfioError
from vfiodma.migration.layout import MemoryLayout
from vfiodma.sources import fewest_ranges
from vfiodma.uapi import vfio as abi


class Scripted:
    """A VfioSystem whose ioctls are functions from the argument's bytes to a result and new bytes."""

    def __init__(self, **answers):
        self.calls = []
        self.closed = []
        self.memory = {}
        self.answers = {abi.VFIO_DEVICE_GET_INFO: lambda data: abi.vfio_device_info.pack(
            argsz=24, flags=2, num_regions=12, num_irqs=5)}
        self.answers |= {getattr(abi, f"VFIO_DEVICE_{name}"): answer for name, answer in answers.items()}

    def ioctl(self, fd, request, arg=0):
        if fd < 0 or fd in self.closed:
            raise error(errno.EBADF, "ioctl")
        size = ctypes.c_uint32.from_address(arg).value if arg else 0
        data = ctypes.string_at(arg, size)
        self.calls.append((request, data))
        if request not in self.answers:
            raise error(errno.ENOTTY, "ioctl")
        answer = self.answers[request](data)
        if isinstance(answer, int):
            if answer < 0:
                raise error(-answer, "ioctl")
            return answer
        assert len(answer) <= size, "more was written than there is room for"
        ctypes.memmove(arg, answer, len(answer))
        return 0

    def pread(self, fd, size, offset):
        return bytes(self.memory.get(offset + i, 0) for i in range(size))

    def mmap(self, fd, size, offset, prot=3):
        return bytearray(size)

    def close(self, fd):
        self.closed.append(fd)


def opened(**answers):
    return VfioDevice(Scripted(**answers), 7, "0000:00:01.0")


def chain(head, size, *capabilities):
    """Answer an information ioctl whose structure `head` has `cap_offset`: grow as the kernel does."""
    def answer(data):
        offset, tail = size, b""
        for i, (number, body) in enumerate(capabilities):
            length = 8 + len(body)
            following = 0 if i == len(capabilities) - 1 else offset + length
            tail += struct.pack("=HHI", number, 1, following) + body
            offset += length
        fits = len(data) >= offset
        values = head(data, offset, size if fits and capabilities else 0)
        return values + tail if fits else values
    return answer


def region(flags=15, size=0x10000):
    return lambda data, needed, cap: abi.vfio_region_info.pack(
        argsz=needed, flags=flags, index=abi.vfio_region_info.unpack(data)["index"], cap_offset=cap, size=size)


def test_capabilities_of_a_device_are_decoded():
    head = lambda data, needed, cap: abi.vfio_device_info.pack(  # noqa: E731
        argsz=needed, flags=2 | 128, num_regions=9, num_irqs=5, cap_offset=cap)
    with opened(GET_INFO=chain(head, 24, (1, b"\1" * 16), (5, struct.pack("=II", 5, 0)))) as device:
        assert device.info.flags == DeviceFlags.PCI | DeviceFlags.CAPS
        assert device.info.atomic_completion == AtomicCompletion.BITS_32 | AtomicCompletion.BITS_128
        assert [(found.id, len(found.data)) for found in device.info.capabilities] == [(1, 24), (5, 16)]
        assert [len(data) for _, data in device.system.calls] == [24, 24 + 24 + 16]     # asked again, large enough


def test_every_capability_of_a_region_is_decoded():
    sparse = struct.pack("=IIQQQQ", 2, 0, 0x1000, 0x2000, 0x8000, 0x1000)
    answer = chain(region(), 32, (1, sparse), (2, struct.pack("=II", 0x800010DE, 1)), (3, b""),
                   (4, struct.pack("=Q", 0x1234000000)), (5, struct.pack("=II", 9, 0)), (77, b"unknown "))
    with opened(GET_REGION_INFO=answer) as device:
        info = device.regions[9].info
        assert info.sparse_areas == ((0x1000, 0x2000), (0x8000, 0x1000))
        assert info.type == RegionType(0x800010DE, 1) and info.type.vendor == 0x10DE
        assert info.msix_mappable and info.nvlink2_target == 0x1234000000 and info.nvlink2_speed == 9
        assert info.capabilities[-1].id == 77 and info.capabilities[-1].data[8:] == b"unknown "
        assert device.regions.find(0x800010DE, 1).info.index == 0
        assert device.regions.find(1, 1) is None


def test_sparse_areas_are_mapped_one_by_one():
    sparse = struct.pack("=IIQQQQ", 2, 0, 0x1000, 0x2000, 0x8000, 0x1000)
    with opened(GET_REGION_INFO=chain(region(), 32, (1, sparse))) as device:
        with device.regions[2].mmap() as mapped:
            assert [(offset, len(buffer)) for offset, buffer in mapped] == [(0x1000, 0x2000), (0x8000, 0x1000)]
            mapped.view(0x8FF0, 0x10)[:] = b"x" * 16
            assert mapped.areas[1][1][0xFF0:] == b"x" * 16
            for offset, size in ((0, 4), (0x2FFE, 4), (0x8000, 0x1001), (0x9000, 1), (0x8000, -1)):
                with pytest.raises(InvalidArgumentError, match="no mapped area"):
                    mapped.view(offset, size)


def test_a_sparse_list_that_is_longer_than_its_data_is_cut():
    sparse = struct.pack("=IIQQ", 1000, 0, 0x1000, 0x2000)
    with opened(GET_REGION_INFO=chain(region(), 32, (1, sparse))) as device:
        assert device.regions[2].info.sparse_areas == ((0x1000, 0x2000),)


def test_a_device_that_does_not_answer_is_closed():
    system = Scripted(GET_INFO=lambda data: -errno.ENODEV)
    with pytest.raises(NoDeviceError):
        VfioDevice(system, 7)
    assert system.closed == [7]


def config_device(contents):
    answer = chain(region(3, 4096), 32)
    device = opened(GET_REGION_INFO=answer)
    for offset, data in contents.items():
        device.system.memory |= dict(enumerate(data, offset))
    return device


def test_capability_lists_that_loop_end():
    with config_device({0x06: b"\x10\0", 0x34: b"\x41", 0x40: b"\x05\x50", 0x50: b"\x10\x40",
                        0x100: struct.pack("<I", 0x20010001), 0x200: struct.pack("<I", 0x10010003)}) as device:
        assert [(found.id, found.offset) for found in device.config.capabilities()] == [(5, 0x40), (16, 0x50)]
        assert [(found.id, found.offset) for found in device.config.extended_capabilities()] == [(1, 0x100), (3, 0x200)]


def test_bars_of_every_kind_are_told():
    with config_device({0x10: struct.pack("<6I", 0xFE000000, 0xE001, 0xD000000C, 0x12, 0, 0xFD000008)}) as device:
        assert [(bar.index, bar.address, bar.memory, bar.bits, bar.prefetchable) for bar in device.config.bars()] == [
            (0, 0xFE000000, True, 32, False), (1, 0xE000, False, 32, False), (2, 0x12D0000000, True, 64, True),
            (5, 0xFD000000, True, 32, True)]


def test_hot_reset_information_grows_and_names_unowned_devices():
    class Growing(Scripted):
        def ioctl(self, fd, request, arg=0):
            if request != abi.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO:
                return super().ioctl(fd, request, arg)
            fits = ctypes.c_uint32.from_address(arg).value >= 12 + 20 * 8
            rows = [struct.pack("=IHBB", 0xFFFFFFFF if i == 3 else i, 1, 2, i << 3 | 1) for i in range(20)]
            answer = struct.pack("=III", 12, int(fits), 20) + b"".join(rows if fits else [])
            ctypes.memmove(arg, answer, len(answer))
            if not fits:
                raise error(errno.ENOSPC, "ioctl")
            return 0

    with VfioDevice(Growing(), 7) as device:
        info = device.hot_reset_info()
        assert len(info.devices) == 20 and info.by_devid and not info.owned
        assert info.devices[3] == ("0001:02:03.1", None, -1)
        assert info.devices[4].devid == 4


def test_fewer_vectors_than_asked_for_is_an_error_that_tells_how_many():
    irq_info = lambda data: abi.vfio_irq_info.pack(argsz=16, flags=1, index=2, count=64)  # noqa: E731
    with opened(GET_IRQ_INFO=irq_info, SET_IRQS=lambda data: 3) as device:
        with pytest.raises(DmaLimitError, match="3 vectors left for MSIX, not 64"):
            device.interrupts(IrqIndex.MSIX, 64)


def test_running_out_of_descriptors_leaves_none_open():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    irq_info = lambda data: abi.vfio_irq_info.pack(argsz=16, flags=1, index=2, count=2048)  # noqa: E731
    with opened(GET_IRQ_INFO=irq_info, SET_IRQS=lambda data: 0) as device:
        before = os.listdir("/proc/self/fd")
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + 100, limits[1]))
        try:
            with pytest.raises(VfioError, match="RLIMIT_NOFILE") as caught:
                device.interrupts(IrqIndex.MSIX, 2048)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert caught.value.errno == errno.EMFILE
        assert os.listdir("/proc/self/fd") == before


def feature_device(handlers):
    """A device with features: functions from the data to new data or -errno."""
    def answer(data):
        argsz, flags = struct.unpack_from("=II", data)
        handler = handlers.get(flags & 0xFFFF)
        if handler is None:
            return -errno.ENOTTY
        if flags & abi.VFIO_DEVICE_FEATURE_PROBE:
            return 0
        result = handler(data[8:])
        return result if isinstance(result, int) else data[:8] + result
    return opened(FEATURE=answer)


def test_features_are_probed_got_and_set():
    with feature_device({0: lambda data: data, 9: lambda data: struct.pack("=Q", 4242)}) as device:
        assert device.features.probe(Feature.PCI_VF_TOKEN) == FeatureOps.GET | FeatureOps.SET
        assert device.features.probe(Feature.DMA_BUF) == FeatureOps(0)
        assert device.migration.data_size() == 4242
        with pytest.raises(InvalidArgumentError, match="no number of a feature"):
            device.features.get(1 << 16, 8)
        with pytest.raises(UnsupportedError, match="BUS_MASTER"):
            device.features.set_bus_master(True)


class Stream(Scripted):
    """A system that reads and writes data descriptors itself."""

    def __init__(self, pieces, **answers):
        super().__init__(**answers)
        self.pieces = pieces
        self.answers[abi.VFIO_MIG_GET_PRECOPY_INFO] = lambda data: abi.vfio_precopy_info.pack(
            argsz=24, flags=1, initial_bytes=5, dirty_bytes=6)

    def read(self, fd, size):
        piece = self.pieces.pop(0)
        if isinstance(piece, int):
            raise OSError(piece, "scripted")
        return piece[:size]

    def write(self, fd, data):
        return len(data)


def test_a_stream_tells_a_pause_from_the_end():
    set_state = lambda data: data[:8] + struct.pack("=Ii", 6, 33)  # noqa: E731
    system = Stream([b"first", errno.ENOMSG, b"rest", b"", errno.ENODEV], FEATURE=set_state)
    device = VfioDevice(system, 7)
    stream = device.migration.set_state(MigrationState.PRE_COPY)
    assert stream.precopy_info() == PrecopyInfo(5, 6, True)
    assert [stream.read(100), stream.read(100), stream.read(100), stream.read(100)] == [b"first", None, b"rest", b""]
    with pytest.raises(NoDeviceError, match="left the state"):
        stream.read(1)
    device.close()
    assert system.closed == [33, 7]             # the stream first
    with pytest.raises(ValueError):
        stream.read(1)
    with pytest.raises(ClosedError):
        device.migration.set_state(MigrationState.RUNNING)


def test_a_refused_transition_hands_out_nothing():
    with feature_device({2: lambda data: -errno.EINVAL}) as device:
        with pytest.raises(InvalidArgumentError, match="flags"):
            device.migration.set_state(MigrationState.PRE_COPY)
    with feature_device({2: lambda data: -errno.EIO}) as device:
        with pytest.raises(VfioError) as caught:
            device.migration.set_state(MigrationState.STOP)
        assert caught.value.errno == errno.EIO


def test_a_log_is_harvested_into_a_bitmap_that_keeps_its_bits():
    started = []

    def start(data):
        values = abi.vfio_device_feature_dma_logging_control.unpack(data)
        rows = ctypes.string_at(values["ranges"], 16 * values["num_ranges"])
        started.extend(struct.iter_unpack("=QQ", rows))
        return data

    def report(data):
        values = abi.vfio_device_feature_dma_logging_report.unpack(data)
        word = ctypes.c_uint64.from_address(values["bitmap"] + 8)
        word.value |= 0b101
        return data

    with feature_device({6: start, 7: lambda data: b"", 8: report}) as device:
        source = DeviceLogSource(device)
        source.start([(0, 0x1000), (0x8000, 0x1000)], 4096)
        assert started == [(0, 0x1000), (0x8000, 0x1000)]
        bitmap = DirtyBitmap(130)
        bitmap.set(3)
        assert source.harvest(0x100000, 130 * 4096, bitmap) == 2
        assert bitmap.indices().tolist() == [3, 64, 66]
        source.stop()
        assert source.name == "DMA log of 0000:00:01.0"


def test_a_device_log_can_be_the_source_of_a_tracker():
    def report(data):
        values = abi.vfio_device_feature_dma_logging_report.unpack(data)
        if values["iova"] <= 0x40000 < values["iova"] + values["length"]:
            ctypes.c_uint64.from_address(values["bitmap"]).value |= 1 << (0x40000 - values["iova"]) // 4096
        return data

    with feature_device({6: lambda data: data, 7: lambda data: b"", 8: report}) as device, \
            open_backend("software") as backend, GuestMemory.memfd(64 * 4096) as memory, \
            IoAddressSpace(backend) as ioas, MemoryLayout(memory, 4096) as layout:
        ioas.map(memory, 0x20000)
        backend.dirty_sources = lambda: [DeviceLogSource(device)]
        tracker = DirtyTracker(ioas, layout, cpu_writes="off")
        tracker.start()
        bitmap = DirtyBitmap(layout.nbits)
        assert tracker.harvest(bitmap) == 1 and bitmap.indices().tolist() == [0x20]
        tracker.stop()


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 5)), min_size=1, max_size=30), st.integers(1, 12))
def test_joined_ranges_cover_the_same_with_the_smallest_gaps(steps, limit):
    ranges, at = [], 0
    for gap, size in steps:
        ranges.append((at + gap, size))
        at += gap + size
    joined = fewest_ranges(ranges[::-1], limit)
    assert len(joined) <= limit
    covered = np.zeros(at, bool)
    for iova, size in joined:
        assert not covered[iova:iova + size].any()
        covered[iova:iova + size] = True
    assert all(covered[iova:iova + size].all() for iova, size in ranges)
    gaps = sorted((gap for gap, _ in steps[1:]), reverse=True)
    assert covered.sum() == sum(size for _, size in ranges) + sum(gaps[limit - 1:])
