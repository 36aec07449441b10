"""What the layers expect of one another.  Structural types: nothing needs to inherit from them."""
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from .types import Capabilities, DeviceLocation, IovaRange


@runtime_checkable
class Backend(Protocol):
    """An IOMMU context that maps process memory for devices.

    Methods raise VfioError and leave the state as it was.  Sizes and addresses are bytes.
    """

    def capabilities(self) -> Capabilities:
        """Return what this context can do at this moment."""

    def iova_ranges(self) -> Sequence[IovaRange]:
        """Return the usable ranges, ascending; empty = no restriction is reported."""

    def map_dma(self, iova: int, vaddr: int, size: int, prot: int) -> None:
        """Map ``[vaddr, vaddr + size)`` at ``iova``; the memory is pinned as the backend does it."""

    def unmap_dma(self, iova: int, size: int) -> int:
        """Remove the mappings inside the range; return the bytes removed (0 = there was none)."""

    def unmap_all(self) -> int:
        """Remove every mapping; return the bytes removed."""

    def close(self) -> None:
        """Release the context; idempotent."""


class SupportsMapMany(Protocol):
    """Feature "map_many"."""

    def map_many(self, entries: Any) -> None:
        """Map an (n, 4) uint64 array of (iova, vaddr, size, prot), all or none, with one release of the GIL."""


class SupportsVaddrUpdate(Protocol):
    """Feature "vaddr": mappings survive a change of the process's addresses."""

    def invalidate_vaddr(self, iova: int = 0, size: int | None = None) -> int:
        """Declare the vaddrs of a range (None = of everything) invalid; DMA goes on.  Return the bytes."""

    def update_vaddr(self, iova: int, vaddr: int, size: int) -> None:
        """Give the invalid mapping exactly at ``iova`` its new address."""

    def update_vaddr_many(self, entries: Any) -> None:
        """The same for an (n, 3) uint64 array of (iova, vaddr, size)."""


class SupportsHandOver(Protocol):
    """A container of the running kernel, which another process can take over with all of its mappings.

    Its module has ``adopt(state, fds)``, the other half.  Optional: ``change_process()`` (mappings made by file, which
    have no vaddr: move the charge to this process), ``note_areas(entries)`` (be told of the mappings adopted).
    """

    def hand_over(self) -> tuple[dict[str, Any], list[int]]:
        """Return what adopt() in the other process needs: a description for JSON, and descriptors, which stay here."""

    def let_go(self) -> None:
        """Close the descriptors and nothing else: mappings, devices and interrupts live on in the other process."""


class SupportsMapFile(Protocol):
    """Feature "map_file": shared memory is mapped by its file, and outlives the process's own mapping of it."""

    def map_file(self, fd: int, start: int, size: int, prot: int = 3, iova: int | None = None) -> int:
        """Map ``[start, start + size)`` of a memfd at ``iova``; return the iova."""


class SupportsDirtyTracking(Protocol):
    """Feature "dirty": the container's own bitmap (VFIO_IOMMU_DIRTY_PAGES)."""

    def start_dirty(self) -> None:
        """Start tracking; no effect when it is on."""

    def read_dirty(self, iova: int, size: int, bitmap: Any) -> None:
        """Store the dirty bits of the range into a buffer of u64 words (bit 0 = page at iova), and clear them."""

    def stop_dirty(self) -> None:
        """Stop tracking; no effect when it is off."""


class SupportsDma(Protocol):
    """Feature "dma": the container moves bytes as an emulated device would."""

    def dma_read(self, iova: int, size: int) -> bytes:
        """Read as a device reads."""

    def dma_write(self, iova: int, data: Any) -> None:
        """Write as a device writes."""


@runtime_checkable
class VfioSystem(Protocol):
    """The system calls that VFIO needs: the running kernel's, or those of a software VFIO in this process.

    Descriptors are numbers; failures are VfioError with the kernel's errno.
    """

    def open(self, path: str) -> int:
        """Open /dev/vfio/vfio, /dev/vfio/<group>, /dev/iommu or /dev/vfio/devices/<name>."""

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """Do ioctl(2); ``arg`` is a value, or an address in this process."""

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Read a device's registers."""

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        """Write a device's registers; return the bytes written."""

    def read(self, fd: int, size: int) -> bytes:
        """Read what has no positions: migration data, page faults."""

    def write(self, fd: int, data: Any) -> int:
        """Write what has no positions; return the bytes taken."""

    def mmap(self, fd: int, size: int, offset: int, prot: int = 3) -> Any:
        """Map a device's registers; return a buffer of ``size`` bytes (Prot bits: readable, writable)."""

    def dup(self, fd: int) -> int:
        """Return a further descriptor of the same open file, as dup(2) with close-on-exec."""

    def close(self, fd: int) -> None:
        """Close a descriptor."""

    def find_device(self, address: str) -> DeviceLocation:
        """Find the group, driver and nodes of a PCI device; ENODEV where there is none."""


class OpensDevices(Protocol):
    """A container that hands out the devices of its groups."""

    system: VfioSystem

    def open_device_fd(self, address: str) -> int:
        """Open a device of the container; the caller closes the descriptor with ``system.close``."""


@runtime_checkable
class DirtySource(Protocol):
    """Something that knows which pages were written by DMA: a device's own log, or a container's bitmap.

    Optional: ``pgsize`` (bytes a bit stands for, when it is not the caller's choice), ``extend(iova, size)`` (log a
    further range, losing nothing), ``survives_unmap`` (False: bits of a mapping go with it; by default they stay).
    """

    name: str

    def start(self, ranges: Sequence[tuple[int, int]], pgsize: int) -> None:
        """Start to log the (iova, size) ranges."""

    def harvest(self, iova: int, size: int, into: Any) -> int:
        """OR the bits of the range into ``into`` (u64 words, bit 0 = page at iova), clear them, return their number."""

    def stop(self) -> None:
        """Stop logging and forget."""


class HasDirtySources(Protocol):
    """A backend that can name the most exact source of dirtiness of each of its devices."""

    def dirty_sources(self) -> Sequence[DirtySource]:
        """Return one source a device, or one for all that share one."""


@runtime_checkable
class DmaPort(Protocol):
    """A software device's way to memory: through its IOMMU, with faults recorded and writes logged.

    Faults (nothing mapped, no permission, memory gone) never crash: the access moves nothing past the fault, is
    recorded, and the call raises VfioError with EFAULT.
    """

    def read(self, iova: int, size: int) -> bytes:
        """Read ``size`` bytes."""

    def write(self, iova: int, data: Any) -> None:
        """Write bytes-like ``data``."""

    def write_many(self, iovas: Any, data: Any) -> int:
        """Write row i of the 2-d byte array ``data`` to ``iovas[i]``; GIL released once.  Return rows that faulted."""


@runtime_checkable
class IrqSink(Protocol):
    """The way of a software device's interrupts to its user.  Any thread may call it, holding any lock of its own."""

    def enabled(self, index: int) -> int:
        """Return how many vectors of an index are enabled (0 INTx, 1 MSI, 2 MSI-X, 3 ERR, 4 REQ)."""

    def trigger(self, index: int, vector: int = 0) -> None:
        """Raise an interrupt; a vector that is not enabled is dropped.  INTx is a level, raised until ``lower``."""

    def lower(self) -> None:
        """Take INTx back."""


@runtime_checkable
class MigratableDevice(Protocol):
    """A software device's part in its migration: its attribute ``migration``.

    VFIO keeps the state machine and the descriptors; a method that raises VfioError gives its errno to the user.
    Optional: ``reinit()`` (asked in PRE_COPY: return True once when ``initial`` has to be read again), ``max_load``
    (bytes of a state at most, more is ENOMEM; 64 MiB by default).
    """

    flags: int                          #: VFIO_MIGRATION_*: STOP_COPY, with P2P and PRE_COPY as they are supported

    def arc(self, current: int, following: int) -> None:
        """Go from one state to the next (VFIO_DEVICE_STATE_*), from ERROR to RUNNING after a reset.

        When it raises, the device stays in ``current``.
        """

    def initial(self) -> bytes:
        """Return what PRE_COPY begins with."""

    def dirty_bytes(self) -> int:
        """Return how many bytes ``dirty`` would give now."""

    def dirty(self) -> bytes:
        """Return what has changed since it was last returned, b"" for nothing."""

    def final(self) -> bytes:
        """Return what STOP_COPY ends with; after PRE_COPY only what that did not give."""

    def size(self) -> int:
        """Return about how many bytes STOP_COPY gives."""

    def load(self, data: bytes) -> None:
        """Take over all that was written; EINVAL: it is not complete yet.  Any other error leads to the state ERROR."""


@runtime_checkable
class SoftwareDevice(Protocol):
    """A device of the software backend.  Regions are numbered as for vfio-pci (0-5 BARs, 6 ROM, 7 config space).

    Optional attributes, by what they are for:

    * interrupts: ``set_irq_sink(sink)``, called with an IrqSink when the device is opened, with None when it is closed;
    * regions: ``region_flags(index)`` (VFIO_REGION_INFO_FLAG_*; read and write by default), ``region_count`` (more
      than 9 with regions of its own), ``region_caps(index)`` (capabilities as (id, version, bytes after the header)),
      ``region_mmap(index, offset, size)`` (the memory of a region with the flag MMAP, a writable buffer),
      ``msix_table`` (BAR, offset, size);
    * information: ``info_caps`` (as ``region_caps``); a ``bus`` that is not PCI (a VFIO_DEVICE_FLAGS bit) with
      ``region_count`` and ``irq_indexes``: regions have no fixed numbers, each index one interrupt, and there are no
      ioctls but those of information, interrupts and reset;
    * resets: ``can_reset`` (True by default), ``reset_scope`` (devices of equal scope take part in one hot reset);
    * features: ``migration`` (a MigratableDevice, or None), ``dma_logging`` (whether its DMA port's log is offered),
      ``vf_token`` (16 bytes, written by its user);
    * a display: ``plane_access`` (VFIO_GFX_PLANE_TYPE bits), ``query_plane(kind, access)`` (fields, or None),
      ``plane_dmabuf(id)`` (a descriptor, or None);
    * an emulated device: ``dma_unmap(iova, size)``, called when mappings go.

    A configuration space of 64 bytes or more is taken as one: opening the device enables memory access (bit 1 of the
    command register) and disables bus mastering, BARs answer while the former is on, a reset keeps the header.
    """

    address: str                        #: what GROUP_GET_DEVICE_FD is asked for, e.g. "0000:00:10.0"

    def connect(self, port: DmaPort) -> None:
        """The first descriptor of the device was opened: ``port`` is its way to memory until disconnect()."""

    def disconnect(self) -> None:
        """The last descriptor is gone; no DMA may follow."""

    def region_size(self, index: int) -> int:
        """Bytes of a region, 0 when it is not implemented."""

    def region_read(self, index: int, offset: int, size: int) -> bytes:
        """Read registers."""

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Write registers."""

    def irq_count(self, index: int) -> int:
        """Interrupts of an index (0 INTx, 1 MSI, 2 MSI-X, 3 ERR, 4 REQ)."""

    def reset(self) -> None:
        """Bring the device back to its power-on state."""
