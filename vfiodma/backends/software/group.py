"""What an IOMMU group of the software VFIO is made of."""
from .device import PlainDevice
from .spapr import TceGroup


class SoftwareGroup:
    """An IOMMU group of the software backend.

    Parameters
    ----------
    number : int
        The N of /dev/vfio/N.
    devices : sequence
        PCI addresses ("0000:00:10.0": a plain device) or objects of the SoftwareDevice protocol.
    aperture : (int, int)
        First and last IOVA that the IOMMU translates.
    reserved : sequence of (int, int)
        First and last IOVA of regions that can't be mapped; by default the MSI window of x86.
    pgsizes : int
        Bitmap of IOMMU page sizes.
    emulated : bool
        A group of mediated devices: no IOMMU, hence no aperture.
    coherent : bool
        The IOMMU enforces cache coherency (extension DMA_CC).
    msi_isolated : bool
        Without it, attaching is EPERM.
    nestable : bool
        The IOMMU can nest (SET_IOMMU 6, up to Linux 6.12; HWPT_ALLOC with NEST_PARENT), and its devices have PASIDs.
    page_request_timeout : float or None
        The devices ask for missing pages where they are attached to a page table of iommufd with a fault queue, and
        wait so many seconds for the answer.  None: they do not ask (they lack PRI).
    dirty_tracking : bool
        The IOMMU can tell which pages were written (HWPT_ALLOC with DIRTY_TRACKING).
    lost_last_page : int
        0: page tables as VT-d has them.  Else those of AMD v1 in Linux 7.2, whose blocks of this many bytes of
        contiguous memory (a power of two) are reported dirty without their last page.
    tce : TceGroup, optional
        On platform "powernv": the windows of the group; by default those of IODA2.
    noiommu : bool
        There is no IOMMU: the group is /dev/vfio/noiommu-N, and its devices reach physical memory, which the model does
        not have.  Needs ``SoftwareVfio(noiommu=True)``.
    eeh : bool
        On platform "powernv": the group is a partitionable endpoint.
    """

    def __init__(self, number, devices, *, aperture=(0, (1 << 39) - 1), reserved=((0xFEE00000, 0xFEEFFFFF),),
                 pgsizes=0x40201000, emulated=False, coherent=True, msi_isolated=True, nestable=False,
                 dirty_tracking=True, lost_last_page=0, tce=None, eeh=True,
                 noiommu=False, page_request_timeout=None):
        if not isinstance(number, int) or not 0 <= number < 1 << 31:
            raise ValueError("a group's number is an integer of 0 ... 2**31 - 1")
        if not emulated:
            if not 0 <= aperture[0] <= aperture[1] < 1 << 64:
                raise ValueError("aperture is (first, last) with 0 <= first <= last < 2**64")
            if any(not 0 <= first <= last < 1 << 64 for first, last in reserved):
                raise ValueError("a reserved region is (first, last) with 0 <= first <= last < 2**64")
            if not 0 < pgsizes < 1 << 64:
                raise ValueError("pgsizes is a bitmap of page sizes")
        if noiommu and emulated:
            raise ValueError("a mediated device needs no IOMMU of its own: emulated or noiommu, not both")
        for device in devices:
            if not hasattr(device, "address") and not isinstance(device, str):
                raise TypeError(f"a device is a PCI address or a SoftwareDevice, not {type(device).__name__}")
        self.number = number
        self.devices = [PlainDevice(device) if isinstance(device, str) else device for device in devices]
        self.aperture = tuple(aperture)
        self.reserved = tuple(tuple(region) for region in reserved)
        self.pgsizes = pgsizes
        self.emulated = emulated
        self.coherent = coherent
        self.msi_isolated = msi_isolated
        self.nestable = nestable
        if page_request_timeout is not None and not page_request_timeout >= 0:
            raise ValueError("page_request_timeout is a number of seconds, or None")
        self.page_request_timeout = page_request_timeout
        if lost_last_page & (lost_last_page - 1) or not 0 <= lost_last_page < 1 << 63:
            raise ValueError("lost_last_page is 0 or a power of two")
        self.dirty_tracking = dirty_tracking
        self.lost_last_page = lost_last_page
        self.tce = TceGroup() if tce is None else tce or None
        self.eeh = eeh
        self.noiommu = noiommu

    @property
    def node(self):
        """Its path in /dev."""
        return f"/dev/vfio/{'noiommu-' if self.noiommu else ''}{self.number}"

    def __repr__(self):
        kind = "emulated" if self.emulated else f"aperture {self.aperture[0]:#x}-{self.aperture[1]:#x}"
        return f"SoftwareGroup({self.number}, {[device.address for device in self.devices]}, {kind})"
