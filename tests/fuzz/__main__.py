"""Compare the model with a kernel of the lab over random scripts.

    python -m tests.fuzz --kernel 6.12 --sequences 20000 --seed 1

Exit status 0 if all agree.  A script that differs is shrunk and printed with both answers.
"""
import argparse
import signal
import sys
import time

from . import fuzz
from .players import LAB


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="6.12", choices=["6.1", "6.12", "7.2", "6.12-iommufd", "7.2-iommufd"])
    parser.add_argument("--sequences", type=int, default=20000)
    parser.add_argument("--first", type=int, default=0, help="number of the first sequence")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--stop-after", type=int, default=5, metavar="DIFFERENCES")
    parser.add_argument("--lab", default=LAB, help="the kernel-lab program")
    options = parser.parse_args()
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))         # so that the guest is ended too

    def progress(done, found):
        print(f"{done} sequences, {found} differences, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    found = 0
    for difference in fuzz(options.kernel, options.seed, options.sequences, first=options.first, length=options.steps,
                           batch=options.batch, lab=options.lab, progress=progress):
        found += 1
        print(difference, flush=True)
        if found >= options.stop_after:
            break
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
