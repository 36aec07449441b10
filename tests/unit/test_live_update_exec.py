"""A program replaces itself: the new image has the container, the memory and the mappings."""
import contextlib
import errno
import os
import sys
import textwrap
from pathlib import Path

import pytest
from shared_container import SharedContainer
from two_processes import answer, fork

from vfiodma import GuestMemory, IoAddressSpace
from vfiodma.errors import ProtocolError, VfioError
from vfiodma.liveupdate import exec_into, take_from_exec
from vfiodma.liveupdate.execing import VARIABLE, _read_state, _write_state
from vfiodma.liveupdate.table import sealed_memfd

PAGE = 4096
TESTS = Path(__file__).parents[1]

NEW = textwrap.dedent("""
    import json, os, sys
    sys.path[:0] = [%r, %r]
    from shared_container import SharedContainer
    from vfiodma.liveupdate import take_from_exec
    with take_from_exec(adopt=SharedContainer.adopt) as taken:
        rows = taken.ioas.backend.rows()
        read = [taken.ioas.read(row[0], 4).decode() for row in rows]
        valid = all(row[4] and row[1] == taken.ioas.translate(row[0]) for row in rows)
        os.write(taken.fds["result"], json.dumps({"read": read, "valid": valid, "state": taken.state.decode(),
                 "pid": os.getpid(), "variable": %r in os.environ, "numpy": "numpy" in sys.modules}).encode())
""") % (str(TESTS), str(TESTS.parent), VARIABLE)


def guest():
    memory = GuestMemory.memfd(8 * PAGE)
    ioas = IoAddressSpace(SharedContainer())
    for at in range(4):
        memory.write(at * PAGE, b"pg%02d" % at)
        ioas.map(memory, at * 2 * PAGE, offset=at * PAGE, size=PAGE)
    return ioas, memory


def test_the_new_image_has_everything():
    read, write = os.pipe()

    def old():
        os.close(read)
        ioas, memory = guest()
        exec_into([sys.executable, "-c", NEW], ioas, memory, fds={"result": write}, freeze=lambda: b"last words")

    child = fork(old)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = answer(child)
    assert status == 0
    assert eval(text, {"true": True, "false": False}) == {
        "read": ["pg00", "pg01", "pg02", "pg03"], "valid": True, "state": "last words", "pid": child[0],
        "variable": False, "numpy": False}


def test_a_program_that_is_not_there_leaves_everything_as_it_was():
    ioas, memory = guest()
    with memory, contextlib.closing(ioas.backend), ioas:
        before = set(os.listdir("/proc/self/fd"))
        inheritable = os.get_inheritable(memory.region.fd)
        with pytest.raises(VfioError) as info:
            exec_into(["/no/such/program"], ioas, memory)
        assert info.value.errno == errno.ENOENT
        assert [ioas.read(at * 2 * PAGE, 4) for at in range(4)] == [b"pg%02d" % at for at in range(4)]
        assert set(os.listdir("/proc/self/fd")) == before and os.get_inheritable(memory.region.fd) == inheritable


def test_nothing_is_taken_where_nothing_was_left(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert take_from_exec() is None


@pytest.mark.parametrize("value", ["", "x", "-1", "1e3", "99999999999", "\u0663"])
def test_a_variable_that_is_no_descriptor_is_refused(monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ProtocolError):
        take_from_exec()
    assert VARIABLE not in os.environ


def test_a_damaged_state_is_refused_at_every_byte():
    fd = _write_state({"body": {"a": 1}, "fds": [3, 4]}, b"last")
    data = os.pread(fd, 1 << 16, 0)
    assert _read_state(fd)[1:] == ([3, 4], b"last")
    os.close(fd)
    for at in range(len(data)):
        for broken in (data[:at], data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1:]):
            fd = sealed_memfd(broken, "broken") if broken else os.memfd_create("empty")
            with pytest.raises(ProtocolError):
                _read_state(fd)
            os.close(fd)


def test_descriptors_that_are_not_open_are_refused(monkeypatch):
    fd = _write_state({"body": {}, "fds": [1 << 20]}, b"")
    monkeypatch.setenv(VARIABLE, str(fd))
    with pytest.raises(VfioError, match="not open"):
        take_from_exec()
    with pytest.raises(OSError):
        os.fstat(fd)
