"""The files: /dev/vfio/vfio, /dev/vfio/N and devices, and their ioctls.

Source: type1.md 2; devices.md 1.
"""
import errno
import itertools
import struct

from .attach import attach, detach
from .kernel import KERNELS
from .memory import PAGE, Process
from .type1 import Type1, fail

BASE = 0x3b00
GET_API_VERSION, CHECK_EXTENSION, SET_IOMMU, GET_STATUS, SET_CONTAINER, UNSET_CONTAINER, GET_DEVICE_FD = range(100, 107)
GET_INFO, MAP_DMA, UNMAP_DMA, DIRTY_PAGES = 112, 113, 114, 117
TYPE1, TYPE1V2, DMA_CC, NESTING, UNMAP_ALL, UPDATE_VADDR = 1, 3, 4, 6, 9, 10


class Group:
    """What is behind /dev/vfio/``number``."""

    def __init__(self, number, devices, aperture=(0, (1 << 39) - 1), reserved=((0xfee00000, 0xfeefffff),),
                 pgsizes=0x40201000, emulated=False, coherent=True, msi_isolated=True, nestable=False):
        self.number, self.devices = number, list(devices)
        self.aperture, self.reserved, self.pgsizes = tuple(aperture), [tuple(r) for r in reserved], pgsizes
        self.emulated, self.coherent, self.msi_isolated, self.nestable = emulated, coherent, msi_isolated, nestable
        self.container = None
        self.open = False                               # a descriptor of the group is open
        self.devices_open = 0

    @property
    def held(self):
        return self.open or self.devices_open > 0


class Container:
    def __init__(self):
        self.groups = []                                # newest first
        self.type1 = None


class Device:
    def __init__(self, group, name):
        self.group, self.name = group, name


class Machine:
    """A host with these groups.  ``foreign_open(fd)`` tells if a descriptor that is not ours is open."""

    def __init__(self, kernel="7.2", groups=(), memory=None, process=None, dma_entry_limit=65535,
                 new_fd=None, close_fd=None, foreign_open=None):
        self.kernel = KERNELS[kernel]
        self.groups = {str(group.number): group for group in groups}
        self.memory, self.process = memory, process or Process()
        self.dma_entry_limit = dma_entry_limit
        self.new_fd = new_fd or itertools.count(1000).__next__
        self.close_fd = close_fd or (lambda fd: None)
        self.foreign_open = foreign_open or (lambda fd: False)
        self.files = {}

    def open(self, path):
        folder, _, name = path.rpartition("/")
        if folder != "/dev/vfio" or name not in ("vfio", *self.groups):
            fail(errno.ENOENT)
        if name == "vfio":
            return self.add(Container())
        group = self.groups[name]
        if group.held:
            fail(errno.EBUSY)
        group.open = True
        return self.add(group)

    def add(self, thing):
        fd = self.new_fd()
        self.files[fd] = thing
        return fd

    def close(self, fd):
        if fd not in self.files:
            fail(errno.EBADF)
        thing = self.files.pop(fd)
        self.close_fd(fd)
        group = None
        if isinstance(thing, Group):
            group = thing
            group.open = False
        elif isinstance(thing, Device):
            group = thing.group
            group.devices_open -= 1
        if group and not group.held and group.container:
            self.leave(group)

    def ioctl(self, fd, request, arg):
        if fd not in self.files:
            fail(errno.EBADF)
        thing, arg = self.files[fd], arg & (1 << 64) - 1
        if isinstance(thing, Container):
            return self.container_ioctl(thing, request - BASE, arg)
        if isinstance(thing, Group):
            return self.group_ioctl(thing, request - BASE, arg)
        raise NotImplementedError("device descriptors have no ioctls here")

    # -- container

    def container_ioctl(self, container, command, arg):
        type1 = container.type1
        if command == GET_API_VERSION:
            return 0
        if command == CHECK_EXTENSION:
            return self.check_extension(type1, arg)
        if command == SET_IOMMU:
            return self.set_iommu(container, arg)
        if type1 is None:
            fail(errno.EINVAL)
        calls = {GET_INFO: type1.get_info, MAP_DMA: type1.map_dma, UNMAP_DMA: type1.unmap_dma,
                 DIRTY_PAGES: type1.dirty_pages}
        if command not in calls:
            fail(errno.ENOTTY)
        return calls[command](arg)

    def check_extension(self, type1, arg):
        if arg in (TYPE1, TYPE1V2):
            return 1
        if arg == DMA_CC:
            return int(type1 is not None and all(domain.coherent for domain in type1.domains))
        if arg == NESTING:
            return int(self.kernel.nesting)
        if arg == UNMAP_ALL:
            return int(bool(self.kernel.unmap_flags & 2))
        if arg == UPDATE_VADDR:
            if self.kernel.update_vaddr == "instance":
                return int(type1 is not None and not type1.emulated)
            return int(self.kernel.update_vaddr == "always")
        return 0

    def set_iommu(self, container, arg):
        if not container.groups or container.type1:
            fail(errno.EINVAL)
        if self.check_extension(None, arg) <= 0:
            fail(errno.ENODEV)
        if arg not in (TYPE1, TYPE1V2, NESTING):
            fail(errno.EINVAL)
        type1 = Type1(self, v2=arg != TYPE1, nesting=arg == NESTING)
        for group in container.groups:
            attach(type1, group)
        container.type1 = type1
        return 0

    # -- group

    def group_ioctl(self, group, command, arg):
        if command == GET_STATUS:
            argsz, _ = struct.unpack("II", self.memory.read(arg, 8))
            if argsz < 8:
                fail(errno.EINVAL)
            self.memory.write(arg, struct.pack("II", argsz, 3 if group.container else 1))
            return 0
        if command == SET_CONTAINER:
            return self.set_container(group, arg)
        if command == UNSET_CONTAINER:
            if group.container is None:
                fail(errno.EINVAL)
            if group.devices_open:
                fail(errno.EBUSY)
            self.leave(group)
            return 0
        if command == GET_DEVICE_FD:
            return self.get_device_fd(group, arg)
        fail(errno.ENOTTY)

    def set_container(self, group, arg):
        fd, = struct.unpack("i", self.memory.read(arg, 4))
        container = self.files.get(fd)
        if container is None and not self.foreign_open(fd):
            fail(errno.EBADF)
        if group.container:
            fail(errno.EINVAL)
        if not isinstance(container, Container):
            fail(self.kernel.foreign_fd)
        if container.type1:
            self.join(container.type1, group)
        container.groups.insert(0, group)
        group.container = container
        return 0

    def leave(self, group):
        container, group.container = group.container, None
        container.groups.remove(group)
        if container.type1:
            self.part(container.type1, group)
            if not container.groups:
                container.type1 = None

    def join(self, type1, group):
        attach(type1, group)

    def part(self, type1, group):
        detach(type1, group)

    def get_device_fd(self, group, arg):
        name = b""
        while len(name) <= PAGE and not name.endswith(b"\0"):
            name += self.memory.read(arg + len(name), 1)
        if len(name) > PAGE:
            fail(errno.EINVAL)
        name = name[:-1].decode("latin-1")
        if name not in group.devices:
            fail(errno.ENODEV)
        if group.container is None or group.container.type1 is None:
            fail(errno.EINVAL)
        group.devices_open += 1
        return self.add(Device(group, name))
