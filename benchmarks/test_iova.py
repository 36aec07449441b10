"""The allocator beside a first-fit list in C, at 90 % of 16 GiB, and where lists and trees without sums turn linear."""
import os
import pathlib
import subprocess

import pytest

from vfiodma._core.iova import IovaAllocator

ROOT = pathlib.Path(__file__).parents[1]
LIMIT_NS = 500          # an allocation or a release, however fragmented the space is


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    program = tmp_path_factory.mktemp("iova") / "iova"
    csrc = ROOT / "csrc"
    kernels = [f"{csrc}/{name}.c" for name in ("gaps", "iovaspace", "rangemap")]
    subprocess.run([os.environ.get("CC", "cc"), "-std=gnu11", "-O3", f"-I{csrc}", f"{ROOT}/benchmarks/peers/iova.c",
                    *kernels, "-pthread", "-o", str(program)],
                   check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: float(ns) for name, ns in (line.split() for line in lines)}


@pytest.mark.parametrize("what", ["alloc", "free", "impossible"])
def test_90_percent_full(benchmark, figures, what):
    own, peer = figures[f"own_{what}"], figures[f"list_{what}"]
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(own_ns=own, limit_ns=LIMIT_NS, peer="first-fit list in C", peer_ns=peer,
                                ratio=round(peer / own, 1), live=figures["live"], holes=figures["holes"])
    assert own < LIMIT_NS


@pytest.mark.parametrize("what", ["two_pages", "aligned_2m", "impossible", "impossible_aligned", "impossible_limit",
                                  "impossible_limit_top_down"])
def test_half_a_million_one_page_holes(benchmark, figures, what):
    """Allocate and give back where it can be done, refuse where it can't."""
    own = figures[f"holes_{what}"]
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(own_ns=own, limit_ns=2 * LIMIT_NS)
    assert own < 2 * LIMIT_NS


@pytest.mark.parametrize("options", [{}, {"limit": 2**32 - 1}, {"top_down": True}, {"ephemeral": True}],
                         ids=["plain", "limit", "top_down", "ephemeral"])
def test_allocate_and_free_from_python(benchmark, options):
    allocator = IovaAllocator([(0, 2**48 - 1)])
    for iova in [allocator.allocate(4096 * (1 + i % 7)) for i in range(65536)][::2]:
        allocator.free(iova)

    def pair():
        allocator.free(allocator.allocate(4096, **options))

    benchmark(pair)
    benchmark.extra_info.update(pair_ns=round(benchmark.stats["median"] * 1e9, 1), live=len(allocator))
