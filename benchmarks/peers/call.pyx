# cython: language_level=3
"""What a call into Cython costs that only turns an int into an int: the floor of a single translation."""
from libc.stdint cimport uint64_t


cdef class Floor:
    def call(self, uint64_t number):
        return number + 1
