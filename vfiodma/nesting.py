"""Page tables of a guest, used by its devices: binding, invalidation, faults and page requests.

The names are those that fit both interfaces that Linux has had: NESTING_OP of a VFIO container (the series of virtual
SVA, which was never merged; ``SoftwareVfio("vsva")`` has it) and the nested page tables of iommufd.
"""
import ctypes
import errno
import itertools
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol, Self

from ._core.errno import error
from .errors import fits
from .protocols import VfioSystem
from .uapi import iommu as abi
from .uapi import iommufd, vfio

if TYPE_CHECKING:
    from .backends.iommufd import FaultQueue as IommufdFaultQueue
    from .backends.iommufd import Hwpt, Ioas, IommufdDevice, NestedHwpt

_RECORDS_AT_ONCE = 64
_ECAP_NEST = 26                 # bit of VT-d's extended capabilities
_EVERYTHING = (1 << 64) - 1


@dataclass(frozen=True)
class GuestPageTable:
    """A first-stage table in the guest's memory, in the x86 format of VT-d.

    Parameters
    ----------
    root : int
        Guest-physical address of its highest level.
    address_width : {48, 57}
        Bits of an address that it translates: 4 or 5 levels.
    supervisor : bool
        Requests with privilege are allowed (SRE).
    extended_accessed : bool
        The walk sets the extended accessed flag (EAFE).
    """

    root: int
    address_width: int = 48
    supervisor: bool = False
    extended_accessed: bool = False


@dataclass(frozen=True)
class Invalidation:
    """What to drop of the cached translations of a PASID.

    Parameters
    ----------
    pasid : int or None
        None: the table of requests without a PASID (iommufd only).
    address : int or None
        The first byte; None: every page of the PASID, except global ones (NESTING_OP).
    npages : int
        4 KiB pages.  Hardware drops the power of two of pages around ``address`` that this rounds up to: invalidate()
        splits a range so that it is dropped whole.
    leaf : bool
        Only leaf entries have changed.
    """

    pasid: int | None
    address: int | None = None
    npages: int = 1
    leaf: bool = False


@dataclass(frozen=True)
class NestingInfo:
    """What the hardware can nest: bits of a guest-physical address and of a PASID, and the registers of VT-d."""

    format: int
    features: int
    address_width: int
    pasid_bits: int
    cap_reg: int
    ecap_reg: int


class PageResponse(IntEnum):
    """The answer to a group of page requests."""

    SUCCESS = abi.IOMMU_PAGE_RESP_SUCCESS       #: the pages are there: try again
    INVALID = abi.IOMMU_PAGE_RESP_INVALID       #: there is no such page: don't
    FAILURE = abi.IOMMU_PAGE_RESP_FAILURE       #: ask no more (not in iommufd)


class FaultReason(IntEnum):
    """Why an access failed for good."""

    UNKNOWN = abi.IOMMU_FAULT_REASON_UNKNOWN
    PASID_FETCH = abi.IOMMU_FAULT_REASON_PASID_FETCH            #: there is no PASID table
    BAD_PASID_ENTRY = abi.IOMMU_FAULT_REASON_BAD_PASID_ENTRY    #: the PASID has no page table
    PASID_INVALID = abi.IOMMU_FAULT_REASON_PASID_INVALID        #: out of range
    WALK_EABT = abi.IOMMU_FAULT_REASON_WALK_EABT                #: a table is outside of the second stage
    PTE_FETCH = abi.IOMMU_FAULT_REASON_PTE_FETCH                #: not mapped, or a reserved bit is set
    PERMISSION = abi.IOMMU_FAULT_REASON_PERMISSION
    ACCESS = abi.IOMMU_FAULT_REASON_ACCESS                      #: accessed and dirty flags can't be set
    OOR_ADDRESS = abi.IOMMU_FAULT_REASON_OOR_ADDRESS            #: an address is out of range


@dataclass(frozen=True)
class UnrecoverableFault:
    """An access that failed for good; ``fetch_address`` is the gpa of the table entry that is to blame, or None."""

    reason: FaultReason
    pasid: int
    address: int
    perm: int
    fetch_address: int | None = None


@dataclass(frozen=True)
class PageRequest:
    """A page that a device asks for.

    All requests of a ``group`` are answered together, once the one with ``last`` has come.  ``perm``: 1 read, 2 write,
    4 execute, 8 privileged.  ``device``: its number in the iommufd, where a queue is of several devices.
    """

    group: int
    pasid: int | None
    address: int
    perm: int
    last: bool
    private_data: tuple[int, int] | None = None
    device: int | None = None


class GuestTables(Protocol):
    """What NestedDomain and IommufdNestedDomain have in common: page tables of a guest, by PASID."""

    def info(self) -> NestingInfo | None:
        """Return what can be nested; None: nothing."""

    def bind(self, pasid: int, table: GuestPageTable) -> None:
        """Bind a page table to a PASID; EBUSY if it has one."""

    def unbind(self, pasid: int) -> None:
        """Forget the table of a PASID and what is cached of it; no effect without one."""

    def invalidate(self, entries: Sequence[Invalidation]) -> None:
        """Drop cached translations."""


def _pieces(address: int, npages: int) -> Iterable[tuple[int, int]]:
    """Cut a range into aligned powers of two of pages: (address, pages)."""
    page = address >> 12
    while npages:
        n = min(page & -page or 1 << 52, 1 << npages.bit_length() - 1)
        yield page << 12, n
        page, npages = page + n, npages - n


class NestedDomain:
    """A container that nests: the guest's page tables are bound to PASIDs and translate before its mappings do.

    Parameters
    ----------
    system : VfioSystem
        Whose calls to use.
    container_fd : int
        A container of type VFIO_TYPE1_NESTING_IOMMU with its group; it stays the caller's.

    Notes
    -----
    Thread-safe.  Failures are VfioError with the kernel's errno; UnsupportedError: ENOTTY (no kernel that was released
    has the operation) or EOPNOTSUPP (the container does not nest).  Source: VFIO_IOMMU_NESTING_OP.
    """

    def __init__(self, system: VfioSystem, container_fd: int) -> None:
        self._system = system
        self._fd = container_fd

    def info(self) -> NestingInfo | None:
        """Return what can be nested; None if the container can't.  Source: VFIO_IOMMU_TYPE1_INFO_CAP_NESTING."""
        buffer = ctypes.create_string_buffer(1 << 16)
        struct.pack_into("=I", buffer, 0, len(buffer))
        self._system.ioctl(self._fd, vfio.VFIO_IOMMU_GET_INFO, ctypes.addressof(buffer))
        raw = buffer.raw
        head = vfio.vfio_iommu_type1_info.unpack(raw[:vfio.vfio_iommu_type1_info.size])
        at = head["cap_offset"] if head["flags"] & vfio.VFIO_IOMMU_INFO_CAPS else 0
        while at:
            number, _, following = struct.unpack_from("=HHI", raw, at)
            if number == vfio.VFIO_IOMMU_TYPE1_INFO_CAP_NESTING:
                start = at + 8
                info = abi.iommu_nesting_info.unpack(raw[start:start + 64])
                vtd = abi.iommu_nesting_info_vtd.unpack(raw[start + 32:start + 64])
                return NestingInfo(info["format"], info["features"], info["addr_width"], info["pasid_bits"],
                                   vtd["cap_reg"], vtd["ecap_reg"])
            at = following
        return None

    def _operate(self, operation: int, data: bytes) -> None:
        buffer = ctypes.create_string_buffer(struct.pack("=II", 8 + len(data), operation) + data)
        self._system.ioctl(self._fd, vfio.VFIO_IOMMU_NESTING_OP, ctypes.addressof(buffer))

    def _bind_data(self, pasid: int, table: GuestPageTable, guest_pasid: int | None) -> bytes:
        flags = ((abi.IOMMU_SVA_VTD_GPASID_SRE if table.supervisor else 0)
                 | (abi.IOMMU_SVA_VTD_GPASID_EAFE if table.extended_accessed else 0))
        with fits("bind"):
            data = abi.iommu_gpasid_bind_data.pack(
                argsz=abi.iommu_gpasid_bind_data.size, version=abi.IOMMU_GPASID_BIND_VERSION_1,
                format=abi.IOMMU_PASID_FORMAT_INTEL_VTD, addr_width=table.address_width,
                flags=0 if guest_pasid is None else abi.IOMMU_SVA_GPASID_VAL, gpgd=table.root, hpasid=pasid,
                gpasid=guest_pasid or 0)
        return data[:56] + abi.iommu_gpasid_bind_data_vtd.pack(flags=flags)

    def bind(self, pasid: int, table: GuestPageTable, guest_pasid: int | None = None) -> None:
        """Bind a page table to an allocated PASID, for every device of the group.

        Parameters
        ----------
        pasid : int
        table : GuestPageTable
        guest_pasid : int, optional
            The guest's own number for it, which the kernel notes.

        Raises
        ------
        BusyError
            EBUSY: it has one.  That table is unbound: the kernel undoes what it finds.
        NotMappedError
            ENOENT: the PASID is not allocated.
        InvalidArgumentError
            EINVAL: a PASID of 0 or above 2**20 - 1, another width, a root outside of the second stage.
        """
        self._operate(vfio.VFIO_IOMMU_NESTING_OP_BIND_PGTBL, self._bind_data(pasid, table, guest_pasid))

    def unbind(self, pasid: int) -> None:
        """Forget the table of a PASID and what is cached of it; no effect without one.  The PASID stays allocated."""
        self._operate(vfio.VFIO_IOMMU_NESTING_OP_UNBIND_PGTBL, self._bind_data(pasid, GuestPageTable(0), None))

    def invalidate(self, entries: Sequence[Invalidation]) -> None:
        """Drop cached translations; EINVAL, and nothing is dropped, where a number does not fit.

        The kernel reports no other mistake.
        """
        with fits("invalidate"):
            operations = [data for entry in entries for data in self._invalidations(entry)]
        for data in operations:
            self._operate(vfio.VFIO_IOMMU_NESTING_OP_CACHE_INVLD, data)

    @staticmethod
    def _invalidations(entry: Invalidation) -> Iterator[bytes]:
        def data(granularity: int, body: bytes) -> bytes:
            head = abi.iommu_cache_invalidate_info.pack(
                argsz=abi.iommu_cache_invalidate_info.size, version=abi.IOMMU_CACHE_INVALIDATE_INFO_VERSION_1,
                cache=abi.IOMMU_CACHE_INV_TYPE_IOTLB, granularity=granularity)
            return head[:16] + body.ljust(40, b"\0")

        if entry.address is None:
            yield data(abi.IOMMU_INV_GRANU_PASID,
                       abi.iommu_inv_pasid_info.pack(flags=abi.IOMMU_INV_PASID_FLAGS_PASID, pasid=entry.pasid or 0))
            return
        flags = abi.IOMMU_INV_ADDR_FLAGS_PASID | (abi.IOMMU_INV_ADDR_FLAGS_LEAF if entry.leaf else 0)
        if entry.npages < 0:
            raise struct.error
        for address, npages in _pieces(entry.address, entry.npages):
            yield data(abi.IOMMU_INV_GRANU_ADDR, abi.iommu_inv_addr_info.pack(
                flags=flags, pasid=entry.pasid or 0, addr=address, granule_size=4096, nb_granules=npages))


class FaultQueue:
    """Faults and page requests of one device.

    Parameters
    ----------
    system : object
        With ``read``, ``write`` and ``close`` of descriptors, as SoftwareVfio.
    fd : int
        From ``SoftwareVfio.open_fault_queue``; belongs to this object from now on.

    Notes
    -----
    ``fileno()`` can be given to select, poll and asyncio: it is readable while something waits.  Thread-safe.
    """

    def __init__(self, system: Any, fd: int) -> None:
        self._system = system
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor; -1 when closed."""
        return self._fd

    def read(self) -> list[UnrecoverableFault | PageRequest]:
        """Take what waits, oldest first, up to 64 records; an empty list when nothing does."""
        raw = self._system.read(self._fd, _RECORDS_AT_ONCE * abi.iommu_fault.size)
        return [_parse(raw[at:at + abi.iommu_fault.size]) for at in range(0, len(raw), abi.iommu_fault.size)]

    def respond(self, request: PageRequest, code: PageResponse = PageResponse.SUCCESS) -> None:
        """Answer the whole group of a request.

        Raises
        ------
        InvalidArgumentError
            EINVAL: the group does not wait: it was answered, its time is over, or its last request has not come.
        """
        with fits("respond"):
            data = abi.iommu_page_response.pack(
                argsz=abi.iommu_page_response.size, version=abi.IOMMU_PAGE_RESP_VERSION_1,
                flags=0 if request.pasid is None else abi.IOMMU_PAGE_RESP_PASID_VALID, pasid=request.pasid or 0,
                grpid=request.group, code=int(code))
        self._system.write(self._fd, data)

    def close(self) -> None:
        """Close the queue; groups that wait are answered INVALID.  Idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._system.close(fd)

    def __enter__(self) -> "FaultQueue":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parse(raw: bytes) -> UnrecoverableFault | PageRequest:
    kind, = struct.unpack_from("=I", raw)
    if kind == abi.IOMMU_FAULT_PAGE_REQ:
        found = abi.iommu_fault_page_request.unpack(raw[8:8 + abi.iommu_fault_page_request.size])
        flags = found["flags"]
        return PageRequest(found["grpid"], found["pasid"] if flags & abi.IOMMU_FAULT_PAGE_REQUEST_PASID_VALID else None,
                           found["addr"], found["perm"], bool(flags & abi.IOMMU_FAULT_PAGE_REQUEST_LAST_PAGE),
                           found["private_data"] if flags & abi.IOMMU_FAULT_PAGE_REQUEST_PRIV_DATA else None)
    event = abi.iommu_fault_unrecoverable.unpack(raw[8:8 + abi.iommu_fault_unrecoverable.size])
    fetched = event["flags"] & abi.IOMMU_FAULT_UNRECOV_FETCH_ADDR_VALID
    return UnrecoverableFault(FaultReason(event["reason"]), event["pasid"], event["addr"], event["perm"],
                              event["fetch_addr"] if fetched else None)


# ---- the form of iommufd

class IommufdNestedDomain:
    """Devices of an iommufd with page tables of a guest: the methods of NestedDomain, over nested page tables.

    The devices are attached to a table of the address space first, with which requests go that have no PASID.

    Parameters
    ----------
    devices : sequence of IommufdDevice
        At least one; all behind one IOMMU.  They stay the caller's.
    ioas : Ioas
        What the guest's physical addresses map to.
    fault_queue : iommufd.FaultQueue, optional
        Where the devices ask for missing pages.  It must be closed after the domain.
    dirty_tracking : bool
        ``parent`` notes what is written, also through the guest's tables.
    pasids : bool
        Tables can be bound to PASIDs (Linux 6.15).  False: only to requests without a PASID.

    Attributes
    ----------
    parent : Hwpt
        The second stage.

    Raises
    ------
    UnsupportedError
        EOPNOTSUPP: the IOMMU can't nest, or the kernel has no PASIDs for user space.

    Notes
    -----
    Source: IOMMU_HWPT_ALLOC with IOMMU_HWPT_ALLOC_NEST_PARENT and IOMMU_HWPT_DATA_VTD_S1;
    VFIO_DEVICE_ATTACH_IOMMUFD_PT.
    """

    def __init__(self, devices: "Sequence[IommufdDevice]", ioas: "Ioas", *, fault_queue: "PageFaults | None" = None,
                 dirty_tracking: bool = False, pasids: bool = True) -> None:
        self._devices = tuple(devices)
        if not self._devices:
            raise error(errno.EINVAL, "nested_domain", hint="name at least one device")
        self._pasids = pasids
        self._queue = fault_queue
        self._tables: dict[int | None, NestedHwpt] = {}
        self._lock = threading.Lock()
        self.parent = ioas.iommufd.alloc_hwpt(ioas, self._devices[0].id, nest_parent=True, pasids=pasids,
                                              dirty_tracking=dirty_tracking)
        try:
            self._attach(self.parent, None)
        except BaseException:
            self.parent.destroy()
            raise

    def info(self) -> NestingInfo | None:
        """Return what can be nested; None: nothing, or not in VT-d's format.  Source: IOMMU_GET_HW_INFO."""
        found = self._devices[0].hw_info()
        if found.type != iommufd.IOMMU_HW_INFO_TYPE_INTEL_VTD:
            return None
        registers = iommufd.iommu_hw_info_vtd.unpack(found.data[:iommufd.iommu_hw_info_vtd.size])
        cap, ecap = registers["cap_reg"], registers["ecap_reg"]
        if not ecap >> _ECAP_NEST & 1:
            return None
        return NestingInfo(abi.IOMMU_PASID_FORMAT_INTEL_VTD,
                           abi.IOMMU_NESTING_FEAT_BIND_PGTBL | abi.IOMMU_NESTING_FEAT_CACHE_INVLD,
                           (cap >> 16 & 63) + 1, found.max_pasid_log2, cap, ecap)

    def _attach(self, table: "Hwpt | NestedHwpt", pasid: int | None) -> None:
        """Attach all devices, or leave them as they were."""
        done = []
        try:
            for device in self._devices:
                device.attach(table, pasid)
                done.append(device)
        except BaseException:
            for device in done:
                if table is self.parent:
                    device.detach()
                else:
                    self._leave(device, pasid)
            raise

    def _leave(self, device: "IommufdDevice", pasid: int | None) -> None:
        if pasid is None:
            device.attach(self.parent)
        else:
            device.detach(pasid)

    def bind(self, pasid: int | None, table: GuestPageTable) -> None:
        """Bind a page table to a PASID, or (None) to requests without one, of every device.

        Parameters
        ----------
        pasid : int or None
            Any number that the devices have: nobody allocates it.
        table : GuestPageTable

        Raises
        ------
        BusyError
            EBUSY: it has one, which stays.
        InvalidArgumentError
            EINVAL: a PASID or a width that the IOMMU does not have.  A wrong root shows as faults.
        VfioError
            ENODEV: there is a fault queue, and a device can't ask for pages.
        """
        with self._lock:
            if pasid in self._tables:
                raise error(errno.EBUSY, "bind", hint=f"PASID {pasid} has a page table: unbind it first")
            made = self.parent.nested(self._devices[0].id, table.root, address_width=table.address_width,
                                      supervisor=table.supervisor, extended_accessed=table.extended_accessed,
                                      pasids=self._pasids, fault_queue=self._queue.queue if self._queue else None)
            try:
                self._attach(made, pasid)
            except BaseException:
                made.destroy()
                raise
            self._tables[pasid] = made

    def unbind(self, pasid: int | None) -> None:
        """Forget the table of a PASID and what is cached of it; no effect without one.  Its requests are invalid."""
        with self._lock:
            table = self._tables.get(pasid)
            if table is None:
                return
            for device in self._devices:
                if device.fd >= 0:
                    self._leave(device, pasid)
            table.destroy()
            del self._tables[pasid]

    def invalidate(self, entries: Sequence[Invalidation]) -> None:
        """Drop cached translations: neighbours of one PASID with one ioctl, in order.  No effect without a table.

        Raises
        ------
        InvalidArgumentError
            EINVAL: an address is no multiple of 4096; the entries before it are done.
        """
        for pasid, group in itertools.groupby(entries, lambda entry: entry.pasid):
            table = self._tables.get(pasid)
            if table is not None:
                table.invalidate([(0, _EVERYTHING, entry.leaf) if entry.address is None
                                  else (entry.address, entry.npages, entry.leaf) for entry in group])

    def close(self) -> None:
        """Unbind every table, detach the devices and destroy the second stage.  Idempotent."""
        if self.parent.ioas.iommufd.fd < 0:             # it took everything along
            self._tables.clear()
            self.parent.forget_id()
        for pasid in tuple(self._tables):
            self.unbind(pasid)
        if self.parent.id:
            for device in self._devices:
                if device.fd >= 0:
                    device.detach()
            self.parent.destroy()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PageFaults:
    """The page requests of iommufd's devices: the methods of FaultQueue, over a fault queue of iommufd.

    Faults that nobody can repair are not told: the kernel only prints them.

    Parameters
    ----------
    queue : iommufd.FaultQueue
        It belongs to this object from now on.
    """

    def __init__(self, queue: "IommufdFaultQueue") -> None:
        self.queue = queue

    def fileno(self) -> int:
        """Return the descriptor; -1 when closed."""
        return self.queue.fileno()

    def read(self) -> list[PageRequest]:
        """Take what waits, oldest first; an empty list when nothing does.  ``group`` is the kernel's cookie."""
        return [PageRequest(fault.cookie, fault.pasid, fault.address, fault.perm, fault.last, device=fault.dev_id)
                for fault in self.queue.read()]

    def respond(self, request: PageRequest, code: PageResponse = PageResponse.SUCCESS) -> None:
        """Answer the whole group of a request.

        Raises
        ------
        InvalidArgumentError
            EINVAL: the group does not wait, or the code is FAILURE, which iommufd does not have.
        """
        if code == PageResponse.FAILURE:
            raise error(errno.EINVAL, "respond", hint="iommufd knows SUCCESS and INVALID; detach the device to stop it")
        self.queue.respond([(request.group, code == PageResponse.SUCCESS)])

    def close(self) -> None:
        """Close the queue, after the domain that uses it.  Idempotent."""
        self.queue.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
