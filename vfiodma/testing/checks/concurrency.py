"""Threads on one backend."""
import errno
import threading
from collections.abc import Callable

from ...errors import VfioError
from ...types import Prot
from ..rig import Rig
from .base import Checks

_TURNS = 60


def run_threads(work: Callable[[int], None], count: int = 4) -> None:
    """Run ``work(0)``, ``work(1)``, ... side by side; raise what one of them raised."""
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class ConcurrencyChecks(Checks):
    """Calls from several threads do not disturb one another."""

    def test_threads_map_ranges_of_their_own(self, rig: Rig) -> None:
        def work(number: int) -> None:
            iova = rig.at(100 * number)
            for turn in range(_TURNS):
                npages = 1 + (turn + number) % 7
                rig.backend.map_dma(iova, rig.vaddr(number), npages * rig.pgsize, Prot.RW)
                rig.backend.map_dma(iova + 8 * rig.pgsize, rig.vaddr(number), rig.pgsize, Prot.READ)
                if turn % 2:
                    assert rig.backend.unmap_dma(iova, 20 * rig.pgsize) == (npages + 1) * rig.pgsize
                else:
                    assert rig.backend.unmap_dma(iova, npages * rig.pgsize) == npages * rig.pgsize
                    assert rig.backend.unmap_dma(iova, 20 * rig.pgsize) == rig.pgsize
        run_threads(work)
        rig.check()

    def test_of_threads_that_want_one_place_one_gets_it(self, rig: Rig) -> None:
        won = [0] * 4

        def work(number: int) -> None:
            for turn in range(_TURNS):
                try:
                    rig.backend.map_dma(rig.at(turn), rig.vaddr(number), rig.pgsize, Prot.RW)
                    won[number] += 1
                except VfioError as exc:
                    assert exc.errno == errno.EEXIST
        run_threads(work)
        assert sum(won) == _TURNS
        rig.book.update({rig.at(turn): rig.pgsize for turn in range(_TURNS)})
        rig.check_count()
