"""Random walks: one device over all states, its state copied on the way; several devices from machine to machine."""
import contextlib
import errno
import warnings

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from migrating_devices import Chip, addresses, machine

from vfiodma.devices.migration import MigrationState
from vfiodma.errors import MigrationError, VfioError
from vfiodma.migration.device_group import DeviceSinks, DeviceStates

ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = list(MigrationState)
SAVING = (STOP_COPY, PRE_COPY, PRE_COPY_P2P)
ALIVE = (RUNNING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P)
BLOCKS = 6
FLAGS = st.sampled_from([1, 3, 5, 7])
KERNELS = st.sampled_from(["6.12", "7.2"])
STATES = st.sampled_from(list(MigrationState))
BLOCK = st.integers(0, BLOCKS - 1)


def states_of(flags):
    return {STOP, RUNNING, STOP_COPY, RESUMING} | ({RUNNING_P2P} if flags & 2 else set()) \
        | ({PRE_COPY} if flags & 4 else set()) | ({PRE_COPY_P2P} if flags == 7 else set())


class StateWalk(RuleBasedStateMachine):
    """One device goes anywhere.  What was read since saving began, up to the end in STOP_COPY, is its whole state."""

    def __init__(self):
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.stream, self.read = None, b""
        self.value = 0

    @initialize(flags=FLAGS, kernel=KERNELS)
    def begin(self, flags, kernel):
        self.flags = flags
        address, = addresses(1)
        self.chip, self.twin_chip = Chip(address, BLOCKS, flags), Chip(address, BLOCKS, flags)
        self.device, = self.stack.enter_context(machine(self.chip, kernel=kernel))
        self.twin, = self.stack.enter_context(machine(self.twin_chip, kernel=kernel))
        self.state, self.content = RUNNING, self.chip.content()

    @precondition(lambda self: self.state in ALIVE)
    @rule(block=BLOCK)
    def change(self, block):
        self.value += 1
        self.chip.poke(block, self.value)
        self.content = self.chip.content()

    @precondition(lambda self: self.state in (PRE_COPY, PRE_COPY_P2P))
    @rule()
    def begin_anew(self):
        self.chip.again = True

    @rule(to=STATES, broken=st.none() | st.tuples(STATES, STATES), code=st.sampled_from([errno.EIO, errno.EBUSY]))
    def go(self, to, broken, code):
        before = self.state
        if broken is not None:
            self.chip.fail[broken] = code
        legal = to in states_of(self.flags) and before is not ERROR \
            and not (before is STOP_COPY and to in (PRE_COPY, PRE_COPY_P2P))
        leaves_resuming = before is RESUMING and to is not RESUMING
        try:
            stream = self.device.migration.set_state(to)
        except VfioError as exc:
            failed = broken is not None and broken not in self.chip.fail
            self.state = self.device.migration.state
            # Nothing was written to it: it stays in RESUMING.
            assert exc.errno == (errno.EINVAL if not legal or leaves_resuming else code)
            assert legal and failed or self.state is before
            if failed:
                assert self.state is broken[0]
        else:
            assert legal and (not leaves_resuming)
            self.state = to
            if stream is not None:
                self._close()
                self.stream, self.read = stream, b""
            assert (stream is not None) == (to is RESUMING and before is not RESUMING
                                            or to in SAVING and before not in SAVING) or before is to
        finally:
            self.chip.fail.clear()
        if self.state not in SAVING and self.state is not RESUMING:
            self._close()

    def _close(self):
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    @precondition(lambda self: self.state in SAVING)
    @rule(most=st.sampled_from([1, 7, 72, 500, 1 << 16]))
    def take(self, most):
        piece = self.stream.read(most)
        assert piece is not None or self.state is not STOP_COPY
        self.read += piece or b""

    @precondition(lambda self: self.state in (PRE_COPY, PRE_COPY_P2P))
    @rule()
    def what_is_left_can_be_read(self):
        initial, dirty, _ = self.stream.precopy_info()
        left = initial + dirty
        while left:
            piece = self.stream.read(left)
            assert piece
            left -= len(piece)
            self.read += piece
        assert self.stream.precopy_info()[:2] == (0, 0)
        assert self.stream.read(1) is None

    @precondition(lambda self: self.state is STOP_COPY)
    @rule(cut=st.integers(1, 2000))
    def copy(self, cut):
        self.read += self.stream.readall()
        sink = self.twin.migration.set_state(RESUMING)
        with sink:
            for at in range(0, len(self.read), cut):
                sink.write(self.read[at:at + cut])
            self.twin.migration.set_state(RUNNING)
        assert self.twin_chip.content() == self.content

    @rule()
    def reset(self):
        self.device.reset()
        self._close()
        self.state, self.content = RUNNING, (bytes(len(self.chip.state)), 0)
        self.chip.dirty_blocks.clear()

    @invariant()
    def the_device_is_where_and_what_it_should_be(self):
        if hasattr(self, "device"):
            assert self.device.migration.state is self.state
            assert self.chip.content() == self.content
            if self.state is not ERROR:
                assert self.chip.now is self.state

    def teardown(self):
        self._close()
        self.stack.close()


class Journey(RuleBasedStateMachine):
    """Devices move again and again; arcs fail, connections break; nothing that they are is lost."""

    def __init__(self):
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.value = 0

    @initialize(flags=FLAGS, count=st.integers(1, 3), chunk=st.sampled_from([5, 72, 300, 1 << 20]), kernel=KERNELS)
    def begin(self, flags, count, chunk, kernel):
        self.flags, self.count, self.chunk, self.kernel = flags, count, chunk, kernel
        self.chips, self.devices = self._machine()
        self._prepare()

    def _machine(self):
        chips = [Chip(address, BLOCKS, self.flags) for address in addresses(self.count)]
        return chips, self.stack.enter_context(machine(*chips, kernel=self.kernel))

    def _prepare(self):
        self.targets, self.new = self._machine()
        options = {"peer_to_peer": bool(self.flags & 2)}
        self.source = DeviceStates(self.devices, chunk=self.chunk, **options)
        self.sinks = DeviceSinks(self.new, **options)
        self.sinks.prepare()
        self.started = False

    @rule(which=st.integers(0, 2), block=BLOCK, anew=st.sampled_from([False, False, False, True]))
    def change(self, which, block, anew):
        self.value += 1
        chip = self.chips[which % self.count]
        chip.poke(block, self.value)
        chip.again = anew and self.started and bool(self.flags & 4)

    def _start(self):
        if not self.started:
            self.source.start()
            self.started = True

    @rule(most=st.integers(0, 9))
    def send(self, most):
        self._start()
        pending = self.source.pending()
        assert pending.initial_bytes + pending.dirty_bytes == 0 or self.flags & 4
        for _, frame in zip(range(most), self.source.chunks(), strict=False):
            assert self.sinks.take(*frame)

    @rule(lost=st.integers(0, 30), final=st.booleans(), loads=st.booleans())
    def the_connection_breaks(self, lost, final, loads):
        """Some chunks are read and never arrive; devices run on, and begin again."""
        self._start()
        if final:
            self.source.quiesce()
        frames = list(self.source.final_chunks() if final else self.source.chunks())
        arrived = frames[:max(0, len(frames) - lost)]
        for frame in arrived:
            self.sinks.take(*frame)
        if final and loads and arrived == frames:
            self.sinks.load()
        assert self.source.resume() == ()
        self.source.start()

    @rule(which=st.integers(0, 2), arc=st.tuples(st.sampled_from([RUNNING, PRE_COPY, PRE_COPY_P2P, RUNNING_P2P, STOP]),
                                                 st.sampled_from([RUNNING_P2P, PRE_COPY_P2P, STOP, STOP_COPY])))
    def stopping_fails(self, which, arc):
        self._start()
        chip = self.chips[which % self.count]
        chip.fail[arc] = errno.EIO
        try:
            self.source.quiesce()
        except MigrationError as exc:
            assert chip.address in str(exc)
        chip.fail.clear()
        assert self.source.resume() == ()
        self.source.start()

    @rule(which=st.integers(0, 2))
    def the_destination_fails(self, which):
        self._start()
        self.source.quiesce()
        for frame in self.source.final_chunks():
            self.sinks.take(*frame)
        self.targets[which % self.count].fail["load"] = errno.EIO
        try:
            self.sinks.load()
            raise AssertionError("it loads")
        except MigrationError:
            self.sinks.abort()
        self.source.resume()
        self.sinks.prepare()
        self.source.start()

    @rule()
    def arrive(self):
        self._start()
        before = [chip.content() for chip in self.chips]
        self.source.quiesce()
        for frame in self.source.final_chunks():
            self.sinks.take(*frame)
        self.sinks.load()
        self.sinks.run()
        assert [chip.content() for chip in self.targets] == before
        self.source.close()
        self.sinks.close()
        self.chips, self.devices = self.targets, self.new
        self._prepare()

    def teardown(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.stack.close()


TestStateWalk = StateWalk.TestCase
TestJourney = Journey.TestCase
TestJourney.settings = settings(max_examples=settings().max_examples * 2 // 5)     # each opens many machines
