"""Two QEMUs (TCG) and a migration between them, on memory that the harness filled: both RAMs are files of ours.

The guest is paused and has no operating system: what moves is memory and little else.  Needs ``qemu-system-x86_64`` and
the package ``qemu.qmp`` (extra "bench").
"""
import contextlib
import shutil
import tempfile
import time
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

QEMU = "qemu-system-x86_64"
_TIMEOUT = 60.0


def missing() -> str:
    """Return why there is no QEMU to compare with; empty where there is."""
    try:
        import qemu.qmp.legacy  # noqa: F401
    except ImportError:
        return 'the package qemu.qmp is missing: pip install "vfiodma[bench]"'
    return "" if shutil.which(QEMU) else f"{QEMU} is not installed"


class Machine:
    """A paused QEMU whose RAM is the file behind a descriptor."""

    def __init__(self, fd: int, size: int, folder: str, name: str, *, incoming: bool) -> None:
        from qemu.qmp.legacy import QEMUMonitorProtocol

        self._parts = contextlib.ExitStack()
        address = f"{folder}/{name}.qmp"
        self._qmp: Any = QEMUMonitorProtocol(address, server=True)
        self._process = self._parts.enter_context(Popen(
            [QEMU, "-accel", "tcg", "-machine", "pc,memory-backend=ram", "-m", f"{size >> 20}M", "-nodefaults",
             "-display", "none", "-vga", "none", "-net", "none", "-S", "-object",
             f"memory-backend-file,id=ram,size={size},mem-path=/proc/self/fd/{fd},share=on,prealloc=on",
             "-qmp", f"unix:{address}", *(["-incoming", "defer"] if incoming else [])],
            pass_fds=[fd], stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, text=True))
        self._parts.callback(self._process.kill)
        self._qmp.settimeout(_TIMEOUT)
        self._qmp.accept()
        self._parts.callback(self._qmp.close)

    def ask(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command; return its answer."""
        return self._qmp.cmd(command, **arguments)

    def close(self) -> None:
        """End it."""
        self._parts.close()


def migrate(source_fd: int, target_fd: int, size: int, *, channels: int = 0) -> dict[str, Any]:
    """Move RAM from one file to another; return what QEMU tells about it (``query-migrate``).

    Parameters
    ----------
    source_fd, target_fd : int
        Files of ``size`` bytes, all of them present.
    channels : int
        Of multifd; 0 = a plain migration.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qemu-pair-"))
        target = stack.enter_context(contextlib.closing(Machine(target_fd, size, folder, "target", incoming=True)))
        source = stack.enter_context(contextlib.closing(Machine(source_fd, size, folder, "source", incoming=False)))
        for machine in (target, source):
            parameters = {"max-bandwidth": 0}
            if channels:
                machine.ask("migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": True}])
                parameters["multifd-channels"] = channels
            machine.ask("migrate-set-parameters", **parameters)
        uri = f"unix:{Path(folder) / 'stream'}"
        target.ask("migrate-incoming", uri=uri)
        source.ask("migrate", uri=uri)
        until = time.monotonic() + _TIMEOUT
        while (info := source.ask("query-migrate")).get("status") not in ("completed", "failed", "cancelled"):
            if time.monotonic() > until:
                raise TimeoutError(f"QEMU is still {info.get('status')}")
            time.sleep(0.01)
        if info["status"] != "completed":
            raise RuntimeError(f"QEMU: {info}")
        # It says "completed" a moment before its times are there.
        while not info.get("total-time"):
            time.sleep(0.01)
            info = source.ask("query-migrate")
        return info
