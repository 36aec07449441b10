"""Compression of pages on their way, by libraries: whether it pays is tried for each chunk."""
import errno
import importlib
from typing import Any

from .._core.errno import error
from ..errors import MissingExtraError
from .stream import CHUNK_BYTES, Compression, damaged

_LIBRARIES = {Compression.ZSTD: "zstandard", Compression.LZ4: "lz4.block"}
#: What a chunk is tried on: so many pieces of so many bytes, spread over it.
_PIECES, _PIECE_BYTES = 4, 16 << 10
#: Compressed bytes of a hundred, at most, that are worth the work of both sides.
_WORTH_SAMPLE, _WORTH = 80, 90


def _library(compression: Compression) -> Any:
    try:
        return importlib.import_module(_LIBRARIES[compression])
    except ImportError:
        return None


def offer(name: str) -> Compression:
    """Return the compressions that one side takes: "none", "auto" (what is installed), "zstd" or "lz4".

    Raises
    ------
    MissingExtraError
        The library is not installed.
    """
    if name == "none":
        return Compression.NONE
    if name == "auto":
        return Compression(sum(known for known in _LIBRARIES if _library(known)))
    if name not in ("zstd", "lz4"):
        raise error(errno.EINVAL, "compression",
                    hint=f'a compression is "none", "auto", "zstd" or "lz4", not {name!r}')
    compression = Compression[name.upper()]
    if _library(compression) is None:
        raise MissingExtraError(_LIBRARIES[compression].partition(".")[0], "migrate")
    return compression


def agree(offered: Compression, taken: Compression) -> Compression:
    """Return the compression of both sides, zstd rather than lz4; NONE where they have none in common."""
    for compression in (Compression.ZSTD, Compression.LZ4):
        if offered & taken & compression:
            return compression
    return Compression.NONE


class Codec:
    """Compresses chunks of one thread, or takes them apart.

    Parameters
    ----------
    compression : Compression
        ZSTD or LZ4; its library is there.
    """

    def __init__(self, compression: Compression) -> None:
        library = _library(compression)
        if compression is Compression.ZSTD:
            self._compress = library.ZstdCompressor(level=1).compress
            self._expand = self._expand_zstd
            self._zstd, self._decompressor = library, library.ZstdDecompressor(max_window_size=CHUNK_BYTES)
        else:
            self._compress = lambda content: library.compress(content, store_size=False)
            self._expand = lambda data, size: library.decompress(data, uncompressed_size=size)

    def compress(self, content: Any) -> bytes | None:
        """Return a chunk's content compressed; None where that does not pay.  The GIL is released."""
        view = memoryview(content).cast("B")
        size = len(view)
        if size > 2 * _PIECES * _PIECE_BYTES:
            step = (size - _PIECE_BYTES) // (_PIECES - 1)
            sample = b"".join(view[at:at + _PIECE_BYTES] for at in range(0, size - _PIECE_BYTES + 1, step))
            if len(self._compress(sample)) * 100 > len(sample) * _WORTH_SAMPLE:
                return None
        data = self._compress(view)
        return data if len(data) * 100 <= size * _WORTH else None

    def expand(self, data: Any, size: int) -> bytes:
        """Return what was compressed, exactly ``size`` bytes; no more memory than that is used.

        Raises
        ------
        ProtocolError
            EPROTO: it is no such thing.
        """
        try:
            content = self._expand(data, size)
        except Exception as exc:        # the libraries have their own errors, ValueError and MemoryError
            raise damaged(f"compressed pages can't be taken apart: {exc}") from None
        if len(content) != size:
            raise damaged(f"compressed pages hold {len(content)} bytes of {size}")
        return content

    def _expand_zstd(self, data: Any, size: int) -> bytes:
        # The library makes room for what the frame says of itself.
        frame = self._zstd.get_frame_parameters(data)
        if frame.content_size != size or frame.window_size > CHUNK_BYTES:
            raise ValueError(f"{frame.content_size} bytes are announced, {size} expected")
        return self._decompressor.decompress(data, max_output_size=size, allow_extra_data=False)
