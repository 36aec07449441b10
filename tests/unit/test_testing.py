"""vfiodma.testing itself: failures on demand, strategies, a missing library, and that the suite finds bugs."""
import errno
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiodma import SoftwareVfio
from vfiodma.errors import DmaLimitError, VfioError
from vfiodma.testing import EveryFailure, FailingBackend, InjectedError, mappings, page_ranges, prots
from vfiodma.testing.rig import Rig
from vfiodma.types import IovaRange, Prot

PAGE = 4096


@pytest.fixture
def container():
    with SoftwareVfio(memlock_limit=None).container() as container:
        yield container


# ---- failures

def test_the_chosen_change_fails_once_and_changes_nothing(container):
    backend = FailingBackend(container, 2, errno.ENOSPC)
    assert backend.unmap_all() == 0
    with pytest.raises(DmaLimitError) as caught:
        backend.map_dma(0x10000, 0x10000, PAGE, 3)
    assert (caught.value.operation, caught.value.iova) == ("map_dma", 0x10000)
    assert isinstance(caught.value.__cause__, InjectedError)
    assert backend.failed and backend.fail_at is None and backend.count == 2
    assert backend.unmap_all() == 0


def test_questions_are_no_changes(container):
    backend = FailingBackend(container, 1)
    assert backend.capabilities() == container.capabilities()
    assert backend.iova_ranges() == container.iova_ranges()
    assert backend.fail_at == 1
    backend.fail_at = None
    assert backend.unmap_all() == 0


def test_counting_starts_at_one(container):
    with pytest.raises(ValueError):
        FailingBackend(container, 0)


def test_a_swallowed_failure_is_told(container):
    with pytest.raises(AssertionError, match="swallowed"):
        for fail in EveryFailure():
            backend = fail.wrap(container)
            with fail.expected():
                try:
                    backend.unmap_all()
                except VfioError:
                    pass


def test_another_error_goes_through(container):
    with pytest.raises(VfioError) as caught:
        for fail in EveryFailure(errno.ENOSPC):
            backend = fail.wrap(container)
            with fail.expected():
                backend.unmap_all()
                backend.map_dma(1, 1, 1, 3)
    assert caught.value.errno == errno.EINVAL


def test_a_loop_that_always_fails_ends(container):
    with pytest.raises(AssertionError, match="round 5"):
        for fail in EveryFailure(limit=5):
            backend = fail.wrap(container)
            while not backend.failed:
                with fail.expected():
                    backend.unmap_all()


# ---- strategies

RANGES = [IovaRange(1, 0x1FFF), IovaRange(0x5000, 0x5FFE), IovaRange(0x100000, (1 << 64) - 1)]


@given(page_ranges(RANGES), st.sampled_from(RANGES))
def test_page_ranges_lie_in_the_ranges(drawn, _):
    iova, size = drawn
    assert size > 0 and not (iova | size) % PAGE
    assert any(start <= iova and iova + size - 1 <= last for start, last in RANGES)


@given(mappings(vaddr=0x70000, size=5 * PAGE))
def test_mappings_lie_in_the_memory(mapping):
    assert mapping.vaddr >= 0x70000 and mapping.vaddr + mapping.size <= 0x75000
    assert mapping.prot in (Prot.READ, Prot.WRITE, Prot.RW)


@given(prots())
def test_rights_are_never_none(prot):
    assert prot


# ---- the suite

class Forgetful:
    """A backend that breaks a rule: says how in ``rule``."""

    def __init__(self, container, rule):
        self.inner, self.rule = container, rule

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def map_dma(self, iova, vaddr, size, prot):
        if self.rule == "overlap" and size == PAGE:
            try:
                self.inner.map_dma(iova, vaddr, size, prot)
            except FileExistsError:
                return
        elif self.rule == "untyped":
            try:
                self.inner.map_dma(iova, vaddr, size, prot)
            except VfioError as exc:
                raise VfioError(exc.errno, operation=exc.operation, iova=exc.iova, size=exc.size) from None
        else:
            self.inner.map_dma(iova, vaddr, size, prot)

    def unmap_dma(self, iova, size):
        removed = self.inner.unmap_dma(iova, size)
        return 0 if self.rule == "uncounted" else removed


@pytest.mark.parametrize("rule", ["overlap", "untyped", "uncounted"])
def test_the_rig_finds_a_broken_rule(container, rule):
    rig = Rig(Forgetful(container, rule))
    rig.map(0, 4)
    with pytest.raises(AssertionError):
        rig.check()
        rig.unmap(0, 4)
    rig.close()


@pytest.mark.parametrize(("name", "library"), [("BackendConformance", "pytest"), ("page_ranges", "hypothesis")])
def test_a_missing_library_is_told_with_the_extra(name, library):
    code = f"import sys; sys.modules[{library!r}] = None\nfrom vfiodma.testing import {name}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MissingExtraError" in ended.stderr and "vfiodma[testing]" in ended.stderr
