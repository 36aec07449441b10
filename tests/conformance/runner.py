#!/usr/bin/env python3
"""Replay recorded VFIO scenarios against an implementation and compare with what real kernels answered.

    runner.py --kernel 6.1|6.12|7.2 [--set type1|emulated|iommufd] [--target MODULE:FACTORY|kernel] [--only PATTERN]
              [--all-tags] [--quiet] [--record FILE]

FACTORY(kernel, set_name) returns an object with the methods of class Kernel below; without --target it is
software_target:make_target.  "--target kernel" drives the running kernel (root, on a machine as in
tests/data/conformance/README.md).

Every scenario runs in a forked process of its own with fresh descriptors; what a step records: {"ret": n} or
{"err": "EINVAL"}, and for ioctls "wrote": [[offset, hex], ...], the bytes of the argument that the call changed (the
argument is followed by 0xAA filler, so every byte written shows).

Exit status 0 if all agree, 1 if some differ; the last line is "N passed, N failed, N skipped".
"""
import argparse
import ctypes
import errno
import fnmatch
import importlib
import json
import os
import pathlib
import re
import resource
import signal
import struct
import sys
import time
import traceback

PAGE = 4096
MEMLOCK = 8 << 20
libc = ctypes.CDLL(None, use_errno=True)
libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong]
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

DEVICES = ["0000:00:10.0", "0000:00:11.0", "0000:01:01.0", "0000:01:02.0"]
REQUESTS = dict(GET_API_VERSION=100, CHECK_EXTENSION=101, SET_IOMMU=102, GROUP_GET_STATUS=103, GROUP_SET_CONTAINER=104,
                GROUP_UNSET_CONTAINER=105, GROUP_GET_DEVICE_FD=106, DEVICE_GET_INFO=107, DEVICE_GET_REGION_INFO=108,
                GET_INFO=112, MAP_DMA=113, UNMAP_DMA=114, DIRTY_PAGES=117, DEVICE_BIND_IOMMUFD=118,
                DEVICE_ATTACH_IOMMUFD_PT=119, DEVICE_DETACH_IOMMUFD_PT=120,
                IOMMU_DESTROY=0x80, IOAS_ALLOC=0x81, IOAS_ALLOW_IOVAS=0x82, IOAS_COPY=0x83, IOAS_IOVA_RANGES=0x84,
                IOAS_MAP=0x85, IOAS_UNMAP=0x86, IOMMU_OPTION=0x87, IOMMU_VFIO_IOAS=0x88, HWPT_ALLOC=0x89,
                GET_HW_INFO=0x8a, HWPT_SET_DIRTY_TRACKING=0x8b, HWPT_GET_DIRTY_BITMAP=0x8c, IOAS_MAP_FILE=0x8f,
                IOAS_CHANGE_PROCESS=0x92, IOMMU_TEST=0xa0)
DATA = pathlib.Path(__file__).resolve().parent.parent / "data" / "conformance"
PROT = {"none": 0, "r": 1, "w": 2, "x": 4, "rw": 3}
MAP_SHARED, MAP_PRIVATE, MAP_ANON, MAP_FIXED_NOREPLACE = 1, 2, 0x20, 0x100000
ENTRY_LIMIT = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit"


def check(value):
    """Turn libc's -1 into an OSError."""
    if value in (-1, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "")
    return value


class Kernel:
    """The implementation under test: the running kernel.  Another one needs the same methods."""

    def open(self, step):
        kind = step["kind"]
        if kind == "container":
            path = "/dev/vfio/vfio"
        elif kind == "group":
            bdf = DEVICES[step["index"]]
            path = "/dev/vfio/" + os.path.basename(os.readlink(f"/sys/bus/pci/devices/{bdf}/iommu_group"))
        elif kind == "mdev":
            path = "/dev/vfio/" + os.path.basename(os.readlink(mediated_device() + "/iommu_group"))
        elif kind == "iommu":
            path = "/dev/iommu"
        elif kind == "cdev":
            path = "/dev/vfio/devices/" + os.listdir(f"/sys/bus/pci/devices/{DEVICES[step['index']]}/vfio-dev")[0]
        else:
            path = step["path"]
        return os.open(path, os.O_RDWR)

    def ioctl(self, handle, request, arg):
        return check(libc.ioctl(handle, request, arg & 0xffffffffffffffff))

    def close(self, handle):
        os.close(handle)

    def number(self, handle):
        """The file descriptor number to put in a struct."""
        return handle

    def pread(self, handle, length, offset):
        return os.pread(handle, length, offset)

    def pwrite(self, handle, data, offset):
        return os.pwrite(handle, data, offset)

    def locked_pages(self):
        """Pages that the calling process has locked, mappings included."""
        return vm_locked()

    def entry_limit(self, value):
        """Set the number of mappings that containers opened from now on may hold; return the old one."""
        with open(ENTRY_LIMIT, "r+") as stream:
            before = int(stream.read())
            stream.seek(0)
            stream.write(str(value))
        return before


def mediated_device():
    """Return the sysfs folder of a sample mediated device (modprobe mtty), made if need be."""
    path = "/sys/bus/mdev/devices/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    if not os.path.exists(path):
        with open("/sys/devices/virtual/mtty/mtty/mdev_supported_types/mtty-1/create", "w") as stream:
            stream.write(os.path.basename(path))
    return path


def map_memory(size, prot=3, kind="anon", file_size=None):
    """Map a buffer, always at the same well-aligned address in a scenario; return the address."""
    map_memory.count += 1
    where = 0x200000000000 + map_memory.count * (1 << 30)
    fd, flags = -1, MAP_PRIVATE
    if kind in ("anon", "thp", "shared-anon"):
        flags = (MAP_SHARED if kind == "shared-anon" else MAP_PRIVATE) | MAP_ANON
    elif kind == "zero-shared":
        fd, flags = os.open("/dev/zero", os.O_RDWR), MAP_SHARED
    elif kind.startswith("memfd"):
        fd, flags = check(libc.memfd_create(b"probe", 4 if kind == "memfd-hugetlb" else 0)), MAP_SHARED
        os.ftruncate(fd, size if file_size is None else file_size)
        prot = 1 if kind == "memfd-readonly" else prot
    else:
        # tmpfs, as /tmp of the recorded machine: elsewhere writing a shared mapping is EFAULT from 6.5.
        path = f"/dev/shm/vfiodma-probe-{os.getpid()}"
        fd, flags = os.open(path, os.O_RDWR | os.O_CREAT), MAP_SHARED if kind == "file-shared" else MAP_PRIVATE
        os.ftruncate(fd, size)
        os.unlink(path)
    address = check(libc.mmap(where, size, prot, flags | MAP_FIXED_NOREPLACE, fd, 0))
    if kind == "thp":
        libc.madvise(address, size, 14)
    if fd >= 0:
        os.close(fd)
    return address


map_memory.count = 0


def vm_locked():
    with open("/proc/self/status") as stream:
        return int(re.search(r"^VmLck:\s+(\d+)", stream.read(), re.MULTILINE)[1]) * 1024 // PAGE


class Runner:
    ARENA = 4 * PAGE

    def __init__(self, target, row):
        self.target = target
        self.row = row
        self.fds = {}
        self.objects = {}
        self.buffers = {}
        self.edu = {}
        for name, spec in row.get("buffers", {}).items():
            try:
                self.add_buffer(name, spec)
            except OSError as error:
                self.buffers[name] = (0, 0)
                print("buffer", name, error, file=sys.stderr)
        self.arena = map_memory(self.ARENA + PAGE)
        check(libc.mprotect(self.arena + self.ARENA, PAGE, 0))
        self.locked = self.target.locked_pages()

    def add_buffer(self, name, spec):
        prot = PROT[spec.get("prot", "rw")]
        address = map_memory(spec["size"], prot if spec.get("fill") is None else 3, spec.get("type", "anon"),
                             spec.get("file_size"))
        self.buffers[name] = (address, spec["size"])
        if spec.get("fill") is not None:
            ctypes.memset(address, spec["fill"], spec["size"])

    def address(self, buffer, offset=0):
        return self.buffers[buffer][0] + offset

    def encode(self, fields):
        out = b""
        for kind, value in fields:
            if kind == "ptr":
                out += struct.pack("Q", self.address(*value))
            elif kind == "fd":
                out += struct.pack("i", self.target.number(self.fds[value]))
            elif kind == "id":
                out += struct.pack("I", self.objects[value] if isinstance(value, str) else value)
            elif kind == "cstr":
                out += (DEVICES[int(value[4:])] if value.startswith("@dev") else value).encode() + b"\0"
            elif kind == "hex":
                out += bytes.fromhex(value)
            else:
                out += struct.pack({"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "s32": "i"}[kind], value)
        return out

    def run(self, steps):
        results = []
        for step in steps:
            try:
                result = getattr(self, "do_" + step["op"])(step)
                results.append(result if isinstance(result, dict) else {"ret": result or 0})
            except OSError as error:
                results.append({"err": errno.errorcode.get(error.errno, str(error.errno))})
            except KeyError as error:
                results.append({"skip": f"no {error}"})
        return results

    # -- file descriptors

    def do_open(self, step):
        self.fds[step["save"]] = self.target.open(step)

    def do_close(self, step):
        self.target.close(self.fds.pop(step["fd"]))

    def do_ioctl(self, step):
        request = step["req"]
        if isinstance(request, str):
            request = 0x3b00 + REQUESTS[request]
        fd = self.fds[step["fd"]]
        if "struct" not in step:
            return self.target.ioctl(fd, request, step.get("arg", 0))
        data = self.encode(step["struct"])
        room = step.get("room", len(data) + 64)
        assert room <= self.ARENA
        data = data[:room].ljust(room, b"\xaa")
        where = self.arena + (self.ARENA - room if step.get("tail") else 0)
        ctypes.memmove(where, data, room)
        if step.get("readonly"):
            check(libc.mprotect(self.arena, self.ARENA, 1))
        result = {}
        try:
            result["ret"] = self.target.ioctl(fd, request, where)
        except OSError as error:
            result["err"] = errno.errorcode.get(error.errno, str(error.errno))
        if step.get("readonly"):
            check(libc.mprotect(self.arena, self.ARENA, 3))
        after = ctypes.string_at(where, room)
        wrote = [[m.start(), after[m.start():m.end()].hex()]
                 for m in re.finditer(rb"\x01+", bytes(a != b for a, b in zip(after, data, strict=True)))]
        if wrote:
            result["wrote"] = wrote
        if "save" in step and "ret" in result:
            self.fds[step["save"]] = result["ret"]
            result["ret"] = "fd"
        for name, offset in step.get("ids", {}).items():
            if "ret" in result:
                self.objects[name], = struct.unpack_from("I", after, offset)
        return result

    def do_avail(self, step):
        self.do_ioctl({"fd": step["fd"], "req": "GET_INFO", "struct": [["u32", 1024]], "room": 1024})
        raw = ctypes.string_at(self.arena, 1024)
        argsz, flags, pgsizes, cap = struct.unpack_from("IIQI", raw)
        while 24 <= cap < 1000 and flags & 2:
            number, version, following = struct.unpack_from("HHI", raw, cap)
            if number == 3:
                return {"avail": struct.unpack_from("I", raw, cap + 8)[0]}
            cap = following
        return {"avail": None}

    def do_read(self, step):
        return len(os.read(self.fds[step["fd"]], step["length"]))

    def do_write(self, step):
        return os.write(self.fds[step["fd"]], bytes.fromhex(step["hex"]))

    def do_lseek(self, step):
        return os.lseek(self.fds[step["fd"]], 0, os.SEEK_SET)

    def do_mmap_fd(self, step):
        check(libc.mmap(None, step["length"], 3, MAP_SHARED, self.fds[step["fd"]], 0))

    # -- memory

    def do_buffer(self, step):
        self.add_buffer(step["name"], step)

    def do_bytes(self, step):
        return {"bytes": ctypes.string_at(self.address(step["buffer"], step["offset"]), step["length"]).hex()}

    def do_fill(self, step):
        address, size = self.buffers[step["buffer"]]
        ctypes.memset(address + step["offset"], step["byte"], step["length"] or size - step["offset"])

    def do_put(self, step):
        data = struct.pack(f"{len(step['values'])}Q", *step["values"])
        ctypes.memmove(self.address(step["buffer"]), data, len(data))

    def do_touch_read(self, step):
        address, size = self.buffers[step["buffer"]]
        for offset in range(0, size, PAGE):
            ctypes.string_at(address + offset, 1)

    def do_munmap(self, step):
        check(libc.munmap(self.address(step["buffer"], step["offset"]), step["length"]))

    def do_mprotect(self, step):
        check(libc.mprotect(self.address(step["buffer"], step["offset"]), step["length"], PROT[step["prot"]]))

    def do_resident(self, step):
        address, size = self.buffers[step["buffer"]]
        vector = ctypes.create_string_buffer(size // PAGE)
        check(libc.mincore(address, size, ctypes.addressof(vector)))
        return {"resident": sum(byte & 1 for byte in vector.raw)}

    # -- process

    def do_locked(self, step):
        return {"locked": self.target.locked_pages() - self.locked}

    def do_memlock(self, step):
        value = step["pages"] * PAGE if "pages" in step else step["bytes"]
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (value, resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]))

    def do_mlock(self, step):
        check(libc.mlock(self.address(step["buffer"]), step["length"]))

    def do_drop_caps(self, step):
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)

    def do_child(self, step):
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            signal.alarm(15)
            os.close(reader)
            self.locked = self.target.locked_pages()
            os.write(writer, json.dumps(self.run(step["steps"])).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            data = stream.read()
        os.waitpid(pid, 0)
        return {"child": json.loads(data) if data else "died"}

    # -- the edu device

    def region(self, fd, index):
        self.do_ioctl({"fd": fd, "req": "DEVICE_GET_REGION_INFO", "room": 32,
                       "struct": [["u32", 32], ["u32", 0], ["u32", index]]})
        return struct.unpack_from("Q", ctypes.string_at(self.arena, 32), 24)[0]

    def do_mmap_bar(self, step):
        fd = self.fds[step["fd"]]
        self.enable(step["fd"])
        address = check(libc.mmap(None, step["length"], 3, MAP_SHARED, fd, self.region(step["fd"], 0)))
        self.buffers[step["save"]] = (address, step["length"])

    def enable(self, name):
        fd, config = self.fds[name], self.region(name, 7)
        command, = struct.unpack("H", self.target.pread(fd, 2, config + 4))
        self.target.pwrite(fd, struct.pack("H", command | 6), config + 4)      # memory space, bus master

    def do_dma(self, step):
        fd = self.fds[step["fd"]]
        if fd not in self.edu:
            self.edu[fd] = self.region(step["fd"], 0)
            self.enable(step["fd"])
        bar = self.edu[fd]
        reads = step["direction"] == "read"
        source, target, command = (step["iova"], 0x40000, 1) if reads else (0x40000, step["iova"], 3)
        for register, value in ((0x80, source), (0x88, target), (0x90, step["length"]), (0x98, command)):
            self.target.pwrite(fd, struct.pack("Q", value), bar + register)
        end = time.monotonic() + 10
        while struct.unpack("Q", self.target.pread(fd, 8, bar + 0x98))[0] & 1:
            if time.monotonic() > end:
                raise OSError(errno.ETIMEDOUT, "")
            time.sleep(0.005)


def limit_memlock():
    """Start from the soft limit of the recorded machine where this process may."""
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    if hard < 0 or hard >= MEMLOCK:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (MEMLOCK, hard))


def run_isolated(target, row, seconds=20):
    """Run a scenario in a process of its own; return its record."""
    record = {"name": row["name"]}
    limit = next((tag.split(":")[1] for tag in row["tags"] if tag.startswith("entry-limit:")), None)
    if limit is not None:
        before = target.entry_limit(int(limit))
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reader)
            signal.alarm(seconds)
            limit_memlock()
            runner = Runner(target, row)
            first = runner.run(row["prelude"])
            out = {"results": runner.run(row["steps"])}
            if any("err" in result or "skip" in result for result in first):
                out["prelude"] = first
            with os.fdopen(writer, "wb") as stream:
                stream.write(json.dumps(out).encode())
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        data = stream.read()
    _, status = os.waitpid(pid, 0)
    if limit is not None:
        target.entry_limit(before)
    record.update(json.loads(data) if data else {"died": status})
    return record


# What needs a second process, real pages or a real device: left out unless asked for.
HARDWARE_TAGS = {"process", "backing", "device", "file", "may-block", "dma", "mock", "cdev"}


def load(set_name):
    with open(DATA / f"{set_name}.jsonl", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def differences(expected, actual):
    """Yield (step index or "prelude", expected, actual) where two records differ."""
    if "died" in actual:
        yield "process", "survives", f"died, wait status {actual['died']}"
        return
    if expected.get("prelude") != actual.get("prelude"):
        yield "prelude", expected.get("prelude"), actual.get("prelude")
    for index, (want, got) in enumerate(zip(expected["results"], actual["results"], strict=True)):
        if want != got:
            yield index, want, got


def has_capabilities(*numbers):
    with open("/proc/self/status") as stream:
        effective = int(re.search(r"^CapEff:\s+(\w+)", stream.read(), re.MULTILINE)[1], 16)
    return all(effective >> number & 1 for number in numbers)


def flat(steps):
    """Yield the steps, those of children too."""
    for step in steps:
        yield step
        yield from flat(step.get("steps", ()))


NEEDS_SYS_RESOURCE = {"option/0/op-0", "option/rlimit-mode-without-objects"}


def cannot_run(row):
    """Return why this process cannot run a scenario, or None."""
    steps = list(flat(row["prelude"] + row["steps"]))
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    wanted = [step["pages"] * PAGE if "pages" in step else step["bytes"] for step in steps if step["op"] == "memlock"]
    if hard >= 0 and any(value < 0 or value > hard for value in wanted):
        return f"it needs a hard RLIMIT_MEMLOCK above {hard}"
    if "limits" in row["tags"] and not has_capabilities(14, 7):
        return "it compares a process with CAP_IPC_LOCK with one that drops it by CAP_SETUID"
    if row["name"] in NEEDS_SYS_RESOURCE and not has_capabilities(24):
        return "it sets the mode of accounting, which needs CAP_SYS_RESOURCE"
    return None


def replay(target, kernel, set_name, only="*", skip_tags=frozenset()):
    """Yield (row, reason it is left out or None, its differences) for each scenario that ``kernel`` answered."""
    for row in load(set_name):
        expected = row["answers"].get(kernel)
        if expected is None or not fnmatch.fnmatch(row["name"], only):
            continue
        tags = skip_tags & {tag.split(":")[0] for tag in row["tags"]}
        if tags:
            reason = f"tag {', '.join(sorted(tags))}"
        else:
            reason = cannot_run(row)
        yield row, reason, [] if reason else list(differences(expected, run_isolated(target, row)))


def describe(row, found):
    """Return a failing scenario as text."""
    lines = [row["name"]]
    for index, want, got in found:
        step = row["steps"][index] if isinstance(index, int) else index
        lines += [f"    step {index}: {json.dumps(step)}", f"      kernel: {json.dumps(want)}",
                  f"      here:   {json.dumps(got)}"]
    return "\n".join(lines)


def record(target, options):
    """Write the set with what the target answers."""
    with open(options.record, "w", encoding="utf-8") as stream:
        for row in load(options.set):
            if fnmatch.fnmatch(row["name"], options.only):
                answer = run_isolated(target, row)
                del answer["name"]
                row["answers"][options.kernel] = answer
            stream.write(json.dumps(row) + "\n")
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--set", default="type1")
    parser.add_argument("--target", default="software_target:make_target")
    parser.add_argument("--only", default="*")
    parser.add_argument("--all-tags", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--record", metavar="FILE", help="write the set with this target's answers instead")
    options = parser.parse_args()
    if options.target == "kernel":
        target = Kernel()
    else:
        module, factory = options.target.split(":")
        sys.path[:0] = [os.getcwd(), str(DATA.parent.parent)]         # targets of tests/, and of wherever this runs
        target = getattr(importlib.import_module(module), factory)(options.kernel, options.set)
    if options.record:
        return record(target, options)
    passed = failed = skipped = 0
    for row, reason, found in replay(target, options.kernel, options.set, options.only,
                                     frozenset() if options.all_tags else HARDWARE_TAGS):
        if reason:
            skipped += 1
            if not reason.startswith("tag "):
                print(f"{row['name']}: left out, {reason}")
        elif found:
            failed += 1
            if not options.quiet:
                print(describe(row, found))
        else:
            passed += 1
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
