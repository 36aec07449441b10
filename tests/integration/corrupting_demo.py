"""The demo with a damaged source: a staged page is changed before its checksum is taken."""
import sys

from vfiodma.cli import main
from vfiodma.migration.sender import _ChannelSender

sound = _ChannelSender._seal


def damage_the_last_byte(self, block, runs, staged):
    if int(runs[-1].sum()) == block.npages:
        staged[-1] ^= 1      # of the last page, which no device writes
    return sound(self, block, runs, staged)


_ChannelSender._seal = damage_the_last_byte
sys.argv[0] = "vfiodma"
main()
