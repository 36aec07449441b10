#include "iovaspace.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { BATCH = 64 };

static inline uint64_t max(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static inline uint64_t min(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* The first valid range that ends at `page` or later. */
static size_t valid_from(const iovaspace *space, uint64_t page)
{
    size_t low = 0, high = space->nvalid;

    while (low < high) {
        size_t middle = (low + high) / 2;
        if (space->valid[middle].last < page)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static bool is_valid(const iovaspace *space, uint64_t start, uint64_t last)
{
    size_t i = valid_from(space, start);

    return i < space->nvalid && space->valid[i].start <= start && last <= space->valid[i].last;
}

/* Make [start, last] free as far as it is valid.  The caller has prepared the gaps. */
static void give_valid(iovaspace *space, uint64_t start, uint64_t last)
{
    for (size_t i = valid_from(space, start); i < space->nvalid && space->valid[i].start <= last; i++) {
        uint64_t from = max(max(start, space->valid[i].start), 1), to = min(last, space->valid[i].last);
        if (from <= to)
            gaps_give(space->lasting, from, to - from + 1, 0, UINT64_MAX);
    }
}

/* Memory for everything that giving [start, last] back can need. */
static int prepare_give(iovaspace *space, uint64_t start, uint64_t last)
{
    size_t first = valid_from(space, start), end = first;

    while (end < space->nvalid && space->valid[end].start <= last)
        end++;
    return gaps_prepare(space->lasting, end - first + 1) || gaps_prepare(space->pool, 2) ? -ENOMEM : 0;
}

/* ---- chunks of the ephemeral pool ---- */

/* Give the free pages of a chunk back; what is in use there becomes lasting. */
static int chunk_dissolve(iovaspace *space, const rangemap_entry *chunk)
{
    uint64_t start, npages;

    while (gaps_next(space->pool, chunk->start, &start, &npages) && start <= chunk->last) {
        if (gaps_prepare(space->lasting, 1) || gaps_take(space->pool, start, npages))
            return -ENOMEM;
        gaps_give(space->lasting, start, npages, 0, UINT64_MAX);
    }
    return rangemap_remove(space->chunks, chunk->start, NULL);
}

static int chunks_dissolve(iovaspace *space, uint64_t start, uint64_t last)
{
    rangemap_entry chunk;

    while (rangemap_count(space->chunks) && rangemap_lower(space->chunks, start, &chunk) && chunk.start <= last) {
        int err = chunk_dissolve(space, &chunk);
        if (err)
            return err;
    }
    return 0;
}

/* Carve a chunk that the query fits in. */
static int chunk_open(iovaspace *space, const gaps_query *query)
{
    uint64_t start, mask = space->chunk_align - 1, npages = max(space->chunk_pages, (query->npages + mask) & ~mask);
    gaps_query place = {npages, max(query->align, space->chunk_align), query->last, true};
    int err = gaps_prepare(space->pool, 1);

    if (!err)
        err = gaps_alloc(space->lasting, &place, &start);
    if (err)
        return err;
    err = rangemap_insert(space->chunks, start, start + npages - 1, 0);
    if (err) {
        gaps_give(space->lasting, start, npages, 0, UINT64_MAX);
        return err;
    }
    return gaps_give(space->pool, start, npages, start, start + npages - 1);
}

/* Count an allocation in or out of its chunk, and close the chunk after the last. */
static void chunk_count(iovaspace *space, const rangemap_entry *chunk, int change)
{
    uint64_t alive = chunk->value + change;

    if (alive)
        rangemap_set_value(space->chunks, chunk->start, alive);
    else
        chunk_dissolve(space, chunk);
}

static bool chunk_find(iovaspace *space, uint64_t page, rangemap_entry *chunk)
{
    return rangemap_count(space->chunks) && rangemap_find(space->chunks, page, chunk);
}

static int alloc_ephemeral(iovaspace *space, const gaps_query *query, uint64_t *start)
{
    rangemap_entry chunk;
    int err = gaps_alloc(space->pool, query, start);

    if (err == -ENOSPC) {
        err = chunk_open(space, query);
        if (!err)
            err = gaps_alloc(space->pool, query, start);
    }
    if (!err && chunk_find(space, *start, &chunk))
        chunk_count(space, &chunk, 1);
    return err;
}

/* ---- taking and giving ---- */

/* Return the pages of an entry to where they came from.  The caller has prepared for it. */
static void give(iovaspace *space, uint64_t start, uint64_t last)
{
    rangemap_entry chunk;

    if (chunk_find(space, start, &chunk)) {
        gaps_give(space->pool, start, last - start + 1, chunk.start, chunk.last);
        chunk_count(space, &chunk, -1);
    } else {
        give_valid(space, start, last);
    }
}

/* Take a given place. */
static int claim(iovaspace *space, uint64_t start, uint64_t last, bool ephemeral)
{
    rangemap_entry chunk;
    int err;

    if (rangemap_overlaps(space->used, start, last))
        return -EEXIST;
    if (!is_valid(space, start, last))
        return -EINVAL;
    if (ephemeral && chunk_find(space, start, &chunk) && last <= chunk.last) {
        err = gaps_take(space->pool, start, last - start + 1);
        if (!err)
            chunk_count(space, &chunk, 1);
        return err;
    }
    err = chunks_dissolve(space, start, last);
    if (!err && last)
        err = gaps_take(space->lasting, max(start, 1), last - max(start, 1) + 1);
    return err;
}

/* Write down what was taken, or give it back. */
static int record(iovaspace *space, uint64_t start, uint64_t npages, uint64_t guard)
{
    int err = rangemap_insert(space->used, start, start + npages - 1, guard);

    if (err)
        give(space, start, start + npages - 1);
    else
        space->used_pages += npages;
    return err;
}

int iovaspace_allocate(iovaspace *space, const iovaspace_request *request, uint64_t *start)
{
    uint64_t npages = request->npages + request->guard;
    gaps_query query = {npages, request->align, request->last + request->guard, request->top_down};
    int err = -ENOSPC;

    if (npages > gaps_pages(space->lasting) + gaps_pages(space->pool))
        return -ENOSPC;
    /* For the way back, should record() fail. */
    if (gaps_prepare(space->lasting, 2) || gaps_prepare(space->pool, 2))
        return -ENOMEM;
    if (request->hint != IOVASPACE_NO_HINT && request->hint && !(request->hint & (request->hint_align - 1)) &&
        request->npages - 1 <= request->last && request->hint <= request->last - (request->npages - 1)) {
        *start = request->hint;
        err = claim(space, *start, *start + npages - 1, request->ephemeral);
    }
    if (err && err != -ENOMEM && request->ephemeral) {
        err = alloc_ephemeral(space, &query, start);
        query.top_down = true;
    }
    if (err && err != -ENOMEM)
        err = gaps_alloc(space->lasting, &query, start);
    if (err == -ENOSPC && rangemap_count(space->chunks)) {
        err = chunks_dissolve(space, 0, UINT64_MAX);
        if (!err)
            err = gaps_alloc(space->lasting, &query, start);
    }
    return err ? err : record(space, *start, npages, request->guard);
}

int iovaspace_reserve(iovaspace *space, uint64_t start, uint64_t npages)
{
    int err = gaps_prepare(space->lasting, 2) ? -ENOMEM : claim(space, start, start + npages - 1, false);

    return err ? err : record(space, start, npages, 0);
}

int iovaspace_release(iovaspace *space, uint64_t start)
{
    rangemap_entry entry;

    if (rangemap_remove(space->used, start, &entry))
        return -ENOENT;
    if (prepare_give(space, entry.start, entry.last)) {
        rangemap_insert(space->used, entry.start, entry.last, entry.value);     /* in the room it has just left */
        return -ENOMEM;
    }
    space->used_pages -= entry.last - entry.start + 1;
    give(space, entry.start, entry.last);
    return 0;
}

/* ---- ranges ---- */

/* Walk what is in use in batches of `entries`: the next one that ends at `page` or later. */
typedef struct {
    rangemap_entry entries[BATCH];
    size_t n, i;
    uint64_t page;
} walk;

static const rangemap_entry *walk_next(iovaspace *space, walk *w)
{
    if (w->i == w->n) {
        w->n = w->n && w->n < BATCH ? 0 : rangemap_copy(space->used, w->page, w->entries, BATCH);
        w->i = 0;
        if (!w->n)
            return NULL;
        w->page = w->entries[w->n - 1].last + 1;
    }
    return &w->entries[w->i++];
}

int iovaspace_set_ranges(iovaspace *space, const iovaspace_range *ranges, size_t n)
{
    gaps *lasting = gaps_new(space->pgshift), *pool = gaps_new(space->pgshift);
    iovaspace_range *valid = malloc((n ? n : 1) * sizeof *valid);
    uint64_t total = 0;
    walk w = {.n = 0};
    int err = lasting && pool && valid ? 0 : -ENOMEM;
    const rangemap_entry *entry = err ? NULL : walk_next(space, &w);

    for (size_t i = 0; i < n && !err; i++) {
        uint64_t page = max(ranges[i].start, 1);    /* free from here on */

        total += ranges[i].last - ranges[i].start + 1;
        for (; !err && entry && entry->start <= ranges[i].last; entry = walk_next(space, &w)) {
            if (entry->start > page)
                err = gaps_give(lasting, page, entry->start - page, 0, UINT64_MAX);
            page = max(page, entry->last + 1);
            if (entry->last > ranges[i].last)
                break;                              /* it may reach into the next range */
        }
        if (!err && page <= ranges[i].last)
            err = gaps_give(lasting, page, ranges[i].last - page + 1, 0, UINT64_MAX);
    }
    if (err) {
        gaps_free(lasting);
        gaps_free(pool);
        free(valid);
        return err;
    }
    if (n)
        memcpy(valid, ranges, n * sizeof *valid);
    gaps_free(space->lasting);
    gaps_free(space->pool);
    free(space->valid);
    rangemap_clear(space->chunks);
    space->lasting = lasting;
    space->pool = pool;
    space->valid = valid;
    space->nvalid = n;
    space->total_pages = total;
    return 0;
}

size_t iovaspace_list(iovaspace *space, bool stranded, uint64_t page, iovaspace_range *out, size_t n, uint64_t *next)
{
    walk w = {.page = page};
    size_t count = 0;

    for (const rangemap_entry *entry; count < n && (entry = walk_next(space, &w));) {
        uint64_t last = entry->last - entry->value;
        *next = entry->last + 1;
        if (!stranded || !is_valid(space, entry->start, last))
            out[count++] = (iovaspace_range){entry->start, last};
    }
    return count;
}

uint64_t iovaspace_free_pages(iovaspace *space)
{
    bool zero = is_valid(space, 0, 0) && !rangemap_overlaps(space->used, 0, 0);

    return gaps_pages(space->lasting) + gaps_pages(space->pool) + zero;
}

/* ---- life ---- */

iovaspace *iovaspace_new(unsigned pgshift)
{
    iovaspace *space = calloc(1, sizeof *space);

    if (!space)
        return NULL;
    pthread_mutex_init(&space->lock, NULL);
    space->pgshift = pgshift;
    space->chunk_align = pgshift < 21 ? UINT64_C(1) << (21 - pgshift) : 1;
    space->chunk_pages = max(space->chunk_align, 64);
    space->used = rangemap_new();
    space->chunks = rangemap_new();
    if (space->used && space->chunks && !iovaspace_set_ranges(space, NULL, 0))
        return space;
    iovaspace_free(space);
    return NULL;
}

void iovaspace_free(iovaspace *space)
{
    if (!space)
        return;
    gaps_free(space->lasting);
    gaps_free(space->pool);
    if (space->used)
        rangemap_free(space->used);
    if (space->chunks)
        rangemap_free(space->chunks);
    free(space->valid);
    pthread_mutex_destroy(&space->lock);
    free(space);
}

const char *iovaspace_check(iovaspace *space)
{
    const char *broken = gaps_check(space->lasting, true);
    uint64_t start, npages, at = 0, inside = 0, outside = 0;
    walk w = {.n = 0};
    rangemap_entry chunk;

    if (!broken)
        broken = gaps_check(space->pool, false);
    if (broken)
        return broken;
    for (const rangemap_entry *entry; (entry = walk_next(space, &w));) {
        uint64_t covered = 0;
        for (size_t i = valid_from(space, entry->start); i < space->nvalid && space->valid[i].start <= entry->last; i++)
            covered += min(entry->last, space->valid[i].last) - max(entry->start, space->valid[i].start) + 1;
        inside += covered;
        outside += entry->last - entry->start + 1 - covered;
    }
    if (inside + outside != space->used_pages)
        return "used_pages is wrong";
    if (inside + iovaspace_free_pages(space) != space->total_pages)
        return "pages are lost";
    while (gaps_next(space->lasting, at, &start, &npages)) {
        if (!start || !is_valid(space, start, start + npages - 1) ||
            rangemap_overlaps(space->used, start, start + npages - 1) ||
            rangemap_overlaps(space->chunks, start, start + npages - 1))
            return "a gap is not free";
        at = start + npages;
    }
    for (at = 0; gaps_next(space->pool, at, &start, &npages); at = start + npages)
        if (!rangemap_find(space->chunks, start, &chunk) || start + npages - 1 > chunk.last ||
            rangemap_overlaps(space->used, start, start + npages - 1))
            return "a gap of the pool is not free, or in no chunk";
    for (at = 0; rangemap_lower(space->chunks, at, &chunk); at = chunk.last + 1) {
        uint64_t alive = 0;
        w = (walk){.page = chunk.start};
        for (const rangemap_entry *entry; (entry = walk_next(space, &w)) && entry->start <= chunk.last;)
            alive++;
        if (!alive || alive != chunk.value)
            return "a chunk's count is wrong";
    }
    return NULL;
}
