"""Ask a device about its migration, and write down the answers; as device_answers.py does for the rest.

In a guest of the lab whose kernel has the sample devices, ``python tests/migration_answers.py OUT/7.2.json.gz`` records
those of mtty (migration) and mdpy (a display).
"""

import ctypes
import gzip
import itertools
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

from device_answers import FEATURE, GFX, RESET, Asker

GET, SET = 1 << 16, 1 << 17
STATES = range(10)


class MigrationAsker(Asker):
    def set_state(self, target, fd=77):
        """Return [errno, state and descriptor as written back (1 = there is one)], and the descriptor."""
        data = ctypes.create_string_buffer(struct.pack("=IIIi", 16, SET | 2, target, fd), 16)
        try:
            result = self.system.ioctl(self.fd, FEATURE, ctypes.addressof(data))
        except OSError as exc:
            result = -exc.errno
        state, fd = struct.unpack_from("=Ii", data.raw, 8)
        return [result, state, min(fd, 1) if fd >= 0 else fd], (fd if not result and fd >= 0 else None)

    def state(self):
        return struct.unpack_from(
            "=I", bytes.fromhex(self.call(FEATURE, struct.pack("=IIIi", 16, GET | 2, 9, 9))[1]), 8
        )[0]

    def read(self, fd, size):
        """Return the errno, or the number of bytes."""
        try:
            return len(self.system.read(fd, size) if hasattr(self.system, "read") else os.read(fd, size))
        except OSError as exc:
            return -exc.errno

    def write(self, fd, data):
        try:
            return self.system.write(fd, data) if hasattr(self.system, "write") else os.write(fd, data)
        except OSError as exc:
            return -exc.errno

    def precopy_info(self, fd, argsz=24):
        data = ctypes.create_string_buffer(struct.pack("=IIQQ", argsz, 9, 9, 9), 24)
        try:
            return self.system.ioctl(fd, 0x3B64 + 21, ctypes.addressof(data))
        except OSError as exc:
            return -exc.errno

    def back(self, *fds):
        """Return to RUNNING, and close."""
        self.call(RESET)
        for fd in fds:
            if fd is not None:
                self.system.close(fd)

    def every_pair(self):
        log = []
        for current, target in itertools.product(STATES, repeat=2):
            first, fd = self.set_state(current)
            if current and first[0]:
                self.back(fd)
                log.append([current, target, None])
                continue
            before = self.state()
            answer, other = self.set_state(target)
            after = self.state()
            log.append([current, target, before, answer, after])
            self.back(fd, other)
        self.answers["pairs"] = log

    def streams(self):
        """What the descriptors of every state answer, then and later."""
        log = []
        for states in (
            (3,),
            (3, 1),
            (4,),
            (4, 1),
            (6,),
            (6, 7),
            (6, 7, 3),
            (6, 2),
            (6, 3),
            (6, 3, 1),
            (3, 1, 3),
            (4, 2),
        ):
            fds = [self.set_state(state)[1] for state in states]
            for fd in (fd for fd in fds if fd is not None):
                log.append(
                    [
                        states,
                        "pread",
                        self.attempt(self.system.pread, fd, 4, 0) if states[0] != 4 else None,
                        "argsz",
                        self.precopy_info(fd, 23),
                        "info",
                        self.precopy_info(fd),
                        "read 0",
                        self.read(fd, 0),
                        "write",
                        self.write(fd, b"x") if states[0] != 4 else None,
                        "read",
                        self.read(fd, 1) if states[0] == 4 else 0,
                    ]
                )
                if states[0] != 4:
                    sizes = [self.read(fd, 1 << 16) for _ in range(3)]
                    log[-1].append([min(size, 1) for size in sizes])
            self.back(*fds)
        self.answers["streams"] = log

    def features(self):
        self.answers["features"] = [
            [
                number,
                ops,
                argsz,
                self.call(FEATURE, struct.pack("=II", argsz, ops << 16 | number) + bytes(40), show=False),
            ]
            for number, ops, argsz in itertools.product((0, 1, 2, 6, 7, 8, 9, 10, 11, 12), range(8), (8, 15, 16))
            if (number, ops & 6) != (2, 2)
        ]

    def display(self):
        log = []
        for argsz, flags in itertools.product((59, 60, 63, 64, 128), range(10)):
            data = struct.pack("=III", argsz, flags, 0) + b"\xaa" * 52
            result, back = self.call(GFX, data)
            log.append([argsz, flags, result, back == data.hex(), back[96:] if flags in (2, 4) else None])
        self.answers["display"] = log


def open_mdev(system, container, name):
    path = f"/sys/bus/mdev/devices/{name}/iommu_group"
    group = system.open(f"/dev/vfio/{os.path.basename(os.readlink(path))}")
    word = ctypes.c_int(container)
    system.ioctl(group, 0x3B64 + 4, ctypes.addressof(word))
    try:
        system.ioctl(container, 0x3B64 + 2, 3)
    except OSError:
        pass  # set already
    text = ctypes.create_string_buffer(name.encode())
    return system.ioctl(group, 0x3B64 + 6, ctypes.addressof(text)), group


def main():
    from vfiodma.kernel import KernelVfio

    system, result = KernelVfio(), {}
    for module, kind, name in (
        ("mtty", "mtty-1", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"),
        ("mdpy", "mdpy-vga", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"),
    ):
        subprocess.run(["modprobe", module], check=True)
        Path(f"/sys/class/mdev_bus/{module}/mdev_supported_types/{kind}/create").write_text(name)
        container = system.open("/dev/vfio/vfio")
        fd, group = open_mdev(system, container, name)
        asker = MigrationAsker(system, fd)
        if module == "mtty":
            asker.answers["flags"] = asker.call(FEATURE, struct.pack("=IIQ", 16, GET | 1, 0))
            asker.features()
            asker.every_pair()
            asker.streams()
        else:
            asker.display()
        result[module] = asker.answers
        for number in (fd, group, container):
            system.close(number)
    Path(sys.argv[1]).write_bytes(gzip.compress(json.dumps(result, separators=(",", ":")).encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
