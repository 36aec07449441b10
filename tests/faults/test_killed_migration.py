"""Real processes killed by SIGKILL at random moments of a migration, and restarted with nothing but their journals.

200 senders and 200 receivers, in turn inside a frame, between two calls of the transport, between two steps of the
journal, and at a random time; five times as many by VFIODMA_PROFILE=deep.  One, two or three channels, with and without
compression.  The devices of the source write by DMA throughout.  That is over UNIX sockets; some more die over TCP,
TLS, pipes and sockets by descriptor.
"""
import collections
import contextlib
import errno
import os
import random
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from migration_doubles import content_of
from migration_machines import Child, Doom, Gate, SoftMachine, empty_guest, missing_pages, small_guest
from transport_ends import have_openssl, make_certificates

from vfiodma.errors import HandoverError, MigrationError, VfioError
from vfiodma.migration import PageReceiver, PrecopySource
from vfiodma.migration.handover import DestinationHandover, Journal, SourceState
from vfiodma.migration.stream import Phase

DEEP = os.environ.get("VFIODMA_PROFILE") == "deep"
KILLS = {"unix": 1000 if DEEP else 200, **dict.fromkeys(["tcp", "tls", "pipe", "fd"], 200 if DEEP else 5)}
KINDS = "byte", "call", "journal", "time"
OPTIONS = [{"channels": 1}, {"channels": 2, "compression": "auto"}, {"channels": 3}]


@pytest.fixture(scope="module")
def memories():
    with small_guest(1) as memory, empty_guest() as target:
        yield memory, target, content_of(memory), content_of(target)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("tls")) if have_openssl() else None


@pytest.fixture(params=KILLS)
def kind(request, certificates):
    """Of the transport, and what it needs."""
    if request.param == "tls" and certificates is None:
        pytest.skip("needs openssl")
    return request.param, certificates


@pytest.fixture
def folder():
    """Where journals are; in memory, if there is such a place, for they are flushed to the disk again and again."""
    path = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    yield Path(path)
    shutil.rmtree(path)


def restore(memory, contents):
    for (gpa, _), content in zip(memory, contents, strict=True):
        memory.write(gpa, content)


def migrate(machine, memory, source):
    source.introduce(memory)
    source.migrate(machine.layout, machine.tracker, machine, {"iovas": b"mappings"})
    source.release()


def state_of(journal):
    return journal.read().get("state")


def phase_of(journal):
    return journal.read().get("phase")


class Scale(NamedTuple):
    """How long a migration is that nobody kills, by the ways in which it can be ended."""

    calls: int
    bytes: int
    seconds: float

    def moment(self, rng, kind):
        """Draw one; a few are too late."""
        if kind == "time":
            return rng.random() * self.seconds
        return rng.randrange({"byte": self.bytes, "call": self.calls, "journal": 6}[kind])


@contextlib.contextmanager
def killed_at(victim, seconds):
    timer = threading.Timer(seconds, victim.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


class Senders:
    """One case: the sender and what is started after it are processes, the destination is here."""

    def __init__(self, memories, folder, doom, options, seed, kind):
        self.memory, self.target, self.doom, self.seed = *memories[:2], doom, seed
        restore(self.memory, memories[2])
        restore(self.target, memories[3])
        self.here, self.there = folder / "source", folder / "destination"
        for path in (self.here, self.there):
            path.unlink(missing_ok=True)
        self.options, self.gate, self.states = options, Gate(*kind), {}
        self.victim, self.successor = Child(self.send), Child(self.settle)
        self.restarted = False

    def send(self):
        self.doom.guard_journal()

        def connect():
            return self.gate.connect(self.doom)

        with SoftMachine(self.memory, seed=self.seed) as machine, PrecopySource(
                connect(), connect=connect, reconnect_timeout=5, journal=Journal(self.here), downtime_limit=1e-9,
                max_rounds=3, **self.options) as source:
            migrate(machine, self.memory, source)
            machine.halt()

    def settle(self):
        """What the process does that is started after the kill: it has the journal, and no guest."""
        with contextlib.closing(self.gate.connect()) as transport:
            source = PrecopySource(transport, journal=Journal(self.here))
            assert not source.handover.may_run
            if source.handover.state is SourceState.COMMITTING:
                source.settle(transport)
            assert source.handover.state is SourceState.GIVEN

    def accept(self, timeout=10.0):
        if not self.restarted:
            with contextlib.suppress(MigrationError):
                return self.gate.accept(timeout, unless=[self.victim.pidfd])
            if self.victim.alive or self.victim.wait() != -9 or state_of(Journal(self.here)) != "committing":
                raise MigrationError(errno.ETIMEDOUT, operation="accept")
            self.restarted = True
            self.successor.go()
        return self.gate.accept(timeout, unless=[self.successor.pidfd])

    def run(self, seconds=None):
        """Return what the journals say, before the restart and after it."""
        try:
            with contextlib.ExitStack() as stack:
                self.victim.go()
                if seconds is not None:
                    stack.enter_context(killed_at(self.victim, seconds))
                return self.receive(stack)
        finally:
            self.victim.close()
            self.successor.close()
            self.gate.close()

    def receive(self, stack):
        try:
            receiver = PageReceiver(self.accept(), lambda hello: self.target, journal=Journal(self.there),
                                    accept=self.accept, channels=3, on_state=self.states.__setitem__)
        except MigrationError:
            assert self.victim.wait() == -9 and state_of(Journal(self.here)) is None
            return None, None, None
        stack.callback(receiver.close)
        handover = receiver.handover
        try:
            assert receiver.serve() is Phase.OWNER
        except VfioError:
            # The sender was killed before it gave the guest: it will never be owned here.
            assert self.victim.wait() == -9 and state_of(Journal(self.here)) is None
            assert handover.phase in (Phase.RECEIVING, Phase.COMPLETE) and not handover.may_run
            assert handover.abort() is Phase.ABORTED
            assert phase_of(Journal(self.there)) == "ABORTED"
            return None, "ABORTED", None
        assert handover.may_run and phase_of(Journal(self.there)) == "OWNER"
        assert self.states["iovas"] == b"mappings"
        assert receiver.layout.digest() == self.states["sha256"] and content_of(self.memory) == content_of(self.target)
        self.victim.wait()
        before = "committing" if self.restarted else state_of(Journal(self.here))
        assert before in ("committing", "given")
        if self.successor.status is None and not self.restarted and self.victim.status == -9:
            # It had written down that it gives the guest; another process learns what became of it.
            self.restarted = True
            self.successor.go()
            with contextlib.closing(self.accept()) as transport:
                if before == "committing":
                    receiver.reconnect(transport)
                    assert receiver.settle() is Phase.OWNER
        if self.restarted:
            assert self.successor.wait() == 0
        source = PrecopySource(None, journal=Journal(self.here))
        assert source.handover.state is SourceState.GIVEN and not source.handover.may_run
        return before, "OWNER", "given"


class Count(Doom):
    """Lets everything pass, and leaves the counts in a file."""

    def __init__(self, path):
        super().__init__()
        self._path, self._calls = path, 0

    def step(self, kind):
        self._calls += kind == "call"
        self._path.write_text(f"{self._calls} {self.moved}")


def campaign(case, memories, folder, kind):
    """Kill until as many were killed as KILLS says; return how often the journals said what."""
    rng, scales, outcomes = random.Random(4), [], collections.Counter()
    for options in OPTIONS:
        began, counts = time.monotonic(), folder / "counts"
        one = case(memories, folder, Count(counts), options, 0, kind)
        one.run()
        assert one.victim.status == 0
        scales.append(Scale(*map(int, counts.read_text().split()), time.monotonic() - began))
    killed = tried = 0
    slowest = 0.0, "none"
    most = KILLS[kind[0]]
    while killed < most:
        assert tried < 3 * most
        how, which = KINDS[tried % len(KINDS)], tried // len(KINDS) % len(OPTIONS)
        at, options = scales[which].moment(rng, how), OPTIONS[which]
        one = case(memories, folder, Doom("never" if how == "time" else how, at), options, tried, kind)
        began = time.monotonic()
        try:
            outcome = one.run(at if how == "time" else None)
        except BaseException:
            print(f"{kind[0]}, try {tried}: {how} {at}, {options}")
            raise
        slowest = max(slowest, (time.monotonic() - began, f"{tried}, {how} {at}, {options}"))
        if one.victim.status == -9:
            killed += 1
            outcomes[outcome] += 1
        tried += 1
    counts = ", ".join(f"{outcome} {count}" for outcome, count in outcomes.items())
    print(f"{kind[0]}: {killed} killed of {tried}: {counts}; slowest {slowest[0]:.2f} s (try {slowest[1]})")
    return outcomes


def test_a_sender_killed_at_any_moment_leaves_one_owner_or_none(memories, folder, kind):
    outcomes = campaign(Senders, memories, folder, kind)
    assert sum(outcomes.values()) == KILLS[kind[0]]
    # Every way in which it can end was seen.
    assert KILLS[kind[0]] < 100 or {(None, "ABORTED", None), ("committing", "OWNER", "given")} <= set(outcomes)


class Receivers:
    """One case: the receiver and what is started after it are processes, the source is here."""

    def __init__(self, memories, folder, doom, options, seed, kind):
        self.memory, self.target, self.doom, self.seed = *memories[:2], doom, seed
        restore(self.memory, memories[2])
        restore(self.target, memories[3])
        self.here, self.there = folder / "source", folder / "destination"
        for path in (self.here, self.there):
            path.unlink(missing_ok=True)
        self.options, self.gates = options, [Gate(*kind), Gate(*kind)]
        self.victim = Child(self.receive, without=self.gates[1:])
        self.successor = Child(self.receive_again, without=self.gates[:1])
        for gate in self.gates:         # theirs alone
            gate.close()
        self.connections = 0
        self.before = None

    def receive(self):
        self.doom.guard_journal()

        def accept(timeout=10.0):
            return self.gates[0].accept(timeout, self.doom)

        with PageReceiver(accept(), lambda hello: self.target, journal=Journal(self.there), accept=accept,
                          channels=3) as receiver:
            receiver.serve()

    def receive_again(self):
        """What the process does that is started after the kill: it has the journal, and no memory."""
        before = DestinationHandover(Journal(self.there)).phase
        with contextlib.closing(self.gates[1].accept()) as transport, \
                PageReceiver(transport, lambda hello: self.target, journal=Journal(self.there)) as receiver:
            assert receiver.handover.phase is before and before in (Phase.OWNER, Phase.ABORTED)
            assert receiver.settle() is before

    def connect(self):
        self.connections += 1
        if self.connections > self.options["channels"]:     # something broke, and only kills break anything here
            self.victim.wait()
            self.before = self.before or (state_of(Journal(self.here)), phase_of(Journal(self.there)))
            if self.before[1] is None:
                raise MigrationError(errno.ECONNREFUSED, operation="connect", hint="no stream was begun there")
            self.successor.go()
            return self.gates[1].connect()
        return self.gates[0].connect()

    def run(self, seconds=None):
        try:
            with contextlib.ExitStack() as stack:
                self.victim.go()
                machine = stack.enter_context(SoftMachine(self.memory, seed=self.seed))
                if seconds is not None:
                    stack.enter_context(killed_at(self.victim, seconds))
                return self.migrate(stack, machine)
        finally:
            self.victim.close()
            self.successor.close()

    def migrate(self, stack, machine):
        # Every other source can connect again by itself; the others are asked to settle where there is doubt.
        can = self.options["channels"] > 1 or self.seed % 2
        try:
            transport = stack.enter_context(contextlib.closing(self.gates[0].connect()))
        except MigrationError:      # killed in a handshake: there is no migration
            assert self.victim.wait() == -9 and phase_of(Journal(self.there)) is None and machine.running
            return None, None, "running"
        source = stack.enter_context(PrecopySource(transport, connect=self.connect if can else None,
            reconnect_timeout=0.3, journal=Journal(self.here), downtime_limit=1e-9, max_rounds=3, **self.options))
        self.connections = 1
        try:
            migrate(machine, self.memory, source)
        except HandoverError as exc:
            assert exc.errno == errno.EINPROGRESS and not can
            assert not source.handover.may_run and not machine.running
            self.connections = 9
            with contextlib.closing(self.connect()) as transport:
                try:
                    source.settle(transport)
                except MigrationError as after:
                    assert after.errno == errno.ECANCELED
        except MigrationError:
            assert source.handover.state in (SourceState.RUNNING, SourceState.KEPT)
        self.victim.wait()
        self.before = self.before or (state_of(Journal(self.here)), phase_of(Journal(self.there)))
        self.successor.wait()
        assert self.successor.status == 0
        phase = phase_of(Journal(self.there))
        running = source.handover.state is SourceState.RUNNING      # that needs no record
        assert state_of(Journal(self.here)) == (None if running else source.handover.state.value)
        if source.handover.state is SourceState.GIVEN:
            assert phase == "OWNER" and not machine.running and not source.handover.may_run
            assert content_of(self.memory) == content_of(self.target)
            assert machine.calls == ["stop"]
        else:
            # The guest runs on here, and nobody else has it or will have it.
            assert source.handover.may_run and machine.running
            assert phase != "OWNER" and DestinationHandover(Journal(self.there)).phase is not Phase.OWNER
            assert machine.calls in ([], ["stop", "resume"])
            if source.ledger is not None:
                assert missing_pages(machine.layout, machine.tracker, source.ledger, self.target) == []
        return (*self.before, source.handover.state.value)


def test_a_receiver_killed_at_any_moment_leaves_the_guest_to_one_side(memories, folder, kind):
    outcomes = campaign(Receivers, memories, folder, kind)
    assert sum(outcomes.values()) == KILLS[kind[0]]
    assert KILLS[kind[0]] < 100 or set(outcomes) >= {
        (None, "RECEIVING", "running"), ("committing", "RECEIVING", "kept"), ("committing", "OWNER", "given")}
