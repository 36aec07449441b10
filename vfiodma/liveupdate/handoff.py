"""Live update of vaddrs: the memory behind mappings moves to another address of the process while devices go on."""
import contextlib
import ctypes
import errno
import mmap
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from .._core.errno import error
from ..address_space import IoAddressSpace
from ..memory import GuestMemory


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


def find_places(memory: GuestMemory, mappings: Any) -> dict[int, Any]:
    """Return, for each region's gpa, an (n, 4) array of iova, offset into the region, size, prot: what stays.

    Raises
    ------
    UnsupportedError
        EOPNOTSUPP: a region has no descriptor.
    InvalidArgumentError
        EINVAL: a mapping leads elsewhere.
    """
    import numpy as np

    places, found = {}, 0
    for gpa, region in memory:
        offset = mappings[:, 1] - np.uint64(region.vaddr)       # wraps, and is too large, for what lies before
        inside = (offset < np.uint64(region.size)) & (mappings[:, 2] <= np.uint64(region.size) - offset)
        if not inside.any():
            continue
        if region.fd is None:
            iova, _, size, _ = mappings[inside][0].tolist()
            raise error(errno.EOPNOTSUPP, "invalidate_vaddr", iova, size,
                        "anonymous memory can't be mapped a second time: use memfd, hugetlb or file memory")
        places[gpa] = np.column_stack((mappings[inside, 0], offset[inside], mappings[inside, 2:]))
        found += len(places[gpa])
    if found != len(mappings):
        known = np.concatenate([rows[:, 0] for rows in places.values()]) if places else mappings[:0, 0]
        iova, _, size, _ = mappings[~np.isin(mappings[:, 0], known)][0].tolist()
        raise error(errno.EINVAL, "invalidate_vaddr", iova, size, "the mapping leads to other memory")
    return places


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
        self._places = {gpa: rows[:, :3] for gpa, rows in find_places(memory, ioas.to_array()).items()}

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
        import numpy as np

        regions, count = dict(memory), sum(map(len, self._places.values()))
        if count != len(self._ioas):
            raise error(errno.EINVAL, "update_vaddr", hint=f"there were {count} mappings, "
                        f"now there are {len(self._ioas)}")
        parts = []
        for gpa, places in self._places.items():
            region = regions.get(gpa)
            size = 0 if region is None else region.size
            outside = (places[:, 1] > size) | (places[:, 2] > np.uint64(size) - places[:, 1])
            if region is None or outside.any():
                iova, _, length = places[outside][0].tolist()
                raise error(errno.EINVAL, "update_vaddr", iova, length, "the memory has another layout")
            parts.append(places + np.array([0, region.vaddr, 0], np.uint64))
        if parts:
            # The views keep every region open until the last mapping goes.
            self._ioas.update_vaddr_many(np.concatenate(parts), keep=tuple(region.view() for region in memory.regions))
        return count

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
