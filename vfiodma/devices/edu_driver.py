"""A driver for QEMU's documented `edu` device, real (emulated) or the software one."""
import errno
import time
from typing import Self

from .._core.errno import error
from .interrupts import IrqIndex, Vectors
from .pci import VfioDevice

_VENDOR_DEVICE = (0x1234, 0x11E8)
_IDENTIFICATION, _LIVENESS, _FACTORIAL, _STATUS = 0x00, 0x04, 0x08, 0x20
_IRQ_STATUS, _IRQ_RAISE, _IRQ_ACK = 0x24, 0x60, 0x64
_DMA_SOURCE, _DMA_TARGET, _DMA_COUNT, _DMA_COMMAND = 0x80, 0x88, 0x90, 0x98
_BUFFER = 0x40000

_COMPUTING, _IRQ_AFTER_FACTORIAL = 0x01, 0x80           # of the status
_RUN, _TO_MEMORY, _IRQ_AFTER_DMA = 1, 2, 4              # of the DMA command
_POLL_INTERVAL = 0.002                                  # seconds

FACTORIAL_DONE = 0x001      #: bits of the interrupt status
DMA_DONE = 0x100


class EduDriver:
    """Drives an `edu` device.

    Parameters
    ----------
    device : VfioDevice
        Stays the caller's.  Bus mastering is turned on.
    timeout : float
        Seconds that the device may take for one step (a DMA transfer of QEMU's takes 0.1).

    Attributes
    ----------
    max_transfer : int
        Bytes of its buffer that one transfer moves, 4095: QEMU 7.2 gives up on the last byte.
    dma_limit : int
        End of the addresses that its DMA reaches, 256 MiB.

    Raises
    ------
    NoDeviceError
        ENODEV: it is another device.

    Notes
    -----
    For one thread.  Waits by polling; by interrupts after ``use_interrupts``.  Source: QEMU's docs/specs/edu.
    """

    max_transfer = 4095
    dma_limit = 1 << 28

    def __init__(self, device: VfioDevice, timeout: float = 5.0) -> None:
        found = device.config.vendor_id, device.config.device_id
        if found != _VENDOR_DEVICE:
            raise error(errno.ENODEV, "open_edu",
                        hint=f"{device.address} is {found[0]:04x}:{found[1]:04x}, not an edu device")
        self.device = device
        self.timeout = timeout
        self._bar = device.regions[0]
        self._vectors: Vectors | None = None
        device.config.bus_master = True

    # ---- registers

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor version."""
        value = self._bar.read_u32(_IDENTIFICATION)
        if value & 0xFF != 0xED:
            raise error(errno.ENODEV, "open_edu", hint=f"identification is {value:#010x}: the device is gone")
        return value >> 24, value >> 16 & 0xFF

    def invert(self, value: int) -> int:
        """Return the bitwise inverse of a 32-bit number, as the device computes it: a sign of life."""
        self._bar.write_u32(_LIVENESS, value)
        return self._bar.read_u32(_LIVENESS)

    def factorial(self, n: int) -> int:
        """Return ``n!`` modulo 2**32, as the device computes it."""
        self._bar.write_u32(_STATUS, _IRQ_AFTER_FACTORIAL if self._vectors else 0)
        self._bar.write_u32(_FACTORIAL, n)
        if self._vectors:
            self.wait_interrupt(FACTORIAL_DONE)
        self._poll(_STATUS, _COMPUTING, "factorial")
        return self._bar.read_u32(_FACTORIAL)

    def _poll(self, register: int, bit: int, operation: str) -> None:
        deadline = time.monotonic() + self.timeout
        while self._bar.read_u32(register) & bit:
            if time.monotonic() > deadline:
                raise error(errno.ETIMEDOUT, operation, hint=f"the device was not ready in {self.timeout} s")
            time.sleep(_POLL_INTERVAL)

    # ---- interrupts

    def use_interrupts(self, kind: int = IrqIndex.MSI) -> Self:
        """Enable INTx or MSI, and wait by it from now on; ``with`` ends that, and so does ``use_polling``."""
        self.use_polling()
        self._vectors = self.device.interrupts.enable(kind)
        return self

    def use_polling(self) -> None:
        """Disable the interrupt; what it was raised for is acknowledged."""
        if self._vectors:
            self._vectors.close()
            self._vectors = None
            self.acknowledge()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.fd >= 0:
            self.use_polling()

    @property
    def interrupt_status(self) -> int:
        """Why the interrupt is raised; 0 = it is not."""
        return self._bar.read_u32(_IRQ_STATUS)

    def raise_interrupt(self, bits: int) -> None:
        """Have the device raise its interrupt, for the reasons ``bits``."""
        self._bar.write_u32(_IRQ_RAISE, bits)

    def acknowledge(self, bits: int | None = None) -> int:
        """Take reasons back (None: all there are); return them."""
        bits = self.interrupt_status if bits is None else bits
        self._bar.write_u32(_IRQ_ACK, bits)
        return bits

    def wait_interrupt(self, bits: int) -> None:
        """Wait until the interrupt is raised for all of ``bits``, and acknowledge it.

        Raises
        ------
        TimedOutError
            ETIMEDOUT.
        """
        if self._vectors is None:
            raise error(errno.EINVAL, "interrupt_wait", hint="call use_interrupts() first")
        left, deadline = bits, time.monotonic() + self.timeout
        while left:
            self._vectors.wait(max(0.0, deadline - time.monotonic()))
            left &= ~self.acknowledge()
            if self._vectors.kind == IrqIndex.INTX:
                self._vectors.unmask()

    # ---- DMA

    def dma_to_device(self, iova: int, size: int) -> None:
        """Have the device read memory into its buffer; of more than ``max_transfer`` bytes the last piece stays.

        Raises
        ------
        VfioError
            EINVAL: above ``dma_limit``; ETIMEDOUT.  What the IOMMU refuses is no error: the device does not know.
        """
        for done, piece in self._pieces(iova, size):
            self._transfer(iova + done, _BUFFER, piece, 0)

    def dma_from_device(self, iova: int, size: int) -> None:
        """Have the device write its buffer to memory; to more than ``max_transfer`` bytes again and again."""
        for done, piece in self._pieces(iova, size):
            self._transfer(_BUFFER, iova + done, piece, _TO_MEMORY)

    def copy(self, source: int, target: int, size: int) -> None:
        """Have the device copy ``size`` bytes of memory from one iova to another."""
        for done, piece in self._pieces(max(source, target), size):
            self.dma_to_device(source + done, piece)
            self.dma_from_device(target + done, piece)

    def _pieces(self, iova: int, size: int) -> list[tuple[int, int]]:
        if iova < 0 or size < 0 or iova + size > self.dma_limit:
            raise error(errno.EINVAL, "edu_dma", iova, size, f"the device reaches addresses below {self.dma_limit:#x}")
        return [(done, min(self.max_transfer, size - done)) for done in range(0, size, self.max_transfer)]

    def _transfer(self, source: int, target: int, size: int, command: int) -> None:
        write = self._bar.write_u32
        write(_DMA_SOURCE, source)
        write(_DMA_TARGET, target)
        write(_DMA_COUNT, size)
        write(_DMA_COMMAND, command | _RUN | (_IRQ_AFTER_DMA if self._vectors else 0))
        if self._vectors:
            self.wait_interrupt(DMA_DONE)
        self._poll(_DMA_COMMAND, _RUN, "edu_dma")
