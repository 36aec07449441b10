"""Dirty bits of the self-test IOMMU of a kernel's iommufd: pages of 2048 bytes, really tracked.

Runs as root in a guest of the kernel lab whose kernel has iommufd and its self-test; is skipped elsewhere.  Linux 6.12
has the self-test IOMMU only without a real one: boot it with intel_iommu=off.
"""
import ctypes
import errno
import mmap
import os
import struct

import numpy as np
import pytest

from vfiodma.backends.iommufd import Hwpt, HwptSource, Iommufd
from vfiodma.errors import InvalidArgumentError, UnsupportedError, VfioError

pytestmark = [pytest.mark.mock,
              pytest.mark.skipif(not os.path.exists("/dev/iommu"), reason="this kernel has no iommufd")]

PAGE = 4096
RELEASE = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2]))
IOMMU_TEST_CMD = 0x3BA0
ADD_RESERVED, MOCK_DOMAIN, MAKE_DIRTY = 1, 2, 13
SMALL = 2048
BASE = 0x2000000


class Mock:
    """A device of the self-test IOMMU."""

    def __init__(self, iommufd, ioas):
        self.iommufd = iommufd
        answer = self.command(MOCK_DOMAIN, ioas.id)
        self.stdev, self.hwpt_id, self.id = struct.unpack_from("=III", answer, 16)

    def command(self, op, id, rest=b""):
        data = bytearray(struct.pack("=IIII", 96, op, id, 0) + rest.ljust(80, b"\0"))
        self.iommufd.ioctl(IOMMU_TEST_CMD, data, "iommu_test")
        return data

    def write(self, hwpt, iova, npages, dirty):
        """Mark pages of [iova, iova + npages * 2048) written: numbers relative to iova."""
        words = np.zeros((npages + 63) // 64, np.uint64)
        for page in dirty:
            words[page // 64] |= np.uint64(1 << page % 64)
        self.command(MAKE_DIRTY, hwpt.id, struct.pack("=IIQQQQQ", 0, 0, iova, npages * SMALL, SMALL,
                                                      words.ctypes.data, 0))


def pages(words):
    return {i for i in range(len(words) * 64) if int(words[i // 64]) >> i % 64 & 1}


@pytest.fixture
def mock():
    with Iommufd() as iommufd:
        ioas = iommufd.alloc_ioas()
        try:
            device = Mock(iommufd, ioas)
        except VfioError as exc:
            if RELEASE > (6, 12) and exc.errno != errno.ENOTTY:
                raise
            pytest.skip(f"no self-test IOMMU: {exc}")
        yield device, ioas, iommufd.alloc_hwpt(ioas, device.id, dirty_tracking=True)


@pytest.fixture
def buffer():
    size = 4 << 20
    block = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    yield (address + (2 << 20) - 1) & -(2 << 20)


def test_the_hardware_tells_whether_it_tracks_writes(mock):
    device, _, _ = mock
    info = device.iommufd.hw_info(device.id)
    assert info.dirty_tracking and len(info.data) == 8
    assert device.iommufd.may_lose_last_page(info) == (RELEASE > (6, 12))


def test_aperture_and_alignment_of_the_self_test_iommu(mock, buffer):
    _, ioas, _ = mock
    assert ioas.iova_ranges() == ((0x1000000, 0x7FFFFFFF),) and ioas.iova_alignment() == SMALL
    assert ioas.map_auto(buffer, PAGE) == 0x1000000


def test_many_ranges_are_told_whole(mock):
    device, ioas, _ = mock
    for i in range(100):
        device.command(ADD_RESERVED, ioas.id, struct.pack("=QQ", 0x10000000 + i * 0x10000, 0x1000))
    assert len(ioas.iova_ranges()) == 101


def test_no_tracking_without_asking_for_it(mock):
    device, ioas, _ = mock
    with pytest.raises(UnsupportedError):
        Hwpt(ioas, device.hwpt_id).set_dirty_tracking(True)


@pytest.mark.parametrize("written", [(0, 2, 64, 127), (127,), (1,), (63,), range(128), (0,), (62, 65)])
def test_no_dirty_page_is_lost_and_none_is_found_outside_of_its_area(mock, buffer, written):
    device, ioas, hwpt = mock
    ioas.map_dma(BASE, buffer, 64 * SMALL, 3)
    ioas.map_dma(BASE + 64 * SMALL, buffer + (1 << 20), 64 * SMALL, 3)
    hwpt.set_dirty_tracking(True)
    device.write(hwpt, BASE, 128, written)
    words = np.zeros(2, np.uint64)
    count = hwpt.harvest(BASE, 128 * SMALL, words, pgsize=SMALL)
    found = pages(words)
    assert set(written) <= found and count == len(found)
    for area in (range(64), range(64, 128)):
        assert set(written) & set(area) or not found & set(area), "an area that nobody wrote to is clean"
    if RELEASE <= (6, 12):
        assert found == set(written)
    assert hwpt.harvest(BASE, 128 * SMALL, words, pgsize=SMALL) == 0, "bits are read once"


def test_the_kernel_alone_loses_the_last_page_of_a_block(mock, buffer):
    device, ioas, hwpt = mock
    ioas.map_dma(BASE, buffer, 64 * SMALL, 3)
    hwpt.set_dirty_tracking(True)
    device.write(hwpt, BASE, 64, [63])
    words = np.zeros(1, np.uint64)
    hwpt.get_dirty_bitmap(BASE, 64 * SMALL, words, clear=False, pgsize=SMALL)
    assert (63 in pages(words)) == (RELEASE <= (6, 12)), "may_lose_last_page() tells the truth about this kernel"
    hwpt.loses_last_page = False
    assert hwpt.harvest(BASE, 64 * SMALL, np.zeros(1, np.uint64), pgsize=SMALL) == len(pages(words))


def test_a_read_that_cuts_a_block_would_lose_the_rest_of_it(mock, buffer):
    device, ioas, hwpt = mock
    ioas.map_dma(BASE, buffer, 64 * SMALL, 3)
    hwpt.set_dirty_tracking(True)
    device.write(hwpt, BASE, 64, [1])
    words = np.zeros(1, np.uint64)
    hwpt.get_dirty_bitmap(BASE, SMALL, words, pgsize=SMALL)             # the first page alone
    hwpt.get_dirty_bitmap(BASE, 64 * SMALL, words, pgsize=SMALL)
    assert (1 in pages(words)) == (RELEASE <= (6, 12)), "hence harvest() reads whole areas only"


def test_without_large_pages_bits_are_exact(buffer):
    with Iommufd() as iommufd:
        ioas = iommufd.alloc_ioas()
        ioas.huge_pages = False
        try:
            device = Mock(iommufd, ioas)
        except VfioError as exc:
            if RELEASE > (6, 12) and exc.errno != errno.ENOTTY:
                raise
            pytest.skip(f"no self-test IOMMU: {exc}")
        hwpt = iommufd.alloc_hwpt(ioas, device.id, dirty_tracking=True)
        ioas.map_dma(BASE, buffer, 64 * PAGE, 3)
        hwpt.set_dirty_tracking(True)
        device.write(hwpt, BASE, 128, [8, 9, 40, 41])
        words = np.zeros(1, np.uint64)
        hwpt.loses_last_page = False
        hwpt.harvest(BASE, 64 * PAGE, words, pgsize=PAGE)
        assert pages(words) == {4, 20}


def test_reading_without_clearing_keeps_the_bits(mock, buffer):
    device, ioas, hwpt = mock
    ioas.map_dma(BASE, buffer, 64 * SMALL, 3)
    hwpt.set_dirty_tracking(True)
    device.write(hwpt, BASE, 64, [4, 20])
    first, again = np.zeros(1, np.uint64), np.zeros(1, np.uint64)
    hwpt.get_dirty_bitmap(BASE, 64 * SMALL, first, clear=False, pgsize=SMALL)
    hwpt.get_dirty_bitmap(BASE, 64 * SMALL, again, pgsize=SMALL)
    assert first == again != 0
    hwpt.get_dirty_bitmap(BASE, 64 * SMALL, again, pgsize=SMALL)
    assert first == again, "bits are added to those of the buffer"


def test_holes_hide_nothing(mock, buffer):
    device, ioas, hwpt = mock
    ioas.map_dma(BASE + 64 * SMALL, buffer, 32 * SMALL, 3)
    ioas.map_dma(BASE + 128 * SMALL, buffer + (1 << 20), 6 * SMALL, 3)
    hwpt.set_dirty_tracking(True)
    device.write(hwpt, BASE + 64 * SMALL, 32, [7])
    device.write(hwpt, BASE + 128 * SMALL, 6, [3])
    words = np.zeros(4, np.uint64)
    hwpt.harvest(BASE, 256 * SMALL, words, pgsize=SMALL)
    assert {64 + 7, 128 + 3} <= pages(words) <= set(range(64, 96)) | set(range(128, 134))


def test_areas_that_begin_between_words(mock, buffer):
    device, ioas, hwpt = mock
    ioas.map_dma(BASE + 3 * SMALL, buffer, 10 * SMALL, 3)
    hwpt.set_dirty_tracking(True)
    device.write(hwpt, BASE + 3 * SMALL, 10, [0, 9])
    words = np.zeros(1, np.uint64)
    hwpt.harvest(BASE, 64 * SMALL, words, pgsize=SMALL)
    assert {3, 12} <= pages(words) <= set(range(3, 13))


def test_bad_bitmaps_and_cut_areas_lose_no_bits(mock, buffer):
    device, ioas, hwpt = mock
    ioas.map_dma(BASE, buffer, 64 * SMALL, 3)
    hwpt.set_dirty_tracking(True)
    device.write(hwpt, BASE, 64, [11])
    words = np.zeros(1, np.uint64)
    for iova, size, target, pgsize in [
            (BASE, 64 * SMALL, np.zeros(7, np.uint8), SMALL), (BASE, 64 * SMALL, np.zeros(0, np.uint64), SMALL),
            (BASE, 32 * SMALL, words, SMALL), (BASE, 0, words, SMALL), (BASE, 64 * SMALL, words, 3000),
            (BASE, 64 * SMALL, words, 0), (BASE + 1, 64 * SMALL, words, SMALL),
            ((1 << 64) - SMALL, PAGE, words, SMALL)]:
        with pytest.raises(InvalidArgumentError):
            hwpt.harvest(iova, size, target, pgsize=pgsize)
    with pytest.raises((BufferError, ValueError)):
        hwpt.harvest(BASE, 64 * SMALL, bytes(8), pgsize=SMALL)
    hwpt.harvest(BASE, 64 * SMALL, words, pgsize=SMALL)
    assert 11 in pages(words)


def test_the_source_of_dirty_pages(mock, buffer):
    device, ioas, hwpt = mock
    ioas.map_dma(BASE, buffer, 64 * PAGE, 3)
    source = HwptSource(hwpt)
    source.start([(BASE, 64 * PAGE)], PAGE)
    device.write(hwpt, BASE, 128, [5, 100])
    words = np.zeros(1, np.uint64)
    assert source.harvest(BASE, 64 * PAGE, words) == len(pages(words)) and {2, 50} <= pages(words)
    device.write(hwpt, BASE, 128, [5])
    source.start([(BASE, 64 * PAGE)], PAGE)
    assert source.harvest(BASE, 64 * PAGE, words) == 0, "starting forgets"
    source.stop()
