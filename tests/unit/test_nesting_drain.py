"""What ends with a page table: the page requests that wait for it; and what a walk's flags leave in dirty logs."""
import ctypes
import errno
import random
import select
import struct
import threading
import time

import numpy as np
import pytest
from test_nesting_op import PAGE, RIGS, Rig, refused

from vfiodma import SoftwareGroup, SoftwareVfio
from vfiodma.backends.software.device.plain import PlainDevice
from vfiodma.errors import MemoryFaultError
from vfiodma.uapi import iommu
from vfiodma.uapi import vfio as abi


@pytest.fixture
def rig():
    rig = Rig()
    rig.tables()
    assert [rig.vfio.pasids.allocate() for _ in range(2)] == [1, 2]
    rig.bind()
    rig.bind(hpasid=2)
    rig.fd_faults = rig.vfio.open_fault_queue(rig.device, timeout=60)
    rig.sink = rig.port.fault_sink
    yield rig
    RIGS.remove(rig)
    rig.close()


def kinds(rig):
    raw = rig.vfio.read(rig.fd_faults, 64 * 64)
    return [struct.unpack_from("=I", raw, at)[0] for at in range(0, len(raw), 64)]


def answer(rig, group, pasid=1):
    return rig.vfio.write(rig.fd_faults, iommu.iommu_page_response.pack(
        argsz=24, version=iommu.IOMMU_PAGE_RESP_VERSION_1, flags=iommu.IOMMU_PAGE_RESP_PASID_VALID, pasid=pasid,
        grpid=group, code=iommu.IOMMU_PAGE_RESP_SUCCESS))


def close_device(rig):
    rig.vfio.close(rig.device)


ENDS = {"unbind": lambda rig: rig.bind(1), "a second bind, which unbinds": lambda rig: refused(rig.bind),
        "unbind and bind": lambda rig: (rig.bind(1), rig.bind()),
        "free of the PASID": lambda rig: rig.vfio.pasids.free(1),
        "close of the device": close_device}


@pytest.mark.parametrize("end", ENDS)
def test_whoever_waits_for_a_page_is_told_that_its_table_is_gone(rig, end):
    rig.entry(4, 1, 0)
    got = []

    def read():
        try:
            got.append(rig.port.read(PAGE, 4, pasid=1))
        except OSError as exc:
            got.append(exc.errno)

    thread = threading.Thread(target=read)
    thread.start()
    assert select.select([rig.fd_faults], [], [], 10)[0]
    ENDS[end](rig)
    thread.join(10)
    assert got == [errno.EFAULT]
    assert kinds(rig) == [iommu.IOMMU_FAULT_DMA_UNRECOV]        # the request is nobody's any more
    assert refused(answer, rig, 0) == errno.EINVAL


@pytest.mark.parametrize("end", [end for end in ENDS if end != "close of the device"])
def test_requests_of_other_tables_go_on_waiting(rig, end):
    mine, other = rig.sink.request_pages(1, [PAGE, 2 * PAGE], 1), rig.sink.request_pages(2, [PAGE], 1)
    ENDS[end](rig)
    assert kinds(rig) == [iommu.IOMMU_FAULT_PAGE_REQ]
    assert rig.sink.answer(mine) == iommu.IOMMU_PAGE_RESP_INVALID
    assert refused(answer, rig, mine) == errno.EINVAL
    assert answer(rig, other, 2) == 24 and rig.sink.answer(other) == iommu.IOMMU_PAGE_RESP_SUCCESS


def test_a_request_that_was_read_is_ended_all_the_same(rig):
    group = rig.sink.request_pages(1, [PAGE], 1)
    assert kinds(rig) == [2] and not select.select([rig.fd_faults], [], [], 0)[0]
    rig.bind(1)
    assert refused(answer, rig, group) == errno.EINVAL and rig.sink.answer(group) == 1
    assert not select.select([rig.fd_faults], [], [], 0)[0]


def test_without_a_table_there_is_nobody_to_ask(rig):
    rig.bind(1)
    group = rig.sink.request_pages(1, [PAGE], 1)
    assert kinds(rig) == [] and rig.sink.answer(group) == iommu.IOMMU_PAGE_RESP_INVALID


def test_freeing_a_pasid_leaves_its_table_bound(rig):
    rig.vfio.pasids.free(1)
    assert rig.port.read(16 * PAGE, 4, pasid=1) == b"p016"
    assert refused(rig.bind) == errno.ENOENT                # and unbinds, as every failure of a bind
    assert refused(rig.port.read, 16 * PAGE, 4, pasid=1) == errno.EFAULT


def logged(rig):
    words = np.zeros(1, np.uint64)
    rig.port.harvest(0, 64 * PAGE, words)
    return {page for page in range(64) if int(words[0]) >> page & 1}


def test_flags_that_a_walk_sets_are_in_the_device_s_dirty_log(rig):
    rig.port.start_logging([(0, 64 * PAGE)])
    assert rig.port.read(16 * PAGE, 4, pasid=1) == b"p016"
    assert logged(rig) == {1, 2, 3, 4}                      # accessed, in every table
    rig.port.read(17 * PAGE, 4, pasid=1)
    assert logged(rig) == {4}
    rig.port.read(17 * PAGE, 4, pasid=1)
    assert logged(rig) == set()                             # from the cache
    rig.port.write(17 * PAGE, b"x", pasid=1)
    assert logged(rig) == {4, 17}                           # dirty, and the data
    rig.entry(4, 18, 18 * PAGE | 5)
    with pytest.raises(MemoryFaultError):
        rig.port.write(18 * PAGE, b"x", pasid=1)
    assert logged(rig) == set()                             # a walk that fails sets nothing
    path = rig.vfio._groups[0].paths["0000:00:10.0"]
    path.translate_many(np.array([19 * PAGE], np.uint64), 1)
    assert logged(rig) == {4}


def test_the_container_takes_all_that_a_device_can_reach_for_dirty(rig):
    bitmap = np.zeros(1, np.uint64)
    rig.call(abi.VFIO_IOMMU_DIRTY_PAGES, struct.pack("=II", 8, abi.VFIO_IOMMU_DIRTY_PAGES_FLAG_START))
    rig.call(abi.VFIO_IOMMU_DIRTY_PAGES, struct.pack(
        "=IIQQQQQ", 48, abi.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP, 0, 64 * PAGE, PAGE, 8, bitmap.ctypes.data))
    assert bitmap[0] == 2**64 - 1


def test_a_device_that_is_not_on_pci_is_not_bound():
    device = PlainDevice("fe000000.dma")
    device.bus, device.irq_indexes = abi.VFIO_DEVICE_FLAGS_PLATFORM, 0
    rig = Rig(groups=[SoftwareGroup(0, [device], nestable=True)], name="fe000000.dma")
    rig.vfio.pasids.allocate()
    assert refused(rig.bind, vtd=64) == errno.EINVAL        # checked before
    assert refused(rig.bind) == refused(rig.bind, hpasid=0) == 524
    assert rig.bind(1) == 0 and rig.invalidate() == 0


def test_free_of_a_pasid_leaves_devices_of_an_iommufd_alone():
    vfio = SoftwareVfio("7.2", [SoftwareGroup(0, ["0000:00:10.0"], nestable=True, page_request_timeout=1.0)])
    iommufd, device = vfio.open("/dev/iommu"), vfio.open("/dev/vfio/devices/vfio0")
    arg = abi.vfio_device_bind_iommufd.pack(argsz=16, iommufd=iommufd)
    buffer = ctypes.create_string_buffer(arg, len(arg))
    vfio.ioctl(device, abi.VFIO_DEVICE_BIND_IOMMUFD, ctypes.addressof(buffer))
    vfio.pasids.free(vfio.pasids.allocate())
    vfio.close(device)
    vfio.close(iommufd)


def test_accesses_answers_and_binds_beside_each_other_all_end(rig):
    for page in range(1, 8):
        rig.entry(4, page, 0)
    over, outcomes = threading.Event(), []

    def device(pasid, seed):
        source = random.Random(seed)
        while not over.is_set():
            try:
                rig.port.read(source.randrange(1, 8) * PAGE, 4, pasid=pasid)
            except OSError as exc:
                outcomes.append(exc.errno)

    def guest():
        source = random.Random(0)
        while not over.is_set() or any(thread.is_alive() for thread in threads[:-1]):
            select.select([rig.fd_faults], [], [], 0.01)
            raw = rig.vfio.read(rig.fd_faults, 64 * 64)
            for at in range(0, len(raw), 64):
                if struct.unpack_from("=I", raw, at)[0] == iommu.IOMMU_FAULT_PAGE_REQ:
                    request = iommu.iommu_fault_page_request.unpack(raw[at + 8:at + 48])
                    try:
                        rig.vfio.write(rig.fd_faults, iommu.iommu_page_response.pack(
                            argsz=24, version=1, flags=1, pasid=request["pasid"], grpid=request["grpid"],
                            code=source.choice([iommu.IOMMU_PAGE_RESP_SUCCESS, iommu.IOMMU_PAGE_RESP_INVALID])))
                    except OSError as exc:
                        assert exc.errno == errno.EINVAL            # its table was taken away meanwhile

    threads = [*(threading.Thread(target=device, args=(1 + number % 2, number)) for number in range(4)),
               threading.Thread(target=guest)]
    for thread in threads:
        thread.start()
    for number in range(60):
        rig.bind(1, hpasid=1 + number % 2)
        rig.bind(hpasid=1 + number % 2)
        time.sleep(0.002)
    over.set()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert set(outcomes) <= {errno.EFAULT}
