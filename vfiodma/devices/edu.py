"""A software PCI device with the registers of QEMU's documented `edu` device: identification, factorial, DMA engine."""
import struct
import threading

from ..errors import MemoryFaultError
from .edu_config import EduConfig
from .edu_migration import EduMigration

_BAR, _CONFIG = 0, 7
_BAR_SIZE = 1 << 20
_BUFFER_AT, _BUFFER_SIZE = 0x40000, 4096
_INTX, _MSI = 0, 1

_IDENTIFICATION, _LIVENESS, _FACTORIAL, _STATUS = 0x00, 0x04, 0x08, 0x20
_IRQ_STATUS, _IRQ_RAISE, _IRQ_ACK = 0x24, 0x60, 0x64
_DMA_SOURCE, _DMA_TARGET, _DMA_COUNT, _DMA_COMMAND = 0x80, 0x88, 0x90, 0x98
_VERSION = 0x010000ED
_IRQ_AFTER_FACTORIAL = 0x80                     # of the status; 0x01 (computing) is never seen: it is done at once
_RUN, _TO_MEMORY, _IRQ_AFTER_DMA = 1, 2, 4      # of the DMA command
_FACTORIAL_IRQ, _DMA_IRQ = 0x001, 0x100
_ONES = 0xFFFFFFFFFFFFFFFF


class EduDevice:
    """The `edu` device: vendor 0x1234, device 0x11e8.

    Parameters
    ----------
    address : str
        Its PCI address, "0000:00:10.0".
    dma_mask : int
        Addresses that its DMA engine can reach.
    migratable : bool
        It can be migrated (STOP_COPY, P2P, PRE_COPY), logs its DMA, and can be reset.
    reset_scope : hashable, optional
        Devices of equal scope are reset together by a hot reset; None: it is not possible.

    Attributes
    ----------
    can_reset : bool
        Whether VFIO_DEVICE_RESET works; as in QEMU it does not, unless the device is migratable.
    migration : EduMigration or None
    dma_logging : bool

    Notes
    -----
    BAR 0, little-endian: 0x00 identification, 0x04 answers the inverse of what was written, 0x08 factorial, 0x20
    status, 0x24/0x60/0x64 interrupt status, raise, acknowledge; 0x80 DMA source, 0x88 target, 0x90 count, 0x98 command
    (bit 0 run, bit 1 from the device's 4 KiB buffer at 0x40000 to memory, bit 2 interrupt at the end).  Accesses have 4
    bytes, from 0x80 on also 8; others read 0 and write nothing.  DMA needs bus mastering, is done when the command's
    write returns (while the device is stopped: when it runs again), and moves nothing past a fault.  Interrupts are an
    MSI when that is enabled, else INTx.  Source: QEMU's docs/specs/edu.
    """

    def __init__(self, address, dma_mask=(1 << 28) - 1, *, migratable=False, reset_scope=None):
        self.address = address
        self.port = None
        self.can_reset = self.dma_logging = migratable
        self.reset_scope = reset_scope
        self.migration = EduMigration(self) if migratable else None
        self.stopped = False            # no DMA and no interrupts of its own
        self.lock = threading.RLock()   # of the registers
        self._mask = dma_mask
        self._irqs = None
        self._config = EduConfig(_BAR_SIZE)
        self.reset()

    def reset(self):
        """Bring every register back to its power-on value."""
        with self.lock:
            self._config.reset()
            self._liveness = 0         # what was written, inverted
            self._factorial = 0
            self._status = 0
            self._irq_status = 0
            self._dma = {_DMA_SOURCE: 0, _DMA_TARGET: 0, _DMA_COUNT: 0, _DMA_COMMAND: 0}
            self.buffer = bytearray(_BUFFER_SIZE)
            self.changes = 0            # of what migrates
            self._update_irq()

    # ---- what VFIO asks

    def connect(self, port):
        """Take the way to memory."""
        self.port = port

    def disconnect(self):
        """Let go of the way to memory."""
        with self.lock:
            self.port = None

    def set_irq_sink(self, irqs):
        """Take the way of interrupts."""
        with self.lock:
            self._irqs = irqs
            if irqs is not None and self._irq_status:
                self._update_irq()

    def region_size(self, index):
        """BAR 0 is 1 MiB, the configuration space 256 bytes."""
        return {_BAR: _BAR_SIZE, _CONFIG: self._config.size}.get(index, 0)

    def irq_count(self, index):
        """One INTx, one MSI, one request interrupt."""
        return 1 if index in (_INTX, _MSI, 4) else 0

    def region_read(self, index, offset, size):
        """Read registers."""
        with self.lock:
            if index == _CONFIG:
                return self._config.read(offset, size, bool(self._irq_status) and not self._msi_enabled())
            if size != 4 and (size != 8 or offset < 0x80):
                return self._wrong_size(offset, size)
            value = {_IDENTIFICATION: _VERSION, _LIVENESS: self._liveness, _FACTORIAL: self._factorial,
                     _STATUS: self._status, _IRQ_STATUS: self._irq_status, **self._dma}.get(offset, _ONES)
            return value.to_bytes(8, "little")[:size]

    @staticmethod
    def _wrong_size(offset, size):
        return b"\xff" * size if size == 8 else bytes(size)

    def region_write(self, index, offset, data):
        """Write registers; a write of the DMA command with bit 0 runs the engine."""
        with self.lock:
            if index == _CONFIG:
                self._config.write(offset, data)
            elif len(data) == 4 or (len(data) == 8 and offset >= 0x80):
                self._write(offset, int.from_bytes(data, "little"))

    def _write(self, offset, value):
        self.changes += 1
        if offset == _LIVENESS:
            self._liveness = ~value & 0xFFFFFFFF
        elif offset == _FACTORIAL:
            self._compute(value)
        elif offset == _STATUS:
            self._status = value & _IRQ_AFTER_FACTORIAL
        elif offset == _IRQ_RAISE:
            self._raise(value)
        elif offset == _IRQ_ACK:
            self._irq_status &= ~value
            self._update_irq(fresh=False)
        elif offset == _DMA_COMMAND and not value & _RUN:
            pass
        elif offset in self._dma and not self._dma[_DMA_COMMAND] & _RUN:
            self._dma[offset] = value
            if offset == _DMA_COMMAND:
                self.run_dma()

    def _compute(self, number):
        result = 1
        for factor in range(2, min(number, 34) + 1):        # from 34 on, 2**32 divides it
            result = result * factor & 0xFFFFFFFF
        self._factorial = result
        if self._status & _IRQ_AFTER_FACTORIAL:
            self._raise(_FACTORIAL_IRQ)

    # ---- interrupts

    def _msi_enabled(self):
        return self._irqs is not None and self._irqs.enabled(_MSI) > 0

    def _raise(self, bits):
        self._irq_status |= bits
        self._update_irq()

    def _update_irq(self, fresh=True):
        """Bring the interrupt in line with its status; an MSI is sent for a fresh reason only."""
        if self._irqs is None:
            return
        if self._msi_enabled():
            if fresh and self._irq_status and self._config.bus_master:
                self._irqs.trigger(_MSI)
        elif not self._irq_status:
            self._irqs.lower()
        elif fresh:
            self._irqs.trigger(_INTX)

    # ---- DMA

    def run_dma(self):
        """Do the DMA that the command register asks for, unless the device is stopped."""
        command = self._dma[_DMA_COMMAND]
        if not command & _RUN or self.stopped:
            return
        self._dma[_DMA_COMMAND] &= ~_RUN
        self._move(bool(command & _TO_MEMORY))
        if command & _IRQ_AFTER_DMA:
            self._raise(_DMA_IRQ)

    def _move(self, to_memory):
        source, target, count = self._dma[_DMA_SOURCE], self._dma[_DMA_TARGET], self._dma[_DMA_COUNT]
        iova, at = (target, source) if to_memory else (source, target)
        at -= _BUFFER_AT
        if not self._config.bus_master or self.port is None or not 0 <= at <= _BUFFER_SIZE - count:
            return
        self.changes += 1
        # The IOMMU records a fault; the device can't tell: a write goes nowhere, a read returns zeros.
        try:
            if to_memory:
                self.port.write(iova & self._mask, self.buffer[at:at + count])
            else:
                self.buffer[at:at + count] = bytes(count)
                self.buffer[at:at + count] = self.port.read(iova & self._mask, count)
        except MemoryFaultError:
            pass

    # ---- state that migrates, besides the buffer

    _STATE = struct.Struct("<IIIIQQQQ")

    def registers(self):
        """Return the registers as bytes."""
        return self._STATE.pack(self._liveness, self._factorial, self._status, self._irq_status,
                                *self._dma.values()) + self._config.state()

    def set_registers(self, data):
        """Take over what ``registers`` of another device returned."""
        values = self._STATE.unpack_from(data)
        self._liveness, self._factorial, self._status, self._irq_status = values[:4]
        self._dma = dict(zip(self._dma, values[4:], strict=True))
        self._config.set_state(data[self._STATE.size:])
        self._update_irq(fresh=not self._msi_enabled())
