"""Migration of software devices: the state machine, the data descriptors, precopy information."""
import ctypes
import errno
import itertools
import struct

import pytest
from software_card import Card
from software_device import fails, opened

from vfiodma._core.errno import error
from vfiodma.backends.software.device.migration import next_state
from vfiodma.devices.edu import EduDevice
from vfiodma.devices.edu_driver import EduDriver
from vfiodma.devices.migration import MigrationState
from vfiodma.devices.pci import VfioDevice
from vfiodma.uapi import vfio as abi

ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = range(8)
HAS_STOP_COPY, HAS_P2P, HAS_PRE_COPY = 1, 2, 4
CAPABILITIES = [HAS_STOP_COPY | p2p | precopy for p2p in (0, HAS_P2P) for precopy in (0, HAS_PRE_COPY)]
ADDRESS = "0000:00:10.0"

# The arcs that a driver implements, as the interface defines them, without and with the optional states.
ARCS = {(STOP, STOP_COPY), (STOP_COPY, STOP), (STOP, RESUMING), (RESUMING, STOP)}
ARCS_WITH = {
    0: ARCS | {(RUNNING, STOP), (STOP, RUNNING)},
    HAS_P2P: ARCS | {(RUNNING, RUNNING_P2P), (RUNNING_P2P, RUNNING), (RUNNING_P2P, STOP), (STOP, RUNNING_P2P)},
}
ARCS_WITH[HAS_PRE_COPY] = ARCS_WITH[0] | {(RUNNING, PRE_COPY), (PRE_COPY, RUNNING), (PRE_COPY, STOP_COPY)}
ARCS_WITH[HAS_P2P | HAS_PRE_COPY] = ARCS_WITH[HAS_P2P] | {
    (RUNNING, PRE_COPY), (PRE_COPY, RUNNING), (PRE_COPY, PRE_COPY_P2P), (PRE_COPY_P2P, PRE_COPY),
    (RUNNING_P2P, PRE_COPY_P2P), (PRE_COPY_P2P, RUNNING_P2P), (PRE_COPY_P2P, STOP_COPY)}


def states_of(flags):
    return [STOP, RUNNING, STOP_COPY, RESUMING] + [RUNNING_P2P] * bool(flags & HAS_P2P) \
        + [PRE_COPY] * bool(flags & HAS_PRE_COPY) + [PRE_COPY_P2P] * (flags == 7)


def shortest(flags, current, target):
    """Ways of fewest arcs."""
    ways, arcs = [[current]], ARCS_WITH[flags & ~HAS_STOP_COPY]
    for _ in range(8):
        if any(way[-1] == target for way in ways):
            return [way for way in ways if way[-1] == target]
        ways = [[*way, after] for way in ways for before, after in arcs if before == way[-1]]
    return []


class Recorder:
    """A device's part in its migration that only remembers."""

    def __init__(self, flags=7):
        self.flags = flags
        self.arcs = []
        self.fail_at = None
        self.changed = b""
        self.loaded = None
        self.refuse = 0

    def arc(self, current, following):
        if (current, following) == self.fail_at:
            raise error(errno.EIO, "arc")
        self.arcs.append((current, following))

    def initial(self):
        return b"initial"

    def dirty_bytes(self):
        return len(self.changed)

    def dirty(self):
        data, self.changed = self.changed, b""
        return data

    def final(self):
        return b"final"

    def size(self):
        return 1234

    def load(self, data):
        if self.refuse:
            raise error(self.refuse, "load")
        self.loaded = data


def set_state(device, state):
    """Return the new state's descriptor."""
    asked = struct.pack("=Ii", state, 77)
    given, fd = struct.unpack("=Ii", device.set(abi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, asked))
    assert given == state
    return fd


def state_of(device):
    state, fd = struct.unpack("=Ii", device.get(abi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, struct.pack("=Ii", 99, 99)))
    assert fd == -1
    return state


@pytest.fixture
def device():
    with opened(Card(migration=Recorder())) as device:
        yield device


# ---- the table

@pytest.mark.parametrize("flags", CAPABILITIES)
def test_every_pair_of_states_is_joined_by_arcs_of_a_driver(flags):
    for current, target in itertools.product(states_of(flags), repeat=2):
        if current == target:
            continue
        way = [current]
        while way[-1] != target:
            following = next_state(way[-1], target, flags)
            if following == ERROR:
                assert current == STOP_COPY and target in (PRE_COPY, PRE_COPY_P2P)
                break
            assert (way[-1], following) in ARCS_WITH[flags & ~HAS_STOP_COPY], (current, target, way)
            way.append(following)
            assert len(way) < 8
        else:
            assert not (current == STOP_COPY and target in (PRE_COPY, PRE_COPY_P2P))
            # No way is longer than need be, but that no device starts saving or resuming on its way elsewhere.
            assert len(way) == len(shortest(flags, current, target)[0]) or PRE_COPY in (current, target) \
                or PRE_COPY_P2P in (current, target)
            assert not set(way[1:-1]) & {RESUMING}


@pytest.mark.parametrize("flags", [0, *CAPABILITIES])
def test_states_that_a_device_lacks_can_not_be_reached(flags):
    have = states_of(flags) if flags else []
    for current, target in itertools.product(range(10), repeat=2):
        if current not in have or target not in have:
            assert next_state(current, target, flags) == ERROR


@pytest.mark.parametrize("flags", CAPABILITIES)
def test_a_request_does_the_arcs_on_its_way_and_returns_its_state(flags):
    for current, target in itertools.product(states_of(flags), range(10)):
        recorder = Recorder(flags)
        with opened(Card(migration=recorder)) as device:
            begun = set_state(device, current)
            recorder.arcs.clear()
            if current == target:
                assert set_state(device, target) == -1 and not recorder.arcs
                continue
            if next_state(current, target, flags) == ERROR:
                with fails(errno.EINVAL):
                    set_state(device, target)
                assert state_of(device) == current and not recorder.arcs
                continue
            fd = set_state(device, target)
            assert state_of(device) == target
            assert recorder.arcs[0][0] == current and recorder.arcs[-1][1] == target
            assert all(before[1] == after[0] for before, after in itertools.pairwise(recorder.arcs))
            saving = (STOP_COPY, PRE_COPY, PRE_COPY_P2P)
            assert (fd >= 0) == (target == RESUMING or (target in saving and current not in saving))
            for number in (begun, fd):
                if number >= 0:
                    device.vfio.close(number)


# ---- the feature

def test_a_running_device_tells_what_it_can(device):
    assert device.get(abi.VFIO_DEVICE_FEATURE_MIGRATION, bytes(8)) == struct.pack("=Q", 7)
    assert device.get(abi.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, bytes(8)) == struct.pack("=Q", 1234)
    assert state_of(device) == RUNNING


def test_without_migration_every_feature_of_it_is_unsupported():
    with opened(Card()) as device:
        for number in (1, 2, 9):
            with fails(errno.ENOTTY):
                device.feature(number, abi.VFIO_DEVICE_FEATURE_PROBE)
        with fails(errno.EINVAL):
            device.feature(12, abi.VFIO_DEVICE_FEATURE_PROBE)


def test_features_came_one_by_one():
    for kernel, absent in (("5.12", (1, 2, 9, 12)), ("6.1", (9, 12)), ("6.12", (12,))):
        with opened(Card(migration=Recorder()), kernel=kernel) as device:
            for number in (1, 2, 9, 12):
                if number in absent:
                    with fails(errno.ENOTTY):
                        device.feature(number, abi.VFIO_DEVICE_FEATURE_PROBE)
                else:
                    device.feature(number, abi.VFIO_DEVICE_FEATURE_PROBE)


def test_an_error_writes_the_descriptor_back_as_none(device):
    buffer = bytearray(struct.pack("=IIIi", 16, abi.VFIO_DEVICE_FEATURE_SET | 2, 9, 77))
    view = (ctypes.c_char * 16).from_buffer(buffer)
    with fails(errno.EINVAL):
        device.vfio.ioctl(device.fd, abi.VFIO_DEVICE_FEATURE, ctypes.addressof(view))
    assert struct.unpack("=IIIi", buffer)[2:] == (9, -1)


def test_a_failing_arc_leaves_the_state_before_it(device):
    device.device.migration.fail_at = (RUNNING_P2P, STOP)
    with fails(errno.EIO):
        set_state(device, STOP_COPY)
    assert state_of(device) == RUNNING_P2P
    device.device.migration.fail_at = None
    assert set_state(device, STOP_COPY) >= 0


def test_a_state_that_can_not_be_loaded_is_an_error_that_only_a_reset_ends(device):
    set_state(device, RESUMING)
    device.device.migration.refuse = errno.EIO
    with fails(errno.EIO):
        set_state(device, RUNNING)
    assert state_of(device) == ERROR
    for target in (STOP, RUNNING, RESUMING, STOP_COPY):
        with fails(errno.EINVAL):
            set_state(device, target)
    device.ioctl(abi.VFIO_DEVICE_RESET)
    assert state_of(device) == RUNNING
    assert device.device.migration.arcs[-1] == (ERROR, RUNNING)


# ---- data

def test_saving_stopped_reads_to_an_end(device):
    fd, vfio = set_state(device, STOP_COPY), device.vfio
    assert vfio.read(fd, 3) + vfio.read(fd, 100) + vfio.read(fd, 100) == b"final"
    with fails(errno.EBADF):
        vfio.write(fd, b"x")
    with fails(errno.ESPIPE):
        vfio.pread(fd, 1, 0)
    set_state(device, RUNNING)
    with fails(errno.ENODEV):
        vfio.read(fd, 1)
    vfio.close(fd)


def test_saving_in_pre_copy_goes_on_into_stop_copy(device):
    fd, vfio = set_state(device, PRE_COPY), device.vfio

    def info():
        data = device.ioctl(abi.VFIO_MIG_GET_PRECOPY_INFO, struct.pack("=IIQQ", 24, 9, 9, 9), fd=fd)
        return struct.unpack("=IIQQ", data)[2:]
    assert info() == (7, 0)
    assert vfio.read(fd, 4) == b"init"
    assert info() == (3, 0)
    assert vfio.read(fd, 10) == b"ial"
    with fails(errno.ENOMSG):
        vfio.read(fd, 10)
    assert vfio.read(fd, 0) == b""
    device.device.migration.changed = b"changed"
    assert info() == (0, 7)
    assert vfio.read(fd, 3) == b"cha"
    assert info() == (0, 4)
    assert set_state(device, PRE_COPY_P2P) == -1
    assert set_state(device, STOP_COPY) == -1
    with fails(errno.EINVAL):
        info()
    assert vfio.read(fd, 100) == b"ngedfinal"
    assert vfio.read(fd, 100) == b""
    vfio.close(fd)


def test_precopy_information_needs_its_size(device):
    fd = set_state(device, PRE_COPY)
    with fails(errno.EINVAL):
        device.ioctl(abi.VFIO_MIG_GET_PRECOPY_INFO, struct.pack("=I", 23).ljust(24, b"\0"), fd=fd)
    with fails(errno.ENOTTY):
        device.ioctl(abi.VFIO_DEVICE_GET_INFO, bytes(24), fd=fd)
    device.set(abi.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2)
    data = device.ioctl(abi.VFIO_MIG_GET_PRECOPY_INFO, struct.pack("=IIQQ", 24, 9, 9, 9), fd=fd)
    assert struct.unpack_from("=I", data, 4) == (0,)        # the flags mean something now
    device.vfio.close(fd)


def test_what_was_written_is_loaded_when_the_device_stops_resuming(device):
    fd, vfio = set_state(device, RESUMING), device.vfio
    assert vfio.write(fd, b"one ") == 4 and vfio.write(fd, bytearray(b"two")) == 3
    with fails(errno.EBADF):
        vfio.read(fd, 1)
    assert device.device.migration.loaded is None
    set_state(device, STOP)
    assert device.device.migration.loaded == b"one two"
    with fails(errno.ENODEV):
        vfio.write(fd, b"x")
    vfio.close(fd)


def test_an_incomplete_state_can_be_completed(device):
    fd = set_state(device, RESUMING)
    device.vfio.write(fd, b"half")
    device.device.migration.refuse = errno.EINVAL
    with fails(errno.EINVAL):
        set_state(device, RUNNING)
    assert state_of(device) == RESUMING
    device.device.migration.refuse = 0
    device.vfio.write(fd, b" and half")
    set_state(device, RUNNING)
    assert device.device.migration.loaded == b"half and half"


def test_closing_the_device_ends_its_migration(device):
    fd = set_state(device, STOP_COPY)
    device.vfio.close(device.fd)
    device.fd = -1
    second = device.vfio._files[fd]
    for address in list(device.container._groups[0].open_devices):      # the container has one of its own
        assert address == device.device.address
    device.container.close()
    with fails(errno.ENODEV):
        second.read(1)
    device.vfio.close(fd)
    assert device.device.migration.arcs[-1] == (ERROR, RUNNING)


# ---- the example

def test_an_edu_device_moves_to_another_one():
    source, target = EduDevice(ADDRESS, migratable=True), EduDevice(ADDRESS, migratable=True)
    with opened(source) as here, opened(target) as there:
        with VfioDevice.open(here.container, ADDRESS) as old, VfioDevice.open(there.container, ADDRESS) as new:
            driver = EduDriver(old)
            driver.factorial(5)
            driver.invert(0x1234)
            source.buffer[:7] = b"content"
            stream = old.migration.set_state(MigrationState.PRE_COPY)
            assert stream.precopy_info()[1] == 0
            data = stream.read(1 << 16)
            assert stream.read(1) is None
            source.buffer[:7] = b"changed"
            driver.invert(0x77)
            assert stream.precopy_info().dirty_bytes == 2 * 12 + 256 + 17       # a block, and the registers
            data += stream.read(1 << 16)
            old.migration.set_state(MigrationState.STOP_COPY)
            data += stream.readall()
            sink = new.migration.set_state(MigrationState.RESUMING)
            assert sink.write(data) == len(data)
            new.migration.set_state(MigrationState.RUNNING)
            assert target.buffer[:7] == b"changed"
            assert new.regions[0].read_u32(0x08) == 120
            assert new.regions[0].read_u32(0x04) == 0xFFFFFFFF ^ 0x77
            assert new.config.bus_master


@pytest.mark.parametrize("damage, code", [
    (lambda data: data[:-1], errno.EINVAL), (lambda data: b"", errno.EINVAL), (lambda data: data[:4109], errno.EINVAL),
    (lambda data: data[:100] + b"!" + data[101:], errno.EIO), (lambda data: data + b"x", errno.EINVAL)])
def test_a_damaged_edu_state_is_refused(damage, code):
    edu = EduDevice(ADDRESS, migratable=True)
    with opened(edu) as device:
        fd = set_state(device, STOP_COPY)
        data = device.vfio.read(fd, 1 << 16)
        device.vfio.close(fd)
        fd = set_state(device, RESUMING)
        device.vfio.write(fd, damage(data))
        with fails(code):
            set_state(device, RUNNING)
        assert state_of(device) == (ERROR if code == errno.EIO else RESUMING)
        device.vfio.close(fd)


def test_a_stopped_edu_device_does_its_dma_when_it_runs_again():
    edu = EduDevice(ADDRESS, migratable=True)
    with opened(edu) as device:
        device.vfio.pwrite(device.fd, b"\x06\0", 7 << 40 | 4)
        set_state(device, STOP)
        for register, value in ((0x80, 0x40000), (0x88, 0x100000), (0x90, 16), (0x98, 3)):
            device.vfio.pwrite(device.fd, struct.pack("=I", value), register)
        assert edu.port.fault_count == 0
        assert device.vfio.pread(device.fd, 4, 0x98) == struct.pack("=I", 3)
        set_state(device, RUNNING)
        assert edu.port.fault_count == 1            # nothing is mapped there
        assert device.vfio.pread(device.fd, 4, 0x98) == struct.pack("=I", 2)
