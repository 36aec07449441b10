"""Failures on demand: a backend whose n-th change fails, and a loop over every n."""
import errno as _errno
from collections.abc import Iterator
from typing import Any

from .._core.errno import error
from ..errors import VfioError

#: Methods of a backend that change it.
CHANGES = frozenset({"map_dma", "map_many", "unmap_dma", "unmap_all", "invalidate_vaddr", "update_vaddr",
                     "update_vaddr_many", "start_dirty", "read_dirty", "stop_dirty"})


class InjectedError(Exception):
    """Stands in the place of ``__cause__`` of an error that a FailingBackend made."""


class FailingBackend:
    """Wraps a backend; a change of it that was chosen fails, before it is done.

    Parameters
    ----------
    backend : Backend
        Stays the caller's; ``close`` closes it, and never fails.
    fail_at : int, optional
        1 = the next change fails.  Only that one does; writable.
    errno : int
        With what; writable.
    calls : collection of str
        Names of the methods that count as changes.

    Attributes
    ----------
    count : int
        Changes asked for so far.
    failed : bool
        Whether the chosen one came.

    Notes
    -----
    Everything else is the backend's.  Not thread-safe.

    Examples
    --------
    >>> from vfiodma import GuestMemory, IoAddressSpace, SoftwareVfio
    >>> from vfiodma.testing import FailingBackend
    >>> with GuestMemory.memfd(4096) as memory, SoftwareVfio().container() as container:
    ...     backend = FailingBackend(container, fail_at=1)
    ...     with IoAddressSpace(backend) as ioas:
    ...         try:
    ...             ioas.map(memory)
    ...         except MemoryError as exc:
    ...             print(exc.operation, ioas.mappings())
    map_dma []
    """

    def __init__(self, backend: Any, fail_at: int | None = None, errno: int = _errno.ENOMEM, *,
                 calls: frozenset[str] | set[str] = CHANGES) -> None:
        self._backend = backend
        self._calls = calls
        self.errno = errno
        self.count = 0
        self.failed = False
        self.fail_at = fail_at

    @property
    def fail_at(self) -> int | None:
        """Which of the changes from now on fails; None = no one."""
        return None if self._target is None else self._target - self.count

    @fail_at.setter
    def fail_at(self, value: int | None) -> None:
        if value is not None and value < 1:
            raise ValueError("fail_at counts from 1, the next change")
        self._target = None if value is None else self.count + value

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._backend, name)
        if name not in self._calls:
            return value

        def change(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self._target:
                self._target, self.failed = None, True
                iova, size = args[0] if args and isinstance(args[0], int) else None, None
                raise error(self.errno, name, iova, size, "injected") from InjectedError(f"change {self.count}")
            return value(*args, **kwargs)
        change.__name__ = name
        return change


class EveryFailure:
    """Repeat something with a failure at the first change, at the second, ... until it ends without one.

    Parameters
    ----------
    errno : int
        What the failures are.
    limit : int
        Rounds after which it must have ended.

    Examples
    --------
    >>> from vfiodma import SoftwareVfio
    >>> from vfiodma.testing import EveryFailure
    >>> for fail in EveryFailure():
    ...     with SoftwareVfio().container() as container:
    ...         backend = fail.wrap(container)
    ...         with fail.expected():
    ...             _ = backend.unmap_all()
    ...             _ = backend.unmap_all()
    >>> fail.rounds
    3
    """

    def __init__(self, errno: int = _errno.ENOMEM, limit: int = 1000) -> None:
        self.errno = errno
        self.limit = limit
        self.rounds = 0
        self._done = False
        self._wrapped: FailingBackend | None = None

    def __iter__(self) -> Iterator["EveryFailure"]:
        while not self._done:
            self.rounds += 1
            if self.rounds > self.limit:
                raise AssertionError(f"a failure was still met in round {self.limit}")
            self._wrapped = None
            yield self
            if self._wrapped is None:
                raise AssertionError("wrap() was not called in this round")
            self._done = not self._wrapped.failed

    def wrap(self, backend: Any) -> FailingBackend:
        """Return the backend with this round's failure."""
        self._wrapped = FailingBackend(backend, self.rounds, self.errno)
        return self._wrapped

    def expected(self) -> "_Expected":
        """Return a context that takes this round's failure, and no other; ``failed`` tells if it came."""
        return _Expected(self)


class _Expected:
    def __init__(self, every: EveryFailure) -> None:
        self._every = every
        self.failed = False
        self._before = False

    def __enter__(self) -> "_Expected":
        wrapped = self._every._wrapped
        self._before = wrapped is not None and wrapped.failed
        return self

    def __exit__(self, kind: Any, exc: BaseException | None, _: Any) -> bool:
        wrapped = self._every._wrapped
        injected = wrapped is not None and wrapped.failed and not self._before
        if exc is None:
            if injected:
                raise AssertionError("the failure was swallowed")
            return False
        self.failed = injected and isinstance(exc, VfioError) and exc.errno == self._every.errno
        return self.failed
