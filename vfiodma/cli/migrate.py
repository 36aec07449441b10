"""``vfiodma migrate``: move a guest with devices that write to another process or machine; ask and cancel."""
import contextlib
import errno
import importlib.util
import json
import os
import secrets
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from ..errors import MigrationError, PostcopyError, VfioError
from ..memory import GuestMemory
from ..migration import Migration, MigrationResult, PageReceiver, Postcopy, stream
from ..migration.compression import offer
from ..migration.events import (
    Broken,
    Event,
    PostcopyBegun,
    PostcopyDone,
    PostcopyProgress,
    Progress,
    Resumed,
    Round,
    Stage,
    Throttled,
    summary,
)
from ..migration.handover import Journal
from ..migration.joining import accept_good
from ..migration.stream import Phase
from ..migration.transport import TlsFiles, listen
from . import control
from .demo import Seed, check_size, check_working_set, parse_size
from .demo_report import Lines, Screen, Silent, milliseconds, rate
from .destination import Background, Destination
from .guest import Guest, Workload, fill, image_files
from .plot import check_plot, plot_migration
from .probe import amount

_HEADROOM = 256 << 20

_STAGES = {"introduce": "waiting for the destination's memory", "rounds": "moving memory, devices write",
           "prepare": "waiting until the destination could take it", "stopped": "devices stand still: the rest moves",
           "moved": "comparing", "release": "handing over", "given": "the destination owns the guest",
           "pushing": "the guest runs there: the rest of its memory moves"}

Url = Annotated[str, typer.Argument(help="unix:/path, tls://host:port, tcp://host:port")]
Size = Annotated[int, typer.Option(parser=parse_size, metavar="SIZE")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]
Ca = Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="TLS: who signs both certificates.")]
Cert = Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="TLS: this side's certificate.")]
Key = Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="TLS: its key.")]
Insecure = Annotated[bool, typer.Option(help="Allow tcp:// beyond this host, in the clear.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds that the other side may be silent.")]
JournalFile = Annotated[Path | None, typer.Option(dir_okay=False, help=(
    "Where it is written down whose the guest is; must outlive this process to be of use."))]
Checksum = Annotated[str, typer.Option(help="auto, xxh3, crc32 or none")]
Channels = Annotated[int, typer.Option(min=1, max=64, help="Connections for pages.")]


def _tls(ca: Path | None, certificate: Path | None, key: Path | None) -> TlsFiles | None:
    if ca is None and certificate is None and key is None:
        return None
    if ca is None or certificate is None or key is None:
        raise typer.BadParameter("--ca, --certificate and --key go together")
    return TlsFiles(str(ca), str(certificate), str(key))


def _journal(path: Path | None) -> Journal | None:
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {path.parent}", param_hint="--journal")
    return None if path is None else Journal(path)


class JsonLines(Silent):
    """One JSON object for each event."""


class Status:
    """What is known of a migration, for ``status``."""

    def __init__(self, role: str, url: str) -> None:
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._known: dict[str, Any] = {"role": role, "url": url, "stage": "waiting", "epoch": 0, "pages": 0, "total": 0}

    def update(self, **known: Any) -> None:
        """Take something in."""
        with self._lock:
            self._known.update(known)

    def event(self, event: Event) -> None:
        """Take an event in."""
        if isinstance(event, Stage):
            self.update(stage=event.name)
        elif isinstance(event, Progress):
            self.update(epoch=event.epoch, pages=event.pages, total=event.total)
        elif isinstance(event, Round):
            self.update(bandwidth=event.bandwidth, dirty_pages=event.dirty_pages, rounds=event.epoch + 1,
                        dirty_rate=event.dirty_pages * 4096 / max(event.seconds, 1e-9),
                        predicted_downtime=event.predicted_downtime)
        elif isinstance(event, PostcopyProgress):
            self.update(missing=event.left, faults=event.faults)

    def show(self) -> dict[str, Any]:
        """Return it all."""
        with self._lock:
            return {**self._known, "seconds": time.monotonic() - self._began}


def _words(event: Event) -> str:
    """Return an event as a line for people."""
    match event:
        case Broken():
            return f"the connection broke, trying to get another: {event.error}"
        case Resumed():
            return f"another connection: {event.epochs} rounds are there, {event.again:,} pages go again"
        case Throttled():
            return f"the guest is slowed down by {event.share:.0%}"
        case PostcopyBegun():
            return f"the guest runs at the destination, {event.pages:,} pages follow: {event.reason}"
        case _:
            return f"forecast: {event}"


def send(
    url: Url,
    size: Annotated[int, typer.Option(parser=check_size, metavar="SIZE", help="Guest memory.")] = "256M",   # type: ignore[assignment]
    image: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, readable=True, help=(
        "File to fill it with; by default the running Python and its libraries."))] = None,
    devices: Annotated[int, typer.Option(min=1, max=64, help="Devices that write.")] = 2,
    write_rate: Annotated[int, typer.Option("--rate", parser=parse_size, metavar="SIZE", help=(
        "Bytes a second of each."))] = "32M",      # type: ignore[assignment]
    working_set: Annotated[int | None, typer.Option(parser=parse_size, metavar="SIZE", help=(
        "Where each writes; by default 64M, or a quarter of the memory."), show_default=False)] = None,
    seed: Seed = None,
    downtime: Annotated[float, typer.Option(min=1, help="Limit of the downtime, in milliseconds.")] = 300.0,
    max_rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds with running devices.")] = 16,
    bandwidth: Annotated[int | None, typer.Option(parser=parse_size, metavar="SIZE", help=(
        "Bytes a second, at most."))] = None,
    channels: Channels = 1,
    checksum: Checksum = "auto",
    compression: Annotated[str, typer.Option(help="none, auto, zstd or lz4")] = "none",
    reconnect: Annotated[float, typer.Option(min=0, help="Seconds to get a broken connection again.")] = 30.0,
    share: Annotated[bool, typer.Option(help="Give the memory itself to a process of this host, uncopied.")] = False,
    postcopy: Annotated[bool, typer.Option(help=(
        "Give the guest away before all memory has come, where the limit is out of reach."))] = False,
    postcopy_after: Annotated[int | None, typer.Option(min=0, metavar="ROUNDS", help=(
        "The same after so many rounds in any case."), show_default=False)] = None,
    verify: Annotated[bool, typer.Option(help="Compare all memory before the hand-over.")] = True,
    journal: JournalFile = None,
    ca: Ca = None, certificate: Cert = None, key: Key = None, insecure: Insecure = False, timeout: Timeout = 30.0,
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, metavar="FILE.png", help="Draw the convergence.")] = None,
) -> None:
    """Move a guest, whose devices write on, to vfiodma migrate serve."""
    workload = Workload(size, image, devices, write_rate, check_working_set(working_set, size),
                        secrets.randbelow(1 << 32) if seed is None else seed)
    stream.offer(checksum)              # said before the work, not after it
    offer(compression)
    record = _journal(journal)
    options = {"tls": _tls(ca, certificate, key), "insecure": insecure, "timeout": timeout}
    check_plot(plot)
    screen = sys.stdout.isatty() and not as_json and importlib.util.find_spec("rich") is not None
    status = Status("source", url)
    with (JsonLines() if as_json else Screen() if screen else Lines()) as report, \
            GuestMemory.memfd(size, "vfiodma-guest") as memory:
        report.stage("filling memory")
        fill(memory, image_files(image), report)
        with Guest(workload, memory) as guest:
            def on_event(event: Event) -> None:
                status.event(event)
                if as_json and not isinstance(event, Progress):
                    print(json.dumps(summary(event)), flush=True)
                elif isinstance(event, Progress):
                    report.progress(event.pages, event.total)
                elif isinstance(event, Round):
                    report.round(event, downtime / 1e3)
                elif isinstance(event, Stage):
                    report.stage(_STAGES[event.name])
                elif not isinstance(event, MigrationResult | PostcopyProgress | PostcopyDone):
                    report.done(_words(event))

            guest.writers.resume()
            migration = Migration(
                url, memory, guest.writers, ioas=guest.ioas, states=guest.states, verify=verify, on_event=on_event,
                transport_options=options, downtime_limit=downtime / 1e3, max_rounds=max_rounds, checksum=checksum,
                compression=compression, channels=channels, reconnect_timeout=reconnect,
                share_memory=share, postcopy=Postcopy(postcopy_after) if postcopy_after is not None else postcopy,
                bandwidth_limit=None if bandwidth is None else float(bandwidth),
                journal=record)

            def cancel() -> dict[str, Any]:
                migration.cancel()
                return {"cancelled": True}

            with control.Control({"status": status.show, "cancel": cancel}):
                result = migration.run()
            nbytes, seconds = result.bytes, result.seconds
            if (late := result.postcopy) is not None:
                nbytes, seconds = nbytes + late.bytes, seconds + late.seconds
                report.done(f"{late.pages + late.zero_pages:,} pages came after that, in {late.seconds:.2f} s; "
                            f"{late.faults:,} were waited for, {milliseconds(late.fault_median)} each (median), "
                            f"{milliseconds(late.fault_max)} at most")
            predicted = f", predicted {milliseconds(result.predicted_downtime)}" if result.predicted_downtime else ""
            report.done(f"moved {amount(size)} in {seconds:.2f} s, {rate(nbytes / seconds)}; downtime "
                        f"{milliseconds(result.downtime)} of {milliseconds(downtime / 1e3)}{predicted}; "
                        f"{guest.dma['writes']:,} DMA writes meanwhile")
    if plot is not None:
        plot_migration(asdict(result), plot, title=f"{amount(size)} of memory moved while {devices} devices write")


def serve(
    url: Url,
    most: Annotated[int, typer.Option("--size", parser=parse_size, metavar="SIZE", help=(
        "Memory to take, at most; by default three quarters of what is available."), show_default=False)] = "0",    # type: ignore[assignment]
    wait: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for a source.")] = 3600.0,
    reconnect: Annotated[float, typer.Option(min=0.1, help=(
        "Seconds to wait for a source whose connection broke."))] = 30.0,
    run_for: Annotated[float, typer.Option(min=0, help="Seconds that the guest's devices go on here.")] = 1.0,
    linger: Annotated[float, typer.Option(min=0, help=(
        "Seconds after that in which a source that heard no answer can still ask."))] = 0.0,
    channels: Channels = 64,
    checksum: Checksum = "auto",
    compression: Annotated[str, typer.Option(help="none, auto, zstd or lz4")] = "auto",
    postcopy: Annotated[bool, typer.Option(help="Take a guest before all of its memory has come as well.")] = False,
    journal: JournalFile = None,
    ca: Ca = None, certificate: Cert = None, key: Key = None, insecure: Insecure = False, timeout: Timeout = 30.0,
    as_json: Json = False,
) -> None:
    """Take one guest that vfiodma migrate send moves here, and let its devices go on."""
    stream.offer(checksum)              # said before the wait, not after it
    offer(compression)
    record = _journal(journal)
    status = Status("destination", url)
    size = most or max(psutil.virtual_memory().available * 3 // 4 - _HEADROOM, 1 << 20)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen(url, timeout=timeout, tls=_tls(ca, certificate, key), insecure=insecure))
        _say(as_json, {"event": "listening", "url": listener.url, "most": size},
             f"waiting at {listener.url} for {amount(size)} at most")
        here = stack.enter_context(contextlib.closing(Destination(size, at_most=True)))
        transport = stack.enter_context(contextlib.closing(accept_good(listener.accept, time.monotonic() + wait)))
        status.update(stage="receiving")

        def on_postcopy(event: Event) -> None:
            status.event(event)
            if as_json:
                print(json.dumps(summary(event)), flush=True)

        receiver = stack.enter_context(PageReceiver(
            transport, here.make_memory, fresh=True, accept=listener.accept, channels=channels,
            checksum=checksum, compression=compression, journal=record,
            on_state=here.take_state, on_prepare=here.prepare, on_switch=here.get_ready,
            take_memory=here.take_memory, postcopy=postcopy, on_postcopy=on_postcopy))

        def cancel() -> dict[str, Any]:
            phase = receiver.handover.abort()
            return {"cancelled": phase is Phase.ABORTED, "phase": phase.name.lower()}

        stack.enter_context(control.Control({
            "status": lambda: {**status.show(), "phase": receiver.handover.phase.name.lower(), "epoch": receiver.epoch},
            "cancel": cancel}))
        phase = receiver.serve(reconnect, on_break=lambda exc: _say(as_json, {"event": "broken", "error": str(exc)},
                                                         f"the connection broke, waiting for another: {exc}"))
        if phase is not Phase.OWNER:
            raise MigrationError(errno.ECANCELED, operation="migrate", hint="the guest stays at the source")
        status.update(stage="running")
        ran: list[dict[str, Any]] = []
        if receiver.digest:
            _say(as_json, {"event": "verified", "sha256": receiver.digest.hex()}, f"SHA-256 {receiver.digest.hex()}")
        devices = Background(lambda: ran.append(here.run_on(receiver, run_for)))
        try:
            late = receiver.finish()
        except PostcopyError as exc:        # devices wait for pages, and can't be stopped
            listener.close()
            print(f"vfiodma: {exc}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)
        devices.finish()
        done = ran[0]
        _say(as_json, {"event": "ran", **done}, f"the guest is here: {done['writes']:,} DMA writes to "
             f"{done['dirty_pages']:,} pages in {run_for:g} s, {done['faults']} faults")
        if late is not None and not as_json:
            print(f"{late.pages + late.zero_pages:,} pages came meanwhile, {late.faults:,} of them were waited for",
                  flush=True)
        until = time.monotonic() + linger
        while (left := until - time.monotonic()) > 0:
            with contextlib.suppress(VfioError):      # nobody came, or a stranger
                receiver.linger(left)


def _say(as_json: bool, event: dict[str, Any], text: str) -> None:
    print(json.dumps(event) if as_json else text, flush=True)


def _chosen(which: str | None) -> list[Path]:
    found = control.running() if which is None else [
        control.folder() / f"{which}.sock" if which.isdecimal() else Path(which)]
    if not found:
        print("no migration of this user runs", file=sys.stderr)
        raise typer.Exit(1)
    return found


Which = Annotated[str | None, typer.Argument(help="Process, or path of its control socket; by default all.")]


def status(which: Which = None, as_json: Json = False) -> None:
    """Show how far migrations are."""
    for path in _chosen(which):
        known = control.ask(path, "status")
        if as_json:
            print(json.dumps(known), flush=True)
            continue
        text = f"{known['pid']}  {known['role']:<11}  {known['stage']:<9}  {known['seconds']:8.1f} s"
        if known["total"]:
            text += f"  round {known['epoch']}: {known['pages']:,} of {known['total']:,} pages"
        if "bandwidth" in known:
            text += f"  {rate(known['bandwidth'])}, dirtied at {rate(known['dirty_rate'])}, downtime would be " \
                    f"{milliseconds(known['predicted_downtime'])}"
        print(text, flush=True)


def cancel(which: Annotated[str, typer.Argument(help="Process, or path of its control socket.")]) -> None:
    """End a migration; its guest runs on at the source, unless it was handed over already."""
    answer = control.ask(_chosen(which)[0], "cancel")
    if not answer.get("cancelled"):
        print(f"too late: the guest is {answer.get('phase', 'handed over')}", file=sys.stderr)
        raise typer.Exit(1)
