"""The old process: hands its container, memory and devices to a new one, or has everything back."""
import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .._core.errno import error
from ..address_space import IoAddressSpace
from ..errors import MigrationError, VfioError
from ..memory import GuestMemory
from .guard import Guard
from .handoff import VaddrHandoff, find_places
from .packets import Kind, Link
from .preflight import preflight
from .table import records_of, sealed_memfd, write_table


class UpdateTimes(NamedTuple):
    """Seconds of each step of a live update, as the old process saw them."""

    mappings: int
    prepare: float      #: table and descriptors sent, mapped and checked there; everything goes on meanwhile
    freeze: float       #: the caller's last word
    invalidate: float
    restore: float      #: told to go on, until the new process has restored everything and said so
    release: float      #: everything closed here; the new process goes on already

    @property
    def blackout(self) -> float:
        """From the first invalid vaddr to the acknowledgement; devices go on meanwhile."""
        return self.invalidate + self.restore


class Offered(NamedTuple):
    """What the old process hands over: a body for JSON, and descriptors, which stay its own."""

    body: dict[str, Any]
    fds: list[int]


def rows_of(memory: GuestMemory, mappings: Any) -> Any:
    """Return mappings as rows of the table: iova, offset, size, region << 3 | mmio << 2 | prot, by iova."""
    import numpy as np

    numbers = {gpa: (index << 3) | (region.mmio << 2) for index, (gpa, region) in enumerate(memory)}
    parts = [np.column_stack((rows[:, :3], rows[:, 3] | np.uint64(numbers[gpa])))
             for gpa, rows in find_places(memory, mappings).items()]
    if not parts:
        return np.empty((0, 4), np.uint64)
    rows = np.concatenate(parts)
    return rows[np.argsort(rows[:, 0], kind="stable")]


def describe(ioas: IoAddressSpace, memory: GuestMemory, way: str, fds: Mapping[str, int]) -> tuple[Offered, int]:
    """Return what is handed over, and the table's descriptor (the first one), which the caller closes."""
    records = records_of(memory)
    rows = rows_of(memory, ioas.to_array())
    state, container = ioas.backend.hand_over()
    table = write_table(records, rows)
    body = {"backend": ioas.capabilities.backend, "state": state, "container": len(container), "way": way,
            "fds": list(fds), "mappings": len(rows)}
    regions = [region.fd for region in memory.regions if region.fd is not None]
    return Offered(body, [table, *regions, *container, *fds.values()]), table


class UpdateOffer:
    """Hand an address space over to a new process, with devices that go on writing throughout.

    Parameters
    ----------
    sock : socket.socket
        A UNIX stream socket to the new process, which runs :class:`UpdateTaker`; stays the caller's.
    ioas : IoAddressSpace
        On a container of the running kernel: Type1, or iommufd with every mapping made by file.
    memory : GuestMemory
        Where its mappings lead; shared memory with descriptors.
    fds : mapping of str to int, optional
        Further descriptors (devices, eventfds), by name; they stay the caller's.
    freeze : callable, optional
        Called when the new process has everything ready: stop the processors, return the last state as
        bytes, of at most 1 GiB.
    timeout : float
        Seconds for each answer of the new process.

    Notes
    -----
    Exactly one process has the mappings at the end.  Where the new one dies, is silent or fails, this one kills it, so
    that it can't come back, restores its own addresses and raises; where it can't be killed nothing is restored and the
    error says so.  The kernel charges the locked memory to the new process, against its limit.
    Source: VFIO_DMA_UNMAP_FLAG_VADDR in include/uapi/linux/vfio.h; IOMMU_IOAS_CHANGE_PROCESS.
    """

    def __init__(self, sock: socket.socket, ioas: IoAddressSpace, memory: GuestMemory, *,
                 fds: Mapping[str, int] | None = None, freeze: Callable[[], bytes] | None = None,
                 timeout: float = 10.0) -> None:
        self._link = Link(sock, timeout)
        self._ioas, self._memory, self._fds, self._freeze = ioas, memory, dict(fds or {}), freeze
        self._handoff: VaddrHandoff | None = None

    def hand_over(self) -> UpdateTimes:
        """Do it all; the address space is closed then, the memory and ``fds`` are the caller's to close.

        Raises
        ------
        UnsupportedError
            EOPNOTSUPP: see :func:`preflight`.
        BusyError
            EBUSY: a pin is held.
        MigrationError, ProtocolError
            The new process did not take over: this one goes on as before.  ENOTRECOVERABLE: it does not.
        """
        with self._ioas.unchanged("live_update", unpinned=True):        # nobody maps from the table to the end
            report = preflight(self._ioas, self._memory)
            report.check()
            start = time.monotonic()
            handoff = VaddrHandoff(self._ioas, self._memory) if report.way == "vaddr" else None
            with contextlib.ExitStack() as steps:
                try:
                    guard = steps.enter_context(self._offer(report.way))
                    ready = time.monotonic()
                    state = self._last_words(steps)
                    frozen = time.monotonic()
                    if handoff is not None:
                        self._handoff = handoff
                        handoff.invalidate()
                except BaseException as exc:
                    self._give_up(exc)
                    raise
                invalid = time.monotonic()
                self._finish(guard, state, report.mappings)
            done = time.monotonic()
            self._ioas.let_go()
        with contextlib.suppress(VfioError):        # it has everything, whether it hears of it or not
            self._link.send(Kind.YOURS)
        return UpdateTimes(report.mappings, ready - start, frozen - ready, invalid - frozen, done - invalid,
                           time.monotonic() - done)

    def _last_words(self, steps: contextlib.ExitStack) -> list[int]:
        """Return the descriptor of what ``freeze`` says, if it says something."""
        last = b"" if self._freeze is None else self._freeze()
        if not last:
            return []
        fd = sealed_memfd(last, "vfiodma-state")
        steps.callback(os.close, fd)
        return [fd]

    def _give_up(self, exc: BaseException) -> None:
        """The new process was not told to go on: it has nothing, and need not wait."""
        with contextlib.suppress(VfioError):
            self._link.send(Kind.FAILED, str(exc).encode()[:4096])
        if self._handoff is not None:
            with contextlib.suppress(VfioError):        # EINVAL: they are still valid
                self._handoff.restore(self._memory)

    def _offer(self, way: str) -> Guard:
        """Send everything and wait until the new process has checked it."""
        offered, table = describe(self._ioas, self._memory, way, self._fds)
        try:
            self._link.send(Kind.OFFER, json.dumps(offered.body).encode(), offered.fds)
        finally:
            os.close(table)
        self._answer(Kind.READY, offered.body["mappings"])
        guard = Guard(self._link.peer)
        if self._link.hung_up():            # its PID may be another process's already
            guard.close()
            raise MigrationError(errno.ECONNRESET, operation="live_update", hint="the new process went away")
        return guard

    def _answer(self, kind: Kind, mappings: int) -> None:
        _, body, fds = self._link.receive(kind)
        fds.close()
        if body != b"%d" % mappings:
            raise error(errno.EPROTO, "live_update", hint=f"the new process counts {body[:20]!r} mappings, "
                        f"there are {mappings}")

    def _finish(self, guard: Guard, state: list[int], mappings: int) -> None:
        try:
            self._link.send(Kind.GO, b"", state)
            self._answer(Kind.DONE, mappings)
        except BaseException as exc:
            undone = isinstance(exc, MigrationError) and exc.errno == errno.ECANCELED     # it says so itself
            if not undone and not guard.stop():
                raise MigrationError(errno.ENOTRECOVERABLE, operation="live_update", hint=(
                    "the new process does not answer and can't be killed: it may have restored mappings, so nothing "
                    "was restored here; end it, then call take_back()")) from exc
            try:
                self.take_back()
            except VfioError as failure:
                raise MigrationError(errno.ENOTRECOVERABLE, operation="live_update", hint=(
                    f"the new process failed ({exc}), and the old addresses can't be restored ({failure}): vaddrs are "
                    "invalid; call take_back() again")) from exc
            raise

    def take_back(self) -> None:
        """Restore this process's own addresses, whatever the new one, which is gone, had restored."""
        if self._handoff is None:
            self._ioas.backend.change_process()
            return
        try:
            self._handoff.restore(self._memory)
        except VfioError:
            # Mappings that the new process had restored are valid, with addresses of a process that is no more.
            for iova, _, size, _ in self._ioas.to_array().tolist():
                with contextlib.suppress(VfioError):        # EINVAL: it is invalid
                    self._ioas.backend.invalidate_vaddr(iova, size)
            self._handoff.restore(self._memory)
