"""A device node bound to an iommufd."""
import contextlib
import errno
from typing import TYPE_CHECKING, Any, Self

from ..._core.kernel import Descriptor
from ...errors import VfioError, fits
from ...uapi import vfio as abi
from .hwpt import Hwpt, NestedHwpt
from .ioas import Ioas

if TYPE_CHECKING:
    from .context import HwInfo, Iommufd

# The forms without PASIDs and tokens, which every kernel takes.
_BIND = abi.vfio_device_bind_iommufd.at("6.12")
_ATTACH = abi.vfio_device_attach_iommufd_pt.at("6.12")
_DETACH = abi.vfio_device_detach_iommufd_pt.at("6.12")
_ATTACH_PASID, _DETACH_PASID = abi.vfio_device_attach_iommufd_pt, abi.vfio_device_detach_iommufd_pt


class IommufdDevice(Descriptor):
    """A VFIO device, opened by its own node and bound to an iommufd; made by ``Iommufd.bind``.

    Attributes
    ----------
    iommufd : Iommufd
    address : str
        As it was asked for: the PCI address, or the node.
    id : int
        Its number in the iommufd.

    Notes
    -----
    A node can be open only once while it is bound; further descriptors are duplicates (``dup()``).
    Source: VFIO_DEVICE_BIND_IOMMUFD.
    """

    def __init__(self, iommufd: "Iommufd", address: str, path: str) -> None:
        self.iommufd = iommufd
        self.address = address
        super().__init__(iommufd.system, iommufd.system.open(path))
        try:
            data = bytearray(_BIND.pack(argsz=_BIND.size, iommufd=iommufd.fd))
            self.ioctl(abi.VFIO_DEVICE_BIND_IOMMUFD, data, "bind")
            self.id: int = _BIND.unpack(data)["out_devid"]
        except BaseException:
            super().close()
            raise
        iommufd.devices.append(self)

    @classmethod
    def adopt(cls, iommufd: "Iommufd", address: str, fd: int, number: int) -> Self:
        """Take over the descriptor of a device that is bound already, as ``number``."""
        device = cls.__new__(cls)
        Descriptor.__init__(device, iommufd.system, fd)
        device.iommufd, device.address, device.id = iommufd, address, number
        iommufd.devices.append(device)
        return device

    def hw_info(self) -> "HwInfo":
        """Ask for the IOMMU in front of the device."""
        return self.iommufd.hw_info(self.id)

    def attach(self, table: Ioas | Hwpt | NestedHwpt, pasid: int | None = None) -> int:
        """Let the device reach what an address space maps; return the number of the page table in use.

        An attached device changes over at once, without a moment in which it reaches nothing.

        Parameters
        ----------
        table : Ioas, Hwpt or NestedHwpt
            With an address space the kernel finds or makes a page table.
        pasid : int, optional
            Attach, or move, only requests with this PASID (Linux 6.15).  Numbers are the caller's choice; tables must
            be allocated with ``pasids=True``, also the one of requests without a PASID.

        Raises
        ------
        VfioError
            EADDRINUSE: a mapping or an allowed range lies where the device does not reach, or mappings are no multiples
            of its page size; EINVAL: the page table is not for this IOMMU, or another device of the group is
            attached elsewhere; EFAULT, ENOMEM: what is mapped can't be pinned.  The device stays as it was.
        """
        if pasid is None:
            data = bytearray(_ATTACH.pack(argsz=_ATTACH.size, pt_id=table.id))
        else:
            with fits("attach"):
                data = bytearray(_ATTACH_PASID.pack(argsz=_ATTACH_PASID.size, pt_id=table.id, pasid=pasid,
                                                    flags=abi.VFIO_DEVICE_ATTACH_PASID))
        self.ioctl(abi.VFIO_DEVICE_ATTACH_IOMMUFD_PT, data, "attach")
        return _ATTACH.unpack(data[:_ATTACH.size])["pt_id"]

    def detach(self, pasid: int | None = None) -> None:
        """Take everything, or what a PASID reaches, out of the device's reach; no effect when it is not attached."""
        if pasid is None:
            data = bytearray(_DETACH.pack(argsz=_DETACH.size))
        else:
            with fits("detach"):
                data = bytearray(_DETACH_PASID.pack(argsz=_DETACH_PASID.size, pasid=pasid,
                                                    flags=abi.VFIO_DEVICE_DETACH_PASID))
        self.ioctl(abi.VFIO_DEVICE_DETACH_IOMMUFD_PT, data, "detach")

    def dup(self) -> int:
        """Return another descriptor of the device, which the caller closes with ``system.close``."""
        if self.fd < 0:
            self.ioctl(abi.VFIO_DEVICE_GET_INFO, 0, "dup")          # EBADF
        return self.system.dup(self.fd)

    def _hint(self, err: int, operation: str) -> str:
        return _HINTS.get((err, operation)) or super()._hint(err, operation)

    def close(self) -> None:
        """Detach the device and close the descriptor.  Idempotent."""
        if self.fd < 0:
            return
        # A duplicate would keep the device attached.
        with contextlib.suppress(VfioError):
            self.detach()
        super().close()
        with contextlib.suppress(ValueError):
            self.iommufd.devices.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


_HINTS = {
    (errno.EINVAL, "bind"): "it is bound already, here or by another process, or its IOMMU is not cache coherent",
    (errno.EBUSY, "bind"): "its group is open through /dev/vfio/<group>, or has a device in a host driver's hands",
    (errno.EPERM, "bind"): "no interrupt remapping isolates its interrupts: enable it in the firmware, or load "
                           "iommufd with allow_unsafe_interrupts=1",
    (errno.EADDRINUSE, "attach"): "a mapping or an allowed range lies where the device does not reach (see "
                                  "iova_ranges()): attach before mapping, or restrict with allow_iovas()",
    (errno.EINVAL, "attach"): "the page table is not for the IOMMU of this device, another device of its group is "
                              "attached to another one, PASIDs need tables with pasids=True, or a guest's table is of "
                              "a width or has flags that the IOMMU lacks",
    (errno.ENODEV, "attach"): "the page table has a fault queue, and the device can't ask for pages (PRI)",
    (errno.EFAULT, "attach"): "a mapping is of memory that the process does not have, or not with that permission",
    (errno.ENOMEM, "attach"): "what is mapped exceeds the limit of locked memory (RLIMIT_MEMLOCK): raise it with "
                              "'ulimit -l', or run with CAP_IPC_LOCK",
    (errno.ENOENT, "attach"): "the address space or page table is destroyed, or of another iommufd",
}
