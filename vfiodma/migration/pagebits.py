"""Which pages, as frames: the bitmaps of LEFT and MISSING."""
from typing import Any

from .._core.bitmap import DirtyBitmap
from . import stream
from .channel import FrameChannel
from .layout import MemoryLayout
from .stream import BITS_BYTES, Header, Kind, damaged


def send_bits(channel: FrameChannel, kind: Kind, layout: MemoryLayout, bitmap: DirtyBitmap, epoch: int) -> None:
    """Send a bitmap of a layout; parts without a page are left out."""
    import numpy as np

    for block in layout.blocks:
        for first in range(0, block.npages, BITS_BYTES * 8):
            end = min(first + BITS_BYTES * 8, (block.npages + 63) // 64 * 64)
            part = bitmap[block.first_bit + first:block.first_bit + end]
            if part.any():
                words: Any = np.frombuffer(part, "u8").astype("<u8", copy=False)     # type: ignore[call-overload]
                channel.send(kind, *stream.encode_bits(first, words), block=block.number, epoch=epoch)


def take_bits(header: Header, body: memoryview, layout: MemoryLayout, into: DirtyBitmap) -> None:
    """Check a part of a bitmap, and OR it into one.

    Raises
    ------
    ProtocolError
        EPROTO: there is no such block, or there are no such pages in it; nothing was changed.
    """
    import numpy as np

    if header.block >= len(layout.blocks):
        raise damaged(f"there is no block {header.block}")
    block = layout.blocks[header.block]
    first, words = stream.decode_bits(body, block.npages)
    part: Any = np.frombuffer(words, "<u8").astype("u8")
    at = block.first_bit + first
    into[at:at + len(part) * 64].merge(DirtyBitmap.frombuffer(part, len(part) * 64, layout.pgsize))
