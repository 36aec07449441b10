/* The bitmap against loops over single bits, on every CPU variant that this machine has.  Argument: seed. */
#include "bitmap.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WORDS 2100
#define BITS (WORDS * 64)
#define CHECK(what) ((what) ? (void)passed++ : \
                     (void)(failed++, printf("%s %s:%d: %s\n", bitmap_cpu(), __FILE__, __LINE__, #what)))

static unsigned passed, failed;
static uint64_t state;
static uint64_t a[WORDS + 8], b[WORDS + 8], c[WORDS + 8], d[WORDS * 64 + 8];

static uint64_t rnd(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static uint64_t below(uint64_t n)
{
    return rnd() % n;
}

/* Densities from empty over sparse and clustered to full; every bit after nbits is set, to catch who looks at it. */
static void fill(uint64_t *words, uint64_t nbits)
{
    unsigned kind = (unsigned)below(6);
    memset(words, kind == 5 ? 0xff : 0, WORDS * 8);
    for (uint64_t i = 0; kind == 1 && i < 1 + nbits / 500; i++)
        bitmap_set(words, below(nbits), 1);
    for (uint64_t i = 0; kind == 2 && i < bitmap_nwords(nbits); i++)
        words[i] = rnd();
    for (uint64_t i = 0; kind == 3 && i < 12; i++) {
        uint64_t first = below(nbits);
        bitmap_set(words, first, 1 + below(nbits - first));
        bitmap_clear(words, below(nbits), 1);
    }
    for (uint64_t i = 0; kind == 4 && i < bitmap_nwords(nbits); i++)
        words[i] = rnd() & rnd() & rnd() & rnd() & rnd() & rnd();
    if (nbits < BITS)
        bitmap_set(words, nbits, BITS - nbits);
}

static uint64_t some_bits(void)
{
    return 1 + (below(3) ? below(BITS) : below(700));
}

static void test_set_and_clear(void)
{
    uint64_t first = below(BITS), n = 1 + below(below(2) ? BITS - first : (BITS - first < 130 ? BITS - first : 130));
    fill(a, BITS);
    memcpy(b, a, sizeof(a));
    bitmap_set(a, first, n);
    for (uint64_t i = first; i < first + n; i++)
        b[i / 64] |= UINT64_C(1) << i % 64;
    CHECK(!memcmp(a, b, sizeof(a)));
    bitmap_clear(a, first, n);
    for (uint64_t i = first; i < first + n; i++)
        b[i / 64] &= ~(UINT64_C(1) << i % 64);
    CHECK(!memcmp(a, b, sizeof(a)));
}

static void test_or_andnot_count_any(void)
{
    uint64_t n = below(WORDS + 1), bits = some_bits(), count = 0, tail = 0;
    fill(a, BITS);
    fill(b, BITS);
    memcpy(c, a, sizeof(a));
    bitmap_or(a, b, n);
    for (uint64_t i = 0; i < n; i++)
        c[i] |= b[i];
    CHECK(!memcmp(a, c, sizeof(a)));
    fill(b, BITS);
    bitmap_andnot(a, b, n);
    for (uint64_t i = 0; i < n; i++)
        c[i] &= ~b[i];
    CHECK(!memcmp(a, c, sizeof(a)));
    for (uint64_t i = 0; i < n; i++)
        count += (uint64_t)__builtin_popcountll(a[i]);
    CHECK(bitmap_count(a, n) == count);
    CHECK(bitmap_any(a, n) == (count != 0));
    fill(a, bits);
    for (uint64_t i = 0; i < bits; i++)
        tail += bitmap_test(a, i);
    CHECK(bitmap_count_bits(a, bits) == tail);
    CHECK(bitmap_any_bits(a, bits) == (tail != 0));
}

static void test_harvest(void)
{
    uint64_t nbits = some_bits(), at = below(nbits), n = 1 + below(nbits - at), to = below(BITS - n + 1), count = 0;
    if (below(2))
        at = 0;
    fill(a, nbits);
    fill(b, BITS);
    memcpy(c, b, sizeof(b));
    uint64_t *before = d;
    memcpy(before, a, sizeof(a));
    for (uint64_t i = 0; i < n; i++)
        if (bitmap_test(before, at + i)) {
            bitmap_set(c, to + i, 1);
            bitmap_clear(before, at + i, 1);
            count++;
        }
    uint64_t got = at ? bitmap_harvest_at(b, to, a, at, n) : bitmap_harvest(b, to, a, n);
    CHECK(got == count);
    CHECK(!memcmp(a, before, sizeof(a)));
    CHECK(!memcmp(b, c, sizeof(b)));
}

static void test_scaling(void)
{
    unsigned shift = (unsigned)below(12);
    uint64_t nbits = some_bits(), groups = ((nbits - 1) >> shift) + 1;
    fill(a, nbits);
    memset(b, 0xaa, sizeof(b));
    memset(c, 0, sizeof(c));
    for (uint64_t i = 0; i < nbits; i++)
        if (bitmap_test(a, i))
            bitmap_set(c, i >> shift, 1);
    bitmap_compact(b, a, nbits, shift);
    CHECK(!memcmp(b, c, bitmap_nwords(groups) * 8));
    CHECK(b[bitmap_nwords(groups)] == UINT64_C(0xaaaaaaaaaaaaaaaa));
    fill(a, groups);
    memset(b, 0xaa, sizeof(b));
    memset(c, 0, sizeof(c));
    for (uint64_t i = 0; i < nbits; i++)
        if (bitmap_test(a, i >> shift))
            bitmap_set(c, i, 1);
    bitmap_expand(b, a, nbits, shift);
    CHECK(!memcmp(b, c, bitmap_nwords(nbits) * 8));
    CHECK(b[bitmap_nwords(nbits)] == UINT64_C(0xaaaaaaaaaaaaaaaa));
}

static void test_indices_and_runs(void)
{
    static uint64_t want[BITS + 8], out[BITS + 8];
    uint64_t nbits = some_bits();
    size_t n = 0, cap, runs = 0;
    fill(a, nbits);
    for (uint64_t i = 0; i < nbits; i++)
        if (bitmap_test(a, i))
            want[n++] = i;
    cap = below(3) ? n : below(n + 1);
    memset(out, 0xaa, sizeof(out));
    CHECK(bitmap_indices(a, nbits, out, cap) == cap);
    CHECK(!memcmp(out, want, cap * 8));
    CHECK(out[cap] == UINT64_C(0xaaaaaaaaaaaaaaaa));
    for (uint64_t i = 0; i < nbits; i++) {
        if (!bitmap_test(a, i))
            continue;
        uint64_t first = i;
        while (i + 1 < nbits && bitmap_test(a, i + 1))
            i++;
        want[2 * runs] = first;
        want[2 * runs++ + 1] = i - first + 1;
    }
    CHECK(bitmap_count_runs(a, nbits) == runs);
    cap = below(3) ? runs : below(runs + 1);
    memset(out, 0xaa, sizeof(out));
    CHECK(bitmap_runs(a, nbits, out, cap) == cap);
    CHECK(!memcmp(out, want, cap * 16));
    CHECK(out[2 * cap] == UINT64_C(0xaaaaaaaaaaaaaaaa));
    CHECK(bitmap_runs(a, nbits, out, runs + 3) == runs);
}

int main(int argc, char **argv)
{
    static const char *const variants[] = {"scalar", "neon", "avx2", "avx512"};
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 20240229;
    CHECK(bitmap_use_cpu("z80") != 0);
    for (unsigned v = 0; v < 4; v++) {
        if (bitmap_use_cpu(variants[v]))
            continue;
        CHECK(!strcmp(bitmap_cpu(), variants[v]));
        state = seed;
        for (unsigned i = 0; i < 150; i++) {
            test_set_and_clear();
            test_or_andnot_count_any();
            test_harvest();
            test_scaling();
            test_indices_and_runs();
        }
    }
    printf("%u passed, %u failed\n", passed, failed);
    return failed != 0;
}
