"""Moving the memory of running devices to another process: tracker, ledger, pre-copy rounds, stream, receiver."""
from .device_group import DeviceSinks, DeviceStates
from .events import MigrationResult, Round
from .migration import Migration
from .postcopy_destination import refuse_kernel_devices
from .postcopy_source import Postcopy
from .precopy import PrecopySource
from .receiver import PageReceiver
from .tracker import DirtyTracker
from .transport import SocketTransport

__all__ = ["DeviceSinks", "DeviceStates", "DirtyTracker", "Migration", "MigrationResult", "PageReceiver",
           "Postcopy", "PrecopySource", "Round", "SocketTransport", "refuse_kernel_devices"]
