"""The hand-over of a guest, explored whole: either side killed at every step, every message lost at every step."""
import collections
import errno
import json
import os

import pytest

from vfiodma.errors import MigrationError, VfioError
from vfiodma.migration.handover import DestinationHandover, Journal, SourceHandover, SourceState
from vfiodma.migration.stream import Phase

STREAM = "s"


class Kept(Journal):
    """A record that outlives the side that wrote it."""

    def __init__(self, record=()):
        super().__init__()
        self._record = dict(record)

    def key(self):
        return tuple(sorted(self._record.items()))


class World:
    """Both sides, what they wrote down, and the messages that are under way.

    ``guest`` of a side is whether its memory and the guest's state are there: a kill ends them.  A connection is one
    message at a time each way, as the protocol asks and answers; a cut loses both.
    """

    def __init__(self, key=None):
        if key is None:
            self.source_journal, self.destination_journal = Kept(), Kept()
            self.source, self.destination = SourceHandover(self.source_journal, STREAM), None
            self.destination = DestinationHandover(self.destination_journal)
            self.destination.begin(STREAM)
            self.source_alive = self.destination_alive = True       # the guest in that side's memory
            self.to_destination = self.to_source = ""
            self.asked = False          # the source asked for the phase, or said RUN or ABORT, and awaits the answer
            self.image_is_now = False   # what the destination has is what the source has
            return
        (source, destination, sj, dj, self.source_alive, self.destination_alive, self.to_destination, self.to_source,
         self.asked, self.image_is_now) = key
        self.source_journal, self.destination_journal = Kept(sj), Kept(dj)
        self.source, self.destination = SourceHandover(Kept(), STREAM), DestinationHandover(Kept())
        self.source.state, self.destination.phase, self.destination.stream = source, destination, STREAM
        self.source._journal, self.destination._journal = self.source_journal, self.destination_journal

    def key(self):
        return (self.source.state, self.destination.phase, self.source_journal.key(), self.destination_journal.key(),
                self.source_alive, self.destination_alive, self.to_destination, self.to_source, self.asked,
                self.image_is_now)

    # Steps: each returns False where it can't happen.

    def rounds(self):
        """More memory is sent by a running source."""
        if not (self.quiet() and self.source_alive and self.source.state is SourceState.RUNNING):
            return False
        if self.destination.phase not in (Phase.RECEIVING, Phase.COMPLETE) or not self.destination_alive:
            return False
        self.destination.receive()
        return True

    def final_arrives(self, acknowledged):
        if not (self.quiet() and self.source_alive and self.source.state is SourceState.RUNNING):
            return False
        if self.destination.phase not in (Phase.RECEIVING, Phase.COMPLETE) or not self.destination_alive:
            return False
        self.source.stop()
        self.destination.complete()
        self.image_is_now = True
        if not acknowledged:                # the source does not know, and runs on
            self.source.resume()
            self.image_is_now = False
        return True

    def source_resumes(self):
        if not (self.quiet() and self.source_alive and self.source.state is SourceState.STOPPED):
            return False
        self.source.resume()
        self.image_is_now = False
        return True

    def source_says(self, what):
        if not self.quiet():
            return False
        if what == "RUN":
            if self.source.state not in (SourceState.STOPPED, SourceState.COMMITTING):
                return False
            if self.source.state is SourceState.STOPPED and not self.source_alive:
                return False
            self.source.commit()
        elif what == "ABORT":
            if self.source.state not in (SourceState.RUNNING, SourceState.STOPPED):
                return False
        elif self.source.state is not SourceState.COMMITTING:
            return False
        self.to_destination, self.asked = what, True
        return True

    def quiet(self):
        return not self.asked and not self.to_destination and not self.to_source

    def destination_answers(self):
        if not self.to_destination:
            return False
        what, self.to_destination = self.to_destination, ""
        if what == "RUN" and self.destination.phase is Phase.RECEIVING:
            raise AssertionError("RUN to a destination that is not complete")
        phase = {"RUN": self.destination.run, "ABORT": self.destination.abort,
                 "ASK": lambda: self.destination.phase}[what]()
        self.to_source = phase.name
        return True

    def source_hears(self):
        if not self.to_source:
            return False
        phase, self.to_source, self.asked = Phase[self.to_source], "", False
        self.source.settle(phase)
        return True

    def cut(self):
        if self.quiet():
            return False
        self.to_destination = self.to_source = ""
        self.asked = False
        return True

    def source_gives_up_waiting(self):
        """The answer's time is over while the message is still under way: the connection is closed."""
        return self.cut()

    def destination_gives_up(self):
        """Its own operator ends it."""
        if self.destination.phase not in (Phase.RECEIVING, Phase.COMPLETE):
            return False
        self.destination.abort()
        return True

    def kill_source(self):
        self.cut()
        self.source_alive = False
        self.source = SourceHandover(self.source_journal, STREAM)
        return True

    def kill_destination(self):
        self.cut()
        self.destination_alive = False
        self.destination = DestinationHandover(self.destination_journal)
        return True

    STEPS = ([("rounds", ()), ("final_arrives", (True,)), ("final_arrives", (False,)), ("source_resumes", ())]
             + [("source_says", (what,)) for what in ("RUN", "ASK", "ABORT")]
             + [(name, ()) for name in ("destination_answers", "source_hears", "cut", "destination_gives_up",
                                        "kill_source", "kill_destination")])

    def runs(self):
        """Which sides may have a running guest now."""
        here = self.source_alive and self.source.may_run
        there = self.destination_alive and self.destination.may_run
        return here, there


def explore():
    """Return every state that can be reached, with the steps that lead to it and on from it."""
    start = World()
    seen, queue, edges = {start.key(): []}, collections.deque([start.key()]), {}
    while queue:
        key = queue.popleft()
        edges[key] = []
        for name, arguments in World.STEPS:
            world = World(key)
            if not getattr(world, name)(*arguments):
                continue
            reached = world.key()
            edges[key].append((name, arguments, reached))
            if reached not in seen:
                seen[reached] = [*seen[key], (name, *arguments)]
                queue.append(reached)
    return seen, edges


@pytest.fixture(scope="module")
def explored():
    seen, edges = explore()
    print(f"{len(seen)} states, {sum(map(len, edges.values()))} steps")
    return seen, edges


def test_everything_was_reached(explored):
    seen, edges = explored
    assert {key[0] for key in seen} == set(SourceState)
    assert {key[1] for key in seen} == set(Phase)
    assert {name for steps in edges.values() for name, _, _ in steps} == {name for name, _ in World.STEPS}
    assert len(seen) > 80


def test_never_do_both_sides_own_the_guest_whatever_is_killed_or_lost(explored):
    seen, _ = explored
    for key, path in seen.items():
        world = World(key)
        assert not (world.source.may_run and world.destination.may_run), path


def test_the_destination_owns_only_what_the_source_held_when_it_stopped_for_good(explored):
    seen, _ = explored
    for key, path in seen.items():
        world = World(key)
        if world.destination.may_run:
            assert world.image_is_now and not world.source.may_run, path


def test_from_everywhere_after_the_decision_one_side_comes_to_own_the_guest(explored):
    """Without further kills or cuts: the source asks, and says RUN again where the destination still waits."""
    seen, _ = explored
    for key, path in seen.items():
        world = World(key)
        if world.source.state is not SourceState.COMMITTING:
            continue
        for _ in range(4):
            world.destination_answers()
            world.source_hears()
            if world.source.state is not SourceState.COMMITTING:
                break
            world.source_says("ASK")
            world.destination_answers()
            answer = world.to_source
            world.source_hears()
            if answer == Phase.COMPLETE.name:
                world.source_says("RUN")
        assert world.source.may_run != world.destination.may_run, path
        if world.source_alive and world.source.may_run:
            assert not world.destination.may_run, path


def test_who_has_given_the_guest_away_never_runs_it_again(explored):
    _, edges = explored
    for key, steps in edges.items():
        for name, _, reached in steps:
            if key[0] is SourceState.GIVEN:
                assert reached[0] is SourceState.GIVEN, name
            if key[1] in (Phase.OWNER, Phase.ABORTED):
                assert reached[1] is key[1], name


def test_a_journal_is_replaced_whole_and_read_again(tmp_path):
    path = tmp_path / "journal"
    Journal(path).write(stream="a", state="committing")
    assert path.stat().st_mode & 0o777 == 0o600
    assert Journal(path).read() == {"stream": "a", "state": "committing"}
    assert SourceHandover(Journal(path), "a").state is SourceState.COMMITTING
    assert SourceHandover(Journal(path), "b").state is SourceState.RUNNING
    assert [entry.name for entry in tmp_path.iterdir()] == ["journal"]


def test_a_record_that_can_not_be_written_changes_nothing(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal")
    handover = DestinationHandover(journal)
    handover.begin("a")
    handover.complete()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            handover.run()
    assert handover.phase is Phase.COMPLETE and not handover.may_run
    assert json.loads(journal.path.read_text())["phase"] == "RECEIVING"
    assert [entry.name for entry in tmp_path.iterdir()] == ["journal"]
    assert handover.run() is Phase.OWNER


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    for content in ("", "{", "[]", "7"):
        (tmp_path / "journal").write_text(content)
        with pytest.raises(VfioError, match="no record of a migration"):
            Journal(tmp_path / "journal")


def test_a_record_of_the_other_side_is_refused_and_stays(tmp_path):
    journal = Journal(tmp_path / "journal")
    source = SourceHandover(journal, STREAM, hello="00")
    source.stop()
    source.commit()
    with pytest.raises(VfioError, match="no record of a destination"):
        DestinationHandover(Journal(journal.path))
    assert Journal(journal.path).read()["state"] == "committing"


def test_a_stream_whose_beginning_can_not_be_written_has_not_begun(tmp_path, monkeypatch):
    handover = DestinationHandover(Journal(tmp_path / "journal"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(MigrationError, match="can't be written") as caught:
            handover.begin("a")
    assert caught.value.errno == errno.ENOSPC and not handover.stream
    handover.begin("b")
    assert handover.stream == "b"


def test_a_record_whose_folder_can_not_be_synced_gives_its_name_back(tmp_path, monkeypatch):
    journal, count, fsync = Journal(tmp_path / "journal"), 0, os.fsync

    def second_fails(fd):
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    for record in ({"state": "first"}, {"state": "second"}):
        before, count = journal.read(), 0
        with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
            patch.setattr(os, "fsync", second_fails)
            journal.write(**record)
        assert journal.read() == Journal(journal.path).read() == before
        journal.write(**record)
    assert [entry.name for entry in tmp_path.iterdir()] == ["journal"]
