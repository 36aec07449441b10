"""The oracle that the state machines compare with answers as recorded kernels did."""
import pytest
from oracle.target import make_target

from .check import RECORDED, check

#: The oracle has no device registers and no file operations.
IMPOSSIBLE = frozenset({"process", "device", "dma", "file"})


@pytest.mark.parametrize(("set_name", "kernel"), RECORDED)
def test_oracle_answers_as_the_kernel_did(set_name, kernel):
    check(make_target(kernel, set_name), kernel, set_name, IMPOSSIBLE)
