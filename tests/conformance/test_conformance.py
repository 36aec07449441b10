"""The software backend answers as recorded kernels did."""
import pytest

from .check import RECORDED, check
from .software_target import make_target

#: A container belongs to one process here; a register window cannot be mapped into memory.
IMPOSSIBLE = frozenset({"process", "device"})


@pytest.mark.parametrize(("set_name", "kernel"), RECORDED)
def test_answers_as_the_kernel_did(set_name, kernel):
    check(make_target(kernel, set_name), kernel, set_name, IMPOSSIBLE)


@pytest.mark.parametrize("kernel", ["6.12", "7.2"])
@pytest.mark.parametrize("set_name", ["iommufd", "found-iommufd"])
def test_iommufd_answers_as_the_kernel_did(set_name, kernel):
    check(make_target(kernel, set_name), kernel, set_name, IMPOSSIBLE)


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "7.2"])
def test_mlock_and_mappings_share_one_limit(kernel):
    check(make_target(kernel, "type1"), kernel, "type1", only="memlock/shares-with-mlock/*")
