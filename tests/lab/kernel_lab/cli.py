"""The command line of the lab.  Exit status: the command's, 124 = time limit, 125 = the lab failed, 128 + signal."""
import argparse
import os
import pathlib
import re
import shlex
import signal
import sys
import time

from . import guest, kernels
from .host import LabError, install_packages, say
from .initramfs import build_initramfs

DEFAULT_CACHE = pathlib.Path("~/.cache/vfiodma-kernel-lab")


class Interrupted(BaseException):
    """A signal asked to stop."""


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        prog="kernel-lab", description="Run a command inside a Debian kernel with a working VFIO stack, in QEMU.",
        epilog="Exit status: the command's, 124 when the time limit ran out, 125 when the lab itself failed, "
               "128 + number when a signal stopped it.")
    parser.add_argument("--kernel", default="6.12", metavar="NAME",
                        help="6.1, 6.12 (default), 7.2, 6.12-iommufd, 7.2-iommufd, any series that Debian ships")
    parser.add_argument("--accel", default="tcg", choices=("tcg", "kvm"),
                        help="software emulation (default) or KVM, where it works")
    parser.add_argument("--mem", default="2G", help="guest memory (default 2G)")
    parser.add_argument("--smp", type=int, default=2, help="guest processors (default 2)")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR",
                        help="a folder the guest may write to, at the same path")
    parser.add_argument("--log", type=pathlib.Path, metavar="FILE", help="keep the kernel's console output")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS",
                        help="stop the guest after this time with status 124 (default 600, 0: never)")
    parser.add_argument("--boot-timeout", type=float, default=240, metavar="SECONDS",
                        help="fail when the command has not started by then (default 240, 0: never)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]",
                        help="pass on or set an environment variable")
    parser.add_argument("--module", action="append", default=[], help="load a further kernel module")
    parser.add_argument("--append", action="append", default=[], metavar="ARGS",
                        help="further kernel command line arguments")
    parser.add_argument("--aw-bits", type=int, choices=(39, 48), default=39, help="IOMMU address width (default 39)")
    parser.add_argument("--qemu", type=shlex.split, default=[], metavar="ARGS", help="further QEMU arguments")
    parser.add_argument("--shell", action="store_true", help="interactive, on the guest's serial console")
    parser.add_argument("--list", action="store_true", help="list the kernels in the cache")
    parser.add_argument("--prepare", action="store_true", help="only do the set-up")
    parser.add_argument("--refresh", action="store_true", help="look for a newer kernel of the series first")
    parser.add_argument("--install", action="store_true",
                        help="install QEMU and what builds need by apt-get, as root (the default where CI=true)")
    parser.add_argument("--cache", type=pathlib.Path, metavar="DIR", default=DEFAULT_CACHE,
                        help=f"where kernels are kept (default {DEFAULT_CACHE})")
    parser.add_argument("command", nargs="*", metavar="COMMAND")
    options = parser.parse_args(arguments)
    if not options.command and not (options.shell or options.prepare or options.list):
        parser.error("a COMMAND is needed")
    for item in options.env:
        if not re.fullmatch(r"[A-Za-z_]\w*(=.*)?", item, re.DOTALL):
            parser.error(f"--env {item!r} is not NAME or NAME=VALUE")
    for name in ("timeout", "boot_timeout"):
        if getattr(options, name) < 0:
            parser.error(f"--{name.replace('_', '-')} is negative")
    options.command = options.command or ["/bin/bash", "-i"]
    options.install = options.install or os.environ.get("CI") == "true"
    for name in ("out", "log", "cache"):
        if getattr(options, name):
            setattr(options, name, getattr(options, name).expanduser().absolute())
    return options


def print_list(cache):
    """Print the kernels of the cache: name, release, size, age."""
    for kernel in kernels.cached(cache):
        size = sum(path.lstat().st_size for path in kernel.folder.rglob("*") if not path.is_dir())
        made = time.strftime("%Y-%m-%d", time.localtime(kernel.modules.stat().st_ctime))
        print(f"{kernel.name:<16}{kernel.release:<28}{size / 1e6:>6.0f} MB  {made}")


def run(options):
    if options.list:
        print_list(options.cache)
        return 0
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    install_packages(guest.HOST_PACKAGES, options.install)
    with kernels.use(options.cache, options.kernel, options.refresh, options.install) as kernel:
        initramfs = build_initramfs(kernel)
        if options.prepare:
            say(f"{options.kernel} is ready: {kernel.release}")
            return 0
        return guest.boot(options, kernel, initramfs)


def stop(number, _frame):
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)            # cleaning up takes no second one
    raise Interrupted(number)


def main(arguments=None):
    os.environ["PATH"] = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"
    options = parse_arguments(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        return run(options)
    except Interrupted as interrupt:
        number, = interrupt.args
        say(f"stopped by {signal.Signals(number).name}")
        return 128 + number
    except (LabError, OSError) as error:
        say(error)
        return 125


if __name__ == "__main__":
    sys.exit(main())
