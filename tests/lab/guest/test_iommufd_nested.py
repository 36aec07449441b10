"""Page tables of guests: the running kernel and the software iommufd are asked the same, and answer the same.

The self-test IOMMU of the kernel has nested tables, invalidations and page faults, though it walks nothing; on Linux
6.12 it needs a boot with intel_iommu=off.  The emulated VT-d before real devices can't nest: there, what is refused.
"""
import ctypes
import errno
import itertools
import os
import select
import struct

import pytest
from conformance.software_target import SoftwareTarget

from vfiodma import SoftwareGroup, SoftwareVfio, VfioError
from vfiodma.backends.iommufd import Iommufd, NestedHwpt
from vfiodma.errors import InvalidArgumentError, UnsupportedError
from vfiodma.kernel import KernelVfio
from vfiodma.nesting import IommufdNestedDomain
from vfiodma.uapi import iommufd as abi
from vfiodma.uapi import vfio

pytestmark = pytest.mark.skipif("KERNEL_LAB" not in os.environ or not os.path.exists("/dev/iommu"),
                                reason="runs in a kernel-lab guest with iommufd")
RELEASE = ".".join(os.environ.get("KERNEL_LAB", "7.2").split("-")[0].split(".")[:2])
IOMMU_TEST, MOCK_DOMAIN, REPLACE, TRIGGER_IOPF = 0x3BA0, 2, 10, 15
SELFTEST = 0xDEAD
EDU = "0000:00:10.0"


class Kernel:
    """The running kernel's calls, as data: (errno or 0, what came back)."""

    def __init__(self):
        self.system = KernelVfio()
        self.log = []
        self.fd = self.system.open("/dev/iommu")

    def ask(self, call, *args):
        try:
            return 0, call(*args)
        except (OSError, VfioError) as exc:
            return exc.errno, None

    def ioctl(self, request, data, fd=None, hide=0):
        """Do an ioctl; note and return the structure afterwards without its last ``hide`` bytes."""
        buffer = ctypes.create_string_buffer(data, len(data))
        code, _ = self.ask(self.system.ioctl, self.fd if fd is None else fd, request, ctypes.addressof(buffer))
        self.log.append((hex(request), data[:len(data) - hide], errno.errorcode.get(code, 0),
                         buffer.raw[:len(data) - hide]))
        return buffer.raw

    def read(self, fd, size):
        self.log.append(("read", size, self.ask(os.read, fd, size)))

    def write(self, fd, data):
        self.log.append(("write", data, self.ask(os.write, fd, data)))

    def readable(self, fd):
        self.log.append(("poll", [bool(found) for found in select.select([fd], [fd], [], 0)]))

    def close(self, fd):
        self.system.close(fd)


class Model(Kernel):
    """The same of the software iommufd, with a model of the self-test IOMMU."""

    def __init__(self, system=None):
        self.target = SoftwareTarget(RELEASE)
        self.system = system or self.target
        self.log = []
        self.fd = (system or self.target.vfio).open("/dev/iommu")

    def read(self, fd, size):
        self.log.append(("read", size, self.ask(self.target.vfio.read, fd, size)))

    def write(self, fd, data):
        self.log.append(("write", data, self.ask(self.target.vfio.write, fd, data)))


def test_command(op, number, rest):
    return struct.pack("=IIII", 96, op, number, 0) + rest.ljust(80, b"\0")


test_command.__test__ = False


def play_mock(player, memory):
    """Nested tables, invalidations and page faults of a mock device."""
    number = itertools.count(1)
    player.ioctl(abi.IOMMU_IOAS_ALLOC, struct.pack("=III", 12, 0, 0))
    ioas = next(number)
    answer = player.ioctl(IOMMU_TEST, test_command(MOCK_DOMAIN, ioas, b""))
    mock, _, device = struct.unpack_from("=III", answer, 16)

    def hwpt(pt, flags=0, kind=0, length=0, address=0, fault=0, dev=device, reserved=0, reserved2=0):
        data = struct.pack("=8IQII", 48, flags, dev, pt, 0, reserved, kind, length, address, fault, reserved2)
        return struct.unpack_from("=I", player.ioctl(abi.IOMMU_HWPT_ALLOC, data), 16)[0]

    def destroy(which):
        player.ioctl(abi.IOMMU_DESTROY, struct.pack("=II", 8, which))

    def invalidate(which, entries, kind=0xDEADBEEF, length=8, n=None, address=memory, reserved=0):
        raw = b"".join(struct.pack("=II", *entry) for entry in entries)
        ctypes.memmove(memory, raw, len(raw))
        player.ioctl(abi.IOMMU_HWPT_INVALIDATE, struct.pack(
            "=IIQIIII", 32, which, address, kind, length, len(entries) if n is None else n, reserved))

    plain, parent = hwpt(ioas), hwpt(ioas, 1)
    nested = hwpt(parent, 0, SELFTEST, 4, memory)
    answer = player.ioctl(abi.IOMMU_FAULT_QUEUE_ALLOC, struct.pack("=4I", 16, 0, 0, 0), hide=4)
    queue, events = struct.unpack("=4I", answer)[2:]
    player.ioctl(abi.IOMMU_FAULT_QUEUE_ALLOC, struct.pack("=4I", 16, 1, 0, 0))
    for flags, kind, length, pt, dev in itertools.product(
            (0, 1, 2, 16), (0, 1, SELFTEST), (0, 4, 64), (parent, plain, nested, device, queue, 99), (device, 99)):
        if kind == 1 and pt == ioas:
            continue                    # kinds of page tables of the mock IOMMU, which came after 6.12
        made = hwpt(pt, flags, kind, length, memory, dev=dev)
        if made:
            destroy(made)
    for pt, reserved, fault in itertools.product((parent, plain), (0, 1), (0, 99, ioas, queue)):
        made = hwpt(pt, 4, SELFTEST, 4, memory, fault, reserved=reserved)
        if made:
            destroy(made)
    hwpt(parent, 0, SELFTEST, 4, 16)
    hwpt(parent, 0, SELFTEST, 4, 0)
    hwpt(parent, 0, SELFTEST, 3, memory)
    hwpt(parent, 4, SELFTEST, 4, 16, 99)
    hwpt(parent, 0, SELFTEST, 4, memory, reserved2=1)
    destroy(parent)

    good, bad_flag, bad_id = (0, 1), (2, 0), (0, 4)
    for which in (nested, parent, plain, ioas, device, queue, 99):
        for entries in ([], [good], [good, bad_flag, good], [good, good, bad_id], [(1, 0), (0, 3), (3, 0)]):
            invalidate(which, entries)
    for length in (0, 4, 7, 8, 9, 16, 4096, 4097):
        invalidate(nested, [good], length=length)
        invalidate(nested, [], length=length)
    for kind in (0, 1, 5, 0xDEADBEEF):
        invalidate(nested, [good], kind=kind)
        invalidate(nested, [], kind=kind)
    invalidate(nested, [good], address=0)
    invalidate(nested, [good], address=16)
    invalidate(nested, [good], reserved=1)
    invalidate(nested, [], n=(1 << 19) + 1)
    invalidate(nested, [], n=1 << 19, length=4096)
    invalidate(nested, [good] * 3, address=memory + 8192 - 20)

    asking = hwpt(parent, 4, SELFTEST, 4, memory, queue)
    destroy(queue)
    player.ioctl(IOMMU_TEST, test_command(REPLACE, mock, struct.pack("=I", asking)))
    destroy(asking)
    player.readable(events)

    def request(pasid, group, address):
        player.ioctl(IOMMU_TEST, test_command(TRIGGER_IOPF, 0, struct.pack("=4IQ", device, pasid, group, 3, address)))

    for size in (0, 1, 20, 39, 41, 40):
        player.read(events, size)
    player.write(events, bytes(8))      # cookie 0, before any was given
    for i in range(4):
        request(5 + i, 2 + i, 0xDEAD0000 + 4096 * i)
    player.readable(events)
    for size in (0, 20, 40, 80, 40, 40):
        player.read(events, size)
    for answers in ([], [(1, 2)], [(1, 0), (77, 0), (2, 0)], [(1, 0)], [(2, 1)], [(3, 5)], [(0, 0)]):
        player.write(events, b"".join(struct.pack("=II", *one) for one in answers))
    for size in (1, 7, 9):
        player.write(events, bytes(size))
    request(20, 30, 4096)
    player.read(events, 400)
    request(21, 31, 8192)
    player.ioctl(IOMMU_TEST, test_command(REPLACE, mock, struct.pack("=I", nested)))     # what waits is invalid now
    player.readable(events)
    player.read(events, 40)
    player.write(events, struct.pack("=II", 1, 0))
    destroy(queue)
    player.close(events)
    destroy(queue)
    destroy(asking)
    destroy(queue)
    destroy(nested)
    player.ioctl(IOMMU_TEST, test_command(REPLACE, mock, struct.pack("=I", parent)))
    for which in (nested, parent, plain, ioas):
        destroy(which)
    destroy(mock)
    for which in (parent, ioas):
        destroy(which)


def compare(one, other):
    """Fail at the first step with another answer."""
    for i, (real, model) in enumerate(zip(one.log, other.log, strict=False)):
        assert real == model, f"step {i}\n kernel {real}\n model  {model}"
    assert len(one.log) == len(other.log)
    print(f"{len(one.log)} steps agree")


@pytest.fixture
def memory():
    """Two pages at 8 KiB before a hole."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    address = libc.mmap(None, 3 * 4096, 3, 0x22, -1, 0)
    assert not libc.mprotect(address + 8192, 4096, 0)
    return address


@pytest.mark.mock
def test_the_mock_iommu_and_its_model_agree_on_nested_tables(memory):
    kernel, model = Kernel(), Model()
    probe = kernel.ioctl(abi.IOMMU_IOAS_ALLOC, struct.pack("=III", 12, 0, 0))
    kernel.ioctl(IOMMU_TEST, test_command(MOCK_DOMAIN, struct.unpack("=III", probe)[2], b""))
    if kernel.log[-1][2]:
        pytest.skip(f"no self-test IOMMU: {kernel.log[-1][2]}")
    kernel.close(kernel.fd)
    kernel = Kernel()
    play_mock(kernel, memory)
    play_mock(model, memory)
    compare(kernel, model)


def play_vtd(player, node, memory):
    """What an IOMMU that can't nest refuses, and its registers."""
    data = struct.pack("=IIiI", 16, 0, player.fd, 0)
    device, = struct.unpack_from("=I", player.ioctl(vfio.VFIO_DEVICE_BIND_IOMMUFD, data, fd=node, hide=8), 12)
    player.ioctl(abi.IOMMU_IOAS_ALLOC, struct.pack("=III", 12, 0, 0))
    ioas = device + 1

    def hwpt(pt, flags=0, kind=0, length=0):
        data = struct.pack("=8IQII", 48, flags, device, pt, 0, 0, kind, length, memory, 0, 0)
        return struct.unpack_from("=I", player.ioctl(abi.IOMMU_HWPT_ALLOC, data), 16)[0]

    ctypes.memset(memory, 0, 64)
    plain = hwpt(ioas)
    for flags, kind, length, pt in itertools.product((0, 1, 2, 3, 4, 5, 8, 16), (0, 1, 2), (0, 24, 40),
                                                     (ioas, plain, device, 99)):
        made = hwpt(pt, flags, kind, length)
        if made:
            player.ioctl(abi.IOMMU_DESTROY, struct.pack("=II", 8, made))
    answer = player.ioctl(vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, struct.pack("=III", 12, 0, ioas), fd=node)
    hwpt(struct.unpack("=III", answer)[2], 0, 1, 24)            # over an automatic table
    for which, n in itertools.product((plain, ioas, device), (0, 1)):
        player.ioctl(abi.IOMMU_HWPT_INVALIDATE, struct.pack("=IIQIIII", 32, which, memory, 0, 24, n, 0))
    return struct.unpack("=4IQIIQ", player.ioctl(abi.IOMMU_GET_HW_INFO, struct.pack(
        "=4IQIIQ", 40, 0, device, 24, memory, 0, 0, 0), hide=40))


@pytest.mark.skipif(not os.path.exists("/sys/bus/pci/devices/0000:00:14.0/iommu_group"),
                    reason="no IOMMU stands before the devices")
def test_an_iommu_that_can_not_nest_refuses_the_same(memory):
    kernel = Kernel()
    node = kernel.system.open(kernel.system.find_device(EDU).cdev)
    info = play_vtd(kernel, node, memory)
    registers = abi.iommu_hw_info_vtd.unpack(ctypes.string_at(memory, 24))
    assert info[3] == 24 and info[5] == abi.IOMMU_HW_INFO_TYPE_INTEL_VTD and not registers["ecap_reg"] >> 26 & 1
    print({name: hex(value) for name, value in registers.items()}, "capabilities", info[7], "pasids", info[6] & 0xff)
    kernel.close(node)
    kernel.close(kernel.fd)

    system = SoftwareVfio(RELEASE, [SoftwareGroup(0, [EDU], dirty_tracking=False, coherent=False)])
    model = Model(system)
    node = system.open(system.find_device(EDU).cdev)
    again = play_vtd(model, node, memory)
    assert abi.iommu_hw_info_vtd.unpack(ctypes.string_at(memory, 24)) == registers and again == info
    compare(kernel, model)


# ---- the typed objects

@pytest.mark.mock
def test_what_can_not_nest_is_told_and_queues_work_alone():
    with Iommufd() as iommufd:
        with iommufd.alloc_fault_queue() as queue:
            assert queue.read() == [] and not select.select([queue], [], [], 0)[0]
            with pytest.raises(InvalidArgumentError):
                queue.respond([(1, True)])
        assert queue.fileno() == -1 and queue.id == 0
        if not os.path.exists("/sys/bus/pci/devices/0000:00:14.0/iommu_group"):
            return
        device, ioas = iommufd.bind(EDU), iommufd.alloc_ioas()
        with pytest.raises(UnsupportedError):
            IommufdNestedDomain([device], ioas, pasids=False)
        with pytest.raises(UnsupportedError):
            IommufdNestedDomain([device], ioas)
        plain = iommufd.alloc_hwpt(ioas, device.id)
        with pytest.raises(InvalidArgumentError, match="nest_parent"):
            plain.nested(device.id, 0x1000)
        with pytest.raises(VfioError):
            NestedHwpt(plain, plain.id).invalidate()
        device.attach(plain)
        with pytest.raises((InvalidArgumentError, UnsupportedError)):
            device.attach(plain, 5)
        device.detach()
        plain.destroy()
        ioas.destroy()
