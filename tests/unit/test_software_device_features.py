"""DEVICE_FEATURE of software devices, DMA logging among them, and ioeventfds."""
import ctypes
import errno
import os
import struct
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from software_card import Card
from software_device import Opened, fails, opened, pages

from vfiodma.errors import VfioError
from vfiodma.uapi import vfio as abi

GET, SET, PROBE = abi.VFIO_DEVICE_FEATURE_GET, abi.VFIO_DEVICE_FEATURE_SET, abi.VFIO_DEVICE_FEATURE_PROBE
TOKEN, ENTRY = abi.VFIO_DEVICE_FEATURE_PCI_VF_TOKEN, abi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY
ENTRY_WITH_WAKEUP = abi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP
EXIT = abi.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT
LOG_START, LOG_STOP = abi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, abi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP
LOG_REPORT, DMA_BUF = abi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, abi.VFIO_DEVICE_FEATURE_DMA_BUF
IOVA, PAGE = 0x100000, 4096


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# ---- the dispatch

def feature_call(device, argsz, flags, data=bytes(32)):
    device.ioctl(abi.VFIO_DEVICE_FEATURE, struct.pack("=II", argsz, flags) + data)


def test_the_head_is_checked_before_the_feature():
    with opened(Card(dma_logging=True)) as device:
        for argsz, flags in ((7, PROBE | LOG_STOP), (40, 1 << 19 | PROBE | LOG_STOP), (40, 1 << 31), (40, GET | SET)):
            with fails(errno.EINVAL):
                feature_call(device, argsz, flags)
        with fails(errno.ENOTTY):
            feature_call(device, 8, PROBE | 0x1234)
        with fails(errno.EFAULT):
            device.vfio.ioctl(device.fd, abi.VFIO_DEVICE_FEATURE, 16)


@pytest.mark.parametrize("number, ops, size", [(LOG_START, SET, 24), (LOG_STOP, SET, 0), (LOG_REPORT, GET, 32),
                                               (ENTRY, SET, 0), (EXIT, SET, 0), (TOKEN, SET, 16), (DMA_BUF, GET, 16)])
def test_ops_are_checked_before_a_probe_and_sizes_after(number, ops, size):
    with opened(Card(dma_logging=True, vf_token=bytes(16))) as device:
        feature_call(device, 8, PROBE | number)
        feature_call(device, 8, PROBE | ops | number)
        with fails(errno.EINVAL):
            feature_call(device, 40, PROBE | GET | SET | number)
        with fails(errno.EINVAL):
            feature_call(device, 40, (GET | SET) ^ ops | number)
        with fails(errno.EINVAL):
            feature_call(device, 40, number)
        if size:
            with fails(errno.EINVAL):
                feature_call(device, 8 + size - 1, ops | number)


def test_kernels_before_features_and_without_them():
    with opened(Card(), kernel="5.4") as device:
        with fails(errno.ENOTTY):
            device.feature(ENTRY, PROBE)
    with opened(Card(vf_token=b""), kernel="5.12") as device:
        device.feature(TOKEN, PROBE)
        with fails(errno.ENOTTY):
            device.feature(ENTRY, PROBE)


def test_a_token_is_kept_by_a_device_that_has_one():
    with opened(Card(vf_token=bytes(16))) as device:
        device.set(TOKEN, bytes(range(16)))
        assert device.device.vf_token == bytes(range(16))
    with opened(Card()) as device:
        with fails(errno.ENOTTY):
            device.set(TOKEN, bytes(16))


def test_registers_are_not_exported_as_a_dmabuf():
    with opened(Card()) as device:
        for region, flags, ranges, code in ((0, 0, 0, errno.EINVAL), (0, 1, 1, errno.EINVAL), (7, 0, 1, errno.ENODEV),
                                            (0, 0, 1, errno.EOPNOTSUPP)):
            with fails(code):
                device.get(DMA_BUF, struct.pack("=IIIIQQ", region, 0, flags, ranges, 0, PAGE))


# ---- low power

def test_low_power_is_entered_once_and_left_at_any_time():
    with opened(Card()) as device:
        device.set(EXIT)
        device.set(ENTRY)
        with fails(errno.EINVAL):
            device.set(ENTRY)
        device.vfio.pread(device.fd, 4, 7 << 40)
        with fails(errno.EINVAL):
            device.set(ENTRY)               # an access does not end it
        device.set(EXIT)
        device.set(ENTRY)


def test_an_access_wakes_a_device_and_tells():
    wakeup = os.eventfd(0, os.EFD_NONBLOCK)
    with opened(Card()) as device:
        for access in (lambda: device.vfio.pread(device.fd, 4, 7 << 40),
                       lambda: device.ioctl(abi.VFIO_DEVICE_GET_INFO, bytes([24] + [0] * 23)),
                       lambda: device.vfio.pwrite(device.fd, b"\0", 7 << 40)):
            device.set(ENTRY_WITH_WAKEUP, struct.pack("=iI", wakeup, 0))
            access()
            assert os.eventfd_read(wakeup) == 1
            access()
            with pytest.raises(BlockingIOError):
                os.eventfd_read(wakeup)
        for fd, code in ((-1, errno.EINVAL), (1 << 20, errno.EBADF), (0, errno.EINVAL)):
            with fails(code):
                device.set(ENTRY_WITH_WAKEUP, struct.pack("=iI", fd, 0))
        device.set(ENTRY_WITH_WAKEUP, struct.pack("=iI", wakeup, 0))
    os.close(wakeup)


# ---- DMA logging

@pytest.fixture
def logging():
    device = Opened(Card(dma_logging=True))
    with pages(64) as (_, vaddr):
        device.container.map_dma(IOVA, vaddr, 64 * PAGE, 3)
        yield device
        device.close()


def start(device, *ranges, page_size=PAGE, count=None, address=None):
    entry = abi.vfio_device_feature_dma_logging_range
    array = ctypes.create_string_buffer(b"".join(entry.pack(iova=iova, length=length) for iova, length in ranges))
    count = len(ranges) if count is None else count
    address = ctypes.addressof(array) if address is None else address
    layout = abi.vfio_device_feature_dma_logging_control
    data = device.set(LOG_START, layout.pack(page_size=page_size, num_ranges=count, ranges=address))
    return layout.unpack(data[-layout.size:])["page_size"]


def report(device, iova, length, page_size=PAGE, bitmap=None):
    words = (ctypes.c_uint64 * (length // page_size // 64 + 1))() if bitmap is None else bitmap
    device.get(LOG_REPORT, struct.pack("=QQQQ", iova, length, page_size, ctypes.addressof(words)))
    return int.from_bytes(words, "little")


def test_written_pages_are_reported_once(logging):
    port = logging.device.port
    assert start(logging, (IOVA, 32 * PAGE)) == PAGE
    port.write(IOVA + PAGE + 5, b"x")
    port.write(IOVA + 3 * PAGE - 1, b"xx")
    port.write(IOVA + 40 * PAGE, b"x")              # not logged
    port.read(IOVA + 9 * PAGE, 4)
    assert report(logging, IOVA, 64 * PAGE) == 0b1110
    assert report(logging, IOVA, 64 * PAGE) == 0
    logging.set(LOG_STOP)
    logging.set(LOG_STOP)
    with fails(errno.EINVAL):
        report(logging, IOVA, PAGE)


def test_bits_are_added_to_what_is_there(logging):
    start(logging, (IOVA, 32 * PAGE))
    logging.device.port.write(IOVA, b"x")
    assert report(logging, IOVA, 8 * PAGE, bitmap=(ctypes.c_uint64 * 1)(0xF0F0)) == 0xF0F1


@pytest.mark.parametrize("asked, used", [(1, PAGE), (2048, PAGE), (PAGE, PAGE), (16 * PAGE, 16 * PAGE)])
def test_the_page_size_is_a_hint(logging, asked, used):
    assert start(logging, (IOVA, 32 * PAGE), page_size=asked) == used


def test_small_pages_are_widened_to_those_of_the_log(logging):
    start(logging, (IOVA + 512, 1024), (IOVA + 2048, 512), (IOVA + 3 * PAGE - 512, 1024), page_size=512)
    logging.device.port.write(IOVA, bytes(5 * PAGE))
    assert report(logging, IOVA, 8 * PAGE) == 0b1101


def test_no_page_size_fits_nothing(logging):
    with fails(errno.EINVAL):
        start(logging, (IOVA, PAGE), page_size=0)


@pytest.mark.parametrize("wanted, bits", [(PAGE, 0b11110000), (2 * PAGE, 0b1100), (4 * PAGE, 0b10), (8 * PAGE, 0b1)])
def test_a_report_may_have_pages_of_another_size(logging, wanted, bits):
    assert start(logging, (IOVA, 32 * PAGE), page_size=4 * PAGE) == 4 * PAGE
    logging.device.port.write(IOVA + 5 * PAGE, b"x")
    assert report(logging, IOVA, 32 * PAGE, wanted) == bits


def test_a_report_may_cover_everything(logging):
    start(logging, (IOVA, PAGE), (IOVA + 40 * PAGE, 8 * PAGE))
    logging.device.port.write(IOVA + 41 * PAGE, b"x")
    logging.device.port.write(IOVA, b"x")
    huge = 1 << 62
    assert report(logging, 0, (1 << 63) - PAGE, huge, (ctypes.c_uint64 * 1)()) == 1
    logging.device.port.write(IOVA + 47 * PAGE, b"x")
    with pages(1 << 10) as (memory, vaddr):
        logging.get(LOG_REPORT, struct.pack("=QQQQ", 0, 1 << 34, PAGE, vaddr))
        assert int.from_bytes(memory[:], "little") == 1 << IOVA // PAGE + 47


def test_a_report_of_a_part_of_a_page_tells_of_the_page(logging):
    start(logging, (IOVA, 4 * PAGE))
    logging.device.port.write(IOVA + 8, b"x")
    assert report(logging, IOVA, 0) == 0
    assert report(logging, IOVA, 1) == 1
    assert report(logging, IOVA, 1) == 0


def test_ranges_that_can_not_be_right(logging):
    with fails(errno.EINVAL):
        start(logging)
    with fails(errno.E2BIG):
        start(logging, (0, PAGE), count=257)
    with fails(errno.EFAULT):
        start(logging, address=16, count=1)
    for ranges, code in ((((1, PAGE),), errno.EINVAL), (((0, 100),), errno.EINVAL),
                         ((((1 << 64) - PAGE, PAGE),), errno.EOVERFLOW),
                         (((0, 2 * PAGE), (PAGE, PAGE)), errno.EINVAL), (((PAGE, PAGE), (0, 3 * PAGE)), errno.EINVAL)):
        with fails(code):
            start(logging, *ranges)
    start(logging, (0, PAGE), (PAGE, PAGE))
    with fails(errno.EINVAL):
        start(logging, (0, PAGE))                   # it is on


def test_a_reply_that_can_not_be_written_stops_the_log(logging):
    with pages(1) as (memory, vaddr):
        array = (ctypes.c_uint64 * 2)(IOVA, PAGE)
        memory[:32] = struct.pack("=IIQIIQ", 32, SET | LOG_START, PAGE, 1, 0, ctypes.addressof(array))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(vaddr), PAGE, 1) == 0
        with fails(errno.EFAULT):
            logging.vfio.ioctl(logging.fd, abi.VFIO_DEVICE_FEATURE, vaddr)
        assert not logging.device.port.logging
        assert libc.mprotect(ctypes.c_void_p(vaddr), PAGE, 3) == 0


def test_a_bad_bitmap_loses_no_bits(logging):
    start(logging, (IOVA, 32 * PAGE))
    logging.device.port.write(IOVA, b"x")
    with fails(errno.EFAULT):
        logging.get(LOG_REPORT, struct.pack("=QQQQ", IOVA, PAGE, PAGE, 16))
    for iova, length, page_size, code in ((IOVA, PAGE, 2048, errno.EINVAL), (IOVA, 3 * PAGE, 3 * PAGE, errno.EINVAL),
                                          (IOVA + 1, PAGE, PAGE, errno.EINVAL),
                                          ((1 << 64) - PAGE, PAGE, PAGE, errno.EOVERFLOW)):
        with fails(code):
            report(logging, iova, length, page_size, (ctypes.c_uint64 * 1)())
    assert report(logging, IOVA, PAGE) == 1


@settings(max_examples=40, deadline=None)
@given(ranges=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8)), min_size=1, max_size=4),
       writes=st.lists(st.tuples(st.integers(0, 64 * PAGE - 300), st.integers(1, 300)), max_size=10))
def test_the_log_has_what_was_written_inside_its_ranges(ranges, writes):
    device = Opened(Card(dma_logging=True))
    with pages(64) as (_, vaddr):
        device.container.map_dma(IOVA, vaddr, 64 * PAGE, 3)
        logged = [set(range(first, first + count)) for first, count in ranges]
        overlap = sum(map(len, logged)) != len(set().union(*logged))
        try:
            start(device, *[(IOVA + first * PAGE, count * PAGE) for first, count in ranges])
            assert not overlap
        except VfioError as exc:
            assert exc.errno == errno.EINVAL and overlap
        else:
            written = set()
            for offset, size in writes:
                device.device.port.write(IOVA + offset, bytes(size))
                written |= set(range(offset // PAGE, (offset + size - 1) // PAGE + 1))
            assert report(device, IOVA, 64 * PAGE) == sum(1 << page for page in written & set().union(*logged))
        finally:
            device.close()


# ---- ioeventfds

def ioeventfd(device, offset, data, width, fd, region=0):
    device.ioctl(abi.VFIO_DEVICE_IOEVENTFD, struct.pack("=IIQQiI", 32, width, region << 40 | offset, data, fd, 0))


@pytest.fixture
def card():
    with opened(Card(msix_table=(3, 0x1000, 0x100))) as device:
        yield device


@pytest.fixture
def eventfd():
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_written_eventfd_writes_the_register(card, eventfd, width):
    ioeventfd(card, 0x10, 0x1122334455667788, width, eventfd)
    for count in (1, 2, 3):
        os.eventfd_write(eventfd, 5)
        wait_for(lambda count=count: len(card.device.accesses) >= count)
    assert card.device.accesses == [(0, 0x10, struct.pack("=Q", 0x1122334455667788)[:width])] * 3


def test_an_eventfd_is_drained(card, eventfd):
    ioeventfd(card, 4, 7, 4, eventfd)
    os.eventfd_write(eventfd, 5)
    wait_for(lambda: card.device.accesses)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(eventfd)


def test_an_eventfd_that_was_written_before_writes_at_once_and_is_not_drained(card, eventfd):
    os.eventfd_write(eventfd, 5)
    for count, data in ((1, 7), (2, 8)):
        ioeventfd(card, 4, data, 4, eventfd)
        wait_for(lambda count=count: len(card.device.accesses) == count)
    assert [int.from_bytes(data, "little") for _, _, data in card.device.accesses] == [7, 8]
    assert os.eventfd_read(eventfd) == 5


def test_one_eventfd_writes_several_registers(card, eventfd):
    other = os.dup(eventfd)
    for data in range(20):
        ioeventfd(card, 4, data, 4, eventfd if data % 2 else other)
    for count in (1, 2, 3):
        os.eventfd_write(eventfd, 1)
        wait_for(lambda count=count: len(card.device.accesses) == 20 * count)
    os.close(other)


def test_a_removed_ioeventfd_writes_nothing(card, eventfd):
    ioeventfd(card, 4, 1, 4, eventfd)
    ioeventfd(card, 8, 2, 4, eventfd)
    ioeventfd(card, 4, 1, 4, -1)
    os.eventfd_write(eventfd, 1)
    wait_for(lambda: card.device.accesses)
    ioeventfd(card, 8, 2, 4, -1)
    os.eventfd_write(eventfd, 1)
    assert card.device.accesses == [(0, 8, struct.pack("=I", 2))]


def test_nothing_is_written_while_memory_access_is_off(card, eventfd):
    ioeventfd(card, 4, 1, 4, eventfd)
    card.vfio.pwrite(card.fd, b"\0\0", 7 << 40 | 4)
    os.eventfd_write(eventfd, 1)
    ioeventfd(card, 4, 1, 4, -1)            # waits for a write that is under way
    assert not card.device.accesses


@pytest.mark.parametrize("offset, width, region, code", [
    (0xFFC, 4, 3, 0), (0xFFE, 2, 3, 0), (0xFFD, 4, 3, errno.EINVAL), (0x10FF, 1, 3, errno.EINVAL), (0x1100, 1, 3, 0),
    (0x1FFFF, 1, 0, 0), (0x1FFFF, 2, 0, errno.EINVAL), (0, 4, 1, errno.EINVAL), (0, 4, 7, errno.EINVAL),
    (0, 4, 6, errno.EINVAL), (0, 3, 0, errno.EINVAL), (0, 16, 0, errno.EINVAL), (0, 8, 0, errno.EINVAL)])
def test_places_where_an_ioeventfd_can_be(card, eventfd, offset, width, region, code):
    if code:
        with fails(code):
            ioeventfd(card, offset, 0, width, eventfd, region)
    else:
        ioeventfd(card, offset, 0, width, eventfd, region)


def test_a_device_has_a_thousand(card, eventfd):
    for data in range(1000):
        ioeventfd(card, 4, data, 4, eventfd)
    with fails(errno.ENOSPC):
        ioeventfd(card, 4, 1000, 4, eventfd)
    with fails(errno.EEXIST):
        ioeventfd(card, 4, 999, 4, eventfd)
    ioeventfd(card, 4, 999, 4, -1)
    ioeventfd(card, 4, 1000, 4, eventfd)


def test_the_thread_lives_while_there_is_an_ioeventfd(card, eventfd):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name == f"eventfds of {card.device.address}"]
    wait_for(lambda: not threads())         # those of other tests
    for _ in range(5):
        ioeventfd(card, 4, 1, 4, eventfd)
        ioeventfd(card, 8, 1, 4, eventfd)
        assert len([thread for thread in threads() if thread.is_alive()]) >= 1
        ioeventfd(card, 4, 1, 4, -1)
        ioeventfd(card, 8, 1, 4, -1)
    wait_for(lambda: not threads())


def test_a_mistake_of_the_device_does_not_stop_the_others(card, eventfd, capfd):
    def write(index, offset, data):
        if offset == 4:
            raise RuntimeError("a mistake")
        card.device.accesses.append(offset)
    card.device.region_write = write
    ioeventfd(card, 4, 1, 4, eventfd)
    ioeventfd(card, 8, 1, 4, eventfd)
    for count in (1, 2):
        os.eventfd_write(eventfd, 1)
        wait_for(lambda count=count: len(card.device.accesses) >= count)
    card.device.__dict__.pop("region_write")
