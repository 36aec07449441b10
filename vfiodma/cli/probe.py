"""``vfiodma probe``: what this host offers for VFIO; every "no" says what to do about it."""
import json
import sys
from dataclasses import asdict
from typing import Annotated, Any, NamedTuple

import typer

from ..hostinfo import HostInfo, is_vfio, read_host, vfio_driver


class Finding(NamedTuple):
    """One line: ``ok`` is None for plain information; ``advice`` is there whenever it is False."""

    topic: str
    ok: bool | None
    value: str
    advice: str = ""


def amount(nbytes: int | None) -> str:
    """Return bytes in the largest unit that stays exact, or else with one decimal."""
    if nbytes is None:
        return "unlimited"
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >> shift:
            exact = not nbytes & ((1 << shift) - 1)
            return f"{nbytes >> shift} {unit}" if exact else f"{nbytes / (1 << shift):.1f} {unit}"
    return f"{nbytes} bytes"


def _page_sizes(bitmap: int) -> str:
    sizes = [amount(1 << bit) for bit in range(64) if bitmap >> bit & 1]
    return ", ".join(sizes) if len(sizes) <= 6 else f"{sizes[0]} and every power of two up to {sizes[-1]}"


def _node(topic: str, node: Any, missing: str) -> Finding:
    if not node.exists:
        return Finding(topic, False, f"no {node.path}", missing)
    if not node.accessible:
        return Finding(topic, False, f"{node.path} is there, but not for you",
                       "chown it to your user, or a udev rule: "
                       f"KERNEL==\"{node.path.rsplit('/', 1)[1]}\", MODE=\"0660\"")
    return Finding(topic, True, node.path)


def _groups(host: HostInfo) -> list[Finding]:
    if not host.groups:
        return [Finding("IOMMU groups", False, "none",
                        "enable VT-d / AMD-Vi / SMMU in the firmware; on Intel boot with intel_iommu=on "
                        "(in a virtual machine, add a virtual IOMMU)")]
    findings = [Finding("IOMMU groups", True, str(len(host.groups)))]
    for group in host.groups:
        devices = ", ".join(f"{d.address}{f' [{d.ids}]' if d.ids else ''} ({d.driver or 'no driver'})"
                            for d in group.devices)
        if group.noiommu:
            findings.append(Finding(f"group {group.number}", None, f"{devices}: no IOMMU",
                                    "nothing can be mapped for it; Type1Container(..., noiommu=True) opens it"))
            continue
        ready = group.node.exists and group.viable
        advice = ""
        if not ready:
            to_bind = [d for d in group.devices if not is_vfio(d.driver)] or list(group.devices)
            steps = "; ".join(f"driverctl set-override {d.address} {vfio_driver(d)}" for d in to_bind)
            advice = f"to use it, bind every device of the group to its VFIO driver: {steps}"
        elif not group.node.accessible:
            ready, advice = False, f"give your user access: chown \"$USER\" {group.node.path}"
        findings.append(Finding(f"group {group.number}", ready, devices or "empty", advice))
    return findings


def _container(host: HostInfo) -> list[Finding]:
    if host.container is None:
        findings = [Finding("IOVA ranges", False, f"unknown: {host.container_error}",
                            "they are told by a container with a group: make one of the groups above usable")]
        windows = sorted({window for group in host.groups for window in group.reserved})
        if windows:
            findings.append(Finding("reserved IOVA", None,
                                    ", ".join(f"{first:#x}-{last:#x} {kind}" for first, last, kind in windows)))
        return findings
    info = host.container
    ranges = ", ".join(f"{first:#x}-{last:#x}" for first, last in info.ranges) or "no restriction"
    return [Finding("IOVA ranges", True, f"{ranges} (group {info.group})"),
            Finding("IOMMU page sizes", True, _page_sizes(info.pgsizes)),
            Finding("mappings left", None, "not reported" if info.dma_avail is None else str(info.dma_avail))]


def _locked(host: HostInfo) -> Finding:
    locked = host.locked
    value = f"limit {amount(locked.soft)} (hard {amount(locked.hard)}), {amount(locked.used)} used, " \
            f"{amount(host.physical)} of memory"
    if locked.cap_ipc_lock:
        return Finding("locked memory", True, f"{value}; CAP_IPC_LOCK lifts the limit")
    if locked.soft is None or locked.soft >= host.physical:
        return Finding("locked memory", True, value)
    kib = host.physical >> 10
    return Finding("locked memory", False, f"{value}: devices can reach {amount(locked.available)} more",
                   f"ulimit -l {kib}, 'memlock' in /etc/security/limits.conf, or systemd LimitMEMLOCK=infinity")


def _huge_pages(host: HostInfo) -> list[Finding]:
    if not host.hugepages:
        return [Finding("huge pages", False, "none in this kernel", "a kernel with CONFIG_HUGETLBFS")]
    findings = []
    for pool in host.hugepages:
        way = "sysctl vm.nr_hugepages=512" if pool.pgsize == 2 << 20 else \
            f"echo 4 > /sys/kernel/mm/hugepages/hugepages-{pool.pgsize >> 10}kB/nr_hugepages"
        value = f"{pool.free} free of {pool.reserved}"
        findings.append(Finding(f"huge pages {amount(pool.pgsize)}", bool(pool.free), value, "" if pool.free else way))
    return findings


def _userfaultfd(host: HostInfo) -> Finding:
    if host.userfaultfd_node.accessible:
        return Finding("userfaultfd", True, host.userfaultfd_node.path)
    if host.userfaultfd_unprivileged is None:
        return Finding("userfaultfd", False, "not in this kernel", "a kernel with CONFIG_USERFAULTFD")
    if host.userfaultfd_unprivileged or host.cap_sys_ptrace:
        return Finding("userfaultfd", True, "by system call")
    return Finding("userfaultfd", False, "user-mode faults only",
                   f"sysctl vm.unprivileged_userfaultfd=1, or access to {host.userfaultfd_node.path}")


def findings(host: HostInfo) -> list[Finding]:
    """Judge what was read."""
    limit = host.dma_entry_limit
    return [
        Finding("kernel", None, host.kernel),
        _node("VFIO container", host.container_node, "modprobe vfio-pci (a kernel with CONFIG_VFIO_CONTAINER)"),
        _node("iommufd", host.iommufd_node, "modprobe iommufd (a kernel from 6.2 on with CONFIG_IOMMUFD)"),
        Finding("VFIO device nodes", True, ", ".join(host.cdevs)) if host.cdevs else
        Finding("VFIO device nodes", False, "none in /dev/vfio/devices",
                "bind a device to vfio-pci (a kernel from 6.6 on with CONFIG_VFIO_DEVICE_CDEV)"),
        *_groups(host),
        *_container(host),
        Finding("CPU page size", None, amount(host.pgsize)),
        Finding("mappings per container", None, "vfio_iommu_type1 is not loaded" if limit is None else
                f"{limit} (raise it: modprobe vfio_iommu_type1 dma_entry_limit=N)"),
        _locked(host),
        *_huge_pages(host),
        _userfaultfd(host),
        Finding("software backend", True, "always: open_address_space(\"software\")"),
    ]


def _plain(found: list[Finding]) -> str:
    words = {True: "yes", False: "no", None: "-"}
    width = max(len(finding.topic) for finding in found)
    lines = []
    for topic, ok, value, advice in found:
        lines.append(f"{topic:<{width}}  {words[ok]:<3}  {value}")
        if advice:
            lines.append(f"{'':<{width}}       -> {advice}")
    return "\n".join(lines)


def _table(found: list[Finding]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(_plain(found))
        return
    table = Table(title="vfiodma probe")
    for heading in ("what", "", "found", "to do"):
        table.add_column(heading, overflow="fold")
    marks = {True: Text("yes", "green"), False: Text("no", "yellow"), None: Text("")}
    for topic, ok, value, advice in found:
        table.add_row(Text(topic), marks[ok], Text(value), Text(advice))
    Console().print(table)


def probe(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show what this host offers: devices, groups, IOVA ranges, limits; and what to do where something is missing."""
    host = read_host()
    found = findings(host)
    if as_json:
        print(json.dumps({"findings": [finding._asdict() for finding in found], "host": asdict(host)}, indent=2))
    elif sys.stdout.isatty():
        _table(found)
    else:
        print(_plain(found))
