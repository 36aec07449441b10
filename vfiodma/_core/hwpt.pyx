"""Page tables of the hardware over I/O address spaces, and the devices that are attached to them.

A table shows all areas of its address space from the moment it exists; while an address space has one, its areas are pinned.
Callers hold the context's lock.  Source: hw_pagetable and device of iommufd, Linux 6.12 and 7.2.
"""
from libc.errno cimport EFAULT, EINVAL, ENODEV, ENOENT, ENOMEM, EOPNOTSUPP, EPERM
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from .hwpt_nested cimport nested_enter, nested_forget, nested_free, nested_new, nested_walk
from .ioas cimport area_drop, area_hold, check_alignment, permitted, reserve, unreserve, update_alignment
from .ioas_dirty cimport dirty_forget, dirty_mark
from .ioas_objects cimport object_add, object_remove
from .ioas_pages cimport pages_access
from .ioas_state cimport (
    DEVICE, FAULT_QUEUE, FREE, HWPT, IOAS, NESTED, area_after, area_at, area_from, area_t, attachment_t, context_t,
    device_t, hwpt_t, ioas_t, lowest_bit, object_of, queue_t,
)
from .nesting cimport (
    PAGEWALK_BAD_PASID_ENTRY, PAGEWALK_PASID_FETCH, PAGEWALK_PASID_INVALID, PAGEWALK_PERMISSION, PAGEWALK_PTE_FETCH,
    PAGEWALK_READ, PAGEWALK_UNKNOWN, PAGEWALK_WRITE, pagewalk_fault, pagewalk_result, wrote_entry,
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
    hwpt.nest = device.nest
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
    if hwpt.queue:
        hwpt.queue.users -= 1
    if hwpt.parent:
        nested_free(hwpt)
        return
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
    cdef hwpt_t *old = device.hwpt
    pthread_rwlock_wrlock(&c.iotlb)
    device.hwpt = hwpt
    device.nests = hwpt and (hwpt.parent or hwpt.queue)
    c.attachments += 1
    device.serial = c.attachments
    pthread_rwlock_unlock(&c.iotlb)
    if old and old.parent:
        nested_forget(old)


cdef bint group_has_pasids(const context_t *c, const void *group) noexcept nogil:
    cdef device_t *device = c.devices
    while device:
        if device.group == group and device.pasids:
            return True
        device = device.next
    return False


cdef int enter_iommu(const context_t *c, hwpt_t *hwpt, const device_t *device) noexcept nogil:
    """Can the device's IOMMU use the table?"""
    if not hwpt.pasids and group_has_pasids(c, device.group) or not fits_iommu(hwpt, device):
        return -EINVAL
    if hwpt.queue and not device.asks_pages:
        return -ENODEV
    return nested_enter(hwpt, device) if hwpt.parent else 0


cdef int attach(context_t *c, device_t *device, hwpt_t *hwpt) noexcept nogil:
    cdef hwpt_t *group = hwpt_of_group(c, device)
    cdef int err
    if group and group != hwpt:
        return -EINVAL
    err = reserve_regions(hwpt.ioas, device)
    if err:
        return err
    err = enter_iommu(c, hwpt, device)
    if err:
        unreserve(hwpt.ioas, device)
        return err
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
    if not err:
        err = enter_iommu(c, hwpt, device)
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


cdef hwpt_t *hwpt_of(const context_t *c, uint32_t id) noexcept nogil:
    cdef hwpt_t *hwpt = <hwpt_t *> object_of(c, id, HWPT)
    return hwpt if hwpt else <hwpt_t *> object_of(c, id, NESTED)


cdef int refuse_attach(context_t *c, uint32_t pt) noexcept nogil:
    """Why nothing attaches to an object that is no address space or table."""
    return -ENOENT if pt >= c.room or c.objects[pt].kind == FREE else -EINVAL


cdef int device_attach(context_t *c, device_t *device, uint32_t *pt) noexcept nogil:
    """Attach to an address space or to a table; one that is attached is moved.  *pt becomes the table's id."""
    cdef hwpt_t *hwpt = hwpt_of(c, pt[0])
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


# ---- PASIDs: numbers of a device, each with a table of its own

cdef attachment_t **pasid_link(device_t *device, uint32_t pasid) noexcept nogil:
    cdef attachment_t **link = &device.pasids
    while link[0] and link[0].pasid != pasid:
        link = &link[0].next
    return link


cdef int pasid_attach(context_t *c, device_t *device, uint32_t pasid, uint32_t pt) noexcept nogil:
    """Attach a PASID to a table, or move it there."""
    cdef attachment_t *entry = pasid_link(device, pasid)[0]
    cdef hwpt_t *hwpt = hwpt_of(c, pt)
    cdef hwpt_t *own = hwpt_of_group(c, device)
    cdef hwpt_t *old
    cdef int err
    if not hwpt:
        return refuse_attach(c, pt)     # also an address space: the tables made for one take no PASIDs
    # As a whole group uses them or none.
    if not pasid or pasid >= device.npasids or not hwpt.pasids or own and not own.pasids or not fits_iommu(hwpt, device):
        return -EINVAL
    if hwpt.queue and not device.asks_pages:
        return -ENODEV
    err = nested_enter(hwpt, device) if hwpt.parent else 0
    if err:
        return err
    if entry and entry.hwpt == hwpt:
        return 0
    old = entry.hwpt if entry else NULL
    if not entry:
        entry = <attachment_t *> calloc(1, sizeof(attachment_t))
        if not entry:
            return -ENOMEM
        entry.pasid = pasid
    hwpt.users += 1
    pthread_rwlock_wrlock(&c.iotlb)
    if not old:
        entry.next = device.pasids
        device.pasids = entry
    c.attachments += 1
    entry.hwpt, entry.serial = hwpt, c.attachments
    pthread_rwlock_unlock(&c.iotlb)
    if old:
        old.users -= 1
        if old.parent:
            nested_forget(old)
    return 0


cdef void pasid_detach(context_t *c, device_t *device, uint32_t pasid) noexcept nogil:
    cdef attachment_t **link = pasid_link(device, pasid)
    cdef attachment_t *gone = link[0]
    if not gone:
        return
    pthread_rwlock_wrlock(&c.iotlb)
    link[0] = gone.next
    pthread_rwlock_unlock(&c.iotlb)
    gone.hwpt.users -= 1
    if gone.hwpt.parent:
        nested_forget(gone.hwpt)
    free(gone)


cdef const queue_t *device_queue(device_t *device, uint32_t pasid, uint64_t *serial) noexcept nogil:
    """Where a device asks for missing pages, or NULL; the attachment's serial, 0 = it is in no table."""
    cdef attachment_t *entry = pasid_link(device, pasid)[0] if pasid else NULL
    cdef hwpt_t *hwpt = (entry.hwpt if entry else NULL) if pasid else device.hwpt
    serial[0] = (entry.serial if pasid else device.serial) if hwpt else 0
    return hwpt.queue if hwpt else NULL


cdef int device_bind(context_t *c, device_t *device) noexcept nogil:
    cdef int err = object_add(c, DEVICE, device, &device.id)
    if err:
        return err
    device.next = c.devices
    c.devices = device
    return 0


cdef void device_unbind(context_t *c, device_t *device) noexcept nogil:
    cdef device_t **link = &c.devices
    while device.pasids:
        pasid_detach(c, device, device.pasids.pasid)
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
    return finish(c, args, hwpt, id) if not err else undo_hwpt(hwpt, err)


cdef int alloc_nested(context_t *c, const hwpt_arguments *args, device_t *device, hwpt_t *parent, uint32_t *id) noexcept nogil:
    cdef hwpt_t *hwpt
    cdef int err
    if args.flags & ~<uint32_t> (FAULT_ID_VALID | (PASID if c.version >= V7_2 else 0)) or not args.data_len:
        return -EOPNOTSUPP
    err = nested_new(c, device, parent, args.data_type, args.data_len, args.data, &hwpt)
    return finish(c, args, hwpt, id) if not err else err


cdef int undo_hwpt(hwpt_t *hwpt, int err) noexcept nogil:
    hwpt_destroy(hwpt)
    return err


cdef int finish(context_t *c, const hwpt_arguments *args, hwpt_t *hwpt, uint32_t *id) noexcept nogil:
    """What tables of both kinds have."""
    cdef queue_t *queue = <queue_t *> object_of(c, args.fault, FAULT_QUEUE)
    hwpt.pasids = args.flags & PASID
    if args.flags & FAULT_ID_VALID:
        if not queue:
            return undo_hwpt(hwpt, -ENOENT)
        queue.users += 1
        hwpt.queue = queue
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
    return alloc_nested(c, args, device, parent, id) if parent else -EINVAL


# ---- DMA

cdef int table_dma(context_t *c, const hwpt_t *hwpt, uint64_t iova, void *data, uint64_t size, bint write,
                   uint64_t *done) noexcept nogil:
    """A device's access through a table of the hardware (NULL: none); the caller has `iotlb`.

    -ENOENT nothing mapped, -EPERM not permitted, -EFAULT the memory is gone; *done = bytes moved before that.
    """
    cdef char *at = <char *> data
    cdef uint64_t part
    cdef area_t *area
    cdef int err = 0
    done[0] = 0
    while size and not err:
        area = area_at(hwpt.ioas, iova) if hwpt else NULL
        if not area or not area.held:
            err = -ENOENT
            break
        if not permitted(area, write):
            err = -EPERM
            break
        part = min(size - 1, area.last - iova) + 1
        err = pages_access(area.pages, area.offset + (iova - area.iova), at, part, write)
        if err:
            break
        # After the bytes are there: whoever takes the bit finds them.
        if write:
            dirty_mark(area, hwpt, iova, part)
        iova += part
        at += part
        size -= part
        done[0] += part
    return err


cdef uint32_t no_table(const device_t *device, uint64_t pasid) noexcept nogil:
    if not pasid:
        return PAGEWALK_PTE_FETCH
    if not device.npasids:
        return PAGEWALK_PASID_FETCH
    return PAGEWALK_BAD_PASID_ENTRY if pasid < device.npasids else PAGEWALK_PASID_INVALID


cdef int nested_dma(context_t *c, device_t *device, uint64_t pasid, uint64_t address, void *data, uint64_t size,
                    unsigned access, uint64_t *gpa, uint64_t *done, pagewalk_fault *fault, wrote_entry wrote, void *log) noexcept nogil:
    """An access with a PASID, or without one (0): up to the end of a page of the guest's table, if there is one.

    -EFAULT with *fault filled in; *gpa = where the second stage found it.
    """
    cdef attachment_t *entry
    cdef pagewalk_result found
    cdef hwpt_t *hwpt
    cdef int err = 0
    done[0] = gpa[0] = 0
    memset(fault, 0, sizeof(pagewalk_fault))
    pthread_rwlock_rdlock(&c.iotlb)
    entry = pasid_link(device, pasid)[0] if pasid and pasid < device.npasids else NULL
    hwpt = (entry.hwpt if entry else NULL) if pasid else device.hwpt
    if not hwpt:
        fault.reason = no_table(device, pasid)
        err = -EFAULT
    else:
        found.gpa, found.room = address, min(size, 0 - address if address else size)
        if hwpt.parent:
            err = nested_walk(hwpt, address, access, &found, fault, wrote, log)
        if not err:
            gpa[0] = found.gpa
            err = table_dma(c, hwpt.parent if hwpt.parent else hwpt, found.gpa, data, min(size, found.room),
                            (access & PAGEWALK_WRITE) != 0, done)
            if err:
                fault.reason = PAGEWALK_PERMISSION if err == -EPERM else PAGEWALK_UNKNOWN if err == -EFAULT else PAGEWALK_PTE_FETCH
                # A table of the hardware is the VMM's, which can map the page.
                fault.missing = err == -ENOENT and not hwpt.parent
                err = -EFAULT
    pthread_rwlock_unlock(&c.iotlb)
    return err


cdef int device_dma(context_t *c, device_t *device, uint64_t iova, void *data, uint64_t size, bint write, uint64_t *done) noexcept nogil:
    """A device's access through its table, beside others'; takes only `iotlb`.  Errors as table_dma()."""
    cdef unsigned access = PAGEWALK_WRITE if write else PAGEWALK_READ
    cdef uint64_t gpa, part
    cdef pagewalk_fault fault
    cdef bint nested
    cdef int err = 0
    pthread_rwlock_rdlock(&c.iotlb)
    nested = device.hwpt and device.hwpt.parent
    if not nested:
        err = table_dma(c, device.hwpt, iova, data, size, write, done)
    pthread_rwlock_unlock(&c.iotlb)
    if not nested:
        return err
    # It has just been attached to a guest's table, else the caller had gone there right away.
    done[0] = 0
    while size and not err:
        err = nested_dma(c, device, 0, iova, data, size, access, &gpa, &part, &fault, NULL, NULL)
        iova += part
        data = <char *> data + part
        size -= part
        done[0] += part
    if err:
        return -EPERM if fault.reason == PAGEWALK_PERMISSION else -EFAULT if fault.reason == PAGEWALK_UNKNOWN else -ENOENT
    return 0
