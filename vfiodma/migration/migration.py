"""A whole migration: one call that returns when the guest is the destination's, or an asynchronous stream of events."""
import asyncio
import contextlib
import errno
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any, cast

from .._core.errno import error
from ..address_space import IoAddressSpace
from ..errors import MigrationError
from ..memory import GuestMemory
from .device_group import DeviceStates
from .events import Event, MigrationResult, Progress
from .handover import SourceState
from .layout import MemoryLayout
from .machine import Machine, Tracker
from .precopy import PrecopySource
from .tracker import DirtyTracker
from .transport import connect


class Migration:
    """Move a guest to a PageReceiver.

    Parameters
    ----------
    target : str or callable
        A URL (unix:/path, tls://host:port, ...), or what returns a Transport to the destination; called again whenever
        another connection is needed.
    memory : GuestMemory
        What is moved.
    machine : Machine
        What writes into it: ``stop``, ``resume``, ``state``.
    ioas : IoAddressSpace, optional
        Its mappings tell what devices write; a DirtyTracker is made over it.
    tracker : callable, optional
        Called with the MemoryLayout, instead of ``ioas``; returns the Tracker.
    states : mapping of str to bytes, optional
        Named states that go first.
    devices : DeviceStates, optional
        VFIO devices whose state goes along.
    verify : bool
        Compare the SHA-256 of all memory before the guest is given away: time in which it stands still.  Not after a
        switch to post-copy.
    on_event : callable, optional
        Called with each event, in the thread that runs the migration.
    transport_options : mapping, optional
        Of ``vfiodma.migration.transport.connect``, where ``target`` is a URL: ``tls``, ``insecure``, ``timeout``.
    **options
        Of PrecopySource.

    Examples
    --------
    ::

        result = Migration("unix:/run/guest", memory, machine, ioas=ioas, downtime_limit=0.03).run()

        async for event in Migration("unix:/run/guest", memory, machine, ioas=ioas):
            print(event)

    Notes
    -----
    A migration runs once.  ``cancel``, ``pause`` and ``unpause`` may be called from any thread.
    """

    def __init__(self, target: "str | Callable[[], Any]", memory: GuestMemory, machine: Machine, *,
                 ioas: IoAddressSpace | None = None, tracker: Callable[[MemoryLayout], Tracker] | None = None,
                 states: Mapping[str, bytes] | None = None, devices: DeviceStates | None = None,
                 verify: bool = False,
                 on_event: Callable[[Event], object] | None = None,
                 transport_options: Mapping[str, Any] | None = None, **options: Any) -> None:
        if (ioas is None) == (tracker is None):
            raise error(errno.EINVAL, "migrate", hint="give ioas, or tracker: what knows which pages are written")
        self._connect: Callable[[], Any] = target if callable(target) else (
            lambda: connect(target, **(transport_options or {})))
        self._memory, self._machine, self._states, self._verify = memory, machine, states, verify
        self._devices = devices
        self._pgsize = 4096 if ioas is None else ioas.pgsize
        self._make_tracker: Callable[[MemoryLayout], Tracker] = tracker or partial(
            DirtyTracker, cast(IoAddressSpace, ioas))
        self._on_event = on_event or (lambda _: None)
        self._options = options
        self._lock = threading.Lock()
        self._cancelled = self._paused = self._began = False
        self.source: PrecopySource | None = None
        self.result: MigrationResult | None = None

    def run(self) -> MigrationResult:
        """Do it all; return when the guest is the destination's.

        Raises
        ------
        MigrationError
            It failed (ECANCELED: by ``cancel``); the guest runs on here.
        HandoverError
            EINPROGRESS: the destination was given the guest, and did not answer: ``source.settle`` asks again.
        PostcopyError
            The guest is the destination's, which lacks pages: ``source.push`` goes on, ``source.close`` gives up.  Also
            after HandoverError and ``source.settle``, and after what ``on_event`` raises, where ``source.switched``.
        """
        return self._run(self._on_event)

    def cancel(self) -> None:
        """End it; up to the hand-over the guest runs on here."""
        with self._lock:
            self._cancelled = True
            if self.source is not None:
                self.source.cancel()

    def pause(self) -> None:
        """Send nothing until ``unpause``."""
        with self._lock:
            self._paused = True
            if self.source is not None:
                self.source.pause()

    def unpause(self) -> None:
        """Go on."""
        with self._lock:
            self._paused = False
            if self.source is not None:
                self.source.unpause()

    def switch_to_postcopy(self) -> None:
        """Give the guest away now, and the rest of its memory afterwards; ``postcopy=True`` allows it.

        Raises
        ------
        InvalidArgumentError
            EINVAL: it was not allowed, or the migration has not begun.
        """
        with self._lock:
            if self.source is None:
                raise error(errno.EINVAL, "switch_to_postcopy", hint="the migration has not begun")
            self.source.switch_to_postcopy()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Run it in a thread; yield its events, the MigrationResult last.

        An iteration that is left early cancels the migration, and waits until it has ended.  Of Progress events that
        nobody came to see, only one is kept.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        waiting = threading.Event()         # a Progress is in the queue

        def put(event: Event | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def on_event(event: Event) -> None:
            self._on_event(event)
            if isinstance(event, Progress):
                if waiting.is_set():
                    return
                waiting.set()
            put(event)

        def work() -> None:
            try:
                self._run(on_event)
            finally:
                put(None)

        running = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            while (event := await events.get()) is not None:
                if isinstance(event, Progress):
                    waiting.clear()
                yield event
            await running
        finally:
            if not running.done():
                self.cancel()
                with contextlib.suppress(MigrationError):
                    await asyncio.shield(running)

    def _run(self, on_event: Callable[[Event], object]) -> MigrationResult:
        with self._lock:
            if self._began:
                raise error(errno.EINVAL, "migrate", hint="a migration runs once: make another one")
            self._began = True
        with contextlib.closing(self._connect()) as transport, MemoryLayout(self._memory, self._pgsize) as layout, \
                contextlib.ExitStack() as parts:
            source = parts.enter_context(PrecopySource(transport, connect=self._connect, on_event=on_event,
                                                       **self._options))
            with self._lock:
                self.source = source
                if self._cancelled:
                    source.cancel()
                elif self._paused:
                    source.pause()
            source.introduce(self._memory, self._pgsize)
            result = source.migrate(layout, self._make_tracker(layout), self._machine, self._states,
                                    self._devices)
            if self._verify and not source.switched:
                here, there = source.verify(layout)
                if here != there:
                    source.abort()
                    raise MigrationError(errno.EBADMSG, operation="verify",
                                         hint="the memory differs between both sides; the guest runs on here")
            try:
                source.release()
                if source.switched:
                    result.postcopy = source.push()
            except BaseException:       # of on_event, and of a user who is impatient, as well
                if source.switched and source.handover.state in (SourceState.COMMITTING, SourceState.GIVEN):
                    parts.pop_all()     # it keeps what the destination lacks, or may lack
                raise
            self.result = result
            on_event(result)
            return result
