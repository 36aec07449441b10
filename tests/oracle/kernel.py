"""What differs between the kernels that are modelled: the specification's version table as data."""
import errno
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Kernel:
    """One kernel version; the defaults are those of 7.2."""

    name: str
    #: Flags that MAP_DMA and UNMAP_DMA know.
    map_flags: int = 7
    unmap_flags: int = 7
    #: DIRTY_PAGES is there.
    dirty: bool = True
    #: Capabilities of GET_INFO in chain order (1 IOVA_RANGE, 2 MIGRATION, 3 DMA_AVAIL) and what they are padded to.
    capabilities: tuple[int, ...] = (2, 3, 1)
    capability_align: int = 8
    #: GET_INFO writes the largest of these sizes that argsz allows; None = min(argsz, 24).
    info_sizes: tuple[int, ...] | None = None
    #: errno of a range that wraps.
    wrap: int = errno.EOVERFLOW
    #: External pins of a range that wraps fail with EOVERFLOW.
    pin_wrap_checked: bool = True
    #: A range or mapping that ends exactly at 2**64 behaves like any other.
    top_works: bool = True
    #: errno of SET_CONTAINER with a descriptor that is not VFIO's.
    foreign_fd: int = errno.EBADFD
    #: TYPE1_NESTING is reported and can be set.
    nesting: bool = False
    #: CHECK_EXTENSION(UPDATE_VADDR): "no" never, "always", "instance" = with an instance without emulated groups.
    update_vaddr: str = "instance"
    #: UNMAP VADDR is refused while an emulated group is present.
    vaddr_needs_real: bool = True
    #: Attach, pin and dma_rw fail with EBUSY while a vaddr is invalid (else they block).
    vaddr_busy: bool = True
    #: MAP VADDR by another process moves the charge.
    owner_moves: bool = True
    #: errno of a replay beyond the aperture of the domain.
    replay_range: int = errno.ERANGE
    #: A READ-only mapping of untouched anonymous memory pins the zero page, which is not counted.
    zero_page: bool = False
    #: Pages are populated this many at a time before the limit is looked at.
    pin_batch: int = 512


V7_2 = Kernel("7.2")
V6_12 = replace(V7_2, name="6.12", wrap=errno.EINVAL, pin_wrap_checked=False, top_works=False, nesting=True,
                replay_range=errno.EFAULT)
V6_1 = replace(V6_12, name="6.1", capability_align=1, info_sizes=(16, 20), foreign_fd=errno.EINVAL, zero_page=True)
V5_12 = replace(V6_1, name="5.12", update_vaddr="always", vaddr_needs_real=False, vaddr_busy=False, owner_moves=False)
V5_4 = replace(V5_12, name="5.4", map_flags=3, unmap_flags=0, dirty=False, capabilities=(1,), update_vaddr="no",
               pin_batch=1)

KERNELS = {kernel.name: kernel for kernel in (V5_4, V5_12, V6_1, V6_12, V7_2)}
