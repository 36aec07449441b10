"""Scripts for executor.c and the records it writes.

A file of scripts: u32 number of steps of the prelude, u32 number of scripts, the prelude's steps (the memory layout,
run before each script and not recorded), then each script: u64 number of steps, steps.  A step is 96 bytes
(``Step.LAYOUT``).  A record: u32 length, u32 wait status, then for each step s32 result or -errno, s32 change of the
locked pages since the prelude, u16 number of runs, and each run of bytes that changed: u16 offset, u16 length, bytes.
Offsets below 4096 are in the argument's page, those from 4096 on in the bitmap area.  After the script's steps every
slot is closed, one step each.
"""
import errno
import struct
from dataclasses import dataclass

PAGE = 4096
OPEN, CLOSE, IOCTL, MMAP, MUNMAP, MPROTECT, TOUCH, MLOCK, MADVISE, RLIMIT, CAPABILITY, ENTRY_LIMIT = range(12)
VALUE, READONLY, BITMAP, DESCRIPTOR = 1, 2, 4, 8
ANON, ANON_READONLY, SHARED_ANON, MEMFD, MEMFD_READONLY, MEMFD_PRIVATE, MEMFD_SHORT, NONE = range(8)
KINDS = ["anon", "anon read-only", "shared anon", "memfd", "memfd read-only", "memfd private",
         "memfd of 2 pages", "PROT_NONE"]
PATHS = ["container", "group 0", "group 1", "group 2", "/dev/iommu", "node 0", "node 1", "node 2", "node 3"]
SLOTS = ["c0", "c1", "g0", "g1", "g2", "g0'", "d0", "d1", "d2", "d3", "memfd", "null"]

ARG = 0x200000000000
BITMAP_AREA = ARG + 0x100000
BITMAP_SIZE = 8 * PAGE
DATA = ARG + 0x1000000
DATA_PAGES = 128
BIG = ARG + 0x10000000
BIG_PAGES = 1024

REQUESTS = {100: "GET_API_VERSION", 101: "CHECK_EXTENSION", 102: "SET_IOMMU", 103: "GET_STATUS", 104: "SET_CONTAINER",
            105: "UNSET_CONTAINER", 106: "GET_DEVICE_FD", 112: "GET_INFO", 113: "MAP_DMA", 114: "UNMAP_DMA",
            115: "ENABLE", 116: "DISABLE", 117: "DIRTY_PAGES", 118: "BIND_IOMMUFD", 119: "ATTACH_PT", 120: "DETACH_PT",
            0x80: "DESTROY", 0x81: "IOAS_ALLOC", 0x82: "IOAS_ALLOW_IOVAS", 0x83: "IOAS_COPY", 0x84: "IOAS_IOVA_RANGES",
            0x85: "IOAS_MAP", 0x86: "IOAS_UNMAP", 0x87: "OPTION", 0x88: "VFIO_IOAS", 0x89: "HWPT_ALLOC",
            0x8b: "HWPT_SET_DIRTY_TRACKING", 0x8c: "HWPT_GET_DIRTY_BITMAP", 0x8f: "IOAS_MAP_FILE",
            0x92: "IOAS_CHANGE_PROCESS"}


@dataclass(frozen=True)
class Step:
    op: int
    slot: int = 0
    flags: int = 0
    request: int = 0
    a: int = 0
    b: int = 0
    data: bytes = b""

    LAYOUT = struct.Struct("<4BI2Q72s")

    def encode(self):
        return self.LAYOUT.pack(self.op, self.slot, self.flags, len(self.data), self.request, self.a, self.b, self.data)

    def __str__(self):
        slot = SLOTS[self.slot]
        if self.op == OPEN:
            return f"{slot} = open({PATHS[self.a]})"
        if self.op == CLOSE:
            return f"close({slot})"
        if self.op == IOCTL:
            return f"{self.show_request()}({slot}, {self.show_argument()})"
        if self.op in (RLIMIT, ENTRY_LIMIT):
            return f"{['RLIMIT_MEMLOCK', 'dma_entry_limit'][self.op == ENTRY_LIMIT]} = {self.a:#x}"
        if self.op == CAPABILITY:
            return f"CAP_IPC_LOCK {'on' if self.request else 'off'}"
        name = ["mmap", "munmap", "mprotect", "touch", "mlock", "madvise"][self.op - MMAP]
        what = KINDS[self.request] if self.op == MMAP else self.request
        return f"{name}({show_address(self.a)}, {self.b // PAGE} pages, {what})"

    def show_request(self):
        number = self.request - 0x3b00
        return REQUESTS.get(number, f"ioctl {self.request:#x}")

    def show_argument(self):
        if self.flags & VALUE:
            return f"{self.a:#x}"
        text = f"at {show_address(self.a)}" + (" read-only" if self.flags & READONLY else "")
        number, data = self.request - 0x3b00, self.data
        if self.flags & DESCRIPTOR:
            word = self.flags >> 4
            text = f"word {word} = fd of {SLOTS[data[4 * word]]}, {text}"
        if number == 113 and len(data) == 32:
            argsz, flags, vaddr, iova, size = struct.unpack("<IIQQQ", data)
            return f"argsz={argsz}, flags={flags}, vaddr={show_address(vaddr)}, iova={iova:#x}, size={size:#x}, {text}"
        if number == 114 and len(data) >= 24:
            argsz, flags, iova, size = struct.unpack_from("<IIQQ", data)
            return f"argsz={argsz}, flags={flags}, iova={iova:#x}, size={size:#x}{self.show_bitmap(24)}, {text}"
        if number == 117 and len(data) == 48:
            argsz, flags, iova, size = struct.unpack_from("<IIQQ", data)
            return f"argsz={argsz}, flags={flags}, iova={iova:#x}, size={size:#x}{self.show_bitmap(24)}, {text}"
        if number == 106:
            return f"{data!r}, {text}"
        words = " ".join(f"{word:#x}" for word in struct.unpack(f"<{len(data) // 4}I", data[:len(data) // 4 * 4]))
        return f"words {words}, {text}"

    def show_bitmap(self, offset):
        if len(self.data) < offset + 24:
            return ""
        pgsize, size, where = struct.unpack_from("<QQQ", self.data, offset)
        return f", bitmap=(pgsize={pgsize:#x}, size={size:#x}, {show_address(where)}) over {self.b:#x}"


def show_address(address):
    for name, start, size in (("arg", ARG, 2 * PAGE), ("bitmap", BITMAP_AREA, BITMAP_SIZE + PAGE),
                              ("data", DATA, (DATA_PAGES + 8) * PAGE), ("big", BIG, (BIG_PAGES + 8) * PAGE)):
        if start - PAGE <= address < start + size:
            return f"{name}+{address - start:#x}"
    return f"{address:#x}"


def memory(first, pages, kind):
    return Step(MMAP, request=kind, a=DATA + first * PAGE, b=pages * PAGE)


#: The memory of every script: one of each kind side by side, so that a range may span several.
PRELUDE = [
    Step(MMAP, request=ANON, a=ARG, b=PAGE), Step(MMAP, request=ANON, a=BITMAP_AREA, b=BITMAP_SIZE),
    Step(MMAP, request=ANON, a=BIG, b=BIG_PAGES * PAGE),
    memory(0, 32, ANON), Step(TOUCH, request=1, a=DATA, b=16 * PAGE),
    memory(32, 16, MEMFD), memory(48, 8, MEMFD_READONLY), memory(56, 8, ANON_READONLY), memory(64, 4, NONE),
    memory(68, 16, SHARED_ANON), memory(84, 8, MEMFD_SHORT),
    memory(92, 16, MEMFD_PRIVATE), memory(108, 4, ANON), Step(TOUCH, request=1, a=DATA + 108 * PAGE, b=4 * PAGE),
    Step(MPROTECT, request=1, a=DATA + 108 * PAGE, b=4 * PAGE), memory(112, 16, ANON),
    Step(RLIMIT, a=8 << 20),
]


def encode(scripts):
    parts = [struct.pack("<II", len(PRELUDE), len(scripts)), *(step.encode() for step in PRELUDE)]
    for steps in scripts:
        parts += [struct.pack("<Q", len(steps)), *(step.encode() for step in steps)]
    return b"".join(parts)


@dataclass(frozen=True)
class Answer:
    """What one step did: result or -errno, locked pages, and (offset, bytes) of what was written."""
    result: int
    locked: int
    written: tuple

    def __str__(self):
        text = str(self.result) if self.result >= 0 else errno.errorcode.get(-self.result, str(self.result))
        text += f", {self.locked} locked" if self.locked else ""
        for offset, data in self.written:
            where = f"arg+{offset:#x}" if offset < PAGE else f"bitmap+{offset - PAGE:#x}"
            text += f", {where}: {data[:64].hex()}" + (f"... {len(data)} bytes" if len(data) > 64 else "")
        return text


DIED = Answer(-9999, 0, ())


def split(raw):
    """Yield (wait status, answers as bytes) of each script."""
    at = 0
    while at < len(raw):
        length, status = struct.unpack_from("<II", raw, at)
        yield status, raw[at + 8:at + 8 + length]
        at += 8 + length


def decode(status, raw):
    """Return the answers of one script; the last one is DIED if its process did not come to its end."""
    answers, at = [], 0
    while at < len(raw):
        result, locked, runs = struct.unpack_from("<iiH", raw, at)
        at += 10
        written = []
        for _ in range(runs):
            offset, length = struct.unpack_from("<HH", raw, at)
            written.append((offset, raw[at + 4:at + 4 + length]))
            at += 4 + length
        answers.append(Answer(result, locked, tuple(written)))
    return [*answers, DIED] if status else answers
