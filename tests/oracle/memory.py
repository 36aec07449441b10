"""User memory as a driver sees it, and the process whose locked pages are counted."""
import ctypes
import errno
import os
import re
import resource

PAGE = 4096
#: First address that no user memory can have (4-level page tables).
USER_END = 0x7ffffffff000


def fault():
    return OSError(errno.EFAULT, os.strerror(errno.EFAULT))


class FakeMemory:
    """Pages made up by a test: address -> bytes, with protections; no real memory is touched."""

    def __init__(self):
        self.pages = {}                 # page number -> (bytearray, writable)
        self.touched = set()            # pages that are no longer the zero page

    def add(self, address, size, writable=True):
        for page in range(address // PAGE, (address + size) // PAGE):
            self.pages[page] = (bytearray(PAGE), writable)

    def remove(self, address, size):
        for page in range(address // PAGE, (address + size) // PAGE):
            self.pages.pop(page, None)
            self.touched.discard(page)

    def read(self, address, size):
        """Return bytes; EFAULT if one of them is not there."""
        out = bytearray()
        while len(out) < size:
            data, _ = self.pages.get((address + len(out)) // PAGE, (None, False))
            if data is None:
                raise fault()
            offset = (address + len(out)) % PAGE
            out += data[offset:offset + size - len(out)]
        return bytes(out)

    def write(self, address, data):
        """Store bytes up to the first that cannot be stored: then EFAULT."""
        for at, byte in enumerate(data, address):
            page, writable = self.pages.get(at // PAGE, (None, False))
            if not writable:
                raise fault()
            page[at % PAGE] = byte
            self.touched.add(at // PAGE)

    def pin(self, vaddr, write):
        """Pin one page: return (errno or 0, True if it is the zero page)."""
        _, writable = self.pages.get(vaddr // PAGE, (None, False))
        if vaddr // PAGE not in self.pages or (write and not writable):
            return errno.EFAULT, False
        if write:
            self.touched.add(vaddr // PAGE)
        return 0, vaddr // PAGE not in self.touched


class ProcessMemory:
    """The memory of this process.  Every access is checked by the kernel: a bad address is EFAULT, never a signal."""

    POPULATE_READ, POPULATE_WRITE = 22, 23

    class IoVec(ctypes.Structure):
        _fields_ = [("base", ctypes.c_uint64), ("size", ctypes.c_uint64)]

    def __init__(self):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.madvise.argtypes = [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int]
        for call in (self.libc.process_vm_readv, self.libc.process_vm_writev):
            call.argtypes = [ctypes.c_int, *[ctypes.c_void_p, ctypes.c_ulong] * 2, ctypes.c_ulong]
            call.restype = ctypes.c_ssize_t

    def transfer(self, call, address, buffer, size):
        local = self.IoVec(ctypes.addressof(buffer), size)
        remote = self.IoVec(address % (1 << 64), size)
        return call(os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)

    def read(self, address, size):
        buffer = ctypes.create_string_buffer(size or 1)
        if size and self.transfer(self.libc.process_vm_readv, address, buffer, size) != size:
            raise fault()
        return buffer.raw[:size]

    def write(self, address, data):
        """Store bytes up to the first that cannot be stored: then EFAULT."""
        buffer = (ctypes.c_char * len(data)).from_buffer_copy(data)
        if self.transfer(self.libc.process_vm_writev, address, buffer, len(data)) != len(data):
            raise fault()

    def pin(self, vaddr, write):
        zero = not write and self.is_zero_page(vaddr)
        if self.libc.madvise(vaddr, PAGE, self.POPULATE_WRITE if write else self.POPULATE_READ):
            return errno.EFAULT, False
        return 0, zero

    @staticmethod
    def is_zero_page(vaddr):
        """True for private anonymous memory that was never written: absent, or mapped without a page of its own."""
        try:
            with open("/proc/self/pagemap", "rb") as stream:
                stream.seek(vaddr // PAGE * 8)
                entry = int.from_bytes(stream.read(8), "little")
            with open("/proc/self/maps") as stream:
                for line in stream:
                    start, end, mode, inode = re.match(r"(\w+)-(\w+) (\S+) \w+ \S+ (\d+)", line).groups()
                    if int(start, 16) <= vaddr < int(end, 16):
                        private = mode[3] == "p" and inode == "0"
                        break
                else:
                    return False
        except (OSError, ValueError, OverflowError):
            return False
        present, swapped, file, exclusive = (entry >> bit & 1 for bit in (63, 62, 61, 56))
        return private and not swapped and not file and not (present and exclusive)


class Process:
    """Who calls: a limit of locked pages, CAP_IPC_LOCK or not, and what is charged."""

    def __init__(self, limit=2048, has_cap=True):
        self.limit = limit
        self.has_cap = has_cap
        self.charged = 0

    def limit_pages(self):
        return self.limit

    def privileged(self):
        return self.has_cap

    def other_locked(self):
        """Pages locked by mlock."""
        return 0

    def locked(self):
        return self.charged + self.other_locked()


class ThisProcess(Process):
    """The running process: its RLIMIT_MEMLOCK, capabilities and VmLck."""

    def limit_pages(self):
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return 1 << 64 if soft < 0 else soft // PAGE

    def privileged(self):
        return bool(int(self.status("CapEff"), 16) >> 14 & 1)

    def other_locked(self):
        return int(self.status("VmLck").split()[0]) * 1024 // PAGE

    @staticmethod
    def status(key):
        with open("/proc/self/status") as stream:
            return re.search(rf"^{key}:\s+(.*)", stream.read(), re.MULTILINE)[1]
