"""Backends: one module each, none imports another.  Only this file knows their names."""
import errno
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .._core.errno import error
from ..protocols import Backend

_MODULES = {"software": "software", "type1": "type1", "iommufd": "iommufd", "spapr": "spapr"}


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
    return _module(name).open(**options)


def adopt_backend(name: str, state: Mapping[str, Any], fds: Sequence[int]) -> Backend:
    """Take over a container that another process opened, with its mappings.

    Parameters
    ----------
    name : str
        "type1" or "iommufd".
    state, fds
        What ``hand_over()`` of the container returned there; the descriptors belong to the container from now on, and
        are closed should it fail.

    Raises
    ------
    ProtocolError
        EPROTO: they do not fit together.
    VfioError
        What the kernel says of descriptors that are none of VFIO's.
    """
    adopt = getattr(_module(name), "adopt", None) if name in _MODULES else None
    if adopt is None:
        for fd in fds:
            os.close(fd)
        raise error(errno.EPROTO, "adopt", hint=f"a container of backend {name!r} can't be adopted")
    return adopt(state, fds)


def _module(name: str) -> Any:
    if name not in _MODULES:
        raise ValueError(f"there is no backend {name!r}; there are: {', '.join(_MODULES)}")
    return importlib.import_module(f".{_MODULES[name]}", __name__)
