"""What mapping takes, and what stands against it: limits by name and value, and how to raise them."""
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import hostinfo
from ..errors import DmaLimitError, VfioError
from ..memory import GuestMemory, MemoryRegion
from .arguments import last_of, number


@dataclass(frozen=True)
class Cost:
    """What mapping some memory will take, and what is left of it.  Sizes are bytes; None = no limit, or not known."""

    entries: int                        #: mappings
    size: int
    locked_pages: int                   #: pages that count against the limit of locked memory
    locked_size: int
    dma_avail: int | None               #: mappings left in the container
    iova_free: int
    locked: hostinfo.LockedMemory
    problems: tuple[str, ...]           #: each limit that would be exceeded, its value and how to raise it

    @property
    def fits(self) -> bool:
        """Whether no limit stands against it."""
        return not self.problems


def raise_entry_limit() -> str:
    """Tell how to raise the limit of mappings."""
    limit = hostinfo.dma_entry_limit()
    value = "65535 unless set" if limit is None else str(limit)
    return f"the limit is dma_entry_limit of vfio_iommu_type1 ({value}, read when a container is opened): raise it " \
           "with 'modprobe vfio_iommu_type1 dma_entry_limit=N', or map fewer, larger blocks"


def raise_locked_limit(locked: hostinfo.LockedMemory) -> str:
    """Tell how to raise the limit of locked memory."""
    if locked.available is None:
        return "RLIMIT_MEMLOCK does not limit this process (unlimited, or CAP_IPC_LOCK): memory itself is short, or " \
               "the backend has a limit of its own"
    hard = "none" if locked.hard is None else f"{locked.hard} bytes"
    return f"RLIMIT_MEMLOCK is {locked.soft} bytes, {locked.used} of them in use (hard limit {hard}): raise it with " \
           "'ulimit -l', 'memlock' in /etc/security/limits.conf or systemd's LimitMEMLOCK="


def limit_hint(exc: VfioError) -> str:
    """Name the limit behind a refused map: its value, and how to raise it."""
    return raise_entry_limit() if isinstance(exc, DmaLimitError) else raise_locked_limit(hostinfo.locked_memory())


def _blocks(item: Any) -> list[tuple[int, bool]]:
    """(size, whether it is device memory) of each mapping."""
    if isinstance(item, GuestMemory):
        return [(region.size, region.mmio) for _, region in item]
    if isinstance(item, MemoryRegion):
        return [(item.size, item.mmio)]
    if hasattr(item, "__index__") and not hasattr(item, "__array_interface__"):
        last_of("cost", 0, item)
        return [(number("size", item), False)]
    with memoryview(item) as view:
        return [(view.nbytes, False)]


def cost_of(memory: Sequence[Any], dma_avail: int | None, iova_free: int) -> Cost:
    """Add up, and compare with the limits."""
    blocks = [block for item in memory for block in _blocks(item)]
    locked = hostinfo.locked_memory()
    size = sum(size for size, _ in blocks)
    pages = sum(-(-size // mmap.PAGESIZE) for size, mmio in blocks if not mmio)
    locked_size = pages * mmap.PAGESIZE
    problems = []
    if dma_avail is not None and len(blocks) > dma_avail:
        problems.append(f"{len(blocks)} mappings are needed, {dma_avail} are left; {raise_entry_limit()}")
    if locked.available is not None and locked_size > locked.available:
        problems.append(f"{locked_size} bytes would be locked; {raise_locked_limit(locked)}")
    if size > iova_free:
        problems.append(f"{size} bytes of IOVA are needed, {iova_free} are free: unmap something")
    return Cost(len(blocks), size, pages, locked_size, dma_avail, iova_free, locked, tuple(problems))
