"""iommufd: /dev/iommu and the device nodes of VFIO, of the running kernel or of a software one in this process."""
from .container import IommufdContainer
from .context import HwInfo, Iommufd
from .device import IommufdDevice
from .hwpt import Hwpt, HwptSource, NestedHwpt
from .ioas import Ioas
from .page_faults import FaultQueue, PageFault

__all__ = ["FaultQueue", "HwInfo", "Hwpt", "HwptSource", "Ioas", "Iommufd", "IommufdContainer", "IommufdDevice",
           "NestedHwpt", "PageFault", "adopt", "open"]

open = IommufdContainer
adopt = IommufdContainer.adopt
