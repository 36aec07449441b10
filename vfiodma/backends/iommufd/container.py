"""An address space of an iommufd with its devices: the backend of an IoAddressSpace."""
import contextlib
import errno
import mmap
from collections.abc import Mapping, Sequence
from typing import Any, Self

from ..._core.errno import error
from ...errors import NotMappedError, VfioError
from ...protocols import DirtySource, VfioSystem
from ...types import Capabilities
from .context import Iommufd
from .device import IommufdDevice
from .hwpt import Hwpt, HwptSource
from .ioas import Ioas

# iommufd does not tell which large pages its tables have.  These are those of most IOMMUs; only placement follows them.
_LARGE_PAGES = 1 << 21 | 1 << 30


def _tracks_writes(device: IommufdDevice) -> bool:
    try:
        return device.hw_info().dirty_tracking
    except NotMappedError:          # an emulated device: no IOMMU stands before it
        return False


class IommufdContainer(Ioas):
    """An address space of an iommufd with devices attached: the backend of an IoAddressSpace.

    Satisfies Backend, SupportsMapMany, HasDirtySources and OpensDevices, and SupportsDirtyTracking where every device's
    IOMMU tracks writes ("dirty" in ``capabilities().features``): the bits are then exact, unlike those of Type1.

    Parameters
    ----------
    devices : sequence of str
        PCI addresses or device nodes ("/dev/vfio/devices/vfio0"), at least one.
    system : VfioSystem, optional
        Whose iommufd; by default the running kernel's.
    huge_pages : bool
        Let the IOMMU use large pages.  Off: dirty bits are exact to the page, and more table memory is used.
    rlimit_mode : {None, "user", "process"}
        See Iommufd.
    by_file : bool, optional
        Offer the feature "map_file": address spaces then map memfd and hugetlb regions by their file, without which
        the mappings can't go to another process.  By default where the kernel has it (Linux 6.14).
    loses_last_page : bool, optional
        Add the page after each run of dirty ones, inside the mapping, as some kernels leave it out.  By default where
        the kernel may (``Iommufd.may_lose_last_page``).

    Attributes
    ----------
    iommufd : Iommufd
    system : VfioSystem
    devices : dict of str to IommufdDevice
    hwpts : tuple of Hwpt
        Page tables with dirty tracking, one an IOMMU; empty where it is not tracked.

    Raises
    ------
    VfioError
        With what to do: ENOENT (no /dev/iommu), ENODEV (no such device, wrong driver), EOPNOTSUPP (no device nodes),
        EACCES, EBUSY, EINVAL, EPERM.  Nothing stays open.

    Notes
    -----
    Thread-safe.  Source: Documentation/userspace-api/iommufd.rst; VFIO_DEVICE_ATTACH_IOMMUFD_PT.
    """

    def __init__(self, devices: Sequence[str], *, system: VfioSystem | None = None, huge_pages: bool = True,
                 rlimit_mode: str | None = None, by_file: bool | None = None,
                 loses_last_page: bool | None = None) -> None:
        if isinstance(devices, str):
            raise TypeError("devices is a sequence of PCI addresses, not one string")
        if not devices:
            raise error(errno.EINVAL, "open_container", hint="name at least one device")
        iommufd = Iommufd(system, rlimit_mode=rlimit_mode)
        self.system: VfioSystem = iommufd.system
        self.devices: dict[str, IommufdDevice] = {}
        self.hwpts: tuple[Hwpt, ...] = ()
        try:
            for address in dict.fromkeys(devices):
                self.devices[address] = iommufd.bind(address)
            super().__init__(iommufd, iommufd.alloc_ioas().id)
            if not huge_pages:
                self.huge_pages = False
            if all(map(_tracks_writes, self.devices.values())):
                for device in self.devices.values():
                    self._attach_tracked(device)
            else:
                for device in self.devices.values():
                    device.attach(self)
            if loses_last_page is not None:
                self._set_loses_last_page(loses_last_page)
            self._by_file = self.iommufd.has_map_file(self) if by_file is None else bool(by_file)
            # Smaller pages than the CPU's are hidden, as Type1 hides them; emulated devices would take single bytes.
            self._pgsizes = max(self.iova_alignment(), mmap.PAGESIZE) | _LARGE_PAGES
        except BaseException:
            iommufd.close()
            raise

    @classmethod
    def adopt(cls, state: Mapping[str, Any], fds: Sequence[int]) -> Self:
        """Take over a container of the running kernel that another process opened, with its devices and mappings.

        Parameters
        ----------
        state, fds
            What :meth:`hand_over` returned there.  The descriptors belong to this object, and are closed on failure.

        Notes
        -----
        Nothing is attached or mapped again.  ``change_process()`` then moves the charge for locked memory here.
        """
        container = cls.__new__(cls)
        iommufd = Iommufd.adopt(fds[0] if fds else -1)
        try:
            devices = state["devices"]
            if len(fds) != 1 + len(devices):
                raise ValueError
            for fd, (address, number) in zip(fds[1:], devices.items(), strict=True):
                IommufdDevice.adopt(iommufd, address, fd, int(number))
            Ioas.__init__(container, iommufd, int(state["ioas"]))
            container.system = iommufd.system
            container.devices = dict(zip(devices, iommufd.devices, strict=True))
            container.hwpts = tuple(Hwpt(container, int(number)) for number, _, _ in state["hwpts"])
            for hwpt, (_, loses, tracking) in zip(container.hwpts, state["hwpts"], strict=True):
                hwpt.loses_last_page = bool(loses)
                hwpt.tracking = bool(tracking)
            container._pgsizes, container._by_file = int(state["pgsizes"]), True
            container.iova_ranges()                 # it is one, and has this address space
        except (KeyError, TypeError, ValueError, AttributeError):
            iommufd.let_go(fds)
            raise error(errno.EPROTO, "adopt", hint="the description of the container does not fit its "
                        f"{len(fds)} descriptors") from None
        except BaseException:
            iommufd.let_go(fds)
            raise
        return container

    def hand_over(self) -> tuple[dict[str, Any], list[int]]:
        """Return what :meth:`adopt` in another process needs; the descriptors stay this container's.

        Raises
        ------
        UnsupportedError
            EOPNOTSUPP: a software iommufd lives in this process.
        """
        if not self.iommufd.real:
            raise error(errno.EOPNOTSUPP, "hand_over", hint="a software IOMMU lives in its process: only a container "
                        "of the running kernel can be handed over")
        state = {"ioas": self.id, "devices": {address: device.id for address, device in self.devices.items()},
                 "hwpts": [[hwpt.id, hwpt.loses_last_page, hwpt.tracking] for hwpt in self.hwpts],
                 "pgsizes": self._pgsizes}
        return state, [self.iommufd.fd, *(device.fd for device in self.devices.values())]

    def let_go(self) -> None:
        """Close every descriptor, detach and unmap nothing: the process that adopted it has it all.  Idempotent."""
        self.iommufd.let_go()
        self.devices.clear()
        self.hwpts = ()

    def _attach_tracked(self, device: IommufdDevice) -> None:
        """Attach to a page table with dirty tracking: one that is there, or a new one for another IOMMU."""
        for hwpt in self.hwpts:
            try:
                device.attach(hwpt)
                return
            except VfioError as exc:
                if exc.errno != errno.EINVAL:
                    raise
        hwpt = self.iommufd.alloc_hwpt(self, device.id, dirty_tracking=True)
        device.attach(hwpt)
        self.hwpts += hwpt,

    def _set_loses_last_page(self, value: bool) -> None:
        for hwpt in self.hwpts:
            hwpt.loses_last_page = value

    def capabilities(self) -> Capabilities:
        """Return what the container can do; see Capabilities.  iommufd has no limit of mappings."""
        features = {"map_many", "unmap_all"} | ({"dirty"} if self.hwpts else set())
        features |= {"map_file"} if self._by_file else set()
        return Capabilities("iommufd", self._pgsizes, frozenset(features))

    # ---- dirty tracking

    def _require_tracking(self, operation: str) -> None:
        if not self.hwpts:
            raise error(errno.EOPNOTSUPP, operation, hint="the IOMMU of a device notes no writes: use the devices' own "
                        "logs, or a Type1 container, which calls everything dirty")

    def start_dirty(self) -> None:
        """Start tracking, with nothing dirty; no effect when it is on.

        Raises
        ------
        UnsupportedError
            EOPNOTSUPP: an IOMMU does not track writes.
        """
        self._require_tracking("start_dirty")
        started: list[Hwpt] = []
        try:
            for hwpt in self.hwpts:
                if not hwpt.tracking:
                    hwpt.set_dirty_tracking(True)
                    started.append(hwpt)
        except VfioError:
            for hwpt in started:
                hwpt.set_dirty_tracking(False)
            raise

    def stop_dirty(self) -> None:
        """Stop tracking; no effect when it is off."""
        for hwpt in self.hwpts:
            hwpt.set_dirty_tracking(False)

    def read_dirty(self, iova: int, size: int, bitmap: Any) -> None:
        """OR the dirty bits of a range into a bitmap and clear them.

        Parameters
        ----------
        iova, size : int
            Bytes; the range must not split a mapping.  Read before unmapping: the bits go with the mapping.
        bitmap : writable buffer
            u64 words, bit 0 = the page of ``capabilities().min_pgsize`` bytes at ``iova``.

        Raises
        ------
        VfioError
            EINVAL: as above, or tracking is off; EOPNOTSUPP.
        """
        self._require_tracking("read_dirty")
        for hwpt in self.hwpts:
            hwpt.harvest(iova, size, bitmap, pgsize=self._pgsizes & -self._pgsizes)

    def dirty_sources(self) -> Sequence[DirtySource]:
        """Return one source a page table.

        Raises
        ------
        UnsupportedError
            EOPNOTSUPP: an IOMMU does not track writes.
        """
        self._require_tracking("dirty_sources")
        return [HwptSource(hwpt) for hwpt in self.hwpts]

    # ---- devices

    def open_device_fd(self, address: str) -> int:
        """Return a descriptor of a device of the container; the caller closes it with ``system.close``.

        It is a duplicate: a device node can be open only once.  Closing the container detaches the device, so that a
        duplicate left open reaches no memory.

        Raises
        ------
        NoDeviceError
            ENODEV: the device is not one of this container.
        """
        device = self.devices.get(address)
        if device is None:
            raise error(errno.ENODEV, "open_device_fd", hint=f"{address} is not a device of this container; it has: "
                        + (", ".join(self.devices) or "none, it is closed"))
        return device.dup()

    def close(self) -> None:
        """Detach the devices, remove every mapping and close all.  Idempotent."""
        for device in reversed(self.devices.values()):
            with contextlib.suppress(VfioError):        # a duplicate that is still open would keep it attached
                device.detach()
        for destroy in (*(hwpt.destroy for hwpt in self.hwpts), self.destroy):
            with contextlib.suppress(VfioError):
                destroy()
        self.devices.clear()
        self.hwpts = ()
        self.iommufd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
