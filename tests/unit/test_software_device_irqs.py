"""Interrupts of software devices: SET_IRQS against an oracle, INTx as a level, eventfds that come and go."""
import errno
import os
import struct
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from software_card import Card
from software_device import Opened, fails, opened

from vfiodma import VfioDevice
from vfiodma.devices.edu import EduDevice
from vfiodma.errors import VfioError
from vfiodma.uapi import vfio as abi

NONE, BOOL, EVENTFD = abi.VFIO_IRQ_SET_DATA_NONE, abi.VFIO_IRQ_SET_DATA_BOOL, abi.VFIO_IRQ_SET_DATA_EVENTFD
MASK, UNMASK, TRIGGER = (abi.VFIO_IRQ_SET_ACTION_MASK, abi.VFIO_IRQ_SET_ACTION_UNMASK,
                         abi.VFIO_IRQ_SET_ACTION_TRIGGER)
DATA, ACTION = abi.VFIO_IRQ_SET_DATA_TYPE_MASK, abi.VFIO_IRQ_SET_ACTION_TYPE_MASK
INTX, MSI, MSIX, ERR, REQ = range(5)
COUNTS = (1, 4, 6, 1, 1)
CLOSED_FD, PLAIN_FD = 1 << 20, "plain"


def word(*fds):
    return struct.pack(f"={len(fds)}i", *fds)


def drain(fd):
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


@pytest.fixture
def eventfd():
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
def card():
    with opened(Card(irqs=COUNTS, msix_table=(3, 0, 0x60), flags={3: 7})) as device:
        yield device


# ---- the oracle: what section 6 says, as plainly as it can be said

class Oracle:
    """SET_IRQS of a card; eventfds are names, signals are counted."""

    def __init__(self, kernel):
        self.old = kernel == "6.1"
        self.kind, self.vectors, self.masked = None, {}, False
        self.size = 0
        self.single = {ERR: None, REQ: None}
        self.unmask = None
        self.signals = []

    def check_fd(self, fd):
        if fd == CLOSED_FD:
            return errno.EBADF
        return errno.EINVAL if fd == PLAIN_FD else 0

    def signal(self, fd):
        if fd is not None:
            self.signals.append(fd)

    def set(self, flags, index, start, count, data):
        """Return the errno, 0 for none; ``data`` has a value for each interrupt."""
        if index >= 5 or flags & ~(DATA | ACTION) or start >= COUNTS[index] or start + count > COUNTS[index]:
            return errno.EINVAL
        kind, action = flags & DATA, flags & ACTION
        if kind not in (NONE, BOOL, EVENTFD):
            return errno.EINVAL
        if action not in (MASK, UNMASK, TRIGGER) or (index != INTX and action != TRIGGER):
            return errno.ENOTTY
        if index == INTX:
            return self.intx(kind, action, count, data)
        return self.msi(index, kind, start, count, data) if index in (MSI, MSIX) else self.one(index, kind, count, data)

    def intx(self, kind, action, count, data):
        on = self.kind == INTX
        if action != TRIGGER:
            if not on or count != 1:
                return errno.EINVAL
            if kind == EVENTFD:
                if action == MASK:
                    return errno.ENOTTY
                if data[0] in (-1, -2):
                    self.unmask = None
                    return 0
                if bad := self.check_fd(data[0]):
                    return bad
                if self.unmask is not None:
                    return errno.EBUSY
                self.unmask = data[0]
            elif kind == NONE or data[0]:
                self.masked = action == MASK
            return 0
        if on and count == 0 and kind == NONE:
            self.off()
            return 0
        if self.kind not in (None, INTX) or count != 1:
            return errno.EINVAL
        if kind == EVENTFD:
            if bad := self.check_fd(data[0]):
                return bad
            if not on:
                self.kind, self.size, self.masked = INTX, 1, False
            self.vectors[0] = data[0] if data[0] not in (-1, -2) else None
            return 0
        if not on:
            return errno.EINVAL
        if kind == NONE or data[0]:
            self.signal(self.vectors.get(0))
        return 0

    def off(self):
        self.kind, self.vectors, self.masked, self.unmask, self.size = None, {}, False, None, 0

    def msi(self, index, kind, start, count, data):
        if self.kind == index and count == 0 and kind == NONE:
            self.off()
            return 0
        if self.kind not in (None, index):
            return errno.EINVAL
        if kind != EVENTFD:
            if self.kind != index or (self.old and start + count > self.size):
                return errno.EINVAL
            for i in range(count):
                if kind == NONE or data[i]:
                    self.signal(self.vectors.get(start + i))
            return 0
        fresh = self.kind is None
        if fresh:
            if start + count == 0:
                return errno.ERANGE
            self.kind, self.size = index, start + count
        result = self.block(index, start, count, data)
        if result and fresh:
            self.off()
        return result

    def block(self, index, start, count, data):
        if self.old and (start >= self.size or start + count > self.size):
            return errno.EINVAL
        for i in range(count):
            vector, fd = start + i, data[i]
            self.vectors.pop(vector, None)
            bad = 0
            if fd not in (-1, -2):
                bad = errno.EINVAL if vector >= self.size and index == MSI else self.check_fd(fd)
                if not bad:
                    self.vectors[vector] = fd
                    self.size = max(self.size, vector + 1)
                elif vector < COUNTS[index] and index == MSIX:
                    self.size = max(self.size, vector + 1)      # an allocated vector stays allocated
            if bad:
                for undone in range(start, vector):
                    self.vectors.pop(undone, None)
                return bad
        return 0

    def one(self, index, kind, count, data):
        have = self.single[index]
        if kind == NONE:
            if have is None:
                return errno.EINVAL
            if count:
                self.signal(have)
            else:
                self.single[index] = None
            return 0
        if not count:
            return errno.EINVAL
        if kind == BOOL:
            if data[0]:
                self.signal(have)
            return 0
        if data[0] == -2:
            return 0 if self.old else errno.EINVAL
        if data[0] == -1:
            self.single[index] = None
            return 0
        if bad := self.check_fd(data[0]):
            return bad
        self.single[index] = data[0]
        return 0


FDS = st.sampled_from(["a", "b", "a", "b", -1, -2, CLOSED_FD, PLAIN_FD])
CALLS = st.tuples(
    st.one_of(st.sampled_from([EVENTFD | TRIGGER, NONE | TRIGGER, BOOL | TRIGGER, NONE | UNMASK, NONE | MASK,
                               EVENTFD | UNMASK]), st.integers(0, 127)),
    st.sampled_from([INTX, MSI, MSIX, MSIX, ERR, REQ, 5]), st.integers(0, 6), st.integers(0, 6),
    st.lists(FDS, min_size=6, max_size=6), st.lists(st.integers(0, 1), min_size=6, max_size=6))


@pytest.mark.parametrize("kernel", ["6.1", "7.2"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(CALLS, max_size=25))
def test_set_irqs_does_what_the_oracle_does(kernel, calls):
    named = {name: os.eventfd(0, os.EFD_NONBLOCK) for name in "ab"}
    plain = os.open("/dev/null", os.O_RDONLY)
    oracle = Oracle(kernel)
    device = Opened(Card(irqs=COUNTS, msix_table=(3, 0, 0x60), flags={3: 7}), kernel=kernel)
    try:
        for flags, index, start, count, fds, bools in calls:
            values, data = None, b""
            if flags & 7 == EVENTFD:
                values = fds
                data = word(*[{**named, PLAIN_FD: plain}.get(fd, fd) for fd in fds[:count]])
            elif flags & 7 == BOOL:
                values, data = bools, bytes(bools[:count])
            oracle.signals.clear()
            expected = oracle.set(flags, index, start, count, values)
            try:
                device.set_irqs(flags, index, start, count, data)
                result = 0
            except VfioError as exc:
                result = exc.errno
            assert result == expected, (flags, index, start, count, fds)
            for name, fd in named.items():
                assert drain(fd) == oracle.signals.count(name)
    finally:
        device.close()
        for fd in (*named.values(), plain):
            os.close(fd)


#: What is enabled before the call, as calls that get there.
BEFORE = {"nothing": [], "INTx": [(EVENTFD | TRIGGER, INTX, 0, 1)], "MSI": [(EVENTFD | TRIGGER, MSI, 0, 2)],
          "MSI-X": [(EVENTFD | TRIGGER, MSIX, 0, 4)], "ERR and REQ": [(EVENTFD | TRIGGER, ERR, 0, 1),
                                                                     (EVENTFD | TRIGGER, REQ, 0, 1)]}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("kernel", ["6.1", "7.2"] if os.environ.get("VFIODMA_PROFILE") == "deep" else ["7.2"])
def test_every_data_action_index_start_and_count_is_answered_as_the_oracle_does(kernel, before):
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    for index in range(6):
        have = COUNTS[index] if index < 5 else 1
        ranges = {(start, count) for start in (0, 1, have) for count in (0, 1, 2, have, have + 1)}
        for flags in range(128):
            # What succeeded has changed the state: a new device for each kind of call, its ranges in one order.
            oracle = Oracle(kernel)
            with opened(Card(irqs=COUNTS, msix_table=(3, 0, 0x60), flags={3: 7}), kernel=kernel) as device:
                for step in BEFORE[before]:
                    assert oracle.set(*step, ["a"] * 6) == 0
                    device.set_irqs(*step, word(*[eventfd] * step[3]))
                for start, count in sorted(ranges):
                    values = ["a"] * 12 if flags & EVENTFD else [1, 0] * 6
                    data = word(*[eventfd] * count) if flags & EVENTFD else bytes([1, 0] * 6)[:count]
                    expected = oracle.set(flags, index, start, count, values)
                    try:
                        device.set_irqs(flags, index, start, count, data)
                        result = 0
                    except VfioError as exc:
                        result = exc.errno
                    assert result == expected, (flags, index, start, count)
    os.close(eventfd)


# ---- arguments

@pytest.mark.parametrize("start, count", [(0, 0xFFFFFFFF), (0xFFFFFFFF, 0), (0xFFFFFFFE, 1), (1, 0xFFFFFFFE)])
def test_counts_that_wrap_are_invalid(card, start, count):
    with fails(errno.EINVAL):
        card.set_irqs(NONE | TRIGGER, MSIX, start, count)


def test_data_that_is_not_there_is_invalid(card, eventfd):
    for argsz in (0, 19, 20, 23):
        with fails(errno.EINVAL):
            card.set_irqs(EVENTFD | TRIGGER, MSIX, 0, 1, word(eventfd), argsz=argsz)


def test_a_bad_address_is_a_fault(card):
    with fails(errno.EFAULT):
        card.vfio.ioctl(card.fd, abi.VFIO_DEVICE_SET_IRQS, 16)


def test_an_index_that_the_card_lacks_refuses_every_call():
    with opened(Card(irqs=(0, 0, 0, 0, 1))) as device:
        for index in range(4):
            with fails(errno.EINVAL):
                device.set_irqs(NONE | TRIGGER, index, 0, 0)


# ---- what a device raises

def test_msix_vectors_go_to_their_own_eventfds(card, eventfd):
    other = os.eventfd(0, os.EFD_NONBLOCK)
    card.set_irqs(EVENTFD | TRIGGER, MSIX, 0, 3, word(eventfd, -1, other))
    sink = card.device.sink
    assert [sink.enabled(index) for index in range(5)] == [0, 0, 3, 0, 0]
    for vector in (0, 1, 2, 2, 3, 100):
        sink.trigger(MSIX, vector)
    sink.trigger(MSI, 0)
    assert (drain(eventfd), drain(other)) == (1, 2)
    os.close(other)


def test_an_eventfd_is_held_though_its_owner_closes_it(card):
    mine = os.eventfd(0, os.EFD_NONBLOCK)
    spare = os.dup(mine)
    card.set_irqs(EVENTFD | TRIGGER, MSI, 0, 1, word(mine))
    os.close(mine)
    card.device.sink.trigger(MSI)
    assert drain(spare) == 1
    os.close(spare)


def test_a_full_counter_blocks_nobody(card):
    fd = os.eventfd(0, 0)
    os.eventfd_write(fd, (1 << 64) - 2)
    card.set_irqs(EVENTFD | TRIGGER, MSI, 0, 1, word(fd))
    card.device.sink.trigger(MSI)
    assert os.eventfd_read(fd) == (1 << 64) - 2
    os.close(fd)


def test_intx_is_a_level(card, eventfd):
    sink = card.device.sink
    card.set_irqs(EVENTFD | TRIGGER, INTX, 0, 1, word(eventfd))
    sink.trigger(INTX)
    sink.trigger(INTX)
    assert drain(eventfd) == 1              # masked since
    card.set_irqs(NONE | UNMASK, INTX, 0, 1)
    assert drain(eventfd) == 1              # still raised
    sink.lower()
    card.set_irqs(NONE | UNMASK, INTX, 0, 1)
    assert drain(eventfd) == 0
    card.set_irqs(NONE | MASK, INTX, 0, 1)
    sink.trigger(INTX)
    assert drain(eventfd) == 0
    sink.lower()
    card.set_irqs(NONE | UNMASK, INTX, 0, 1)
    assert drain(eventfd) == 0              # nobody saw it


def test_intx_that_was_raised_before_fires_when_it_is_enabled(card, eventfd):
    card.device.sink.trigger(INTX)
    card.set_irqs(EVENTFD | TRIGGER, INTX, 0, 1, word(eventfd))
    assert drain(eventfd) == 1


def test_disabling_intx_in_the_command_register_holds_it_back(eventfd):
    edu = EduDevice("0000:00:10.0")
    with opened(edu) as device:
        command = 7 << 40 | 4
        device.set_irqs(EVENTFD | TRIGGER, INTX, 0, 1, word(eventfd))
        device.vfio.pwrite(device.fd, b"\x02\x04", command)
        edu.region_write(0, 0x60, struct.pack("=I", 1))
        device.set_irqs(NONE | UNMASK, INTX, 0, 1)
        device.set_irqs(NONE | TRIGGER, INTX, 0, 1)
        assert drain(eventfd) == 0
        device.vfio.pwrite(device.fd, b"\x02\x00", command)
        assert drain(eventfd) == 1


def test_both_descriptors_of_a_device_share_its_interrupts(card, eventfd):
    second = card.open()
    card.set_irqs(EVENTFD | TRIGGER, MSI, 0, 1, word(eventfd))
    with fails(errno.EINVAL):
        card.ioctl(abi.VFIO_DEVICE_SET_IRQS, struct.pack("=IIIIIi", 24, EVENTFD | TRIGGER, INTX, 0, 1, eventfd),
                   fd=second)
    card.vfio.close(card.fd)
    card.fd = second
    card.device.sink.trigger(MSI)
    assert drain(eventfd) == 1


def test_closing_the_last_descriptor_lets_everything_go():
    fd, unmask = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    with opened(Card()) as device:
        device.set_irqs(EVENTFD | TRIGGER, INTX, 0, 1, word(fd))
        device.set_irqs(EVENTFD | UNMASK, INTX, 0, 1, word(unmask))
        device.set_irqs(EVENTFD | TRIGGER, REQ, 0, 1, word(fd))
        device.set_irqs(EVENTFD | TRIGGER, ERR, 0, 1, word(fd))
        sink = device.device.sink
    assert device.device.sink is None
    sink.trigger(INTX)
    sink.trigger(REQ)
    assert drain(fd) == 0
    for thread in threading.enumerate():
        if thread.name.startswith("eventfds of"):
            thread.join(10)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    os.close(fd)
    os.close(unmask)


def test_a_device_may_raise_interrupts_while_its_user_changes_them(card, eventfd):
    sink, ending, raised = card.device.sink, threading.Event(), []

    def device():
        while not ending.is_set():
            for index in range(5):
                sink.trigger(index)
                sink.enabled(index)
            sink.lower()
            raised.append(1)

    thread = threading.Thread(target=device)
    thread.start()
    try:
        while len(raised) < 50:
            for index in (INTX, MSI, MSIX, REQ):
                card.set_irqs(EVENTFD | TRIGGER, index, 0, 1, word(eventfd))
                card.set_irqs(NONE | TRIGGER, index, 0, 0)
    finally:
        ending.set()
        thread.join()
    drain(eventfd)
    sink.trigger(MSI)
    assert drain(eventfd) == 0


def test_an_eventfd_can_have_the_device_raise_an_interrupt(eventfd):
    doorbell, answer = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0)
    with opened(EduDevice("0000:00:10.0")) as device:
        device.set_irqs(EVENTFD | TRIGGER, INTX, 0, 1, word(answer))
        device.set_irqs(EVENTFD | UNMASK, INTX, 0, 1, word(eventfd))
        request = struct.pack("=IIQQiI", 32, 4, 0x60, 1, doorbell, 0)
        device.ioctl(abi.VFIO_DEVICE_IOEVENTFD, request)
        for _ in range(20):
            os.eventfd_write(doorbell, 1)
            assert os.eventfd_read(answer) == 1                 # waits
            device.vfio.pwrite(device.fd, struct.pack("=I", 1), 0x64)
            device.set_irqs(NONE | UNMASK, INTX, 0, 1)
        os.eventfd_write(doorbell, 1)
        assert os.eventfd_read(answer) == 1
        os.eventfd_write(eventfd, 1)
        assert os.eventfd_read(answer) == 1                     # still raised
    for fd in (doorbell, answer):
        os.close(fd)


def test_a_device_that_is_let_go_leaves_interrupts_to_whoever_has_it_too():
    with opened(Card(irqs=COUNTS)) as card:
        old = VfioDevice(card.vfio, card.open(), "old")
        vectors = old.interrupts.enable(MSI, 2)
        passed = [os.dup(vector.fd) for vector in vectors]
        new = VfioDevice(card.vfio, card.vfio.dup(old.fd), "new")
        old.let_go()
        assert old.fd < 0 and vectors.closed
        with new, new.interrupts.take_over(MSI, passed) as taken:
            taken.trigger(1, 1)
            assert [vector.poll() for vector in taken] == [0, 1]
            with pytest.raises(VfioError):
                new.interrupts.enable(MSI)
        with pytest.raises(OSError):
            os.fstat(passed[0])
