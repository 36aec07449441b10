"""The new process: takes container, memory and devices over from the old one."""
import contextlib
import errno
import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from .._core.errno import error
from .._core.maprows import split_entries
from ..address_space import IoAddressSpace
from ..backends import adopt_backend
from ..errors import MigrationError, VfioError
from ..hostinfo import locked_memory
from ..memory import GuestMemory
from .packets import Fds, Kind, Link
from .table import Table, map_regions, place, read_state, read_table

Adopt = Callable[[str, Mapping[str, Any], Sequence[int]], Any]


class Taken(NamedTuple):
    """What the new process has; it closes all of it."""

    ioas: IoAddressSpace        #: closes its backend
    memory: GuestMemory
    fds: dict[str, int]         #: the further descriptors, by name
    state: bytes                #: what ``freeze`` of the old process returned

    def close(self) -> None:
        """Close everything: mappings, container, memory, descriptors."""
        self.ioas.close()
        self.memory.close()
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Offer(NamedTuple):
    backend: str
    state: dict[str, Any]
    container: int
    way: str
    fds: list[str]
    mappings: int


def _parse(body: bytes) -> _Offer:
    try:
        values = json.loads(body)
        offer = _Offer(**values)
        sound = all(map(isinstance, offer, (str, dict, int, str, list, int)))
        if not sound or offer.way not in ("vaddr", "file") or offer.container < 1 or \
                not all(isinstance(name, str) for name in offer.fds) or len(set(offer.fds)) != len(offer.fds):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise error(errno.EPROTO, "live_update", hint="the offer can't be read") from None
    return offer


class Prepared:
    """Everything that was offered, mapped and checked; not this process's yet.

    Parameters
    ----------
    body : bytes
        Of the offer.
    fds : Fds
        Table, memory, container, others; what is needed is taken out of it.
    adopt : callable
        See :func:`vfiodma.backends.adopt_backend`.
    """

    def __init__(self, body: bytes, fds: Fds, adopt: Adopt) -> None:
        offer = _parse(body)
        if not len(fds):
            raise error(errno.EPROTO, "live_update", hint="no descriptors came")
        table = read_table(fds[0])
        nregions = len(table.regions)
        if len(fds) != 1 + nregions + offer.container + len(offer.fds) or len(table.mappings) != offer.mappings:
            raise error(errno.EPROTO, "live_update", hint=f"{len(fds)} descriptors and {len(table.mappings)} mappings "
                        "do not fit the offer")
        self.way, self.mappings = offer.way, offer.mappings
        self._undo = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            self.memory = map_regions(table.regions, [fds[1 + index] for index in range(nregions)])
            undo.callback(self.memory.close)
            backend = self._backend = adopt(offer.backend, offer.state, fds.take(1 + nregions, offer.container))
            undo.callback(backend.let_go)
            if getattr(backend, "real", False) and self.way == "vaddr":
                _check_limit(table)
            self._entries = place(table, self.memory)
            views = tuple(region.view() for region in self.memory.regions)
            self._updates = split_entries(self._entries)[2] if len(self._entries) else ()
            for view in views:
                undo.callback(view.release)         # or the memory could not be closed
            self._ioas: IoAddressSpace = IoAddressSpace.adopt(backend, self._entries, keep=views, close_backend=True)
            self.fds = dict(zip(offer.fds, fds.take(1 + nregions + offer.container, len(offer.fds)), strict=True))
            self._undo = undo.pop_all()

    def take(self) -> None:
        """Make every mapping this process's: all or none.

        Raises
        ------
        LockedMemoryError
            ENOMEM: over this process's limit of locked memory, to which the kernel moves the charge.
        """
        if self.way == "file":
            self._backend.change_process()
        elif len(self._entries):
            self._backend.update_vaddr_many(self._updates)

    def taken(self, state: bytes) -> Taken:
        """Return what is the caller's from now on."""
        self._undo.pop_all()
        return Taken(self._ioas, self.memory, self.fds, state)

    def drop(self) -> None:
        """Close everything and unmap nothing: it is still the old process's."""
        self._ioas.let_go()
        self._undo.close()
        Fds(list(self.fds.values())).close()


def _check_limit(table: Table) -> None:
    available = locked_memory().available
    if available is not None and table.locked > available:
        raise error(errno.ENOMEM, "live_update", None, table.locked, "the kernel charges all of it to the new process, "
                    f"which may lock {available} more bytes: raise its RLIMIT_MEMLOCK, or give it CAP_IPC_LOCK")


class UpdateTaker:
    """Take an address space over from an old process that runs :class:`UpdateOffer`.

    Parameters
    ----------
    sock : socket.socket
        A UNIX stream socket to it; stays the caller's.
    timeout : float
        Seconds for each message of the old process.  How long it may be before the first one is for the caller to wait.
    adopt : callable, optional
        Instead of :func:`vfiodma.backends.adopt_backend`.

    Notes
    -----
    Start the process, and make this object, before the update: importing takes longer than everything else.
    """

    def __init__(self, sock: socket.socket, *, timeout: float = 10.0, adopt: Adopt = adopt_backend) -> None:
        self._link, self._adopt = Link(sock, timeout), adopt

    def take_over(self) -> Taken:
        """Receive, map, check, take over.

        Raises
        ------
        MigrationError, ProtocolError, DmaPermissionError, LockedMemoryError
            Nothing was taken: the old process goes on.

        Notes
        -----
        An old process that dies once it has told this one to go on leaves everything to it.  The last step waits
        without a limit: until the old process has let go, or is gone, it may still kill this one and go on itself.
        """
        _, body, fds = self._link.receive(Kind.OFFER)
        with fds, self._telling():
            prepared = Prepared(body, fds, self._adopt)
        try:
            with self._telling():
                self._link.send(Kind.READY, b"%d" % prepared.mappings)
                with self._link.receive(Kind.GO)[2] as words:
                    state = read_state(words[0]) if len(words) else b""
                prepared.take()
        except BaseException:
            prepared.drop()
            raise
        # The old process restores nothing from here on unless it has killed this one, which it may do until it says
        # that it has seen the end: it may have been stopped meanwhile.  That is waited for, or the old one's own end.
        with contextlib.suppress(MigrationError):
            self._link.send(Kind.DONE, b"%d" % prepared.mappings)
            self._link.receive(Kind.YOURS, for_ever=True)
        return prepared.taken(state)

    @contextlib.contextmanager
    def _telling(self):
        """Tell the old process of a failure here."""
        try:
            yield
        except BaseException as exc:
            if not (isinstance(exc, MigrationError) and exc.errno in (errno.ECANCELED, errno.ECONNRESET)):
                with contextlib.suppress(VfioError):
                    self._link.send(Kind.FAILED, str(exc).encode()[:4096])
            raise
