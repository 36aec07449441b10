"""``vfiodma demo``: memory moves to another process while devices write into it, and not one byte is lost."""
import contextlib
import importlib.util
import json
import re
import secrets
import sys
from pathlib import Path
from typing import Annotated

import psutil
import typer

from .demo_report import Lines, Screen, Silent, show
from .demo_source import Settings, run
from .plot import check_plot, plot_rounds
from .probe import amount

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_PAGE = 4096
_HEADROOM = 256 << 20       # memory for the two processes themselves
_MOST = (1 << 63) - 1

Seed = Annotated[int | None, typer.Option(min=0, max=_MOST, help="Of the devices' writes; by default random.")]


def parse_size(text: str) -> int:
    """Return the bytes of "64M", "1GiB", "4096"; BadParameter for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(?:iB|B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size: write 4096, 64M, 1.5G")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size > _MOST:
        raise typer.BadParameter(f"{text} is too much: it must be less than {(_MOST + 1) >> 40}T")
    return int(size)


def check_size(text: str) -> int:
    """Return the bytes of memory that is there twice; BadParameter for what can't be."""
    size = parse_size(text)
    if size < 1 << 20 or size % _PAGE:
        raise typer.BadParameter(f"{text} is {size} bytes: at least 1M, in whole pages of {_PAGE} bytes")
    available = psutil.virtual_memory().available
    if 2 * size + _HEADROOM > available:
        raise typer.BadParameter(f"{text} takes {amount(2 * size + _HEADROOM)}, for two copies and the processes; "
                                 f"{amount(available)} of memory are available")
    return size


def check_working_set(working_set: int | None, size: int) -> int:
    """Return the bytes of a working set; by default 64M, or a quarter of the memory."""
    if working_set is None:
        return min(64 << 20, size // 4 // _PAGE * _PAGE)
    if not _PAGE <= working_set <= size or working_set % _PAGE:
        raise typer.BadParameter(f"{amount(working_set)} can't be: whole pages of {_PAGE} bytes, at most the memory's "
                                 f"{amount(size)}", param_hint="--working-set")
    return working_set


def demo(
    size: Annotated[int, typer.Option(parser=check_size, metavar="SIZE", help="Guest memory.")] = "1G",     # type: ignore[assignment]
    image: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, readable=True, help=(
        "File to fill it with; by default the running Python and its libraries."))] = None,
    devices: Annotated[int, typer.Option(min=1, max=64, help="Devices that write.")] = 2,
    rate: Annotated[int, typer.Option(parser=parse_size, metavar="SIZE", help="Bytes a second of each.")] = "32M",    # type: ignore[assignment]
    working_set: Annotated[int | None, typer.Option(parser=parse_size, metavar="SIZE", help=(
        "Where each writes; by default 64M, or a quarter of the memory."), show_default=False)] = None,
    downtime: Annotated[float, typer.Option(min=1, help="Limit of the downtime, in milliseconds.")] = 300.0,
    max_rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds with running devices.")] = 16,
    seed: Seed = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, metavar="FILE.png", help=(
        "Draw dirty pages and bandwidth of each round."))] = None,
) -> None:
    """Move memory to another process while devices write into it; compare every byte."""
    settings = Settings(size, image, devices, rate, check_working_set(working_set, size),
                        secrets.randbelow(1 << 32) if seed is None else seed, downtime / 1e3, max_rounds)
    check_plot(plot)
    screen = sys.stdout.isatty() and not as_json and importlib.util.find_spec("rich") is not None
    with Silent() if as_json else Screen() if screen else Lines() as report:
        summary = run(settings, report)
    with contextlib.suppress(BrokenPipeError):
        if as_json:
            print(json.dumps(summary, indent=2), flush=True)
        else:
            show(summary, screen)
    if plot is not None:
        plot_rounds(summary, plot)
    if not summary["equal"]:
        _fail("the memory of both processes differs: bytes were lost or changed on the way")
    if summary["dma"]["faults"] or summary["destination"]["faults"]:
        _fail("devices had DMA faults")


def _fail(why: str) -> None:
    print(f"vfiodma demo: {why}", file=sys.stderr)
    raise typer.Exit(1)
