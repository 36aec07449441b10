/* Guest page tables: every kind of page, fault and invalidation; then random bytes as tables, which never crash. */
#include "pagewalk.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGES 32
#define WORDS 512
#define P 1ull
#define W 2ull
#define U 4ull
#define A 0x20ull
#define D 0x40ull
#define PS 0x80ull
#define G 0x100ull
#define EA 0x400ull

static uint64_t guest[PAGES * WORDS];
static bool readonly_tables;
static unsigned contended;      /* every how manieth update finds that the entry has changed; 0: none */

static int load(void *context, uint64_t gpa, uint64_t *entry)
{
    (void)context;
    assert(gpa % 8 == 0);
    if (gpa / 8 >= PAGES * WORDS)
        return -EINVAL;
    *entry = guest[gpa / 8];
    return 0;
}

static int update(void *context, uint64_t gpa, uint64_t seen, uint64_t entry)
{
    (void)context;
    if (gpa / 8 >= PAGES * WORDS)
        return -EINVAL;
    if (readonly_tables)
        return -EPERM;
    static unsigned updates;
    if (guest[gpa / 8] != seen || (contended && ++updates % contended == 0))
        return -EAGAIN;
    guest[gpa / 8] = entry;
    return 0;
}

static unsigned long fetched;

static void fetch(void *context, uint64_t gpa)
{
    (void)context;
    assert(gpa % 8 == 0);
    fetched++;
}

static const pagewalk_memory memory = {NULL, load, update, fetch};
static pagewalk *w;
static pagewalk_result found;
static pagewalk_fault fault;

static uint64_t *at(unsigned page, unsigned index)
{
    return &guest[page * WORDS + index];
}

/* The gpa, or the fault's reason with the top bit set. */
static uint64_t go(uint64_t pasid, uint64_t address, unsigned access)
{
    return pagewalk_translate(w, &memory, pasid, address, access, &found, &fault) ? 1ull << 63 | fault.reason : found.gpa;
}
#define FAULT(reason) (1ull << 63 | PAGEWALK_##reason)

static void check_pages(void)
{
    memset(guest, 0, sizeof guest);
    *at(1, 0) = 2 << 12 | P | W | U;                    /* PML4 in page 1, PDPT 2, PD 3, PT 4 */
    *at(2, 0) = 3 << 12 | P | W | U;
    *at(2, 1) = 1ull << 30 | PS | P | W | U;            /* 1 GiB */
    *at(3, 0) = 4 << 12 | P | W | U;
    *at(3, 1) = 6ull << 21 | PS | P | W | U;            /* 2 MiB */
    *at(4, 5) = 0x77ull << 12 | P | W | U;
    *at(4, 6) = 0x78ull << 12 | P | U;
    *at(4, 7) = 0x79ull << 12 | P | W;
    *at(4, 8) = 1ull << 45 | P | W | U;
    *at(4, 9) = 0x7bull << 12 | P | W | U | G;
    *at(5, 0) = 1 << 12 | P | W | U;                    /* PML5 */
    assert(!pagewalk_bind(w, 1, 1 << 12, 4, 0) && pagewalk_bind(w, 1, 0, 4, 0) == -EBUSY);
    assert(pagewalk_bind(w, 2, 0, 3, 0) == -EINVAL && pagewalk_bind(w, 1 << 20, 0, 4, 0) == -EINVAL);
    assert(!pagewalk_bind(w, 0xfffff, 5 << 12, 5, PAGEWALK_SRE | PAGEWALK_EAFE));

    assert(go(1, 0x5123, PAGEWALK_READ) == 0x77123 && found.room == 0xedd);
    assert((*at(4, 5) & (A | D | EA)) == A && *at(1, 0) & A && *at(2, 0) & A && *at(3, 0) & A);
    assert(go(1, 0x5123, PAGEWALK_WRITE) == 0x77123 && *at(4, 5) & D && !(*at(3, 0) & D));
    assert(go(1, 0x212345, PAGEWALK_READ) == (6ull << 21) + 0x12345 && found.room == (1 << 21) - 0x12345);
    assert(go(1, (1ull << 30) + 0x345678, PAGEWALK_WRITE) == (1ull << 30) + 0x345678);
    assert(go(1, 0x6000, PAGEWALK_WRITE) == FAULT(PERMISSION) && fault.fetch_addr == (4 << 12) + 6 * 8);
    assert(go(1, 0x7000, PAGEWALK_READ) == FAULT(PERMISSION) && !(*at(4, 7) & A));
    assert(go(1, 0x8000, PAGEWALK_READ) == FAULT(OOR_ADDRESS));
    assert(go(1, 0xa000, PAGEWALK_READ) == FAULT(PTE_FETCH) && fault.missing);
    assert(go(1, 0x5000, PAGEWALK_PRIV) == FAULT(PERMISSION));
    assert(go(1, 1ull << 47, PAGEWALK_READ) == FAULT(OOR_ADDRESS));
    assert(go(3, 0x5000, PAGEWALK_READ) == FAULT(BAD_PASID_ENTRY));
    assert(go(0, 0, PAGEWALK_READ) == FAULT(PASID_INVALID) && go(1ull << 32 | 1, 0x5000, 1) == FAULT(PASID_INVALID));
    /* five levels, a supervisor */
    assert(go(0xfffff, 0x7010, PAGEWALK_PRIV | PAGEWALK_READ) == 0x79010 && *at(5, 0) & EA && *at(4, 7) & EA);
    assert(go(0xfffff, 0x6000, PAGEWALK_PRIV | PAGEWALK_WRITE) == 0x78000);     /* no WPE */
    assert(go(0xfffff, 1ull << 56, PAGEWALK_READ) == FAULT(OOR_ADDRESS));
    assert(pagewalk_unbind(w, 0xfffff) && !pagewalk_unbind(w, 0xfffff));
    assert(!pagewalk_bind(w, 0xfffff, 5 << 12, 5, PAGEWALK_SRE | PAGEWALK_WPE));
    assert(go(0xfffff, 0x6000, PAGEWALK_PRIV | PAGEWALK_WRITE) == FAULT(PERMISSION));
    /* tables outside memory, reserved bits, flags that can't be set */
    *at(3, 2) = (uint64_t)PAGES << 12 | P | W | U;
    *at(3, 3) = 0x2000 | PS | P | W | U;
    *at(1, 1) = PS | P | W | U;
    *at(4, 10) = 0x7cull << 12 | P | W | U;
    assert(go(1, 0x400000, PAGEWALK_READ) == FAULT(WALK_EABT) && fault.fetch_addr == PAGES << 12);
    assert(go(1, 0x600000, PAGEWALK_READ) == FAULT(PTE_FETCH) && !fault.missing);
    assert(go(1, 1ull << 39, PAGEWALK_READ) == FAULT(PTE_FETCH));
    readonly_tables = true;
    assert(go(1, 0xa000, PAGEWALK_READ) == FAULT(ACCESS));
    readonly_tables = false;
}

static void check_invalidation(void)
{
    assert(go(1, 0x5000, PAGEWALK_READ) == 0x77000 && go(1, 0x9000, PAGEWALK_READ) == 0x7b000);
    *at(4, 5) = *at(4, 9) = 0;
    pagewalk_flush_pages(w, 1, 0x6000, 0);
    pagewalk_flush_pages(w, 2, 0x5000, 0);
    assert(go(1, 0x5000, PAGEWALK_READ) == 0x77000);            /* stale */
    pagewalk_flush_pages(w, 1, 0x7000, 2);                      /* 0x4000 to 0x7fff */
    assert(go(1, 0x5000, PAGEWALK_READ) == FAULT(PTE_FETCH));
    *at(3, 1) = 0;
    pagewalk_flush_pasid(w, 1);
    assert(go(1, 0x212345, PAGEWALK_READ) == FAULT(PTE_FETCH));
    assert(go(1, 0x9000, PAGEWALK_READ) == 0x7b000);            /* global */
    pagewalk_flush_all(w);
    assert(go(1, 0x9000, PAGEWALK_READ) == FAULT(PTE_FETCH) && pagewalk_cached(w) == 0);
    assert(go(1, 1ull << 30, PAGEWALK_READ) == 1ull << 30);
    *at(2, 1) = 0;
    pagewalk_flush_pages(w, 1, (1ull << 30) + (5 << 20), 0);    /* one page of a large one */
    assert(go(1, 1ull << 30, PAGEWALK_READ) == FAULT(PTE_FETCH));
}

/* What is begun for one address is never taken for another. */
static void check_batches(void)
{
    uint64_t addresses[1000], gpas[1000];
    memset(guest, 0, sizeof guest);
    *at(1, 0) = 2 << 12 | P | W | U | A;
    for (unsigned i = 0; i < WORDS; i++) {
        *at(2, i) = (3 + i % 2) << 12 | P | W | U | A;
        *at(3, i) = *at(4, i) = (5 + i % 2) << 12 | P | W | U | A;
        *at(5, i) = (uint64_t)(i + 1) << 12 | P | W | U | A;
        *at(6, i) = (uint64_t)(i + 1000) << 12 | P | W | U | (i % 3 ? A : 0);
    }
    *at(3, 7) = 9ull << 21 | PS | P | W | U;
    for (unsigned round = 0; round < 4; round++) {      /* cold; mixed; cached; some pages missing */
        for (unsigned i = 0; i < 1000; i++) {
            addresses[i] = (uint64_t)(i * 7919 % 997) * 0x203000 + i;
            if (round == 3 && i % 5 == 0)
                addresses[i] |= 1ull << 40;
        }
        if (round == 1)
            for (unsigned i = 0; i < 1000; i += 3)
                pagewalk_flush_pages(w, 1, addresses[i], 0);
        pagewalk_translate_many(w, &memory, 1, addresses, gpas, 1000, PAGEWALK_READ);
        for (unsigned i = 0; i < 1000; i++)
            assert(gpas[i] == (round == 3 && i % 5 == 0 ? UINT64_MAX : go(1, addresses[i], PAGEWALK_READ)));
    }
    assert(fetched > 1000);
}

/* Many pages through one table: the cache grows, holds what it should and gives back what is dropped. */
static void check_growth(void)
{
    memset(guest, 0, sizeof guest);
    for (unsigned i = 0; i < WORDS; i++) {
        *at(1, i) = 2 << 12 | P | W | U | A;
        *at(2, i) = 3 << 12 | P | W | U | A;
        *at(3, i) = 4 << 12 | P | W | U | A;
        *at(4, i) = (uint64_t)(i + 1) << 12 | P | W | U | A;
    }
    pagewalk_flush_all(w);
    for (uint64_t i = 0; i < 100000; i++)
        assert(go(1, i << 12 | i % 4096, PAGEWALK_READ) == ((i % WORDS + 1) << 12 | i % 4096));
    assert(pagewalk_cached(w) == 100000 && pagewalk_cache_bytes(w) <= 64 * 100000);
    memset(at(4, 0), 0, WORDS * 8);
    for (uint64_t i = 0; i < 100000; i += 2)
        pagewalk_flush_pages(w, 1, i << 12, 0);
    assert(pagewalk_cached(w) == 50000);
    for (uint64_t i = 0; i < 100000; i++)
        assert(go(1, i << 12, PAGEWALK_READ) == (i % 2 ? (i % WORDS + 1) << 12 : FAULT(PTE_FETCH)));
    pagewalk_flush_pages(w, 1, 0, 16);
    assert(pagewalk_cached(w) == 50000 - 32768);
    pagewalk_flush_range(w, 1, 70000ull << 12, 1001);           /* 500 odd pages */
    pagewalk_flush_range(w, 1, 80001ull << 12, 1);
    pagewalk_flush_range(w, 1, 80003ull << 12, 0);
    pagewalk_flush_range(w, 2, 0, UINT64_MAX);
    assert(pagewalk_cached(w) == 50000 - 32768 - 501);
    pagewalk_flush_range(w, 1, 90000ull << 12, UINT64_MAX);
    assert(pagewalk_cached(w) == 0);
    pagewalk_unbind(w, 1);
    assert(pagewalk_cached(w) == 0);
}

static uint64_t state = 0x1234567;

static uint64_t any(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545f4914f6cdd1dull;
}

static void scribble(void)
{
    for (unsigned i = 0; i < PAGES * WORDS; i++) {
        uint64_t r = any();
        /* Most entries lead to a table in memory, itself or one above included. */
        uint64_t flags = r >> 32 & 7 ? P | W | U | (r >> 8 & 0x760) : r >> 8 & 0xfff;
        guest[i] = r & 31 ? (any() % (PAGES + 1)) << 12 | flags : any();
    }
}

/* A batch finds what one look-up after the other does: from the cache, from a walk, from one that was begun ahead. */
static void fuzz_batch(const uint64_t *pool)
{
    uint64_t addresses[48], gpas[48], pasid = any() % 6;
    unsigned access = any() % 16;
    size_t n = any() % 49;
    pagewalk_flush_all(w);
    for (size_t i = 0; i < n; i++)
        addresses[i] = any() % 16 ? pool[any() % 64] + (any() & 0xfff) : any();
    for (size_t i = 0; i < n; i++)
        if (any() % 4 == 0)     /* some are in the cache */
            pagewalk_translate(w, &memory, pasid, addresses[i], access, &found, &fault);
    pagewalk_translate_many(w, &memory, pasid, addresses, gpas, n, access);
    for (size_t i = 0; i < n; i++)
        if (pagewalk_translate(w, &memory, pasid, addresses[i], access, &found, &fault))
            assert(gpas[i] == UINT64_MAX);
        else
            assert(gpas[i] == found.gpa);
}

static void fuzz(unsigned long walks)
{
    static uint64_t pool[64];
    unsigned long hits = 0, reasons[PAGEWALK_OOR_ADDRESS + 1] = {0};
    for (unsigned long i = 0; i < walks; i++) {
        if (i % 20000 == 0) {
            scribble();
            pagewalk_unbind_all(w);
            readonly_tables = i / 20000 % 8 == 7;
            contended = i / 20000 % 4;
            for (unsigned pasid = 1; pasid < 5; pasid++)
                assert(!pagewalk_bind(w, pasid, any() % 8 ? any() % PAGES << 12 : any(), 4 + any() % 2, any() % 8));
            for (unsigned j = 0; j < 64; j++)
                pool[j] = (uint64_t)((int64_t)any() >> (7 + any() % 50));
        }
        uint64_t address = any() % 16 ? pool[any() % 64] + (any() & 0xfff) : any();
        unsigned access = any() % 16;
        if (pagewalk_translate(w, &memory, any() % 6, address, access, &found, &fault)) {
            assert(fault.reason != PAGEWALK_PASID_FETCH && fault.reason <= PAGEWALK_OOR_ADDRESS);
            assert(!fault.missing || fault.reason == PAGEWALK_PTE_FETCH);
            reasons[fault.reason]++;
        } else {
            assert(found.gpa < 1ull << 39 && found.room && found.gpa % 4096 == address % 4096);
            hits++;
        }
        if (i % 512 == 0)
            fuzz_batch(pool);
        if (any() % 64 == 0)
            guest[any() % (PAGES * WORDS)] ^= 1ull << any() % 64;
        if (any() % 256 == 0)
            pagewalk_flush_pages(w, any() % 6, any(), any() % 60);
        if (any() % 1024 == 0)
            pagewalk_flush_range(w, any() % 6, any(), any() >> any() % 64);
        if (any() % 4096 == 0)
            pagewalk_flush_pasid(w, any() % 6);
    }
    assert(hits > walks / 1000 && fetched > walks / 10000);
    if (!getenv("VFIODMA_PROFILE"))
        return;
    printf("%lu walks: %lu found", walks, hits);
    for (unsigned i = 0; i <= PAGEWALK_OOR_ADDRESS; i++)
        if (reasons[i])
            printf(", %lu reason %u", reasons[i], i);
    puts("");
}

int main(void)
{
    const char *deep = getenv("VFIODMA_PROFILE");
    w = pagewalk_new(39, true, 1 << 20);
    check_pages();
    check_invalidation();
    check_batches();
    check_growth();
    fuzz(deep && !strcmp(deep, "deep") ? 10000000 : 500000);
    pagewalk_free(w);
    w = pagewalk_new(39, true, 100);                            /* a small cache that is emptied again and again */
    fuzz(100000);
    pagewalk_free(w);
    puts("ok");
    return 0;
}
