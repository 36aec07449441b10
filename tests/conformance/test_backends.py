"""The public conformance suite on every backend that needs no hardware."""
import itertools

import pytest

from vfiodma import IommufdContainer, SoftwareGroup, SoftwareVfio, Type1Container
from vfiodma.backends.spapr import SpaprContainer
from vfiodma.devices.edu import EduDevice
from vfiodma.testing import BackendConformance
from vfiodma.uapi import vfio as abi

EDU, OTHER = "0000:00:10.0", "0000:00:11.0"
V1, V2 = abi.VFIO_TYPE1_IOMMU, abi.VFIO_TYPE1v2_IOMMU


def make(kernel, **options):
    groups = [SoftwareGroup(3, [EduDevice(EDU)]), SoftwareGroup(4, [EduDevice(OTHER)])]
    return SoftwareVfio(kernel, groups, **options)


def suite(name, opener, **facts):
    """Put a class of tests into this module."""
    globals()[name] = type(name, (BackendConformance,), {"open_backend": opener, "__module__": __name__, **facts})


for kernel, version in itertools.product(["5.4", "6.1", "6.12", "7.2"], [V1, V2]):
    suffix = f"{kernel.replace('.', '')}{'v1' if version == V1 else 'v2'}"
    facts = {"edu": EDU, "charges_locked_memory": True}
    suite(f"TestSoftware{suffix}",
          lambda self, kernel=kernel, version=version: make(kernel, dma_entry_limit=400).container(iommu_type=version),
          **facts)
    suite(f"TestType1{suffix}",
          lambda self, kernel=kernel, version=version: Type1Container(
              [EDU], system=make(kernel, dma_entry_limit=400), iommu_type=version), **facts)

for kernel in ("6.12", "7.2"):
    suffix = kernel.replace(".", "")
    suite(f"TestIommufd{suffix}", lambda self, kernel=kernel: IommufdContainer([EDU], system=make(kernel)),
          edu=EDU, charges_locked_memory=True, exact_dirty=True)
    suite(f"TestType1OnIommufd{suffix}", lambda self, kernel=kernel: Type1Container(
        [EDU], system=make(kernel), node="/dev/iommu"), edu=EDU, charges_locked_memory=True, atomic_unmap=False)

for version in (1, 2):
    # Without EEH, which stops a device that is refused an access.  Tables are charged, too: more than the checks allow.
    suite(f"TestSpapr{version}", lambda self, version=version: SpaprContainer(
        [EDU], system=SoftwareVfio("7.2", [SoftwareGroup(3, [EduDevice(EDU)], eeh=False)], platform="powernv"),
        version=version), edu=EDU, maps_readable_memory=version == 1)


class TestSoftwareManyEntries(BackendConformance):
    edu = EDU

    def open_backend(self):
        return make("7.2").container()


class TestTwoGroups(BackendConformance):
    edu = OTHER

    def open_backend(self):
        return Type1Container([EDU, OTHER], system=make("6.12", memlock_limit=None))


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "7.2"])
class TestEmulatedGroup(BackendConformance):
    """Mediated devices: no IOMMU, no ranges, memory is looked at when it is used."""

    pins_memory = False
    exact_dirty = True

    @pytest.fixture(autouse=True)
    def chosen(self, kernel):
        self.kernel = kernel

    def open_backend(self):
        vfio = SoftwareVfio(self.kernel, [SoftwareGroup(5, [EduDevice(EDU)], emulated=True)], memlock_limit=None)
        return vfio.container()


class TestLargePages(BackendConformance):
    """An IOMMU whose smallest page is larger than the processor's."""

    edu = EDU

    def open_backend(self):
        group = SoftwareGroup(3, [EduDevice(EDU)], pgsizes=0x40200000 | 1 << 16, aperture=(0x10000, (1 << 64) - 1))
        return SoftwareVfio("7.2", [group], dma_entry_limit=400, memlock_limit=None).container()
