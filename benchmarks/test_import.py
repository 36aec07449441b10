"""`import vfiodma` beside the start of an interpreter and beside `import numpy`."""
import statistics
import subprocess
import sys

LIMIT_MS = 60
MEASURE = "import time; start = time.perf_counter(); import {}; print((time.perf_counter() - start) * 1e3)"


def import_ms(module):
    command = [sys.executable, "-c", MEASURE.format(module)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_import_vfiodma(benchmark):
    peer = statistics.median(import_ms("numpy") for _ in range(7))
    own = []
    benchmark.pedantic(lambda: own.append(import_ms("vfiodma")), rounds=15, warmup_rounds=2)
    benchmark.extra_info.update(import_ms=round(statistics.median(own), 2), limit_ms=LIMIT_MS, peer="import numpy",
                                peer_ms=round(peer, 2), ratio=round(peer / statistics.median(own), 2))
    assert statistics.median(own) < LIMIT_MS
