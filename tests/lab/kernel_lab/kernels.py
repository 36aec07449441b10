"""Kernels of the lab: fetched from Debian or built from its source, and kept in a cache that many runs share.

The cache holds ``kernels/NAME`` (``boot/``, ``lib/modules/RELEASE``, initramfs) and ``lock``, which is held while a
kernel is made.  A run holds a shared lock on the folder of its kernel, so that ``--refresh`` replaces none in use.
"""
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import re
import shutil
import tempfile

from .apt import Archive
from .host import LabError, install_packages, run, say

# Which suites carry a kernel series.  A series absent here is looked up in all of them, so that e.g. "7.0" works as
# long as Debian ships one.
SUITES = {
    "6.1": ["bookworm", "bookworm-security"],
    "6.12": ["trixie", "trixie-security"],
    "7.2": ["trixie-backports"],
}
EXTRA_SUITES = ["bookworm-backports", "trixie-backports", "sid"]
BUILT = "-iommufd"          # the end of the name of a kernel that is built here

# What building needs: program or header -> package.
BUILD_PACKAGES = {
    "gcc": "gcc",
    "make": "make",
    "bc": "bc",
    "flex": "flex",
    "bison": "bison",
    "xz": "xz-utils",
    "perl": "perl",
    "/usr/include/libelf.h": "libelf-dev",
    "/usr/include/openssl/ssl.h": "libssl-dev",
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    name: str
    folder: pathlib.Path

    @property
    def release(self):
        """What ``uname -r`` tells."""
        found = [path.name for path in self.folder.glob("lib/modules/*")]
        if len(found) != 1:
            raise LabError(f"{self.folder} is damaged: remove it, or start the lab with --refresh")
        return found[0]

    @property
    def modules(self):
        return self.folder / "lib/modules" / self.release

    @property
    def image(self):
        for path in (self.folder / "boot" / f"vmlinuz-{self.release}", self.modules / "vmlinuz"):
            if path.exists():
                return path
        raise LabError(f"no kernel image in {self.folder}: remove it, or start the lab with --refresh")


def cached(cache):
    """Return the kernels of a cache, oldest series first."""
    return sorted((Kernel(path.name, path) for path in cache.glob("kernels/*") if path.is_dir()),
                  key=lambda kernel: natural_key(kernel.name))


def natural_key(text):
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]


@contextlib.contextmanager
def use(cache, name, refresh=False, install=False):
    """Yield a kernel, made first where needed; nobody replaces it meanwhile."""
    folder = cache / "kernels" / name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise LabError(f"{name!r} is no name of a kernel")
    while True:
        if refresh or not folder.exists():
            make(cache, name, refresh, install)
            refresh = False
        with contextlib.ExitStack() as stack:
            try:
                fd = stack.enter_context(
                    locked(folder, fcntl.LOCK_SH, f"waiting until kernel {name} is replaced"))
                current = os.path.samestat(os.fstat(fd), os.stat(folder))
            except FileNotFoundError:                   # being replaced just now
                continue
            if current:
                yield Kernel(name, folder)
                return


@contextlib.contextmanager
def locked(path, operation, message):
    """Hold a lock on a file or folder; ``message`` is said if it must be waited for."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            say(message)
            fcntl.flock(fd, operation)
        yield fd
    finally:
        os.close(fd)


def make(cache, name, refresh, install):
    """Fetch or build a kernel, unless another run did while this one waited."""
    folder = cache / "kernels" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    (cache / "lock").touch()
    with locked(cache / "lock", fcntl.LOCK_EX, "waiting for another run that prepares a kernel"):
        if folder.exists() and not refresh:
            return
        for left in cache.glob("new-*"):            # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="new-", ignore_cleanup_errors=True) as scratch:
            tree = pathlib.Path(scratch, "tree")
            tree.mkdir()
            if name.endswith(BUILT):
                build(cache, name.removesuffix(BUILT), tree, install)
            else:
                fetch(cache, name, tree)
            if folder.exists():
                with locked(folder, fcntl.LOCK_EX, f"waiting for the runs that use kernel {name}"):
                    folder.rename(pathlib.Path(scratch, "old"))
                    tree.rename(folder)
            else:
                tree.rename(folder)


def packages_of(cache, series):
    suites = SUITES.get(series) or list(dict.fromkeys(sum(SUITES.values(), []) + EXTRA_SUITES))
    say(f"looking for a Debian kernel {series} in {', '.join(suites)}")
    archive = Archive(cache / "apt", suites)
    return archive, archive.names("linux-")


def newest_release(series, names):
    """Return the newest release of a series among names of packages, None without one."""
    pattern = re.compile(rf"linux-image-({re.escape(series)}\.\d+(-\d+|\+deb[\d.]+)-amd64)")
    return max((match[1] for match in map(pattern.fullmatch, names) if match), key=natural_key, default=None)


def fetch(cache, series, tree):
    """Unpack the newest Debian kernel of a series."""
    archive, names = packages_of(cache, series)
    release = newest_release(series, names)
    if release is None:
        raise LabError(f"no Debian kernel {series} found; try another --kernel")
    # Newer kernels come in several packages; linux-image-* is then all but empty.
    archive.unpack([package for part in ("image", "binary", "modules", "base")
                    if (package := f"linux-{part}-{release}") in names], tree)
    if not (tree / "lib/modules").exists():   # merged /usr
        (tree / "lib").mkdir(exist_ok=True)
        (tree / "usr/lib/modules").rename(tree / "lib/modules")
    run("depmod", "-b", tree, release)


def build(cache, series, tree, install):
    """Build a kernel of a series from Debian's source package, with iommufd.config."""
    install_packages(BUILD_PACKAGES, install)
    archive, names = packages_of(cache, series)
    package = f"linux-source-{series}"
    if package not in names:
        raise LabError(f"Debian has no {package}; try another --kernel")
    with tempfile.TemporaryDirectory(dir=cache, prefix="new-", ignore_cleanup_errors=True) as scratch:
        archive.unpack([package], pathlib.Path(scratch))
        run("tar", "-xf", f"{scratch}/usr/src/{package}.tar.xz", cwd=scratch)
        source = pathlib.Path(scratch, package)
        make_command = ["make", "-s", "-C", source, f"-j{os.cpu_count()}"]
        run(*make_command, "tinyconfig")
        config = source / ".config"
        config.write_text(merged_config(config.read_text(),
                                        pathlib.Path(__file__).with_name("iommufd.config").read_text()))
        run(*make_command, "olddefconfig")
        for option in ("INTEL_IOMMU", "IOMMUFD", "IOMMUFD_TEST", "VFIO_DEVICE_CDEV"):
            if f"CONFIG_{option}=y\n" not in config.read_text():
                raise LabError(f"kernel {series} does not take CONFIG_{option}")
        say("building (ten minutes or so)")
        run(*make_command, "bzImage", "modules")
        run(*make_command, "modules_install", f"INSTALL_MOD_PATH={tree}")
        release, = os.listdir(tree / "lib/modules")
        (tree / "boot").mkdir()
        shutil.copy(source / "arch/x86/boot/bzImage", tree / f"boot/vmlinuz-{release}")
        shutil.copy(config, tree / f"boot/config-{release}")
        (tree / "lib/modules" / release / "build").unlink(missing_ok=True)


def merged_config(base, wanted):
    """Return a kernel configuration with the lines of ``wanted`` in place of those for the same options."""
    symbol = re.compile(r"(?:# )?(CONFIG_\w+)[= ]")
    changed = {match[1] for match in map(symbol.match, wanted.splitlines()) if match}
    kept = [line for line in base.splitlines() if not ((match := symbol.match(line)) and match[1] in changed)]
    return "\n".join(kept) + "\n" + wanted
