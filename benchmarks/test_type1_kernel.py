"""Mapping and unmapping through the Type1 backend, beside the bare ioctls in C and from ctypes, on the running kernel.

Runs in a guest of the kernel lab:
    tests/lab/kernel-lab --kernel 6.12 -- .venv/bin/python -m pytest benchmarks/test_type1_kernel.py
The program in C is compiled by whoever runs this first, into build/; on the host that is faster.
"""
import ctypes
import fcntl
import os
import pathlib
import statistics
import subprocess
import time
from itertools import repeat
from operator import truediv

import pytest

from vfiodma import GuestMemory, Type1Container
from vfiodma.uapi import vfio as abi

ROOT = pathlib.Path(__file__).parents[1]
EDU = "0000:00:10.0"
IOVA, PAGE = 0x100000, 4096
ROUNDS = 120
LIMIT_C = 1.15              # of the pair in C
LIMIT_CTYPES = 0.5          # of the pair from ctypes


class Map(ctypes.Structure):
    _fields_ = [("argsz", ctypes.c_uint32), ("flags", ctypes.c_uint32),
                ("vaddr", ctypes.c_uint64), ("iova", ctypes.c_uint64), ("size", ctypes.c_uint64)]


class Unmap(ctypes.Structure):
    _fields_ = [("argsz", ctypes.c_uint32), ("flags", ctypes.c_uint32),
                ("iova", ctypes.c_uint64), ("size", ctypes.c_uint64)]


def compiled():
    """Return the peer in C as a library, compiled if it is older than its source."""
    source = ROOT / "benchmarks/peers/type1_pair.c"
    library = ROOT / "build/peers/type1_pair.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        library.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    pairs = ctypes.CDLL(str(library)).type1_pairs
    pairs.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint]
    pairs.restype = ctypes.c_uint64
    return pairs


def in_backend(container, iova, vaddr, size, count):
    map_dma, unmap_dma = container.map_dma, container.unmap_dma
    start = time.perf_counter_ns()
    for _ in repeat(None, count):
        map_dma(iova, vaddr, size, 3)
        unmap_dma(iova, size)
    return time.perf_counter_ns() - start


def in_ctypes(fd, iova, vaddr, size, count):
    ioctl, map_dma, unmap_dma = fcntl.ioctl, abi.VFIO_IOMMU_MAP_DMA, abi.VFIO_IOMMU_UNMAP_DMA
    start = time.perf_counter_ns()
    for _ in repeat(None, count):
        ioctl(fd, map_dma, Map(argsz=ctypes.sizeof(Map), flags=3, vaddr=vaddr, iova=iova, size=size))
        request = Unmap(argsz=ctypes.sizeof(Unmap), iova=iova, size=size)
        ioctl(fd, unmap_dma, request)
        assert request.size == size
    return time.perf_counter_ns() - start


def in_ctypes_again(fd, iova, vaddr, size, count):
    """As in_ctypes, with two structures that are made once and filled by field: one caller at a time."""
    ioctl, map_dma, unmap_dma = fcntl.ioctl, abi.VFIO_IOMMU_MAP_DMA, abi.VFIO_IOMMU_UNMAP_DMA
    mapping, request = Map(argsz=ctypes.sizeof(Map), flags=3), Unmap(argsz=ctypes.sizeof(Unmap))
    start = time.perf_counter_ns()
    for _ in repeat(None, count):
        mapping.vaddr, mapping.iova, mapping.size = vaddr, iova, size
        ioctl(fd, map_dma, mapping)
        request.iova, request.size = iova, size
        ioctl(fd, unmap_dma, request)
        assert request.size == size
    return time.perf_counter_ns() - start


@pytest.mark.skipif("KERNEL_LAB" not in os.environ, reason="runs in a guest of the kernel lab")
@pytest.mark.parametrize(("size", "count"), [(PAGE, 50), (1 << 20, 10)], ids=["a page", "1 MiB"])
def test_one_mapping_comes_and_goes(benchmark, size, count):
    """Blocks take turns, so that what else goes on meets all alike; a ratio is the median of the rounds' ratios."""
    pairs = compiled()
    with GuestMemory.memfd(size) as memory, Type1Container([EDU]) as container:
        vaddr = memory.region.vaddr
        memory.write(0, bytes(size))
        turns = {"c": lambda: pairs(container.fd, IOVA, vaddr, size, count),
                 "own": lambda: in_backend(container, IOVA, vaddr, size, count),
                 "ctypes": lambda: in_ctypes(container.fd, IOVA, vaddr, size, count),
                 "ctypes_again": lambda: in_ctypes_again(container.fd, IOVA, vaddr, size, count)}
        for turn in turns.values():
            assert turn() > 0
        times = {name: [] for name in turns}
        for _ in range(ROUNDS):
            for name, turn in turns.items():
                times[name].append(turn() / count)
    benchmark.pedantic(lambda: None)
    to_c, to_ctypes, to_ctypes_again = (round(statistics.median(map(truediv, times["own"], times[peer])), 3)
                                        for peer in ("c", "ctypes", "ctypes_again"))
    benchmark.extra_info.update(
        kernel=os.uname().release, ratio_c=to_c, limit_c=LIMIT_C, ratio_ctypes=to_ctypes,
        limit_ctypes=LIMIT_CTYPES if size == PAGE else "none: with more pages the kernel's share grows",
        ratio_ctypes_again=to_ctypes_again,     # no limit: the pair in C is 0.64 of it
        **{f"{name}_ns": round(statistics.median(values)) for name, values in times.items()})
    assert to_c <= LIMIT_C, f"{to_c} of the pair in C; the limit is {LIMIT_C}"
    assert to_ctypes <= LIMIT_CTYPES or size > PAGE, f"{to_ctypes} of the pair from ctypes; the limit is {LIMIT_CTYPES}"
