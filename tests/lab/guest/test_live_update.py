"""Live update on the running kernel: container, memory and a device that goes on with DMA go to another process."""
import contextlib
import json
import os
import signal
import socket
import sys
import threading

import pytest
from ipc_lock import set_ipc_lock
from two_processes import answer, fork

from vfiodma import EduDriver, GuestMemory, IoAddressSpace, IommufdContainer, Type1Container, VfioDevice
from vfiodma.devices.interrupts import IrqIndex
from vfiodma.errors import MigrationError, VfioError
from vfiodma.liveupdate import UpdateOffer, UpdateTaker, exec_into, preflight

pytestmark = pytest.mark.skipif(not os.path.exists("/sys/bus/pci/devices/0000:00:10.0/iommu_group"),
                                reason="no IOMMU stands before the devices")

EDU, PAGE, IOVA, PAGES = "0000:00:10.0", 4096, 0x100000, 64
RELEASE = tuple(map(int, os.uname().release.split("-")[0].split("+")[0].split(".")[:2]))
BACKENDS = [Type1Container, pytest.param(IommufdContainer, marks=pytest.mark.skipif(
    not os.path.exists("/dev/iommu") or RELEASE < (6, 14), reason="this kernel can't change the process of mappings"))]


def locked_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmLck"))


def page(number, generation=0):
    return bytes([number & 0xFF, generation]) * (PAGE // 2)


class Mover(threading.Thread):
    """Has the device copy page 0 to page 1, 2, ... until it is stopped."""

    def __init__(self, driver):
        super().__init__()
        self.driver, self.stopped, self.moved, self.failure = driver, threading.Event(), 0, None

    def run(self):
        try:
            while not self.stopped.is_set():
                self.driver.copy(IOVA, IOVA + (1 + self.moved % 15) * PAGE, 64)
                self.moved += 1
        except VfioError as exc:
            self.failure = exc


def new_process(sock, other, die_after=None, limit=None):
    """Take over, have the device copy, tell what was seen."""
    other.close()
    if limit is not None:
        import resource
        set_ipc_lock(False)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
    if die_after is not None:
        def die(container, entries):
            for iova, vaddr, size in entries.tolist()[:die_after]:
                container.update_vaddr(iova, vaddr, size)
            os.kill(os.getpid(), signal.SIGKILL)
        Type1Container.update_vaddr_many = die
        IommufdContainer.change_process = lambda container: die(container, memoryview(b""))
    try:
        taken = UpdateTaker(sock, timeout=60).take_over()
    except VfioError as exc:
        return {"taken": False, "error": str(exc)}
    with taken:
        sock.settimeout(60)
        sock.recv(1)                    # the old process still drives the device until then
        device = VfioDevice(None, taken.fds.pop(EDU), EDU)
        ioas, memory = taken.ioas, taken.memory
        same = all(ioas.translate(IOVA + at * PAGE) == memory.region.vaddr + at * PAGE for at in range(PAGES))
        before = memory.read(PAGE, 64) == memory.read(0, 64)
        memory.write(0, page(200, 7))
        with device:
            driver = EduDriver(device, timeout=30)
            driver.copy(IOVA, IOVA + 20 * PAGE, 64)
            if "irq" in taken.fds:
                os.set_blocking(taken.fds["irq"], False)
                with device.interrupts.take_over(IrqIndex.MSI, [taken.fds.pop("irq")]) as vectors:
                    driver.raise_interrupt(1)
                    irq = vectors.wait(10)
                    driver.acknowledge()
            else:
                irq = None
        result = {"taken": True, "same": same, "before": before, "state": taken.state.decode(), "irq": irq,
                  "locked": locked_kib(),
                  "copied": memory.read(20 * PAGE, 64) == page(200, 7)[:64], "count": len(ioas)}
        ioas.unmap_all()
        return result


@contextlib.contextmanager
def old_process(make):
    """A container with many mappings, and a device that copies."""
    with GuestMemory.memfd(PAGES * PAGE) as memory, IoAddressSpace(make([EDU]), close_backend=True) as ioas:
        for at in range(PAGES):
            memory.write(at * PAGE, page(at))
            ioas.map(memory, IOVA + at * PAGE, offset=at * PAGE, size=PAGE)
        with VfioDevice.open(ioas.backend, EDU) as device:
            mover = Mover(EduDriver(device, timeout=30))
            mover.start()
            try:
                yield ioas, memory, device, mover
            finally:
                mover.stopped.set()
                mover.join()


def start(**options):
    one, other = socket.socketpair()
    child = fork(lambda: new_process(other, one, **options))
    other.close()
    return one, child


@pytest.mark.short
@pytest.mark.parametrize("make", BACKENDS)
def test_everything_goes_to_the_new_process_while_the_device_copies(make, capsys):
    sock, child = start()
    with sock, old_process(make) as (ioas, memory, device, mover):
        assert preflight(ioas, memory).ok
        mapped = locked_kib()
        vectors = device.interrupts.enable(IrqIndex.MSI)
        while mover.moved < 1:
            mover.join(0.01)
        times = UpdateOffer(sock, ioas, memory, fds={EDU: device.fd, "irq": vectors[0].fd}, freeze=lambda: b"last",
                            timeout=60).hand_over()
        moved = mover.moved
        while mover.moved < moved + 2 and mover.failure is None:     # its registers are still reachable from here
            mover.join(0.01)
        mover.stopped.set()
        mover.join()
        assert mover.failure is None and ioas.closed and times.mappings == PAGES
        left = locked_kib()
        device.let_go()
        assert vectors.closed
        sock.send(b".")
    seen, status = answer(child)
    assert status == 0
    assert seen.pop("locked") >= (PAGES * PAGE >> 10 if make is Type1Container else 0)
    assert left < mapped or make is not Type1Container
    assert seen == {"taken": True, "same": True, "before": True, "state": "last", "copied": True, "count": PAGES,
                    "irq": 1}
    with capsys.disabled():
        print(f"\n{make.__name__}: {times}")


@pytest.mark.parametrize("make", BACKENDS)
@pytest.mark.parametrize("restored", [0, 1, PAGES - 1, PAGES])
def test_a_new_process_that_dies_leaves_the_old_one_as_it_was(make, restored):
    if make is IommufdContainer and restored:
        pytest.skip("there is one step only")
    sock, child = start(die_after=restored)
    with sock, old_process(make) as (ioas, memory, device, mover):
        mapped = locked_kib()
        with pytest.raises(MigrationError):
            UpdateOffer(sock, ioas, memory, fds={EDU: device.fd}, timeout=60).hand_over()
        assert answer(child) == (None, -signal.SIGKILL)
        moved = mover.moved
        while mover.moved < moved + 2 and mover.failure is None:
            mover.join(0.01)
        assert mover.failure is None and locked_kib() == mapped
        assert all(ioas.translate(IOVA + at * PAGE) == memory.region.vaddr + at * PAGE for at in range(PAGES))
        ioas.invalidate_vaddr() if make is Type1Container else None         # every vaddr is valid: this can be done
        if make is Type1Container:
            ioas.update_vaddr_many([(IOVA + at * PAGE, memory.region.vaddr + at * PAGE, PAGE) for at in range(PAGES)])


NEW_PROGRAM = """
import json, os, sys
sys.path[:0] = %r
from vfiodma import EduDriver, VfioDevice
from vfiodma.liveupdate import take_from_exec
with take_from_exec() as taken:
    ioas, memory = taken.ioas, taken.memory
    memory.write(0, b"after the exec")
    with VfioDevice(None, taken.fds.pop("device")) as device:
        EduDriver(device, timeout=30).copy(0x100000, 0x100000 + 20 * 4096, 64)
    os.write(taken.fds["result"], json.dumps({"read": memory.read(20 * 4096, 14).decode(), "count": len(ioas),
             "state": taken.state.decode(), "numpy": "numpy" in sys.modules}).encode())
    ioas.unmap_all()
"""


@pytest.mark.parametrize("make", BACKENDS)
def test_everything_stays_when_the_program_replaces_itself(make):
    read, write = os.pipe()

    def old():
        os.close(read)
        memory, ioas = GuestMemory.memfd(PAGES * PAGE), IoAddressSpace(make([EDU]), close_backend=True)
        for at in range(PAGES):
            ioas.map(memory, IOVA + at * PAGE, offset=at * PAGE, size=PAGE)
        device = VfioDevice.open(ioas.backend, EDU)
        EduDriver(device, timeout=30).copy(IOVA, IOVA + PAGE, 64)
        with pytest.raises(VfioError):
            exec_into(["/no/such/program"], ioas, memory)
        exec_into([sys.executable, "-c", NEW_PROGRAM % [entry for entry in sys.path if entry]], ioas, memory,
                  fds={"device": device.fd, "result": write}, freeze=lambda: b"last")

    child = fork(old)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    assert answer(child)[1] == 0
    assert json.loads(text) == {"read": "after the exec", "count": PAGES, "state": "last", "numpy": False}


def test_black_out_of_many_mappings(capsys):
    """No limit here: the guest is emulated."""
    count = 10_000

    def new(sock, other):
        other.close()
        with UpdateTaker(sock, timeout=120).take_over() as taken:
            found = len(taken.ioas)
            taken.ioas.unmap_all()
            return found

    one, other = socket.socketpair()
    child = fork(new, other, one)
    other.close()
    with one, GuestMemory.memfd(count * PAGE) as memory, \
            IoAddressSpace(Type1Container([EDU]), close_backend=True) as ioas:
        rows = [(at * 2 * PAGE, memory.region.vaddr + at * PAGE, PAGE, 3) for at in range(count)]
        ioas.map_many([row for row in rows if not 0xFEE00000 - PAGE < row[0] < 0xFEF00000], keep=memory.region)
        times = UpdateOffer(one, ioas, memory, timeout=120).hand_over()
    assert answer(child) == (times.mappings, 0)
    with capsys.disabled():
        print(f"\n{times}: black-out {times.blackout * 1e3:.2f} ms")


def test_a_new_process_that_may_lock_too_little_is_refused_before_anything_changes():
    sock, child = start(limit=16 * PAGE)
    with sock, old_process(Type1Container) as (ioas, memory, device, _):
        with pytest.raises(MigrationError, match="RLIMIT_MEMLOCK"):
            UpdateOffer(sock, ioas, memory, timeout=60).hand_over()
        assert ioas.translate(IOVA) == memory.region.vaddr
    seen, _ = answer(child)
    assert not seen["taken"]


@pytest.mark.skipif(not os.path.exists("/dev/iommu") or RELEASE < (6, 14), reason="for kernels that map by file")
def test_mappings_by_address_are_refused_by_the_preflight():
    with GuestMemory.memfd(2 * PAGE) as memory, IoAddressSpace(IommufdContainer([EDU], by_file=False),
                                                               close_backend=True) as ioas:
        ioas.map(memory, IOVA)
        report = preflight(ioas, memory)
        assert not report.ok and "mapped by file" in str([f.topic for f in report.findings if not f.ok])
        ioas.unmap_all()


def test_what_is_no_container_is_not_adopted():
    from vfiodma.backends import adopt_backend

    for name, state in (("type1", {"groups": ["/dev/vfio/0"], "members": {}, "held": 0, "iommu_type": 3}),
                        ("iommufd", {"devices": {}, "ioas": 1, "hwpts": [], "pgsizes": 4096}),
                        ("type1", {}), ("iommufd", {})):
        count = 2 if name == "type1" else 1
        fds = [os.memfd_create("x") for _ in range(count)]
        with pytest.raises(VfioError):
            adopt_backend(name, state, fds)
        for fd in fds:
            with pytest.raises(OSError):
                os.fstat(fd)
