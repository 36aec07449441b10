"""Migration of the software `edu` device: an example of what a migratable device has to do."""
import errno
import zlib

from .._core.errno import error
from ..uapi import vfio as abi

_MAGIC = b"edu1"
_TAIL = 4               # a checksum
_RUNNING = (abi.VFIO_DEVICE_STATE_RUNNING, abi.VFIO_DEVICE_STATE_PRE_COPY)
_BUFFER, _REGISTERS = b"B", b"R"
_BUFFER_SIZE = 4096
_REGISTERS_SIZE = 48 + 256


class EduMigration:
    """The part that a device has in its migration: it starts and stops, says its state, takes it over.

    Notes
    -----
    The stream is a sequence of records: ``edu1``, one letter for what it is, the content, a CRC-32.  PRE_COPY begins
    with the buffer and sends it again when something changed; STOP_COPY ends with buffer and registers.  Satisfies
    MigratableDevice.
    """

    flags = abi.VFIO_MIGRATION_STOP_COPY | abi.VFIO_MIGRATION_P2P | abi.VFIO_MIGRATION_PRE_COPY

    def __init__(self, device):
        self._device = device
        self._sent = 0                  # changes of the device that were sent

    def arc(self, current, following):
        """Start or stop: DMA runs in RUNNING and PRE_COPY."""
        device = self._device
        with device.lock:
            device.stopped = following not in _RUNNING
            device.run_dma()

    @staticmethod
    def _record(kind, content):
        body = _MAGIC + kind + content
        return body + zlib.crc32(body).to_bytes(_TAIL, "little")

    def initial(self):
        """Return what PRE_COPY begins with."""
        with self._device.lock:
            self._sent = self._device.changes
            return self._record(_BUFFER, bytes(self._device.buffer))

    def dirty_bytes(self):
        """Return how many bytes ``dirty`` would give now."""
        return 0 if self._sent == self._device.changes else len(_MAGIC) + 1 + _BUFFER_SIZE + _TAIL

    def dirty(self):
        """Return what has changed since the last call."""
        with self._device.lock:
            return self.initial() if self.dirty_bytes() else b""

    def final(self):
        """Return the rest; the device is stopped."""
        with self._device.lock:
            device = self._device
            return self._record(_BUFFER, bytes(device.buffer)) + self._record(_REGISTERS, device.registers())

    def size(self):
        """Return about how many bytes ``final`` has."""
        return 2 * (len(_MAGIC) + 1 + _TAIL) + _BUFFER_SIZE + _REGISTERS_SIZE

    def load(self, data):
        """Take over a whole stream; EINVAL while it is not complete, EIO where it is damaged."""
        records, at = {}, 0
        while at < len(data):
            kind = data[at + 4:at + 5]
            size = {_BUFFER: _BUFFER_SIZE, _REGISTERS: _REGISTERS_SIZE}.get(kind, 0)
            end = at + len(_MAGIC) + 1 + size
            if not size or self._record(kind, data[at + 5:end]) != data[at:end + _TAIL]:
                code = errno.EIO if size and len(data) >= end + _TAIL else errno.EINVAL
                raise error(code, "edu_load", hint=f"at byte {at} it ends early, is damaged, or not an edu device's")
            records[kind] = data[at + 5:end]
            at = end + _TAIL
        if set(records) != {_BUFFER, _REGISTERS}:
            raise error(errno.EINVAL, "edu_load", hint="the stream is not complete")
        with self._device.lock:
            self._device.buffer[:] = records[_BUFFER]
            self._device.set_registers(records[_REGISTERS])
            self._device.changes += 1
