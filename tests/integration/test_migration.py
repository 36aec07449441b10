"""A whole migration with devices that write: by one call, and as a stream of events."""
import asyncio
import contextlib
import errno
import re
import threading
import time
from pathlib import Path

import pytest

from vfiodma import GuestMemory, IoAddressSpace, SoftwareGroup, open_backend
from vfiodma.devices.dma_writer import DmaWriter
from vfiodma.errors import InvalidArgumentError, MigrationError
from vfiodma.migration import Migration, MigrationResult, PageReceiver, Round
from vfiodma.migration.events import Progress, Stage
from vfiodma.migration.stream import Phase
from vfiodma.migration.transport import listen

SIZE = 4 << 20
DEVICES = ["0000:00:16.0", "0000:00:16.1"]


class Writers:
    """Devices that write into memory by DMA."""

    def __init__(self, devices):
        self.devices = devices

    def resume(self):
        for device in self.devices:
            device.start()

    def stop(self):
        for device in self.devices:
            device.halt()
        for device in self.devices:
            device.stop()

    def state(self):
        return {device.address: device.state() for device in self.devices}


class Destination(threading.Thread):
    """Serves one migration at a URL."""

    def __init__(self, url):
        super().__init__()
        self.listener = listen(url, timeout=10)
        self.url = url
        self.memory = GuestMemory.memfd(SIZE)
        self.states, self.phase, self.failure = {}, None, None
        self.start()

    def run(self):
        try:
            with self.listener, contextlib.closing(self.listener.accept()) as transport, \
                    PageReceiver(transport, lambda hello: self.memory, fresh=True, accept=self.listener.accept,
                                 on_state=self.states.__setitem__) as receiver:
                self.phase = receiver.serve(wait=2)
        except OSError as exc:
            self.failure = exc


@pytest.fixture
def destination(tmp_path):
    destination = Destination(f"unix:{tmp_path}/guest")
    yield destination
    destination.join(20)
    assert not destination.is_alive()
    destination.memory.close()


@pytest.fixture
def guest():
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(GuestMemory.memfd(SIZE))
        memory.write(0, bytes(range(256)) * (SIZE // 512))
        writers = Writers([DmaWriter(address, rate=20 << 20, seed=index) for index, address in enumerate(DEVICES)])
        backend = open_backend("software", groups=[SoftwareGroup(1, writers.devices)], memlock_limit=None)
        stack.callback(backend.close)
        ioas = stack.enter_context(IoAddressSpace(backend))
        iova = ioas.map(memory).iova
        for device in writers.devices:
            device.working_set = [(iova, SIZE // 4)]
        stack.callback(writers.stop)
        writers.resume()
        yield memory, ioas, writers


def test_one_call_moves_a_guest_whose_devices_write(destination, guest):
    memory, ioas, writers = guest
    events = []
    result = Migration(destination.url, memory, writers, ioas=ioas, downtime_limit=0.3, verify=True,
                       on_event=events.append).run()
    destination.join(20)
    assert destination.phase is Phase.OWNER and destination.failure is None
    assert memory.read(0, SIZE) == destination.memory.read(0, SIZE)
    assert set(destination.states) == set(DEVICES)
    assert events[-1] is result and result.rounds[-1].final and result.breaks == 0
    assert [event for event in events if isinstance(event, Round)] == result.rounds
    assert [event.name for event in events if isinstance(event, Stage)] == [
        "introduce", "rounds", "prepare", "stopped", "moved", "release", "given"]


def test_events_come_while_it_runs(destination, guest):
    memory, ioas, writers = guest

    async def move():
        return [event async for event in Migration(destination.url, memory, writers, ioas=ioas)]

    events = asyncio.run(move())
    assert isinstance(events[-1], MigrationResult)
    assert any(isinstance(event, Progress) for event in events)
    destination.join(20)
    assert memory.read(0, SIZE) == destination.memory.read(0, SIZE)


def test_leaving_the_events_cancels_the_migration_and_the_guest_runs_on(destination, guest):
    memory, ioas, writers = guest

    async def leave():
        migration = Migration(destination.url, memory, writers, ioas=ioas, bandwidth_limit=2 << 20)
        async for event in migration:
            if isinstance(event, Progress):
                break
        with contextlib.suppress(RuntimeError):
            await asyncio.sleep(0)
        return migration

    migration = asyncio.run(leave())
    assert migration.source.handover.may_run and migration.result is None
    destination.join(20)
    assert destination.phase is None and destination.failure.errno == errno.ECANCELED
    before = sum(device.writes for device in writers.devices)
    deadline = time.monotonic() + 5
    while sum(device.writes for device in writers.devices) == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sum(device.writes for device in writers.devices) > before


def test_a_failure_is_raised_where_the_events_are_awaited(tmp_path, guest):
    memory, ioas, writers = guest

    async def move():
        async for _ in Migration(f"unix:{tmp_path}/nobody", memory, writers, ioas=ioas):
            pass

    with pytest.raises(MigrationError):
        asyncio.run(move())


def test_a_migration_runs_once_and_knows_who_tells_what_is_written(destination, guest):
    memory, ioas, writers = guest
    with pytest.raises(InvalidArgumentError, match="give ioas, or tracker"):
        Migration(destination.url, memory, writers)
    migration = Migration(destination.url, memory, writers, ioas=ioas)
    migration.run()
    with pytest.raises(InvalidArgumentError, match="runs once"):
        migration.run()


def test_a_migration_that_was_cancelled_before_it_began_moves_nothing(destination, guest):
    memory, ioas, writers = guest
    migration = Migration(destination.url, memory, writers, ioas=ioas)
    migration.cancel()
    with pytest.raises(MigrationError) as caught:
        migration.run()
    assert caught.value.errno == errno.ECANCELED


def test_the_documents_example_moves_a_guest(tmp_path, guest):
    memory, ioas, writers = guest
    text = (Path(__file__).parents[2] / "docs/migration.md").read_text()
    example = {"__name__": "example"}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/migration.md", "exec"), example)
    url, got = f"unix:{tmp_path}/documented", []
    thread = threading.Thread(target=lambda: got.append(example["receive"](url, SIZE)))
    thread.start()
    deadline = time.monotonic() + 10
    while not (tmp_path / "documented").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    result = example["send"](url, memory, writers, ioas)
    thread.join(20)
    assert result.downtime > 0 and got[0].read(0, SIZE) == memory.read(0, SIZE)
    got[0].close()


def test_memory_is_shared_with_a_destination_on_the_same_host(tmp_path, guest):
    memory, ioas, writers = guest
    url, taken, states = f"unix:{tmp_path}/guest", [], {}

    def receive():
        with listen(url, timeout=10) as listener, PageReceiver(
                listener.accept(), lambda hello: None, take_memory=taken.append,
                on_state=states.__setitem__, accept=listener.accept) as receiver:
            taken.append(receiver.serve(wait=2))

    thread = threading.Thread(target=receive)
    thread.start()
    deadline = time.monotonic() + 10
    while not (tmp_path / "guest").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    result = Migration(url, memory, writers, ioas=ioas, share_memory=True, verify=True).run()
    thread.join(20)
    there, phase = taken
    assert phase is Phase.OWNER and set(states) == set(DEVICES)
    assert sum(done.pages + done.zero_pages for done in result.rounds) == 0 and result.bytes < 4096
    there.write(SIZE - 4, b"same")
    assert memory.read(0, SIZE) == there.read(0, SIZE)
    there.close()


def test_shared_memory_needs_both_sides_and_a_unix_socket(destination, guest):
    memory, ioas, writers = guest
    with pytest.raises(MigrationError, match="nobody here takes it"):
        Migration(destination.url, memory, writers, ioas=ioas, share_memory=True).run()
    with listen("tcp://127.0.0.1:0") as listener:
        def receive():
            with contextlib.closing(listener.accept()) as transport, contextlib.suppress(OSError), \
                    PageReceiver(transport, lambda hello: None, take_memory=lambda memory: None) as receiver:
                receiver.receive()
        thread = threading.Thread(target=receive)
        thread.start()
        with pytest.raises(MigrationError, match="UNIX stream socket"):
            Migration(listener.url, memory, writers, ioas=ioas, share_memory=True).run()
        thread.join(20)
