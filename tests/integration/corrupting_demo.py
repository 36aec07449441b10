"""The demo with a damaged source: once, a copied page is changed before its checksum is taken."""
import sys

from vfiodma.cli import main
from vfiodma.migration import precopy

sound = precopy.gather


def damage_the_last_byte(source, runs, out, pgsize):
    copied = sound(source, runs, out, pgsize)
    if int(runs[-1].sum()) * pgsize == len(source):
        out[copied - 1] ^= 1        # of the last page, which no device writes
    return copied


precopy.gather = damage_the_last_byte
sys.argv[0] = "vfiodma"
main()
