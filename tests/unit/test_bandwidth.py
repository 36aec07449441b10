"""The limit of bandwidth, by a clock that the test moves."""
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from migration_doubles import PGSIZE, guest

from vfiodma._core.bitmap import DirtyBitmap
from vfiodma.errors import InvalidArgumentError
from vfiodma.migration import bandwidth
from vfiodma.migration.bandwidth import BandwidthLimit
from vfiodma.migration.channel import FrameChannel
from vfiodma.migration.layout import MemoryLayout
from vfiodma.migration.sender import PageSender


class Clock:
    def __init__(self):
        self.now = 100.0
        self.naps = []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.naps.append(seconds)
        self.now += max(seconds, 1e-6)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bandwidth, "time", clock)
    return clock


@given(st.lists(st.integers(1, 3_000_000), min_size=1, max_size=50), st.floats(1e3, 1e9))
def test_on_average_no_more_than_the_rate_and_not_less(sizes, rate):
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bandwidth, "time", clock)
        limit = BandwidthLimit(rate)
        for size in sizes:
            limit.spend(size, lambda: None)
        took = clock.now - 100
    # All but the last frame are paid for; what may go at once comes on top.
    assert took <= sum(sizes[:-1]) / rate * 1.001 + 0.001
    assert took >= (sum(sizes[:-1]) / rate - 0.05) * 0.999 - 0.001


def test_without_a_rate_nobody_waits(clock):
    limit = BandwidthLimit()
    for _ in range(100):
        limit.spend(1 << 40, lambda: pytest.fail("waited"))
    assert limit.burst is None and not clock.naps


def test_the_rate_may_change_while_somebody_waits(clock):
    limit = BandwidthLimit(1000.0)
    limit.spend(1_000_000, lambda: None)
    checks = []

    def check():
        checks.append(clock.now)
        if len(checks) == 10:
            limit.rate = 1e9

    limit.spend(1, check)
    assert len(checks) <= 11 and max(clock.naps) <= 0.05
    limit.spend(10 << 20, lambda: None)
    limit.rate = None
    limit.spend(1, lambda: pytest.fail("waited"))


def test_who_waits_can_be_stopped(clock):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    limit = BandwidthLimit(1.0)
    limit.spend(1000, lambda: None)
    with pytest.raises(Stop):
        limit.spend(1, stop)


@pytest.mark.parametrize("rate", [0, -1, float("inf"), float("nan")])
def test_a_rate_is_above_0(rate):
    with pytest.raises(InvalidArgumentError):
        BandwidthLimit(rate)
    limit = BandwidthLimit(1.0)
    with pytest.raises(InvalidArgumentError):
        limit.rate = rate
    assert limit.rate == 1.0


def test_all_channels_share_one_limit_and_their_frames_are_small(clock):
    sizes, lock = [], threading.Lock()

    class Sink:
        def send(self, parts):
            with lock:
                sizes.append(sum(memoryview(part).nbytes for part in parts))

    with guest([b"x" * (256 << 10)]) as memory, MemoryLayout(memory, PGSIZE) as layout:
        rate = 400_000.0
        sender = PageSender([FrameChannel(Sink()) for _ in range(3)], layout, limit=BandwidthLimit(rate))
        bitmap = DirtyBitmap(layout.nbits, PGSIZE)
        bitmap.set(0, layout.npages)
        sender.send(bitmap, 0)
    assert max(sizes) <= rate * 0.05 + 100
    # Threads that nap at once move the test's clock for one another: it runs too fast, never too slowly.
    assert sum(sizes) >= 256 << 10 and clock.now - 100 >= (sum(sizes) - 3 * max(sizes)) / rate - 0.05
