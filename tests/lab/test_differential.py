"""The model against real kernels over random scripts: a few hundred here, `make fuzz` plays any number."""
import os
import shutil

import pytest
from fuzz import fuzz
from kernel_lab import cli, kernels

CAP_IPC_LOCK = 14


def reason_to_skip(kernel):
    if os.environ.get("LAB") == "off":
        return "LAB=off"
    if not shutil.which("qemu-system-x86_64"):
        return "QEMU is not installed: `make lab-prepare` as root installs it"
    if kernel not in {found.name for found in kernels.cached(cli.DEFAULT_CACHE.expanduser())}:
        return f"there is no kernel {kernel} in the cache: `make lab-prepare` makes it"
    with open("/proc/self/status") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    if not effective >> CAP_IPC_LOCK & 1:
        return "needs CAP_IPC_LOCK, as the kernel's side has it"
    return None


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kernel", ["6.12", "6.1", "7.2"])
def test_random_scripts_get_the_same_answers(kernel):
    reason = reason_to_skip(kernel)
    if reason:
        pytest.skip(reason)
    for difference in fuzz(kernel, "short", 300, batch=100):
        pytest.fail(f"kernel and model differ\n{difference}")
