"""Post-copy: the guest runs at the destination while its memory still comes; who touches a missing page waits."""
import collections
import contextlib
import errno
import hmac
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from .._core.bitmap import DirtyBitmap
from .._core.copy import PageStage
from .._core.errno import error
from .._core.userfault import MissingPages
from ..errors import MigrationError, VfioError
from ..memory import GuestMemory
from . import stream
from .channel import FrameChannel
from .layout import Block, MemoryLayout, split_runs
from .stream import RUN_SIZE, Checksum, Hello, Kind, Ready, Totals, damaged

_CHUNK_BYTES = 256 << 10        # pushed at once: a wanted page waits for no more than this
_WINDOW = 1 << 16               # bits of a block that are looked at for the next chunk
_NAP = 0.2                      # seconds between looks at the end
_CURABLE = {errno.EPROTO, errno.EBADMSG, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE}


def _offer(checksum: str) -> Checksum:
    if checksum == "none":
        raise error(errno.EINVAL, "postcopy", hint="post-copy has checksums: a guest runs on what came")
    return stream.offer(checksum)


class PostcopySource:
    """Give a guest away at once, and its memory afterwards: what is wanted first, then everything else.

    Parameters
    ----------
    transport : Transport
        Closed by the caller.
    layout : MemoryLayout
        Of memory that nobody writes any more.
    states : mapping of str to bytes, optional
        What the destination needs to run the guest.
    checksum : {"auto", "xxh3", "crc32"}
        As of PrecopySource.
    connect : callable, optional
        Called with seconds; returns another transport when a connection broke, or raises.

    Notes
    -----
    From ``run`` on the guest is the destination's, and half of its memory is here: keep it until ``run`` has returned.
    """

    def __init__(self, transport: Any, layout: MemoryLayout, *, states: Mapping[str, bytes] | None = None,
                 checksum: str = "auto", connect: Callable[[float], Any] | None = None,
                 reconnect_timeout: float = 30.0) -> None:
        import numpy as np

        self._channel = FrameChannel(transport)
        self._layout = layout
        self._states = states or {}
        self._connect, self._timeout = connect, reconnect_timeout
        self._hello = Hello(layout.pgsize, os.urandom(16), layout.shape, _offer(checksum), os.urandom(16))
        self._stage: Any = np.empty(max(_CHUNK_BYTES, layout.pgsize), np.uint8)
        self._left = DirtyBitmap(layout.nbits, layout.pgsize)
        self._wanted: collections.deque[tuple[int, Any]] = collections.deque()
        self._done = threading.Event()
        self._started = False
        self._totals = Totals(0, 0, 0)
        self.wanted_pages = 0           #: that were asked for, and not on their way yet

    def run(self) -> Totals:
        """Give the guest away, then serve and push until the destination has everything; return what was sent.

        Raises
        ------
        MigrationError
            The connection broke, and there was no other.  Before the destination answered RUN the guest is still here;
            after that ``started`` is true, and ``resume`` goes on.
        """
        while True:
            try:
                self._greet()
                self._push()
                return self._totals
            except VfioError as exc:
                if self._connect is None or not self._started or exc.errno not in _CURABLE:
                    raise
                self._channel = FrameChannel(self._connect(self._timeout))

    def resume(self, transport: Any) -> Totals:
        """Go on over another connection; raises as ``run``."""
        self._channel = FrameChannel(transport)
        return self.run()

    @property
    def started(self) -> bool:
        """Whether the destination runs the guest."""
        return self._started

    # Inside

    def _greet(self) -> None:
        channel, hello = self._channel, self._hello._replace(resume=self._started)
        channel.send(Kind.HELLO, stream.encode_hello(hello))
        ready = stream.decode_ready(channel.answer(Kind.READY)[1], hello)
        channel.checksum = ready.checksum
        if not self._started:
            for name, data in self._states.items():
                channel.send(Kind.STATE, stream.encode_state(name, data))
            channel.send(Kind.RUN)
            channel.answer(Kind.STARTED)
            self._started = True
        self._left.clear()
        self._wanted.clear()
        self._done.clear()
        while True:
            header, body = channel.answer(Kind.MISSING)
            if not header.nruns:
                return
            block, runs = self._runs(header, body)
            for first, count in runs.tolist():
                self._left.set(block.first_bit + first, count)

    def _runs(self, header: Any, body: memoryview) -> tuple[Block, Any]:
        import numpy as np

        if header.block >= len(self._layout.blocks):
            raise damaged(f"there is no block {header.block}")
        block = self._layout.blocks[header.block]
        runs = np.frombuffer(body[:header.nruns * RUN_SIZE], "<u8").reshape(-1, 2).astype(np.uint64)
        ends = runs[:, 0] + runs[:, 1]
        if (runs[:, 1] == 0).any() or (ends < runs[:, 0]).any() or (ends > block.npages).any():
            raise damaged(f"{header.kind.name} of pages that are not in block {header.block}")
        return block, runs

    def _push(self) -> None:
        failures: list[BaseException] = []
        listener = threading.Thread(target=self._listen, args=(failures,), name="vfiodma-wanted", daemon=True)
        listener.start()
        try:
            cursor = (0, 0)
            while not self._done.is_set() and (portion := self._next(cursor)) is not None:
                block, runs = portion
                self._send(block, runs)
                cursor = (block.number, int(runs[-1, 0] + runs[-1, 1]))
            if not failures:
                self._channel.send(Kind.END, stream.encode_totals(self._totals), flags=stream.FINAL)
                self._done.wait()
        except BaseException as exc:
            failures.append(exc)
            self._channel.transport.interrupt()
        listener.join()
        if failures:
            raise failures[0]       # the other one, if any, was caused by it

    def _listen(self, failures: list[BaseException]) -> None:
        try:
            while True:
                if not self._channel.transport.wait_readable(_NAP):
                    continue
                header, body = self._channel.answer(Kind.WANTED, Kind.ACK)
                if header.kind is Kind.ACK:
                    return
                block, runs = self._runs(header, body)
                self._wanted.append((block.number, runs))
        except BaseException as exc:
            failures.append(exc)
            self._channel.transport.interrupt()
        finally:
            self._done.set()

    def _next(self, cursor: tuple[int, int]) -> "tuple[Block, Any] | None":
        """What somebody waits for, else the next chunk from the last one on: neighbours are wanted soon."""
        import numpy as np

        while self._wanted:
            number, runs = self._wanted.popleft()
            block = self._layout.blocks[number]
            pages = [page for first, count in runs.tolist() for page in range(first, first + count)
                     if self._left.test(block.first_bit + page)]       # else it is on its way
            if pages:
                self.wanted_pages += len(pages)
                return block, np.array([(page, 1) for page in pages], np.uint64)
        if not self._left.any():
            return None
        blocks = self._layout.blocks
        number, page = cursor
        while True:
            block = blocks[number]
            for start in range(page // 64 * 64, block.npages, _WINDOW):
                stop = min(start + _WINDOW, block.npages)
                runs = self._left[block.first_bit + start:block.first_bit + stop].runs()
                if len(runs):
                    runs[:, 0] += start
                    return block, next(split_runs(runs, len(self._stage) // self._layout.pgsize))
            number, page = (number + 1) % len(blocks), 0

    def _send(self, block: Block, runs: Any) -> None:
        chunk = PageStage(block.view, runs, self._stage, self._layout.pgsize)
        frames, pages, zero_pages = self._totals
        try:
            while chunk.next():
                if chunk.zero_pages:
                    self._send_runs(Kind.ZEROS, block, chunk.zeros)
                if chunk.kept_pages:
                    self._send_runs(Kind.PAGES, block, chunk.kept,
                                    [self._stage[:chunk.kept_pages * self._layout.pgsize]])
                frames += (chunk.zero_pages > 0) + (chunk.kept_pages > 0)
                pages, zero_pages = pages + chunk.kept_pages, zero_pages + chunk.zero_pages
        finally:
            chunk.release()
        self._totals = Totals(frames, pages, zero_pages)
        for first, count in runs.tolist():
            self._left.clear(block.first_bit + first, count)

    def _send_runs(self, kind: Kind, block: Block, runs: Any, content: Any = ()) -> None:
        self._channel.send(kind, runs.astype("<u8", copy=False), content=content, block=block.number, nruns=len(runs))


class PostcopyReceiver:
    """Run a guest whose memory comes when it is touched, and in the background.

    Parameters
    ----------
    transport : Transport
        Closed by the caller.
    make_memory : callable
        Called with a Hello; returns fresh GuestMemory that nobody touched: memfd or anonymous, no huge pages.
    checksum : {"auto", "xxh3", "crc32"}
        As of PageReceiver.
    accept : callable, optional
        Called with seconds; returns the next connection when one broke, or raises.
    on_state : callable, optional
        Called with (name, bytes) of each state.

    Attributes
    ----------
    memory : GuestMemory
        From ``start`` on; owned by the caller.

    Notes
    -----
    ``start``, then run the guest, and ``receive`` until everything is there.  A Python thread that touches a missing
    page waits with the GIL, and ``receive`` in the same process would wait for ever: fork, and call ``receive`` in the
    child, unless only C code that released the GIL touches the memory.  **Devices of the kernel can't wait for pages**:
    map the memory for them after ``receive`` (``refuse_kernel_devices``); software devices wait as any thread does.
    Every page is placed exactly once.  When the connection breaks, whoever waits goes on waiting; ``receive`` takes
    another connection, and asks for what is left.
    """

    def __init__(self, transport: Any, make_memory: Callable[[Hello], GuestMemory], *, checksum: str = "auto",
                 accept: Callable[[float], Any] | None = None, reconnect_timeout: float = 30.0,
                 on_state: Callable[[str, bytes], object] | None = None) -> None:
        self._channel: FrameChannel | None = FrameChannel(transport)
        self._make_memory = make_memory
        self._takes = _offer(checksum)
        self._accept, self._timeout = accept, reconnect_timeout
        self._on_state = on_state or (lambda *_: None)
        self._hello: Hello | None = None
        self.memory: GuestMemory | None = None
        self._missing: list[MissingPages] = []
        self._waiting: list[set[int]] = []      # pages that somebody waits for
        self._sending = threading.Lock()
        self._over = threading.Event()

    def start(self) -> GuestMemory:
        """Get memory ready and take the guest over; return its memory, where nothing is yet.

        Raises
        ------
        MigrationError, VfioError
            The guest is still the source's.
        """
        channel = self._channel
        assert channel is not None
        hello = stream.decode_hello(channel.receive(Kind.HELLO)[1])
        memory = self._make_memory(hello)
        with MemoryLayout(memory, hello.pgsize) as layout:
            if layout.shape != hello.blocks:
                raise error(errno.EINVAL, "postcopy", hint="the memory made is not the one that was announced")
            self._missing = [MissingPages(block.region.vaddr, block.region.size, hello.pgsize)
                             for block in layout.blocks]
        self._waiting = [set() for _ in self._missing]
        self._hello, self.memory = hello, memory
        self._ready(channel, hello)
        while True:
            header, body = channel.receive(Kind.STATE, Kind.RUN)
            if header.kind is Kind.RUN:
                break
            self._on_state(*stream.decode_state(body))
        channel.send(Kind.STARTED)
        self._ask(channel)
        return memory

    def receive(self) -> None:
        """Place pages until all are there.

        Raises
        ------
        MigrationError
            The connection broke, and there was no other: whoever waits for a page goes on waiting; ``resume``.
        """
        self._over.clear()
        threads = [threading.Thread(target=self._watch, args=(number,), name=f"vfiodma-faults-{number}", daemon=True)
                   for number in range(len(self._missing))]
        for thread in threads:
            thread.start()
        try:
            while True:
                channel = self._channel
                if channel is None and self._accept is not None:
                    channel = FrameChannel(self._accept(self._timeout))     # its failure is the end
                try:
                    if channel is not self._channel and channel is not None:
                        self._connected(channel)
                    self._take_all()
                    return
                except VfioError as exc:
                    with self._sending:
                        self._channel = None
                    if channel is not None:
                        channel.transport.interrupt()
                    if self._accept is None or exc.errno not in _CURABLE:
                        raise
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def resume(self, transport: Any) -> None:
        """Go on over another connection; raises as ``receive``."""
        self._connected(FrameChannel(transport))
        self.receive()

    @property
    def left(self) -> int:
        """Pages that are not there yet, as this process knows."""
        return sum(missing.left for missing in self._missing)

    def close(self, *, abandon: bool = False) -> None:
        """Let the memory go; EBUSY while pages are left.  With ``abandon``, what did not come is zero."""
        for missing in self._missing:
            missing.close(abandon)

    # Inside

    def _ready(self, channel: FrameChannel, hello: Hello) -> None:
        checksum = stream.agree(hello.checksums, self._takes)
        channel.send(Kind.READY, stream.encode_ready(hello.stream_id, Ready(checksum)))
        channel.checksum = checksum

    def _connected(self, channel: FrameChannel) -> None:
        known = self._hello
        assert known is not None
        hello = stream.decode_hello(channel.receive(Kind.HELLO)[1])
        if not hello.resume or hello.blocks != known.blocks or not hmac.compare_digest(
                hello.stream_id + hello.token, known.stream_id + known.token):
            raise damaged("the connection is of another stream")
        self._ready(channel, hello)
        self._ask(channel)

    def _ask(self, channel: FrameChannel) -> None:
        """Tell what is missing, and what somebody waits for."""
        with self._sending:
            for number, missing in enumerate(self._missing):
                bitmap: Any = DirtyBitmap(missing.npages, missing.pgsize)
                missing.missing(bitmap)
                runs = bitmap.runs()
                for start in range(0, len(runs), stream.MAX_RUNS):
                    self._send_runs(channel, Kind.MISSING, number, runs[start:start + stream.MAX_RUNS])
            channel.send(Kind.MISSING)
            self._channel = channel
            for number, pages in enumerate(self._waiting):
                self._want(number, sorted(pages))

    @staticmethod
    def _send_runs(channel: FrameChannel, kind: Kind, number: int, runs: Any) -> None:
        channel.send(kind, runs.astype("<u8", copy=False), block=number, nruns=len(runs))

    def _want(self, number: int, pages: list[int]) -> None:
        import numpy as np

        still = [page for page in pages if self._missing[number].is_missing(page)]
        if still and self._channel is not None:
            self._send_runs(self._channel, Kind.WANTED, number, np.array([(page, 1) for page in still], np.uint64))

    def _watch(self, number: int) -> None:
        """Ask for what somebody touches in one block."""
        while not self._over.is_set():
            pages = self._missing[number].next(_NAP)
            if pages:
                with self._sending, contextlib.suppress(VfioError):     # receive() hears of it as well
                    self._waiting[number].update(pages)
                    self._want(number, pages)

    def _take_all(self) -> None:
        import numpy as np

        channel = self._channel
        if channel is None:
            raise MigrationError(errno.ECONNRESET, operation="postcopy", hint="there is no connection: resume()")
        while True:
            header, body = channel.receive(Kind.PAGES, Kind.ZEROS, Kind.END)
            if header.kind is Kind.END:
                break
            if header.block >= len(self._missing):
                raise damaged(f"there is no block {header.block}")
            runs = np.frombuffer(body[:header.nruns * RUN_SIZE], "<u8").reshape(-1, 2).astype(np.uint64)
            content = body[header.nruns * RUN_SIZE:] if header.kind is Kind.PAGES else None
            if not header.nruns or (content is None and len(body) != header.nruns * RUN_SIZE):
                raise damaged(f"{header.kind.name} without runs, or with too much")
            self._missing[header.block].place(runs, content)
        if self.left:
            raise damaged(f"the source has sent all, and {self.left} pages are missing")
        with self._sending:
            channel.send(Kind.ACK, stream.encode_totals(Totals(0, 0, 0)))


def refuse_kernel_devices(ioas: Any, memory: GuestMemory) -> None:
    """Refuse post-copy where devices of the kernel reach the memory: they need pages that are there, and pinned.

    Raises
    ------
    BusyError
        EBUSY: memory is mapped in a container that is not the software one.
    """
    if type(ioas.backend).__module__.startswith("vfiodma.backends.software"):
        return
    for mapping in ioas.mappings(mmio=False):
        for _, region in memory:
            if mapping.vaddr <= region.last and region.vaddr < mapping.vaddr + mapping.size:
                raise error(errno.EBUSY, "postcopy", mapping.iova, mapping.size,
                            "devices can't wait for pages: unmap the memory, and map it when all is there")
