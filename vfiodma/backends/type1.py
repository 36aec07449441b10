"""The VFIO container with a Type1 IOMMU: /dev/vfio/vfio and IOMMU groups, of the running kernel or a software VFIO."""
import contextlib
import ctypes
import errno
import resource
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from .._core.errno import error
from .._core.kernel import Descriptor, Type1Ioctls
from ..errors import VfioError
from ..hostinfo import dma_entry_limit
from ..kernel import KernelVfio, refuse_unbound
from ..protocols import DirtySource, VfioSystem
from ..sources import ContainerSource
from ..types import Capabilities, IovaRange
from ..uapi import vfio as abi
from ..uapi.caps import capability_chain

CONTAINER = "/dev/vfio/vfio"
EVERYWHERE = IovaRange(0, (1 << 64) - 1)
UNLIMITED = (1 << 32) - 1               # what iommufd tells of mappings left: it has no limit


class Type1Info(NamedTuple):
    """What GET_INFO of a Type1 container tells."""

    pgsizes: int                            #: bitmap of page sizes
    iova_ranges: tuple[IovaRange, ...]      #: empty = not reported
    dma_avail: int | None                   #: mappings left; None = not reported
    dirty_pgsizes: int                      #: page sizes of dirty bitmaps; 0 = no dirty tracking
    max_dirty_bitmap_size: int              #: bytes


def _decode(data: bytes) -> Type1Info:
    head = abi.vfio_iommu_type1_info.unpack(data)
    ranges: tuple[IovaRange, ...] = ()
    avail, pgsizes, bitmap_size = None, 0, 0
    first = head["cap_offset"] if head["flags"] & abi.VFIO_IOMMU_INFO_CAPS else 0
    for number, _, at in capability_chain(data, first):
        if number == abi.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
            count = abi.vfio_iommu_type1_info_cap_iova_range.unpack_from(data, at)["nr_iovas"]
            at += abi.vfio_iommu_type1_info_cap_iova_range.size
            layout = abi.vfio_iova_range
            pairs = (layout.unpack_from(data, at + i * layout.size) for i in range(count))
            ranges = tuple(IovaRange(pair["start"], pair["end"]) for pair in pairs)
        elif number == abi.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL:
            avail = abi.vfio_iommu_type1_info_dma_avail.unpack_from(data, at)["avail"]
        elif number == abi.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION:
            migration = abi.vfio_iommu_type1_info_cap_migration.unpack_from(data, at)
            pgsizes, bitmap_size = migration["pgsize_bitmap"], migration["max_dirty_bitmap_size"]
    return Type1Info(head["iova_pgsizes"] if head["flags"] & abi.VFIO_IOMMU_INFO_PGSIZES else 4096, ranges, avail,
                     pgsizes, bitmap_size)


class Type1Container(Type1Ioctls):
    """A container with its groups: the backend of an IoAddressSpace on the kernel's VFIO.

    Satisfies Backend, SupportsMapMany, SupportsVaddrUpdate, SupportsDirtyTracking, HasDirtySources and OpensDevices.

    Parameters
    ----------
    devices : sequence of str
        PCI addresses; the group of each joins the container.
    groups : sequence of int
        Numbers of further groups.
    system : VfioSystem, optional
        Whose VFIO; by default the running kernel's.
    iommu_type : int
        VFIO_TYPE1v2_IOMMU or VFIO_TYPE1_IOMMU.
    node : str
        "/dev/vfio/vfio", or "/dev/iommu" for the container that iommufd emulates.
    noiommu : bool
        Allow groups without an IOMMU.  Nothing can be mapped then: their devices reach physical memory.

    Raises
    ------
    VfioError
        With what to do: ENOENT (module missing), EACCES, EBUSY (group in use, or not viable), ENODEV (wrong driver, no
        such device), EPERM (no-IOMMU, or no interrupt remapping).  Nothing stays open.

    Notes
    -----
    With ``node="/dev/iommu"`` the rules are those of iommufd's emulation: no dirty tracking, no vaddr update, and an
    unmap that is refused because it would split a mapping has removed the mappings before that one.
    Thread-safe.  The methods that map are those of Type1Ioctls.  Closing removes every mapping, even while devices are
    open.  Source: Documentation/driver-api/vfio.rst; VFIO_IOMMU_GET_INFO.
    """

    def __init__(self, devices: Sequence[str] = (), *, groups: Iterable[int] = (), system: VfioSystem | None = None,
                 iommu_type: int = abi.VFIO_TYPE1v2_IOMMU, node: str = CONTAINER, noiommu: bool = False) -> None:
        vfio = KernelVfio() if system is None else system
        self._groups: dict[str, Descriptor] = {}            # node -> group
        self._members: dict[str, Descriptor] = {}           # address -> its group
        self._held: list[Descriptor] = []                   # devices that must be open to be attached
        if isinstance(devices, str):
            raise TypeError("devices is a sequence of PCI addresses, not one string")
        locations = [vfio.find_device(address) for address in devices]
        for location in locations:
            refuse_unbound(location, noiommu=noiommu)
        paths = dict.fromkeys([location.group_path for location in locations] + [f"/dev/vfio/{n}" for n in groups])
        if not paths:
            raise error(errno.EINVAL, "open_container", hint="name at least one device or group")
        self.noiommu = any(location.noiommu for location in locations)
        if self.noiommu:
            iommu_type = abi.VFIO_NOIOMMU_IOMMU
        self.iommu_type = iommu_type
        super().__init__(vfio, vfio.open(node))
        try:
            for path in paths:
                self._join(path)
            for location in locations:
                self._members[location.address] = self._groups[location.group_path]
            self._set_iommu(iommu_type)
            if not self.noiommu:
                info = self.info()
                if info.iova_ranges == (EVERYWHERE,):
                    self._hold_devices()
                self._take_limits(info)
        except BaseException:
            self.close()
            raise

    @classmethod
    def adopt(cls, state: Mapping[str, Any], fds: Sequence[int]) -> Self:
        """Take over a container of the running kernel that another process opened, with its groups and mappings.

        Parameters
        ----------
        state, fds
            What :meth:`hand_over` returned there.  The descriptors belong to this object, and are closed on failure.

        Notes
        -----
        Nothing is set up again and nothing is mapped: neither SET_CONTAINER nor SET_IOMMU.  Vaddrs are those of the
        other process until update_vaddr(), which charges the locked memory to this process (ENOMEM over its limit).
        """
        container = cls.__new__(cls)
        vfio = KernelVfio()
        container._groups, container._members, container._held = {}, {}, []
        opened = [Descriptor(vfio, fd) for fd in fds[1:]]
        Type1Ioctls.__init__(container, vfio, fds[0] if fds else -1)
        try:
            paths, members, held = state["groups"], state["members"], state["held"]
            if not paths or len(fds) != 1 + len(paths) + held:
                raise ValueError
            container._groups = dict(zip(map(str, paths), opened, strict=False))
            container._held = opened[len(paths):]
            container._members = {address: container._groups[path] for address, path in members.items()}
            container.iommu_type, container.noiommu = int(state["iommu_type"]), False
            container._take_limits(container.info())
        except (KeyError, TypeError, ValueError, AttributeError):
            container._close_all(opened)
            raise error(errno.EPROTO, "adopt", hint="the description of the container does not fit its "
                        f"{len(fds)} descriptors") from None
        except BaseException:
            container._close_all(opened)
            raise
        return container

    def hand_over(self) -> tuple[dict[str, Any], list[int]]:
        """Return what :meth:`adopt` in another process needs; the descriptors stay this container's.

        Raises
        ------
        UnsupportedError
            EOPNOTSUPP: a software container lives in this process; a no-IOMMU container has no mappings.
        """
        if not self.real or self.noiommu:
            raise error(errno.EOPNOTSUPP, "hand_over", hint="a software IOMMU lives in its process: only a container "
                        "of the running kernel, with an IOMMU, can be handed over")
        paths = {id(group): path for path, group in self._groups.items()}
        state = {"groups": list(self._groups), "members": {a: paths[id(g)] for a, g in self._members.items()},
                 "held": len(self._held), "iommu_type": self.iommu_type}
        return state, [self.fd, *(group.fd for group in self._groups.values()), *(held.fd for held in self._held)]

    def let_go(self) -> None:
        """Close every descriptor and unmap nothing: the process that adopted the container has it all.  Idempotent."""
        self._close_all([*self._held, *self._groups.values()])

    def _join(self, path: str) -> None:
        group = self._groups[path] = Descriptor(self.system, self.system.open(path))
        status = bytearray(abi.vfio_group_status.pack(argsz=abi.vfio_group_status.size))
        group.ioctl(abi.VFIO_GROUP_GET_STATUS, status, "group_get_status")
        if not abi.vfio_group_status.unpack(status)["flags"] & abi.VFIO_GROUP_FLAGS_VIABLE:
            raise error(errno.EBUSY, "group_set_container", hint=f"group {path} is not viable: a device of it is bound "
                        "to a host driver; bind all of them to vfio-pci")
        try:
            group.ioctl(abi.VFIO_GROUP_SET_CONTAINER, bytearray(self.fd.to_bytes(4, "little")), "group_set_container")
        except VfioError as exc:
            if exc.errno == errno.EBUSY:
                exc.hint = f"group {path} is in use by another driver or process"
            raise

    def _set_iommu(self, iommu_type: int) -> None:
        try:
            self.ioctl(abi.VFIO_SET_IOMMU, iommu_type, "set_iommu")
        except VfioError as exc:
            if exc.errno == errno.EPERM:
                exc.hint = ("no interrupt remapping isolates the device's interrupts: enable it in the firmware, or "
                            "load vfio_iommu_type1 with allow_unsafe_interrupts=1")
            elif exc.errno == errno.ENODEV:
                exc.hint = f"no IOMMU driver offers type {iommu_type}: modprobe vfio_iommu_type1"
            raise

    def _hold_devices(self) -> None:
        """Open the devices: iommufd attaches them only then, and what they can't reach was told as usable before."""
        for address in self._members:
            self._held.append(Descriptor(self.system, self.open_device_fd(address)))

    def info(self) -> Type1Info:
        """Ask VFIO_IOMMU_GET_INFO, with as large a buffer as the kernel wants."""
        layout = abi.vfio_iommu_type1_info
        size = 512
        while True:
            data = bytearray(layout.pack(argsz=size).ljust(size, b"\0"))
            self.ioctl(abi.VFIO_IOMMU_GET_INFO, data, "get_info")
            needed = layout.unpack(data)["argsz"]
            if needed <= size:
                return _decode(bytes(data))
            size = needed

    def _take_limits(self, info: Type1Info) -> None:
        if info.max_dirty_bitmap_size:
            self.pgsize = info.dirty_pgsizes & -info.dirty_pgsizes
            self.max_map_size = info.max_dirty_bitmap_size * 8 * self.pgsize

    def has_extension(self, number: int) -> bool:
        """Ask VFIO_CHECK_EXTENSION."""
        return self.ioctl(abi.VFIO_CHECK_EXTENSION, number, "check_extension") > 0

    def capabilities(self) -> Capabilities:
        """Return what the container can do now; see Capabilities."""
        if self.noiommu:
            return Capabilities("type1", 4096)
        info = self.info()
        features = {"map_many"}
        if self.has_extension(abi.VFIO_UNMAP_ALL):
            features.add("unmap_all")
        if self.has_extension(abi.VFIO_UPDATE_VADDR):
            features.add("vaddr")
        if info.dirty_pgsizes and self.iommu_type != abi.VFIO_TYPE1_IOMMU:
            features.add("dirty")
        avail = None if info.dma_avail == UNLIMITED else info.dma_avail
        limit = dma_entry_limit() if self.real and info.dma_avail != UNLIMITED else None
        return Capabilities("type1", info.pgsizes, frozenset(features), avail, limit,
                            info.max_dirty_bitmap_size)

    def iova_ranges(self) -> tuple[IovaRange, ...]:
        """Return the usable ranges, ascending; empty = no restriction is reported."""
        return () if self.noiommu else self.info().iova_ranges

    def dirty_sources(self) -> Sequence[DirtySource]:
        """Return the container's own bitmap, which calls every mapped page dirty that a device could have written."""
        return [ContainerSource(self, self.pgsize)]

    def open_device_fd(self, address: str) -> int:
        """Open a device of one of the groups; the caller closes the descriptor with ``system.close``.

        Raises
        ------
        NoDeviceError
            ENODEV: the device is in no group of this container.
        """
        if self.fd < 0:
            raise error(errno.EBADF, "group_get_device_fd", hint="the container is closed")
        name = ctypes.create_string_buffer(address.encode())
        groups = [self._members[address]] if address in self._members else list(self._groups.values())
        for group in groups:
            try:
                return group.ioctl(abi.VFIO_GROUP_GET_DEVICE_FD, ctypes.addressof(name), "group_get_device_fd")
            except VfioError as exc:
                if exc.errno != errno.ENODEV:
                    raise
        raise error(errno.ENODEV, "group_get_device_fd", hint=f"{address} is not in a group of this container")

    def group_fds(self) -> tuple[int, ...]:
        """Return the descriptors of the groups, for a hot reset; they stay the container's."""
        return tuple(group.fd for group in self._groups.values())

    def _hint(self, err: int, operation: str) -> str:
        if err == errno.ENOMEM:
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            return (f"the limit of locked memory (RLIMIT_MEMLOCK) is {limit} bytes: raise it with 'ulimit -l', "
                    "limits.conf or LimitMEMLOCK=, or run with CAP_IPC_LOCK")
        if err == errno.ENOSPC:
            return ("no mapping is left (dma_entry_limit): map larger pieces, or load vfio_iommu_type1 with a larger "
                    "dma_entry_limit")
        if err == errno.ENOENT and operation == "unmap_dma":
            return "it would split a mapping: iommufd removes whole mappings only"
        if err == errno.EEXIST:
            return "a mapping overlaps it: unmap that first"
        if err == errno.EFAULT:
            return "the memory is not mapped in this process, or not with the permission needed"
        if err == errno.ENOTTY and self.noiommu:
            return "a no-IOMMU container maps nothing"
        if err == errno.EINVAL and operation.startswith(("map_", "unmap_")):
            try:
                pgsizes = self.info().pgsizes
            except VfioError:
                return "the container has lost its groups: their devices were removed, or unbound from vfio-pci"
            return f"see iova_ranges(); addresses and sizes are multiples of {pgsizes & -pgsizes}"
        return super()._hint(err, operation)

    def close(self) -> None:
        """Remove every mapping, leave the groups and close the container.  Idempotent."""
        if self.fd >= 0 and self._groups and not self.noiommu:
            with contextlib.suppress(VfioError):        # a device that is still open would keep the mappings
                if self.has_extension(abi.VFIO_UNMAP_ALL):
                    self.unmap_all()
                else:
                    self.unmap_dma(0, 1 << 63)
        self._close_all([*reversed(self._held), *reversed(self._groups.values())])

    def _close_all(self, opened: Iterable[Descriptor]) -> None:
        for descriptor in opened:
            descriptor.close()
        self._held.clear()
        self._groups.clear()
        self._members.clear()
        super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


open = Type1Container
adopt = Type1Container.adopt
