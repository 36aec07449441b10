"""Software devices whose state is worth moving, and what moves it from one machine to another."""
import contextlib
import errno
import struct
import zlib

from vfiodma import SoftwareGroup, SoftwareVfio, VfioDevice
from vfiodma._core.errno import error
from vfiodma.devices.migration import MigrationState

BLOCK = 64
STANDING = (MigrationState.STOP, MigrationState.STOP_COPY, MigrationState.RESUMING)


class Chip:
    """A device that is a block of memory, with the part that migrates it.

    Its state travels as records: index, content, CRC-32; the last one has index 2**32 - 1 and the number of changes.
    ``log`` has every arc; ``fail`` maps what is asked of it ((from, to), "initial", "dirty", "final", "load") to the
    errno that it answers with, once.
    """

    def __init__(self, address, blocks=16, flags=7, log=None):
        self.address = address
        self.port = None
        self.migration = self
        self.flags = flags
        self.state = bytearray(blocks * BLOCK)
        self.changes = 0
        self.dirty_blocks = set()
        self.again = False
        self.log = [] if log is None else log
        self.fail = {}
        self.now = MigrationState.RUNNING

    def poke(self, block, value):
        self.state[block * BLOCK:(block + 1) * BLOCK] = struct.pack("<I", value) * (BLOCK // 4)
        self.changes += 1
        self.dirty_blocks.add(block)

    def content(self):
        return bytes(self.state), self.changes

    def connect(self, port):
        self.port = port

    def disconnect(self):
        self.port = None

    def region_size(self, index):
        return 0

    def region_read(self, index, offset, size):
        return bytes(size)

    def region_write(self, index, offset, data):
        pass

    def irq_count(self, index):
        return 0

    def reset(self):
        self.state[:] = bytes(len(self.state))
        self.changes = 0

    def _may_fail(self, what):
        code = self.fail.pop(what, 0)
        if code:
            raise error(code, "chip")

    def arc(self, current, following):
        self._may_fail((current, following))
        self.now = MigrationState(following)
        self.log.append((self.address, MigrationState(current), self.now))

    @staticmethod
    def _record(index, content):
        body = struct.pack("<I", index) + content
        return body + struct.pack("<I", zlib.crc32(body))

    def _blocks(self, which):
        return b"".join(self._record(index, self.state[index * BLOCK:(index + 1) * BLOCK]) for index in sorted(which))

    def reinit(self):
        again, self.again = self.again, False
        return again

    def initial(self):
        self._may_fail("initial")
        self.dirty_blocks.clear()
        return self._blocks(range(len(self.state) // BLOCK))

    def dirty_bytes(self):
        return len(self.dirty_blocks) * (BLOCK + 8)

    def dirty(self):
        self._may_fail("dirty")
        blocks, self.dirty_blocks = self.dirty_blocks, set()
        return self._blocks(blocks)

    def final(self):
        self._may_fail("final")
        assert self.now in STANDING
        blocks = self.dirty_blocks if self.saved_before else range(len(self.state) // BLOCK)
        return self._blocks(blocks) + self._record(0xFFFFFFFF, struct.pack("<Q", self.changes).ljust(BLOCK, b"\0"))

    @property
    def saved_before(self):
        arcs = [arc[1:] for arc in self.log if arc[0] == self.address]
        return arcs[-1][0] in (MigrationState.PRE_COPY, MigrationState.PRE_COPY_P2P)

    def size(self):
        return len(self.state) // BLOCK * (BLOCK + 8) + BLOCK + 8

    def load(self, data):
        self._may_fail("load")
        state, changes = bytearray(len(self.state)), None
        if len(data) % (BLOCK + 8):
            raise error(errno.EINVAL, "chip_load")
        for at in range(0, len(data), BLOCK + 8):
            index, = struct.unpack_from("<I", data, at)
            content = data[at + 4:at + 4 + BLOCK]
            if self._record(index, content) != data[at:at + BLOCK + 8] or changes is not None:
                raise error(errno.EIO, "chip_load")
            if index == 0xFFFFFFFF:
                changes, = struct.unpack_from("<Q", content)
            elif index < len(state) // BLOCK:
                state[index * BLOCK:(index + 1) * BLOCK] = content
            else:
                raise error(errno.EIO, "chip_load")
        if changes is None:
            raise error(errno.EINVAL, "chip_load")
        self.state[:], self.changes = state, changes
        self.dirty_blocks = set()


@contextlib.contextmanager
def machine(*devices, kernel="7.2"):
    """Yield the open VfioDevices of software devices."""
    vfio = SoftwareVfio(kernel=kernel, groups=[SoftwareGroup(1, list(devices))], memlock_limit=None)
    with vfio.container() as container, contextlib.ExitStack() as stack:
        yield [stack.enter_context(VfioDevice.open(container, device.address)) for device in devices]


def addresses(count):
    return [f"0000:00:10.{number}" for number in range(count)]


def send(states, sinks):
    """Move what there is for now."""
    for name, chunk in states.chunks():
        assert sinks.take(name, bytes(chunk))


def finish(states, sinks):
    """Stop here, go on there."""
    states.quiesce()
    for name, chunk in states.final_chunks():
        assert sinks.take(name, bytes(chunk))
    sinks.load()
    sinks.run()
