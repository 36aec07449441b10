"""Devices that fail on their way: a typed error with the device's name, and every device runs again or says why not."""
import errno
import itertools
import json
import random
import struct
import threading
import warnings
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from migrating_devices import Chip, addresses, finish, machine, send

from vfiodma.devices import DmaWriter, EduDevice
from vfiodma.devices.migration import MigrationState
from vfiodma.errors import MigrationError, ProtocolError, VfioError
from vfiodma.migration.device_group import DeviceSinks, DeviceStates

ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = list(MigrationState)
CODES = [errno.EIO, errno.EBUSY, errno.ENOMEM, errno.ETIMEDOUT]
FORWARD = {
    1: [(RUNNING, STOP), (STOP, STOP_COPY)],
    3: [(RUNNING, RUNNING_P2P), (RUNNING_P2P, STOP), (STOP, STOP_COPY)],
    5: [(RUNNING, PRE_COPY), (PRE_COPY, STOP_COPY)],
    7: [(RUNNING, PRE_COPY), (PRE_COPY, PRE_COPY_P2P), (PRE_COPY_P2P, STOP_COPY)],
}
BACK = {1: [(STOP_COPY, STOP), (STOP, RUNNING)], 3: [(STOP_COPY, STOP), (STOP, RUNNING_P2P), (RUNNING_P2P, RUNNING)],
        5: [(STOP_COPY, STOP), (STOP, RUNNING)], 7: [(STOP_COPY, STOP), (STOP, RUNNING_P2P), (RUNNING_P2P, RUNNING)]}


def chips(flags):
    devices = [Chip(address, 8, flags) for address in addresses(3)]
    for number, chip in enumerate(devices):
        chip.poke(number, number + 1)
    return devices


def states(devices):
    return [device.migration.state for device in devices]


def moves(old, flags, here):
    """The devices can be moved after all."""
    there = [Chip(chip.address, 8, flags) for chip in here]
    with machine(*there) as new:
        source, sinks = DeviceStates(old, peer_to_peer=bool(flags & 2)), DeviceSinks(new, peer_to_peer=bool(flags & 2))
        sinks.prepare()
        source.start()
        send(source, sinks)
        finish(source, sinks)
        assert [chip.content() for chip in there] == [chip.content() for chip in here]


def go(source):
    source.start()
    list(source.chunks())
    source.quiesce()
    list(source.final_chunks())


@pytest.mark.parametrize("flags", FORWARD)
def test_a_failing_arc_names_device_and_state_and_all_run_on(flags):
    for arc, code, which in itertools.product(FORWARD[flags], CODES, range(3)):
        here = chips(flags)
        before = [chip.content() for chip in here]
        with machine(*here) as old, warnings.catch_warnings():
            warnings.simplefilter("error")
            here[which].fail[arc] = code
            source = DeviceStates(old, peer_to_peer=bool(flags & 2))
            with pytest.raises(MigrationError, match=f"device {here[which].address}: it does not go to") as caught:
                go(source)
            assert caught.value.errno == code and f"is left in {arc[0].name}" in str(caught.value)
            assert source.resume() == ()
            assert states(old) == [RUNNING] * 3 and [chip.content() for chip in here] == before
            moves(old, flags, here)


@pytest.mark.parametrize("flags", BACK)
def test_the_way_back_is_tried_twice_then_the_device_is_reset_and_that_is_told(flags):
    for arc, times in itertools.product(BACK[flags], (1, 3)):
        here = chips(flags)
        before = [chip.content() for chip in here]

        def fail(what, chip=here[1], arc=arc, left=[times], plain=here[1]._may_fail):     # noqa: B006
            if what == arc and left[0]:
                left[0] -= 1
                chip.fail[arc] = errno.EIO
            plain(what)

        with machine(*here) as old:
            source = DeviceStates(old, peer_to_peer=bool(flags & 2))
            go(source)
            here[1]._may_fail = fail
            if times == 1:
                assert source.resume() == ()
            else:
                with pytest.warns(RuntimeWarning, match=f"reset, .*{here[1].address}"):
                    assert source.resume() == (here[1].address,)
                before[1] = (bytes(8 * 64), 0)
            assert states(old) == [RUNNING] * 3 and [chip.content() for chip in here] == before


@pytest.mark.parametrize("what", ["initial", "final"])
def test_a_device_that_does_not_give_its_state_is_reset(what):
    here = chips(7)
    with machine(*here) as old:
        source = DeviceStates(old)
        here[2].fail[what] = errno.EIO
        with pytest.warns(RuntimeWarning, match=here[2].address), \
                pytest.raises(MigrationError, match="left in ERROR"):
            if what == "initial":
                source.start()          # resumes by itself
            else:
                try:
                    go(source)
                finally:
                    assert states(old)[2] == ERROR
                    assert source.resume() == (here[2].address,)
        assert states(old) == [RUNNING] * 3
        assert here[2].content() == (bytes(8 * 64), 0) and here[1].content()[1] == 1
        moves(old, 7, here)


def test_a_device_that_can_not_be_read_names_itself():
    here = chips(7)
    with machine(*here) as old:
        source = DeviceStates(old)
        source.start()
        list(source.chunks())
        here[1].poke(0, 1)
        here[1].fail["dirty"] = errno.EIO
        with pytest.raises(MigrationError, match=f"device {here[1].address}: its state can't be read in PRE_COPY"):
            list(source.chunks())
        assert source.resume() == ()
        moves(old, 7, here)


def test_a_device_that_can_not_be_reset_keeps_no_other_from_running():
    here = chips(7)
    here[0].can_reset = False
    with machine(*here) as old:
        source = DeviceStates(old)
        here[0].fail["final"] = errno.EIO
        with pytest.raises(MigrationError):
            go(source)
        with pytest.raises(MigrationError, match=f"{here[0].address}: it is in ERROR and can't be reset") as caught:
            source.resume()
        assert caught.value.errno == errno.EINVAL
        assert states(old) == [ERROR, RUNNING, RUNNING]


def test_a_driver_that_says_more_will_come_after_the_stop_is_not_believed():
    here = chips(7)
    with machine(*here) as old:
        source = DeviceStates(old)
        source.start()
        source.quiesce()
        stream = source.devices[0]._stream
        stream.readinto = lambda buffer: None
        with pytest.raises(MigrationError, match="an error of its driver") as caught:
            list(source.final_chunks())
        assert caught.value.errno == errno.ENOMSG
        del stream.readinto
        source.resume()


def test_without_threads_nothing_begins(monkeypatch):
    here, plain, started = chips(7), threading.Thread.start, []

    def start(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        plain(thread)
    with machine(*here) as old:
        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(VfioError, match="3 threads are needed") as caught:
            DeviceStates(old).start()
        assert caught.value.errno == errno.EAGAIN and not here[0].log
        assert len(started) == 2 and not any(thread.is_alive() for thread in started)
        monkeypatch.undo()
        moves(old, 7, here)


def test_a_device_of_a_vmm_with_an_error_of_its_own_keeps_no_other_from_running():
    here = chips(7)
    with machine(*here) as old:
        source = DeviceStates(old)
        source.start()
        source.quiesce()
        source.devices[0].resume_p2p = lambda: {}["no such key"]
        with pytest.raises(KeyError):
            source.resume()
        assert states(old) == [RUNNING] * 3


# ---- the destination

@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL, errno.ENOMEM])
def test_a_destination_that_does_not_load_is_reset_and_usable(code):
    here, there = chips(7), chips(7)
    with machine(*here) as old, machine(*there) as new, warnings.catch_warnings():
        warnings.simplefilter("error")
        for attempt in range(2):
            source = DeviceStates(old)
            with DeviceSinks(new) as sinks:
                sinks.prepare()
                source.start()
                send(source, sinks)
                source.quiesce()
                for frame in source.final_chunks():
                    sinks.take(*frame)
                if attempt:
                    sinks.load()
                    sinks.run()
                    continue
                there[1].fail["load"] = code
                with pytest.raises(MigrationError, match=f"{there[1].address}: it does not go to STOP") as caught:
                    sinks.load()
                assert caught.value.errno == code
            assert states(new) == [RUNNING] * 3
            assert all(chip.content() == (bytes(8 * 64), 0) for chip in there)
            source.resume()
        assert [chip.content() for chip in there] == [chip.content() for chip in here]


def test_an_aborted_stream_leaves_the_destination_reset_and_usable():
    here, there = chips(7), chips(7)
    with machine(*here) as old, machine(*there) as new:
        source = DeviceStates(old, chunk=50)
        source.start()
        source.quiesce()
        frames = list(source.final_chunks())
        for length in range(0, len(frames), 5):
            with DeviceSinks(new) as sinks:
                sinks.prepare()
                for frame in frames[:length]:
                    sinks.take(*frame)
                with pytest.raises(ProtocolError, match="not complete"):
                    sinks.load()
                assert states(new) == [RESUMING] * 3
            assert states(new) == [RUNNING] * 3
        source.resume()
        moves(old, 7, here)


@pytest.mark.parametrize("arc", [(RUNNING, RUNNING_P2P), (RUNNING_P2P, STOP), (STOP, RESUMING)])
def test_a_destination_that_does_not_get_ready_is_left_running(arc):
    there = chips(7)
    with machine(*there) as new:
        there[2].fail[arc] = errno.EIO
        with pytest.raises(MigrationError, match=f"device {there[2].address}: it does not go to RESUMING"):
            DeviceSinks(new).prepare()
        assert states(new) == [RUNNING] * 3


def test_a_destination_that_does_not_run_says_that_the_state_is_lost():
    here, there = chips(7), chips(7)
    with machine(*here) as old, machine(*there) as new, DeviceSinks(new) as sinks:
        source = DeviceStates(old)
        sinks.prepare()
        source.start()
        source.quiesce()
        for frame in source.final_chunks():
            sinks.take(*frame)
        sinks.load()
        failures, plain = [errno.EIO] * 2, there[0].arc

        def arc(current, following):
            if following == RUNNING_P2P and failures:
                there[0].fail[current, following] = failures.pop()
            plain(current, following)
        there[0].arc = arc
        with pytest.warns(RuntimeWarning), pytest.raises(MigrationError, match=f"state of {there[0].address} is lost"):
            sinks.run()
        assert states(new) == [RUNNING] * 3
        assert [chip.content() for chip in there[1:]] == [chip.content() for chip in here[1:]]


# ---- damaged states of real devices

def edu():
    device = EduDevice(addresses(1)[0], migratable=True)
    device.buffer[:] = random.Random(5).randbytes(4096)
    return device


def writer():
    return DmaWriter(addresses(1)[0], working_set=[(0x1000, 0x4000), (0x10000, 0x2000)], rate=1e6, seed=99)


def state_bytes(make):
    with machine(make()) as [device]:
        stream = device.migration.set_state(STOP_COPY)
        return stream.readall()


def load(device, data):
    """Load into a device; return the errno of the refusal, and the state that it was left in."""
    stream = device.migration.set_state(RESUMING)
    stream.write(data)
    try:
        device.migration.set_state(STOP)
    except VfioError as exc:
        return exc.errno, device.migration.state
    finally:
        stream.close()
    return 0, device.migration.state


@pytest.mark.parametrize("make", [edu, writer])
def test_a_truncated_state_can_be_completed_and_is_never_taken(make):
    data = state_bytes(make)
    with machine(make()) as [device]:
        for length in range(0, len(data), max(1, len(data) // 400)):
            assert load(device, data[:length]) == (errno.EINVAL, RESUMING), length
            device.reset()
        stream = device.migration.set_state(RESUMING)
        stream.write(data[:100])
        with pytest.raises(VfioError):
            device.migration.set_state(RUNNING)
        stream.write(data[100:])
        device.migration.set_state(RUNNING)


@pytest.mark.parametrize("make", [edu, writer])
def test_a_flipped_bit_is_never_taken(make):
    data, draw = state_bytes(make), random.Random(7)
    with machine(make()) as [device]:
        for at in range(len(data)):
            flipped = bytearray(data)
            flipped[at] ^= 1 << draw.randrange(8)
            code, left = load(device, bytes(flipped))
            assert (code, left) in ((errno.EIO, ERROR), (errno.EINVAL, RESUMING)), at
            device.reset()
        assert load(device, data) == (0, STOP)


@pytest.mark.parametrize("make, where", [(edu, 3), (writer, 4)])
def test_a_state_of_another_version_is_refused(make, where):
    data = bytearray(state_bytes(make))
    end = 8 + int.from_bytes(data[6:8], "little") if make is edu else 12 + int.from_bytes(data[8:12], "little")
    data[where] += 1
    data[end:end + 4] = zlib.crc32(data[:end]).to_bytes(4, "little")
    with machine(make()) as [device]:
        assert load(device, bytes(data)) == (errno.EOPNOTSUPP, ERROR)
        device.reset()
        with DeviceSinks([device]) as sinks:
            sinks.prepare()
            sink = sinks.devices[0]
            sink.write(data)
            with pytest.raises(MigrationError, match=f"{device.address}: it does not go to STOP, and is left in ERROR"):
                sink.load()
        assert device.migration.state == RUNNING


@pytest.mark.parametrize("make", [edu, writer])
def test_a_state_without_end_is_cut_off(make):
    with machine(make()) as [device], DeviceSinks([device]) as sinks:
        sinks.prepare()
        piece, limit = bytes(1 << 20), 64 << 20
        with pytest.raises(MigrationError, match="it refuses the state that came") as caught:
            for _ in range(limit // len(piece) + 1):
                sinks.devices[0].write(piece)
        assert caught.value.errno == errno.ENOMEM


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=6)


@given(st.sampled_from(["working_set", "rate", "block", "seed", "writes", "faulted", "started", None]), JSON)
def test_a_writer_takes_no_values_that_make_no_sense(key, value):
    """With a good checksum: it is refused, or it works."""
    settings = {"working_set": [[0x1000, 0x4000]], "rate": 1e6, "block": 4096, "seed": 1}
    progress = {"writes": 5, "faulted": 0, "started": False}
    parts = [settings, progress] if key is not None else [value, progress]
    for part in parts:
        if key is not None and key in part:
            part[key] = value
    data = b""
    for number, part in enumerate(parts, 1):
        content = json.dumps(part).encode()
        body = struct.pack("<4sBBHI", b"dmaw", 1, number, 0, len(content)) + content
        data += body + struct.pack("<I", zlib.crc32(body))
    device = writer()
    try:
        device.set_state(data)
    except VfioError as exc:
        assert exc.errno == errno.EIO
        assert (device.seed, device.writes) == (99, 0)
        return
    if device.working_set:
        device.blocks(device.writes, 3)
