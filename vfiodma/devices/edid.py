"""The monitor of a virtual display: what it says about itself (EDID), and whether it is on."""
import errno
from typing import TYPE_CHECKING, Any

from .._core.errno import error
from ..uapi import vfio as abi

if TYPE_CHECKING:
    from .pci import VfioDevice

_LAYOUT = abi.vfio_region_gfx_edid
_AT = {field.name: field.offset for field in _LAYOUT.fields}


class Edid:
    """The EDID region of a device.  Get one from ``device.graphics.edid()``.

    Attributes
    ----------
    region : Region
    max_size : int
        Bytes that an EDID may have.
    max_resolution : (int, int)
        Pixels; 0 = no limit.

    Raises
    ------
    VfioError
        ENODEV: the device has no such region.

    Notes
    -----
    Source: VFIO_REGION_TYPE_GFX, VFIO_REGION_SUBTYPE_GFX_EDID.
    """

    def __init__(self, device: "VfioDevice") -> None:
        region = device.regions.find(abi.VFIO_REGION_TYPE_GFX, abi.VFIO_REGION_SUBTYPE_GFX_EDID)
        if region is None:
            raise error(errno.ENODEV, "edid", hint="the device has no region for a monitor's EDID")
        self.region = region
        self._offset = self._get("edid_offset")
        self.max_size = self._get("edid_max_size")
        self.max_resolution = self._get("max_xres"), self._get("max_yres")

    def _get(self, name: str) -> int:
        return self.region.read_u32(_AT[name])

    def _set(self, name: str, value: int) -> None:
        self.region.write_u32(_AT[name], value)

    @property
    def on(self) -> bool:
        """Whether the monitor is turned on (its link is up)."""
        return self._get("link_state") == abi.VFIO_DEVICE_GFX_LINK_STATE_UP

    def read(self) -> bytes:
        """Return the EDID, empty when none was set."""
        size = self._get("edid_size")
        return self.region.read(self._offset, size) if size else b""

    def turn_off(self) -> None:
        """Turn the monitor off."""
        self._set("link_state", abi.VFIO_DEVICE_GFX_LINK_STATE_DOWN)

    def turn_on(self) -> None:
        """Turn it on with the EDID that was set; EINVAL where there is none that is valid."""
        self._set("link_state", abi.VFIO_DEVICE_GFX_LINK_STATE_UP)

    def update(self, edid: Any) -> None:
        """Connect a monitor: turn the old one off, set the EDID, turn it on.

        Parameters
        ----------
        edid : bytes-like
            A whole number of blocks of 128 bytes.

        Raises
        ------
        VfioError
            EINVAL: too long (nothing has changed), or not taken by the device (the monitor is off).
        """
        data = bytes(edid)
        if len(data) > self.max_size:
            raise error(errno.EINVAL, "edid", size=len(data), hint=f"the device takes EDIDs of {self.max_size} bytes")
        self.turn_off()
        self._set("edid_size", len(data))       # first: a device may take no more of the blob than its size
        if data:
            self.region.write(self._offset, data)
        self.turn_on()
