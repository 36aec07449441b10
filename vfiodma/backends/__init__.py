"""Backends: one module each, none imports another.  Only this file knows their names."""
import importlib
from typing import Any

from ..protocols import Backend

_MODULES = {"software": "software", "type1": "type1", "iommufd": "iommufd"}


def open_backend(name: str, **options: Any) -> Backend:
    """Open a backend by name.

    Parameters
    ----------
    name : str
        "software": the IOMMU inside this process; "type1": /dev/vfio/vfio of the running kernel; "iommufd":
        its /dev/iommu.
    **options
        What its ``open()`` takes.

    Returns
    -------
    Backend
        A new container; the caller closes it.
    """
    if name not in _MODULES:
        raise ValueError(f"there is no backend {name!r}; there are: {', '.join(_MODULES)}")
    return importlib.import_module(f".{_MODULES[name]}", __name__).open(**options)
