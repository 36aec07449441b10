"""The software VFIO: containers, groups and devices in this process, with the answers of a chosen Linux kernel.

Two doors lead to the same logic (vfiodma._core.type1):

* SoftwareVfio (vfio.py), what a C program sees: open a path, ioctl with numbers and addresses, close;
* SoftwareContainer (container.py), typed: the backend that IoAddressSpace works on.
"""
from ...uapi import vfio as abi
from .container import SoftwareContainer
from .group import SoftwareGroup
from .vfio import SoftwareVfio

__all__ = ["SoftwareContainer", "SoftwareGroup", "SoftwareVfio", "open"]


def open(*, groups=None, iommu_type=abi.VFIO_TYPE1v2_IOMMU, **options):
    """Make a SoftwareVfio and open a container with all of its groups; options are those of SoftwareVfio."""
    return SoftwareVfio(groups=groups, **options).container(iommu_type=iommu_type)
