"""Snapshots under failures: full disks, errors at every write, kills, damaged files.  Never wrong bytes.

The counts are printed: ``pytest -rP``.
"""
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from vfiodma import DirtyBitmap, GuestMemory
from vfiodma.errors import SnapshotError
from vfiodma.migration import snapshot_format
from vfiodma.migration.snapshot import inspect, load, save
from vfiodma.migration.snapshot_file import File

PAGE = 4096
SIZE = 64 * PAGE
ROOT = Path(__file__).parents[2]
DEEP = os.environ.get("VFIODMA_PROFILE") == "deep"


@pytest.fixture
def memory():
    with GuestMemory.memfd(SIZE) as memory:
        memory.write(0, random.Random(1).randbytes(SIZE // 2))
        yield memory


def loaded(path):
    memory, states = load(path)
    with memory:
        return memory.read(0, SIZE), states


def change(memory, seed):
    """Change pages: content, to zeros, from zeros."""
    dirty = DirtyBitmap(64, PAGE)
    for page in random.Random(seed).sample(range(64), 20):
        memory.write(page * PAGE, bytes(PAGE) if page % 3 == 0 else random.Random(seed + page).randbytes(PAGE))
        dirty.set(page)
    return dirty


@pytest.mark.parametrize("partial", [False, True], ids=["all", "changes"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failure_at_any_step_leaves_the_older_snapshot_and_nothing_else(tmp_path, memory, monkeypatch, partial,
                                                                          number):
    path, steps = tmp_path / "guest", ["write", "write_pages", "resize", "sync", "rename", "sync_directory"]
    held = save(memory, path, states={"a": b"old"})
    old = loaded(path)
    real = {name: getattr(File, name) for name in steps}
    count, at, tried = [0], [0], 0

    def failing(name):
        def step(self, *args):
            count[0] += 1
            if count[0] == at[0]:
                if name == "write":         # short, and then no more
                    real["write"](self, args[0], bytes(args[1])[:len(bytes(args[1])) // 2] if args[0] else b"")
                with self.failing(name):
                    raise OSError(number, os.strerror(number))
            return real[name](self, *args)
        return step

    for name in steps:
        monkeypatch.setattr(File, name, failing(name))
    dirty = change(memory, 5)
    while True:
        count[0], at[0] = 0, at[0] + 1
        try:
            save(memory, path, states={"a": b"new"}, **({"dirty": dirty, "since": held} if partial else {}))
        except SnapshotError as exc:
            assert exc.errno == number
            tried += 1
            assert os.listdir(tmp_path) == ["guest"]
            if "if the machine" in exc.hint:        # the very last step: it has the name already
                assert loaded(path)[1] == {"a": b"new"}
            else:
                assert loaded(path) == old
            continue
        break
    assert loaded(path) == (memory.read(0, SIZE), {"a": b"new"})
    assert tried >= 6
    print(f"{tried} steps failed with {errno.errorcode[number]}")


@pytest.mark.parametrize("partial", [False, True], ids=["all", "changes"])
def test_a_limit_of_the_file_size_is_told_as_such(tmp_path, memory, partial):
    path = tmp_path / "guest"
    held = save(memory, path)
    old = loaded(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    dirty = change(memory, 3)
    for limit in (0, PAGE, 1 << 20, path.stat().st_size - PAGE if not partial else 2 << 20):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(SnapshotError) as failed:
                save(memory, path, **({"dirty": dirty, "since": held} if partial else {}))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert failed.value.errno == errno.EFBIG
        assert loaded(path) == old and os.listdir(tmp_path) == ["guest"]


FULL_DISK = """
import errno, os, random, sys
from vfiodma import DirtyBitmap, GuestMemory
from vfiodma.errors import SnapshotError
from vfiodma.migration.snapshot import load, save
folder, size = sys.argv[1], 4 << 20
path = folder + "/guest"
with GuestMemory.memfd(size) as memory:
    memory.write(0, random.Random(1).randbytes(1 << 20))
    held = save(memory, path)
    old = memory.read(0, size)
    free = os.statvfs(folder).f_bavail
    memory.write(0, random.Random(2).randbytes(size))
    dirty = DirtyBitmap(size >> 12, 4096)
    dirty.set(0, size >> 12)
    for how in ({}, {"dirty": dirty, "since": held}):
        try:
            save(memory, path, **how)
        except SnapshotError as exc:
            assert exc.errno == errno.ENOSPC, exc
        else:
            raise SystemExit("the disk should have been full")
        again, _ = load(path)
        with again:
            assert again.read(0, size) == old
        assert os.listdir(folder) == ["guest"]
        assert os.statvfs(folder).f_bavail >= free - 16, (free, os.statvfs(folder).f_bavail)
"""


def test_a_full_disk(tmp_path):
    mount = f"mount -t tmpfs -o size=3m none {tmp_path} && exec {sys.executable} -c '{FULL_DISK}' {tmp_path}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, text=True)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no file system of its own: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


SPARSE = """
import resource, sys, time, zlib
from vfiodma.errors import SnapshotError
from vfiodma.migration import snapshot, snapshot_format as file_format
from vfiodma.migration.snapshot_file import File, opened
path, right = sys.argv[1], sys.argv[2] == "right"
where = file_format.places(4096, ((0, 64 << 30),))          # its table has 132 MiB, all of it a hole
head, rest, summed = file_format.encode_table_head(where, b""), where.nbits * 8 + where.nbits // 8, 0
summed = zlib.crc32(head)
for _ in range(rest >> 16):
    summed = zlib.crc32(bytes(1 << 16), summed)
header = file_format.Header(4096, 1, 0, 0, summed ^ (not right), 0, where.capacity, bytes(16), bytes(64))
with open(path, "wb") as file:
    file.write(file_format.encode_header(header))
    file.seek(where.table_offset(0))
    file.write(head)
    file.truncate(where.file_size)
with snapshot.GuestMemory.memfd(4096) as memory:            # warm: libraries are loaded
    snapshot.save(memory, path + ".small")
snapshot.load(path + ".small")[0].close()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    found = snapshot.inspect(path)
    memory, _ = snapshot.load(path)
    memory.close()
    assert right and found.pages == 0 and found.blocks == ((0, 64 << 30),)
except SnapshotError as exc:
    assert not right and "checksum" in exc.hint, exc
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10, "MiB")
"""


@pytest.mark.parametrize("checksum", ["right", "wrong"])
def test_a_sparse_file_that_claims_much_memory_takes_little(checksum, tmp_path):
    done = subprocess.run([sys.executable, "-c", SPARSE, tmp_path / "guest", checksum], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) < 32, done.stdout


KILLED = """
import sys
from tests.faults.test_broken_snapshot import KillState
KillState(sys.argv[1]).run()
"""


class KillState:
    """Memory whose content follows from a number, saved again and again: the number is in the states."""

    def __init__(self, path):
        self.path = path

    @staticmethod
    def fill(memory, number):
        dirty = DirtyBitmap(256, PAGE)
        for page in random.Random(number).sample(range(256), 50):
            memory.write(page * PAGE, bytes(PAGE) if (page + number) % 4 == 0 else bytes([number % 251 + 1]) * PAGE)
            dirty.set(page)
        return dirty

    def run(self):
        with GuestMemory.memfd(256 * PAGE) as memory:
            held, number = None, 0
            while True:
                number += 1
                dirty = self.fill(memory, number)
                changes = {"dirty": dirty, "since": held} if held is not None and number % 5 else {}
                held = save(memory, self.path, states={"number": str(number).encode()}, **changes)
                if number == 1:
                    print("ready", flush=True)


def test_a_save_killed_at_any_moment_leaves_a_whole_snapshot(tmp_path):
    path, kills, chance = tmp_path / "guest", 40 if DEEP else 6, random.Random(7)
    numbers = []
    for _ in range(kills):
        with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, cwd=ROOT) as child:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0, 0.15))
            child.send_signal(signal.SIGKILL)
        again, states = load(path)
        numbers.append(int(states["number"]))
        with again, GuestMemory.memfd(256 * PAGE) as wanted:
            for number in range(1, numbers[-1] + 1):
                KillState.fill(wanted, number)
            assert again.read(0, 256 * PAGE) == wanted.read(0, 256 * PAGE)
        assert set(os.listdir(tmp_path)) <= {"guest", "guest.part"}
    print(f"killed {kills} times, in the middle of saves {numbers}")


def test_a_file_that_a_kill_left_behind_is_no_snapshot_and_is_reused(tmp_path, memory):
    save(memory, tmp_path / "guest")
    (tmp_path / "guest.part").write_bytes(bytes(1 << 20))
    with pytest.raises(SnapshotError, match="never completed"):
        load(tmp_path / "guest.part")
    save(memory, tmp_path / "guest")
    assert os.listdir(tmp_path) == ["guest"]


def stored(path):
    """(offset, bytes) of what is not a hole."""
    parts, at = [], 0
    with open(path, "rb") as file:
        while True:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                return parts
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            parts.append((at, os.pread(file.fileno(), end - at, at)))
            at = end


def test_a_flipped_byte_is_found_wherever_it_is(tmp_path):
    path = tmp_path / "guest"
    with GuestMemory.memfd(4 * PAGE) as memory:
        memory.write(PAGE, b"content" * 500)
        held = save(memory, path, states={"name": b"state"})
        dirty = DirtyBitmap(64, PAGE)
        dirty.set(2)
        memory.write(2 * PAGE, b"more")
        save(memory, path, states={"name": b"state"}, dirty=dirty, since=held)
        wanted = memory.read(0, 4 * PAGE)
    refused = harmless = 0
    with open(path, "r+b", buffering=0) as file:
        for start, data in stored(path):
            for i in range(0, len(data), 1 if DEEP else 5):
                os.pwrite(file.fileno(), bytes([data[i] ^ 1 << i % 8]), start + i)
                try:
                    again, states = load(path)
                except SnapshotError as exc:
                    assert exc.errno in (errno.EBADMSG, errno.EPROTONOSUPPORT)
                    refused += 1
                else:
                    with again:
                        assert (again.read(0, 4 * PAGE), states) == (wanted, {"name": b"state"})
                    harmless += 1
                os.pwrite(file.fileno(), data[i:i + 1], start + i)
    assert refused > 300
    print(f"{refused} flipped bytes refused, {harmless} are in no snapshot")


def test_a_truncated_or_extended_file_is_refused(tmp_path, memory):
    path = tmp_path / "guest"
    save(memory, path, states={"name": b"state"})
    size = path.stat().st_size
    lengths = {*range(0, 600), *range(0, 1 << 20, 4093), *range(0, size, 65521), size - 1, size + 1, size + PAGE}
    data = path.read_bytes()
    short = tmp_path / "short"
    short.write_bytes(data)
    for length in sorted(lengths - {size}, reverse=True):
        os.truncate(short, length)
        with pytest.raises(SnapshotError) as failed:
            inspect(short)
        assert failed.value.errno == errno.EBADMSG
    print(f"{len(lengths)} lengths refused")


def test_a_newer_version_and_impossible_numbers_are_refused(tmp_path, memory):
    path = tmp_path / "guest"
    save(memory, path)
    chance, tried = random.Random(3), 0
    with open(path, "r+b", buffering=0) as file:
        whole = os.pread(file.fileno(), 512, 0)
        for at, size in [(8, 4), (12, 4), (16, 4), (20, 4), (24, 4), (28, 4), (32, 8), (40, 8)]:
            for value in (0, 1, 2, 1 << 12, (1 << 8 * size) - 1, *(chance.getrandbits(8 * size) for _ in range(20))):
                header = whole[:at] + value.to_bytes(size, "little") + whole[at + size:-4]
                header += zlib.crc32(header).to_bytes(4, "little")
                if header == whole:
                    continue
                os.pwrite(file.fileno(), header, 0)
                try:
                    load(path)[0].close()
                except SnapshotError as exc:
                    tried += 1
                    assert exc.errno == (errno.EPROTONOSUPPORT if at == 8 else errno.EBADMSG)
                else:
                    assert (at, value % 2) == (32, whole[32] % 2)     # of the generation, the parity counts
    assert tried > 100 and snapshot_format.VERSION == 1


def test_no_such_file_and_no_permission(tmp_path, memory):
    for path, number in ((tmp_path / "none", errno.ENOENT), (tmp_path, errno.EISDIR)):
        with pytest.raises(SnapshotError) as failed:
            load(path)
        assert failed.value.errno == number
    with pytest.raises(SnapshotError) as failed:
        save(memory, tmp_path / "none" / "guest")
    assert failed.value.errno == errno.ENOENT
    with pytest.raises(SnapshotError) as failed:
        save(memory, "/proc/guest")
    assert failed.value.errno in (errno.ENOENT, errno.EACCES)
