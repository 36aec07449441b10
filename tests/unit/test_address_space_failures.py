"""IoAddressSpace on a fake backend: failures at every step and bad input leave everything as it was."""
import errno
import mmap

import pytest
from fake_backend import FailNth, Failure, FakeBackend, recorder, refused, state

from vfiodma import errors
from vfiodma._core.bitmap import DirtyBitmap
from vfiodma.address_space import IoAddressSpace
from vfiodma.memory import GuestMemory

PAGE = mmap.PAGESIZE
BASE = 0x100000


# A failure at every step

def operations(memory, moved):
    """Each change, as (what is there before, the change)."""
    vaddr = memory.region.vaddr
    rows = [(BASE * i, vaddr + i * PAGE, PAGE, 3) for i in range(1, 5)]

    def nothing(ioas):
        pass

    def four(ioas):
        ioas.map_many(rows, keep=memory.region)

    def four_invalid(ioas):
        four(ioas)
        ioas.invalidate_vaddr()
    return {
        "map": (nothing, lambda ioas: ioas.map(memory)),
        "map at": (four, lambda ioas: ioas.map(memory, BASE * 9)),
        "map_memory": (four, lambda ioas: ioas.map_memory(memory, BASE * 9)),
        "map_many": (nothing, four),
        "unmap": (four, lambda ioas: ioas.unmap(BASE)),
        "unmap_all": (four, lambda ioas: ioas.unmap_all()),
        "invalidate": (four, lambda ioas: ioas.invalidate_vaddr()),
        "update": (four_invalid, lambda ioas: ioas.update_vaddr(BASE, moved, offset=PAGE)),
        "update_many": (four_invalid, lambda ioas: ioas.update_vaddr_many(
            [(iova, address - vaddr + moved.region.vaddr, size) for iova, address, size, _ in rows],
            keep=moved.region)),
    }


# After the backend has unmapped or invalidated, what follows can't fail: only the steps up to there are tried.
LAST_STEP = {"unmap": 1, "unmap_all": 1, "invalidate": 1}


@pytest.mark.parametrize("features", [("map_many", "vaddr", "unmap_all"), ("vaddr",)])
@pytest.mark.parametrize("name", ["map", "map at", "map_memory", "map_many", "unmap", "unmap_all", "invalidate",
                                  "update", "update_many"])
def test_failure_at_any_step_leaves_the_state_as_it_was(name, features):
    memory = GuestMemory.memfd(8 * PAGE)
    moved = memory.remap()
    failed = 0
    for step in range(1, LAST_STEP.get(name, 60) + 1):
        with IoAddressSpace(FakeBackend(features)) as ioas:
            ioas.add_listener(**recorder([], "a"))
            faults = FailNth()
            ioas.add_listener(mapped=lambda _, faults=faults: faults.step())
            prepare, change = operations(memory, moved)[name]
            prepare(ioas)
            faults.wrap_all(ioas)
            before = state(ioas)
            faults.left = step
            try:
                change(ioas)
            except Failure:
                failed += 1
                assert state(ioas) == before, f"step {step}"
            else:
                break
            finally:
                faults.left = None
            change(ioas)        # and now it works
    assert failed == step - (name not in LAST_STEP) and failed
    moved.close()
    memory.close()


def test_roll_back_that_fails_keeps_the_place(ioas, backend, memory):
    def refuse(_):
        raise Failure

    def fail(iova, size):
        raise OSError(errno.EIO, "stuck")
    ioas.add_listener(mapped=refuse)
    backend.unmap_dma = fail
    with pytest.raises(Failure) as caught:
        ioas.map(memory, BASE)
    assert "stuck" in caught.value.__notes__[0]
    del caught
    assert [(r.start, r.last) for r in ioas.allocator.allocations()] == [(BASE, BASE + 8 * PAGE - 1)]
    del backend.unmap_dma


# Bad input

BAD_RANGES = [(BASE + 1, PAGE), (BASE, PAGE + 1), (BASE, 0), (BASE, -PAGE), (-PAGE, PAGE), (1 << 64, PAGE),
              (2**64 - PAGE, 2 * PAGE), (BASE, 1 << 64), (BASE, 1 << 70), (1 << 80, PAGE)]
RANGE_CALLS = {
    "map": lambda ioas, memory, iova, size: ioas.map(memory, iova, size=size),
    "map address": lambda ioas, memory, iova, size: ioas.map(memory.region.vaddr, iova, size=size),
    "map_many": lambda ioas, memory, iova, size: ioas.map_many([(iova, memory.region.vaddr, size, 3)]),
    "unmap": lambda ioas, memory, iova, size: ioas.unmap(iova, size),
    "invalidate": lambda ioas, memory, iova, size: ioas.invalidate_vaddr(iova, size),
    "harvest": lambda ioas, memory, iova, size: ioas.harvest_marked(iova, size, DirtyBitmap(8, PAGE)),
}


@pytest.mark.parametrize(("iova", "size"), BAD_RANGES)
@pytest.mark.parametrize("name", RANGE_CALLS)
def test_bad_range_is_a_typed_error_and_changes_nothing(name, iova, size, ioas, memory):
    ioas.map(memory, 8 * BASE)
    before = state(ioas)
    try:
        RANGE_CALLS[name](ioas, memory, iova, size)
    except errors.VfioError as exc:
        assert exc.errno in {errno.EINVAL, errno.EOVERFLOW, errno.ENOENT} and exc.operation
        exc.__traceback__ = None
    else:
        pytest.fail("no error")
    assert state(ioas) == before


@pytest.mark.parametrize("call", [
    lambda ioas, memory: ioas.map(None), lambda ioas, memory: ioas.map("text"), lambda ioas, memory: ioas.map(object()),
    lambda ioas, memory: ioas.map(memory, "1"), lambda ioas, memory: ioas.map(memory, 1.0),
    lambda ioas, memory: ioas.map(memory, True), lambda ioas, memory: ioas.map(memory, prot="rw"),
    lambda ioas, memory: ioas.map(memory, size=1.5), lambda ioas, memory: ioas.map(memory, offset=None),
    lambda ioas, memory: ioas.map(memory.region.vaddr), lambda ioas, memory: ioas.map(memory, colour=1),
    lambda ioas, memory: ioas.unmap(None), lambda ioas, memory: ioas.unmap(1.0),
    lambda ioas, memory: ioas.translate("1"), lambda ioas, memory: ioas.read(BASE, None),
    lambda ioas, memory: ioas.write(BASE, "text"), lambda ioas, memory: ioas.map_many([(1.5, 0, PAGE, 3)]),
    lambda ioas, memory: ioas.map_many(None), lambda ioas, memory: ioas.sgl(BASE, "1"),
    lambda ioas, memory: ioas.mark_dirty(None, 1), lambda ioas, memory: ioas.update_vaddr("1", memory),
])
def test_wrong_type_is_a_type_error_and_changes_nothing(call, ioas, memory):
    before = state(ioas)
    with pytest.raises(TypeError) as caught:
        call(ioas, memory)
    del caught
    assert state(ioas) == before


@pytest.mark.parametrize("prot", [0, 4, 7, -1, 1 << 70])
def test_permission_that_is_none_is_einval(prot, ioas, memory):
    refused(errno.EINVAL, ioas.map, memory, prot=prot)


def test_rows_of_another_shape_are_einval(ioas):
    refused(errno.EINVAL, ioas.map_many, [(1, 2, 3)])
    refused(errno.EINVAL, ioas.map_many, [1, 2, 3, 4])


def test_overlap_and_space_outside_of_the_ranges(memory):
    with IoAddressSpace(FakeBackend(ranges=((0, 0xFFFFF),))) as ioas:
        ioas.map(memory, 0x10000)
        before = state(ioas)
        assert isinstance(refused(errno.EEXIST, ioas.map, memory, 0x11000), errors.OverlapError)
        assert refused(errno.EINVAL, ioas.map, memory, 0xFF000).operation == "map_dma"
        assert isinstance(refused(errno.ENOSPC, ioas.map, memory, limit=0x7FFF), errors.IovaSpaceError)
        assert state(ioas) == before


def test_last_page_of_the_address_space_can_be_mapped(memory):
    backend = FakeBackend(ranges=())
    with IoAddressSpace(backend) as ioas:
        iova = 2**64 - 8 * PAGE
        ioas.map(memory, iova)
        assert ioas.translate(2**64 - 1) == memory.region.last and ioas.mappings()[0].iova == iova
        ioas.write(2**64 - 1, b"x")
        assert ioas.read(2**64 - 2, 2) == b"\0x"
        refused(errno.EOVERFLOW, ioas.read, 2**64 - 1, 2)
        assert ioas.unmap(iova) == 8 * PAGE
