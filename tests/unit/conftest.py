"""An address space on a fake backend, and memory for it."""
import gc
import mmap

import pytest
from fake_backend import FakeBackend

from vfiodma.address_space import IoAddressSpace
from vfiodma.memory import GuestMemory

PAGE = mmap.PAGESIZE


@pytest.fixture
def backend():
    return FakeBackend()


@pytest.fixture
def ioas(backend):
    with IoAddressSpace(backend) as space:
        yield space


@pytest.fixture
def memory(ioas):
    """Eight pages; the address space goes first, so that nothing of it is mapped when it closes."""
    memory = GuestMemory.memfd(8 * PAGE)
    yield memory
    ioas.close()
    gc.collect()
    memory.close()
