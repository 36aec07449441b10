"""Regions of a device: BARs, ROM, configuration space, and those of types of their own."""
import contextlib
import enum
import errno
import operator
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from .._core.errno import error
from ..errors import InvalidArgumentError, VfioError
from ..types import Prot
from ..uapi import vfio as abi
from .capabilities import Capability, ask, decode_chain

if TYPE_CHECKING:
    from .pci import VfioDevice

_ACCESS_HINTS = {
    errno.EIO: "memory access is off in the command register (config.memory_enabled), or the device is in a low power "
               "state or gone",
}
_NAMES = {abi.VFIO_PCI_ROM_REGION_INDEX: "ROM", abi.VFIO_PCI_CONFIG_REGION_INDEX: "configuration space",
          abi.VFIO_PCI_VGA_REGION_INDEX: "VGA"}


class RegionFlags(enum.IntFlag):
    """What may be done with a region (VFIO_REGION_INFO_FLAG_*)."""

    READ = abi.VFIO_REGION_INFO_FLAG_READ
    WRITE = abi.VFIO_REGION_INFO_FLAG_WRITE
    MMAP = abi.VFIO_REGION_INFO_FLAG_MMAP
    CAPS = abi.VFIO_REGION_INFO_FLAG_CAPS


class RegionType(NamedTuple):
    """What a region beyond the standard ones is for."""

    type: int
    subtype: int

    @property
    def vendor(self) -> int | None:
        """PCI vendor whose type it is; None for the kernel's own types."""
        if not self.type & abi.VFIO_REGION_TYPE_PCI_VENDOR_TYPE:
            return None
        return self.type & abi.VFIO_REGION_TYPE_PCI_VENDOR_MASK


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """What VFIO_DEVICE_GET_REGION_INFO tells."""

    index: int
    size: int                                       #: bytes; 0 = not implemented
    offset: int                                     #: in the device's file
    flags: RegionFlags
    sparse_areas: tuple[tuple[int, int], ...] | None    #: (offset, size) that can be mapped; None = all
    type: RegionType | None                         #: None for the standard regions
    msix_mappable: bool                             #: the MSI-X table in it may be mapped too
    nvlink2_target: int | None                      #: address of the GPU's memory on the system bus
    nvlink2_speed: int | None                       #: link speed
    capabilities: tuple[Capability, ...]            #: all of them, also those that are not decoded


def _decode(data: bytes) -> RegionInfo:
    head = abi.vfio_region_info.unpack(data)
    flags = RegionFlags(head["flags"])
    capabilities = decode_chain(data, head["cap_offset"] if flags & RegionFlags.CAPS else 0)
    sparse: tuple[tuple[int, int], ...] | None = None
    kind, target, speed, msix = None, None, None, False
    for capability in capabilities:
        if capability.id == abi.VFIO_REGION_INFO_CAP_SPARSE_MMAP:
            layout = abi.vfio_region_info_cap_sparse_mmap
            areas = capability.array(layout, abi.vfio_region_sparse_mmap_area, capability.unpack(layout)["nr_areas"])
            sparse = tuple((area["offset"], area["size"]) for area in areas)
        elif capability.id == abi.VFIO_REGION_INFO_CAP_TYPE:
            values = capability.unpack(abi.vfio_region_info_cap_type)
            kind = RegionType(values["type"], values["subtype"])
        elif capability.id == abi.VFIO_REGION_INFO_CAP_MSIX_MAPPABLE:
            msix = True
        elif capability.id == abi.VFIO_REGION_INFO_CAP_NVLINK2_SSATGT:
            target = capability.unpack(abi.vfio_region_info_cap_nvlink2_ssatgt)["tgt"]
        elif capability.id == abi.VFIO_REGION_INFO_CAP_NVLINK2_LNKSPD:
            speed = capability.unpack(abi.vfio_region_info_cap_nvlink2_lnkspd)["link_speed"]
    return RegionInfo(head["index"], head["size"], head["offset"], flags, sparse, kind, msix, target, speed,
                      capabilities)


class Region:
    """Registers of a device, by their offset in the region.  Get one from ``device.regions``.

    Attributes
    ----------
    info : RegionInfo

    Notes
    -----
    Numbers are little-endian.  A read or write of 1, 2, 4 or 8 aligned bytes is one access of that width (8 only where
    the kernel can, else two of 4).  The GIL is released.  Errors: EINVAL outside of the region or against its flags,
    EIO when the device does not answer.
    Source: VFIO_DEVICE_GET_REGION_INFO; pread(2), pwrite(2), mmap(2) of a device.
    """

    __slots__ = ("_device", "_flags", "info")

    def __init__(self, device: "VfioDevice", info: RegionInfo) -> None:
        self._device = device
        self._flags = int(info.flags)       # IntFlag is slow
        self.info = info

    @property
    def size(self) -> int:
        """Bytes."""
        return self.info.size

    @property
    def name(self) -> str:
        """"BAR 0", "ROM", "region 9"."""
        index = self.info.index
        return f"BAR {index}" if index < abi.VFIO_PCI_ROM_REGION_INDEX else _NAMES.get(index, f"region {index}")

    def __repr__(self) -> str:
        return f"<{self.name} of {self._device!r}, {self.size:#x} bytes>"

    def _place(self, operation: str, offset: int, size: int, needed: int) -> int:
        """Check an access; return its place in the device's file."""
        info = self.info
        if not isinstance(offset, int):
            raise TypeError(f"an offset is an int, not {type(offset).__name__}")
        if offset < 0 or size < 0 or offset + size > info.size:
            raise error(errno.EINVAL, operation, size=size,
                        hint=f"offset {offset:#x} is outside of {self.name}, which has {info.size:#x} bytes")
        if not needed & self._flags:
            raise error(errno.EINVAL, operation, size=size, hint=f"{self.name} does not allow it: {info.flags!r}")
        return info.offset + offset

    def read(self, offset: int, size: int) -> bytes:
        """Read ``size`` bytes."""
        place = self._place("region_read", offset, size, abi.VFIO_REGION_INFO_FLAG_READ)
        device = self._device
        try:
            data = device.system.pread(device.check("region_read"), size, place)
        except VfioError as exc:
            exc.operation, exc.size, exc.hint = "region_read", size, _ACCESS_HINTS.get(exc.errno or 0, exc.hint)
            raise
        if len(data) != size:
            raise error(errno.EIO, "region_read", size=size, hint=f"{self.name} gave {len(data)} bytes at {offset:#x}")
        return data

    def write(self, offset: int, data: Any) -> None:
        """Write bytes-like ``data``."""
        size = memoryview(data).nbytes
        place = self._place("region_write", offset, size, abi.VFIO_REGION_INFO_FLAG_WRITE)
        device = self._device
        try:
            done = device.system.pwrite(device.check("region_write"), data, place)
        except VfioError as exc:
            exc.operation, exc.size, exc.hint = "region_write", size, _ACCESS_HINTS.get(exc.errno or 0, exc.hint)
            raise
        if done != size:
            raise error(errno.EIO, "region_write", size=size, hint=f"{self.name} took {done} bytes at {offset:#x}")

    def _read_number(self, offset: int, width: int) -> int:
        return int.from_bytes(self.read(offset, width), "little")

    def _write_number(self, offset: int, value: int, width: int) -> None:
        if not 0 <= value < 1 << 8 * width:
            raise error(errno.EINVAL, "region_write", size=width, hint=f"{value:#x} does not fit {width} bytes")
        self.write(offset, value.to_bytes(width, "little"))

    def read_u8(self, offset: int) -> int:
        """Read a byte."""
        return self._read_number(offset, 1)

    def read_u16(self, offset: int) -> int:
        """Read 2 bytes."""
        return self._read_number(offset, 2)

    def read_u32(self, offset: int) -> int:
        """Read 4 bytes."""
        return self._read_number(offset, 4)

    def read_u64(self, offset: int) -> int:
        """Read 8 bytes."""
        return self._read_number(offset, 8)

    def write_u8(self, offset: int, value: int) -> None:
        """Write a byte."""
        self._write_number(offset, value, 1)

    def write_u16(self, offset: int, value: int) -> None:
        """Write 2 bytes."""
        self._write_number(offset, value, 2)

    def write_u32(self, offset: int, value: int) -> None:
        """Write 4 bytes."""
        self._write_number(offset, value, 4)

    def write_u64(self, offset: int, value: int) -> None:
        """Write 8 bytes."""
        self._write_number(offset, value, 8)

    def mmap(self, prot: int = Prot.RW) -> "MappedRegion":
        """Map the registers into this process: the whole region, or the areas that the device allows.

        Returns
        -------
        MappedRegion
            (offset, buffer) of each area; closed by itself, or with the device.

        Raises
        ------
        VfioError
            EINVAL: the region can't be mapped (use read and write), or not with this ``prot``.
        """
        self._place("region_mmap", 0, self.size, abi.VFIO_REGION_INFO_FLAG_MMAP)
        fd = self._device.check("region_mmap")
        areas = ((0, self.size),) if self.info.sparse_areas is None else self.info.sparse_areas
        mapped = MappedRegion(self)
        try:
            for offset, size in areas:
                mapped.areas.append((offset, self._device.system.mmap(fd, size, self.info.offset + offset, prot)))
        except BaseException:
            mapped.close()
            raise
        self._device.adopt(mapped)
        return mapped


class MappedRegion:
    """Registers mapped into this process; iterates over (offset, buffer).

    Attributes
    ----------
    areas : list of (int, buffer)
        Offset in the region, and the memory; empty after close.

    Notes
    -----
    Access memory through a cast memoryview (``view(...).cast("I")[0]``), which moves whole elements; a slice is copied
    in pieces of any width.  The kernel keeps the device open while any view of the memory lives.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self.areas: list[tuple[int, Any]] = []

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return iter(self.areas)

    def __len__(self) -> int:
        return len(self.areas)

    def view(self, offset: int, size: int) -> memoryview:
        """Return the memory of ``[offset, offset + size)``; EINVAL where it is in no mapped area."""
        for start, buffer in self.areas:
            view = memoryview(buffer)
            if start <= offset and size >= 0 and offset + size <= start + view.nbytes:
                return view.cast("B")[offset - start:offset - start + size]
        raise error(errno.EINVAL, "region_mmap", size=size,
                    hint=f"offset {offset:#x} of {self.region.name} is in no mapped area, or the mapping is closed")

    def close(self) -> None:
        """Unmap.  Idempotent.  Memory with a view that is still in use goes with the view, with a ResourceWarning."""
        while self.areas:
            _, buffer = self.areas.pop()
            try:
                getattr(buffer, "close", getattr(buffer, "release", lambda: None))()
            except BufferError:
                warnings.warn(f"a view of {self.region!r} is in use: the device stays open until it goes",
                              ResourceWarning, source=self, stacklevel=2)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Regions:
    """The regions of a device, by index; iterates over those that are implemented.

    Notes
    -----
    Each is asked for once.
    """

    def __init__(self, device: "VfioDevice", infos: dict[int, RegionInfo]) -> None:
        self._device = device
        self._infos = infos

    def __len__(self) -> int:
        return self._device.info.num_regions

    def __getitem__(self, index: int) -> Region:
        """Return a region.

        Raises
        ------
        VfioError
            EINVAL: the device has no such index.
        """
        index = operator.index(index)
        info = self._infos.get(index)
        if info is None:
            number = index if 0 <= index < 1 << 32 else 0xFFFFFFFF
            hints = {errno.EINVAL: f"the device has no region {index}; see info.num_regions"}
            info = self._infos[index] = _decode(ask(self._device, abi.VFIO_DEVICE_GET_REGION_INFO, abi.vfio_region_info,
                                                    "device_get_region_info", hints, index=number))
        return Region(self._device, info)

    def __iter__(self) -> Iterator[Region]:
        for index in range(len(self)):
            with contextlib.suppress(InvalidArgumentError):     # no VGA
                region = self[index]
                if region.size:
                    yield region

    def find(self, type: int, subtype: int) -> Region | None:
        """Return the region of a type, None where the device has none."""
        return next((region for region in self if region.info.type == (type, subtype)), None)
