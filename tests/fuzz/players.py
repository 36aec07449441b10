"""Who plays scripts: a kernel in the lab, and the model in this process."""
import contextlib
import ctypes
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

from .script import encode, split

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LAB = os.environ.get("KERNEL_LAB_PROGRAM", str(ROOT / "tests/lab/kernel-lab"))
LONG = ctypes.c_long


def compile_executor(target, *flags):
    compiler = os.environ.get("CC", "gcc").split()
    subprocess.run([*compiler, "-O2", "-Wall", "-Wextra", *flags, HERE / "executor.c", "-o", target], check=True)


class System(ctypes.Structure):
    _fields_ = [("open", ctypes.CFUNCTYPE(LONG, LONG)),
                ("ioctl", ctypes.CFUNCTYPE(LONG, LONG, ctypes.c_ulong, ctypes.c_ulong)),
                ("close", ctypes.CFUNCTYPE(LONG, LONG)), ("locked", ctypes.CFUNCTYPE(LONG)),
                ("entry_limit", ctypes.CFUNCTYPE(LONG, LONG))]


def answering(function):
    """Wrap a method for C: its result, or -errno."""
    def call(*args):
        try:
            return function(*args) or 0
        except OSError as error:
            return -error.errno
        except BaseException as error:              # neither may happen; -9998 differs from what any kernel says
            print(f"the model raised {error!r}", flush=True)
            return -9998
    return call


class Model:
    """SoftwareVfio with the groups of the lab's machine."""

    def __init__(self, name):
        kernel, _, iommufd = name.partition("-")
        from vfiodma import SoftwareGroup, SoftwareVfio
        groups = [["0000:00:10.0"], ["0000:00:11.0"], ["0000:01:01.0", "0000:01:02.0"]]
        # QEMU's IOMMU can't enforce coherency: its DMAR has no snoop control.
        self.vfio = SoftwareVfio(kernel, [SoftwareGroup(number, devices, coherent=False, dirty_tracking=False)
                                          for number, devices in enumerate(groups, 1)], iommufd=bool(iommufd))
        self.scratch = tempfile.TemporaryDirectory()
        library = pathlib.Path(self.scratch.name, "executor.so")
        compile_executor(library, "-shared", "-fPIC")
        self.executor = ctypes.CDLL(str(library))
        paths = ["/dev/vfio/vfio", "/dev/vfio/1", "/dev/vfio/2", "/dev/vfio/3", "/dev/iommu",
                 *(f"/dev/vfio/devices/vfio{number}" for number in range(4))]
        methods = {"open": lambda kind: self.vfio.open(paths[kind]), "ioctl": self.vfio.ioctl, "close": self.vfio.close,
                   "locked": self.vfio.locked_pages, "entry_limit": self.set_entry_limit}
        self.system = System(**{name: kind(answering(methods[name])) for name, kind in System._fields_})

    def set_entry_limit(self, value):
        self.vfio.dma_entry_limit = value

    def play(self, scripts):
        path = os.path.join(self.scratch.name, "out")
        err = self.executor.run_file(ctypes.byref(self.system), encode(scripts), os.fsencode(path))
        if err:
            raise OSError(-err, "the model's executor failed")
        with open(path, "rb") as stream:
            return list(split(stream.read()))

    def close(self):
        self.scratch.cleanup()


class Guest:
    """A kernel of the lab that is booted once and plays scripts until it is closed."""

    def __init__(self, kernel, lab, processors=2):
        self.scratch = pathlib.Path(tempfile.mkdtemp(prefix="vfiodma-fuzz-"))
        self.count = 0
        out = self.scratch / "out"
        out.mkdir()
        program = self.scratch / "executor"
        compile_executor(program, "-DGUEST", "-static")
        with open(self.scratch / "log", "wb") as log:
            self.process = subprocess.Popen(
                [lab, "--kernel", kernel, "--timeout", "0", "--smp", str(processors), "--out", out,
                 "--log", self.scratch / "console", "--", program, out],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.out = out

    def start(self, scripts):
        """Give scripts to the guest without waiting."""
        new = self.scratch / "new"
        new.write_bytes(encode(scripts))
        new.rename(self.out / f"{self.count}.in")
        self.count += 1

    def finish(self):
        """Wait for the answers to what ``start`` gave."""
        name = self.out / f"{self.count - 1}.out"
        while not name.exists():
            if self.process.poll() is not None:
                console = self.scratch / "console"
                tail = console.read_text(errors="replace")[-3000:] if console.exists() else ""
                raise RuntimeError(f"the guest ended with status {self.process.returncode}:\n"
                                   + (self.scratch / "log").read_text(errors="replace") + tail)
            time.sleep(0.02)
        answers = list(split(name.read_bytes()))
        name.unlink()
        (self.out / f"{self.count - 1}.in").unlink()
        return answers

    def play(self, scripts):
        self.start(scripts)
        return self.finish()

    def close(self):
        (self.out / "stop").touch()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait()
        with contextlib.suppress(OSError):
            shutil.rmtree(self.scratch)
