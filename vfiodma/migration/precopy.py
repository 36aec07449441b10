"""The source's side: rounds over what is dirty while devices run, then the rest while they stand still."""
import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from .._core.bitmap import DirtyBitmap
from .._core.errno import error
from ..errors import MigrationError, PostcopyError, VfioError
from ..hostinfo import run_delay
from ..memory import GuestMemory
from . import stream
from .bandwidth import BandwidthLimit
from .channel import FrameChannel
from .compression import offer as offer_compression
from .convergence import Convergence, DowntimeBreakdown, Policy, Sample, Step
from .device_group import DeviceStates
from .events import (
    Broken,
    Event,
    MigrationResult,
    PostcopyBegun,
    PostcopyDone,
    Progress,
    Resumed,
    Round,
    Stage,
    Throttled,
)
from .handover import Journal, SourceState
from .joining import close_channels
from .layout import MemoryLayout
from .ledger import Ledger
from .machine import Machine, Tracker
from .postcopy_source import PagePusher, Postcopy
from .sender import PageSender
from .sharing import NothingToTrack, share
from .source_link import SourceLink
from .stream import Done, Hello, Kind, Phase, Totals

_KEEPALIVE = 1.0            # seconds between signs of life while paused
#: Why a destination gave a connection up, where another connection may do better.
_CURABLE = {errno.EPROTO, errno.EBADMSG, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE}


class PrecopySource(SourceLink):
    """Move guest memory to a PageReceiver while devices write into it.

    Parameters
    ----------
    transport : Transport
        Closed by the caller.
    downtime_limit : float
        Seconds that the devices may stand still.
    max_rounds : int
        Rounds with running devices, at most.
    policy : Policy, optional
        Instead of both: what is wanted in detail (ramp of the limit, time-out, throttle, ...).
    throttle : callable, optional
        Called with the share of its speed (0 to 0.99) that the guest is to give up, whenever that changes; needs
        ``Policy.throttle_max``.
    checksum : {"auto", "xxh3", "crc32", "none"}
        What protects the bytes on their way: by default xxh3 where both sides have the library ``xxhash``, else CRC-32.
        "none" must be asked for on both sides, and is for transports that protect bytes themselves.
    compression : {"none", "auto", "zstd", "lz4"}
        Of pages, where it pays; none as well where the destination does not have it.
    channels : int
        Connections that pages go over, if the destination takes as many; more than one need ``connect``.
    bandwidth_limit : float, optional
        Bytes/s of all channels; ``limit.rate`` changes it at any time.
    connect : callable, optional
        Returns another transport to the same destination, or raises MigrationError when it can't yet.  With it, a
        connection that breaks costs the epoch that was in flight, and no more; devices run on meanwhile.
    reconnect_timeout : float
        Seconds that reconnecting may take.
    share_memory : bool
        Give the memory itself to a destination on the same host, over ``unix:``, instead of its content: nothing is
        copied, and only states move.  Regions are of memfd, hugetlb or files.
    postcopy : Postcopy or bool
        Allow a switch to post-copy (docs/postcopy.md): the guest goes on at the destination before all memory is there.
    journal : Journal, optional
        Where it is written down that the guest was given away, so that a restarted process knows: a source that is made
        with the journal of a process that was killed after ``release`` began can ``settle``, and must before it
        introduces anything else.
    on_event : callable, optional
        Called with every event (vfiodma.migration.events) in the calling thread; what it raises ends the migration.

    Attributes
    ----------
    handover : SourceHandover
        Whose the guest is: ``handover.state`` and ``handover.may_run``.
    ledger : Ledger
        After a failure, ``ledger.pending`` has what the destination lacked when tracking ended.

    Notes
    -----
    ``introduce``, ``migrate``, then ``verify`` and ``release``; where it ``switched`` to post-copy, ``push`` instead of
    ``verify``, after ``release``.  Up to ``release`` this side owns the guest: a failure
    resumes the devices, puts the pages in flight back into ``ledger.pending`` and raises MigrationError.  ``cancel``,
    ``pause`` and ``unpause`` may be called from any thread.
    """

    def __init__(self, transport: Any, *, downtime_limit: float = 0.3, max_rounds: int = 16,
                 policy: Policy | None = None, throttle: Callable[[float], object] | None = None,
                 checksum: str = "auto", compression: str = "none", channels: int = 1,
                 bandwidth_limit: float | None = None, connect: Callable[[], Any] | None = None,
                 reconnect_timeout: float = 30.0,
                 share_memory: bool = False, postcopy: "Postcopy | bool" = False, journal: Journal | None = None,
                 on_event: Callable[[Event], object] | None = None) -> None:
        if not 1 <= channels <= stream.MAX_CHANNELS or (channels > 1 and connect is None):
            raise error(errno.EINVAL, "migrate", hint=f"channels is 1 ... {stream.MAX_CHANNELS}; more than one need "
                        "`connect`")
        if postcopy and share_memory:
            raise error(errno.EINVAL, "migrate", hint="shared memory is there at once: post-copy has nothing to do")
        super().__init__(transport, connect, reconnect_timeout, journal, on_event)
        self._offer, self._compressions = stream.offer(checksum), offer_compression(compression)
        self._channels = channels
        self.limit = BandwidthLimit(bandwidth_limit)
        self._shares = share_memory
        self._postcopy = Postcopy() if postcopy is True else postcopy or None
        self._switch, self._reason = threading.Event(), ""      # to post-copy, and why
        self._cut: Totals | None = None         # of a round that was cut for it, and is not acknowledged
        self._pusher: PagePusher | None = None
        self._pushing_over: FrameChannel | None = None          # the connection that the guest was given over
        self.convergence = Convergence(policy or Policy(downtime_limit, max_rounds))
        self._throttle, self._throttled = throttle or (lambda _: None), 0.0
        self._devices: DeviceStates | None = None      # while they save their states
        self._began = self._harvested_at = self._paused = 0.0
        self.ledger: Ledger | None = None
        self._machine: Machine | None = None
        self._sender: PageSender | None = None
        self._cancelled, self._running = threading.Event(), threading.Event()
        self._running.set()

    def introduce(self, memory: GuestMemory, pgsize: int = 4096) -> None:
        """Tell the destination what will come, so that it can get memory ready.

        Raises
        ------
        HandoverError
            EINPROGRESS: an earlier process gave its guest away, and did not hear what became of it; ``settle`` first.
        MigrationError
            The destination is not there, or refuses.
        """
        if self.handover.state is SourceState.COMMITTING:
            raise self._in_doubt()
        with MemoryLayout(memory, pgsize) as layout, self._failing("introduce"):
            self._check_cancel()
            self._on_event(Stage("introduce"))
            hello = Hello(pgsize, os.urandom(16), layout.shape, self._offer, os.urandom(16), self._compressions,
                          1 if self._shares else self._channels, shares=self._shares,
                          postcopy=self._postcopy is not None)
            self.handover = self._taking(hello)
            self._greet(hello)
            if self._shares:
                share(self._channel.transport, memory)
            self._hello = hello

    def migrate(self, layout: MemoryLayout, tracker: Tracker, machine: Machine,
                states: Mapping[str, bytes] | None = None, devices: DeviceStates | None = None) -> MigrationResult:
        """Move everything; the devices stand still afterwards, here and there.

        Parameters
        ----------
        layout : MemoryLayout
            Of the memory, as it was introduced.
        tracker : Tracker
            Started and stopped here.
        machine : Machine
            The devices.
        states : mapping of str to bytes, optional
            Named states that go first.
        devices : DeviceStates, optional
            VFIO devices whose state goes along, while they run and when they stand still.

        Raises
        ------
        MigrationError
            It failed (ECANCELED: by ``cancel``; ETIME: the policy's time is over); the devices run on here.
        """
        if self._hello is None or (layout.pgsize, layout.shape) != (self._hello.pgsize, self._hello.blocks):
            raise error(errno.EINVAL, "migrate", hint="the memory is not the one that was introduced")
        if self.ledger is not None:
            raise error(errno.EINVAL, "migrate", hint="a source migrates once: make another one")
        if devices is not None:
            devices.preflight()
        self.ledger, self._machine = Ledger(layout.nbits, layout.pgsize), machine
        result, began = MigrationResult(), time.perf_counter()
        self._began = began
        if self._shares:
            tracker = NothingToTrack()
        try:
            with self._failing("migrate"):
                tracker.start()
            self._harvested_at = time.perf_counter()
            for block in layout.blocks if not self._shares else ():
                self.ledger.pending.set(block.first_bit, block.npages)
            while True:
                try:
                    with self._failing("migrate"):
                        if devices is not None:
                            devices.start()
                            self._devices = devices
                        self._rounds(layout, tracker, states or {}, result)
                        self._switch_over(layout, tracker, machine, result)
                    break
                except MigrationError as exc:
                    self._stay()
                    self._go_on(exc, result)
            with self._failing("migrate"):
                tracker.stop()
            self._tell_throttle(0.0)
            result.bytes, result.seconds = self._bytes + self._sent(), time.perf_counter() - began
            self._on_event(Stage("moved"))
        except BaseException as exc:
            self.ledger.put_back()
            self._stay()
            if self._cancelled.is_set() and isinstance(exc, MigrationError):
                self._tell_abort()
            with contextlib.suppress(VfioError):        # what was written since the last round is lacking as well
                tracker.harvest(self.ledger.pending)
            raise
        finally:
            tracker.stop()
            self._tell_throttle(0.0)
        return result

    def verify(self, layout: MemoryLayout) -> tuple[bytes, bytes]:
        """Return the SHA-256 of all memory here and there, taken at the same time."""
        if self._pusher is not None:
            raise error(errno.EINVAL, "verify", hint="memory comes later: each of its frames has a checksum")
        try:
            with self._failing("verify"):
                self._channel.send(Kind.VERIFY)
                here = layout.digest()
                there = bytes(self._channel.answer(Kind.DIGEST)[1])
                if len(there) != stream.DIGEST_SIZE:
                    raise stream.damaged("a digest of a wrong length")
                return here, there
        except BaseException:
            self._stay()
            raise

    def release(self) -> None:
        """Hand the guest over: from here on the destination owns it.

        Raises
        ------
        HandoverError
            EINPROGRESS: the destination was told, and no answer came.  It may own the guest, which stands still here
            until ``settle`` has asked.
        MigrationError
            ECANCELED: the destination has given the guest up for good; the devices run on here.  ENOSPC, EIO, ...: the
            journal can't be written, the guest was not given; the devices run on here.
        """
        try:
            self._on_event(Stage("release"))
            with self._written("the guest runs on here"):
                self.handover.commit()
        except BaseException:
            if self.handover.state is SourceState.STOPPED:
                self.abort()
            raise
        try:
            with self._failing("release"):
                self._say_run()
        except MigrationError as exc:
            self._settle(exc)

    @property
    def switched(self) -> bool:
        """Whether it switched to post-copy: after ``release``, ``push``."""
        return self._pusher is not None

    def switch_to_postcopy(self) -> None:
        """From any thread: stop the guest now, and give it away before its memory; ``postcopy`` must allow it."""
        if self._postcopy is None:
            raise error(errno.EINVAL, "switch_to_postcopy", hint="it was not allowed: PrecopySource(postcopy=True)")
        self._reason = self._reason or "asked for"
        self._switch.set()
        self._running.set()

    def close(self) -> None:
        """Close the connections that ``connect`` opened, and let the memory go that ``push`` would send; idempotent."""
        super().close()
        if self._pusher is not None:
            self._pusher.close()

    def push(self, transport: Any = None) -> PostcopyDone:
        """Send what the destination lacks, what somebody waits for there first; return when it has everything.

        Parameters
        ----------
        transport : Transport, optional
            Another connection, after a failure; closed by the caller.  By default ``connect`` makes one.

        Raises
        ------
        PostcopyError
            The destination is gone, or silent, for longer than reconnecting may take.  The guest is the destination's
            all the same, and its memory is only here: keep it, and ``push`` again.
        """
        pusher = self._pusher
        if pusher is None or self.handover.state is not SourceState.GIVEN:
            raise error(errno.EINVAL, "push", hint="the guest was not given away by post-copy")
        began, heard = time.perf_counter(), None
        close_channels(self._further)
        if transport is not None:
            self._connected(transport)
            try:
                with self._failing("push"):
                    self._again()
            except MigrationError as exc:
                raise self._stopped_pushing(exc) from exc
        self._on_event(Stage("pushing"))
        self._on_event(PostcopyBegun(pusher.missing, self._reason))
        while heard is None:
            heard = self._push(pusher)
        done = pusher.done
        done.seconds += time.perf_counter() - began
        done.faults, done.fault_median, done.fault_max = heard.faults, heard.median / 1e9, heard.longest / 1e9
        self._on_event(done)
        return done

    def _push(self, pusher: PagePusher) -> "Done | None":
        """Push over this connection; None: there is another one."""
        try:
            with self._failing("push"):
                return pusher.run(self._channel, self._channel is not self._pushing_over)
        except MigrationError as exc:
            failure = exc
        try:
            # EBADF: it was closed here, after an earlier failure.
            if not _curable(failure) and failure.errno != errno.EBADF:
                raise failure
            self._on_event(Broken(failure))
            pusher.done.breaks += 1
            for _ in self._connections(failure):
                with contextlib.suppress(MigrationError), self._failing("push"):
                    self._again()
                    return None
        except MigrationError as exc:
            raise self._stopped_pushing(exc) from exc
        return None

    def _stopped_pushing(self, exc: MigrationError) -> PostcopyError:
        missing = 0 if self._pusher is None else self._pusher.missing
        lost = PostcopyError(exc.errno, operation="push", hint=(
            f"{exc.hint or exc.strerror}; the guest is the destination's, which lacks {missing} pages: keep them, and "
            "push() again"))
        lost.missing = missing
        return lost

    def settle(self, transport: Any = None) -> None:
        """Ask the destination once more whose the guest is; raises as ``release``.

        Parameters
        ----------
        transport : Transport, optional
            To the destination; closed by the caller.  By default ``connect`` makes one.
        """
        if self.handover.state is not SourceState.COMMITTING:
            raise error(errno.EINVAL, "settle", hint=f"there is no doubt: the guest is {self.handover.state.name} here")
        if transport is None:
            return self._settle(self._in_doubt())
        self._connected(transport)
        try:
            with self._failing("settle"):
                self._ask()
        except MigrationError as exc:
            self._raise_kept(exc)
            raise self._in_doubt() from exc

    def abort(self) -> None:
        """Keep the guest after all, instead of ``release``: the devices run on here."""
        if self.handover.state is not SourceState.STOPPED:
            raise error(errno.EINVAL, "abort", hint=f"the guest is {self.handover.state.name} here")
        self._stay()
        if self.ledger is not None:
            self.ledger.put_back()
        self._tell_abort()

    def cancel(self) -> None:
        """End the migration at the next chunk: it raises MigrationError (ECANCELED), and the devices run on."""
        self._cancelled.set()
        self._running.set()

    def pause(self) -> None:
        """Send nothing more until ``unpause``; devices run, and what they write is kept in mind."""
        self._running.clear()

    def unpause(self) -> None:
        """Go on."""
        self._running.set()

    # Rounds

    def _rounds(self, layout: MemoryLayout, tracker: Tracker, states: Mapping[str, bytes],
                result: MigrationResult) -> None:
        """Rounds with running devices, up to the decision to stop them."""
        # A tracker that compares memory with what was sent must be told what that was.
        note_sent = getattr(tracker, "note_sent", None) if getattr(tracker, "compares", False) else None
        self._sender = PageSender([self._channel, *self._further], layout, compression=self._compression,
                                  limit=self.limit, stop=self._cancelled.is_set, hold=self._is_paused,
                                  cut=self._is_cut if self._postcopy else None, note_sent=note_sent,
                                  on_progress=self._on_chunk)
        self._on_event(Stage("rounds"))
        prepared, step = False, Step.CONTINUE
        self._forget_pusher()
        if self._postcopy and self._postcopy.after_rounds == 0:
            self._reason = "no rounds were wanted"
            self._switch.set()
        while step is Step.CONTINUE and not self._switch.is_set():
            done = self._round(layout, tracker, {} if result.rounds else states)
            if done is None:
                break
            result.rounds.append(done)
            loading = self._expect_device_states()
            decision = self.convergence.decide(time.perf_counter() - self._began)
            prediction, step = decision.prediction, decision.step
            done.predicted_downtime, done.band = prediction.total, (prediction.low, prediction.high)
            done.limit, done.dirty_rate, done.reason = decision.limit, self.convergence.dirty_rate, decision.reason
            self._on_event(done)
            if self._postcopy and (reason := self._postcopy.reason(
                    decision, self.convergence.rounds, self.convergence.policy, self.convergence.forecast)):
                self._reason = reason
                self._switch.set()
            elif step is Step.CANCEL:
                raise MigrationError(errno.ETIME, operation="migrate", hint=f"{decision.reason}: "
                                     f"{self.convergence.forecast()}; the guest runs on here")
            self._tell_throttle(decision.throttle)
            if not prepared:
                self._on_event(self.convergence.forecast())
                self._prepare()
                prepared = True
            if loading and step is Step.SWITCH and self.convergence.rounds < self.convergence.policy.max_rounds:
                step = Step.CONTINUE        # devices have told that they are not ready to be stopped
            result.predicted_downtime, result.band = prediction.total, (prediction.low, prediction.high)
            result.limit = decision.limit
        if not prepared:
            if not self._epoch and self._cut is None:       # without a round the states go alone
                self._tell_states(states)
            self._prepare()
        result.converged = step is Step.SWITCH

    def _expect_device_states(self) -> bool:
        """Tell the estimator what devices have left; return whether some have bytes to be read before a stop."""
        if self._devices is None:
            return False
        pending = self._devices.pending()
        left = pending.initial_bytes + pending.dirty_bytes
        self.convergence.costs.device_bytes = left if pending.final_bytes is None else pending.final_bytes
        return pending.initial_bytes > 0

    def _tell_states(self, states: Mapping[str, bytes]) -> None:
        for name, data in states.items():
            self._channel.send(Kind.STATE, stream.encode_state(name, data), epoch=self._epoch)

    def _tell_throttle(self, share: float) -> None:
        if share != self._throttled:
            self._throttled = share
            self._throttle(share)
            self._on_event(Throttled(share))

    def _prepare(self) -> None:
        """Wait until the destination could take the guest; devices run."""
        self._on_event(Stage("prepare"))
        self._channel.send(Kind.PREPARE, epoch=self._epoch)
        self._channel.answer(Kind.PREPARED, epoch=self._epoch)

    def _switch_over(self, layout: MemoryLayout, tracker: Tracker, machine: Machine, result: MigrationResult) -> None:
        assert self.ledger is not None
        self._check()
        self._on_event(Stage("stopped"))
        down = time.perf_counter()
        self.handover.stop()
        machine.stop()
        if self._devices is not None:
            self._devices.quiesce()
        stopped = time.perf_counter()
        tracker.harvest(self.ledger.pending)
        scanned = time.perf_counter()
        if self._switch.is_set():
            self._pusher = self._leave(layout)
        done = self._round(layout, None, machine.state())       # the named states have gone first
        assert done is not None
        end = time.perf_counter()
        result.downtime = end - down
        result.breakdown = DowntimeBreakdown(stopped - down, scanned - stopped, self._sent_at - self._state_at,
                                             self._state_at - scanned, end - self._sent_at)
        self.convergence.costs.learn(result.breakdown)
        result.rounds.append(done)
        self._on_event(done)

    def _is_cut(self) -> bool:
        return self._switch.is_set() and self.handover.state is SourceState.RUNNING

    def _forget_pusher(self) -> None:
        self._cut, pusher, self._pusher = None, self._pusher, None
        if pusher is not None:
            pusher.close()

    def _leave(self, layout: MemoryLayout) -> PagePusher:
        """Return what will send all that the destination lacks, after the hand-over."""
        assert self.ledger is not None and self._sender is not None
        left = DirtyBitmap(layout.nbits, layout.pgsize)
        left.merge(self.ledger.pending)
        if self._cut is not None and self._sender.rest is not None:
            left.merge(self._sender.rest)
        self.ledger.take()      # until the destination owns the guest, it is this side's to send
        return PagePusher(layout, left, self._epoch + 1, limit=self.limit, compression=self._compression,
                          paused=lambda: not self._running.is_set(), on_event=self._on_event)

    def _round(self, layout: MemoryLayout, tracker: Tracker | None, states: Mapping[str, bytes]) -> Round | None:
        """Send everything pending as one epoch; without a tracker nothing runs, and it is the last one.

        None: it was cut for post-copy, and goes on as the last one.
        """
        assert self.ledger is not None and self._sender is not None
        began, before, epoch = time.perf_counter(), self._sent(), self._epoch
        self._tell_states(states)
        if self._devices is not None:
            for name, chunk in self._devices.chunks() if tracker else self._devices.final_chunks():
                self.limit.spend(len(chunk), self._check_cancel)
                self._channel.send(Kind.STATE, stream.encode_state_name(name), chunk, epoch=epoch)
        state, of_states, paused, waited = time.perf_counter(), self._sent(), self._paused, run_delay()
        if self._pusher is None:
            totals = self._sender.send(self.ledger.take(), epoch)
        else:
            totals = self._cut or self._sender.send(DirtyBitmap(layout.nbits, layout.pgsize), epoch)
            self._pusher.tell(self._channel, epoch)
        if tracker is not None and self._sender.rest is not None:
            self._cut = totals
            return None
        sent, page_bytes, paused = time.perf_counter(), self._sent() - of_states, self._paused - paused
        waited = run_delay() - waited
        self._state_at, self._sent_at = state, sent
        self._channel.send(Kind.END, stream.encode_totals(totals), epoch=epoch,
                           flags=0 if tracker else stream.FINAL | (stream.LATER if self._pusher else 0))
        if stream.decode_totals(self._channel.answer(Kind.ACK, epoch=epoch)[1]) != totals:
            raise stream.damaged(f"the acknowledgement of epoch {epoch} has other totals")
        if self._pusher is None:
            self.ledger.retire()
        self._epoch += 1
        acked = time.perf_counter()
        if tracker is not None:
            tracker.harvest(self.ledger.pending)
        nbytes, seconds = self._sent() - before, acked - began
        dirty = self.ledger.pending.count()
        if tracker is not None:
            harvested = time.perf_counter()
            interval, self._harvested_at = harvested - self._harvested_at, harvested
            self.convergence.observe(Sample(
                page_bytes, sent - state - paused, dirty * layout.pgsize, interval, totals.pages * layout.pgsize,
                totals.zero_pages * layout.pgsize, acked - sent, harvested - acked, waited))
        return Round(epoch, totals.pages, totals.zero_pages, nbytes, seconds, dirty, nbytes / seconds, None,
                     final=tracker is None)

    def _on_chunk(self, epoch: int, pages: int, total: int) -> None:
        self._on_event(Progress(epoch, pages, total))
        self._check()

    def _check(self) -> None:
        """Wait while paused, showing life to the destination; MigrationError (ECANCELED) when cancelled."""
        if self._is_paused():
            began = time.perf_counter()
            while not self._running.wait(_KEEPALIVE):
                self._channel.send(Kind.KEEPALIVE)
            self._paused += time.perf_counter() - began
        self._check_cancel()

    def _is_paused(self) -> bool:
        return not self._running.is_set() and self.handover.state is SourceState.RUNNING

    def _check_cancel(self) -> None:
        if self._began and self.convergence.policy.on_timeout == "cancel" and self.convergence.expired(
                time.perf_counter() - self._began) and self.handover.state is SourceState.RUNNING:
            raise MigrationError(errno.ETIME, operation="migrate", hint="the time is over; the guest runs on here")
        if self._cancelled.is_set():
            raise MigrationError(errno.ECANCELED, operation="migrate", hint="it was cancelled; the guest runs on here")

    def _check_wanted(self) -> None:
        if self.handover.state is SourceState.RUNNING:
            self._check_cancel()

    def _nap(self, seconds: float) -> None:
        if self.handover.state is SourceState.RUNNING:
            self._cancelled.wait(seconds)
        else:           # a cancel comes too late, and is no reason to hurry
            super()._nap(seconds)

    def _stay(self) -> None:
        """The guest runs on here, if it was stopped."""
        stopped = self.handover.state is SourceState.STOPPED
        if stopped:
            self.handover.resume()
        self._run_on(self._machine if stopped else None)

    def _run_on(self, machine: Machine | None) -> None:
        """Resume the devices, then the machine: also when one of its devices can't be helped."""
        devices, self._devices = self._devices, None
        try:
            if devices is not None:
                devices.resume()
        finally:
            if machine is not None:
                machine.resume()

    # Connections

    def _go_on(self, failure: MigrationError, result: MigrationResult) -> None:
        """Get a connection again after a failure in a round, and put the ledger right."""
        assert self.ledger is not None
        if self._connect is None or not _curable(failure):
            raise failure
        result.breaks += 1
        self._on_event(Broken(failure))
        for _ in self._connections(failure):
            try:
                with self._failing("reconnect"):
                    ready = self._again()
            except MigrationError as exc:
                if not _curable(exc):
                    raise
                continue
            if ready.phase is Phase.ABORTED:
                self.handover.settle(ready.phase)
                raise MigrationError(errno.ECANCELED, operation="reconnect",
                                     hint="the destination has given the guest up: start another migration")
            again = 0
            if ready.phase is Phase.OWNER or ready.epochs not in (self._epoch, self._epoch + 1):
                raise stream.damaged(f"the destination is {ready.phase.name} after {ready.epochs} epochs, "
                                     f"{self._epoch} were acknowledged")
            if ready.epochs > self._epoch and self._pusher is None:      # only the acknowledgement was lost
                self.ledger.retire()
                self._epoch = ready.epochs
            else:
                self._epoch = ready.epochs
                again = self.ledger.in_flight.count()
                self.ledger.put_back()
            self._on_event(Resumed(ready.epochs, again))
            return

    def _say_run(self) -> None:
        """Give the guest, and hear what became of it."""
        self._channel.send(Kind.RUN)
        self._pushing_over = self._channel
        header, _ = self._channel.answer(Kind.STARTED, Kind.ABORTED)
        self._settled(Phase.OWNER if header.kind is Kind.STARTED else Phase.ABORTED)

    def _ask(self) -> None:
        """Ask over a new connection; give the guest again where the destination still waits for it."""
        ready = self._again()
        if ready.phase is Phase.COMPLETE:
            self._say_run()
        elif ready.phase is Phase.RECEIVING:
            raise stream.damaged("the destination lost what it had")
        else:
            self._settled(ready.phase)

    def _settled(self, phase: Phase) -> None:
        with self._written("settle() when it can be"):
            self.handover.settle(phase)
        if phase is Phase.OWNER:
            self._on_event(Stage("given"))
            return
        self._run_on(self._machine)
        raise MigrationError(errno.ECANCELED, operation="release",
                             hint="the destination has given the guest up; it runs on here")

    def _settle(self, failure: MigrationError) -> None:
        """Ask again and again; HandoverError if the doubt remains."""
        try:
            self._raise_kept(failure)
            for _ in self._connections(failure):
                try:
                    with self._failing("settle"):
                        return self._ask()
                except MigrationError as exc:
                    self._raise_kept(exc)
        except MigrationError as exc:
            self._raise_kept(exc)
            raise self._in_doubt() from exc

    def _raise_kept(self, exc: MigrationError) -> None:
        if self.handover.state is not SourceState.COMMITTING:
            raise exc



def _curable(exc: MigrationError) -> bool:
    """Whether another connection may do better."""
    return (exc.peer_errno or exc.errno) in _CURABLE
