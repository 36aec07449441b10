"""Migration of the software `edu` device: an example of what a migratable device has to do."""
import errno
import struct
import zlib

from .._core.errno import error
from ..uapi import vfio as abi

VERSION = 2
_HEAD = struct.Struct("<3sBBBH")        # "edu", version, part, number, bytes of the content
_SUM = struct.Struct("<I")
_BUFFER, _REGISTERS, _DMA, _CONFIG, _END = range(5)
_BLOCK, _BLOCKS = 256, 16               # of the buffer
_SIZES = {_BUFFER: _BLOCK, _REGISTERS: 17, _DMA: 36, _CONFIG: 256, _END: 0}
_WHOLE = {(_BUFFER, number) for number in range(_BLOCKS)} | {(part, 0) for part in (_REGISTERS, _DMA, _CONFIG)}


class EduMigration:
    """The part that a device has in its migration: it starts and stops, says its state, takes it over.

    Notes
    -----
    The stream is a sequence of records: ``edu``, version, part (block of the buffer, registers, DMA engine,
    configuration, end) and number of the block, bytes of the content as u16, the content, a CRC-32 of all that.
    PRE_COPY sends everything, then what has changed; STOP_COPY what has changed since, and the end.
    Satisfies MigratableDevice.
    """

    max_load = 64 << 20

    def __init__(self, device):
        self.flags = abi.VFIO_MIGRATION_STOP_COPY | abi.VFIO_MIGRATION_P2P | abi.VFIO_MIGRATION_PRE_COPY
        self._device = device
        self._sent = {}                 # what the destination has, by part and number
        self._anew = False

    def arc(self, current, following):
        """Start or stop: in P2P states there is no DMA, in STOP, STOP_COPY and RESUMING no interrupt either."""
        if following == abi.VFIO_DEVICE_STATE_STOP_COPY and current == abi.VFIO_DEVICE_STATE_STOP:
            self._sent = {}
        runs = following in (abi.VFIO_DEVICE_STATE_RUNNING, abi.VFIO_DEVICE_STATE_PRE_COPY)
        answers = following in (abi.VFIO_DEVICE_STATE_RUNNING_P2P, abi.VFIO_DEVICE_STATE_PRE_COPY_P2P)
        self._device.halt(quiet=not runs, stopped=not (runs or answers))

    def begin_anew(self):
        """Have PRE_COPY begin again: the next initial bytes are the whole state (VFIO_PRECOPY_INFO_REINIT)."""
        self._anew = True

    def reinit(self):
        """Return whether ``begin_anew`` was called, once."""
        anew, self._anew = self._anew, False
        return anew

    @staticmethod
    def _record(key, content):
        body = _HEAD.pack(b"edu", VERSION, *key, len(content)) + content
        return body + _SUM.pack(zlib.crc32(body))

    def _parts(self):
        device = self._device
        with device.lock:
            parts = {(_BUFFER, number): bytes(device.buffer[number * _BLOCK:(number + 1) * _BLOCK])
                     for number in range(_BLOCKS)}
            registers, dma, config = device.state()
        return parts | {(_REGISTERS, 0): registers, (_DMA, 0): dma, (_CONFIG, 0): config}

    def _changed(self):
        return {key: content for key, content in self._parts().items() if self._sent.get(key) != content}

    def initial(self):
        """Return what PRE_COPY begins with."""
        self._sent = {}
        return self.dirty()

    def dirty_bytes(self):
        """Return how many bytes ``dirty`` would give now."""
        return sum(_HEAD.size + len(content) + _SUM.size for content in self._changed().values())

    def dirty(self):
        """Return what has changed since the last call."""
        changed = self._changed()
        self._sent.update(changed)
        return b"".join(self._record(key, content) for key, content in changed.items())

    def final(self):
        """Return the rest; the device is stopped."""
        return self.dirty() + self._record((_END, 0), b"")

    def size(self):
        """Return how many bytes STOP_COPY alone has."""
        return sum(_HEAD.size + _SIZES[part] + _SUM.size for part, _ in (*_WHOLE, (_END, 0)))

    def load(self, data):
        """Take over a whole stream.

        Raises
        ------
        VfioError
            EINVAL: it is not complete; EIO: damaged, or not of an edu device; EOPNOTSUPP: of another version.
        """
        found, at, ended = {}, 0, False
        while at < len(data):
            key, content, at = self._next(data, at)
            if ended:
                raise error(errno.EIO, "edu_load", hint=f"it goes on after its end, at byte {at}")
            ended = key[0] == _END
            found[key] = content
        if not ended or len(found) <= len(_WHOLE):
            raise error(errno.EINVAL, "edu_load", hint="the stream is not complete")
        buffer = b"".join(found[_BUFFER, number] for number in range(_BLOCKS))
        with self._device.lock:
            self._device.set_state(found[_REGISTERS, 0], found[_DMA, 0], found[_CONFIG, 0], buffer)

    def _next(self, data, at):
        """Return (part, number), content and the end of the record at a place."""
        short = error(errno.EINVAL, "edu_load", hint=f"it ends early, in the record at byte {at}")
        if len(data) < at + _HEAD.size:
            raise short
        magic, version, part, number, size = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + size
        if magic == b"edu" and len(data) < end + _SUM.size:
            raise short
        if magic != b"edu" or _SUM.unpack_from(data, end)[0] != zlib.crc32(data[at:end]):
            raise error(errno.EIO, "edu_load", hint=f"the record at byte {at} is damaged, or not of an edu device")
        if version != VERSION:
            raise error(errno.EOPNOTSUPP, "edu_load", hint=f"a state of version {version}, this device has {VERSION}")
        if _SIZES.get(part) != size or (part, number) not in _WHOLE | {(_END, 0)}:
            raise error(errno.EIO, "edu_load", hint=f"the record at byte {at} is of no part of an edu device")
        return (part, number), data[at + _HEAD.size:end], end + _SUM.size
