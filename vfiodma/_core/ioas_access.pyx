"""Accesses: emulated devices, which reach an I/O address space without a page table and pin what they keep.

Callers hold the context's lock.  Source: iommufd_access_attach, _pin_pages, _unpin_pages and _rw, Linux 6.12 and 7.2.
"""
from libc.errno cimport EFAULT, EINVAL, ENOENT, ENOMEM, EOVERFLOW, EPERM
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from .ioas cimport READABLE, WRITEABLE, check_alignment, update_alignment
from .ioas_objects cimport object_add, object_remove
from .ioas_pages cimport pages_address, pages_drop, pages_hold
from .ioas_state cimport (
    ACCESS, IOAS, access_pin_t, access_t, area_at, area_t, context_t, ioas_t, object_of,
)
from .state cimport PS

cdef extern from "usercopy.h" nogil:
    int user_read(void *dst, uint64_t src, size_t n)
    int user_write(uint64_t dst, const void *src, size_t n)


cdef int access_bind(context_t *c, access_t *access) noexcept nogil:
    return object_add(c, ACCESS, access, &access.id)


cdef void access_unbind(context_t *c, access_t *access) noexcept nogil:
    access_detach(access)
    object_remove(c, access.id)
    access.id = 0


cdef int access_attach(context_t *c, access_t *access, uint32_t id) noexcept nogil:
    """Attach to an address space; what is pinned in another one is given up."""
    cdef ioas_t *ioas = <ioas_t *> object_of(c, id, IOAS)
    cdef int err
    if not ioas:
        return -ENOENT
    if ioas == access.ioas:
        return 0
    err = check_alignment(ioas, PS)
    if err:
        return err
    access_detach(access)
    access.ioas = ioas
    access.next = ioas.accesses
    ioas.accesses = access
    update_alignment(ioas)
    return 0


cdef void unpin(access_t *access, access_pin_t *entry) noexcept nogil:
    cdef uint64_t at = entry.iova, end
    cdef area_t *area
    while True:
        area = area_at(access.ioas, at)
        end = min(area.last, entry.last)
        area.pins -= 1
        pages_drop(area.pages, (area.offset + (at - area.iova)) // PS, (area.offset + (end - area.iova)) // PS)
        if end == entry.last:
            break
        at = end + 1
    free(entry)


cdef void access_detach(access_t *access) noexcept nogil:
    cdef access_t **link
    cdef access_pin_t *entry
    if not access.ioas:
        return
    while access.pins:
        entry = access.pins
        access.pins = entry.next
        unpin(access, entry)
    link = &access.ioas.accesses
    while link[0] != access:
        link = &link[0].next
    link[0] = access.next
    update_alignment(access.ioas)
    access.ioas = NULL


cdef int hold_range(access_t *access, uint64_t iova, uint64_t last, bint write, uint64_t *done) noexcept nogil:
    """Pin the parts of areas one after another; *done = the address after what was pinned."""
    cdef uint64_t end
    cdef area_t *area
    cdef int err
    done[0] = iova
    while True:
        area = area_at(access.ioas, done[0])
        if not area:
            return -ENOENT
        end = min(area.last, last)
        if (area.offset + (done[0] - area.iova)) % PS or (area.offset + (end - area.iova) + 1) % PS:
            return -EINVAL
        if not area.prot & (WRITEABLE if write else READABLE):
            return -EPERM
        err = pages_hold(area.pages, (area.offset + (done[0] - area.iova)) // PS, (area.offset + (end - area.iova)) // PS)
        if err:
            return err
        area.pins += 1
        if end == last:
            return 0
        done[0] = end + 1


cdef int access_pin(access_t *access, uint64_t iova, uint64_t length, bint write) noexcept nogil:
    cdef access_pin_t *entry
    cdef uint64_t done
    cdef int err
    if length == 0:
        return -EINVAL
    if iova + (length - 1) < iova:
        return -EOVERFLOW
    if not access.ioas:
        return -ENOENT
    entry = <access_pin_t *> calloc(1, sizeof(access_pin_t))
    if not entry:
        return -ENOMEM
    entry.iova = iova
    entry.last = iova + (length - 1)
    err = hold_range(access, iova, entry.last, write, &done)
    if not err:
        entry.next = access.pins
        access.pins = entry
    elif done > iova:
        entry.last = done - 1
        unpin(access, entry)
    else:
        free(entry)
    return err


cdef void access_unpin(access_t *access, uint64_t iova, uint64_t length) noexcept nogil:
    """Give up a pin of exactly this range; anything else is ignored."""
    cdef access_pin_t **link = &access.pins
    cdef access_pin_t *entry
    while link[0]:
        entry = link[0]
        if entry.iova == iova and entry.last - entry.iova + 1 == length:
            link[0] = entry.next
            unpin(access, entry)
            return
        link = &entry.next


cdef int access_rw(access_t *access, uint64_t iova, void *data, uint64_t size, bint write) noexcept nogil:
    """Move bytes by the process's own addresses; the areas before a failing one stay moved."""
    cdef char *at = <char *> data
    cdef uint64_t part, address
    cdef area_t *area
    cdef int err
    if size and iova + (size - 1) < iova:
        return -EOVERFLOW
    while size:
        area = area_at(access.ioas, iova) if access.ioas else NULL
        if not area:
            return -ENOENT
        if not area.prot & (WRITEABLE if write else READABLE):
            return -EPERM
        part = min(size - 1, area.last - iova) + 1
        if pages_address(area.pages, &address):
            return -EFAULT
        address += area.offset + (iova - area.iova)
        err = user_write(address, at, part) if write else user_read(at, address, part)
        if err:
            return -EFAULT
        iova += part
        at += part
        size -= part
    return 0
