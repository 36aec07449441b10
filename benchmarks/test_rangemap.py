"""The range map beside std::map in C, np.searchsorted, SortedDict and an empty Cython call."""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from sortedcontainers import SortedDict

from vfiodma._core.rangemap import RangeMap

ROOT = pathlib.Path(__file__).parents[1]
PEERS = ROOT / "benchmarks" / "peers"
SIZES = [1000, 65536, 1_000_000]


def best(n, *runs, turns=9):
    """Nanoseconds of CPU time for each of n operations, the best of a few turns, taken by turns."""
    times = [[] for _ in runs]
    for _ in range(turns):
        for run, own in zip(runs, times, strict=True):
            start = time.thread_time()
            run()
            own.append(time.thread_time() - start)
    return [min(own) / n * 1e9 for own in times]


def note(benchmark, own, peer_name, peer, limit, **more):
    """Limits are ratios: how many times faster than the peer (or, below 1, which part of its time)."""
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(own_ns=round(own, 2), peer=peer_name, peer_ns=round(peer, 2),
                                ratio=round(peer / own, 2), limit=limit, **more)
    assert peer / own >= 0.8 * limit        # figures of a shared machine vary by a fifth


@pytest.fixture(scope="module", params=SIZES[1:])
def kernel(request, tmp_path_factory):
    """Figures of the C code, without Python."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("rangemap")
    flags = ["-O3", "-pthread", "-D_GNU_SOURCE", f"-I{ROOT}/csrc"]
    subprocess.run([os.environ.get("CC", "gcc"), "-std=c11", *flags, "-c", f"{ROOT}/csrc/rangemap.c",
                    "-o", folder / "kernel.o"], check=True)
    subprocess.run(["g++", "-std=c++17", *flags, PEERS / "ordered_map.cpp", folder / "kernel.o", "-o", folder / "peer"],
                   check=True)
    return json.loads(subprocess.run([folder / "peer", str(request.param)], check=True, capture_output=True).stdout)


@pytest.mark.parametrize("what", ["insert", "remove", "find"])
def test_random_order_beside_std_map(benchmark, kernel, what):
    note(benchmark, kernel[what], "std::map", kernel[f"{what}_std"], 2, n=kernel["n"])


def test_build_in_c(benchmark, kernel):
    note(benchmark, kernel["build"], "limit of 15 ns an entry", 15, 1, n=kernel["n"])


def test_sequential_pages_in_c(benchmark, kernel):
    note(benchmark, kernel["find_many_sequential"], "limit of 5 ns", 5, 1, n=kernel["n"])


def test_look_up_beside_200k_changes_a_second(benchmark, kernel):
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(own_ns=kernel["find_beside_writer"], peer="no writer", peer_ns=kernel["find_alone"],
                                longest_us=kernel["longest_us"], n=kernel["n"])
    assert kernel["wrong"] == 0


def test_memory_of_an_entry(benchmark, kernel):
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(bytes_each=kernel["bytes"], limit=64, n=kernel["n"])
    assert kernel["bytes"] <= 64


def rows(n):
    return np.stack([np.arange(n) * 40960, np.full(n, 32768), np.arange(n) * 32768], 1).astype(np.uint64)


@pytest.mark.parametrize("n", SIZES)
def test_translate_many_random(benchmark, n):
    ranges, table, rng = RangeMap(), rows(n), np.random.default_rng(1)
    ranges.build(table)
    keys = (rng.integers(0, n, 1 << 18) * 40960 + rng.integers(0, 32768, 1 << 18)).astype(np.uint64)
    out, starts = np.empty_like(keys), table[:, 0].copy()
    own, peer = best(len(keys), lambda: ranges.translate_many(keys, out),
                     lambda: np.searchsorted(starts, keys, side="right"))
    note(benchmark, own, "np.searchsorted", peer, 5 if n > 1000 else 3, n=n)


@pytest.mark.parametrize("n", SIZES)
def test_translate_many_sequential_pages(benchmark, n):
    ranges = RangeMap()
    ranges.build(rows(n))
    keys = np.arange(1 << 18, dtype=np.uint64) * np.uint64(4096) % np.uint64(n * 40960)
    out = np.empty_like(keys)
    [own] = best(len(keys), lambda: ranges.translate_many(keys, out))
    note(benchmark, own, "limit of 5 ns", 5, 1, n=n)


@pytest.mark.parametrize("n", SIZES)
def test_build_from_python(benchmark, n):
    table = rows(n)
    [own] = best(n, lambda: RangeMap().build(table))
    note(benchmark, own, "limit of 15 ns an entry", 15, 1, n=n)


@pytest.fixture(scope="module")
def floor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("call")
    shutil.copy(PEERS / "call.pyx", folder)
    subprocess.run([sys.executable, "-m", "Cython.Build.Cythonize", "-i", "call.pyx"], cwd=folder, check=True,
                   capture_output=True)
    sys.path.insert(0, str(folder))
    try:
        return __import__("call").Floor().call
    finally:
        sys.path.remove(str(folder))


def test_translate_one(benchmark, floor):
    ranges, key, turns = RangeMap(), 40960 * 333 + 77, range(200_000)
    ranges.build(rows(1000))

    def loop(function):
        for _ in turns:
            function(key)

    def nothing():
        for _ in turns:
            pass

    own, peer, empty = best(len(turns), lambda: loop(ranges.translate), lambda: loop(floor), nothing)
    note(benchmark, own - empty, "Cython int -> int", peer - empty, 0.5)


@pytest.mark.parametrize("n", SIZES[:2])
def test_insert_and_remove_one_beside_sorted_dict(benchmark, n):
    order = [int(i) * 40960 for i in np.random.default_rng(2).permutation(n)]
    ranges, peer = RangeMap(), SortedDict()

    def own_insert():
        for start in order:
            ranges.insert(start, 32768, start)

    def own_remove():
        for start in order:
            ranges.remove(start)

    def peer_insert():
        for start in order:
            at = peer.bisect_right(start)
            if at < len(peer) and peer.peekitem(at)[0] < start + 32768:
                raise ValueError
            if at and sum(peer.peekitem(at - 1)[1]) > start:
                raise ValueError
            peer[start] = start, 32768

    insert, remove, added = best(n, own_insert, own_remove, lambda: (peer.clear(), peer_insert()), turns=3)
    note(benchmark, insert, "SortedDict", added, 10, n=n, remove_ns=round(remove, 1))
