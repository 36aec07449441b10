"""Information ioctls that append a chain of capabilities: asking with a large enough buffer, cutting the chain up."""
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..uapi.caps import capability_chain
from ..uapi.layout import Layout

if TYPE_CHECKING:
    from .pci import VfioDevice


class Capability(NamedTuple):
    """A capability as the kernel wrote it."""

    id: int
    version: int
    data: bytes         #: with its header, up to the next capability or the end of all

    def unpack(self, layout: Layout) -> dict[str, Any]:
        """Decode it; bytes that an older kernel did not write are 0."""
        return layout.unpack(self.data.ljust(layout.size, b"\0"))

    def array(self, layout: Layout, element: Layout, count: int) -> list[dict[str, Any]]:
        """Decode the array behind the structure, as much of it as is there."""
        count = min(count, (len(self.data) - layout.size) // element.size)
        return [element.unpack_from(self.data, layout.size + i * element.size) for i in range(count)]


def decode_chain(data: bytes, first: int) -> tuple[Capability, ...]:
    """Cut the chain that begins at ``first`` into its capabilities (0 = there is none)."""
    found = list(capability_chain(data, first))
    places = sorted(at for _, _, at in found) + [len(data)]
    return tuple(Capability(number, version, data[at:places[places.index(at) + 1]]) for number, version, at in found)


def ask(device: "VfioDevice", request: int, layout: Layout, operation: str, hints: Mapping[int, str] | None = None,
        **values: Any) -> bytes:
    """Do an information ioctl with as large a buffer as the kernel wants; return structure and capabilities."""
    size = layout.size      # without capabilities, so that the answer is exactly as long as they are
    while True:
        data = bytearray(layout.pack(argsz=size, **values).ljust(size, b"\0"))
        device.control(request, data, operation, hints)
        needed = layout.unpack(data)["argsz"]
        if needed <= size:
            return bytes(data)
        size = needed
