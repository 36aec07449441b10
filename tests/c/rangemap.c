/* rangemap against a plain sorted array, on every CPU level; then readers beside a writer.  Argument: the seed. */
#include "rangemap.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned passed, failed;

#define CHECK(condition) \
    do { \
        if (condition) { \
            passed++; \
        } else if (failed++ < 10) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
        } \
    } while (0)

static uint64_t random_state;

static uint64_t rnd(void)       /* splitmix64 */
{
    uint64_t z = random_state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

/* ---- the model ---- */

enum { MODEL = 4096 };
static rangemap_entry model[MODEL];
static size_t nmodel;

static size_t model_lower(uint64_t key)     /* index of the first entry with last >= key */
{
    size_t i = 0;
    while (i < nmodel && model[i].last < key)
        i++;
    return i;
}

static int model_insert(uint64_t start, uint64_t last, uint64_t value)
{
    if (last < start)
        return -EINVAL;
    size_t i = model_lower(start);
    if (i < nmodel && model[i].start <= last)
        return -EEXIST;
    memmove(model + i + 1, model + i, (nmodel - i) * sizeof(model[0]));
    model[i] = (rangemap_entry){start, last, value};
    nmodel++;
    return 0;
}

static int model_remove(uint64_t start, rangemap_entry *out)
{
    size_t i = model_lower(start);
    if (i == nmodel || model[i].start != start)
        return -ENOENT;
    *out = model[i];
    memmove(model + i, model + i + 1, (nmodel - i - 1) * sizeof(model[0]));
    nmodel--;
    return 0;
}

static bool same(const rangemap_entry *a, const rangemap_entry *b)
{
    return a->start == b->start && a->last == b->last && a->value == b->value;
}

/* Addresses in [0, space) or as far below 2^64, so that both ends of the address space are used. */
static uint64_t address(uint64_t space)
{
    uint64_t at = rnd() % space;
    return rnd() & 1 ? at : ~at;
}

typedef struct {
    size_t seen, stop;
} visited;

static bool visit(void *context, const uint64_t *start, const rangemap_tail *tail, unsigned n)
{
    visited *v = context;
    for (unsigned i = 0; i < n; i++, v->seen++) {
        rangemap_entry got = {start[i], tail[i].last, tail[i].value};
        CHECK(v->seen < nmodel && same(&got, &model[v->seen]));
    }
    return v->seen < v->stop;
}

static void agree(rangemap *map, uint64_t space)
{
    enum { KEYS = 100 };
    rangemap_entry got, copy[64];
    uint64_t keys[KEYS], out[KEYS], start = address(space), last = start + rnd() % 40;
    size_t hits = 0, i;

    for (i = 0; i < KEYS; i++)
        keys[i] = rnd() % 4 ? address(space) : i ? keys[i - 1] + 1 : 0;
    size_t found = rangemap_find_many(map, keys, out, KEYS, 12345);
    for (i = 0; i < KEYS; i++) {
        size_t at = model_lower(keys[i]);
        bool lower = rangemap_lower(map, keys[i], &got);
        CHECK(lower == (at < nmodel) && (!lower || same(&got, &model[at])));
        bool hit = at < nmodel && model[at].start <= keys[i];
        CHECK(rangemap_find(map, keys[i], &got) == hit && (!hit || same(&got, &model[at])));
        CHECK(out[i] == (hit ? model[at].value + keys[i] - model[at].start : 12345));
        hits += hit;
    }
    CHECK(found == hits);
    if (start <= last) {
        i = model_lower(start);
        CHECK(rangemap_overlaps(map, start, last) == (i < nmodel && model[i].start <= last));
    }
    i = model_lower(start);
    size_t n = rangemap_copy(map, start, copy, 64);
    CHECK(n == (nmodel - i < 64 ? nmodel - i : 64));
    for (size_t j = 0; j < n; j++)
        CHECK(same(&copy[j], &model[i + j]));
    visited v = {0, rnd() % 2 ? SIZE_MAX : rnd() % 50};
    rangemap_visit(map, visit, &v);
    CHECK(v.seen == nmodel || (v.seen < nmodel && v.seen >= v.stop));
}

static void fuzz(uint64_t space, unsigned longest, unsigned steps)
{
    rangemap *map = rangemap_new();
    rangemap_entry a = {0}, b = {0};
    unsigned removals = 1;

    nmodel = 0;
    for (unsigned step = 0; step < steps; step++) {
        if (step % 500 == 0)
            removals = rnd() % 8;       /* grow and shrink */
        uint64_t start = address(space), last = start + rnd() % longest, value = rnd();
        if (nmodel && rnd() % 8 < removals) {
            start = rnd() % 8 ? model[rnd() % nmodel].start : start;
            CHECK(rangemap_remove(map, start, &a) == model_remove(start, &b));
            CHECK(same(&a, &b));
        } else if (nmodel && rnd() % 16 == 0) {
            size_t i = rnd() % nmodel;
            model[i].value = value;
            CHECK(rangemap_set_value(map, model[i].start, value) == 0);
            bool next = i + 1 < nmodel && model[i + 1].start == model[i].start + 1;
            CHECK(rangemap_set_value(map, model[i].start + 1, value) == (next ? 0 : -ENOENT));
            if (next)
                model[i + 1].value = value;
        } else if (nmodel < MODEL) {
            CHECK(rangemap_insert(map, start, last, value) == model_insert(start, last, value));
        }
        int broken = rangemap_check(map);
        CHECK(broken == 0);
        if (broken) {
            fprintf(stderr, "invariant %d at step %u\n", broken, step);
            break;
        }
        CHECK(rangemap_count(map) == nmodel);
        if (step % 16 == 0)
            agree(map, space);
        if (step % 5000 == 4999) {
            if (rnd() & 1) {
                rangemap_clear(map);
                nmodel = 0;
            } else if (nmodel) {
                CHECK(rangemap_build(map, model, nmodel) == -EEXIST);
                rangemap_clear(map);
                CHECK(rangemap_build(map, model, nmodel) == 0);
            }
            CHECK(rangemap_check(map) == 0);
            agree(map, space);
        }
    }
    rangemap_free(map);
}

/* ---- traps ---- */

static void spans_past_an_old_separator(void)
{
    rangemap *map = rangemap_new();
    rangemap_entry got;

    for (uint64_t i = 0; i < 4000; i++)
        CHECK(rangemap_insert(map, i * 16, i * 16 + 7, i) == 0);
    /* Keep one entry in 50: the separators between the leaves are those of entries long gone. */
    for (uint64_t i = 0; i < 4000; i++)
        if (i % 50)
            CHECK(rangemap_remove(map, i * 16, NULL) == 0);
    CHECK(rangemap_check(map) == 0);
    for (uint64_t i = 0; i < 4000; i += 50)
        CHECK(rangemap_insert(map, i * 16 + 8, (i + 50) * 16 - 1, i + 1) == 0);
    CHECK(rangemap_check(map) == 0);
    for (uint64_t key = 0; key < 4000 * 16; key++) {
        uint64_t i = key / 16 / 50 * 50;
        CHECK(rangemap_find(map, key, &got) && got.value == (key < i * 16 + 8 ? i : i + 1));
        CHECK(rangemap_insert(map, key, key, 0) == -EEXIST);
    }
    rangemap_free(map);
}

static void ends_at_the_last_address(void)
{
    rangemap *map = rangemap_new();
    rangemap_entry got;

    CHECK(rangemap_insert(map, 0, UINT64_MAX, 7) == 0);
    CHECK(rangemap_find(map, 0, &got) && rangemap_find(map, UINT64_MAX, &got) && got.value == 7);
    CHECK(rangemap_insert(map, UINT64_MAX, UINT64_MAX, 8) == -EEXIST);
    CHECK(rangemap_remove(map, 0, &got) == 0 && got.last == UINT64_MAX);
    CHECK(!rangemap_find(map, UINT64_MAX, NULL) && !rangemap_lower(map, 0, NULL));
    for (uint64_t i = 0; i < 100; i++)
        CHECK(rangemap_insert(map, UINT64_MAX - i, UINT64_MAX - i, i) == 0);
    for (uint64_t i = 0; i < 100; i++)
        CHECK(rangemap_find(map, UINT64_MAX - i, &got) && got.value == i);
    CHECK(rangemap_check(map) == 0);
    CHECK(rangemap_overlaps(map, 5, UINT64_MAX) && !rangemap_overlaps(map, 5, UINT64_MAX - 100));
    CHECK(rangemap_insert(map, 1, 0, 0) == -EINVAL);
    rangemap_free(map);
}

static void build_refuses_what_is_not_sorted(void)
{
    rangemap_entry backwards[] = {{10, 19, 0}, {0, 9, 0}}, overlap[] = {{0, 10, 0}, {10, 19, 0}};
    rangemap_entry inverted[] = {{5, 4, 0}};
    rangemap *map = rangemap_new();

    CHECK(rangemap_build(map, backwards, 2) == -EINVAL);
    CHECK(rangemap_build(map, overlap, 2) == -EINVAL);
    CHECK(rangemap_build(map, inverted, 1) == -EINVAL);
    CHECK(rangemap_build(map, NULL, 0) == 0 && rangemap_count(map) == 0 && rangemap_check(map) == 0);
    rangemap_free(map);
}

static void build_of_every_size(void)
{
    enum { MOST = 30000 };
    rangemap_entry *entries = malloc(MOST * sizeof(*entries)), *copy = malloc(MOST * sizeof(*copy));
    rangemap *map = rangemap_new();

    for (size_t i = 0; i < MOST; i++)
        entries[i] = (rangemap_entry){i * 2, i * 2, i};
    for (size_t n = 0; n <= MOST; n += n < 1200 ? 1 : 7177) {
        CHECK(rangemap_build(map, entries, n) == 0);
        CHECK(rangemap_check(map) == 0 && rangemap_count(map) == n);
        CHECK(rangemap_copy(map, 0, copy, MOST) == n && !memcmp(copy, entries, n * sizeof(*copy)));
        rangemap_clear(map);
    }
    rangemap_free(map);
    free(entries);
    free(copy);
}

/* ---- readers beside a writer ---- */

/*
 * Even slots stay mapped, odd ones come and go, one address at a time.  The value says what the entry covers, so a torn
 * answer shows.
 */
enum { SLOTS = 2000, WIDTH = 16 };
static rangemap *shared;
static int stop;

static uint64_t mark(uint64_t start, uint64_t last)
{
    return start * 0x9e3779b97f4a7c15 ^ last * 0xbf58476d1ce4e5b9;
}

static int map_marked(uint64_t start, uint64_t last)
{
    return rangemap_insert(shared, start, last, mark(start, last));
}

static void *reader(void *wrong)
{
    uint64_t state = (uintptr_t)wrong, errors = 0;
    rangemap_entry got;

    for (unsigned turn = 0; !__atomic_load_n(&stop, __ATOMIC_RELAXED); turn++) {
        state = state * 6364136223846793005 + 1442695040888963407;
        uint64_t slot = (state >> 33) % (SLOTS - 1), key = slot * WIDTH + (state >> 20) % WIDTH;
        bool hit = rangemap_find(shared, key, &got);
        errors += hit && (got.start > key || got.last < key || got.value != mark(got.start, got.last));
        errors += !hit && slot % 2 == 0;
        if (turn % 4 == 0) {
            bool lower = rangemap_lower(shared, key, &got);
            errors += lower && (got.last < key || got.value != mark(got.start, got.last));
            errors += !lower || got.start > (slot + 2) * WIDTH;
        }
        if (turn % 16 == 0) {
            uint64_t keys[40], out[40];
            for (unsigned i = 0; i < 40; i++)
                keys[i] = (slot * WIDTH + i * (turn % 3 ? 2 : 7 * WIDTH)) % ((SLOTS - 1) * WIDTH);
            rangemap_find_many(shared, keys, out, 40, UINT64_MAX);
            for (unsigned i = 0; i < 40; i++) {
                uint64_t base = keys[i] / WIDTH * WIDTH;
                if (keys[i] / WIDTH % 2 == 0)
                    errors += out[i] != mark(base, base + WIDTH - 1) + keys[i] % WIDTH;
            }
        }
    }
    *(uint64_t *)wrong = errors;
    return NULL;
}

static void readers_beside_a_writer(unsigned rounds)
{
    pthread_t thread[2];
    uint64_t wrong[2];

    shared = rangemap_new();
    __atomic_store_n(&stop, 0, __ATOMIC_RELAXED);
    for (uint64_t slot = 0; slot < SLOTS; slot += 2)
        CHECK(map_marked(slot * WIDTH, slot * WIDTH + WIDTH - 1) == 0);
    for (int i = 0; i < 2; i++)
        pthread_create(&thread[i], NULL, reader, &wrong[i]);
    for (unsigned round = 0; round < rounds; round++) {
        /* Waves that fill and empty regions one address at a time, so that leaves split and join. */
        uint64_t from = rnd() % (SLOTS / 2 - 60) * 2 + 1;
        for (uint64_t slot = from; slot < from + 100; slot += 2)
            for (uint64_t i = 0; i < WIDTH; i++)
                CHECK(map_marked(slot * WIDTH + i, slot * WIDTH + i) == 0);
        for (uint64_t slot = from; slot < from + 100; slot += 2)
            for (uint64_t i = 0; i < WIDTH; i++)
                CHECK(rangemap_remove(shared, slot * WIDTH + i, NULL) == 0);
    }
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    for (int i = 0; i < 2; i++) {
        pthread_join(thread[i], NULL);
        CHECK(wrong[i] == 0);
    }
    CHECK(rangemap_check(shared) == 0);
    rangemap_free(shared);
}

int main(int argc, char **argv)
{
    static const char *const levels[] = {"scalar", "avx2", "avx512"};
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 20240607;

    for (unsigned i = 0; i < 3; i++) {
        setenv("VFIODMA_CPU", levels[i], 1);
        rangemap *map = rangemap_new();
        bool there = !strcmp(rangemap_level(map), levels[i]);
        rangemap_free(map);
        if (!there) {
            fprintf(stderr, "%s: not on this machine, or not in this build\n", levels[i]);
            continue;
        }
        random_state = seed;
        spans_past_an_old_separator();
        ends_at_the_last_address();
        build_refuses_what_is_not_sorted();
        build_of_every_size();
        fuzz(300, 20, 10000);
        fuzz(20000, 40, 10000);
        fuzz(1 << 20, 200, 10000);
        readers_beside_a_writer(100);
    }
    printf("seed %llu, %u passed, %u failed\n", (unsigned long long)seed, passed, failed);
    return failed != 0;
}
