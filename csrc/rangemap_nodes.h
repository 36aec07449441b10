/* The nodes of the range map: their layout, the accesses that race by design, and the pool they come from.
 *
 * Part of rangemap.c, which holds the mutex wherever the pool is used. */
#ifndef VFIODMA_RANGEMAP_NODES_H
#define VFIODMA_RANGEMAP_NODES_H
#include "rangemap.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum {
    LEAF = 20, LEAF_MIN = 8, LEAF_MERGED = 16, LEAF_BUILT = 18,
    FANOUT = 32, INNER_MIN = 10, INNER_MERGED = 24, INNER_BUILT = 28,
    HEIGHT = 16,                /* 2^16 at the least branching of 2, in practice 10^16 entries */
    RETRIES = 64,
    GROUP = 32,                 /* keys looked up side by side */
    DENSE = 2 << 20,            /* bytes that a group of keys spans when it counts as a run */
};

typedef union node node;

typedef struct leaf {
    uint32_t version, count;
    struct leaf *next;
    uint64_t unused[2];
    uint64_t start[LEAF];
    rangemap_tail tail[LEAF];   /* beside each other: a hit needs one cache line of these */
} leaf;

typedef struct {
    uint64_t key[FANOUT - 1];   /* above each `last` under child[i], at most the first start under child[i + 1] */
    uint32_t count, unused;     /* of children; in the same line as the last keys */
    node *child[FANOUT];
} inner;

union node {
    leaf leaf;
    inner inner;
    node *free;
};
_Static_assert(sizeof(node) == 512, "node");

typedef struct {
    inner *node[HEIGHT + 1];    /* by level; leaves are level 0 */
    unsigned slot[HEIGHT + 1];
} path;

typedef struct {
    leaf *(*locate)(const rangemap *, uint64_t key, path *, unsigned *rank);
    int (*find)(const rangemap *, uint64_t key, rangemap_entry *);
    int (*lower)(const rangemap *, uint64_t key, rangemap_entry *);
    size_t (*find_many)(rangemap *, const uint64_t *, uint64_t *, size_t, uint64_t);
} operations;

struct rangemap {
    /* what readers need, in a line of its own */
    const operations *operations;
    uint64_t structure;
    node *root;
    unsigned height;
    /* what writers change all the time */
    _Alignas(64) pthread_mutex_t mutex;
    size_t count;
    node *free;                 /* nodes given back */
    node *fresh;                /* the part of chunk[current] never given out since the last clear */
    size_t nfresh, nfree;
    unsigned current, nchunks;
    struct { node *nodes; size_t n; } chunk[64];
};

/*
 * Accesses that race by design.  ThreadSanitizer does not model fences, so it gets ordered accesses in their place.
 */
#ifdef __SANITIZE_THREAD__
#define GET(x) __atomic_load_n(&(x), __ATOMIC_ACQUIRE)
#define PUT(x, v) __atomic_store_n(&(x), (v), __ATOMIC_RELEASE)
#define READ_FENCE() ((void)0)
#define WRITE_FENCE() ((void)0)
#else
#define GET(x) __atomic_load_n(&(x), __ATOMIC_RELAXED)
#define PUT(x, v) __atomic_store_n(&(x), (v), __ATOMIC_RELAXED)
#define READ_FENCE() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define WRITE_FENCE() __atomic_thread_fence(__ATOMIC_RELEASE)
#endif

static inline void move_words(void *to, const void *from, size_t bytes)
{
#ifdef __SANITIZE_THREAD__
    uint64_t *t = to;
    const uint64_t *f = from;
    size_t n = bytes / 8;
    if (t < f)
        for (size_t i = 0; i < n; i++)
            PUT(t[i], GET(f[i]));
    else
        for (size_t i = n; i-- > 0;)
            PUT(t[i], GET(f[i]));
#else
    memmove(to, from, bytes);
#endif
}

static inline bool structure_changed(const rangemap *map, uint64_t seq)
{
    READ_FENCE();
    return GET(map->structure) != seq;
}

/* True too if the version was odd to begin with. */
static inline bool leaf_changed(const leaf *at, uint32_t version)
{
    READ_FENCE();
    return version & 1 || GET(at->version) != version;
}

static inline rangemap_entry leaf_get(const leaf *at, unsigned i)
{
    return (rangemap_entry){GET(at->start[i]), GET(at->tail[i].last), GET(at->tail[i].value)};
}

/* ---- the pool ---- */

/* Make sure that n nodes can be taken without failing. */
static int pool_reserve(rangemap *map, size_t n)
{
    while (map->nfree + map->nfresh < n) {
        /* What is left of the current chunk goes to the free list, so that `fresh` is one piece. */
        for (; map->nfresh; map->nfresh--, map->fresh++, map->nfree++) {
            PUT(map->fresh->free, map->free);
            map->free = map->fresh;
        }
        unsigned next = map->nchunks ? map->current + 1 : 0;
        if (next == map->nchunks) {
            size_t nodes = next < 10 ? (size_t)8 << next : 4096;      /* 4 KiB, doubling up to 2 MiB */
            if (nodes < n && next >= 10)
                nodes = (n + 4095) / 4096 * 4096;
            if (next == sizeof(map->chunk) / sizeof(map->chunk[0]))
                return -ENOMEM;
            /* 2 MiB and multiples of it get huge pages: fewer faults now, fewer TLB misses later. */
            bool huge = nodes >= 4096;
            node *fresh = aligned_alloc(huge ? 2 << 20 : 64, nodes * sizeof(node));
            if (!fresh)
                return -ENOMEM;
            if (huge)
                madvise(fresh, nodes * sizeof(node), MADV_HUGEPAGE);
            map->chunk[next].nodes = fresh;
            map->chunk[next].n = nodes;
            map->nchunks++;
        }
        map->current = next;
        map->fresh = map->chunk[next].nodes;
        map->nfresh = map->chunk[next].n;
    }
    return 0;
}

static node *pool_take(rangemap *map)
{
    if (map->free) {
        node *taken = map->free;
        map->free = taken->free;
        map->nfree--;
        return taken;
    }
    map->nfresh--;
    return map->fresh++;
}

static void pool_give(rangemap *map, node *given)
{
    PUT(given->free, map->free);
    map->free = given;
    map->nfree++;
}

static leaf *leaf_new(rangemap *map)
{
    leaf *fresh = &pool_take(map)->leaf;
    PUT(fresh->version, 0);
    PUT(fresh->count, 0);
    PUT(fresh->next, NULL);
    return fresh;
}
#endif
