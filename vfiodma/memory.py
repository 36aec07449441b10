"""Memory for DMA: blocks of process memory with an address, and the layout of guest memory made of them.

A block is a Python ``mmap``.  Whoever needs its address for longer (a mapping, a slice) holds a memoryview of it: as
long as one exists, ``close()`` is refused with EBUSY, so that an address in use never leads nowhere.
"""
import bisect
import contextlib
import errno
import fcntl
import mmap
import os
import warnings
from collections.abc import Iterator
from typing import Any, Self

from ._core.errno import error
from ._core.memory import buffer_address
from .types import Prot

_LIMIT = 1 << 63


def _whole_number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    return value.__index__()


def _check_block(operation: str, size: Any, offset: Any, pgsize: int) -> tuple[int, int]:
    size, offset = _whole_number("size", size), _whole_number("offset", offset)
    if not 0 < size < _LIMIT or not 0 <= offset < _LIMIT or offset + size > _LIMIT:
        raise error(errno.EINVAL, operation, None, size, "size must be positive, and offset + size below 2**63")
    if size % pgsize or offset % pgsize:
        raise error(errno.EINVAL, operation, None, size, f"size and offset must be multiples of {pgsize:#x}")
    return size, offset


class MemoryRegion:
    """One contiguous block of memory.

    Made by the class methods of :class:`GuestMemory`, or by :meth:`from_fd`.

    Attributes
    ----------
    vaddr, size : int
        Address in this process and length, in bytes.
    fd, offset : int or None, int
        The descriptor behind shared memory (owned by the region; None for anonymous memory) and where the block begins
        in it, in bytes.
    kind : str
        "anonymous", "memfd", "hugetlb", "file" or "device".
    prot : Prot
        What the process, and hence a device, may do with it.
    pgsize : int
        Size of the pages behind it, in bytes.
    mmio : bool
        Device memory (a BAR, a dma-buf): mapped, but left out of migration.
    """

    def __init__(self, block: mmap.mmap, *, kind: str, prot: Prot, fd: int | None = None, offset: int = 0,
                 pgsize: int = mmap.PAGESIZE, mmio: bool = False) -> None:
        self._block: mmap.mmap | memoryview | None = block
        self._pid = os.getpid()
        self._parent: MemoryRegion | None = None
        self.kind, self.prot, self.fd, self.offset, self.pgsize, self.mmio = kind, prot, fd, offset, pgsize, mmio
        self.size = len(block)
        with memoryview(block) as view:
            self.vaddr = buffer_address(view)

    @classmethod
    def from_fd(cls, fd: int, size: int, *, offset: int = 0, prot: Prot = Prot.RW, kind: str = "file",
                pgsize: int = mmap.PAGESIZE, mmio: bool = False) -> Self:
        """Map shared memory or a device's region by descriptor; the region keeps a duplicate of ``fd``.

        Raises
        ------
        VfioError
            With the errno of dup(2) or mmap(2); EINVAL for a size or offset that is not a multiple of the page size.

        Notes
        -----
        Source: mmap(2), MAP_SHARED.
        """
        size, offset = _check_block("mmap", size, offset, pgsize)
        protection = (mmap.PROT_READ if prot & Prot.READ else 0) | (mmap.PROT_WRITE if prot & Prot.WRITE else 0)
        try:
            own = os.dup(fd)
        except OSError as exc:
            raise error(exc.errno or errno.EIO, "mmap", None, size, f"fd {fd} is not an open descriptor") from None
        try:
            block = mmap.mmap(own, size, flags=mmap.MAP_SHARED, prot=protection, offset=offset)
        except (OSError, ValueError) as exc:
            os.close(own)
            number = getattr(exc, "errno", None) or errno.EINVAL
            hint = _hugetlb_hint(size, pgsize) if kind == "hugetlb" and number == errno.ENOMEM else str(exc)
            raise error(number, "mmap", None, size, hint) from None
        return cls(block, kind=kind, prot=prot, fd=own, offset=offset, pgsize=pgsize, mmio=mmio)

    @property
    def last(self) -> int:
        """Address of the last byte."""
        return self.vaddr + self.size - 1

    @property
    def closed(self) -> bool:
        """Whether the block is gone."""
        return self._block is None

    def _open(self) -> "mmap.mmap | memoryview":
        if self._block is None:
            raise error(errno.EBADF, "memory", None, self.size, "the memory region is closed")
        return self._block

    def view(self) -> memoryview:
        """Return the bytes, read-only unless ``prot`` has WRITE.  The region can't be closed while the view lives."""
        return memoryview(self._open())[:]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> "MemoryRegion":
        """Return a part as a region of its own, which shares the memory and keeps this region open."""
        if not isinstance(part, slice):
            raise TypeError("a region is cut with a slice of bytes, region[first:end]")
        first, end, step = part.indices(self.size)
        if step != 1:
            raise error(errno.EINVAL, "slice", None, None, "a slice of memory has step 1")
        _check_block("slice", end - first, first, self.pgsize)
        region = object.__new__(type(self))
        region.__dict__.update(self.__dict__, _parent=self, _block=self.view()[first:end], size=end - first,
                               vaddr=self.vaddr + first, offset=self.offset + first)
        return region

    def remap(self) -> "MemoryRegion":
        """Map the same memory at another address, as a live vaddr update needs it.

        Raises
        ------
        UnsupportedError
            EOPNOTSUPP: anonymous memory has no descriptor to map again.
        """
        self._open()
        if self.fd is None:
            raise error(errno.EOPNOTSUPP, "remap", None, self.size,
                        "anonymous memory can't be mapped a second time: use memfd, hugetlb or file memory")
        return type(self).from_fd(self.fd, self.size, offset=self.offset, prot=self.prot, kind=self.kind,
                                  pgsize=self.pgsize, mmio=self.mmio)

    def close(self) -> None:
        """Unmap the block; idempotent.

        Raises
        ------
        BusyError
            EBUSY: it is mapped for DMA, or a view or slice of it is alive.  The region stays as it was.
        """
        if self._block is None:
            return
        try:
            if isinstance(self._block, memoryview):
                self._block.release()
            else:
                self._block.close()
        except BufferError:
            raise error(errno.EBUSY, "close", None, self.size,
                        f"memory at {self.vaddr:#x} is still mapped for DMA or viewed: unmap it first") from None
        self._block = None
        if self.fd is not None and self._parent is None:
            os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_block", None) is None or self._parent is not None or self._pid != os.getpid():
            return
        warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        with contextlib.suppress(Exception):
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._block is None else f"vaddr={self.vaddr:#x}"
        return f"<MemoryRegion {self.kind} {state} size={self.size:#x}{' mmio' if self.mmio else ''}>"


def _hugetlb_hint(size: int, pgsize: int) -> str:
    pool = f"/sys/kernel/mm/hugepages/hugepages-{pgsize >> 10}kB"

    def read(name: str) -> int:
        try:
            with open(f"{pool}/{name}") as file:
                return int(file.read())
        except (OSError, ValueError):
            return 0

    reserved, free, needed = read("nr_hugepages"), read("free_hugepages"), size // pgsize
    way = f"sysctl vm.nr_hugepages={reserved + needed - free}" if pgsize == 2 << 20 else \
        f"echo {reserved + needed - free} > {pool}/nr_hugepages"
    return f"{needed} huge pages of {pgsize >> 10} KiB are needed, {free} of {reserved} reserved ones are free: {way}"


class GuestMemory:
    """Guest-physical memory: memory regions at guest addresses, ordered and without overlap.

    Owns its regions.  The class methods make a memory of one region at guest address 0; ``add`` builds larger layouts.

    Examples
    --------
    >>> from vfiodma import GuestMemory
    >>> with GuestMemory.memfd(1 << 20) as memory:
    ...     memory.write(0x1000, b"boot")
    ...     memory.read(0x1000, 4)
    b'boot'
    """

    def __init__(self) -> None:
        self._gpas: list[int] = []
        self._regions: list[MemoryRegion] = []
        self._closed = False

    @classmethod
    def _of(cls, region: MemoryRegion) -> Self:
        memory = cls()
        memory.add(region, 0)
        return memory

    @classmethod
    def anonymous(cls, size: int) -> Self:
        """Private memory of this process; a forked child does not get it.

        Notes
        -----
        Source: mmap(2), MAP_ANONYMOUS; madvise(2), MADV_DONTFORK: a copy-on-write fault after fork would otherwise
        move the parent's pages away from under the device.
        """
        size, _ = _check_block("mmap", size, 0, mmap.PAGESIZE)
        try:
            block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as exc:
            raise error(exc.errno or errno.ENOMEM, "mmap", None, size,
                        "too little memory or address space (ulimit -v)") from None
        block.madvise(mmap.MADV_DONTFORK)
        return cls._of(MemoryRegion(block, kind="anonymous", prot=Prot.RW))

    @classmethod
    def memfd(cls, size: int, name: str = "vfiodma", *, seal: bool = True) -> Self:
        """Shared memory with a descriptor that other processes can map.

        Parameters
        ----------
        size : int
            Bytes, a multiple of the page size.
        name : str
            Shown in /proc/PID/maps.
        seal : bool
            Fix the size for good: nobody can shrink the file, so that DMA into it can't raise SIGBUS.

        Notes
        -----
        Source: memfd_create(2); fcntl(2), F_ADD_SEALS.
        """
        return cls._of(_from_memfd(size, name, seal, mmap.PAGESIZE, 0, "memfd"))

    @classmethod
    def hugetlb(cls, size: int, page_size: int = 2 << 20, *, name: str = "vfiodma", seal: bool = True) -> Self:
        """Shared memory of huge pages, with a descriptor.

        Parameters
        ----------
        size, page_size : int
            Bytes; ``size`` is a multiple of ``page_size``, which is one that the CPU has (2 MiB, 1 GiB).

        Raises
        ------
        LockedMemoryError
            ENOMEM: not enough huge pages are reserved; the text names the sysctl.

        Notes
        -----
        Source: memfd_create(2), MFD_HUGETLB.
        """
        page_size = _whole_number("page_size", page_size)
        if page_size <= 0 or page_size & (page_size - 1):
            raise error(errno.EINVAL, "memfd_create", None, page_size, "page_size must be a power of two")
        flags = os.MFD_HUGETLB | (page_size.bit_length() - 1) << 26
        return cls._of(_from_memfd(size, name, seal, page_size, flags, "hugetlb"))

    @classmethod
    def file(cls, path: str | os.PathLike[str], size: int | None = None, *, offset: int = 0,
             prot: Prot = Prot.RW) -> Self:
        """Map a file, shared.

        Parameters
        ----------
        path : path-like
            An existing file.
        size : int, optional
            Bytes; by default the whole pages of the file from ``offset`` on.
        offset : int
            Where to begin, in bytes, a multiple of the page size.
        prot : Prot
            Prot.READ maps a file that can't be written.

        Notes
        -----
        Nothing keeps others from shrinking the file: only a memfd can be sealed.  Recent kernels pin shared pages of
        ordinary file systems for reading only (EFAULT otherwise).
        """
        fd = os.open(path, (os.O_RDWR if prot & Prot.WRITE else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            if size is None:
                size = (os.fstat(fd).st_size - offset) & -mmap.PAGESIZE
            return cls._of(MemoryRegion.from_fd(fd, size, offset=offset, prot=prot))
        finally:
            os.close(fd)

    @classmethod
    def device(cls, fd: int, size: int, *, offset: int = 0, prot: Prot = Prot.RW) -> Self:
        """Map device memory: a BAR of a VFIO device (by region offset) or a dma-buf.

        It maps for DMA like other memory, and is left out of migration (``mmio`` is set).
        """
        return cls._of(MemoryRegion.from_fd(fd, size, offset=offset, prot=prot, kind="device", mmio=True))

    def add(self, region: MemoryRegion, gpa: int) -> None:
        """Place a region at a guest-physical address; the memory owns it from now on.

        Raises
        ------
        OverlapError
            EEXIST: another region is there.
        """
        if not isinstance(region, MemoryRegion):
            raise TypeError(f"a MemoryRegion is needed, not {type(region).__name__}")
        gpa = _whole_number("gpa", gpa)
        if gpa < 0 or gpa + region.size > 1 << 64 or gpa % mmap.PAGESIZE:
            raise error(errno.EINVAL, "add", gpa, region.size, "a region lies on page boundaries below 2**64")
        at = bisect.bisect(self._gpas, gpa)
        if (at and self._gpas[at - 1] + self._regions[at - 1].size > gpa) or \
                (at < len(self._gpas) and gpa + region.size > self._gpas[at]):
            raise error(errno.EEXIST, "add", gpa, region.size, "another region lies there")
        self._gpas.insert(at, gpa)
        self._regions.insert(at, region)

    @property
    def size(self) -> int:
        """Bytes of all regions."""
        return sum(region.size for region in self._regions)

    @property
    def regions(self) -> tuple[MemoryRegion, ...]:
        """The regions, by guest address."""
        return tuple(self._regions)

    @property
    def region(self) -> MemoryRegion:
        """The only region of a memory that has just one."""
        self._check_open("region")
        if len(self._regions) != 1:
            raise error(errno.EINVAL, "region", None, None, f"the memory has {len(self._regions)} regions, not one")
        return self._regions[0]

    def __iter__(self) -> Iterator[tuple[int, MemoryRegion]]:
        """Yield (gpa, region), ascending."""
        return iter(list(zip(self._gpas, self._regions, strict=True)))

    def __len__(self) -> int:
        return len(self._regions)

    def find(self, gpa: int) -> tuple[MemoryRegion, int]:
        """Return the region that holds a guest address, and the offset into it.

        Raises
        ------
        NotMappedError
            ENOENT: no region is there.
        """
        self._check_open("find")
        at = bisect.bisect(self._gpas, gpa) - 1
        if at < 0 or gpa - self._gpas[at] >= self._regions[at].size:
            raise error(errno.ENOENT, "find", gpa, None, "no memory region at this guest address")
        return self._regions[at], gpa - self._gpas[at]

    def _pieces(self, gpa: int, size: int) -> list[tuple[MemoryRegion, int, int]]:
        pieces = []
        while size:
            region, offset = self.find(gpa)
            length = min(size, region.size - offset)
            pieces.append((region, offset, length))
            gpa, size = gpa + length, size - length
        return pieces

    def read(self, gpa: int, size: int) -> bytes:
        """Copy bytes out, across adjacent regions."""
        if size < 0:
            raise error(errno.EINVAL, "read", gpa, size)
        parts = []
        for region, offset, length in self._pieces(gpa, size):
            with region.view() as view:
                parts.append(bytes(view[offset:offset + length]))
        return b"".join(parts)

    def write(self, gpa: int, data: Any) -> None:
        """Copy a bytes-like object in, across adjacent regions; nothing is written when a part does not fit."""
        source = memoryview(data).cast("B")
        pieces = self._pieces(gpa, len(source))
        if not all(region.prot & Prot.WRITE for region, _, _ in pieces):
            raise error(errno.EPERM, "write", gpa, len(source), "the memory is read-only")
        done = 0
        for region, offset, length in pieces:
            with region.view() as view:
                view[offset:offset + length] = source[done:done + length]
            done += length

    def remap(self) -> "GuestMemory":
        """Map every region at another address (see :meth:`MemoryRegion.remap`); all or none."""
        moved = type(self)()
        try:
            for gpa, region in self:
                moved.add(region.remap(), gpa)
        except BaseException:
            moved.close()
            raise
        return moved

    def close(self) -> None:
        """Close the regions, the last first; idempotent.  EBUSY leaves what is still in use open."""
        while self._regions:
            self._regions[-1].close()
            del self._regions[-1], self._gpas[-1]
        self._closed = True

    def _check_open(self, operation: str) -> None:
        if self._closed and not self._regions:
            raise error(errno.EBADF, operation, hint="the memory is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GuestMemory regions={len(self._regions)} size={self.size:#x}>"


def _from_memfd(size: int, name: str, seal: bool, pgsize: int, flags: int, kind: str) -> MemoryRegion:
    size, _ = _check_block("memfd_create", size, 0, pgsize)
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    except OSError as exc:
        sizes = "the CPU's huge page sizes are listed in /sys/kernel/mm/hugepages" if flags else ""
        raise error(exc.errno or errno.EIO, "memfd_create", None, size, sizes) from None
    try:
        try:
            os.ftruncate(fd, size)
            if seal:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except OSError as exc:
            hint = _hugetlb_hint(size, pgsize) if kind == "hugetlb" else ""
            raise error(exc.errno or errno.EIO, "memfd_create", None, size, hint) from None
        return MemoryRegion.from_fd(fd, size, kind=kind, pgsize=pgsize)
    finally:
        os.close(fd)
