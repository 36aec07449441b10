"""Whatever is written when, the destination holds what the source held when it stopped."""
import contextlib
import socket

from hypothesis import given
from hypothesis import strategies as st
from migration_doubles import PGSIZE, Hooked, LogTracker, Machine, Peer, content_of, guest

from vfiodma.migration import PrecopySource
from vfiodma.migration.layout import MemoryLayout
from vfiodma.migration.ledger import Ledger

PAGES = (16, 8)     # of each region: neither is a multiple of 64, so that blocks begin inside no word
PAGE = st.integers(0, sum(PAGES) - 1)
#: Before a frame is sent: (page, first byte in it, length, value); value 0 makes pages zero again.
WRITE = st.tuples(PAGE, st.integers(0, PGSIZE - 1), st.integers(1, 3 * PGSIZE), st.sampled_from([0, 0, 1, 7, 255]))
WRITES = st.lists(WRITE, min_size=1, max_size=6)
#: By the number of the frame, and what devices still write while they are being stopped.
SCHEDULE = st.tuples(st.dictionaries(st.integers(0, 25), WRITES, max_size=12), WRITES | st.just([]))
FILL = st.lists(st.sampled_from([0, 0, 3, 200]), min_size=sum(PAGES), max_size=sum(PAGES))


@given(FILL, SCHEDULE, st.integers(1, 5), st.booleans())
def test_the_image_equals_the_source_for_any_interleaving_of_writes_and_rounds(fill, schedule, rounds, fresh):
    pages = [bytes([value]) * PGSIZE for value in fill]
    start = [b"".join(pages[:PAGES[0]]), b"".join(pages[PAGES[0]:])]
    by_frame, at_stop = schedule
    here, there = socket.socketpair()
    stale = b"\0" if fresh else b"\xee"
    with guest(start) as memory, guest([stale * len(region) for region in start]) as target:
        with MemoryLayout(memory, PGSIZE) as layout:
            tracker = LogTracker(layout)

            def write(writes):
                """Write as devices do: bytes first, then the mark."""
                for page, first, length, value in writes:
                    block = layout.blocks[page >= PAGES[0]]
                    at = (page - (PAGES[0] if block.number else 0)) * PGSIZE + first
                    length = min(length, block.npages * PGSIZE - at)
                    memory.write(block.gpa + at, bytes([value]) * length)
                    low, last = at // PGSIZE, (at + length - 1) // PGSIZE
                    tracker.log.mark(block.first_bit + low, last - low + 1)

            class Writers(Machine):
                def stop(self):
                    write(at_stop)
                    super().stop()

            machine = Writers()

            def dma(frame):
                """In the middle of a frame's way out."""
                if "stop" not in machine.calls:
                    write(by_frame.get(frame, ()))

            peer = Peer(there, target, verify=True, fresh=fresh)
            with contextlib.closing(Hooked(here, dma)) as transport:
                source = PrecopySource(transport, downtime_limit=1e-9, max_rounds=rounds)
                source.introduce(memory, PGSIZE)
                result = source.migrate(layout, tracker, machine)
                digests = source.verify(layout)
                source.release()
            peer.join()
            assert peer.failure is None and peer.receiver.complete
            assert len(set(digests)) == 1
            assert content_of(memory) == content_of(target)
            assert len(result.rounds) == rounds + 1 and result.rounds[-1].final and not result.converged
            assert not source.ledger.pending.any() and not source.ledger.in_flight.any()


@given(st.sets(st.integers(0, 199)), st.sets(st.integers(0, 199)), st.booleans())
def test_an_epoch_in_flight_and_what_is_dirtied_meanwhile_do_not_mix(sent, dirtied, acknowledged):
    ledger = Ledger(200, 4096)
    for page in sent:
        ledger.pending.set(page, 1)
    assert ledger.take().count() == len(sent) and not ledger.pending.any()
    for page in dirtied:
        ledger.pending.set(page, 1)
    if acknowledged:
        ledger.retire()
    else:
        ledger.put_back()
    assert not ledger.in_flight.any()
    assert {page for page in range(200) if ledger.pending.test(page)} == dirtied | (set() if acknowledged else sent)
