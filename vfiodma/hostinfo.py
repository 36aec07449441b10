"""What this host offers for DMA, read from sysfs, procfs and the device nodes; nothing is changed.

Every reader takes ``root``, so that a tree of plain files can stand for a host.
"""
import errno
import mmap
import os
import resource
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .errors import NoDeviceError
from .types import DeviceLocation, IovaRange
from .uapi import vfio
from .uapi.caps import capability_chain

CAP_IPC_LOCK = 14
CAP_SYS_PTRACE = 19
UNLIMITED = resource.RLIM_INFINITY
# The driver to bind a device of a bus to.
_VFIO_DRIVER = {"pci": "vfio-pci", "platform": "vfio-platform", "ap": "vfio_ap", "fsl-mc": "vfio-fsl-mc",
                "cdx": "vfio-cdx"}


@dataclass(frozen=True)
class LockedMemory:
    """Limit of locked memory, in bytes; None = unlimited."""

    soft: int | None
    hard: int | None
    used: int                   #: VmLck, what counts against the limit already
    cap_ipc_lock: bool          #: the limit does not apply

    @property
    def available(self) -> int | None:
        """Bytes that may still be locked; None = no limit."""
        return None if self.cap_ipc_lock or self.soft is None else max(0, self.soft - self.used)


@dataclass(frozen=True)
class Node:
    """A device node and whether it can be opened for reading and writing."""

    path: str
    exists: bool
    accessible: bool


@dataclass(frozen=True)
class Device:
    """A device of an IOMMU group."""

    address: str
    bus: str
    driver: str | None
    ids: str                    #: "vendor:device" of a PCI device, else empty


def is_vfio(driver: str | None) -> bool:
    """Tell whether a driver hands its devices to VFIO: vfio-pci, and the variants for one device (mlx5_vfio_pci)."""
    return driver is not None and "vfio" in driver


def holds_group(driver: str | None) -> bool:
    """Tell whether a device that is bound to the driver keeps its group from being used."""
    return driver is not None and not is_vfio(driver) and driver not in {"pci-stub", "pcieport"}


@dataclass(frozen=True)
class Group:
    """An IOMMU group: the smallest set of devices that can be handed out."""

    number: int
    node: Node
    devices: tuple[Device, ...]
    reserved: tuple[tuple[int, int, str], ...]      #: (start, last, type)

    @property
    def noiommu(self) -> bool:
        """Whether no IOMMU stands between its devices and memory."""
        return "noiommu-" in self.node.path

    @property
    def viable(self) -> bool:
        """Whether no device of it is in a host driver's hands."""
        return not any(holds_group(d.driver) for d in self.devices)


@dataclass(frozen=True)
class ContainerInfo:
    """What VFIO_IOMMU_GET_INFO of a container with one group told."""

    group: int
    pgsizes: int
    ranges: tuple[IovaRange, ...]
    dma_avail: int | None


@dataclass(frozen=True)
class HugePages:
    """A pool of huge pages; sizes are bytes."""

    pgsize: int
    reserved: int
    free: int


@dataclass(frozen=True)
class HostInfo:
    """Everything that ``vfiodma probe`` shows."""

    kernel: str
    container_node: Node
    iommufd_node: Node
    cdevs: tuple[str, ...]
    groups: tuple[Group, ...]
    container: ContainerInfo | None
    container_error: str
    pgsize: int
    dma_entry_limit: int | None
    locked: LockedMemory
    physical: int
    hugepages: tuple[HugePages, ...]
    userfaultfd_node: Node
    userfaultfd_unprivileged: bool | None           #: None = the kernel has no userfaultfd
    cap_sys_ptrace: bool = field(default=False)


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def _node(root: Path, path: str) -> Node:
    place = root / path.lstrip("/")
    return Node(path, place.exists(), os.access(place, os.R_OK | os.W_OK))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder), key=lambda name: (len(name), name))
    except OSError:
        return []


def _status(root: Path) -> dict[str, str]:
    lines = (_text(root / "proc/self/status") or "").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def has_capability(number: int, root: Path | str = "/") -> bool:
    """Return whether a capability is in the effective set of this process (not only of its user namespace)."""
    held = int(_status(Path(root)).get("CapEff", "0"), 16) >> number & 1
    # The kernel asks for the capability in the initial user namespace: a container's root does not have it there.
    namespace = (_text(Path(root) / "proc/self/uid_map") or "0 0 4294967295").split()
    return bool(held) and namespace == ["0", "0", "4294967295"]


def locked_memory(root: Path | str = "/") -> LockedMemory:
    """Read the limit of locked memory and what counts against it.

    Notes
    -----
    Source: getrlimit(2), RLIMIT_MEMLOCK; VmLck and CapEff of /proc/self/status.
    """
    soft, hard = (None if value == UNLIMITED else value for value in resource.getrlimit(resource.RLIMIT_MEMLOCK))
    used = int(_status(Path(root)).get("VmLck", "0 kB").split()[0]) << 10
    return LockedMemory(soft, hard, used, has_capability(CAP_IPC_LOCK, root))


def dma_entry_limit(root: Path | str = "/") -> int | None:
    """Read the limit of mappings of a new Type1 container; None where the module is not loaded."""
    return _number(Path(root) / "sys/module/vfio_iommu_type1/parameters/dma_entry_limit")


def run_delay() -> float:
    """Return the seconds that this thread has stood ready without a CPU; 0 where the kernel does not count them.

    Source: /proc/thread-self/schedstat, the second number.
    """
    try:
        with open("/proc/thread-self/schedstat", "rb") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _device(link: Path) -> Device:
    place = link.resolve()
    bus = os.path.basename(os.path.realpath(place / "subsystem")) if (place / "subsystem").exists() else ""
    driver = os.path.basename(os.path.realpath(place / "driver")) if (place / "driver").exists() else None
    vendor, device = _text(place / "vendor"), _text(place / "device")
    ids = f"{vendor[2:]}:{device[2:]}" if vendor and device else ""
    return Device(link.name, bus, driver, ids)


def _reserved(text: str) -> Iterator[tuple[int, int, str]]:
    for line in text.splitlines():
        parts = line.split()
        if len(parts) == 3:
            yield int(parts[0], 16), int(parts[1], 16), parts[2]


def iommu_groups(root: Path | str = "/") -> tuple[Group, ...]:
    """List the IOMMU groups and their devices.

    Notes
    -----
    Source: /sys/kernel/iommu_groups (Documentation/ABI/testing/sysfs-kernel-iommu_groups).
    """
    root = Path(root)
    folder = root / "sys/kernel/iommu_groups"

    def node(name: str) -> Node:
        noiommu = _node(root, f"/dev/vfio/noiommu-{name}")
        return noiommu if noiommu.exists else _node(root, f"/dev/vfio/{name}")

    return tuple(
        Group(int(name), node(name),
              tuple(_device(folder / name / "devices" / entry) for entry in _names(folder / name / "devices")),
              tuple(_reserved(_text(folder / name / "reserved_regions") or "")))
        for name in _names(folder) if name.isdigit())


def device_location(address: str, root: Path | str = "/") -> DeviceLocation:
    """Find the group, driver and nodes of a PCI device.

    Raises
    ------
    NoDeviceError
        ENODEV: there is no such device, or it has no IOMMU group.

    Notes
    -----
    Source: /sys/bus/pci/devices/<address>/{iommu_group,driver,vfio-dev}.
    """
    if not isinstance(address, str):
        raise TypeError(f"a PCI address is a str like '0000:00:10.0', not {type(address).__name__}")
    root = Path(root)
    place = root / "sys/bus/pci/devices" / address
    if "/" in address or not place.exists():
        raise NoDeviceError(errno.ENODEV, operation="find_device",
                            hint=f"there is no PCI device {address!r}: give an address as lspci -D lists them, "
                                 "for example 0000:00:10.0")
    if not (place / "iommu_group").exists():
        raise NoDeviceError(errno.ENODEV, operation="find_device", hint=f"{address} has no IOMMU group: "
                            "enable the IOMMU in the firmware and, on Intel, boot with intel_iommu=on")
    group = (place / "iommu_group").resolve()
    noiommu = _text(group / "name") == "vfio-noiommu"
    members = {name: _device(group / "devices" / name).driver for name in _names(group / "devices")}
    members.pop(address, None)
    cdevs = _names(place / "vfio-dev")
    return DeviceLocation(
        address, int(group.name), f"/dev/vfio/{'noiommu-' if noiommu else ''}{group.name}",
        f"/dev/vfio/devices/{cdevs[0]}" if cdevs else None, noiommu, _device(place).driver, tuple(members.items()))


def huge_pages(root: Path | str = "/") -> tuple[HugePages, ...]:
    """List the pools of huge pages.

    Notes
    -----
    Source: /sys/kernel/mm/hugepages.
    """
    folder = Path(root) / "sys/kernel/mm/hugepages"
    pools = []
    for name in _names(folder):
        size = name.removeprefix("hugepages-").removesuffix("kB")
        if size.isdigit():
            pools.append(HugePages(int(size) << 10, _number(folder / name / "nr_hugepages") or 0,
                                   _number(folder / name / "free_hugepages") or 0))
    return tuple(pools)


def parse_info(data: bytes, group: int) -> ContainerInfo:
    """Read what VFIO_IOMMU_GET_INFO wrote: struct vfio_iommu_type1_info and its chain of capabilities."""
    _, _, pgsizes, first = struct.unpack_from("=IIQI", data)
    ranges: tuple[IovaRange, ...] = ()
    avail = None
    for kind, _, offset in capability_chain(data, first):
        if kind == vfio.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
            count, = struct.unpack_from("=I", data, offset + 8)
            ranges = tuple(IovaRange(*struct.unpack_from("=QQ", data, offset + 16 + 16 * i)) for i in range(count))
        elif kind == vfio.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL:
            avail, = struct.unpack_from("=I", data, offset + 8)
    return ContainerInfo(group, pgsizes, ranges, avail)


def container_info(groups: tuple[Group, ...]) -> tuple[ContainerInfo | None, str]:
    """Ask a container about the first group that is free; return (answer, why there is none).

    A group that somebody uses is never touched: its descriptor can be open only once, so that opening it fails with
    EBUSY.  No device is opened, hence none is reset.
    """
    import fcntl

    reason = "no IOMMU group is bound to a VFIO driver"
    for group in groups:
        if not (group.node.accessible and group.viable and any(d.driver for d in group.devices)):
            continue
        opened: list[int] = []
        try:
            opened.append(os.open("/dev/vfio/vfio", os.O_RDWR | os.O_CLOEXEC))
            opened.append(os.open(group.node.path, os.O_RDWR | os.O_CLOEXEC))
            container, descriptor = opened
            fcntl.ioctl(descriptor, vfio.VFIO_GROUP_SET_CONTAINER, struct.pack("=i", container))
            fcntl.ioctl(container, vfio.VFIO_SET_IOMMU, vfio.VFIO_TYPE1v2_IOMMU)
            data = bytearray(struct.pack("=IIQII", 24, 0, 0, 0, 0))
            fcntl.ioctl(container, vfio.VFIO_IOMMU_GET_INFO, data)
            needed, = struct.unpack_from("=I", data)
            data = bytearray(struct.pack("=I", needed).ljust(max(needed, 24), b"\0"))
            fcntl.ioctl(container, vfio.VFIO_IOMMU_GET_INFO, data)
            return parse_info(bytes(data), group.number), ""
        except OSError as exc:
            in_use = "it is in use" if exc.errno == errno.EBUSY else exc.strerror
            reason = f"group {group.number}: {in_use}"
        finally:
            for fd in reversed(opened):
                os.close(fd)
    return None, reason


def _physical_memory() -> int:
    import psutil

    return psutil.virtual_memory().total


def read_host(root: Path | str = "/") -> HostInfo:
    """Read everything; ``root`` other than "/" is a tree of files, where no container is opened."""
    place = Path(root)
    node, groups = _node(place, "/dev/vfio/vfio"), iommu_groups(place)
    if not node.exists:
        container, reason = None, "there is no /dev/vfio/vfio"
    elif place != Path("/"):
        container, reason = None, "not this host"
    else:
        container, reason = container_info(groups)
    unprivileged = _number(place / "proc/sys/vm/unprivileged_userfaultfd")
    return HostInfo(
        kernel=os.uname().release, container_node=node, iommufd_node=_node(place, "/dev/iommu"),
        cdevs=tuple(_names(place / "dev/vfio/devices")), groups=groups, container=container, container_error=reason,
        pgsize=mmap.PAGESIZE, dma_entry_limit=dma_entry_limit(place), locked=locked_memory(place),
        physical=_physical_memory(), hugepages=huge_pages(place),
        userfaultfd_node=_node(place, "/dev/userfaultfd"),
        userfaultfd_unprivileged=None if unprivileged is None else bool(unprivileged),
        cap_sys_ptrace=has_capability(CAP_SYS_PTRACE, place))


def vfio_driver(device: Device) -> str:
    """Return the VFIO driver that a device can be bound to."""
    return _VFIO_DRIVER.get(device.bus, f"vfio-{device.bus or 'pci'}")
