"""iommufd: /dev/iommu and the device nodes of VFIO, of the running kernel or of a software one in this process."""
from .container import IommufdContainer
from .context import HwInfo, Iommufd
from .device import IommufdDevice
from .hwpt import Hwpt, HwptSource
from .ioas import Ioas

__all__ = ["HwInfo", "Hwpt", "HwptSource", "Ioas", "Iommufd", "IommufdContainer", "IommufdDevice", "adopt", "open"]

open = IommufdContainer
adopt = IommufdContainer.adopt
