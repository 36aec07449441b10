"""What vfio-pci answers on the descriptors of a software device."""
from .answers import device_ioctl, device_mmap, device_pread, device_pwrite
from .plain import PlainDevice
from .state import close_device, open_device

__all__ = ["PlainDevice", "close_device", "device_ioctl", "device_mmap", "device_pread", "device_pwrite", "open_device"]
