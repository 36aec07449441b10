"""Tests in guest/ run inside a kernel of the lab; everywhere else they are skipped.

Those marked `short` are run by `make test` too, all of them by `make lab`.  In a boot without an IOMMU, which the
self-test IOMMU of Linux 6.12 wants, only those marked `mock` run.
"""
import os
import pathlib

import pytest

GUEST = pathlib.Path(__file__).with_name("guest")


def pytest_collection_modifyitems(items):
    outside = pytest.mark.skip(reason="runs in a guest of the kernel lab: make lab")
    without = pytest.mark.skip(reason="this boot has no IOMMU before the devices")
    has_iommu = any(pathlib.Path("/sys/kernel/iommu_groups").glob("*"))
    for item in items:
        if item.path.is_relative_to(GUEST):
            item.add_marker("lab")
            if "KERNEL_LAB" not in os.environ:
                item.add_marker(outside)
            elif not has_iommu and not item.get_closest_marker("mock"):
                item.add_marker(without)
