"""Random bytes at the raw door of a POWER host: every call answers or is a VfioError; closing gives everything back."""
import ctypes
import mmap
import os
import random
import struct

import pytest

from vfiodma import SoftwareGroup, SoftwareVfio
from vfiodma.backends.software.spapr import TceGroup
from vfiodma.errors import VfioError

PAGE, BASE = 4096, 0x3b64
SEQUENCES = {"deep": 20000, "short": 500}.get(os.environ.get("VFIODMA_PROFILE", ""), 2000)
FORMS = {BASE + 12: "=IIIIQII", BASE + 13: "=IIQQQ", BASE + 14: "=IIQQ", BASE + 15: "", BASE + 16: "",
         BASE + 17: "=IIQQ", BASE + 18: "=IIQQ", BASE + 19: "=IIIIQIIQ", BASE + 20: "=IIQ", BASE + 21: "=IIIIIIQQ",
         BASE + 2: "", BASE + 1: ""}
AREA = mmap.mmap(-1, 64 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
START = ctypes.addressof(ctypes.c_char.from_buffer(AREA))
ARGUMENT = ctypes.create_string_buffer(64)
#: Values that mean something somewhere: places, sizes, shifts, levels, flags.
VALUES = [0, 1, 2, 3, 5, 7, 12, 16, 24, 40, 64, PAGE, 1 << 16, 1 << 20, 1 << 31, 1 << 32, 1 << 40, 1 << 53, 1 << 59,
          1 << 63, (1 << 64) - 1, (1 << 64) - PAGE, START, START + PAGE, START + 63 * PAGE, 2 * PAGE, 64 * PAGE]


def argument(rng, form):
    """A struct of plausible and other values, or bytes of any kind."""
    if rng.randrange(8) == 0:
        return rng.randbytes(rng.randrange(65))
    values = [rng.choice(VALUES) if rng.randrange(6) else rng.getrandbits(64) for _ in form[1:]]
    if rng.randrange(8):
        values[0] = struct.calcsize(form) + rng.choice([0, 0, 0, 8])
    if rng.randrange(4):
        values[1] = rng.choice([0, 0, 1, 3])
    return struct.pack(form, *(value & ((1 << 32) - 1) if kind == "I" else value
                               for kind, value in zip(form[1:], values, strict=True)))


def host(rng):
    groups = [SoftwareGroup(n, [f"0000:00:0{n}.0"], eeh=rng.random() < 0.8, tce=TceGroup(
        tce32_size=rng.choice([0, PAGE, 1 << 20, 2 << 30]), pgsizes=rng.choice([0x1011000, rng.getrandbits(64) | 1]),
        max_windows=rng.choice([2, 2, 0]), levels=rng.choice([1, 5, 40]))) for n in range(2)]
    return SoftwareVfio(rng.choice(["5.4", "6.1", "7.2"]), groups, platform="powernv",
                        memlock_limit=rng.choice([None, 1 << 20, 0]))


@pytest.mark.timeout(0)
def test_random_calls_are_answered():
    before, answers = SoftwareVfio().locked_pages(), set()
    for seed in range(SEQUENCES):
        rng = random.Random(seed)
        vfio = host(rng)
        container = vfio.open("/dev/vfio/vfio")
        fds = [vfio.open(f"/dev/vfio/{n}") for n in range(2)]
        for group in fds[:rng.randrange(1, 3)]:
            vfio.ioctl(group, BASE + 4, ctypes.addressof(ctypes.c_int(container)))
        try:
            vfio.ioctl(container, BASE + 2, rng.choice([2, 7, 7, 7]))
        except VfioError as exc:
            answers.add(exc.errno)
        for _ in range(30):
            request = rng.choice(list(FORMS))
            where = rng.getrandbits(64)
            if FORMS[request]:
                data = argument(rng, FORMS[request])
                ctypes.memmove(ARGUMENT, data.ljust(64, b"\xaa"), 64)
                where = ctypes.addressof(ARGUMENT) if rng.randrange(20) else rng.choice(VALUES)
            try:
                answers.add(vfio.ioctl(container, request, where) > 0)
            except VfioError as exc:
                answers.add(exc.errno)
            except BaseException as exc:
                raise AssertionError(f"seed {seed}: request {request:#x} of {data.hex()}") from exc
        if rng.randrange(4) == 0:
            vfio.ioctl(fds[0], BASE + 5, 0)
        for fd in rng.sample([container, *fds], 3):
            vfio.close(fd)
        assert vfio.locked_pages() == before, f"seed {seed}"
    assert len(answers) > 8
