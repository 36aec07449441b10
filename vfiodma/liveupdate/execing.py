"""Live update in place: the process replaces its own image, and the new one takes everything over.

What there is stands in a sealed memfd whose number an environment variable tells; it and all descriptors stay open.
"""
import contextlib
import errno
import fcntl
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

from .._core.errno import error
from ..address_space import IoAddressSpace
from ..backends import adopt_backend
from ..memory import GuestMemory
from .handoff import VaddrHandoff
from .offer import describe
from .packets import MAX_BODY, MAX_FDS, Fds
from .preflight import preflight
from .table import MAX_STATE, read_sealed, sealed_memfd
from .taker import Adopt, Prepared, Taken

VARIABLE = "VFIODMA_UPDATE"             #: its value: the number of the descriptor
_HEAD = struct.Struct("<8sIIII")        # magic, version, bytes of JSON, bytes of the last state, crc32 of both
_MAGIC = b"vfioLuEx"
_VERSION = 1


def exec_into(argv: Sequence[str], ioas: IoAddressSpace, memory: GuestMemory, *, fds: Mapping[str, int] | None = None,
              freeze: Callable[[], bytes] | None = None, env: Mapping[str, str] | None = None) -> NoReturn:
    """Replace this process's program; the new one calls :func:`take_from_exec`, while devices go on.

    Parameters
    ----------
    argv : sequence of str
        Program and arguments, looked up in PATH.
    ioas, memory, fds
        As for :class:`UpdateOffer`.
    freeze : callable, optional
        Called before the vaddrs become invalid; returns the last state as bytes, of at most 1 GiB.
    env : mapping of str to str, optional
        The new program's environment; by default this one's.

    Raises
    ------
    UnsupportedError, BusyError
        See :func:`preflight`; nothing has changed.
    VfioError
        With the errno of execve(2): the old addresses are restored, and this program goes on.

    Notes
    -----
    There is no way back once the new program runs: should it fail, all descriptors close with it and the kernel ends
    all mappings.  Threads end, and nothing is cleaned up: flush files before.  Source: execve(2).
    """
    offered: list[int] = []
    with ioas.unchanged("live_update", unpinned=True), contextlib.ExitStack() as undo:
        report = preflight(ioas, memory)
        report.check()
        handoff = VaddrHandoff(ioas, memory) if report.way == "vaddr" else None
        described, table = describe(ioas, memory, report.way, dict(fds or {}))
        undo.callback(os.close, table)
        offered += described.fds
        last = b"" if freeze is None else freeze()
        state = _write_state({"body": described.body, "fds": offered}, last)
        undo.callback(os.close, state)
        undo.enter_context(_inherited([state, *offered]))
        if handoff is not None:
            handoff.invalidate()
            undo.callback(handoff.restore, memory)
        try:
            os.execvpe(argv[0], list(argv), {**(os.environ if env is None else env), VARIABLE: str(state)})
        except (OSError, ValueError, IndexError) as exc:
            raise error(getattr(exc, "errno", None) or errno.EINVAL, "exec", hint=f"{list(argv)[:1]}: {exc}") from None


@contextlib.contextmanager
def _inherited(fds: Sequence[int]) -> Iterator[None]:
    """Keep descriptors open over execve(2), unless it fails."""
    before = {fd: os.get_inheritable(fd) for fd in fds}
    try:
        for fd in before:
            os.set_inheritable(fd, True)
        yield
    finally:
        for fd, was in before.items():
            os.set_inheritable(fd, was)


def _write_state(values: Mapping[str, object], last: bytes) -> int:
    text = json.dumps(values).encode()
    if len(text) > MAX_BODY or len(last) > MAX_STATE:
        raise error(errno.EMSGSIZE, "exec", hint=f"names may have {MAX_BODY} bytes, the last state {MAX_STATE}")
    body = text + last
    return sealed_memfd(_HEAD.pack(_MAGIC, _VERSION, len(text), len(last), zlib.crc32(body)) + body, "vfiodma-update")


def _read_state(fd: int) -> tuple[bytes, list[int], bytes]:
    """Return the offer's body, the descriptors and the last state."""
    with read_sealed(fd, _HEAD.size + MAX_BODY + MAX_STATE) as file:
        data = bytes(file)
    try:
        magic, version, size, rest, crc = _HEAD.unpack_from(data)
        body = data[_HEAD.size:]
        if magic != _MAGIC or len(body) != size + rest or zlib.crc32(body) != crc:
            raise ValueError("it is damaged, or none")
        if version != _VERSION:
            raise ValueError(f"it has version {version}, this program reads {_VERSION}")
        values = json.loads(body[:size])
        numbers = values["fds"]
        if not 0 < len(numbers) <= MAX_FDS or not all(type(n) is int and 0 <= n < 1 << 31 for n in numbers):
            raise ValueError("its descriptors are none")
        return json.dumps(values["body"]).encode(), numbers, body[size:]
    except (ValueError, TypeError, KeyError, struct.error, RecursionError) as exc:
        raise error(errno.EPROTO, "live_update", hint=f"the state of the old program can't be read: {exc}") from None


def take_from_exec(*, adopt: Adopt = adopt_backend) -> Taken | None:
    """Take over what the program before this one left with :func:`exec_into`; None where there was none.

    Raises
    ------
    VfioError
        It can't be taken: the guest is lost, its devices end with this process.

    Notes
    -----
    Call it first: vaddrs are invalid until it returns.  The variable is removed from the environment.
    """
    number = os.environ.pop(VARIABLE, None)
    if number is None:
        return None
    if not number.isascii() or not number.isdigit() or len(number) > 9:
        raise error(errno.EPROTO, "live_update", hint=f"{VARIABLE} is {number!r}, not a descriptor")
    with Fds([int(number)]) as state:
        body, numbers, last = _read_state(state[0])
    with _owned(numbers) as fds:
        prepared = Prepared(body, fds, adopt)
    try:
        prepared.take()
    except BaseException:
        prepared.drop()
        raise
    return prepared.taken(last)


def _owned(numbers: Sequence[int]) -> Fds:
    """Take descriptors that were inherited; each number may have been given more than once."""
    fds = Fds()
    try:
        for number in numbers:
            fds.add([fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)])
    except OSError as exc:
        fds.close()
        raise error(exc.errno or errno.EBADF, "live_update",
                    hint=f"descriptor {number} of the old program is not open") from None
    finally:
        for number in set(numbers):
            with contextlib.suppress(OSError):
                os.close(number)
    return fds
