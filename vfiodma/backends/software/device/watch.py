"""Functions called when an eventfd is written: what unmasking and register writes by eventfd need."""
import os
import select
import threading
import traceback
from collections.abc import Callable

_STOP = 0


class Watch:
    """Calls functions as eventfds are written, in a thread that lives while there is something to watch.

    Notes
    -----
    A write is noticed even when nobody reads the counter, as the kernel notices it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Condition()
        self._calls: dict[int, Callable[[], None]] = {}
        self._thread: threading.Thread | None = None
        self._running = 0                   # the call under way
        self._next = 1
        self._epoll: select.epoll | None = None
        self._stop = -1
        self._fds: dict[int, int] = {}      # number -> our duplicate
        self._numbers: dict[int, int] = {}  # and back

    def add(self, fd: int, call: Callable[[], None]) -> int:
        """Watch an eventfd, which stays open meanwhile; return what remove() takes."""
        with self._lock:
            if self._epoll is None:
                self._start()
            assert self._epoll is not None
            number, self._next = self._next, self._next + 1
            # An eventfd can be in one epoll once a number; a duplicate may be there again.
            own = os.dup(fd)
            self._calls[number], self._fds[number] = call, own
            self._numbers[own] = number
            self._epoll.register(own, select.EPOLLIN | select.EPOLLET)
            return number

    def _start(self) -> None:
        self._epoll = select.epoll()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._numbers = {self._stop: _STOP}
        self._epoll.register(self._stop, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, args=(self._epoll, self._numbers), name=self._name,
                                        daemon=True)
        self._thread.start()

    def remove(self, number: int, *, wait: bool) -> None:
        """Watch it no longer; with ``wait`` a call that is under way ends first (not from within a call)."""
        with self._lock:
            if self._calls.pop(number, None) is None:
                return
            own = self._fds.pop(number)
            assert self._epoll is not None
            self._epoll.unregister(own)
            del self._numbers[own]
            os.close(own)
            if wait and threading.current_thread() is not self._thread:
                self._lock.wait_for(lambda: self._running != number)
            if not self._calls and self._epoll is not None:
                self._end()

    def _end(self) -> None:
        """Let the thread go; it closes what it has waited on."""
        os.eventfd_write(self._stop, 1)
        self._epoll, self._thread, self._stop = None, None, -1

    def _run(self, epoll: select.epoll, numbers: dict[int, int]) -> None:
        while True:
            for fd, _ in epoll.poll():
                with self._lock:
                    number = numbers.get(fd, -1)
                    if number == _STOP:
                        os.close(fd)
                        epoll.close()
                        return
                    call = self._calls.get(number)
                    self._running = number if call else 0
                if call:
                    try:
                        call()
                    except Exception:           # a device's mistake; the other eventfds go on
                        traceback.print_exc()
                    with self._lock:
                        self._running = 0
                        self._lock.notify_all()

    def close(self) -> None:
        """Watch nothing."""
        for number in list(self._calls):
            self.remove(number, wait=True)
