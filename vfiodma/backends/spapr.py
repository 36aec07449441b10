"""The VFIO container with the SPAPR TCE driver of POWER: windows, registered memory, EEH."""
import enum
import errno
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from .._core.errno import error
from .._core.kernel import Descriptor
from ..errors import VfioError
from ..kernel import KernelVfio, refuse_unbound
from ..protocols import VfioSystem
from ..types import Capabilities, IovaRange
from ..uapi import vfio as abi

_CONTAINER = "/dev/vfio/vfio"


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
        self._registered: dict[tuple[int, int], bool] = {}      # region -> by map_dma
        self._mapped: dict[int, tuple[int, tuple[int, int] | None]] = {}    # iova -> size, its region
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
            self._register(vaddr, size, False)

    def _register(self, vaddr: int, size: int, by_map: bool) -> None:
        layout = abi.vfio_iommu_spapr_register_memory
        data = bytearray(layout.pack(argsz=layout.size, vaddr=vaddr, size=size))
        self.ioctl(abi.VFIO_IOMMU_SPAPR_REGISTER_MEMORY, data, "register_memory")
        self._registered[vaddr, size] = by_map

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
            self._registered.pop((vaddr, size), None)

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
            self.ioctl(abi.VFIO_IOMMU_SPAPR_TCE_CREATE, data, "create_window")
            window = Window(layout.unpack(data)["start_addr"], size, page_shift, levels)
            self.windows = sorted([*self.windows, window])
            return window

    def remove_window(self, start: int) -> None:
        """Remove the window that begins at ``start``, with what is mapped in it; EINVAL where there is none."""
        with self._lock:
            window = next((window for window in self.windows if window.start == start), None)
            if window is None:
                raise error(errno.EINVAL, "remove_window", start, None, "no window begins there")
            layout = abi.vfio_iommu_spapr_tce_remove
            self.ioctl(abi.VFIO_IOMMU_SPAPR_TCE_REMOVE, bytearray(layout.pack(argsz=layout.size, start_addr=start)),
                       "remove_window")
            self.windows.remove(window)
            for iova in [iova for iova in self._mapped if window.start <= iova < window.start + window.size]:
                self._let_go(*self._mapped.pop(iova))

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
        with self._lock:
            if any(iova < other + length and other < iova + size for other, (length, _) in self._mapped.items()):
                raise error(errno.EEXIST, "map_dma", iova, size, "something is mapped there")
            own = None
            if self.version == 2:
                own = next(((base, length) for base, length in self._registered
                            if base <= vaddr and vaddr + size <= base + length), None)
                if own is None:
                    self._register(vaddr, size, True)
                    own = (vaddr, size)
            layout = abi.vfio_iommu_type1_dma_map
            data = bytearray(layout.pack(argsz=layout.size, flags=prot, vaddr=vaddr, iova=iova, size=size))
            try:
                self._aligned(self.ioctl(abi.VFIO_IOMMU_MAP_DMA, data, "map_dma"), "map_dma", iova, size)
            except VfioError:
                self._let_go(size, own)
                raise
            self._mapped[iova] = (size, own)

    def unmap_dma(self, iova: int, size: int) -> int:
        """Remove the mappings inside the range; EINVAL where one is cut."""
        with self._lock:
            inside = {at: length for at, (length, _) in self._mapped.items() if at < iova + size and iova < at + length}
            if any(at < iova or at + length > iova + size for at, length in inside.items()):
                raise error(errno.EINVAL, "unmap_dma", iova, size, "it would cut a mapping")
            for at in sorted(inside):
                layout = abi.vfio_iommu_type1_dma_unmap
                data = bytearray(layout.pack(argsz=24, iova=at, size=inside[at])[:24])
                self._aligned(self.ioctl(abi.VFIO_IOMMU_UNMAP_DMA, data, "unmap_dma"), "unmap_dma", at, inside[at])
                self._let_go(*self._mapped.pop(at))
            return sum(inside.values())

    def unmap_all(self) -> int:
        """Remove every mapping; return the bytes."""
        with self._lock:
            return sum(self.unmap_dma(iova, size) for iova, (size, _) in list(self._mapped.items()))

    @staticmethod
    def _aligned(result: int, operation: str, iova: int, size: int) -> None:
        # The driver returns 1, and no error, where it finds iova or end misplaced.
        if result:
            raise error(errno.EINVAL, operation, iova, size, "whole pages of its window, inside the window")

    def _let_go(self, _: int, region: tuple[int, int] | None) -> None:
        # What map_dma registered goes with the last mapping that leads there.
        if region is not None and self._registered.get(region) and all(
                region != other for _, other in self._mapped.values()):
            self.unregister_memory(*region)

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


def open(devices: Sequence[str], **options: Any) -> SpaprContainer:
    """Open a container; see SpaprContainer."""
    return SpaprContainer(devices, **options)
