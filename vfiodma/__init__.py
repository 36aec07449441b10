"""vfiodma: a VFIO DMA mapping engine.

One I/O address space API (allocate, map, translate, track dirty pages, migrate) over exchangeable backends, with an
exact in-process software IOMMU as the default.  Names are imported on first use, so that ``import vfiodma`` stays
cheap.
"""
import importlib
import logging

__version__ = "0.1.0"

_HOME = {
    "IoAddressSpace": "address_space", "open_address_space": "address_space",
    "GuestMemory": "memory", "MemoryRegion": "memory",
    "IovaAllocator": "_core.iova",
    "DirtyBitmap": "_core.bitmap", "DirtyLog": "_core.bitmap",
    "RangeMap": "_core.rangemap",
    "SoftwareVfio": "backends.software", "SoftwareGroup": "backends.software",
    "Type1Container": "backends.type1", "KernelVfio": "kernel",
    "Iommufd": "backends.iommufd", "Ioas": "backends.iommufd", "Hwpt": "backends.iommufd",
    "IommufdContainer": "backends.iommufd",
    "open_backend": "backends",
    "VfioDevice": "devices.pci", "EduDriver": "devices.edu_driver",
    "VaddrHandoff": "liveupdate", "UpdateOffer": "liveupdate", "UpdateTaker": "liveupdate",
    "DirtyTracker": "migration.tracker", "PrecopySource": "migration.precopy", "PageReceiver": "migration.receiver",
    "Capabilities": "types", "DeviceLocation": "types",
    "DmaFault": "types", "IovaRange": "types", "Mapping": "types", "Prot": "types",
    "VfioError": "errors",
}
__all__ = [*_HOME, "__version__"]

logging.getLogger("vfiodma").addHandler(logging.NullHandler())


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
