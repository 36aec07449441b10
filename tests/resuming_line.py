"""A destination that listens, and lines to it that are cut."""
import contextlib
import errno
import queue
import socket
import threading

from vfiodma.errors import MigrationError, VfioError
from vfiodma.migration import PageReceiver, SocketTransport
from vfiodma.migration.stream import Phase


class Cut(SocketTransport):
    """Cuts the line after ``left`` more bytes have gone through, either way: the rest is lost."""

    def __init__(self, sock, left, timeout=5.0):
        super().__init__(sock, timeout)
        self.left = left
        self.moved = 0
        self.ends = []          # after how many bytes a frame, or an answer's part, was complete

    def _cut(self):
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        raise MigrationError(errno.ECONNRESET, operation="send", hint="cut by the test")

    def send(self, parts):
        data = b"".join(bytes(part) for part in parts)
        self.moved += len(data)
        if self.left is not None and self.moved > self.left:
            with contextlib.suppress(VfioError):
                super().send([data[:len(data) - (self.moved - self.left)]])
            self._cut()
        super().send([data])
        self.ends.append(self.moved)

    def receive_into(self, view):
        super().receive_into(view)
        self.moved += len(view)
        self.ends.append(self.moved)
        if self.left is not None and self.moved > self.left:
            self._cut()


class Line:
    """A destination that listens, and connections to it that are cut after so many bytes each."""

    def __init__(self, target, cuts, **options):
        self.cuts, self.waiting, self.opened = iter(cuts), queue.Queue(), []
        self.receiver = None
        self.failure, self.phase, self.runs = None, None, 0
        self.options = options
        self.breaks = options.pop("breaks", 1000)
        self.target = target
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def accept(self, seconds=5):
        try:
            sock = self.waiting.get(timeout=seconds)
            if sock is None:
                self.waiting.put(None)      # for whoever asks next
        except queue.Empty:
            sock = None
        if sock is None:
            raise MigrationError(errno.ETIMEDOUT, operation="accept", hint="nobody came")
        return SocketTransport(sock, 5)

    def first(self):
        return self.accept()

    def serve(self):
        try:
            self.receiver = PageReceiver(self.first(), lambda hello: self.target, accept=self.accept,
                                         **self.options)
            self.phase = self.receiver.serve(5, breaks=self.breaks)
            if self.phase is Phase.OWNER:
                self.runs += 1
            # The answer may have got lost: the next connection is told.
            while True:
                self.receiver.linger(5)
        except VfioError as exc:
            self.failure = exc

    def connect(self):
        here, there = socket.socketpair()
        transport = Cut(here, next(self.cuts, None))
        self.opened.append(transport)
        self.waiting.put(there)
        return transport

    def close(self):
        for transport in self.opened:
            transport.close()
        self.waiting.put(None)
        self.thread.join(20)
        assert not self.thread.is_alive()
        if self.receiver is not None:
            self.receiver.close()
