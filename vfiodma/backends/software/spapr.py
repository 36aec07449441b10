"""A container of the SPAPR TCE driver, version 1 or 2: windows, registered memory, EEH."""
import errno
from typing import Any

from ..._core.errno import error
from ..._core.memory import read_memory, write_memory
from ..._core.tce import Region, TcePath, TceTables, charge, uncharge
from ..._core.type1 import VERSIONS
from ...errors import VfioError
from ...uapi import vfio as abi
from .registered import region_shift

_PAGE = 4096                    # what processes of the model have; POWER kernels have 64 KiB as well
_SLOTS = 2
_SECOND_WINDOW = 1 << 59        # bus address of window 1 on PowerNV
_MOST_BITS = 55


class TceGroup:
    """What the platform knows of a group: its default window, and which others can be made.

    Parameters
    ----------
    tce32_size : int
        Bytes of the default 32-bit window, which begins at 0.
    pgsizes : int
        Bitmap of IOMMU page sizes.
    max_windows : int
        Dynamic windows; 0: version 2 is not there.
    levels : int
        Of a table, at most.
    ownership : bool
        The platform hands ownership over (PowerNV IODA2); up to 6.1 version 2 needs that, and version 1 the opposite.
    """

    def __init__(self, *, tce32_size=2 << 30, pgsizes=0x1011000, max_windows=2, levels=5, ownership=True):
        if tce32_size % _PAGE or not 0 <= tce32_size < 1 << 32:
            raise ValueError("tce32_size is in whole pages, below 4 GiB")
        if not 0 < pgsizes < 1 << 64 or max_windows < 0 or levels < 1:
            raise ValueError("pgsizes is a bitmap of page sizes, levels is at least 1")
        self.tce32_size, self.pgsizes, self.max_windows = tce32_size, pgsizes, max_windows
        self.levels, self.ownership = levels, ownership


class _Window:
    def __init__(self, start, size, shift, levels, charged):
        self.start, self.size, self.shift, self.levels, self.charged = start, size, shift, levels, charged

    @property
    def page(self):
        return 1 << self.shift

    def contains(self, iova):
        return self.start <= iova < self.start + self.size


def table_bytes(size, shift, levels):
    """Return the bytes of the hardware's table and its copy in memory for a window."""
    bits = size.bit_length() - 1 - shift
    direct = max(8 << -(-bits // levels), _PAGE)
    total, current = 0, max(4096, 8 << max(bits, 0))
    for _ in range(levels):
        total += -(-current // direct) * direct
        current = max(current // direct * 8, direct)
    return 2 * total


class SpaprDriver:
    """The driver's part of a container.

    Parameters
    ----------
    vfio : SoftwareVfio
    v2 : bool
        VFIO_SPAPR_TCE_v2_IOMMU.

    Notes
    -----
    Called with the lock of ``vfio``.  Source: the SPAPR TCE driver of VFIO.
    """

    def __init__(self, vfio, v2):
        self.vfio, self.v2 = vfio, v2
        self.version = VERSIONS[vfio.kernel]
        self.groups = []                # newest first
        self.tables = TceTables()
        self.windows: list[Any] = [None] * _SLOTS       # of _Window
        self.regions = {}               # (vaddr, size) -> Region; those of this container
        self.enabled = self.owned = self.default_pending = False
        self.charged = 0                # pages, by ENABLE
        self.lost = 0                   # pages, for tables that were refused
        self.paths = {}

    # ---- groups

    def attach(self, group):
        """Take a group in."""
        if group.iommu.emulated:
            raise error(errno.EINVAL, "attach_group", hint="mediated devices have no TCE tables")
        tce = group.config.tce
        if tce is None:
            raise error(errno.ENODEV, "attach_group", hint="the platform knows no TCE tables for this group")
        old = self.version <= VERSIONS["6.1"]
        if not old and self.v2 and not tce.max_windows:
            raise error(errno.EINVAL, "attach_group", hint="version 2 needs dynamic windows")
        if self.groups and not (tce.ownership if old else self.v2):
            raise error(errno.EBUSY, "attach_group", hint="tables that are not handed over serve one group"
                        if old else "version 1 takes one group")
        if self.groups and self.groups[0].config.tce.ownership != tce.ownership:
            raise error(errno.EPERM, "attach_group", hint="groups of two kinds of platform do not go together")
        if old and tce.ownership != self.v2:
            raise error(errno.EPERM, "attach_group", hint="up to Linux 6.1 a platform offers one version only")
        first = not self.groups
        self.groups.insert(0, group)
        path = self.paths[group] = TcePath(self.tables, group.endpoint is not None)
        if group.endpoint is not None:
            group.endpoint.connect(path)
        if first and self.windows[0] is None:
            if old and not self.v2:
                self._adopt(tce.tce32_size)
            else:
                self.default_pending = True

    def detach(self, group):
        """Let a group go: its windows are unset, the tables stay, empty."""
        self.groups.remove(group)
        del self.paths[group]
        if group.endpoint is not None:
            group.endpoint.connect(None)
        self.tables.clear()

    def abandon(self):
        """Undo what attaching did."""
        for group in list(self.groups):
            self.detach(group)
        self.close()

    def close(self):
        """Release everything."""
        for slot, window in enumerate(self.windows):
            if window is not None:
                self._drop(slot)
        for key in list(self.regions):
            self._forget(key)
        uncharge(self.charged + self.lost)
        self.charged = self.lost = 0

    # ---- ioctl

    def ioctl(self, request, arg):
        """Do an ioctl of the container."""
        if request == abi.VFIO_CHECK_EXTENSION:
            return extension(self.vfio, arg)
        if request == abi.VFIO_EEH_PE_OP:
            return self._eeh(arg)
        both = {abi.VFIO_IOMMU_SPAPR_TCE_GET_INFO: self._get_info, abi.VFIO_IOMMU_MAP_DMA: self._map,
                abi.VFIO_IOMMU_UNMAP_DMA: self._unmap}
        own = {abi.VFIO_IOMMU_SPAPR_REGISTER_MEMORY: self._register,
               abi.VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY: self._unregister,
               abi.VFIO_IOMMU_SPAPR_TCE_CREATE: self._create, abi.VFIO_IOMMU_SPAPR_TCE_REMOVE: self._remove} \
            if self.v2 else {abi.VFIO_IOMMU_ENABLE: self._enable, abi.VFIO_IOMMU_DISABLE: self._disable}
        operation = {**both, **own}.get(request)
        if operation is None:
            raise error(errno.ENOTTY, "container_ioctl", hint=f"request {request:#x} is not one of SPAPR TCE version "
                        f"{2 if self.v2 else 1}")
        return operation(arg)

    def _group(self):
        if not self.groups:
            raise error(errno.ENXIO, "spapr", hint="no group is in the container")
        return self.groups[0].config.tce

    @staticmethod
    def _read(layout, arg, size=None, *, flags=0):
        """Read a struct; EINVAL for an argsz that is too small, or flags beyond those known."""
        size = size or layout.size
        values = layout.unpack(read_memory(arg, size).ljust(layout.size, b"\0"))
        if values["argsz"] < size:
            raise error(errno.EINVAL, "spapr", hint=f"argsz must be at least {size}")
        if values["flags"] & ~flags:
            raise error(errno.EINVAL, "spapr", hint=f"unknown flags {values['flags']:#x}")
        return values

    def _get_info(self, arg):
        layout = abi.vfio_iommu_spapr_tce_info
        tce = self._group()
        argsz = int.from_bytes(read_memory(arg, 16)[:4], "little")
        if argsz < 16:
            raise error(errno.EINVAL, "get_info", hint="argsz must be at least 16")
        ddw = self.v2 and tce.max_windows > 0
        values = {"argsz": argsz, "flags": abi.VFIO_IOMMU_SPAPR_INFO_DDW if ddw else 0, "dma32_window_start": 0,
                  "dma32_window_size": tce.tce32_size}
        if ddw:
            values["ddw"] = {"pgsizes": tce.pgsizes, "max_dynamic_windows_supported": tce.max_windows,
                             "levels": tce.levels}
        packed = layout.pack(**values)
        write_memory(arg, packed if argsz >= layout.size else packed[:16])
        return 0

    # ---- version 1: locked memory for the whole window

    def _enable(self, _):
        if self.enabled:
            raise error(errno.EBUSY, "enable", hint="enabled already")
        if not self.groups:
            raise error(errno.ENODEV, "enable", hint="no group is in the container")
        size = self.groups[0].config.tce.tce32_size
        if not size:
            raise error(errno.EPERM, "enable", hint="the platform has no 32-bit window")
        charge(size // _PAGE, self.vfio._memlock_limit)
        self.charged, self.enabled = size // _PAGE, True
        return 0

    def _disable(self, _):
        if self.enabled:
            uncharge(self.charged)
            self.charged, self.enabled = 0, False
        return 0

    # ---- version 2: memory is registered, and charged, ahead of its mapping

    def _register(self, arg):
        self.owned = True
        values = self._read(abi.vfio_iommu_spapr_register_memory, arg)
        key = values["vaddr"], values["size"]
        self._check_region(*key)
        if key in self.regions:
            raise error(errno.EBUSY, "register_memory", hint="registered by this container already")
        registered = self.vfio._registered
        shared = registered.shared.get(key)
        if shared is None:
            vaddr, size = key
            charge(size // _PAGE, self.vfio._memlock_limit)
            try:
                region = Region(vaddr, size, region_shift(vaddr, size))
                if registered.between(vaddr, size):
                    raise error(errno.EINVAL, "register_memory", hint="it overlaps memory that is registered")
            except VfioError:
                uncharge(size // _PAGE)
                raise
            registered.enter(vaddr, size, region)
            shared = registered.shared[key]
        shared[1] += 1
        self.regions[key] = shared[0]
        self.enabled = True
        return 0

    def _unregister(self, arg):
        if not self.owned:
            raise error(errno.EPERM, "unregister_memory", hint="nothing was registered yet")
        values = self._read(abi.vfio_iommu_spapr_register_memory, arg)
        key = values["vaddr"], values["size"]
        self._check_region(*key)
        if key not in self.regions:
            raise error(errno.ENOENT, "unregister_memory", hint="registered are whole regions, by this container")
        if self.regions[key].mapped and self.vfio._registered.shared[key][1] == 1:
            raise error(errno.EBUSY, "unregister_memory", hint="TCEs lead into it: unmap first")
        self._forget(key)
        return 0

    @staticmethod
    def _check_region(vaddr, size):
        if (vaddr | size) % _PAGE or vaddr + size > (1 << 64) - 1:
            raise error(errno.EINVAL, "register_memory", None, size, f"whole pages of {_PAGE} bytes")

    def _forget(self, key):
        region = self.regions.pop(key)
        shared = self.vfio._registered.shared[key]
        shared[1] -= 1
        if shared[1]:
            return
        self.vfio._registered.remove(key)
        uncharge(key[1] // _PAGE)
        region.released = True
        for driver in {self, *(getattr(group.container, "driver", None) for group in self.vfio._groups.values())}:
            if isinstance(driver, SpaprDriver):
                driver.tables.release(region)

    # ---- windows

    def _make(self, shift, size, levels):
        tce = self._group()
        slot = next((slot for slot, window in enumerate(self.windows) if window is None), None)
        if slot is None:
            raise error(errno.ENOSPC, "create_window", hint=f"there are {_SLOTS} windows already")
        if shift > 63 or not tce.pgsizes >> shift & 1:
            raise error(errno.EINVAL, "create_window", hint=f"pages of 1 << {shift} are none of {tce.pgsizes:#x}")
        if not tce.ownership:
            raise error(errno.EPERM, "create_window", hint="the platform makes no windows")
        if not 0 < levels <= tce.levels or not size or size & (size - 1) or size >> shift == 0:
            raise error(errno.EINVAL, "create_window", hint=f"1 to {tce.levels} levels, a size that is a power of two")
        start = _SECOND_WINDOW if slot else 0
        charged = table_bytes(size, shift, levels) // _PAGE
        charge(charged, self.vfio._memlock_limit)
        # As in the kernel, a table that is refused from here on stays charged; here up to the container's end.
        bits = -(-(size.bit_length() - 1 - shift) // levels)
        if (max(bits + 3, 12) - 3) * levels + shift >= _MOST_BITS:
            self.lost += charged
            raise error(errno.EINVAL, "create_window", start, size, "the table would have too many levels")
        try:
            self.tables.create(slot, start, size >> shift, shift)
        except VfioError:
            self.lost += charged
            raise
        self.windows[slot] = _Window(start, size, shift, levels, charged)
        return slot

    def _adopt(self, size):
        """Take over the platform's own table of the default window; nothing is charged."""
        if size:
            self.tables.create(0, 0, size >> 12, 12)
            self.windows[0] = _Window(0, size, 12, 1, 0)

    def _make_default(self):
        if self.default_pending:
            self._make(12, self._group().tce32_size, 1)
            self.default_pending = False

    def _drop(self, slot):
        self.tables.remove(slot)
        uncharge(self.windows[slot].charged)
        self.windows[slot] = None

    def _create(self, arg):
        layout = abi.vfio_iommu_spapr_tce_create
        self.owned = True
        self._group()
        values = self._read(layout, arg)
        self._make_default()
        slot = self._make(values["page_shift"], values["window_size"], values["levels"])
        values["start_addr"] = self.windows[slot].start
        try:
            write_memory(arg, layout.pack(**values))
        except VfioError:
            self._drop(slot)
            raise
        return 0

    def _remove(self, arg):
        self.owned = True
        self._group()
        start = self._read(abi.vfio_iommu_spapr_tce_remove, arg)["start_addr"]
        if self.default_pending and not start:
            self.default_pending = False
            return 0
        slot = self._find(start)
        if slot is None:
            raise error(errno.EINVAL, "remove_window", start, None, "no window is there")
        self._drop(slot)
        return 0

    def _find(self, iova):
        return next((slot for slot, window in enumerate(self.windows) if window and window.contains(iova)), None)

    # ---- mappings

    def _usable(self, iova):
        """Return the slot of the window for a MAP or UNMAP."""
        self._make_default()
        slot = self._find(iova)
        if slot is None:
            raise error(errno.ENXIO, "map_dma", iova, None, "no window has this iova")
        return slot

    def _map(self, arg):
        if not self.enabled:
            raise error(errno.EPERM, "map_dma", hint="ENABLE (version 1) or REGISTER_MEMORY (version 2) comes first")
        known = abi.VFIO_DMA_MAP_FLAG_READ | abi.VFIO_DMA_MAP_FLAG_WRITE
        values = self._read(abi.vfio_iommu_type1_dma_map, arg, flags=known)
        iova, size, vaddr, flags = values["iova"], values["size"], values["vaddr"], values["flags"]
        slot = self._usable(iova)
        window = self.windows[slot]
        if (size | vaddr) % window.page:
            raise error(errno.EINVAL, "map_dma", iova, size, f"whole pages of {window.page:#x} bytes")
        if not flags & known:
            raise error(errno.EINVAL, "map_dma", iova, size, "neither readable nor writable")
        if (iova - window.start) % window.page:
            return 1            # the driver's own oddity: a failed check becomes the result
        if iova + size > window.start + window.size:
            raise error(errno.EINVAL, "map_dma", iova, size, "it ends behind its window")
        self.tables.map(slot, (iova - window.start) >> window.shift, size >> window.shift, vaddr, flags,
                        self.vfio._registered.between(vaddr, size) if self.v2 else None)
        return 0

    def _unmap(self, arg):
        if not self.enabled:
            raise error(errno.EPERM, "unmap_dma", hint="ENABLE (version 1) or REGISTER_MEMORY (version 2) comes first")
        values = self._read(abi.vfio_iommu_type1_dma_unmap, arg, 24)
        iova, size = values["iova"], values["size"]
        slot = self._usable(iova)
        window = self.windows[slot]
        if size % window.page:
            raise error(errno.EINVAL, "unmap_dma", iova, size, f"whole pages of {window.page:#x} bytes")
        if (iova - window.start) % window.page or iova + size > window.start + window.size:
            return 1            # as in MAP
        self.tables.unmap(slot, (iova - window.start) >> window.shift, size >> window.shift)
        return 0

    # ---- EEH

    def _eeh(self, arg):
        for group in self.groups:
            if group.endpoint is None:
                raise error(errno.ENODEV, "eeh", hint=f"group {group.config.number} has no partitionable endpoint")
            values = self._read(abi.vfio_eeh_pe_op, arg, 12)
            if values["op"] > abi.VFIO_EEH_PE_INJECT_ERR:
                raise error(errno.EINVAL, "eeh", hint=f"there is no operation {values['op']}")
            result = group.endpoint.operate(
                values["op"], values["argsz"],
                lambda: abi.vfio_eeh_pe_err.unpack(read_memory(arg + 16, abi.vfio_eeh_pe_err.size)))
            if result:
                return result
        return 0


def extension(vfio, number):
    """Answer CHECK_EXTENSION as the driver does."""
    if number == abi.VFIO_EEH:
        return int(any(group.endpoint is not None and group.endpoint.enabled for group in vfio._groups.values()))
    return int(number in (abi.VFIO_SPAPR_TCE_IOMMU, abi.VFIO_SPAPR_TCE_v2_IOMMU))
