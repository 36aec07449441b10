/*
 * The parts of rangemap.c that search inside nodes, compiled once per CPU level:
 *   LEVEL   0 scalar, 1 AVX2, 2 AVX-512      FN(name)  the name for this level      TARGET  its function attribute
 *
 * Readers: a pointer is followed only after the structure sequence under which it was read has been found unchanged,
 * so that a node that was reused meanwhile is never taken for what it was.  An answer counts only if the leaf's
 * version and the structure sequence did not change while it was read.
 */

#if LEVEL == 0
/* Branch-free: how many of the first n ascending keys are <= key. */
static inline unsigned rank_scalar(const uint64_t *keys, unsigned n, uint64_t key)
{
    unsigned base = 0;

    if (!n)
        return 0;
    while (n > 1) {
        unsigned half = n / 2;
        base += GET(keys[base + half - 1]) <= key ? half : 0;
        n -= half;
    }
    return base + (GET(keys[base]) <= key);
}

static inline unsigned FN(rank_leaf)(const leaf *node, uint64_t key)
{
    unsigned n = GET(node->count);
    return rank_scalar(node->start, n < LEAF ? n : LEAF, key);
}

static inline unsigned FN(rank_inner)(const inner *node, uint64_t key)
{
    unsigned n = GET(node->count) - 1;
    return rank_scalar(node->key, n < FANOUT - 1 ? n : FANOUT - 1, key);
}

#elif LEVEL == 1
/* One bit for each of four keys that is <= key; AVX2 compares signed, hence the flipped sign bits in `flipped`. */
static inline TARGET unsigned le4(const uint64_t *keys, __m256i flipped)
{
    __m256i k = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)keys), _mm256_set1_epi64x(INT64_MIN));
    return ~_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(k, flipped))) & 15;
}

static inline TARGET unsigned FN(rank_leaf)(const leaf *node, uint64_t key)
{
    __m256i k = _mm256_set1_epi64x(key ^ (1ULL << 63));
    unsigned bits = 0;
    for (unsigned i = 0; i < LEAF; i += 4)
        bits |= le4(node->start + i, k) << i;
    return _mm_popcnt_u32(_bzhi_u32(bits, node->count));
}

static inline TARGET unsigned FN(rank_inner)(const inner *node, uint64_t key)
{
    __m256i k = _mm256_set1_epi64x(key ^ (1ULL << 63));
    unsigned bits = 0;
    for (unsigned i = 0; i < FANOUT; i += 4)
        bits |= le4(node->key + i, k) << i;     /* the last lane is not a key */
    return _mm_popcnt_u32(_bzhi_u32(bits & INT32_MAX, node->count - 1));
}

#else
/* One bit for each of eight keys that is <= key. */
#define LE8(keys) _mm512_cmple_epu64_mask(_mm512_load_si512(keys), k)

static inline TARGET unsigned FN(rank_leaf)(const leaf *node, uint64_t key)
{
    __m512i k = _mm512_set1_epi64(key);
    unsigned bits = _mm512_kunpackw(_mm512_kunpackb(0, LE8(node->start + 12)),
                                    _mm512_kunpackb(LE8(node->start + 4), 0));
    bits = bits >> 4 |
           _mm256_cmple_epu64_mask(_mm256_load_si256((const __m256i *)node->start), _mm512_castsi512_si256(k));
    return _mm_popcnt_u32(_bzhi_u32(bits, node->count));
}

static inline TARGET unsigned FN(rank_inner)(const inner *node, uint64_t key)
{
    __m512i k = _mm512_set1_epi64(key);
    unsigned bits = _mm512_kunpackw(_mm512_kunpackb(LE8(node->key + 24), LE8(node->key + 16)),
                                    _mm512_kunpackb(LE8(node->key + 8), LE8(node->key)));
    return _mm_popcnt_u32(_bzhi_u32(bits & INT32_MAX, node->count - 1));    /* the last lane is not a key */
}
#endif

/* For writers: the leaf where `key` belongs, the way to it, and how many of its entries start at or below key. */
static TARGET leaf *FN(locate)(const rangemap *map, uint64_t key, path *way, unsigned *rank)
{
    node *at = map->root;

    for (unsigned level = map->height; level; level--) {
        unsigned slot = FN(rank_inner)(&at->inner, key);
        way->node[level] = &at->inner;
        way->slot[level] = slot;
        at = at->inner.child[slot];
    }
    for (unsigned line = 3; line < 8; line++)       /* rank reads three lines; the change will touch the others */
        __builtin_prefetch((const char *)at + 64 * line, 1);
    *rank = FN(rank_leaf)(&at->leaf, key);
    return &at->leaf;
}

/* NULL if the structure is no longer that of `seq`. */
static inline TARGET const leaf *FN(descend)(const rangemap *map, uint64_t key, uint64_t seq)
{
    const node *at = GET(map->root);
    unsigned level = GET(map->height);

    if (seq & 1 || structure_changed(map, seq))
        return NULL;
    for (; level; level--) {
        at = GET(at->inner.child[FN(rank_inner)(&at->inner, key)]);
        if (structure_changed(map, seq))
            return NULL;
    }
    return &at->leaf;
}

/* 1 found, 0 not there, -1 a writer came between. */
static TARGET int FN(find)(const rangemap *map, uint64_t key, rangemap_entry *out)
{
    uint64_t seq = __atomic_load_n(&map->structure, __ATOMIC_ACQUIRE);
    const leaf *at = FN(descend)(map, key, seq);
    rangemap_entry entry;

    if (!at)
        return -1;
    uint32_t version = __atomic_load_n(&at->version, __ATOMIC_ACQUIRE);
    unsigned rank = FN(rank_leaf)(at, key);
    if (rank)
        entry = leaf_get(at, rank - 1);
    if (leaf_changed(at, version) || structure_changed(map, seq))
        return -1;
    if (!rank || entry.last < key)
        return 0;
    *out = entry;
    return 1;
}

/* As find, but for the first entry with last >= key. */
static TARGET int FN(lower)(const rangemap *map, uint64_t key, rangemap_entry *out)
{
    uint64_t seq = __atomic_load_n(&map->structure, __ATOMIC_ACQUIRE);
    const leaf *at = FN(descend)(map, key, seq), *next;

    if (!at)
        return -1;
    uint32_t version = __atomic_load_n(&at->version, __ATOMIC_ACQUIRE), next_version;
    unsigned rank = FN(rank_leaf)(at, key);
    if (rank && GET(at->tail[rank - 1].last) >= key)
        rank--;
    if (rank < GET(at->count)) {
        *out = leaf_get(at, rank < LEAF ? rank : 0);
        return leaf_changed(at, version) || structure_changed(map, seq) ? -1 : 1;
    }
    next = GET(at->next);
    if (leaf_changed(at, version) || structure_changed(map, seq))
        return -1;
    if (!next)
        return 0;
    next_version = __atomic_load_n(&next->version, __ATOMIC_ACQUIRE);
    *out = leaf_get(next, 0);
    return leaf_changed(next, next_version) || leaf_changed(at, version) || structure_changed(map, seq) ? -1 : 1;
}

/*
 * Look up n <= GROUP keys side by side, so that their cache misses overlap; one validation for all of them.
 * Returns one bit for each hit, or -1 if a writer came between.
 */
static inline TARGET int64_t FN(find_group)(const rangemap *map, const uint64_t *keys, size_t n, uint64_t *out,
                                            uint64_t miss)
{
    uint64_t seq = __atomic_load_n(&map->structure, __ATOMIC_ACQUIRE);
    const node *at[GROUP], *root = GET(map->root);
    unsigned level = GET(map->height), rank[GROUP];
    uint32_t version[GROUP];
    bool changed = false;
    int64_t hits = 0;

    if (seq & 1 || structure_changed(map, seq))
        return -1;
    for (unsigned i = 0; i < n; i++)
        at[i] = root;
    for (; level; level--) {
        for (unsigned i = 0; i < n; i++) {
            at[i] = GET(at[i]->inner.child[FN(rank_inner)(&at[i]->inner, keys[i])]);
            for (unsigned line = 0; line < 3 + (level > 1); line++)  /* keys: 4 lines of an inner node, 3 of a leaf */
                __builtin_prefetch((const char *)at[i] + 64 * line);
        }
        if (structure_changed(map, seq))
            return -1;
    }
    for (unsigned i = 0; i < n; i++) {
        version[i] = __atomic_load_n(&at[i]->leaf.version, __ATOMIC_ACQUIRE);
        rank[i] = FN(rank_leaf)(&at[i]->leaf, keys[i]);
        __builtin_prefetch(&at[i]->leaf.tail[rank[i] ? rank[i] - 1 : 0]);
    }
    for (unsigned i = 0; i < n; i++) {
        rangemap_entry entry = leaf_get(&at[i]->leaf, rank[i] ? rank[i] - 1 : 0);
        bool hit = rank[i] && keys[i] <= entry.last;
        out[i] = hit ? entry.value + (keys[i] - entry.start) : miss;
        hits |= (int64_t)hit << i;
    }
    READ_FENCE();
    for (unsigned i = 0; i < n; i++)
        changed |= version[i] & 1 || GET(at[i]->leaf.version) != version[i];
    if (changed || GET(map->structure) != seq)
        return -1;
    return hits;
}

/* Copy the leaf where key belongs, as it is at one moment: 0, or -1 if a writer came between. */
static TARGET int FN(copy_leaf)(const rangemap *map, uint64_t key, leaf *copy)
{
    uint64_t seq = __atomic_load_n(&map->structure, __ATOMIC_ACQUIRE);
    const leaf *at = FN(descend)(map, key, seq);

    if (!at)
        return -1;
    uint32_t version = __atomic_load_n(&at->version, __ATOMIC_ACQUIRE);
    unsigned n = GET(at->count);
    if (n > LEAF)
        return -1;
    move_words(copy->start, at->start, n * sizeof(copy->start[0]));
    move_words(copy->tail, at->tail, n * sizeof(copy->tail[0]));
    copy->count = n;
    if (!n) {       /* [1, 0] contains nothing */
        copy->start[0] = 1;
        copy->tail[0].last = 0;
    }
    return leaf_changed(at, version) || structure_changed(map, seq) ? -1 : 0;
}

/*
 * Keys that lie close together: nearly all of them, hits or misses, are answered from a copy of one leaf after another.
 * An entry of the copy may be gone by now, but was there during this call.
 */
static TARGET size_t FN(find_run)(rangemap *map, const uint64_t *keys, uint64_t *out, size_t n, uint64_t miss,
                                  leaf *copy, unsigned *slot)
{
    size_t hits = 0;

    for (size_t i = 0; i < n; i++) {
        uint64_t key = keys[i];
        unsigned at = *slot;
        if (key < copy->start[at] || key > copy->tail[at].last) {
            if (!copy->count || key < copy->start[0] || key > copy->tail[copy->count - 1].last) {
                int err = -1;
                for (int attempt = 0; err && attempt < RETRIES; attempt++)
                    err = FN(copy_leaf)(map, key, copy);
                if (err) {
                    pthread_mutex_lock(&map->mutex);
                    FN(copy_leaf)(map, key, copy);
                    pthread_mutex_unlock(&map->mutex);
                }
            }
            unsigned rank = FN(rank_leaf)(copy, key);
            at = *slot = rank ? rank - 1 : 0;
            if (!rank || key > copy->tail[at].last) {
                out[i] = miss;
                continue;
            }
        }
        out[i] = copy->tail[at].value + (key - copy->start[at]);
        hits++;
    }
    return hits;
}

/* Do these keys ascend within DENSE bytes?  A look at three of them is enough for a guess. */
static inline TARGET bool FN(is_run)(const uint64_t *keys, size_t n)
{
    return keys[0] <= keys[n / 2] && keys[n / 2] <= keys[n - 1] && keys[n - 1] - keys[0] < DENSE;
}

static TARGET size_t FN(find_many)(rangemap *map, const uint64_t *keys, uint64_t *out, size_t n, uint64_t miss)
{
    _Alignas(64) leaf copy = {.start = {1}};
    uint64_t found[GROUP];                  /* until a group is complete: `out` may be `keys` */
    unsigned slot = 0;
    size_t hits = 0;

    for (size_t i = 0; i < n; i += GROUP) {
        size_t count = n - i < GROUP ? n - i : GROUP;
        if (FN(is_run)(keys + i, count)) {
            hits += FN(find_run)(map, keys + i, out + i, count, miss, &copy, &slot);
            continue;
        }
        int64_t got = -1;
        for (int attempt = 0; got < 0 && attempt < RETRIES; attempt++)
            got = count == GROUP ? FN(find_group)(map, keys + i, GROUP, found, miss)
                                 : FN(find_group)(map, keys + i, count, found, miss);
        if (got < 0) {
            pthread_mutex_lock(&map->mutex);
            got = FN(find_group)(map, keys + i, count, found, miss);
            pthread_mutex_unlock(&map->mutex);
        }
        memcpy(out + i, found, count * sizeof(out[0]));
        hits += __builtin_popcountll(got);
    }
    return hits;
}

static const operations FN(operations) = {FN(locate), FN(find), FN(lower), FN(find_many)};
