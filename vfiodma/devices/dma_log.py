"""The log that a device keeps of the pages that it writes."""
import array
import ctypes
import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .._core.errno import error
from ..sources import fewest_ranges, or_words
from ..uapi import vfio as abi
from .arguments import check_u64
from .features import Feature, FeatureOps

if TYPE_CHECKING:
    from .pci import VfioDevice

_MAX_RANGES = 256       # a page of vfio_device_feature_dma_logging_range


class DmaLog:
    """A device's log of its writes.  Source: VFIO_DEVICE_FEATURE_DMA_LOGGING_START, _STOP, _REPORT."""

    __slots__ = ("_device",)

    def __init__(self, device: "VfioDevice") -> None:
        self._device = device

    @property
    def supported(self) -> bool:
        """Whether the device has one."""
        return bool(self._device.features.probe(Feature.DMA_LOGGING_START) & FeatureOps.SET)

    def start(self, ranges: Sequence[tuple[int, int]], pgsize: int = 4096) -> int:
        """Start to log.

        Parameters
        ----------
        ranges : sequence of (iova, size)
            Bytes, multiples of ``pgsize``, disjoint; at most 256.
        pgsize : int
            The page size wanted.

        Returns
        -------
        int
            The page size that the device uses.

        Raises
        ------
        VfioError
            ENOTTY: the device has no log; EINVAL: no range, overlapping ones, or it is on; E2BIG: too many ranges;
            EOVERFLOW: a range reaches 2**64; ENOMEM, ENOSPC of the device.
        """
        numbers = [number for iova, size in ranges for number in (iova, size)]
        check_u64("dma_logging_start", pgsize, *numbers)
        rows = array.array("Q", numbers)
        layout = abi.vfio_device_feature_dma_logging_control
        data = layout.pack(page_size=pgsize, num_ranges=len(ranges), ranges=rows.buffer_info()[0])
        data = self._device.features.call(Feature.DMA_LOGGING_START, FeatureOps.SET, data, "dma_logging_start")
        return layout.unpack(data)["page_size"]

    def stop(self) -> None:
        """Stop logging and forget."""
        self._device.features.call(Feature.DMA_LOGGING_STOP, FeatureOps.SET, b"", "dma_logging_stop")

    def report(self, iova: int, size: int, bitmap: Any, pgsize: int = 4096) -> None:
        """OR the pages written since the last report into a bitmap, and clear them in the device.

        Parameters
        ----------
        iova, size : int
            Bytes.
        bitmap : writable buffer
            Little-endian u64 words, bit 0 = the page at ``iova``; a DirtyBitmap, for example.
        pgsize : int
            Bytes a bit stands for: a power of two from 4096.

        Raises
        ------
        VfioError
            EINVAL: not started, or a bad page size or bitmap; EOVERFLOW.
        """
        check_u64("dma_logging_report", iova, size, pgsize)
        if pgsize < 4096 or pgsize & (pgsize - 1):
            raise error(errno.EINVAL, "dma_logging_report", iova, size, "pgsize is a power of two from 4096")
        with memoryview(bitmap).cast("B") as view:
            needed = (-(-size // pgsize) + 63) // 64 * 8
            if view.nbytes < needed:
                raise error(errno.EINVAL, "dma_logging_report", iova, size,
                            f"the bitmap has {view.nbytes} bytes, the range needs {needed}")
            words = (ctypes.c_char * view.nbytes).from_buffer(view)
            data = abi.vfio_device_feature_dma_logging_report.pack(iova=iova, length=size, page_size=pgsize,
                                                                   bitmap=ctypes.addressof(words))
            try:
                self._device.features.call(Feature.DMA_LOGGING_REPORT, FeatureOps.GET, data, "dma_logging_report")
            finally:
                del words


class DeviceLogSource:
    """A device's own log as a DirtySource, for DirtyTracker.

    Parameters
    ----------
    device : VfioDevice
        Stays open while the source is used.
    """

    def __init__(self, device: "VfioDevice") -> None:
        self.name = f"DMA log of {device.address}"
        self._log = device.dma_log
        self._pgsize = 0

    def start(self, ranges: Sequence[tuple[int, int]], pgsize: int) -> None:
        """Start to log; more ranges than a device takes are joined where the gaps are smallest."""
        self._log.start(fewest_ranges(ranges, _MAX_RANGES), pgsize)
        self._pgsize = pgsize

    def harvest(self, iova: int, size: int, into: Any) -> int:
        """OR the pages written since the last harvest into ``into``; return their number."""
        import numpy
        words = numpy.zeros((size // self._pgsize + 63) // 64, numpy.uint64)
        self._log.report(iova, size, words, self._pgsize)
        return or_words(into, words)

    def stop(self) -> None:
        """Stop logging."""
        self._log.stop()
