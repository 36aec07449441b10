"""What the two processes of a live update believe: nothing that is wrong, whoever says it."""
import contextlib
import errno
import json
import mmap
import os
import resource
import socket
import struct
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_container import SharedContainer

from vfiodma import GuestMemory, IoAddressSpace, MemoryRegion, SoftwareGroup, open_address_space
from vfiodma.errors import BusyError, MigrationError, ProtocolError, UnsupportedError, VfioError
from vfiodma.liveupdate import UpdateOffer, UpdateTaker, preflight, receive_memory, send_memory
from vfiodma.liveupdate import table as tables
from vfiodma.liveupdate.guard import Guard
from vfiodma.liveupdate.packets import MAX_BODY, MAX_FDS, Kind, Link, Peer

PAGE = mmap.PAGESIZE
HEADER = struct.Struct("<8sHHIII")
SIZES = (4 * PAGE, 8 * PAGE)


@pytest.fixture
def ends():
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def open_files():
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return {(name, target) for name, target in found if not target.endswith("/maps")}    # the software IOMMU keeps that


@pytest.fixture(autouse=True)
def no_descriptor_is_left():
    before = open_files()
    yield
    assert open_files() <= before


def regions():
    memory = GuestMemory()
    memory.add(GuestMemory.memfd(SIZES[0]).region, 0)
    memory.add(GuestMemory.memfd(SIZES[1]).region, 1 << 32)
    return memory


def read(fd):
    try:
        return tables.read_table(fd)
    finally:
        os.close(fd)


def rows_of(table):
    return [tuple(row) for row in memoryview(table.mappings).tolist()] if len(table.mappings) else []


# ---- the table

page_numbers = st.one_of(st.integers(0, 12), st.sampled_from([1 << 51, (1 << 52) - 1]))
numbers = st.one_of(page_numbers.map(lambda n: n * PAGE), page_numbers.map(lambda n: n * PAGE + 1))


@given(st.lists(st.tuples(numbers, numbers, numbers, st.integers(0, 24)), max_size=5), st.booleans())
def test_a_table_is_taken_only_if_every_mapping_is_sound(rows, in_order):
    rows = sorted(rows) if in_order else rows
    with regions() as memory:
        records = tables.records_of(memory)
    fd = tables.write_table(records, np.array(rows, np.uint64).reshape(-1, 4))
    last, sound = -1, True
    for iova, offset, size, tag in rows:
        region = tag >> 3
        sound &= region < 2 and tag & 3 != 0 and size > 0 and not (iova | offset | size) % PAGE and iova > last
        sound &= iova + size <= 1 << 64 and region < 2 and offset + size <= SIZES[min(region, 1)]
        last = iova + size - 1
    if sound:
        found = read(fd)
        assert rows_of(found) == rows and found.regions == records
        assert found.size == sum(row[2] for row in rows)
        assert found.locked == sum(row[2] for row in rows if not row[3] & 4)
    else:
        with pytest.raises(ProtocolError):
            read(fd)


def sound_table():
    with regions() as memory:
        rows = np.array([[0, 0, PAGE, 3], [4 * PAGE, PAGE, 2 * PAGE, 8 | 1]], np.uint64)
        fd = tables.write_table(tables.records_of(memory), rows)
        data = os.pread(fd, 1 << 16, 0)
        os.close(fd)
    return data


def test_a_table_is_refused_with_any_byte_changed_and_at_any_length():
    data = sound_table()
    assert len(rows_of(read(tables.sealed_memfd(data, "table")))) == 2
    for at in range(len(data)):
        with pytest.raises(ProtocolError):
            read(tables.sealed_memfd(data[:at] + bytes([data[at] ^ 0x5A]) + data[at + 1:], "table"))
        with pytest.raises(ProtocolError):
            read(tables.sealed_memfd(data[:at], "table"))
    with pytest.raises(ProtocolError):
        read(tables.sealed_memfd(data + bytes(32), "table"))


def test_a_changed_table_with_a_good_checksum_is_refused_or_sound():
    """Bytes of somebody who means harm: what is taken stays within the regions."""
    data = sound_table()
    head = 48
    for at in range(head, len(data)):
        body = bytearray(data[head:])
        body[at - head] ^= 0x10
        forged = data[:40] + struct.pack("<I", zlib.crc32(body)) + data[44:head] + bytes(body)
        with contextlib.suppress(ProtocolError):
            found = read(tables.sealed_memfd(forged, "table"))
            for iova, offset, size, tag in rows_of(found):
                assert not (iova | offset | size) % PAGE and offset + size <= found.regions[tag >> 3].size


def test_a_table_that_can_still_be_changed_is_refused():
    fd = os.memfd_create("table", os.MFD_ALLOW_SEALING)
    os.write(fd, sound_table())
    with pytest.raises(ProtocolError, match="not sealed"):
        read(fd)
    one, other = os.pipe()
    os.close(other)
    with pytest.raises(ProtocolError, match="not a memfd"):
        read(one)


@pytest.mark.parametrize("field, value", [
    (0, PAGE // 2), (0, (1 << 64) - PAGE), (1, 0), (1, PAGE + 1), (1, 1 << 63), (2, 1), (2, 1 << 63), (3, 0), (3, 12),
    (3, PAGE * 3), (4, 0), (4, 9), (5, 0), (5, 4), (6, 2), (7, 1)])
def test_a_region_without_such_a_place_is_refused(field, value):
    good = [0, 4 * PAGE, 0, PAGE, 1, 3, 0, 0]
    assert tables.unpack_regions(struct.pack("<QQQQIIII", *good))
    good[field] = value
    with pytest.raises(ProtocolError):
        tables.unpack_regions(struct.pack("<QQQQIIII", *good))


def test_regions_that_overlap_or_are_out_of_order_are_refused():
    def packed(*gpas):
        return b"".join(struct.pack("<QQQQIIII", gpa, 2 * PAGE, 0, PAGE, 1, 3, 0, 0) for gpa in gpas)

    assert len(tables.unpack_regions(packed(0, 2 * PAGE))) == 2
    for gpas in ((0, PAGE), (2 * PAGE, 0), (0, 0), ()):
        with pytest.raises(ProtocolError):
            tables.unpack_regions(packed(*gpas))
    with pytest.raises(ProtocolError):
        tables.unpack_regions(packed(0)[:-1])


# ---- memory by descriptor

def test_memory_arrives_as_it_is_and_is_shared(ends):
    with regions() as memory:
        memory.write(PAGE, b"before")
        send_memory(ends[0], memory)
        with receive_memory(ends[1]) as same:
            assert same.read(PAGE, 6) == b"before"
            same.write((1 << 32) + 7 * PAGE, b"after")
            assert memory.read((1 << 32) + 7 * PAGE, 5) == b"after"
            assert [(gpa, region.size, region.kind) for gpa, region in same] == \
                [(gpa, region.size, region.kind) for gpa, region in memory]


def test_more_regions_than_descriptors_fit_into_a_message(ends):
    with GuestMemory.memfd(PAGE * 300) as whole, GuestMemory() as memory:
        for at in range(300):
            memory.add(MemoryRegion.from_fd(whole.region.fd, PAGE, offset=at * PAGE, kind="memfd"), at * 2 * PAGE)
            memory.write(at * 2 * PAGE, b"%04d" % at)
        received = []
        thread = threading.Thread(target=lambda: received.append(receive_memory(ends[1])))
        thread.start()
        send_memory(ends[0], memory)
        thread.join()
        with received[0] as same:
            assert [same.read(at * 2 * PAGE, 4) for at in range(300)] == [b"%04d" % at for at in range(300)]


def test_a_receiver_without_descriptors_left_says_so(ends):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with regions() as memory:
        send_memory(ends[0], memory)
        free = os.dup(ends[0].fileno())         # the lowest number that is free
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
        try:
            with pytest.raises(MigrationError, match="ulimit -n"):
                receive_memory(ends[1])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_anonymous_memory_is_refused(ends):
    with GuestMemory.anonymous(PAGE) as memory, pytest.raises(UnsupportedError):
        send_memory(ends[0], memory)


def test_a_file_that_is_shorter_than_its_region_is_refused(ends, tmp_path):
    path = tmp_path / "memory"
    path.write_bytes(bytes(4 * PAGE))
    with GuestMemory.file(path) as memory:
        os.truncate(path, PAGE)
        send_memory(ends[0], memory)
        with pytest.raises(ProtocolError, match="shorter"):
            receive_memory(ends[1])


def send_raw(sock, kind, body=b"", nfds=0, *, magic=b"vfioLiUp", version=1, size=None, zero=0):
    sock.sendall(HEADER.pack(magic, version, kind, len(body) if size is None else size, nfds, zero) + body)


@pytest.mark.parametrize("message", [
    {"magic": b"GET / HT"}, {"version": 2}, {"kind": Kind.GO}, {"kind": 99}, {"size": MAX_BODY + 1}, {"zero": 1},
    {"nfds": MAX_FDS + 1}, {"body": b""}, {"body": bytes(47)}, {"body": bytes(48)}])
def test_messages_that_are_none_are_refused(ends, message):
    send_raw(ends[0], **{"kind": Kind.MEMORY, **message})
    with pytest.raises(ProtocolError):
        receive_memory(ends[1], timeout=1)


def test_descriptors_that_do_not_fit_what_was_announced_are_refused(ends):
    with regions() as memory:
        body = tables.pack_regions(tables.records_of(memory))
        fds = [region.fd for region in memory.regions]
        for announced, sent in ((2, fds[:1]), (1, fds), (3, fds), (1, fds[:1])):
            one, other = socket.socketpair()
            with one, other:
                send_raw(one, Kind.MEMORY, body, announced)
                socket.send_fds(one, [b"f"], sent)
                with pytest.raises(ProtocolError):
                    receive_memory(other, timeout=1)
        # Uncalled for, with the header itself.
        socket.send_fds(ends[0], [HEADER.pack(b"vfioLiUp", 1, Kind.MEMORY, 0, 0, 0)], fds)
        with pytest.raises(ProtocolError):
            receive_memory(ends[1], timeout=1)


@given(st.binary(max_size=200))
def test_noise_is_refused(data):
    one, other = socket.socketpair()
    with one, other:
        one.sendall(data)
        one.close()
        with pytest.raises((ProtocolError, MigrationError)):
            receive_memory(other, timeout=1)


def test_the_socket_keeps_the_time_limit_that_its_owner_gave_it(ends):
    with GuestMemory.memfd(PAGE) as memory:
        for limit in (None, 0.0, 7.5):
            for end in ends:
                end.settimeout(limit)
            send_memory(ends[0], memory)
            receive_memory(ends[1]).close()
            assert [end.gettimeout() for end in ends] == [limit, limit]


def test_a_silent_peer_is_given_up(ends):
    with pytest.raises(MigrationError) as info:
        receive_memory(ends[1], timeout=0.05)
    assert info.value.errno == errno.ETIMEDOUT


def test_only_connected_unix_stream_sockets_of_the_same_user_are_taken(monkeypatch):
    for family, kind in ((socket.AF_INET, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_DGRAM)):
        with socket.socket(family, kind) as sock, pytest.raises(VfioError):
            Link(sock, 1)
    one, other = socket.socketpair()
    with one, other:
        for timeout in (0, -1, float("inf")):
            with pytest.raises(VfioError):
                Link(one, timeout)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(VfioError) as info:
            Link(one, 1)
        assert info.value.errno == errno.EPERM


# ---- the two sides

@pytest.fixture
def guest():
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(GuestMemory.memfd(8 * PAGE))
        container = SharedContainer()
        stack.callback(container.close)
        ioas = stack.enter_context(IoAddressSpace(container))
        for at in range(4):
            memory.write(at * PAGE, b"pg%02d" % at)
            ioas.map(memory, at * 2 * PAGE, offset=at * PAGE, size=PAGE)
        yield ioas, memory, container


def is_old_ones(ioas, memory, container):
    return all(row[4] and row[1] == memory.region.vaddr + at * PAGE and ioas.translate(row[0]) == row[1]
               for at, row in enumerate(container.rows()))


class Liar(threading.Thread):
    """A new process that says what it is told to; it is a thread of this process, so that it can't be killed."""

    def __init__(self, sock, *answers):
        super().__init__()
        self.sock, self.answers = sock, answers
        self.start()

    def run(self):
        link = Link(self.sock, 5)
        link.receive(Kind.OFFER)[2].close()
        for at, (kind, body) in enumerate(self.answers):
            link.send(kind, body)
            if kind == Kind.READY and not at:
                with contextlib.suppress(VfioError):
                    link.receive(Kind.GO)


@pytest.mark.parametrize("answer", [(Kind.READY, b"5"), (Kind.READY, b""), (Kind.DONE, b"4"), (Kind.GO, b""),
                                    (Kind.FAILED, b"no \xff"), (Kind.READY, b"4" * 1000)])
def test_an_answer_that_is_wrong_before_anything_changed_ends_it(guest, ends, answer):
    liar = Liar(ends[1], answer)
    with pytest.raises((ProtocolError, MigrationError)):
        UpdateOffer(ends[0], guest[0], guest[1], timeout=1).hand_over()
    liar.join()
    assert is_old_ones(*guest)


@pytest.mark.parametrize("answer", [(Kind.DONE, b"3"), (Kind.READY, b"4"), (Kind.OFFER, b"{}")])
def test_a_wrong_answer_of_a_process_that_can_not_be_killed_is_told_and_can_be_taken_back(guest, ends, answer):
    liar = Liar(ends[1], (Kind.READY, b"4"), answer)
    offer = UpdateOffer(ends[0], guest[0], guest[1], timeout=1)
    with pytest.raises(MigrationError) as info:
        offer.hand_over()
    liar.join()
    assert info.value.errno == errno.ENOTRECOVERABLE and "take_back" in str(info.value)
    assert not any(row[4] for row in guest[2].rows())
    # Two of the mappings are the other one's by now.
    guest[2].update_vaddr(0, 0x1000, PAGE)
    guest[2].update_vaddr(4 * PAGE, 0x1000, PAGE)
    offer.take_back()
    assert is_old_ones(*guest)


def test_a_new_process_that_says_that_it_failed_is_believed(guest, ends):
    liar = Liar(ends[1], (Kind.READY, b"4"), (Kind.FAILED, b"no memory"))
    with pytest.raises(MigrationError, match="no memory"):
        UpdateOffer(ends[0], guest[0], guest[1], timeout=1).hand_over()
    liar.join()
    assert is_old_ones(*guest)


def test_a_pin_or_a_failing_freeze_leaves_everything_as_it_was(guest, ends):
    with guest[0].pin(0, PAGE), pytest.raises(BusyError):
        UpdateOffer(ends[0], guest[0], guest[1], timeout=1).hand_over()

    def freeze():
        raise RuntimeError("not now")

    liar = Liar(ends[1], (Kind.READY, b"4"))
    with pytest.raises(RuntimeError, match="not now"):
        UpdateOffer(ends[0], guest[0], guest[1], freeze=freeze, timeout=1).hand_over()
    liar.join()
    assert is_old_ones(*guest)


def offer_by_hand(sock, body, fds):
    link = Link(sock, 1)
    link.send(Kind.OFFER, body if isinstance(body, bytes) else json.dumps(body).encode(), fds)
    return link


GOOD = {"backend": "shared", "state": {"double": True}, "container": 1, "way": "vaddr", "fds": [], "mappings": 2}


@pytest.mark.parametrize("body", [
    b"", b"[]", b"{}", b"\xff", b"[" * 10000, {**GOOD, "more": 1}, {**GOOD, "backend": 3}, {**GOOD, "container": 0},
    {**GOOD, "container": -1}, {**GOOD, "way": "guess"}, {**GOOD, "fds": ["a"]}, {**GOOD, "fds": [3]},
    {**GOOD, "mappings": 3}, {**GOOD, "container": 2}, {**GOOD, "fds": ["a", "a"]}, {**GOOD, "state": []}])
def test_an_offer_that_is_none_is_refused_and_the_old_process_hears_why(ends, body):
    with regions() as memory, contextlib.closing(SharedContainer()) as container:
        table = tables.sealed_memfd(sound_table(), "table")
        link = offer_by_hand(ends[0], body, [table, *(region.fd for region in memory.regions), container.fd])
        os.close(table)
        with pytest.raises(ProtocolError):
            UpdateTaker(ends[1], timeout=1, adopt=SharedContainer.adopt).take_over()
        with pytest.raises(MigrationError, match="refuses"):
            link.receive(Kind.READY)


@pytest.mark.parametrize("backend", ["software", "spapr", "none"])
def test_a_container_that_nobody_can_adopt_is_refused_and_closed(ends, backend):
    with regions() as memory, contextlib.closing(SharedContainer()) as container:
        table = tables.sealed_memfd(sound_table(), "table")
        offer_by_hand(ends[0], {**GOOD, "backend": backend}, [table, *(region.fd for region in memory.regions),
                                                              container.fd])
        os.close(table)
        with pytest.raises(ProtocolError, match="can't be adopted"):
            UpdateTaker(ends[1], timeout=1).take_over()


def test_memory_that_is_not_what_the_table_says_is_refused(ends):
    table = tables.sealed_memfd(sound_table(), "table")
    with contextlib.closing(SharedContainer()) as container, GuestMemory.memfd(PAGE) as small:
        offer_by_hand(ends[0], GOOD, [table, small.region.fd, small.region.fd, container.fd])
        os.close(table)
        with pytest.raises(ProtocolError, match="shorter"):
            UpdateTaker(ends[1], timeout=1, adopt=SharedContainer.adopt).take_over()


def test_a_container_that_refuses_an_address_is_as_it_was_and_the_old_process_hears_why(ends):
    table = tables.sealed_memfd(sound_table(), "table")
    with regions() as memory, contextlib.closing(SharedContainer()) as container:
        container.map_dma(0, 0x1000, PAGE, 3)
        container.map_dma(4 * PAGE, 0x5000, 2 * PAGE, 1)
        container.invalidate_vaddr(0, PAGE)             # the second one is valid still: EINVAL
        link = offer_by_hand(ends[0], GOOD, [table, *(region.fd for region in memory.regions), container.fd])
        os.close(table)
        taker = UpdateTaker(ends[1], timeout=5, adopt=SharedContainer.adopt)
        failure = []

        def take():
            try:
                taker.take_over()
            except VfioError as exc:
                failure.append(exc.errno)
        thread = threading.Thread(target=take)
        thread.start()
        assert link.receive(Kind.READY)[1] == b"2"
        link.send(Kind.GO)
        with pytest.raises(MigrationError, match="refuses"):
            link.receive(Kind.DONE)
        thread.join()
        assert failure == [errno.EINVAL]
        assert [row[4] for row in container.rows()] == [0, 1]


def test_a_guard_never_ends_its_own_process():
    for peer in (None, Peer(os.getpid(), os.getuid())):
        with Guard(peer) as guard:
            assert guard.stop(0.01) is False


# ---- preflight

def topics(report):
    return {finding.topic for finding in report.findings if not finding.ok}


def test_the_preflight_tells_every_reason_at_once():
    with open_address_space("software", memlock_limit=None) as ioas, GuestMemory.memfd(PAGE) as memory, \
            GuestMemory.anonymous(PAGE) as other:
        ioas.map(memory)
        assert preflight(ioas, memory, between_processes=False).ok
        report = preflight(ioas, memory)
        assert not report.ok and topics(report) == {"container"} and report.way == "vaddr"
        ioas.map(other)
        report = preflight(ioas, memory)
        assert topics(report) == {"container", "memory"} and report.mappings == 2 and report.size == 2 * PAGE
        with pytest.raises(UnsupportedError, match="memory.*|container.*"):
            report.check()
        assert all(finding.advice for finding in report.findings if not finding.ok)
        ioas.unmap_all()


def test_an_emulated_group_and_an_old_kernel_have_no_way():
    for options in ({"groups": [SoftwareGroup(0, ["0000:00:10.0"], emulated=True)]}, {"kernel": "5.4"}):
        with open_address_space("software", memlock_limit=None, **options) as ioas, GuestMemory.memfd(PAGE) as memory:
            report = preflight(ioas, memory)
            assert report.way == "" and "interface" in topics(report)


def test_an_address_space_without_mappings_can_go(guest):
    ioas, memory, _ = guest
    assert preflight(ioas, memory).ok
    ioas.unmap_all()
    assert preflight(ioas, memory).ok
