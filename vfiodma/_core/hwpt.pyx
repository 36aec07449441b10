"""Page tables of the hardware over I/O address spaces, and the devices that are attached to them.

A table shows all areas of its address space from the moment it exists; while an address space has one, its areas are pinned.
Callers hold the context's lock.  Source: hw_pagetable and device of iommufd, Linux 6.12 and 7.2.
"""
from libc.errno cimport EINVAL, ENOENT, ENOMEM, EOPNOTSUPP, EPERM
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from .ioas cimport READABLE, WRITEABLE, area_drop, area_hold, check_alignment, reserve, unreserve, update_alignment
from .ioas_dirty cimport dirty_forget, dirty_mark
from .ioas_objects cimport object_add, object_remove
from .ioas_pages cimport pages_access
from .ioas_state cimport (
    DEVICE, FAULT_QUEUE, FREE, HWPT, IOAS, area_after, area_at, area_from, area_t, context_t, device_t, hwpt_t, ioas_t,
    lowest_bit, object_of,
)
from .state cimport PS, V7_2, pthread_rwlock_rdlock, pthread_rwlock_unlock, pthread_rwlock_wrlock

ctypedef int (*attach_function)(context_t *c, device_t *device, hwpt_t *hwpt) noexcept nogil


# ---- page tables

cdef hwpt_t *hwpt_new(ioas_t *ioas, const device_t *device, int *err) noexcept nogil:
    """A table for the device's IOMMU, not filled yet."""
    cdef hwpt_t *hwpt = <hwpt_t *> calloc(1, sizeof(hwpt_t))
    err[0] = -ENOMEM
    if not hwpt:
        return NULL
    err[0] = object_add(ioas.context, HWPT, hwpt, &hwpt.id)
    if err[0]:
        free(hwpt)
        return NULL
    hwpt.ioas = ioas
    hwpt.aperture = device.aperture
    hwpt.pgsizes = device.pgsizes
    hwpt.coherent = device.coherent
    hwpt.generic_table = device.generic_table
    hwpt.block = device.block
    return hwpt


cdef void unpin_areas(ioas_t *ioas) noexcept nogil:
    cdef area_t *area = area_from(ioas, 0)
    while area:
        area_drop(area)
        area = area_after(ioas, area)


cdef int pin_areas(ioas_t *ioas) noexcept nogil:
    cdef area_t *area = area_from(ioas, 0)
    cdef int err
    while area:
        err = area_hold(area)
        if err:
            return err
        area = area_after(ioas, area)
    return 0


cdef int reserve_outside(hwpt_t *hwpt) noexcept nogil:
    cdef int err = 0
    if hwpt.aperture.start:
        err = reserve(hwpt.ioas, 0, hwpt.aperture.start - 1, hwpt)
    if not err and hwpt.aperture.last != UINT64_MAX:
        err = reserve(hwpt.ioas, hwpt.aperture.last + 1, UINT64_MAX, hwpt)
    return err


cdef int hwpt_fill(hwpt_t *hwpt) noexcept nogil:
    """Make the address space's areas reachable through a new table."""
    cdef ioas_t *ioas = hwpt.ioas
    cdef hwpt_t **link = &ioas.hwpts
    cdef int err
    if lowest_bit(hwpt.pgsizes) > PS:
        return -EINVAL
    err = check_alignment(ioas, lowest_bit(hwpt.pgsizes)) or reserve_outside(hwpt)
    if not err:
        err = pin_areas(ioas)
        if err and not ioas.hwpts:
            unpin_areas(ioas)
    if err:
        unreserve(ioas, hwpt)
        return err
    while link[0]:
        link = &link[0].next
    link[0] = hwpt
    update_alignment(ioas)
    return 0


cdef void hwpt_destroy(hwpt_t *hwpt) noexcept nogil:
    """Free a table that no device uses, filled or not."""
    cdef ioas_t *ioas = hwpt.ioas
    cdef hwpt_t **link = &ioas.hwpts
    cdef area_t *area
    while link[0] and link[0] != hwpt:
        link = &link[0].next
    if link[0]:
        link[0] = hwpt.next
        unreserve(ioas, hwpt)
        update_alignment(ioas)
        pthread_rwlock_wrlock(&ioas.context.iotlb)
        area = area_from(ioas, 0)
        while area:
            dirty_forget(area, hwpt)
            area = area_after(ioas, area)
        pthread_rwlock_unlock(&ioas.context.iotlb)
        if not ioas.hwpts:
            unpin_areas(ioas)
    object_remove(ioas.context, hwpt.id)
    free(hwpt)


# ---- attaching

cdef hwpt_t *hwpt_of_group(const context_t *c, const device_t *device) noexcept nogil:
    cdef device_t *other = c.devices
    while other:
        if other.group == device.group and other.hwpt:
            return other.hwpt
        other = other.next
    return NULL


cdef bint fits_iommu(const hwpt_t *hwpt, const device_t *device) noexcept nogil:
    return (hwpt.pgsizes == device.pgsizes and hwpt.coherent == device.coherent and hwpt.aperture.start == device.aperture.start
            and hwpt.aperture.last == device.aperture.last and (device.can_track or not hwpt.tracks))


cdef int reserve_regions(ioas_t *ioas, device_t *device) noexcept nogil:
    cdef size_t i
    cdef int err
    for i in range(device.nreserved):
        err = reserve(ioas, device.reserved[i].start, device.reserved[i].last, device)
        if err:
            unreserve(ioas, device)
            return err
    return 0


cdef void set_hwpt(context_t *c, device_t *device, hwpt_t *hwpt) noexcept nogil:
    pthread_rwlock_wrlock(&c.iotlb)
    device.hwpt = hwpt
    pthread_rwlock_unlock(&c.iotlb)


cdef int attach(context_t *c, device_t *device, hwpt_t *hwpt) noexcept nogil:
    cdef hwpt_t *group = hwpt_of_group(c, device)
    cdef int err
    if group and group != hwpt:
        return -EINVAL
    err = reserve_regions(hwpt.ioas, device)
    if err:
        return err
    if not fits_iommu(hwpt, device):
        unreserve(hwpt.ioas, device)
        return -EINVAL
    hwpt.users += 1
    set_hwpt(c, device, hwpt)
    return 0


cdef void put(hwpt_t *hwpt) noexcept nogil:
    hwpt.users -= 1
    if hwpt.automatic and not hwpt.users:
        hwpt_destroy(hwpt)


cdef int replace(context_t *c, device_t *device, hwpt_t *hwpt) noexcept nogil:
    """Move the device's whole group to another table."""
    cdef hwpt_t *old = device.hwpt
    cdef device_t *other
    cdef int err = 0
    if old == hwpt:
        return 0
    other = c.devices
    while other and not err:
        if other.hwpt == old and other.group == device.group and old.ioas != hwpt.ioas:
            err = reserve_regions(hwpt.ioas, other)
        other = other.next
    if not err and not fits_iommu(hwpt, device):
        err = -EINVAL
    other = c.devices
    while other:
        if other.hwpt == old and other.group == device.group:
            if old.ioas != hwpt.ioas:
                unreserve(hwpt.ioas if err else old.ioas, other)
            if not err:
                hwpt.users += 1
                set_hwpt(c, other, hwpt)
                old.users -= 1
        other = other.next
    if not err:
        old.users += 1
        put(old)
    return err


cdef int attach_automatic(context_t *c, device_t *device, ioas_t *ioas, uint32_t *id) noexcept nogil:
    """Attach to a table of the address space that fits, or to a new one that lives as long as devices use it."""
    cdef attach_function enter = replace if device.hwpt else attach
    cdef bint first = device.hwpt == NULL
    cdef hwpt_t *hwpt = ioas.hwpts
    cdef int err
    while hwpt:
        if hwpt.automatic:
            err = enter(c, device, hwpt)
            if err != -EINVAL:
                id[0] = hwpt.id
                return err
        hwpt = hwpt.next
    hwpt = hwpt_new(ioas, device, &err)
    if not hwpt:
        return err
    if first:
        err = attach(c, device, hwpt)
        if not err:
            err = hwpt_fill(hwpt)
            if err:
                device_detach(c, device)
    else:
        err = hwpt_fill(hwpt) or replace(c, device, hwpt)
    if err:
        hwpt_destroy(hwpt)
        return err
    hwpt.automatic = True
    id[0] = hwpt.id
    return 0


cdef int refuse_attach(context_t *c, uint32_t pt) noexcept nogil:
    """Why nothing attaches to an object that is no address space or table, or with a PASID to any."""
    return -ENOENT if pt >= c.room or c.objects[pt].kind == FREE else -EINVAL


cdef int device_attach(context_t *c, device_t *device, uint32_t *pt) noexcept nogil:
    """Attach to an address space or to a table; one that is attached is moved.  *pt becomes the table's id."""
    cdef hwpt_t *hwpt = <hwpt_t *> object_of(c, pt[0], HWPT)
    cdef ioas_t *ioas = <ioas_t *> object_of(c, pt[0], IOAS)
    if ioas:
        return attach_automatic(c, device, ioas, pt)
    if not hwpt:
        return refuse_attach(c, pt[0])
    return replace(c, device, hwpt) if device.hwpt else attach(c, device, hwpt)


cdef void device_detach(context_t *c, device_t *device) noexcept nogil:
    cdef hwpt_t *hwpt = device.hwpt
    if not hwpt:
        return
    set_hwpt(c, device, NULL)
    unreserve(hwpt.ioas, device)
    put(hwpt)


cdef int device_bind(context_t *c, device_t *device) noexcept nogil:
    cdef int err = object_add(c, DEVICE, device, &device.id)
    if err:
        return err
    device.next = c.devices
    c.devices = device
    return 0


cdef void device_unbind(context_t *c, device_t *device) noexcept nogil:
    cdef device_t **link = &c.devices
    device_detach(c, device)
    while link[0] != device:
        link = &link[0].next
    link[0] = device.next
    object_remove(c, device.id)
    device.id = 0


# ---- HWPT_ALLOC

cdef int alloc_paging(context_t *c, const hwpt_arguments *args, device_t *device, ioas_t *ioas, uint32_t *id) noexcept nogil:
    cdef uint32_t known = NEST_PARENT | DIRTY_TRACKING
    cdef hwpt_t *hwpt
    cdef int err
    if c.version >= V7_2:
        known |= FAULT_ID_VALID | PASID
    if args.flags & ~known or args.data_len or args.data_type:
        return -EOPNOTSUPP
    if args.flags & NEST_PARENT and (args.flags & FAULT_ID_VALID or not device.nestable):
        return -EOPNOTSUPP
    if args.flags & DIRTY_TRACKING and not device.can_track:
        return -EOPNOTSUPP
    hwpt = hwpt_new(ioas, device, &err)
    if not hwpt:
        return err
    hwpt.nest_parent = args.flags & NEST_PARENT
    hwpt.tracks = args.flags & DIRTY_TRACKING
    err = hwpt_fill(hwpt)
    if not err and args.flags & FAULT_ID_VALID and not object_of(c, args.fault, FAULT_QUEUE):
        err = -ENOENT
    if err:
        hwpt_destroy(hwpt)
        return err
    id[0] = hwpt.id
    return 0


cdef int hwpt_alloc(context_t *c, const hwpt_arguments *args, uint32_t *id) noexcept nogil:
    cdef device_t *device = <device_t *> object_of(c, args.device, DEVICE)
    cdef ioas_t *ioas = <ioas_t *> object_of(c, args.pt, IOAS)
    cdef hwpt_t *parent = <hwpt_t *> object_of(c, args.pt, HWPT)
    if (args.data_type != 0) != (args.data_len != 0):
        return -EINVAL
    if not device:
        return -ENOENT
    if ioas:
        return alloc_paging(c, args, device, ioas, id)
    if not parent:
        return -EINVAL
    if args.flags & ~<uint32_t> (FAULT_ID_VALID | (PASID if c.version >= V7_2 else 0)) or not args.data_len:
        return -EOPNOTSUPP
    if parent.automatic or not parent.nest_parent:
        return -EINVAL
    return -EOPNOTSUPP                  # nested tables are not modelled: as an IOMMU whose driver knows none


# ---- DMA

cdef bint permitted(const context_t *c, const area_t *area, bint write) noexcept nogil:
    # Up to 6.12 the VT-d driver sets the read bit in every entry, so WRITE-only memory can be read as well.
    if write or c.version >= V7_2:
        return area.prot & (WRITEABLE if write else READABLE)
    return True


cdef int device_dma(context_t *c, device_t *device, uint64_t iova, void *data, uint64_t size, bint write, uint64_t *done) noexcept nogil:
    """A device's access through its table, beside others'; takes only `iotlb`.

    -ENOENT nothing mapped, -EPERM not permitted, -EFAULT the memory is gone; *done = bytes moved before that.
    """
    cdef char *at = <char *> data
    cdef uint64_t part
    cdef area_t *area
    cdef int err = 0
    done[0] = 0
    pthread_rwlock_rdlock(&c.iotlb)
    while size and not err:
        area = area_at(device.hwpt.ioas, iova) if device.hwpt else NULL
        if not area or not area.held:
            err = -ENOENT
            break
        if not permitted(c, area, write):
            err = -EPERM
            break
        part = min(size - 1, area.last - iova) + 1
        err = pages_access(area.pages, area.offset + (iova - area.iova), at, part, write)
        if err:
            break
        # After the bytes are there: whoever takes the bit finds them.
        if write:
            dirty_mark(area, device.hwpt, iova, part)
        iova += part
        at += part
        size -= part
        done[0] += part
    pthread_rwlock_unlock(&c.iotlb)
    return err
