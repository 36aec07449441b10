"""A plain-Python oracle of the Linux VFIO container and Type1 driver, written from the specification alone.

Sorted lists, sets and loops: made to be read beside the specification, not to be fast.

    kernel.py     what differs from kernel to kernel
    memory.py     user memory: this process's, or a made-up one; the process that is charged
    dirty.py      the dirty words of one mapping
    ranges.py     apertures, reserved regions, valid ranges
    type1.py      one Type1 instance: its mappings and ioctls
    attach.py     groups that join and leave an instance
    container.py  files: containers, groups, devices; the door
    spapr.py      the driver of POWER instead of Type1, and EEH
    target.py     the oracle as a target of tests/conformance
"""
from .container import Group, Machine
from .kernel import KERNELS, Kernel
from .memory import FakeMemory, Process, ProcessMemory

__all__ = ["KERNELS", "FakeMemory", "Group", "Kernel", "Machine", "Process", "ProcessMemory"]
