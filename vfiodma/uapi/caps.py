"""Chains of capabilities, as VFIO's information ioctls append them to their structs."""
import struct
from collections.abc import Iterator

_HEADER = struct.Struct("=HHI")


def capability_chain(data: bytes, offset: int) -> Iterator[tuple[int, int, int]]:
    """Yield (id, version, offset) of each capability in ``data``; ``offset`` is where its header stands.

    A chain that loops or leads outside ends there.  Source: struct vfio_info_cap_header.
    """
    seen = set()
    while offset and offset not in seen and offset + _HEADER.size <= len(data):
        seen.add(offset)
        number, version, following = _HEADER.unpack_from(data, offset)
        yield number, version, offset
        offset = following
