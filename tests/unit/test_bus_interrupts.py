"""Interrupts of devices that are not on PCI, from the user's side: channel I/O, adapters, platform and other buses."""
import os

import pytest
from software_device import opened

from vfiodma import VfioDevice
from vfiodma.devices import ApIrq, CcwIrq, IrqFlags, IrqIndex
from vfiodma.devices import model_regions as models
from vfiodma.errors import InvalidArgumentError, VfioError
from vfiodma.uapi import vfio as abi

ADDRESS = "0000:00:10.0"
PLATFORM, AP, CCW = abi.VFIO_DEVICE_FLAGS_PLATFORM, abi.VFIO_DEVICE_FLAGS_AP, abi.VFIO_DEVICE_FLAGS_CCW
BUSES = [PLATFORM, abi.VFIO_DEVICE_FLAGS_AMBA, CCW, AP, abi.VFIO_DEVICE_FLAGS_FSL_MC, abi.VFIO_DEVICE_FLAGS_CDX]


def model(bus, count=3):
    device = models.ChannelDevice(ADDRESS)
    device.bus, device.irq_indexes = bus, count
    return device


@pytest.mark.parametrize("bus", BUSES)
def test_each_type_has_one_interrupt_that_comes_and_goes(bus):
    with opened(model(bus)) as raw, VfioDevice.open(raw.container, ADDRESS) as device:
        assert [(info.index, info.count, info.flags) for info in device.interrupts] == [
            (index, 1, IrqFlags.EVENTFD) for index in range(3)]
        first = device.interrupts(0)
        with first, device.interrupts(2) as last:
            raw.device.irqs.trigger(0)
            raw.device.irqs.trigger(2)
            last.trigger()
            last.trigger_where([False])
            assert (first[0].poll(), last[0].poll()) == (1, 2)
            with pytest.raises(InvalidArgumentError, match="has 1 vectors, not 2"):
                device.interrupts(1, 2)
            with pytest.raises(InvalidArgumentError):
                first.mask()                    # an edge: nothing to mask
        assert [raw.device.irqs.enabled(index) for index in range(3)] == [0, 0, 0]
        with device.interrupts(0) as again:     # and once more
            raw.device.irqs.trigger(0)
            assert again.wait(timeout=5) == 1


@pytest.mark.parametrize("bus", BUSES)
def test_switching_off_signals_nobody(bus):
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    with opened(model(bus)) as raw, VfioDevice.open(raw.container, ADDRESS) as device:
        vectors = device.interrupts(1)
        vectors.assign(0, [eventfd])
        vectors.close()
        raw.device.irqs.trigger(1)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(eventfd)
        device.interrupts.disable(1)            # it is off already
    os.close(eventfd)


def test_types_have_the_names_of_their_bus():
    named = [(CCW, CcwIrq.CRW, "CRW"), (AP, ApIrq.CFG_CHG, "CFG_CHG"), (PLATFORM, 1, "interrupt index 1")]
    for bus, kind, name in named:
        with opened(model(bus)) as raw, VfioDevice.open(raw.container, ADDRESS) as device:
            with device.interrupts(kind) as vectors:
                assert f"of {name} " in repr(vectors)
            for missing in (3, 77):
                with pytest.raises(VfioError, match=f"no interrupt index {missing}"):
                    device.interrupts.info(missing)
    assert [(kind.name, kind.value) for kinds in (CcwIrq, ApIrq) for kind in kinds] == [
        ("IO", 0), ("CRW", 1), ("REQ", 2), ("REQ", 0), ("CFG_CHG", 1)]
    assert IrqIndex.INTX == CcwIrq.IO == 0
