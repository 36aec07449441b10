"""The oracle that the state machines compare with answers as recorded kernels did."""
import os

import pytest
from oracle.target import make_target

from .check import RECORDED, check

#: The oracle has no device registers and no file operations.
IMPOSSIBLE = frozenset({"process", "device", "dma", "file"})

# The oracle is what tests are made of: one kernel of it is enough each time, `make test-deep` looks at all.
DEEP = os.environ.get("VFIODMA_PROFILE") == "deep"


@pytest.mark.parametrize(("set_name", "kernel"), [row for row in RECORDED if DEEP or row[1] == "7.2"])
def test_oracle_answers_as_the_kernel_did(set_name, kernel):
    check(make_target(kernel, set_name), kernel, set_name, IMPOSSIBLE)
