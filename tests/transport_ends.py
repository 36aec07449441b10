"""Ends of connections of every kind, the certificates that TLS needs, and a wire that is cut after some bytes."""
import contextlib
import errno
import os
import select
import shutil
import socket
import struct
import subprocess
import threading

from vfiodma.errors import MigrationError
from vfiodma.migration import SocketTransport
from vfiodma.migration.transport import PipeTransport, TlsFiles, TlsTransport

KINDS = "unix", "tcp", "tls", "pipe", "fd"


def have_openssl():
    return shutil.which("openssl") is not None


def make_certificates(place):
    """Return TlsFiles: of a destination on localhost, a source, the same expired, and of who is not to be trusted."""
    def openssl(*args, text=""):
        subprocess.run(["openssl", *args], cwd=place, check=True, capture_output=True, input=text, text=True)

    def authority(name):
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj",
                f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem")

    def files(name, ca, hosts, days=2):
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
                "-keyout", f"{name}.key", "-out", f"{name}.csr")
        (place / f"{name}.ext").write_text(f"subjectAltName={hosts}\n")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial",
                "-days", str(days), "-extfile", f"{name}.ext", "-out", f"{name}.pem")
        return TlsFiles(place / "ours.pem", place / f"{name}.pem", place / f"{name}.key")

    authority("ours")
    authority("theirs")
    return {"destination": files("destination", "ours", "DNS:localhost,IP:127.0.0.1"),
            "source": files("source", "ours", "DNS:source"),
            "stranger": files("stranger", "theirs", "DNS:localhost,IP:127.0.0.1"),
            "expired": files("expired", "ours", "DNS:localhost,IP:127.0.0.1", days=-1),
            "elsewhere": files("elsewhere", "ours", "DNS:elsewhere")}


def pass_ends(sock, fds):
    """Send descriptors to the other side, which gets what they are ends of; both go."""
    with sock:
        socket.send_fds(sock, [b"e"], fds)
    for fd in fds:
        os.close(fd)


def take_ends(sock, count, timeout):
    """Receive what ``pass_ends`` sent; MigrationError where it did not."""
    with sock:
        sock.settimeout(timeout)
        try:
            fds = socket.recv_fds(sock, 1, count)[1]
        except OSError as exc:
            raise MigrationError(errno.ECONNRESET, operation="accept") from exc
    if len(fds) != count:
        raise MigrationError(errno.ECONNRESET, operation="accept", hint="the other side is gone")
    return fds


def accepted_end(kind, sock, files=None, timeout=10.0):
    """Return the destination's transport over a connection; pipes and sockets by descriptor come over it first."""
    if kind == "tls":
        return TlsTransport(sock, files["destination"], None, timeout)
    if kind == "pipe":
        return PipeTransport(*take_ends(sock, 2, timeout), timeout)
    if kind == "fd":
        return SocketTransport(socket.socket(fileno=take_ends(sock, 1, timeout)[0]), timeout)
    return SocketTransport(sock, timeout)


def connected_end(kind, sock, files=None, timeout=10.0):
    """Return the source's transport over a connection."""
    if kind == "tls":
        return TlsTransport(sock, files["source"], "localhost", timeout)
    if kind == "pipe":
        (there, here_out), (here_in, there_out) = os.pipe(), os.pipe()
        pass_ends(sock, [there, there_out])
        return PipeTransport(here_in, here_out, timeout)
    if kind == "fd":
        here, there = socket.socketpair()
        pass_ends(sock, [there.detach()])
        return SocketTransport(here, timeout)
    return SocketTransport(sock, timeout)


def bound_socket(kind):
    """Return a socket that listens where only tests of this machine look."""
    sock = socket.socket(socket.AF_INET if kind in ("tcp", "tls") else socket.AF_UNIX)
    sock.bind(("127.0.0.1", 0) if sock.family == socket.AF_INET else b"")      # the kernel makes up the rest
    sock.listen(16)
    return sock


class Wire(threading.Thread):
    """Stands between connections over loopback and carries their bytes, up to where each is cut.

    ``cuts`` has, for each connection in turn, None or (direction, bytes, reset): direction 0 is from the source; after
    so many bytes nothing more goes either way, and both sides see the end of the stream, or a reset.  ``lines`` has the
    bytes that went each way, for each connection.
    """

    def __init__(self, target, cuts=()):
        super().__init__()
        self._cuts, self._target = iter(cuts), target
        self._sock = bound_socket("tcp")
        self.address = self._sock.getsockname()
        self._ended, self._end = socket.socketpair()
        self.lines = []
        self.start()

    def run(self):
        pairs = {}          # socket -> (the other, line, direction)
        with self._sock, self._ended:
            while True:
                ready = select.select([self._sock, self._ended, *pairs], [], [])[0]
                if self._ended in ready:
                    break
                if self._sock in ready:
                    here, there = self._sock.accept()[0], socket.create_connection(self._target)
                    for sock in (here, there):
                        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    line = [bytearray(), bytearray()], next(self._cuts, None)
                    self.lines.append(line[0])
                    pairs[here], pairs[there] = (there, line, 0), (here, line, 1)
                for sock in ready:
                    if sock in pairs:
                        self._carry(pairs, sock)
            for sock in pairs:
                sock.close()

    def _carry(self, pairs, sock):
        other, (line, cut), direction = pairs[sock]
        moved, cut_here = line[direction], cut is not None and cut[0] == direction
        left = cut[1] - len(moved) if cut_here else 1 << 16
        try:
            data = sock.recv(min(left, 1 << 16)) if left else b""
            moved += data
            other.sendall(data)
        except OSError:
            data = b""
        if not data or cut_here and len(moved) == cut[1]:
            for end in (sock, other):
                if cut_here and cut[2]:
                    with contextlib.suppress(OSError):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                pairs.pop(end)
                end.close()

    def close(self):
        self._end.close()
        self.join(10)
        assert not self.is_alive()


def record_ends(data):
    """Return after how many bytes each record of TLS ends."""
    ends, at = [], 0
    while at + 5 <= len(data):
        at += 5 + int.from_bytes(data[at + 3:at + 5], "big")
        ends.append(at)
    return ends
