"""The `edu` driver on the software device: the tests that a real one passes in the lab."""
import pytest
from device_checks import (
    EDU,
    DriverChecks,
    RegisterChecks,
)

from vfiodma import SoftwareGroup, open_backend
from vfiodma.devices.edu import EduDevice


@pytest.fixture
def container():
    with open_backend("software", groups=[SoftwareGroup(0, [EduDevice(EDU)])], memlock_limit=None) as container:
        yield container


class TestRegisters(RegisterChecks):
    pass


class TestDriver(DriverChecks):
    pass
