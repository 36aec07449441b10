"""Further channels of a stream: connections that say which stream they belong to, and know its secret."""
import errno
import time
from collections.abc import Callable
from typing import Any

from ..errors import MigrationError, VfioError
from . import stream
from .channel import FrameChannel
from .stream import Hello, Kind, Ready

# What a stranger's connection may end with; the one that is waited for comes all the same.
_STRANGERS = {errno.EPROTO, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT, errno.EKEYREJECTED}

_JOIN = 2.0     # seconds for a JOIN to come over a new connection
_LOOK = 0.1     # seconds between looks at channel 0


def accept_good(accept: Callable[[float], Any], until: float) -> Any:
    """Return the next connection whose handshake is good; strangers do not end the wait.

    Parameters
    ----------
    accept : callable
        Called with seconds; returns a Transport, or raises MigrationError: ``Listener.accept``.
    until : float
        Of time.monotonic().
    """
    while True:
        try:
            return accept(max(until - time.monotonic(), 0.001))
        except MigrationError as exc:
            if exc.errno not in _STRANGERS or exc.errno == errno.ETIMEDOUT or time.monotonic() >= until:
                raise


def connect_channels(connect: Callable[[], Any], control: Any, hello: Hello, ready: Ready) -> list[FrameChannel]:
    """Open the further channels that READY allows.

    Parameters
    ----------
    connect : callable
        Returns a Transport to the destination.  It belongs to the channel: ``channel.transport.close()``.
    control : Transport
        That of channel 0: a destination that goes away is not waited for.
    hello, ready : Hello, Ready
        Of this stream.

    Returns
    -------
    list of FrameChannel
        Channels 1, 2, ...; all pages may go over them.

    Raises
    ------
    MigrationError, ProtocolError
        A connection failed, or the destination refused it; all are closed.
    """
    channels: list[FrameChannel] = []
    try:
        for index in range(1, ready.channels):
            channel = FrameChannel(connect())
            channels.append(channel)
            channel.send(Kind.JOIN, stream.encode_join(hello, index))
            deadline = time.monotonic() + channel.transport.timeout
            while not channel.transport.wait_readable(_LOOK) and time.monotonic() < deadline:
                if control.wait_readable(0):
                    raise MigrationError(errno.ECONNRESET, operation="join",
                                         hint="the destination gave up before all channels had joined")
            channel.answer(Kind.JOINED)
            channel.checksum = ready.checksum
    except BaseException:
        close_channels(channels)
        raise
    return channels


def accept_channels(accept: Callable[[float], Any], control: Any, hello: Hello, ready: Ready,
                    timeout: float = 30.0) -> list[FrameChannel]:
    """Wait until all further channels have joined, in whichever order.

    Parameters
    ----------
    accept : callable
        Called with seconds; returns a Transport that connected within them: ``Listener.accept``.
    control : Transport
        That of channel 0: a source that goes away is not waited for.
    hello, ready : Hello, Ready
        Of this stream.
    timeout : float
        Seconds until all have joined.

    Returns
    -------
    list of FrameChannel
        Channels 1, 2, ...; their transports belong to them.

    Raises
    ------
    MigrationError
        ETIMEDOUT: not all came in time; ECONNRESET: the source gave up.  Those that joined are closed.  Connections
        that are not this stream's are closed, and nothing else.
    """
    channels: dict[int, FrameChannel] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(channels) < ready.channels - 1:
            if (left := deadline - time.monotonic()) <= 0:
                raise MigrationError(errno.ETIMEDOUT, operation="join",
                                     hint=f"{len(channels)} of {ready.channels - 1} further channels joined")
            if control.wait_readable(0):
                raise MigrationError(errno.ECONNRESET, operation="join", hint="the source gave up before all joined")
            try:
                transport = accept(min(left, _LOOK))
            except MigrationError as exc:
                if exc.errno not in _STRANGERS:
                    raise
                continue
            joining = FrameChannel(transport)
            if not transport.wait_readable(min(left, _JOIN)):       # who says nothing keeps nobody waiting
                transport.close()
                continue
            try:
                index = _receive_join(joining, hello)
                if index in channels or index >= ready.channels:
                    raise stream.damaged(f"channel {index} joined twice, or was not allowed")
                joining.send(Kind.JOINED)
            except VfioError:
                transport.close()
                continue
            except BaseException:
                transport.close()
                raise
            joining.checksum = ready.checksum
            channels[index] = joining
    except BaseException:
        close_channels(list(channels.values()))
        raise
    return [channels[index] for index in sorted(channels)]


def _receive_join(channel: FrameChannel, hello: Hello) -> int:
    header, body = channel.receive(Kind.JOIN)
    if header.epoch:
        raise stream.damaged("JOIN belongs to no epoch")
    return stream.decode_join(body, hello)


def close_channels(channels: list[FrameChannel]) -> None:
    """Close further channels."""
    for channel in channels:
        channel.close()
