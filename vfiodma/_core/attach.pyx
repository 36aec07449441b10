"""Groups joining and leaving a Type1 instance: domains, apertures, reserved regions, the list of valid IOVA ranges.

Callers hold the instance's lock.  A failed attach leaves ranges, page sizes and mappings as they were.  Source: the VFIO
Type1 driver's attach and detach of Linux 5.4 to 7.2.
"""
from libc.errno cimport EFAULT, EINVAL, ENOMEM, EPERM, ERANGE
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free, malloc

from .dirty cimport dirty_fill_all, dirty_resize
from .mappings cimport pin_mapping, remove_all, unpin_mapping, wait_until_valid
from .nesting cimport nesting_start, nesting_stop, nests
from .state cimport (
    PS, V7_2, dma_t, domain_t, first_from, group_t, iommu_mapped, iova_range, next_of,
    rangemap_overlaps, type1_t,
)

cdef struct range_list:
    iova_range *items
    size_t n, room


# ---- lists of ranges

cdef int append(range_list *to, uint64_t start, uint64_t last) noexcept nogil:
    cdef iova_range *grown
    cdef size_t i
    if to.n == to.room:
        grown = <iova_range *> malloc((to.room * 2 + 4) * sizeof(iova_range))
        if not grown:
            return -ENOMEM
        for i in range(to.n):
            grown[i] = to.items[i]
        free(to.items)
        to.items = grown
        to.room = to.room * 2 + 4
    to.items[to.n].start = start
    to.items[to.n].last = last
    to.n += 1
    return 0


cdef int copy_ranges(const iova_range *items, size_t n, range_list *to) noexcept nogil:
    cdef size_t i
    cdef int err = 0
    to.n = 0
    for i in range(n):
        err = err or append(to, items[i].start, items[i].last)
    return err


cdef int clip(range_list *ranges, iova_range aperture) noexcept nogil:
    """Keep what lies in the aperture.  A range whose last address is the aperture's start is dropped, as the kernel does."""
    cdef range_list kept
    cdef iova_range r
    cdef size_t i
    cdef int err = 0
    cdef bint started = False
    if ranges.n == 0:
        return append(ranges, aperture.start, aperture.last)
    kept.items, kept.n, kept.room = NULL, 0, 0
    for i in range(ranges.n):
        r = ranges.items[i]
        if not started and aperture.start >= r.start:
            if aperture.start >= r.last:
                continue
            r.start = aperture.start
        started = True
        if aperture.last > r.last:
            err = err or append(&kept, r.start, r.last)
        elif aperture.last > r.start:
            err = err or append(&kept, r.start, aperture.last)
    free(ranges.items)
    ranges[0] = kept
    return err


cdef int cut(range_list *ranges, iova_range reserved) noexcept nogil:
    cdef range_list kept
    cdef iova_range r
    cdef size_t i
    cdef int err = 0
    kept.items, kept.n, kept.room = NULL, 0, 0
    for i in range(ranges.n):
        r = ranges.items[i]
        if reserved.start > r.last or reserved.last < r.start:
            err = err or append(&kept, r.start, r.last)
            continue
        if reserved.start > r.start:
            err = err or append(&kept, r.start, reserved.start - 1)
        if reserved.last < r.last:
            err = err or append(&kept, reserved.last + 1, r.last)
    free(ranges.items)
    ranges[0] = kept
    return err


cdef int cut_reserved(range_list *ranges, const group_t *group) noexcept nogil:
    cdef size_t i
    cdef int err = 0
    for i in range(group.nreserved):
        err = err or cut(ranges, group.reserved[i])
    return err


# ---- domains

cdef bint enforces_coherency(const type1_t *t) noexcept nogil:
    cdef domain_t *domain = t.domains
    while domain:
        if not domain.coherent:
            return False
        domain = domain.next
    return True


cdef uint64_t common_pgsizes(const type1_t *t, uint64_t sizes) noexcept nogil:
    cdef domain_t *domain = t.domains
    while domain:
        sizes &= domain.pgsizes
        domain = domain.next
    return sizes


cdef void update_pgsizes(type1_t *t) noexcept nogil:
    cdef uint64_t sizes = common_pgsizes(t, <uint64_t> -1)
    if sizes & (PS - 1):
        sizes = sizes & ~<uint64_t> (PS - 1) | PS
    t.pgsizes = sizes
    dirty_resize(t)


cdef bint aperture_conflicts(type1_t *t, iova_range aperture) noexcept nogil:
    cdef uint64_t first, last
    if t.nranges == 0:
        return False
    first = t.ranges[0].start
    last = t.ranges[t.nranges - 1].last
    if aperture.start > last or aperture.last < first:
        return True
    if aperture.start > first and rangemap_overlaps(t.mappings, first, aperture.start - 1):
        return True
    # Up to 6.12 a list that ends at 2**64 makes the upper look-up wrap and find nothing.
    if last == <uint64_t> -1 and t.version < V7_2:
        return False
    return aperture.last < last and rangemap_overlaps(t.mappings, aperture.last + 1, last)


cdef bint reserved_conflicts(type1_t *t, const group_t *group) noexcept nogil:
    cdef size_t i
    for i in range(group.nreserved):
        if rangemap_overlaps(t.mappings, group.reserved[i].start, group.reserved[i].last):
            return True
    return False


cdef domain_t *compatible_domain(type1_t *t, const group_t *group) noexcept nogil:
    """A domain that the group's devices could use as it is: the same IOMMU geometry and coherency."""
    cdef domain_t *domain = t.domains
    while domain:
        if (domain.coherent == group.coherent and domain.pgsizes == group.pgsizes
                and domain.aperture.start == group.aperture.start and domain.aperture.last == group.aperture.last):
            return domain
        domain = domain.next
    return NULL


cdef int replay_one(type1_t *t, dma_t *dma, const group_t *group, bint *pinned) noexcept nogil:
    cdef int err
    pinned[0] = False
    if not iommu_mapped(dma):
        err = pin_mapping(t, dma)
        if err:
            return err
        pinned[0] = True
    if dma.iova < group.aperture.start or dma.iova + dma.size - 1 > group.aperture.last:
        return -ERANGE if t.version >= V7_2 else -EFAULT
    return 0


cdef int replay(type1_t *t, const group_t *group) noexcept nogil:
    """Map everything for a new domain; what only emulated groups had is pinned now, under today's limit."""
    cdef dma_t *dma = first_from(t, 0)
    cdef dma_t *failed = NULL
    cdef bint pinned = False, any_pinned = False
    cdef int err = 0
    while dma:
        err = replay_one(t, dma, group, &pinned)
        any_pinned = any_pinned or pinned
        if err:
            failed = dma
            break
        dma = next_of(t, dma)
    if not err and t.unfindable:
        err = -EFAULT                   # it ends at 2**64, beyond any aperture
    # Either every mapping was in an IOMMU before (another domain has them) or none was.
    if err and any_pinned:
        dma = first_from(t, 0)
        while dma:
            unpin_mapping(t, dma)
            if dma == failed:
                break
            dma = next_of(t, dma)
    return err


cdef int attach_to_iommu(type1_t *t, group_t *group, range_list *ranges) noexcept nogil:
    cdef domain_t *domain
    cdef int err
    if t.nesting and not group.nestable:
        return -EINVAL
    if aperture_conflicts(t, group.aperture) or reserved_conflicts(t, group):
        return -EINVAL
    err = copy_ranges(t.ranges, t.nranges, ranges) or clip(ranges, group.aperture) or cut_reserved(ranges, group)
    if err:
        return err
    if ranges.n == 0:
        return -EINVAL
    if not group.msi_isolated:
        return -EPERM
    domain = compatible_domain(t, group)
    if not domain:
        if not common_pgsizes(t, group.pgsizes):
            return -EINVAL              # no page size would be left to map or to count with
        domain = <domain_t *> calloc(1, sizeof(domain_t))
        if not domain:
            return -ENOMEM
        err = replay(t, group)
        if err:
            free(domain)
            return err
        domain.aperture = group.aperture
        domain.pgsizes = group.pgsizes
        domain.coherent = group.coherent
        domain.next = t.domains
        t.domains = domain
        update_pgsizes(t)
    group.domain = domain
    group.next = domain.groups
    domain.groups = group
    free(t.ranges)
    t.ranges = ranges.items
    t.nranges = ranges.n
    ranges.items = NULL
    group.pinned_scope = False
    t.non_pinned_groups += 1
    return 0


cdef int attach_group(type1_t *t, group_t *group) noexcept nogil:
    cdef range_list ranges
    cdef int err
    err = wait_until_valid(t, 0, True)
    if err:
        return err
    if nests(t) and (t.domains or t.emulated):
        return -EINVAL                  # one group at most
    if group.emulated:
        group.pinned_scope = True
        group.next = t.emulated
        t.emulated = group
        return 0
    ranges.items, ranges.n, ranges.room = NULL, 0, 0
    err = attach_to_iommu(t, group, &ranges)
    free(ranges.items)
    if not err and nests(t):
        nesting_start(t)
    return err


# ---- detach

cdef void unlink(group_t **head, group_t *group) noexcept nogil:
    cdef group_t **link = head
    while link[0] != group:
        link = &link[0].next
    link[0] = group.next
    group.next = NULL


cdef void drop_domain(type1_t *t, domain_t *domain) noexcept nogil:
    cdef domain_t **link = &t.domains
    while link[0] != domain:
        link = &link[0].next
    link[0] = domain.next
    free(domain)


cdef iova_range outer_bounds(type1_t *t, bint domain_gone) noexcept nogil:
    """Of the list to be: today's, or those of the apertures that remain when a domain is gone."""
    cdef iova_range bounds
    cdef domain_t *domain = t.domains
    bounds.start = 0 if domain_gone else t.ranges[0].start
    bounds.last = <uint64_t> -1 if domain_gone else t.ranges[t.nranges - 1].last
    while domain and domain_gone:
        bounds.start = max(bounds.start, domain.aperture.start)
        bounds.last = min(bounds.last, domain.aperture.last)
        domain = domain.next
    return bounds


cdef void recompute_ranges(type1_t *t, bint domain_gone) noexcept nogil:
    """One range between the outer bounds, without the reserved regions of the groups that remain."""
    cdef range_list ranges
    cdef iova_range bounds
    cdef domain_t *domain = t.domains
    cdef group_t *group
    cdef int err
    if t.nranges == 0:
        return
    bounds = outer_bounds(t, domain_gone)
    ranges.items, ranges.n, ranges.room = NULL, 0, 0
    err = append(&ranges, bounds.start, bounds.last)
    while domain:
        group = domain.groups
        while group:
            err = err or cut_reserved(&ranges, group)
            group = group.next
        domain = domain.next
    if err or ranges.n == 0:
        free(ranges.items)
        return
    free(t.ranges)
    t.ranges = ranges.items
    t.nranges = ranges.n


cdef void leave_iommu(type1_t *t) noexcept nogil:
    """The last domain is gone but emulated groups stay: mappings stay too, in no IOMMU."""
    cdef dma_t *dma = first_from(t, 0)
    while dma:
        unpin_mapping(t, dma)
        dma = next_of(t, dma)


cdef void detach_group(type1_t *t, group_t *group) noexcept nogil:
    cdef domain_t *domain = group.domain
    cdef bint emptied
    if group.emulated:
        unlink(&t.emulated, group)
        if not t.emulated and not t.domains:
            remove_all(t)
        return
    unlink(&domain.groups, group)
    group.domain = NULL
    emptied = domain.groups == NULL
    if emptied:
        nesting_stop(t)
        if t.domains == domain and not domain.next:
            if t.emulated:
                leave_iommu(t)
            else:
                remove_all(t)
        drop_domain(t, domain)
        update_pgsizes(t)
    recompute_ranges(t, emptied)
    if not group.pinned_scope:
        t.non_pinned_groups -= 1
        if t.tracking:
            dirty_fill_all(t)


cdef void forget_groups(type1_t *t) noexcept nogil:
    """The instance ends: no group belongs to it any more."""
    cdef group_t *group
    while t.emulated:
        group = t.emulated
        detach_group(t, group)
    while t.domains:
        detach_group(t, t.domains.groups)
