/*
 * The free space of an I/O address space: an ordered set of disjoint gaps, counted in pages of the smallest page size.
 *
 * A B+tree whose every row says where its subtree begins and the largest run of pages in it that begins on a multiple
 * of each of three alignments (one page, 2 MiB, 1 GiB).  So the lowest or the highest gap that fits is found, or
 * refused, in O(log n), exactly, for those alignments.
 *
 * Pages are below 2**52 and no gap ends past it, so `start + npages` can't wrap.  Not thread safe: the caller locks.
 */
#ifndef VFIODMA_GAPS_H
#define VFIODMA_GAPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct gaps gaps;

typedef struct {
    uint64_t npages;    /* at least 1 */
    uint64_t align;     /* in pages, a power of two */
    uint64_t last;      /* the last page that may be taken, inclusive */
    bool top_down;      /* the highest place instead of the lowest */
} gaps_query;

/* `pgshift`: log2 of the page that everything is counted in, 12 to 63. */
gaps *gaps_new(unsigned pgshift);
void gaps_free(gaps *tree);

/* Memory for the next `changes` calls that give or take: 0 or -ENOMEM.  After 0 they can't fail for want of memory. */
int gaps_prepare(gaps *tree, size_t changes);

/*
 * Find a place and take it: 0, -ENOSPC or -ENOMEM.  Lowest (highest when top_down) place for the alignments of one
 * page, 2 MiB and 1 GiB.  Other alignments: the first GAPS_CANDIDATES gaps that could fit are tried in order, then the
 * first gap that is sure to fit, then every other one: still exact about whether there is a place.
 */
enum { GAPS_CANDIDATES = 64 };
int gaps_alloc(gaps *tree, const gaps_query *query, uint64_t *start);

/* Take a given place: 0, -ENOENT when it is not wholly free, -ENOMEM. */
int gaps_take(gaps *tree, uint64_t start, uint64_t npages);

/* Make a place free; it joins its neighbours inside [low, high] only.  0, -EEXIST when part of it is free, -ENOMEM. */
int gaps_give(gaps *tree, uint64_t start, uint64_t npages, uint64_t low, uint64_t high);

/* The first gap that ends at `page` or later. */
bool gaps_next(const gaps *tree, uint64_t page, uint64_t *start, uint64_t *npages);

/* Pages of the largest run up to page `last` that begins on `align` (in pages): O(log n) for the three alignments
 * above, O(n) for others. */
uint64_t gaps_largest(const gaps *tree, uint64_t align, uint64_t last);

size_t gaps_count(const gaps *tree);
uint64_t gaps_pages(const gaps *tree);

/* NULL, or which invariant is broken.  `joined`: gaps that touch are an error. */
const char *gaps_check(const gaps *tree, bool joined);

#endif
