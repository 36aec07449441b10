"""The runner of the guest tests: which kernels, and what counts as a success."""
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import run_guests as run
from kernel_lab import host
from lab_fakes import fake_kernel

JUNIT = '<testsuites><testsuite name="pytest" errors="{}" failures="{}" skipped="{}" tests="{}"/></testsuites>'


@pytest.fixture
def fake_lab(tmp_path, monkeypatch):
    """Return a function that replaces kernel-lab by a script, and the file that holds the calls."""
    monkeypatch.setattr(run, "HERE", tmp_path / "tests/lab")
    monkeypatch.setattr(host, "missing_packages", lambda packages: [])
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.chdir(tmp_path)
    run.HERE.mkdir(parents=True)

    def make(script):
        path = run.HERE / "kernel-lab"
        path.write_text(f'#!/bin/bash\necho "$*" >>{tmp_path}/calls\n'
                        f'for word; do case $word in --out=*) out=${{word#*=}};; esac; done\n{script}\n')
        path.chmod(0o755)
        return tmp_path / "calls"

    return make


def results(errors=0, failures=0, skipped=0, tests=5):
    return f"echo '{JUNIT.format(errors, failures, skipped, tests)}' >$out/junit.xml"


def test_results_are_counted(tmp_path):
    path = tmp_path / "junit.xml"
    assert run.counts(path) is None
    path.write_text("<testsuites><testsuite")
    assert run.counts(path) is None
    path.write_text(JUNIT.format(1, 2, 3, 10))
    assert run.counts(path) == (7, 3, 3)


@pytest.mark.parametrize(("status", "found", "well", "words"), [
    (0, (5, 0, 2), True, "5 ran, 0 failed, 2 skipped"),
    (1, (5, 1, 0), False, "5 ran, 1 failed"),
    (0, (5, 1, 0), False, "5 ran, 1 failed"),
    (0, (0, 0, 9), False, "no test ran"),
    (5, (0, 0, 0), False, "no test ran"),
    (0, None, False, "no results"),
    (2, (0, 0, 0), False, "pytest ended with status 2"),
    (139, None, False, "pytest ended with status 139"),
    (124, None, False, "time limit; no results"),
    (125, None, False, "the lab failed"),
])
def test_success_means_that_tests_ran_and_none_failed(status, found, well, words):
    told = run.outcome(status, found)
    assert told[0] is well and words in told[1]


def test_a_failure_does_not_hide_the_kernels_after_it(tmp_path, fake_lab, capfd):
    calls = fake_lab('case "$*" in *"--kernel 6.1 "*) exit 125;;\n'
                     f'*"--kernel 7.2 "*) {results(failures=1)}; exit 1;; esac\n{results()}')
    names = ["6.1", "7.2", "6.12-iommufd+intel_iommu=off"]
    assert run.main(["--cache", str(tmp_path), *names, "--", "-k", "some"], "") == 1
    out = capfd.readouterr().out
    assert "FAIL  6.1 " in out and "the lab failed" in out
    assert "FAIL  7.2 " in out and "5 ran, 1 failed" in out
    assert "ok    6.12-iommufd+intel_iommu=off" in out
    last = calls.read_text().splitlines()[2]
    assert "--kernel 6.12-iommufd " in last and " --append=intel_iommu=off " in last and last.endswith("-k some")
    assert "--install" not in last


def test_an_interrupt_stops_the_guest_and_the_loop(tmp_path, fake_lab):
    calls = fake_lab(f'case "$*" in *"--kernel 6.1 "*) {results()}; exit;; esac\n'
                     f"trap 'kill $!; echo cleaned up >{tmp_path}/end; exit 143' TERM\n"
                     f"sleep 60 >/dev/null & : >{tmp_path}/started; wait")
    script = ("import pathlib, sys; sys.path[:0] = sys.argv[1:2]; import run_guests as run; "
              "run.HERE = pathlib.Path(sys.argv[2]); sys.exit(run.main(sys.argv[3:], ''))")
    process = subprocess.Popen([sys.executable, "-c", script, pathlib.Path(run.__file__).parent, run.HERE, "--cache",
                                tmp_path, "6.1", "6.12", "7.2"], stdout=subprocess.PIPE, text=True)
    with process:
        while not (tmp_path / "started").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and (tmp_path / "end").read_text() == "cleaned up\n"
    assert "ok    6.1 " in out and "FAIL  6.12                          stopped" in out
    assert len(calls.read_text().splitlines()) == 2


def test_old_results_do_not_count(tmp_path, fake_lab):
    fake_lab(results())
    assert run.main(["--cache", str(tmp_path), "6.1"], "") == 0
    fake_lab("true")
    assert run.main(["--cache", str(tmp_path), "6.1"], "") == 1


def test_the_default_is_what_is_cached(tmp_path, fake_lab, capfd):
    calls = fake_lab(results())
    for name in ("6.1", "6.12-iommufd", "5.10"):
        fake_kernel(tmp_path, name)
    assert run.main(["--cache", str(tmp_path)], "") == 0
    out = capfd.readouterr().out
    assert [line.split()[1] for line in calls.read_text().splitlines()] == ["6.1", "6.12-iommufd", "6.12-iommufd"]
    assert "skip  7.2-iommufd" in out and "not in the cache" in out


def test_without_any_cached_kernel_one_is_fetched(tmp_path, fake_lab):
    calls = fake_lab(results())
    assert run.main(["--cache", str(tmp_path)], "") == 0
    assert [line.split()[1] for line in calls.read_text().splitlines()] == ["6.12"]


def test_full_means_all_kernels_and_may_install(tmp_path, fake_lab):
    calls = fake_lab(results())
    assert run.main(["--cache", str(tmp_path)], "full") == 0
    lines = calls.read_text().splitlines()
    assert {line.split()[1] for line in lines} == {"6.1", "6.12", "7.2", "6.12-iommufd", "7.2-iommufd"}
    assert all("--install" in line for line in lines)


def test_preparing_only_prepares(tmp_path, fake_lab):
    calls = fake_lab("true")
    assert run.main(["--cache", str(tmp_path), "--prepare"], "") == 0
    lines = calls.read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["6.1", "6.12", "7.2"]
    assert all(line.endswith("--install --prepare") for line in lines)
    fake_lab("exit 125")
    assert run.main(["--cache", str(tmp_path), "--prepare", "6.1"], "") == 1


def test_the_short_stage_says_why_it_is_left_out(tmp_path, fake_lab, monkeypatch, capfd):
    calls = fake_lab(results())
    short = ["--short", "--cache", str(tmp_path)]
    assert run.main(short, "off") == 0
    assert capfd.readouterr().out == "kernel lab: skipped, LAB=off\n"
    monkeypatch.setattr(host, "missing_packages", lambda packages: ["qemu-system-x86"])
    assert run.main(short, "") == 0
    assert "kernel lab: skipped, not installed: qemu-system-x86; " in capfd.readouterr().out
    assert not calls.exists()


def test_the_short_stage_needs_no_network(tmp_path, fake_lab, capfd, monkeypatch):
    fake_lab("exit 125")
    short = ["--short", "--cache", str(tmp_path / "cache")]
    assert run.main(short, "") == 0
    assert "kernel lab: skipped, there is no kernel 6.12" in capfd.readouterr().out
    assert run.main(short, "on") == 1
    fake_kernel(tmp_path / "cache")
    assert run.main(short, "") == 1


def test_the_short_stage_installs_where_it_may(tmp_path, fake_lab, monkeypatch):
    calls = fake_lab(results())
    monkeypatch.setattr(host, "missing_packages", lambda packages: ["qemu-system-x86"])
    monkeypatch.setattr(run.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(run.os, "geteuid", lambda: 0)
    monkeypatch.setenv("CI", "true")
    assert run.main(["--short", "--cache", str(tmp_path)], "") == 0
    line, = calls.read_text().splitlines()
    assert "--install" in line and line.endswith("-m short") and "--kernel 6.12 " in line


def test_the_lab_is_where_the_runner_looks():
    assert (pathlib.Path(run.__file__).parent / "kernel-lab").is_file()
