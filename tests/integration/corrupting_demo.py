"""The demo with a damaged source: a staged page is changed before its checksum is taken."""
import sys

from vfiodma.cli import main
from vfiodma.migration.sender import _ChannelSender

sound = _ChannelSender._send_pages


def damage_the_last_byte(self, block, runs, npages, epoch):
    if int(runs[-1].sum()) == block.npages:
        self._stage[npages * self._pgsize - 1] ^= 1      # of the last page, which no device writes
    sound(self, block, runs, npages, epoch)


_ChannelSender._send_pages = damage_the_last_byte
sys.argv[0] = "vfiodma"
main()
