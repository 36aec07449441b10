"""Post-copy beside pre-copy in one run: how long the guest stands still, and waits for a page after that."""
import contextlib
import json
import os
import random
import statistics
import tempfile
import time

import pytest

from vfiodma import DirtyBitmap, GuestMemory, PageReceiver
from vfiodma.errors import VfioError
from vfiodma.migration import Migration, Postcopy
from vfiodma.migration.stream import Phase
from vfiodma.migration.transport import listen

PAGE = 4096
SIZE = int(os.environ.get("VFIODMA_BENCH_GUEST", str(256 << 20)))
WRITTEN = SIZE // PAGE // 4         # pages that the guest writes in each round: the limit is out of reach
RUNS = 5


class Writes:
    """A tracker of a guest that writes a quarter of its memory in every round."""

    def __init__(self, layout):
        self.chance, self.layout = random.Random(1), layout

    def start(self):
        pass

    def stop(self):
        pass

    def harvest(self, into: DirtyBitmap):
        block = self.layout.blocks[0]
        first = self.chance.randrange(block.npages - WRITTEN)
        block.region.view()[first * PAGE:(first + WRITTEN) * PAGE:PAGE] = bytes([self.chance.randrange(256)]) * WRITTEN
        into.set(first, WRITTEN)
        return WRITTEN


class Machine:
    """It has no state."""

    def stop(self):
        pass

    def resume(self):
        pass

    def state(self):
        return {}


def source(url, memory, postcopy, out):
    """Move memory away in a process of its own; tell what it took, but for the harvest, which is the guest here."""
    if pid := os.fork():
        return pid
    try:
        result = Migration(url, memory, Machine(), tracker=Writes, postcopy=postcopy, downtime_limit=1e-9,
                           max_rounds=2).run()
        late = result.postcopy
        os.write(out, json.dumps({"downtime": result.downtime - result.breakdown.scan, "late": late and late.seconds,
                                  "median": late and late.fault_median}).encode())
    finally:
        os._exit(0)


def move(postcopy):
    """Return what the source measured, and the seconds of reads that found no page."""
    touches: list[float] = []
    with contextlib.ExitStack() as parts:
        folder = parts.enter_context(tempfile.TemporaryDirectory())
        here = parts.enter_context(GuestMemory.memfd(SIZE))
        there = parts.enter_context(GuestMemory.memfd(SIZE))
        for memory in (here, there):        # present, and not zero
            with memory.region.view() as view:
                for at in range(0, SIZE, 32 << 20):
                    view[at:at + (32 << 20)] = random.Random(at).randbytes(1 << 20) * 32
        url = f"unix:{folder}/guest"
        listener = parts.enter_context(listen(url, timeout=30.0))
        read, write = os.pipe()
        pid = source(url, here, postcopy and Postcopy(2, when_needed=False), write)
        receiver = parts.enter_context(PageReceiver(listener.accept(30), lambda _: there, accept=listener.accept,
                                                    postcopy=postcopy))
        assert receiver.serve() is Phase.OWNER
        chance = random.Random(2)
        with there.region.view() as view:
            while receiver.missing and len(touches) < 20_000:
                at, began = chance.randrange(SIZE // PAGE) * PAGE, time.perf_counter()
                view[at]
                touches.append(time.perf_counter() - began)
        done = receiver.finish(60)
        os.waitpid(pid, 0)
        told = json.loads(os.read(read, 4096))
        os.close(read)
        os.close(write)
    waited = sorted(touches)[-done.faults:] if done and done.faults else []
    return told, waited


def test_downtime_and_faults_of_post_copy_beside_pre_copy(benchmark):
    """A guest that does not converge: the rest of it is moved while it stands still, or after that."""
    try:
        runs = [(move(False), move(True)) for _ in range(RUNS)]
    except VfioError as exc:
        pytest.skip(str(exc))
    benchmark.pedantic(lambda: None)
    pre = statistics.median(before["downtime"] for (before, _), _ in runs)
    post = statistics.median(after["downtime"] for _, (after, _) in runs)
    faults = sorted(seconds for _, (_, waited) in runs for seconds in waited)
    benchmark.extra_info.update(
        peer="the same guest by pre-copy alone", ratio=round(post / pre, 3), limit="< 1",
        downtime_ms=round(post * 1e3, 2), precopy_downtime_ms=round(pre * 1e3, 2), faults=len(faults),
        fault_us_median=round(statistics.median(faults) * 1e6) if faults else None,
        fault_us_p99=round(faults[int(len(faults) * 0.99)] * 1e6) if faults else None,
        fault_us_max=round(faults[-1] * 1e6) if faults else None,
        rest_ms=round(statistics.median(after["late"] for _, (after, _) in runs) * 1e3, 1))
