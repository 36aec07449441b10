/*
 * An I/O address space as an allocator sees it: the valid ranges, what is in use, and the gaps between, all in pages
 * of the smallest page size (below 2**52).
 *
 * Page 0 counts as valid when a range holds it, but only iovaspace_reserve() takes it: it never is in a gap.
 *
 * Ephemeral allocations live in chunks carved from the top of the gaps, with gaps of their own.  A chunk goes back when
 * its last allocation is freed.  It is dissolved (its free pages go back, what is in use stays) when a place inside is
 * asked for, or when the lasting gaps are exhausted; that is paid for by the allocations which broke the chunk up, so
 * every call stays O(log n), amortized over those.
 *
 * Functions with a space as argument need its lock.  They return 0 or -errno; after an error nothing has changed.
 */
#ifndef VFIODMA_IOVASPACE_H
#define VFIODMA_IOVASPACE_H

#include <pthread.h>

#include "gaps.h"
#include "rangemap.h"

typedef struct {
    uint64_t start, last;
} iovaspace_range;

typedef struct {
    pthread_mutex_t lock;
    unsigned pgshift;
    uint64_t chunk_align, chunk_pages;
    gaps *lasting, *pool;
    rangemap *used;             /* value: guard pages at the end of the entry */
    rangemap *chunks;           /* value: allocations alive in the chunk */
    iovaspace_range *valid;     /* sorted, disjoint, not touching */
    size_t nvalid;
    uint64_t used_pages;        /* with guards, stranded ones too */
    uint64_t total_pages;
} iovaspace;

typedef struct {
    uint64_t npages, guard, align;
    uint64_t last;              /* last page of the allocation, without its guard */
    uint64_t hint;              /* IOVASPACE_NO_HINT: none */
    uint64_t hint_align;
    bool top_down, ephemeral;
} iovaspace_request;

#define IOVASPACE_NO_HINT UINT64_MAX

/* NULL when out of memory. */
iovaspace *iovaspace_new(unsigned pgshift);
void iovaspace_free(iovaspace *space);

/* New valid ranges, sorted, disjoint and not touching (copied): 0 or -ENOMEM.  O(allocations). */
int iovaspace_set_ranges(iovaspace *space, const iovaspace_range *ranges, size_t n);

/* 0, -ENOSPC or -ENOMEM. */
int iovaspace_allocate(iovaspace *space, const iovaspace_request *request, uint64_t *start);

/* 0, -EEXIST (in use, or a guard), -EINVAL (not wholly in a valid range), -ENOMEM. */
int iovaspace_reserve(iovaspace *space, uint64_t start, uint64_t npages);

/* What begins at `start`: 0, -ENOENT or -ENOMEM. */
int iovaspace_release(iovaspace *space, uint64_t start);

/* Fill `out` with up to `n` allocations, without guards, from the first that ends at `page` or later.  `stranded`: only
 * those that no valid range holds.  `next` gets the page to go on from. */
size_t iovaspace_list(iovaspace *space, bool stranded, uint64_t page, iovaspace_range *out, size_t n, uint64_t *next);

uint64_t iovaspace_free_pages(iovaspace *space);

/* NULL, or which invariant is broken.  O(everything): for tests. */
const char *iovaspace_check(iovaspace *space);

#endif
