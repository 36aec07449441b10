"""Regions that software devices have beside the standard ones: of a vendor, a monitor's EDID, channel I/O, NVLink2."""
import errno
import mmap
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from .._core.errno import error
from ..uapi import vfio as abi

_READ, _WRITE, _MMAP = abi.VFIO_REGION_INFO_FLAG_READ, abi.VFIO_REGION_INFO_FLAG_WRITE, abi.VFIO_REGION_INFO_FLAG_MMAP
_VENDOR = abi.VFIO_REGION_TYPE_PCI_VENDOR_TYPE
INTEL, NVIDIA, IBM = 0x8086, 0x10DE, 0x1014
CapabilityBytes = tuple[int, int, bytes]        # id, version, bytes after the header


def _refused(code: int, operation: str, hint: str) -> Exception:
    return error(code, f"region_{operation}", hint=hint)


class ModelRegion:
    """A region of a type and sub-type that is plain memory.

    Parameters
    ----------
    type, subtype : int
        VFIO_REGION_TYPE_*, VFIO_REGION_SUBTYPE_*; see `vendor_region` for those of a PCI vendor.
    size : int
        Bytes.
    flags : int
        VFIO_REGION_INFO_FLAG bits.  With MMAP the size is rounded up to whole pages.
    capabilities : iterable of (int, int, bytes)
        More capabilities: id, version, bytes after the header.
    sparse_areas : iterable of (int, int), optional
        (offset, size) of what can be mapped; None = all.

    Attributes
    ----------
    memory : mmap
        What it holds; the device's model reads and writes it.
    """

    def __init__(self, type: int, subtype: int, size: int, *, flags: int = _READ | _WRITE,
                 capabilities: Iterable[CapabilityBytes] = (),
                 sparse_areas: Iterable[tuple[int, int]] | None = None) -> None:
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE if flags & _MMAP else size
        self.flags = flags
        self.memory = mmap.mmap(-1, self.size)
        self.capabilities: list[CapabilityBytes] = [
            (abi.VFIO_REGION_INFO_CAP_TYPE, 1, struct.pack("=II", type, subtype)), *capabilities]
        if sparse_areas is not None:
            areas = list(sparse_areas)
            data = struct.pack("=II", len(areas), 0) + b"".join(struct.pack("=QQ", *area) for area in areas)
            self.capabilities.append((abi.VFIO_REGION_INFO_CAP_SPARSE_MMAP, 1, data))

    def read(self, offset: int, size: int) -> bytes:
        """Read; offset and size are inside of the region."""
        return self.memory[offset:offset + size]

    def write(self, offset: int, data: bytes) -> None:
        """Write; offset and size are inside of the region."""
        self.memory[offset:offset + len(data)] = data

    def reset(self) -> None:
        """The device was reset.  Memory stays as it is."""


def vendor_region(vendor: int, subtype: int, data: bytes, *, flags: int = _READ) -> ModelRegion:
    """Return a region of a PCI vendor's type that holds ``data``, readonly by default."""
    if vendor & ~abi.VFIO_REGION_TYPE_PCI_VENDOR_MASK:
        raise ValueError(f"{vendor:#x} is no PCI vendor")
    region = ModelRegion(_VENDOR | vendor, subtype, len(data), flags=flags)
    region.memory[:len(data)] = data
    return region


def intel_gpu_regions(opregion: bytes, host_config: bytes, lpc_config: bytes) -> list[ModelRegion]:
    """Return what vfio-pci adds to an Intel GPU: the OpRegion, and the configuration of the host and LPC bridges."""
    return [vendor_region(INTEL, abi.VFIO_REGION_SUBTYPE_INTEL_IGD_OPREGION, opregion),
            vendor_region(INTEL, abi.VFIO_REGION_SUBTYPE_INTEL_IGD_HOST_CFG, host_config),
            vendor_region(INTEL, abi.VFIO_REGION_SUBTYPE_INTEL_IGD_LPC_CFG, lpc_config)]


def nvlink2_ram(size: int, target: int) -> ModelRegion:
    """Return the memory of an NVLink2 GPU, which the system sees at ``target``."""
    return ModelRegion(_VENDOR | NVIDIA, abi.VFIO_REGION_SUBTYPE_NVIDIA_NVLINK2_RAM, size, flags=_READ | _WRITE | _MMAP,
                       capabilities=[(abi.VFIO_REGION_INFO_CAP_NVLINK2_SSATGT, 1, struct.pack("=Q", target))])


def nvlink2_atsd(target: int, link_speed: int, size: int = mmap.PAGESIZE) -> ModelRegion:
    """Return the address translation shoot-down registers of an NVLink2 bridge, with the speed of its link."""
    return ModelRegion(_VENDOR | IBM, abi.VFIO_REGION_SUBTYPE_IBM_NVLINK2_ATSD, size, flags=_READ | _WRITE | _MMAP,
                       capabilities=[(abi.VFIO_REGION_INFO_CAP_NVLINK2_SSATGT, 1, struct.pack("=Q", target)),
                                     (abi.VFIO_REGION_INFO_CAP_NVLINK2_LNKSPD, 1, struct.pack("=II", link_speed, 0))])


class EdidRegion(ModelRegion):
    """The monitor of a virtual display.

    Parameters
    ----------
    max_size : int
        Bytes that an EDID may have.
    max_resolution : (int, int)
        Pixels; 0 = no limit.
    on_link : callable, optional
        Called with the EDID when the monitor is turned on, with None when it is turned off.

    Attributes
    ----------
    edid : bytes or None
        Of the monitor that is on; None while it is off, which it is at first and after a reset.

    Notes
    -----
    The header is read and written in aligned words of 4 bytes: others are EINVAL, writes of read-only words EPERM.
    EINVAL too: a size above the maximum, a state that is neither UP nor DOWN, UP without a valid EDID (blocks of 128
    bytes whose sums are 0 modulo 256, the first with the EDID header), a blob access beyond the size.  The blob and its
    size may only be written while the monitor is off: else EBUSY.
    Source: VFIO_REGION_SUBTYPE_GFX_EDID and its update protocol; errnos of a virtual GPU's driver, EBUSY is ours (the
    header leaves open what happens).
    """

    _LAYOUT = abi.vfio_region_gfx_edid
    _OFFSETS = {field.offset: field.name for field in _LAYOUT.fields}

    def __init__(self, max_size: int = 512, max_resolution: tuple[int, int] = (0, 0), *,
                 on_link: Callable[[bytes | None], None] | None = None) -> None:
        start = mmap.PAGESIZE // 2
        super().__init__(abi.VFIO_REGION_TYPE_GFX, abi.VFIO_REGION_SUBTYPE_GFX_EDID, start + max_size)
        self.on_link = on_link
        self.edid: bytes | None = None
        self._start = start
        self._lock = threading.Lock()
        self._head = {"edid_offset": start, "edid_max_size": max_size, "edid_size": 0, "max_xres": max_resolution[0],
                      "max_yres": max_resolution[1], "link_state": abi.VFIO_DEVICE_GFX_LINK_STATE_DOWN}

    def _word(self, offset: int, size: int, operation: str) -> str:
        if size != 4 or offset not in self._OFFSETS:
            raise _refused(errno.EINVAL, operation, "the header of an EDID region has aligned words of 4 bytes")
        return self._OFFSETS[offset]

    def _check_blob(self, offset: int, size: int, operation: str) -> None:
        if offset - self._start + size > self._head["edid_size"]:
            raise _refused(errno.EINVAL, operation, "beyond the EDID: set edid_size first")

    def _check_off(self) -> None:
        if self.edid is not None:
            raise _refused(errno.EBUSY, "write", "turn the monitor off (link_state) before its EDID is changed")

    def read(self, offset: int, size: int) -> bytes:
        """Read a word of the header, or of the EDID."""
        with self._lock:
            if offset < self._start:
                return struct.pack("=I", self._head[self._word(offset, size, "read")])
            self._check_blob(offset, size, "read")
            return super().read(offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """Write a word of the header, or of the EDID."""
        with self._lock:
            if offset >= self._start:
                self._check_blob(offset, len(data), "write")
                self._check_off()
                super().write(offset, data)
                return
            name = self._word(offset, len(data), "write")
            value, = struct.unpack("=I", data)
            if name == "edid_size":
                if value > self._head["edid_max_size"]:
                    raise _refused(errno.EINVAL, "write", f"an EDID has at most {self._head['edid_max_size']} bytes")
                self._check_off()
                self._head[name] = value
            elif name == "link_state":
                self._set_link(value)
            else:
                raise _refused(errno.EPERM, "write", f"{name} is read-only")

    def _set_link(self, state: int) -> None:
        edid = None
        if state == abi.VFIO_DEVICE_GFX_LINK_STATE_UP:
            edid = self.memory[self._start:self._start + self._head["edid_size"]]
            if not valid_edid(edid):
                raise _refused(errno.EINVAL, "write", "what is in the region is no EDID")
        elif state != abi.VFIO_DEVICE_GFX_LINK_STATE_DOWN:
            raise _refused(errno.EINVAL, "write", "link_state is UP (1) or DOWN (2)")
        self.edid, changed = edid, edid != self.edid
        self._head["link_state"] = state
        if changed and self.on_link is not None:
            self.on_link(edid)

    def reset(self) -> None:
        """The monitor is off; the EDID stays."""
        with self._lock:
            self._set_link(abi.VFIO_DEVICE_GFX_LINK_STATE_DOWN)


def valid_edid(edid: bytes) -> bool:
    """Whether bytes are an EDID: its header, and whole blocks of 128 bytes that sum up to 0 modulo 256."""
    return len(edid) >= 128 and not len(edid) % 128 and edid[:8] == b"\0\xff\xff\xff\xff\xff\xff\0" and not any(
        sum(edid[block:block + 128]) % 256 for block in range(0, len(edid), 128))


class CcwCommandRegion(ModelRegion):
    """Asynchronous commands to a subchannel: {command u32, ret_code u32}, 1 = halt, 2 = clear.

    Parameters
    ----------
    do : callable
        Called with the command; returns 0 or a negative errno, which becomes ret_code and the write's errno.

    Notes
    -----
    Unknown commands are EINVAL; so is an access that leaves the region.  Source: VFIO_REGION_SUBTYPE_CCW_ASYNC_CMD.
    """

    def __init__(self, do: Callable[[int], int]) -> None:
        super().__init__(abi.VFIO_REGION_TYPE_CCW, abi.VFIO_REGION_SUBTYPE_CCW_ASYNC_CMD, 8)
        self._do = do

    def write(self, offset: int, data: bytes) -> None:
        """Write the command, which is then done."""
        super().write(offset, data)
        command, = struct.unpack_from("=I", self.memory)
        result = self._do(command) if command in (1, 2) else -errno.EINVAL
        self.memory[4:8] = struct.pack("=i", result)
        if result:
            raise _refused(-result, "write", f"channel command {command} failed")


class CcwSchibRegion(ModelRegion):
    """The subchannel information block, 52 bytes that ``schib`` returns when it is read; read-only.

    Source: VFIO_REGION_SUBTYPE_CCW_SCHIB.
    """

    def __init__(self, schib: Callable[[], bytes]) -> None:
        super().__init__(abi.VFIO_REGION_TYPE_CCW, abi.VFIO_REGION_SUBTYPE_CCW_SCHIB, 52, flags=_READ)
        self._schib = schib

    def read(self, offset: int, size: int) -> bytes:
        """Read it as it is now."""
        return self._schib().ljust(self.size, b"\0")[offset:offset + size]


class CcwCrwRegion(ModelRegion):
    """Channel report words, one at each read, the oldest first: {crw u32, pad u32}, 0 = there is none; read-only.

    Parameters
    ----------
    on_pending : callable, optional
        Called when a word waits to be read, and after a read that leaves some: what raises the CRW interrupt.

    Notes
    -----
    Source: VFIO_REGION_SUBTYPE_CCW_CRW.
    """

    def __init__(self, on_pending: Callable[[], None] | None = None) -> None:
        super().__init__(abi.VFIO_REGION_TYPE_CCW, abi.VFIO_REGION_SUBTYPE_CCW_CRW, 8, flags=_READ)
        self._words: deque[int] = deque()
        self._pending = on_pending or (lambda: None)

    def report(self, word: int) -> None:
        """Queue a word."""
        self._words.append(word)
        self._pending()

    def read(self, offset: int, size: int) -> bytes:
        """Take the oldest word."""
        word = self._words.popleft() if self._words else 0
        if self._words:
            self._pending()
        return struct.pack("=II", word, 0)[offset:offset + size]


class ChannelDevice:
    """A subchannel with one I/O region, which is memory; its other regions are given by `DeviceWithRegions`.

    Interrupts: VFIO_CCW_IO_IRQ_INDEX, VFIO_CCW_CRW_IRQ_INDEX, VFIO_CCW_REQ_IRQ_INDEX, raised by ``irqs.trigger(index)``
    while the device is open (``irqs`` is None else).

    Parameters
    ----------
    address : str
    size : int
        Bytes of the I/O region.
    """

    bus = abi.VFIO_DEVICE_FLAGS_CCW
    region_count = abi.VFIO_CCW_NUM_REGIONS
    irq_indexes = abi.VFIO_CCW_NUM_IRQS

    def __init__(self, address: str, size: int = 636) -> None:
        self.address = address
        self.port: Any = None
        self.irqs: Any = None
        self.memory = bytearray(size)

    def connect(self, port: Any) -> None:
        """Note the way to memory."""
        self.port = port

    def disconnect(self) -> None:
        """Forget it."""
        self.port = None

    def set_irq_sink(self, irqs: Any) -> None:
        """Note what interrupts are raised with."""
        self.irqs = irqs

    def region_size(self, index: int) -> int:
        """Bytes of a region."""
        return len(self.memory) if index == abi.VFIO_CCW_CONFIG_REGION_INDEX else 0

    def region_read(self, index: int, offset: int, size: int) -> bytes:
        """Read the I/O region."""
        return bytes(self.memory[offset:offset + size])

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Write the I/O region."""
        self.memory[offset:offset + len(data)] = data

    def irq_count(self, index: int) -> int:
        """One of each index."""
        return int(index < self.irq_indexes)

    def reset(self) -> None:
        """Clear the I/O region."""
        self.memory[:] = bytes(len(self.memory))


class DeviceWithRegions:
    """A software device with more regions, numbered from 9 on (or from where its own end).

    Parameters
    ----------
    device : SoftwareDevice
        Everything else is that device's.
    regions : iterable of ModelRegion

    Attributes
    ----------
    extra : dict of int to ModelRegion
        By region index.

    Examples
    --------
    >>> from vfiodma.devices import EduDevice
    >>> device = DeviceWithRegions(EduDevice("0000:00:10.0"), [EdidRegion(), nvlink2_ram(1 << 20, 0x6000_0000_0000)])
    >>> list(device.extra)
    [9, 10]
    """

    def __init__(self, device: Any, regions: Iterable[ModelRegion]) -> None:
        self.device = device
        self.address: str = device.address
        on_pci = getattr(device, "bus", abi.VFIO_DEVICE_FLAGS_PCI) == abi.VFIO_DEVICE_FLAGS_PCI
        first = max(abi.VFIO_PCI_NUM_REGIONS if on_pci else 0, getattr(device, "region_count", 0))
        self.extra = dict(enumerate(regions, first))
        self.region_count = first + len(self.extra)

    def __getattr__(self, name: str) -> Any:
        if name == "device":                # not there yet, or while unpickling
            raise AttributeError(name)
        return getattr(self.device, name)

    def connect(self, port: Any) -> None:
        """As the device's."""
        self.device.connect(port)

    def disconnect(self) -> None:
        """As the device's."""
        self.device.disconnect()

    def irq_count(self, index: int) -> int:
        """As the device's."""
        return self.device.irq_count(index)

    def region_size(self, index: int) -> int:
        """Bytes of a region."""
        region = self.extra.get(index)
        return self.device.region_size(index) if region is None else region.size

    def region_flags(self, index: int) -> int:
        """What may be done with a region; those of the device as it says, or VFIO's defaults."""
        if index in self.extra:
            return self.extra[index].flags
        if hasattr(self.device, "region_flags"):
            return self.device.region_flags(index)
        return _READ if index == abi.VFIO_PCI_ROM_REGION_INDEX else _READ | _WRITE

    def region_caps(self, index: int) -> Iterable[CapabilityBytes]:
        """Capabilities of a region."""
        if index in self.extra:
            return self.extra[index].capabilities
        return self.device.region_caps(index) if hasattr(self.device, "region_caps") else ()

    def region_mmap(self, index: int, offset: int, size: int) -> Any:
        """Memory of a region."""
        if index in self.extra:
            return memoryview(self.extra[index].memory)[offset:offset + size]
        return self.device.region_mmap(index, offset, size)

    def region_read(self, index: int, offset: int, size: int) -> bytes:
        """Read registers."""
        region = self.extra.get(index)
        return self.device.region_read(index, offset, size) if region is None else region.read(offset, size)

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Write registers."""
        region = self.extra.get(index)
        if region is None:
            self.device.region_write(index, offset, data)
        else:
            region.write(offset, data)

    def reset(self) -> None:
        """Reset the device and its regions."""
        self.device.reset()
        for region in self.extra.values():
            region.reset()
