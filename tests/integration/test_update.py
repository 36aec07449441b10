"""`vfiodma update` as a user runs it."""
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "PYTHONWARNINGS": "error::ResourceWarning"}


def update(*options, code="from vfiodma.cli import main; main()"):
    return subprocess.run([sys.executable, "-c", code, "update", "--size", "8M", *map(str, options)],
                          capture_output=True, text=True, env=ENVIRONMENT, timeout=60, cwd=ROOT)


def test_every_byte_that_devices_write_is_there_after_each_update():
    done = update("--json", "--mappings", 500, "--times", 3, "--rate", "16M", "--seed", 5)
    assert done.returncode == 0 and done.stderr == ""
    summary = json.loads(done.stdout)
    assert summary["equal"] and summary["hand_over"]["equal"] and summary["dma"]["faults"] == 0
    assert len(summary["updates"]) == 3 and summary["seed"] == 5
    for took in summary["updates"]:
        assert took["mappings"] == 500
        assert took["total"] >= took["engine"] == took["invalidate"] + took["restore"] > 0
    assert summary["dma"]["writes"] > 100


def test_piped_it_prints_plain_lines():
    done = update("--mappings", 1, "--devices", 3, "--times", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("equal: every byte") and "\x1b" not in done.stdout


def test_a_byte_that_changed_is_exit_status_1():
    code = ("import vfiodma.cli.update as module; from vfiodma.cli import main; inner = module._is_what_was_written\n"
            "def damaged(memory, writers):\n    memory.write(0x5000, b'?' + memory.read(0x5000, 1) * 2)\n"
            "    return inner(memory, writers)\nmodule._is_what_was_written = damaged; main()")
    done = update("--mappings", 4, "--times", 1, "--seed", 1, code=code)
    assert done.returncode == 1 and "not what the devices wrote" in done.stderr and "equal:" not in done.stdout


def test_sizes_that_can_not_be_are_refused():
    for options in (("--size", "5000"), ("--mappings", 100_000), ("--size", "x")):
        assert update(*options).returncode == 2
