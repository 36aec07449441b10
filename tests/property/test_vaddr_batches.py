"""Vaddr updates in bulk beside a table in plain Python: of everything, of some, out of order, with a wrong row."""
import errno

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiodma import VfioError
from vfiodma._core.type1 import Type1

PAGE = 4096
SLOTS = 30
SIZES = st.sampled_from([PAGE, PAGE, 2 * PAGE])
STEPS = st.lists(st.one_of(
    st.tuples(st.just("map"), st.integers(0, SLOTS - 1), SIZES),
    st.tuples(st.just("unmap"), st.integers(0, SLOTS - 1)),
    st.tuples(st.just("invalidate"), st.integers(0, SLOTS - 1), st.integers(1, SLOTS)),
    st.tuples(st.just("invalidate everything")), st.tuples(st.just("invalidate everything")),
    st.tuples(st.just("update one"), st.integers(0, SLOTS - 1)),
    st.tuples(st.just("update"), st.sampled_from(["ascending", "ascending", "descending", "halves", "twice"])),
    st.tuples(st.just("update wrongly"), st.integers(0, SLOTS - 1),
              st.sampled_from(["iova", "size", "vaddr", "far", "wraps", "empty"]))), min_size=6, max_size=25)


def wrong_row(row, how):
    """Return the row with something wrong, and the errno that it brings where it is the first one."""
    iova, vaddr, size = row
    return {"iova": ((iova + 1, vaddr, size), errno.EINVAL), "size": ((iova, vaddr, size + PAGE), errno.EINVAL),
            "vaddr": ((iova, vaddr + 1, size), errno.EINVAL), "far": ((iova + (1 << 40), vaddr, size), errno.ENOENT),
            "wraps": ((iova, 2**64 - PAGE, 2 * PAGE), errno.EOVERFLOW), "empty": ((iova, vaddr, 0), errno.EINVAL)}[how]


@given(st.lists(SIZES, max_size=SLOTS), STEPS)
def test_a_batch_of_updates_is_all_or_nothing(sizes, steps):
    instance = Type1("7.2", True, 1000, -2)
    model = {}                                      # iova -> [vaddr, size, valid]
    fresh = iter(range(1 << 20, 1 << 40))

    def vaddr():
        return next(fresh) * 4 * PAGE

    def add(slot, size):
        iova = slot * 4 * PAGE
        if iova not in model:
            model[iova] = [vaddr(), size, True]
            instance.map_dma(iova, model[iova][0], size, 3)

    def waiting():
        return [(iova, vaddr(), size) for iova, (_, size, valid) in sorted(model.items()) if not valid]

    def update(rows):
        instance.update_vaddr_many(np.array(rows, np.uint64).reshape(-1, 3))
        for iova, address, _ in rows:
            model[iova][0], model[iova][2] = address, True

    def refused(rows, code):
        with pytest.raises(VfioError) as caught:
            instance.update_vaddr_many(np.array(rows, np.uint64).reshape(-1, 3))
        assert caught.value.errno == code

    def invalidate(some, call):
        if all(model[iova][2] for iova in some):
            call()
            for iova in some:
                model[iova][2] = False
        else:
            with pytest.raises(VfioError):
                call()

    for slot, size in enumerate(sizes):
        add(slot, size)
    for step, *arguments in steps:
        match step:
            case "map":
                add(*arguments)
            case "unmap":
                iova = arguments[0] * 4 * PAGE
                assert instance.unmap_dma(iova, 4 * PAGE) == model.pop(iova, [0, 0])[1]
            case "invalidate":
                first, last = arguments[0] * 4 * PAGE, (arguments[0] + arguments[1]) * 4 * PAGE - 1
                invalidate([iova for iova in model if first <= iova <= last],
                           lambda at=first, to=last: instance.invalidate_vaddr(at, to - at + 1))
            case "invalidate everything":
                invalidate(list(model), instance.invalidate_vaddr)
            case "update one":
                row = (waiting() or [None])[-1]
                if row:
                    instance.update_vaddr(*row)
                    model[row[0]][0], model[row[0]][2] = row[1], True
            case "update":
                rows = waiting()
                if arguments == ["twice"] and rows:
                    refused([*rows, rows[0]], errno.EINVAL)
                elif arguments == ["halves"]:
                    update(rows[::2])
                    update(waiting())
                else:
                    update(rows if arguments == ["ascending"] else rows[::-1])
            case "update wrongly":
                rows = waiting()
                if rows:
                    at = arguments[0] % len(rows)
                    rows[at], code = wrong_row(rows[at], arguments[1])
                    refused(rows, code)
        assert instance.mappings().tolist() == [[iova, address, size, 3, valid] for iova, (address, size, valid)
                                                in sorted(model.items())]
    instance.close()
