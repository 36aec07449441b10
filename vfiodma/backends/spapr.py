"""The VFIO container with the SPAPR TCE driver of POWER: windows, registered memory, EEH."""
import enum
import errno
import operator
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from .._core.errno import error
from .._core.kernel import Descriptor
from .._core.rangemap import RangeMap
from ..errors import ForkedError, VfioError
from ..kernel import KernelVfio, refuse_unbound
from ..protocols import VfioSystem
from ..types import Capabilities, IovaRange
from ..uapi import vfio as abi

_CONTAINER = "/dev/vfio/vfio"
_END = 1 << 64

_HINTS = {
    errno.EFAULT: "the memory is not there, or not writable: registered memory must be, up to its last page",
    errno.ENOMEM: "the limit of locked memory (RLIMIT_MEMLOCK): raise it, or run with CAP_IPC_LOCK",
    errno.EINVAL: "whole pages of the window; memory that overlaps a registered region in part, or whose pages are "
                  "smaller than the window's, can't be mapped",
}


class TceInfo(NamedTuple):
    """What VFIO_IOMMU_SPAPR_TCE_GET_INFO tells."""

    start: int          #: of the default 32-bit window
    size: int           #: bytes of it
    pgsizes: int        #: bitmap of page sizes of further windows; 0 = there are none
    max_windows: int
    levels: int         #: of a window's table, at most


class Window(NamedTuple):
    """A DMA window."""

    start: int          #: iova
    size: int           #: bytes
    page_shift: int     #: log2 of its page size
    levels: int


class EehState(enum.IntEnum):
    """Of a partitionable endpoint."""

    NORMAL = abi.VFIO_EEH_PE_STATE_NORMAL
    RESET = abi.VFIO_EEH_PE_STATE_RESET
    STOPPED = abi.VFIO_EEH_PE_STATE_STOPPED             #: neither DMA nor register accesses
    STOPPED_DMA = abi.VFIO_EEH_PE_STATE_STOPPED_DMA     #: register accesses only
    UNAVAILABLE = abi.VFIO_EEH_PE_STATE_UNAVAIL


class EehOp(enum.IntEnum):
    """What can be done to the endpoints of a container."""

    DISABLE = abi.VFIO_EEH_PE_DISABLE
    ENABLE = abi.VFIO_EEH_PE_ENABLE
    UNFREEZE_IO = abi.VFIO_EEH_PE_UNFREEZE_IO
    UNFREEZE_DMA = abi.VFIO_EEH_PE_UNFREEZE_DMA
    RESET_DEACTIVATE = abi.VFIO_EEH_PE_RESET_DEACTIVATE
    RESET_HOT = abi.VFIO_EEH_PE_RESET_HOT
    RESET_FUNDAMENTAL = abi.VFIO_EEH_PE_RESET_FUNDAMENTAL
    CONFIGURE = abi.VFIO_EEH_PE_CONFIGURE


class SpaprContainer(Descriptor):
    """A container with the SPAPR TCE driver: the backend of an IoAddressSpace on POWER.

    Parameters
    ----------
    devices : sequence of str
        PCI addresses; the group of each joins the container.
    version : {2, 1}
        Of the driver.  Version 2 has windows of other page sizes, and memory is registered before it is mapped; version
        1 has the default window only, and one group.
    system : VfioSystem, optional
        Whose VFIO; by default the running kernel's.

    Attributes
    ----------
    windows : list of Window
        Those there are; the default one comes with the first mapping, unless it was removed.

    Notes
    -----
    ``map_dma`` registers memory that no registered region covers, and ``unmap_dma`` lets it go again; what was
    registered by ``register_memory`` stays.  The driver replaces what is mapped at an iova, and clears any whole pages:
    it does not know mappings, this class does.  Thread-safe.
    Source: Documentation/driver-api/vfio.rst; VFIO_IOMMU_SPAPR_* in include/uapi/linux/vfio.h.
    """

    def __init__(self, devices: Sequence[str], *, version: int = 2, system: VfioSystem | None = None) -> None:
        if isinstance(devices, str):
            raise TypeError("devices is a sequence of PCI addresses, not one string")
        if version not in (1, 2):
            raise error(errno.EINVAL, "open_container", hint="version is 1 or 2")
        if not devices:
            raise error(errno.EINVAL, "open_container", hint="name at least one device")
        vfio: Any = KernelVfio() if system is None else system
        self.version = version
        self._lock = threading.RLock()
        self._groups: dict[str, Descriptor] = {}
        self._members: dict[str, Descriptor] = {}
        self._registered = RangeMap()           # vaddrs -> how many mappings lead there
        self._own: set[int] = set()             # vaddrs of regions that map_dma registered
        self._mapped = RangeMap()               # iovas -> vaddr
        self._gone: set[int] = set()            # iovas of mappings whose window was removed
        self.windows: list[Window] = []
        super().__init__(vfio, vfio.open(_CONTAINER))
        try:
            for address in devices:
                location = vfio.find_device(address)
                refuse_unbound(location, noiommu=False)
                if location.group_path not in self._groups:
                    group = self._groups[location.group_path] = Descriptor(vfio, vfio.open(location.group_path))
                    group.ioctl(abi.VFIO_GROUP_SET_CONTAINER, bytearray(self.fd.to_bytes(4, "little")),
                                "group_set_container")
                    if len(self._groups) == 1:
                        self.ioctl(abi.VFIO_SET_IOMMU, abi.VFIO_SPAPR_TCE_v2_IOMMU if version == 2 else
                                   abi.VFIO_SPAPR_TCE_IOMMU, "set_iommu")
                self._members[address] = self._groups[location.group_path]
            info = self.info()
            self.windows = [Window(info.start, info.size, 12, 1)]
            if version == 1:
                self.ioctl(abi.VFIO_IOMMU_ENABLE, 0, "enable")
        except BaseException:
            self.close()
            raise

    def info(self) -> TceInfo:
        """Return what the driver tells of windows."""
        layout = abi.vfio_iommu_spapr_tce_info
        data = bytearray(layout.pack(argsz=layout.size))
        self.ioctl(abi.VFIO_IOMMU_SPAPR_TCE_GET_INFO, data, "get_info")
        values = layout.unpack(data)
        ddw = values["ddw"] if values["flags"] & abi.VFIO_IOMMU_SPAPR_INFO_DDW else {}
        return TceInfo(values["dma32_window_start"], values["dma32_window_size"], ddw.get("pgsizes", 0),
                       ddw.get("max_dynamic_windows_supported", 0), ddw.get("levels", 0))

    # ---- registered memory and windows

    def register_memory(self, vaddr: int, size: int) -> None:
        """Pin memory for writing, and charge it to the process; version 2.

        Raises
        ------
        VfioError
            EBUSY: it is registered; EINVAL: misaligned, or it overlaps registered memory; ENOMEM: above the limit of
            locked memory; EFAULT: not writable; ENOTTY: version 1.
        """
        with self._lock:
            layout = abi.vfio_iommu_spapr_register_memory
            self._register(bytearray(layout.pack(argsz=layout.size, vaddr=_u64("register_memory", vaddr),
                                                 size=_u64("register_memory", size))), "register_memory")

    def _register(self, data: bytearray, operation: str, iova: int | None = None, size: int | None = None) -> None:
        self._call(abi.VFIO_IOMMU_SPAPR_REGISTER_MEMORY, data, operation, iova, size)
        values = abi.vfio_iommu_spapr_register_memory.unpack(data)
        if values["size"]:
            self._registered.insert(values["vaddr"], values["size"], 0)

    def _call(self, request: int, data: bytearray, operation: str, iova: int | None, size: int | None) -> int:
        try:
            return self.ioctl(request, data, operation)
        except ForkedError:
            raise
        except VfioError as exc:
            hint = exc.hint or _HINTS.get(exc.errno or 0, "")
            raise error(exc.errno or errno.EIO, operation, iova, size, hint) from None

    def unregister_memory(self, vaddr: int, size: int) -> None:
        """Let registered memory go.

        Raises
        ------
        VfioError
            ENOENT: no such region; EBUSY: it is mapped.
        """
        with self._lock:
            layout = abi.vfio_iommu_spapr_register_memory
            data = bytearray(layout.pack(argsz=layout.size, vaddr=vaddr, size=size))
            self.ioctl(abi.VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY, data, "unregister_memory")
            if size:
                self._registered.remove(vaddr)
                self._own.discard(vaddr)

    def create_window(self, page_shift: int, size: int, levels: int = 1) -> Window:
        """Make a window of pages of ``1 << page_shift`` bytes; version 2.

        Raises
        ------
        VfioError
            ENOSPC: there is no room for another; EINVAL: page size, size (a power of two) or levels; ENOMEM: the table
            is above the limit of locked memory; ENOTTY: version 1.
        """
        with self._lock:
            layout = abi.vfio_iommu_spapr_tce_create
            data = bytearray(layout.pack(argsz=layout.size, page_shift=page_shift, window_size=size, levels=levels))
            try:
                self.ioctl(abi.VFIO_IOMMU_SPAPR_TCE_CREATE, data, "create_window")
            except ForkedError:
                raise
            except VfioError as exc:
                raise error(exc.errno or errno.EIO, "create_window", None, size,
                            exc.hint or self._window_hint(exc.errno)) from None
            window = Window(layout.unpack(data)["start_addr"], size, page_shift, levels)
            self.windows = sorted([*self.windows, window])
            return window

    def _window_hint(self, number: int | None) -> str:
        info = self.info()
        if number == errno.EINVAL:
            shifts = [str(shift) for shift in range(64) if info.pgsizes >> shift & 1]
            return f"page_shift is one of {', '.join(shifts)}, size a power of two, levels 1 to {info.levels}"
        if number == errno.ENOSPC:
            return f"there are {len(self.windows)} of {info.max_windows} windows: remove one"
        return _HINTS.get(number or 0, "")

    def remove_window(self, start: int) -> None:
        """Remove the window that begins at ``start``; EINVAL where there is none.

        Devices reach nothing of it any more.  Mappings in it are known up to their ``unmap_dma``, or to a new one in
        their place; of an IoAddressSpace, ``refresh_ranges`` tells which they are.
        """
        with self._lock:
            window = next((window for window in self.windows if window.start == start), None)
            if window is None:
                raise error(errno.EINVAL, "remove_window", start, None, "no window begins there")
            layout = abi.vfio_iommu_spapr_tce_remove
            self.ioctl(abi.VFIO_IOMMU_SPAPR_TCE_REMOVE, bytearray(layout.pack(argsz=layout.size, start_addr=start)),
                       "remove_window")
            self.windows.remove(window)
            for iova, length, vaddr in self._overlapping(self._mapped, window.start, window.size):
                if iova not in self._gone:
                    self._gone.add(iova)
                    self._release(vaddr, length)

    # ---- Backend

    def capabilities(self) -> Capabilities:
        """Return what the container can do."""
        shifts = {window.page_shift for window in self.windows} or {12}
        return Capabilities("spapr", sum(1 << shift for shift in shifts), frozenset({"windows"}))

    def iova_ranges(self) -> tuple[IovaRange, ...]:
        """Return the windows as ranges, ascending."""
        return tuple(IovaRange(window.start, window.start + window.size - 1) for window in sorted(self.windows))

    def map_dma(self, iova: int, vaddr: int, size: int, prot: int) -> None:
        """Map memory; see Backend.  EEXIST where this container has mapped before."""
        at, source, length, access = (_u64("map_dma", value) for value in (iova, vaddr, size, prot))
        if not length or not 0 < access < 4 or source + length > _END:
            raise error(errno.EINVAL, "map_dma", at, length, "a size, and rights to read or write (1, 2, 3)")
        with self._lock:
            if not any(window.start <= at and at + length <= window.start + window.size for window in self.windows):
                raise error(errno.EINVAL, "map_dma", at, length, "no window has all of it: see iova_ranges()")
            there = self._overlapping(self._mapped, at, length)
            if any(start not in self._gone for start, _, _ in there):
                raise error(errno.EEXIST, "map_dma", at, length, "something is mapped there")
            covered = self._cover(at, source, length) if self.version == 2 else 0
            layout = abi.vfio_iommu_type1_dma_map
            try:
                data = bytearray(layout.pack(argsz=layout.size, flags=access, vaddr=source, iova=at, size=length))
                self._aligned(self._call(abi.VFIO_IOMMU_MAP_DMA, data, "map_dma", at, length), "map_dma", at, length)
            except BaseException:
                self._release(source, covered)
                raise
            for start, _, _ in there:
                self._mapped.remove(start)
                self._gone.discard(start)
            self._mapped.insert(at, length, source)

    def unmap_dma(self, iova: int, size: int) -> int:
        """Remove the mappings inside the range; EINVAL where one is cut."""
        iova, size = _u64("unmap_dma", iova), _u64("unmap_dma", size)
        if not size or iova + size > _END:
            raise error(errno.EINVAL, "unmap_dma", iova, size, "the range is empty, or goes beyond 2**64 - 1")
        with self._lock:
            inside = self._overlapping(self._mapped, iova, size)
            if any(at < iova or at + length > iova + size for at, length, _ in inside):
                raise error(errno.EINVAL, "unmap_dma", iova, size, "it would cut a mapping")
            for at, length, vaddr in inside:
                if at in self._gone:
                    self._gone.discard(at)
                else:
                    layout = abi.vfio_iommu_type1_dma_unmap
                    data = bytearray(layout.pack(argsz=24, iova=at, size=length)[:24])
                    self._aligned(self._call(abi.VFIO_IOMMU_UNMAP_DMA, data, "unmap_dma", at, length), "unmap_dma",
                                  at, length)
                    self._release(vaddr, length)
                self._mapped.remove(at)
            return sum(length for _, length, _ in inside)

    def unmap_all(self) -> int:
        """Remove every mapping; return the bytes."""
        with self._lock:
            return sum(self.unmap_dma(iova, size) for iova, size, _ in list(self._mapped))

    @staticmethod
    def _overlapping(ranges: RangeMap, start: int, size: int) -> list[tuple[int, int, int]]:
        found, at = [], start
        if ranges.overlaps(start, size):
            while (entry := ranges.lower(at)) and entry[0] < start + size:
                found.append(entry)
                at = entry[0] + entry[1]
                if at >= start + size:
                    break
        return found

    def _cover(self, iova: int, vaddr: int, size: int) -> int:
        """See that memory is registered, all of it, and count a mapping that leads there; return ``size``."""
        at = vaddr
        try:
            while at < vaddr + size:
                found = self._registered.lower(at)
                if found is None or found[0] > at:
                    length = (min(found[0], vaddr + size) if found else vaddr + size) - at
                    layout = abi.vfio_iommu_spapr_register_memory
                    self._register(bytearray(layout.pack(argsz=layout.size, vaddr=at, size=length)), "map_dma", iova,
                                   size)
                    self._own.add(at)
                    found = (at, length, 0)
                self._registered.set_value(found[0], found[2] + 1)
                at = found[0] + found[1]
        except BaseException:
            self._release(vaddr, at - vaddr)
            raise
        return size

    @staticmethod
    def _aligned(result: int, operation: str, iova: int, size: int) -> None:
        # The driver returns 1, and no error, where it finds iova or end misplaced.
        if result:
            raise error(errno.EINVAL, operation, iova, size, "whole pages of its window, inside the window")

    def _release(self, vaddr: int, size: int) -> None:
        """A mapping is gone; what map_dma registered goes with the last one that leads there."""
        if not size or self.version == 1:
            return
        for start, length, users in self._overlapping(self._registered, vaddr, size):
            self._registered.set_value(start, users - 1)
            if users == 1 and start in self._own:
                self.unregister_memory(start, length)

    # ---- EEH

    def eeh(self, op: EehOp) -> None:
        """Do an operation on the endpoint of every group.

        Raises
        ------
        VfioError
            ENODEV: a group is no partitionable endpoint; EIO: the platform failed.
        """
        layout = abi.vfio_eeh_pe_op
        self.ioctl(abi.VFIO_EEH_PE_OP, bytearray(layout.pack(argsz=12, op=EehOp(op))), "eeh")

    def inject_error(self, function: int, address: int = 0, mask: int = 0, *, wide: bool = True) -> None:
        """Have the hardware make an error; ``function`` is one of those of the EEH specification, 0 to 19."""
        layout = abi.vfio_eeh_pe_op
        data = layout.pack(argsz=layout.size, op=abi.VFIO_EEH_PE_INJECT_ERR,
                           err={"type": int(wide), "func": function, "addr": address, "mask": mask})
        self.ioctl(abi.VFIO_EEH_PE_OP, bytearray(data), "eeh")

    @property
    def eeh_state(self) -> EehState:
        """State of the endpoints: that of the newest group that is not NORMAL."""
        layout = abi.vfio_eeh_pe_op
        data = bytearray(layout.pack(argsz=12, op=abi.VFIO_EEH_PE_GET_STATE))
        return EehState(self.ioctl(abi.VFIO_EEH_PE_OP, data, "eeh"))

    # ---- OpensDevices, closing

    def open_device_fd(self, address: str) -> int:
        """Open a device of the container; the caller closes the descriptor with ``system.close``."""
        if address not in self._members:
            raise error(errno.ENODEV, "group_get_device_fd", hint=f"{address} was not named when the container opened")
        return self._members[address].ioctl(abi.VFIO_GROUP_GET_DEVICE_FD, bytearray(address.encode() + b"\0"),
                                            "group_get_device_fd")

    def close(self) -> None:
        """Close groups and container; every mapping goes.  Idempotent."""
        while self._groups:
            self._groups.popitem()[1].close()
        super().close()

    def __enter__(self) -> "SpaprContainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _u64(operation: str, value: int) -> int:
    number = operator.index(value)
    if not 0 <= number < _END:
        raise error(errno.EINVAL, operation, hint=f"{number} is not within 0 ... 2**64 - 1")
    return number


def open(devices: Sequence[str], **options: Any) -> SpaprContainer:
    """Open a container; see SpaprContainer."""
    return SpaprContainer(devices, **options)
