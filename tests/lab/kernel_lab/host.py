"""The machine the lab runs on: messages, helper programs, packages."""
import os
import shlex
import shutil
import subprocess
import sys


class LabError(Exception):
    """The lab itself, not the command in the guest, failed."""


def say(message):
    print(f"kernel-lab: {message}", file=sys.stderr, flush=True)


def run(*argv, **kwargs):
    """Run a helper program; its output goes to stderr unless captured."""
    kwargs.setdefault("stdout", sys.stderr)
    try:
        return subprocess.run(argv, check=True, text=True, stdin=subprocess.DEVNULL, **kwargs)
    except FileNotFoundError:
        raise LabError(f"{argv[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        raise LabError(f"{shlex.join(map(str, argv))} failed with status {error.returncode}") from None


def missing_packages(packages):
    """Return which of the packages (a dict: program or file -> package) are not installed."""
    return sorted({package for program, package in packages.items()
                   if not (os.path.exists(program) if "/" in program else shutil.which(program))})


def install_packages(packages, allowed):
    """Install what is missing of the packages, where that is ``allowed`` and this process may."""
    missing = missing_packages(packages)
    if not missing:
        return
    if not allowed or os.geteuid():
        how = "or start the lab with --install" if not allowed else "this is not root"
        raise LabError(f"not installed: {', '.join(missing)}; as root: apt-get install {' '.join(missing)} ({how})")
    if not shutil.which("apt-get"):
        raise LabError(f"not installed: {', '.join(missing)}, and there is no apt-get here")
    say("installing " + " ".join(missing))
    run("apt-get", "-qq", "update")
    run("apt-get", "-qq", "-y", "--no-install-recommends", "install", *missing,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
