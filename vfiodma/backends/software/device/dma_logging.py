"""The features DMA_LOGGING_START, STOP and REPORT, on the log of the device's DMA port."""
import errno
import struct

from ...._core.errno import error
from ...._core.memory import read_memory, write_memory
from ....uapi import vfio as abi
from .state import DeviceState

_PAGE = 4096
_MAX_RANGES = _PAGE // 16
_TOP = 1 << 64
_CHUNK = 1 << 18          # bits that are handled at once


def _aligned(value: int, page_size: int) -> bool:
    return not value & (page_size - 1) & (_TOP - 1)         # as the kernel tests it, for any page size


def _read_ranges(address: int, count: int, page_size: int) -> list[tuple[int, int]]:
    """Read and check the caller's ranges, one by one; return (first, last)."""
    ranges: list[tuple[int, int]] = []
    for i in range(count):
        iova, length = struct.unpack("=QQ", read_memory(address + 16 * i, 16))
        if not _aligned(iova, page_size) or not _aligned(length, page_size) or not length:
            raise error(errno.EINVAL, "dma_logging_start", iova, length, "multiples of the page size")
        if iova + length >= _TOP:
            raise error(errno.EOVERFLOW, "dma_logging_start", iova, length)
        last = iova + length - 1
        if any(iova <= other_last and first <= last for first, other_last in ranges):
            raise error(errno.EINVAL, "dma_logging_start", iova, length, "ranges overlap")
        ranges.append((iova, last))
    return ranges


def _in_pages(ranges: list[tuple[int, int]], page_size: int) -> list[tuple[int, int]]:
    """Widen (first, last) to whole pages and join what meets; return (iova, size)."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        first, last = first & -page_size, last | (page_size - 1)
        if joined and first <= joined[-1][1] + 1:
            first, last = joined[-1][0], max(last, joined.pop()[1])
        joined.append((first, last))
    return [(first, last + 1 - first) for first, last in joined]


def start(state: DeviceState, op: int, data: int) -> None:
    """SET DMA_LOGGING_START; the log has pages of the size asked for, of 4 KiB at least and a power of two."""
    layout = abi.vfio_device_feature_dma_logging_control
    control = layout.unpack(read_memory(data, layout.size))
    if not control["num_ranges"]:
        raise error(errno.EINVAL, "dma_logging_start", hint="give at least one range")
    if control["num_ranges"] > _MAX_RANGES:
        raise error(errno.E2BIG, "dma_logging_start", hint=f"at most {_MAX_RANGES} ranges")
    ranges = _read_ranges(control["ranges"], control["num_ranges"], control["page_size"])
    page_size = max(_PAGE, 1 << max(0, control["page_size"] - 1).bit_length())
    with state.lock:
        logged = _in_pages(ranges, page_size)
        state.port.start_logging(logged, page_size)
        state.log_page_size, state.log_ranges = page_size, logged
        try:
            write_memory(data, layout.pack(**control | {"page_size": page_size}))
        except OSError:
            state.port.stop_logging()
            raise


def stop(state: DeviceState, op: int, data: int) -> None:
    """SET DMA_LOGGING_STOP."""
    state.port.stop_logging()


def report(state: DeviceState, op: int, data: int) -> None:
    """GET DMA_LOGGING_REPORT: OR the pages written since the last report into the caller's bitmap."""
    layout = abi.vfio_device_feature_dma_logging_report
    asked = layout.unpack(read_memory(data, layout.size))
    iova, length, page_size, bitmap = asked["iova"], asked["length"], asked["page_size"], asked["bitmap"]
    if page_size < _PAGE or page_size & (page_size - 1):
        raise error(errno.EINVAL, "dma_logging_report", hint="page_size is a power of two of at least 4096")
    if iova + length >= _TOP:
        raise error(errno.EOVERFLOW, "dma_logging_report", iova, length)
    if not state.port.logging:
        raise error(errno.EINVAL, "dma_logging_report", iova, length, "the log is off")
    with state.lock:
        own = state.log_page_size
        if iova % own:
            raise error(errno.EINVAL, "dma_logging_report", iova, length, f"pages of the log have {own:#x} bytes")
        read_memory(bitmap, min(_PAGE, (-(-length // page_size) + 7) // 8))
        # Only where something is logged: a report may cover all addresses there are.
        end = iova + -(-length // own) * own
        step = max(own, min(own, page_size) * _CHUNK)
        for start, size in state.log_ranges:
            for at in range(max(start, iova), min(start + size, end), step):
                _report_chunk(state, iova, at, min(at + step, start + size, end), page_size, bitmap)


def _report_chunk(state: DeviceState, iova: int, at: int, end: int, page_size: int, bitmap: int) -> None:
    """Report the pages of the log in [at, end); ``iova`` is where the bitmap begins."""
    own, low, high = state.log_page_size, (at - iova) // page_size, (end - 1 - iova) // page_size
    place, size = bitmap + low // 8, high // 8 - low // 8 + 1
    # Writing back what was there finds a bad bitmap before bits are taken out of the log.
    before = read_memory(place, size)
    write_memory(place, before)
    words = bytearray(((end - at) // own + 63) // 64 * 8)
    state.port.harvest(at, end - at, words)
    found, bits = int.from_bytes(words, "little"), int.from_bytes(before, "little")
    if own == page_size:
        bits |= found << low % 8
    else:
        while found:
            page = at - iova + ((found & -found).bit_length() - 1) * own
            found &= found - 1
            first, last = page // page_size, (page + own - 1) // page_size
            bits |= (1 << min(last, high) - low // 8 * 8 + 1) - (1 << first - low // 8 * 8)
    write_memory(place, bits.to_bytes(size, "little"))
