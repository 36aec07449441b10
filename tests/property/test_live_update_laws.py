"""Whatever is mapped, in whatever memory: after a hand-over each iova leads to the byte that it led to before."""
import contextlib
import mmap
import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_container import SharedContainer

from vfiodma import GuestMemory, IoAddressSpace, Prot
from vfiodma.errors import MigrationError, VfioError
from vfiodma.liveupdate import UpdateOffer, UpdateTaker

PAGE = mmap.PAGESIZE
# A region: its size and the gap before it, in pages.
REGIONS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=5)
# A mapping: gap before it, region, offset, size (all reduced to what is possible), permission.
MAPPINGS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 9), st.integers(1, 9),
                              st.sampled_from([1, 2, 3])), max_size=12)


@contextlib.contextmanager
def guest(regions, mappings):
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(GuestMemory())
        gpa = number = 0
        for pages, gap in regions:
            gpa += gap * PAGE
            memory.add(GuestMemory.memfd(pages * PAGE).region, gpa)
            for at in range(pages):
                memory.write(gpa + at * PAGE, number.to_bytes(8, "little"))
                number += 1
            gpa += pages * PAGE
        container = SharedContainer()
        stack.callback(container.let_go)
        ioas, iova = stack.enter_context(IoAddressSpace(container)), 0
        for gap, region, offset, size, prot in mappings:
            chosen = memory.regions[region % len(memory)]
            offset %= chosen.size // PAGE
            size = min(size, chosen.size // PAGE - offset)
            iova += gap * PAGE
            ioas.map(chosen, iova, prot=prot, offset=offset * PAGE, size=size * PAGE)
            iova += size * PAGE
        yield ioas, memory, container


def image(ioas, memory):
    """What each page of each mapping holds, and how it may be used."""
    pages = []
    for mapping in ioas.mappings():
        for at in range(0, mapping.size, PAGE):
            vaddr = ioas.translate(mapping.iova + at)
            region = next(region for region in memory.regions if region.vaddr <= vaddr <= region.last)
            with region.view() as view:
                offset = vaddr - region.vaddr
                pages.append((mapping.iova + at, mapping.prot, bytes(view[offset:offset + 8])))
    return pages


@given(REGIONS, MAPPINGS, st.binary(max_size=20))
@settings(max_examples=60)
def test_every_iova_leads_to_the_same_byte_in_the_new_process(regions, mappings, state):
    one, other = socket.socketpair()
    with one, other, guest(regions, mappings) as (ioas, memory, container):
        before, rows = image(ioas, memory), len(ioas)
        taken = []
        taker = UpdateTaker(other, adopt=SharedContainer.adopt)
        thread = threading.Thread(target=lambda: taken.append(taker.take_over()))
        thread.start()
        times = UpdateOffer(one, ioas, memory, freeze=lambda: state).hand_over()
        thread.join()
        with taken[0] as new:
            assert times.mappings == rows == len(new.ioas) and new.state == state
            assert image(new.ioas, new.memory) == before
            assert new.ioas.allocator.stats().used == sum(mapping.size for mapping in new.ioas)
            for row, mapping in zip(sorted(new.ioas.backend.rows()), new.ioas.mappings(), strict=True):
                assert row[:3] == [mapping.iova, mapping.vaddr, mapping.size] and row[4]
            # It is an address space like any other.
            free = new.ioas.map(new.memory.regions[0], prot=Prot.RW)
            new.ioas.unmap(free.iova)
            if rows:
                new.ioas.invalidate_vaddr()
                new.ioas.update_vaddr_many([mapping[:3] for mapping in new.ioas.mappings()])


@given(REGIONS, MAPPINGS.filter(bool), st.integers(0, 11))
@settings(max_examples=60)
def test_a_new_process_that_fails_at_a_mapping_leaves_the_old_one_as_it_was(regions, mappings, fail_at):
    one, other = socket.socketpair()
    with one, other, guest(regions, mappings) as (ioas, memory, container):
        before, rows = image(ioas, memory), sorted(container.rows())

        class Failing(SharedContainer):
            def update_vaddr(self, iova, vaddr, size):
                if iova == before_iova:
                    raise VfioError(12, operation="update_vaddr")
                super().update_vaddr(iova, vaddr, size)

        before_iova = rows[fail_at % len(rows)][0]
        failure = []

        def take():
            try:
                UpdateTaker(other, adopt=Failing.adopt).take_over()
            except VfioError as exc:
                failure.append(exc.errno)

        thread = threading.Thread(target=take)
        thread.start()
        with pytest.raises(MigrationError, match="refuses"):
            UpdateOffer(one, ioas, memory).hand_over()
        thread.join()
        assert failure == [12]
        assert image(ioas, memory) == before and sorted(container.rows()) == rows
