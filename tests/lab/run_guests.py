#!/usr/bin/env python3
"""Run the tests of tests/lab/guest inside kernels: boots each, brings the results back, tells the outcome of all.

    run_guests.py [--short] [--prepare] [--cache DIR] [--accel kvm] [KERNEL ...] [-- PYTEST ARGUMENTS]

KERNEL is a name that kernel-lab takes, with kernel arguments after a "+": 6.12-iommufd+intel_iommu=off.  Without one:
those of KERNELS that are in the cache, 6.12 if none is; with LAB=full all of them, built first where needed.

The environment variable LAB is "off" (do nothing), "on" or "full"; "on" and "full" allow apt-get to install QEMU, as
CI=true does.  --short runs the tests marked `short` on 6.12, and is left out, saying so, where QEMU is not installed or
the kernel cannot be fetched.

Exit status 0 if on every kernel tests ran and none failed.
"""
import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from kernel_lab import cli, guest, host, kernels  # noqa: E402

# Linux 6.12 has the self-test IOMMU of iommufd only without a real one.
KERNELS = ["6.1", "6.12", "7.2", "7.2-iommufd", "6.12-iommufd", "6.12-iommufd+intel_iommu=off"]
RESULTS = pathlib.Path("build/lab")


def say(line):
    print(line, flush=True)


def counts(junit):
    """Return (tests that ran, failed, skipped) of a JUnit file, None if there is none that can be read."""
    try:
        suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return None
    total, skipped, failed = (sum(int(suite.get(name, 0)) for suite in suites for name in names)
                              for names in (("tests",), ("skipped",), ("failures", "errors")))
    return total - skipped, failed, skipped


def outcome(status, found):
    """Return (whether all is well, what to tell) of a run: the lab's exit status and the counts of its tests."""
    text = "{} ran, {} failed, {} skipped".format(*found) if found else "no results"
    if status == 124:
        return False, f"time limit; {text}"
    if status == 125:
        return False, f"the lab failed; {text}"
    if found is None or (status not in (0, 1, 5)):
        return False, f"pytest ended with status {status}; {text}"
    if found[1] or status == 1:
        return False, text
    if not found[0]:
        return False, f"no test ran; {text}"
    return True, text


def call(command):
    """Return the exit status of a program that ends with this one, and is waited for when a signal comes."""
    with subprocess.Popen(["setpriv", "--pdeathsig", "TERM", *command]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise


def lab_command(kernel, options):
    return [HERE / "kernel-lab", "--kernel", kernel, f"--cache={options.cache}",
            *(["--install"] if options.install else [])]


def run_tests(name, options):
    """Run the tests on one kernel; return (whether all is well, what to tell)."""
    kernel, *append = name.split("+")
    out = (RESULTS / name).absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    pytest = [sys.executable, "-m", "pytest", "tests/lab/guest", "-q", "-p", "no:cacheprovider",
              f"--junitxml={out}/junit.xml", *(["-m", "short"] if options.short else []), *options.pytest]
    status = call([*lab_command(kernel, options), *[f"--append={argument}" for argument in append], f"--out={out}",
                   f"--log={out}/console.log", f"--timeout={options.timeout}", f"--accel={options.accel}",
                   "--env=PYTHONDONTWRITEBYTECODE=1", "--", *pytest])
    return outcome(status, counts(out / "junit.xml"))


def prepare(name, options):
    ready = call([*lab_command(name.split("+")[0], options), "--prepare"]) == 0
    return ready, "ready" if ready else "not prepared"


def is_there(name, options):
    return name.split("+")[0] in {kernel.name for kernel in kernels.cached(options.cache)}


def chosen(options, lab):
    """Return the kernels to run, and those of the default that are left out."""
    if options.kernels:
        return options.kernels, []
    if options.short:
        return ["6.12"], []
    if lab == "full":
        return KERNELS, []
    if options.prepare:
        return [name for name in KERNELS if kernels.BUILT not in name], []
    names = [name for name in KERNELS if is_there(name, options)]
    return names or ["6.12"], [name for name in KERNELS if name not in (names or ["6.12"])]


def reason_to_skip(options, lab):
    """Return why the short stage is left out, None if it can run."""
    if lab == "off":
        return "LAB=off"
    missing = host.missing_packages(guest.HOST_PACKAGES)
    if not missing or not options.short:
        return None
    if options.install and os.geteuid() == 0 and shutil.which("apt-get"):
        return None
    return f"not installed: {', '.join(missing)}; `make lab-prepare` as root installs it"


def parse_arguments(arguments, lab):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--prepare", action="store_true", help="only fetch or build the kernels")
    parser.add_argument("--cache", type=pathlib.Path, default=cli.DEFAULT_CACHE)
    parser.add_argument("--accel", choices=("tcg", "kvm"), default="tcg")
    parser.add_argument("--timeout", type=int, help="seconds for one kernel (default 1200, with --short 300)")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL")
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:cut])
    options.pytest = arguments[cut + 1:]
    options.cache = options.cache.expanduser().absolute()
    options.timeout = options.timeout or (300 if options.short else 1200)
    options.install = options.prepare or lab in ("on", "full") or os.environ.get("CI") == "true"
    return options


def main(arguments, lab):
    os.environ["PATH"] = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"
    options = parse_arguments(arguments, lab)
    os.chdir(HERE.parent.parent)
    reason = reason_to_skip(options, lab)
    if reason:
        say(f"kernel lab: skipped, {reason}")
        return 0
    names, left_out = chosen(options, lab)
    if options.short and not options.install and not is_there(names[0], options) and not prepare(names[0], options)[0]:
        say(f"kernel lab: skipped, there is no kernel {names[0]}: see above")
        return 0
    lines, failures = [], 0
    for name in names:
        say(f"kernel lab: {'preparing ' if options.prepare else 'tests on '}{name}")
        start = time.monotonic()
        try:
            well, text = (prepare if options.prepare else run_tests)(name, options)
        except KeyboardInterrupt:
            say("\n".join(["kernel lab:", *lines, f"FAIL  {name:<30}stopped"]))
            return 130
        failures += not well
        lines.append(f"{'ok  ' if well else 'FAIL'}  {name:<30}{text}, {time.monotonic() - start:.0f} s")
    lines += [f"skip  {name:<30}not in the cache: `make lab-prepare LAB=full` makes it" for name in left_out]
    say("\n".join(["kernel lab:", *lines]))
    if failures and not options.prepare:
        say(f"logs: {RESULTS}/*/console.log")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ.get("LAB", "")))
