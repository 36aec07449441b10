"""Dirty bits of one mapping as raw words, with the left-over bits that the kernel's in-place shift leaves behind.

Source: type1.md 8.3, 8.4.
"""

WORD = (1 << 64) - 1


class DirtyWords:
    """Storage of ``nbits`` bits rounded up to words, plus one word."""

    def __init__(self, nbits):
        self.nbits = nbits
        self.nwords = (nbits + 63) // 64 + 1
        self.value = 0                      # all words as one integer, word 0 lowest

    def set(self, first, n=1):
        self.value |= ((1 << n) - 1) << first

    def copy_out(self, memory, data, bit):
        """Store the bits into user words at ``data``, whose bit 0 is ``bit`` bits before this mapping's first."""
        at, shift = data + bit // 64 * 8, bit % 64
        nwords = (self.nbits + shift + 63) // 64
        low = (1 << 64 * nwords) - 1
        if shift:
            self.value = (self.value & ~low) | ((self.value & low) << shift) & low
            self.value |= int.from_bytes(memory.read(at, 8), "little")
        memory.write(at, (self.value & low).to_bytes(8 * nwords, "little"))

    def reseed(self, pinned):
        """After a query: clear the mapping's own bits, set those of the pages still pinned."""
        self.value &= ~((1 << self.nbits) - 1)
        for bit in pinned:
            self.set(bit)
