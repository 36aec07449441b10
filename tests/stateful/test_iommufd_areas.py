"""What an Ioas notes of its areas is what the (software) kernel has, whatever succeeds and fails."""
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vfiodma import GuestMemory, SoftwareGroup, SoftwareVfio
from vfiodma.backends.iommufd import IommufdContainer
from vfiodma.errors import VfioError

PAGE = 4096
PAGES = 48                      # where everything happens
BASE = 0xFEDE0000               # 32 pages, then the reserved window

starts = st.integers(0, PAGES - 1)
sizes = st.integers(1, 12)


class AreasMachine(RuleBasedStateMachine):
    """The model: a dict of first page -> pages for each of two address spaces."""

    @initialize(kernel=st.sampled_from(["6.12", "7.2"]))
    def open(self, kernel):
        self.memory = GuestMemory.memfd(PAGES * PAGE)
        self.vaddr = self.memory.regions[0].vaddr
        self.container = IommufdContainer(["0000:00:10.0"], system=SoftwareVfio(
            kernel, memlock_limit=None, groups=[SoftwareGroup(0, ["0000:00:10.0"])]))
        self.spaces = [self.container, self.container.iommufd.alloc_ioas()]
        self.models = [{}, {}]

    def teardown(self):
        if hasattr(self, "container"):
            self.container.close()
            self.memory.close()

    def overlaps(self, which, start, size):
        return any(start < first + count and first < start + size for first, count in self.models[which].items())

    def fits(self, which, start, size):
        reserved = which == 0 and start + size > 32          # the other space has no device
        return not reserved and not self.overlaps(which, start, size)

    @rule(which=st.integers(0, 1), start=starts, size=sizes)
    def map_fixed(self, which, start, size):
        try:
            self.spaces[which].map_dma(BASE + start * PAGE, self.vaddr, size * PAGE, 3)
        except VfioError:
            assert not self.fits(which, start, size)
        else:
            assert self.fits(which, start, size)
            self.models[which][start] = size

    @rule(start=starts, size=sizes, rows=st.integers(1, 5))
    def map_list(self, start, size, rows):
        import numpy as np
        table = np.array([[BASE + (start + i * size) * PAGE, self.vaddr, size * PAGE, 1] for i in range(rows)],
                         np.uint64)
        fits = all(self.fits(0, start + i * size, size) for i in range(rows))
        try:
            self.container.map_many(table)
        except VfioError:
            assert not fits
        else:
            assert fits
            self.models[0] |= {start + i * size: size for i in range(rows)}

    @rule(which=st.integers(0, 1), start=starts, size=st.integers(0, PAGES))
    def unmap(self, which, start, size):
        model = self.models[which]
        inside = {first: count for first, count in model.items() if start <= first and first + count <= start + size}
        cut = any(first < edge < first + count for first, count in model.items() for edge in (start, start + size))
        try:
            removed = self.spaces[which].unmap_dma(BASE + start * PAGE, size * PAGE)
        except VfioError:
            assert cut or not size
        else:
            assert not cut and removed == sum(inside.values()) * PAGE
            for first in inside:
                del model[first]

    @rule(which=st.integers(0, 1))
    def unmap_all(self, which):
        assert self.spaces[which].unmap_all() == sum(self.models[which].values()) * PAGE
        self.models[which] = {}

    @rule(source=st.integers(0, 1), into=st.integers(0, 1), start=starts, size=sizes, at=starts)
    def copy(self, source, into, start, size, at):
        mapped = {page: first for first, count in self.models[source].items() for page in range(first, first + count)}
        whole = all(page in mapped for page in range(start, start + size))
        fits = self.fits(into, at, size)
        try:
            self.spaces[into].copy(self.spaces[source], BASE + start * PAGE, size * PAGE, 1, BASE + at * PAGE)
        except VfioError:
            assert not whole or not fits
        else:
            assert whole and fits
            pieces = {}
            for page in range(start, start + size):
                pieces.setdefault(mapped[page], []).append(page)
            self.models[into] |= {at + pages[0] - start: len(pages) for pages in pieces.values()}

    @invariant()
    def notes_are_right(self):
        if hasattr(self, "spaces"):
            for space, model in zip(self.spaces, self.models, strict=True):
                assert space.areas() == [(BASE + first * PAGE, count * PAGE) for first, count in sorted(model.items())]


TestAreas = AreasMachine.TestCase
TestAreas.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
