"""What vfio-pci answers on the descriptors of a software device."""
from .answers import device_ioctl, device_mmap, device_pread, device_pwrite
from .plain import PlainDevice
from .state import DeviceState

__all__ = ["DeviceState", "PlainDevice", "device_ioctl", "device_mmap", "device_pread", "device_pwrite"]
