"""Stand-ins for what the lab works on."""
import lzma

from kernel_lab import kernels


def fake_kernel(cache, name="6.12", release="6.12.1-amd64"):
    """Put a kernel into a cache: module a needs b, which needs c."""
    folder = cache / "kernels" / name
    modules = folder / "lib/modules" / release
    (modules / "kernel").mkdir(parents=True)
    (folder / "boot").mkdir()
    (folder / "boot" / f"vmlinuz-{release}").write_bytes(b"image")
    (modules / "modules.dep").write_text("kernel/vfio-pci.ko.xz: kernel/vfio.ko.xz kernel/irq.ko.xz\n"
                                         "kernel/vfio.ko.xz: kernel/irq.ko.xz\nkernel/irq.ko.xz:\n"
                                         "kernel/9p.ko: kernel/vfio.ko.xz kernel/irq.ko.xz\n")
    for module in ("vfio-pci", "vfio", "irq"):
        (modules / "kernel" / f"{module}.ko.xz").write_bytes(lzma.compress(module.encode()))
    (modules / "kernel/9p.ko").write_bytes(b"9p")
    return kernels.Kernel(name, folder)
