"""Hypothesis profiles, chosen by VFIODMA_PROFILE: default, short (sanitizers), deep (`make test-deep`).

The default profile tries the same examples every time, so that a change and not luck turns a test red.  The others draw
new ones; the header of the run names the seed, and `--hypothesis-seed=SEED` repeats it.
"""
import os
import random

from hypothesis import HealthCheck, core, settings

COMMON = {"deadline": None, "print_blob": True,
          "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", settings(max_examples=100, stateful_step_count=50, derandomize=True, **COMMON))
settings.register_profile("short", settings(max_examples=20, stateful_step_count=30, **COMMON))
# 1,000 runs of 100 steps: 100,000 steps of each state machine.
settings.register_profile("deep", settings(max_examples=1000, stateful_step_count=100, **COMMON))
PROFILE = os.environ.get("VFIODMA_PROFILE", "default")
settings.load_profile(PROFILE)


def pytest_report_header(config):
    if PROFILE == "default":
        return "hypothesis: profile default, the same examples every time"
    if core.global_force_seed is None:
        core.global_force_seed = random.SystemRandom().randrange(1 << 32)
    return f"hypothesis: profile {PROFILE}, --hypothesis-seed={core.global_force_seed}"
