"""``vfiodma snapshot``: images in, the same images out; failures with words and status 1."""
import json
import os
import subprocess
import sys

PAGE = 4096


def run(*words):
    return subprocess.run([sys.executable, "-c", "from vfiodma.cli import main; main()", "snapshot", *map(str, words)],
                          capture_output=True, text=True)


def test_images_and_states_come_back_and_changes_cost_what_changed(tmp_path):
    low, high, state, path = (tmp_path / name for name in ("low", "high", "state", "guest"))
    low.write_bytes(os.urandom(8 * PAGE) + bytes(8 * PAGE))
    high.write_bytes(os.urandom(3 * PAGE))
    state.write_bytes(b"registers")
    images = [low, f"0x100000000:{high}", "--state", f"device={state}"]
    assert json.loads(run("save", path, *images, "--json").stdout)["written"] == 11 * PAGE
    with open(low, "r+b") as file:
        file.write(b"changed")
    assert json.loads(run("save", path, *images, "--changes", "--json").stdout)["written"] == PAGE
    shown = json.loads(run("show", path, "--verify", "--json").stdout)
    assert (shown["generation"], shown["pages"], shown["states"]) == (2, 11, {"device": 9})
    assert "block  0x0000000100000000  12 KiB" in run("show", path).stdout
    assert run("load", path, tmp_path / "out").returncode == 0
    assert (tmp_path / "out/memory-0x0.img").read_bytes() == low.read_bytes()
    assert (tmp_path / "out/memory-0x100000000.img").read_bytes() == high.read_bytes()
    assert (tmp_path / "out/state-device").read_bytes() == b"registers"
    again = run("load", path, tmp_path / "out")
    assert again.returncode == 1 and "File exists" in again.stderr
    assert (tmp_path / "out/memory-0x0.img").read_bytes() == low.read_bytes()


def test_a_damaged_snapshot_leaves_no_image(tmp_path):
    image, path = tmp_path / "image", tmp_path / "guest"
    image.write_bytes(os.urandom(2 * PAGE))
    assert run("save", path, image).returncode == 0
    with open(path, "r+b") as file:
        first = path.stat().st_size - (2 << 20)         # the areas end the file
        byte = os.pread(file.fileno(), 1, first)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), first)
    for words in (("show", path, "--verify"), ("load", path, tmp_path / "out")):
        done = run(*words)
        assert done.returncode == 1 and "is not what was saved" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_snapshot_that_is_not_there_leaves_no_folder(tmp_path):
    done = run("load", tmp_path / "none", tmp_path / "new/out")
    assert done.returncode == 1 and "No such file" in done.stderr
    assert os.listdir(tmp_path) == []


def test_an_image_that_is_not_whole_pages_or_not_there_is_refused(tmp_path):
    (tmp_path / "image").write_bytes(bytes(PAGE + 1))
    for name, words in (("image", "whole pages"), ("none", "No such file")):
        done = run("save", tmp_path / "guest", tmp_path / name)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "guest").exists()
