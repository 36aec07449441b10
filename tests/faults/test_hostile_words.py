"""Words and names from another process or a file reach a terminal as text only, and have an end."""
import contextlib
import errno
import json
import os
import socket
import struct
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from migration_doubles import PGSIZE, guest

from vfiodma import GuestMemory
from vfiodma.cli import control
from vfiodma.cli.destination import Destination
from vfiodma.errors import InvalidArgumentError, MigrationError, ProtocolError, VfioError, peer_words
from vfiodma.migration import PageReceiver, PrecopySource, SocketTransport, snapshot, stream

ESCAPES = "owned\x1b]0;owned\x07\x1b[2J\r\n\b\x9b31m\u202e\u2028"


@given(st.text() | st.binary())
def test_words_of_a_peer_are_printable_and_bounded(words):
    shown = peer_words(words)
    assert shown.isprintable() and len(shown) <= 1000
    assert not isinstance(words, str) or not words.isprintable() or shown == words[:1000]


def test_what_a_destination_says_of_its_failure_moves_no_cursor():
    def refuse(hello):
        raise VfioError(errno.ENOMEM, operation="make_memory", hint=ESCAPES * 1000)

    here, there = (SocketTransport(sock, 5) for sock in socket.socketpair())

    def receive():
        with pytest.raises(VfioError), contextlib.closing(there):
            PageReceiver(there, refuse).receive()

    thread = threading.Thread(target=receive)
    thread.start()
    with contextlib.closing(here), guest([bytes(4096)]) as memory, pytest.raises(MigrationError) as caught:
        PrecopySource(here).introduce(memory, PGSIZE)
    thread.join()
    words = str(caught.value)
    assert words.isprintable() and len(words) < 1200 and "the destination gave up" in words and "owned" in words


@pytest.mark.parametrize("name", [ESCAPES, "line\nline", "x" * 1025, "\u202e"], ids=ascii)
def test_a_state_has_a_name_that_can_be_shown(name):
    with pytest.raises(InvalidArgumentError, match="printable"):
        stream.encode_state(name, b"")
    encoded = name.encode()
    with pytest.raises(ProtocolError, match="not printable"):
        stream.decode_state(struct.pack("<H", len(encoded)) + encoded)


def test_a_device_of_a_migrated_guest_has_a_name_that_can_be_shown():
    here = Destination(1 << 20)
    with contextlib.closing(here):
        here.take_state("address space", json.dumps({"devices": [ESCAPES], "mappings": []}).encode())
        with pytest.raises(ProtocolError) as caught:
            here.prepare()
    assert str(caught.value).isprintable()


def test_a_snapshot_of_strange_names_is_shown_in_plain_characters(tmp_path):
    with GuestMemory.memfd(4096) as memory:
        snapshot.save(memory, tmp_path / "guest", states={ESCAPES: b"state"})
    for words, status in ((("show", "guest"), 0), (("load", "guest", "out"), 2)):
        done = subprocess.run([sys.executable, "-m", "vfiodma", "snapshot", *words], cwd=tmp_path, text=True,
                              capture_output=True, env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200",
                                                        "PYTHONPATH": os.pathsep.join(sys.path)})
        assert done.returncode == status and "owned" in done.stdout + done.stderr
        assert all(line.isprintable() for line in (done.stdout + done.stderr).split("\n"))
    assert os.listdir(tmp_path) == ["guest"]
    memory, states = snapshot.load(tmp_path / "guest")
    with memory:
        assert states == {ESCAPES: b"state"}


@contextlib.contextmanager
def answering(path, answer):
    """Somebody at a control socket who says what he likes, once."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()

        def say():
            there, _ = sock.accept()
            with there:
                there.recv(100)
                there.sendall(answer + b"\n")

        thread = threading.Thread(target=say)
        thread.start()
        yield
        thread.join()


@pytest.mark.parametrize("answer, number", [
    (b"[1]", errno.EPROTO), (b"\xff", errno.EPROTO), (b"[" * 100_000, errno.EPROTO), (b"", errno.EPROTO),
    (json.dumps({"error": ESCAPES * 999}).encode(), errno.EREMOTEIO),
], ids=["list", "bytes", "deep", "nothing", "error"])
def test_nonsense_at_a_control_socket_is_an_error_in_plain_words(answer, number, tmp_path):
    with answering(tmp_path / "1.sock", answer), pytest.raises(VfioError) as caught:
        control.ask(tmp_path / "1.sock", "status")
    assert caught.value.errno == number and str(caught.value).isprintable() and len(str(caught.value)) < 1200


def test_what_a_migration_says_of_itself_is_shown_in_plain_characters(tmp_path):
    with answering(tmp_path / "1.sock", json.dumps({"pid": 1, "stage": ESCAPES}).encode()):
        assert control.ask(tmp_path / "1.sock", "status")["stage"].isprintable()


def test_a_control_socket_answers_again_after_a_while_without_descriptors_and_after_a_failure(tmp_path, monkeypatch):
    accept, failures = socket.socket.accept, [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ECONNABORTED]

    def failing(sock):
        if failures:
            number = failures.pop()
            raise OSError(number, os.strerror(number))
        return accept(sock)

    def cancel():
        raise MigrationError(errno.ENOSPC, operation="handover", hint="the journal can't be written")

    monkeypatch.setattr(socket.socket, "accept", failing)
    with control.Control({"status": lambda: {"stage": "rounds"}, "cancel": cancel}, tmp_path / "1.sock") as running:
        assert control.ask(running.path, "status") == {"pid": os.getpid(), "stage": "rounds"} and not failures
        for what, words in (("cancel", "journal"), ("\x1b", "can't be asked")):
            with pytest.raises(VfioError, match=words):
                control.ask(running.path, what)
        assert control.ask(running.path, "status")["stage"] == "rounds"
    assert not running.path.exists()
