"""A connection breaks anywhere, once or again and again: the stream goes on, and exactly one side gets the guest."""
import contextlib
import errno
import os
import random
import threading

import pytest
from migration_doubles import PGSIZE, LogTracker, Machine, content_of, each_round, guest
from resuming_line import Line

from vfiodma.errors import HandoverError, MigrationError, VfioError
from vfiodma.migration import PrecopySource
from vfiodma.migration.events import Broken, Resumed, Stage
from vfiodma.migration.handover import Journal, SourceState
from vfiodma.migration.layout import MemoryLayout
from vfiodma.migration.stream import Kind, Phase

CONTENT = [bytes(512) + b"a" * 3072 + bytes(512), b"b" * 4096]
ROUNDS = 3


def migrate(line, memory, machine, events, journal=None):
    with MemoryLayout(memory, PGSIZE) as layout:
        tracker = LogTracker(layout)
        written = iter(range(1, 200))

        def write(_=None):
            memory.write(0, bytes([next(written)]) * PGSIZE)
            tracker.log.mark(0)

        def on_event(event):
            events.append(event)
            each_round(lambda done: done.final or write())(event)
            if isinstance(event, Broken) and "resume" in machine.calls:
                write()         # the guest runs on after a failed switch-over

        with PrecopySource(line.connect(), downtime_limit=1e-9, max_rounds=ROUNDS, connect=line.connect,
                           reconnect_timeout=10, on_event=on_event, journal=journal) as source:
            for _ in range(50):
                try:
                    source.introduce(memory, PGSIZE)
                    break
                except MigrationError:      # before the stream there is nothing to resume
                    with contextlib.suppress(MigrationError):
                        source._connected(line.connect())
            source.migrate(layout, tracker, machine)
            source.release()
            return source


def run(cuts):
    """Migrate with a cut of each connection after so many bytes; return the bytes that went through in all."""
    machine, events = Machine(), []
    with guest(CONTENT) as memory, guest([bytes(4096), bytes(4096)]) as target:
        line = Line(target, cuts)
        try:
            source = migrate(line, memory, machine, events)
        finally:
            line.close()
        assert source.handover.state is SourceState.GIVEN and not source.handover.may_run
        assert line.receiver.handover.phase is Phase.OWNER and line.runs == 1
        assert content_of(memory) == content_of(target)
        assert machine.calls.count("stop") == machine.calls.count("resume") + 1
        assert machine.calls[-1] in ("stop", "state")
        broken = [event for event in events if isinstance(event, Broken)]
        assert len(broken) == len([event for event in events if isinstance(event, Resumed)])
        assert [event.name for event in events if isinstance(event, Stage)].count("given") == 1
        return sum(transport.moved for transport in line.opened), len(broken)


def test_a_line_cut_at_any_byte_resumes_and_one_side_gets_the_guest():
    total, breaks = run([])
    assert not breaks and total > 8192
    hello = 44 + 56 + 32 + 44 + 32          # up to READY another stream begins instead
    step = 37
    assert not any(run([at])[1] for at in range(1, hello - 32, 5))
    resumed = sum(run([at])[1] for at in range(hello + 1, total, step))
    print(f"{total} bytes, cut every {step}: resumed {resumed} times")
    assert resumed > total // step * 0.8


@pytest.mark.parametrize("seed", range(20))
def test_a_line_cut_again_and_again_still_gets_there(seed):
    rng = random.Random(seed)
    print("seed", seed)
    cuts = [rng.randrange(200, 6000) for _ in range(rng.randrange(2, 12))]
    run(cuts)


def test_without_an_answer_to_run_the_source_stays_in_doubt_and_still_until_it_has_asked():
    """The line is cut just after RUN, and nothing reaches the destination for a while."""
    machine, events = Machine(), []
    with guest(CONTENT) as memory, guest([bytes(4096), bytes(4096)]) as target, MemoryLayout(memory, PGSIZE) as layout:
        line = Line(target, [])
        try:
            transport = line.connect()
            source = PrecopySource(transport, downtime_limit=1e-9, max_rounds=1, on_event=events.append)
            source.introduce(memory, PGSIZE)
            source.migrate(layout, LogTracker(layout), machine)
            transport.left = transport.moved + 44       # RUN leaves, the answer does not arrive
            with pytest.raises(HandoverError) as caught:
                source.release()
            assert caught.value.errno == errno.EINPROGRESS and "settle()" in str(caught.value)
            assert source.handover.state is SourceState.COMMITTING and not source.handover.may_run
            assert "resume" not in machine.calls
            with pytest.raises(VfioError):
                source.abort()
            source.settle(line.connect())
            assert source.handover.state is SourceState.GIVEN and "resume" not in machine.calls
            with pytest.raises(VfioError, match="no doubt"):
                source.settle(line.connect())
        finally:
            line.close()
        assert line.receiver.handover.phase is Phase.OWNER


def test_a_guest_that_the_destination_gave_up_runs_on_at_the_source():
    machine = Machine()
    with guest(CONTENT) as memory, guest([bytes(4096), bytes(4096)]) as target, MemoryLayout(memory, PGSIZE) as layout:
        line = Line(target, [])
        try:
            source = PrecopySource(line.connect(), downtime_limit=1e-9, max_rounds=1)
            source.introduce(memory, PGSIZE)
            source.migrate(layout, LogTracker(layout), machine)
            assert line.receiver.handover.abort() is Phase.ABORTED
            with pytest.raises(MigrationError) as caught:
                source.release()
            assert caught.value.errno == errno.ECANCELED and not isinstance(caught.value, HandoverError)
            assert source.handover.state is SourceState.KEPT and machine.calls[-1] == "resume"
        finally:
            line.close()
        assert line.receiver.handover.phase is Phase.ABORTED and line.runs == 0


def test_a_source_that_keeps_the_guest_says_so():
    machine = Machine()
    with guest(CONTENT) as memory, guest([bytes(4096), bytes(4096)]) as target, MemoryLayout(memory, PGSIZE) as layout:
        line = Line(target, [])
        try:
            source = PrecopySource(line.connect(), downtime_limit=1e-9, max_rounds=1)
            source.introduce(memory, PGSIZE)
            source.migrate(layout, LogTracker(layout), machine)
            source.abort()
            assert source.handover.may_run and machine.calls[-1] == "resume"
        finally:
            line.close()
        assert line.receiver.handover.phase is Phase.ABORTED


@pytest.mark.parametrize("when", ["acknowledging", "verifying"])
def test_a_destination_that_gives_up_between_two_answers_still_tells_the_source(when):
    machine = Machine()
    with guest(CONTENT) as memory, guest([bytes(4096), bytes(4096)]) as target, MemoryLayout(memory, PGSIZE) as layout:
        line = Line(target, [])
        try:
            source = PrecopySource(line.connect(), downtime_limit=1e-9, max_rounds=1)
            source.introduce(memory, PGSIZE)
            receiver = line.receiver
            send, given_up = receiver._channel.send, Kind.ACK if when == "acknowledging" else Kind.DIGEST

            def give_up(kind, *parts, **options):
                if kind is given_up and receiver.handover.phase is Phase.COMPLETE:
                    receiver.handover.abort()
                send(kind, *parts, **options)

            receiver._channel.send = give_up
            source.migrate(layout, LogTracker(layout), machine)
            if when == "verifying":
                source.verify(layout)
            with pytest.raises(MigrationError) as caught:
                source.release()
            assert caught.value.errno == errno.ECANCELED and not isinstance(caught.value, HandoverError)
            assert source.handover.state is SourceState.KEPT and machine.calls[-1] == "resume"
        finally:
            line.close()
        assert line.receiver.handover.phase is Phase.ABORTED and line.runs == 0


def test_a_cancelled_migration_leaves_the_guest_running_and_the_destination_knows():
    machine, events = Machine(), []
    with guest(CONTENT) as memory, guest([bytes(4096), bytes(4096)]) as target, MemoryLayout(memory, PGSIZE) as layout:
        line = Line(target, [])
        try:
            def on_event(event):
                events.append(event)
                if isinstance(event, Stage) and event.name == "prepare":
                    source.cancel()

            source = PrecopySource(line.connect(), downtime_limit=1e-9, max_rounds=5, on_event=on_event)
            source.introduce(memory, PGSIZE)
            tracker = LogTracker(layout)
            tracker.log.mark(3)
            with pytest.raises(MigrationError) as caught:
                source.migrate(layout, tracker, machine)
            assert caught.value.errno == errno.ECANCELED
            assert source.handover.may_run and "stop" not in machine.calls and tracker.stopped
            assert source.ledger.pending.test(3)
        finally:
            line.close()
        assert line.receiver.handover.phase is Phase.ABORTED


def test_a_paused_migration_keeps_its_line_alive_and_goes_on():
    machine = Machine()
    with guest(CONTENT) as memory, guest([bytes(4096), bytes(4096)]) as target, MemoryLayout(memory, PGSIZE) as layout:
        line = Line(target, [])
        try:
            def on_event(event):
                if isinstance(event, Stage) and event.name == "rounds":
                    source.pause()
                    threading.Timer(2.5, source.unpause).start()

            source = PrecopySource(line.connect(), downtime_limit=1e-9, max_rounds=2, on_event=on_event)
            source.introduce(memory, PGSIZE)
            source.migrate(layout, LogTracker(layout), machine)
            source.release()
        finally:
            line.close()
        assert line.runs == 1 and content_of(memory) == content_of(target)


def test_a_restarted_destination_knows_what_became_of_the_guest(tmp_path):
    machine = Machine()
    path = tmp_path / "journal"
    with guest(CONTENT) as memory, guest([bytes(4096), bytes(4096)]) as target, MemoryLayout(memory, PGSIZE) as layout:
        line = Line(target, [], journal=Journal(path))
        try:
            transport = line.connect()
            source = PrecopySource(transport, downtime_limit=1e-9, max_rounds=1,
                                   journal=Journal(tmp_path / "source"))
            source.introduce(memory, PGSIZE)
            source.migrate(layout, LogTracker(layout), machine)
            transport.left = transport.moved + 44
            with pytest.raises(HandoverError):
                source.release()
        finally:
            line.close()
        # Both processes come back, with nothing but what they wrote down.
        assert Journal(tmp_path / "source").read()["state"] == "committing"
        again = Line(target, [], journal=Journal(path))
        try:
            source.settle(again.connect())
        finally:
            again.close()
        assert source.handover.state is SourceState.GIVEN
        assert Journal(path).read()["phase"] == "OWNER"
        assert Journal(tmp_path / "source").read()["state"] == "given"


def test_a_stranger_can_not_go_on_with_a_stream():
    machine = Machine()
    with guest(CONTENT) as memory, guest([bytes(4096), bytes(4096)]) as target, MemoryLayout(memory, PGSIZE) as layout:
        line = Line(target, [])
        try:
            source = PrecopySource(line.connect(), downtime_limit=1e-9, max_rounds=1)
            source.introduce(memory, PGSIZE)
            source.migrate(layout, LogTracker(layout), machine)
            line.opened[0].close()
            for change in ({"token": bytes(16)}, {"stream_id": bytes(16)}, {"resume": False, "epochs": 0}):
                stranger = PrecopySource(line.connect())
                stranger._hello = source._hello._replace(resume=True, **change) if "resume" not in change else \
                    source._hello._replace(**change)
                with pytest.raises(MigrationError, match="another stream"):
                    stranger._greet(stranger._hello)
            source._connected(line.connect())
            assert source._greet(source._hello._replace(resume=True, asks=True)).phase is Phase.COMPLETE
            source.release()
        finally:
            line.close()
        assert line.runs == 1


def test_a_restarted_source_settles_with_what_was_written_down(tmp_path):
    """Nothing but the journal is left of the source: no stream, no token, no guest."""
    machine, journal = Machine(), tmp_path / "source"
    with guest(CONTENT) as memory, guest([bytes(4096), bytes(4096)]) as target, MemoryLayout(memory, PGSIZE) as layout:
        line = Line(target, [])
        try:
            transport = line.connect()
            source = PrecopySource(transport, downtime_limit=1e-9, max_rounds=1, journal=Journal(journal))
            source.introduce(memory, PGSIZE)
            source.migrate(layout, LogTracker(layout), machine)
            transport.left = transport.moved + 10       # not even RUN arrives
            with pytest.raises(HandoverError):
                source.release()
            again = PrecopySource(None, journal=Journal(journal))
            assert again.handover.state is SourceState.COMMITTING and not again.handover.may_run
            with pytest.raises(HandoverError, match="settle"):      # another guest can't take the record's place
                again.introduce(memory, PGSIZE)
            again.settle(line.connect())
            assert again.handover.state is SourceState.GIVEN
        finally:
            line.close()
        assert line.runs == 1 and line.receiver.handover.phase is Phase.OWNER
        assert PrecopySource(None, journal=Journal(journal)).handover.state is SourceState.GIVEN


def test_a_journal_of_something_else_is_refused_by_a_source(tmp_path):
    for record in ({"stream": "ab", "state": "committing"}, {"hello": "zz"}, {"hello": "00"}, {"hello": 7}):
        Journal(tmp_path / "journal").write(**record)
        with pytest.raises(VfioError, match="no record of a source") as caught:
            PrecopySource(None, journal=Journal(tmp_path / "journal"))
        assert caught.value.errno == errno.EBADMSG


def test_a_destination_that_can_not_write_that_it_owns_the_guest_is_asked_again():
    class Full(Journal):
        failed = 0

        def write(self, **record):
            if record["phase"] == "OWNER" and not self.failed:
                self.failed += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().write(**record)

    journal = Full()
    with guest(CONTENT) as memory, guest([bytes(4096), bytes(4096)]) as target, MemoryLayout(memory, PGSIZE) as layout:
        line = Line(target, [], journal=journal)
        try:
            source = PrecopySource(line.connect(), downtime_limit=1e-9, max_rounds=1, connect=line.connect)
            source.introduce(memory, PGSIZE)
            source.migrate(layout, LogTracker(layout), Machine())
            source.release()
        finally:
            line.close()
        assert journal.failed == line.runs == 1 and source.handover.state is SourceState.GIVEN
        assert content_of(memory) == content_of(target)


def test_strangers_do_not_end_the_wait_for_a_source_that_broke_off():
    machine, events = Machine(), []
    with guest(CONTENT) as memory, guest([bytes(4096), bytes(4096)]) as target:
        line = Line(target, [4000], breaks=3)
        connect = line.connect

        def past_strangers():
            for _ in range(12 if len(line.opened) == 1 else 0):
                stranger = connect()
                with contextlib.suppress(MigrationError):
                    stranger.send([b"GET / HTTP/1.0\r\n" * 20])
                stranger.close()
            return connect()

        first = connect()
        try:
            with MemoryLayout(memory, PGSIZE) as layout, PrecopySource(
                    first, downtime_limit=1e-9, max_rounds=1, connect=past_strangers, on_event=events.append) as source:
                source.introduce(memory, PGSIZE)
                source.migrate(layout, LogTracker(layout), machine)
                source.release()
        finally:
            line.close()
        assert any(isinstance(event, Resumed) for event in events)
        assert line.runs == 1 and content_of(memory) == content_of(target)
