"""Devices of a running kernel: see ../../device_checks.py for the `edu` tests that the software device passes too."""
import os

import pytest
from device_checks import (
    EDU,
    DriverChecks,
    InterruptChecks,
    IoEventChecks,
    RegisterChecks,
    device,  # noqa: F401  (a fixture)
    edu,  # noqa: F401
)

from vfiodma import Type1Container

pytestmark = pytest.mark.skipif("KERNEL_LAB" not in os.environ, reason="runs in a guest of kernel-lab")


@pytest.fixture
def container():
    with Type1Container([EDU]) as container:
        yield container


class TestRegisters(RegisterChecks):
    pass


class TestDriver(DriverChecks):
    pass


class TestInterrupts(InterruptChecks):
    pass


class TestIoEvents(IoEventChecks):
    pass
