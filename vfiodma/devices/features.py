"""VFIO_DEVICE_FEATURE: asking what a device can, and the features that are one call."""
import enum
import errno
import uuid
from typing import TYPE_CHECKING

from .._core.errno import error
from ..errors import VfioError
from ..uapi import vfio as abi
from .arguments import check_u64, pack_fds

if TYPE_CHECKING:
    from .pci import VfioDevice


class Feature(enum.IntEnum):
    """Features by number (VFIO_DEVICE_FEATURE_*)."""

    PCI_VF_TOKEN = abi.VFIO_DEVICE_FEATURE_PCI_VF_TOKEN
    MIGRATION = abi.VFIO_DEVICE_FEATURE_MIGRATION
    MIG_DEVICE_STATE = abi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
    LOW_POWER_ENTRY = abi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY
    LOW_POWER_ENTRY_WITH_WAKEUP = abi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP
    LOW_POWER_EXIT = abi.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT
    DMA_LOGGING_START = abi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START
    DMA_LOGGING_STOP = abi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP
    DMA_LOGGING_REPORT = abi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT
    MIG_DATA_SIZE = abi.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE
    BUS_MASTER = abi.VFIO_DEVICE_FEATURE_BUS_MASTER
    DMA_BUF = abi.VFIO_DEVICE_FEATURE_DMA_BUF
    MIG_PRECOPY_INFOV2 = abi.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2


class FeatureOps(enum.IntFlag):
    """What can be done with a feature."""

    GET = abi.VFIO_DEVICE_FEATURE_GET
    SET = abi.VFIO_DEVICE_FEATURE_SET


def _name(feature: int) -> str:
    return Feature(feature).name if feature in Feature.__members__.values() else f"feature {feature}"


class Features:
    """The features of a device.  Source: VFIO_DEVICE_FEATURE."""

    __slots__ = ("_device",)

    def __init__(self, device: "VfioDevice") -> None:
        self._device = device

    def call(self, feature: int, ops: int, data: bytes = b"", operation: str | None = None) -> bytes:
        """Do the ioctl; return the data as the kernel left it.

        Parameters
        ----------
        feature : int
            Feature.
        ops : int
            FeatureOps, with VFIO_DEVICE_FEATURE_PROBE.
        data : bytes
            The structure of the feature.
        """
        layout = abi.vfio_device_feature
        if not 0 <= feature <= abi.VFIO_DEVICE_FEATURE_MASK:
            raise error(errno.EINVAL, operation or "device_feature", hint=f"{feature} is no number of a feature")
        buffer = bytearray(layout.pack(argsz=layout.size + len(data), flags=ops | feature) + data)
        self._device.control(abi.VFIO_DEVICE_FEATURE, buffer, operation or "device_feature", {
            errno.ENOTTY: f"the device or its driver does not have {_name(feature)}",
            errno.EINVAL: f"{_name(feature)}: not in this state, or not with these values",
        })
        return bytes(buffer[layout.size:])

    def probe(self, feature: int) -> FeatureOps:
        """Return what can be done with a feature; nothing (false) where the device does not have it."""
        found = FeatureOps(0)
        for op in FeatureOps:
            try:
                self.call(feature, op | abi.VFIO_DEVICE_FEATURE_PROBE)
                found |= op
            except VfioError as exc:
                if exc.errno not in (errno.ENOTTY, errno.EINVAL):
                    raise
        return found

    def get(self, feature: int, size: int) -> bytes:
        """Return the ``size`` bytes of a feature's structure."""
        return self.call(feature, abi.VFIO_DEVICE_FEATURE_GET, bytes(size))

    def set(self, feature: int, data: bytes = b"") -> bytes:
        """Set a feature; return its structure as the kernel left it."""
        return self.call(feature, abi.VFIO_DEVICE_FEATURE_SET, data)

    # ---- features that are one call

    def enter_low_power(self, wakeup: int | None = None) -> None:
        """Let the host put the device to sleep.

        Parameters
        ----------
        wakeup : int, optional
            An eventfd that fires when the device wakes up by itself; without one any access wakes it for its time.

        Notes
        -----
        Registers and interrupts must not be used until exit_low_power().
        """
        if wakeup is None:
            self.set(Feature.LOW_POWER_ENTRY)
        else:
            self.set(Feature.LOW_POWER_ENTRY_WITH_WAKEUP, pack_fds("enter_low_power", [wakeup]) + bytes(4))

    def exit_low_power(self) -> None:
        """Wake the device for good."""
        self.set(Feature.LOW_POWER_EXIT)

    def set_vf_token(self, token: uuid.UUID) -> None:
        """Set the secret that the users of a physical function's virtual functions must know."""
        self.set(Feature.PCI_VF_TOKEN, token.bytes)

    def set_bus_master(self, on: bool) -> None:
        """Let a CDX device do DMA, or not; a PCI device has ``config.bus_master``."""
        op = abi.VFIO_DEVICE_FEATURE_SET_MASTER if on else abi.VFIO_DEVICE_FEATURE_CLEAR_MASTER
        self.set(Feature.BUS_MASTER, abi.vfio_device_feature_bus_master.pack(op=op))

    def export_dmabuf(self, region: int, ranges: list[tuple[int, int]], open_flags: int) -> int:
        """Return a new dma-buf of (offset, size) ranges of a BAR, for other devices; the caller closes it.

        Parameters
        ----------
        region : int
            BAR index.
        ranges : list of (int, int)
            Bytes, multiples of the page size.
        open_flags : int
            ``os.O_CLOEXEC | os.O_RDWR``.

        Notes
        -----
        Newer than Linux 6.12.
        """
        if not ranges:
            raise error(errno.EINVAL, "device_feature", hint="name at least one range")
        check_u64("export_dmabuf", *(number for row in ranges for number in row))
        layout = abi.vfio_device_feature
        body = abi.vfio_device_feature_dma_buf.pack(
            region_index=region, open_flags=open_flags, nr_ranges=len(ranges),
            dma_ranges=[{"offset": offset, "length": size} for offset, size in ranges])
        flags = abi.VFIO_DEVICE_FEATURE_GET | Feature.DMA_BUF
        buffer = bytearray(layout.pack(argsz=layout.size + len(body), flags=flags) + body)
        return self._device.control(abi.VFIO_DEVICE_FEATURE, buffer, "export_dmabuf", {
            errno.ENOTTY: "the device, or the kernel, can't export dma-bufs",
            errno.EINVAL: "ranges are whole pages of a memory BAR"})
