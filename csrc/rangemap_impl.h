/*
 * The parts of rangemap.c that search inside nodes, compiled once per CPU level:
 *   LEVEL   0 scalar, 1 AVX2, 2 AVX-512      FN(name)  the name for this level      TARGET  its function attribute
 *
 * Readers: a pointer is followed only after the structure sequence under which it was read has been found unchanged, so that
 * a node that was reused meanwhile is never taken for what it was.  An answer counts only if the leaf's version and the
 * structure sequence did not change while it was read.
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
static inline TARGET unsigned FN(rank_leaf)(const leaf *node, uint64_t key)
{
    __m512i k = _mm512_set1_epi64(key);
    unsigned bits = _mm256_cmple_epu64_mask(_mm256_load_si256((const __m256i *)node->start), _mm512_castsi512_si256(k));
    bits |= (unsigned)_mm512_cmple_epu64_mask(_mm512_load_si512(node->start + 4), k) << 4;
    bits |= (unsigned)_mm512_cmple_epu64_mask(_mm512_load_si512(node->start + 12), k) << 12;
    return _mm_popcnt_u32(_bzhi_u32(bits, node->count));
}

static inline TARGET unsigned FN(rank_inner)(const inner *node, uint64_t key)
{
    __m512i k = _mm512_set1_epi64(key);
    unsigned bits = 0;
    for (unsigned i = 0; i < FANOUT; i += 8)
        bits |= (unsigned)_mm512_cmple_epu64_mask(_mm512_load_si512(node->key + i), k) << i;
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

static const operations FN(operations) = {FN(locate), FN(find), FN(lower), NULL};
