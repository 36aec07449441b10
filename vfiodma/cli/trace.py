"""``vfiodma trace``: record which pages a guest writes, look at it, and play it against a link."""
import importlib.util
import json
import secrets
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import MissingExtraError
from ..memory import GuestMemory
from ..migration import DirtyTracker
from ..migration.convergence import Costs, Policy, Step
from ..migration.events import finite
from ..migration.layout import MemoryLayout
from ..migration.replay import Replay, replay
from ..migration.trace import Trace, TraceRecorder
from ..migration.trace_file import read_trace, write_trace
from .demo import Seed, check_size, check_working_set, parse_size
from .demo_report import milliseconds, rate
from .guest import Guest, Workload
from .plot import check_plot, plot_migration, plot_trace
from .probe import amount

_ROWS = 20                  # of a table over time
_SPANS = (0.001, 0.01, 0.1, 1.0, 10.0)

TraceFile = Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, metavar="FILE")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Plot = Annotated[Path | None, typer.Option(dir_okay=False, metavar="FILE.png", help="Draw it.")]


def _table(title: str, headings: list[str], rows: list[list[str]]) -> None:
    """Print a table: by rich on a terminal, else in plain columns."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title)
        for heading in headings:
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    print(title)
    for row in [headings, *rows]:
        print("  ".join(f"{value:>{width}}" for value, width in zip(row, widths, strict=True)))


def record(
    path: Annotated[Path | None, typer.Argument(dir_okay=False, metavar="FILE", help=(
        "FILE.parquet, or anything else for JSON lines; by default trace.parquet, or trace.jsonl without pyarrow."),
        show_default=False)] = None,
    seconds: Annotated[float, typer.Option(min=0.01, max=86400, help="How long.")] = 10.0,
    interval: Annotated[float, typer.Option(min=1, max=60000, help="Milliseconds from harvest to harvest.")] = 20.0,
    size: Annotated[int, typer.Option(parser=check_size, metavar="SIZE", help="Guest memory.")] = "256M",   # type: ignore[assignment]
    devices: Annotated[int, typer.Option(min=1, max=64, help="Devices that write.")] = 2,
    write_rate: Annotated[int, typer.Option("--rate", parser=parse_size, metavar="SIZE", help=(
        "Bytes a second of each."))] = "32M",      # type: ignore[assignment]
    working_set: Annotated[int | None, typer.Option(parser=parse_size, metavar="SIZE", help=(
        "Where each writes; by default 64M, or a quarter of the memory."), show_default=False)] = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Record the writes of a guest of software devices; a TraceRecorder does it for any other."""
    pyarrow = importlib.util.find_spec("pyarrow") is not None
    path = path or Path("trace.parquet" if pyarrow else "trace.jsonl")
    if path.suffix == ".parquet" and not pyarrow:
        raise MissingExtraError("pyarrow", "trace")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {path.parent}", param_hint="FILE")
    workload = Workload(size, None, devices, write_rate, check_working_set(working_set, size),
                        secrets.randbelow(1 << 32) if seed is None else seed)
    with GuestMemory.memfd(size, "vfiodma-guest") as memory, Guest(workload, memory) as guest, \
            MemoryLayout(memory, guest.ioas.pgsize) as layout:
        guest.writers.resume()
        recorder = TraceRecorder(DirtyTracker(guest.ioas, layout, cpu_writes="off"), layout)
        trace = recorder.record(seconds, interval / 1e3)
        guest.writers.stop()
    write_trace(trace, path)
    if as_json:
        print(json.dumps({"file": str(path), "file_bytes": path.stat().st_size, **_summary(trace)}, indent=2))
    else:
        print(f"{path}: {len(trace)} intervals in {trace.seconds:.2f} s, {len(trace.runs):,} runs of pages, "
              f"{amount(path.stat().st_size)}")


def _summary(trace: Trace) -> dict[str, Any]:
    pages, fitted = trace.pages, trace.working_set
    lengths = [span for span in _SPANS if span <= trace.seconds]
    starts = [trace.seconds * part / 8 for part in range(8)]
    return {
        "pgsize": trace.pgsize, "blocks": [list(block) for block in trace.blocks],
        "size": trace.npages * trace.pgsize, "seconds": trace.seconds, "intervals": len(trace), "runs": len(trace.runs),
        "unique_pages": trace.unique(0.0, trace.seconds), "most_pages": int(pages.max()),
        "dirty_rate": float(pages.sum()) * trace.pgsize / trace.seconds,
        "fit": finite({"rate": fitted.rate, "working_set": fitted.size}),
        "unique_bytes": {f"{span:g}": round(sum(trace.unique(at, at + span) for at in starts) / len(starts)
                                            * trace.pgsize) for span in lengths},
    }


def _over_time(trace: Trace) -> list[dict[str, Any]]:
    """A row for each part of the trace: its end, and the unique pages written in it, and since the beginning."""
    count = min(_ROWS, len(trace))
    ends = [float(trace.times[(part + 1) * len(trace) // count - 1]) for part in range(count)]
    return [{"seconds": end, "pages": trace.unique(begin, end), "unique_pages": trace.unique(0.0, end),
             "dirty_rate": trace.unique(begin, end) * trace.pgsize / (end - begin)}
            for begin, end in zip([0.0, *ends], ends, strict=False)]


def show(path: TraceFile, as_json: Json = False, plot: Plot = None) -> None:
    """Show how fast a traced guest writes, and into how much memory."""
    check_plot(plot)
    trace = read_trace(path)
    found, rows = _summary(trace), _over_time(trace)
    if as_json:
        print(json.dumps({**found, "over_time": rows}, indent=2))
    else:
        working_set = found["fit"]["working_set"]
        print(f"memory        {amount(found['size'])} in {len(trace.blocks)} blocks, pages of {amount(trace.pgsize)}\n"
              f"recorded      {found['seconds']:.2f} s in {found['intervals']} intervals, {found['runs']:,} runs\n"
              f"written       {amount(found['unique_pages'] * trace.pgsize)}, {rate(found['dirty_rate'])} in unique "
              "pages of each interval\n"
              f"working set   {'no bound seen' if working_set is None else amount(int(working_set))}, written at "
              f"{rate(found['fit']['rate'])}\n"
              "unique        " + ", ".join(f"{amount(nbytes)} in {milliseconds(float(span))}"
                                           for span, nbytes in found["unique_bytes"].items()))
        _table("over time", ["until", "unique pages", "dirty rate", "unique so far"], [
            [f"{row['seconds']:.2f} s", f"{row['pages']:,}", rate(row["dirty_rate"]),
             amount(row["unique_pages"] * trace.pgsize)] for row in rows])
    if plot is not None:
        plot_trace(trace, plot)


def play(
    path: TraceFile,
    bandwidth: Annotated[list[int], typer.Option("--bandwidth", "-b", parser=parse_size, metavar="SIZE", help=(
        "Bytes a second of the link; several for a comparison."))],
    downtime: Annotated[float, typer.Option(min=0.01, help="Limit of the downtime, in milliseconds.")] = 300.0,
    downtime_max: Annotated[float, typer.Option(min=0, help="The limit may rise to this; 0 = it stays.")] = 0.0,
    max_rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds with running devices.")] = 16,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds for these rounds; 0 = any.")] = 0.0,
    on_timeout: Annotated[str, typer.Option(help="force, cancel or ignore")] = "force",
    throttle_max: Annotated[float, typer.Option(min=0, max=0.99, help="How far the guest may be slowed down.")] = 0.0,
    latency: Annotated[float, typer.Option(min=0, help="Milliseconds of an acknowledgement.")] = 0.2,
    stop: Annotated[float, typer.Option(min=0, help="Milliseconds that devices take to stop.")] = 2.0,
    device_state: Annotated[int, typer.Option(parser=parse_size, metavar="SIZE", help=(
        "Bytes of device state in the downtime."))] = "0",      # type: ignore[assignment]
    start: Annotated[float, typer.Option(min=0, help="Seconds into the trace.")] = 0.0,
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, metavar="FILE.png", help=(
        "Draw the convergence at the first bandwidth."))] = None,
) -> None:
    """Predict rounds, bytes and downtime of a traced guest's migration over a link."""
    check_plot(plot)
    policy = Policy(downtime / 1e3, max_rounds, downtime_max / 1e3, timeout=timeout, on_timeout=on_timeout,
                    throttle_max=throttle_max)
    costs = Costs(stop=stop / 1e3, device_bytes=device_state)
    links = [float(link) for link in bandwidth]
    if not all(links):
        raise typer.BadParameter("nothing moves over a link of 0 bytes a second", param_hint="--bandwidth")
    trace = read_trace(path)
    found = [replay(trace, link, policy, costs, latency=latency / 1e3, start=start) for link in links]
    if as_json:
        print(json.dumps({"trace": str(path), "replays": [_as_dict(one) for one in found]}, indent=2))
    else:
        if len(found) == 1:
            _show_rounds(found[0], trace)
        _table("replay", ["link", "rounds", "moved", "in", "downtime", "predicted", "limit", "result"], [
            [rate(one.bandwidth), str(len(one.result.rounds)), amount(one.result.bytes), f"{one.result.seconds:.2f} s",
             milliseconds(one.result.downtime), milliseconds(one.result.predicted_downtime),
             milliseconds(one.result.limit), _verdict(one)] for one in found])
        for one in found:
            print(f"{rate(one.bandwidth)}: after the first round: {one.forecast}")
            if one.laps > 1:
                print(f"{rate(one.bandwidth)}: longer than the trace, which was played {one.laps:.1f} times")
    if plot is not None:
        plot_migration(asdict(found[0].result), plot, pgsize=trace.pgsize,
                       title=f"{amount(trace.npages * trace.pgsize)} replayed at {rate(links[0])}")


def _verdict(one: Replay) -> str:
    if one.step is Step.CANCEL:
        return "cancelled: " + one.reason
    return ("within the limit: " if one.within_limit else "ABOVE the limit: ") + one.reason


def _show_rounds(one: Replay, trace: Trace) -> None:
    _table("rounds", ["round", "moved", "in", "left", "dirty rate", "downtime would be"], [
        ["stop-and-copy" if done.final else str(done.epoch), amount(done.bytes), milliseconds(done.seconds),
         "" if done.final else amount(done.dirty_pages * trace.pgsize), "" if done.final else rate(done.dirty_rate),
         "" if done.band is None else f"{milliseconds(done.predicted_downtime)} "
         f"({milliseconds(done.band[0])} to {milliseconds(done.band[1])})"] for done in one.result.rounds])


def _as_dict(one: Replay) -> dict[str, Any]:
    values = asdict(one)
    values["step"], values["within_limit"] = one.step.value, one.within_limit
    return finite(values)
