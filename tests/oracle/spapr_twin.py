"""SoftwareVfio(platform="powernv") and the oracle side by side."""
import struct

from vfiodma import SoftwareGroup, SoftwareVfio
from vfiodma.backends.software import registered
from vfiodma.backends.software.spapr import TceGroup as RealTce

from . import spapr
from .memory import PAGE
from .spapr import SpaprMachine, TceGroup
from .twin import Twin, show

#: Memory of larger pages, as far as the model of both is concerned.
BIG = 1 << 16


class SpaprTwin(Twin):
    """One POWER host, twice.  ``big``: (first, end) of memory that is made of 64 KiB pages."""

    def __init__(self, memory, kernel, groups, big):
        self.big, self.touched = big, {}
        self.old_page_size, registered.page_size = registered.page_size, self.backing
        super().__init__(memory, kernel, groups)

    def hosts(self, kernel, groups):
        return (SoftwareVfio(kernel, [SoftwareGroup(n, [self.device(n)], **{**g, "tce": self.real_tce(g.get("tce"))})
                                      for n, g in groups.items()], platform="powernv", memlock_limit=2048 * PAGE),
                SpaprMachine(kernel, [TceGroup(n, [self.device(n)], **g) for n, g in groups.items()], self.fake,
                             self.process, foreign_open=lambda fd: fd == 0, backing=self.backing))

    @staticmethod
    def real_tce(tce):
        return False if tce is False else RealTce(**(tce or {}))

    def backing(self, vaddr, size):
        first, end = self.big
        return BIG if size and first <= vaddr and vaddr + size <= end else PAGE

    def restore(self):
        registered.page_size = self.old_page_size
        super().restore()

    def limit(self, pages):
        self.script.append(f"limit of locked memory = {pages} pages")
        self.real._memlock_limit = pages * PAGE
        self.process.limit = pages

    def check(self):
        self.agree("locked pages", self.real.locked_pages() - self.before, self.process.charged)
        self.agree("registered", {key: users for key, (_, users) in self.real._registered.shared.items()},
                   {(region.vaddr, region.size): region.users for region in self.oracle.registry})
        for name, (real_fd, _) in self.fds.items():
            if name[0] == "c" and (instance := self.instance(name)):
                self.check_tables(name, self.real._files[real_fd].driver, instance)
        for number, group in self.oracle.groups.items():
            self.agree(f"endpoint of g{number}", (real := self.real._groups[int(number)].endpoint) and real.state,
                       group.pe and group.pe.state())

    def check_tables(self, name, real, oracle):
        for slot, (window, expected) in enumerate(zip(real.windows, oracle.tables, strict=True)):
            self.agree(f"{name}: window {slot}",
                       window and (window.start, window.size, window.shift, window.levels, window.charged),
                       expected and (expected.start, expected.size, expected.shift, expected.levels, expected.charged))
            if expected is None:
                continue
            self.touched.setdefault(expected, set()).update(expected.entries)
            for index in self.touched[expected]:
                self.agree(f"{name}: window {slot}, entry {index:#x}", real.tables.entry(slot, index),
                           expected.entries.get(index, (0, 0))[:2])

    def tce(self, name, command, form, *values, tail=None):
        """An ioctl of a container with a struct of these values, the first of them argsz."""
        text = f"{command}({name}, {show(values)}, room={tail})"
        return self.call(text, name, getattr(spapr, command), 0, struct.pack(form, *values), tail=tail)

    def map_tce(self, name, iova, vaddr, size, flags, argsz=32, tail=None):
        return self.tce(name, "MAP", "=IIQQQ", argsz, flags, vaddr, iova, size, tail=tail)

    def dma(self, group, iova, size, data=None):
        """Read or write as the group's device; compare bytes, and whether it was refused."""
        port = self.real._groups[int(group[1:])].ports[self.device(int(group[1:]))]

        def real():
            try:
                return port.read(iova, size) if data is None else port.write(iova, data) or b""
            except OSError:
                return "refused"

        text = f"dma_{'read' if data is None else 'write'}({group}, {iova:#x}, {size})"
        wanted = self.oracle.groups[group[1:]]
        wanted = wanted.container.type1.dma(wanted, iova, size, data)
        self.script.append(text)
        self.agree(text, real(), "refused" if wanted is None else wanted)

    def platform(self, group, **changes):
        """Change what an endpoint's platform does."""
        self.script.append(f"endpoint of {group}: {show(changes)}")
        for name, value in changes.items():
            setattr(self.oracle.groups[group[1:]].pe, {"enabled": "on"}.get(name, name), value)
            setattr(self.real._groups[int(group[1:])].endpoint, name, value)
