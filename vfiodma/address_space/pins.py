"""Ranges that must stay mapped for a while."""
import errno
import threading
import time
from collections.abc import Callable

from .._core.errno import error


class Pins:
    """Ranges in use, by key; all methods are called with the lock of ``changed`` held."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._held: dict[object, tuple[int, int, bool]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def add(self, iova: int, last: int, copying: bool) -> object:
        """Pin a range; ``copying`` = only for the time of a copy.  Return the key."""
        key = object()
        self._held[key] = iova, last, copying
        return key

    def remove(self, key: object) -> None:
        """Unpin."""
        self._held.pop(key, None)
        self._changed.notify_all()

    def clear(self) -> None:
        """Unpin everything."""
        self._held.clear()

    def wait(self, operation: str, iova: int, last: int, timeout: float | None, check: Callable[[str], None]) -> bool:
        """Wait until nothing holds a range: for copies as long as they take, for other pins up to ``timeout``.

        The lock is free meanwhile; ``check`` is called when it was.  Return whether it was.
        """
        waited = False
        deadline = None if timeout is None else time.monotonic() + timeout
        while holding := [copying for low, high, copying in self._held.values() if low <= last and high >= iova]:
            left = None
            if not all(holding) and deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise error(errno.EBUSY, operation, iova, last - iova + 1, "a part of the range is pinned")
            self._changed.wait(left)
            waited = True
            check(operation)
        return waited
