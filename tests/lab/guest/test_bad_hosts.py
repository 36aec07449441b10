"""What is wrong with a host, on the running kernel: typed errors that say what to do, and nothing left behind."""
import contextlib
import errno
import os
import pathlib
import resource
import subprocess
import threading

import pytest

from vfiodma import EduDriver, GuestMemory, IoAddressSpace, IommufdContainer, Type1Container, VfioDevice
from vfiodma.errors import (
    BusyError,
    DmaLimitError,
    DmaPermissionError,
    InvalidArgumentError,
    LockedMemoryError,
    NoDeviceError,
    UnsupportedError,
    VfioError,
)
from vfiodma.testing.memlock import locked_memory_limit
from vfiodma.types import Prot

EDU, OTHER, NVME = "0000:00:10.0", "0000:00:14.0", "0000:00:15.0"
SHARED = ["0000:01:01.0", "0000:01:02.0"]       # of one group
NOBODY = 65534
PAGE = 4096
IOVA = 0x100000
PCI = pathlib.Path("/sys/bus/pci")
ENTRY_LIMIT = pathlib.Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
UNSAFE = pathlib.Path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")

pytestmark = pytest.mark.skipif("KERNEL_LAB" not in os.environ, reason="runs in a guest of the kernel lab")
has_iommu = (PCI / "devices" / EDU / "iommu_group").exists()
isolated = "intremap=off" not in pathlib.Path("/proc/cmdline").read_text()
needs_iommu = pytest.mark.skipif(not has_iommu or not isolated, reason="booted without IOMMU or interrupt remapping")
needs_iommufd = pytest.mark.skipif(not os.path.exists("/dev/iommu"), reason="this kernel has no iommufd")


def opened():
    return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                  if os.path.exists(f"/proc/self/fd/{fd}"))


@pytest.fixture(autouse=True)
def nothing_stays_open():
    before = opened()
    yield
    assert opened() == before


@pytest.fixture
def memory():
    with GuestMemory.memfd(64 * PAGE) as memory:
        yield memory.region


def refused(kind, code, advice, call, *args, **kwargs):
    """Call; the error is of this class and errno, and its text has the advice.  Nothing stays open by then."""
    before = opened()
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    assert caught.value.errno == code, repr(caught.value)
    assert advice in str(caught.value)
    assert opened() == before
    return caught.value


def group_of(address):
    return int((PCI / "devices" / address / "iommu_group").resolve().name)


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def driver_of(address):
    link = PCI / "devices" / address / "driver"
    return link.resolve().name if link.exists() else None


def unbind(address):
    if driver_of(address):
        write(PCI / "devices" / address / "driver/unbind", address)


@contextlib.contextmanager
def bound(address, driver):
    """Give a device to another driver, or to none, for a while."""
    override = PCI / "devices" / address / "driver_override"
    before = override.read_text().strip()
    unbind(address)
    try:
        if driver:
            write(override, driver)
            try:
                write(PCI / "drivers_probe", address)
            except OSError:
                pass
            if driver_of(address) != driver:
                pytest.skip(f"{driver} does not take {address} here")
        yield
    finally:
        unbind(address)
        write(override, "vfio-pci" if before == "(null)" else before)
        write(PCI / "drivers_probe", address)
        assert driver_of(address) == "vfio-pci"


@contextlib.contextmanager
def another_user():
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def missing(path):
    os.rename(path, path + ".away")
    try:
        yield
    finally:
        os.rename(path + ".away", path)


@contextlib.contextmanager
def mode(path, bits):
    before = os.stat(path).st_mode & 0o777
    os.chmod(path, bits)
    try:
        yield
    finally:
        os.chmod(path, before)


def works():
    """The device can be opened, and reached, as if nothing had been."""
    with Type1Container([EDU]) as container, VfioDevice.open(container, EDU) as device:
        return EduDriver(device).version[0] == 1


# ---- who may

@needs_iommu
def test_a_group_of_somebody_else_is_eacces():
    with another_user():
        refused(DmaPermissionError, errno.EACCES, f"{group_of(EDU)} is not for this user", Type1Container, [EDU])
    assert works()


@needs_iommu
def test_a_container_node_of_somebody_else_is_eacces():
    with mode("/dev/vfio/vfio", 0o600), another_user():
        refused(DmaPermissionError, errno.EACCES, "/dev/vfio/vfio is not for this user", Type1Container, [EDU])


@needs_iommu
@needs_iommufd
def test_an_iommufd_node_of_somebody_else_is_eacces():
    with mode("/dev/iommu", 0o600), another_user():
        refused(DmaPermissionError, errno.EACCES, "/dev/iommu is not for this user", IommufdContainer, [EDU])


@needs_iommu
def test_a_user_whom_the_nodes_belong_to_needs_no_other_right(memory):
    """But for the limit of locked memory, which is root's no longer."""
    group = f"/dev/vfio/{group_of(EDU)}"
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 * PAGE, hard))
    try:
        with mode(group, 0o666), mode("/dev/vfio/vfio", 0o666), another_user(), Type1Container([EDU]) as container:
            container.map_dma(IOVA, memory.vaddr, 8 * PAGE, Prot.RW)
            before = opened()
            with pytest.raises(LockedMemoryError) as caught:
                container.map_dma(IOVA + 16 * PAGE, memory.vaddr, PAGE, Prot.RW)
            assert caught.value.errno == errno.ENOMEM and f"{8 * PAGE} bytes" in str(caught.value)
            assert "ulimit -l" in str(caught.value) and opened() == before
            assert container.unmap_dma(IOVA, 8 * PAGE) == 8 * PAGE
            container.map_dma(IOVA + 16 * PAGE, memory.vaddr, PAGE, Prot.RW)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


# ---- what is missing

@needs_iommu
def test_a_missing_container_node_is_enoent():
    with missing("/dev/vfio/vfio"):
        refused(NoDeviceError, errno.ENOENT, "modprobe vfio-pci", Type1Container, [EDU])
    assert works()


@needs_iommu
def test_a_missing_group_node_is_enoent():
    with missing(f"/dev/vfio/{group_of(EDU)}"):
        refused(NoDeviceError, errno.ENOENT, "bind the group's devices to vfio-pci", Type1Container, [EDU])
    refused(NoDeviceError, errno.ENOENT, "/dev/vfio/9999 is missing", Type1Container, [OTHER], groups=[9999])


@needs_iommu
def test_a_missing_iommufd_is_enoent():
    with missing("/dev/iommu") if os.path.exists("/dev/iommu") else contextlib.nullcontext():
        refused(NoDeviceError, errno.ENOENT, "CONFIG_IOMMUFD", IommufdContainer, [EDU])
        refused(NoDeviceError, errno.ENOENT, "CONFIG_IOMMUFD", Type1Container, [EDU], node="/dev/iommu")


@needs_iommu
def test_a_missing_type1_module_is_enodev():
    if subprocess.run(["modprobe", "-r", "vfio_iommu_type1"], capture_output=True).returncode:
        pytest.skip("the module can't be unloaded here")
    try:
        refused(NoDeviceError, errno.ENODEV, "modprobe vfio_iommu_type1", Type1Container, [EDU])
    finally:
        subprocess.run(["modprobe", "vfio_iommu_type1"], check=True)
    assert works()


def test_a_device_that_is_not_there_is_enodev():
    refused(NoDeviceError, errno.ENODEV, "there is no PCI device", Type1Container, ["0000:7f:1f.7"])


@needs_iommu
@pytest.mark.parametrize("spare", range(3))
def test_too_many_open_files_leave_none_open(spare):
    """The container, then a group, then ...: whichever can not be opened."""
    before = opened()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    fill = [os.open("/dev/null", os.O_RDONLY) for _ in range(highest)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(fill) + 1 + spare, hard))
    try:
        with pytest.raises(VfioError) as caught:
            Type1Container([EDU, OTHER])
        assert caught.value.errno == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fill:
            os.close(fd)
    assert opened() == before


# ---- who has it

@needs_iommu
def test_a_group_in_use_is_ebusy_and_the_others_are_let_go():
    with Type1Container([EDU]) as container:
        refused(BusyError, errno.EBUSY, "a group has one user at a time", Type1Container, [EDU])
        refused(BusyError, errno.EBUSY, f"{group_of(EDU)} is open already", Type1Container, [OTHER, NVME, EDU])
        Type1Container([OTHER, NVME]).close()
        container.system.close(container.open_device_fd(EDU))
    assert works()


@needs_iommu
@needs_iommufd
def test_a_device_of_an_iommufd_is_ebusy():
    with IommufdContainer([EDU]):
        refused(BusyError, errno.EBUSY, "", Type1Container, [EDU])
    with Type1Container([EDU]):
        refused(BusyError, errno.EBUSY, "", IommufdContainer, [EDU])
    assert works()


@needs_iommu
def test_a_device_without_a_driver_is_enodev():
    with bound(EDU, None):
        refused(NoDeviceError, errno.ENODEV, f"driverctl set-override {EDU} vfio-pci", Type1Container, [EDU])
        refused(NoDeviceError, errno.ENODEV, "not bound to a driver", Type1Container, [OTHER, EDU])
    assert works()


@needs_iommu
@pytest.mark.parametrize("driver", ["uio_pci_generic", "pci-stub"])
def test_a_device_of_another_driver_is_enodev(driver):
    subprocess.run(["modprobe", driver], capture_output=True)
    with bound(EDU, driver):
        refused(NoDeviceError, errno.ENODEV, f"bound to {driver}: bind it to vfio-pci", Type1Container, [EDU])
    assert works()


@needs_iommu
def test_a_group_that_a_host_driver_has_a_part_of_is_ebusy(memory):
    subprocess.run(["modprobe", "uio_pci_generic"], capture_output=True)
    with bound(SHARED[1], "uio_pci_generic"):
        refused(BusyError, errno.EBUSY, f"{SHARED[1]} (uio_pci_generic)", Type1Container, [SHARED[0]])
        refused(BusyError, errno.EBUSY, "not viable", Type1Container, groups=[group_of(SHARED[0])])
        refused(BusyError, errno.EBUSY, "not viable", Type1Container, [OTHER], groups=[group_of(SHARED[0])])
    with Type1Container(SHARED) as container:
        container.map_dma(IOVA, memory.vaddr, PAGE, Prot.RW)


@needs_iommu
@pytest.mark.parametrize("driver", [None, "pci-stub"])
def test_a_group_with_a_part_that_nobody_uses_works(driver, memory):
    with bound(SHARED[1], driver), Type1Container([SHARED[0]]) as container:
        container.map_dma(IOVA, memory.vaddr, PAGE, Prot.RW)
        with VfioDevice.open(container, SHARED[0]) as device:
            assert EduDriver(device).invert(5) == 0xFFFFFFFA
        refused(NoDeviceError, errno.ENODEV, "not in a group of this container", container.open_device_fd, SHARED[1])


# ---- what goes away

@needs_iommu
def test_a_device_that_is_unbound_takes_the_mappings_with_it(memory):
    with Type1Container([EDU]) as container, bound(EDU, None):
        # bound() has unbound the device of the open container.
        with pytest.raises(InvalidArgumentError, match="lost its groups"):
            container.map_dma(IOVA, memory.vaddr, PAGE, Prot.RW)
        with pytest.raises(InvalidArgumentError, match="lost its groups"):
            container.unmap_dma(IOVA, PAGE)
        with pytest.raises(VfioError) as caught:
            container.open_device_fd(EDU)
        assert caught.value.errno in (errno.ENODEV, errno.EINVAL)
        container.close()
    assert works()


@needs_iommu
def test_an_address_space_of_a_device_that_was_unbound_is_closed(memory):
    ioas = IoAddressSpace(Type1Container([EDU]), close_backend=True)
    mapping = ioas.map(memory)
    with bound(EDU, None):
        with pytest.raises(VfioError) as caught:
            ioas.unmap(mapping.iova)
        assert "lost its groups" in str(caught.value)
        with contextlib.suppress(VfioError):
            ioas.close()
        ioas.close()
    memory.view().release()
    assert works()


@needs_iommu
def test_an_open_device_keeps_its_driver_until_it_is_closed(memory):
    with Type1Container([EDU]) as container:
        container.map_dma(IOVA, memory.vaddr, PAGE, Prot.RW)
        with VfioDevice.open(container, EDU) as device:
            unbinding = threading.Thread(target=unbind, args=(EDU,))
            unbinding.start()
            unbinding.join(0.3)
            assert unbinding.is_alive(), "the kernel waits for the descriptor"
            assert EduDriver(device).version[0] == 1
        unbinding.join(30)
        assert not unbinding.is_alive()
        with pytest.raises(InvalidArgumentError, match="lost its groups"):
            container.map_dma(IOVA, memory.vaddr, PAGE, Prot.RW)
    with bound(EDU, None):
        refused(NoDeviceError, errno.ENODEV, "not bound to a driver", Type1Container, [EDU])
    assert works()


@needs_iommu
def test_one_group_of_two_goes_and_the_other_stays(memory):
    with Type1Container([EDU, OTHER]) as container:
        container.map_dma(IOVA, memory.vaddr, PAGE, Prot.RW)
        with bound(OTHER, None):
            container.map_dma(IOVA + PAGE, memory.vaddr, PAGE, Prot.RW)
            assert container.unmap_dma(IOVA, 2 * PAGE) == 2 * PAGE


# ---- limits

@needs_iommu
def test_the_limit_of_mappings_is_enospc_and_a_list_is_undone(memory):
    before = ENTRY_LIMIT.read_text()
    write(ENTRY_LIMIT, "5")
    try:
        with Type1Container([EDU]) as container:
            assert container.capabilities().dma_avail == container.capabilities().dma_entry_limit == 5
            with IoAddressSpace(container) as ioas:
                rows = [[IOVA + 2 * n * PAGE, memory.vaddr, PAGE, 3] for n in range(6)]
                refused(DmaLimitError, errno.ENOSPC, "dma_entry_limit", ioas.map_many, rows)
                assert container.capabilities().dma_avail == 5 and ioas.mappings() == []
                ioas.map_many(rows[:5])
                refused(DmaLimitError, errno.ENOSPC, "map larger pieces", ioas.map, memory)
                assert len(ioas.mappings()) == 5
    finally:
        write(ENTRY_LIMIT, before)


@needs_iommu
def test_the_limit_of_locked_memory_is_enomem_and_a_list_is_undone(memory):
    with IoAddressSpace(Type1Container([EDU]), close_backend=True) as ioas:
        rows = [[IOVA + 8 * n * PAGE, memory.vaddr, 8 * PAGE, 3] for n in range(4)]
        with locked_memory_limit(20 * PAGE):
            refused(LockedMemoryError, errno.ENOMEM, "RLIMIT_MEMLOCK", ioas.map_many, rows)
            assert ioas.mappings() == [] and ioas.backend.capabilities().dma_avail == 65535
            ioas.map_many(rows[:2])


# ---- without an IOMMU, or without its protection of interrupts: boots of their own.  `mock` marks those that run
# where no IOMMU is.

@pytest.mark.skipif(has_iommu and isolated, reason="needs a kernel booted with intremap=off")
@pytest.mark.skipif(not has_iommu, reason="booted without an IOMMU")
def test_without_interrupt_remapping_it_is_eperm():
    refused(DmaPermissionError, errno.EPERM, "allow_unsafe_interrupts", Type1Container, [EDU])
    allowed = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
    write(allowed, "1")
    try:
        assert works()
    finally:
        write(allowed, "0")


@pytest.fixture
def unprotected():
    """The edu device in a group without an IOMMU."""
    if has_iommu:
        pytest.skip("needs a kernel booted with intel_iommu=off")
    if not UNSAFE.exists():
        pytest.skip("this kernel has no no-IOMMU mode")
    unbind(EDU)
    write(UNSAFE, "1")
    write(PCI / "devices" / EDU / "driver_override", "vfio-pci")
    write(PCI / "drivers_probe", EDU)
    yield
    unbind(EDU)
    write(UNSAFE, "0")


@pytest.mark.skipif(has_iommu, reason="needs a kernel booted with intel_iommu=off")
@pytest.mark.mock
def test_a_device_without_an_iommu_is_enodev():
    refused(NoDeviceError, errno.ENODEV, "enable the IOMMU in the firmware", Type1Container, [EDU])


@pytest.mark.mock
def test_a_group_without_an_iommu_is_refused_unless_it_is_asked_for(unprotected):
    refused(DmaPermissionError, errno.EPERM, "noiommu=True", Type1Container, [EDU])
    if os.path.exists("/dev/iommu"):
        refused(DmaPermissionError, errno.EPERM, "noiommu=True", IommufdContainer, [EDU])


@pytest.mark.mock
def test_a_group_without_an_iommu_maps_nothing_but_opens_its_device(unprotected, memory):
    with Type1Container([EDU], noiommu=True) as container:
        assert container.noiommu and container.capabilities().features == frozenset()
        assert container.iova_ranges() == ()
        with pytest.raises(UnsupportedError, match="a no-IOMMU container maps nothing"):
            container.map_dma(IOVA, memory.vaddr, PAGE, Prot.RW)
        with VfioDevice.open(container, EDU) as device:
            assert EduDriver(device).factorial(5) == 120


@pytest.mark.mock
def test_a_group_without_an_iommu_needs_a_capability(unprotected):
    node = f"/dev/vfio/noiommu-{group_of(EDU)}"
    with mode(node, 0o666), mode("/dev/vfio/vfio", 0o666), another_user():
        refused(DmaPermissionError, errno.EPERM, "CAP_SYS_RAWIO", Type1Container, [EDU], noiommu=True)


def test_the_kernel_did_not_complain():
    text = subprocess.run(["dmesg"], capture_output=True, text=True).stdout
    assert "BUG:" not in text
