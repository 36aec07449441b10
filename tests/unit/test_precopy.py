"""What the engine does with a policy: throttle, time-out, ramp; what it tells; what it refuses."""
import contextlib
import errno
import socket

import pytest
from migration_doubles import PGSIZE, LogTracker, Machine, Peer, guest

from vfiodma.errors import HandoverError, InvalidArgumentError, MigrationError, VfioError
from vfiodma.migration import PrecopySource
from vfiodma.migration.convergence import Forecast, Policy
from vfiodma.migration.events import Broken, Progress, Resumed, Round, Stage, Throttled, summary
from vfiodma.migration.handover import Journal
from vfiodma.migration.layout import MemoryLayout
from vfiodma.migration.stream import Hello, encode_hello

CONTENT = [b"\x5a" * (64 << 10)]


class Busy(LogTracker):
    """All memory is written in every interval."""

    def harvest(self, into):
        self.log.mark(0, self.pages)
        return super().harvest(into)


@contextlib.contextmanager
def session(tracker=LogTracker, **options):
    """Yield (source, layout, tracker, machine, events), introduced to a destination."""
    here, there = socket.socketpair()
    events = []
    with guest(CONTENT) as memory, guest([bytes(64 << 10)]) as target, MemoryLayout(memory, PGSIZE) as layout:
        from vfiodma.migration import SocketTransport
        peer = Peer(there, target)
        with contextlib.closing(SocketTransport(here, 10)) as transport:
            source = PrecopySource(transport, on_event=events.append, **options)
            source.introduce(memory, PGSIZE)
            tracker = tracker(layout)
            tracker.pages = len(CONTENT[0]) // PGSIZE
            yield source, layout, tracker, Machine(), events
        peer.join()


def test_a_guest_that_writes_too_fast_is_throttled_step_by_step_and_let_go_at_the_end():
    told = []
    policy = Policy(1e-6, max_rounds=8, throttle_max=0.5, throttle_share=0.1)
    with session(Busy, policy=policy, throttle=told.append) as (source, layout, tracker, machine, events):
        result = source.migrate(layout, tracker, machine)
    assert len(told) > 1 and told[-1] == 0.0 and max(told) <= 0.5
    assert told[:-1] == sorted(told[:-1])
    assert [event.share for event in events if isinstance(event, Throttled)] == told
    assert not result.converged


def test_without_permission_nobody_is_throttled():
    told = []
    policy = Policy(1e-6, max_rounds=8)
    with session(Busy, policy=policy, throttle=told.append) as (source, layout, tracker, machine, _):
        source.migrate(layout, tracker, machine)
    assert told == []


def test_when_the_time_is_over_the_policy_says_who_keeps_the_guest():
    policy = Policy(1e-6, max_rounds=1000, timeout=0.05, on_timeout="cancel")
    with session(Busy, policy=policy) as (source, layout, tracker, machine, _):
        with pytest.raises(MigrationError) as caught:
            source.migrate(layout, tracker, machine)
        assert caught.value.errno == errno.ETIME and "runs on here" in str(caught.value)
        assert "stop" not in machine.calls and source.handover.may_run and tracker.stopped
        assert source.ledger.pending.count() == tracker.pages
    policy = Policy(1e-6, max_rounds=1000, timeout=0.05, on_timeout="force")
    with session(Busy, policy=policy) as (source, layout, tracker, machine, _):
        result = source.migrate(layout, tracker, machine)
        assert not result.converged and machine.calls == ["stop", "state"]


def test_a_limit_that_is_out_of_reach_rises_with_the_ramp():
    policy = Policy(1e-6, max_rounds=60, downtime_max=10.0, ramp_rounds=1, ramp_steps=4)
    with session(Busy, policy=policy) as (source, layout, tracker, machine, events):
        result = source.migrate(layout, tracker, machine)
    limits = [event.limit for event in events if isinstance(event, Round) and not event.final]
    assert limits == sorted(limits) and limits[0] < limits[-1]
    assert result.converged and result.limit == limits[-1] and len(result.rounds) < 61


def test_after_the_first_round_it_says_whether_it_will_converge():
    with session(Busy, policy=Policy(1e-6, max_rounds=3)) as (source, layout, tracker, machine, events):
        source.migrate(layout, tracker, machine)
    forecast, = [event for event in events if isinstance(event, Forecast)]
    assert not forecast.converges and str(forecast).startswith("will not converge")
    assert [event.name for event in events if isinstance(event, Stage)] == ["introduce", "rounds", "prepare", "stopped",
                                                                          "moved"]


def test_a_result_tells_where_the_downtime_went_and_what_was_predicted():
    with session() as (source, layout, tracker, machine, events):
        result = source.migrate(layout, tracker, machine)
    assert result.breakdown.total == pytest.approx(result.downtime, rel=0.05)
    assert result.band[0] <= result.predicted_downtime <= result.band[1]
    assert result.converged and all(done.reason for done in result.rounds[:-1])


def test_events_can_be_told_as_json():
    import json
    with session() as (source, layout, tracker, machine, events):
        result = source.migrate(layout, tracker, machine)
    kinds = set()
    for event in [*events, result, Broken(MigrationError(errno.EPROTO, operation="x")), Resumed(3, 1), Throttled(0.2)]:
        told = json.loads(json.dumps(summary(event)))
        kinds.add(told["event"])
    assert kinds == {"stage", "progress", "round", "forecast", "migrationresult", "broken", "resumed", "throttled"}
    assert any(isinstance(event, Progress) for event in events)


@pytest.mark.parametrize("options", [{"downtime_limit": 0}, {"max_rounds": 0}, {"reconnect_timeout": -1},
                                     {"channels": 0}, {"channels": 2}, {"channels": 65, "connect": print},
                                     {"bandwidth_limit": 0}, {"bandwidth_limit": -5}, {"compression": "rar"},
                                     {"checksum": "md5"}])
def test_options_that_can_not_be_are_refused(options):
    with pytest.raises(InvalidArgumentError):
        PrecopySource(None, **options)


def test_a_source_migrates_once_and_what_was_introduced():
    with session() as (source, layout, tracker, machine, _):
        source.migrate(layout, tracker, machine)
        with pytest.raises(InvalidArgumentError, match="migrates once"):
            source.migrate(layout, tracker, machine)
        with pytest.raises(InvalidArgumentError, match="no doubt"):
            source.settle()


@pytest.mark.parametrize("stage", ["moved", "release"])
def test_an_event_that_raises_when_all_is_there_keeps_the_guest(stage):
    with session() as (source, layout, tracker, machine, _):
        def on_event(event):
            if isinstance(event, Stage) and event.name == stage:
                raise KeyError(stage)

        source._on_event = on_event
        with pytest.raises(KeyError):
            source.migrate(layout, tracker, machine)
            source.release()
        assert machine.calls == ["stop", "state", "resume"] and source.handover.may_run


def test_a_tracker_that_does_not_stop_keeps_the_guest():
    class Stuck(LogTracker):
        def stop(self):
            raise VfioError(errno.EIO, operation="stop_dirty")

    with session(Stuck) as (source, layout, tracker, machine, _):
        with pytest.raises(VfioError, match="stop_dirty"):
            source.migrate(layout, tracker, machine)
        assert machine.calls == ["stop", "state", "resume"] and source.handover.may_run


def test_the_guest_does_not_wait_for_a_destination_that_is_told_to_give_it_up():
    with session() as (source, layout, tracker, machine, _):
        source.migrate(layout, tracker, machine)
        told = []
        source._tell_abort = lambda: told.append(list(machine.calls))
        source.abort()
        assert told == [["stop", "state", "resume"]]


def test_a_cancel_after_the_guest_was_given_does_not_hurry_the_questions():
    attempts = []

    def connect():
        attempts.append(1)
        raise MigrationError(errno.ECONNREFUSED, operation="connect")

    with session(connect=connect, reconnect_timeout=0.3) as (source, layout, tracker, machine, _):
        source.migrate(layout, tracker, machine)
        source.cancel()
        source._channel.close()
        with pytest.raises(HandoverError):
            source.release()
    assert 0 < len(attempts) < 6


def test_a_journal_that_makes_no_sense_is_refused(tmp_path):
    hello = encode_hello(Hello(PGSIZE, bytes(16), ((0, 4096),))).hex()
    for record in ({"hello": hello, "stream": "00" * 16, "state": "none"}, {"hello": hello}, {"state": "given"}):
        journal = Journal(tmp_path / "journal")
        journal.write(**record)
        with pytest.raises(VfioError, match="no record of a source"):
            PrecopySource(None, journal=journal)
