"""An open /dev/iommu: the objects of one user."""
import ctypes
import errno
import os
import resource
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from ..._core.errno import error
from ..._core.kernel import Descriptor
from ...errors import VfioError, fits
from ...kernel import KernelVfio, refuse_unbound
from ...protocols import VfioSystem
from ...uapi import iommufd as abi
from ...uapi.layout import Layout
from .device import IommufdDevice
from .hwpt import Hwpt
from .ioas import Ioas
from .page_faults import FaultQueue

NODE = "/dev/iommu"


class HwInfo(NamedTuple):
    """What GET_HW_INFO tells of the IOMMU in front of a device."""

    type: int               #: IOMMU_HW_INFO_TYPE_*: the layout of ``data``
    data: bytes             #: the vendor's structure
    capabilities: int       #: IOMMU_HW_CAP_*
    max_pasid_log2: int

    @property
    def dirty_tracking(self) -> bool:
        """Whether page tables can be allocated that note what devices write."""
        return bool(self.capabilities & abi.IOMMU_HW_CAP_DIRTY_TRACKING)


class Iommufd(Descriptor):
    """An iommufd: address spaces, hardware page tables and bound devices belong to it.

    Parameters
    ----------
    system : VfioSystem, optional
        Whose iommufd; by default the running kernel's.
    rlimit_mode : {None, "user", "process"}
        Against which counter of locked memory pages are charged (the kernel's default is "user").  Setting it needs
        CAP_SYS_RESOURCE.

    Raises
    ------
    VfioError
        ENOENT: the kernel has no iommufd, or the module is not loaded; EACCES.

    Notes
    -----
    Thread-safe.  Closing it closes the devices bound to it and destroys every object.
    Source: Documentation/userspace-api/iommufd.rst.
    """

    def __init__(self, system: VfioSystem | None = None, *, rlimit_mode: str | None = None) -> None:
        vfio = KernelVfio() if system is None else system
        self.devices: list[IommufdDevice] = []
        if rlimit_mode not in (None, "user", "process"):
            raise ValueError(f'rlimit_mode is "user" or "process", not {rlimit_mode!r}')
        super().__init__(vfio, vfio.open(NODE))
        try:
            if rlimit_mode is not None:
                self.set_option(abi.IOMMU_OPTION_RLIMIT_MODE, int(rlimit_mode == "process"))
        except BaseException:
            self.close()
            raise

    @classmethod
    def adopt(cls, fd: int) -> Self:
        """Take over a descriptor of the running kernel's, which belongs to this object from now on."""
        iommufd = cls.__new__(cls)
        iommufd.devices = []
        Descriptor.__init__(iommufd, KernelVfio(), fd)
        return iommufd

    def let_go(self, fds: Sequence[int] = ()) -> None:
        """Close the descriptors, of the devices too, and nothing else: another process has them.  Idempotent.

        ``fds`` are those that were to be adopted: the ones that no object has yet are closed as well.
        """
        for fd in fds[1 + len(self.devices):]:
            self.system.close(fd)
        for device in self.devices:
            Descriptor.close(device)
        self.devices.clear()
        Descriptor.close(self)

    def command(self, request: int, layout: Layout, operation: str, **values: Any) -> dict[str, Any]:
        """Do an ioctl with a structure, ``size`` filled in; return the structure as the kernel left it."""
        with fits(operation):
            data = bytearray(layout.pack(size=layout.size, **values))
        self.ioctl(request, data, operation)
        return layout.unpack(data)

    # ---- objects

    def alloc_ioas(self) -> Ioas:
        """Make an I/O address space, empty and without restrictions."""
        answer = self.command(abi.IOMMU_IOAS_ALLOC, abi.iommu_ioas_alloc, "ioas_alloc")
        return Ioas(self, answer["out_ioas_id"])

    def alloc_fault_queue(self) -> FaultQueue:
        """Make a queue in which devices ask for missing pages (Linux 6.11): give it to page tables as they are made."""
        return FaultQueue(self)

    def alloc_hwpt(self, ioas: Ioas, dev_id: int, *, dirty_tracking: bool = False, nest_parent: bool = False,
                   pasids: bool = False) -> Hwpt:
        """Make a hardware page table of an address space, for the IOMMU in front of a device.

        It maps all that the address space maps, from now on; nothing needs to be attached.

        Parameters
        ----------
        ioas : Ioas
        dev_id : int
            ``IommufdDevice.id``.
        dirty_tracking : bool
            It is to note what devices write.
        nest_parent : bool
            Page tables of guests may be put on top: ``Hwpt.nested``.
        pasids : bool
            It can be attached to PASIDs, or to a device that has PASIDs attached elsewhere (Linux 6.15).

        Raises
        ------
        UnsupportedError
            EOPNOTSUPP: the IOMMU has no such thing.
        """
        flags = (abi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING if dirty_tracking else 0) | (
            abi.IOMMU_HWPT_ALLOC_NEST_PARENT if nest_parent else 0) | (abi.IOMMU_HWPT_ALLOC_PASID if pasids else 0)
        answer = self.command(abi.IOMMU_HWPT_ALLOC, abi.iommu_hwpt_alloc, "hwpt_alloc", flags=flags, dev_id=dev_id,
                              pt_id=ioas.id)
        hwpt = Hwpt(ioas, answer["out_hwpt_id"])
        if dirty_tracking:
            hwpt.loses_last_page = self.may_lose_last_page(self.hw_info(dev_id))
        return hwpt

    def destroy(self, id: int) -> None:
        """Destroy any object by its number; EBUSY while another one uses it.

        ``destroy()`` of the object does the same and notes that it is gone.
        """
        self.command(abi.IOMMU_DESTROY, abi.iommu_destroy, "destroy", id=id)

    def bind(self, address: str) -> IommufdDevice:
        """Open the device node of a device and bind it to this iommufd.

        Parameters
        ----------
        address : str
            A PCI address, or the node itself ("/dev/vfio/devices/vfio0") for mediated and other devices.

        Raises
        ------
        VfioError
            With what to do: ENODEV (no such device, wrong driver), EOPNOTSUPP (the kernel has no device nodes), EACCES,
            EBUSY (its group is in use, or not viable), EINVAL (open already), EPERM.  Nothing stays open.
        """
        if address.startswith("/"):
            return IommufdDevice(self, address, address)
        location = self.system.find_device(address)
        if location.noiommu:
            raise error(errno.EPERM, "bind", hint=f"{address} is in a no-IOMMU group: it can reach all of memory, and "
                        'iommufd does not take it; the backend "type1" does, with noiommu=True')
        refuse_unbound(location, noiommu=False)
        if location.cdev is None:
            raise error(errno.EOPNOTSUPP, "bind", hint=f"{address} has no node in /dev/vfio/devices: the kernel needs "
                        'CONFIG_VFIO_DEVICE_CDEV (Linux 6.6); groups work through the backend "type1"')
        return IommufdDevice(self, address, location.cdev)

    # ---- what there is

    def hw_info(self, dev_id: int) -> HwInfo:
        """Ask for the IOMMU in front of a device."""
        size = 64
        while True:
            data = ctypes.create_string_buffer(size)
            answer = self.command(abi.IOMMU_GET_HW_INFO, abi.iommu_hw_info, "get_hw_info", dev_id=dev_id,
                                  data_len=size, data_uptr=ctypes.addressof(data))
            length = answer["data_len"]
            if length <= size:
                return HwInfo(answer["out_data_type"], data.raw[:length], answer["out_capabilities"],
                              answer["out_max_pasid_log2"])
            size = length

    def may_lose_last_page(self, info: HwInfo) -> bool:
        """Tell whether dirty bitmaps may lack the last page of a contiguous block, as Linux 7.2 with AMD tables does.

        Kernels up to 6.12 do not, nor do Intel's and Arm's tables.
        """
        release = os.uname().release if self.real else getattr(self.system, "kernel", "0.0")
        major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in f"{release}.0".split(".")[:2])
        sound = (abi.IOMMU_HW_INFO_TYPE_INTEL_VTD, abi.IOMMU_HW_INFO_TYPE_ARM_SMMUV3,
                 abi.IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV)
        return (major, minor) > (6, 12) and info.type not in sound

    def option(self, option: int, object_id: int = 0) -> int:
        """Read an IOMMU_OPTION_*, of an object or (0) of the iommufd."""
        return self.command(abi.IOMMU_OPTION, abi.iommu_option, "option", option_id=option, object_id=object_id,
                            op=abi.IOMMU_OPTION_OP_GET)["val64"]

    def set_option(self, option: int, value: int, object_id: int = 0) -> None:
        """Set an IOMMU_OPTION_*, of an object or (0) of the iommufd."""
        self.command(abi.IOMMU_OPTION, abi.iommu_option, "option", option_id=option, object_id=object_id,
                     op=abi.IOMMU_OPTION_OP_SET, val64=value)

    @property
    def rlimit_mode(self) -> str:
        """What locked memory is charged to: "user" or "process"."""
        return "process" if self.option(abi.IOMMU_OPTION_RLIMIT_MODE) else "user"

    def vfio_ioas(self) -> int | None:
        """Return the number of the address space behind the VFIO compatibility ioctls; None = there is none."""
        try:
            return self.command(abi.IOMMU_VFIO_IOAS, abi.iommu_vfio_ioas, "vfio_ioas",
                                op=abi.IOMMU_VFIO_IOAS_GET)["ioas_id"]
        except OSError as exc:
            if exc.errno == errno.ENODEV:
                return None
            raise

    def set_vfio_ioas(self, ioas: Ioas | None) -> None:
        """Choose the address space behind the VFIO compatibility ioctls; None: none."""
        if ioas is None:
            self.command(abi.IOMMU_VFIO_IOAS, abi.iommu_vfio_ioas, "vfio_ioas", op=abi.IOMMU_VFIO_IOAS_CLEAR)
        else:
            self.command(abi.IOMMU_VFIO_IOAS, abi.iommu_vfio_ioas, "vfio_ioas", op=abi.IOMMU_VFIO_IOAS_SET,
                         ioas_id=ioas.id)

    def change_process(self) -> None:
        """Move the charge for locked memory, of all mappings, to this process (Linux 6.14): for a descriptor passed on.

        Raises
        ------
        VfioError
            EINVAL: a mapping was not made by map_file; EBUSY; ENOMEM.
        """
        self.command(abi.IOMMU_IOAS_CHANGE_PROCESS, abi.iommu_ioas_change_process, "change_process")

    def has_map_file(self, ioas: Ioas) -> bool:
        """Tell whether the kernel maps memory by file and changes the process (Linux 6.14): asked with no bytes."""
        try:
            ioas.map_file(-1, 0, 0)
        except VfioError as exc:
            return exc.errno != errno.ENOTTY
        return True

    def _hint(self, err: int, operation: str) -> str:
        if err == errno.ENOMEM:
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            return (f"the limit of locked memory (RLIMIT_MEMLOCK) is {limit} bytes, counted for all processes of the "
                    "user: raise it with 'ulimit -l', limits.conf or LimitMEMLOCK=, or run with CAP_IPC_LOCK")
        if err == errno.ENOTTY:
            return "this kernel's iommufd does not have it"
        return _HINTS.get((err, operation)) or (
            _MAP_HINTS.get(err, "") if operation.startswith(("map_", "copy")) else "") or super()._hint(err, operation)

    def close(self) -> None:
        """Detach and close the devices and destroy every object.  Idempotent."""
        for device in reversed(self.devices.copy()):
            device.close()
        super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


_MAP_HINTS = {
    errno.EEXIST: "a mapping overlaps it: unmap that first",
    errno.EFAULT: "the memory is not mapped in this process, or not with the permission needed",
    errno.EINVAL: "outside of iova_ranges(), or not a multiple of iova_alignment()",
    errno.ENOSPC: "no hole is left for it in iova_ranges() and what allow_iovas() allows",
}
_HINTS = {
    (errno.ENOENT, "copy"): "the source range has a hole, or an address space is destroyed",
    (errno.EPERM, "copy"): "the source is mapped for reading only",
    (errno.ENOENT, "unmap_dma"): "it would split a mapping: iommufd removes whole mappings only",
    (errno.EADDRINUSE, "allow_iovas"): "a range goes beyond iova_ranges(): attached devices cannot reach it",
    (errno.EBUSY, "destroy"): "another object uses it: destroy page tables before address spaces, detach devices first",
    (errno.EBUSY, "option"): "set it before any object is made",
    (errno.EPERM, "option"): "it needs CAP_SYS_RESOURCE",
    (errno.EINVAL, "option"): "large pages are switched off before anything is mapped for a device",
    (errno.EOPNOTSUPP, "hwpt_alloc"): "the IOMMU has no dirty tracking, nesting or PASIDs: see hw_info()",
    (errno.EINVAL, "hwpt_nested"): "the table below it was not allocated with nest_parent=True, or for another IOMMU",
    (errno.ENOENT, "hwpt_nested"): "the fault queue is closed, or the device gone",
    (errno.EOPNOTSUPP, "hwpt_nested"): "the IOMMU or this kernel can't nest tables in VT-d's format: see hw_info()",
    (errno.EINVAL, "hwpt_invalidate"): "addresses are multiples of 4096",
    (errno.EADDRINUSE, "hwpt_alloc"): "a mapping or an allowed range lies where the IOMMU does not reach",
    (errno.EOPNOTSUPP, "set_dirty_tracking"): "allocate the page table with dirty_tracking=True",
    (errno.EINVAL, "change_process"): "every mapping must be made by map_file",
}
