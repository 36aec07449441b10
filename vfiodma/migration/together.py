"""Work of several channels at once: all end, and the first failure is what is told."""
import errno
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from .._core.errno import error

T = TypeVar("T")


def together(works: Sequence[Callable[[], T]], give_up: Callable[[BaseException], object]) -> list[T]:
    """Run the first work in this thread and each other one in its own; return what they return.

    ``give_up`` is called once, with the first failure and in the thread that failed: it makes the others end.  They are
    waited for in any case, then the failure is raised.
    """
    if len(works) == 1:
        return [works[0]()]
    results: dict[int, T] = {}
    failures: list[BaseException] = []
    lock = threading.Lock()

    def fail(exc: BaseException) -> None:
        with lock:
            failures.append(exc)
            first = len(failures) == 1
        if first:
            give_up(exc)

    def run(index: int) -> None:
        try:
            results[index] = works[index]()
        except BaseException as exc:
            fail(exc)

    threads: list[threading.Thread] = []
    try:
        try:
            for index in range(1, len(works)):
                thread = threading.Thread(target=run, args=(index,), name=f"vfiodma-channel-{index}", daemon=True)
                try:
                    thread.start()
                except RuntimeError as exc:
                    raise error(errno.EAGAIN, "migrate", hint=f"a thread for each channel is needed: {exc}") from None
                threads.append(thread)
            run(0)
        except BaseException as exc:    # no more threads to be had, or an interrupt: the others end
            fail(exc)
        for thread in threads:
            while thread.is_alive():
                try:
                    thread.join()
                except BaseException as exc:
                    fail(exc)
        if failures:
            raise failures[0]
        return [results[index] for index in range(len(works))]
    finally:
        failures.clear()        # a traceback that leads to itself would keep memory for long
