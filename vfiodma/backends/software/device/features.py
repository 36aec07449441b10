"""VFIO_DEVICE_FEATURE: which features there are, and the small ones among them."""
import errno
import struct
from collections.abc import Callable
from typing import NamedTuple

from ...._core.errno import error
from ...._core.memory import read_memory
from ....uapi import vfio as abi
from . import dma_logging, migration
from .arguments import Eventfd
from .state import DeviceState

_HEAD = struct.Struct("=II")
_GET, _SET, _PROBE = abi.VFIO_DEVICE_FEATURE_GET, abi.VFIO_DEVICE_FEATURE_SET, abi.VFIO_DEVICE_FEATURE_PROBE
_KNOWN = abi.VFIO_DEVICE_FEATURE_MASK | _GET | _SET | _PROBE


class Feature(NamedTuple):
    """A feature of the kernel: from when on, who has it, and what it does."""

    since: str
    present: Callable[[DeviceState], bool]
    ops: int
    size: int                                           # of its data, bytes
    act: Callable[[DeviceState, int, int], None]        # (state, GET or SET, address of the data)


def device_feature(state: DeviceState, arg: int) -> int:
    """Do DEVICE_FEATURE."""
    operation = "device_feature"
    argsz, flags = _HEAD.unpack(read_memory(arg, _HEAD.size))
    ops = flags & (_GET | _SET)
    if argsz < _HEAD.size or flags & ~_KNOWN or (ops == _GET | _SET and not flags & _PROBE):
        raise error(errno.EINVAL, operation, hint="argsz, unknown flags, or GET and SET at once")
    number = flags & abi.VFIO_DEVICE_FEATURE_MASK
    if (number == abi.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 and state.at_least("7.2")
            and not migration.has_precopy(state)):
        raise error(errno.EINVAL, operation, hint="the device has no PRE_COPY states")
    feature = FEATURES.get(number)
    if feature is None or not state.at_least(feature.since) or not feature.present(state):
        raise error(errno.ENOTTY, operation, hint=f"the device or the kernel does not have feature {number}")
    if ops & ~feature.ops:
        raise error(errno.EINVAL, operation, hint=f"feature {number} can't be read or set that way")
    if flags & _PROBE:
        return 0
    if not ops:
        raise error(errno.EINVAL, operation, hint="neither GET, SET nor PROBE")
    if argsz - _HEAD.size < feature.size:
        raise error(errno.EINVAL, operation, hint=f"the data of feature {number} has {feature.size} bytes")
    feature.act(state, ops, arg + _HEAD.size)
    return 0


# ---- the token of a physical function

def _set_token(state: DeviceState, op: int, data: int) -> None:
    state.device.vf_token = read_memory(data, 16)


# ---- low power

def _sleep(state: DeviceState, wakeup: Eventfd | None) -> None:
    with state.lock:
        if state.asleep:
            if wakeup is not None:
                wakeup.close()
            raise error(errno.EINVAL, "low_power_entry", hint="the device is in low power already")
        state.asleep, state.wakeup = True, wakeup


def _enter(state: DeviceState, op: int, data: int) -> None:
    _sleep(state, None)


def _enter_with_wakeup(state: DeviceState, op: int, data: int) -> None:
    fd, reserved = struct.unpack("=iI", read_memory(data, 8))
    if fd < 0:
        raise error(errno.EINVAL, "low_power_entry", hint="an eventfd is needed")
    _sleep(state, Eventfd(fd, "low_power_entry"))


def _leave(state: DeviceState, op: int, data: int) -> None:
    with state.lock:
        state.leave_low_power()


# ---- a part of a BAR as a dma-buf

def _export(state: DeviceState, op: int, data: int) -> None:
    """Check the request as the kernel does; there is no dma-buf to make out of a software device's registers."""
    layout = abi.vfio_device_feature_dma_buf
    values = layout.unpack(read_memory(data, layout.size))
    if not values["nr_ranges"] or values["flags"]:
        raise error(errno.EINVAL, "export_dmabuf", hint="give at least one range, and no flags")
    if values["region_index"] >= abi.VFIO_PCI_ROM_REGION_INDEX:
        raise error(errno.ENODEV, "export_dmabuf", hint="only a BAR can be exported")
    raise error(errno.EOPNOTSUPP, "export_dmabuf", hint="registers of a software device can't be exported")


def _always(state: DeviceState) -> bool:
    return True


def _logs(state: DeviceState) -> bool:
    return getattr(state.device, "dma_logging", False)


FEATURES = {
    abi.VFIO_DEVICE_FEATURE_PCI_VF_TOKEN: Feature(
        "5.12", lambda state: getattr(state.device, "vf_token", None) is not None, _SET, 16, _set_token),
    abi.VFIO_DEVICE_FEATURE_MIGRATION: Feature("6.1", migration.present, _GET, 8, migration.get_flags),
    abi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE: Feature("6.1", migration.present, _GET | _SET, 8, migration.device_state),
    abi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY: Feature("6.1", _always, _SET, 0, _enter),
    abi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP: Feature("6.1", _always, _SET, 8, _enter_with_wakeup),
    abi.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT: Feature("6.1", _always, _SET, 0, _leave),
    abi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START: Feature("6.1", _logs, _SET, 24, dma_logging.start),
    abi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP: Feature("6.1", _logs, _SET, 0, dma_logging.stop),
    abi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT: Feature("6.1", _logs, _GET, 32, dma_logging.report),
    abi.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE: Feature("6.12", migration.present, _GET, 8, migration.data_size),
    abi.VFIO_DEVICE_FEATURE_DMA_BUF: Feature("7.2", _always, _GET, 16, _export),
    abi.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2: Feature("7.2", migration.present, _SET, 0, migration.use_precopy_v2),
}
