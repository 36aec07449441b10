"""Register writes that the kernel does by itself whenever an eventfd fires."""
import contextlib
import errno
import os
import warnings
from typing import TYPE_CHECKING, Self

from .._core.errno import error
from ..errors import VfioError
from ..uapi import vfio as abi
from .arguments import new_eventfd

if TYPE_CHECKING:
    from .pci import VfioDevice

_WIDTHS = {1: abi.VFIO_DEVICE_IOEVENTFD_8, 2: abi.VFIO_DEVICE_IOEVENTFD_16, 4: abi.VFIO_DEVICE_IOEVENTFD_32,
           8: abi.VFIO_DEVICE_IOEVENTFD_64}


class IoEvent:
    """A register write that an eventfd makes.

    Attributes
    ----------
    fd : int
        The eventfd: ``fire()`` or any write to it does the register write; -1 when closed.
    """

    def __init__(self, device: "VfioDevice", bar: int, offset: int, value: int, width: int) -> None:
        if width not in _WIDTHS:
            raise error(errno.EINVAL, "ioeventfd", size=width, hint="a register has 1, 2, 4 or 8 bytes")
        if not 0 <= value < 1 << 8 * width:
            raise error(errno.EINVAL, "ioeventfd", size=width, hint=f"{value:#x} does not fit {width} bytes")
        region = device.regions[bar]
        if offset < 0 or offset + width > region.size:
            raise error(errno.EINVAL, "ioeventfd", size=width, hint=f"offset {offset:#x} is outside of {region.name}")
        self._device = device
        self._fields = {"flags": _WIDTHS[width], "offset": region.info.offset + offset, "data": value}
        self.fd = new_eventfd("ioeventfd")
        try:
            self._set(self.fd)
        except BaseException:
            self._close_eventfd()
            raise

    def _set(self, fd: int) -> None:
        layout = abi.vfio_device_ioeventfd
        data = bytearray(layout.pack(argsz=layout.size, fd=fd, **self._fields))
        self._device.control(abi.VFIO_DEVICE_IOEVENTFD, data, "ioeventfd", {
            errno.EINVAL: "registers in BARs 0 to 5, outside of the MSI-X table; 8 bytes only where the kernel can",
            errno.EEXIST: "the same write of the same register has an eventfd already",
            errno.ENOSPC: "a device can have no more ioeventfds",
            errno.ENOTTY: "the device, or this processor architecture, has no ioeventfds",
        })

    def _close_eventfd(self) -> None:
        fd, self.fd = self.fd, -1
        os.close(fd)

    def fire(self) -> None:
        """Signal the eventfd; the kernel writes the register, at once or from a worker."""
        try:
            os.eventfd_write(self.fd, 1)
        except OSError as exc:
            raise error(exc.errno or errno.EIO, "ioeventfd", hint="the ioeventfd is closed") from None

    def fileno(self) -> int:
        """Return the eventfd."""
        return self.fd

    def close(self) -> None:
        """Remove it.  Idempotent."""
        if self.fd >= 0:
            with contextlib.suppress(VfioError):
                self._set(-1)
            self._close_eventfd()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()
            if not self._device.forked:
                warnings.warn(f"an ioeventfd of {self._device!r} was not closed", ResourceWarning, source=self,
                              stacklevel=1)


class IoEvents:
    """The ioeventfds of a device.  Source: VFIO_DEVICE_IOEVENTFD."""

    __slots__ = ("_device",)

    def __init__(self, device: "VfioDevice") -> None:
        self._device = device

    def add(self, bar: int, offset: int, value: int, width: int) -> IoEvent:
        """Have the kernel write ``value`` to a register whenever the eventfd of the result fires.

        Parameters
        ----------
        bar, offset, width : int
            BAR index, place in it and bytes (1, 2, 4; 8 only with some kernels) of the register.
        value : int
            What is written.

        Raises
        ------
        VfioError
            EINVAL, EEXIST: the same write is there; ENOSPC: 1000 of them; ENOTTY.
        """
        event = IoEvent(self._device, bar, offset, value, width)
        self._device.adopt(event)
        return event
