"""Replay a set of scenarios in a test."""
import pytest

from . import runner

RECORDED = [("type1", "6.1"), ("type1", "6.12"), ("type1", "7.2"), ("emulated", "6.12"), ("emulated", "7.2"),
            ("found", "6.1"), ("found", "6.12"), ("found", "7.2")]


def check(target, kernel, set_name, skip_tags=frozenset(), only="*"):
    """Fail with every scenario and step that differs."""
    replayed, left_out, failures = 0, 0, []
    for row, reason, found in runner.replay(target, kernel, set_name, only, skip_tags):
        replayed, left_out = replayed + (not reason), left_out + bool(reason)
        if found:
            failures.append(runner.describe(row, found))
    print(f"{set_name} {kernel}: {replayed} replayed, {left_out} left out")
    assert not failures, f"{len(failures)} of {replayed} scenarios differ\n" + "\n".join(failures)
    if left_out and not replayed:
        pytest.skip("this process may not run any of them")
    assert replayed, "no scenario was replayed"
