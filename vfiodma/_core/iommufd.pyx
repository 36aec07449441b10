"""Typed ioctls on the objects of an iommufd: of the running kernel, or of a software one in this process.

Arguments are built on the C stack; with the running kernel the GIL is released for every call.
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer, Py_buffer
from libc.errno cimport EEXIST, EINTR, EINVAL, ENOENT, ENOMEM
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from .args cimport acquire_rows, u64
from .errno cimport raise_errno
from .kernel cimport Descriptor
from .rangemap cimport (
    rangemap_clear, rangemap_copy, rangemap_count, rangemap_entry, rangemap_find, rangemap_free, rangemap_insert,
    rangemap_lower, rangemap_new, rangemap_overlaps, rangemap_remove,
)
from .uapi_iommufd cimport (
    DIRTY_BITMAP_NO_CLEAR, DIRTY_TRACKING_ENABLE, HWPT_GET_DIRTY_BITMAP, HWPT_SET_DIRTY_TRACKING, IOAS_COPY, IOAS_MAP,
    IOAS_MAP_FILE, IOAS_UNMAP, MAP_FIXED_IOVA, MAP_READABLE, MAP_WRITEABLE, hwpt_get_dirty_bitmap,
    hwpt_set_dirty_tracking, ioas_copy, ioas_map, ioas_map_file, ioas_unmap,
)

cdef extern from "bitmap.h" nogil:
    uint64_t bitmap_harvest(uint64_t *dst, uint64_t dst_bit, uint64_t *src, uint64_t nbits)


cdef inline uint32_t access_flags(uint64_t prot) noexcept:
    """Translate Prot (bit 0 = read, bit 1 = write) to the flags of IOAS_MAP."""
    return (MAP_READABLE if prot & 1 else 0) | (MAP_WRITEABLE if prot & 2 else 0)


cdef uint32_t checked_flags(str operation, object prot, object iova, object size) except? 0xffffffff:
    cdef uint64_t access = u64(operation, prot)
    if access & ~<uint64_t> 3 or not access:
        raise_errno(EINVAL, operation, iova, size, "prot is READ, WRITE or both")
    return access_flags(access)


cdef inline bint splits(rangemap *areas, uint64_t first, uint64_t last, rangemap_entry *area) noexcept nogil:
    """Is there an area that reaches over an end of the range?"""
    if rangemap_find(areas, first, area):
        if area.start < first or area.last > last:
            return True
    return rangemap_find(areas, last, area) and area.last > last


cdef class IoasIoctls:
    """IOAS_MAP, IOAS_MAP_FILE, IOAS_COPY and IOAS_UNMAP on one I/O address space.

    It notes what is mapped through it: iommufd has no way to ask, and reading dirty bits needs it.  Mappings made
    otherwise (by the VFIO compatibility ioctls, or by another object for the same id) are not known here.

    Parameters
    ----------
    iommufd : Descriptor
        It is kept alive.
    id : int
        Number of the address space.
    """

    def __cinit__(self):
        self.noted = rangemap_new()
        if self.noted == NULL:
            raise MemoryError

    def __init__(self, Descriptor iommufd not None, uint32_t id):
        self.iommufd = iommufd
        self.id = id

    def __dealloc__(self):
        rangemap_free(self.noted)

    cdef int fail(self, long err, str operation, object iova=None, object size=None, object entry=None) except -1:
        if not self.id:
            return raise_errno(-err, operation, iova, size, "the address space is destroyed")
        return self.iommufd.fail(err, operation, iova, size, entry)

    def forget_id(self):
        """Note that the object is destroyed: calls fail with ENOENT, also when the number is used again."""
        self.id = 0
        rangemap_clear(self.noted)

    def areas(self):
        """Return the areas noted, ascending: a list of (iova, size)."""
        cdef rangemap_entry entry
        cdef uint64_t key = 0
        found = []
        while rangemap_lower(self.noted, key, &entry):
            found.append((entry.start, entry.last - entry.start + 1))
            if entry.last == UINT64_MAX:
                break
            key = entry.last + 1
        return found

    def note_areas(self, entries):
        """Note what another process mapped, from (n, 4) rows of iova, vaddr, size, prot; nothing is mapped."""
        cdef Py_buffer view
        cdef uint64_t *row
        cdef Py_ssize_t n, i
        cdef int err = 0
        acquire_rows(entries, &view, 4, &n, "note_areas")
        try:
            row = <uint64_t *> view.buf
            for i in range(n):
                err = rangemap_insert(self.noted, row[0], row[0] + (row[2] - 1), 0)
                if err:
                    self.fail(err, "note_areas", row[0], row[2], i)
                row += 4
        finally:
            PyBuffer_Release(&view)

    # ---- notes

    cdef long note(self, uint64_t iova, uint64_t size) except? -1:
        """Note what was just mapped; on lack of memory it is unmapped again."""
        cdef rangemap_entry stale
        cdef uint64_t unmapped, last = iova + size - 1
        cdef long result = rangemap_insert(self.noted, iova, last, 0)
        while result == -EEXIST:            # something was unmapped behind our back: the kernel knows better
            if rangemap_lower(self.noted, iova, &stale) and stale.start <= last:
                rangemap_remove(self.noted, stale.start, NULL)
            result = rangemap_insert(self.noted, iova, last, 0)
        if result < 0:
            self.unmap_one(iova, size, &unmapped)
        return result

    cdef long note_copy(self, IoasIoctls source, uint64_t src, uint64_t size, uint64_t dst) except? -1:
        """Note a copy: one area for each source area."""
        cdef rangemap_entry entry
        cdef uint64_t end = src + (size - 1), at = src, last, unmapped
        while True:
            if not rangemap_lower(source.noted, at, &entry) or entry.start > at:
                last = end                  # mapped by others: its areas are not known
                if rangemap_lower(source.noted, at, &entry) and entry.start <= end:
                    last = entry.start - 1
            else:
                last = min(entry.last, end)
            if self.note(dst + (at - src), last - at + 1) < 0:
                self.forget(dst, dst + (size - 1))
                self.unmap_one(dst, size, &unmapped)
                return -ENOMEM
            if last == end:
                return 0
            at = last + 1

    cdef void forget(self, uint64_t iova, uint64_t last) noexcept:
        """Drop the notes wholly inside the range."""
        cdef rangemap_entry entry
        while rangemap_lower(self.noted, iova, &entry) and entry.last <= last:
            if entry.start >= iova:
                rangemap_remove(self.noted, entry.start, NULL)
            if entry.last == UINT64_MAX:
                break
            iova = entry.last + 1

    # ---- one ioctl

    cdef long map_one(self, uint64_t *iova, uint64_t vaddr, uint64_t size, uint32_t flags) except? -1:
        cdef ioas_map args
        cdef long result
        memset(&args, 0, sizeof(args))
        args.size = sizeof(args)
        args.flags = flags
        args.ioas_id = self.id
        args.user_va = vaddr
        args.length = size
        args.iova = iova[0]
        result = self.iommufd.call(IOAS_MAP, &args)
        if result < 0:
            return result
        iova[0] = args.iova
        return self.note(args.iova, size)

    cdef long unmap_one(self, uint64_t iova, uint64_t size, uint64_t *unmapped) except? -1:
        cdef ioas_unmap args
        cdef long result
        args.size = sizeof(args)
        args.ioas_id = self.id
        args.iova = iova
        args.length = size
        result = self.iommufd.call(IOAS_UNMAP, &args)
        unmapped[0] = 0 if result < 0 else args.length
        return result

    # ---- mapping

    def map_dma(self, iova, vaddr, size, prot):
        """Map ``[vaddr, vaddr + size)`` at ``iova``; the pages are pinned once a device is attached.

        Parameters
        ----------
        iova, vaddr, size : int
            Bytes; multiples of ``iova_alignment()``.
        prot : int
            Prot.READ, Prot.WRITE or both, as the device sees it.

        Raises
        ------
        VfioError
            EEXIST, EINVAL (also: a reserved range), EOVERFLOW, ENOMEM, EFAULT; nothing is mapped then.

        Notes
        -----
        The GIL is released.  Source: IOMMU_IOAS_MAP with IOMMU_IOAS_MAP_FIXED_IOVA.
        """
        cdef uint64_t at = u64("map_dma", iova)
        cdef uint32_t flags = MAP_FIXED_IOVA | checked_flags("map_dma", prot, iova, size)
        cdef long result = self.map_one(&at, u64("map_dma", vaddr), u64("map_dma", size), flags)
        if result < 0:
            self.fail(result, "map_dma", iova, size)

    def map_auto(self, vaddr, size, prot=3):
        """Map memory at an address that the kernel chooses: the lowest that fits; return the IOVA.

        Before a device is attached only ``allow_iovas()`` restricts the choice: attach first.

        Raises
        ------
        VfioError
            ENOSPC (no room), EINVAL, EOVERFLOW, ENOMEM, EFAULT.

        Notes
        -----
        The GIL is released.  Source: IOMMU_IOAS_MAP.
        """
        cdef uint64_t at = 0
        cdef uint32_t flags = checked_flags("map_auto", prot, None, size)
        cdef long result = self.map_one(&at, u64("map_auto", vaddr), u64("map_auto", size), flags)
        if result < 0:
            self.fail(result, "map_auto", None, size)
        return at

    def map_file(self, int fd, start, size, prot=3, iova=None):
        """Map a part of a memfd (Linux 6.14): it stays mapped when the process has no mapping of it any more.

        Parameters
        ----------
        fd : int
            A memfd, or a dma-buf of a VFIO device's region.
        start, size : int
            Bytes.
        prot : int
            Prot.READ, Prot.WRITE or both.
        iova : int, optional
            Where; by default the kernel chooses.

        Returns
        -------
        int
            The IOVA.

        Notes
        -----
        The GIL is released.  Source: IOMMU_IOAS_MAP_FILE.
        """
        cdef ioas_map_file args
        cdef long result
        memset(&args, 0, sizeof(args))
        args.size = sizeof(args)
        args.flags = checked_flags("map_file", prot, iova, size) | (0 if iova is None else MAP_FIXED_IOVA)
        args.ioas_id = self.id
        args.fd = fd
        args.start = u64("map_file", start)
        args.length = u64("map_file", size)
        args.iova = 0 if iova is None else u64("map_file", iova)
        result = self.iommufd.call(IOAS_MAP_FILE, &args)
        if result >= 0:
            result = self.note(args.iova, args.length)
        if result < 0:
            self.fail(result, "map_file", iova, size)
        return args.iova

    def copy(self, IoasIoctls source not None, src_iova, size, prot=3, iova=None):
        """Map here what ``source`` maps at ``[src_iova, src_iova + size)``; pages are shared and charged once.

        Parameters
        ----------
        source : Ioas
            Of the same iommufd; it may be this one.
        src_iova, size : int
            Bytes, mapped without a hole.  A range over several areas becomes as many here.
        prot : int
            Prot.READ, Prot.WRITE or both.
        iova : int, optional
            Where; by default the kernel chooses.

        Returns
        -------
        int
            The IOVA.

        Raises
        ------
        VfioError
            ENOENT (a hole), EPERM (write access to what was mapped for reading), and those of map_dma.

        Notes
        -----
        The GIL is released.  Source: IOMMU_IOAS_COPY.
        """
        cdef ioas_copy args
        cdef long result
        if source.iommufd is not self.iommufd:
            raise_errno(EINVAL, "copy", src_iova, size, "the source is an address space of another iommufd")
        memset(&args, 0, sizeof(args))
        args.size = sizeof(args)
        args.flags = checked_flags("copy", prot, iova, size) | (0 if iova is None else MAP_FIXED_IOVA)
        args.dst_ioas_id = self.id
        args.src_ioas_id = source.id
        args.length = u64("copy", size)
        args.src_iova = u64("copy", src_iova)
        args.dst_iova = 0 if iova is None else u64("copy", iova)
        result = self.iommufd.call(IOAS_COPY, &args)
        if result >= 0:
            result = self.note_copy(source, args.src_iova, args.length, args.dst_iova)
        if result < 0:
            self.fail(result, "copy", src_iova, size)
        return args.dst_iova

    def map_many(self, entries):
        """Map an (n, 4) uint64 array of (iova, vaddr, size, prot): all of them, or none; the text of an error names the entry."""
        cdef Py_buffer view
        cdef uint64_t *row
        cdef uint64_t unmapped, at
        cdef Py_ssize_t done = 0, n
        cdef long result
        acquire_rows(entries, &view, 4, &n, "map_many")
        row = <uint64_t *> view.buf
        try:
            while done < n:
                at = row[0]
                result = -EINVAL if row[3] - 1 > 2 else self.map_one(&at, row[1], row[2], MAP_FIXED_IOVA | access_flags(row[3]))
                if result < 0:
                    self.fail(result, "map_many", row[0], row[2], done)
                row += 4
                done += 1
        except BaseException:
            for _ in range(done):
                row -= 4
                self.unmap_area(row[0], row[2], &unmapped)
            raise
        finally:
            PyBuffer_Release(&view)

    # Notes go first: another thread may map there as soon as the kernel has let go.

    cdef long unmap_area(self, uint64_t iova, uint64_t size, uint64_t *unmapped) except? -1:
        """Unmap and forget exactly one area."""
        cdef long result = -EINTR               # stays so when an exception goes through
        cdef bint known = rangemap_remove(self.noted, iova, NULL) == 0
        try:
            result = self.unmap_one(iova, size, unmapped)
        finally:
            if result < 0 and known:
                rangemap_insert(self.noted, iova, iova + size - 1, 0)
        return result

    cdef long unmap_range(self, uint64_t iova, uint64_t size, uint64_t *unmapped) except? -1:
        """Unmap and forget all areas inside a range."""
        # This size from 0 means everything, also the last byte.
        cdef uint64_t last = iova + size - 1 if iova or size != UINT64_MAX else UINT64_MAX
        cdef rangemap_entry *saved
        cdef size_t n, i
        cdef long result
        if not size or last < iova:
            return self.unmap_one(iova, size, unmapped)         # the kernel refuses it
        n = rangemap_count(self.noted)
        saved = <rangemap_entry *> malloc((n + 1) * sizeof(rangemap_entry))
        if saved == NULL:
            return -ENOMEM
        n = rangemap_copy(self.noted, iova, saved, n)
        self.forget(iova, last)
        result = -EINTR
        try:
            result = self.unmap_one(iova, size, unmapped)
        finally:
            if result < 0:
                for i in range(n):
                    if saved[i].start >= iova and saved[i].last <= last:
                        rangemap_insert(self.noted, saved[i].start, saved[i].last, 0)
            free(saved)
        return result

    def unmap_dma(self, iova, size):
        """Remove the mappings inside ``[iova, iova + size)``; return the bytes removed (0 = there was none).

        Their dirty bits are lost: read them before.

        Raises
        ------
        VfioError
            ENOENT: the range would split a mapping, which iommufd never does; EINVAL, EOVERFLOW; EBUSY: a mapping is
            being made, or a hardware queue uses it; EDEADLK.  Nothing is unmapped then.

        Notes
        -----
        The GIL is released.  Source: IOMMU_IOAS_UNMAP.
        """
        cdef uint64_t at = u64("unmap_dma", iova), length = u64("unmap_dma", size), unmapped, last = at + length - 1
        cdef rangemap_entry entry
        cdef long result
        if rangemap_find(self.noted, at, &entry) and entry.start == at and entry.last == last:
            result = self.unmap_area(at, length, &unmapped)
            if result < 0:
                self.fail(result, "unmap_dma", iova, size)
            return unmapped
        # The kernel finds out only when it has removed what stands before.
        if length and last >= at and splits(self.noted, at, last, &entry):
            raise_errno(ENOENT, "unmap_dma", iova, size, f"it would split the mapping at {entry.start:#x}...{entry.last:#x}: "
                        "iommufd removes whole mappings only")
        result = self.unmap_range(at, length, &unmapped)
        if result == -ENOENT and self.id and not rangemap_overlaps(self.noted, at, last):
            return 0
        if result < 0:
            self.fail(result, "unmap_dma", iova, size)
        return unmapped

    def unmap_all(self):
        """Remove every mapping; return the bytes removed.  Source: IOMMU_IOAS_UNMAP of [0, 2**64 - 1)."""
        cdef uint64_t unmapped
        cdef long result = self.unmap_range(0, UINT64_MAX, &unmapped)
        if result < 0:
            self.fail(result, "unmap_all")
        return unmapped


cdef void add_last_pages(uint64_t *words, uint64_t nbits) noexcept nogil:
    """Set the bit after every run of set bits."""
    cdef uint64_t i, n = (nbits + 63) // 64, carry = 0, word
    for i in range(n):
        word = words[i]
        words[i] = word | word << 1 | carry
        carry = word >> 63
    if nbits % 64:
        words[n - 1] &= (<uint64_t> 1 << nbits % 64) - 1


cdef class HwptIoctls:
    """Dirty tracking of one hardware page table.

    Parameters
    ----------
    ioas : IoasIoctls
        The address space behind it; it is kept alive.
    id : int
        Number of the page table.

    Attributes
    ----------
    loses_last_page : bool
        The kernel leaves out the last page of a contiguous block of dirty pages: harvest() adds it.
    tracking : bool
        Whether tracking was switched on through this object.
    """

    def __init__(self, IoasIoctls ioas not None, uint32_t id):
        self.ioas = ioas
        self.id = id

    def forget_id(self):
        """Note that the object is destroyed."""
        self.id = 0

    def set_dirty_tracking(self, enable=True):
        """Switch tracking on or off.  Switching on forgets what was written before, also when it is on already.

        Raises
        ------
        VfioError
            EOPNOTSUPP: the page table was allocated without dirty tracking.

        Notes
        -----
        Source: IOMMU_HWPT_SET_DIRTY_TRACKING.
        """
        cdef hwpt_set_dirty_tracking args
        cdef long result
        args.size = sizeof(args)
        args.flags = DIRTY_TRACKING_ENABLE if enable else 0
        args.hwpt_id = self.id
        args.__reserved = 0
        result = self.ioas.iommufd.call(HWPT_SET_DIRTY_TRACKING, &args)
        if result < 0:
            self.ioas.fail(result, "set_dirty_tracking")
        self.tracking = enable

    cdef long get_bits(self, uint64_t iova, uint64_t size, uint64_t pgsize, uint32_t flags, void *words) except? -1:
        cdef hwpt_get_dirty_bitmap args
        args.size = sizeof(args)
        args.hwpt_id = self.id
        args.flags = flags
        args.__reserved = 0
        args.iova = iova
        args.length = size
        args.page_size = pgsize
        args.data = <size_t> words
        return self.ioas.iommufd.call(HWPT_GET_DIRTY_BITMAP, &args)

    cdef int check(self, str operation, object iova, object size, uint64_t at, uint64_t length, uint64_t pgsize,
                   Py_buffer *view) except -1:
        """Refuse what the kernel takes and gets wrong."""
        if not length or at + (length - 1) < at or not pgsize or pgsize & (pgsize - 1) or (at | length) & (pgsize - 1):
            raise_errno(EINVAL, operation, iova, size, "a dirty bitmap covers whole pages, at least one, of a page size "
                        f"that is a power of two, not {pgsize}")
        if <uint64_t> view.len < (length // pgsize + 63) // 64 * 8 or <size_t> view.buf % 8:
            raise_errno(EINVAL, operation, iova, size, f"the bitmap is an aligned buffer of u64 words with a bit for each "
                        f"page of {pgsize} bytes; it has {view.len} bytes")
        return 0

    def get_dirty_bitmap(self, iova, size, bitmap, *, clear=True, pgsize=4096):
        """OR the dirty bits of a range into a bitmap, as one ioctl tells them.

        Parameters
        ----------
        iova, size : int
            Bytes; multiples of ``pgsize`` and of ``iova_alignment()``.  The kernel stops at the first hole without a word:
            give ranges without holes, or use harvest().
        bitmap : writable buffer
            u64 words, bit 0 = the page at ``iova``.
        clear : bool
            Forget the bits, as the next read is to tell what was written since.
        pgsize : int
            Bytes a bit stands for, a power of two.

        Notes
        -----
        The GIL is released.  Source: IOMMU_HWPT_GET_DIRTY_BITMAP.
        """
        cdef uint64_t at = u64("get_dirty_bitmap", iova), length = u64("get_dirty_bitmap", size)
        cdef uint64_t page = u64("get_dirty_bitmap", pgsize)
        cdef Py_buffer view
        cdef long result
        PyObject_GetBuffer(bitmap, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            self.check("get_dirty_bitmap", iova, size, at, length, page, &view)
            result = self.get_bits(at, length, page, 0 if clear else DIRTY_BITMAP_NO_CLEAR, view.buf)
        finally:
            PyBuffer_Release(&view)
        if result < 0:
            self.ioas.fail(result, "get_dirty_bitmap", iova, size)

    def harvest(self, iova, size, into, *, pgsize=4096):
        """OR the dirty bits of a range into a bitmap and clear them: area by area, so that holes hide nothing.

        Parameters
        ----------
        iova, size : int
            Bytes, multiples of ``pgsize``; the range must not split a mapping, since the bits of a large page are read
            and cleared together.
        into : writable buffer
            u64 words, bit 0 = the page at ``iova``.
        pgsize : int
            Bytes a bit stands for, a power of two.

        Returns
        -------
        int
            Bits found.

        Raises
        ------
        VfioError
            EINVAL: misaligned, splits a mapping, the bitmap is too small (no bit is lost then), or tracking is off.

        Notes
        -----
        The GIL is released.  Source: IOMMU_HWPT_GET_DIRTY_BITMAP.
        """
        cdef uint64_t at = u64("harvest", iova), length = u64("harvest", size), page = u64("harvest", pgsize)
        cdef uint64_t key = at, last = at + (length - 1), start, end, nbits, found = 0
        cdef uint64_t *scratch = NULL
        cdef rangemap_entry entry
        cdef Py_buffer view
        cdef long result
        PyObject_GetBuffer(into, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            self.check("harvest", iova, size, at, length, page, &view)
            if not self.tracking:
                raise_errno(EINVAL, "harvest", iova, size, "dirty tracking is off: everything would look clean")
            if splits(self.ioas.noted, at, last, &entry):
                raise_errno(EINVAL, "harvest", iova, size, f"it would split the mapping at {entry.start:#x}...{entry.last:#x}")
            scratch = <uint64_t *> calloc((length // page + 63) // 64, 8)
            if scratch == NULL:
                raise MemoryError
            while rangemap_lower(self.ioas.noted, key, &entry) and entry.start <= last:
                start, end = entry.start, entry.last
                # Areas that touch are read with one call; not where the page after a block is to be added to its own.
                while not self.loses_last_page and end < last and rangemap_find(self.ioas.noted, end + 1, &entry):
                    end = entry.last
                result = self.get_bits(start, end - start + 1, page, 0, scratch)
                if result < 0:
                    self.ioas.fail(result, "harvest", start, end - start + 1)
                nbits = (end - start) // page + 1
                with nogil:
                    if self.loses_last_page:
                        add_last_pages(scratch, nbits)
                    found += bitmap_harvest(<uint64_t *> view.buf, (start - at) // page, scratch, nbits)
                if end >= last:
                    break
                key = end + 1
        finally:
            free(scratch)
            PyBuffer_Release(&view)
        return found
