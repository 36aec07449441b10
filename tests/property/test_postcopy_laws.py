"""Whatever is written before and after, touched first, and cut: the destination has what the source had at pause."""
import ctypes
import os
import random
import threading

import pytest
from postcopy_pair import PAGE, Pair, filled, skip_unless_permitted

from vfiodma.migration.postcopy_source import Postcopy
from vfiodma.migration.stream import Phase

SEEDS = 300 if os.environ.get("VFIODMA_PROFILE") == "deep" else 15
MARK = 16


class Guest(threading.Thread):
    """Touches its share of pages in random order: reads what was there, and writes a mark into some."""

    def __init__(self, memory, source, share, of, chance):
        super().__init__(daemon=True)
        self.pages = [(here.vaddr + page * PAGE, gpa + page * PAGE) for gpa, here in memory
                      for page in range(here.size // PAGE) if page % of == share]
        chance.shuffle(self.pages)
        self.marks = {gpa: chance.randbytes(MARK) for _, gpa in self.pages if chance.random() < 0.3}
        self.source, self.wrong = source, []
        self.start()

    def run(self):
        seen = ctypes.create_string_buffer(PAGE)
        for vaddr, gpa in self.pages:
            if (mark := self.marks.get(gpa)) is not None:
                ctypes.memmove(vaddr + 100, mark, MARK)     # a write is what finds it missing
            ctypes.memmove(seen, vaddr, PAGE)
            wanted = bytearray(self.source.read(gpa, PAGE))
            if mark is not None:
                wanted[100:100 + MARK] = mark
            if seen.raw != bytes(wanted):
                self.wrong.append(gpa)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_the_image_is_the_source_at_pause(tmp_path, seed):
    skip_unless_permitted()
    chance = random.Random(seed)
    channels = chance.choice([1, 1, 2])
    options = {"compression": chance.choice(["none", "zstd", "lz4"]), "channels": channels,
               "checksum": chance.choice(["auto", "crc32"])}
    rounds, writes = chance.randrange(4), chance.choice([0, 5, 300])
    cuts = [None] * channels + [chance.randrange(2, 12) for _ in range(chance.randrange(3))]
    if chance.random() < 0.6:       # the first connection breaks as well, when the guest is given or later
        cuts[0] = chance.randrange(12, 40)
    print(f"seed {seed}: {options}, {rounds} rounds, {writes} writes, cuts {cuts}")
    with filled(seed, chance.random()) as source, \
            Pair(tmp_path, source, writes, seed, Postcopy(rounds, when_needed=False), cuts, **options) as pair:
        assert pair.receiver.serve(10, on_break=print) is Phase.OWNER
        guests = [Guest(pair.memory, source, share, 3, chance) for share in range(3)]
        pair.receiver.finish(20)
        pair.thread.join(20)
        for guest in guests:
            guest.join(20)
        assert pair.failure is None and [guest.wrong for guest in guests] == [[], [], []]
        model = {gpa: bytearray(source.read(gpa, region.size)) for gpa, region in source}
        for guest in guests:
            for gpa, mark in guest.marks.items():
                start = max(base for base in model if base <= gpa)
                model[start][gpa - start + 100:gpa - start + 100 + MARK] = mark
        assert all(pair.memory.read(gpa, len(content)) == content for gpa, content in model.items())
