"""Asking a migration that runs in another process: a UNIX socket each, one line of JSON there and back."""
import contextlib
import errno
import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from .._core.errno import error
from ..errors import VfioError, peer_words

_LINE = 1 << 20         # bytes of an answer, at most
_TIMEOUT = 5.0
_PAUSE = 0.1            # seconds after an accept that failed for want of descriptors or memory


def folder() -> Path:
    """Return where the sockets are: the user's own folder, made if it is not there.

    Raises
    ------
    DmaPermissionError
        EPERM: somebody else owns it.
    VfioError
        It can't be made.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(base) / "vfiodma" if base else Path(f"/tmp/vfiodma-{os.getuid()}")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        hint = f"{path} can't be made: set XDG_RUNTIME_DIR to a folder of this user's"
        raise error(exc.errno or errno.EIO, "control", hint=hint) from None
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise error(errno.EPERM, "control", hint=f"{path} is not a folder of this user's alone: set XDG_RUNTIME_DIR")
    return path


class Control:
    """Answers on a socket, in a thread of its own, until the block ends.

    Parameters
    ----------
    answers : mapping of str to callable
        What can be asked, and what returns the answer (a dict for JSON).
    path : Path, optional
        Of the socket; by default named after the process, in ``folder()``.
    """

    def __init__(self, answers: Mapping[str, Callable[[], dict[str, Any]]], path: Path | None = None) -> None:
        self._answers = answers
        self.path = path or folder() / f"{os.getpid()}.sock"
        self._sock = socket.socket(socket.AF_UNIX)
        try:
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(self.path.lstat().st_mode) and not _alive(self.path):
                    self.path.unlink()
            self._sock.bind(str(self.path))
            self.path.chmod(0o600)
            self._sock.listen()
        except OSError as exc:
            self._sock.close()
            raise error(exc.errno or errno.EIO, "control", hint=f"no socket can be made at {self.path}") from None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="vfiodma-control", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                sock, _ = self._sock.accept()
            except OSError:
                self._ended.wait(_PAUSE)        # closed, or no descriptors or memory at the moment
                continue
            with sock, contextlib.suppress(OSError, ValueError):
                sock.settimeout(_TIMEOUT)
                asked = sock.recv(4096).decode().strip()
                try:
                    answer = self._answers[asked]() if asked in self._answers else {
                        "error": f"{asked!r} can't be asked: {', '.join(self._answers)}"}
                except VfioError as exc:
                    answer = {"error": str(exc)}
                sock.sendall(json.dumps({"pid": os.getpid(), **answer}).encode() + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._thread.join()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


def ask(path: Path, what: str) -> dict[str, Any]:
    """Ask a migration.

    Raises
    ------
    VfioError
        ESRCH: nobody is there; ETIMEDOUT, EPROTO: it does not answer, or not in JSON; EREMOTEIO: what it said instead.
    """
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_TIMEOUT)
            sock.connect(str(path))
            sock.sendall(what.encode() + b"\n")
            data = b""
            while not data.endswith(b"\n") and len(data) < _LINE and (part := sock.recv(1 << 16)):
                data += part
        answer = json.loads(data)
        if not isinstance(answer, dict):
            raise ValueError
    except TimeoutError:
        raise VfioError(errno.ETIMEDOUT, operation="control", hint=f"{path} does not answer") from None
    except OSError:
        raise VfioError(errno.ESRCH, operation="control", hint=f"no migration answers at {path}") from None
    except (ValueError, RecursionError):
        raise VfioError(errno.EPROTO, operation="control", hint=f"{path} is no control socket of a migration") from None
    if "error" in answer:
        raise VfioError(errno.EREMOTEIO, operation="control", hint=peer_words(str(answer["error"])))
    return {name: peer_words(value) if isinstance(value, str) else value for name, value in answer.items()}


def running() -> list[Path]:
    """Return the sockets of this user's migrations; those of processes that are gone are removed."""
    found = []
    for path in sorted(folder().glob("*.sock")):
        if _alive(path):
            found.append(path)
        else:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    return found


def _alive(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_TIMEOUT)
        try:
            sock.connect(str(path))
        except TimeoutError:
            return True
        except OSError:
            return False
        return True
