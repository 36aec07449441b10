"""`vfiodma demo` as a user runs it: two processes, and the exit status."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

import vfiodma
from vfiodma.cli import main
from vfiodma.cli.destination import Destination
from vfiodma.errors import ProtocolError, VfioError
from vfiodma.migration.stream import Hello

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "PYTHONWARNINGS": "error::ResourceWarning"}
SMALL = ["--size", "16M", "--working-set", "2M"]


def demo(*options, script=("-m", "vfiodma")):
    return subprocess.run([sys.executable, *script, "demo", *map(str, options)], capture_output=True, text=True,
                          env=ENVIRONMENT, timeout=60, cwd=ROOT)


def test_the_command_tells_its_version(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vfiodma", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and capsys.readouterr().out == f"vfiodma {vfiodma.__version__}\n"


def test_memory_is_equal_for_several_seeds_and_rates():
    for seed, rate, devices in ((1, "8M", 1), (2, "64M", 2), (3, "0", 3)):
        done = demo(*SMALL, "--json", "--seed", seed, "--rate", rate, "--devices", devices)
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        assert summary["equal"] and summary["sha256"]["source"] == summary["sha256"]["destination"]
        assert summary["seed"] == seed and summary["size"] == 16 << 20
        assert sum(r["pages"] + r["zero_pages"] for r in summary["rounds"][:1]) == 4096
        assert [r["final"] for r in summary["rounds"]][-2:] == [False, True]
        assert summary["rounds"][-1]["dirty_pages"] == 0
        assert summary["dma"]["faults"] == summary["destination"]["faults"] == 0
        assert bool(summary["destination"]["writes"]) == bool(summary["dma"]["writes"]) == (rate != "0")
        assert summary["destination"]["sha256"] == summary["sha256"]["source"]
        assert summary["vaddr_update"]["mappings"] == 8
        assert done.stderr == ""


def test_piped_it_prints_plain_lines_and_draws_its_picture(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"a small image that is repeated")
    done = demo(*SMALL, "--image", image, "--plot", tmp_path / "rounds.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "equal: not one byte was lost"
    assert f"memory filled from {image}" in done.stdout and "stop-and-copy" in done.stdout
    assert "\x1b" not in done.stdout
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")


def test_one_byte_that_differs_is_exit_status_1_and_the_devices_stay_held_back():
    done = demo(*SMALL, "--json", script=(ROOT / "tests/integration/corrupting_demo.py",))
    assert done.returncode == 1
    assert "memory of both processes differs" in done.stderr
    summary = json.loads(done.stdout)
    assert not summary["equal"] and summary["destination"] is None


def test_a_machine_that_writes_too_fast_ends_at_max_rounds_and_says_so():
    done = demo("--size", "32M", "--working-set", "16M", "--rate", "4G", "--downtime", "1", "--max-rounds", 3)
    assert done.returncode == 0, done.stderr
    assert "did not converge in 3 rounds" in done.stdout
    assert done.stdout.splitlines()[-1] == "equal: not one byte was lost"


@pytest.mark.parametrize("killed", ["destination", "source"])
def test_when_one_process_is_killed_the_other_ends_with_status_1_and_claims_nothing(killed):
    source = subprocess.Popen([sys.executable, "-m", "vfiodma", "demo", "--size", "512M"], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT)
    children, deadline = Path(f"/proc/{source.pid}/task/{source.pid}/children"), time.monotonic() + 20
    while not (child := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert source.stdout.readline().startswith("memory filled")
    os.kill(int(child[0]) if killed == "destination" else source.pid, signal.SIGKILL)
    stdout, stderr = source.communicate(timeout=30)
    assert "equal" not in stdout
    if killed == "destination":
        assert source.returncode == 1
        assert stderr.startswith("vfiodma: ") and "Traceback" not in stderr
    else:
        assert source.returncode == -signal.SIGKILL
        assert "vfiodma demo, destination: " in stderr and "Traceback" not in stderr


@pytest.mark.parametrize("options, words", [
    (["--size", "12X"], "is not a size"),
    (["--size", "1000000"], "whole pages"),
    (["--size", "4K"], "at least 1M"),
    (["--size", "1000T"], "of memory are available"),
    (["--size", "16M", "--working-set", "17M"], "at most the memory's"),
    (["--size", "9" * 400], "is too much"),
    (["--rate", "9000000T"], "is too much"),
    (["--seed", str(1 << 63)], "Invalid value for '--seed'"),
    (["--image", "/does/not/exist"], "does not exist"),
    (["--devices", "0"], "Invalid value for '--devices'"),
    (["--downtime", "0"], "Invalid value for '--downtime'"),
    (["--plot", "/does/not/exist/a.png"], "no directory"),
    (["--plot", "a.gift"], "a.gift is none of *.png"),
])
def test_options_that_can_not_be_are_refused_at_once(options, words):
    done = demo(*options)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.replace("│", "").split())


def test_an_empty_image_is_an_error(tmp_path):
    (tmp_path / "empty").touch()
    done = demo(*SMALL, "--image", tmp_path / "empty")
    assert done.returncode == 1
    assert "has no bytes to fill memory with" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"devices": 3}', b'{"devices": [], "mappings": [[1]]}',
                                  pytest.param(b"[" * 100_000, id="deep")])
def test_an_address_space_that_makes_no_sense_is_a_protocol_error(data):
    destination = Destination(1 << 20)
    with contextlib.closing(destination):
        destination.make_memory(Hello(4096, bytes(16), ((0, 1 << 20),)))
        destination.take_state("address space", data)
        with pytest.raises(ProtocolError, match="address space makes no sense"):
            destination.get_ready()


def test_another_stream_gets_its_own_memory_and_mappings():
    plan = b'{"devices": ["0000:00:10.0"], "mappings": [[0, 0, 1048576]]}'
    with contextlib.closing(Destination(1 << 20)) as destination:
        for stream_id in (bytes(16), b"b" * 16):
            memory = destination.make_memory(Hello(4096, stream_id, ((0, 1 << 20),)))
            destination.take_state("address space", plan)
            destination.prepare()
            assert destination.ioas.translate(0) == memory.region.vaddr


def test_devices_without_state_and_other_memory_are_refused():
    destination = Destination(1 << 20)
    with contextlib.closing(destination):
        with pytest.raises(VfioError, match="announced on the command line"):
            destination.make_memory(Hello(4096, bytes(16), ((0, 1 << 60),)))
        destination.make_memory(Hello(4096, bytes(16), ((0, 1 << 20),)))
        with pytest.raises(ProtocolError, match="mappings did not come"):
            destination.get_ready()
        destination.take_state("address space", b'{"devices": ["0000:00:10.0"], "mappings": []}')
        with pytest.raises(ProtocolError, match="state of 0000:00:10.0 did not come"):
            destination.get_ready()
        destination.take_state("0000:00:10.0", b'{"rate": 1, "seed": 1}')
        with pytest.raises(VfioError, match="damaged, or of another device"):
            destination.get_ready()


def test_ctrl_c_while_modules_are_imported_is_status_130():
    with mock.patch("vfiodma.cli._app", side_effect=KeyboardInterrupt), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


def test_ctrl_c_at_a_terminal_ends_both_processes_without_a_word():
    # Whatever runs the tests may have SIGINT ignored, as shells do in the background.
    source = subprocess.Popen([sys.executable, "-m", "vfiodma", "demo", "--size", "256M"], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT, start_new_session=True,
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while "vaddr update" not in source.stdout.readline():
        assert source.poll() is None
    os.killpg(source.pid, signal.SIGINT)
    _, errors = source.communicate(timeout=30)  # which ends when the destination has closed them as well
    assert source.returncode == 130 and not errors, errors
