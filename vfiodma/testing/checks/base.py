"""What every check needs: a backend, the rig around it, a device that does DMA."""
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from ...devices.edu_driver import EduDriver
from ...devices.pci import VfioDevice
from ...errors import VfioError
from ..rig import Rig


class BackendDma:
    """The backend as an emulated device that copies, by the feature "dma"."""

    dma_limit = 1 << 64

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def copy(self, source: int, target: int, size: int) -> None:
        """Copy from one iova to another.  What is refused moves nothing, and is no error: a device is not told."""
        with contextlib.suppress(VfioError):
            self.backend.dma_write(target, self.backend.dma_read(source, size))


class Checks:
    """See BackendConformance for the attributes."""

    edu: str | None = None
    pins_memory = True
    charges_locked_memory = False
    exact_dirty = False
    atomic_unmap = True
    maps_readable_memory = True

    def open_backend(self) -> Any:
        """Return a new backend; the one of the last call is closed by now."""
        raise NotImplementedError("derive a class that opens the backend to test")

    @pytest.fixture
    def backend(self) -> Iterator[Any]:
        """A backend, closed at the end."""
        backend = self.open_backend()
        try:
            yield backend
        finally:
            backend.close()

    @pytest.fixture
    def rig(self, backend: Any) -> Iterator[Rig]:
        """The backend with memory and a book; what the book says is compared at the end."""
        rig = Rig(backend)
        yield rig
        try:
            rig.finish()
        finally:
            rig.close()

    @contextlib.contextmanager
    def dma_of(self, backend: Any) -> Iterator[Any]:
        """Return a device of the backend: ``copy(source, target, size)`` by iova, ``dma_limit``; skip without."""
        if self.edu is not None:
            with VfioDevice.open(backend, self.edu) as device, EduDriver(device) as driver:
                yield driver
        elif "dma" in backend.capabilities().features:
            yield BackendDma(backend)
        else:
            pytest.skip("no device of this backend does DMA")

    @pytest.fixture
    def dma(self, backend: Any) -> Iterator[Any]:
        """A device of the backend that copies."""
        with self.dma_of(backend) as device:
            yield device


def needs(rig: Rig, feature: str) -> None:
    """Skip where the backend does not have a feature."""
    if feature not in rig.features:
        pytest.skip(f'this backend has no feature "{feature}"')
