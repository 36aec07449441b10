"""The display of a device: what its planes show, as a region or a dma-buf."""
import enum
import errno
from typing import TYPE_CHECKING, NamedTuple

from ..errors import InvalidArgumentError, UnsupportedError
from ..uapi import vfio as abi
from .edid import Edid

if TYPE_CHECKING:
    from .pci import VfioDevice


class PlaneAccess(enum.IntEnum):
    """How the pixels of a plane are reached."""

    DMABUF = abi.VFIO_GFX_PLANE_TYPE_DMABUF
    REGION = abi.VFIO_GFX_PLANE_TYPE_REGION


class PlaneKind(enum.IntEnum):
    """Planes, numbered as DRM does."""

    OVERLAY = 0
    PRIMARY = 1
    CURSOR = 2


class Plane(NamedTuple):
    """What VFIO_DEVICE_QUERY_GFX_PLANE tells."""

    drm_format: int             #: fourcc
    drm_format_mod: int
    width: int                  #: pixels
    height: int                 #: pixels
    stride: int                 #: bytes
    size: int                   #: bytes
    position: tuple[int, int]
    hotspot: tuple[int, int] | None
    region_index: int | None    #: region that holds the pixels, with REGION
    dmabuf_id: int | None       #: for Graphics.dmabuf, with DMABUF

    @property
    def enabled(self) -> bool:
        """Whether it shows anything."""
        return bool(self.drm_format and self.size)


class Graphics:
    """The planes of a device's display.  Source: VFIO_DEVICE_QUERY_GFX_PLANE, VFIO_DEVICE_GET_GFX_DMABUF."""

    __slots__ = ("_device",)

    def __init__(self, device: "VfioDevice") -> None:
        self._device = device

    def _query(self, flags: int, kind: int) -> bytearray:
        layout = abi.vfio_device_gfx_plane_info
        data = bytearray(layout.pack(argsz=layout.size, flags=flags, drm_plane_type=kind))
        self._device.control(abi.VFIO_DEVICE_QUERY_GFX_PLANE, data, "query_gfx_plane", {
            errno.ENOTTY: "the device has no display", errno.EINVAL: "the device does not offer this plane this way",
            errno.ENOMEM: "the device's driver has no memory for the dma-buf: query it again"})
        return data

    def probe(self, access: PlaneAccess, kind: int = PlaneKind.PRIMARY) -> bool:
        """Return whether the device has a display that is reached this way."""
        try:
            self._query(abi.VFIO_GFX_PLANE_TYPE_PROBE | access, kind)
        except (InvalidArgumentError, UnsupportedError):
            return False
        return True

    def query(self, access: PlaneAccess, kind: int = PlaneKind.PRIMARY) -> Plane:
        """Return what a plane shows now.

        Raises
        ------
        VfioError
            ENOTTY: no display; EINVAL: not this way.
        """
        values = abi.vfio_device_gfx_plane_info.unpack(self._query(access, kind))
        hotspot = (values["x_hot"], values["y_hot"])
        return Plane(values["drm_format"], values["drm_format_mod"], values["width"], values["height"],
                     values["stride"], values["size"], (values["x_pos"], values["y_pos"]),
                     None if hotspot == (0xFFFFFFFF, 0xFFFFFFFF) else hotspot,
                     values["region_index"] if access == PlaneAccess.REGION else None,
                     values["dmabuf_id"] if access == PlaneAccess.DMABUF else None)

    def edid(self) -> Edid:
        """Return the monitor's EDID region; ENODEV where the device has none."""
        return Edid(self._device)

    def dmabuf(self, dmabuf_id: int) -> int:
        """Return a new descriptor of a plane's dma-buf; the caller closes it.

        Raises
        ------
        VfioError
            ENOENT: there is no such id (any more).
        """
        data = bytearray((dmabuf_id & 0xFFFFFFFF).to_bytes(4, "little"))
        return self._device.control(abi.VFIO_DEVICE_GET_GFX_DMABUF, data, "get_gfx_dmabuf", {
            errno.ENOTTY: "the device has no display", errno.ENOENT: "no plane has this dma-buf: query it again"})
