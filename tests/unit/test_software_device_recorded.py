"""The software devices answer as the devices of real kernels did: recorded in the lab with tests/device_answers.py."""
import errno
import gzip
import json
import struct
from functools import cache
from pathlib import Path

import device_answers
import pytest
from device_answers import ask
from migration_answers import FEATURE, MigrationAsker
from software_card import Card
from software_device import opened
from test_software_device_migration import Recorder

from vfiodma import SoftwareGroup, SoftwareVfio
from vfiodma._core.errno import error
from vfiodma.devices.edu import EduDevice
from vfiodma.uapi import vfio as abi

RECORDED = Path(__file__).parent.parent / "data" / "devices"
KERNELS = ("6.1", "6.12", "7.2")
BRIDGED_GROUP = 7               # its number in the recordings


def e1000e():
    return Card("0000:00:14.0", regions={0: 0x20000, 1: 0x20000, 2: 0x20, 3: 0x4000, 7: 0x1000},
                flags={0: 7, 1: 7, 2: 3, 3: 7}, msix_table=(3, 0, 0x50))


def nvme():
    return Card("0000:00:15.0", regions={0: 0x4000, 7: 0x1000}, irqs=(1, 0, 65, 1, 1), flags={0: 7},
                msix_table=(0, 0x2000, 0x410))


DEVICES = {
    "edu": (lambda: [EduDevice("0000:00:10.0")], {}),
    "edu behind a bridge": (lambda: [EduDevice(f"0000:01:0{i}.0", reset_scope="bus 1") for i in (1, 2)], {}),
    "e1000e": (lambda: [e1000e()], {"vectors": (1, 2), "count": 5, "edu": False}),
    "nvme": (lambda: [nvme()], {"vectors": (2,), "count": 5, "edu": False}),
}


@cache
def recorded(kernel):
    return json.loads(gzip.decompress((RECORDED / f"{kernel}.json.gz").read_bytes()))


device_answers.SETTLE, device_answers.PAUSE = 0, 0.2        # signals are there at once, but for those of a thread


@cache
def answered(kernel, name):
    make, options = DEVICES[name]
    devices = make()
    vfio = SoftwareVfio(kernel=kernel, groups=[SoftwareGroup(BRIDGED_GROUP, devices)])
    container = vfio.open("/dev/vfio/vfio")
    answers = ask(vfio, container, f"/dev/vfio/{BRIDGED_GROUP}", devices[0].address, **options)
    vfio.close(container)
    return json.loads(json.dumps(answers))


def where_they_differ_on_purpose(name, question, answer):
    """Blank out what a model of a device can't have, and what the platform decides."""
    if not name.startswith("edu"):
        return answer
    if question == "region":        # registers of the software edu can't be mapped: accesses have effects
        return [[index, size, [result, data[:8] + "xx" + data[10:] if index == 0 and not result else data]]
                for index, size, (result, data) in answer]
    if question == "mmap":
        return [entry for entry in answer if entry[:3] not in ([0, 0, 0x100000], [0, 0x1000, 0x1000])]
    if question == "config":        # addresses of BARs, the number of the interrupt line
        return answer[:0x10 * 2] + answer[0x14 * 2:0x3C * 2] + answer[0x3D * 2:]
    if question == "edu interrupts":    # QEMU does not deliver what was raised before INTx was enabled
        return [entry for entry in answer if entry[0] != "enable while raised"]
    return answer


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", DEVICES)
def test_every_answer_is_that_of_the_kernel(kernel, name):
    real, model = recorded(kernel)[name], answered(kernel, name)
    assert list(real) == list(model)
    for question in real:
        expected = where_they_differ_on_purpose(name, question, real[question])
        assert where_they_differ_on_purpose(name, question, model[question]) == expected, question


class NothingYet(Recorder):
    """The kernel's sample device keeps resuming while its state is not complete."""

    def load(self, data):
        raise error(errno.EINVAL, "load")


@pytest.mark.parametrize("kernel", ["6.12", "7.2"])
def test_migration_is_that_of_the_kernel(kernel):
    real = recorded(f"migration-{kernel}")["mtty"]
    with opened(Card(migration=NothingYet(), dma_logging=True), kernel=kernel) as device:
        asker = MigrationAsker(device.vfio, device.fd)
        assert asker.call(FEATURE, struct.pack("=IIQ", 16, 1 << 16 | 1, 0)) == real["flags"]
        asker.features()
        asker.every_pair()
        asker.streams()
    model = json.loads(json.dumps(asker.answers))
    assert model["pairs"] == real["pairs"]
    # A part of a BAR as a dma-buf: vfio-pci's, not the sample device's.
    assert [e for e in model["features"] if e[0] != 11] == [e for e in real["features"] if e[0] != 11]
    for mine, theirs in zip(model["streams"], real["streams"], strict=True):
        if mine[0][-1] in (6, 7):       # at the temporary end the sample device says 0 where the interface says ENOMSG
            assert mine.pop() == [1, -errno.ENOMSG, -errno.ENOMSG] and theirs.pop() == [1, 0, 0]
        assert mine == theirs


@pytest.mark.parametrize("kernel", ["6.12", "7.2"])
def test_planes_are_those_of_the_kernel(kernel):
    class Display(Card):
        plane_access = abi.VFIO_GFX_PLANE_TYPE_REGION

        def query_plane(self, kind, access):
            return {"x_hot": 0, "y_hot": 0, "region_index": 16, "drm_format": 1}

    with opened(Display(), kernel=kernel) as device:
        asker = MigrationAsker(device.vfio, device.fd)
        asker.display()
    assert json.loads(json.dumps(asker.answers["display"])) == recorded(f"migration-{kernel}")["mdpy"]["display"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_recording_has_what_the_specification_says(kernel):
    """Spot checks that the data is what it is taken for."""
    edu, card = recorded(kernel)["edu"], recorded(kernel)["e1000e"]
    assert edu["reset"] == -22 and card["reset"] == 0
    assert dict((size, result) for size, (result, _) in edu["hot reset info"])[12] == -19
    assert [entry[2][0] for entry in edu["irq"] if entry[1] == 16] == [0, 0, 0, -22, 0, -22, -22]
    flags, = struct.unpack_from("=I", bytes.fromhex(next(e[2][1] for e in card["irq"] if e[:2] == [2, 16])), 4)
    assert flags == (9 if kernel == "6.1" else 1)
