"""Live update of vaddrs: the memory behind mappings moves to another address of the process while devices go on."""
import contextlib
import ctypes
import errno
import mmap
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from ._core.errno import error
from .address_space import IoAddressSpace
from .memory import GuestMemory


class _Place(NamedTuple):
    """A mapping by what stays when addresses change."""

    iova: int
    size: int
    gpa: int        #: of the region that it leads to
    offset: int     #: into that region


class HandoffTimes(NamedTuple):
    """Seconds of each step of a vaddr update."""

    mappings: int
    invalidate: float
    remap: float        #: the same memory, mapped at another address
    unmap: float        #: the old address, gone
    restore: float

    @property
    def engine(self) -> float:
        """What the engine itself takes: invalidate and restore."""
        return self.invalidate + self.restore

    @property
    def total(self) -> float:
        """From the first invalid vaddr to the last restored one."""
        return self.invalidate + self.remap + self.unmap + self.restore


class VaddrHandoff:
    """Take every vaddr of an address space away, and give all of them back at other addresses.

    Parameters
    ----------
    ioas : IoAddressSpace
        Every mapping leads to ``memory``.
    memory : GuestMemory
        Where the mappings lead now.

    Attributes
    ----------
    memory : GuestMemory
        Where it is now.

    Raises
    ------
    UnsupportedError
        EOPNOTSUPP: the backend can't, or a region has no descriptor to map it again.
    InvalidArgumentError
        EINVAL: a mapping leads elsewhere.

    Notes
    -----
    Nothing changes before ``invalidate``; between it and ``restore`` devices go on, and translations fail.
    Source: VFIO_DMA_UNMAP_FLAG_VADDR and VFIO_DMA_MAP_FLAG_VADDR in include/uapi/linux/vfio.h.

    Examples
    --------
    >>> from vfiodma import GuestMemory, VaddrHandoff, open_address_space
    >>> memory = GuestMemory.memfd(1 << 20)
    >>> with open_address_space("software", memlock_limit=None) as ioas:
    ...     iova = ioas.map(memory).iova
    ...     memory, times = VaddrHandoff(ioas, memory).move()
    ...     ioas.translate(iova) == memory.region.vaddr
    True
    >>> memory.close()
    """

    def __init__(self, ioas: IoAddressSpace, memory: GuestMemory) -> None:
        if "vaddr" not in ioas.capabilities.features:
            raise error(errno.EOPNOTSUPP, "invalidate_vaddr", hint="the backend can't update vaddrs now "
                        "(VFIO_UPDATE_VADDR, and no emulated group)")
        self._ioas = ioas
        self.memory = memory
        self._places = [self._place(memory, mapping) for mapping in ioas]

    @staticmethod
    def _place(memory: GuestMemory, mapping: Any) -> _Place:
        for gpa, region in memory:
            offset = mapping.vaddr - region.vaddr
            if offset >= 0 and offset + mapping.size <= region.size:
                if region.fd is None:
                    raise error(errno.EOPNOTSUPP, "invalidate_vaddr", mapping.iova, mapping.size,
                                "anonymous memory can't be mapped a second time: use memfd, hugetlb or file memory")
                return _Place(mapping.iova, mapping.size, gpa, offset)
        raise error(errno.EINVAL, "invalidate_vaddr", mapping.iova, mapping.size, "the mapping leads to other memory")

    def invalidate(self) -> int:
        """Declare every vaddr invalid; return the bytes."""
        return self._ioas.invalidate_vaddr()

    def restore(self, memory: GuestMemory) -> int:
        """Give every mapping its address in ``memory``, the same memory mapped elsewhere; return how many.

        Raises
        ------
        InvalidArgumentError
            EINVAL: the layout differs, or the mappings changed meanwhile; every vaddr is still invalid.
        """
        regions = dict(memory)
        if len(self._places) != len(self._ioas):
            raise error(errno.EINVAL, "update_vaddr", hint=f"there were {len(self._places)} mappings, "
                        f"now there are {len(self._ioas)}")
        rows = []
        for place in self._places:
            region = regions.get(place.gpa)
            if region is None or place.offset + place.size > region.size:
                raise error(errno.EINVAL, "update_vaddr", place.iova, place.size, "the memory has another layout")
            rows.append((place.iova, region.vaddr + place.offset, place.size))
        # The views keep every region open until the last mapping goes.
        self._ioas.update_vaddr_many(rows, keep=tuple(region.view() for region in memory.regions))
        return len(rows)

    def move(self, remap: Callable[[], GuestMemory] | None = None) -> tuple[GuestMemory, HandoffTimes]:
        """Do it all: invalidate, map the memory again, unmap the old address, restore.

        Returns
        -------
        (GuestMemory, HandoffTimes)
            The memory at its new address; the old object is closed.

        Notes
        -----
        When mapping it again fails, the old addresses are restored and the error is raised.  Should the restore fail,
        the vaddrs stay invalid: ``restore(handoff.memory)`` can be tried again.
        """
        start = time.perf_counter()
        self.invalidate()
        invalid = time.perf_counter()
        try:
            moved = (remap or self.memory.remap)()
        except BaseException:
            self.restore(self.memory)
            raise
        mapped = time.perf_counter()
        _empty(self.memory)
        self.memory.close()
        self.memory = moved
        unmapped = time.perf_counter()
        count = self.restore(moved)
        end = time.perf_counter()
        return moved, HandoffTimes(count, invalid - start, mapped - invalid, unmapped - mapped, end - unmapped)


def _empty(memory: GuestMemory) -> None:
    """Take the pages out of the process's mappings of shared memory; their contents stay.

    mmap.close() holds the GIL, and what it does takes most of a vaddr update: emptying first lets threads go on.
    """
    with contextlib.suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None).madvise
        for region in memory.regions:
            if region.fd is not None:
                madvise(ctypes.c_void_p(region.vaddr), ctypes.c_size_t(region.size), mmap.MADV_DONTNEED)
