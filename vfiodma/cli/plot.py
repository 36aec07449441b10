"""Pictures of a migration."""
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from .probe import amount

_INK, _GREY, _GRID = "#1f2933", "#9aa5b1", "#e4e7eb"
_RUNNING, _STOPPED, _BANDWIDTH, _DIRTY = "#2f6fb0", "#d1495b", "#2a9d8f", "#e08e2b"


def plot_rounds(summary: dict[str, Any], path: Path) -> None:
    """Draw dirty pages and bandwidth of each round of a demo's summary into an image file.

    Raises
    ------
    MissingExtraError
        matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plot") from None
    figure = Figure(figsize=(9, 6.2), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.095, right=0.975, top=0.86, bottom=0.11, hspace=0.12)
    pages, band = figure.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
    for axes in (pages, band):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GREY)
        axes.tick_params(which="both", color=_GREY, labelcolor=_INK, length=0)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.yaxis.label.set_color(_INK)
        axes.xaxis.label.set_color(_INK)
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
