"""VFIO_DEVICE_QUERY_GFX_PLANE and GET_GFX_DMABUF: the display of a device that has ``query_plane``."""
import errno

from ...._core.errno import error
from ...._core.memory import read_memory, write_memory
from ....uapi import vfio as abi
from .arguments import read_struct
from .state import DeviceState

_MINIMUM = 60               # through region_index or dmabuf_id
_PROBE, _DMABUF, _REGION = abi.VFIO_GFX_PLANE_TYPE_PROBE, abi.VFIO_GFX_PLANE_TYPE_DMABUF, abi.VFIO_GFX_PLANE_TYPE_REGION
_NO_HOTSPOT = 0xFFFFFFFF


def _needs_display(state: DeviceState, operation: str) -> None:
    if not hasattr(state.device, "query_plane"):
        raise error(errno.ENOTTY, operation, hint="the device has no display")


def query_plane(state: DeviceState, arg: int) -> int:
    """Answer QUERY_GFX_PLANE.

    ``device.plane_access`` has the VFIO_GFX_PLANE_TYPE bits that it supports; ``device.query_plane(kind, access)``
    returns the fields of the plane, or None when it is disabled.
    """
    operation = "query_gfx_plane"
    _needs_display(state, operation)
    layout = abi.vfio_device_gfx_plane_info
    values = read_struct(layout, _MINIMUM, arg, operation)
    flags, access = values["flags"], values["flags"] & ~_PROBE
    if access not in (_DMABUF, _REGION) or not access & state.device.plane_access:
        raise error(errno.EINVAL, operation, hint="the device does not show its planes that way")
    if flags & _PROBE:
        return 0
    plane = state.device.query_plane(values["drm_plane_type"], access) or {}
    reply = {"argsz": values["argsz"], "flags": flags, "drm_plane_type": values["drm_plane_type"],
             "x_hot": _NO_HOTSPOT, "y_hot": _NO_HOTSPOT} | plane
    write_memory(arg, layout.pack(**reply)[:_MINIMUM])
    return 0


def get_dmabuf(state: DeviceState, arg: int) -> int:
    """Answer GET_GFX_DMABUF: the descriptor that ``device.plane_dmabuf(id)`` returns, ENOENT where it returns None."""
    _needs_display(state, "get_gfx_dmabuf")
    number = int.from_bytes(read_memory(arg, 4), "little")
    fd = state.device.plane_dmabuf(number) if hasattr(state.device, "plane_dmabuf") else None
    if fd is None:
        raise error(errno.ENOENT, "get_gfx_dmabuf", hint=f"there is no dma-buf {number}")
    return fd
