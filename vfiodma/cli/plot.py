"""Pictures of a migration, and of a dirty trace."""
import importlib.util
import os
from pathlib import Path
from typing import Any

import typer

from ..errors import MissingExtraError
from ..migration.trace import Trace
from .probe import amount

_INK, _GREY, _GRID = "#1f2933", "#9aa5b1", "#e4e7eb"
_RUNNING, _STOPPED, _BANDWIDTH, _DIRTY = "#2f6fb0", "#d1495b", "#2a9d8f", "#e08e2b"
# Of a downtime: (attribute of DowntimeBreakdown, name, colour).
_PARTS = (("stop", "stop", "#7b6ca8"), ("scan", "scan", "#4c9fd1"), ("send", "send", _RUNNING),
          ("device_state", "device state", _BANDWIDTH), ("acknowledgement", "acknowledgement", "#e9c46a"),
          ("apply", "apply", _DIRTY), ("start", "start", _STOPPED))
_SUFFIXES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")


def check_plot(plot: Path | None) -> None:
    """Say before the work, not after it, what keeps a picture from being drawn: BadParameter, or MissingExtraError."""
    if plot is None:
        return
    if plot.suffix.lower() not in _SUFFIXES:
        raise typer.BadParameter(f"{plot.name} is none of {', '.join('*' + suffix for suffix in _SUFFIXES)}",
                                 param_hint="--plot")
    if not plot.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {plot.parent}", param_hint="--plot")
    if not os.access(plot if plot.exists() else plot.parent, os.W_OK):
        raise typer.BadParameter(f"{plot} can't be written", param_hint="--plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "plot")


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plot") from None
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _style(*all_axes: Any) -> None:
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GREY)
        axes.tick_params(which="both", color=_GREY, labelcolor=_INK, length=0)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.yaxis.label.set_color(_INK)
        axes.xaxis.label.set_color(_INK)


def _legend(axes: Any, columns: int) -> None:
    axes.legend(frameon=False, fontsize=9, loc="upper right", labelcolor=_INK, ncols=columns)


def plot_migration(result: dict[str, Any], path: Path, *, pgsize: int = 4096, title: str = "") -> None:
    """Draw the convergence of a migration, and where its downtime went, into an image file.

    Parameters
    ----------
    result : dict
        ``dataclasses.asdict`` of a MigrationResult, or its JSON.
    path : Path
        Its suffix tells the format: .png, .svg, .pdf.
    pgsize : int
        Bytes of a page.
    title : str
        Above it.

    Raises
    ------
    MissingExtraError
        matplotlib is not installed.
    """
    figure = _figure(9, 9.4)
    figure.subplots_adjust(left=0.105, right=0.975, top=0.905, bottom=0.05, hspace=0.3)
    left, speed, downtime, parts = figure.subplots(4, 1, height_ratios=(1.1, 1, 1.1, 0.55))
    _style(left, speed, downtime, parts)
    rounds = result["rounds"]
    _draw_left(left, rounds, pgsize)
    _draw_speed(speed, rounds)
    _draw_downtime(downtime, result)
    _draw_parts(parts, result["breakdown"])
    for axes in (left, speed, downtime):
        _mark_rounds(axes, rounds)
    figure.text(0.02, 0.965, title or "Convergence", fontsize=14.5, fontweight="bold", color=_INK)
    facts = (f"downtime {result['downtime'] * 1e3:.1f} ms, predicted {result['predicted_downtime'] * 1e3:.1f} ms, "
             f"limit {result['limit'] * 1e3:g} ms", f"{amount(result['bytes'])} in {result['seconds']:.2f} s",
             f"{len(rounds)} rounds" if result["converged"] else "DID NOT CONVERGE")
    figure.text(0.02, 0.935, "   ·   ".join(facts), fontsize=10.5, color=_INK if result["converged"] else _STOPPED)
    figure.savefig(path)


def _mark_rounds(axes: Any, rounds: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.6, max(len(rounds) - 1, 1) + 0.6)
    if len(rounds) <= 16:
        axes.set_xticks(range(len(rounds)), ["stop-and-copy" if done["final"] else str(number)
                                             for number, done in enumerate(rounds)])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_left(axes: Any, rounds: list[dict[str, Any]], pgsize: int) -> None:
    sent = [(done["pages"] + done["zero_pages"]) * pgsize / (1 << 20) for done in rounds]
    running = [number for number, done in enumerate(rounds) if not done["final"]]
    left = [rounds[number]["dirty_pages"] * pgsize / (1 << 20) for number in running]
    smallest = min([value for value in sent + left if value > 0], default=1.0)
    axes.bar(range(len(sent)), sent, width=0.62, label="moved",
             color=[_STOPPED if done["final"] else _RUNNING for done in rounds])
    axes.plot(running, [max(value, smallest / 2) for value in left], "o-", color=_DIRTY, linewidth=2, markersize=6,
              markeredgecolor="white", label="left after it")
    axes.set_ylim(smallest / 3, max(sent + left + [smallest]) * 6)
    axes.set_yscale("log")
    axes.set_ylabel("MiB (log scale)")
    _legend(axes, 2)


def _draw_speed(axes: Any, rounds: list[dict[str, Any]]) -> None:
    moved = [done["bandwidth"] / (1 << 20) for done in rounds]
    running = [number for number, done in enumerate(rounds) if not done["final"]]
    written = [rounds[number]["dirty_rate"] / (1 << 20) for number in running]
    axes.fill_between(range(len(moved)), moved, color=_BANDWIDTH, alpha=0.12, linewidth=0)
    axes.plot(moved, "o-", color=_BANDWIDTH, linewidth=2, markersize=6, markeredgecolor="white", label="moved")
    axes.plot(running, written, "o-", color=_DIRTY, linewidth=2, markersize=6, markeredgecolor="white",
              label="written into clean pages")
    axes.set_ylim(0, max([*moved, *written, 1e-3]) * 1.4)
    axes.set_ylabel("MiB/s")
    _legend(axes, 2)


def _draw_downtime(axes: Any, result: dict[str, Any]) -> None:
    known = [(number, done) for number, done in enumerate(result["rounds"])
             if done["predicted_downtime"] is not None and done["predicted_downtime"] < 1e9]
    at = [number for number, _ in known]
    predicted = [done["predicted_downtime"] * 1e3 for _, done in known]
    bands = [done["band"] or (done["predicted_downtime"],) * 2 for _, done in known]
    limits = [done["limit"] * 1e3 for _, done in known]
    axes.fill_between(at, [low * 1e3 for low, _ in bands], [high * 1e3 for _, high in bands], color=_RUNNING,
                      alpha=0.18, linewidth=0, step=None, label="band")
    axes.plot(at, predicted, "o-", color=_RUNNING, linewidth=2, markersize=6, markeredgecolor="white",
              label="predicted downtime")
    if any(limits):
        axes.plot([*at, len(at)], [*limits, limits[-1]], "--", color=_GREY, linewidth=1.6, label="limit")
    if result["downtime"] > 0:
        axes.plot([len(result["rounds"]) - 1], [result["downtime"] * 1e3], "D", color=_STOPPED, markersize=8,
                  markeredgecolor="white", label="measured")
    everything = [*predicted, *filter(None, limits), result["downtime"] * 1e3]
    axes.set_ylim(min([value for value in everything if value > 0], default=1.0) / 2.5, max([*everything, 1.0]) * 8)
    axes.set_yscale("log")
    axes.set_ylabel("ms (log scale)")
    _legend(axes, 4)


def _draw_parts(axes: Any, breakdown: dict[str, float]) -> None:
    total, at = sum(breakdown.values()), 0.0
    axes.grid(False)
    axes.spines[["left"]].set_visible(False)
    axes.set_yticks([])
    for name, label, colour in _PARTS:
        value = breakdown[name] * 1e3
        if value > 0:
            axes.barh([0], [value], left=[at], height=0.5, color=colour, label=f"{label} {value:.2f} ms")
        at += value
    axes.set_xlim(0, max(total * 1e3, 1e-3))
    axes.set_ylim(-0.35, 1.35)
    axes.set_xlabel("where the downtime went, ms")
    if total:
        axes.legend(frameon=False, fontsize=8.5, loc="upper left", labelcolor=_INK, ncols=4, borderpad=0)


def plot_trace(trace: Trace, path: Path) -> None:
    """Draw the dirty rate and the unique memory written over the time of a trace into an image file.

    Raises
    ------
    MissingExtraError
        matplotlib is not installed.
    """
    import numpy as np

    figure = _figure(9, 6.2)
    figure.subplots_adjust(left=0.105, right=0.975, top=0.9, bottom=0.1, hspace=0.25)
    speed, unique = figure.subplots(2, 1, sharex=True)
    _style(speed, unique)
    rates = trace.pages * trace.pgsize / np.diff(trace.times, prepend=0.0) / (1 << 20)
    speed.step(trace.times, rates, where="pre", color=_DIRTY, linewidth=1.6)
    speed.fill_between(trace.times, rates, step="pre", color=_DIRTY, alpha=0.15, linewidth=0)
    speed.set_ylim(0, max(float(rates.max()) * 1.2, 1e-3))
    speed.set_ylabel("MiB/s in unique pages")
    at = np.linspace(0, trace.seconds, min(len(trace), 100) + 1)[1:]
    written = np.array([trace.unique(0.0, float(end)) for end in at]) * trace.pgsize / (1 << 20)
    fitted = np.array([trace.working_set.curve(float(end)) for end in at]) / (1 << 20)
    unique.plot(at, written, color=_RUNNING, linewidth=2.2, label="written at least once")
    unique.plot(at, fitted, "--", color=_GREY, linewidth=1.6, label="fitted working set")
    unique.set_ylim(0, max(float(written.max()), float(fitted.max()), 1e-3) * 1.25)
    unique.set_xlim(0, trace.seconds)
    unique.set_ylabel("MiB")
    unique.set_xlabel("seconds")
    _legend(unique, 2)
    figure.text(0.02, 0.945, f"What a guest of {amount(trace.npages * trace.pgsize)} writes", fontsize=14.5,
                fontweight="bold", color=_INK)
    figure.savefig(path)


def plot_rounds(summary: dict[str, Any], path: Path) -> None:
    """Draw dirty pages and bandwidth of each round of a demo's summary into an image file.

    Raises
    ------
    MissingExtraError
        matplotlib is not installed.
    """
    figure = _figure(9, 6.2)
    figure.subplots_adjust(left=0.095, right=0.975, top=0.86, bottom=0.11, hspace=0.12)
    pages, band = figure.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
    _style(pages, band)
    _draw_pages(pages, summary["rounds"])
    _draw_bandwidth(band, summary)
    figure.text(0.02, 0.955, f"{amount(summary['size'])} of memory moved while {summary['devices']} devices write",
                fontsize=14.5, fontweight="bold", color=_INK)
    facts = (f"downtime {summary['downtime'] * 1e3:.1f} ms of {summary['downtime_limit'] * 1e3:g} ms allowed",
             f"{summary['throughput'] / (1 << 30):.2f} GiB/s over {summary['seconds']:.2f} s",
             "every byte equal" if summary["equal"] else "BYTES DIFFER")
    figure.text(0.02, 0.915, "   ·   ".join(facts), fontsize=10.5, color=_INK if summary["equal"] else _STOPPED)
    figure.savefig(path)


def _draw_pages(axes: Any, rounds: list[dict[str, Any]]) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import EngFormatter, NullLocator

    counts = [done["pages"] + done["zero_pages"] for done in rounds]
    bars = axes.bar([done["epoch"] for done in rounds], [max(count, 1) for count in counts], width=0.62, bottom=0.1,
                    color=[_STOPPED if done["final"] else _RUNNING for done in rounds])
    if len(rounds) <= 12:
        for bar, done, count in zip(bars, rounds, counts, strict=True):
            time = done["seconds"] * 1e3
            axes.annotate(f"{count:,}\n{time:,.0f} ms" if time >= 10 else f"{count:,}\n{time:.1f} ms",
                          (bar.get_x() + bar.get_width() / 2, max(count, 1)), xytext=(0, 4), ha="center", fontsize=8.5,
                          textcoords="offset points", color=_INK, linespacing=1.35)
    axes.set_yscale("log")
    axes.set_ylim(max(0.3, min(counts) / 5), max(counts) * 12)
    axes.yaxis.set_major_formatter(EngFormatter(sep="", places=0))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("dirty pages moved (log scale)")
    axes.legend(handles=[Patch(color=_RUNNING, label="while devices write"),
                         Patch(color=_STOPPED, label="while they stand still")],
                frameon=False, fontsize=9, loc="upper right", labelcolor=_INK, ncols=2)


def _draw_bandwidth(axes: Any, summary: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    rounds = summary["rounds"]
    epochs = [done["epoch"] for done in rounds]
    moved = [done["bandwidth"] / (1 << 20) for done in rounds]
    running = [done for done in rounds if not done["final"]]
    written = [done["dirty_pages"] * summary["pgsize"] / done["seconds"] / (1 << 20) for done in running]
    axes.fill_between(epochs, moved, color=_BANDWIDTH, alpha=0.12, linewidth=0)
    axes.plot(epochs, moved, "o-", color=_BANDWIDTH, linewidth=2, markersize=6, markeredgecolor="white",
              label="moved over the stream")
    axes.plot([done["epoch"] for done in running], written, "o-", color=_DIRTY, linewidth=2, markersize=6,
              markeredgecolor="white", label="made dirty by devices")
    axes.set_ylim(0, max(moved + written) * 1.35)
    axes.set_xlim(-0.6, max(epochs) + 0.6)
    axes.set_ylabel("MiB/s")
    axes.set_xlabel("round")
    if len(rounds) <= 16:
        axes.set_xticks(epochs, [*map(str, epochs[:-1]), "stop-and-copy"])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9, loc="upper right", labelcolor=_INK, ncols=2)
