"""Each of one, two or three lines is cut at a byte, the others are not: the stream goes on, or never began.

By default at every frame boundary, one byte before and after it, and every 41 bytes; by VFIODMA_PROFILE=deep at every
byte.
The guest has states, pages of zeros, pages that become zero, and pages that can be compressed.
"""
import os

import pytest
from migration_doubles import PGSIZE, LogTracker, Machine, content_of, each_round, guest
from resuming_line import Line

from vfiodma.errors import MigrationError, VfioError
from vfiodma.migration import PrecopySource, sender
from vfiodma.migration.events import Broken, Resumed
from vfiodma.migration.handover import SourceState
from vfiodma.migration.layout import MemoryLayout
from vfiodma.migration.stream import Phase

STEP = 1 if os.environ.get("VFIODMA_PROFILE") == "deep" else 41
RANDOM = bytes((7 * at * at + at // 3) % 251 for at in range(2048))
CONTENT = [bytes(512) + b"a" * 2560 + RANDOM[:512] + bytes(512), RANDOM + b"b" * 2048]
ROUNDS = 2
WAYS = [{}, {"compression": "zstd"}, {"channels": 2}, {"channels": 3, "compression": "lz4"}]


def run(way, which=0, at=None):
    """Migrate while the ``which``-th line is cut after ``at`` bytes; return what moved, what broke, and the lines."""
    channels = way.get("channels", 1)
    machine, events, states, began = Machine({"device": b"state"}), [], {}, False
    with guest(CONTENT) as memory, guest([b"\xee" * 4096] * 2) as target, MemoryLayout(memory, PGSIZE) as layout:
        line = Line(target, [None] * which + [at], on_state=states.__setitem__)
        tracker = LogTracker(layout)

        def write(done):
            if not done.final:
                for page, data in ((0, bytes([done.epoch + 1]) * PGSIZE), (3, bytes(PGSIZE))):
                    memory.write(page * PGSIZE, data)
                    tracker.log.mark(page)

        def on_event(event):
            events.append(event)
            each_round(write)(event)

        try:
            with PrecopySource(line.connect(), downtime_limit=1e-9, max_rounds=ROUNDS, connect=line.connect,
                               reconnect_timeout=10, on_event=on_event, **way) as source:
                try:
                    source.introduce(memory, PGSIZE)
                    began = True
                except MigrationError:      # there is no stream that could go on
                    assert source.handover.may_run and len(line.opened) <= channels
                else:
                    source.migrate(layout, tracker, machine, {"iovas": b"mappings"})
                    source.release()
        finally:
            line.close()
        broken = sum(isinstance(event, Broken) for event in events)
        phase = line.receiver.handover.phase
        if began:
            assert source.handover.state is SourceState.GIVEN and phase is Phase.OWNER and line.runs == 1
            assert content_of(memory) == content_of(target)
            assert states == {"iovas": b"mappings", "device": b"state"}
            assert machine.calls.count("stop") == machine.calls.count("resume") + 1
            assert broken == sum(isinstance(event, Resumed) for event in events) <= 1
        else:
            assert phase is not Phase.OWNER and isinstance(line.failure, VfioError) and not machine.calls
        return began, broken, line.opened


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_line_cut_at_any_byte_costs_an_epoch_at_most(way, monkeypatch):
    monkeypatch.setattr(sender, "_STAGE_BYTES", 4 * PGSIZE)     # more frames
    began, broken, lines = run(way)
    assert began and not broken and len(lines) == way.get("channels", 1)
    cases = resumed = refused = boundaries = 0
    for which, line in enumerate(lines):
        ends = {0, *line.ends}
        boundaries += len(ends)
        places = sorted({*range(0, line.moved, STEP), *ends, *(end + 1 for end in ends), *(end - 1 for end in ends)})
        for at in places:
            if 0 <= at < line.moved:
                began, broken, _ = run(way, which, at)
                cases += 1
                resumed += broken
                refused += not began
    print(f"{way}: {sum(line.moved for line in lines)} bytes, {boundaries} boundaries, {cases} cuts: "
          f"resumed {resumed}, before the stream began {refused}")
    assert cases >= 2 * boundaries and resumed and refused
