"""Hypothesis profiles, chosen by VFIODMA_PROFILE: default, short (sanitizers), deep (`make test-deep`)."""
import os

from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "print_blob": True,
          "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", settings(max_examples=100, stateful_step_count=50, **COMMON))
settings.register_profile("short", settings(max_examples=20, stateful_step_count=30, **COMMON))
# 1,000 runs of 100 steps: 100,000 steps of each state machine.
settings.register_profile("deep", settings(max_examples=1000, stateful_step_count=100, **COMMON))
settings.load_profile(os.environ.get("VFIODMA_PROFILE", "default"))
