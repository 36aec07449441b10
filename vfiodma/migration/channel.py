"""Frames over a transport: numbered, and summed as both sides agreed."""
import errno
import mmap
from collections.abc import Sequence
from typing import Any

from ..errors import MigrationError
from .stream import (
    CHUNK_BYTES,
    COMPRESSED,
    HEADER_SIZE,
    MAX_RUNS,
    RUN_SIZE,
    Checksum,
    Header,
    Kind,
    body_sum,
    damaged,
    decode_error,
    decode_header,
    encode_header,
)

#: Content from this size on goes with a system call of its own: behind a header the kernel would copy it to and from
#: places that are not aligned, which takes a third longer.
_APART_BYTES = 64 << 10


def page_buffer(size: int) -> mmap.mmap:
    """Return memory for content on its way; copies of it are fastest from and to the start of a page."""
    try:
        return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        raise MemoryError(f"no memory for a buffer of {size} bytes") from None


class FrameChannel:
    """Numbered frames over a transport, both ways.

    Parameters
    ----------
    transport : Transport
        ``send(parts)``, ``receive_into(view)`` and, where pages travel without checksum, ``receive_parts(views)``.

    Attributes
    ----------
    transport : Transport
        As it was given.
    checksum : Checksum
        Of the bodies from here on: CRC-32 up to READY or JOINED, then what READY says.
    bytes_sent, bytes_received : int
        So far, headers included.
    """

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self._sent = self._received = 0
        self._head = memoryview(bytearray(HEADER_SIZE))
        self._body = page_buffer(1 << 16)
        self.checksum = Checksum.CRC32
        self.bytes_sent = self.bytes_received = 0

    def send(self, kind: Kind, *parts: Any, content: Sequence[Any] = (), block: int = 0, flags: int = 0,
             epoch: int = 0, nruns: int = 0) -> None:
        """Send a frame whose body is the parts, and the content of pages behind them.

        All are bytes-like, and staged: nobody writes into them any more.  Only without checksums may the content be
        memory that is written meanwhile.
        """
        summed = parts if self.checksum is Checksum.NONE else (*parts, *content)
        size = sum(memoryview(part).nbytes for part in content)
        length = sum(memoryview(part).nbytes for part in parts) + size
        header = encode_header(Header(kind, block, flags, epoch, self._sent, nruns, length,
                                      body_sum(self.checksum, summed)))
        self._sent += 1
        if size < _APART_BYTES:
            self.transport.send([header, *parts, *content])
        else:
            self.transport.send([header, *parts])
            self.transport.send(content)
        self.bytes_sent += HEADER_SIZE + length

    def receive(self, *kinds: Kind) -> tuple[Header, memoryview]:
        """Receive a frame of one of the kinds; the body is good until the next call.

        Without checksums the body of PAGES is their runs only, unless they are compressed; ``receive_content`` is next.

        Raises
        ------
        ProtocolError
            EPROTO: damaged, out of order, or not of a kind that may come now.
        """
        self.transport.receive_into(self._head)
        header = decode_header(self._head)
        if header.kind not in kinds:
            raise damaged(f"{header.kind.name} came where only {' or '.join(kind.name for kind in kinds)} may")
        if header.sequence != self._received:
            raise damaged(f"frame {header.sequence} came, {self._received} was next: lost, repeated or out of order")
        self._received += 1
        unsummed = self.checksum is Checksum.NONE and header.kind is Kind.PAGES
        summed = header.nruns * RUN_SIZE if unsummed else header.length
        length = summed if unsummed and not header.flags & COMPRESSED else header.length
        if length > MAX_RUNS * RUN_SIZE + CHUNK_BYTES:
            raise damaged(f"a body of {length} bytes, which would have to be kept")
        start = -header.nruns * RUN_SIZE % mmap.PAGESIZE        # content begins where a page does
        if start + length > len(self._body):
            self._body = page_buffer(start + length)
        body = memoryview(self._body)[start:start + length]
        self.transport.receive_into(body)
        if body_sum(self.checksum, [body[:summed]]) != header.body_sum:
            raise damaged(f"the checksum of frame {header.sequence} ({header.kind.name}) is wrong: "
                          "bytes changed on the way")
        self.bytes_received += HEADER_SIZE + header.length
        return header, body

    def receive_content(self, views: Sequence[memoryview]) -> None:
        """Receive the content of a frame of pages straight to where it belongs."""
        self.transport.receive_parts(views)

    def answer(self, *kinds: Kind, epoch: int = 0) -> tuple[Header, memoryview]:
        """Receive the destination's answer; MigrationError (ECONNABORTED) with its own words where it gave up."""
        header, body = self.receive(*kinds, Kind.ERROR)
        if header.kind is Kind.ERROR:
            raise gave_up(body)
        if header.epoch != epoch:
            raise damaged(f"{header.kind.name} of epoch {header.epoch}, {epoch} was awaited")
        return header, body

    def close(self) -> None:
        """Close the transport; idempotent."""
        self.transport.close()


def gave_up(body: memoryview) -> MigrationError:
    """Return the error that an ERROR frame tells of; ``peer_errno`` is why the destination gave up."""
    number, words = decode_error(body)
    exc = MigrationError(errno.ECONNABORTED, operation="migrate", hint=words)
    exc.peer_errno = number
    return exc
