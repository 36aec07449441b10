"""Who is told of new and gone mappings."""
from collections.abc import Callable
from typing import NamedTuple

from ..types import Mapping
from .table import Row
from .undo import Undo


class Listener(NamedTuple):
    """Callbacks of :meth:`IoAddressSpace.add_listener`; each takes a Mapping, each may be None."""

    mapped: Callable[..., object] | None = None
    unmapping: Callable[..., object] | None = None
    unmapped: Callable[..., object] | None = None


class Listeners(list):
    """The listeners of an address space, in the order in which they are called."""

    busy = False        #: a listener is being called: nothing may change

    def _call(self, callback: Callable[..., object], mapping: Mapping) -> None:
        self.busy = True
        try:
            callback(mapping)
        finally:
            self.busy = False

    def announce(self, call: str, back: str, rows: list[Row], undo: Undo) -> None:
        """Tell all; those that were told go into ``undo`` with the callback that takes it back."""
        for row in rows if self else ():
            mapping = row.mapping
            for listener in self:
                callback, reverse = getattr(listener, call), getattr(listener, back)
                if callback is not None:
                    self._call(callback, mapping)
                if reverse is not None:
                    undo.append((self._call, reverse, mapping))

    def replay(self, listener: Listener, rows: list[Row]) -> None:
        """Tell one listener of what is there."""
        if listener.mapped is not None:
            for row in rows:
                self._call(listener.mapped, row.mapping)

    def tell_unmapped(self, rows: list[Row]) -> None:
        """Tell all what is gone; the first exception is raised when everybody knows."""
        failure: Exception | None = None
        for row in rows if self else ():
            for listener in self:
                if listener.unmapped is not None:
                    try:
                        self._call(listener.unmapped, row.mapping)
                    except Exception as exc:
                        failure = failure or exc
        if failure is not None:
            raise failure
