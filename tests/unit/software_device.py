"""Opens software devices for tests, and calls them as a C program would."""
import contextlib
import ctypes
import mmap
import struct

import pytest

from vfiodma import SoftwareGroup, SoftwareVfio
from vfiodma.errors import VfioError
from vfiodma.uapi import vfio as abi


class Opened:
    """A descriptor of a device, in a group with a container."""

    def __init__(self, *devices, kernel="7.2"):
        self.vfio = SoftwareVfio(kernel=kernel, groups=[SoftwareGroup(3, devices)], memlock_limit=None)
        self.container = self.vfio.container()
        self.device = devices[0]
        self.fd = self.open()

    def open(self, device=None):
        return self.container.open_device_fd((device or self.device).address)

    def ioctl(self, request, data=b"", fd=None):
        """Return the bytes as the call left them."""
        buffer = ctypes.create_string_buffer(bytes(data), max(1, len(data)))
        self.result = self.vfio.ioctl(self.fd if fd is None else fd, request, ctypes.addressof(buffer))
        return buffer.raw[:len(data)]

    def feature(self, number, ops, data=b"", argsz=None):
        head = struct.pack("=II", 8 + len(data) if argsz is None else argsz, ops | number)
        return self.ioctl(abi.VFIO_DEVICE_FEATURE, head + data)[8:]

    def get(self, number, data):
        return self.feature(number, abi.VFIO_DEVICE_FEATURE_GET, data)

    def set(self, number, data=b""):
        return self.feature(number, abi.VFIO_DEVICE_FEATURE_SET, data)

    def set_irqs(self, flags, index, start, count, data=b"", argsz=None):
        layout = abi.vfio_irq_set
        head = layout.pack(argsz=layout.size + len(data) if argsz is None else argsz, flags=flags, index=index,
                           start=start, count=count)
        self.ioctl(abi.VFIO_DEVICE_SET_IRQS, head + data)

    def close(self):
        if self.fd >= 0:
            self.vfio.close(self.fd)
            self.fd = -1
        self.container.close()


@contextlib.contextmanager
def pages(count):
    """Yield (memory, its address)."""
    memory = mmap.mmap(-1, count * mmap.PAGESIZE)
    export = ctypes.c_char.from_buffer(memory)
    yield memory, ctypes.addressof(export)
    del export
    memory.close()


@contextlib.contextmanager
def opened(*devices, kernel="7.2"):
    device = Opened(*devices, kernel=kernel)
    try:
        yield device
    finally:
        device.close()


@contextlib.contextmanager
def fails(code):
    """The errno that the block must end with."""
    with pytest.raises(VfioError) as caught:
        yield caught
    assert caught.value.errno == code
