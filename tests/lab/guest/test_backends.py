"""The public conformance suite on the running kernel, with DMA by an `edu` device."""
import os

import pytest

from vfiodma import IommufdContainer, Type1Container
from vfiodma.testing import BackendConformance
from vfiodma.uapi import vfio as abi

EDU, OTHER = "0000:00:10.0", "0000:00:14.0"

pytestmark = [
    pytest.mark.skipif("KERNEL_LAB" not in os.environ, reason="runs in a guest of the kernel lab"),
    pytest.mark.skipif(not os.path.exists(f"/sys/bus/pci/devices/{EDU}/iommu_group"),
                       reason="no IOMMU stands before the devices")]
needs_iommufd = pytest.mark.skipif(not os.path.exists("/dev/iommu"), reason="this kernel has no iommufd")


class OnKernel(BackendConformance):
    edu = EDU
    charges_locked_memory = True


@pytest.mark.short
class TestType1(OnKernel):
    def open_backend(self):
        return Type1Container([EDU])


class TestType1v1(OnKernel):
    def open_backend(self):
        return Type1Container([EDU], iommu_type=abi.VFIO_TYPE1_IOMMU)


class TestTwoGroups(OnKernel):
    """A second group joins: its IOMMU domain may be another one."""

    def open_backend(self):
        return Type1Container([EDU, OTHER])


@needs_iommufd
class TestIommufd(OnKernel):
    exact_dirty = True

    def open_backend(self):
        return IommufdContainer([EDU])


@needs_iommufd
class TestType1OnIommufd(OnKernel):
    atomic_unmap = False

    def open_backend(self):
        return Type1Container([EDU], node="/dev/iommu")
