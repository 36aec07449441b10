"""The running kernel answers as the recorded one did: the recordings, the runner and the guest fit together."""
import os
import pathlib
import re
import resource
import subprocess

import pytest
from conformance import runner

RELEASE = re.match(r"\d+\.\d+", os.environ.get("KERNEL_LAB", "0.0"))[0]
IOMMU = "intel_iommu=off" not in pathlib.Path("/proc/cmdline").read_text()
TYPE1, EMULATED, IOMMUFD = (runner.load(name) for name in ("type1", "emulated", "iommufd"))
needs_iommufd = pytest.mark.skipif(not os.path.exists("/dev/iommu"), reason="this kernel has no iommufd")


@pytest.fixture(autouse=True)
def unlimited_hard_memlock():
    """The limits of the recorded machine; its soft one is set by the runner."""
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (before[0], resource.RLIM_INFINITY))
    yield
    resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


@pytest.fixture
def mediated():
    """A sample mediated device, gone afterwards: others make the same."""
    if subprocess.run(["modprobe", "-q", "mtty"]).returncode:
        pytest.skip("this kernel has no sample mediated devices")
    path = runner.mediated_device()
    yield
    pathlib.Path(path, "remove").write_text("1")


def part(row):
    return row["name"].split("/")[0]


def parts(rows):
    return list(dict.fromkeys(map(part, rows)))


#: The mock IOMMU of 7.2 reports a block of physically contiguous pages as one: the answer depends on where pages lie.
BY_CHANCE = {("7.2", "mock/dirty-page-sizes")}


def possible(row):
    """Tell whether this boot is the one that a scenario was recorded in."""
    if (RELEASE, row["name"]) in BY_CHANCE:
        return False
    if "mock" not in row["tags"]:
        return IOMMU
    return RELEASE != "6.12" or not IOMMU       # 6.12 has the mock IOMMU only without a real one


def check(rows):
    rows = [row for row in rows if RELEASE in row["answers"] and possible(row)]
    if not rows:
        pytest.skip(f"nothing recorded for {RELEASE} in this boot")
    target, failures = runner.Kernel(), []
    for row in rows:
        found = list(runner.differences(row["answers"][RELEASE], runner.run_isolated(target, row)))
        if found:
            failures.append(runner.describe(row, found))
    assert not failures, f"{len(failures)} of {len(rows)} scenarios differ\n" + "\n".join(failures)


@pytest.mark.short
@pytest.mark.parametrize("rows", [pytest.param(TYPE1, id="type1"),
                                  pytest.param(IOMMUFD, id="iommufd", marks=needs_iommufd)])
def test_a_sample(rows):
    """The first scenario of every part, and every thirtieth."""
    firsts = {part(row): row for row in reversed(rows)}
    check([row for index, row in enumerate(rows) if index % 30 == 0 or firsts[part(row)] is row])


@pytest.mark.parametrize("name", parts(TYPE1))
def test_type1(name):
    check([row for row in TYPE1 if part(row) == name])


@pytest.mark.parametrize("name", parts(EMULATED))
@pytest.mark.usefixtures("mediated")
def test_emulated(name):
    check([row for row in EMULATED if part(row) == name])


@needs_iommufd
@pytest.mark.mock
@pytest.mark.parametrize("name", parts(IOMMUFD))
def test_iommufd(name):
    check([row for row in IOMMUFD if part(row) == name])
