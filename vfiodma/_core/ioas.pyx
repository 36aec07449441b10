"""I/O address spaces: areas over shared pages, reserved and allowed ranges, automatic IOVAs, map, copy, unmap.

Callers hold the context's lock.  Functions return 0 or -errno and leave the state as it was when they fail, except where
the kernel does not.  Source: the I/O address spaces of iommufd, Linux 6.12 and 7.2.
"""
from libc.errno cimport EADDRINUSE, EDEADLOCK, EEXIST, EINVAL, ENOENT, ENOMEM, ENOSPC, EOVERFLOW, EPERM
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memmove

from .ioas_dirty cimport dirty_forget, dirty_move, dirty_prepare, dirty_split
from .ioas_pages cimport pages_drop, pages_hold, pages_of_file, pages_of_user, pages_put
from .ioas_state cimport (
    area_after, area_at, area_from, area_t, context_t, hwpt_t, ioas_t, lowest_bit, pages_t, reserved_t,
)
from .state cimport (
    PS, V7_2, pthread_mutex_lock, pthread_mutex_unlock, pthread_rwlock_unlock, pthread_rwlock_wrlock, rangemap_count,
    rangemap_entry, rangemap_find, rangemap_free, rangemap_insert, rangemap_lower, rangemap_new, rangemap_overlaps,
    rangemap_remove,
)

cdef enum:
    HUGE = 2097152                          # alignment that transparent huge pages ask for
    UNMAP_TRIES = 100


cdef ioas_t *ioas_new(context_t *c) noexcept nogil:
    cdef ioas_t *ioas = <ioas_t *> calloc(1, sizeof(ioas_t))
    if not ioas:
        return NULL
    ioas.context = c
    ioas.alignment = 1
    ioas.full_below = PS
    ioas.areas = rangemap_new()
    ioas.allowed = rangemap_new()
    if not ioas.areas or not ioas.allowed:
        ioas_free(ioas)
        return NULL
    return ioas


cdef void ioas_free(ioas_t *ioas) noexcept nogil:
    """Free an address space that nothing is attached to."""
    cdef uint64_t ignored
    if ioas.areas:
        unmap_all(ioas, &ignored)
        rangemap_free(ioas.areas)
    if ioas.allowed:
        rangemap_free(ioas.allowed)
    free(ioas.reserved)
    free(ioas)


# ---- areas

cdef int area_hold(area_t *area) noexcept nogil:
    """Pin the area's pages for the page tables."""
    cdef int err
    if area.held:
        return 0
    err = pages_hold(area.pages, area.offset // PS, (area.offset + (area.last - area.iova)) // PS)
    if not err:
        area.held = True
    return err


cdef void area_drop(area_t *area) noexcept nogil:
    if area.held:
        area.held = False
        pages_drop(area.pages, area.offset // PS, (area.offset + (area.last - area.iova)) // PS)


cdef void release(area_t *area) noexcept nogil:
    """Free an area that is in no table."""
    area_drop(area)
    dirty_forget(area, NULL)
    area.pages.areas -= 1
    pages_put(area.pages)
    free(area)


cdef void remove_area(ioas_t *ioas, area_t *area) noexcept nogil:
    cdef rangemap_entry entry
    pthread_rwlock_wrlock(&ioas.context.iotlb)
    rangemap_remove(ioas.areas, area.iova, &entry)
    pthread_rwlock_unlock(&ioas.context.iotlb)
    ioas.full_below = min(ioas.full_below, max(area.iova, <uint64_t> PS))
    release(area)


# ---- reserved ranges

cdef int reserve(ioas_t *ioas, uint64_t start, uint64_t last, void *owner) noexcept nogil:
    """Take a range out of use; ranges of several owners may overlap."""
    cdef reserved_t *grown
    cdef size_t at = ioas.nreserved
    if rangemap_overlaps(ioas.areas, start, last) or rangemap_overlaps(ioas.allowed, start, last):
        return -EADDRINUSE
    if ioas.nreserved == ioas.reserved_room:
        grown = <reserved_t *> realloc(ioas.reserved, (2 * ioas.reserved_room + 4) * sizeof(reserved_t))
        if not grown:
            return -ENOMEM
        ioas.reserved = grown
        ioas.reserved_room = 2 * ioas.reserved_room + 4
    while at and ioas.reserved[at - 1].start > start:
        at -= 1
    memmove(&ioas.reserved[at + 1], &ioas.reserved[at], (ioas.nreserved - at) * sizeof(reserved_t))
    ioas.reserved[at].start = start
    ioas.reserved[at].last = last
    ioas.reserved[at].owner = owner
    ioas.nreserved += 1
    return 0


cdef void unreserve(ioas_t *ioas, void *owner) noexcept nogil:
    cdef size_t i, kept = 0
    for i in range(ioas.nreserved):
        if ioas.reserved[i].owner != owner:
            ioas.reserved[kept] = ioas.reserved[i]
            kept += 1
    ioas.nreserved = kept
    ioas.full_below = PS


cdef bint is_reserved(const ioas_t *ioas, uint64_t start, uint64_t last) noexcept nogil:
    cdef size_t i
    for i in range(ioas.nreserved):
        if ioas.reserved[i].start <= last and start <= ioas.reserved[i].last:
            return True
    return False


cdef bint next_hole(ioas_t *ioas, uint64_t *start, uint64_t *last) noexcept nogil:
    """The first range from *start on that is not reserved."""
    cdef size_t i
    last[0] = UINT64_MAX
    for i in range(ioas.nreserved):
        if ioas.reserved[i].last < start[0]:
            continue
        if ioas.reserved[i].start > start[0]:
            last[0] = ioas.reserved[i].start - 1
            return True
        if ioas.reserved[i].last == UINT64_MAX:
            return False
        start[0] = ioas.reserved[i].last + 1
    return True


# ---- alignment

cdef int check_alignment(ioas_t *ioas, uint64_t alignment) noexcept nogil:
    """May the alignment become this much?"""
    cdef area_t *area = area_from(ioas, 0)
    if alignment <= ioas.alignment:
        return 0
    while area:
        if (area.iova | (area.last - area.iova + 1) | area.offset % PS) & (alignment - 1):
            return -EADDRINUSE
        area = area_after(ioas, area)
    return 0


cdef void update_alignment(ioas_t *ioas) noexcept nogil:
    cdef hwpt_t *hwpt = ioas.hwpts
    ioas.alignment = PS if ioas.small_pages or ioas.accesses else 1
    while hwpt:
        ioas.alignment = max(ioas.alignment, lowest_bit(hwpt.pgsizes))
        hwpt = hwpt.next


cdef int disable_large_pages(ioas_t *ioas) noexcept nogil:
    cdef int err
    if ioas.small_pages:
        return 0
    # Nobody knows in what sizes existing areas were mapped.
    if ioas.hwpts and rangemap_count(ioas.areas):
        return -EINVAL
    err = check_alignment(ioas, PS)
    if not err:
        ioas.small_pages = True
        update_alignment(ioas)
    return err


cdef int enable_large_pages(ioas_t *ioas) noexcept nogil:
    ioas.small_pages = False
    update_alignment(ioas)
    return 0


# ---- automatic IOVAs

cdef bint fits(uint64_t *start, uint64_t last, uint64_t length, uint64_t alignment, uint64_t offset) noexcept nogil:
    """Move *start to the first place in [*start, last] that is aligned, and has the offset in its page."""
    cdef uint64_t aligned = start[0] + (alignment - 1)
    if aligned < start[0]:
        return False
    aligned = (aligned & ~(alignment - 1)) | offset
    if aligned >= last or last - aligned < length - 1:
        return False
    start[0] = aligned
    return True


cdef bint allowed_from(ioas_t *ioas, uint64_t *start, uint64_t *last) noexcept nogil:
    """The first allowed range from *start on; those that touch are one."""
    cdef rangemap_entry entry
    if not rangemap_count(ioas.allowed):
        last[0] = UINT64_MAX - PS
        return start[0] <= last[0]
    if not rangemap_lower(ioas.allowed, start[0], &entry):
        return False
    start[0] = max(start[0], entry.start)
    last[0] = entry.last
    while last[0] < UINT64_MAX - PS and rangemap_find(ioas.allowed, last[0] + 1, &entry):
        last[0] = entry.last
    last[0] = min(last[0], UINT64_MAX - PS)
    return start[0] <= last[0]


cdef bint hole_from(ioas_t *ioas, uint64_t *start, uint64_t *last, uint64_t limit) noexcept nogil:
    """The first range from *start to limit that is neither reserved nor an area."""
    cdef rangemap_entry entry
    while start[0] <= limit:
        if not next_hole(ioas, start, last) or start[0] > limit:
            return False
        last[0] = min(last[0], limit)
        if not rangemap_lower(ioas.areas, start[0], &entry) or entry.start > last[0]:
            return True
        if entry.start > start[0]:
            last[0] = entry.start - 1
            return True
        if entry.last == UINT64_MAX:
            return False
        start[0] = entry.last + 1
    return False


cdef int choose_iova(ioas_t *ioas, uint64_t address, uint64_t length, uint64_t *iova) noexcept nogil:
    """The lowest place that fits, aligned so that memory at `address` could be mapped in huge pages."""
    cdef uint64_t alignment = 1, start, last, at, end, offset = address % PS
    if length >= UINT64_MAX // 2:
        return -EOVERFLOW
    while alignment < length and alignment < HUGE:
        alignment *= 2
    if address:
        alignment = min(alignment, lowest_bit(address))
    if alignment < ioas.alignment:
        return -EINVAL
    # Small mappings one after another leave no holes: they need not be gone through each time.
    at = ioas.full_below
    ioas.full_below = at if hole_from(ioas, &at, &end, UINT64_MAX) else UINT64_MAX
    start = PS
    while allowed_from(ioas, &start, &last):
        if fits(&start, last, length, alignment, offset):
            at = max(start, ioas.full_below)
            while hole_from(ioas, &at, &end, last):
                if fits(&at, end, length, alignment, offset):
                    iova[0] = at
                    return 0
                if end >= last:
                    break
                at = end + 1
        if last >= UINT64_MAX - PS:
            break
        start = last + 1
    return -ENOSPC


cdef int check_iova(ioas_t *ioas, uint64_t iova, uint64_t length) noexcept nogil:
    if iova & (ioas.alignment - 1):
        return -EINVAL
    if iova + length - 1 < iova:
        return -EOVERFLOW
    if is_reserved(ioas, iova, iova + length - 1):
        return -EINVAL
    return -EEXIST if rangemap_overlaps(ioas.areas, iova, iova + length - 1) else 0


# ---- map

cdef int insert(ioas_t *ioas, area_t **areas, size_t n) noexcept nogil:
    """Put areas into the table, all or none."""
    cdef rangemap_entry ignored
    cdef size_t i, done = 0
    cdef int err = 0
    for i in range(n):
        if ioas.hwpts:
            err = area_hold(areas[i])
        err = err or dirty_prepare(ioas, areas[i])
        if err:
            return err
    pthread_rwlock_wrlock(&ioas.context.iotlb)
    for i in range(n):
        err = rangemap_insert(ioas.areas, areas[i].iova, areas[i].last, <uint64_t> areas[i])
        if err:
            break
        done += 1
    if err:
        for i in range(done):
            rangemap_remove(ioas.areas, areas[i].iova, &ignored)
    pthread_rwlock_unlock(&ioas.context.iotlb)
    return err


cdef int make_areas(ioas_t *ioas, const element_t *elements, size_t n, uint64_t iova, uint32_t prot, area_t **areas) noexcept nogil:
    cdef area_t *area
    cdef size_t i
    for i in range(n):
        area = areas[i] = <area_t *> calloc(1, sizeof(area_t))
        if not area:
            return -ENOMEM
        area.pages = elements[i].pages
        area.pages.areas += 1
        area.offset = elements[i].offset
        area.iova = iova
        area.last = iova + (elements[i].length - 1)
        area.prot = prot
        area.small = ioas.small_pages
        iova = area.last + 1
        if prot & WRITEABLE and not area.pages.writable:
            return -EPERM
        if area.offset % PS & (ioas.alignment - 1):
            return -EINVAL
    return 0


cdef int place(ioas_t *ioas, const element_t *elements, size_t n, uint64_t length, uint64_t *iova, uint32_t prot,
               bint fixed) noexcept nogil:
    """Make areas of neighbouring elements, at an IOVA that is given or chosen; each takes a reference of its pages."""
    cdef area_t *one = NULL
    cdef area_t **areas = &one
    cdef uint64_t at = iova[0]
    cdef size_t i
    cdef int err
    if length & (ioas.alignment - 1) or not length:
        return -EINVAL
    if fixed:
        err = check_iova(ioas, at, length)
    else:
        err = choose_iova(ioas, elements[0].pages.start + elements[0].offset, length, &at)
    if err:
        return err
    if n > 1:
        areas = <area_t **> calloc(n, sizeof(area_t *))
        if not areas:
            return -ENOMEM
    err = make_areas(ioas, elements, n, at, prot, areas) or insert(ioas, areas, n)
    if err:
        for i in range(n):
            if areas[i]:
                release(areas[i])
    else:
        iova[0] = at
    if n > 1:
        free(areas)
    return err


cdef int place_new(ioas_t *ioas, pages_t *pages, uint64_t offset, uint64_t length, uint64_t *iova, uint32_t prot,
                   bint fixed) noexcept nogil:
    cdef element_t element
    cdef int err
    element.pages = pages
    element.offset = offset
    element.length = length
    pages.areas += 1                    # our own reference: an area that fails would free the object
    err = place(ioas, &element, 1, length, iova, prot, fixed)
    pages.areas -= 1
    pages_put(pages)
    return err


cdef int map_user(ioas_t *ioas, uint64_t vaddr, uint64_t length, uint64_t *iova, uint32_t prot, bint fixed) noexcept nogil:
    """Map memory of this process."""
    cdef pages_t *pages
    cdef bint bad_length = length == 0 or length > UINT64_MAX - PS
    # Which of the two is looked at first has changed with the mapping of files.
    if vaddr + length < vaddr and not (bad_length and ioas.context.version < V7_2):
        return -EOVERFLOW
    if bad_length:
        return -EINVAL
    pages = pages_of_user(ioas.context, vaddr - vaddr % PS, (vaddr % PS + length - 1) // PS + 1, prot & WRITEABLE != 0)
    if not pages:
        return -ENOMEM
    return place_new(ioas, pages, vaddr % PS, length, iova, prot, fixed)


cdef int map_file(ioas_t *ioas, int fd, uint64_t start, uint64_t length, uint64_t *iova, uint32_t prot, bint fixed) noexcept nogil:
    """Map a part of a memfd."""
    cdef pages_t *pages
    cdef int err
    if length == 0:
        return -EINVAL
    if start + length - 1 < start:
        return -EOVERFLOW
    pages = pages_of_file(ioas.context, fd, start - start % PS, (start % PS + length - 1) // PS + 1,
                          prot & WRITEABLE != 0, &err)
    if not pages:
        return err
    if length > UINT64_MAX - PS:
        pages_put(pages)
        return -EINVAL
    return place_new(ioas, pages, start % PS, length, iova, prot, fixed)


# ---- copy

cdef int copy_check(ioas_t *source, uint64_t iova, uint64_t length) noexcept nogil:
    """Is the range mapped without a hole?"""
    cdef uint64_t last = iova + (length - 1)
    cdef area_t *area
    if length == 0:
        return -EINVAL
    if last < iova:
        return -EOVERFLOW
    area = area_at(source, iova)
    while area and area.last < last:
        area = area_at(source, area.last + 1)
    return 0 if area else -ENOENT


cdef int copy_areas(ioas_t *target, ioas_t *source, uint64_t source_iova, uint64_t length, uint64_t *iova, uint32_t prot,
                    bint fixed) noexcept nogil:
    """Map what a range of `source` maps, sharing its pages; the range was checked."""
    cdef uint64_t at = source_iova, last = source_iova + (length - 1)
    cdef element_t *elements
    cdef area_t *area
    cdef size_t i, n = 0
    cdef int err
    area = area_at(source, at)
    while area and area.iova <= last:
        n += 1
        area = area_after(source, area)
    elements = <element_t *> calloc(n, sizeof(element_t))
    if not elements:
        return -ENOMEM
    for i in range(n):
        area = area_at(source, at)
        elements[i].pages = area.pages
        elements[i].offset = area.offset + (at - area.iova)
        elements[i].length = min(area.last, last) - at + 1
        at = area.last + 1
    err = place(target, elements, n, length, iova, prot, fixed)
    free(elements)
    return err


# ---- unmap

cdef void call_owner(void *owner, uint64_t iova, uint64_t size) noexcept with gil:
    (<object> owner)._notify_unmap(iova, size)


cdef void notify_unmap(ioas_t *ioas, uint64_t iova, uint64_t size) noexcept nogil:
    """Ask emulated devices to give up what they have pinned; called, and returns, with the lock held."""
    cdef context_t *c = ioas.context
    cdef void *owner = c.owner
    ioas.unmaps += 1
    c.unmaps += 1
    pthread_mutex_unlock(&c.lock)
    call_owner(owner, iova, size)
    pthread_mutex_lock(&c.lock)
    ioas.unmaps -= 1
    c.unmaps -= 1


cdef int unmap_areas(ioas_t *ioas, uint64_t start, uint64_t last, uint64_t *unmapped) noexcept nogil:
    """Remove the areas of a range one after another; stops at the first that can't go."""
    cdef area_t *area
    cdef int tries = 0
    unmapped[0] = 0
    while True:
        area = area_from(ioas, start)
        if not area or area.iova > last:
            return 0
        if area.iova < start or area.last > last:
            return -ENOENT
        if area.iova != start:
            tries = 0
        start = area.iova
        if area.pins:
            tries += 1
            if tries > UNMAP_TRIES:
                return -EDEADLOCK
            notify_unmap(ioas, area.iova, area.last - area.iova + 1)
            continue
        unmapped[0] += area.last - area.iova + 1
        start = area.last
        remove_area(ioas, area)
        if start == UINT64_MAX:
            return 0
        start += 1
        tries = 0


cdef int unmap(ioas_t *ioas, uint64_t iova, uint64_t length, uint64_t *unmapped) noexcept nogil:
    """Remove the areas that lie wholly in the range; *unmapped counts also when it fails midway."""
    unmapped[0] = 0
    if length == 0:
        return -EINVAL
    if iova + (length - 1) < iova:
        return -EOVERFLOW
    return unmap_areas(ioas, iova, iova + (length - 1), unmapped)


cdef int unmap_all(ioas_t *ioas, uint64_t *unmapped) noexcept nogil:
    return unmap_areas(ioas, 0, UINT64_MAX, unmapped)


cdef int split(ioas_t *ioas, uint64_t at) noexcept nogil:
    """Make an area end at `at`, if one goes beyond it: the VFIO dialect's way to unmap parts of mappings."""
    cdef area_t *area = area_at(ioas, at)
    cdef rangemap_entry entry
    cdef uint64_t length
    cdef area_t *rest
    cdef int err
    if not area or area.last == at:
        return 0
    length = at - area.iova + 1
    if (at + 1) & (ioas.alignment - 1) or (area.offset + length) % PS & (ioas.alignment - 1):
        return -EINVAL
    if area.pins or (ioas.hwpts and not ioas.small_pages):
        return -EINVAL
    rest = <area_t *> calloc(1, sizeof(area_t))
    if not rest:
        return -ENOMEM
    rest.pages = area.pages
    rest.iova = at + 1
    rest.last = area.last
    rest.offset = area.offset + length
    rest.prot = area.prot
    rest.small = area.small
    rest.pages.areas += 1
    err = dirty_split(area, rest)
    if not err and area.held:
        # Two users where there was one: each drops its own part later.
        err = pages_hold(area.pages, area.offset // PS, (rest.offset - 1) // PS)
        if not err:
            err = pages_hold(area.pages, rest.offset // PS, (rest.offset + (rest.last - rest.iova)) // PS)
            if err:
                pages_drop(area.pages, area.offset // PS, (rest.offset - 1) // PS)
    if err:
        release(rest)
        return err
    if area.held:
        area_drop(area)
        area.held = rest.held = True
    pthread_rwlock_wrlock(&ioas.context.iotlb)
    rangemap_remove(ioas.areas, area.iova, &entry)
    area.last = at
    dirty_move(area, rest)
    err = rangemap_insert(ioas.areas, area.iova, area.last, <uint64_t> area)
    err = err or rangemap_insert(ioas.areas, rest.iova, rest.last, <uint64_t> rest)
    pthread_rwlock_unlock(&ioas.context.iotlb)
    return err
