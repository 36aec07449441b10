"""What a bare address in a group stands for."""
from ....uapi import vfio as abi

_CONFIG = abi.VFIO_PCI_CONFIG_REGION_INDEX


class PlainDevice:
    """A PCI function with a configuration space and nothing else."""

    def __init__(self, address):
        self.address = address
        self._config = bytearray(256)

    def connect(self, port):
        self.port = port

    def disconnect(self):
        self.port = None

    def region_size(self, index):
        return len(self._config) if index == _CONFIG else 0

    def region_read(self, index, offset, size):
        return bytes(self._config[offset:offset + size])

    def region_write(self, index, offset, data):
        if offset == 4:         # only the command register keeps what is written
            self._config[4:6] = data[:2].ljust(2, b"\0")

    def irq_count(self, index):
        return 1 if index in (0, 4) else 0

    def reset(self):
        self._config[4:6] = bytes(2)
