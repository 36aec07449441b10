"""The device side of a migration: order of the states, chunks, what is left, and what an error leaves behind."""
import contextlib
import errno
import itertools
import os
import struct

import pytest
from migrating_devices import Chip, addresses, finish, machine, send

from vfiodma import SoftwareGroup, SoftwareVfio, VfioDevice, open_backend
from vfiodma.devices import EduDevice, EduDriver
from vfiodma.devices.migration import MigrationFlags, MigrationState
from vfiodma.errors import InvalidArgumentError, MigrationError, ProtocolError, UnsupportedError
from vfiodma.migration.device_group import LAST, PREFIX, DeviceSinks, DeviceStates
from vfiodma.migration.device_state import DeviceStateSink, DeviceStateSource, Pending, StateSink, StateSource

STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = list(MigrationState)[1:]
ALL_FLAGS = [1, 3, 5, 7]


def chips(count, flags=7, blocks=16, log=None):
    return [Chip(address, blocks, flags, log) for address in addresses(count)]


def states(devices):
    return [device.migration.state for device in devices]


# ---- the whole way

@pytest.mark.parametrize("flags", ALL_FLAGS)
@pytest.mark.parametrize("chunk", [1, 71, 1 << 20])
def test_devices_move_while_they_change(flags, chunk):
    here, there = chips(3, flags), chips(3, flags)
    with machine(*here) as old, machine(*there) as new:
        source = DeviceStates(old, peer_to_peer=bool(flags & 2), chunk=chunk)
        sinks = DeviceSinks(new, peer_to_peer=False)
        sinks.prepare()
        source.start()
        assert states(old) == [PRE_COPY if flags & 4 else RUNNING] * 3
        for turn in range(4):
            for number, chip in enumerate(here):
                chip.poke(turn + number, 1000 * turn + number)
            send(source, sinks)
        here[1].poke(9, 77)
        finish(source, sinks)
        assert [chip.content() for chip in there] == [chip.content() for chip in here]
        assert states(old) == [STOP_COPY] * 3 and states(new) == [RUNNING] * 3


def test_both_satisfy_the_protocols():
    with machine(*chips(1)) as [device]:
        assert isinstance(DeviceStateSource(device), StateSource)
        assert isinstance(DeviceStateSink(device), StateSink)


class Clock:
    """A device that a VMM emulates itself, both ways: its state is a number."""

    name = "clock"

    def __init__(self, ticks=0):
        self.ticks, self.calls, self.state = ticks, [], b""

    def preflight(self):
        return MigrationFlags.STOP_COPY | MigrationFlags.P2P

    def start(self):
        self.state = None

    def pending(self):
        return Pending(0, 0, 8)

    def readinto(self, buffer):
        piece, self.state = self.state[:len(buffer)], self.state[len(buffer):]
        buffer[:len(piece)] = piece
        return len(piece)

    def stop(self):
        self.state = self.ticks.to_bytes(8, "little")

    def prepare(self):
        self.state = b""

    def write(self, data):
        self.state += data

    def load(self):
        self.ticks = int.from_bytes(self.state, "little")

    def quiesce(self):
        self.calls.append("quiesce")

    def resume_p2p(self):
        self.calls.append("resume_p2p")
        return False

    def resume(self):
        self.calls.append("resume")
        return False

    def reset(self):
        self.ticks = 0

    def close(self):
        pass


def test_a_vmm_brings_devices_of_its_own():
    here, there = chips(1), chips(1)
    with machine(*here) as old, machine(*there) as new:
        clock, other = Clock(123456), Clock()
        source, sinks = DeviceStates([clock, *old], chunk=3), DeviceSinks([*new, other])
        sinks.prepare()
        source.start()
        here[0].poke(1, 1)
        send(source, sinks)
        finish(source, sinks)
        assert other.ticks == 123456 and there[0].content() == here[0].content()
        assert clock.calls == ["quiesce"] and other.calls == ["resume_p2p", "resume"]
    for wrong in ("0000:00:10.0", None, object()):
        with pytest.raises(InvalidArgumentError):
            DeviceStates([wrong])


# ---- the order

@pytest.mark.parametrize("flags", [3, 7])
def test_no_device_stops_before_all_are_quiesced(flags):
    log = []
    with machine(*chips(3, flags, log=log)) as devices:
        source = DeviceStates(devices)
        source.start()
        source.quiesce()
        quiesced = [index for index, (_, _, to) in enumerate(log) if to in (RUNNING_P2P, PRE_COPY_P2P)]
        stopped = [index for index, (_, _, to) in enumerate(log) if to in (STOP, STOP_COPY)]
        assert len(quiesced) == 3 and max(quiesced) < min(stopped)
        source.resume()
        assert states(devices) == [RUNNING] * 3


@pytest.mark.parametrize("flags", [3, 7])
def test_no_device_runs_again_before_all_answer(flags):
    log = []
    with machine(*chips(3, flags, log=log)) as devices:
        source = DeviceStates(devices)
        source.start()
        source.quiesce()
        log.clear()
        source.resume()
        answering = [index for index, (_, _, to) in enumerate(log) if to == RUNNING_P2P]
        running = [index for index, (_, _, to) in enumerate(log) if to == RUNNING]
        assert len(answering) == len(running) == 3 and max(answering) < min(running)


def test_several_devices_need_p2p_unless_told_otherwise():
    with machine(*chips(2), Chip("0000:00:11.0", flags=5)) as devices:
        with pytest.raises(UnsupportedError, match="0000:00:11.0 can't be quiesced"):
            DeviceStates(devices).preflight()
        with pytest.raises(UnsupportedError):
            DeviceStates(devices).start()
        assert states(devices) == [RUNNING] * 3
        assert DeviceStates(devices, peer_to_peer=False).preflight() == [7, 7, 5]
        assert DeviceStates(devices[2:]).preflight() == [MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY]


def test_what_can_not_be_migrated_is_refused_before_anything_changes():
    chip, plain = chips(1)[0], EduDevice("0000:00:12.0")
    with machine(chip, plain) as devices:
        with pytest.raises(UnsupportedError, match="0000:00:12.0 can't be migrated") as caught:
            DeviceStates(devices).start()
        assert caught.value.errno == errno.EOPNOTSUPP and not chip.log
        devices[0].migration.set_state(STOP)
        with pytest.raises(MigrationError, match="is in STOP already") as caught:
            DeviceStates(devices[:1]).preflight()
        assert caught.value.errno == errno.EBUSY


def test_names_are_unique_and_chunks_have_limits():
    with machine(*chips(1)) as [device]:
        with pytest.raises(InvalidArgumentError):
            DeviceStates([device, device])
        for chunk in (0, -1, (8 << 20) + 1):
            with pytest.raises(InvalidArgumentError):
                DeviceStates([device], chunk=chunk)
        assert DeviceStates([DeviceStateSource(device, "net0")]).devices[0].name == "net0"


def test_the_child_of_a_fork_is_told_and_does_not_hang():
    with machine(*chips(2)) as devices, DeviceStates(devices) as source:
        source.start()
        child = os.fork()
        if not child:
            code = 1
            try:
                source.resume()
            except MigrationError as exc:
                code = 0 if exc.errno == errno.EBADF else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert source.resume() == ()


# ---- what is left

def test_pending_tells_initial_dirty_and_final_bytes():
    chip, = chips(1)
    with machine(chip) as [device]:
        source = DeviceStates([device], chunk=100)
        assert source.pending() == Pending(0, 0, chip.size())
        source.start()
        whole = 16 * 72
        assert source.pending() == Pending(whole, 0, chip.size())
        next(source.chunks())
        assert source.pending().initial_bytes == whole - 100
        chip.poke(3, 1)
        assert source.pending()[:2] == (whole - 100, 72)
        for _ in source.chunks():
            pass
        assert source.pending()[:2] == (0, 0)
        source.resume()


def test_initial_bytes_grow_again_when_a_device_begins_anew():
    chip, other = chips(2)[0], Chip(addresses(1)[0])
    with machine(chip) as [device], machine(other) as [target]:
        source, sinks = DeviceStates([device], chunk=100), DeviceSinks([target])
        sinks.prepare()
        source.start()
        send(source, sinks)
        assert source.pending()[:2] == (0, 0)
        chip.poke(2, 5)
        chip.again = True
        assert source.pending()[:2] == (16 * 72, 0)
        send(source, sinks)
        assert source.pending()[:2] == (0, 0)
        finish(source, sinks)
        assert other.content() == chip.content()


def test_without_the_newer_interface_new_initial_bytes_are_dirty_ones():
    chip, = chips(1)
    with machine(chip, kernel="6.12") as [device]:
        source = DeviceStates([device])
        source.start()
        for _ in source.chunks():
            pass
        chip.again = True
        assert source.pending()[:2] == (0, 16 * 72)
        source.resume()


def test_an_older_kernel_does_not_tell_the_size():
    with machine(*chips(2), kernel="6.1") as devices:
        assert DeviceStates(devices).pending() == Pending(0, 0, None)


def test_a_device_that_changes_all_the_time_does_not_hold_up_a_round():
    chip, = chips(1)
    with machine(chip) as [device]:
        source = DeviceStates([device], chunk=64)
        source.start()
        total = 0
        for turn, (_, chunk) in enumerate(source.chunks()):
            chip.poke(turn % 16, turn)
            total += len(chunk) - 16
        assert total == 16 * 72
        source.resume()


def test_memory_of_chunks_is_used_again_unless_they_are_kept():
    chip, = chips(1, blocks=64)
    with machine(chip) as [device], DeviceStates([device], chunk=100) as source:
        source.start()
        assert len({id(chunk.obj) for _, chunk in source.chunks()}) == 2
        source.resume()
        source.start()
        kept = [chunk for _, chunk in source.chunks()]
        copies = [bytes(chunk) for chunk in kept]
        source.quiesce()
        list(source.final_chunks())
        assert kept == copies and len({id(chunk.obj) for chunk in kept}) == len(kept)
        source.resume()


# ---- the destination trusts nothing

def recorded(chip):
    with machine(chip) as [device]:
        source = DeviceStates([device], chunk=500)
        source.start()
        frames = [(name, bytes(chunk)) for name, chunk in source.chunks()]
        source.quiesce()
        return frames + [(name, bytes(chunk)) for name, chunk in source.final_chunks()]


def replay(frames, target):
    with machine(target) as [device], DeviceSinks([device]) as sinks:
        sinks.prepare()
        for name, chunk in frames:
            assert sinks.take(name, chunk)
        sinks.load()
        sinks.run()


def test_frames_lost_repeated_or_exchanged_are_refused():
    chip, = chips(1)
    chip.poke(1, 1)
    frames = recorded(chip)
    assert len(frames) >= 4
    for first, second in itertools.combinations(range(len(frames)), 2):
        exchanged = list(frames)
        exchanged[first], exchanged[second] = exchanged[second], exchanged[first]
        with pytest.raises(ProtocolError):
            replay(exchanged, Chip(chip.address))
    for at in range(len(frames)):
        with pytest.raises(ProtocolError):
            replay(frames[:at] + frames[at + 1:], Chip(chip.address))
        with pytest.raises(ProtocolError):
            replay(frames[:at + 1] + frames[at:], Chip(chip.address))
    target = Chip(chip.address)
    replay(frames, target)
    assert target.content() == chip.content()


def test_a_header_of_another_kind_is_refused():
    good = struct.pack("<BBHIQ", 1, 0, 0, 4, 0) + b"data"
    bad = [b"", good[:15], b"\2" + good[1:], good[:1] + b"\2" + good[2:], good[:1] + bytes([LAST]) + good[2:],
           struct.pack("<BBHIQ", 1, 0, 1, 4, 4) + b"data", good + b"x", good[:-1], struct.pack("<BBHIQ", 1, 0, 0, 0, 0)]
    with machine(*chips(1)) as [device], DeviceSinks([device], limit=7) as sinks:
        sinks.prepare()
        for data in bad:
            with pytest.raises(ProtocolError):
                sinks.take(PREFIX + device.address, data)
        with pytest.raises(ProtocolError, match="there is no device"):
            sinks.take(PREFIX + "0000:ff:00.0", good)
        assert not sinks.take("address space", b"anything")
        assert sinks.take(PREFIX + device.address, good)
        with pytest.raises(ProtocolError, match="more than 7 bytes"):
            sinks.take(PREFIX + device.address, struct.pack("<BBHIQ", 1, 0, 0, 4, 4) + b"data")


@pytest.mark.parametrize("cut", ["running", "final", "loaded"])
def test_after_a_broken_connection_the_state_comes_anew(cut):
    here, there = chips(2), chips(2)
    with machine(*here) as old, machine(*there) as new:
        source, sinks = DeviceStates(old, chunk=300), DeviceSinks(new)
        sinks.prepare()
        source.start()
        here[0].poke(1, 1)
        here[1].poke(3, 2)
        chunks = source.chunks()
        lost = [next(chunks) for _ in range(5)][-1]         # the last one never arrives
        for name, chunk in source.chunks() if cut != "running" else ():
            lost = name, chunk
        if cut != "running":
            source.resume()
            source.start()
            send(source, sinks)
            source.quiesce()
            final = list(source.final_chunks())
            for name, chunk in final if cut == "loaded" else final[:-1]:
                sinks.take(name, chunk)
            if cut == "loaded":
                sinks.load()
            lost = final[-1]
        source.resume()
        here[0].poke(7, 3)
        source.start()
        first = next(source.chunks())
        assert sinks.take(*first)
        with pytest.raises(ProtocolError):
            sinks.take(*lost)                               # of the attempt before
        with pytest.raises(ProtocolError, match="not complete"):
            sinks.load()
        send(source, sinks)
        finish(source, sinks)
        assert [chip.content() for chip in there] == [chip.content() for chip in here]
        assert states(new) == [RUNNING] * 2


def test_a_device_that_stays_with_an_older_attempt_is_not_loaded():
    here, there = chips(2), chips(2)
    with machine(*here) as old, machine(*there) as new, DeviceSinks(new) as sinks:
        source = DeviceStates(old)
        sinks.prepare()
        for attempt in range(2):
            source.start()
            source.quiesce()
            for name, chunk in source.final_chunks():
                if not attempt or name.endswith(old[0].address):
                    sinks.take(name, chunk)
            source.resume()
        with pytest.raises(ProtocolError, match=f"the state of {old[1].address} is not complete"):
            sinks.load()


# ---- a device with registers

def test_devices_behind_iommufd_move_as_well():
    address, = addresses(1)
    with contextlib.ExitStack() as stack:
        old, new = (stack.enter_context(VfioDevice.open(stack.enter_context(open_backend(
            "iommufd", devices=[address], system=SoftwareVfio(
                groups=[SoftwareGroup(0, [EduDevice(address, migratable=True)])], memlock_limit=None))), address))
            for _ in range(2))
        source, sinks = DeviceStates([old]), DeviceSinks([new])
        sinks.prepare()
        source.start()
        send(source, sinks)
        EduDriver(old).factorial(6)
        finish(source, sinks)
        assert new.regions[0].read_u32(0x08) == 720


def test_an_edu_device_goes_on_at_the_destination():
    address, = addresses(1)
    with machine(EduDevice(address, migratable=True)) as [old], machine(EduDevice(address, migratable=True)) as [new]:
        driver = EduDriver(old)
        driver.factorial(5)
        source, sinks = DeviceStates([old]), DeviceSinks([new])
        sinks.prepare()
        source.start()
        send(source, sinks)
        driver.invert(0x77)
        finish(source, sinks)
        assert new.regions[0].read_u32(0x08) == 120
        assert new.regions[0].read_u32(0x04) == 0xFFFFFFFF ^ 0x77
        assert new.config.bus_master
