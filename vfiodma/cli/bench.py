"""``vfiodma bench``: how fast this machine is at it, each figure beside what would be used instead."""
import json
import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from .._core.bitmap import cpu_variant
from .bench_parts import everything
from .demo import check_size
from .measure import Comparison
from .probe import amount

_HEADER = ["", "here", "beside it", "peer", "ratio", "middle half", "wanted"]


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            model = value.strip()
            break
    return {"cpu": model or platform.machine(), "cpus": os.cpu_count(), "memory": psutil.virtual_memory().total,
            "kernel": platform.release(), "python": platform.python_version(), "numpy": np.__version__,
            "simd": cpu_variant(), "load": os.getloadavg()[0]}


def row(comparison: Comparison) -> list[str]:
    """Return a line of the table."""
    found = comparison.summary()
    figures = [f"{found[key]:.3g} {comparison.unit}" for key in ("own", "peer_figure")]
    return [comparison.name, figures[0], figures[1], comparison.peer, f"{comparison.ratio:.2f}x",
            f"{found['ratio_low']:.2f} - {found['ratio_high']:.2f}", f"{comparison.limit}x" if comparison.limit else ""]


def bench(
    size: Annotated[int, typer.Option(parser=check_size, metavar="SIZE", help="Memory that is moved.")] = "256M",   # type: ignore[assignment]
    turns: Annotated[int, typer.Option(min=3, max=1000, help="Times that each is measured.")] = 15,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure this library beside what would be used instead, in turn, in one run; ratios are what counts."""
    about = machine()
    if as_json:
        print(json.dumps({"machine": about, "results": [part.summary() for part in everything(size, turns)]}, indent=2))
        return
    print(f"{about['cpu']}, {about['cpus']} CPUs, {amount(about['memory'])}, Linux {about['kernel']}, "
          f"Python {about['python']}, NumPy {about['numpy']}, {about['simd']}, load {about['load']:.1f}", flush=True)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.live import Live
        from rich.table import Table

        table = Table(*_HEADER)
        with Live(table, console=Console()):
            for part in everything(size, turns):
                table.add_row(*row(part))
    else:
        for part in everything(size, turns):
            name, own, other, peer, ratio, middle, wanted = row(part)
            print(f"{name:<27} {own:>10}  {ratio:>7} ({middle}{wanted and f'; wanted {wanted}'})  {peer}: {other}",
                  flush=True)
    print("ratio: how many times faster, the median of turns; below 1 = that share of the peer's speed\n"
          "migrations are timed by the wall clock, all else by the CPU of its thread")
