"""``vfiodma migrate``: two processes, asked and cancelled from a third."""
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from postcopy_pair import skip_unless_permitted

from vfiodma.migration.events import Broken, PostcopyBegun, Resumed, Throttled, summary

VFIODMA = [sys.executable, "-m", "vfiodma", "migrate"]
pytest.importorskip("typer")
from vfiodma.cli.migrate import _words  # noqa: E402


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@contextlib.contextmanager
def started(*arguments):
    process = subprocess.Popen([*VFIODMA, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run(*arguments):
    return subprocess.run([*VFIODMA, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def objects(text):
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]     # no Infinity, no NaN


SMALL = ["--size", "8M", "--working-set", "1M", "--rate", "8M"]


def test_for_people_events_are_lines_in_words(runtime):
    url = f"unix:{runtime}/guest"
    with started("serve", url, "--run-for", "0.1") as there:
        there.stdout.readline()
        sent = run("send", url, *SMALL)
        assert sent.returncode == 0, sent.stderr
        assert there.wait(30) == 0
    assert re.search("^forecast: .*limit", sent.stdout, re.MULTILINE) and "event" not in sent.stdout, sent.stdout


@pytest.mark.parametrize("event, words", [
    (Broken(OSError("cut")), "trying to get another: cut"), (Resumed(2, 3000), "3,000 pages go again"),
    (Throttled(0.25), "slowed down by 25%"), (PostcopyBegun(5, "why"), "5 pages follow: why"),
])
def test_rare_events_have_words_too(event, words):
    assert words in _words(event)


def test_a_number_that_json_can_not_have_is_none():
    assert summary(Throttled(float("inf"))) == {"event": "throttled", "share": None}


@pytest.mark.parametrize("options", [[], ["--channels", "2", "--compression", "auto"]])
def test_a_guest_moves_from_one_process_to_another(runtime, options):
    url = f"unix:{runtime}/guest"
    with started("serve", url, "--json", "--run-for", "0.2", "--journal", runtime / "there") as there:
        assert json.loads(there.stdout.readline())["event"] == "listening"
        sent = run("send", url, *SMALL, "--seed", "7", "--json", "--journal", runtime / "here", *options)
        assert sent.returncode == 0, sent.stderr
        events = objects(sent.stdout)
        out, err = there.communicate(timeout=30)
        assert there.returncode == 0, err
    assert [event["name"] for event in events if event["event"] == "stage"][-1] == "given"
    assert events[-1]["event"] == "migrationresult" and events[-1]["rounds"][-1]["final"]
    verified, ran = objects(out)
    assert len(verified["sha256"]) == 64 and ran["writes"] > 0 and not ran["faults"]
    assert json.loads((runtime / "there").read_text())["phase"] == "OWNER"
    assert json.loads((runtime / "here").read_text())["state"] == "given"


def test_a_migration_is_asked_and_cancelled_and_both_sides_say_so(runtime):
    url = f"unix:{runtime}/guest"
    with started("serve", url) as there:
        assert "waiting at unix:" in there.stdout.readline()
        with started("send", url, *SMALL, "--bandwidth", "1M") as here:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                known = objects(run("status", "--json").stdout)
                if len(known) == 2 and any(each["total"] for each in known):
                    break
            source = next(each for each in known if each["role"] == "source")
            assert source["pid"] == here.pid and source["url"] == url and source["stage"] == "rounds"
            shown = run("status", here.pid)
            assert shown.returncode == 0 and re.search(r"round \d+:", shown.stdout)
            assert run("cancel", here.pid).returncode == 0
            _, err = here.communicate(timeout=20)
            assert here.returncode == 1 and "it was cancelled; the guest runs on here" in err
        _, err = there.communicate(timeout=20)
        assert there.returncode == 1 and "the source keeps the guest" in err
    gone = run("status")
    assert gone.returncode == 1 and "no migration of this user runs" in gone.stderr


def test_a_source_that_is_killed_leaves_a_destination_that_never_runs_the_guest(runtime):
    url = f"unix:{runtime}/guest"
    with started("serve", url, "--timeout", "1", "--reconnect", "1", "--journal", runtime / "there") as there:
        there.stdout.readline()
        with started("send", url, *SMALL, "--bandwidth", "1M") as here:
            deadline = time.monotonic() + 20
            while not (runtime / "there").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(here.pid, signal.SIGKILL)
            here.wait(10)
        there.wait(60)
        assert there.returncode == 1
    assert json.loads((runtime / "there").read_text())["phase"] == "RECEIVING"


@pytest.mark.parametrize("arguments, words", [
    (["send", "unix:/nowhere/socket", *SMALL], "unix:/nowhere/socket"),
    (["send", "nonsense", *SMALL], "none of unix:/path"),
    (["send", "tcp://192.0.2.1:9", *SMALL], "in the clear"),
    (["send", "unix:/nowhere/socket", *SMALL, "--checksum", "md5"], "a checksum is"),
    (["serve", "unix:/nowhere/socket"], "/nowhere/socket"),
    (["send", "unix:/" + "x" * 107, *SMALL], "at most 107 bytes"),
    (["serve", "tls://127.0.0.1:0"], "--certificate"),
    (["serve", "unix:/nowhere/socket", "--checksum", "md5"], "a checksum is"),
    (["serve", "unix:/nowhere/socket", "--compression", "rar"], "a compression is"),
    (["status", "/nowhere/socket"], "no migration answers"),
    (["cancel", "/nowhere/socket"], "no migration answers"),
])
def test_what_can_not_be_is_one_line_and_status_1(runtime, arguments, words):
    done = run(*arguments)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("arguments, words", [
    (["send", "unix:/nowhere/socket", *SMALL, "--plot", "/nowhere/a.png"], "no directory /nowhere"),
    (["send", "unix:/nowhere/socket", "--bandwidth", "fast"], "Invalid value for '--bandwidth'"),
    (["send", "unix:/nowhere/socket", *SMALL, "--journal", "/nowhere/journal"], "no directory /nowhere"),
    (["serve", "unix:/nowhere/socket", "--journal", "/nowhere/journal"], "no directory /nowhere"),
])
def test_options_that_can_not_be_are_refused_before_anybody_connects(runtime, arguments, words):
    done = run(*arguments)
    assert done.returncode == 2 and words in done.stderr, done.stderr


def test_a_port_that_was_chosen_and_a_socket_that_is_taken_are_told(runtime):
    with started("serve", "tcp://127.0.0.1:0") as there:
        assert re.match(r"waiting at tcp://127\.0\.0\.1:[1-9]\d* ", there.stdout.readline())
    (runtime / "guest").touch()
    done = run("serve", f"unix:{runtime}/guest")
    assert done.returncode == 1 and "remove the file if nobody listens" in done.stderr


def test_a_folder_for_sockets_that_can_not_be_made_comes_with_the_remedy(runtime, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime / "nowhere"))
    done = run("status")
    assert done.returncode == 1 and "set XDG_RUNTIME_DIR" in done.stderr


def test_somebody_elses_folder_is_not_trusted(runtime):
    (runtime / "vfiodma").mkdir(mode=0o777)
    (runtime / "vfiodma").chmod(0o777)
    done = run("status")
    assert done.returncode == 1 and "XDG_RUNTIME_DIR" in done.stderr


@pytest.mark.parametrize("rounds", ["0", "1"])
def test_a_guest_that_writes_too_fast_goes_on_there_before_its_memory_has_come(runtime, rounds):
    skip_unless_permitted()
    url = f"unix:{runtime}/guest"
    with started("serve", url, "--json", "--run-for", "0.2", "--postcopy") as there:
        assert json.loads(there.stdout.readline())["event"] == "listening"
        sent = run("send", url, *SMALL, "--json", "--postcopy-after", rounds, "--downtime", "1", "--bandwidth", "50M")
        assert sent.returncode == 0, sent.stderr
        out, err = there.communicate(timeout=30)
        assert there.returncode == 0, err
    late = objects(sent.stdout)[-1]["postcopy"]
    told = [event for event in objects(out) if event["event"] == "postcopydone"]
    assert told and told[0]["pages"] + told[0]["zero_pages"] == late["pages"] + late["zero_pages"] > 0
    with started("serve", url, "--json") as there:
        assert json.loads(there.stdout.readline())["event"] == "listening"
        refused = run("send", url, *SMALL, "--json", "--postcopy")
        assert refused.returncode == 1 and "postcopy" in refused.stderr
