"""The raw door of the software iommufd: life and death of its objects, the group side, emulated devices, bad input."""
import ctypes
import errno
import mmap
import os
import struct
import sys
import threading
import time

import pytest
from ipc_lock import without_ipc_lock

from vfiodma import SoftwareGroup, SoftwareVfio, VfioError
from vfiodma._core.ioas_context import IommufdAccess, IommufdContext, IommufdDevice
from vfiodma._core.type1 import IommuGroup
from vfiodma.errors import ForkedError

PAGE = 4096
DESTROY, IOAS_ALLOC, ALLOW, COPY, RANGES, MAP, UNMAP, OPTION, VFIO_IOAS, HWPT_ALLOC = range(0x3B80, 0x3B8A)
HW_INFO, SET_DIRTY, GET_DIRTY, INVALIDATE, FAULT_QUEUE, MAP_FILE, VIOMMU, VDEVICE, CHANGE_PROCESS, VEVENTQ, HW_QUEUE = \
    range(0x3B8A, 0x3B95)
SET_IOMMU, GET_STATUS, SET_CONTAINER, UNSET_CONTAINER, GET_DEVICE_FD, GET_INFO = range(0x3B66, 0x3B6C)
MAP_DMA, UNMAP_DMA, BIND, ATTACH, DETACH = 0x3B71, 0x3B72, 0x3B76, 0x3B77, 0x3B78
DEVICE = "0000:00:10.0"


class Door:
    """A SoftwareVfio with an open iommufd, spoken to in packed structs."""

    def __init__(self, **options):
        self.vfio = SoftwareVfio(**{"memlock_limit": None, **options})
        self.fd = self.vfio.open("/dev/iommu")

    def call(self, request, layout, *values, fd=None):
        data = struct.pack("=" + layout, *values)
        buffer = ctypes.create_string_buffer(data, len(data))
        self.vfio.ioctl(self.fd if fd is None else fd, request, ctypes.addressof(buffer))
        return struct.unpack("=" + layout, buffer.raw)

    def alloc(self):
        return self.call(IOAS_ALLOC, "III", 12, 0, 0)[2]

    def map(self, ioas, iova, address, length, flags=7):
        return self.call(MAP, "IIIIQQQ", 40, flags, ioas, 0, address, length, iova)[6]

    def unmap(self, ioas, iova, length):
        return self.call(UNMAP, "IIQQ", 24, ioas, iova, length)[3]

    def bind(self, address=DEVICE, fd=None):
        node = self.vfio.open(self.vfio.find_device(address).cdev)
        return node, self.call(BIND, "IIiIQ", 24, 0, self.fd if fd is None else fd, 0, 0, fd=node)[3]

    def attach(self, node, number):
        return self.call(ATTACH, "IIII", 16, 0, number, 0, fd=node)[2]


def refused(code, call, *args, **options):
    with pytest.raises(OSError) as failure:
        call(*args, **options)
    assert errno.errorcode[failure.value.errno] == errno.errorcode[code]


@pytest.fixture
def door():
    return Door()


@pytest.fixture
def memory():
    area = mmap.mmap(-1, 16 * PAGE)
    return area, ctypes.addressof(ctypes.c_char.from_buffer(area))


def port_of(door, address=DEVICE):
    return next(group.ports[address] for group in door.vfio._groups.values() if address in group.ports)


# ---- where it is

@pytest.mark.parametrize("kernel", ["5.4", "5.12", "6.1"])
def test_older_kernels_have_no_iommufd(kernel):
    vfio = SoftwareVfio(kernel=kernel)
    refused(errno.ENOENT, vfio.open, "/dev/iommu")
    refused(errno.ENOENT, vfio.open, "/dev/vfio/devices/vfio0")
    with pytest.raises(ValueError, match="no iommufd"):
        SoftwareVfio(kernel=kernel, iommufd=True)


def test_iommufd_can_be_left_out():
    vfio = SoftwareVfio(iommufd=False)
    refused(errno.ENOENT, vfio.open, "/dev/iommu")
    with pytest.raises(ValueError, match="vfio_container"):
        SoftwareVfio(iommufd=False, vfio_container="iommufd")


def test_device_nodes_are_numbered_over_all_devices():
    vfio = SoftwareVfio(groups=[SoftwareGroup(7, ["a", "b"]), SoftwareGroup(3, ["c"])])
    assert [vfio._files[vfio.open(f"/dev/vfio/devices/vfio{i}")].device.address for i in range(3)] == ["a", "b", "c"]
    refused(errno.ENOENT, vfio.open, "/dev/vfio/devices/vfio3")


# ---- bad input

@pytest.mark.parametrize("kernel", ["6.12", "7.2"])
def test_no_request_trusts_its_argument(kernel):
    door = Door(kernel=kernel)
    hole = mmap.mmap(-1, PAGE)
    gone = ctypes.addressof(ctypes.c_char.from_buffer(hole))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(gone), PAGE, 0) == 0
    for number in set(range(256)) - {100, 101}:         # GET_API_VERSION, CHECK_EXTENSION: take no address
        for argument in (0, 1, gone, (1 << 47) - 2, 1 << 63, (1 << 64) - 1):
            with pytest.raises(VfioError):
                door.vfio.ioctl(door.fd, 0x3B00 + number, argument)


def test_a_size_of_gigabytes_is_read_until_the_first_byte_that_is_not_zero(door, memory):
    area, address = memory
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + 15 * PAGE), PAGE, 0) == 0
    struct.pack_into("=III", area, 0, 0xFFFFFFFF, 0, 0)
    refused(errno.EFAULT, door.vfio.ioctl, door.fd, IOAS_ALLOC, address)
    area[9 * PAGE] = 1
    refused(errno.E2BIG, door.vfio.ioctl, door.fd, IOAS_ALLOC, address)
    assert door.alloc() == 1


def test_an_object_whose_id_cannot_be_told_never_was(door):
    area = mmap.mmap(-1, PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    struct.pack_into("=III", area, 0, 12, 0, 0)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), PAGE, 1) == 0
    refused(errno.EFAULT, door.vfio.ioctl, door.fd, IOAS_ALLOC, address)
    assert door.alloc() == 1


def test_an_id_of_another_kind_is_not_found(door, memory):
    ioas = door.alloc()
    node, device = door.bind()
    refused(errno.ENOENT, door.map, device, 0, memory[1], PAGE)
    refused(errno.ENOENT, door.call, HW_INFO, "IIIIQIIQ", 40, 0, ioas, 0, 0, 0, 0, 0)
    refused(errno.ENOENT, door.call, SET_DIRTY, "IIII", 16, 1, ioas, 0)
    refused(errno.EINVAL, door.attach, node, device)
    refused(errno.EBUSY, door.call, DESTROY, "II", 8, device)


# ---- closing

def test_a_bound_device_keeps_a_closed_iommufd(door, memory):
    ioas = door.alloc()
    node, _ = door.bind()
    door.attach(node, ioas)
    door.map(ioas, PAGE, memory[1], PAGE)
    door.vfio.close(door.fd)
    port_of(door).write(PAGE, b"still here")
    assert memory[0][:10] == b"still here"
    door.vfio.close(node)
    refused(errno.EBADF, door.vfio.ioctl, node, DETACH, 0)
    assert not door.vfio._files


def test_a_context_that_is_closed_before_its_devices_goes_with_the_last_of_them(memory):
    context = IommufdContext("6.12", -2)
    group = IommuGroup(0, (0, (1 << 39) - 1), (), 0x40201000, False, True, True, False)
    device, access = IommufdDevice(context, group), IommufdAccess(context)
    number = context.compat_ioas()
    device.attach(number)
    access.attach(number)
    context.close()
    with pytest.raises(VfioError, match="closed"):
        device.detach()
    del device, access, context


def test_a_device_may_go_while_who_has_the_lock_waits_for_the_interpreter():
    """One thread is long in an ioctl, one waits for the lock, and this one drops a device without having let go."""
    context = IommufdContext("6.12", -2)
    group = IommuGroup(0, (0, (1 << 39) - 1), (), 0x40201000, False, True, True, False)
    devices = [IommufdDevice(context, group), IommufdAccess(context)]
    size, interval = 64 << 20, sys.getswitchinterval()
    argument = mmap.mmap(-1, size)                  # what follows the known part is read to its end, as it must be 0
    address = ctypes.addressof(ctypes.c_char.from_buffer(argument))
    sys.setswitchinterval(60)
    try:
        while devices:
            argument[:4] = size.to_bytes(4, "little")
            threads = [threading.Thread(target=context.ioctl, args=(IOAS_ALLOC, address)),
                       threading.Thread(target=context.compat_ioas)]
            for thread in threads:
                thread.start()
            time.sleep(0.005)
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                pass
            devices.pop()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)


def test_a_fault_queue_without_a_descriptor_never_was(door, monkeypatch):
    def full(file):
        raise OSError(errno.EMFILE, "full")
    with monkeypatch.context() as patch:
        patch.setattr(door.vfio, "_new_fd", full)
        refused(errno.EMFILE, door.call, FAULT_QUEUE, "4I", 16, 0, 0, 0)
    assert door.alloc() == 1


def test_marks_stay_within_their_area(door, memory):
    ioas = door.alloc()
    _, device = door.bind()
    table = door.call(HWPT_ALLOC, "12I", 48, 2, device, ioas, *[0] * 8)[4]
    door.call(SET_DIRTY, "IIII", 16, 1, table, 0)
    for iova in (PAGE, 9 * PAGE):
        door.map(ioas, iova, memory[1], 4 * PAGE)
    context = door.vfio._files[door.fd].context
    assert context.mark_dirty(table, PAGE, 0)
    assert context.mark_dirty(table, 3 * PAGE, 1 << 62)
    assert not context.mark_dirty(table, 5 * PAGE, PAGE)
    bits = ctypes.c_uint64()
    for iova, expected in ((PAGE, 0b1100), (9 * PAGE, 0)):
        bits.value = 0
        door.call(GET_DIRTY, "IIIIQQQQ", 48, table, 0, 0, iova, 4 * PAGE, PAGE, ctypes.addressof(bits))
        assert bits.value == expected


def test_a_closed_device_has_no_way_to_memory(door, memory):
    ioas = door.alloc()
    node, _ = door.bind()
    door.attach(node, ioas)
    door.map(ioas, PAGE, memory[1], PAGE)
    port = port_of(door)
    door.vfio.close(node)
    refused(errno.EBADF, port.write, PAGE, b"x")
    again, _ = door.bind()
    assert door.attach(again, ioas) == 3


def test_a_detached_device_faults(door, memory):
    ioas = door.alloc()
    node, _ = door.bind()
    door.map(ioas, PAGE, memory[1], PAGE)
    port = port_of(door)
    refused(errno.EFAULT, port.read, PAGE, 1)
    door.attach(node, ioas)
    assert port.read(PAGE, 1) == b"\0"
    door.call(DETACH, "III", 12, 0, 0, fd=node)
    refused(errno.EFAULT, port.read, PAGE, 1)
    assert [fault.reason for fault in port.faults] == ["not mapped", "not mapped"]


def test_a_group_and_a_node_exclude_each_other(door):
    node, _ = door.bind()
    refused(errno.EBUSY, door.vfio.open, "/dev/vfio/0")
    refused(errno.EINVAL, door.bind)                    # a node serves one descriptor
    door.vfio.close(node)
    group = door.vfio.open("/dev/vfio/0")
    refused(errno.EBUSY, door.bind)
    door.vfio.close(group)


def test_devices_of_a_group_bind_to_one_iommufd():
    door = Door(groups=[SoftwareGroup(0, ["a", "b"])])
    other = door.vfio.open("/dev/iommu")
    door.bind("a")
    refused(errno.EPERM, door.bind, "b", fd=other)
    door.bind("b")


def test_a_device_without_isolated_interrupts_cannot_be_bound():
    refused(errno.EPERM, Door(groups=[SoftwareGroup(0, [DEVICE], msi_isolated=False)]).bind)


def test_a_device_whose_iommu_does_not_enforce_coherency_can_be_bound():
    Door(groups=[SoftwareGroup(0, [DEVICE], coherent=False)]).bind()


def test_a_forked_child_can_do_nothing_with_it(door, memory):
    ioas = door.alloc()
    node, _ = door.bind()
    door.attach(node, ioas)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            door.alloc()
        except ForkedError:
            code = 0
        os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    door.map(ioas, PAGE, memory[1], PAGE)


# ---- memory

def test_copies_share_pages_and_are_charged_once(memory):
    with without_ipc_lock():
        door = Door(memlock_limit=4 * PAGE)
        first, second = door.alloc(), door.alloc()
        node, _ = door.bind()
        door.attach(node, first)
        door.map(first, 0x10000, memory[1], 4 * PAGE)
        before = door.vfio.locked_pages()
        door.call(COPY, "IIIIQQQ", 40, 7, first, first, 4 * PAGE, 0x20000, 0x10000)
        refused(errno.ENOMEM, door.map, first, 0x30000, memory[1], PAGE)
        door.call(COPY, "IIIIQQQ", 40, 6, second, first, PAGE, 0, 0x11000)
        assert door.unmap(first, 0, (1 << 64) - 1) == 8 * PAGE
        assert door.vfio.locked_pages() == before           # the user is charged, not the process
        door.map(first, 0x30000, memory[1], 4 * PAGE)


def test_the_container_of_iommufd_charges_the_process(memory):
    with without_ipc_lock():
        vfio = SoftwareVfio(vfio_container="iommufd", memlock_limit="process")
        before = vfio.locked_pages()
        fd, group = vfio.open("/dev/vfio/vfio"), vfio.open("/dev/vfio/0")
        number, name = ctypes.c_int(fd), ctypes.create_string_buffer(DEVICE.encode())
        vfio.ioctl(group, SET_CONTAINER, ctypes.addressof(number))
        device = vfio.ioctl(group, GET_DEVICE_FD, ctypes.addressof(name))
        args = ctypes.create_string_buffer(struct.pack("=IIQQQ", 32, 3, memory[1], 0x10000, 2 * PAGE))
        vfio.ioctl(fd, MAP_DMA, ctypes.addressof(args))
        assert vfio.locked_pages() == before + 2
        for descriptor in (fd, group, device):
            vfio.close(descriptor)
        assert vfio.locked_pages() == before


def test_a_copy_outlives_its_source(door, memory):
    first, second = door.alloc(), door.alloc()
    node, _ = door.bind()
    door.map(first, 0x10000, memory[1], 2 * PAGE)
    door.call(COPY, "IIIIQQQ", 40, 7, second, first, PAGE, 0x5000, 0x11000)
    door.call(DESTROY, "II", 8, first)
    door.attach(node, second)
    memory[0][PAGE:PAGE + 4] = b"here"
    assert port_of(door).read(0x5000, 4) == b"here"
    refused(errno.EFAULT, port_of(door).read, 0x5FFE, 4)


def test_files_are_mapped_without_an_address(door):
    fd = os.memfd_create("memory")
    os.ftruncate(fd, 4 * PAGE)
    ioas = door.alloc()
    node, _ = door.bind()
    door.attach(node, ioas)
    assert door.call(MAP_FILE, "IIIiQQQ", 40, 7, ioas, fd, PAGE, 2 * PAGE, 0x8000)[6] == 0x8000
    refused(errno.EINVAL, door.call, MAP_FILE, "IIIiQQQ", 40, 7, ioas, fd, 3 * PAGE, 2 * PAGE, 0x10000)
    os.close(fd)
    refused(errno.EBADF, door.call, MAP_FILE, "IIIiQQQ", 40, 7, ioas, fd, 0, PAGE, 0x10000)
    port_of(door).write(0x8FFE, b"over")
    assert port_of(door).read(0x8FFE, 4) == b"over"
    assert door.call(CHANGE_PROCESS, "II", 8, 0) == (8, 0)


def test_only_memory_files_can_be_pinned(door, tmp_path):
    with open("/proc/self/exe", "rb") as file:
        ioas = door.alloc()
        node, _ = door.bind()
        door.call(MAP_FILE, "IIIiQQQ", 40, 5, ioas, file.fileno(), 0, PAGE, 0x8000)
        refused(errno.EINVAL, door.attach, node, ioas)


# ---- through a group

def test_a_group_takes_an_iommufd_for_a_container(door, memory):
    group = door.vfio.open("/dev/vfio/0")
    door.call(SET_CONTAINER, "i", door.fd, fd=group)
    assert door.call(GET_STATUS, "II", 8, 0, fd=group)[1] == 3
    assert door.call(VFIO_IOAS, "IIHH", 12, 0, 0, 0)[1] == 1
    name = ctypes.create_string_buffer(DEVICE.encode())
    device = door.vfio.ioctl(group, GET_DEVICE_FD, ctypes.addressof(name))      # no SET_IOMMU is needed
    door.call(MAP_DMA, "IIQQQ", 32, 3, memory[1], 0x10000, PAGE)
    port_of(door).write(0x10000, b"bytes")
    assert memory[0][:5] == b"bytes"
    refused(errno.EBUSY, door.call, UNSET_CONTAINER, "I", 0, fd=group)
    door.vfio.close(door.fd)
    assert port_of(door).read(0x10000, 5) == b"bytes"
    door.vfio.close(group)
    door.vfio.close(device)
    assert not door.vfio._files


def test_the_container_node_can_be_served_by_iommufd(memory):
    vfio = SoftwareVfio(vfio_container="iommufd", memlock_limit=None)
    fd = vfio.open("/dev/vfio/vfio")
    refused(errno.ENODEV, vfio.ioctl, fd, SET_IOMMU, 1)
    group = vfio.open("/dev/vfio/0")
    number = ctypes.c_int(fd)
    vfio.ioctl(group, SET_CONTAINER, ctypes.addressof(number))
    assert vfio.ioctl(fd, SET_IOMMU, 1) == 0


def test_old_type1_splits_mappings_with_their_dirty_bits(memory):
    door = Door()
    ioas = door.alloc()
    node, device = door.bind()
    table = door.call(HWPT_ALLOC, "12I", 48, 2, device, ioas, *[0] * 8)[4]
    door.attach(node, table)
    door.call(VFIO_IOAS, "IIHH", 12, ioas, 1, 0)
    door.vfio.ioctl(door.fd, SET_IOMMU, 1)
    door.call(MAP_DMA, "IIQQQ", 32, 3, memory[1], 0x10000, 8 * PAGE)
    door.call(SET_DIRTY, "IIII", 16, 1, table, 0)
    for page in (0, 2, 5, 7):
        port_of(door).write(0x10000 + page * PAGE, b"x")
    assert door.call(UNMAP_DMA, "IIQQ", 24, 0, 0x13000, PAGE)[3] == PAGE
    bits = ctypes.c_uint64()
    for iova, expected in ((0x10000, 0b101), (0x14000, 0b1010)):
        bits.value = 0
        door.call(GET_DIRTY, "IIIIQQQQ", 48, table, 0, 0, iova, 4 * PAGE, PAGE, ctypes.addressof(bits))
        assert bits.value == expected
    refused(errno.EFAULT, port_of(door).read, 0x13000, 1)


# ---- emulated devices

class Mediated:
    """An emulated device that pins what it uses."""

    address = "mdev"

    def connect(self, port):
        self.port, self.pinned, self.asked = port, [], []

    def disconnect(self):
        pass

    def dma_unmap(self, iova, size):
        self.asked.append((iova, size))
        for start, count in [entry for entry in self.pinned if iova <= entry[0] < iova + size]:
            self.pinned.remove((start, count))
            self.port.unpin_pages(start, count)

    def pin(self, iova, count, prot):
        self.port.pin_pages(iova, count, prot)
        self.pinned.append((iova, count))


@pytest.fixture
def mediated():
    device = Mediated()
    door = Door(groups=[SoftwareGroup(0, [device], emulated=True)])
    ioas = door.alloc()
    node, _ = door.bind("mdev")
    assert door.attach(node, ioas) == ioas
    return door, ioas, device


def test_an_emulated_device_asks_for_whole_pages(mediated, memory):
    door, ioas, _ = mediated
    refused(errno.EINVAL, door.map, ioas, 0x10000, memory[1], 512)
    refused(errno.EBUSY, door.call, DESTROY, "II", 8, ioas)


def test_an_unmap_asks_for_pinned_pages(mediated, memory):
    door, ioas, device = mediated
    door.map(ioas, 0x10000, memory[1], 4 * PAGE)
    device.pin(0x11000, 2, 2)
    device.pin(0x12000, 1, 1)
    assert door.unmap(ioas, 0x10000, 4 * PAGE) == 4 * PAGE
    assert device.asked == [(0x10000, 4 * PAGE)]


def test_an_unmap_gives_up_on_a_device_that_keeps_its_pages(mediated, memory):
    door, ioas, device = mediated
    door.map(ioas, 0x10000, memory[1], PAGE)
    device.port.pin_pages(0x10000, 1, 3)
    refused(errno.EDEADLK, door.unmap, ioas, 0x10000, PAGE)
    assert len(device.asked) == 100
    device.port.unpin_pages(0x10000, 1)
    assert door.unmap(ioas, 0x10000, PAGE) == PAGE


def test_pins_need_only_the_permission_that_they_ask_for(mediated, memory):
    door, ioas, device = mediated
    door.map(ioas, 0x10000, memory[1], PAGE, 3)         # WRITEABLE alone
    refused(errno.EPERM, device.pin, 0x10000, 1, 1)
    device.pin(0x10000, 1, 2)
    refused(errno.ENOENT, device.pin, 0x10000, 2, 2)
    refused(errno.ENOENT, device.pin, 0x20000, 1, 1)
    device.port.write(0x10000, b"abc")
    assert memory[0][:3] == b"abc"
    refused(errno.EFAULT, device.port.read, 0x10000, 3)


def test_fault_queues_are_empty(door):
    _, _, number, fd = door.call(FAULT_QUEUE, "IIII", 16, 0, 0, 0)
    assert door.vfio.read(fd, 80) == b""
    refused(errno.ESPIPE, door.vfio.read, fd, 41)
    refused(errno.ESPIPE, door.vfio.pread, fd, 40, 0)
    refused(errno.ESPIPE, door.vfio.pwrite, fd, bytes(8), 0)
    refused(errno.EINVAL, door.vfio.write, fd, bytes(8))
    refused(errno.EBUSY, door.call, DESTROY, "II", 8, number)
    door.vfio.close(fd)
    door.call(DESTROY, "II", 8, number)
    refused(errno.EOPNOTSUPP, door.call, FAULT_QUEUE, "IIII", 16, 1, 0, 0)


# ---- threads

def test_no_write_is_lost_between_reports_while_maps_come_and_go(memory):
    door = Door()
    ioas = door.alloc()
    node, device = door.bind()
    table = door.call(HWPT_ALLOC, "12I", 48, 2, device, ioas, *[0] * 8)[4]
    door.attach(node, table)
    door.map(ioas, 0x10000, memory[1], 16 * PAGE)
    door.call(SET_DIRTY, "IIII", 16, 1, table, 0)
    port, done, failures = port_of(door), threading.Event(), []
    written = [0] * 16

    def write(pages):
        for i in range(400):
            for page in pages:
                port.write(0x10000 + page * PAGE, struct.pack("=I", i + 1))
                written[page] += 1

    def churn():
        while not done.is_set():
            try:
                door.map(ioas, 0x100000, memory[1], PAGE)
                door.unmap(ioas, 0x100000, PAGE)
            except OSError as failure:
                failures.append(failure)
                return

    threads = [threading.Thread(target=write, args=(range(first, 16, 2),)) for first in (0, 1)]
    churner = threading.Thread(target=churn)
    for thread in (*threads, churner):
        thread.start()
    bits, seen = ctypes.c_uint64(), 0
    while True:
        last = not any(thread.is_alive() for thread in threads)
        # Bits of pages that are reported stand for contents that are there: each page's last write is seen in the end.
        bits.value = 0
        door.call(GET_DIRTY, "IIIIQQQQ", 48, table, 0, 0, 0x10000, 16 * PAGE, PAGE, ctypes.addressof(bits))
        seen |= bits.value
        if last:
            break
    done.set()
    churner.join()
    assert not failures and seen == 0xFFFF and written == [400] * 16
    bits.value = 0
    door.call(GET_DIRTY, "IIIIQQQQ", 48, table, 0, 0, 0x10000, 16 * PAGE, PAGE, ctypes.addressof(bits))
    assert bits.value == 0


def test_an_iommufd_closed_while_an_unmap_waits_for_a_device_is_freed_later(memory):
    class Closes(Mediated):
        def dma_unmap(self, iova, size):
            door.vfio.close(node)
            refused(errno.EBUSY, door.call, DESTROY, "II", 8, ioas)
            door.vfio.close(door.fd)

    device = Closes()
    door = Door(groups=[SoftwareGroup(0, [device], emulated=True)])
    ioas = door.alloc()
    node, _ = door.bind("mdev")
    door.attach(node, ioas)
    door.map(ioas, 0x10000, memory[1], PAGE)
    device.pin(0x10000, 1, 3)
    assert door.unmap(ioas, 0x10000, PAGE) == PAGE
    assert not door.vfio._files
