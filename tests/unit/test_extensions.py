"""CHECK_EXTENSION: the whole table of extension x kernel x who is asked, and SET_IOMMU beside it."""
import ctypes
import errno
import itertools

import pytest

from vfiodma import SoftwareGroup, SoftwareVfio
from vfiodma.backends.software import files
from vfiodma.errors import VfioError
from vfiodma.uapi import vfio as abi

KERNELS = ["5.4", "5.12", "vsva", "6.1", "6.12", "7.2"]
TYPE1, SPAPR, V2, DMA_CC, EEH, NESTING, SPAPR_V2, NOIOMMU, UNMAP_ALL, UPDATE_VADDR = range(1, 11)
#: What the headers name, neighbours, and what no header will ever name.
NUMBERS = [*range(40), 99, 100, 1 << 31, 1 << 32, 1 << 32 | TYPE1, 1 << 63, *range(-12, 0)]

#: Extensions of Type1 before SET_IOMMU and after it, aside from what depends on the groups.
ALWAYS = {"5.4": {TYPE1, V2, NESTING}, "5.12": {TYPE1, V2, NESTING, UNMAP_ALL, UPDATE_VADDR},
          "vsva": {TYPE1, V2, NESTING, UNMAP_ALL, UPDATE_VADDR}, "6.1": {TYPE1, V2, NESTING, UNMAP_ALL},
          "6.12": {TYPE1, V2, NESTING, UNMAP_ALL}, "7.2": {TYPE1, V2, UNMAP_ALL}}
#: From here on UPDATE_VADDR is told only by an instance without mediated devices.
BY_INSTANCE = {"6.1", "6.12", "7.2"}


@pytest.fixture(autouse=True)
def rawio(monkeypatch):
    monkeypatch.setattr(files, "has_capability", lambda number: True)


def code(call, *arguments):
    try:
        return call(*arguments)
    except VfioError as exc:
        return errno.errorcode[exc.errno]


def extensions(vfio, fd):
    return {number for number in NUMBERS if vfio.ioctl(fd, abi.VFIO_CHECK_EXTENSION, number)}


def join(vfio, group, fd):
    word = ctypes.c_int(fd)
    vfio.ioctl(vfio.open(vfio._groups[group].config.node), abi.VFIO_GROUP_SET_CONTAINER, ctypes.addressof(word))


#: Groups of a host: what they are, and whether all of their domains enforce coherency and none is mediated.
MEMBERS = {"plain": {"coherent": True}, "incoherent": {"coherent": False}, "mediated": {"emulated": True}}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("members", [each for n in (1, 2, 3) for each in itertools.combinations(MEMBERS, n)],
                         ids="+".join)
def test_type1_answers_by_version_and_by_what_is_in_the_container(kernel, members):
    vfio = SoftwareVfio(kernel, [SoftwareGroup(n, [], **MEMBERS[name]) for n, name in enumerate(members)],
                        memlock_limit=None)
    fd = vfio.open("/dev/vfio/vfio")
    assert extensions(vfio, fd) == ALWAYS[kernel]
    for group in range(len(members)):
        join(vfio, group, fd)
        assert extensions(vfio, fd) == ALWAYS[kernel]           # still nobody's instance
    assert vfio.ioctl(fd, abi.VFIO_SET_IOMMU, V2) == 0
    wanted = set(ALWAYS[kernel])
    if "incoherent" not in members:
        wanted.add(DMA_CC)                                      # also where there is no domain at all
    if kernel in BY_INSTANCE and "mediated" not in members:
        wanted.add(UPDATE_VADDR)
    assert extensions(vfio, fd) == wanted
    assert extensions(vfio, vfio.open("/dev/vfio/vfio")) == ALWAYS[kernel]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("platform", ["x86", "powernv"])
@pytest.mark.parametrize("option", [False, True])
def test_types_that_can_be_set_are_those_that_are_told(kernel, platform, option):
    vfio = SoftwareVfio(kernel, [SoftwareGroup(0, [], nestable=True)], memlock_limit=None, platform=platform,
                        noiommu=option)
    power = platform == "powernv"
    types = {SPAPR, SPAPR_V2} if power else ALWAYS[kernel] & {TYPE1, V2, NESTING}
    #: Told, but no type: asked without an instance, the driver then refuses to be opened.
    refused = {EEH} if power else ALWAYS[kernel] & {UNMAP_ALL, UPDATE_VADDR}
    fd = vfio.open("/dev/vfio/vfio")
    assert extensions(vfio, fd) == types | refused | ({NOIOMMU} if option else set())
    assert code(vfio.ioctl, fd, abi.VFIO_SET_IOMMU, min(types)) == "EINVAL"         # no group
    group = vfio.open("/dev/vfio/0")
    word = ctypes.c_int(fd)
    for number in NUMBERS:
        vfio.ioctl(group, abi.VFIO_GROUP_SET_CONTAINER, ctypes.addressof(word))
        assert extensions(vfio, fd) == types | refused
        if power and number in types and kernel not in ("6.12", "7.2"):
            wanted = 0 if number == SPAPR_V2 else "EPERM"       # a platform that hands ownership over
        else:
            wanted = 0 if number in types else "EINVAL" if number in refused else "ENODEV"
        assert code(vfio.ioctl, fd, abi.VFIO_SET_IOMMU, number) == wanted, number
        if wanted == 0:
            assert code(vfio.ioctl, fd, abi.VFIO_SET_IOMMU, number) == "EINVAL"     # once
        vfio.ioctl(group, abi.VFIO_GROUP_UNSET_CONTAINER)


@pytest.mark.parametrize("platform", ["x86", "powernv"])
@pytest.mark.parametrize("kernel", ["5.4", "7.2"])
def test_only_no_iommu_is_told_with_such_a_group(kernel, platform):
    vfio = SoftwareVfio(kernel, [SoftwareGroup(0, ["0000:00:10.0"], noiommu=True), SoftwareGroup(1, [])],
                        platform=platform, noiommu=True, memlock_limit=None)
    fd = vfio.open("/dev/vfio/vfio")
    join(vfio, 0, fd)
    assert extensions(vfio, fd) == {NOIOMMU}
    for number in set(NUMBERS) - {NOIOMMU}:
        assert code(vfio.ioctl, fd, abi.VFIO_SET_IOMMU, number) == "ENODEV"
    assert vfio.ioctl(fd, abi.VFIO_SET_IOMMU, NOIOMMU) == 0 and extensions(vfio, fd) == {NOIOMMU}
    for request in (abi.VFIO_IOMMU_GET_INFO, abi.VFIO_IOMMU_MAP_DMA, abi.VFIO_IOMMU_ENABLE, abi.VFIO_EEH_PE_OP):
        assert code(vfio.ioctl, fd, request, 0) == "ENOTTY"
    group = next(fd for fd, file in vfio._files.items() if getattr(file, "config", None) is vfio._groups[0].config)
    name = ctypes.create_string_buffer(b"0000:00:10.0")
    device = vfio.ioctl(group, abi.VFIO_GROUP_GET_DEVICE_FD, ctypes.addressof(name))
    with pytest.raises(VfioError):
        vfio._groups[0].ports["0000:00:10.0"].read(0, 1)        # what it reaches is not modelled
    vfio.close(device)
    vfio.ioctl(group, abi.VFIO_GROUP_UNSET_CONTAINER)
    assert NOIOMMU in extensions(vfio, fd) and len(extensions(vfio, fd)) > 1


@pytest.mark.parametrize("kernel", ["6.12", "7.2"])
def test_an_iommufd_answers_as_type1_as_far_as_it_can(kernel):
    vfio = SoftwareVfio(kernel, [SoftwareGroup(0, [])], memlock_limit=None, vfio_container="iommufd")
    for path in ("/dev/vfio/vfio", "/dev/iommu"):
        fd = vfio.open(path)
        assert code(vfio.ioctl, fd, abi.VFIO_CHECK_EXTENSION, DMA_CC) == "ENODEV"      # no IOAS
        assert {number for number in set(NUMBERS) - {DMA_CC}
                if vfio.ioctl(fd, abi.VFIO_CHECK_EXTENSION, number)} == {TYPE1, V2, UNMAP_ALL}
