"""Snapshots: what was saved is what is loaded, for any course of full and partial saves; sizes on disk; a live save."""
import errno
import os
import random
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.migration_doubles import LogTracker, Machine
from vfiodma import DirtyBitmap, GuestMemory
from vfiodma.errors import InvalidArgumentError, SnapshotError
from vfiodma.migration.layout import MemoryLayout
from vfiodma.migration.snapshot import changed, inspect, load, save, save_live

PAGE = 4096
BLOCKS = ((0, 70), (1 << 32, 3), ((1 << 32) + 4 * PAGE, 130))      # (gpa, pages): not whole words of a bitmap


def make_memory(*_):
    memory = GuestMemory()
    for gpa, pages in BLOCKS:
        memory.add(GuestMemory.memfd(pages * PAGE).region, gpa)
    return memory


def content(memory):
    return [memory.read(gpa, region.size) for gpa, region in memory]


def bit_of(memory, block, page):
    with MemoryLayout(memory, PAGE) as layout:
        return layout.blocks[block].first_bit + page


def empty(memory):
    with MemoryLayout(memory, PAGE) as layout:
        return DirtyBitmap(layout.nbits, PAGE)


def loaded(path, **how):
    memory, states = load(path, **how)
    with memory:
        return content(memory), states


@pytest.fixture
def memory():
    with make_memory() as memory:
        yield memory


PAGES = [(block, page) for block, (_, pages) in enumerate(BLOCKS) for page in range(pages)]
WRITES = st.lists(st.tuples(st.sampled_from(PAGES), st.integers(0, 3)), max_size=40)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.sampled_from(["all", "changes", "found", "twice"]), WRITES), min_size=1, max_size=6),
       lazy=st.booleans())
def test_what_was_saved_last_is_loaded(tmp_path, steps, lazy):
    path = tmp_path / "guest"
    with make_memory() as memory:
        held = None
        for number, (how, writes) in enumerate(steps):
            dirty = empty(memory)
            for (block, page), value in writes:
                memory.write(BLOCKS[block][0] + page * PAGE, bytes([value]) * PAGE)
                dirty.set(bit_of(memory, block, page))
            states = {f"state {number}": bytes(number)}
            if held is None or how == "all":
                held = save(memory, path, states=states)
            elif how == "found":
                held, dirty = changed(memory, path)
                held = save(memory, path, states=states, dirty=dirty, since=held)
            else:
                held = save(memory, path, states=states, dirty=dirty, since=held)
            assert loaded(path, lazy=lazy) == (content(memory), states)
            assert loaded(path, make_memory=lambda _: filled())[0] == content(memory)
            assert inspect(path) == held._replace(written=0)
    path.unlink()


def filled():
    memory = make_memory()
    for gpa, region in memory:
        memory.write(gpa, b"old" * (region.size // 3))
    return memory


def test_zero_pages_take_no_space_and_a_changed_page_is_all_that_is_written(tmp_path):
    path, size = tmp_path / "guest", 64 << 20
    with GuestMemory.memfd(size) as memory:
        memory.write(0, os.urandom(4 << 20))
        first = save(memory, path)
        assert (first.pages, first.written) == (1024, 4 << 20)
        full = path.stat()
        assert full.st_size > 2 * size and full.st_blocks * 512 < 6 << 20
        for _ in range(5):                  # the place that a page leaves is given back each time
            memory.write(0, os.urandom(PAGE))
            memory.write(PAGE, bytes(PAGE))
            dirty = empty(memory)
            dirty.set(0, 2)
            first = save(memory, path, dirty=dirty, since=first)
            assert (first.pages, first.written) == (1023, PAGE)
            now = path.stat()
            assert now.st_ino == full.st_ino and now.st_blocks <= full.st_blocks + 512     # a second table
        assert loaded(path)[0] == content(memory)
        assert os.listdir(tmp_path) == ["guest"]


def test_changes_are_refused_where_the_file_is_not_what_they_are_relative_to(tmp_path, memory):
    path = tmp_path / "guest"
    first = save(memory, path)
    second = save(memory, path, dirty=empty(memory), since=first)
    for old in (first, second._replace(id=bytes(16))):
        with pytest.raises(SnapshotError) as failed:
            save(memory, path, dirty=empty(memory), since=old)
        assert failed.value.errno == errno.ESTALE
    with GuestMemory.memfd(PAGE) as other, pytest.raises(InvalidArgumentError):
        save(other, path, dirty=DirtyBitmap(64, PAGE), since=second)
    with pytest.raises(InvalidArgumentError):
        save(memory, path, dirty=empty(memory))
    assert inspect(path) == second._replace(written=0)


def test_a_lazy_load_maps_the_file_and_keeps_it_from_being_changed(tmp_path):
    path = tmp_path / "guest"
    with GuestMemory.memfd(8 << 20) as memory:
        memory.write(0, os.urandom(8 << 20))
        first = save(memory, path)
        mapped, _ = load(path, lazy=True)
        with mapped:
            mapped.write(0, b"mine")
            with pytest.raises(SnapshotError) as failed:
                save(memory, path, dirty=empty(memory), since=first)
            assert failed.value.errno == errno.EBUSY
            before = content(memory)
            memory.write(1 << 20, b"newer")
            save(memory, path)              # a new file under the same name
            assert mapped.read(4, (8 << 20) - 4) == before[0][4:]
        assert loaded(path)[0] == content(memory)


class Writer:
    """A device that writes until it is stopped."""

    def __init__(self, memory, tracker):
        self.memory, self.tracker, self.random = memory, tracker, random.Random(1)
        self.running, self.stops, self.at_stop = True, 0, None
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        while not self.ended.wait(0.0002):
            with self.lock:
                if self.running:
                    page = self.random.randrange(70)
                    self.memory.write(page * PAGE, bytes([self.random.randrange(3)]) * PAGE)
                    self.tracker.log.mark(page)

    ended = threading.Event()

    def stop(self):
        with self.lock:
            self.running = False
        self.stops += 1
        self.at_stop = content(self.memory)

    def resume(self):
        self.running = True

    def state(self):
        return {"device": b"state"}


def test_a_live_snapshot_is_of_the_moment_when_the_devices_stood_still(tmp_path, memory):
    path = tmp_path / "guest"
    with MemoryLayout(memory, PAGE) as layout:
        tracker = LogTracker(layout)
        writer = Writer(memory, tracker)
        try:
            for _ in range(5):
                save_live(layout, path, tracker, writer, states={"more": b"1"}, stop_pages=2)
                assert writer.running
                assert loaded(path) == (writer.at_stop, {"more": b"1", "device": b"state"})
        finally:
            writer.ended.set()
            writer.thread.join()
        assert (writer.stops, tracker.started, tracker.stopped) == (5, 5, 5)


def test_a_live_snapshot_that_fails_lets_the_devices_run_on(tmp_path, memory):
    class Broken:
        running = True

        def stop(self):
            self.running = False

        def resume(self):
            self.running = True

        def state(self):
            raise SnapshotError(errno.EIO)

    with MemoryLayout(memory, PAGE) as layout:
        tracker, machine = LogTracker(layout), Broken()
        with pytest.raises(SnapshotError):
            save_live(layout, tmp_path / "guest", tracker, machine)
        assert machine.running and tracker.stopped == 1 and not os.listdir(tmp_path)


def test_a_live_snapshot_without_a_round_before_the_stop_has_all_memory(tmp_path, memory):
    memory.write(0, b"content")
    with MemoryLayout(memory, PAGE) as layout:
        save_live(layout, tmp_path / "guest", LogTracker(layout), Machine({"device": b"state"}), max_rounds=0)
        assert loaded(tmp_path / "guest") == (content(memory), {"device": b"state"})


def test_what_lies_in_the_way_of_the_new_file_is_not_written_through(tmp_path, memory, monkeypatch):
    other, part = tmp_path / "other", tmp_path / "guest.part"
    other.write_bytes(b"precious")
    part.symlink_to(other)
    with pytest.raises(SnapshotError) as caught:
        save(memory, tmp_path / "guest")
    assert caught.value.errno == errno.ELOOP and other.read_bytes() == b"precious"
    part.unlink()
    part.touch()
    with monkeypatch.context() as patch, pytest.raises(SnapshotError, match="another user's") as caught:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        save(memory, tmp_path / "guest")
    assert caught.value.errno == errno.EPERM and part.exists()
    part.chmod(0o666)           # left by a kill, say, and opened to all since
    save(memory, tmp_path / "guest")
    assert (tmp_path / "guest").stat().st_mode & 0o777 == 0o600
