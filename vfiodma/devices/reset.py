"""Resets: of one device, and of everything behind its bus or slot."""
import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from ..errors import VfioError
from ..uapi import vfio as abi
from .arguments import pack_fds

if TYPE_CHECKING:
    from .pci import VfioDevice

_FIRST_COUNT = 16


class HotResetDevice(NamedTuple):
    """A device that a hot reset takes along."""

    address: str            #: "0000:01:02.0"
    group: int | None       #: number of its group; None when the devices were opened through their own nodes
    devid: int | None       #: its id in the iommufd, 0 = owned through its group, -1 = not owned; None with groups


class HotResetInfo(NamedTuple):
    """What VFIO_DEVICE_GET_PCI_HOT_RESET_INFO tells."""

    devices: tuple[HotResetDevice, ...]
    by_devid: bool          #: opened through device nodes: a hot reset takes no group descriptors
    owned: bool             #: every device is bound to this iommufd; with groups always False


def reset(device: "VfioDevice") -> None:
    """Reset a device.

    Raises
    ------
    VfioError
        EINVAL: it can't be reset alone (``DeviceFlags.RESET`` is missing in its info).

    Notes
    -----
    Leaves migration in MigrationState.RUNNING.  Source: VFIO_DEVICE_RESET.
    """
    device.control(abi.VFIO_DEVICE_RESET, 0, "device_reset", {
        errno.EINVAL: "the device can't be reset alone: see hot_reset_info()",
        errno.EAGAIN: "another reset is under way, or its bus is in use: try again",
    })


def hot_reset_info(device: "VfioDevice") -> HotResetInfo:
    """Return which devices a hot reset takes along.

    Raises
    ------
    VfioError
        ENODEV: its slot or bus can't be reset (a device on a root bus); EPERM: one of the devices has no IOMMU group.
    """
    head, entry = abi.vfio_pci_hot_reset_info, abi.vfio_pci_dependent_device
    count = _FIRST_COUNT
    while True:
        size = head.size + count * entry.size
        data = bytearray(head.pack(argsz=size).ljust(size, b"\0"))
        try:
            device.control(abi.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, data, "hot_reset_info", {
                errno.ENODEV: "neither its slot nor its bus can be reset",
                errno.EPERM: "one of the devices has no IOMMU group",
            })
            break
        except VfioError as exc:
            needed = head.unpack(data)["count"]
            if exc.errno != errno.ENOSPC or needed <= count:
                raise
            count = needed
    values = head.unpack(data, head.unpack(data)["count"])
    by_devid = bool(values["flags"] & abi.VFIO_PCI_HOT_RESET_FLAG_DEV_ID)
    devices = []
    for row in values["devices"]:
        address = f"{row['segment']:04x}:{row['bus']:02x}:{row['devfn'] >> 3:02x}.{row['devfn'] & 7}"
        devid = -1 if row["devid"] == abi.VFIO_PCI_DEVID_NOT_OWNED else row["devid"]
        devices.append(HotResetDevice(address, None if by_devid else row["group_id"], devid if by_devid else None))
    return HotResetInfo(tuple(devices), by_devid, bool(values["flags"] & abi.VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED))


def hot_reset(device: "VfioDevice", group_fds: Iterable[int] = ()) -> None:
    """Reset the slot or bus of a device with every device behind it.

    Parameters
    ----------
    group_fds : iterable of int
        Descriptors of the groups of all devices in hot_reset_info(), as proof that they are the caller's; none when
        the devices were opened through their own nodes.

    Raises
    ------
    VfioError
        EINVAL: the proof is not complete, or one of the devices is not bound to VFIO; ENODEV: no such reset; EBUSY.
    """
    data = pack_fds("hot_reset", group_fds)
    layout = abi.vfio_pci_hot_reset
    head = layout.pack(argsz=layout.size + len(data), count=len(data) // 4)
    device.control(abi.VFIO_DEVICE_PCI_HOT_RESET, bytearray(head + data), "hot_reset", {
        errno.EINVAL: "give the descriptors of all groups in hot_reset_info(), none for a device that was opened "
                      "through its own node; every device must be bound to a VFIO driver",
        errno.ENODEV: "neither its slot nor its bus can be reset",
        errno.EBADF: "one of the group descriptors is closed",
        errno.EBUSY: "one of the devices is busy",
    })
