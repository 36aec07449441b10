"""What carries a migration's stream, by URL: unix:/path, tcp://host:port, tls://host:port, fd:N, fd:IN,OUT."""
from .pipes import PipeTransport
from .sockets import ByteTransport, SocketTransport, Transport
from .tls import TlsFiles, TlsTransport
from .urls import Listener, connect, listen

__all__ = ["ByteTransport", "Listener", "PipeTransport", "SocketTransport", "TlsFiles", "TlsTransport", "Transport",
           "connect", "listen"]
