"""VaddrHandoff: memory moves to another address while devices write into it."""
import contextlib
import errno

import pytest

from vfiodma import GuestMemory, IoAddressSpace, SoftwareGroup, VaddrHandoff, open_backend
from vfiodma.devices.dma_writer import DmaWriter
from vfiodma.errors import InvalidArgumentError, NotMappedError, UnsupportedError, VfioError

PAGE = 4096
SIZE = 64 * PAGE


@contextlib.contextmanager
def address_space(emulated=False):
    device = DmaWriter("0000:00:10.0")
    backend = open_backend("software", groups=[SoftwareGroup(0, [device], emulated=emulated)], memlock_limit=None)
    try:
        with IoAddressSpace(backend) as ioas:
            yield ioas, device, next(iter(backend.ports.values()))
    finally:
        backend.close()


def two_regions():
    memory = GuestMemory()
    memory.add(GuestMemory.memfd(SIZE).region, 0)
    memory.add(GuestMemory.memfd(SIZE).region, 1 << 32)
    return memory


def test_every_mapping_leads_to_the_new_address_and_dma_went_on():
    with address_space() as (ioas, device, port):
        memory = two_regions()
        first, second = memory.regions
        places = [(ioas.map(first, offset=at, size=4 * PAGE).iova, at) for at in range(0, SIZE, 8 * PAGE)]
        whole = ioas.map(second).iova
        device.working_set, device.rate = [(whole, SIZE)], 50 << 20
        device.start()
        moved, times = VaddrHandoff(ioas, memory).move()
        port.write(places[1][0], b"after")
        device.stop()
        assert memory.regions == () and times.mappings == 9
        assert times.total >= times.engine > 0
        assert all(ioas.translate(iova) == moved.regions[0].vaddr + at for iova, at in places)
        assert ioas.translate(whole) == moved.regions[1].vaddr
        assert moved.read(8 * PAGE, 5) == b"after"
        assert device.faulted == 0
        ioas.unmap_all()
        moved.close()


def test_while_vaddrs_are_invalid_translation_fails_and_dma_works():
    with address_space() as (ioas, _, port), GuestMemory.memfd(SIZE) as memory:
        iova = ioas.map(memory).iova
        handoff = VaddrHandoff(ioas, memory)
        assert handoff.invalidate() == SIZE
        with pytest.raises(NotMappedError):
            ioas.translate(iova)
        port.write(iova, b"device")
        assert handoff.restore(memory) == 1
        assert ioas.read(iova, 6) == b"device"
        ioas.unmap_all()


def test_memory_that_can_not_be_mapped_again_keeps_its_old_address():
    def fail():
        raise VfioError(errno.ENOMEM, operation="mmap")

    with address_space() as (ioas, _, _), GuestMemory.memfd(SIZE) as memory:
        iova = ioas.map(memory).iova
        with pytest.raises(VfioError, match="mmap"):
            VaddrHandoff(ioas, memory).move(fail)
        assert ioas.translate(iova) == memory.region.vaddr
        ioas.unmap_all()


def test_a_smaller_memory_is_refused_and_the_right_one_can_follow():
    with address_space() as (ioas, _, _), GuestMemory.memfd(SIZE) as memory, GuestMemory.memfd(PAGE) as small:
        ioas.map(memory)
        handoff = VaddrHandoff(ioas, memory)
        handoff.invalidate()
        with pytest.raises(InvalidArgumentError, match="another layout"):
            handoff.restore(small)
        handoff.restore(memory)
        ioas.unmap_all()


def test_an_emulated_group_stands_against_it():
    with address_space(emulated=True) as (ioas, _, _), GuestMemory.memfd(SIZE) as memory:
        ioas.map(memory)
        with pytest.raises(UnsupportedError, match="no emulated group"):
            VaddrHandoff(ioas, memory)
        ioas.unmap_all()


def test_private_and_foreign_memory_is_refused_before_anything_happens():
    with address_space() as (ioas, _, _), GuestMemory.anonymous(SIZE) as private, GuestMemory.memfd(SIZE) as other:
        iova = ioas.map(private).iova
        with pytest.raises(UnsupportedError, match="anonymous memory"):
            VaddrHandoff(ioas, private)
        with pytest.raises(InvalidArgumentError, match="leads to other memory"):
            VaddrHandoff(ioas, other)
        assert ioas.translate(iova) == private.region.vaddr
        ioas.unmap_all()
