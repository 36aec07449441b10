"""The DMA engine of the software `edu` device: a transfer between its buffer and memory, at once or in pieces."""
import errno
import struct
import threading

from .._core.errno import error
from ..errors import MemoryFaultError

SOURCE, TARGET, COUNT, COMMAND = 0x80, 0x88, 0x90, 0x98     # registers
BUFFER_AT, BUFFER_SIZE = 0x40000, 4096
_RUN, _TO_MEMORY, _IRQ_AT_END = 1, 2, 4                     # of the command
_STEPS = 16                     # of a transfer that takes its time
_STATE = struct.Struct("<QQQQI")


class EduDma:
    """The registers from 0x80 on, and what they set going.

    Parameters
    ----------
    device : EduDevice
        Its lock is held wherever this is called; ``bus_master``, ``quiet`` and ``port`` say whether DMA may be done.
    mask : int
        Addresses that can be reached.
    seconds : float
        That a transfer takes; 0 = it is done when ``run`` returns.
    """

    def __init__(self, device, mask, seconds):
        self._device = device
        self._mask = mask
        self._pause = seconds / _STEPS
        self._thread = None
        self.reset()

    def reset(self):
        """Forget the transfer, and clear the buffer."""
        self.registers = {SOURCE: 0, TARGET: 0, COUNT: 0, COMMAND: 0}
        self.buffer = bytearray(BUFFER_SIZE)
        self._done = 0              # bytes of the transfer under way that were moved

    @property
    def busy(self):
        """Whether a transfer was begun and has not ended, stopped ones included."""
        return bool(self.registers[COMMAND] & _RUN)

    def write(self, register, value):
        """Write a register; a command with bit 0 begins a transfer.  None can be written meanwhile."""
        if self.busy or (register == COMMAND and not value & _RUN):
            return
        self.registers[register] = value
        if register == COMMAND:
            self._done = 0
            self.run()

    def run(self):
        """Go on with the transfer, if there is one and the device may do DMA."""
        if not self.busy or self._device.quiet:
            return
        if not self._pause:
            self._step(self.registers[COUNT])
        elif self._thread is None:
            self._thread = threading.Thread(target=self._take_time, name=f"DMA of {self._device.address}", daemon=True)
            self._thread.start()

    def _take_time(self):
        wait = threading.Event().wait
        while True:
            wait(self._pause)
            with self._device.lock:
                if not self.busy or self._device.quiet:
                    self._thread = None
                    return
                self._step(-(-self.registers[COUNT] // _STEPS))

    def _step(self, most):
        """Move a piece; with the last one the transfer has ended."""
        size = min(most, self.registers[COUNT] - self._done)
        if self._move(size):
            self._done += size
            if self._done < self.registers[COUNT]:
                return
        command = self.registers[COMMAND]
        self.registers[COMMAND] = command & ~_RUN
        self._done = 0
        if command & _IRQ_AT_END:
            self._device.dma_ended()

    def _move(self, size):
        """Move the next bytes; return False where nothing can be moved, now or later."""
        device, to_memory = self._device, bool(self.registers[COMMAND] & _TO_MEMORY)
        source, target, count = self.registers[SOURCE], self.registers[TARGET], self.registers[COUNT]
        iova, at = (target, source) if to_memory else (source, target)
        at -= BUFFER_AT
        if not device.bus_master or device.port is None or not 0 <= at <= BUFFER_SIZE - count:
            return False
        iova, at = (iova & self._mask) + self._done, at + self._done
        # The IOMMU records a fault; the device can't tell: a write goes nowhere, a read returns zeros.
        try:
            if to_memory:
                device.port.write(iova, self.buffer[at:at + size])
            else:
                self.buffer[at:at + count - self._done] = bytes(count - self._done)
                self.buffer[at:at + size] = device.port.read(iova, size)
        except MemoryFaultError:
            return False
        return True

    def state(self):
        """Return what migrates, besides the buffer."""
        return _STATE.pack(*self.registers.values(), self._done)

    def check_state(self, data):
        """Raise EIO where ``data`` is no ``state`` of an engine."""
        if len(data) != _STATE.size or (values := _STATE.unpack(data))[-1] > values[2]:
            raise error(errno.EIO, "edu_load", hint="a DMA transfer that can't be")

    def set_state(self, data):
        """Take over what ``state`` of another one returned; ``run`` goes on with it."""
        *values, self._done = _STATE.unpack(data)
        self.registers = dict(zip(self.registers, values, strict=True))
