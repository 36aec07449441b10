"""A random run against a plain dict."""
import errno
import os
import random
from typing import Any

import numpy as np

from ...errors import VfioError
from ...types import Prot
from ..rig import PAGES, Rig
from .base import Checks

_STEPS = 250
_SPACE = 96                     # pages of the run: crowded, so that ranges meet


class _Run:
    """The backend and the dict that says what it must do."""

    def __init__(self, rig: Rig, seed: int, atomic: bool) -> None:
        self.rig = rig
        self.atomic = atomic
        self.random = random.Random(seed)
        self.many = "map_many" in rig.features
        self.all = "unmap_all" in rig.features

    def draw(self) -> tuple[int, int]:
        page = self.random.randrange(_SPACE)
        return page, self.random.randint(1, min(12, _SPACE - page))

    def touching(self, page: int, npages: int) -> list[int]:
        first, end = self.rig.at(page), self.rig.at(page + npages)
        return [iova for iova, size in self.rig.book.items() if iova < end and iova + size > first]

    def map(self) -> None:
        page, npages = self.draw()
        memory = self.random.randrange(PAGES - npages)
        arguments = self.rig.at(page), self.rig.vaddr(memory), npages * self.rig.pgsize, self.random.choice(list(Prot))
        if self.touching(page, npages):
            self.rig.refused(errno.EEXIST, self.rig.backend.map_dma, *arguments)
        else:
            self.rig.map(page, npages, memory=memory, prot=arguments[3])

    def map_many(self) -> None:
        entries = [self.draw() for _ in range(self.random.randint(1, 4))]
        taken: set[int] = set()
        good = True
        for page, npages in entries:
            pages = set(range(page, page + npages))
            good &= not pages & taken and not self.touching(page, npages)
            taken |= pages
        rows = np.array([[self.rig.at(page), self.rig.vaddr(), npages * self.rig.pgsize, Prot.RW]
                         for page, npages in entries], np.uint64)
        if good:
            self.rig.backend.map_many(rows)
            self.rig.book.update({self.rig.at(page): npages * self.rig.pgsize for page, npages in entries})
        else:
            self.rig.refused(errno.EEXIST, self.rig.backend.map_many, rows)

    def unmap(self) -> None:
        if self.rig.book and self.random.random() < 0.5:
            iova = self.random.choice(list(self.rig.book))
            page, npages = (iova - self.rig.iova) // self.rig.pgsize, self.rig.book[iova] // self.rig.pgsize
        else:
            page, npages = self.draw()
        iova, size = self.rig.at(page), npages * self.rig.pgsize
        touched = self.touching(page, npages)
        if all(iova <= start and start + self.rig.book[start] <= iova + size for start in touched):
            self.rig.unmap(page, npages)
            return
        if not self.atomic:
            return
        try:
            removed = self.rig.backend.unmap_dma(iova, size)
        except VfioError as exc:
            assert exc.errno in (errno.EINVAL, errno.ENOENT)
            return
        # Version 1 of Type1 removes the mappings that begin in the range, or none when one begins before it.
        assert removed in (0, sum(self.rig.book[start] for start in touched))
        if removed:
            for start in touched:
                del self.rig.book[start]

    def unmap_all(self) -> None:
        assert self.rig.backend.unmap_all() == sum(self.rig.book.values())
        self.rig.book.clear()

    def step(self) -> None:
        chosen = self.random.random()
        if chosen < 0.02 and self.all:
            self.unmap_all()
        elif chosen < 0.12 and self.many:
            self.map_many()
        elif chosen < 0.6:
            self.map()
        else:
            self.unmap()
        self.rig.check_count()


class ModelChecks(Checks):
    """Whatever is asked in whatever order, the backend does what a dict does."""

    def test_a_random_run_does_what_a_dict_does(self, rig: Rig) -> None:
        chosen = os.environ.get("VFIODMA_SEED", "1")
        seed = random.SystemRandom().randrange(1 << 32) if chosen == "random" else int(chosen)
        print(f"VFIODMA_SEED={seed}")
        run: Any = _Run(rig, seed, self.atomic_unmap)
        for number in range(_STEPS):
            run.step()
            if number % 50 == 49:
                rig.check()
