"""Device states in chunks beside bare reads and writes of the same streams; stopping devices beside one after another.

`ratio` is peer time divided by own time, medians of interleaved rounds: more is better, `limit` is the least that is
wanted.
"""
import contextlib
import statistics
import threading
import time

import pytest

from vfiodma import SoftwareGroup, SoftwareVfio, VfioDevice
from vfiodma.devices.migration import MigrationState
from vfiodma.migration import DeviceSinks, DeviceStates

SIZE = 64 << 20
CHUNK = 1 << 20


class Block:
    """A device that is nothing but a large state; its arcs take a while, as those of real ones do."""

    max_load = 2 * SIZE
    flags = 3

    def __init__(self, address, size=SIZE, seconds=0.0):
        self.address, self.migration = address, self
        self.data, self.seconds = bytes(size), seconds

    def arc(self, current, following):
        if self.seconds:
            threading.Event().wait(self.seconds)

    def final(self):
        return self.data

    def size(self):
        return len(self.data)

    def load(self, data):
        self.loaded = len(data)

    def initial(self):
        return b""

    dirty = initial

    def dirty_bytes(self):
        return 0

    def connect(self, port):
        pass

    def disconnect(self):
        pass

    def region_size(self, index):
        return 0

    region_read = region_write = None

    def irq_count(self, index):
        return 0

    def reset(self):
        pass


@contextlib.contextmanager
def opened(devices):
    system = SoftwareVfio(groups=[SoftwareGroup(0, devices)], memlock_limit=None)
    with system.container() as container, contextlib.ExitStack() as stack:
        yield [stack.enter_context(VfioDevice.open(container, device.address)) for device in devices]


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(benchmark, own, peer, limit, name, rounds=5):
    times = [(own(), peer()) for _ in range(rounds)]
    mine, other = map(statistics.median, zip(*times, strict=True))
    benchmark.pedantic(own, rounds=1)
    benchmark.extra_info.update(ms=mine * 1e3, peer=name, peer_ms=other * 1e3, ratio=other / mine, limit=limit)


def test_chunks_beside_bare_reads_and_writes(benchmark):
    with opened([Block("0000:00:10.0")]) as old, opened([Block("0000:00:10.0")]) as new, \
            DeviceStates(old, chunk=CHUNK) as states:
        def own():
            sinks = DeviceSinks(new)
            sinks.prepare()
            states.start()
            states.quiesce()

            def move():
                for frame in states.final_chunks():
                    sinks.take(*frame)
            took = timed(move)
            states.resume()
            sinks.abort()
            return took

        def bare():
            source, target = (device[0].migration for device in (old, new))
            with source.set_state(MigrationState.STOP_COPY) as reader, \
                    target.set_state(MigrationState.RESUMING) as writer:
                buffer = memoryview(bytearray(CHUNK))

                def move():
                    while count := reader.readinto(buffer):
                        writer.write(buffer[:count])
                took = timed(move)
            old[0].reset()
            new[0].reset()
            return took
        compare(benchmark, own, bare, 0.7, "bare loop")
        benchmark.extra_info["gb_s"] = SIZE / benchmark.extra_info["ms"] / 1e6


@pytest.mark.parametrize("count", [2, 8])
def test_stopping_devices_beside_one_after_another(benchmark, count):
    devices = [Block(f"0000:00:10.{number}", 4096, 0.002) for number in range(count)]
    with opened(devices) as handles, DeviceStates(handles) as states:
        def own():
            states.start()
            took = timed(states.quiesce)
            states.resume()
            return took

        def one_by_one():
            def stop():
                for state in (MigrationState.RUNNING_P2P, MigrationState.STOP_COPY):
                    for handle in handles:
                        if (stream := handle.migration.set_state(state)) is not None:
                            stream.close()
            took = timed(stop)
            states.resume()
            return took
        # Two steps, of three arcs in all, whatever the number of devices.
        compare(benchmark, own, one_by_one, count * 0.6, "one by one")
