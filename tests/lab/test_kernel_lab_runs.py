"""Runs of the lab's command with a stand-in for QEMU: results, time limits, signals, what is left behind."""
import contextlib
import os
import pathlib
import signal
import subprocess
import time

import pytest
from kernel_lab import guest
from lab_fakes import fake_kernel

LAB = pathlib.Path(__file__).with_name("kernel-lab")

# Finds what the lab tells QEMU, then does $FAKE_QEMU as the guest would: boots, then the command with its streams.
QEMU = """#!/bin/bash
for word; do
    case $word in
        local,id=control,path=*) control=${word#*path=}; control=${control%%,sec*};;
        socket,id=stream1,fd=*) out=${word##*=};;
        socket,id=stream2,fd=*) err=${word##*=};;
        file:*) console=${word#file:};;
    esac
done
echo $$ >"$TMPDIR/qemu.pid"
eval "$FAKE_QEMU"
"""
BOOT = 'echo booting >"$console"; : >"$control/started"; '
RUN = BOOT + 'bash "$control/command" >&$out 2>&$err; echo $? >"$control/status"'


@pytest.fixture
def lab(tmp_path):
    """Return a function that starts the lab with a stand-in that does ``fake``."""
    fake_kernel(tmp_path / "cache")
    (tmp_path / "bin").mkdir()
    (tmp_path / "tmp").mkdir()
    for name, text in (("qemu-system-x86_64", QEMU), ("busybox", ""), ("depmod", "")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    started = []

    def start(fake, *arguments, stdout=subprocess.PIPE):
        environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "FAKE_QEMU": fake,
                       "TMPDIR": f"{tmp_path}/tmp", "CI": ""}
        started.append(subprocess.Popen([LAB, "--cache", tmp_path / "cache", *arguments], env=environment, text=True,
                                        stdout=stdout, stderr=subprocess.PIPE, cwd=tmp_path))
        return started[-1]

    yield start
    for process in started:
        with process:
            process.kill()


def finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def folders(tmp_path):
    return [path.name for path in (tmp_path / "tmp").glob(guest.PREFIX + "*")]


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def qemu_pid(tmp_path):
    path = tmp_path / "tmp/qemu.pid"
    wait_for(lambda: path.exists() and path.read_text().strip())
    return int(path.read_text())


@pytest.mark.parametrize("status", [0, 7, 255])
def test_output_and_status_are_those_of_the_command(lab, tmp_path, status):
    process = lab(RUN, "--", "sh", "-c", f"echo $KERNEL_LAB; pwd; echo wrong >&2; exit {status}")
    assert finish(process) == (status, f"6.12.1-amd64\n{tmp_path}\n", "wrong\n")
    assert folders(tmp_path) == []


def test_much_output_arrives_whole(lab):
    status, out, _ = finish(lab(RUN, "--", "seq", "200000"))
    assert status == 0 and out.splitlines() == [str(number) for number in range(1, 200001)]


def test_a_reader_that_goes_away_does_not_stop_the_command(lab):
    reader, writer = os.pipe()
    process = lab(RUN, "--", "sh", "-c", "seq 200000; exit 9", stdout=writer)
    os.close(writer)
    os.close(reader)
    assert finish(process)[::2] == (9, "")


def test_two_runs_at_the_same_time_keep_apart(lab, tmp_path):
    processes = [lab(RUN, "--", "sh", "-c", f"sleep 0.3; echo {number}") for number in range(2)]
    assert [finish(process)[:2] for process in processes] == [(0, "0\n"), (0, "1\n")]
    assert folders(tmp_path) == []


def test_the_time_limit_gives_124_and_what_came_until_then(lab, tmp_path):
    status, out, err = finish(lab(BOOT + "echo early >&$out; exec sleep 60", "--timeout", "1", "--", "true"))
    assert (status, out) == (124, "early\n")
    assert "no end after 1 seconds: stopped" in err and "booting" in err
    assert not running(qemu_pid(tmp_path)) and folders(tmp_path) == []


def test_a_kernel_that_does_not_boot_is_the_labs_failure(lab):
    status, _, err = finish(lab('echo hangs >"$console"; exec sleep 60', "--boot-timeout", "0.5", "--", "true"))
    assert status == 125
    assert "hangs" in err and "did not reach the command within 0.5 seconds" in err


def test_a_command_may_run_longer_than_booting_may(lab):
    process = lab(RUN, "--boot-timeout", "0.5", "--timeout", "0", "--", "sh", "-c", "sleep 1; exit 3")
    assert finish(process)[0] == 3


def test_an_oops_shows_the_end_of_the_console(lab, tmp_path):
    fake = BOOT + 'seq 100 >>"$console"; echo Kernel panic >>"$console"'
    status, out, err = finish(lab(fake, "--log", "console.log", "--", "true"))
    assert (status, out) == (125, "")
    assert "Kernel panic" in err and "the guest ended without a result\n" in err and "booting" not in err
    assert (tmp_path / "console.log").read_text().startswith("booting")


def test_a_qemu_that_refuses_its_arguments_is_told(lab):
    status, _, err = finish(lab("echo no such device >&2; exit 1", "--", "true"))
    assert status == 125
    assert "no such device" in err and "QEMU ended with status 1" in err


def test_a_qemu_that_crashes_is_told(lab):
    status, _, err = finish(lab("kill -SEGV $$", "--", "true"))
    assert status == 125 and "QEMU died of SIGSEGV" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_guest_and_leaves_nothing(lab, tmp_path, number):
    process = lab(BOOT + "exec sleep 60", "--", "true")
    pid = qemu_pid(tmp_path)
    wait_for(lambda: list((tmp_path / "tmp").glob("*/started")))
    process.send_signal(number)
    status, _, err = finish(process)
    assert status == 128 + number
    assert f"stopped by {number.name}" in err and "Traceback" not in err
    wait_for(lambda: not running(pid))
    assert folders(tmp_path) == []


def test_a_killed_lab_takes_the_guest_along_and_the_next_one_cleans_up(lab, tmp_path):
    process = lab(BOOT + "exec sleep 60", "--", "true")
    pid = qemu_pid(tmp_path)
    process.kill()
    finish(process)
    wait_for(lambda: not running(pid))
    left, = folders(tmp_path)
    os.utime(tmp_path / "tmp" / left, (0, 0))
    assert finish(lab(RUN, "--", "true"))[0] == 0
    assert folders(tmp_path) == []


def test_folders_in_use_or_new_are_not_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(guest.tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"{guest.PREFIX}new").mkdir()
    (tmp_path / f"{guest.PREFIX}file").write_text("")
    (tmp_path / f"{guest.PREFIX}link").symlink_to(tmp_path)
    (tmp_path / "other").mkdir()
    with guest.control_folder() as used:
        os.utime(used, (0, 0))
        guest.remove_stale_folders(tmp_path)
        assert used.exists()
    assert not used.exists()
    assert len(list(tmp_path.iterdir())) == 4
    guest.remove_stale_folders(tmp_path, grace=-60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", f"{guest.PREFIX}file", f"{guest.PREFIX}link"]


def test_what_the_lab_cannot_do_is_one_line(lab):
    for option, value, words in (("--out", "/proc/no", "/proc/no"), ("--kernel", "../up", "no name of a kernel")):
        status, out, err = finish(lab(RUN, option, value, "--", "true"))
        assert (status, out) == (125, "") and words in err and len(err.splitlines()) == 1


def test_a_folder_given_with_out_is_made(lab, tmp_path):
    with contextlib.chdir(tmp_path):
        assert finish(lab(RUN, "--out", "new/er", "--", "true"))[0] == 0
    assert (tmp_path / "new/er").is_dir()
