"""Who owns the guest: two small state machines and a record that survives kills.  No I/O but the record's.

The source is the owner until it *commits*: it writes that down, and only then says so.  The destination is the owner
from the moment it has written that down, which it does before it runs or answers.  Between the two the guest stands
still.  A source that hears no answer stays in doubt, and asks again; a destination that has written "aborted" will
never run.  So never two sides run, and after a commit exactly one will, as soon as they have talked once.
"""
import contextlib
import enum
import errno
import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

from .._core.errno import error
from ..errors import MigrationError
from .stream import Phase


class Journal:
    """One small record in a file: replaced whole or not at all, and on the disk before ``write`` returns.

    Parameters
    ----------
    path : path-like, optional
        The file, readable by its owner only; by default the record is kept in this object, and ends with the process.

    Raises
    ------
    OSError
        Of the file system; the old record stays.
    """

    def __init__(self, path: "os.PathLike[str] | str | None" = None) -> None:
        self.path = None if path is None else Path(path)
        self._record: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            try:
                record = json.loads(self.path.read_text())
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise error(errno.EBADMSG, "journal", hint=f"{self.path} is no record of a migration")
            self._record = record

    def read(self) -> dict[str, Any]:
        """Return the record; empty if none was written."""
        return dict(self._record)

    def write(self, **record: Any) -> None:
        """Replace the record."""
        if self.path is not None:
            self._replace(self.path, record)
            try:
                directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(directory)
                finally:
                    os.close(directory)
            except BaseException:
                with contextlib.suppress(OSError):      # it has the name already: the old one takes it back
                    if self._record:
                        self._replace(self.path, self._record)
                    else:
                        self.path.unlink()
                raise
        self._record = dict(record)

    @staticmethod
    def _replace(path: Path, record: dict[str, Any]) -> None:
        fd, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
        try:
            with open(fd, "w") as file:
                json.dump(record, file)
                file.flush()
                os.fsync(fd)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise


class SourceState(enum.Enum):
    """Of the guest at the source."""

    RUNNING = "running"
    STOPPED = "stopped"         #: may run again
    COMMITTING = "committing"   #: the destination may own it: must not run
    GIVEN = "given"             #: the destination's, for good
    KEPT = "kept"               #: this side's, for good: the destination has written down that it gave it up


class SourceHandover:
    """The source's side.

    Parameters
    ----------
    journal : Journal
        Its record, if there is one, is of an earlier process: then the guest of this side is gone, and the state is
        COMMITTING, GIVEN or KEPT.
    stream : str
        The stream's id, for the record.
    **details : Any
        What else a later process must know of the stream, for the record.
    """

    def __init__(self, journal: Journal, stream: str, **details: Any) -> None:
        self._journal, self._stream, self._details = journal, stream, details
        record = journal.read()
        before = record.get("state") if record.get("stream") == stream else None
        self.state = SourceState(before) if before else SourceState.RUNNING

    @property
    def may_run(self) -> bool:
        """Whether the guest may run here."""
        return self.state in (SourceState.RUNNING, SourceState.KEPT)

    def stop(self) -> None:
        """The guest stands still."""
        self._need(SourceState.RUNNING)
        self.state = SourceState.STOPPED

    def resume(self) -> None:
        """The guest runs again: the destination has not been given it."""
        self._need(SourceState.STOPPED)
        self.state = SourceState.RUNNING

    def commit(self) -> None:
        """Decide to give the guest away; only after this may the destination be told."""
        if self.state is not SourceState.COMMITTING:
            self._need(SourceState.STOPPED)
            self._write(SourceState.COMMITTING)

    def settle(self, phase: Phase) -> None:
        """Take in what the destination says it is: owner, or that it will never be."""
        if phase is Phase.OWNER and self.state in (SourceState.COMMITTING, SourceState.GIVEN):
            self._write(SourceState.GIVEN)
        elif phase is Phase.ABORTED and self.state is not SourceState.GIVEN:
            self._write(SourceState.KEPT)
        elif phase in (Phase.OWNER, Phase.ABORTED):
            raise error(errno.EPROTO, "handover", hint=f"the destination says {phase.name}, the guest here is "
                        f"{self.state.name}")

    def _need(self, state: SourceState) -> None:
        if self.state is not state:
            raise error(errno.EINVAL, "handover", hint=f"the guest is {self.state.name} here, not {state.name}")

    def _write(self, state: SourceState) -> None:
        if self.state is not state:
            self._journal.write(stream=self._stream, state=state.value, **self._details)
            self.state = state


class DestinationHandover:
    """The destination's side.

    Parameters
    ----------
    journal : Journal
        Its record, if there is one, is of an earlier process, whose memory is gone: OWNER stays OWNER (the guest died
        as guests die with their hosts), everything else becomes ABORTED.

    Raises
    ------
    MigrationError
        From every method that writes: the journal can't be written, and nothing has changed.
    ProtocolError
        EBADMSG: the journal is a source's.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.stream = ""
        self.phase = Phase.RECEIVING
        self._lock = threading.Lock()       # abort() may come from any thread
        record = journal.read()
        if record:
            if record.get("phase") not in Phase.__members__:        # a source's, which must not be overwritten
                raise error(errno.EBADMSG, "journal", hint=f"{journal.path} is no record of a destination")
            self.stream = str(record.get("stream"))
            if record["phase"] == Phase.OWNER.name:
                self.phase = Phase.OWNER
            else:
                self._write(Phase.ABORTED)

    @property
    def may_run(self) -> bool:
        """Whether the guest may run here."""
        return self.phase is Phase.OWNER

    def begin(self, stream: str) -> None:
        """A stream begins; a restarted destination will know that there was one."""
        self._record(stream, Phase.RECEIVING)
        self.stream = stream

    def receive(self) -> None:
        """More memory comes: what was complete is not any more, because the source runs on."""
        self._move(Phase.RECEIVING)

    def complete(self) -> None:
        """Everything is here, from a source that stands still."""
        self._move(Phase.COMPLETE)

    def _move(self, phase: Phase) -> None:
        with self._lock:
            if self.phase not in (Phase.RECEIVING, Phase.COMPLETE):
                raise error(errno.EPROTO, "handover", hint=f"memory came although the guest is {self.phase.name} here")
            self.phase = phase

    def run(self) -> Phase:
        """The source gives the guest: own it, unless it was given up before."""
        if self.phase is Phase.RECEIVING:
            raise error(errno.EPROTO, "handover", hint="the guest was given before its memory was complete")
        with self._lock:
            if self.phase is Phase.COMPLETE:
                self._write(Phase.OWNER)
            return self.phase

    def abort(self) -> Phase:
        """Give the guest up, unless it is owned."""
        with self._lock:
            if self.phase in (Phase.RECEIVING, Phase.COMPLETE):
                self._write(Phase.ABORTED)
            return self.phase

    def _write(self, phase: Phase) -> None:
        self._record(self.stream, phase)
        self.phase = phase

    def _record(self, stream: str, phase: Phase) -> None:
        try:
            self._journal.write(stream=stream, phase=phase.name)
        except OSError as exc:
            raise MigrationError(exc.errno or errno.EIO, operation="handover", hint=(
                f"the journal can't be written: the guest is {self.phase.name} here, as before")) from exc
