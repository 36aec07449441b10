"""Functions called when an eventfd is written: what unmasking and register writes by eventfd need."""
import os
import select
import threading
import traceback
from collections.abc import Callable

_RWF_NOWAIT = getattr(os, "RWF_NOWAIT", 8)


class _Source:
    """An eventfd that is watched, for one or several calls."""

    def __init__(self, fd: int) -> None:
        self.fd = os.dup(fd)
        self.calls: dict[int, Callable[[], None]] = {}
        self.missed: set[int] = set()       # of the calls that came when it had been written already

    def readable(self) -> bool:
        """Whether its counter is not 0."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(0))

    def take(self) -> list[int]:
        """Return the calls that an event is for.  A write drains the counter; what came before the watch stays."""
        if self.missed:
            missed, self.missed = self.missed, set()
            return sorted(missed)
        try:
            os.preadv(self.fd, [bytearray(8)], -1, _RWF_NOWAIT)
        except OSError:
            pass                            # somebody else has read it: it was written all the same
        return sorted(self.calls)


class Watch:
    """Calls functions as eventfds are written, in a thread that lives while there is something to watch.

    Notes
    -----
    As with the kernel, a write drains the counter, and one that came before the watch counts for it without that.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Condition()
        self._sources: dict[str, _Source] = {}
        self._keys: dict[int, str] = {}             # of the numbers
        self._running = 0                           # the call under way
        self._next = 1
        self._thread: threading.Thread | None = None
        self._epoll: select.epoll | None = None
        self._stop = -1

    @staticmethod
    def _key(fd: int) -> str:
        """Return what two descriptors of one eventfd have in common."""
        with open(f"/proc/self/fdinfo/{fd}") as lines:
            return next((line for line in lines if line.startswith("eventfd-id:")), f"descriptor {fd}")

    def add(self, fd: int, call: Callable[[], None]) -> int:
        """Watch an eventfd, which stays open meanwhile; return what remove() takes."""
        key = self._key(fd)
        with self._lock:
            if self._epoll is None:
                self._epoll = select.epoll()
                self._stop = os.eventfd(0, os.EFD_CLOEXEC)
                self._epoll.register(self._stop, select.EPOLLIN)
                self._thread = threading.Thread(target=self._run, args=(self._epoll, self._stop), name=self._name,
                                                daemon=True)
                self._thread.start()
            number, self._next = self._next, self._next + 1
            source = self._sources.get(key)
            known = source is not None
            if source is None:
                source = self._sources[key] = _Source(fd)
            source.calls[number] = call
            self._keys[number] = key
            if source.readable():
                source.missed.add(number)
            # Arming it again reports a counter that is not 0.
            (self._epoll.modify if known else self._epoll.register)(source.fd, select.EPOLLIN | select.EPOLLET)
            return number

    def remove(self, number: int, *, wait: bool) -> None:
        """Watch it no longer; with ``wait`` a call that is under way ends first (not from within a call)."""
        with self._lock:
            key = self._keys.pop(number, None)
            if key is None:
                return
            source = self._sources[key]
            del source.calls[number]
            source.missed.discard(number)
            if not source.calls:
                assert self._epoll is not None
                self._epoll.unregister(source.fd)
                os.close(source.fd)
                del self._sources[key]
            if wait and threading.current_thread() is not self._thread:
                self._lock.wait_for(lambda: self._running != number)
            if not self._sources and self._epoll is not None:
                os.eventfd_write(self._stop, 1)     # the thread closes what it has waited on
                self._epoll, self._thread, self._stop = None, None, -1

    def _run(self, epoll: select.epoll, stop: int) -> None:
        while True:
            for fd, _ in epoll.poll():
                if fd == stop:
                    os.close(stop)
                    epoll.close()
                    return
                with self._lock:
                    source = next((source for source in self._sources.values() if source.fd == fd), None)
                    numbers = source.take() if source else []
                for number in numbers:
                    self._call(number)

    def _call(self, number: int) -> None:
        with self._lock:
            if number not in self._keys:
                return
            call = self._sources[self._keys[number]].calls[number]
            self._running = number
        try:
            call()
        except Exception:                           # a device's mistake; the other eventfds go on
            traceback.print_exc()
        with self._lock:
            self._running = 0
            self._lock.notify_all()

    def close(self) -> None:
        """Watch nothing."""
        for number in list(self._keys):
            self.remove(number, wait=True)
