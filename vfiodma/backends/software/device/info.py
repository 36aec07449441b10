"""VFIO_DEVICE_GET_INFO."""
from typing import Any

from ...._core.memory import write_memory
from ....uapi import vfio as abi
from .arguments import chain, read_struct
from .state import DeviceState

_MINIMUM = 16               # through num_irqs
_CAP_OFFSET_END = 20


def get_info(state: DeviceState, arg: int) -> int:
    """Answer GET_INFO; the capabilities come from the device's ``info_caps``."""
    layout = abi.vfio_device_info
    values = read_struct(layout, _MINIMUM, arg, "device_get_info")
    argsz, device = values["argsz"], state.device
    flags = state.bus | (abi.VFIO_DEVICE_FLAGS_RESET if state.can_reset else 0)
    reply: dict[str, Any] = {"argsz": argsz, "flags": flags, "num_regions": state.region_count,
                             "num_irqs": state.irq_indexes, "cap_offset": 0, "pad": 0}
    size, capabilities = _MINIMUM, b""              # 5.4 has neither capabilities nor cap_offset
    if state.at_least("5.12"):
        capabilities = chain(layout.size, getattr(device, "info_caps", ()))
        # Up to 6.1 the struct ends with cap_offset, which is written whole or not at all.
        if state.at_least("6.12"):
            size = min(argsz, layout.size)
        elif argsz >= _CAP_OFFSET_END:
            size = _CAP_OFFSET_END
    if capabilities:
        reply["flags"] |= abi.VFIO_DEVICE_FLAGS_CAPS
        if argsz < layout.size + len(capabilities):
            reply["argsz"] = layout.size + len(capabilities)
        else:
            write_memory(arg + layout.size, capabilities)
            reply["cap_offset"] = layout.size
    write_memory(arg, layout.pack(**reply)[:size])
    return 0
