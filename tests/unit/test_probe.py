"""What probe says, on trees of plain files that stand for hosts."""
import json
import os
import struct
import subprocess
import sys

import pytest

from vfiodma import hostinfo
from vfiodma.cli.probe import amount, findings
from vfiodma.types import IovaRange
from vfiodma.uapi import vfio


@pytest.fixture
def host(tmp_path):
    """Return a function that writes files below a fake root, and the root."""
    def write(path, text=""):
        place = tmp_path / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        return place
    write("proc/self/status", "VmLck:\t 8 kB\nCapEff:\t0000000000000000\n")
    return write, tmp_path


def add_device(host, group, address, driver=None, bus="pci"):
    write, root = host
    place = root / f"sys/devices/{address}"
    write(f"sys/devices/{address}/vendor", "0x8086")
    write(f"sys/devices/{address}/device", "0x10fb")
    (root / f"sys/bus/{bus}").mkdir(parents=True, exist_ok=True)
    (place / "subsystem").symlink_to(root / f"sys/bus/{bus}")
    if driver:
        folder = root / f"sys/bus/{bus}/drivers/{driver}"
        folder.mkdir(parents=True, exist_ok=True)
        (place / "driver").symlink_to(folder)
    links = root / f"sys/kernel/iommu_groups/{group}/devices"
    links.mkdir(parents=True, exist_ok=True)
    (links / address).symlink_to(place)


def told(root):
    return {finding.topic: finding for finding in findings(hostinfo.read_host(root))}


def test_every_no_on_an_empty_host_says_what_to_do(host):
    found = findings(hostinfo.read_host(host[1]))
    assert [finding.topic for finding in found if finding.ok is False and not finding.advice] == []
    assert {finding.topic for finding in found if finding.ok is False} >= {
        "VFIO container", "iommufd", "IOMMU groups", "IOVA ranges", "huge pages", "userfaultfd"}


def test_group_with_host_driver_names_each_device_to_bind(host):
    add_device(host, 7, "0000:01:00.0", "ixgbe")
    add_device(host, 7, "0000:01:00.1", "vfio-pci")
    host[0]("sys/kernel/iommu_groups/7/reserved_regions", "0x00000000fee00000 0x00000000feefffff msi\n")
    group, = hostinfo.iommu_groups(host[1])
    assert [(d.address, d.driver, d.ids) for d in group.devices] == [
        ("0000:01:00.0", "ixgbe", "8086:10fb"), ("0000:01:00.1", "vfio-pci", "8086:10fb")]
    assert group.reserved == ((0xfee00000, 0xfeefffff, "msi"),) and not group.viable
    finding = told(host[1])["group 7"]
    assert finding.ok is False and "driverctl set-override 0000:01:00.0 vfio-pci" in finding.advice
    assert "01:00.1" not in finding.advice
    assert "0xfee00000-0xfeefffff msi" in told(host[1])["reserved IOVA"].value


def test_group_bound_to_vfio_with_its_node_is_usable(host):
    add_device(host, 7, "0000:01:00.0", "vfio-pci")
    host[0]("dev/vfio/7")
    assert told(host[1])["group 7"].ok is True


def test_the_vfio_driver_of_a_single_device_is_one(host):
    add_device(host, 7, "0000:01:00.0", "mlx5_vfio_pci")
    host[0]("dev/vfio/7")
    assert told(host[1])["group 7"].ok is True


def test_groups_are_ordered_by_number(host):
    for number in (10, 9, 100):
        add_device(host, number, f"0000:{number}:00.0")
    assert [group.number for group in hostinfo.iommu_groups(host[1])] == [9, 10, 100]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_node_without_permission_names_the_udev_rule(host):
    host[0]("dev/iommu").chmod(0)
    finding = told(host[1])["iommufd"]
    assert finding.ok is False and "udev" in finding.advice


def test_huge_pages_are_listed_by_size(host):
    for size, reserved, free in ((2048, 8, 3), (1048576, 0, 0)):
        host[0](f"sys/kernel/mm/hugepages/hugepages-{size}kB/nr_hugepages", str(reserved))
        host[0](f"sys/kernel/mm/hugepages/hugepages-{size}kB/free_hugepages", str(free))
    assert hostinfo.huge_pages(host[1]) == (
        hostinfo.HugePages(2 << 20, 8, 3), hostinfo.HugePages(1 << 30, 0, 0))
    found = told(host[1])
    assert found["huge pages 2 MiB"].ok and "1048576kB" in found["huge pages 1 GiB"].advice


def test_locked_memory_knows_what_is_used_and_who_is_exempt(host):
    assert hostinfo.locked_memory(host[1]).used == 8192
    assert not hostinfo.locked_memory(host[1]).cap_ipc_lock
    host[0]("proc/self/status", f"CapEff:\t{1 << hostinfo.CAP_IPC_LOCK:016x}\n")
    assert hostinfo.locked_memory(host[1]).cap_ipc_lock
    assert hostinfo.locked_memory(host[1]).available is None
    host[0]("proc/self/uid_map", "0 1000 1\n")       # root of a user namespace only
    assert not hostinfo.locked_memory(host[1]).cap_ipc_lock


def test_small_limit_of_locked_memory_is_a_no():
    host = hostinfo.read_host()
    small = hostinfo.LockedMemory(8 << 20, 8 << 20, 0, False)
    finding = {f.topic: f for f in findings(hostinfo.HostInfo(**{**host.__dict__, "locked": small}))}["locked memory"]
    assert finding.ok is False and "LimitMEMLOCK" in finding.advice and "8 MiB" in finding.value


def test_info_of_a_container_is_read_from_its_capabilities():
    # Laid out as Linux 7.2 answers: migration, DMA_AVAIL, two ranges.
    data = struct.pack("=IIQII", 120, 3, 0x40201000, 24, 0)
    data += struct.pack("=HHIIIQQ", vfio.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION, 1, 56, 0, 0, 0x1000, 1 << 28)
    data += struct.pack("=HHIII", vfio.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, 1, 72, 65535, 0)
    data += struct.pack("=HHIIIQQQQ", vfio.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, 1, 0, 2, 0,
                        0, 0xfedfffff, 0xfef00000, 2**64 - 1)
    info = hostinfo.parse_info(data, 5)
    assert info == hostinfo.ContainerInfo(
        5, 0x40201000, (IovaRange(0, 0xfedfffff), IovaRange(0xfef00000, 2**64 - 1)), 65535)


def test_chain_of_capabilities_that_loops_ends():
    data = struct.pack("=IIQII", 40, 3, 0x1000, 24, 0) + struct.pack("=HHIII", 3, 1, 24, 9, 0)
    assert hostinfo.parse_info(data, 0).dma_avail == 9


def test_container_is_not_opened_for_groups_in_use_by_the_host(host):
    add_device(host, 7, "0000:01:00.0", "ixgbe")
    host[0]("dev/vfio/7")
    assert hostinfo.container_info(hostinfo.iommu_groups(host[1])) == (None, "no IOMMU group is bound to a VFIO driver")


@pytest.mark.parametrize(("nbytes", "text"), [(0, "0 bytes"), (4096, "4 KiB"), (8 << 20, "8 MiB"), (None, "unlimited"),
                                              (3 << 29, "1.5 GiB")])
def test_amounts(nbytes, text):
    assert amount(nbytes) == text


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


MAIN = "import sys; sys.argv[0] = 'vfiodma'; from vfiodma.cli import main; main()"


def test_piped_output_is_plain_lines_and_json_is_one_object():
    plain = run(MAIN, "probe")
    assert plain.returncode == 0 and "\x1b" not in plain.stdout and "locked memory" in plain.stdout
    answer = json.loads(run(MAIN, "probe", "--json").stdout)
    assert answer["host"]["pgsize"] == os.sysconf("SC_PAGE_SIZE")
    assert all(finding["advice"] for finding in answer["findings"] if finding["ok"] is False)


def test_missing_extra_names_the_install_and_ends_with_2():
    result = run("import sys; sys.modules['typer'] = None; sys.argv[:] = ['vfiodma', 'probe']\n"
                 "from vfiodma.cli import main; main()")
    assert result.returncode == 2 and "pip install 'vfiodma[cli]'" in result.stderr
