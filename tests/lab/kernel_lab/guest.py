"""One run: a QEMU machine with an emulated Intel IOMMU, the command in it, its output and status back."""
import contextlib
import fcntl
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from .host import LabError, say
from .initramfs import VFIO_IDS

# Programs that a run needs -> package.
HOST_PACKAGES = {"qemu-system-x86_64": "qemu-system-x86", "busybox": "busybox-static", "depmod": "kmod"}

DEVICES = [
    # Two DMA-capable test devices, each alone in its IOMMU group.
    "edu,id=edu0,bus=pcie.0,addr=10",
    "edu,id=edu1,bus=pcie.0,addr=11",
    # Two more behind a conventional bridge: one group with two devices.
    "pcie-pci-bridge,id=bridge,bus=pcie.0,addr=12",
    "edu,id=edu2,bus=bridge,addr=1",
    "edu,id=edu3,bus=bridge,addr=2",
    # Real-life devices.
    "e1000e,id=net0,bus=pcie.0,addr=14,romfile=,netdev=nowhere",
    "nvme,id=nvme0,bus=pcie.0,addr=15,serial=lab,drive=disk0",
]

CMDLINE = (
    "console=ttyS0 loglevel=6 panic=-1 oops=panic intel_iommu=on mitigations=off nokaslr audit=0 apparmor=0 "
    "cryptomgr.notests rcupdate.rcu_expedited=1 no_timer_check tsc=reliable random.trust_cpu=on "
    f"vfio-pci.ids={VFIO_IDS}"
)

PASSED_ENV = ["PATH", "HOME", "LANG", "LC_ALL", "TERM", "CI", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"]

PREFIX = "vfiodma-lab-"


def write_control(control, options, kernel):
    """Write what the guest's init script reads: shares, modules, the command."""
    target = f"/root/lib/modules/{kernel.release}"
    setup = [f"mkdir -p {target}", f"mount --bind {shlex.quote(f'/root{kernel.modules}')} {target}"]
    if options.out:
        setup.append(f"share out {shlex.quote(str(options.out))}")
    if options.shell:
        setup.append("lab_console=yes")
    (control / "setup").write_text("\n".join(setup) + "\n")

    environment = {name: os.environ[name] for name in PASSED_ENV if name in os.environ}
    for item in options.env:
        name, equals, value = item.partition("=")
        environment[name] = value if equals else os.environ.get(name, "")
    environment["KERNEL_LAB"] = kernel.release
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines += [f"modprobe {shlex.quote(name)}" for name in options.module]
    lines.append(f"cd {shlex.quote(os.getcwd())} || exit 125")
    lines.append("exec " + shlex.join(options.command))
    (control / "command").write_text("\n".join(lines) + "\n")


def kvm_usable(path="/dev/kvm"):
    """Tell whether this process can make a virtual machine."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.close(fcntl.ioctl(fd, 0xAE01, 0))            # KVM_CREATE_VM
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def accelerator(wanted):
    """Return QEMU's arguments for ``tcg`` or ``kvm``."""
    if wanted == "tcg":
        return ["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,la57=off"]
    if not kvm_usable():
        raise LabError("/dev/kvm cannot be used here: leave --accel kvm out")
    return ["-machine", "q35,kernel-irqchip=split", "-accel", "kvm", "-cpu", "host,arch-capabilities=off"]


def quoted(path):
    """Return a path as a value in a QEMU option."""
    return str(path).replace(",", ",,")


def qemu_command(options, kernel, initramfs, control, streams):
    """Return QEMU's command line; ``streams`` are the descriptors of the guest's stdout and stderr."""
    argv = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            *accelerator(options.accel), "-smp", str(options.smp), "-m", options.mem,
            "-kernel", kernel.image, "-initrd", initramfs, "-append", " ".join([CMDLINE, *options.append]),
            "-device", f"intel-iommu,intremap=on,caching-mode=on,aw-bits={options.aw_bits}",
            "-netdev", "user,id=nowhere,restrict=on",
            "-blockdev", "null-co,node-name=disk0,size=67108864,read-zeroes=on"]
    shares = [("host", "/", ",readonly=on"), ("control", control, "")]
    if options.out:
        shares.append(("out", options.out, ""))
    for tag, path, extra in shares:
        argv += ["-fsdev", f"local,id={tag},path={quoted(path)},security_model=none,multidevs=remap{extra}",
                 "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    for device in DEVICES:
        argv += ["-device", device]
    if options.shell:
        argv += ["-serial", "mon:stdio"]
    else:
        argv += ["-serial", f"file:{options.log or control / 'console'}", "-device", "virtio-serial-pci"]
        for number, fd in enumerate(streams, 1):
            argv += ["-chardev", f"socket,id=stream{number},fd={fd}",
                     "-device", f"virtserialport,nr={number},chardev=stream{number}"]
    return [str(word) for word in argv + options.qemu]


@contextlib.contextmanager
def control_folder():
    """Yield a folder that the guest may write to; its lock tells that this run lives."""
    remove_stale_folders(pathlib.Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as scratch:
        fd = os.open(scratch, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield pathlib.Path(scratch)
        finally:
            os.close(fd)


def remove_stale_folders(parent, grace=60):
    """Remove control folders of runs that were killed: nobody holds their lock, and they are not new."""
    for folder in parent.glob(PREFIX + "*"):
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            found = os.fstat(fd)
            if found.st_uid == os.geteuid() and found.st_mtime < time.time() - grace:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)


def copy_stream(source, fd):
    """Copy what the guest writes to a descriptor; go on reading when nobody reads there any more."""
    with source:
        while data := source.recv(65536):
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(fd, data):]


def wait(process, options, control):
    """Return QEMU's exit status, None when the time limit ran out; a guest that does not boot is the lab's failure."""
    end = time.monotonic() + options.timeout if options.timeout else None
    limit = min(options.boot_timeout or options.timeout, options.timeout or options.boot_timeout) or None
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(limit)
    if not (control / "started").exists():
        hint = "; KVM may not work here, try without --accel kvm" if options.accel == "kvm" else ""
        raise LabError(f"the kernel did not reach the command within {limit:g} seconds{hint}")
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(max(end - time.monotonic(), 0) if end else None)
    say(f"no end after {options.timeout:g} seconds: stopped")
    return None


def print_end(path, count):
    """Show the last lines of a file."""
    with contextlib.suppress(FileNotFoundError):
        print(*path.read_text(errors="replace").splitlines()[-count:], sep="\n", file=sys.stderr)


def boot(options, kernel, initramfs):
    """Boot the guest, run the command and return its exit status, 124 when the time limit ran out."""
    with control_folder() as control:
        write_control(control, options, kernel)
        pairs = [] if options.shell else [(fd, *socket.socketpair()) for fd in (1, 2)]
        theirs = [peer.fileno() for _, _, peer in pairs]
        # QEMU ends with the lab, even when that is killed.
        argv = ["setpriv", "--pdeathsig", "KILL", *qemu_command(options, kernel, initramfs, control, theirs)]
        with open(control / "qemu", "wb") as messages:
            process = subprocess.Popen(argv, pass_fds=theirs, stdin=None if options.shell else subprocess.DEVNULL,
                                       stdout=None if options.shell else messages,
                                       stderr=None if options.shell else messages)
        copiers = []
        for fd, ours, peer in pairs:
            peer.close()
            copiers.append(threading.Thread(target=copy_stream, args=(ours, fd), daemon=True))
            copiers[-1].start()
        try:
            failure = None
            status = wait(process, options, control)
        except LabError as error:
            failure, status = error, None
        finally:
            process.kill()
            process.wait()
            for copier in copiers:
                copier.join(timeout=5)
        result = control / "status"
        if status is not None and result.exists() and result.read_text().strip():
            return int(result.read_text())
        if not options.shell:
            print_end(control / "qemu", 5)
            print_end(options.log or control / "console", 40)
        if status is None and failure is None:
            return 124
        raise failure or LabError("the guest ended without a result" + ending(status))


def ending(status):
    """Say how QEMU ended, where it was not the guest's doing."""
    if status < 0:
        return f": QEMU died of {signal.Signals(-status).name}"
    return f": QEMU ended with status {status}" if status else ""
