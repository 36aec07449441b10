"""Post-copy: the guest runs at the destination while its memory comes; who touches a page sees the source's."""
import errno
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from migration_doubles import Machine
from postcopy_pair import GPAS, PAGE, PAGES, Pair, Toucher, filled, make_memory, skip_unless_permitted, touch

from vfiodma import DirtyBitmap, GuestMemory
from vfiodma._core.userfault import MissingPages
from vfiodma.errors import (
    BusyError,
    DmaPermissionError,
    HandoverError,
    MigrationError,
    OverlapError,
    PostcopyError,
    ProtocolError,
    UnsupportedError,
    VfioError,
)
from vfiodma.migration import PageReceiver, PrecopySource, SocketTransport, postcopy_destination
from vfiodma.migration.bandwidth import BandwidthLimit
from vfiodma.migration.channel import FrameChannel
from vfiodma.migration.events import PostcopyBegun, PostcopyDone, PostcopyProgress, Progress, Stage
from vfiodma.migration.handover import SourceState
from vfiodma.migration.layout import MemoryLayout
from vfiodma.migration.postcopy_source import PagePusher, Postcopy
from vfiodma.migration.stream import Compression, Kind, Phase

ALL = sum(PAGES)


@pytest.fixture(autouse=True)
def permitted():
    skip_unless_permitted()


@pytest.fixture
def source():
    with filled() as memory:
        yield memory


@pytest.mark.parametrize(("rounds", "options"), [
    (0, {}), (1, {}), (3, {"compression": "zstd"}), (2, {"channels": 3}), (0, {"channels": 2, "checksum": "none"}),
    (1, {"bandwidth_limit": 20e6}),
])
def test_threads_see_the_bytes_of_the_source_while_they_come(tmp_path, source, rounds, options):
    receiver = {"checksum": options["checksum"]} if "checksum" in options else {}
    with Pair(tmp_path, source, postcopy=Postcopy(rounds, when_needed=False), receiver=receiver, **options) as pair:
        assert pair.receiver.serve() is Phase.OWNER
        touchers = [Toucher(pair.memory, source, seed) for seed in range(3)]
        done = pair.finish()
        for each in touchers:
            each.join(20)
        assert [each.wrong for each in touchers] == [0, 0, 0]
        begun = next(event for event in pair.events if isinstance(event, PostcopyBegun))
        told = pair.result.postcopy
        assert done.pages + done.zero_pages == told.pages + told.zero_pages == begun.pages <= (20 * rounds or ALL)
        assert told.faults == done.faults and told.fault_max >= told.fault_median >= 0
        assert any(isinstance(event, PostcopyProgress) and not event.left for event in pair.events)
        assert len(pair.result.rounds) == rounds + 1 and pair.states["device"] == b"state"
        assert pair.machine.calls == ["stop", "state"] and pair.migration.source.handover.state is SourceState.GIVEN
        pair.receiver.close()       # nothing is left: it may


def test_a_switch_that_is_asked_for_cuts_the_round_and_keeps_what_came(tmp_path, source):
    asked = threading.Event()

    def hook(pair, event):
        if isinstance(event, Progress) and not asked.is_set():      # of a round of 1.5 s, the first frame went out
            asked.set()
            pair.migration.switch_to_postcopy()
            pair.migration.source.limit.rate = None

    with Pair(tmp_path, source, postcopy=True, bandwidth_limit=2e6, max_rounds=100, hook=hook) as pair:
        assert pair.receiver.serve() is Phase.OWNER
        assert asked.is_set()
        pair.finish()
        begun = next(event for event in pair.events if isinstance(event, PostcopyBegun))
        assert begun.reason == "asked for" and 0 < begun.pages < ALL


def test_a_migration_that_converges_does_not_switch(tmp_path, source):
    with Pair(tmp_path, source, writes=0, postcopy=True, downtime_limit=10.0) as pair:
        assert pair.receiver.serve() is Phase.OWNER
        assert pair.receiver.finish() is None
        pair.thread.join(20)
        assert pair.result.postcopy is None and not pair.migration.source.switched


def test_one_that_does_not_converge_switches_instead_of_stopping_for_long(tmp_path, source):
    with Pair(tmp_path, source, writes=500, postcopy=Postcopy(), max_rounds=5) as pair:
        assert pair.receiver.serve() is Phase.OWNER
        pair.finish()
        assert pair.result.postcopy is not None and len(pair.result.rounds) <= 6


@pytest.mark.parametrize("cuts", [(12,), (11, 5, 4), (None, 3, 4, 5)])
def test_a_broken_connection_makes_threads_wait_and_the_next_one_goes_on(tmp_path, source, cuts):
    with Pair(tmp_path, source, postcopy=Postcopy(0), cuts=cuts) as pair:
        assert pair.receiver.serve() is Phase.OWNER
        touchers = [Toucher(pair.memory, source, seed) for seed in range(2)]
        pair.finish()
        for each in touchers:
            each.join(20)
        assert [each.wrong for each in touchers] == [0, 0]


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_connection_that_breaks_around_the_switch_costs_no_byte_and_no_owner(tmp_path, source, cut):
    with Pair(tmp_path, source, postcopy=Postcopy(0), cuts=(cut,)) as pair:
        try:
            phase = pair.receiver.serve(1)
        except VfioError:
            phase = None
        if phase is Phase.OWNER:
            pair.finish()
        else:
            pair.thread.join(20)
            assert pair.migration.source is None or pair.migration.source.handover.may_run


def test_a_last_acknowledgement_that_is_lost_loses_no_page(tmp_path, source):
    """The destination has thrown pages away that the source, which runs on, has to send again, now or later."""
    with Pair(tmp_path, source, postcopy=Postcopy(1, when_needed=False), writes=300) as pair:
        lost, send = [], FrameChannel.send

        def lose(kind, *parts, **options):
            if kind is Kind.ACK and pair.receiver.complete and not lost:
                lost.append(pair.receiver.missing)
                pair.receiver._channel.transport.interrupt()
            return send(pair.receiver._channel, kind, *parts, **options)

        pair.receiver._channel.send = lose
        assert pair.receiver.serve() is Phase.OWNER
        assert lost[0] > 0
        pair.finish()


def test_a_source_that_is_killed_is_an_error_that_says_how_many_pages_are_missing(tmp_path, source):
    with Pair(tmp_path, source, postcopy=Postcopy(0), bandwidth_limit=1e6, reconnect_timeout=0.1) as pair:
        assert pair.receiver.serve(0.3) is Phase.OWNER
        pair.listener.close()
        assert pair.pushing.wait(10)
        here = pair.migration.source
        here._channel.transport.interrupt()
        with pytest.raises(PostcopyError, match=rf"\d+ of the {ALL} pages that were to come are missing") as caught:
            pair.receiver.finish(20)
        assert 0 < caught.value.missing == pair.receiver.missing <= ALL
        pair.thread.join(20)
        assert isinstance(pair.failure, PostcopyError) and pair.failure.missing > 0
        assert here.handover.state is SourceState.GIVEN and not here.handover.may_run
        assert "resume" not in pair.machine.calls
        with pytest.raises(BusyError, match="pages of the guest are not there yet"):
            pair.receiver.close()


def test_whatever_ends_a_push_keeps_what_the_destination_lacks(tmp_path, source):
    """A callback that fails, a connection that leads nowhere."""
    failures = []

    def hook(pair, event):
        if isinstance(event, PostcopyProgress) and not failures:
            failures.append(event.left)
            raise InterruptedError(errno.EINTR, "of the caller")

    with Pair(tmp_path, source, postcopy=Postcopy(0), hook=hook) as pair:
        assert pair.receiver.serve() is Phase.OWNER
        pair.thread.join(20)
        assert isinstance(pair.raised, InterruptedError)
        here, (ours, theirs) = pair.migration.source, socket.socketpair()
        theirs.close()
        nowhere = SocketTransport(ours)
        with pytest.raises(PostcopyError, match="keep them, and push") as lost:
            here.push(nowhere)
        nowhere.close()
        assert lost.value.missing > 0 and here.handover.state is SourceState.GIVEN
        assert here.push().pages > 0
        pair.finish()
        assert failures


def test_a_source_in_doubt_keeps_what_the_destination_may_lack(tmp_path, source):
    def hook(pair, event):
        if isinstance(event, Stage) and event.name == "release":
            pair.right, pair.url = pair.url, "unix:/nowhere"
            pair.migration.source._channel.transport.interrupt()

    with Pair(tmp_path, source, postcopy=Postcopy(0), hook=hook, reconnect_timeout=0.1) as pair:
        phases = []
        serving = threading.Thread(target=lambda: phases.append(pair.receiver.serve()))
        serving.start()
        pair.thread.join(20)
        assert isinstance(pair.failure, HandoverError)
        pair.url, pair.failure = pair.right, None
        pair.migration.source.settle()
        serving.join(20)
        assert phases == [Phase.OWNER] and pair.migration.source.push().pages > 0
        pair.finish()


def test_a_source_that_was_away_for_long_is_waited_for_again(tmp_path, source):
    with Pair(tmp_path, source, postcopy=Postcopy(0), bandwidth_limit=1e6, reconnect_timeout=0.1) as pair:
        assert pair.receiver.serve(0.2) is Phase.OWNER
        assert pair.pushing.wait(10)
        here, refused = pair.migration.source, pair.url
        pair.url = "unix:/nowhere"
        here._channel.transport.interrupt()
        with pytest.raises(PostcopyError):
            pair.receiver.finish(20)
        pair.thread.join(20)
        assert isinstance(pair.failure, PostcopyError)
        pair.url, here.limit.rate, pair.failure = refused, None, None
        results = []
        line = pair.connect()
        thread = threading.Thread(target=lambda: results.append(here.push(line)))
        thread.start()
        while True:
            try:
                done = pair.finish()
                break
            except PostcopyError:       # its helper waits a while, as it was told to
                time.sleep(0.05)
        thread.join(20)
        line.close()
        assert isinstance(results[0], PostcopyDone) and results[0].faults == done.faults


def test_a_helper_that_is_killed_is_an_error(tmp_path, source):
    with Pair(tmp_path, source, postcopy=Postcopy(0), bandwidth_limit=1e6, reconnect_timeout=0.1) as pair:
        assert pair.receiver.serve() is Phase.OWNER
        assert pair.pushing.wait(10)
        os.kill(pair.receiver._missing._pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(PostcopyError, match="helper process is gone") as caught:
                pair.receiver.finish(20)
            assert caught.value.errno == errno.EOWNERDEAD
        pair.migration.source._channel.transport.interrupt()


def test_who_watches_and_fails_does_not_keep_finish_waiting(tmp_path, source, capfd):
    def fail(event):
        raise ValueError("of the caller")

    with Pair(tmp_path, source, postcopy=Postcopy(0), receiver={"on_postcopy": fail}) as pair:
        assert pair.receiver.serve() is Phase.OWNER
        assert pair.finish().pages > 0
    assert "of the caller" in capfd.readouterr().err


def test_the_helper_keeps_no_files_of_its_parent_and_ends_by_no_signal_of_the_terminal(tmp_path, source):
    ours, theirs = socket.socketpair()
    with Pair(tmp_path, source, postcopy=Postcopy(0), bandwidth_limit=1e6) as pair:
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            assert pair.receiver.serve() is Phase.OWNER
        finally:
            signal.signal(signal.SIGTERM, before)
        assert pair.pushing.wait(10)
        theirs.close()
        ours.settimeout(10)
        assert ours.recv(1) == b""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pair.receiver._missing._pid, number)
        pair.migration.source.limit.rate = None
        pair.finish()
    ours.close()


def test_who_gives_up_while_the_source_pauses_does_not_wait_for_it(tmp_path, source):
    with Pair(tmp_path, source, postcopy=Postcopy(0), bandwidth_limit=1e6, reconnect_timeout=0.1) as pair:
        assert pair.receiver.serve() is Phase.OWNER
        assert pair.pushing.wait(10)
        pair.migration.source.pause()
        pair.receiver.close(abandon=True)
        pair.listener.close()
        pair.thread.join(20)
        assert isinstance(pair.failure, PostcopyError)


def test_an_accept_that_fails_in_its_own_way_does_not_end_the_helper(tmp_path, source):
    failures = [ValueError("no errno"), OSError("no errno either"), KeyError()]

    with Pair(tmp_path, source, postcopy=Postcopy(0), cuts=(11,)) as pair:
        def accept(seconds):
            if pair.receiver._missing is not None and failures:
                raise failures.pop()
            return pair.listener.accept(seconds)

        pair.receiver._accept = accept
        assert pair.receiver.serve() is Phase.OWNER
        pair.finish()


def test_a_helper_that_can_not_start_is_no_hand_over_and_another_one_can(tmp_path, source, monkeypatch):
    breaks = []

    def on_break(exc):
        breaks.append((exc.errno, pair.receiver.handover.phase))
        monkeypatch.undo()

    with Pair(tmp_path, source, postcopy=Postcopy(0)) as pair:
        monkeypatch.setattr(postcopy_destination, "_forget_signals", lambda: os._exit(1))
        assert pair.receiver.serve(on_break=on_break) is Phase.OWNER
        pair.finish()
        assert breaks == [(errno.ECHILD, Phase.COMPLETE)]


def test_a_destination_that_does_not_take_post_copy_refuses_before_anything_moves(tmp_path, source):
    with Pair(tmp_path, source, receiver={"postcopy": False}) as pair:
        with pytest.raises(UnsupportedError, match="postcopy=True"):
            pair.receiver.receive()
        pair.receiver._channel.close()
        pair.thread.join(20)
        assert isinstance(pair.failure, MigrationError) and pair.failure.peer_errno == errno.EOPNOTSUPP
        assert pair.machine.calls == []


def test_memory_that_nobody_can_wait_for_is_refused_before_anything_moves(tmp_path, source):
    with Pair(tmp_path, source) as pair:
        (tmp_path / "file").write_bytes(bytes(PAGES[0] * PAGE))
        pair.memory.close()
        pair.memory = GuestMemory()
        pair.memory.add(GuestMemory.file(tmp_path / "file").region, GPAS[0])
        pair.memory.add(GuestMemory.anonymous(PAGES[1] * PAGE).region, GPAS[1])
        with pytest.raises(UnsupportedError, match="file memory can't be waited for"):
            pair.receiver.receive()
        pair.receiver._channel.close()
        pair.thread.join(20)
        assert pair.failure.peer_errno == errno.EOPNOTSUPP


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_who_has_no_userfaultfd_is_told_how_to_get_it(tmp_path):
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("vm.unprivileged_userfaultfd is on")
    read, write = os.pipe()
    if not (pid := os.fork()):
        try:
            os.setresuid(65534, 65534, 65534)
            with GuestMemory.memfd(PAGE) as memory:
                MissingPages(memory.region.vaddr, PAGE, DirtyBitmap(1))
        except DmaPermissionError as exc:
            os.write(write, str(exc).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    words = os.read(read, 1000).decode()
    os.close(read)
    assert "vm.unprivileged_userfaultfd=1" in words and "CAP_SYS_PTRACE" in words


def forged(kind, runs, content=b"", block=0):
    return lambda channel, epoch: channel.send(
        kind, np.array(runs, "<u8"), content=[content], block=block, nruns=len(runs), epoch=epoch)


@pytest.mark.parametrize("forge", [
    forged(Kind.PAGES, [[700, 1]], bytes(PAGE)), forged(Kind.PAGES, [[0, 1], [0, 1]], bytes(2 * PAGE)),
    forged(Kind.PAGES, [[1 << 63, 1 << 63]], bytes(PAGE)), forged(Kind.PAGES, [[0, 2]], bytes(PAGE)),
    forged(Kind.ZEROS, [[0, 701]]), forged(Kind.ZEROS, [[0, 0]]), forged(Kind.ZEROS, [[0, 1]], block=2),
    forged(Kind.ZEROS, [[0, 1]], b"x"), forged(Kind.STATE, []),
    lambda channel, epoch: channel.send(Kind.END, bytes(24), epoch=epoch),
    lambda channel, epoch: channel.send(Kind.ZEROS, np.array([[0, 1]], "<u8"), nruns=1, epoch=epoch + 1),
])
def test_a_frame_that_can_not_be_ends_the_connection_and_places_nothing(tmp_path, source, forge):
    with Pair(tmp_path, source, postcopy=Postcopy(0)) as pair:
        pushed = []

        def forging(pusher, before=PrecopySource._push):
            here = pair.migration.source
            if not pushed:
                pushed.append(forge(here._channel, here._epoch))
            return before(here, pusher)

        while pair.migration.source is None:
            time.sleep(0.01)
        pair.migration.source._push = forging
        assert pair.receiver.serve() is Phase.OWNER
        pair.finish()
        assert pair.result.postcopy.breaks == 1


@pytest.mark.parametrize(("number", "runs"), [
    (0, [[2, 1]]), (0, [[0, 1 << 63]]), (1, [[0, 1]]), (0, [[700, 1]]), (0, []), (0, [[0, 0]]), (0, [[0, 300]]),
    (9, [[0, 1]]),
])
def test_a_destination_that_wants_what_it_has_or_what_is_not_there_is_refused(source, number, runs):
    ours, theirs = (SocketTransport(sock, 5.0) for sock in socket.socketpair())
    with MemoryLayout(source, PAGE) as layout:
        left = DirtyBitmap(layout.nbits, PAGE)
        left.set(0, 2)
        left.set(3, 600)
        pusher = PagePusher(layout, left, 7, limit=BandwidthLimit(), compression=Compression.NONE,
                            paused=lambda: False, on_event=lambda _: None)
        FrameChannel(theirs).send(Kind.WANTED, np.array(runs, "<u8"), block=number, nruns=len(runs), epoch=7)
        with pytest.raises(ProtocolError):
            pusher.run(FrameChannel(ours), False)
        pusher.close()
        assert pusher.missing == 602
    ours.close()
    theirs.close()


def test_a_destination_that_lacks_what_came_before_is_refused(source):
    ours, theirs = (SocketTransport(sock, 5.0) for sock in socket.socketpair())
    with MemoryLayout(source, PAGE) as layout:
        left = DirtyBitmap(layout.nbits, PAGE)
        left.set(0, 2)
        pusher = PagePusher(layout, left, 7, limit=BandwidthLimit(), compression=Compression.NONE,
                            paused=lambda: False, on_event=lambda _: None)
        channel = FrameChannel(theirs)
        channel.send(Kind.MISSING, (0).to_bytes(8, "little"), (5).to_bytes(8, "little"), epoch=7)
        channel.send(Kind.MISSING, epoch=7)
        with pytest.raises(ProtocolError, match="lacks 1 pages"):
            pusher.run(FrameChannel(ours), True)
        pusher.close()
    ours.close()
    theirs.close()


def test_a_page_is_placed_once_and_only_where_nobody_else_put_something():
    with GuestMemory.memfd(8 * PAGE) as memory:
        memory.write(0, b"old" * PAGE)
        left = DirtyBitmap(8)
        left.set(0, 7)
        pages = MissingPages(memory.region.vaddr, memory.size, left)
        with memory.region.remap() as other:
            other.view()[6 * PAGE:6 * PAGE + 7] = b"touched"
        pages.place(np.array([[0, 2]], np.uint64), b"a" * 2 * PAGE)
        for runs in ([[1, 1]], [[2, 1], [2, 1]], [[7, 1]], [[6, 3]], [[8, 1]], [[1 << 63, 1 << 63]], [[3, 0]]):
            with pytest.raises(ProtocolError):
                pages.place(np.array(runs, np.uint64))
        with pytest.raises(ProtocolError):
            pages.place(np.array([[2, 2]], np.uint64), b"short")
        assert pages.left == 5 and pages.fill(7) and pages.fill(7) and not pages.fill(3)
        with pytest.raises(OverlapError):
            pages.place(np.array([[5, 2]], np.uint64), b"b" * 2 * PAGE)
        assert pages.left == 4 and not pages.is_missing(5) and pages.is_missing(6)
        assert touch(memory.region.vaddr + 6 * PAGE)[:7] == b"touched"
        with pytest.raises(BusyError):
            pages.close()
        pages.close(abandon=True)
        with pytest.raises(VfioError) as failed:
            pages.next(0)
        assert failed.value.errno == errno.EBADF


def test_who_waits_for_faults_and_who_closes_are_no_race():
    for seed in range(30):
        with GuestMemory.anonymous(4 * PAGE) as memory:
            pages = MissingPages(memory.region.vaddr, memory.size, DirtyBitmap(4), shared=False)
            failures = []

            def look(pages=pages, failures=failures):
                try:
                    while True:
                        pages.next(0.01)
                except VfioError as exc:
                    failures.append(exc.errno)

            threads = [threading.Thread(target=look) for _ in range(3)]
            for thread in threads:
                thread.start()
            time.sleep(random.Random(seed).random() / 100)
            pages.close()
            for thread in threads:
                thread.join(10)
            assert failures == [errno.EBADF] * 3


def test_shared_memory_and_post_copy_exclude_each_other():
    ours, theirs = socket.socketpair()
    with pytest.raises(VfioError, match="nothing to do"):
        PrecopySource(SocketTransport(ours), share_memory=True, postcopy=True)
    source = PrecopySource(SocketTransport(ours))
    for call in (source.switch_to_postcopy, source.push):
        with pytest.raises(VfioError) as refused:
            call()
        assert refused.value.errno == errno.EINVAL
    with pytest.raises(VfioError):
        Postcopy(-1)
    assert PageReceiver(SocketTransport(theirs), lambda _: make_memory()).finish() is None and Machine()
    ours.close()
    theirs.close()
