"""Moving the memory of running devices to another process: tracker, ledger, pre-copy rounds, stream, receiver."""
from .device_group import DeviceSinks, DeviceStates
from .events import MigrationResult, Round
from .migration import Migration
from .precopy import PrecopySource
from .receiver import PageReceiver
from .tracker import DirtyTracker
from .transport import SocketTransport

__all__ = ["DeviceSinks", "DeviceStates", "DirtyTracker", "Migration", "MigrationResult", "PageReceiver",
           "PrecopySource", "Round", "SocketTransport"]
