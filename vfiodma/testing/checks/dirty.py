"""The feature "dirty": the backend's own bitmap of pages that were written."""
import errno
from typing import Any

import numpy as np
import pytest

from ...errors import VfioError
from ...types import Prot
from ..rig import Rig
from .base import Checks, needs


def read_pages(rig: Rig, page: int, npages: int) -> set[int]:
    """Read and clear the dirty bits of pages; return those of mapped pages that are set.

    What a word has beside the bits of a mapping means nothing: Linux stores leftovers there.  A word without any stays.
    """
    words = np.zeros((npages + 63) // 64, np.uint64)
    rig.backend.read_dirty(rig.at(page), npages * rig.pgsize, words)
    for n, word in enumerate(words.tolist()):
        pages = range(page + 64 * n, page + 64 * (n + 1))
        assert not word or any(rig.is_mapped(rig.at(other)) for other in pages), "bits where nothing is mapped"
    return {page + n for n in range(64 * len(words))
            if int(words[n // 64]) >> (n % 64) & 1 and rig.is_mapped(rig.at(page + n))}


class DirtyChecks(Checks):
    """All that was written is dirty; more may be, but nothing that is not mapped."""

    def test_tracking_starts_and_stops_again_and_again(self, rig: Rig) -> None:
        needs(rig, "dirty")
        rig.map(0, 8)
        rig.backend.stop_dirty()
        for _ in range(2):
            rig.backend.start_dirty()
            rig.backend.start_dirty()
            read_pages(rig, 0, 8)
            rig.backend.stop_dirty()
            rig.backend.stop_dirty()
        rig.check()

    def test_words_without_a_mapping_stay_as_they_are(self, rig: Rig) -> None:
        needs(rig, "dirty")
        rig.map(2, 4)
        rig.map(70, 3)
        rig.backend.start_dirty()
        read_pages(rig, 0, 192)
        read_pages(rig, 70, 3)
        assert read_pages(rig, 10, 20) == set()

    def test_mappings_come_and_go_while_tracking(self, rig: Rig) -> None:
        needs(rig, "dirty")
        rig.map(0, 4)
        rig.backend.start_dirty()
        rig.map(8, 4)
        rig.unmap(0, 4)
        read_pages(rig, 0, 64)
        rig.check()

    def test_reading_without_tracking_is_einval(self, rig: Rig) -> None:
        needs(rig, "dirty")
        rig.map(0, 8)
        words = np.zeros(1, np.uint64)
        rig.refused(errno.EINVAL, rig.backend.read_dirty, rig.at(0), 8 * rig.pgsize, words)
        rig.backend.start_dirty()
        rig.backend.stop_dirty()
        rig.refused(errno.EINVAL, rig.backend.read_dirty, rig.at(0), 8 * rig.pgsize, words)

    def test_bad_ranges_and_bitmaps_are_refused(self, rig: Rig) -> None:
        needs(rig, "dirty")
        rig.map(0, 64)
        rig.backend.start_dirty()
        words, codes = np.zeros(1, np.uint64), {errno.EINVAL, errno.EOVERFLOW}
        for iova, size in [(rig.at(0) + 1, rig.pgsize), (rig.at(0), rig.pgsize + 1), (rig.at(0), 0),
                           (rig.at(0), (1 << 64) - rig.pgsize), (-rig.pgsize, rig.pgsize)]:
            rig.refused(codes, rig.backend.read_dirty, iova, size, words)
        rig.refused(codes, rig.backend.read_dirty, rig.at(0), 64 * rig.pgsize, bytearray(7))
        with pytest.raises((TypeError, ValueError, BufferError)):
            rig.backend.read_dirty(rig.at(0), 64 * rig.pgsize, bytes(8))
        assert not words.any()

    def test_what_a_device_writes_is_dirty(self, rig: Rig, dma: Any) -> None:
        needs(rig, "dirty")
        rig.map(0, 16, prot=Prot.RW)
        rig.map(20, 4, prot=Prot.READ)
        rig.backend.start_dirty()
        dma.copy(rig.at(20), rig.at(3), 8)
        first = read_pages(rig, 0, 64)
        dma.copy(rig.at(0), rig.at(8) - 4, 8)           # across a page's end
        second = read_pages(rig, 0, 64)
        third = read_pages(rig, 0, 64)
        rig.backend.stop_dirty()
        assert first >= {3} and second >= {7, 8}
        if self.exact_dirty:
            assert (first, second, third) == ({3}, {7, 8}, set())

    def test_starting_again_does_not_lose_bits(self, rig: Rig, dma: Any) -> None:
        needs(rig, "dirty")
        rig.map(0, 8)
        rig.backend.start_dirty()
        dma.copy(rig.at(0), rig.at(5), 8)
        rig.backend.start_dirty()
        assert 5 in read_pages(rig, 0, 8)

    def test_its_sources_tell_the_same(self, rig: Rig, dma: Any) -> None:
        needs(rig, "dirty")
        if not hasattr(rig.backend, "dirty_sources"):
            pytest.skip("this backend names no sources")
        rig.map(0, 16)
        sources = rig.backend.dirty_sources()
        assert sources
        for source in sources:
            source.start([(rig.at(0), 16 * rig.pgsize)], rig.pgsize)
        dma.copy(rig.at(0), rig.at(9), 8)
        words = np.zeros(1, np.uint64)
        count = sum(source.harvest(rig.at(0), 16 * rig.pgsize, words) for source in sources)
        assert int(words[0]) >> 9 & 1 and count >= 1
        for source in sources:
            source.stop()

    def test_tracking_is_refused_without_the_feature(self, rig: Rig) -> None:
        if "dirty" in rig.features:
            pytest.skip("this backend has it")
        if hasattr(rig.backend, "start_dirty"):
            with pytest.raises(VfioError):
                rig.backend.start_dirty()
