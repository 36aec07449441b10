"""Can this address space go to another process?  Asked before anything changes, answered with what to do."""
import errno
from dataclasses import dataclass
from typing import Any, NamedTuple

from .._core.errno import error
from ..address_space import IoAddressSpace
from ..errors import VfioError
from ..memory import GuestMemory
from .handoff import find_places
from .packets import MAX_FDS
from .table import MAX_REGIONS

_RESERVE = 64           # descriptors for the container, groups and devices


class Finding(NamedTuple):
    """One condition; ``advice`` says what to do where it is not met."""

    topic: str
    ok: bool
    value: str
    advice: str = ""


@dataclass(frozen=True)
class Preflight:
    """What :func:`preflight` found."""

    findings: tuple[Finding, ...]
    way: str                    #: "vaddr" (Type1), "file" (iommufd), "" = there is none
    mappings: int
    size: int                   #: bytes mapped

    @property
    def ok(self) -> bool:
        """Whether every condition is met."""
        return all(finding.ok for finding in self.findings)

    def check(self) -> None:
        """Raise what stands in the way.

        Raises
        ------
        UnsupportedError
            EOPNOTSUPP, with every reason in the text.
        """
        reasons = [f"{topic}: {value}: {advice}" for topic, ok, value, advice in self.findings if not ok]
        if reasons:
            raise error(errno.EOPNOTSUPP, "live_update", hint="; ".join(reasons))


def preflight(ioas: IoAddressSpace, memory: GuestMemory, *, between_processes: bool = True) -> Preflight:
    """Tell whether a live update of an address space can work.

    Parameters
    ----------
    ioas : IoAddressSpace
    memory : GuestMemory
        Where its mappings lead.
    between_processes : bool
        To another process; or only to another address in this one (VaddrHandoff).

    Returns
    -------
    Preflight
        ``report.ok``; ``report.check()`` raises with the reasons.

    Notes
    -----
    Changes nothing.  Source: VFIO_UPDATE_VADDR, VFIO_UNMAP_ALL; IOMMU_IOAS_CHANGE_PROCESS, which is asked on the
    running process, where it has no effect.
    """
    features, backend = ioas.capabilities.features, ioas.backend
    mappings, findings = ioas.to_array(), []
    way = "vaddr" if "vaddr" in features else "file" if hasattr(backend, "change_process") else ""
    if way == "file" and not between_processes:
        way = ""
    findings.append(_way(way, features, between_processes))
    if way == "file":
        findings.append(_by_file(backend))
    if between_processes:
        findings.append(_container(backend))
        if way == "vaddr":
            findings.append(_charge(memory, mappings))
    findings.append(_memory(memory, mappings))
    count = len(memory)
    if between_processes:
        findings.append(Finding("regions", 0 < count <= min(MAX_REGIONS, MAX_FDS - _RESERVE), str(count),
                                f"make memory of at most {MAX_REGIONS} regions"))
    return Preflight(tuple(findings), way, len(mappings), int(mappings[:, 2].sum()))


def _way(way: str, features: Any, between_processes: bool) -> Finding:
    if way == "vaddr" and "unmap_all" not in features:
        return Finding("interface", False, "the kernel can't invalidate all vaddrs at once (VFIO_UNMAP_ALL)",
                       "a kernel from 5.12 on")
    if way:
        return Finding("interface", True, {"vaddr": "VFIO_UPDATE_VADDR", "file": "IOMMU_IOAS_CHANGE_PROCESS"}[way])
    return Finding("interface", False, "vaddrs can't be updated", "Type1 from Linux 5.12 on, without mediated or other "
                   "emulated devices" + (", or iommufd from Linux 6.14 on" if between_processes else ""))


def _by_file(backend: Any) -> Finding:
    try:
        backend.change_process()
    except VfioError as exc:
        if exc.errno == errno.EINVAL:
            return Finding("mapped by file", False, "a mapping was made by address",
                           "map memory of memfd or hugetlb regions only, as regions")
        return Finding("mapped by file", False, str(exc), "iommufd from Linux 6.14 on")
    return Finding("mapped by file", True, "every mapping")


def _container(backend: Any) -> Finding:
    if not hasattr(backend, "hand_over"):
        return Finding("container", False, "its IOMMU lives in this process",
                       "a container of the running kernel; within one process VaddrHandoff does it")
    try:
        backend.hand_over()
    except VfioError as exc:
        return Finding("container", False, str(exc), "a container of the running kernel")
    return Finding("container", True, "its descriptors can be sent")


def _charge(memory: GuestMemory, mappings: Any) -> Finding:
    """For the new process to check against its own limit; it does, before anything changes."""
    mmio = any(region.mmio for region in memory.regions)
    size = int(mappings[:, 2].sum())
    return Finding("locked memory", True, f"the kernel charges up to {size} bytes to the new process"
                   + (", less what is device memory" if mmio else ""))


def _memory(memory: GuestMemory, mappings: Any) -> Finding:
    try:
        find_places(memory, mappings)
        for gpa, region in memory:
            if region.fd is None:
                raise error(errno.EOPNOTSUPP, "live_update", gpa, region.size, "anonymous memory has no descriptor")
    except VfioError as exc:
        return Finding("memory", False, str(exc), "map regions of memfd, hugetlb or file memory, and name them all")
    return Finding("memory", True, f"{len(memory)} regions, shared, with descriptors")
