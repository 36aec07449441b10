"""What carries a migration's stream, by URL: unix:/path, tcp://host:port, tls://host:port, fd:N."""
from .sockets import SocketTransport, Transport
from .tls import TlsFiles, TlsTransport
from .urls import Listener, connect, listen

__all__ = ["Listener", "SocketTransport", "TlsFiles", "TlsTransport", "Transport", "connect", "listen"]
