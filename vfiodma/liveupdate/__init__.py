"""Live update: memory moves to another address, or everything to another process, while devices go on."""
from .execing import exec_into, take_from_exec
from .handoff import HandoffTimes, VaddrHandoff
from .memory_fds import receive_memory, send_memory
from .offer import UpdateOffer, UpdateTimes
from .preflight import Finding, Preflight, preflight
from .taker import Taken, UpdateTaker

__all__ = ["Finding", "HandoffTimes", "Preflight", "Taken", "UpdateOffer", "UpdateTaker", "UpdateTimes",
           "VaddrHandoff", "exec_into", "preflight", "receive_memory", "send_memory", "take_from_exec"]
