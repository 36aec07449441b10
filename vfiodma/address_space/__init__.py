"""The I/O address space of devices: allocate, map, translate, access, pin, move."""
from .cost import Cost
from .listeners import Listener
from .opening import open_address_space
from .space import IoAddressSpace

__all__ = ["Cost", "IoAddressSpace", "Listener", "open_address_space"]
