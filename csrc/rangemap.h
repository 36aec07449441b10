/*
 * Ordered map of disjoint ranges [start, last] of 64-bit addresses to a 64-bit value.
 *
 * `last` is inclusive: a range may end at 2^64-1.  The value is opaque.  Any number of readers (find, find_many,
 * lower, overlaps) may run beside writers without taking a lock; writers take the map's own mutex.  An entry that a
 * reader got was in the map at some moment during its call.  Functions return 0 or -errno unless they say otherwise.
 */
#ifndef VFIODMA_RANGEMAP_H
#define VFIODMA_RANGEMAP_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct rangemap rangemap;

typedef struct {
    uint64_t start, last, value;
} rangemap_entry;

typedef struct {
    uint64_t last, value;
} rangemap_tail;

/* NULL when out of memory.  The environment variable VFIODMA_CPU=scalar|avx2|avx512 lowers its CPU level. */
rangemap *rangemap_new(void);
void rangemap_free(rangemap *map);

/* Add [start, last].  -EINVAL if last < start, -EEXIST if it overlaps an entry, -ENOMEM; the map is then as before. */
int rangemap_insert(rangemap *map, uint64_t start, uint64_t last, uint64_t value);

/* Remove the entry that begins at exactly `start`; it goes to *out unless that is NULL.  -ENOENT if there is none. */
int rangemap_remove(rangemap *map, uint64_t start, rangemap_entry *out);

/* Replace the value of the entry that begins at exactly `start`.  -ENOENT if there is none. */
int rangemap_set_value(rangemap *map, uint64_t start, uint64_t value);

/* The entry that contains key.  `out` may be NULL here and below. */
bool rangemap_find(rangemap *map, uint64_t key, rangemap_entry *out);

/* The first entry with last >= key: the one that contains key, or the next above it. */
bool rangemap_lower(rangemap *map, uint64_t key, rangemap_entry *out);

/* Does an entry share an address with [start, last]? */
bool rangemap_overlaps(rangemap *map, uint64_t start, uint64_t last);

size_t rangemap_count(rangemap *map);

/* Remove everything.  Memory stays with the map until rangemap_free(), as readers may still look at it. */
void rangemap_clear(rangemap *map);

/* Copy up to n entries, ascending, from the first with last >= key: one consistent moment.  Returns how many. */
size_t rangemap_copy(rangemap *map, uint64_t key, rangemap_entry *out, size_t n);

/*
 * Show every entry to `visit`, some at a time, ascending, until it returns false: starts beside what belongs to them.
 * It must not use the map.
 */
void rangemap_visit(rangemap *map, bool (*visit)(void *, const uint64_t *start, const rangemap_tail *, unsigned n),
                    void *context);

/* Fill an empty map from ascending, disjoint entries, in linear time; -EINVAL if they are not, -EEXIST if it isn't. */
int rangemap_build(rangemap *map, const rangemap_entry *entries, size_t n);

/* The same from n rows of start, size, value.  -EINVAL too if a size is 0 or a range goes beyond 2^64-1. */
int rangemap_build_sizes(rangemap *map, const uint64_t *rows, size_t n);

/* out[i] = value + keys[i] - start of the entry that contains keys[i], or `miss`.  Returns the hits. */
size_t rangemap_find_many(rangemap *map, const uint64_t *keys, uint64_t *out, size_t n, uint64_t miss);

/* Bytes of memory that the map holds. */
size_t rangemap_memory(rangemap *map);

/* The CPU level that the map uses: "scalar", "avx2" or "avx512". */
const char *rangemap_level(rangemap *map);

/* For tests: 0, or the number of the first broken invariant (see rangemap.c). */
int rangemap_check(rangemap *map);
#endif
