"""`vfiodma bench`: ratios from turns, and a run of everything on little memory."""
import json
import os
import subprocess
import sys

import pytest

from vfiodma.cli.measure import Comparison, in_turn

PARTS = {"map + unmap", "translate, 65,536 ranges", "dirty log, 64 GiB, harvest", "dirty bitmap, 8 GiB, runs",
         "migration, no checksum", "migration, xxh3"}


def bench(*arguments):
    return subprocess.run([sys.executable, "-m", "vfiodma", "bench", *arguments], capture_output=True, text=True,
                          timeout=60, env={**os.environ, "COLUMNS": "200"})


def test_a_ratio_is_the_median_of_the_turns_and_not_of_the_times():
    found = Comparison("a", "b", [1.0, 2.0, 4.0], [2.0, 2.0, 40.0])
    assert (found.ratio, found.ratios, found.spread) == (2.0, [1.0, 2.0, 10.0], (1.0, 10.0))


@pytest.mark.parametrize("unit, figure", [("ns", 5e7), ("us", 5e4), ("ms", 50.0), ("GB/s", 2e-8)])
def test_figures_have_their_unit(unit, figure):
    assert Comparison("a", "b", [0.5], [1.0], 10, unit).summary()["own"] == pytest.approx(figure)


def test_turns_alternate_and_the_first_is_not_counted():
    called = []

    def call(name):
        called.append(name)
        return float(len(called))
    assert in_turn(lambda: call("own"), lambda: call("other"), 2) == ([3.0, 5.0], [4.0, 6.0])
    assert called == ["own", "other"] * 3


def test_everything_is_measured_and_printed_as_json():
    pytest.importorskip("xxhash")
    run = bench("--size", "2M", "--turns", "3", "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert {part["name"] for part in found["results"]} == PARTS
    assert all(part["ratio"] > 0 and part["ratio_low"] <= part["ratio"] <= part["ratio_high"]
               for part in found["results"])
    assert found["machine"]["cpus"] == os.cpu_count()


def test_memory_that_is_not_there_is_refused_before_anything_is_measured():
    run = bench("--size", "900T")
    assert run.returncode == 2 and "available" in run.stderr + run.stdout
