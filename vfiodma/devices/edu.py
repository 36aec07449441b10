"""A software PCI device with the registers of QEMU's documented `edu` device: identification, factorial, DMA engine."""
import struct
import threading

from ..errors import MemoryFaultError

_BAR_SIZE = 1 << 20
_CONFIG_SIZE = 256
_BUFFER_AT, _BUFFER_SIZE = 0x40000, 4096
_BUS_MASTER = 4
_IRQ_AFTER_DMA = 4
_DMA_IRQ = 0x100


class EduDevice:
    """The `edu` device: vendor 0x1234, device 0x11e8.

    Parameters
    ----------
    address : str
        Its PCI address, "0000:00:10.0".
    dma_mask : int
        Addresses that its DMA engine can reach.

    Notes
    -----
    BAR 0, little-endian: 0x00 identification, 0x04 answers the inverse of what was written, 0x08 factorial, 0x20
    status, 0x24/0x60/0x64 interrupt status, raise, acknowledge; 0x80 DMA source, 0x88 target, 0x90 count, 0x98 command
    (bit 0 run, bit 1 from the device's 4 KiB buffer at 0x40000 to memory, bit 2 interrupt at the end).  DMA needs bus
    mastering, is done when the command's write returns, and moves nothing past a fault.  Source: QEMU's docs/specs/edu.
    """

    def __init__(self, address, dma_mask=(1 << 28) - 1):
        self.address = address
        self.port = None
        self._mask = dma_mask
        self._lock = threading.Lock()
        self.reset()

    def reset(self):
        """Bring every register back to its power-on value."""
        self._config = bytearray(_CONFIG_SIZE)
        struct.pack_into("<HH", self._config, 0, 0x1234, 0x11E8)
        struct.pack_into("<I", self._config, 8, 0x00FF0010)
        self._liveness = 0
        self._factorial = 1
        self._irq_status = 0
        self._dma = {0x80: 0, 0x88: 0, 0x90: 0, 0x98: 0}
        self._buffer = bytearray(_BUFFER_SIZE)

    def connect(self, port):
        """Take the way to memory."""
        self.port = port

    def disconnect(self):
        """Let go of the way to memory."""
        with self._lock:
            self.port = None

    def region_size(self, index):
        """BAR 0 is 1 MiB, the configuration space 256 bytes."""
        return {0: _BAR_SIZE, 7: _CONFIG_SIZE}.get(index, 0)

    def irq_count(self, index):
        """One INTx, one MSI, one request interrupt."""
        return 1 if index in (0, 1, 4) else 0

    def region_read(self, index, offset, size):
        """Read registers."""
        if index == 7:
            return bytes(self._config[offset:offset + size])
        value = {0x00: 0x010000ED, 0x04: ~self._liveness & 0xFFFFFFFF, 0x08: self._factorial, 0x20: 0,
                 0x24: self._irq_status, **self._dma}.get(offset, 0xFFFFFFFFFFFFFFFF)
        return value.to_bytes(8, "little")[:size].ljust(size, b"\xff")

    def region_write(self, index, offset, data):
        """Write registers; a write of the DMA command with bit 0 runs the engine."""
        if index == 7:
            if offset == 4:
                self._config[4:6] = data[:2].ljust(2, b"\0")
            return
        value = int.from_bytes(data, "little")
        if offset == 0x04:
            self._liveness = value & 0xFFFFFFFF
        elif offset == 0x08:
            self._factorial = 1
            for factor in range(2, min(value, 1 << 12) + 1):
                self._factorial = self._factorial * factor & 0xFFFFFFFF
        elif offset == 0x60:
            self._irq_status |= value
        elif offset == 0x64:
            self._irq_status &= ~value
        elif offset in self._dma:
            self._dma[offset] = value
            if offset == 0x98 and value & 1:
                with self._lock:
                    self._run()

    def _run(self):
        command = self._dma[0x98]
        self._dma[0x98] &= ~1
        source, target, count = self._dma[0x80], self._dma[0x88], self._dma[0x90]
        to_memory = bool(command & 2)
        iova, at = ((target, source) if to_memory else (source, target))
        at -= _BUFFER_AT
        if not self._config[4] & _BUS_MASTER or self.port is None or not 0 <= at <= _BUFFER_SIZE - count:
            return
        # The IOMMU records a fault; the device can't tell: a write goes nowhere, a read returns zeros.
        try:
            if to_memory:
                self.port.write(iova & self._mask, self._buffer[at:at + count])
            else:
                self._buffer[at:at + count] = bytes(count)
                self._buffer[at:at + count] = self.port.read(iova & self._mask, count)
        except MemoryFaultError:
            pass
        if command & _IRQ_AFTER_DMA:
            self._irq_status |= _DMA_IRQ
