"""The devices of a guest together: their states as chunks of a stream, saved and resumed in the order VFIO asks for.

A chunk is a header of 16 bytes (little-endian: version u8, flags u8, attempt u16, bytes of content u32, offset of the
content in the device's stream u64) and the content.  A device's last chunk has the flag LAST and no content, so that a
stream which ends early is not taken for a whole one.  What was read of a device can't be read again: after a broken
connection its state begins anew, as another attempt, and the destination forgets what it had.
"""
import errno
import struct
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from functools import partial
from typing import Any, Self

from .._core.errno import error
from .._core.type1 import generation
from ..devices.migration import MigrationFlags
from ..devices.pci import VfioDevice
from ..errors import MigrationError, UnsupportedError
from .device_state import DeviceStateSink, DeviceStateSource, Pending, StateSink, StateSource
from .stream import damaged

#: What the names of STATE frames with chunks begin with; the device's name follows.
PREFIX = "device:"
CHUNK_VERSION = 1
LAST = 1                    #: flag: the device's stream is complete
CHUNK_BYTES = 1 << 20       #: content of a chunk, by default
MAX_CHUNK = 8 << 20         #: at most: it travels in one frame
_HEADER = struct.Struct("<BBHIQ")
_MAX_ATTEMPTS = 1 << 16


class _SideBySide:
    """Does a step on all devices at once, for drivers may take long.  Its threads wait for that from ``begin`` on."""

    def __init__(self, devices: Sequence[Any]) -> None:
        self._devices = devices
        self._pool: Any = None
        self._generation = generation()

    def begin(self) -> None:
        """Have a thread for each device; in the downtime there is no time for starting them."""
        count = len(self._devices)
        if self._generation != generation():        # the threads are the parent's
            self._pool, self._generation = None, generation()
        if self._pool is None and count > 1:
            pool, barrier = futures.ThreadPoolExecutor(count, "device state"), threading.Barrier(count)
            try:
                list(pool.map(lambda _: barrier.wait(), range(count)))
            except RuntimeError as exc:
                barrier.abort()
                pool.shutdown()
                raise error(errno.EAGAIN, "migrate_device", hint=f"{count} threads are needed: {exc}") from None
            self._pool = pool

    def try_all(self, step: Callable[[Any], Any]) -> tuple[list[Any], list[Exception]]:
        """Return what the steps returned (None: failed), and the failures."""
        outcomes: list[Callable[[], Any]] = [partial(step, device) for device in self._devices]
        if len(outcomes) > 1:
            self.begin()
            begun = [self._pool.submit(outcome) for outcome in outcomes]
            try:
                futures.wait(begun)
            finally:            # interrupted: what follows must not overtake a step that is under way
                futures.wait(begun)
            outcomes = [future.result for future in begun]
        results: list[Any] = []
        failures: list[Exception] = []
        for outcome in outcomes:
            try:
                results.append(outcome())
            except Exception as exc:
                results.append(None)
                failures.append(exc)
        return results, failures

    def on_all(self, step: Callable[[Any], Any]) -> None:
        """Do the step; all are done with it when the first failure is raised."""
        _raise(self.try_all(step)[1])

    def close(self) -> None:
        """End the threads."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()


def _raise(failures: Sequence[Exception]) -> None:
    """Raise the first failure, if there is one, with the others as notes."""
    if failures:
        texts = {str(failures[0])}
        for other in failures[1:]:
            if str(other) not in texts:
                texts.add(str(other))
                failures[0].add_note(f"also: {other}")
        raise failures[0]


def _check_group(devices: Sequence[Any], peer_to_peer: bool) -> list[MigrationFlags]:
    flags = [device.preflight() for device in devices]
    if peer_to_peer and len(devices) > 1:
        lacking = [device.name for device, own in zip(devices, flags, strict=True) if not own & MigrationFlags.P2P]
        if lacking:
            raise UnsupportedError(errno.EOPNOTSUPP, operation="migrate_device", hint=(
                f"{', '.join(lacking)} can't be quiesced for DMA between devices (no P2P states), which several "
                "devices need; peer_to_peer=False says that they never do such DMA"))
    return flags


def _named(devices: Iterable[Any], wrap: type, protocol: type) -> list[Any]:
    parts = [wrap(device) if isinstance(device, VfioDevice) else device for device in devices]
    for part in parts:
        if not isinstance(part, protocol):
            raise error(errno.EINVAL, "migrate_device", hint=f"{part!r} is no VfioDevice and no {protocol.__name__}")
    names = [part.name for part in parts]
    for name in names:
        if not name or names.count(name) > 1:
            raise error(errno.EINVAL, "migrate_device", hint=f"two devices, or none, are called {name!r}")
    return parts


def _resume(devices: Sequence[Any], together: _SideBySide) -> tuple[str, ...]:
    """Let all run: first answer one another, then begin; return the names of those that were reset.

    One that can't be helped keeps nobody else from running.
    """
    answering, failures = together.try_all(lambda device: device.resume_p2p())
    running, more = together.try_all(lambda device: device.resume())
    names = tuple(device.name for device, *lost in zip(devices, answering, running, strict=True) if any(lost))
    if names:
        warnings.warn(f"reset, and without their state now, because they could not be resumed: {', '.join(names)}; "
                      "tell their drivers in the guest", RuntimeWarning, stacklevel=3)
    _raise(failures + more)
    return names


class _Buffers:
    """Two buffers by turns, since new memory costs more than to fill it; one that its taker has kept is left to him."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._pair = [bytearray(), bytearray()]

    def next(self) -> memoryview:
        """Return memory that nobody holds."""
        self._pair.reverse()
        buffer = self._pair[0]
        try:
            buffer.append(0)            # BufferError: a view of it is alive
            del buffer[self._size:]
        except BufferError:
            buffer = bytearray()
        if len(buffer) < self._size:
            buffer = self._pair[0] = bytearray(self._size)
        return memoryview(buffer)


class DeviceStates:
    """The devices that a migration moves away.

    Parameters
    ----------
    devices : iterable of VfioDevice or StateSource
        They stay the caller's.
    peer_to_peer : bool
        Devices may do DMA to one another, so that several of them need P2P states.  False: they never do.
    chunk : int
        Bytes of a chunk, at most; two of them are held in memory.

    Notes
    -----
    ``preflight``, ``start``, then by turns ``pending`` and ``chunks`` while the guest runs; ``quiesce`` when its CPUs
    are stopped, after that the last harvest of dirty pages, ``final_chunks``.  On failure ``resume``; after a broken
    connection ``start`` follows again.  For one thread at a time.
    """

    def __init__(self, devices: Iterable[VfioDevice | StateSource], *, peer_to_peer: bool = True,
                 chunk: int = CHUNK_BYTES) -> None:
        if not 0 < chunk <= MAX_CHUNK:
            raise error(errno.EINVAL, "migrate_device", hint=f"a chunk has 1 to {MAX_CHUNK} bytes, not {chunk}")
        self.devices: list[StateSource] = _named(devices, DeviceStateSource, StateSource)
        self._peer_to_peer = peer_to_peer
        self._chunk = chunk
        self._buffers = _Buffers(_HEADER.size + chunk)
        self._together = _SideBySide(self.devices)
        self._offsets: dict[str, int] = {}
        self._attempt = -1

    def preflight(self) -> list[MigrationFlags]:
        """Return the states that each device has; nothing changes.

        Raises
        ------
        UnsupportedError
            EOPNOTSUPP: a device can't be migrated, or not together with the others.
        MigrationError
            EBUSY: a device is not running.
        """
        return _check_group(self.devices, self._peer_to_peer)

    def start(self) -> None:
        """Begin to save; after a failure all devices run as before."""
        self.preflight()
        self._attempt += 1
        if self._attempt == _MAX_ATTEMPTS:
            raise MigrationError(errno.EOVERFLOW, operation="migrate_device", hint="too many attempts")
        self._offsets = dict.fromkeys((device.name for device in self.devices), 0)
        self._together.begin()
        try:
            self._together.on_all(lambda device: device.start())
        except BaseException:
            self.resume()
            raise

    def pending(self) -> Pending:
        """Return what is left of all; do not stop the guest for good while there are initial bytes."""
        parts = [device.pending() for device in self.devices]
        final = [part.final_bytes for part in parts]
        return Pending(sum(part.initial_bytes for part in parts), sum(part.dirty_bytes for part in parts),
                       None if None in final else sum(filter(None, final)))

    def chunks(self) -> Iterator[tuple[str, memoryview]]:
        """Yield (name of the STATE frame, its bytes) while the devices run.

        No more is read than ``pending`` tells at the beginning, so that it ends however much the devices change.  The
        bytes may be kept; where they are not, their memory is used again.
        """
        for device in self.devices:
            initial, dirty, _ = device.pending()
            left = initial + dirty
            while left > 0:
                chunk, count = self._read(device, min(left, self._chunk))
                if not count:
                    break
                left -= count
                yield PREFIX + device.name, chunk

    def quiesce(self) -> None:
        """Have all devices begin no DMA to others, and when all do not, have all stand still.

        The guest's CPUs are stopped before.  When it returns there is no DMA and no interrupt any more.
        """
        self._together.on_all(lambda device: device.quiesce())
        self._together.on_all(lambda device: device.stop())

    def final_chunks(self) -> Iterator[tuple[str, memoryview]]:
        """Yield the rest of all, as ``chunks``; every device ends with a chunk that says so."""
        for device in self.devices:
            count = 1
            while count:
                chunk, count = self._read(device, self._chunk, LAST)
                yield PREFIX + device.name, chunk

    def _read(self, device: StateSource, most: int, at_end: int = 0) -> tuple[memoryview, int]:
        """Return a chunk and the bytes of its content; ``at_end`` are the flags of one without."""
        buffer = self._buffers.next()
        count, offset = device.readinto(buffer[_HEADER.size:_HEADER.size + most]), self._offsets[device.name]
        _HEADER.pack_into(buffer, 0, CHUNK_VERSION, 0 if count else at_end, self._attempt, count, offset)
        self._offsets[device.name] = offset + count
        return buffer[:_HEADER.size + count], count

    def resume(self) -> tuple[str, ...]:
        """Let all devices run on, wherever they are.

        Returns
        -------
        tuple of str
            Names of devices that had to be reset for that and have lost their state; told by a RuntimeWarning, too.

        Raises
        ------
        MigrationError
            A device could not be brought back at all; the others run.
        """
        return _resume(self.devices, self._together)

    def close(self) -> None:
        """Let go of the streams; the devices keep their states.  Idempotent."""
        for device in self.devices:
            device.close()
        self._together.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Arriving:
    """How far a device's stream has come."""

    def __init__(self, sink: StateSink) -> None:
        self.sink = sink
        self.attempt = 0
        self.bytes = 0
        self.complete = False


class DeviceSinks:
    """The devices that take over the states of others.

    Parameters
    ----------
    devices : iterable of VfioDevice or StateSink
        Called as at the source; they stay the caller's.
    peer_to_peer : bool
        As of DeviceStates.
    limit : int
        Bytes of one device's state, at most.

    Notes
    -----
    ``prepare``, ``take`` of each STATE frame, ``load`` before the last acknowledgement, ``run`` when the guest is ours.
    ``abort`` resets the devices; ``close`` does so too unless they run.  For one thread at a time.
    """

    def __init__(self, devices: Iterable[VfioDevice | StateSink], *, peer_to_peer: bool = True,
                 limit: int = 16 << 30) -> None:
        self.devices: list[StateSink] = _named(devices, DeviceStateSink, StateSink)
        self._peer_to_peer = peer_to_peer
        self._limit = limit
        self._together = _SideBySide(self.devices)
        self._arriving: dict[str, _Arriving] = {}
        self._attempt = 0           # the newest one
        self._mine = False          # the devices wait for a state, or have one

    def preflight(self) -> list[MigrationFlags]:
        """As of DeviceStates."""
        return _check_group(self.devices, self._peer_to_peer)

    def prepare(self) -> None:
        """Have all devices wait for their state; after a failure they are reset."""
        self.preflight()
        self._arriving, self._mine = {device.name: _Arriving(device) for device in self.devices}, True
        self._attempt = 0
        self._together.begin()
        try:
            self._together.on_all(lambda device: device.prepare())
        except BaseException:
            self.abort()
            raise

    def take(self, name: str, data: Any) -> bool:
        """Take a STATE frame; return False where it is not a device's.

        Raises
        ------
        ProtocolError
            EPROTO: a device that is not here, a chunk that is damaged, lost, repeated, or too much.
        MigrationError
            The device refuses its state.  ``abort`` is what is left to do.
        """
        if not name.startswith(PREFIX):
            return False
        arriving = self._arriving.get(name[len(PREFIX):])
        if arriving is None:
            raise damaged(f"there is no device {name[len(PREFIX):]!r} here that waits for a state")
        with memoryview(data).cast("B") as view:
            content = self._check(arriving, view)
            if content:
                arriving.sink.write(content)
            arriving.bytes += len(content)
        return True

    def _check(self, arriving: _Arriving, view: memoryview) -> memoryview:
        name = f"the state of {arriving.sink.name}"
        if len(view) < _HEADER.size:
            raise damaged(f"a chunk of {name} is too short")
        version, flags, attempt, count, offset = _HEADER.unpack_from(view)
        if version != CHUNK_VERSION:
            raise damaged(f"a chunk of {name} has version {version}, this side knows {CHUNK_VERSION}")
        if flags not in (0, LAST) or count != len(view) - _HEADER.size or (count == 0) != (flags == LAST):
            raise damaged(f"a chunk of {name} with flags {flags:#x} and {len(view) - _HEADER.size} bytes of {count}")
        if attempt > arriving.attempt and not offset:
            self._begin_anew(arriving, attempt)
        if attempt != arriving.attempt or attempt != self._attempt:
            raise damaged(f"a chunk of {name} belongs to attempt {attempt} of {self._attempt}, byte {offset}")
        if arriving.complete:
            raise damaged(f"{name} goes on after its end")
        if offset != arriving.bytes:
            raise damaged(f"{name} goes on at byte {offset}, {arriving.bytes} was next: lost, repeated or out of order")
        if offset + count > self._limit:
            raise damaged(f"{name} has more than {self._limit} bytes")
        arriving.complete = flags == LAST
        return view[_HEADER.size:]

    def _begin_anew(self, arriving: _Arriving, attempt: int) -> None:
        """Have a device forget the state that came, whole or in part, and wait for another one."""
        if arriving.bytes or arriving.complete:
            arriving.sink.reset()
            arriving.sink.prepare()
        self._attempt = max(self._attempt, attempt)
        arriving.attempt, arriving.bytes, arriving.complete = attempt, 0, False

    def load(self) -> None:
        """Have all devices be what those of the source were; they stand still.

        Raises
        ------
        ProtocolError
            EPROTO: a state is not complete.
        MigrationError
            A device does not take its state.
        """
        missing = [arriving.sink.name for arriving in self._arriving.values()
                   if not arriving.complete or arriving.attempt != self._attempt]
        if missing or not self._mine:
            raise damaged(f"the state of {', '.join(missing) or 'the devices'} is not complete")
        self._together.on_all(lambda device: device.load())

    def run(self) -> None:
        """Let all devices run: the guest is ours.

        Raises
        ------
        MigrationError
            A device that was loaded does not run, or had to be reset for it.
        """
        self._mine = False          # whatever happens now: the source has given the guest away
        lost = _resume(self.devices, self._together)
        if lost:
            raise MigrationError(errno.EIO, operation="migrate_device",
                                 hint=f"the state of {', '.join(lost)} is lost: it did not run, and was reset")

    def abort(self) -> None:
        """Give up: reset every device, so that it can be used or prepared again."""
        self._mine = False
        self._together.on_all(lambda device: device.reset())

    def close(self) -> None:
        """Abort, unless the devices run.  Idempotent."""
        if self._mine:
            self.abort()
        for device in self.devices:
            device.close()
        self._together.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
