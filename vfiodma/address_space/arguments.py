"""What may be passed to an address space: ranges, permissions, memory, arrays.  Checked before anything happens."""
import contextlib
import errno
from typing import Any

from .._core.errno import error
from .._core.memory import buffer_address
from ..memory import GuestMemory, MemoryRegion
from ..types import Prot
from .table import Row

TOP = (1 << 64) - 1


def number(name: str, value: Any) -> int:
    """Return an integer; TypeError for anything else, bool included."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    return value.__index__()


def last_of(operation: str, iova: Any, size: Any) -> int:
    """Check a range of bytes and return its last address."""
    iova, size = number("iova", iova), number("size", size)
    if not 0 <= iova <= TOP or not 0 < size <= TOP + 1:
        raise error(errno.EINVAL, operation, iova, size, "iova and size are unsigned 64-bit numbers, and size is not 0")
    if iova + size - 1 > TOP:
        raise error(errno.EOVERFLOW, operation, iova, size, "the range ends above 2**64 - 1")
    return iova + size - 1


def check_prot(operation: str, prot: Any) -> int:
    """Return a permission, which is READ, WRITE or both."""
    prot = number("prot", prot)
    if prot not in (1, 2, 3):
        raise error(errno.EINVAL, operation, None, None, "prot is Prot.READ, Prot.WRITE or Prot.RW")
    return prot


def release(keeper: Any) -> None:
    """Let memory go.  Not left to the collector: a traceback may hold the frame that holds the view."""
    if isinstance(keeper, memoryview):
        keeper.release()


def hold(keep: Any) -> Any:
    """Return what keeps an object alive: a view of memory, which locks it as well, or else the object."""
    if isinstance(keep, MemoryRegion):
        return keep.view()
    with contextlib.suppress(TypeError):
        return memoryview(keep)
    return keep


def place(operation: str, memory: Any, offset: Any, size: Any, pgsize: int, prot: int) -> Row:
    """Find where memory is: a region, a memory of one region, a buffer or an address; the row keeps a view of it."""
    offset = number("offset", offset)
    size = None if size is None else number("size", size)
    if isinstance(memory, GuestMemory):
        memory = memory.region
    view, file = None, None
    try:
        if hasattr(memory, "__index__") and not hasattr(memory, "__array_interface__") and not isinstance(memory, bool):
            if size is None:
                raise TypeError("size is needed with an address")
            vaddr, mmio = memory.__index__() + offset, False
            last_of(operation, vaddr, size)
        else:
            region = isinstance(memory, MemoryRegion)
            view = memory.view() if region else memoryview(memory)
            size = view.nbytes - offset if size is None else size
            if not view.c_contiguous:
                raise error(errno.EINVAL, operation, None, size, "the buffer is not contiguous")
            if offset < 0 or size <= 0 or offset + size > view.nbytes:
                raise error(errno.EINVAL, operation, None, size,
                            f"offset {offset:#x} and size must lie within the {view.nbytes:#x} bytes of the memory")
            if view.readonly and prot & Prot.WRITE:
                raise error(errno.EFAULT, operation, None, size, "the memory is read-only: map it with prot=Prot.READ")
            vaddr, mmio = (memory.vaddr if region else buffer_address(view)) + offset, region and memory.mmio
            if region and memory.fd is not None and memory.kind in ("memfd", "hugetlb"):
                file = memory.fd, memory.offset + offset
        if (vaddr | size) & (pgsize - 1):
            raise error(errno.EINVAL, operation, None, size,
                        f"the address {vaddr:#x} and the size must be multiples of {pgsize:#x}")
    except BaseException:
        release(view)
        raise
    return Row(0, vaddr, size, prot, mmio, view, file)


def table_of(operation: str, entries: Any, columns: int) -> Any:
    """Return entries as an (n, columns) array of uint64."""
    import numpy

    table = numpy.asarray(entries)
    if not table.ndim:
        raise TypeError(f"entries are rows of {columns} numbers, not {type(entries).__name__}")
    if not table.size:
        return numpy.empty((0, columns), numpy.uint64)
    if table.ndim != 2 or table.shape[1] != columns:
        raise error(errno.EINVAL, operation, None, None, f"entries have the shape (n, {columns}), not {table.shape}")
    try:
        if table.dtype.kind not in "ui":
            # Rows whose numbers no one integer type holds arrive as floats or objects: convert exactly or not at all.
            table = numpy.array([[number("an entry", value) for value in row] for row in entries], numpy.uint64)
        elif table.dtype.kind == "i" and (table < 0).any():
            raise OverflowError
    except OverflowError:
        raise error(errno.EINVAL, operation, None, None, "entries are unsigned 64-bit numbers") from None
    return numpy.ascontiguousarray(table, numpy.uint64)
