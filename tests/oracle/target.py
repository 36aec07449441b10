"""The oracle as a target of the conformance runner: real memory and descriptor numbers, but no device moves bytes."""
import os

from .container import Group, Machine
from .memory import ProcessMemory, ThisProcess


class OracleTarget:
    def __init__(self, kernel):
        groups = [Group(0, ["0000:00:10.0"], coherent=False), Group(1, ["0000:00:11.0"], coherent=False),
                  Group(2, ["0000:01:01.0", "0000:01:02.0"], coherent=False),
                  Group(9, ["83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"], emulated=True)]
        self.machine = Machine(kernel, groups, ProcessMemory(), ThisProcess(),
                               new_fd=lambda: os.open("/dev/null", os.O_RDWR), close_fd=os.close,
                               foreign_open=self.is_open)

    @staticmethod
    def is_open(fd):
        try:
            os.fstat(fd)
        except OSError:
            return False
        return True

    def open(self, step):
        if step["kind"] == "container":
            return self.machine.open("/dev/vfio/vfio")
        if step["kind"] == "mdev":
            return self.machine.open("/dev/vfio/9")
        if step["kind"] == "group":
            return self.machine.open(f"/dev/vfio/{min(step['index'], 2)}")
        return os.open(step["path"], os.O_RDWR)

    def ioctl(self, handle, request, arg):
        return self.machine.ioctl(handle, request, arg)

    def close(self, handle):
        if handle in self.machine.files:
            self.machine.close(handle)
        else:
            os.close(handle)

    def number(self, handle):
        return handle

    def locked_pages(self):
        return self.machine.process.locked()

    def entry_limit(self, value):
        before, self.machine.dma_entry_limit = self.machine.dma_entry_limit, value
        return before


def make_target(kernel, set_name):
    return OracleTarget(kernel)
