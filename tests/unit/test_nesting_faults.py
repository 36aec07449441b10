"""The fault queue of a software device: records, polling, page requests and what answers do to them."""
import errno
import os
import select
import struct
import threading

import pytest
from test_nesting_op import PAGE, RIGS, RWU, Rig, refused

from vfiodma.errors import MemoryFaultError
from vfiodma.uapi import iommu


@pytest.fixture
def rig():
    rig = Rig()
    rig.tables()
    assert rig.vfio.pasids.allocate() == 1
    rig.bind()
    yield rig
    RIGS.remove(rig)
    rig.close()


def readable(fd):
    return bool(select.select([fd], [], [], 0)[0])


def records(rig, fd):
    raw = rig.vfio.read(fd, 64 * 64)
    found = []
    for at in range(0, len(raw), 64):
        kind, = struct.unpack_from("=I", raw, at)
        layout = iommu.iommu_fault_page_request if kind == 2 else iommu.iommu_fault_unrecoverable
        found.append((kind, layout.unpack(raw[at + 8:at + 8 + layout.size])))
    return found


def answer(rig, fd, group, code=0, pasid=1, version=1, flags=1, argsz=24):
    return rig.vfio.write(fd, iommu.iommu_page_response.pack(argsz=argsz, version=version, flags=flags, pasid=pasid,
                                                             grpid=group, code=code))


def test_unrecoverable_faults_are_records_with_every_reason(rig):
    fd = rig.vfio.open_fault_queue(rig.device, page_requests=False)
    rig.entry(4, 1, 0)
    rig.entry(4, 2, 1 << 39 | RWU)
    rig.entry(4, 4, 16 * PAGE | 5)
    rig.entry(3, 2, 100 * PAGE | RWU)
    cases = [(1 * PAGE, 1, 5, 4 * PAGE + 8), (2 * PAGE, 1, 8, 4 * PAGE + 16), (4 * PAGE, 1, 6, 4 * PAGE + 32),
             (4 << 20, 1, 4, 100 * PAGE), (0, 0, 3, None), (0, 1 << 20, 3, None), (0, 9, 2, None)]
    assert not readable(fd) and rig.vfio.read(fd, 64) == b""
    for address, pasid, _, _ in cases:
        with pytest.raises(MemoryFaultError):
            rig.port.write(address, b"x", pasid=pasid)
    assert readable(fd)
    found = records(rig, fd)
    assert not readable(fd)
    assert [(kind, event["reason"], event["addr"], event["pasid"], event["perm"]) for kind, event in found] == [
        (1, reason, address, pasid, 2) for address, pasid, reason, _ in cases]
    assert [event["fetch_addr"] if event["flags"] & 4 else None for _, event in found] == [at for *_, at in cases]
    rig.vfio.close(fd)


def test_a_device_has_one_queue(rig):
    fd = rig.vfio.open_fault_queue(rig.device)
    assert refused(rig.vfio.open_fault_queue, rig.device) == errno.EBUSY
    assert refused(rig.vfio.open_fault_queue, rig.fd) == errno.EINVAL
    assert refused(rig.vfio.read, fd, 63) == errno.EINVAL and refused(rig.vfio.write, fd, bytes(23)) == errno.EINVAL
    other = rig.vfio.dup(fd)
    rig.vfio.close(fd)
    assert refused(rig.vfio.open_fault_queue, rig.device) == errno.EBUSY
    rig.vfio.close(other)
    rig.vfio.close(rig.vfio.open_fault_queue(rig.device))


def access(rig, address=PAGE):
    """Read in another thread; what it got comes into the list."""
    got = []

    def read():
        try:
            got.append(rig.port.read(address, 4, pasid=1))
        except MemoryFaultError as exc:
            got.append(exc.errno)

    thread = threading.Thread(target=read)
    thread.start()
    return thread, got


@pytest.mark.parametrize("code, outcome", [(0, b"late"), (1, errno.EFAULT), (2, errno.EFAULT), (77, errno.EFAULT)])
def test_a_missing_page_is_asked_for_and_the_answer_decides(rig, code, outcome):
    fd = rig.vfio.open_fault_queue(rig.device)
    rig.entry(4, 1, 0)
    thread, got = access(rig, PAGE + 12)
    assert select.select([fd], [], [], 10)[0]
    (kind, request), = records(rig, fd)
    assert kind == 2 and request["flags"] == 1 | 2 | 8
    assert (request["pasid"], request["addr"], request["perm"]) == (1, PAGE, 1)
    rig.entry(4, 1, 40 * PAGE | RWU)
    rig.area[40 * PAGE + 12:40 * PAGE + 16] = b"late"
    assert answer(rig, fd, request["grpid"], code) == 24
    thread.join()
    assert got == [outcome]
    assert [kind for kind, _ in records(rig, fd)] == ([] if code == 0 else [1])
    rig.entry(4, 2, 0)                      # after FAILURE the device asks no more
    if code == 2:
        assert refused(rig.port.read, 2 * PAGE, 1, pasid=1) == errno.EFAULT
        assert [kind for kind, _ in records(rig, fd)] == [1]


def test_answers_are_checked(rig):
    fd = rig.vfio.open_fault_queue(rig.device)
    sink = rig.port.fault_sink
    group = sink.request_pages(1, [PAGE, 2 * PAGE, 3 * PAGE], 3, (7, 8))
    found = [request for _, request in records(rig, fd)]
    assert [request["flags"] for request in found] == [1 | 4 | 8, 1 | 4 | 8, 1 | 2 | 4 | 8]
    assert all(request["private_data"] == (7, 8) and request["grpid"] == group for request in found)
    for wrong in ({"group": group + 1}, {"pasid": 2}, {"flags": 0}, {"flags": 3}, {"version": 0}, {"version": 2}):
        assert refused(answer, rig, fd, **{"group": group, **wrong}) == errno.EINVAL
    assert answer(rig, fd, group, argsz=0) == 24            # not looked at
    assert sink.answer(group) == 0
    assert refused(answer, rig, fd, group) == errno.EINVAL   # answered


def test_of_several_answers_those_before_a_bad_one_count(rig):
    fd = rig.vfio.open_fault_queue(rig.device)
    groups = [rig.port.fault_sink.request_pages(1, [PAGE], 1) for _ in range(2)]
    packed = [iommu.iommu_page_response.pack(argsz=24, version=1, flags=1, pasid=1, grpid=group)
              for group in (groups[0], 99, groups[1])]
    assert rig.vfio.write(fd, b"".join(packed)) == 24
    assert refused(rig.vfio.write, fd, b"".join(packed[1:])) == errno.EINVAL
    assert answer(rig, fd, groups[1]) == 24


def test_a_group_without_an_answer_times_out(rig):
    fd = rig.vfio.open_fault_queue(rig.device, timeout=0.05)
    rig.entry(4, 1, 0)
    assert refused(rig.port.read, PAGE, 4, pasid=1) == errno.EFAULT
    (_, request), (kind, _) = records(rig, fd)
    assert kind == 1 and refused(answer, rig, fd, request["grpid"]) == errno.EINVAL


def test_closing_the_queue_makes_waiting_groups_invalid(rig):
    fd = rig.vfio.open_fault_queue(rig.device, timeout=60)
    rig.entry(4, 1, 0)
    thread, got = access(rig)
    assert select.select([fd], [], [], 10)[0]
    rig.vfio.close(fd)
    thread.join(10)
    assert got == [errno.EFAULT] and rig.port.fault_sink is None


def test_a_full_queue_refuses_and_never_more_than_512_groups_wait(rig):
    rig.vfio.open_fault_queue(rig.device)
    sink = rig.port.fault_sink
    assert len({sink.request_pages(1, [PAGE], 1) for _ in range(512)}) == 512
    assert refused(sink.request_pages, 1, [PAGE], 1) == errno.EINVAL
    for _ in range(5000):
        sink.unrecoverable(5, 1, 1, 0, None)
    assert len(sink.read(1 << 20)) == 4096 * 64


def test_a_late_answer_is_not_that_of_the_next_group(rig):
    fd = rig.vfio.open_fault_queue(rig.device, timeout=0.0)
    sink = rig.port.fault_sink
    late = sink.request_pages(1, [PAGE], 1)
    sink.timeout = 60.0
    waiting = sink.request_pages(1, [2 * PAGE], 1)
    assert refused(answer, rig, fd, late) == errno.EINVAL
    assert sink.answer(late) is None
    answer(rig, fd, waiting, code=iommu.IOMMU_PAGE_RESP_INVALID)
    assert sink.answer(waiting) == iommu.IOMMU_PAGE_RESP_INVALID


def test_without_a_free_descriptor_the_device_has_no_queue(rig, monkeypatch):
    before = set(os.listdir("/proc/self/fd"))

    def full(_):
        raise OSError(errno.EMFILE, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", full)
        with pytest.raises(OSError, match="full"):
            rig.vfio.open_fault_queue(rig.device)
    assert set(os.listdir("/proc/self/fd")) == before
    rig.vfio.open_fault_queue(rig.device)


def test_a_read_that_comes_behind_close_leaves_other_descriptors_alone(rig):
    fd = rig.vfio.open_fault_queue(rig.device)
    queue = rig.vfio._files[fd]
    queue.unrecoverable(6, 1, 1, 0, None)
    number = queue.event
    rig.vfio.close(fd)
    other = os.memfd_create("other")
    os.dup2(other, number)          # whoever opens something gets the number
    os.write(other, b"12345678")
    os.lseek(other, 0, os.SEEK_SET)
    assert len(queue.read(64)) == 64
    assert os.read(other, 8) == b"12345678"
    os.close(number)
    if other != number:
        os.close(other)
