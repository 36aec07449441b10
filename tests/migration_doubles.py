"""Stand-ins for the ends of a migration: transports that record, replay, cut and interfere; a tracker and a machine."""
import errno
import socket
import threading

from vfiodma import DirtyLog, GuestMemory
from vfiodma._core.errno import error
from vfiodma.migration import PageReceiver, PrecopySource, Round, SocketTransport
from vfiodma.migration.layout import MemoryLayout

PGSIZE = 512        # small pages keep recorded streams short


class Recorder(SocketTransport):
    """Keeps every frame that is sent."""

    def __init__(self, sock, timeout=10.0):
        super().__init__(sock, timeout)
        self.frames = []

    def send(self, parts):
        self.frames.append(b"".join(bytes(part) for part in parts))
        super().send(parts)


class Hooked(SocketTransport):
    """Calls ``before(number of the frame)`` when a frame is complete, checksum included, and not sent yet."""

    def __init__(self, sock, before, timeout=10.0):
        super().__init__(sock, timeout)
        self.before = before
        self.count = 0

    def send(self, parts):
        self.before(self.count)
        self.count += 1
        super().send(parts)


class Replay:
    """A transport that delivers recorded bytes, and then the end of the stream."""

    def __init__(self, data):
        self.data = memoryview(data)
        self.at = 0
        self.answers = []

    def send(self, parts):
        self.answers.append(b"".join(bytes(part) for part in parts))

    def receive_into(self, view):
        end = self.at + len(view)
        if end > len(self.data):
            raise error(errno.EPROTO, "receive", hint="the stream ended too early")
        view[:] = self.data[self.at:end]
        self.at = end

    def receive_parts(self, views):
        for view in views:
            self.receive_into(view)

    def close(self):
        pass

    def wait_readable(self, timeout=None):
        return timeout != 0

    def interrupt(self, receiving=True, sending=True):
        pass


class LogTracker:
    """A tracker over one dirty log."""

    def __init__(self, layout):
        self.log = DirtyLog(layout.nbits, layout.pgsize)
        self.started = self.stopped = 0

    def start(self):
        self.started += 1

    def harvest(self, into):
        return self.log.harvest(into)

    def stop(self):
        self.stopped += 1


class Machine:
    """A machine that remembers what it was told."""

    def __init__(self, state=None):
        self.calls = []
        self._state = state or {}

    def stop(self):
        self.calls.append("stop")

    def resume(self):
        self.calls.append("resume")

    def state(self):
        self.calls.append("state")
        return self._state


def each_round(call):
    """An ``on_event`` that hears of rounds only."""
    return lambda event: call(event) if isinstance(event, Round) else None


class Peer(threading.Thread):
    """A PageReceiver in a thread; ``join`` raises nothing, ``failure`` is what ended it."""

    def __init__(self, sock, memory, verify=False, timeout=10.0, **options):
        super().__init__()
        self.transport = SocketTransport(sock, timeout)
        self.receiver = PageReceiver(self.transport, lambda hello: memory, **options)
        self.verify, self.failure = verify, None
        self.start()

    def run(self):
        try:
            self.receiver.receive()
            if self.verify:
                self.receiver.settle()
        except OSError as exc:
            self.failure = exc
        finally:
            self.receiver.close()
            self.transport.close()


def guest(contents, gap=True):
    """Return memory with a region for each bytes object, each a multiple of 4096 bytes."""
    memory, gpa = GuestMemory(), 0
    for content in contents:
        region = GuestMemory.memfd(len(content)).region
        memory.add(region, gpa)
        memory.write(gpa, content)
        gpa += len(content) + (1 << 20 if gap else 0)
    return memory


def content_of(memory):
    """Return the bytes of each region."""
    return [memory.read(gpa, region.size) for gpa, region in memory]


def record(memory, target, writes=(), rounds=2, states=None, checksum="auto"):
    """Move memory to ``target``; return the frames that the source sent.  ``writes`` happen after the first round."""
    here, there = socket.socketpair()
    peer = Peer(there, target, verify=True, checksum=checksum)
    recorder = Recorder(here)
    try:
        with MemoryLayout(memory, PGSIZE) as layout:
            tracker = LogTracker(layout)

            def on_round(done):
                if done.epoch == 0:
                    for block, page, data in writes:
                        memory.write(layout.blocks[block].gpa + page * PGSIZE, data)
                        tracker.log.mark(layout.blocks[block].first_bit + page)

            source = PrecopySource(recorder, downtime_limit=1e-9, max_rounds=rounds, checksum=checksum,
                                   on_event=each_round(on_round))
            source.introduce(memory, PGSIZE)
            source.migrate(layout, tracker, Machine({"device": b"state"}), states)
            assert len(set(source.verify(layout))) == 1
            source.release()
    finally:
        recorder.close()
        peer.join()
    assert peer.failure is None
    return recorder.frames
