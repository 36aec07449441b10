"""``vfiodma snapshot``: raw images of guest memory into a snapshot, and back."""
import contextlib
import errno
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import VfioError, peer_words
from ..memory import GuestMemory, MemoryRegion
from ..migration import snapshot as snapshots
from ..migration.snapshot import Snapshot
from ..types import Prot
from .probe import amount


def _block(text: str) -> tuple[int, Path]:
    gpa, colon, path = text.partition(":")
    try:
        return (int(gpa, 0), Path(path)) if colon else (0, Path(text))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not ADDRESS:FILE, for example 0x100000000:high.img") from None


def _state(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r} is not NAME=FILE")
    return name, Path(path)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Let errors of other files than the snapshot end as its own do: in words, with status 1."""
    try:
        yield
    except VfioError:
        raise
    except OSError as exc:
        raise VfioError(exc.errno or errno.EIO, operation="snapshot", hint=str(exc.filename or "")) from None


def _image(path: Path) -> MemoryRegion:
    with _plain_errors():
        size = path.stat().st_size
        if not size or size % mmap.PAGESIZE:
            raise VfioError(errno.EINVAL, operation="snapshot", size=size, hint=f"{path} is not whole pages")
        return GuestMemory.file(path, prot=Prot.READ).region


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, todo: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn(what), BarColumn(), TextColumn("{task.completed} of {task.total} pages"),
                  TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what)
        yield lambda done, todo: bar.update(task, completed=done, total=todo)


def _facts(path: Path, snapshot: Snapshot) -> dict[str, Any]:
    return {"path": str(path), "id": snapshot.id.hex(), "generation": snapshot.generation, "pgsize": snapshot.pgsize,
            "size": sum(size for _, size in snapshot.blocks), "pages": snapshot.pages,
            "disk": path.stat().st_blocks * 512,
            "blocks": [{"gpa": gpa, "size": size} for gpa, size in snapshot.blocks], "states": snapshot.states}


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print(f"{facts['path']}: {amount(facts['size'])} of memory, {amount(facts['pages'] * facts['pgsize'])} not zero, "
          f"{amount(facts['disk'])} on disk")
    print(f"id {facts['id']}, save {facts['generation']}, pages of {amount(facts['pgsize'])}")
    for block in facts["blocks"]:
        print(f"block  {block['gpa']:#018x}  {amount(block['size'])}")
    for name, size in facts["states"].items():
        print(f"state  {peer_words(name)}  {amount(size)}")
    if "written" in facts:
        print(f"written: {amount(facts['written'])} of pages")


def save(
    snapshot: Annotated[Path, typer.Argument(help="The snapshot; replaced when all is on the disk.")],
    blocks: Annotated[list[str], typer.Argument(metavar="[ADDRESS:]FILE...",
                                                help="Raw images of memory, whole pages, by guest address.")],
    state: Annotated[list[str] | None, typer.Option(metavar="NAME=FILE", help="A state; may be repeated.")] = None,
    changes: Annotated[bool, typer.Option("--changes", help="Write only what differs from the snapshot.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Save raw images of memory, which nobody writes meanwhile, and states."""
    with _plain_errors():
        states = {name: path.read_bytes() for name, path in map(_state, state or [])}
    with GuestMemory() as memory, _progress("save") as on_progress:
        for gpa, path in map(_block, blocks):
            memory.add(_image(path), gpa)
        since, dirty = snapshots.changed(memory, snapshot) if changes else (None, None)
        saved = snapshots.save(memory, snapshot, states=states, dirty=dirty, since=since, on_progress=on_progress)
    _print(_facts(snapshot, saved) | {"written": saved.written}, as_json)


def load(
    snapshot: Annotated[Path, typer.Argument(help="The snapshot.")],
    folder: Annotated[Path, typer.Argument(help="Where memory-ADDRESS.img and state-NAME go; made if need be.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a snapshot, and write its memory as raw images, with holes for zeros, and its states."""
    found = snapshots.inspect(snapshot)
    for name in found.states:
        if "/" in name or not name.isprintable():
            raise typer.BadParameter(f"the state {name!r} can't be the name of a file")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []

    def make_memory(found: Snapshot) -> GuestMemory:
        memory = GuestMemory()
        try:
            for gpa, size in found.blocks:
                files.append(folder / f"memory-{gpa:#x}.img")
                with open(files[-1], "xb") as file:
                    os.truncate(file.fileno(), size)
                memory.add(GuestMemory.file(files[-1]).region, gpa)
        except BaseException:
            memory.close()
            raise
        return memory

    try:
        memory, states = snapshots.load(snapshot, make_memory, fresh=True)
        memory.close()
        for name, data in states.items():
            files.append(folder / f"state-{name}")
            with open(files[-1], "xb") as file:
                file.write(data)
    except BaseException as exc:
        for path in files[:-1] if isinstance(exc, FileExistsError) else files:      # the last one is somebody else's
            path.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        with _plain_errors():
            raise
    _print(_facts(snapshot, found), as_json)


def show(
    snapshot: Annotated[Path, typer.Argument(help="The snapshot.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read all pages and check their hashes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a snapshot holds."""
    found = snapshots.inspect(snapshot)
    if verify:
        snapshots.load(snapshot)[0].close()
    _print(_facts(snapshot, found) | ({"verified": True} if verify else {}), as_json)
