"""IoAddressSpace: allocator, table of mappings and backend, which change together or not at all.

Every change runs under one lock, in the order allocator, backend, table, listeners; a failure runs it backwards.
"""
import contextlib
import errno
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Self

from .._core.bitmap import DirtyBitmap
from .._core.errno import error
from .._core.iova import IovaAllocator
from .._core.memory import read_memory, write_memory
from ..errors import DmaLimitError, ForkedError, LockedMemoryError, MemoryFaultError, VfioError
from ..memory import GuestMemory
from ..protocols import Backend
from ..types import Capabilities, IovaRange, Mapping, Prot
from .adopting import Adoptable
from .arguments import TOP, check_prot, hold, last_of, number, place, release, table_of
from .cost import Cost, cost_of, limit_hint
from .fork import retire_in_child
from .listeners import Listener, Listeners
from .marks import Marks
from .pins import Pins
from .table import MappingTable, Row
from .undo import Undo
from .vaddrs import invalidate_everything, restore, update_many

EVERYWHERE = IovaRange(0, TOP)


class IoAddressSpace(Adoptable):
    """An I/O address space of devices: what they see at which I/O virtual address.

    Parameters
    ----------
    backend : Backend
        The container that maps for the devices.
    close_backend : bool
        Close the backend with this object.

    Notes
    -----
    Thread safe.  Look-ups (``translate``, ``get``, ``translate_many``) take no lock and run beside changes; an address
    that they return is good until the mapping goes, so hold a :meth:`pin` where it is used longer.  All sizes and
    addresses are bytes.

    Examples
    --------
    >>> from vfiodma import GuestMemory, open_address_space
    >>> with GuestMemory.memfd(1 << 20) as memory, open_address_space("software") as ioas:
    ...     mapping = ioas.map(memory)
    ...     ioas.write(mapping.iova + 16, b"from the device")
    ...     memory.read(16, 15)
    b'from the device'
    """

    #: translate(iova) -> vaddr; NotMappedError (ENOENT) where nothing is mapped or the vaddr is invalid.  Lock free.
    translate: Callable[[int], int]
    #: get(iova, default=None) -> vaddr or the default.  Lock free.
    get: Callable[..., Any]
    #: translate_many(iovas, out=None) -> uint64 array of vaddrs.  Releases the GIL.
    translate_many: Callable[..., Any]

    def __init__(self, backend: Backend, *, close_backend: bool = False) -> None:
        self._unusable = "closed"               # until everything is there
        if not hasattr(backend, "capabilities"):
            raise TypeError(f"a backend is what open_backend() returns, not {type(backend).__name__}; "
                            "open_address_space(name) opens both")
        capabilities = backend.capabilities()
        self.backend: Any = backend             # Any: optional features are asked for by name
        self._close_backend = close_backend
        self._pid = os.getpid()
        self.allocator = IovaAllocator(backend.iova_ranges() or [EVERYWHERE], pgsizes=capabilities.pgsizes)
        self.pgsize = capabilities.min_pgsize
        self._changed = threading.Condition(threading.RLock())
        self._table = MappingTable(release)
        self._marks = Marks(self.pgsize)
        self._pins = Pins(self._changed)
        self._listeners = Listeners()
        self.translate = self._table.translations.translate
        self.get = self._table.translations.get
        self.translate_many = self._table.translations.translate_many
        self._unusable = ""
        retire_in_child(self)

    # Mapping

    def map(self, memory: Any, iova: int | None = None, *, prot: int = Prot.RW, offset: int = 0,
            size: int | None = None, mmio: bool = False, **placement: Any) -> Mapping:
        """Map memory for the devices.

        Parameters
        ----------
        memory : MemoryRegion, GuestMemory of one region, buffer or int
            What to map.  Buffers are kept alive, and locked against a change of size, until they are unmapped; so are
            regions.  An int is an address of this process, and the caller's own to keep valid.
        iova : int, optional
            Where; by default the allocator chooses.
        prot : Prot
            What the device may do.
        offset, size : int
            Which part, in bytes; by default everything.  An address needs a size.
        mmio : bool
            Device memory, left out of migration; set by itself for such regions.
        **placement
            ``align, limit, hint, top_down, guard, ephemeral`` of :meth:`IovaAllocator.allocate`, when it chooses.

        Returns
        -------
        Mapping

        Raises
        ------
        InvalidArgumentError
            EINVAL, EOVERFLOW: misaligned, empty, wrapping, or outside the IOVA ranges.
        OverlapError
            EEXIST: something is mapped there.
        IovaSpaceError, DmaLimitError
            ENOSPC: no place, or the container's limit of mappings is reached.
        LockedMemoryError
            ENOMEM: over the limit of locked memory.
        MemoryFaultError
            EFAULT: the memory can't be pinned, or only for reading.

        Notes
        -----
        A failure leaves everything as it was.  Source: VFIO_IOMMU_MAP_DMA in include/uapi/linux/vfio.h.
        """
        if iova is not None and placement:
            raise TypeError(f"{', '.join(placement)}: only for an iova that the allocator chooses")
        with self._change("map_dma"), Undo() as undo:
            row = place("map_dma", memory, offset, size, self.pgsize, check_prot("map_dma", prot))
            undo.append((release, row.keeper))
            row = row._replace(mmio=row.mmio or bool(mmio))
            if iova is None:
                row = row._replace(iova=self.allocator.allocate(row.size, **placement))
                undo.append((self.allocator.free, row.iova))
            else:
                row = row._replace(iova=number("iova", iova))
                self._reserve([row], undo)
            self._install([row], undo)
        return row.mapping

    def map_memory(self, memory: GuestMemory, base: int = 0, *, prot: int = Prot.RW) -> list[Mapping]:
        """Map every region of guest memory at ``base`` + its guest-physical address; all or none.

        A region that the process can only read is mapped with Prot.READ.
        """
        base, rows = number("base", base), []
        with self._change("map_dma"), Undo() as undo:
            for gpa, region in memory:
                row = place("map_dma", region, 0, None, self.pgsize, check_prot("map_dma", prot & region.prot))
                undo.append((release, row.keeper))
                rows.append(row._replace(iova=base + gpa))
            self._reserve(rows, undo)
            self._install(rows, undo)
        return [row.mapping for row in rows]

    def map_many(self, entries: Any, *, keep: Any = None) -> None:
        """Map many addresses; all or none.

        Parameters
        ----------
        entries : (n, 4) array of uint64, or a sequence of rows
            iova, vaddr, size, prot of each mapping.
        keep : object, optional
            Held until the last of them is unmapped; a buffer is locked against a change of size as well.

        Notes
        -----
        A backend with the feature "map_many" gets them in one call, without the GIL.
        """
        table = table_of("map_dma", entries, 4)
        with self._change("map_dma"), Undo() as undo:
            keep = hold(keep)
            undo.append((release, keep))
            rows = [Row(iova, vaddr, size, check_prot("map_dma", prot), False, keep)
                    for iova, vaddr, size, prot in table.tolist()]
            for row in rows:
                if (row.vaddr | row.size) & (self.pgsize - 1):
                    raise error(errno.EINVAL, "map_dma", row.iova, row.size,
                                f"vaddr {row.vaddr:#x} and size must be multiples of {self.pgsize:#x}")
            self._reserve(rows, undo)
            self._install(rows, undo, table)

    def unmap(self, iova: int, size: int | None = None, *, timeout: float | None = 0.0) -> int:
        """Remove the mapping that starts at ``iova``, or every mapping of a range.

        Parameters
        ----------
        iova, size : int
            A range must be covered with whole mappings: a shorter unmap than asked for is an error.
        timeout : float or None
            Seconds to wait for pins; None waits for ever.

        Returns
        -------
        int
            Bytes unmapped.

        Raises
        ------
        NotMappedError
            ENOENT: nothing is mapped in a part of the range.
        InvalidArgumentError
            EINVAL: the range cuts a mapping.
        BusyError
            EBUSY: a pin is still held.
        """
        with self._change("unmap_dma"):
            rows = self._free_rows("unmap_dma", iova, size, timeout)
            return self._remove(rows, lambda: self.backend.unmap_dma(iova, rows[-1].last + 1 - iova))

    def unmap_all(self, *, timeout: float | None = 0.0) -> int:
        """Remove every mapping; return the bytes unmapped."""
        with self._change("unmap_all"):
            self._pins.wait("unmap_all", 0, TOP, timeout, self._check)
            rows = self._table.rows()
            return self._remove(rows, lambda: self._unmap_backend(rows))

    # Looking up

    def find(self, iova: int) -> Mapping:
        """Return the mapping that holds an address; NotMappedError (ENOENT) if there is none."""
        last_of("find", iova, 1)
        with self.unchanged("find"):
            return self._table.covering("find", iova, iova)[0].mapping

    def mappings(self, iova: int = 0, size: int | None = None, *, mmio: bool | None = None) -> list[Mapping]:
        """List the mappings that touch a range, ascending.

        ``mmio`` selects device memory (True) or the rest (False).  While a vaddr is invalid, the last one is shown.
        """
        last = last_of("mappings", iova, TOP + 1 - iova if size is None else size)
        with self.unchanged("mappings"):
            return [row.mapping for row in self._table.rows(iova, last) if mmio is None or row.mmio == mmio]

    def to_array(self) -> Any:
        """Return every mapping as an (n, 4) uint64 array of iova, vaddr, size, prot, by iova; a copy."""
        with self.unchanged("to_array"):
            return self._table.to_array()

    def sgl(self, iova: int, size: int) -> list[tuple[int, int]]:
        """Return the memory behind a range as (vaddr, size) pieces; neighbours in memory are joined.

        Raises
        ------
        NotMappedError
            ENOENT: a hole in the range, or an invalid vaddr; ``iova`` of the error is where it begins.
        """
        last = last_of("sgl", iova, size)
        with self.unchanged("sgl"):
            return self._table.segments("sgl", iova, last)

    def iovas_of(self, vaddr: int) -> list[int]:
        """Return every iova that leads to an address of this process, ascending."""
        last_of("iovas_of", vaddr, 1)
        with self.unchanged("iovas_of"):
            return sorted(self._table.reverse.iovas(vaddr))

    # Access, as a device does it

    def read(self, iova: int, size: int) -> bytes:
        """Read memory by iova.

        Raises
        ------
        NotMappedError
            ENOENT: a part is not mapped.
        DmaPermissionError
            EPERM: a part is not mapped with Prot.READ.
        MemoryFaultError
            EFAULT: the memory behind it is gone.
        """
        with self._pinned("dma_read", iova, size, Prot.READ, True) as segments:
            try:
                return b"".join([read_memory(vaddr, length) for vaddr, length in segments])
            except MemoryFaultError as exc:
                raise error(errno.EFAULT, "dma_read", iova, size, exc.hint) from None

    def write(self, iova: int, data: Any) -> None:
        """Write memory by iova, and mark it dirty.  Raises as :meth:`read` does; EPERM without Prot.WRITE.

        Nothing is written unless all of the range is mapped for writing.
        """
        with memoryview(data) as view, view.cast("B") as source:
            size = len(source)
            with self._pinned("dma_write", iova, size, Prot.WRITE, True) as segments:
                done = 0
                try:
                    for vaddr, length in segments:
                        write_memory(vaddr, source[done:done + length])
                        done += length
                except MemoryFaultError as exc:
                    raise error(errno.EFAULT, "dma_write", iova, size, exc.hint) from None
                finally:
                    # After the bytes: a harvest in between would take the mark and miss them.
                    self.mark_dirty(iova, size)

    def pin(self, iova: int, size: int) -> contextlib.AbstractContextManager[list[tuple[int, int]]]:
        """Hold a range: a context manager with the ``sgl``, whose addresses stay valid inside the block.

        Meanwhile unmap and invalidate_vaddr wait for it, or fail with EBUSY.
        """
        return self._pinned("pin", iova, size, 0, False)

    # Writes of the process itself

    def mark_dirty(self, iova: int, size: int) -> None:
        """Say that a range was written by the process itself, after writing; every page it touches counts as dirty.

        Raises
        ------
        NotMappedError
            ENOENT: a part is not mapped; nothing is marked.
        """
        last = last_of("mark_dirty", iova, size)
        with self.unchanged("mark_dirty"):
            for row in self._table.covering("mark_dirty", iova, last):
                self._marks.mark(row, iova, last)

    def harvest_marked(self, iova: int, size: int, into: Any) -> int:
        """OR the marked pages of a range into a bitmap, and clear the marks.

        Parameters
        ----------
        iova, size : int
            Multiples of the page size.
        into : DirtyBitmap or writable buffer of u64 words
            Bit 0 is the page at ``iova``.

        Returns
        -------
        int
            Pages that were marked.
        """
        last = last_of("harvest_marked", iova, size)
        if (iova | size) & (self.pgsize - 1):
            raise error(errno.EINVAL, "harvest_marked", iova, size, f"they must be multiples of {self.pgsize:#x}")
        if not isinstance(into, DirtyBitmap):
            into = DirtyBitmap.frombuffer(into, size // self.pgsize, self.pgsize)
        if into.readonly or into.npages * self.pgsize < size or into.pgsize != self.pgsize:
            raise error(errno.EINVAL, "harvest_marked", iova, size,
                        f"a writable bitmap of pages of {self.pgsize:#x} bytes for the whole range is needed")
        with self.unchanged("harvest_marked"):
            return sum(self._marks.harvest(row, iova, last, into) for row in self._table.rows(iova, last))

    # Live update of vaddrs

    def invalidate_vaddr(self, iova: int = 0, size: int | None = None, *, timeout: float | None = 0.0) -> int:
        """Declare the process's addresses of mappings invalid, so that the memory can move; DMA of devices goes on.

        Look-ups of them fail until :meth:`update_vaddr`; memory that was kept is let go.

        Parameters
        ----------
        iova, size : int
            A range of whole mappings; by default everything.
        timeout : float or None
            Seconds to wait for pins; None waits for ever.

        Returns
        -------
        int
            Bytes of the mappings.

        Raises
        ------
        UnsupportedError
            EOPNOTSUPP: the backend can't.
        InvalidArgumentError
            EINVAL: one is invalid already, or the range cuts a mapping.
        BusyError
            EBUSY: a pin is held, or an emulated group is attached.

        Notes
        -----
        Source: VFIO_DMA_UNMAP_FLAG_VADDR in include/uapi/linux/vfio.h.
        """
        with self._change("invalidate_vaddr"):
            self._need("vaddr", "invalidate_vaddr")
            everything = size is None and iova == 0
            if everything:
                self._pins.wait("invalidate_vaddr", 0, TOP, timeout, self._check)
                if not self._table.invalid:
                    return invalidate_everything(self.backend, self._table)
                rows = self._table.rows()
            else:
                rows = self._free_rows("invalidate_vaddr", iova, size, timeout)
            for row in rows:
                if self._table.is_invalid(row):
                    raise error(errno.EINVAL, "invalidate_vaddr", row.iova, row.size, "its vaddr is invalid already")
            self.backend.invalidate_vaddr(*(() if everything else (iova, rows[-1].last + 1 - iova)))
            for row in rows:
                self._table.invalidate(row)
            return sum(row.size for row in rows)

    def update_vaddr(self, iova: int, memory: Any, *, offset: int = 0) -> Mapping:
        """Give an invalid mapping its memory's new address.

        Parameters
        ----------
        iova : int
            Where the mapping starts.
        memory : MemoryRegion, GuestMemory of one region, buffer or int
            The same memory as before, at another address, with ``offset`` bytes before the mapping's first.  It is not
            compared.

        Raises
        ------
        NotMappedError
            ENOENT: no mapping starts there.
        InvalidArgumentError
            EINVAL: its vaddr is valid.

        Notes
        -----
        Source: VFIO_DMA_MAP_FLAG_VADDR in include/uapi/linux/vfio.h.
        """
        last_of("update_vaddr", iova, 1)
        with self._change("update_vaddr"), Undo() as undo:
            self._need("vaddr", "update_vaddr")
            old = self._table.waiting("update_vaddr", iova)
            row = place("update_vaddr", memory, offset, old.size, self.pgsize, old.prot)
            undo.append((release, row.keeper))
            row = row._replace(iova=old.iova, mmio=old.mmio)
            self.backend.update_vaddr(row.iova, row.vaddr, row.size)
            undo.append((self.backend.invalidate_vaddr, row.iova, row.size))
            restore(self._table, [old], [row], undo)
            return row.mapping

    def update_vaddr_many(self, entries: Any, *, keep: Any = None) -> None:
        """Give many invalid mappings their new addresses.

        Parameters
        ----------
        entries : (n, 3) array of uint64, or a sequence of rows
            iova, vaddr, size of each.
        keep : object, optional
            As for :meth:`map_many`.
        """
        table = table_of("update_vaddr", entries, 3)
        with self._change("update_vaddr"), Undo() as undo:
            keep = hold(keep)
            undo.append((release, keep))
            self._need("vaddr", "update_vaddr")
            update_many(self.backend, self._table, table, keep, undo)

    @property
    def capabilities(self) -> Capabilities:
        """What the backend can do at this moment."""
        with self.unchanged("capabilities"):
            return self.backend.capabilities()

    @property
    def iova_ranges(self) -> list[IovaRange]:
        """The ranges that mappings may use, ascending, as of the last :meth:`refresh_ranges`."""
        return self.allocator.ranges

    @property
    def closed(self) -> bool:
        """Whether the address space can't be used any more."""
        return bool(self._unusable)

    def refresh_ranges(self) -> list[IovaRange]:
        """Take over the backend's IOVA ranges when a device joined or left; return the allocations outside of them."""
        with self._change("refresh_ranges"):
            return self.allocator.set_ranges(self.backend.iova_ranges() or [EVERYWHERE])

    def cost(self, *memory: Any) -> Cost:
        """Tell what mapping memory would take, before it is done.

        Parameters
        ----------
        *memory : GuestMemory, MemoryRegion, buffer or int
            Each region is one mapping; an int is a number of bytes.

        Notes
        -----
        Pages count once for every mapping they are in.  Device memory is not counted.  An estimate: pages that turn
        out to be reserved are not counted by the kernel either.

        Source: getrlimit(2), RLIMIT_MEMLOCK; VFIO_IOMMU_GET_INFO.
        """
        return cost_of(memory, self.capabilities.dma_avail, self.allocator.stats().free)

    def add_listener(self, *, mapped: Callable[[Mapping], object] | None = None,
                     unmapping: Callable[[Mapping], object] | None = None,
                     unmapped: Callable[[Mapping], object] | None = None, replay: bool = False) -> Listener:
        """Be told of changes, in the order of adding.

        Parameters
        ----------
        mapped : callable, optional
            Called with each new Mapping.  If one raises, the mapping is undone and those before it get ``unmapped``.
        unmapping : callable, optional
            Called before the backend unmaps; raising stops the unmap, and those before it get ``mapped`` again.
        unmapped : callable, optional
            Called when it is gone.
        replay : bool
            Call ``mapped`` for what is mapped already.

        Notes
        -----
        Called with the lock held, so that no change can come in between; a listener must not change the address space
        (EBUSY) nor wait for another thread that does.
        """
        listener = Listener(mapped, unmapping, unmapped)
        with self._change("add_listener"):
            if replay:
                self._listeners.replay(listener, self._table.rows())
            self._listeners.append(listener)
        return listener

    def remove_listener(self, listener: Listener) -> None:
        """Forget a listener; ValueError if it is not one."""
        with self._change("remove_listener"):
            self._listeners.remove(listener)

    @contextlib.contextmanager
    def unchanged(self, operation: str = "unchanged", *, unpinned: bool = False) -> Iterator[None]:
        """Keep mappings from coming or going meanwhile; other threads that change them wait, look-ups do not.

        With ``unpinned`` nothing is pinned meanwhile either: BusyError (EBUSY) if something is now.
        """
        with self._changed:
            self._check(operation)
            if unpinned:
                self._pins.wait(operation, 0, TOP, 0.0, self._check)
            yield

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, iova: int) -> bool:
        with self.unchanged("find"):
            return iova in self._table.tags

    def __iter__(self) -> Iterator[Mapping]:
        return iter(self.mappings())

    def __repr__(self) -> str:
        return f"<IoAddressSpace {self._unusable or f'{len(self)} mappings'}>"

    def close(self) -> None:
        """Unmap everything and close the backend if it is ours; idempotent.

        Raises
        ------
        BusyError
            EBUSY: a pin is held; the address space stays as it was.
        """
        with self._changed:
            if self._unusable:
                return
            if self._listeners.busy:
                raise error(errno.EBUSY, "close", hint="a listener can't close the address space")
            self._pins.wait("close", 0, TOP, 0.0, lambda _: None)
            if self._unusable:      # another thread was faster
                return
            rows = self._table.rows()
            self._retire("closed")
            with contextlib.ExitStack() as steps:       # runs them all, from the last, whatever fails
                steps.callback(self._listeners.clear)
                steps.callback(self._listeners.tell_unmapped, rows)
                steps.callback(self._forget, rows)
                if self._close_backend:
                    steps.callback(self.backend.close)
                steps.callback(self._unmap_backend, rows)

    def __enter__(self) -> Self:
        self._check("open")
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_unusable", "closed") or self._pid != os.getpid():
            return
        warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        with contextlib.suppress(Exception):
            self._pins.clear()
            self.close()

    def _check(self, operation: str) -> None:
        if self._unusable == "closed":
            raise error(errno.EBADF, operation, hint="the address space is closed")
        if self._unusable:
            raise ForkedError(errno.EBADF, operation=operation,
                              hint="the address space was opened before a fork: open one in this process")

    def _retire(self, why: str) -> None:
        def refuse(*_: Any, **__: Any) -> Any:
            self._check("translate")

        self._unusable = why
        self.translate = self.get = self.translate_many = refuse

    def _retire_forked(self) -> None:
        self._changed = threading.Condition(threading.RLock())      # a thread of the parent may hold the old one
        if not self._unusable:
            self._retire("forked")

    @contextlib.contextmanager
    def _change(self, operation: str) -> Iterator[None]:
        with self._changed:
            self._check(operation)
            if self._listeners.busy:
                raise error(errno.EBUSY, operation, hint="a listener can't change the address space")
            yield

    def _need(self, feature: str, operation: str) -> None:
        if feature not in self.backend.capabilities().features:
            raise error(errno.EOPNOTSUPP, operation, hint=f"the backend has no feature {feature!r} now")

    def _free_rows(self, operation: str, iova: Any, size: Any, timeout: float | None) -> list[Row]:
        """Return the mappings that cover a range wholly, when no pin holds it any more."""
        last: int | None = last_of(operation, iova, 1 if size is None else size)
        if size is not None and (iova | size) & (self.pgsize - 1):
            raise error(errno.EINVAL, operation, iova, size, f"iova and size must be multiples of {self.pgsize:#x}")

        last = None if size is None else last
        rows = self._table.whole(operation, iova, last)
        if self._pins.wait(operation, iova, rows[-1].last, timeout, self._check):
            rows = self._table.whole(operation, iova, last)     # the wait gave the lock away
        return rows

    def _reserve(self, rows: list[Row], undo: Undo) -> None:
        for row in rows:
            try:
                self.allocator.reserve(row.iova, row.size)
            except VfioError as exc:
                exc.operation = "map_dma"
                raise
            undo.append((self.allocator.free, row.iova))

    def _install(self, rows: list[Row], undo: Undo, table: Any = None) -> None:
        """Map rows whose places are taken: backend, table, listeners."""
        try:
            features = self.backend.capabilities().features
            if "map_file" in features and any(row.file for row in rows):
                for row in rows:
                    if row.file:
                        self.backend.map_file(*row.file, row.size, row.prot, row.iova)
                    else:
                        self.backend.map_dma(row.iova, row.vaddr, row.size, row.prot)
                    undo.append((self.backend.unmap_dma, row.iova, row.size))
            elif len(rows) > 1 and "map_many" in features:
                self.backend.map_many(table_of("map_dma", [row[:4] for row in rows], 4) if table is None else table)
                undo += [(self.backend.unmap_dma, row.iova, row.size) for row in rows]
            else:
                for row in rows:
                    self.backend.map_dma(row.iova, row.vaddr, row.size, row.prot)
                    undo.append((self.backend.unmap_dma, row.iova, row.size))
        except (DmaLimitError, LockedMemoryError) as exc:
            exc.hint = exc.hint or limit_hint(exc)
            raise
        for row in rows:
            undo.append((self._table.remove, row))
            self._table.add(row)
        self._listeners.announce("mapped", "unmapped", rows, undo)

    def _remove(self, rows: list[Row], unmap: Callable[[], int]) -> int:
        with Undo() as undo:
            self._listeners.announce("unmapping", "mapped", rows, undo)
            removed = unmap()
        self._forget(rows)
        self._listeners.tell_unmapped(rows)
        expected = sum(row.size for row in rows)
        if removed != expected:
            raise error(errno.EIO, "unmap_dma", rows[0].iova, expected, f"the backend unmapped {removed:#x} bytes")
        return expected

    def _unmap_backend(self, rows: list[Row]) -> int:
        """Unmap everything; rows are all there is."""
        if "unmap_all" in self.backend.capabilities().features:
            return self.backend.unmap_all()
        if not rows:
            return 0
        start, size = rows[0].iova, rows[-1].last + 1 - rows[0].iova
        if size <= TOP:
            return self.backend.unmap_dma(start, size)      # one call: all or nothing
        return sum(self.backend.unmap_dma(row.iova, row.size) for row in rows)

    def _forget(self, rows: list[Row]) -> None:
        for row in rows:
            self._table.remove(row)
            self._marks.forget(row)
            self.allocator.free(row.iova)

    @contextlib.contextmanager
    def _pinned(self, operation: str, iova: Any, size: Any, prot: int,
                copying: bool) -> Iterator[list[tuple[int, int]]]:
        last = last_of(operation, iova, size)
        with self.unchanged(operation):
            segments = self._table.segments(operation, iova, last, prot)
            key = self._pins.add(iova, last, copying)
        try:
            yield segments
        finally:
            with self._changed:
                self._pins.remove(key)
