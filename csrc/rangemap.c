/*
 * Ordered map of disjoint ranges: a B+tree of 512-byte nodes.
 *
 * A leaf holds up to 20 entries, an inner node up to 32 children and, between each two, a separator.  Invariant: every
 * entry lies wholly between the separators around its leaf, [low, high).  Removals leave a separator lower than the
 * first start to its right, and a later entry to its left may then span it; insert raises the separator first.  So
 * whoever looks for an address needs one leaf only.
 *
 * Readers beside writers.  In-place changes of one leaf make its version odd meanwhile; everything that moves entries
 * between leaves, or changes a separator, a link or the root, makes the map's structure sequence odd meanwhile. 
 * Readers check both and try again; after 64 vain attempts they take the mutex.  Nodes come from a pool that returns
 * memory only with the map, so that a pointer read a moment ago always leads to a node.  No two readers disturb each
 * other.
 */
#include "rangemap_nodes.h"

#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
/* Vector loads of what a writer may be changing can't be declared atomic: ThreadSanitizer gets the scalar level. */
#define VECTORS 1
#include <immintrin.h>
#endif

/* Search without the lock, or with it when writers keep coming between. */
static inline bool search(rangemap *map, int (*once)(const rangemap *, uint64_t, rangemap_entry *), uint64_t key,
                          rangemap_entry *out)
{
    rangemap_entry ignored;
    int found;

    if (!out)
        out = &ignored;
    for (int i = 0; i < RETRIES; i++) {
        found = once(map, key, out);
        if (__builtin_expect(found >= 0, 1))
            return found;
    }
    pthread_mutex_lock(&map->mutex);
    found = once(map, key, out);
    pthread_mutex_unlock(&map->mutex);
    return found;
}

#define LEVEL 0
#define TARGET
#define FN(name) name##_scalar
#include "rangemap_impl.h"
#ifdef VECTORS
#undef LEVEL
#undef TARGET
#undef FN
#define LEVEL 1
#define TARGET __attribute__((target("avx2,bmi,bmi2,popcnt")))
#define FN(name) name##_avx2
#include "rangemap_impl.h"
#undef LEVEL
#undef TARGET
#undef FN
#define LEVEL 2
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx2,bmi,bmi2,popcnt")))
#define FN(name) name##_avx512
#include "rangemap_impl.h"
#endif

static const operations *choose(void)
{
#ifdef VECTORS
    const char *limit = getenv("VFIODMA_CPU");
    bool scalar = limit && !strcmp(limit, "scalar"), avx2 = limit && !strcmp(limit, "avx2");
    __builtin_cpu_init();
    if (!scalar && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
        __builtin_cpu_supports("popcnt")) {
        if (!avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl"))
            return &operations_avx512;
        return &operations_avx2;
    }
#endif
    return &operations_scalar;
}

/* ---- writers ---- */

static void structure_begin(rangemap *map)
{
    PUT(map->structure, map->structure + 1);
    WRITE_FENCE();
}

static void structure_end(rangemap *map)
{
    __atomic_store_n(&map->structure, map->structure + 1, __ATOMIC_RELEASE);
}

static void leaf_begin(leaf *at)
{
    PUT(at->version, at->version + 1);
    WRITE_FENCE();
}

static void leaf_end(leaf *at)
{
    __atomic_store_n(&at->version, at->version + 1, __ATOMIC_RELEASE);
}

static void leaf_put(leaf *at, unsigned i, rangemap_entry entry)
{
    unsigned after = at->count - i;
    move_words(at->start + i + 1, at->start + i, after * sizeof(at->start[0]));
    move_words(at->tail + i + 1, at->tail + i, after * sizeof(at->tail[0]));
    PUT(at->start[i], entry.start);
    PUT(at->tail[i].last, entry.last);
    PUT(at->tail[i].value, entry.value);
    PUT(at->count, at->count + 1);
}

static void leaf_drop(leaf *at, unsigned i)
{
    unsigned after = at->count - i - 1;
    move_words(at->start + i, at->start + i + 1, after * sizeof(at->start[0]));
    move_words(at->tail + i, at->tail + i + 1, after * sizeof(at->tail[0]));
    PUT(at->count, at->count - 1);
}

/* Copy n entries; the two leaves differ or the pieces do not overlap the wrong way. */
static void leaf_move(leaf *to, unsigned i, const leaf *from, unsigned j, unsigned n)
{
    move_words(to->start + i, from->start + j, n * sizeof(to->start[0]));
    move_words(to->tail + i, from->tail + j, n * sizeof(to->tail[0]));
}

static void inner_put(inner *at, unsigned slot, uint64_t key, node *right)
{
    unsigned after = at->count - slot - 1;
    move_words(at->key + slot + 1, at->key + slot, after * sizeof(at->key[0]));
    move_words(at->child + slot + 2, at->child + slot + 1, after * sizeof(at->child[0]));
    PUT(at->key[slot], key);
    PUT(at->child[slot + 1], right);
    PUT(at->count, at->count + 1);
}

/* Put `right` after the child at way->slot[level], splitting upwards.  The nodes needed are reserved. */
static void child_insert(rangemap *map, path *way, unsigned level, uint64_t key, node *right)
{
    if (level > map->height) {
        inner *top = &pool_take(map)->inner;
        PUT(top->count, 1);
        PUT(top->child[0], map->root);
        inner_put(top, 0, key, right);
        PUT(map->root, (node *)top);
        PUT(map->height, level);
        return;
    }
    inner *at = way->node[level];
    unsigned slot = way->slot[level];
    if (at->count < FANOUT) {
        inner_put(at, slot, key, right);
        return;
    }
    /* Entries that come in ascending order leave full nodes behind. */
    unsigned keep = slot == FANOUT - 1 ? INNER_BUILT : FANOUT / 2;
    inner *half = &pool_take(map)->inner;
    uint64_t up = at->key[keep - 1];
    move_words(half->key, at->key + keep, (FANOUT - 1 - keep) * sizeof(at->key[0]));
    move_words(half->child, at->child + keep, (FANOUT - keep) * sizeof(at->child[0]));
    PUT(half->count, FANOUT - keep);
    PUT(at->count, keep);
    if (slot < keep)
        inner_put(at, slot, key, right);
    else
        inner_put(half, slot - keep, key, right);
    child_insert(map, way, level + 1, up, (node *)half);
}

static int leaf_split(rangemap *map, path *way, leaf *at, unsigned rank, rangemap_entry entry)
{
    int err = pool_reserve(map, map->height + 2);
    if (err)
        return err;

    bool append = rank == LEAF && !at->next;
    unsigned keep = append ? LEAF : LEAF / 2;
    structure_begin(map);
    leaf *right = leaf_new(map);
    leaf_move(right, 0, at, keep, LEAF - keep);
    PUT(right->count, LEAF - keep);
    PUT(right->next, at->next);
    PUT(at->next, right);
    PUT(at->count, keep);
    if (rank <= keep && !append)
        leaf_put(at, rank, entry);
    else
        leaf_put(right, rank - keep, entry);
    child_insert(map, way, 1, right->start[0], (node *)right);
    structure_end(map);
    return 0;
}

static int insert(rangemap *map, rangemap_entry entry)
{
    path way;
    unsigned rank;
    leaf *at = map->operations->locate(map, entry.start, &way, &rank);
    int err;

    if (rank && at->tail[rank - 1].last >= entry.start)
        return -EEXIST;
    if (rank < at->count) {
        if (at->start[rank] <= entry.last)
            return -EEXIST;
    } else if (at->next) {
        /* The separator above this leaf is in the lowest ancestor that goes on to the right. */
        unsigned level = 1;
        while (way.slot[level] == way.node[level]->count - 1)
            level++;
        uint64_t *separator = &way.node[level]->key[way.slot[level]];
        if (entry.last >= *separator) {
            if (at->next->start[0] <= entry.last)
                return -EEXIST;
            structure_begin(map);
            PUT(*separator, entry.last + 1);
            structure_end(map);
        }
    }
    if (at->count == LEAF) {
        err = leaf_split(map, &way, at, rank, entry);
        if (err)
            return err;
    } else {
        leaf_begin(at);
        leaf_put(at, rank, entry);
        leaf_end(at);
    }
    PUT(map->count, map->count + 1);
    return 0;
}

static void child_remove(rangemap *map, path *way, unsigned level, unsigned slot);

/* Join the inner node at `level` with a neighbour, or share children evenly. */
static void inner_balance(rangemap *map, path *way, unsigned level)
{
    inner *above = way->node[level + 1];
    unsigned slot = way->slot[level + 1], first = slot ? slot - 1 : 0;
    inner *left = &above->child[first]->inner, *right = &above->child[first + 1]->inner;
    unsigned total = left->count + right->count;
    uint64_t key[2 * FANOUT];
    node *child[2 * FANOUT];

    memcpy(key, left->key, (left->count - 1) * sizeof(key[0]));
    key[left->count - 1] = above->key[first];
    memcpy(key + left->count, right->key, (right->count - 1) * sizeof(key[0]));
    memcpy(child, left->child, left->count * sizeof(child[0]));
    memcpy(child + left->count, right->child, right->count * sizeof(child[0]));

    unsigned keep = total <= INNER_MERGED ? total : total / 2;
    move_words(left->key, key, (keep - 1) * sizeof(key[0]));
    move_words(left->child, child, keep * sizeof(child[0]));
    PUT(left->count, keep);
    if (keep == total) {
        child_remove(map, way, level + 1, first + 1);
        pool_give(map, (node *)right);
        return;
    }
    PUT(above->key[first], key[keep - 1]);
    move_words(right->key, key + keep, (total - keep - 1) * sizeof(key[0]));
    move_words(right->child, child + keep, (total - keep) * sizeof(child[0]));
    PUT(right->count, total - keep);
}

/* Take child `slot` (not the first) and the separator before it out of the node at `level`. */
static void child_remove(rangemap *map, path *way, unsigned level, unsigned slot)
{
    inner *at = way->node[level];
    unsigned after = at->count - slot - 1;

    move_words(at->key + slot - 1, at->key + slot, after * sizeof(at->key[0]));
    move_words(at->child + slot, at->child + slot + 1, after * sizeof(at->child[0]));
    PUT(at->count, at->count - 1);
    if (level < map->height) {
        if (at->count < INNER_MIN)
            inner_balance(map, way, level);
    } else if (at->count == 1) {
        PUT(map->root, at->child[0]);
        PUT(map->height, map->height - 1);
        pool_give(map, (node *)at);
    }
}

/* The same for leaves, whose way is `way`. */
static void leaf_balance(rangemap *map, path *way)
{
    inner *above = way->node[1];
    unsigned slot = way->slot[1], first = slot ? slot - 1 : 0;
    leaf *left = &above->child[first]->leaf, *right = &above->child[first + 1]->leaf;
    unsigned total = left->count + right->count, keep = total / 2;

    structure_begin(map);
    if (total <= LEAF_MERGED) {
        leaf_move(left, left->count, right, 0, right->count);
        PUT(left->count, total);
        PUT(left->next, right->next);
        child_remove(map, way, 1, first + 1);
        pool_give(map, (node *)right);
    } else {
        if (left->count < keep) {
            unsigned n = keep - left->count;
            leaf_move(left, left->count, right, 0, n);
            leaf_move(right, 0, right, n, right->count - n);
        } else {
            unsigned n = left->count - keep;
            leaf_move(right, n, right, 0, right->count);
            leaf_move(right, 0, left, keep, n);
        }
        PUT(left->count, keep);
        PUT(right->count, total - keep);
        PUT(above->key[first], right->start[0]);
    }
    structure_end(map);
}

static int remove_start(rangemap *map, uint64_t start, rangemap_entry *out)
{
    path way;
    unsigned rank;
    leaf *at = map->operations->locate(map, start, &way, &rank);

    if (!rank || at->start[rank - 1] != start)
        return -ENOENT;
    if (out)
        *out = leaf_get(at, rank - 1);
    leaf_begin(at);
    leaf_drop(at, rank - 1);
    leaf_end(at);
    PUT(map->count, map->count - 1);
    if (at->count < LEAF_MIN && map->height)
        leaf_balance(map, &way);
    return 0;
}

/* ---- public ---- */

rangemap *rangemap_new(void)
{
    rangemap *map = aligned_alloc(64, (sizeof(*map) + 63) / 64 * 64);
    if (!map)
        return NULL;
    memset(map, 0, sizeof(*map));
    map->operations = choose();
    if (pool_reserve(map, 1)) {
        free(map);
        return NULL;
    }
    map->root = (node *)leaf_new(map);
    pthread_mutex_init(&map->mutex, NULL);
    return map;
}

void rangemap_free(rangemap *map)
{
    if (!map)
        return;
    pthread_mutex_destroy(&map->mutex);
    for (unsigned i = 0; i < map->nchunks; i++)
        free(map->chunk[i].nodes);
    free(map);
}

int rangemap_insert(rangemap *map, uint64_t start, uint64_t last, uint64_t value)
{
    if (last < start)
        return -EINVAL;
    pthread_mutex_lock(&map->mutex);
    int err = insert(map, (rangemap_entry){start, last, value});
    pthread_mutex_unlock(&map->mutex);
    return err;
}

int rangemap_remove(rangemap *map, uint64_t start, rangemap_entry *out)
{
    pthread_mutex_lock(&map->mutex);
    int err = remove_start(map, start, out);
    pthread_mutex_unlock(&map->mutex);
    return err;
}

int rangemap_set_value(rangemap *map, uint64_t start, uint64_t value)
{
    path way;
    unsigned rank;
    int err = -ENOENT;

    pthread_mutex_lock(&map->mutex);
    leaf *at = map->operations->locate(map, start, &way, &rank);
    if (rank && at->start[rank - 1] == start) {
        /* One word: readers see the old or the new value, and need not try again. */
        PUT(at->tail[rank - 1].value, value);
        err = 0;
    }
    pthread_mutex_unlock(&map->mutex);
    return err;
}

bool rangemap_find(rangemap *map, uint64_t key, rangemap_entry *out)
{
    return search(map, map->operations->find, key, out);
}

bool rangemap_lower(rangemap *map, uint64_t key, rangemap_entry *out)
{
    return search(map, map->operations->lower, key, out);
}

bool rangemap_overlaps(rangemap *map, uint64_t start, uint64_t last)
{
    rangemap_entry entry;
    return rangemap_lower(map, start, &entry) && entry.start <= last;
}

size_t rangemap_count(rangemap *map)
{
    return GET(map->count);
}

void rangemap_clear(rangemap *map)
{
    pthread_mutex_lock(&map->mutex);
    structure_begin(map);
    map->free = NULL;
    map->nfree = 0;
    map->current = 0;
    map->fresh = map->chunk[0].nodes;
    map->nfresh = map->chunk[0].n;
    PUT(map->root, (node *)leaf_new(map));
    PUT(map->height, 0);
    PUT(map->count, 0);
    structure_end(map);
    pthread_mutex_unlock(&map->mutex);
}

size_t rangemap_copy(rangemap *map, uint64_t key, rangemap_entry *out, size_t n)
{
    path way;
    unsigned rank;
    size_t copied = 0;

    pthread_mutex_lock(&map->mutex);
    leaf *at = map->operations->locate(map, key, &way, &rank);
    if (rank && at->tail[rank - 1].last >= key)
        rank--;
    for (; at && copied < n; at = at->next, rank = 0)
        for (; rank < at->count && copied < n; rank++)
            out[copied++] = leaf_get(at, rank);
    pthread_mutex_unlock(&map->mutex);
    return copied;
}

void rangemap_visit(rangemap *map, bool (*visit)(void *, const uint64_t *start, const rangemap_tail *, unsigned n),
                    void *context)
{
    pthread_mutex_lock(&map->mutex);
    const node *first = map->root;
    for (unsigned level = map->height; level; level--)
        first = first->inner.child[0];
    for (const leaf *at = &first->leaf; at; at = at->next) {
        for (unsigned line = 0; line < 8; line++)
            __builtin_prefetch((const char *)at->next + 64 * line);
        if (!visit(context, at->start, at->tail, at->count))
            break;
    }
    pthread_mutex_unlock(&map->mutex);
}

/* How many children or entries the next of `left` nodes gets when `n` are to be spread over them. */
static size_t share(size_t n, size_t left)
{
    return (n + left - 1) / left;
}

/* Row i of n rows of start, last or size, value. */
static inline rangemap_entry row(const uint64_t *rows, size_t i, bool sizes)
{
    return (rangemap_entry){rows[3 * i], rows[3 * i + 1] + (sizes ? rows[3 * i] - 1 : 0), rows[3 * i + 2]};
}

static inline int build(rangemap *map, const uint64_t *rows, size_t n, bool sizes)
{
    bool wrong = false;
    for (size_t i = 0; i < n; i++)
        wrong |= (i && row(rows, i, sizes).start <= row(rows, i - 1, sizes).last) | (sizes && !rows[3 * i + 1]) |
                 (row(rows, i, sizes).last < row(rows, i, sizes).start);
    if (wrong)
        return -EINVAL;

    pthread_mutex_lock(&map->mutex);
    size_t leaves = n ? share(n, LEAF_BUILT) : 0, nodes = leaves;
    for (size_t width = leaves; width > 1; nodes += width)
        width = share(width, INNER_BUILT);
    int err = map->count ? -EEXIST : pool_reserve(map, nodes);
    if (err || !n) {
        pthread_mutex_unlock(&map->mutex);
        return err;
    }

    /* The empty root becomes the first leaf; each other one is appended at the right edge of the tree. */
    structure_begin(map);
    leaf *at = &map->root->leaf;
    path edge;
    for (size_t i = 0, left = leaves, size; left; left--, i += size) {
        if (i) {
            leaf *next = leaf_new(map);
            PUT(at->next, next);
            at = next;
        }
        size = share(n - i, left);
        for (size_t j = 0; j < size; j++) {
            rangemap_entry entry = row(rows, i + j, sizes);
            PUT(at->start[j], entry.start);
            PUT(at->tail[j].last, entry.last);
            PUT(at->tail[j].value, entry.value);
        }
        PUT(at->count, size);
        if (!i)
            continue;
        node *down = map->root;
        for (unsigned level = map->height; level; level--) {
            edge.node[level] = &down->inner;
            edge.slot[level] = down->inner.count - 1;
            down = down->inner.child[edge.slot[level]];
        }
        child_insert(map, &edge, 1, at->start[0], (node *)at);
    }
    PUT(map->count, n);
    structure_end(map);
    pthread_mutex_unlock(&map->mutex);
    return 0;
}

int rangemap_build(rangemap *map, const rangemap_entry *entries, size_t n)
{
    return build(map, (const uint64_t *)entries, n, false);
}

int rangemap_build_sizes(rangemap *map, const uint64_t *rows, size_t n)
{
    return build(map, rows, n, true);
}

size_t rangemap_find_many(rangemap *map, const uint64_t *keys, uint64_t *out, size_t n, uint64_t miss)
{
    return map->operations->find_many(map, keys, out, n, miss);
}

size_t rangemap_memory(rangemap *map)
{
    size_t bytes = sizeof(*map);
    pthread_mutex_lock(&map->mutex);
    for (unsigned i = 0; i < map->nchunks; i++)
        bytes += map->chunk[i].n * sizeof(node);
    pthread_mutex_unlock(&map->mutex);
    return bytes;
}

const char *rangemap_level(rangemap *map)
{
#ifdef VECTORS
    if (map->operations == &operations_avx512)
        return "avx512";
    if (map->operations == &operations_avx2)
        return "avx2";
#endif
    (void)map;
    return "scalar";
}

/* ---- invariants, for tests ---- */

typedef struct {
    const leaf *expected;       /* the leaf that the links say comes now */
    size_t count, nodes;
} walk;

static int check_node(const rangemap *map, const node *at, unsigned level, uint64_t low, uint64_t high, walk *w)
{
    w->nodes++;
    if (!level) {
        const leaf *l = &at->leaf;
        if (w->expected != l)
            return 1;                                   /* links and tree agree */
        if (l->version & 1 || l->count > LEAF || (!l->count && map->height))
            return 2;
        for (unsigned i = 0; i < l->count; i++) {
            if (l->start[i] > l->tail[i].last || l->start[i] < low || l->tail[i].last > high)
                return 3;                               /* entries lie wholly between the separators */
            if (i && l->start[i] <= l->tail[i - 1].last)
                return 4;                               /* ascending, disjoint */
        }
        w->count += l->count;
        w->expected = l->next;
        return 0;
    }
    const inner *n = &at->inner;
    if (n->count < 2 || n->count > FANOUT)
        return 5;
    for (unsigned i = 0; i < n->count; i++) {
        uint64_t from = i ? n->key[i - 1] : low, to = i + 1 < n->count ? n->key[i] - 1 : high;
        if (from < low || to > high || from > to)
            return 6;
        int broken = check_node(map, n->child[i], level - 1, from, to, w);
        if (broken)
            return broken;
    }
    return 0;
}

int rangemap_check(rangemap *map)
{
    pthread_mutex_lock(&map->mutex);
    const node *first = map->root;
    for (unsigned level = map->height; level; level--)
        first = first->inner.child[0];
    walk w = {.expected = &first->leaf};
    int broken = map->structure & 1 ? 7 : check_node(map, map->root, map->height, 0, UINT64_MAX, &w);
    if (!broken && (w.expected || w.count != map->count))
        broken = 8;
    size_t nodes = map->nfresh + map->nfree + w.nodes;
    for (unsigned i = 0; i < map->nchunks; i++)
        if (i <= map->current)
            nodes -= map->chunk[i].n;
    if (!broken && nodes)
        broken = 9;                                     /* a node was lost or is used twice */
    pthread_mutex_unlock(&map->mutex);
    return broken;
}
