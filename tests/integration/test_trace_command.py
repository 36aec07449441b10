"""`vfiodma trace` as a user runs it, and the pictures."""
import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace
from unittest import mock

import pytest

from vfiodma.cli import main
from vfiodma.cli.plot import plot_migration
from vfiodma.migration.convergence import DowntimeBreakdown
from vfiodma.migration.events import MigrationResult, Round


def trace(*options, cwd):
    """Run the command in this process, as its entry point does."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            mock.patch.object(sys, "argv", ["vfiodma", "trace", *map(str, options)]):
        try:
            main()
        except SystemExit as exc:
            status = exc.code or 0
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    done = trace("record", "trace.jsonl", "--size", "16M", "--working-set", "2M", "--rate", "64M", "--seconds", "0.4",
                 "--seed", 1, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_a_recording_says_what_it_holds_and_show_says_the_same(recorded):
    folder, summary = recorded
    assert summary["size"] == 16 << 20 and summary["intervals"] >= 2 and summary["seconds"] >= 0.4
    assert 0 < summary["unique_pages"] <= 2 * (2 << 20) // 4096
    done = trace("show", "trace.jsonl", "--json", "--plot", "writes.png", cwd=folder)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert {name: shown[name] for name in ("runs", "unique_pages", "dirty_rate", "fit")} == \
        {name: summary[name] for name in ("runs", "unique_pages", "dirty_rate", "fit")}
    assert shown["over_time"][-1]["unique_pages"] == summary["unique_pages"]
    assert (folder / "writes.png").read_bytes().startswith(b"\x89PNG")
    plain = trace("show", "trace.jsonl", cwd=folder)
    assert plain.returncode == 0 and "working set" in plain.stdout and "\x1b" not in plain.stdout


def test_a_replay_compares_links_and_draws_the_first(recorded):
    folder, _ = recorded
    done = trace("replay", "trace.jsonl", "-b", "1G", "-b", "1M", "--downtime", 20, "--plot", "rounds.svg", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "within the limit" in done.stdout and "ABOVE the limit" in done.stdout
    assert (folder / "rounds.svg").read_text().startswith("<?xml")
    done = trace("replay", "trace.jsonl", "-b", "1M", "--on-timeout", "cancel", "--json", cwd=folder)
    one, = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["replays"]
    assert one["step"] == "cancel" and not one["within_limit"] and not one["result"]["rounds"][-1]["final"]


@pytest.mark.parametrize("options, words, status", [
    (["replay", "trace.jsonl", "-b", "0"], "nothing moves", 2),
    (["replay", "trace.jsonl", "-b", "fast"], "is not a size", 2),
    (["replay", "none.jsonl", "-b", "1G"], "does not exist", 2),
    (["replay", "trace.jsonl", "-b", "1G", "--on-timeout", "explode"], "on_timeout", 1),
    (["show", "broken"], "not a dirty trace", 1),
    (["record", "/does/not/exist/trace.jsonl"], "no directory", 2),
    (["show", "trace.jsonl", "--plot", "/does/not/exist/a.png"], "no directory", 2),
])
def test_what_can_not_be_is_refused_in_words(options, words, status, recorded):
    folder, _ = recorded
    (folder / "broken").write_bytes(b"\0\xff not a trace")
    done = trace(*options, cwd=folder)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert words in " ".join(done.stderr.replace("│", "").split())


def test_a_full_disk_is_an_error_of_one_line_and_the_old_trace_stays(recorded, tmp_path):
    words = "trace record trace.jsonl --size 16M --working-set 8M --rate 256M --seconds 0.4"
    call = f"mount -t tmpfs -o size=64k none {tmp_path} && cd {tmp_path} && head -c 40000 /dev/zero > ballast && " \
           f"echo old > trace.jsonl && {sys.executable} -m vfiodma {words}; echo status $?; cat trace.jsonl; ls -A"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", call], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no file system of its own: {done.stderr.strip()}")
    assert done.stdout.split() == ["status", "1", "old", "ballast", "trace.jsonl"]
    assert done.stderr == "vfiodma: [Errno 28] write_trace: No space left on device; trace.jsonl is as it was\n"


@pytest.mark.parametrize("rounds", [0, 1, 40])
def test_results_of_any_length_are_drawn(rounds, tmp_path):
    done = [Round(n, 100 - n, 0, 4096 * (100 - n), 0.01, 0, 4e7, 0.02, False, (0.01, 0.03), 0.05, 1e6)
            for n in range(rounds)] + [Round(rounds, 0, 0, 0, 0.0, 0, 0.0, None, final=True)]
    result = MigrationResult(done, 0.02, 0.02, (0.01, 0.03), 0.05, DowntimeBreakdown(0.001, send=0.019), bytes=1,
                             seconds=1.0)
    plot_migration(asdict(result), tmp_path / "a.png")
    plot_migration(json.loads(json.dumps(asdict(MigrationResult(done)))), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
