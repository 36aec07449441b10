#include "dmapool.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define HIDE(record) ASAN_POISON_MEMORY_REGION(record, DMAPOOL_RECORD)
#define SHOW(record) ASAN_UNPOISON_MEMORY_REGION(record, DMAPOOL_RECORD)
#else
#define HIDE(record) ((void)0)
#define SHOW(record) ((void)0)
#endif

enum {
    FIRST = 2 * DMAPOOL_COLUMN,         /* of a block's records; the columns' words below FIRST / RECORD are free */
    HUGE_PAGE = 2 << 20,
};

typedef struct chunk {                  /* at the start of its first block: in those free words */
    struct chunk *before;
    size_t size;
} chunk;
_Static_assert(sizeof(chunk) <= FIRST / DMAPOOL_RECORD * sizeof(uint64_t), "chunk");

struct dmapool {
    chunk *newest;
    dma_t *free;
    char *fresh;                        /* the next record of the newest chunk that was never given out */
};

dmapool *dmapool_new(void)
{
    return calloc(1, sizeof(dmapool));
}

void dmapool_free(dmapool *pool)
{
    for (chunk *at = pool ? pool->newest : NULL, *before; at; at = before) {
        before = at->before;
#ifdef __SANITIZE_ADDRESS__
        ASAN_UNPOISON_MEMORY_REGION(at, at->size);
#endif
        free(at);
    }
    free(pool);
}

/* A block to begin with, then twice as many each time up to 2 MiB, which get a huge page each. */
static bool grow(dmapool *pool)
{
    size_t size = pool->newest ? pool->newest->size * 2 : DMAPOOL_BLOCK;
    if (size > HUGE_PAGE)
        size = HUGE_PAGE;
    chunk *fresh = aligned_alloc(size == HUGE_PAGE ? HUGE_PAGE : DMAPOOL_BLOCK, size);
    if (!fresh)
        return false;
    if (size == HUGE_PAGE)
        madvise(fresh, size, MADV_HUGEPAGE);
    *fresh = (chunk){pool->newest, size};
    pool->newest = fresh;
    pool->fresh = (char *)fresh + FIRST;
    return true;
}

dma_t *dmapool_take(dmapool *pool)
{
    dma_t *taken = pool->free;
    if (taken) {
        SHOW(taken);
        pool->free = taken->next;
    } else {
        if ((!pool->newest || pool->fresh == (char *)pool->newest + pool->newest->size) && !grow(pool))
            return NULL;
        taken = (dma_t *)pool->fresh;
        pool->fresh += DMAPOOL_RECORD;
        if (!((uintptr_t)pool->fresh % DMAPOOL_BLOCK) && pool->fresh != (char *)pool->newest + pool->newest->size)
            pool->fresh += FIRST;
    }
    return memset(taken, 0, sizeof(*taken));
}

void dmapool_give(dmapool *pool, dma_t *dma)
{
    dma->next = pool->free;
    pool->free = dma;
    HIDE(dma);
}

typedef struct {
    const uint64_t *row, *end;
    uint64_t pgsize;
    unsigned column;
    bool right;
} restore;

static bool restore_leaf(void *context, const uint64_t *start, const rangemap_tail *tail, unsigned n)
{
    restore *r = context;
    uint64_t different = 0, bits = 0;
    bool wraps = false;

    if (n > (size_t)(r->end - r->row) / 3)
        return r->right = false;
    for (unsigned i = 0; i < n; i++, r->row += 3) {
        uint64_t iova = r->row[0], vaddr = r->row[1], size = r->row[2];
        different |= (start[i] ^ iova) | (tail[i].last ^ (iova + size - 1));
        wraps |= vaddr + size - 1 < vaddr;
        bits |= iova | vaddr | size;
        *dmapool_vaddr((const dma_t *)(uintptr_t)tail[i].value, r->column) = vaddr;
    }
    return r->right = !different && !wraps && !(bits & (r->pgsize - 1));
}

bool dmapool_restore(rangemap *mappings, const uint64_t *rows, size_t n, uint64_t pgsize, unsigned column)
{
    restore r = {rows, rows + 3 * n, pgsize, column, true};
    rangemap_visit(mappings, restore_leaf, &r);
    return r.right && r.row == r.end;
}
