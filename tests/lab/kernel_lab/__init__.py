"""Run a command inside a Debian kernel with a working VFIO stack, in QEMU: see docs/kernel-lab.md."""
