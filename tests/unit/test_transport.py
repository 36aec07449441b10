"""Transports by URL: the same bytes over each, what is refused, and what a lost or silent peer is."""
import contextlib
import errno
import os
import socket
import stat
import threading
import time

import pytest
from migration_doubles import PGSIZE, LogTracker, Machine, Peer, content_of, guest
from transport_ends import have_openssl, make_certificates

from vfiodma.errors import InvalidArgumentError, MigrationError, ProtocolError
from vfiodma.migration import PrecopySource
from vfiodma.migration.layout import MemoryLayout
from vfiodma.migration.transport import PipeTransport, TlsFiles, TlsTransport, connect, listen

CONTENT = [bytes(512) + b"a" * 3072 + bytes(512), os.urandom(64 << 10)]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """TlsFiles of a destination on localhost, a source, a stranger from another authority, and others."""
    if not have_openssl():
        pytest.skip("needs openssl")
    return make_certificates(tmp_path_factory.mktemp("tls"))


@contextlib.contextmanager
def connected(url, here=None, there=None, timeout=10):
    """Both ends of a connection: (source's, destination's)."""
    with listen(url, timeout=timeout, tls=there) as listener:
        accepted = []
        thread = threading.Thread(target=lambda: accepted.append(listener.accept(10)))
        thread.start()
        source = connect(listener.url, timeout=timeout, tls=here)
        thread.join()
    with contextlib.closing(source), contextlib.closing(accepted[0]):
        yield source, accepted[0]


@contextlib.contextmanager
def by_descriptors(urls, timeout):
    """Both ends of descriptors that are open already."""
    ends = [connect(url, timeout=timeout) for url in urls]
    with contextlib.closing(ends[0]), contextlib.closing(ends[1]):
        yield ends


@pytest.fixture(params=["unix", "tcp", "tcp6", "tls", "fd", "fds", "pipe"])
def transports(request, tmp_path):
    """A function that connects two ends, for each kind of transport."""
    files = request.getfixturevalue("certificates") if request.param == "tls" else {}

    def manager(timeout):
        if request.param in ("fd", "fds"):
            fds = [sock.detach() for sock in socket.socketpair()]
            return by_descriptors([f"fd:{fd}" if request.param == "fd" else f"fd:{fd},{fd}" for fd in fds], timeout)
        if request.param == "pipe":
            (to_read, to_send), (back_read, back_send) = os.pipe(), os.pipe()
            return by_descriptors([f"fd:{back_read},{to_send}", f"fd:{to_read},{back_send}"], timeout)
        url = {"unix": f"unix:{tmp_path}/socket", "tcp": "tcp://127.0.0.1:0", "tcp6": "tcp://[::1]:0",
               "tls": "tls://localhost:0"}[request.param]
        return connected(url, files.get("source"), files.get("destination"), timeout)

    with contextlib.ExitStack() as stack:
        def pair(timeout=10):
            try:
                return stack.enter_context(manager(timeout))
            except MigrationError as exc:
                if request.param == "tcp6" and exc.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    pytest.skip("no IPv6 here")
                raise
        yield pair


@pytest.fixture
def pair(transports):
    return transports()


def test_all_bytes_arrive_in_order(pair):
    here, there = pair
    parts = [os.urandom(size) for size in (1, 0, 44, 3 << 20, 17)] + [bytes([at % 256]) for at in range(1500)]
    sender = threading.Thread(target=here.send, args=(parts,))
    sender.start()
    whole = bytearray(sum(map(len, parts)))
    view = memoryview(whole)
    there.receive_into(view[:1000])
    there.receive_parts([view[1000:1001], view[1001:1001], view[1001:2 << 20], view[2 << 20:]])
    sender.join()
    assert whole == b"".join(parts)


@pytest.mark.parametrize("checksum", ["auto", "none"])
def test_a_guest_moves(pair, checksum):
    here, there = pair
    with guest(CONTENT) as memory, guest([b"\xee" * 4096, b"\xee" * (64 << 10)]) as target:
        peer = Peer.__new__(Peer)
        threading.Thread.__init__(peer)
        from vfiodma.migration import PageReceiver
        peer.transport, peer.verify, peer.failure = there, True, None
        peer.receiver = PageReceiver(there, lambda hello: target, checksum=checksum)
        peer.start()
        with MemoryLayout(memory, PGSIZE) as layout:
            source = PrecopySource(here, checksum=checksum)
            source.introduce(memory, PGSIZE)
            source.migrate(layout, LogTracker(layout), Machine())
            assert len(set(source.verify(layout))) == 1
            source.release()
        peer.join()
        assert peer.failure is None
        assert content_of(target) == CONTENT


def test_a_peer_that_closes_is_an_early_end_and_then_lost(pair):
    here, there = pair
    there.close()
    with pytest.raises((ProtocolError, MigrationError)):
        here.receive_into(memoryview(bytearray(4)))
    with pytest.raises(MigrationError) as caught:
        for _ in range(50):
            here.send([bytes(1 << 20)])
    assert caught.value.errno == errno.ECONNRESET


def test_a_silent_peer_is_given_up_in_time(transports):
    here, _ = transports(0.2)
    began = time.monotonic()
    for wait in (lambda: here.receive_into(memoryview(bytearray(4))), lambda: here.send([bytes(64 << 20)])):
        with pytest.raises(MigrationError, match="did not move for 0.2 s") as caught:
            wait()
        assert caught.value.errno == errno.ETIMEDOUT
    assert time.monotonic() - began < 5


def test_the_other_side_notices_that_nothing_more_will_be_sent(pair):
    here, there = pair
    here.interrupt(receiving=False)
    if isinstance(here, PipeTransport):
        here.close()        # a pipe has no other way to say so
    with pytest.raises((ProtocolError, MigrationError)) as caught:
        there.receive_into(memoryview(bytearray(4)))
    assert caught.value.errno in (errno.EPROTO, errno.ECONNRESET)


@pytest.mark.parametrize("doing", ["receive", "send"])
def test_a_thread_that_waits_is_interrupted_and_the_other_direction_stays(transports, doing):
    here, there = transports()
    failures = []

    def wait():
        try:
            if doing == "receive":
                here.receive_into(memoryview(bytearray(4)))
            else:
                here.send([bytes(64 << 20)])
        except MigrationError as exc:
            failures.append(exc.errno)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.05)
    here.interrupt(receiving=doing == "receive", sending=doing == "send")
    here.interrupt(receiving=doing == "receive", sending=doing == "send")
    waiting.join(5)
    assert failures == [errno.ECANCELED]
    wait()
    assert failures == [errno.ECANCELED] * 2
    if doing == "receive":
        here.send([b"last"])
        there.receive_into(memoryview(bytearray(4)))
    else:
        there.send([b"last"])
        here.receive_into(memoryview(bytearray(4)))


def test_descriptors_that_are_no_good_are_refused_and_stay_open():
    read, write = os.pipe()
    try:
        for url in (f"fd:{write},{write}", f"fd:{read},{read}", f"fd:{write},{read}", f"fd:{read},999999"):
            with pytest.raises(MigrationError) as caught:
                connect(url)
            assert caught.value.errno == errno.EBADF
        assert os.get_blocking(read) and os.get_blocking(write)
        with socket.socket() as lone, pytest.raises(MigrationError) as caught:
            connect(f"fd:{lone.fileno()},{write}")
        assert caught.value.errno == errno.ENOTCONN
    finally:
        os.close(read)
        os.close(write)


def test_closed_pipes_touch_no_file_that_got_their_numbers():
    (there, write), (read, here) = os.pipe(), os.pipe()
    transport = connect(f"fd:{read},{write}")
    transport.close()
    other = os.memfd_create("other")
    try:
        assert other in (read, write)
        for call in (lambda: transport.send([b"frame"]), lambda: transport.receive_into(memoryview(bytearray(1)))):
            with pytest.raises(MigrationError) as caught:
                call()
            assert caught.value.errno == errno.EBADF
        assert os.fstat(other).st_size == 0
    finally:
        for fd in (other, there, here):
            os.close(fd)


@pytest.mark.parametrize("url", ["", "unix:", "fd:", "fd:-1", "fd:x", "tcp://", "tcp://host", "tcp://:1", "tcp://h:99999",
                                 "tcp://h:1/path", "tcp://u@h:1", "tcp://h:1?x=1", "http://h:1", "h:1", "tls://h",
                                 "unix:a\0b", "fd:1,", "fd:1,2,3", "fd:1,-2"])
def test_a_url_of_no_kind_is_refused(url):
    for function in (connect, listen):
        with pytest.raises(InvalidArgumentError):
            function(url)
    with pytest.raises(TypeError):
        connect(b"unix:/x")


@pytest.mark.parametrize("address", ["0.0.0.0", "[::]", "192.0.2.1", "[2001:db8::1]", "10.0.0.1"])
def test_memory_in_the_clear_over_a_network_needs_the_word(address):
    for function in (connect, listen):
        with pytest.raises(MigrationError, match="in the clear") as caught:
            function(f"tcp://{address}:1")
        assert caught.value.errno == errno.EPERM
    with listen("tcp://0.0.0.0:0", insecure=True) as listener:
        assert listener.url.startswith("tcp://0.0.0.0:")


def test_certificates_and_their_url_belong_together(tmp_path):
    files = TlsFiles(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    for function in (connect, listen):
        with pytest.raises(InvalidArgumentError, match="certificates"):
            function("tls://127.0.0.1:1")
        with pytest.raises(InvalidArgumentError, match="belong together"):
            function("tcp://127.0.0.1:1", tls=files)
    here, there = socket.socketpair()
    with there, pytest.raises(MigrationError, match="can't be used") as caught:
        TlsTransport(here, files, "localhost")
    assert caught.value.errno == errno.ENOENT and here.fileno() == -1


@pytest.mark.parametrize("source, destination", [("stranger", "destination"), ("source", "stranger"),
                                                 ("source", "elsewhere"), ("expired", "destination"),
                                                 ("source", "expired")])
def test_a_certificate_of_another_authority_or_host_or_time_is_refused(certificates, source, destination):
    with listen("tls://localhost:0", timeout=10, tls=certificates[destination]) as listener:
        failures = []

        def accept():
            try:
                with contextlib.closing(listener.accept()) as there:
                    there.receive_into(memoryview(bytearray(1)))
            except OSError as exc:
                failures.append(exc)

        thread = threading.Thread(target=accept)
        thread.start()
        with pytest.raises(MigrationError) as caught:
            with contextlib.closing(connect(listener.url, timeout=10, tls=certificates[source])) as here:
                here.receive_into(memoryview(bytearray(1)))
        thread.join()
    assert caught.value.errno == errno.EKEYREJECTED
    assert isinstance(failures[0], MigrationError) and failures[0].errno == errno.EKEYREJECTED


def test_a_peer_without_tls_or_certificate_is_refused(certificates):
    with listen("tls://127.0.0.1:0", timeout=10, tls=certificates["destination"]) as listener:
        plain = connect(listener.url.replace("tls", "tcp"), timeout=10)
        plain.send([b"VDMA" * 100])
        with contextlib.closing(plain), pytest.raises(MigrationError) as caught:
            listener.accept()
        assert caught.value.errno == errno.EPROTO


def test_a_handshake_that_stalls_is_given_up_in_time(certificates):
    with listen("tls://127.0.0.1:0", timeout=0.2, tls=certificates["destination"]) as listener:
        with contextlib.closing(connect(listener.url.replace("tls", "tcp"))), pytest.raises(MigrationError) as caught:
            listener.accept()
    assert caught.value.errno == errno.ETIMEDOUT


def test_nobody_there_is_an_error_in_time(tmp_path):
    with pytest.raises(MigrationError) as caught:
        connect(f"unix:{tmp_path}/none")
    assert caught.value.errno == errno.ENOENT
    with listen("tcp://127.0.0.1:0", timeout=0.1) as listener:
        with pytest.raises(MigrationError, match="nobody connected") as caught:
            listener.accept()
        assert caught.value.errno == errno.ETIMEDOUT
    with pytest.raises(MigrationError) as caught:
        connect(listener.url)
    assert caught.value.errno == errno.ECONNREFUSED
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InvalidArgumentError):
            connect("tcp://127.0.0.1:1", timeout=timeout)


def test_a_unix_socket_is_its_owners_only_and_its_file_goes(tmp_path):
    path = tmp_path / "socket"
    with listen(f"unix:{path}"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(MigrationError) as caught:
            listen(f"unix:{path}")
        assert caught.value.errno == errno.EADDRINUSE
        assert path.exists()
    assert not path.exists()
    path.write_text("not a socket")
    with pytest.raises(MigrationError):
        listen(f"unix:{path}")
    assert path.read_text() == "not a socket"
    for call in (listen, connect):
        with pytest.raises(MigrationError) as caught:
            call(f"unix:{tmp_path}/{'x' * 200}")
        assert caught.value.errno == errno.ENAMETOOLONG


def test_a_descriptor_must_be_a_connected_stream_socket():
    with open(os.devnull) as file, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams, \
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as alone:
        for thing, number in [(file, errno.ENOTSOCK), (datagrams, errno.EPROTOTYPE), (alone, errno.ENOTCONN)]:
            with pytest.raises(MigrationError) as caught:
                connect(f"fd:{thing.fileno()}")
            assert caught.value.errno == number
            os.fstat(thing.fileno())        # still open
    with pytest.raises(MigrationError) as caught:
        connect("fd:999999")
    assert caught.value.errno == errno.EBADF
    with pytest.raises(InvalidArgumentError, match="are connected already"):
        listen("fd:3")


def test_without_descriptors_left_it_is_a_typed_error_and_nothing_is_left_open(tmp_path, monkeypatch):
    def none_left(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    read, write = os.pipe()
    with listen(f"unix:{tmp_path}/guest") as listener:
        before = set(os.listdir("/proc/self/fd"))
        for module, name, call in ((socket, "socket", lambda: connect(listener.url)),
                                   (socket, "socket", lambda: listen(f"unix:{tmp_path}/other")),
                                   (os, "eventfd", lambda: connect(f"fd:{read},{write}"))):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, none_left)
                with pytest.raises(MigrationError) as caught:
                    call()
            assert caught.value.errno == errno.EMFILE
        assert set(os.listdir("/proc/self/fd")) == before
    os.close(read)
    os.close(write)
