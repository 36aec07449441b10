"""Post-copy between processes: devices reach memory that is still to come, and the source is killed in the middle."""
import contextlib
import faulthandler
import os
import random
import resource
import signal
import time

import pytest
from migration_doubles import LogTracker, Machine
from postcopy_pair import GPAS, PAGE, PAGES, filled, make_memory, skip_unless_permitted
from transport_ends import have_openssl, make_certificates

from vfiodma import DirtyBitmap, GuestMemory, IoAddressSpace, SoftwareGroup, open_backend
from vfiodma._core.userfault import MissingPages
from vfiodma.devices.dma_writer import DmaWriter
from vfiodma.errors import PostcopyError
from vfiodma.migration import Migration, PageReceiver, postcopy_destination
from vfiodma.migration.events import PostcopyBegun, PostcopyProgress
from vfiodma.migration.postcopy_source import Postcopy
from vfiodma.migration.stream import Phase
from vfiodma.migration.transport import PipeTransport, connect, listen


@contextlib.contextmanager
def sending(path, memory, **options):
    """Move memory away, in a process of its own; yield its number and a listener for it."""
    with listen(f"unix:{path}/guest", timeout=10.0) as listener:
        if not (pid := os.fork()):
            status = 1
            try:
                Migration(f"unix:{path}/guest", memory, Machine(), tracker=LogTracker,
                          postcopy=Postcopy(0), **options).run()
                status = 0
            finally:
                os._exit(status)
        try:
            yield pid, listener
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture
def source():
    skip_unless_permitted()
    with filled(anonymous=False) as memory:
        yield memory


@pytest.fixture
def memory():
    with make_memory() as memory:
        yield memory


def test_devices_and_threads_that_hold_the_gil_wait_for_pages(tmp_path, source, memory):
    """Through the mapping that the software IOMMU made for itself before pages were missing."""
    device, chance = DmaWriter("0000:00:10.0"), random.Random(3)
    backend = open_backend("software", groups=[SoftwareGroup(1, [device])], memlock_limit=None)
    with contextlib.closing(backend), IoAddressSpace(backend) as ioas, sending(tmp_path, source) as (_, listener):
        for gpa, region in memory:
            ioas.map(region, gpa)
        with PageReceiver(listener.accept(10), lambda _: memory, accept=listener.accept, postcopy=True,
                          fresh=True) as receiver:
            assert receiver.serve() is Phase.OWNER
            wanted = [gpa + page * PAGE for gpa, pages in zip(GPAS, PAGES, strict=True) for page in range(pages)]
            for gpa in chance.sample(wanted, 200):
                assert device._port.read(gpa, 64) == source.read(gpa, 64)
            for gpa, region in memory:
                assert memory.read(gpa, region.size) == source.read(gpa, region.size)
            assert receiver.finish(20).pages > 0


@pytest.mark.parametrize("kind", ["tls", "pipe"])
def test_the_helper_goes_on_with_connections_of_other_kinds(tmp_path, source, kind):
    if kind == "tls" and not have_openssl():
        pytest.skip("openssl makes the certificates")
    files = make_certificates(tmp_path) if kind == "tls" else {}
    there, back = os.pipe(), os.pipe()
    with listen("tls://localhost:0", timeout=10.0, tls=files["destination"]) if files else \
            contextlib.nullcontext() as listener:
        if not (pid := os.fork()):
            try:
                os.close(there[0])
                os.close(back[1])
                Migration(lambda: connect(listener.url, timeout=10.0, tls=files["source"]) if listener else
                          PipeTransport(back[0], there[1], 10.0), source, Machine(), tracker=LogTracker,
                          postcopy=Postcopy(0)).run()
            finally:
                os._exit(0)
        os.close(there[1])
        os.close(back[0])
        transport = listener.accept(10) if listener else PipeTransport(there[0], back[1], 10.0)
        with make_memory() as memory, PageReceiver(transport, lambda _: memory, postcopy=True) as receiver:
            assert receiver.serve() is Phase.OWNER
            assert all(memory.read(gpa, region.size) == source.read(gpa, region.size) for gpa, region in memory)
            assert receiver.finish(20).faults > 0
        os.waitpid(pid, 0)
        if listener:
            os.close(there[0])
            os.close(back[1])


@pytest.mark.parametrize("after", [0, 1, 40, 300])
def test_a_source_that_is_killed_is_a_loud_end_that_names_the_missing_pages(tmp_path, source, memory, after):
    killed = []
    with sending(tmp_path, source, bandwidth_limit=3e5) as (pid, listener):
        def on_postcopy(event):
            if isinstance(event, PostcopyProgress) and not killed:
                killed.append(event.left)

        with PageReceiver(listener.accept(10), lambda _: memory, accept=listener.accept, postcopy=True, fresh=True,
                          on_postcopy=on_postcopy) as receiver:
            assert receiver.serve(0.3) is Phase.OWNER
            for page in random.Random(after).sample(range(PAGES[0]), after):
                assert memory.read(page * PAGE, PAGE) == source.read(page * PAGE, PAGE)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(PostcopyError, match=r"pages that were to come are missing") as caught:
                receiver.finish(20)
            assert 0 < caught.value.missing <= sum(PAGES) - after and receiver.missing == caught.value.missing
            receiver.close(abandon=True)


@pytest.mark.parametrize("paused", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_a_destination_that_is_killed_leaves_a_source_that_says_so_and_never_runs(tmp_path, source, both, paused):
    """With its helper, or without: the helper notices."""
    machine = Machine()
    with listen(f"unix:{tmp_path}/guest", timeout=10.0) as listener:
        if not (pid := os.fork()):
            with make_memory(False) as memory, PageReceiver(listener.accept(10), lambda _: memory,
                                                            postcopy=True, fresh=True) as receiver:
                receiver.serve()
                while receiver.missing == sum(PAGES):       # until the source knows
                    time.sleep(0.01)
                if both:
                    os.kill(receiver._missing._pid, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)

        def on_event(event):
            if isinstance(event, PostcopyBegun):
                listener.close()
            if isinstance(event, PostcopyProgress) and paused:
                migration.pause()

        migration = Migration(f"unix:{tmp_path}/guest", source, machine, tracker=LogTracker, postcopy=Postcopy(0),
                              bandwidth_limit=1e6, reconnect_timeout=0.2,
                              on_event=on_event)
        with pytest.raises(PostcopyError, match="the guest is the destination's") as caught:
            migration.run()
        os.waitpid(pid, 0)
    assert caught.value.missing > 0 and "resume" not in machine.calls and not migration.source.handover.may_run
    migration.source.close()


@pytest.mark.parametrize(("before", "alias", "dropped"), [
    (True, False, False), (True, True, False), (False, False, False), (False, True, True)])
def test_a_helper_that_is_killed_is_a_loud_end_for_a_thread_that_waits_with_the_gil(before, alias, dropped):
    """Of its process: nothing in there could wake it, and nobody may read zeros."""
    skip_unless_permitted()
    stderr, write = os.pipe()
    if not (pid := os.fork()):
        try:
            os.dup2(write, 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            faulthandler.disable()
            with GuestMemory.memfd(8 * PAGE) as memory, memory.region.remap() as other:
                left = DirtyBitmap(8)
                left.set(2, 4)
                pages = MissingPages(memory.region.vaddr, memory.size, left, aliases=[(other.vaddr, 0, 8)])
                heard, told = os.pipe()
                if not (helper := os.fork()):
                    os.write(told, b"x" if not before else b"%d" % pages.next(10)[0])
                    os.kill(os.getpid(), signal.SIGKILL)
                pages.guard(os.pidfd_open(helper))
                if dropped:
                    del pages
                if not before:
                    os.read(heard, 1)
                    os.waitpid(helper, 0)
                (other if alias else memory.region).view()[3 * PAGE:3 * PAGE + 4].tobytes()
        finally:
            os._exit(0)
    os.close(write)
    status = os.waitpid(pid, 0)[1]
    with open(stderr) as words:
        assert "the helper process that places pages is gone" in words.read()
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGBUS, signal.SIGABRT)


def test_a_lost_source_is_a_loud_end_where_a_thread_waits_with_the_gil(tmp_path, source, monkeypatch):
    """Nobody in that process can be told of it."""
    monkeypatch.setattr(postcopy_destination, "_HEARD", 0.2)
    stderr, write = os.pipe()
    with sending(tmp_path, source, bandwidth_limit=1e5) as (sender, listener):
        if not (pid := os.fork()):
            try:
                os.dup2(write, 2)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                faulthandler.disable()
                with make_memory(False) as memory, PageReceiver(
                        listener.accept(10), lambda _: memory, accept=listener.accept, postcopy=True) as receiver:
                    assert receiver.serve(0.2) is Phase.OWNER
                    os.kill(sender, signal.SIGKILL)
                    for gpa, region in memory:
                        memory.read(gpa, region.size)
            finally:
                os._exit(0)
        os.close(write)
        status = os.waitpid(pid, 0)[1]
    with open(stderr) as words:
        said = words.read()
    assert "nobody here can be told" in said and "somebody touches the missing page" in said
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGBUS, signal.SIGABRT)
