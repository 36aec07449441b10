"""DMA: by emulated devices, which pin pages or go through the container, and by ordinary ones through the software IOMMU.

Source: vfio_pin_pages, vfio_unpin_pages and vfio_dma_rw of the Type1 driver; for ordinary devices the rule that an IOMMU
translates each page by itself and stops at the first that is not there.
"""
from libc.errno cimport E2BIG, EACCES, EBUSY, EFAULT, EINVAL, ENOMEM, EOVERFLOW, EPERM
from libc.stdint cimport uint32_t, uint64_t

from .dirty cimport dirty_mark
from .mappings cimport count_page, find_mapping, uncount_page, wait_until_valid
from .state cimport (
    PS, V6_1, V7_2, dma_t, group_t, pin_read, pin_write, pthread_rwlock_rdlock, pthread_rwlock_unlock,
    rangemap_entry, rangemap_find, rangemap_insert, rangemap_new, rangemap_remove, rangemap_set_value, type1_t, vaddr_of,
)
from .uapi cimport MAP_READ, MAP_WRITE

cdef extern from "usercopy.h" nogil:
    int user_read(void *dst, uint64_t src, size_t n)
    int user_write(uint64_t dst, const void *src, size_t n)

cdef enum:
    MAX_PIN_PAGES = PS // 8


cdef int pin_one(type1_t *t, uint64_t iova, uint32_t prot) noexcept nogil:
    cdef dma_t *dma = find_mapping(t, iova)
    cdef rangemap_entry entry
    cdef bint countable = False
    cdef int err
    if not dma:
        return -EINVAL
    if prot & ~dma.prot:
        return -EPERM
    iova -= iova % PS
    if dma.pinned and rangemap_find(dma.pinned, iova, &entry):
        return rangemap_set_value(dma.pinned, iova, entry.value + 2)
    if not dma.pinned:
        dma.pinned = rangemap_new()
        if not dma.pinned:
            return -ENOMEM
    err = count_page(t, dma, iova, &countable)
    if err:
        return err
    err = rangemap_insert(dma.pinned, iova, iova + PS - 1, 3 if countable else 2)
    if err:
        uncount_page(dma, countable)
        return err
    dirty_mark(t, dma, iova, PS)
    return 0


cdef int pin_pages(type1_t *t, group_t *group, uint64_t iova, uint64_t npages, uint32_t prot) noexcept nogil:
    cdef uint64_t i
    cdef int err
    if npages == 0:
        return -EINVAL
    if npages > MAX_PIN_PAGES:
        return -E2BIG
    if not t.v2:
        return -EACCES
    if iova + npages * PS - 1 < iova:
        return -EOVERFLOW if t.version >= V7_2 else -EINVAL
    if t.version >= V6_1 and t.vaddr_invalid_count:
        return -EBUSY
    if t.unmap_listeners == 0:
        return -EINVAL
    for i in range(npages):
        err = wait_until_valid(t, iova + i * PS, False) or pin_one(t, iova + i * PS, prot)
        if err:
            unpin_pages(t, iova, i)
            return err
    if not group.pinned_scope:
        group.pinned_scope = True
        t.non_pinned_groups -= 1
    return 0


cdef void unpin_pages(type1_t *t, uint64_t iova, uint64_t npages) noexcept nogil:
    cdef uint64_t i, at
    cdef rangemap_entry entry
    cdef dma_t *dma
    for i in range(npages):
        at = iova + i * PS
        dma = find_mapping(t, at)
        if not dma or not dma.pinned or not rangemap_find(dma.pinned, at, &entry):
            continue
        if entry.value >= 4:
            rangemap_set_value(dma.pinned, entry.start, entry.value - 2)
        else:
            rangemap_remove(dma.pinned, entry.start, &entry)
            uncount_page(dma, entry.value & 1)


cdef int dma_rw(type1_t *t, uint64_t iova, void *data, uint64_t size, bint write) noexcept nogil:
    """Move bytes for an emulated device by the process's own addresses; the chunks before a failing one stay moved."""
    cdef char *at = <char *> data
    cdef uint64_t part, vaddr
    cdef dma_t *dma
    cdef int err
    while size:
        err = wait_until_valid(t, iova, False)
        if err:
            return err
        dma = find_mapping(t, iova)
        if not dma:
            return -EINVAL
        if (write and not dma.prot & MAP_WRITE) or not dma.prot & MAP_READ:
            return -EPERM
        part = min(size, dma.iova + dma.size - iova)
        vaddr = vaddr_of(t, dma)[0] + (iova - dma.iova)
        if user_write(vaddr, at, part) if write else user_read(at, vaddr, part):
            return -EFAULT
        if write:
            dirty_mark(t, dma, iova, part)
        iova += part
        at += part
        size -= part
    return 0


cdef bint allowed(const type1_t *t, const dma_t *dma, bint write) noexcept nogil:
    # Up to 6.12 the VT-d driver sets the read bit in every entry, so WRITE-only memory can be read as well.
    if write or t.version >= V7_2:
        return (dma.prot & (MAP_WRITE if write else MAP_READ)) != 0
    return True


cdef int device_access(type1_t *t, uint64_t iova, void *data, uint64_t size, bint write, uint64_t *done) noexcept nogil:
    """An ordinary device's access through the software IOMMU, beside others'; takes only `iotlb`.

    -EINVAL nothing mapped, -EPERM not permitted, -EFAULT the memory is gone; *done = bytes moved before that.
    """
    cdef char *at = <char *> data
    cdef uint64_t part
    cdef dma_t *dma
    cdef int err = 0
    done[0] = 0
    pthread_rwlock_rdlock(&t.iotlb)
    while size and not err:
        dma = find_mapping(t, iova)
        if not dma or not dma.pages:
            err = -EINVAL
            break
        if not allowed(t, dma, write):
            err = -EPERM
            break
        part = min(size, dma.iova + dma.size - iova)
        if write:
            err = pin_write(dma.pages, iova - dma.iova, at, part)
        else:
            err = pin_read(dma.pages, iova - dma.iova, at, part)
        if err:
            break
        iova += part
        at += part
        size -= part
        done[0] += part
    pthread_rwlock_unlock(&t.iotlb)
    return err
