"""Hypothesis strategies: ranges of pages, mappings and rights."""
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from ..types import IovaRange, Mapping, Prot

_EVERYWHERE = (IovaRange(0, (1 << 64) - 1),)


def prots() -> st.SearchStrategy[Prot]:
    """Return a strategy of what a device may be allowed: READ, WRITE, RW."""
    return st.sampled_from([Prot.READ, Prot.WRITE, Prot.RW])


@st.composite
def page_ranges(draw: Any, ranges: Sequence[tuple[int, int]] = (), *, pgsize: int = 4096,
                max_pages: int = 64) -> tuple[int, int]:
    """Draw an (iova, size) of whole pages.

    Parameters
    ----------
    ranges : sequence of (start, last)
        It lies in one of these, as ``Backend.iova_ranges()`` returns them; empty = anywhere below 2**64.
    pgsize : int
        Bytes.
    max_pages : int

    Returns
    -------
    (int, int)
        Their starts and ends are drawn more often than by chance.
    """
    pages = [(-(-start // pgsize), (last + 1) // pgsize - 1) for start, last in ranges or _EVERYWHERE]
    first, last = draw(st.sampled_from([(first, last) for first, last in pages if first <= last]))
    npages = draw(st.integers(1, min(max_pages, last - first + 1)))
    place = draw(st.one_of(st.just(first), st.just(last - npages + 1), st.integers(first, last - npages + 1)))
    return place * pgsize, npages * pgsize


@st.composite
def mappings(draw: Any, ranges: Sequence[tuple[int, int]] = (), *, vaddr: int = 0, size: int | None = None,
             pgsize: int = 4096, max_pages: int = 64) -> Mapping:
    """Draw a Mapping: of an iova in ``ranges`` to memory in ``[vaddr, vaddr + size)`` (None: to any address).

    The memory must have at least one page, and begin at one.
    """
    if size is not None:
        max_pages = min(max_pages, size // pgsize)
    iova, length = draw(page_ranges(ranges, pgsize=pgsize, max_pages=max_pages))
    room = ((1 << 47) if size is None else size) - length
    return Mapping(iova, vaddr + draw(st.integers(0, room // pgsize)) * pgsize, length, draw(prots()))
