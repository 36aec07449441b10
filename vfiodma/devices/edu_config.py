"""The configuration space of an `edu` device, as vfio-pci shows it."""
import struct

_COMMAND, _STATUS, _BAR, _LINE, _PIN, _CAPABILITIES, _MSI = 0x04, 0x06, 0x10, 0x3C, 0x3D, 0x34, 0x40
_COMMAND_BITS = 0x0507                  # I/O, memory, bus master, SERR, INTx disable
_INTERRUPT_STATUS = 0x08
_BUS_MASTER = 4
_POWER_ON = 0x0101
_MSI_CAPABILITY, _MSI_64_BIT = 5, 0x80
_MSI_ADDRESS, _MSI_DATA_END = _MSI + 4, _MSI + 14


class EduConfig:
    """256 bytes: identity, command and status, BAR 0 with its sizing, an interrupt pin, a capability for one MSI.

    Parameters
    ----------
    bar_size : int
        Bytes of BAR 0, a power of two.
    """

    size = 256

    def __init__(self, bar_size):
        self._bar_mask = -bar_size & 0xFFFFFFFF
        self.reset()

    def reset(self):
        """Bring it back to its power-on value."""
        data = self._data = bytearray(self.size)
        struct.pack_into("<HHHH", data, 0, 0x1234, 0x11E8, _POWER_ON, 0x0010)      # status: has capabilities
        struct.pack_into("<I", data, 8, 0x00FF0010)                             # class 00ff00, revision 10
        struct.pack_into("<I", data, _BAR, 0xFE000000 & self._bar_mask)
        struct.pack_into("<HH", data, 0x2C, 0x1AF4, 0x1100)
        data[_CAPABILITIES], data[_LINE], data[_PIN] = _MSI, 10, 1
        struct.pack_into("<BBH", data, _MSI, _MSI_CAPABILITY, 0, _MSI_64_BIT)

    @property
    def bus_master(self):
        """Whether the device may do DMA."""
        return bool(self._data[_COMMAND] & _BUS_MASTER)

    def read(self, offset, size, interrupt):
        """Read; ``interrupt`` is the state of INTx."""
        data = self._data
        data[_STATUS] = data[_STATUS] & ~_INTERRUPT_STATUS | (_INTERRUPT_STATUS if interrupt else 0)
        return bytes(data[offset:offset + size])

    def write(self, offset, data):
        """Write the bytes that can be written: command, BAR 0, interrupt line, cache line size, MSI message."""
        for at, byte in enumerate(data, offset):
            mask = self._writable(at)
            self._data[at] = self._data[at] & ~mask | byte & mask

    def _writable(self, at):
        if _COMMAND <= at < _COMMAND + 2:
            return _COMMAND_BITS >> 8 * (at - _COMMAND) & 0xFF
        if _BAR <= at < _BAR + 4:
            return self._bar_mask >> 8 * (at - _BAR) & 0xFF
        if at in (0x0C, _LINE) or _MSI_ADDRESS < at < _MSI_DATA_END:
            return 0xFF
        return 0xFC if at == _MSI_ADDRESS else 0

    def state(self):
        """Return what migrates."""
        return bytes(self._data)

    def set_state(self, data):
        """Take over what ``state`` of another device returned, where it can be written."""
        self.write(0, data)
