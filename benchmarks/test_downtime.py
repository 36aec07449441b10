"""Downtime beside its limit and its prediction; ``python benchmarks/downtime.py`` does it with large guests."""
import os

import pytest
from downtime import measure, summarize

RUNS = int(os.environ.get("VFIODMA_BENCH_RUNS", "10"))
SIZE = int(os.environ.get("VFIODMA_BENCH_GUEST", str(512 << 20)))


@pytest.mark.parametrize("checksum", ["none", "auto"])
def test_downtime_of_a_guest_written_at_1_gib_a_second(benchmark, checksum):
    """A working set of 64 MiB, a limit of 30 ms."""
    runs = list(measure(RUNS, size=SIZE, rate=1 << 30, working_set=64 << 20, devices=2, limit=0.03, checksum=checksum))
    summary = summarize(runs, 0.03)
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(
        peer="the limit of 30 ms", kept=f"{summary['kept']} of {RUNS}", limit="95 of 100",
        median_ms=round(summary["downtime_ms"][1], 1), worst_ms=round(summary["downtime_ms"][3], 1),
        prediction_error=round(summary["prediction_error"][1], 2), prediction_limit=0.15, rounds=summary["rounds"],
        gb_s_written=round(summary["gb_s_written"], 2), misses="; ".join(summary["misses"]) or "none")
