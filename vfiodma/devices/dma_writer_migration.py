"""What migrates of a DmaWriter: its settings while it runs, how far it came when it stands still."""
import errno
import json
import struct
import zlib
from typing import TYPE_CHECKING, Any

from .._core.errno import error
from ..uapi import vfio as abi

if TYPE_CHECKING:
    from .dma_writer import DmaWriter

VERSION = 1
_HEAD = struct.Struct("<4sBBHI")        # "dmaw", version, part, 0, bytes of the content
_SUM = struct.Struct("<I")
_SETTINGS, _PROGRESS = 1, 2
_RUNNING = (abi.VFIO_DEVICE_STATE_RUNNING, abi.VFIO_DEVICE_STATE_PRE_COPY)
_ADDRESSES = 1 << 64


def _record(part: int, values: dict[str, Any]) -> bytes:
    content = json.dumps(values).encode()
    body = _HEAD.pack(b"dmaw", VERSION, part, 0, len(content)) + content
    return body + _SUM.pack(zlib.crc32(body))


def _decode(data: bytes) -> dict[int, dict[str, Any]]:
    """Return the last record of each part; EINVAL, EIO, EOPNOTSUPP as ``load``."""
    found: dict[int, dict[str, Any]] = {}
    at = 0
    while at < len(data):
        whole = len(data) >= at + _HEAD.size
        magic, version, part, zero, size = _HEAD.unpack_from(data, at) if whole else (b"dmaw", VERSION, 0, 0, 0)
        end = at + _HEAD.size + size
        if magic == b"dmaw" and (not whole or len(data) < end + _SUM.size):
            raise error(errno.EINVAL, "dma_writer_load", hint=f"it ends early, in the record at byte {at}")
        if magic != b"dmaw" or _SUM.unpack_from(data, end)[0] != zlib.crc32(data[at:end]):
            raise _damaged(f"the record at byte {at} is damaged, or of another device")
        if version != VERSION:
            raise error(errno.EOPNOTSUPP, "dma_writer_load",
                        hint=f"a state of version {version}, this device has {VERSION}")
        if part not in (_SETTINGS, _PROGRESS) or zero or _PROGRESS in found:
            raise _damaged(f"the record at byte {at} is out of place")
        found[part] = json.loads(data[at + _HEAD.size:end])
        at = end + _SUM.size
    if set(found) != {_SETTINGS, _PROGRESS}:
        raise error(errno.EINVAL, "dma_writer_load", hint="the stream is not complete")
    return found


def _damaged(why: str) -> Exception:
    return error(errno.EIO, "dma_writer_load", hint=why)


class DmaWriterMigration:
    """The part that a DmaWriter has in its migration.

    Notes
    -----
    The stream is a sequence of records: ``dmaw``, version, part, bytes of the content, content as JSON, CRC-32.  The
    settings come first, and again when they have changed; the progress comes last.  Satisfies MigratableDevice.
    """

    max_load = 1 << 20

    def __init__(self, device: "DmaWriter") -> None:
        self.flags = abi.VFIO_MIGRATION_STOP_COPY | abi.VFIO_MIGRATION_P2P | abi.VFIO_MIGRATION_PRE_COPY
        self._device = device
        self._sent = b""

    def arc(self, current: int, following: int) -> None:
        """Write, if it was started, in RUNNING and PRE_COPY only."""
        if following == abi.VFIO_DEVICE_STATE_STOP_COPY and current == abi.VFIO_DEVICE_STATE_STOP:
            self._sent = b""
        self._device.hold(following not in _RUNNING)

    def _settings(self) -> bytes:
        device = self._device
        return _record(_SETTINGS, {"working_set": device.working_set, "rate": float(device.rate), "block": device.block,
                                   "seed": device.seed})

    def initial(self) -> bytes:
        """Return the settings."""
        self._sent = self._settings()
        return self._sent

    def dirty_bytes(self) -> int:
        """Return the bytes of the settings, if they have changed."""
        settings = self._settings()
        return 0 if settings == self._sent else len(settings)

    def dirty(self) -> bytes:
        """Return the settings, if they have changed."""
        return self.initial() if self.dirty_bytes() else b""

    def final(self) -> bytes:
        """Return the rest; the device stands still."""
        device = self._device
        return self.dirty() + _record(_PROGRESS, {"writes": device.writes, "faulted": device.faulted,
                                                  "started": device.started})

    def whole(self) -> bytes:
        """Return all of the state."""
        self._sent = b""
        return self.final()

    def size(self) -> int:
        """Return about how many bytes STOP_COPY alone gives."""
        return len(self._settings()) + _HEAD.size + _SUM.size + 64

    def load(self, data: bytes) -> None:
        """Take over a whole state.

        Raises
        ------
        VfioError
            EINVAL: it is not complete; EIO: damaged, or of another device; EOPNOTSUPP: of another version.
        """
        device = self._device
        try:
            parts = _decode(data)
            settings, progress = parts[_SETTINGS], parts[_PROGRESS]
            working_set = [(int(iova), int(size)) for iova, size in settings["working_set"]]
            rate, block, seed = float(settings["rate"]), int(settings["block"]), int(settings["seed"])
            writes, faulted, started = int(progress["writes"]), int(progress["faulted"]), bool(progress["started"])
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as exc:
            if isinstance(exc, OSError):
                raise
            raise _damaged(f"it makes no sense: {exc!r}") from None
        if not all(0 <= iova < iova + size <= _ADDRESSES for iova, size in working_set) or not 0 <= rate < 1e15 \
                or not 0 < block <= 1 << 20 or block % 512 or not 0 <= seed < _ADDRESSES \
                or not 0 <= faulted <= writes < _ADDRESSES:
            raise _damaged("a value that can't be")
        device.working_set, device.rate, device.block, device.seed = working_set, rate, block, seed
        device.writes, device.faulted, device.started = writes, faulted, started
