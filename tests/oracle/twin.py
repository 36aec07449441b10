"""SoftwareVfio and the oracle side by side: every call goes to both, and everything a caller can see must agree.

The oracle works on made-up memory that has the same addresses and bytes as the real one.
"""
import ctypes
import errno
import mmap
import resource
import struct
from collections import Counter

from vfiodma import SoftwareGroup, SoftwareVfio

from .container import BASE, Group, Machine
from .memory import PAGE, FakeMemory, Process
from .type1 import WouldBlock

CAP_IPC_LOCK = 14
MADV_NOHUGEPAGE = 15
FILLER = 0xaa
#: Arguments: one page, then nothing.
ARG_SIZE = PAGE
BITMAP_SIZE = 2 * PAGE
DATA_PAGES, READONLY_PAGES = 160, 4

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.capget.argtypes = libc.capset.argtypes = [ctypes.c_void_p, ctypes.c_void_p]


#: A mapping may lead beyond the end (nobody checks a new vaddr): nothing of the process may stand there.
END_SIZE = 64 << 20


class Memory:
    """Private anonymous memory with a hole behind each part, and its image for the oracle."""

    def __init__(self):
        size = ARG_SIZE + PAGE + BITMAP_SIZE + PAGE + (DATA_PAGES + READONLY_PAGES) * PAGE + END_SIZE
        self.map = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.map.madvise(MADV_NOHUGEPAGE)
        self.arg = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.bitmap = self.arg + ARG_SIZE + PAGE
        self.data = self.bitmap + BITMAP_SIZE + PAGE
        self.readonly = self.data + DATA_PAGES * PAGE
        end = self.readonly + READONLY_PAGES * PAGE
        for hole, size in ((self.bitmap - PAGE, PAGE), (self.data - PAGE, PAGE), (end, END_SIZE)):
            libc.mprotect(hole, size, 0)
        libc.mprotect(self.readonly, READONLY_PAGES * PAGE, mmap.PROT_READ)

    def image(self):
        """Forget all content; return the oracle's memory."""
        self.map.madvise(mmap.MADV_DONTNEED)
        fake = FakeMemory()
        fake.add(self.arg, ARG_SIZE)
        fake.add(self.bitmap, BITMAP_SIZE)
        fake.add(self.data, DATA_PAGES * PAGE)
        fake.add(self.readonly, READONLY_PAGES * PAGE, writable=False)
        return fake

    def name(self, address):
        for name, start, size in (("data", self.data, DATA_PAGES * PAGE), ("bitmap", self.bitmap, BITMAP_SIZE),
                                  ("readonly", self.readonly, READONLY_PAGES * PAGE), ("arg", self.arg, ARG_SIZE)):
            if start <= address < start + size:
                return f"{name}+{address - start:#x}"
        return f"{address:#x}"


def set_capability(on):
    """Raise or lower CAP_IPC_LOCK of this thread; return whether it is on."""
    header, data = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    libc.capget(header, data)
    words = list(struct.unpack("6I", data.raw))
    bit = 1 << CAP_IPC_LOCK
    words[0] = words[0] & ~bit | (bit if on and words[1] & bit else 0)
    libc.capset(header, struct.pack("6I", *words))
    return bool(words[0] & bit)


class Disagreement(AssertionError):
    pass


class Twin:
    """One host, twice.  Containers, groups and devices are named: "c0", "g1", "d1"."""

    def __init__(self, memory, kernel, groups):
        self.memory, self.fake = memory, memory.image()
        self.kernel = kernel
        self.agreed = True
        self.process = Process()
        # ``groups``: number -> keyword arguments of both kinds of group.
        self.real, self.oracle = self.hosts(kernel, groups)
        self.fds = {}                                   # name -> (real, oracle)
        self.listening = {}                             # id of a real instance -> (instance, pins)
        self.before = self.real.locked_pages()
        self.old_limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        self.old_capability = set_capability(True)
        self.process.has_cap = self.old_capability
        self.script = [f"kernel {kernel}", *(f"group {n}: {show(g)}" for n, g in groups.items())]
        self.limit(2048)

    def hosts(self, kernel, groups):
        """Return the software VFIO and the oracle's host."""
        return (SoftwareVfio(kernel, [SoftwareGroup(n, [self.device(n)], **g) for n, g in groups.items()]),
                Machine(kernel, [Group(n, [self.device(n)], **g) for n, g in groups.items()], self.fake, self.process,
                        foreign_open=lambda fd: fd == 0))

    @staticmethod
    def device(number):
        return f"0000:00:{number:02x}.0"

    def finish(self):
        """Close everything.  After a disagreement nothing is compared any more."""
        try:
            for name in sorted(self.fds):
                if self.agreed:
                    self.close(name)
            if self.agreed:
                self.agree("locked pages at the end", self.real.locked_pages() - self.before, self.process.charged)
        finally:
            for real_fd, _ in self.fds.values():
                self.real.close(real_fd)
            self.fds.clear()
            self.restore()

    def restore(self):
        set_capability(self.old_capability)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, self.old_limit)

    # -- comparing

    def agree(self, what, real, oracle):
        if real != oracle:
            self.agreed = False
            raise Disagreement("\n".join([what, f"    software: {show(real)}", f"    oracle:   {show(oracle)}",
                                          *self.script]))

    def both(self, text, real, oracle):
        """Call both; return the common outcome ("ret", value) or ("err", name), or None if the oracle would block."""
        try:
            wanted = outcome(oracle)
        except WouldBlock:
            return None
        self.script.append(text)
        try:
            got = outcome(real)
        except Exception as error:                      # anything but an OSError
            raise Disagreement(f"{text}: {error!r}, oracle: {wanted}\n" + "\n".join(self.script)) from error
        self.script[-1] += f" -> {show(wanted)}"
        self.agree(text, got, wanted)
        return wanted

    def call(self, text, name, request, arg, argument=None, bitmap=None, tail=None):
        """An ioctl of a named descriptor on both, comparing the bytes that were written back."""
        real_fd, oracle_fd = self.fds[name]
        where = self.memory.arg
        if argument is not None:
            real_bytes, oracle_bytes = argument if isinstance(argument, tuple) else (argument, argument)
            room = len(real_bytes) + 64 if tail is None else tail
            where = arg = self.memory.arg + ARG_SIZE - room if tail is not None else self.memory.arg
            # Only this test writes here, so the oracle's image never differs from what the implementation sees.
            ctypes.memmove(where, real_bytes[:room].ljust(room, bytes([FILLER])), room)
            self.fake.write(where, oracle_bytes[:room].ljust(room, bytes([FILLER])))
        if bitmap is not None:
            ctypes.memset(self.memory.bitmap, bitmap, BITMAP_SIZE)
            self.fake.write(self.memory.bitmap, bytes([bitmap]) * BITMAP_SIZE)
        result = self.both(text, lambda: self.real.ioctl(real_fd, BASE + request, arg),
                           lambda: self.oracle.ioctl(oracle_fd, BASE + request, arg))
        if result and argument is not None:
            self.agree(f"{text}: bytes written back", written(ctypes.string_at(where, room), real_bytes),
                       written(self.fake.read(where, room), oracle_bytes))
        if result and bitmap is not None:
            words = f"{BITMAP_SIZE // 8}Q"
            self.agree(f"{text}: bitmap words", struct.unpack(words, ctypes.string_at(self.memory.bitmap, BITMAP_SIZE)),
                       struct.unpack(words, self.fake.read(self.memory.bitmap, BITMAP_SIZE)))
        return result

    def check(self):
        """Compare what can be asked without changing anything."""
        self.agree("locked pages", self.real.locked_pages() - self.before, self.process.charged)
        for name in self.fds:
            if name[0] == "c" and self.instance(name):
                script = len(self.script)
                self.get_info(name, 1024)
                del self.script[script:]

    def instance(self, container):
        return self.oracle.files[self.fds[container][1]].type1

    # -- files

    def open(self, name):
        path = "/dev/vfio/vfio" if name[0] == "c" else f"/dev/vfio/{name[1:]}"
        fds = [None, None]

        def real():
            fds[0] = self.real.open(path)
            return "fd"

        def oracle():
            fds[1] = self.oracle.open(path)
            return "fd"

        if self.both(f"{name}: open({path})", real, oracle) == ("ret", "fd"):
            self.fds[name] = tuple(fds)

    def close(self, name):
        real_fd, oracle_fd = self.fds.pop(name)
        self.both(f"close({name})", lambda: self.real.close(real_fd), lambda: self.oracle.close(oracle_fd))

    def set_container(self, group, container):
        """``container``: a name, or a number that is no container."""
        fds = self.fds[container] if isinstance(container, str) else (container, container)
        return self.call(f"SET_CONTAINER({group}, {container})", group, 104, 0,
                         (struct.pack("i", fds[0]), struct.pack("i", fds[1])))

    def unset_container(self, group):
        return self.call(f"UNSET_CONTAINER({group})", group, 105, 0)

    def get_status(self, group, argsz):
        return self.call(f"GET_STATUS({group}, {argsz})", group, 103, 0, struct.pack("I", argsz))

    def get_device(self, group, name=None):
        device = f"d{group[1:]}"
        text = (name or self.device(int(group[1:]))).encode() + b"\0"
        real_fd, oracle_fd = self.fds[group]
        ctypes.memmove(self.memory.arg, text, len(text))
        self.fake.write(self.memory.arg, text)
        fds = [None, None]

        def real():
            fds[0] = self.real.ioctl(real_fd, BASE + 106, self.memory.arg)
            return "fd"

        def oracle():
            fds[1] = self.oracle.ioctl(oracle_fd, BASE + 106, self.memory.arg)
            return "fd"

        if self.both(f"{device}: GET_DEVICE_FD({group}, {text})", real, oracle) == ("ret", "fd"):
            self.fds[device] = tuple(fds)

    def plain(self, name, command, arg):
        """An ioctl whose argument is a value."""
        return self.call(f"ioctl({name}, {command}, {arg:#x})", name, command, arg)

    def set_iommu(self, container, kind):
        return self.call(f"SET_IOMMU({container}, {kind})", container, 102, kind)

    def check_extension(self, container, number):
        return self.call(f"CHECK_EXTENSION({container}, {number})", container, 101, number)

    # -- Type1

    def get_info(self, container, argsz, tail=None):
        room = min(argsz, 1024) if tail is None else 4
        return self.call(f"GET_INFO({container}, argsz={argsz}, room={tail})", container, 112, 0,
                         struct.pack("I", argsz).ljust(room, bytes([FILLER])), tail=tail)

    def map_dma(self, container, iova, vaddr, size, flags, argsz=32, tail=None):
        text = (f"MAP_DMA({container}, iova={iova:#x}, size={size:#x}, vaddr={self.memory.name(vaddr)}, "
                f"flags={flags}, argsz={argsz})")
        return self.call(text, container, 113, 0, struct.pack("IIQQQ", argsz, flags, vaddr, iova, size), tail=tail)

    def unmap_dma(self, container, iova, size, flags, bitmap=None, argsz=None, fill=0x55):
        """``bitmap`` = (page size, bytes, address)."""
        argument = struct.pack("IIQQ", argsz or (48 if bitmap else 24), flags, iova, size)
        text = (f"UNMAP_DMA({container}, iova={iova:#x}, size={size:#x}, flags={flags}, argsz={argsz}, "
                f"bitmap={self.show(bitmap)})")
        if bitmap:
            argument += struct.pack("QQQ", *bitmap)
        return self.call(text, container, 114, 0, argument, bitmap=fill if bitmap else None)

    def dirty(self, container, flags, argsz=8):
        return self.call(f"DIRTY_PAGES({container}, flags={flags}, argsz={argsz})", container, 117, 0,
                         struct.pack("II", argsz, flags))

    def get_bitmap(self, container, iova, size, bitmap, argsz=48, fill=0):
        text = (f"GET_BITMAP({container}, iova={iova:#x}, size={size:#x}, bitmap={self.show(bitmap)}, argsz={argsz}, "
                f"fill={fill:#x})")
        return self.call(text, container, 117, 0, struct.pack("IIQQQQQ", argsz, 4, iova, size, *bitmap), bitmap=fill)

    def show(self, bitmap):
        return bitmap and f"(pgsize={bitmap[0]:#x}, size={bitmap[1]:#x}, {self.memory.name(bitmap[2])})"

    # -- emulated devices

    def pair(self, container):
        """The two instances; the real one has a listener that gives pinned pages back."""
        real = self.real._files[self.fds[container][0]].type1
        if id(real) not in self.listening:
            pins = Counter()

            def give_back(iova, size):
                for page in [page for page in pins if iova <= page < iova + size]:
                    for _ in range(pins.pop(page)):
                        real.unpin_pages(page, 1)

            real.add_unmap_listener(give_back)
            self.listening[id(real)] = (real, pins)
        return real, self.instance(container), self.listening[id(real)][1]

    def pin_pages(self, container, group, iova, npages, prot):
        real, oracle, pins = self.pair(container)
        result = self.both(f"pin_pages({container}, {group}, {iova:#x}, {npages}, prot={prot})",
                           lambda: real.pin_pages(self.real._groups[int(group[1:])].iommu, iova, npages, prot) or 0,
                           lambda: oracle.pin_pages(self.oracle.groups[group[1:]], iova, npages, prot) and 0)
        if result == ("ret", 0):
            pins.update(iova + index * PAGE for index in range(npages))

    def unpin_pages(self, container, iova, npages):
        real, oracle, pins = self.pair(container)
        self.both(f"unpin_pages({container}, {iova:#x}, {npages})", lambda: real.unpin_pages(iova, npages),
                  lambda: oracle.unpin_pages(iova, npages))
        pins.subtract(iova + index * PAGE for index in range(npages))
        for page in [page for page, count in pins.items() if count <= 0]:
            del pins[page]

    def dma_write(self, container, iova, data):
        real, oracle, _ = self.pair(container)
        self.both(f"dma_write({container}, {iova:#x}, {len(data)} bytes)", lambda: real.dma_write(iova, data) or 0,
                  lambda: oracle.dma_rw(iova, data) and 0 or 0)

    def dma_read(self, container, iova, size):
        real, oracle, _ = self.pair(container)
        self.both(f"dma_read({container}, {iova:#x}, {size})", lambda: real.dma_read(iova, size),
                  lambda: oracle.dma_rw(iova, size=size))

    # -- limits

    def limit(self, pages):
        self.script.append(f"RLIMIT_MEMLOCK = {pages} pages")
        hard = self.old_limit[1]
        pages = pages if hard < 0 else min(pages, hard // PAGE)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (pages * PAGE, hard))
        self.process.limit = pages

    def privilege(self, on):
        self.process.has_cap = set_capability(on)
        self.script.append(f"CAP_IPC_LOCK {'on' if self.process.has_cap else 'off'}")

    def entry_limit(self, value):
        self.script.append(f"dma_entry_limit = {value}")
        self.real.dma_entry_limit = self.oracle.dma_entry_limit = value


def outcome(call):
    try:
        value = call()
    except OSError as error:
        return "err", errno.errorcode.get(error.errno, error.errno)
    return "ret", value or 0


def written(after, before):
    """The bytes that differ, as (offset, hex)."""
    before = before.ljust(len(after), bytes([FILLER]))
    return [(index, f"{a:02x}") for index, (a, b) in enumerate(zip(after, before, strict=False)) if a != b]


def show(value):
    if isinstance(value, dict):
        return ", ".join(f"{key}={show(item)}" for key, item in value.items())
    if isinstance(value, (tuple, list)):
        if len(value) > 64 and isinstance(value[0], int):           # words of a bitmap
            return " ".join(f"{index}:{word:x}" for index, word in enumerate(value) if word)
        return "(" + ", ".join(map(show, value)) + ")"
    return hex(value) if isinstance(value, int) and value > 9 else str(value)
