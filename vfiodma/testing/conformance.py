"""The tests that every backend must pass."""
from .checks.address_space import AddressSpaceChecks
from .checks.concurrency import ConcurrencyChecks
from .checks.dirty import DirtyChecks
from .checks.dma import DmaChecks
from .checks.lifecycle import LifecycleChecks
from .checks.limits import LimitChecks
from .checks.lists import ListChecks
from .checks.mapping import MappingChecks
from .checks.model import ModelChecks
from .checks.refusals import RefusalChecks
from .checks.vaddr import VaddrChecks


class BackendConformance(LifecycleChecks, MappingChecks, RefusalChecks, LimitChecks, ListChecks, VaddrChecks,
                         DirtyChecks, DmaChecks, ConcurrencyChecks, ModelChecks, AddressSpaceChecks):
    """Tests of a backend, for pytest: derive a class named Test... and say how a backend is opened.

    What a backend can't do (``capabilities().features``) is skipped, with the reason.  The class attributes say what no
    capability tells.

    Attributes
    ----------
    edu : str or None
        Address of an `edu` device that ``open_device_fd`` of the backend opens, for DMA.  None: DMA is done by the
        feature "dma", or not tested.
    pins_memory : bool
        Memory that is not there is refused when it is mapped.  Default True.
    charges_locked_memory : bool
        Mapped memory counts against RLIMIT_MEMLOCK, unless the process has CAP_IPC_LOCK.  Default False.
    exact_dirty : bool
        Dirty bits tell what was written and no more.  Default False.
    atomic_unmap : bool
        An unmap that is refused, because it would split a mapping, removes nothing.  False: those before it are gone,
        as with the container that iommufd emulates.  Default True.
    maps_readable_memory : bool
        Memory that the process can only read is mapped for devices that only read.  False where all memory must be
        writable, as with SPAPR TCE version 2.  Default True.

    Notes
    -----
    Each test opens backends of its own, some several one after the other, and closes them.  The random run is the same
    one every time; the environment variable VFIODMA_SEED takes another number, or "random", which is printed.

    Examples
    --------
    >>> from vfiodma import SoftwareVfio
    >>> from vfiodma.testing import BackendConformance
    >>> class TestSoftware(BackendConformance):
    ...     def open_backend(self):
    ...         return SoftwareVfio(kernel="6.12").container()
    """
