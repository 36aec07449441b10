/* Threads mark pages in a log while another thread harvests it: no mark may be lost.  Argument: seed. */
#include "dirtylog.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap.h"

#define CHECK(what) ((what) ? (void)passed++ : (void)(failed++, printf("%s:%d: %s\n", __FILE__, __LINE__, #what)))
#define THREADS 4
#define PAGES 20011
#define ROUNDS 300

static unsigned passed, failed;

static uint64_t rnd(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/*
 * Each writer owns the pages that leave its number when divided by THREADS, marks one of them, and then waits for a
 * harvest that began after the mark to hand it over.  The harvester counts what it gets for each page.
 */
struct shared {
    dirtylog *log;
    _Atomic uint64_t started, finished;     /* harvests */
    _Atomic uint32_t got[PAGES];
    atomic_uint running;
    atomic_uint lost;
};

struct marker {
    struct shared *shared;
    unsigned number;
    uint64_t seed;
};

static void *mark_and_wait(void *arg)
{
    struct marker *own = arg;
    struct shared *shared = own->shared;
    uint64_t state = own->seed;
    for (unsigned round = 0; round < ROUNDS; round++) {
        uint64_t page = rnd(&state) % (PAGES / THREADS) * THREADS + own->number;
        uint32_t before = atomic_load(&shared->got[page]);
        dirtylog_mark(shared->log, page, 1);
        uint64_t after = atomic_load(&shared->started);
        while (atomic_load(&shared->finished) <= after)
            sched_yield();
        /* Exactly once: the page has one writer, and it marked it once. */
        if (atomic_load(&shared->got[page]) != before + 1)
            atomic_fetch_add(&shared->lost, 1);
    }
    atomic_fetch_sub(&shared->running, 1);
    return NULL;
}

static void take(struct shared *shared, uint64_t first, uint64_t n)
{
    static uint64_t pages[PAGES / 64 + 2];
    uint64_t shift = first % 50, seen = 0;
    memset(pages, 0, sizeof(pages));
    uint64_t count = dirtylog_harvest(shared->log, first, n, pages, shift);
    for (uint64_t i = 0; i < n; i++)
        if (bitmap_test(pages, i + shift)) {
            seen++;
            atomic_fetch_add(&shared->got[first + i], 1);
        }
    if (count != seen || bitmap_count(pages, PAGES / 64 + 2) != seen)
        atomic_fetch_add(&shared->lost, 1);
}

static void test_marks_are_harvested_exactly_once(uint64_t seed, bool in_parts)
{
    static struct shared shared;
    pthread_t threads[THREADS];
    struct marker markers[THREADS];
    memset(&shared, 0, sizeof(shared));
    shared.log = dirtylog_new(PAGES);
    shared.running = THREADS;
    for (unsigned i = 0; i < THREADS; i++) {
        markers[i] = (struct marker){&shared, i, seed + 7919 * i};
        pthread_create(&threads[i], NULL, mark_and_wait, &markers[i]);
    }
    while (atomic_load(&shared.running)) {
        atomic_fetch_add(&shared.started, 1);
        if (in_parts) {
            uint64_t cut = rnd(&seed) % (PAGES - 1) + 1;
            take(&shared, 0, cut);
            take(&shared, cut, PAGES - cut);
        } else {
            take(&shared, 0, PAGES);
        }
        atomic_fetch_add(&shared.finished, 1);
    }
    for (unsigned i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    CHECK(!shared.lost);
    dirtylog_free(shared.log);
}

/* Ranges flat out, without waiting: the union of all harvests is the union of all marks. */
static void *mark_flat_out(void *arg)
{
    struct marker *own = arg;
    for (uint64_t i = own->number; i < 40000; i += THREADS)
        dirtylog_mark(own->shared->log, i * 7 % (PAGES - 70), i % 9 ? 1 : 70);
    atomic_fetch_sub(&own->shared->running, 1);
    return NULL;
}

static void test_union_of_harvests_is_union_of_marks(void)
{
    static struct shared shared;
    static uint64_t all[PAGES / 64 + 1], want[PAGES / 64 + 1];
    pthread_t threads[THREADS];
    struct marker markers[THREADS];
    memset(&shared, 0, sizeof(shared));
    memset(all, 0, sizeof(all));
    memset(want, 0, sizeof(want));
    shared.log = dirtylog_new(PAGES);
    shared.running = THREADS;
    for (unsigned i = 0; i < THREADS; i++) {
        markers[i] = (struct marker){&shared, i, 0};
        pthread_create(&threads[i], NULL, mark_flat_out, &markers[i]);
    }
    while (atomic_load(&shared.running))
        dirtylog_harvest(shared.log, 0, PAGES, all, 0);
    for (unsigned i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    dirtylog_harvest(shared.log, 0, PAGES, all, 0);
    for (uint64_t i = 0; i < 40000; i++)
        bitmap_set(want, i * 7 % (PAGES - 70), i % 9 ? 1 : 70);
    CHECK(!memcmp(all, want, sizeof(all)));
    CHECK(dirtylog_harvest(shared.log, 0, PAGES, all, 0) == 0);
    dirtylog_free(shared.log);
}

/* One thread, random ranges, sub-ranges and sizes, against a plain bitmap. */
static void test_against_a_plain_bitmap(uint64_t seed)
{
    for (unsigned round = 0; round < 40; round++) {
        static uint64_t want[4096], dst[4096], model[4096];
        uint64_t nbits = 1 + rnd(&seed) % (round % 2 ? 4096 * 32 : 1500), count;
        dirtylog *log = dirtylog_new(nbits);
        memset(want, 0, sizeof(want));
        for (unsigned step = 0; step < 30; step++) {
            for (unsigned i = 0; i < step % 7; i++) {
                uint64_t first = rnd(&seed) % nbits, n = rnd(&seed) % 3 ? 1 : 1 + rnd(&seed) % (nbits - first);
                dirtylog_mark(log, first, n);
                bitmap_set(want, first, n);
            }
            uint64_t first = rnd(&seed) % nbits, n = 1 + rnd(&seed) % (nbits - first), bit = rnd(&seed) % 4096;
            if (step % 3 == 0) {
                first = 0;
                n = nbits;
            }
            memset(dst, 0, sizeof(dst));
            memset(model, 0, sizeof(model));
            dst[0] = model[0] = 5;
            count = bitmap_harvest_at(model, bit, want, first, n);
            CHECK(dirtylog_harvest(log, first, n, dst, bit) == count);
            CHECK(!memcmp(dst, model, sizeof(dst)));
        }
        dirtylog_free(log);
    }
}

int main(int argc, char **argv)
{
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 20240229;
    CHECK(dirtylog_new(0) == NULL);
    CHECK(dirtylog_new(~UINT64_C(0)) == NULL);
    dirtylog_free(NULL);
    static const char *const variants[] = {"scalar", "neon", "avx2", "avx512"};
    for (unsigned v = 0; v < 4; v++)
        if (!bitmap_use_cpu(variants[v]))
            test_against_a_plain_bitmap(seed);
    for (int membarrier = 0; membarrier < 2; membarrier++) {
        dirtylog_use_membarrier(membarrier);
        test_marks_are_harvested_exactly_once(seed, false);
        test_marks_are_harvested_exactly_once(seed, true);
        test_union_of_harvests_is_union_of_marks();
    }
    printf("%u passed, %u failed\n", passed, failed);
    return failed != 0;
}
