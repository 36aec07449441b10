"""The destination process of ``vfiodma demo``: receives the memory, then lets its own devices go on in it.

Started by the source: ``python -m vfiodma.cli.demo_destination FD SIZE``; FD is a connected UNIX socket.  At the end it
prints one JSON object.  A failure is a message on standard error and status 1.
"""
import contextlib
import errno
import json
import os
import socket
import sys
from typing import Any

from ..errors import MigrationError, VfioError
from ..migration import PageReceiver, SocketTransport
from ..migration.stream import Phase
from .demo_source import TIMEOUT
from .destination import Destination


def main(fd: int, size: int) -> dict[str, Any]:
    """Receive over a socket, and run on when the source says so."""
    with contextlib.ExitStack() as stack:
        transport = SocketTransport(socket.socket(fileno=fd), TIMEOUT)
        stack.callback(transport.close)
        here = Destination(size)
        stack.callback(here.close)
        receiver = PageReceiver(transport, here.make_memory, fresh=True, on_state=here.take_state,
                                on_prepare=here.prepare, on_switch=here.get_ready)
        stack.enter_context(receiver)
        receiver.receive()
        if receiver.settle() is not Phase.OWNER:
            raise MigrationError(errno.ECANCELED, operation="run", hint="the source keeps the guest")
        return {"pid": os.getpid(), "sha256": receiver.digest.hex(), **here.run_on(receiver)}


if __name__ == "__main__":
    try:
        print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))), flush=True)
    except VfioError as exc:
        print(f"vfiodma demo, destination: {exc}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
