"""open_address_space: a backend by name with an address space on it."""
from typing import Any

from ..backends import open_backend
from .space import IoAddressSpace


def open_address_space(backend: str = "software", **options: Any) -> IoAddressSpace:
    """Open a backend by name and put an address space on it, which closes it.

    Parameters
    ----------
    backend : str
        See :func:`vfiodma.open_backend`.
    **options
        What the backend takes.
    """
    opened = open_backend(backend, **options)
    try:
        return IoAddressSpace(opened, close_backend=True)
    except BaseException:
        opened.close()
        raise
