"""The typed door: a container with everything set up, the backend of an IoAddressSpace."""
import errno

from ..._core.errno import error
from ..._core.type1 import VERSIONS
from ...errors import ForkedError
from ...protocols import DirtySource
from ...sources import ContainerSource
from ...types import Capabilities
from .sources import PortSource

_MAX_DIRTY_BITMAP = 268435456


class SoftwareContainer:
    """A container of the software VFIO with everything set up: the backend of an IoAddressSpace.

    Satisfies Backend, SupportsMapMany, SupportsVaddrUpdate, SupportsDirtyTracking, SupportsDma and HasDirtySources; its
    methods are those of the Type1 instance itself.
    """

    def __init__(self, vfio, iommu_type, groups):
        self.system = vfio
        self._fds = []
        self._container = None
        try:
            container_fd = self._open("/dev/vfio/vfio")
            self._container = vfio._files[container_fd]
            self._group_fds = tuple(self._open(f"/dev/vfio/{number}") for number in groups)
            self._groups = [vfio._files[fd] for fd in self._group_fds]
            for group in self._groups:
                group.set_container(container_fd)
            self._container.set_iommu(iommu_type)
            for group in self._groups:
                for device in group.config.devices:
                    self._fds.append(group.get_device_fd(device.address))
        except BaseException:
            self.close()
            raise
        type1 = self.type1 = self._container.type1
        for name in ("map_dma", "map_many", "unmap_dma", "unmap_all", "invalidate_vaddr", "update_vaddr",
                     "update_vaddr_many", "start_dirty", "read_dirty", "stop_dirty", "dma_read", "dma_write",
                     "iova_ranges"):
            setattr(self, name, getattr(type1, name))

    def _open(self, path):
        self._fds.append(self.system.open(path))
        return self._fds[-1]

    def capabilities(self):
        """Return what the container can do now; see Capabilities."""
        type1 = self.type1
        features = {"map_many", "dma"}
        if VERSIONS[type1.kernel] >= VERSIONS["5.12"]:
            features.add("unmap_all")
            if type1.v2:
                features.add("dirty")
            if not type1.has_emulated:
                features.add("vaddr")
        return Capabilities("software", type1.pgsizes, frozenset(features), type1.dma_avail, type1.entry_limit,
                            _MAX_DIRTY_BITMAP)

    def group_fds(self):
        """Return the descriptors of the groups, for a hot reset; they stay the container's."""
        return self._group_fds

    def open_device_fd(self, address):
        """Open a device of the container once more; the caller closes the descriptor with ``system.close``."""
        if not self._fds:
            raise error(errno.EBADF, "group_get_device_fd", hint="the container is closed")
        with self.system._lock:
            for group in self._groups:
                if any(device.address == address for device in group.config.devices):
                    return group.get_device_fd(address)
        raise error(errno.ENODEV, "group_get_device_fd", hint=f"{address} is not in a group of this container")

    @property
    def fd(self):
        """The container's descriptor, for calls of ``system``; it stays the container's."""
        return self._fds[0]

    @property
    def paths(self):
        """The devices' ways through the IOMMU, by address."""
        return {address: path for group in self._groups for address, path in group.paths.items()}

    @property
    def ports(self):
        """The DMA ports of the devices, by address."""
        return {address: port for group in self._groups for address, port in group.ports.items()}

    def dirty_sources(self):
        """Return the most exact source of each device: its own DMA log, or the container's bitmap for emulated ones."""
        ordinary = [group for group in self._groups if not group.iommu.emulated]
        sources: list[DirtySource] = [PortSource(port) for group in ordinary for port in group.ports.values()]
        if self.type1.has_emulated:
            sources.append(ContainerSource(self.type1, self.type1.pgsizes & -self.type1.pgsizes))
        return sources

    @property
    def faults(self):
        """The recorded DMA faults of all devices, as DmaFault."""
        return [fault for port in self.ports.values() for fault in port.faults]

    def close(self):
        """Close devices, groups and the container; every mapping goes.  Idempotent."""
        while self._fds:
            fd = self._fds.pop()
            try:
                self.system.close(fd)
            except ForkedError:
                pass                # the child of a fork has nothing to close: the parent does

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
