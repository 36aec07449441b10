"""Several channels: every page over one of them, an epoch ends when all have, and a failure of one ends all."""
import contextlib
import errno
import queue
import random
import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from migration_doubles import PGSIZE, Hooked, LogTracker, Machine, content_of, each_round, guest

from vfiodma._core.bitmap import DirtyBitmap
from vfiodma.errors import InvalidArgumentError, MigrationError, ProtocolError, VfioError
from vfiodma.migration import PageReceiver, PrecopySource, SocketTransport, stream
from vfiodma.migration.channel import FrameChannel
from vfiodma.migration.joining import accept_channels, connect_channels
from vfiodma.migration.layout import MemoryLayout
from vfiodma.migration.sender import PageSender
from vfiodma.migration.stream import Checksum, Hello, Kind, Phase, Ready
from vfiodma.migration.together import together


def pages(count, seed=7):
    """Pages of content, some of them zeros."""
    rng = random.Random(seed)
    return b"".join(bytes(PGSIZE) if rng.random() < 0.3 else rng.randbytes(PGSIZE // 4) * 4 for _ in range(count))


class Line:
    """Connections by socket pairs: ``connect`` here, ``accept`` there."""

    def __init__(self, timeout=10.0, wrap=SocketTransport):
        self.waiting = queue.Queue()
        self.timeout, self.wrap = timeout, wrap
        self.here = []
        self.most = 100

    def connect(self):
        if len(self.here) == self.most:
            raise MigrationError(errno.ECONNREFUSED, operation="transport")
        here, there = socket.socketpair()
        self.here.append(self.wrap(here, timeout=self.timeout))
        self.waiting.put(SocketTransport(there, self.timeout))
        return self.here[-1]

    def accept(self, timeout):
        try:
            return self.waiting.get(timeout=timeout)
        except queue.Empty:
            raise MigrationError(errno.ETIMEDOUT, operation="transport") from None


    def close(self):
        """Close what nobody accepted."""
        while not self.waiting.empty():
            self.waiting.get().close()


class Destination(threading.Thread):
    """A PageReceiver with its further channels, in a thread."""

    def __init__(self, line, target, **options):
        super().__init__()
        self.failure = None
        self.transport = line.accept(5)
        self.receiver = PageReceiver(self.transport, lambda hello: target, accept=line.accept, **options)
        self.start()

    def run(self):
        try:
            self.receiver.receive()
        except OSError as exc:
            self.failure = exc
        finally:
            self.receiver.close()
            self.transport.close()


@contextlib.contextmanager
def no_threads_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def move(memory, target, line, channels, writes=(), checksum="auto", compression="none", **options):
    """Move memory; return the destination, joined, and what ended the source."""
    line.most = channels        # a stream that breaks does not go on
    transport = line.connect()
    destination = Destination(line, target, checksum=checksum)
    source = PrecopySource(transport, downtime_limit=1e-9, max_rounds=2, checksum=checksum, compression=compression,
                           channels=channels, connect=line.connect, reconnect_timeout=0, **options)
    failure = None
    with MemoryLayout(memory, PGSIZE) as layout, contextlib.closing(transport), contextlib.closing(source):
        tracker = LogTracker(layout)

        def on_round(done):
            if not done.final:
                for gpa, page, data in writes:
                    memory.write(gpa + page * PGSIZE, data)
                    tracker.log.mark(page)

        source._on_event = each_round(on_round)
        try:
            source.introduce(memory, PGSIZE)
            source.migrate(layout, tracker, Machine({"device": b"state"}))
        except OSError as exc:
            failure = exc
    destination.join(15)
    assert not destination.is_alive()
    line.close()
    return destination, failure


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("checksum, compression", [("auto", "none"), ("none", "none"), ("crc32", "zstd"),
                                                   ("none", "lz4"), ("xxh3", "auto")])
def test_a_guest_moves_over_all_channels(channels, checksum, compression, monkeypatch):
    if compression != "none":
        pytest.importorskip("zstandard")
        pytest.importorskip("lz4")
    monkeypatch.setattr("vfiodma.migration.sender._STAGE_BYTES", 4 * PGSIZE)
    monkeypatch.setattr("vfiodma.migration.stream.DIRECT_BYTES", 64 * PGSIZE)
    content = [pages(304), pages(64, 8)]
    with no_threads_left(), guest(content) as memory, guest([b"\xee" * len(part) for part in content]) as target:
        writes = [(0, page, bytes([page % 251]) * PGSIZE) for page in range(3, 290, 7)]
        line = Line()
        destination, failure = move(memory, target, line, channels, writes, checksum, compression)
        assert failure is None and destination.failure is None and destination.receiver.complete
        assert content_of(target) == content_of(memory)
        assert len(line.here) == channels


@pytest.mark.parametrize("checksum", ["auto", "none"])
def test_pages_that_change_while_they_are_sent_arrive_as_they_were_at_the_end(checksum, monkeypatch):
    monkeypatch.setattr("vfiodma.migration.sender._STAGE_BYTES", 16 * PGSIZE)
    monkeypatch.setattr("vfiodma.migration.stream.DIRECT_BYTES", 64 * PGSIZE)
    npages = 2048
    with no_threads_left(), guest([pages(npages)]) as memory, guest([b"\xee" * (npages * PGSIZE)]) as target:
        line, stopped = Line(), threading.Event()
        line.most = 3
        transport = line.connect()
        destination = Destination(line, target, checksum=checksum)
        with MemoryLayout(memory, PGSIZE) as layout, contextlib.closing(transport):
            tracker = LogTracker(layout)

            def write():
                rng = random.Random(5)
                while not stopped.is_set():
                    for page in rng.choices(range(npages), k=20):
                        memory.write(page * PGSIZE, rng.choice([bytes(PGSIZE), rng.randbytes(PGSIZE)]))
                        tracker.log.mark(page)

            writer = threading.Thread(target=write)

            class Writing(Machine):
                def stop(self):
                    stopped.set()
                    writer.join()
                    super().stop()

            source = PrecopySource(transport, downtime_limit=1e-9, max_rounds=6, checksum=checksum, channels=3,
                                   connect=line.connect)
            with contextlib.closing(source):
                source.introduce(memory, PGSIZE)
                writer.start()
                try:
                    result = source.migrate(layout, tracker, Writing())
                finally:
                    stopped.set()
        destination.join(15)
        assert destination.failure is None and len(result.rounds) == 7
        assert content_of(target) == content_of(memory)


@given(st.sets(st.integers(0, 299)), st.integers(1, 4), st.integers(0, 1 << 32))
@settings(deadline=None)
def test_every_dirty_page_is_sent_once_over_whichever_channel(dirty, channels, seed):
    class Sink:
        def __init__(self):
            self.frames = []

        def send(self, parts):
            self.frames.append(b"".join(bytes(memoryview(part).cast("B")) for part in parts))

    with guest([pages(304, seed)]) as memory, MemoryLayout(memory, PGSIZE) as layout:
        bitmap = DirtyBitmap(layout.nbits, PGSIZE)
        for page in dirty:
            bitmap.set(page, 1)
        sinks = [Sink() for _ in range(channels)]
        sender = PageSender([FrameChannel(sink) for sink in sinks], layout)
        for each in sender._senders:
            each.chunk = 3
            each._stage = each._stage[:3 * PGSIZE]
        totals = sender.send(bitmap, 3)
        seen, barriers = [], []
        for sink in sinks:
            for frame in sink.frames:
                header = stream.decode_header(frame[:stream.HEADER_SIZE])
                assert header.epoch == 3
                body = memoryview(frame)[stream.HEADER_SIZE:]
                if header.kind is Kind.BARRIER:
                    barriers.append(stream.decode_totals(body))
                    continue
                for at in range(header.nruns):
                    first, count = stream._BLOCK.unpack_from(body, at * stream.RUN_SIZE)
                    seen += range(first, first + count)
        assert sorted(seen) == sorted(dirty) and totals.pages + totals.zero_pages == len(dirty)
        assert len(barriers) == channels - 1
        assert sum(one.pages for one in barriers) <= totals.pages


class Fails(Exception):
    pass


def test_together_waits_for_all_and_raises_the_first_failure():
    stopped = threading.Event()
    told = []

    def give_up(exc):
        told.append(exc)
        stopped.set()

    def fail():
        raise Fails

    def wait():
        assert stopped.wait(10)
        raise OSError("a consequence")

    with no_threads_left(), pytest.raises(Fails):
        together([wait, fail, wait], give_up)
    assert [type(exc) for exc in told] == [Fails]
    stopped.clear()
    with no_threads_left(), pytest.raises(Fails):
        together([fail, wait], give_up)
    assert together([lambda: 1, lambda: 2, lambda: 3], give_up) == [1, 2, 3]


@pytest.mark.parametrize("cut", range(0, 12))
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_channel_that_breaks_ends_all_on_both_sides(which, cut, monkeypatch):
    monkeypatch.setattr("vfiodma.migration.sender._STAGE_BYTES", 4 * PGSIZE)

    class Breaking(Line):
        def connect(self):
            number = len(self.here)

            def before(frame):
                if number == which and frame == cut:
                    self.here[which]._sock.shutdown(socket.SHUT_RDWR)

            self.wrap = lambda sock, timeout: Hooked(sock, before, timeout)
            return super().connect()

    content = [pages(200)]
    with no_threads_left(), guest(content) as memory, guest([b"\xee" * len(content[0])]) as target:
        line = Breaking()
        began = time.monotonic()
        destination, failure = move(memory, target, line, 3)
        assert time.monotonic() - began < 8
        if failure is not None:     # not cut after its last frame
            assert isinstance(failure, MigrationError)
            assert not destination.receiver.complete and destination.failure is not None
        else:
            assert content_of(target) == content


@pytest.mark.parametrize("cut", range(2, 14, 2))
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_stream_goes_on_over_new_channels_when_one_breaks(which, cut, monkeypatch):
    monkeypatch.setattr("vfiodma.migration.sender._STAGE_BYTES", 4 * PGSIZE)

    class Breaking(Line):
        def connect(self):
            number = len(self.here)

            def before(frame):
                if number == which and frame == cut:
                    self.here[which]._sock.shutdown(socket.SHUT_RDWR)

            self.wrap = lambda sock, timeout: Hooked(sock, before, timeout)
            return super().connect()

    content = [pages(200)]
    with no_threads_left(), guest(content) as memory, guest([b"\xee" * len(content[0])]) as target:
        line = Breaking()
        transport = line.connect()
        receiver = PageReceiver(line.accept(5), lambda hello: target, accept=line.accept)
        phases = []
        peer = threading.Thread(target=lambda: phases.append(receiver.serve(10)))
        peer.start()
        with MemoryLayout(memory, PGSIZE) as layout, contextlib.closing(transport):
            tracker = LogTracker(layout)

            def on_round(done):
                if not done.final:
                    memory.write(done.epoch * PGSIZE, b"w" * PGSIZE)
                    tracker.log.mark(done.epoch)

            source = PrecopySource(transport, downtime_limit=1e-9, max_rounds=3, channels=3, connect=line.connect,
                                   on_event=each_round(on_round))
            with contextlib.closing(source):
                source.introduce(memory, PGSIZE)
                source.migrate(layout, tracker, Machine())
                source.release()
        peer.join(15)
        receiver.close()
        line.close()
        assert phases == [Phase.OWNER]
        assert content_of(target) == content_of(memory)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_channel_that_stalls_ends_all_in_time(which):
    content = [pages(64)]
    with no_threads_left(), guest(content) as memory, guest([b"\xee" * len(content[0])]) as target:
        stall = threading.Event()

        class Stalling(Line):
            def connect(self):
                number = len(self.here)

                def before(frame):
                    if number == which and frame == 1:
                        stall.wait(1)

                self.wrap = lambda sock, timeout: Hooked(sock, before, timeout)
                return super().connect()

        line = Stalling(timeout=0.3)
        destination, failure = move(memory, target, line, 3)
        assert isinstance(failure, MigrationError) and not destination.receiver.complete
        assert destination.failure.errno == errno.ETIMEDOUT


def test_the_source_learns_on_channel_0_why_another_one_failed():
    content = [pages(200)]
    with no_threads_left(), guest(content) as memory, guest([b"\xee" * len(content[0])]) as target:

        class Damaging(Line):
            def connect(self):
                number = len(self.here)

                class Damaged(SocketTransport):
                    def send(self, parts):
                        data = bytearray(b"".join(bytes(memoryview(part).cast("B")) for part in parts))
                        if number == 1 and stream.decode_header(data[:stream.HEADER_SIZE]).kind is Kind.BARRIER:
                            data[-1] ^= 1
                        super().send([data])

                self.wrap = Damaged
                return super().connect()

        destination, failure = move(memory, target, Damaging(), 2)
        assert isinstance(destination.failure, ProtocolError)
        assert isinstance(failure, MigrationError) and "checksum of frame" in str(failure)


def test_a_stop_comes_between_frames_and_leaves_the_channels_as_they_were():
    with guest([pages(304)]) as memory, MemoryLayout(memory, PGSIZE) as layout:
        asked = []

        class Sink:
            def send(self, parts):
                pass

        channels = [FrameChannel(Sink()) for _ in range(3)]
        sender = PageSender(channels, layout, stop=lambda: asked.append(1) or len(asked) > 4)
        for each in sender._senders:
            each.chunk, each._stage = 3, each._stage[:3 * PGSIZE]
        bitmap = DirtyBitmap(layout.nbits, PGSIZE)
        bitmap.set(0, 300)
        with no_threads_left(), pytest.raises(MigrationError) as caught:
            sender.send(bitmap, 0)
        assert caught.value.errno == errno.ECANCELED
        channels[0].send(Kind.RUN)


class Quiet:
    """Channel 0 while others join."""

    def wait_readable(self, timeout):
        return False


HELLO = Hello(PGSIZE, b"i" * 16, ((0, 4096),), token=b"t" * 16, channels=4)


def test_strangers_and_latecomers_do_not_join():
    line = Line(timeout=0.2)
    for _ in range(2):
        stranger = line.connect()
        stranger.send([b"GET / HTTP/1.0\r\n\r\n" * 4])
    silent = line.connect()
    wrong = FrameChannel(line.connect())
    wrong.send(Kind.JOIN, stream.encode_join(HELLO._replace(token=b"x" * 16), 1))
    high = FrameChannel(line.connect())
    high.send(Kind.JOIN, stream.encode_join(HELLO, 3))
    again = [FrameChannel(line.connect()) for _ in range(3)]
    for channel, index in zip(again, (2, 2, 1), strict=True):
        channel.send(Kind.JOIN, stream.encode_join(HELLO, index))
    found = accept_channels(line.accept, Quiet(), HELLO, Ready(Checksum.XXH3, channels=3), 5)
    assert [channel.checksum for channel in found] == [Checksum.XXH3] * 2
    for channel in (again[0], again[2]):
        channel.answer(Kind.JOINED)
    for channel in (wrong, high, again[1], FrameChannel(silent)):
        with pytest.raises((ProtocolError, MigrationError)):
            channel.answer(Kind.JOINED)
    for channel in found:
        channel.transport.close()
    for transport in line.here:
        transport.close()


def test_channels_that_do_not_come_or_are_refused_are_an_error_in_time():
    line = Line()
    with pytest.raises(MigrationError, match="0 of 1 further channels") as caught:
        accept_channels(line.accept, Quiet(), HELLO, Ready(Checksum.CRC32, channels=2), 0.1)
    assert caught.value.errno == errno.ETIMEDOUT
    line = Line(timeout=0.1)
    with pytest.raises(MigrationError) as caught:
        connect_channels(line.connect, Quiet(), HELLO, Ready(Checksum.CRC32, channels=2))
    assert caught.value.errno == errno.ETIMEDOUT and line.here[0]._sock.fileno() == -1
    line.accept(0).close()
    line, gone = Line(timeout=60), Quiet()
    gone.wait_readable = lambda timeout: True
    with pytest.raises(MigrationError, match="gave up before all channels") as caught:
        connect_channels(line.connect, gone, HELLO, Ready(Checksum.CRC32, channels=2))
    assert caught.value.errno == errno.ECONNRESET
    line.accept(0).close()
    for bad in (0, 65):
        with pytest.raises(InvalidArgumentError):
            PrecopySource(None, channels=bad, connect=line.connect)
    with pytest.raises(InvalidArgumentError):
        PrecopySource(None, channels=2)


def test_without_threads_left_it_is_a_typed_error():
    gave_up = []
    with pytest.MonkeyPatch.context() as patch:
        def none_left(_):
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(VfioError, match="a thread for each channel") as caught:
            together([lambda: None, lambda: None], gave_up.append)
    assert caught.value.errno == errno.EAGAIN and gave_up == [caught.value]
