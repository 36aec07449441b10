/*
 * The records of a Type1 instance's mappings, and their vaddrs, which stand apart from them.
 *
 * Records come in blocks of 64 KiB:  page 0, 1: two columns of vaddrs, one of which counts (the other takes those of
 * an update of everything, so that it need not be undone); after them 448 records of 128 bytes.  A record's place in
 * its block is that of its vaddrs in the columns.  Records made one after another lie side by side: who updates all of
 * them writes 8 bytes for each, in order, and not a cache line.
 *
 * Not thread-safe.  Memory stays with the pool until dmapool_free().
 */
#ifndef VFIODMA_DMAPOOL_H
#define VFIODMA_DMAPOOL_H
#include "pin.h"
#include "rangemap.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { DMAPOOL_BLOCK = 1 << 16, DMAPOOL_COLUMN = 1 << 12, DMAPOOL_RECORD = 128 };

typedef struct dma_t dma_t;

struct dma_t {                  /* one mapping */
    uint64_t iova, size;
    uint64_t exception_in;      /* the vaddr's validity is not everybody's while this is the instance's generation */
    uint32_t prot;
    bool lock_cap;
    uint64_t locked;            /* pages that it accounts */
    pin *pages;                 /* how devices reach it; NULL = not mapped in an IOMMU */
    rangemap *pinned;           /* externally pinned pages: iova -> references << 1 | countable; NULL = none yet */
    uint64_t countable;         /* pinned pages that can be accounted: not the zero page */
    uint64_t *bitmap;           /* raw words as the kernel keeps them, one u64 more than needed; NULL = not tracked */
    uint64_t bitmap_words;
    dma_t *next;                /* in the list of unfindable mappings, or of free records */
};
_Static_assert(sizeof(dma_t) <= DMAPOOL_RECORD, "record");

typedef struct dmapool dmapool;

dmapool *dmapool_new(void);             /* NULL when out of memory */
void dmapool_free(dmapool *pool);

dma_t *dmapool_take(dmapool *pool);     /* all zero, but for its vaddrs; NULL when out of memory */
void dmapool_give(dmapool *pool, dma_t *dma);

/* Where the vaddr of a record stands in a column (0 or 1). */
static inline uint64_t *dmapool_vaddr(const dma_t *dma, unsigned column)
{
    uintptr_t at = (uintptr_t)dma, block = at & ~(uintptr_t)(DMAPOOL_BLOCK - 1);
    return (uint64_t *)(block + column * DMAPOOL_COLUMN) + (at - block) / DMAPOOL_RECORD;
}

/*
 * Store the vaddrs of n rows of iova, vaddr, size into a column of the records that `mappings` leads to.  False, and
 * the column holds anything, unless the rows are exactly the mappings, ascending, and multiples of pgsize, and no
 * vaddr goes beyond 2^64-1.
 */
bool dmapool_restore(rangemap *mappings, const uint64_t *rows, size_t n, uint64_t pgsize, unsigned column);
#endif
