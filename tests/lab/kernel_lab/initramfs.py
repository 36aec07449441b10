"""The first file system of the guest: busybox, the modules that boot it, and init.sh."""
import hashlib
import lzma
import os
import pathlib
import re
import shutil
import tempfile

from .host import LabError

# Loaded by init.sh before the root file system is there, ...
BOOT_MODULES = ["virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_console"]
# ... and those that make VFIO.  A kernel that lacks one of them (or has it built in) goes without.
VFIO_MODULES = ["iommufd", "vfio_iommu_type1", "vfio_pci"]

#: PCI ids that vfio-pci claims: edu, e1000e, nvme.
VFIO_IDS = "1234:11e8,8086:10d3,1b36:0010"
ARGUMENTS = {"vfio-pci.ko": f"ids={VFIO_IDS}"}
FOLDERS = ("bin", "dev", "proc", "sys", "root", "host", "scratch", "modules")


class Cpio:
    """A writer for the kernel's initramfs format (cpio "newc")."""

    def __init__(self, stream):
        self.stream = stream
        self.inode = 0

    def add(self, name, mode, data=b""):
        self.inode += 1
        raw = name.encode() + b"\0"
        fields = (self.inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + raw
        for part in (header, data):
            self.stream.write(part + b"\0" * (-len(part) % 4))

    def close(self):
        self.add("TRAILER!!!", 0)


def module_order(modules, wanted):
    """Return the files of the wanted modules, each after those it depends on."""
    depends = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        name, _, rest = line.partition(":")
        depends[name] = rest.split()
    by_name = {re.sub(r"\.ko(\.\w+)?$", "", os.path.basename(path)).replace("-", "_"): path for path in depends}
    order = []
    for name in wanted:
        path = by_name.get(name.replace("-", "_"))
        if path:
            # modules.dep lists all of them, the most basic last.
            order += [p for p in [*reversed(depends[path]), path] if p not in order]
    return order


def read_module(path):
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def find_busybox():
    """Return busybox's bytes; it must need no libraries."""
    path = shutil.which("busybox")
    if path is None:
        raise LabError("busybox is not installed (package busybox-static)")
    data = pathlib.Path(path).read_bytes()
    if b"/ld-linux-" in data:
        raise LabError(f"{path} needs shared libraries; install busybox-static in its place")
    return data


def build_initramfs(kernel):
    """Return the initramfs of a kernel, written unless one with the same contents to be is there."""
    order = module_order(kernel.modules, BOOT_MODULES + VFIO_MODULES)
    init = pathlib.Path(__file__).with_name("init.sh").read_bytes()
    busybox = find_busybox()
    digest = hashlib.sha256(repr((init, busybox, order, ARGUMENTS, FOLDERS)).encode()).hexdigest()[:12]
    target = kernel.folder / f"initramfs-{digest}.cpio"
    if target.exists():
        return target
    with tempfile.NamedTemporaryFile(dir=kernel.folder, prefix="initramfs-", suffix=".tmp", delete=False) as stream:
        cpio = Cpio(stream)
        for name in FOLDERS:
            cpio.add(name, 0o040755)
        cpio.add("bin/busybox", 0o100755, busybox)
        cpio.add("init", 0o100755, init)
        lines = []
        for path in order:
            name = os.path.basename(path).removesuffix(".xz")
            cpio.add(f"modules/{name}", 0o100644, read_module(kernel.modules / path))
            lines.append(f"{name} {ARGUMENTS.get(name, '')}\n")
        cpio.add("modules/order", 0o100644, "".join(lines).encode())
        cpio.close()
    os.chmod(stream.name, 0o644)
    os.replace(stream.name, target)
    return target
