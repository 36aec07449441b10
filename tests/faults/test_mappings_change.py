"""Threads map, unmap, re-map and re-protect guest memory, and write through it by DMA, while Migration runs.

They use nothing but the public API, and nobody holds them back: no call may be refused, no page be lost.
"""
import contextlib
import random
import threading

from vfiodma import GuestMemory, IoAddressSpace, Prot, SoftwareGroup, open_backend
from vfiodma.devices.dma_writer import DmaWriter
from vfiodma.migration import Migration, PageReceiver, Round
from vfiodma.migration.stream import Phase
from vfiodma.migration.transport import listen

PAGE, SIZE, WINDOW = 4096, 2 << 20, 1 << 30
DEVICES = ["0000:00:16.0", "0000:00:16.1"]


class Mapper(threading.Thread):
    """Has windows of its own in the address space: a device writes through each as long as it is there."""

    def __init__(self, ioas, port, memory, number):
        super().__init__()
        self.ioas, self.port, self.memory = ioas, port, memory
        self.rng, self.base = random.Random(number), WINDOW * (number + 1)
        self.halted, self.failure, self.count = threading.Event(), None, 0

    def write(self, iova, size):
        at = self.rng.randrange(size - 8)
        self.port.write(iova + at, self.rng.randbytes(8))

    def run(self):
        try:
            while not self.halted.wait(0.0005):
                size = PAGE * self.rng.randrange(1, 9)
                offset = self.rng.randrange((SIZE - size) // PAGE) * PAGE
                iova = self.base + self.rng.randrange(64) * 16 * PAGE
                self.ioas.map(self.memory.region, iova, offset=offset, size=size)
                self.write(iova, size)
                self.ioas.unmap(iova)       # what was just written is in nobody's log but the unmap's
                self.ioas.map(self.memory.region, iova + PAGE, offset=offset, size=size)
                self.write(iova + PAGE, size)
                self.ioas.unmap(iova + PAGE)
                self.ioas.map(self.memory.region, iova, offset=offset, size=size, prot=Prot.READ)
                self.ioas.unmap(iova)
                self.count += 1
        except BaseException as exc:
            self.failure = exc


class Machine:
    """Mappers and their devices."""

    def __init__(self, mappers):
        self.mappers = mappers

    def stop(self):
        for mapper in self.mappers:
            mapper.halted.set()
        for mapper in self.mappers:
            mapper.join()

    def resume(self):
        raise AssertionError("the migration failed")

    def state(self):
        return {}


def test_mappings_that_come_and_go_while_a_guest_moves_lose_no_page(tmp_path):
    phases = []
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(GuestMemory.memfd(SIZE))
        target = stack.enter_context(GuestMemory.memfd(SIZE))
        memory.write(0, random.Random(1).randbytes(SIZE))
        backend = open_backend("software", groups=[SoftwareGroup(1, [DmaWriter(name) for name in DEVICES])],
                               memlock_limit=None)
        stack.callback(backend.close)
        ioas = stack.enter_context(IoAddressSpace(backend))
        ioas.map(memory)
        mappers = [Mapper(ioas, port, memory, number) for number, port in enumerate(backend.ports.values())]
        machine = Machine(mappers)
        stack.callback(machine.stop)
        listener = stack.enter_context(listen(f"unix:{tmp_path}/guest", timeout=10))

        def receive():
            with contextlib.closing(listener.accept()) as transport, \
                    PageReceiver(transport, lambda hello: target, fresh=True) as receiver:
                phases.append(receiver.serve())

        destination = threading.Thread(target=receive)
        destination.start()
        for mapper in mappers:
            mapper.start()
        rounds = []
        result = Migration(listener.url, memory, machine, ioas=ioas, downtime_limit=1e-9, max_rounds=40, verify=True,
                           on_event=lambda event: rounds.append(event) if isinstance(event, Round) else None).run()
        destination.join(20)
        assert phases == [Phase.OWNER] and result.rounds[-1].final
        assert [mapper.failure for mapper in mappers] == [None] * len(mappers)
        assert memory.read(0, SIZE) == target.read(0, SIZE)
        # They did change mappings while it ran, and what they wrote came again.
        assert min(mapper.count for mapper in mappers) > 0 and sum(done.pages for done in rounds[1:]) > 0
        print(f"{len(rounds)} rounds, {sum(mapper.count for mapper in mappers)} changes")
