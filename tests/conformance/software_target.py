"""SoftwareVfio as a target of the conformance runner, with the groups of the recorded machine."""
import os

from vfiodma import SoftwareGroup, SoftwareVfio
from vfiodma.backends.software.iommufd import IommufdFile
from vfiodma.devices.edu import EduDevice

from .iommufd_self_test import SelfTest

MDEV = 9


class SoftwareTarget:
    """The methods of ``runner.Kernel`` on SoftwareVfio."""

    def __init__(self, kernel):
        self.vfio = SoftwareVfio(kernel=kernel, groups=[
            SoftwareGroup(0, [EduDevice("0000:00:10.0")], dirty_tracking=False, coherent=False),
            SoftwareGroup(1, [EduDevice("0000:00:11.0")], dirty_tracking=False, coherent=False),
            SoftwareGroup(2, ["0000:01:01.0", "0000:01:02.0"], dirty_tracking=False, coherent=False),
            SoftwareGroup(MDEV, ["83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"], emulated=True),
        ])
        self.self_test = SelfTest(kernel)
        self.others = set()                 # descriptors of files that are not VFIO's

    def open(self, step):
        if step["kind"] == "container":
            return self.vfio.open("/dev/vfio/vfio")
        if step["kind"] == "group":
            return self.vfio.open(f"/dev/vfio/{min(step['index'], 2)}")
        if step["kind"] == "mdev":
            return self.vfio.open(f"/dev/vfio/{MDEV}")
        if step["kind"] == "iommu":
            return self.vfio.open("/dev/iommu")
        if step["kind"] == "cdev":
            return self.vfio.open(f"/dev/vfio/devices/vfio{step['index']}")
        fd = os.open(step["path"], os.O_RDWR)
        self.others.add(fd)
        return fd

    def ioctl(self, handle, request, arg):
        file = self.vfio._files.get(handle)
        if isinstance(file, IommufdFile):
            answer = self.self_test.ioctl(file, request, arg)
            if answer is not None:
                return answer
        return self.vfio.ioctl(handle, request, arg)

    def close(self, handle):
        if handle in self.others:
            self.others.remove(handle)
            os.close(handle)
        else:
            self.vfio.close(handle)

    def number(self, handle):
        return handle

    def pread(self, handle, length, offset):
        return self.vfio.pread(handle, length, offset)

    def pwrite(self, handle, data, offset):
        return self.vfio.pwrite(handle, data, offset)

    def locked_pages(self):
        return self.vfio.locked_pages()

    def entry_limit(self, value):
        before, self.vfio.dma_entry_limit = self.vfio.dma_entry_limit, value
        return before


def make_target(kernel, set_name):
    """Return the implementation under test; one target serves all sets."""
    return SoftwareTarget(kernel)
