"""The `edu` driver on the software device: the tests that a real one passes in the lab, through every door."""
import pytest
from device_checks import EDU, DriverChecks, InterruptChecks, IoEventChecks, RegisterChecks

from vfiodma import SoftwareGroup, SoftwareVfio, Type1Container, VfioDevice, open_backend
from vfiodma.devices import EduDevice, IrqIndex
from vfiodma.errors import UnsupportedError


@pytest.fixture(params=["software", "type1", "iommufd"])
def container(request):
    system = SoftwareVfio(groups=[SoftwareGroup(0, [EduDevice(EDU)])], memlock_limit=None)
    if request.param == "software":
        container = system.container()
    elif request.param == "type1":
        container = Type1Container([EDU], system=system)
    else:
        container = open_backend("iommufd", devices=[EDU], system=system)
    with container:
        yield container


class TestRegisters(RegisterChecks):
    pass


class TestDriver(DriverChecks):
    pass


class Newer:
    """Tests of what a software device may not have yet."""

    @pytest.fixture(autouse=True)
    def needs(self, container):
        with VfioDevice.open(container, EDU) as device:
            try:
                self.try_out(device)
            except UnsupportedError as exc:
                pytest.skip(str(exc))


class TestInterrupts(Newer, InterruptChecks):
    def try_out(self, device):
        device.interrupts(IrqIndex.INTX).close()


class TestIoEvents(Newer, IoEventChecks):
    def try_out(self, device):
        device.ioevents.add(0, 4, 0, 4).close()
