"""How ``vfiodma demo`` shows itself: rich on a terminal, lines in a pipe, nothing beside JSON."""
from typing import Any

from ..migration import Round
from .probe import amount


def rate(value: float) -> str:
    """Return bytes a second in the largest fitting unit."""
    for unit, name in ((1 << 30, "GiB/s"), (1 << 20, "MiB/s")):
        if value >= unit:
            return f"{value / unit:.2f} {name}"
    return f"{value / 1024:.1f} KiB/s"


def milliseconds(seconds: float | None) -> str:
    """Return a time in milliseconds."""
    return "" if seconds is None else f"{seconds * 1e3:.1f} ms"


class Silent:
    """Reports nothing."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stage(self, text: str) -> None:
        """Something begins."""

    def done(self, text: str) -> None:
        """It ended."""

    def progress(self, done: int, total: int) -> None:
        """It is under way."""

    def round(self, done: Round, limit: float) -> None:
        """A round ended."""


class Lines(Silent):
    """One line for each thing that is done."""

    def done(self, text: str) -> None:
        """Print it."""
        print(text, flush=True)

    def round(self, done: Round, limit: float) -> None:
        """Print the round."""
        name = "stop-and-copy" if done.final else f"round {done.epoch:<7}"
        text = f"{name}  {done.pages:>9,} pages {done.zero_pages:>7,} zero  {amount(done.bytes):>10}  " \
               f"{milliseconds(done.seconds):>10}  {rate(done.bandwidth):>12}"
        if not done.final:
            text += f"  {done.dirty_pages:>8,} dirty again, downtime would be {milliseconds(done.predicted_downtime)}"
        print(text, flush=True)


class Screen(Silent):
    """A progress bar, and a table that grows below what is done."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self.console = Console()
        self._progress = Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                                  TimeElapsedColumn(), console=self.console, transient=True)
        self._task = self._progress.add_task("starting", total=None)

    def __enter__(self) -> "Screen":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        """Name the bar."""
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(text, total=None)

    def done(self, text: str) -> None:
        """Print it above the bar."""
        self._progress.print(f"[green]✓[/] {text}", highlight=False)

    def progress(self, done: int, total: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=done, total=total)

    def round(self, done: Round, limit: float) -> None:
        """Print the round above the bar."""
        if done.final:
            text = "[bold]stop-and-copy[/]"
        else:
            text = f"[bold]round {done.epoch:<7}[/]"
        text += f"  {done.pages:>9,} pages  {amount(done.bytes):>10}  {milliseconds(done.seconds):>10}  " \
                f"{rate(done.bandwidth):>12}"
        if done.predicted_downtime is not None:
            colour, downtime = "green" if done.predicted_downtime <= limit else "yellow", done.predicted_downtime
            text += f"  {done.dirty_pages:>8,} dirty again  [{colour}]downtime {milliseconds(downtime)}[/]"
        self._progress.print("  " + text, highlight=False)


def findings(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the summary as (what, value)."""
    limit, update, there = summary["downtime_limit"], summary["vaddr_update"], summary["destination"]
    verdict = "within" if summary["within_limit"] else "ABOVE"
    if not summary["converged"]:
        verdict += f"; it did not converge in {len(summary['rounds']) - 1} rounds: devices write too much for it"
    last = "devices held back: the memories differ" if there is None else \
        f"{there['writes']:,} DMA writes to {there['dirty_pages']:,} pages in {there['seconds']} s"
    return [
        ("memory", f"{amount(summary['size'])}, {summary['devices']} devices at {rate(summary['rate'])} each over "
                   f"{amount(summary['working_set'])}"),
        ("rounds", f"{len(summary['rounds'])}, {sum(r['pages'] for r in summary['rounds']):,} pages and "
                   f"{sum(r['zero_pages'] for r in summary['rounds']):,} zero pages, {amount(summary['bytes'])} sent"),
        ("throughput", f"{rate(summary['throughput'])} over {summary['seconds']:.2f} s"),
        ("downtime", f"{milliseconds(summary['downtime'])}, {verdict} the limit of {milliseconds(limit)}"),
        ("vaddr update", f"{milliseconds(update['total'])} for {update['mappings']} mappings "
                         f"({update['engine'] * 1e6:.0f} µs without mmap and munmap)"),
        ("DMA while it moved", f"{summary['dma']['writes']:,} writes, {amount(summary['dma']['bytes'])}, "
                               f"{summary['dma']['faults']} faults"),
        ("at the destination", last),
        ("SHA-256 source", summary["sha256"]["source"]),
        ("SHA-256 destination", summary["sha256"]["destination"]),
        ("seed", str(summary["seed"])),
    ]


def show(summary: dict[str, Any], screen: bool) -> None:
    """Print the summary."""
    rows = findings(summary)
    verdict = "equal: not one byte was lost" if summary["equal"] else "DIFFERENT"
    if not screen:
        for what, value in rows:
            print(f"{what:<20} {value}")
        print(verdict, flush=True)
        return
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for what, value in rows:
        table.add_row(Text(what, "bold"), Text(value))
    colour = "green" if summary["equal"] else "red"
    Console().print(Panel(table, title=Text(verdict, f"bold {colour}"), border_style=colour, expand=False))
