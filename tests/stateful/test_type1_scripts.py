"""Scripts that chance seldom writes: the software VFIO and the oracle side by side, on every kernel."""
import pytest
from oracle import KERNELS
from oracle.memory import PAGE
from oracle.twin import Memory, Twin

MEMORY = Memory()
BASE, TOP = 0x100000, 1 << 64
WORD = (PAGE, 8, MEMORY.bitmap)


@pytest.fixture(params=list(KERNELS))
def twin(request):
    """One host, twice: two ordinary groups alike, a wider one, one whose IOMMU can nest, one emulated."""
    twin = Twin(MEMORY, request.param, {0: {}, 1: {}, 2: {"aperture": (0, (1 << 48) - 1), "reserved": []},
                                        3: {"emulated": True}, 4: {"nestable": True}})
    for name in ("c0", "g0", "g1", "g2", "g3", "g4"):
        twin.open(name)
    yield twin
    if twin.agreed:
        twin.check()
    twin.finish()


def set_up(twin, *groups, kind=3):
    twin.set_container(groups[0], "c0")
    twin.set_iommu("c0", kind)
    for group in groups[1:]:
        twin.set_container(group, "c0")


def test_real_group_rejoins_emulated_container_over_a_mapping_beyond_its_aperture(twin):
    """The ranges end at 2**64 by then: kernels up to 6.12 find no mapping below that end, and fail in the replay."""
    set_up(twin, "g3", "g0")
    twin.unset_container("g0")
    twin.map_dma("c0", 1 << 39, MEMORY.data, PAGE, 3)
    twin.set_container("g0", "c0")


@pytest.mark.parametrize("first", ["g3", "g4"])
def test_nesting_container_refuses_later_groups_that_cannot_nest(twin, first):
    set_up(twin, first, "g0", kind=6)


def test_mapping_that_ends_at_the_top(twin):
    set_up(twin, "g3")
    twin.map_dma("c0", TOP - 2 * PAGE, MEMORY.data, PAGE, 3)
    twin.map_dma("c0", TOP - 2 * PAGE, MEMORY.data, 2 * PAGE, 3)
    twin.map_dma("c0", TOP - 4 * PAGE, MEMORY.data, 2 * PAGE, 3)
    twin.unmap_dma("c0", TOP - PAGE, PAGE, 0)
    for iova, npages in ((TOP - PAGE, 1), (TOP - PAGE, 3), (TOP - 2 * PAGE, 2)):
        twin.pin_pages("c0", "g3", iova, npages, 1)
    twin.check()
    twin.unmap_dma("c0", 0, 0, 2)


def test_external_pins_survive_a_real_group_that_comes_and_goes(twin):
    set_up(twin, "g3")
    twin.map_dma("c0", BASE, MEMORY.data, 8 * PAGE, 3)
    twin.pin_pages("c0", "g3", BASE + PAGE, 2, 3)
    twin.check()
    twin.set_container("g0", "c0")
    twin.check()
    twin.pin_pages("c0", "g0", BASE + 4 * PAGE, 2, 3)
    twin.check()
    twin.dirty("c0", 1)
    twin.get_bitmap("c0", BASE - PAGE, 16 * PAGE, WORD)
    twin.unset_container("g0")
    twin.check()
    for _ in range(2):
        twin.get_bitmap("c0", BASE - PAGE, 16 * PAGE, WORD)
    twin.unpin_pages("c0", BASE + PAGE, 1)
    twin.check()
    twin.unmap_dma("c0", BASE, 8 * PAGE, 1, WORD)


def test_one_of_two_domains_leaves_while_tracking(twin):
    set_up(twin, "g0", "g2")
    twin.dirty("c0", 1)
    twin.map_dma("c0", BASE, MEMORY.data, 8 * PAGE, 3)
    twin.unset_container("g0")
    twin.get_bitmap("c0", BASE, 16 * PAGE, WORD)


def test_left_over_bits_of_a_shifted_bitmap(twin):
    set_up(twin, "g0")
    twin.map_dma("c0", BASE, MEMORY.data, PAGE, 3)
    twin.dirty("c0", 1)
    for _ in range(70):
        twin.get_bitmap("c0", BASE - PAGE, 80 * PAGE, (PAGE, 16, MEMORY.bitmap))


def test_device_keeps_group_and_container(twin):
    set_up(twin, "g0")
    twin.map_dma("c0", BASE, MEMORY.data, 8 * PAGE, 3)
    twin.get_device("g0")
    twin.close("g0")
    twin.open("g0")
    twin.close("c0")
    twin.check()
    twin.close("d0")
    twin.check()
    twin.open("g0")
    twin.get_status("g0", 8)
