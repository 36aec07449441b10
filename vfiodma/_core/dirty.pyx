"""Dirty tracking of a Type1 instance: raw bitmap words with the kernel's own quirks.

A mapping's words are shifted in place while they are copied out, so bits can linger past its end; that is what real
kernels report, and it is kept on purpose.  Callers hold the instance's lock.
"""
from libc.errno cimport EFAULT, EINVAL, ENOMEM, EOVERFLOW
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset

from .state cimport V7_2, dma_t, first_from, iommu_mapped, min_pgsize, next_of, rangemap_entry, rangemap_lower, type1_t

cdef extern from "usercopy.h" nogil:
    int user_read(void *dst, uint64_t src, size_t n)
    int user_write(uint64_t dst, const void *src, size_t n)
    bint user_range_ok(uint64_t address, uint64_t size)

cdef extern from "bitmap.h" nogil:
    void bitmap_set(uint64_t *words, uint64_t first, uint64_t n)
    void bitmap_clear(uint64_t *words, uint64_t first, uint64_t n)

cdef extern from *:
    int count_trailing_zeros "__builtin_ctzll" (unsigned long long) nogil

cdef enum:
    MAX_PAGES = 0x7fffffff              # of one mapping
    MAX_BITMAP_BYTES = 268435456


cdef uint64_t bitmap_bytes(uint64_t npages) noexcept nogil:
    return npages // 64 * 8 + (8 if npages % 64 else 0)


cdef bint bitmap_arguments_ok(uint64_t size, uint64_t pgsize, uint64_t bitmap_size) noexcept nogil:
    """What the kernel asks of a caller's bitmap before it looks at anything else."""
    cdef uint64_t npages = size >> count_trailing_zeros(pgsize) if pgsize else 0
    return npages != 0 and bitmap_size != 0 and bitmap_size <= MAX_BITMAP_BYTES and bitmap_size >= bitmap_bytes(npages)


cdef uint64_t npages_of(const type1_t *t, const dma_t *dma) noexcept nogil:
    return dma.size // min_pgsize(t)


cdef void mark_pinned(type1_t *t, dma_t *dma) noexcept nogil:
    """Externally pinned pages count as dirty for as long as they are pinned."""
    cdef rangemap_entry entry
    cdef uint64_t key = 0
    while dma.pinned and dma.bitmap and rangemap_lower(dma.pinned, key, &entry):
        bitmap_set(dma.bitmap, (entry.start - dma.iova) // min_pgsize(t), 1)
        if entry.last == <uint64_t> -1:
            break
        key = entry.last + 1


cdef int dirty_allocate(type1_t *t, dma_t *dma) noexcept nogil:
    cdef uint64_t npages = npages_of(t, dma)
    if npages > MAX_PAGES:
        return -EINVAL
    dma.bitmap_words = bitmap_bytes(npages) // 8 + 1
    dma.bitmap = <uint64_t *> calloc(dma.bitmap_words, 8)
    return 0 if dma.bitmap else -ENOMEM


cdef void dirty_free(dma_t *dma) noexcept nogil:
    free(dma.bitmap)
    dma.bitmap = NULL


cdef void dirty_fill_all(type1_t *t) noexcept nogil:
    """Every page of every mapping is dirty: a group that can't tell has left."""
    cdef dma_t *dma = first_from(t, 0)
    while dma:
        if dma.bitmap:
            bitmap_set(dma.bitmap, 0, npages_of(t, dma))
        dma = next_of(t, dma)
    dma = t.unfindable
    while dma:
        if dma.bitmap:
            bitmap_set(dma.bitmap, 0, npages_of(t, dma))
        dma = dma.next


cdef void dirty_mark(type1_t *t, dma_t *dma, uint64_t iova, uint64_t size) noexcept nogil:
    cdef uint64_t first = (iova - dma.iova) // min_pgsize(t)
    if dma.bitmap:
        bitmap_set(dma.bitmap, first, (iova - dma.iova + size - 1) // min_pgsize(t) - first + 1)


cdef void resize_one(type1_t *t, dma_t *dma) noexcept nogil:
    cdef uint64_t words = bitmap_bytes(npages_of(t, dma)) // 8 + 1
    cdef uint64_t *grown
    if not dma.bitmap or words <= dma.bitmap_words:
        return
    grown = <uint64_t *> realloc(dma.bitmap, words * 8)
    if grown:
        memset(grown + dma.bitmap_words, 0, (words - dma.bitmap_words) * 8)
        dma.bitmap = grown
        dma.bitmap_words = words
    else:
        dirty_free(dma)


cdef void dirty_resize(type1_t *t) noexcept nogil:
    """The smallest page size has changed.  The kernel keeps the old storage; ours must stay inside its own."""
    cdef dma_t *dma = first_from(t, 0)
    while dma:
        resize_one(t, dma)
        dma = next_of(t, dma)
    dma = t.unfindable
    while dma:
        resize_one(t, dma)
        dma = dma.next


cdef int dirty_start(type1_t *t) noexcept nogil:
    cdef dma_t *dma
    cdef int err = 0
    if t.tracking:
        return 0
    dma = first_from(t, 0)
    while dma and not err:
        err = dirty_allocate(t, dma)
        mark_pinned(t, dma)
        dma = next_of(t, dma)
    dma = t.unfindable
    while dma and not err:
        err = dirty_allocate(t, dma)
        dma = dma.next
    if err:
        free_all(t)
        return err
    t.tracking = True
    return 0


cdef void free_all(type1_t *t) noexcept nogil:
    cdef dma_t *dma = first_from(t, 0)
    while dma:
        dirty_free(dma)
        dma = next_of(t, dma)
    dma = t.unfindable
    while dma:
        dirty_free(dma)
        dma = dma.next


cdef void dirty_stop(type1_t *t) noexcept nogil:
    if t.tracking:
        free_all(t)
        t.tracking = False


cdef int dirty_copy_out(type1_t *t, dma_t *dma, uint64_t base, uint64_t data) noexcept nogil:
    """Store the mapping's bits into the caller's bitmap, whose bit 0 is the page at `base`."""
    cdef uint64_t nbits = npages_of(t, dma)
    cdef uint64_t bit = (dma.iova - base) // min_pgsize(t)
    cdef unsigned shift = bit % 64
    cdef uint64_t words = bitmap_bytes(nbits + shift) // 8
    cdef uint64_t at = data + bit // 64 * 8
    cdef uint64_t theirs, i
    if not dma.bitmap:
        return -EINVAL
    # An ordinary group can't tell what it wrote: whatever it can reach is dirty.
    if t.non_pinned_groups and iommu_mapped(dma):
        bitmap_set(dma.bitmap, 0, nbits)
    if shift:
        for i in range(words - 1, 0, -1):
            dma.bitmap[i] = dma.bitmap[i] << shift | dma.bitmap[i - 1] >> (64 - shift)
        dma.bitmap[0] <<= shift
        if user_read(&theirs, at, 8):
            return -EFAULT
        dma.bitmap[0] |= theirs
    return -EFAULT if user_write(at, dma.bitmap, words * 8) else 0


cdef bint bisects(type1_t *t, uint64_t iova, uint64_t last) noexcept nogil:
    """Does a mapping begin before `iova` and hold it, or hold `last` and end after it?"""
    cdef rangemap_entry entry
    if rangemap_lower(t.mappings, iova, &entry) and entry.start < iova:
        return True
    return rangemap_lower(t.mappings, last, &entry) and entry.start <= last and entry.last > last


cdef int dirty_get(type1_t *t, uint64_t iova, uint64_t size, uint64_t pgsize, uint64_t bitmap_size, uint64_t data) noexcept nogil:
    cdef uint64_t last = iova + size - 1
    cdef dma_t *dma
    cdef int err
    if size == 0:
        return -EINVAL
    if last < iova:
        return -EOVERFLOW if t.version >= V7_2 else -EINVAL
    if t.version < V7_2 and last == <uint64_t> -1:
        return -EINVAL                      # older kernels compute the end, which wraps to 0
    if not user_range_ok(data, bitmap_size) or not bitmap_arguments_ok(size, pgsize, bitmap_size):
        return -EINVAL
    if pgsize != min_pgsize(t) or iova % pgsize or size % pgsize or not t.tracking or bisects(t, iova, last):
        return -EINVAL
    dma = first_from(t, iova)
    while dma and dma.iova <= last:
        err = dirty_copy_out(t, dma, iova, data)
        if err:
            return err
        bitmap_clear(dma.bitmap, 0, npages_of(t, dma))
        mark_pinned(t, dma)
        dma = next_of(t, dma)
    return 0
