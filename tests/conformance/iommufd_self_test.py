"""The mock IOMMU of a kernel's iommufd self-test option, on the hooks of the software iommufd."""
import struct

from vfiodma._core.ioas_context import IommufdDevice
from vfiodma._core.memory import read_memory, write_memory
from vfiodma._core.type1 import IommuGroup
from vfiodma.backends.software.page_requests import Group
from vfiodma.uapi import iommufd as abi

IOMMU_TEST = 0x3BA0
MOCK_DOMAIN, MOCK_DOMAIN_REPLACE, DIRTY, TRIGGER_IOPF = 2, 10, 13, 15
PAGE = 2048
APERTURE = (0x1000000, 0x7FFFFFFF)
HW_INFO_SELFTEST = 0xFEEDBEEF


class SelfTest:
    """IOMMU_TEST commands that tests use: mock devices, dirty bits set by hand, page requests."""

    def __init__(self, kernel):
        self.newest = kernel == "7.2"
        self.iommufds = {}
        self.mocks = {}                 # (context, id of the self-test object) -> its device

    def ioctl(self, iommufd, request, arg):
        """Do a request that concerns mock devices; None if it is another one."""
        context = iommufd.context
        if request == abi.IOMMU_DESTROY:
            return self.destroy(context, arg)
        if request != IOMMU_TEST:
            return None
        size, op, number = struct.unpack("=III", read_memory(arg, 12))
        if op == TRIGGER_IOPF:
            return self.trigger_iopf(iommufd, *struct.unpack("=4IQ", read_memory(arg + 16, 24)))
        self.iommufds[context] = iommufd
        do = {MOCK_DOMAIN: self.mock_domain, MOCK_DOMAIN_REPLACE: self.replace, DIRTY: self.dirty}[op]
        return do(context, number, arg)

    def mock_domain(self, context, ioas, arg):
        number = context.add_object()
        group = IommuGroup(number, APERTURE, (), PAGE, False, True, True, True)
        device = IommufdDevice(context, group, hw_type=HW_INFO_SELFTEST, hw_data=bytes(8), can_track=True,
                               hw_capabilities=9 if self.newest else 1,
                               block=2 * PAGE if self.newest else 0,        # its memory is scattered over CPU pages
                               asks_pages=True)
        try:
            table = device.attach(ioas)
        except OSError:
            device.unbind()
            context.remove_object(number)
            raise
        self.mocks[context, number] = device
        write_memory(arg + 16, struct.pack("=III", number, table, device.id))
        return 0

    def destroy(self, context, arg):
        device = self.mocks.pop((context, int.from_bytes(read_memory(arg + 4, 4), "little")), None)
        if device is None:
            return None
        device.unbind()
        context.remove_object(int.from_bytes(read_memory(arg + 4, 4), "little"))
        return 0

    def replace(self, context, number, arg):
        table = self.mocks[context, number].attach(int.from_bytes(read_memory(arg + 16, 4), "little"))
        self.iommufds[context].drop_requests()
        write_memory(arg + 16, struct.pack("=I", table))
        return 0

    def trigger_iopf(self, iommufd, device, pasid, number, perm, address):
        path = next(path for path in self.mocks.values() if path.id == device)
        queue, serial = path.fault_queue(0)
        iommufd.queues[queue].put(Group(path, pasid, number, [(address, perm)], serial, 0))
        return 0

    def dirty(self, context, table, arg):
        iova, length, page_size, bitmap = struct.unpack("=4Q", read_memory(arg + 24, 32))
        bits = int.from_bytes(read_memory(bitmap, (length // page_size + 7) // 8), "little")
        written = [i for i in range(length // page_size) if bits >> i & 1]
        for i in written:
            context.mark_dirty(table, iova + i * page_size, page_size)
        write_memory(arg + 56, struct.pack("=Q", len(written)))
        return 0
