"""Groups that join and leave a Type1 instance.

Source: type1.md 3.
"""
import errno

from . import ranges
from .memory import PAGE
from .type1 import TOP, Domain, WouldBlock, fail


def attach(type1, group):
    kernel = type1.kernel
    if type1.invalid:
        if not kernel.vaddr_busy:
            raise WouldBlock
        fail(errno.EBUSY)
    if group.emulated:
        type1.emulated.append(group)
        return
    if type1.nesting and not group.nestable:
        fail(errno.EINVAL)
    first, last = group.aperture
    if aperture_conflict(type1, first, last):
        fail(errno.EINVAL)
    if any(type1.find(*region) for region in group.reserved):
        fail(errno.EINVAL)
    valid = ranges.cut(ranges.clip(type1.iova_ranges, first, last), group.reserved)
    if not valid:
        fail(errno.EINVAL)
    if not group.msi_isolated:
        fail(errno.EPERM)
    home = next((d for d in type1.domains if d.takes(group)), None)
    if home:
        home.groups.append(group)
    else:
        replay(type1, group)
        type1.domains.insert(0, Domain(group))
        type1.pgsizes = ranges.page_sizes([d.pgsizes for d in type1.domains], PAGE)
    type1.iova_ranges = valid
    type1.unpinned_scope.add(group)


def aperture_conflict(type1, first, last):
    if not type1.iova_ranges:
        return False
    lowest, highest = type1.iova_ranges[0][0], type1.iova_ranges[-1][1]
    return (first > highest or last < lowest
            or first > lowest and type1.find(lowest, first - 1) is not None
            or last < highest and type1.find(last + 1, highest) is not None)


def replay(type1, group):
    """Put every mapping into a new domain; those that were never pinned are pinned now.  All or nothing."""
    first, last = group.aperture
    pinned = []
    error = 0
    for m in type1.mappings:
        if not m.iommu_mapped:
            before = m.charged
            error = type1.pin(m)
            if error:
                break
            pinned.append((m, before))
        if m.iova < first or m.last > last:
            error = type1.kernel.replay_range
            break
    if error:
        for m, before in pinned:
            type1.charge(m, before - m.charged)
        fail(error)
    for m, _ in pinned:
        m.iommu_mapped = True


def detach(type1, group):
    if group in type1.emulated:
        type1.emulated.remove(group)
        if not type1.emulated and not type1.domains:
            type1.remove_all()
        return
    domain = next(d for d in type1.domains if group in d.groups)
    domain.groups.remove(group)
    valid = list(type1.iova_ranges)
    if not domain.groups:
        type1.domains.remove(domain)
        if not type1.domains:
            if type1.emulated:
                keep_for_emulated(type1)
            else:
                type1.remove_all()
        if valid:                                               # expand to the apertures that remain
            lowest = max((d.aperture[0] for d in type1.domains), default=0)
            highest = min((d.aperture[1] for d in type1.domains), default=TOP)
            valid[0] = (lowest, valid[0][1])
            valid[-1] = (valid[-1][0], highest)
        type1.pgsizes = ranges.page_sizes([d.pgsizes for d in type1.domains], PAGE)
    if valid:
        regions = [region for d in type1.domains for member in d.groups for region in member.reserved]
        valid = ranges.cut([(valid[0][0], valid[-1][1])], regions)
    if valid:
        type1.iova_ranges = valid
    if group in type1.unpinned_scope:
        type1.unpinned_scope.remove(group)
        if type1.tracking:
            type1.all_dirty()


def keep_for_emulated(type1):
    """The last domain goes: mappings stay, charged for their externally pinned pages only."""
    for m in type1.mappings:
        m.iommu_mapped = False
        type1.charge(m, len(m.pins) - len(m.free_pins) - m.charged)
