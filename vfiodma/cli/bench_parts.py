"""What ``vfiodma bench`` measures, each beside what a program would do without it."""
import contextlib
import fcntl
import importlib.util
import os
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

from .. import SoftwareGroup, open_backend
from .._core.bitmap import DirtyBitmap, DirtyLog
from .._core.rangemap import RangeMap
from ..memory import GuestMemory
from . import bench_memory
from .measure import Comparison, in_turn

_PAGE = 4096
_FIONREAD = 0x541B
_CALLS = 2000


def ioctl_pairs(fd: int, number: int) -> None:
    """Do what a Python program does before any kernel work, for a map and an unmap each: fill a struct, call ioctl."""
    buffer, small = bytearray(32), bytearray(24)
    for _ in range(number):
        struct.pack_into("IIQQQ", buffer, 0, 32, 3, 0x10000, 0x1000000, _PAGE)
        fcntl.ioctl(fd, _FIONREAD, buffer)
        struct.pack_into("IIQQ", small, 0, 24, 0, 0x10000, _PAGE)
        fcntl.ioctl(fd, _FIONREAD, small)


def timed(work: Callable[..., object], *arguments: Any) -> float:
    """Return the seconds of CPU of a call, which other programs on the machine change little."""
    began = time.thread_time()
    work(*arguments)
    return time.thread_time() - began


def map_and_unmap(turns: int) -> Comparison:
    """One mapping comes and goes among 1,000, in a container without a domain: nothing is pinned."""
    import numpy as np

    rows = np.empty((1000, 4), np.uint64)
    rows[:] = [0, 0x10000, _PAGE, 3]
    rows[:, 0] = np.arange(1, 1001, dtype=np.uint64) * 4 * _PAGE
    backend = open_backend("software", groups=[SoftwareGroup(0, [], emulated=True)], memlock_limit=None)
    with contextlib.closing(backend):
        backend.map_many(rows)
        map_dma, unmap_dma = backend.map_dma, backend.unmap_dma

        def pairs() -> None:
            for _ in range(_CALLS):
                map_dma(0x1000, 0x10000, _PAGE, 3)
                unmap_dma(0x1000, _PAGE)

        read, write = os.pipe()
        try:
            own, other = in_turn(lambda: timed(pairs), lambda: timed(ioctl_pairs, read, _CALLS), turns)
        finally:
            os.close(read)
            os.close(write)
    return Comparison("map + unmap", "2 x (struct.pack_into + fcntl.ioctl)", own, other, _CALLS)


def translate(turns: int) -> Comparison:
    """Random addresses in 65,536 ranges, all in one call."""
    import numpy as np

    count = 1 << 16
    starts = np.arange(count, dtype=np.uint64) * 2 * _PAGE
    ranges = RangeMap()
    ranges.build(np.stack([starts, np.full_like(starts, _PAGE), starts], 1))
    addresses = np.random.default_rng(1).permutation(starts) + 8

    def search() -> None:
        at = np.searchsorted(starts, addresses, "right") - 1
        addresses - starts[at] + starts[at]

    own, other = in_turn(lambda: timed(ranges.translate_many, addresses), lambda: timed(search), turns)
    return Comparison("translate, 65,536 ranges", "numpy.searchsorted", own, other, count, limit=5.0)


def harvest(turns: int) -> Comparison:
    """The log of a guest of 64 GiB, 1 % of the pages written in clusters."""
    import numpy as np

    npages = 1 << 24
    log, into = DirtyLog(npages), DirtyBitmap(npages)
    firsts = np.random.default_rng(2).integers(0, npages - 200, npages // 100 // 192).tolist()
    words, target = np.zeros(npages // 64, np.uint64), np.zeros(npages // 64, np.uint64)

    def own() -> float:
        for first in firsts:
            log.mark(first, 192)
        return timed(log.harvest, into)

    def numpy() -> float:
        def work() -> None:
            np.bitwise_or(target, words, out=target)
            np.bitwise_count(words).sum()
            words[:] = 0
        return timed(work)
    return Comparison("dirty log, 64 GiB, harvest", "NumPy: or, count, clear", *in_turn(own, numpy, turns), unit="us",
                      limit=1.0)


def runs(turns: int) -> Comparison:
    """1 % of a guest of 8 GiB at random places."""
    import numpy as np

    bits = np.random.default_rng(3).random(1 << 21) < 0.01
    words: Any = np.packbits(bits, bitorder="little")
    bitmap = DirtyBitmap.frombuffer(words, len(bits))

    def numpy() -> None:
        flags = np.unpackbits(words, bitorder="little")
        np.flatnonzero(np.diff(flags, prepend=np.uint8(0), append=np.uint8(0)))

    own, other = in_turn(lambda: timed(bitmap.runs), lambda: timed(numpy), turns)
    return Comparison("dirty bitmap, 8 GiB, runs", "NumPy: unpackbits, diff", own, other, unit="us", limit=20.0)


def memory(size: int, turns: int) -> Iterator[Comparison]:
    """Whole memory to another process, without and with checksums."""
    import numpy as np

    with GuestMemory.memfd(size) as source, GuestMemory.memfd(size) as target:
        with source.region.view() as view:
            view[:] = np.random.default_rng(4).integers(1, 255, size, np.uint8).data
        bench_memory.populated(target)
        for checksum, limit in (("none", 0.85), ("xxh3", 0.6)):
            if checksum == "xxh3" and importlib.util.find_spec("xxhash") is None:
                continue

            def own(checksum: str = checksum) -> float:
                return bench_memory.stream(source, target, checksum)

            def plain() -> float:
                return bench_memory.plain(source, target, bench_memory.send_all, bench_memory.receive_all)
            name = "migration" + (f", {checksum}" if checksum != "none" else ", no checksum")
            yield Comparison(name, "plain socket, 1 MiB a call", *in_turn(own, plain, turns), size, "GB/s", limit)


def everything(size: int, turns: int) -> Iterator[Comparison]:
    """Measure one after another."""
    for part in (map_and_unmap, translate, harvest, runs):
        yield part(turns)
    yield from memory(size, max(3, turns // 2))
