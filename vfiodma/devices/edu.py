"""A software PCI device with the registers of QEMU's documented `edu` device: identification, factorial, DMA engine."""
import struct
import threading

from .edu_config import EduConfig
from .edu_dma import EduDma
from .edu_migration import EduMigration

_BAR, _CONFIG = 0, 7
_BAR_SIZE = 1 << 20
_INTX, _MSI = 0, 1

_IDENTIFICATION, _LIVENESS, _FACTORIAL, _STATUS = 0x00, 0x04, 0x08, 0x20
_IRQ_STATUS, _IRQ_RAISE, _IRQ_ACK = 0x24, 0x60, 0x64
_VERSION = 0x010000ED
_IRQ_AFTER_FACTORIAL = 0x80                     # of the status; 0x01 (computing) is never seen: it is done at once
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
    transfer_time : float
        Seconds that a DMA transfer takes (QEMU's: 0.1); 0 = it is done when the command's write returns.
    reset_scope : hashable, optional
        Devices of equal scope are reset together by a hot reset; None: it is not possible.

    Attributes
    ----------
    can_reset : bool
        Whether VFIO_DEVICE_RESET works; as in QEMU it does not, unless the device is migratable.
    migration : EduMigration or None
        What it has to do when it is migrated: with a transfer under way, interrupts that are due, its buffer.
    dma_logging : bool
    quiet, stopped : bool
        It does no DMA; it sends no interrupts either.

    Notes
    -----
    BAR 0, little-endian: 0x00 identification, 0x04 answers the inverse of what was written, 0x08 factorial, 0x20
    status, 0x24/0x60/0x64 interrupt status, raise, acknowledge; 0x80 DMA source, 0x88 target, 0x90 count, 0x98 command
    (bit 0 run, bit 1 from the device's 4 KiB buffer at 0x40000 to memory, bit 2 interrupt at the end).  Accesses have 4
    bytes, from 0x80 on also 8; others read 0 and write nothing.  DMA needs bus mastering, waits while the device is
    quiet, and moves nothing past a fault.  Interrupts are an MSI when that is enabled, else INTx.
    Source: QEMU's docs/specs/edu.
    """

    def __init__(self, address, dma_mask=(1 << 28) - 1, *, migratable=False, reset_scope=None,
                 transfer_time=0.0):
        self.address = address
        self.port = None
        self.can_reset = self.dma_logging = migratable
        self.reset_scope = reset_scope
        self.migration = EduMigration(self) if migratable else None
        self.quiet = self.stopped = False
        self.lock = threading.RLock()   # of the registers
        self._irqs = None
        self._config = EduConfig(_BAR_SIZE)
        self._dma = EduDma(self, dma_mask, transfer_time)
        self.reset()

    def reset(self):
        """Bring every register back to its power-on value."""
        with self.lock:
            self._config.reset()
            self._liveness = 0         # what was written, inverted
            self._factorial = 0
            self._status = 0
            self._irq_status = 0
            self._due = False           # an interrupt that came while it was stopped
            self._dma.reset()
            self._update_irq()

    @property
    def buffer(self):
        """The 4 KiB that DMA moves from and to."""
        return self._dma.buffer

    @property
    def bus_master(self):
        """Whether it may do DMA and send MSIs."""
        return self._config.bus_master

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
                     _STATUS: self._status, _IRQ_STATUS: self._irq_status, **self._dma.registers}.get(offset, _ONES)
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
        elif offset in self._dma.registers:
            self._dma.write(offset, value)

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
        if self.stopped:
            self._due = self._due or fresh
        elif self._irqs is None:
            pass
        elif self._msi_enabled():
            if fresh and self._irq_status and self.bus_master:
                self._irqs.trigger(_MSI)
        elif not self._irq_status:
            self._irqs.lower()
        elif fresh:
            self._irqs.trigger(_INTX)

    def dma_ended(self):
        """A transfer that was to interrupt has ended."""
        self._raise(_DMA_IRQ)

    # ---- migration

    def halt(self, *, quiet, stopped):
        """Do no DMA, send no interrupts; or go on with what was held up."""
        with self.lock:
            awakes = self.stopped and not stopped
            self.quiet, self.stopped = quiet, stopped
            if awakes:
                due, self._due = self._due, False
                self._update_irq(fresh=bool(self._irq_status) and (due or not self._msi_enabled()))
            self._dma.run()

    _STATE = struct.Struct("<IIIIB")

    def state(self):
        """Return registers, DMA engine and configuration space as bytes of their own."""
        registers = self._STATE.pack(self._liveness, self._factorial, self._status, self._irq_status, self._due)
        return registers, self._dma.state(), self._config.state()

    def set_state(self, registers, dma, config, buffer):
        """Take over what ``state`` of another device returned, and its buffer; EIO where that can't be."""
        self._dma.check_state(dma)
        self._liveness, self._factorial, self._status, self._irq_status, due = self._STATE.unpack(registers)
        self._due = bool(due)
        self._dma.set_state(dma)
        self._dma.buffer[:] = buffer
        self._config.set_state(config)
