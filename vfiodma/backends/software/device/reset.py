"""VFIO_DEVICE_RESET, and the reset of all devices of a bus or slot: GET_PCI_HOT_RESET_INFO, PCI_HOT_RESET."""
import errno
import os
import struct
from typing import Any

from ...._core.errno import error
from ...._core.memory import read_memory, write_memory
from ....uapi import vfio as abi
from .state import DeviceState

_HEAD = struct.Struct("=III")           # argsz, flags, count
_NOT_OWNED = abi.VFIO_PCI_DEVID_NOT_OWNED


def reset(state: DeviceState) -> int:
    """Do RESET."""
    if not state.can_reset:
        raise error(errno.EINVAL, "device_reset", hint="the device has no reset of its own")
    state.reset()
    return 0


def _read_head(arg: int, operation: str) -> tuple[int, int, int]:
    argsz, flags, count = _HEAD.unpack(read_memory(arg, _HEAD.size))
    if argsz < _HEAD.size:
        raise error(errno.EINVAL, operation, hint=f"argsz must be at least {_HEAD.size}")
    return argsz, flags, count


def _affected(state: DeviceState, operation: str) -> list[tuple[Any, Any]]:
    """Return (group, device) of everything that is reset together with a device."""
    scope = getattr(state.device, "reset_scope", None)
    if scope is None:
        raise error(errno.ENODEV, operation, hint="neither the device's slot nor its bus can be reset")
    return [(group, device) for group in state.group.vfio._groups.values() for device in group.config.devices
            if getattr(device, "reset_scope", None) == scope]


def _place(address: str) -> tuple[int, int, int]:
    """Split "0000:01:02.3" into segment, bus and devfn."""
    try:
        segment, bus, slot = address.split(":")
        device, function = slot.split(".")
        return int(segment, 16), int(bus, 16), int(device, 16) << 3 | int(function, 16)
    except ValueError:
        return 0, 0, 0


def _devid(iommufd: Any, group: Any, device: Any) -> int:
    """Return the device's id in an iommufd, 0 when its group is that iommufd's, or that it is not owned."""
    bound = group.cdevs.get(device.address)
    if bound is not None:
        return bound.path.id if bound.iommufd is iommufd else _NOT_OWNED
    owned = any(other.iommufd is iommufd for other in group.cdevs.values())
    return abi.VFIO_PCI_DEVID_OWNED if owned else _NOT_OWNED


def get_hot_reset_info(state: DeviceState, arg: int, iommufd: Any) -> int:
    """Answer GET_PCI_HOT_RESET_INFO; ``iommufd`` is the one the descriptor's node is bound to, or None."""
    operation = "get_pci_hot_reset_info"
    argsz, _, _ = _read_head(arg, operation)
    affected = _affected(state, operation)
    if argsz < _HEAD.size + 8 * len(affected):
        write_memory(arg, _HEAD.pack(argsz, 0, len(affected)))
        raise error(errno.ENOSPC, operation, hint=f"room for {len(affected)} devices is needed")
    flags = 0
    if iommufd is not None:
        flags = abi.VFIO_PCI_HOT_RESET_FLAG_DEV_ID | abi.VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED
    entries = b""
    for group, device in affected:
        number = group.config.number
        if iommufd is not None:
            number = _devid(iommufd, group, device)
            if number == _NOT_OWNED:
                flags &= ~abi.VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED
        entries += struct.pack("=IHBB", number, *_place(device.address))
    write_memory(arg + _HEAD.size, entries)
    write_memory(arg, _HEAD.pack(argsz, flags, len(affected)))
    return 0


def hot_reset(state: DeviceState, arg: int, iommufd: Any) -> int:
    """Do PCI_HOT_RESET."""
    operation = "pci_hot_reset"
    _, flags, count = _read_head(arg, operation)
    if flags:
        raise error(errno.EINVAL, operation, hint="flags must be 0")
    wrong = error(errno.EINVAL, operation, hint="give the groups' descriptors, or none on a device's own node")
    if state.at_least("6.12") and bool(count) == (iommufd is not None):
        raise wrong
    affected = _affected(state, operation)
    if not count and iommufd is None:
        raise wrong
    owned = [_devid(iommufd, group, device) != _NOT_OWNED for group, device in affected]
    if iommufd is None:
        if count > len(affected):
            raise error(errno.EINVAL, operation, hint=f"{len(affected)} devices are affected")
        groups = _groups(state, struct.unpack(f"={count}i", read_memory(arg + _HEAD.size, 4 * count)), operation)
        owned = [group in groups for group, _ in affected]
    if not all(owned):
        missing = ", ".join(device.address for (_, device), mine in zip(affected, owned, strict=True) if not mine)
        raise error(errno.EINVAL, operation, hint=f"also affected, and not yours: {missing}")
    for group, device in affected:
        other = group.states.get(device.address)
        if other is not None:
            other.reset()
        else:
            device.reset()
    return 0


def _groups(state: DeviceState, fds: tuple[int, ...], operation: str) -> list[Any]:
    groups = []
    for fd in fds:
        try:
            if fd < 0:
                raise OSError
            os.fstat(fd)
        except OSError:
            raise error(errno.EBADF, operation, hint=f"descriptor {fd} is not open") from None
        file = state.group.vfio._files.get(fd)
        if not hasattr(file, "get_device_fd"):
            raise error(errno.EINVAL, operation, hint=f"descriptor {fd} is not a group's")
        groups.append(file)
    return groups
