"""Post-copy at the destination: memory with pages missing, and the helper process that places them.

Whoever touches a missing page waits in the kernel; a Python thread does so with the GIL.  So the pages are placed by a
process of its own, forked when the source gives the guest: it has the connection, and the userfaultfds of this one.
"""
import array
import contextlib
import errno
import json
import os
import select
import signal
import socket
import statistics
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from .._core.bitmap import DirtyBitmap
from .._core.errno import error
from .._core.userfault import MissingPages
from ..errors import PostcopyError, VfioError
from ..memory import GuestMemory
from . import stream
from .channel import FrameChannel
from .compression import Codec
from .events import Event, PostcopyDone, PostcopyProgress
from .layout import Block, MemoryLayout
from .pagebits import send_bits
from .stream import COMPRESSED, RUN_SIZE, Checksum, Compression, Done, Header, Kind, Totals, damaged

_NAP = 0.1              # seconds between looks at the end
_REPORT = 0.5           # seconds between reports of the helper
_HEARD = 30.0           # seconds for the other process to hear that the source is lost
_START = 10.0           # seconds for the helper to start
_LINGER = 5.0           # seconds for the source to hear that all is there, over another connection
#: Of guests whose memory will not come: never freed, so that who touches a missing page never finds zeros.
_LOST: list[MissingPages] = []


def check_memory(layout: MemoryLayout) -> None:
    """Refuse memory that nobody can wait for.

    Raises
    ------
    DmaPermissionError
        EPERM: userfaultfd is not for this user.
    UnsupportedError
        EOPNOTSUPP: hugetlb, a file, or a kernel without userfaultfd for such memory.
    """
    for block in layout.blocks:
        if block.region.kind not in ("memfd", "anonymous"):
            raise error(errno.EOPNOTSUPP, "postcopy", block.gpa, block.region.size,
                        f"pages of {block.region.kind} memory can't be waited for: use memfd or anonymous memory")
        _missing(block, DirtyBitmap(block.npages, layout.pgsize), layout.pgsize).close()


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


def _missing(block: Block, bitmap: DirtyBitmap, pgsize: int) -> MissingPages:
    region = block.region
    return MissingPages(region.vaddr, region.size, bitmap, pgsize, region.kind == "memfd", _aliases(block, pgsize))


def _aliases(block: Block, pgsize: int) -> list[tuple[int, int, int]]:
    """Return where else this process has the memory: software devices have mappings of their IOMMU's."""
    region = block.region
    if region.fd is None:
        return []
    info, found = os.fstat(region.fd), []
    with open("/proc/self/maps") as maps:
        for line in maps:
            place, _, offset, device, inode = line.split(maxsplit=5)[:5]
            major, minor = (int(number, 16) for number in device.split(":"))
            if int(inode) != info.st_ino or os.makedev(major, minor) != info.st_dev:
                continue
            start, end = (int(address, 16) for address in place.split("-"))
            first = int(offset, 16) - region.offset      # where the mapping begins in the region
            low, high = max(first, 0), min(first + end - start, region.size)
            address = start + low - first
            if low < high and not region.vaddr <= address <= region.last:
                found.append((address, low // pgsize, (high - low) // pgsize))
    return found


class MissingMemory:
    """Guest memory of which pages come later.

    Parameters
    ----------
    layout : MemoryLayout
    left : DirtyBitmap
        Which; what they hold is thrown away.
    epoch : int
        Of the frames that bring them.
    reconnect : callable, optional
        Called in the helper process with seconds; returns the channel of another connection from the same source, after
        READY, or raises.
    on_event : callable, optional
        Called with PostcopyProgress and PostcopyDone, in a thread.

    Attributes
    ----------
    left : int
        Pages that are not there, as this process knows.
    """

    def __init__(self, layout: MemoryLayout, left: DirtyBitmap, epoch: int, *, compression: Compression,
                 reconnect: Callable[[float], FrameChannel] | None, wait: float,
                 on_event: Callable[[Event], object] | None = None) -> None:
        self._layout, self._epoch, self._compression = layout, epoch, compression
        self._reconnect, self._wait = reconnect, wait
        self._on_event = on_event or (lambda _: None)
        self.left = self._all = left.count()
        self._pages: list[MissingPages] = []
        self._pid, self._pidfd = 0, -1
        self._control: socket.socket | None = None
        self._monitor: threading.Thread | None = None
        self._changed = threading.Condition()
        self._failure: PostcopyError | None = None
        self._done: PostcopyDone | None = None
        self._began = 0.0
        try:
            for block in layout.blocks:
                bits = left[block.first_bit:block.first_bit + block.npages]
                self._pages.append(_missing(block, bits, layout.pgsize))
        except BaseException:
            self.undo()
            raise

    def fork(self, channel: FrameChannel, needed: Sequence[int] | None = None) -> None:
        """Start the helper, which waits for ``go``.

        Parameters
        ----------
        channel : FrameChannel
            To the source.
        needed : sequence of int, optional
            Descriptors of the channel and of ``reconnect``: the helper gives all others up.

        Raises
        ------
        VfioError
            EAGAIN, ENOMEM, EMFILE: there can't be one; nothing has changed.
        """
        self._end_helper()
        self._failure = None        # of an earlier helper
        try:
            ours, theirs = socket.socketpair()
        except OSError as exc:
            raise error(exc.errno or errno.EMFILE, "postcopy", hint="two descriptors are needed") from None
        self._keep_from_children(True)      # it needs no tables of pages, and must not make them copies on write
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)     # other threads: the helper needs none of theirs
                pid = os.fork()
        except OSError as exc:
            self._keep_from_children(False)
            ours.close()
            theirs.close()
            raise error(exc.errno or errno.EAGAIN, "postcopy", hint="a helper process is needed") from None
        if not pid:
            status = 1
            try:
                _forget_signals()
                ours.close()
                if needed is not None:
                    _give_up_descriptors({theirs.fileno(), *needed, *(pages.fileno() for pages in self._pages)})
                status = _Helper(self, channel, theirs).run()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        self._keep_from_children(False)
        theirs.close()
        self._pid, self._control = pid, ours
        try:
            self._pidfd = os.pidfd_open(pid)
            ours.settimeout(_START)
            if not ours.recv(1):
                raise error(errno.ECHILD, "postcopy")
            ours.settimeout(None)
            for pages in self._pages:
                pages.guard(self._pidfd)
            monitor = threading.Thread(target=self._watch, name="vfiodma-postcopy", daemon=True)
            monitor.start()
            self._monitor = monitor
        except BaseException as exc:
            self._end_helper()
            if not isinstance(exc, OSError | RuntimeError):
                raise
            raise error(getattr(exc, "errno", None) or errno.EAGAIN, "postcopy", hint="a helper process is needed, and "
                        "threads and descriptors to watch it") from exc

    def go(self) -> None:
        """The guest is owned: the helper tells the source so, and places pages from here on."""
        self._began = time.monotonic()
        control = self._control
        if control is not None:
            with contextlib.suppress(OSError):      # it is gone: the monitor hears of it
                control.sendall(b"go\n")

    def finish(self, timeout: float | None = None) -> PostcopyDone:
        """Wait until every page is there.

        Raises
        ------
        PostcopyError
            The source is gone, or silent, or the time is over (ETIMEDOUT): who touches a missing page waits on.
            ``finish`` again waits for the source once more, unless the helper is gone (EOWNERDEAD).
        """
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            if self._failure is not None and self._control is not None:
                self._failure = None
                with contextlib.suppress(OSError):
                    self._control.sendall(b"again\n")
            while self._done is None and self._failure is None:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise self._error(errno.ETIMEDOUT, "the time is over")
                self._changed.wait(left)
            if self._failure is not None:
                raise self._failure
            assert self._done is not None
            return self._done

    @property
    def done(self) -> bool:
        """Whether every page is there."""
        return self._done is not None

    def undo(self) -> None:
        """The source keeps the guest: pages may be written again, and those that were missing are zeros."""
        self._end_helper()
        while self._pages:
            self._pages.pop().close(abandon=True)

    def close(self, abandon: bool = False) -> None:
        """Let the memory go; idempotent.

        Raises
        ------
        BusyError
            EBUSY: pages are missing, and the guest may touch them.  With ``abandon`` it finds zeros there.
        """
        if self._pages and self._done is None and not abandon:
            raise error(errno.EBUSY, "postcopy", hint=f"{self.left} pages of the guest are not there yet: finish()")
        self.undo()

    def give_up(self) -> None:
        """Nobody places pages any more; who touches one gets SIGBUS, and finds no zeros."""
        _LOST.extend(self._pages)
        self._end_helper(guarded=True)

    # Inside

    def _keep_from_children(self, keep: bool) -> None:
        for pages in self._pages:
            pages.keep_from_children(keep)

    def _end_helper(self, guarded: bool = False) -> None:
        for pages in self._pages if not guarded else ():
            pages.unguard()
        control, self._control = self._control, None
        if self._pidfd >= 0:
            if self._done is None:      # else it may still tell the source
                with contextlib.suppress(OSError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = -1
        if control is not None:
            with contextlib.suppress(OSError):
                control.shutdown(socket.SHUT_RDWR)      # it ends, and so does the monitor
        if self._monitor is not None:
            self._monitor.join()
        elif self._pid:
            self._reap()
        if control is not None:
            control.close()
        self._monitor, self._pid = None, 0

    def _reap(self) -> int:
        with contextlib.suppress(ChildProcessError):
            return os.waitpid(self._pid, 0)[1]
        return 0

    def _error(self, number: int, words: str) -> PostcopyError:
        end = "gets SIGBUS" if number == errno.EOWNERDEAD else "waits"
        exc = PostcopyError(number, operation="postcopy", hint=(
            f"{words}; {self.left} of the {self._all} pages that were to come are missing: whoever touches one {end}"))
        exc.missing = self.left
        return exc

    def _watch(self) -> None:
        """Hear what the helper says, until it ends."""
        control = self._control
        assert control is not None
        with contextlib.suppress(OSError, ValueError), control.makefile("r") as lines:
            for line in lines:
                said = json.loads(line)
                with self._changed:
                    self.left = said["left"]
                    if "errno" in said:
                        self._failure = self._error(said["errno"], said["words"])
                        control.sendall(b"heard\n")
                    elif "done" in said:
                        for pages in self._pages:
                            pages.close(abandon=True)       # all placed: by the helper
                        self._done = PostcopyDone(**said["done"], seconds=time.monotonic() - self._began)
                    self._changed.notify_all()
                try:
                    self._on_event(self._done if "done" in said and self._done is not None
                                   else PostcopyProgress(self.left, said["faults"]))
                except Exception:       # the caller's: who waits in finish() needs this thread
                    traceback.print_exc()
        status = self._reap()
        with self._changed:
            if self._done is None:
                self._control = None
                control.close()
                self._failure = self._error(errno.EOWNERDEAD, f"the helper process is gone (status {status:#x})")
                self._changed.notify_all()


def _forget_signals() -> None:
    """Handlers are the other process's, and so is what would end both: the helper ends when that one does."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _give_up_descriptors(needed: set[int]) -> None:
    """Let go of other files, but not of their numbers: objects of this process may still close those."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != null and fd not in needed:
            os.dup2(null, fd, inheritable=False)


class _Helper:
    """What runs in the helper process: two threads, one for faults and one for frames."""

    def __init__(self, memory: MissingMemory, channel: FrameChannel, control: socket.socket) -> None:
        self._layout, self._epoch, self._wait = memory._layout, memory._epoch, memory._wait
        self._pages, self._reconnect = memory._pages, memory._reconnect
        self._codec = Codec(memory._compression) if memory._compression else None
        self._channel: FrameChannel | None = channel
        self._control = control
        self._sending = threading.Lock()        # of WANTED, against another connection
        self._asked: dict[tuple[int, int], float] = {}      # pages that somebody waits for, since when
        self._seconds = array.array("d")        # of faults
        self._totals = [0, 0]                   # pages, zero pages; over all connections
        self._received = 0
        self._over = threading.Event()
        self._heard = False                     # the source knows that all is there
        self._told = 0.0

    def run(self) -> int:
        """Do it all; return the status of the process."""
        self._control.send(b"\n")
        if self._order() != b"go\n":
            return 1
        channel = self._channel
        assert channel is not None
        with contextlib.suppress(VfioError):        # the source asks again
            channel.send(Kind.STARTED)
        watcher = threading.Thread(target=self._watch, name="vfiodma-faults", daemon=True)
        watcher.start()
        try:
            while not self._place_all():
                if not self._wanted_again():
                    return 1
            return 0
        finally:
            self._over.set()
            watcher.join()

    def _order(self) -> bytes:
        with contextlib.suppress(OSError):
            return self._control.recv(64)
        return b""

    def _wanted_again(self) -> bool:
        """Wait until the other process wants to wait on; False: it does not, or none of its threads can say so."""
        orders = b""
        while not orders.endswith(b"again\n"):
            self._control.settimeout(None if orders else _HEARD)
            order = self._order()
            if not order:
                if not orders and not self._orphaned():     # somebody there waits for a page with the GIL
                    os.write(2, b"vfiodma: the source is lost, and nobody here can be told: all wait for a page\n")
                return False
            orders += order
        self._control.settimeout(None)
        return True

    def _orphaned(self) -> bool:
        """Whether the other process is gone, or wants no more."""
        poll = select.poll()
        poll.register(self._control, 0)
        return bool(poll.poll(0))       # POLLHUP

    @property
    def _left(self) -> int:
        return sum(pages.left for pages in self._pages)

    def _place_all(self) -> bool:
        """Take frames over as many connections as it needs; False: the source is lost, and the other process knows."""
        until = time.monotonic() + self._wait
        while True:
            before = self._left
            try:
                if self._channel is None:
                    self._connected(until)
                self._take(self._channel)
                return True
            except Exception as exc:        # of the caller's ``accept`` as well: nobody else can go on
                failure = exc
                time.sleep(_NAP / 10)       # whatever fails at once must not keep a core busy
            channel = self._channel
            with self._sending:
                self._channel = None
            if channel is not None:
                channel.close()
            if self._heard or self._orphaned():
                return True
            left = self._left
            if not left and before:
                self._tell_done()       # the source did not hear it
            if left != before:
                until = time.monotonic() + (self._wait if left else _LINGER)
            if self._reconnect is None or time.monotonic() >= until:
                if not left:
                    return True
                self._tell(errno=getattr(failure, "errno", None) or errno.EIO,
                           words=f"the source does not come back: {failure}")
                return False

    def _connected(self, until: float) -> None:
        """Wait for another connection, and tell what is missing and wanted."""
        if self._reconnect is None:
            raise error(errno.ECONNRESET, "postcopy", hint="there is no accept= to get another connection from")
        channel = self._reconnect(max(0.001, min(until - time.monotonic(), 1.0)))
        missing = DirtyBitmap(self._layout.nbits, self._layout.pgsize)
        for block, pages in zip(self._layout.blocks, self._pages, strict=True):
            pages.missing(missing[block.first_bit:block.first_bit + block.npages])
        send_bits(channel, Kind.MISSING, self._layout, missing, self._epoch)
        channel.send(Kind.MISSING, epoch=self._epoch)
        with self._sending:
            self._channel, self._received = channel, 0
            self._ask(sorted(self._asked))

    # Frames

    def _take(self, channel: "FrameChannel | None") -> None:
        assert channel is not None
        began = tuple(self._totals)
        while True:
            header, body = channel.receive(Kind.PAGES, Kind.ZEROS, Kind.END, Kind.KEEPALIVE)
            if header.epoch != self._epoch:
                raise damaged(f"a frame of epoch {header.epoch} after epoch {self._epoch}")
            if header.kind is Kind.END:
                break
            if header.kind is not Kind.KEEPALIVE:
                self._place(channel, header, body)
            if time.monotonic() - self._told >= _REPORT:
                self._tell()
                if self._orphaned():        # a source that pauses would not notice
                    raise error(errno.EOWNERDEAD, "postcopy", hint="the other process is gone")
        totals = Totals(self._received, self._totals[0] - began[0], self._totals[1] - began[1])
        if stream.decode_totals(body) != totals:
            raise damaged("the source has sent other totals than came")
        if left := self._left:
            raise damaged(f"the source has sent all, and {left} pages are missing")
        self._tell_done()
        channel.send(Kind.DONE, stream.encode_done(self._summary()), epoch=self._epoch)
        channel.receive(Kind.KEEPALIVE)
        self._heard = True

    def _place(self, channel: FrameChannel, header: Header, body: memoryview) -> None:
        import numpy as np

        if header.block >= len(self._pages):
            raise damaged(f"there is no block {header.block}")
        pages, pgsize = self._pages[header.block], self._layout.pgsize
        runs = np.frombuffer(body[:header.nruns * RUN_SIZE], "<u8").reshape(-1, 2).astype("u8")
        content: Any = None
        most = (stream.DIRECT_BYTES if header.kind is Kind.PAGES else stream.ZEROS_BYTES) // pgsize
        if not header.nruns or (runs > pages.npages).any() or (count := int(runs[:, 1].sum())) > most:
            raise damaged(f"{header.kind.name} without runs, or of too many pages")
        size, length = count * pgsize, header.length - header.nruns * RUN_SIZE
        if header.kind is Kind.PAGES:
            content = body[header.nruns * RUN_SIZE:]
            if header.flags & COMPRESSED:
                if self._codec is None or not length < size:
                    raise damaged("PAGES are compressed, which was not agreed on")
                content = self._codec.expand(content, size)
            elif length != size:
                raise damaged(f"PAGES with {length} bytes for {count} pages")
            elif channel.checksum is Checksum.NONE:
                content = memoryview(bytearray(size))
                channel.receive_content([content])
        elif length:
            raise damaged("ZEROS with content")
        pages.place(runs, content)
        self._received += 1
        self._totals[header.kind is Kind.ZEROS] += count
        now = time.monotonic()
        for number, page in list(self._asked):
            if number == header.block and not pages.is_missing(page) and (
                    since := self._asked.pop((number, page), None)) is not None:
                self._seconds.append(now - since)

    # Faults

    def _watch(self) -> None:
        """Ask for what somebody touches."""
        poll = select.poll()
        try:
            for pages in self._pages:
                poll.register(pages.fileno(), select.POLLIN)
            while not self._over.is_set():
                self._look(poll)
        except BaseException:       # closed, or out of memory for a page of zeros: then there is no helper any more
            if not self._over.is_set():
                traceback.print_exc()
                os._exit(1)

    def _look(self, poll: Any) -> None:
        if len(self._asked) >= stream.WANTED_PAGES // 2:        # the others wait in the kernel
            time.sleep(_NAP / 100)
        elif poll.poll(_NAP * 1e3):
            for number, pages in enumerate(self._pages):
                self._see(number, pages)

    def _see(self, number: int, pages: MissingPages) -> None:
        now, new = time.monotonic(), []
        for page in pages.next(0):
            key = number, page
            while not pages.is_missing(page):
                if pages.fill(page):        # nobody ever wrote there, or it came meanwhile
                    break
            else:
                if key not in self._asked:
                    self._asked[key] = now
                    new.append(key)
                    if not pages.is_missing(page):
                        self._asked.pop(key, None)
        with self._sending, contextlib.suppress(VfioError):         # the other thread hears of it as well
            self._ask(new)

    def _ask(self, keys: list[tuple[int, int]]) -> None:
        import numpy as np

        if self._channel is None:
            return
        for number in sorted({number for number, _ in keys}):
            runs = np.array([(page, 1) for block, page in keys if block == number], "<u8")
            self._channel.send(Kind.WANTED, runs, block=number, nruns=len(runs), epoch=self._epoch)

    # The other process

    def _summary(self) -> Done:
        seconds = self._seconds
        return Done(sum(self._totals), len(seconds), int(statistics.median(seconds) * 1e9) if seconds else 0,
                    int(max(seconds, default=0) * 1e9))

    def _tell(self, **more: Any) -> None:
        self._told = time.monotonic()
        line = json.dumps({"left": self._left, "faults": len(self._seconds), **more}).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._control.sendall(line)

    def _tell_done(self) -> None:
        """Every page is there: nobody has to wait any more, and the memory is ordinary again."""
        if self._over.is_set():
            return
        done = self._summary()
        self._over.set()
        for pages in self._pages:
            pages.close()
        self._tell(done={"pages": self._totals[0], "zero_pages": self._totals[1], "faults": done.faults,
                         "fault_median": done.median / 1e9, "fault_max": done.longest / 1e9})
