from libc.stdint cimport uint64_t

cdef extern from "rangemap.h" nogil:
    ctypedef struct rangemap:
        pass
    ctypedef struct rangemap_entry:
        uint64_t start
        uint64_t last
        uint64_t value
    rangemap *rangemap_new()
    void rangemap_free(rangemap *)
    int rangemap_insert(rangemap *, uint64_t start, uint64_t last, uint64_t value)
    int rangemap_remove(rangemap *, uint64_t start, rangemap_entry *out)
    int rangemap_set_value(rangemap *, uint64_t start, uint64_t value)
    bint rangemap_find(rangemap *, uint64_t key, rangemap_entry *out)
    bint rangemap_lower(rangemap *, uint64_t key, rangemap_entry *out)
    bint rangemap_overlaps(rangemap *, uint64_t start, uint64_t last)
    size_t rangemap_count(rangemap *)
    void rangemap_clear(rangemap *)
    size_t rangemap_copy(rangemap *, uint64_t key, rangemap_entry *out, size_t n)
    int rangemap_build(rangemap *, const rangemap_entry *entries, size_t n)
    int rangemap_build_sizes(rangemap *, const uint64_t *rows, size_t n)
    size_t rangemap_find_many(rangemap *, const uint64_t *keys, uint64_t *out, size_t n, uint64_t miss)
    size_t rangemap_memory(rangemap *)
    const char *rangemap_level(rangemap *)
    int rangemap_check(rangemap *)

cdef extern from "vaddrindex.h" nogil:
    ctypedef struct vaddrindex:
        pass
    ctypedef struct vaddrindex_entry:
        uint64_t vaddr
        uint64_t last
        uint64_t iova
    vaddrindex *vaddrindex_new()
    void vaddrindex_free(vaddrindex *)
    int vaddrindex_insert(vaddrindex *, uint64_t vaddr, uint64_t last, uint64_t iova)
    int vaddrindex_remove(vaddrindex *, uint64_t vaddr, uint64_t iova)
    size_t vaddrindex_find(vaddrindex *, uint64_t address, vaddrindex_entry *out, size_t cap)
    size_t vaddrindex_count(vaddrindex *)
    void vaddrindex_clear(vaddrindex *)
    int vaddrindex_check(vaddrindex *)


cdef class RangeMap:
    cdef rangemap *map      # used only by code that is linked into this module
    cdef list _piece(self, uint64_t key)


cdef class VaddrIndex:
    cdef vaddrindex *index
    cdef list _find(self, uint64_t address, bint whole)
