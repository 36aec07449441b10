"""Memory that a process has registered with its SPAPR TCE containers: pinned and charged once, whoever uses it."""
import re
from bisect import bisect_left, insort
from typing import Any

_PAGE = 4096                    # what processes of the model have; POWER kernels have 64 KiB as well


class Registered:
    """The regions of a process.

    Attributes
    ----------
    shared : dict
        (vaddr, size) -> [Region, how many containers have registered it].
    """

    def __init__(self):
        self.shared: dict[tuple[int, int], list[Any]] = {}
        self._order: list[tuple[int, int]] = []         # keys, ascending, without empty ones

    def enter(self, vaddr, size, region):
        """Put a region in that overlaps no other."""
        self.shared[vaddr, size] = [region, 0]
        if size:
            insort(self._order, (vaddr, size))

    def remove(self, key):
        """Take a region out."""
        del self.shared[key]
        if key[1]:
            del self._order[bisect_left(self._order, key)]

    def between(self, vaddr, size):
        """Return the regions that overlap a range, ascending."""
        end = bisect_left(self._order, (vaddr + size,))
        first = end
        while first and sum(self._order[first - 1]) > vaddr:
            first -= 1
        return [self.shared[key][0] for key in self._order[first:end]]


def region_shift(vaddr, size):
    """Return log2 of the largest IOMMU page for memory: the alignment's, up to that of the pages it is made of."""
    low = (vaddr | size) & -(vaddr | size)
    return min(low, page_size(vaddr, size)).bit_length() - 1 if low > _PAGE else 12


def page_size(vaddr, size):
    """Return the bytes of the smallest page that memory is made of: more than 4 KiB for hugetlb only."""
    with open("/proc/meminfo") as file:
        if re.search(r"^Hugetlb: +0 kB", file.read(), re.MULTILINE):
            return _PAGE                                # what follows takes milliseconds
    smallest = None
    with open("/proc/self/smaps") as file:
        inside = False
        for line in file:
            if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(match[1], 16) < vaddr + size and vaddr < int(match[2], 16)
            elif inside and line.startswith("KernelPageSize:"):
                own = int(line.split()[1]) << 10
                smallest = own if smallest is None else min(smallest, own)
    return smallest or _PAGE
