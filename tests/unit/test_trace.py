"""Dirty traces: recorded, kept in files, counted and replayed."""
import json
import math
import os
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiodma import DirtyBitmap, DirtyLog
from vfiodma.errors import InvalidArgumentError, MissingExtraError, ProtocolError
from vfiodma.migration.convergence import Costs, Policy, Step
from vfiodma.migration.replay import replay
from vfiodma.migration.trace import Trace, TraceRecorder
from vfiodma.migration.trace_file import read_trace, write_trace

BLOCKS = ((0, 100 * 4096), (1 << 32, 28 * 4096))     # the second begins inside no word of a bitmap
ROOM = (100, 28)
RUN = st.integers(0, 1).flatmap(lambda block: st.integers(0, ROOM[block] - 1).flatmap(
    lambda first: st.tuples(st.just(block), st.just(first), st.integers(1, ROOM[block] - first))))
INTERVALS = st.lists(st.lists(RUN, max_size=5), min_size=1, max_size=8)


class Layout:
    """Two blocks, as a MemoryLayout has them."""

    pgsize, shape, nbits = 4096, BLOCKS, 128 + 64
    first_bits = (0, 128)


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


class Tracker:
    """Writes what is planned for each harvest."""

    def __init__(self, plan=()):
        self.log = DirtyLog(Layout.nbits)
        self.plan = list(plan)
        self.running = False

    def start(self):
        self.running = True

    def harvest(self, into):
        return self.log.harvest(into)

    def stop(self):
        self.running = False

    def write(self, runs):
        for block, first, count in runs:
            self.log.mark(Layout.first_bits[block] + first, count)


def trace_of(intervals, step=0.5):
    runs = np.array([run for interval in intervals for run in interval], np.int64).reshape(-1, 3)
    offsets = np.cumsum([0, *map(len, intervals)])
    return Trace(4096, BLOCKS, np.arange(1, len(intervals) + 1) * step, offsets, runs)


def pages_of(*intervals):
    return {(block, page) for runs in intervals for block, first, count in runs for page in range(first, first + count)}


def same(one, other):
    return (one.pgsize, one.blocks) == (other.pgsize, other.blocks) and \
        all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("times", "offsets", "runs"))


@given(INTERVALS)
def test_unique_pages_of_whole_intervals_are_those_of_sets(intervals):
    trace = trace_of(intervals)
    assert trace.pages.tolist() == [len(pages_of(runs)) for runs in intervals]
    for low in range(len(intervals)):
        for high in range(low + 1, len(intervals) + 1):
            assert trace.unique(low / 2, high / 2) == len(pages_of(*intervals[low:high]))


@given(INTERVALS, st.floats(0, 20), st.floats(0, 20))
def test_unique_pages_between_any_times_grow_with_the_time_and_end_at_all(intervals, begin, length):
    trace = trace_of(intervals)
    found = trace.unique(begin, begin + length)
    assert 0 <= found <= len(pages_of(*intervals))
    if length >= trace.seconds:
        assert found == len(pages_of(*intervals))


@given(INTERVALS)
def test_a_recorder_writes_down_what_it_harvests_and_hands_it_on(intervals):
    clock, tracker, into = Clock(), Tracker(), DirtyBitmap(Layout.nbits)
    recorder = TraceRecorder(tracker, Layout(), clock)
    tracker.write([(0, 3, 4)])          # before the start: no part of it
    recorder.start()
    for runs in intervals:
        tracker.write(runs)
        clock.wait(0.25)
        into.clear()
        recorder.harvest(into)
        assert into.count() == len(pages_of(runs))
    recorder.stop()
    trace = recorder.trace()
    assert not tracker.running and trace.times.tolist() == [0.25 * (n + 1) for n in range(len(intervals))]
    for index, runs in enumerate(intervals):
        found = trace.runs[trace.offsets[index]:trace.offsets[index + 1]].tolist()
        assert pages_of(found) == pages_of(runs)


def test_record_harvests_at_intervals_and_stops_the_tracker():
    clock, tracker = Clock(), Tracker()
    seen = []

    def wait(seconds):
        clock.wait(seconds)
        tracker.write([(1, len(seen) % 28, 1)])

    trace = TraceRecorder(tracker, Layout(), clock).record(1.0, 0.3, wait, lambda at, found: seen.append((at, found)))
    assert trace.times.tolist() == pytest.approx([0.3, 0.6, 0.9, 1.0]) and not tracker.running
    assert [found for _, found in seen] == [1, 1, 1, 1]
    for wrong in ((0, 1), (1, 0), (1, math.nan), (math.inf, 1)):
        with pytest.raises(InvalidArgumentError):
            TraceRecorder(tracker, Layout(), clock).record(*wrong)


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.parquet"])
def test_a_file_gives_back_what_was_written(name, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    for intervals in ([[(0, 1, 3), (1, 27, 1)], [], [(0, 0, 100)]], [[]]):
        trace = trace_of(intervals)
        write_trace(trace, tmp_path / name)
        assert same(read_trace(tmp_path / name), trace)
    assert os.listdir(tmp_path) == [name]       # and nothing half done


def test_without_pyarrow_parquet_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "old.parquet").write_bytes(b"PAR1....PAR1")
    with pytest.raises(MissingExtraError, match=r"vfiodma\[trace\]"):
        write_trace(trace_of([[]]), tmp_path / "new.parquet")
    with pytest.raises(MissingExtraError, match=r"vfiodma\[trace\]"):
        read_trace(tmp_path / "old.parquet")
    assert os.listdir(tmp_path) == ["old.parquet"]


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.parquet"])
def test_a_file_that_is_cut_anywhere_is_refused_with_what_to_do(name, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    write_trace(trace_of([[(0, 1, 3), (1, 2, 3)], [(0, 50, 5)]]), path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 1 + len(whole) // 150):      # without the last newline it is complete
        path.write_bytes(whole[:length])
        with pytest.raises(ProtocolError, match="record it again"):
            read_trace(path)


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.parquet"])
def test_a_flipped_byte_is_refused_or_makes_another_trace_but_never_another_error(name, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    write_trace(trace_of([[(0, 1, 3), (1, 2, 3)], [(0, 50, 5)]]), path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 1 + len(whole) // 150):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1:])
        try:
            assert isinstance(read_trace(path), Trace)
        except ProtocolError:
            pass


HEADER = {"vfiodma_trace": 1, "pgsize": 4096, "blocks": [list(block) for block in BLOCKS]}


@pytest.mark.parametrize("lines, why", [
    ([{"something": 1}], "not a dirty trace"),
    ([{**HEADER, "vfiodma_trace": 2}, {"intervals": 0}], "version 2.*update"),
    ([{**HEADER, "pgsize": 4095}, [0.5, []], {"intervals": 1}], "power of two"),
    ([{**HEADER, "pgsize": "4096"}, [0.5, []], {"intervals": 1}], "header"),
    ([{**HEADER, "blocks": [[0, 4096.5]]}, [0.5, []], {"intervals": 1}], "header"),
    ([{**HEADER, "blocks": []}, [0.5, []], {"intervals": 1}], "0 blocks"),
    ([{**HEADER, "blocks": [[0, 1 << 80]]}, [0.5, []], {"intervals": 1}], "too many"),
    ([HEADER, {"intervals": 0}], "no interval"),
    ([HEADER, [0.5, []]], "too early"),
    ([HEADER, [0.5, []], {"intervals": 2}], "not the end"),
    ([HEADER, [0.5, []], {"intervals": 1}, [1.0, []]], "after the end"),
    ([HEADER, [0.5, []], [0.5, []], {"intervals": 2}], "ascend"),
    ([HEADER, [math.nan, []], {"intervals": 1}], "ascend"),
    ([HEADER, [10 ** 400, []], {"intervals": 1}], "not an interval"),
    ([HEADER, [0.5, [0, 1]], {"intervals": 1}], "not an interval"),
    ([HEADER, [0.5, [0, 1, 1.5]], {"intervals": 1}], "not an interval"),
    ([HEADER, [0.5, [0, 1, 1 << 70]], {"intervals": 1}], "not an interval"),
    ([HEADER, [0.5, [[0, 1, 1]]], {"intervals": 1}], "not an interval"),
    ([HEADER, [0.5, [2, 0, 1]], {"intervals": 1}], "not there"),
    ([HEADER, [0.5, [1, 27, 2]], {"intervals": 1}], "outside"),
    ([HEADER, [0.5, [0, -1, 1]], {"intervals": 1}], "outside"),
    ([HEADER, [0.5, [0, 1, (1 << 63) - 1]], {"intervals": 1}], "outside"),
])
def test_files_that_make_no_sense_are_refused(lines, why, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ProtocolError, match=why):
        read_trace(path)


def test_parquet_of_something_else_is_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path, header = tmp_path / "trace.parquet", {"vfiodma_trace": json.dumps(HEADER)}
    lists = pa.array([[1], [2, 3]], pa.large_list(pa.int64()))
    good = {"time": [0.5, 1.0], "block": pa.array([[0], [0, 0]], pa.large_list(pa.int64())), "first": lists,
            "npages": lists}
    parquet.write_table(pa.table(good).replace_schema_metadata(header), path)
    assert read_trace(path).runs.tolist() == [[0, 1, 1], [0, 2, 2], [0, 3, 3]]
    for table, why in (
        (pa.table(good), "not a dirty trace"),
        (pa.table({"time": [0.5]}).replace_schema_metadata(header), "columns"),
        (pa.table({**good, "first": [1, 2]}).replace_schema_metadata(header), "columns"),
        (pa.table({**good, "time": ["a", "b"]}).replace_schema_metadata(header), "columns"),
        (pa.table({**good, "npages": pa.array([[1, 2], [3]], pa.large_list(pa.int64()))})
         .replace_schema_metadata(header), "columns"),
        (pa.table({**good, "npages": pa.array([[1], None], pa.large_list(pa.int64()))})
         .replace_schema_metadata(header), "columns"),
        (pa.table({**good, "first": pa.array([[100], [2, 3]], pa.large_list(pa.int64()))})
         .replace_schema_metadata(header), "outside"),
    ):
        parquet.write_table(table, path)
        with pytest.raises(ProtocolError, match=why):
            read_trace(path)


def steady(rate=2000, working_set=96, seconds=4.0, step=0.01, seed=1):
    """A guest that writes ``rate`` pages a second at random into a working set of the first block."""
    random = np.random.default_rng(seed)
    intervals = []
    for _ in range(round(seconds / step)):
        intervals.append([(0, int(page), 1) for page in random.integers(0, working_set, round(rate * step))])
    return trace_of(intervals, step)


def test_the_working_set_of_a_trace_is_the_one_that_was_written():
    trace = steady()
    assert trace.working_set.size == pytest.approx(96 * 4096, rel=0.15)
    assert trace.working_set.rate == pytest.approx(2000 * 4096, rel=0.2)


def test_a_replay_over_a_fast_link_keeps_the_limit_and_its_prediction():
    trace = steady()
    found = replay(trace, 40e6, Policy(0.02), Costs(stop=0.001))
    assert found.step is Step.SWITCH and found.within_limit and found.forecast.converges is not False
    assert found.result.rounds[0].pages == trace.npages and found.result.rounds[-1].final
    assert found.result.downtime == pytest.approx(found.result.breakdown.total)
    assert found.result.predicted_downtime == pytest.approx(found.result.downtime, rel=0.25)
    assert found.result.bytes == sum(done.bytes for done in found.result.rounds)


def test_a_replay_over_a_slow_link_ends_as_the_policy_says():
    trace = steady()
    forced = replay(trace, 1e6, Policy(0.02, max_rounds=10))
    assert forced.step is Step.FORCED and not forced.within_limit and forced.laps > 0
    assert len(forced.result.rounds) <= 11 and forced.result.downtime > 0.1
    cancelled = replay(trace, 1e6, Policy(0.02, max_rounds=10, on_timeout="cancel"))
    assert cancelled.step is Step.CANCEL and not cancelled.within_limit and not cancelled.result.rounds[-1].final
    throttled = replay(trace, 4e6, Policy(0.05, max_rounds=100, throttle_max=0.99))
    assert throttled.step is Step.SWITCH and throttled.throttle > 0


def test_a_guest_that_writes_nothing_moves_in_one_round():
    found = replay(trace_of([[], []]), 1e6)
    assert found.step is Step.SWITCH and len(found.result.rounds) == 2 and found.result.rounds[1].bytes == 0


@given(INTERVALS, st.floats(1e3, 1e10), st.floats(1e-4, 1), st.integers(1, 20), st.floats(0, 100))
def test_any_replay_ends(intervals, bandwidth, limit, rounds, start):
    found = replay(trace_of(intervals), bandwidth, Policy(limit, rounds), start=start)
    assert len(found.result.rounds) <= rounds + 1
    assert found.result.downtime >= 0 and math.isfinite(found.result.seconds)


@pytest.mark.parametrize("wrong", [{"bandwidth": 0}, {"bandwidth": math.nan}, {"bandwidth": 1e6, "latency": -1},
                                   {"bandwidth": 1e6, "start": math.inf}])
def test_a_replay_of_nonsense_is_refused(wrong):
    with pytest.raises(InvalidArgumentError):
        replay(trace_of([[]]), **wrong)
