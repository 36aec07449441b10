"""Devices: the user's side of real and software ones (VfioDevice, drivers), and software devices themselves."""
import importlib

_HOME = {
    "VfioDevice": "pci", "DeviceFlags": "pci", "DeviceInfo": "pci",
    "Region": "regions", "RegionFlags": "regions", "MappedRegion": "regions",
    "IrqIndex": "interrupts", "IrqFlags": "interrupts", "Vectors": "interrupts",
    "CcwIrq": "interrupts", "ApIrq": "interrupts",
    "Feature": "features", "FeatureOps": "features",
    "MigrationState": "migration", "MigrationFlags": "migration", "MigrationData": "migration",
    "Edid": "edid", "DeviceWithRegions": "model_regions", "ModelRegion": "model_regions", "EdidRegion": "model_regions",
    "ChannelDevice": "model_regions",
    "DmaLog": "dma_log", "DeviceLogSource": "dma_log",
    "EduDriver": "edu_driver", "EduDevice": "edu", "DmaWriter": "dma_writer",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
