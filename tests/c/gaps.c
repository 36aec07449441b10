/* The gaps against an array of pages: named traps first, then random work with every answer compared. */
#include "gaps.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned passed, failed;

#define CHECK(condition) \
    do { \
        if (condition) { \
            passed++; \
        } else { \
            failed++; \
            printf("%s:%d: %s (seed %" PRIu64 ", step %u)\n", __FILE__, __LINE__, #condition, seed, step_no); \
        } \
    } while (0)

enum { PAGES = 8192, SHIFT = 19 };      /* 512 KiB pages: the alignments are 1, 4 and 2048 pages */

static uint64_t seed, state;
static unsigned step_no;
static bool is_free[PAGES];

static uint64_t draw(uint64_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (state * UINT64_C(0x2545F4914F6CDD1D) >> 20) % below;
}

/* Every answer from one pass over the pages: runs[i] = free pages from i on. */
static bool model_find(const gaps_query *q, uint64_t *start)
{
    uint64_t run = 0;
    bool found = false;

    for (uint64_t i = PAGES; i-- > 0;) {
        run = is_free[i] ? run + 1 : 0;
        if (run < q->npages || i % q->align || i + q->npages - 1 > q->last)
            continue;
        *start = i;
        found = true;
        if (q->top_down)
            break;
    }
    return found;
}

static uint64_t model_largest(uint64_t align, uint64_t last)
{
    uint64_t run = 0, best = 0;

    for (uint64_t i = PAGES; i-- > 0;) {
        run = is_free[i] && i <= last ? run + 1 : 0;
        if (i % align == 0 && run > best)
            best = run;
    }
    return best;
}

static bool all(uint64_t start, uint64_t npages, bool value)
{
    for (uint64_t i = start; i < start + npages; i++)
        if (is_free[i] != value)
            return false;
    return true;
}

static bool same(gaps *tree)
{
    uint64_t at = 0, start = 0, npages = 0, page = 0, count = 0;

    while (gaps_next(tree, at, &start, &npages)) {
        if (!all(page, start - page, false) || !all(start, npages, true))
            return false;
        page = at = start + npages;
        count++;
    }
    return all(page, PAGES - page, false) && count == gaps_count(tree);
}

static gaps *whole(void)
{
    gaps *tree = gaps_new(SHIFT);

    CHECK(!gaps_give(tree, 0, PAGES, 0, UINT64_MAX));
    memset(is_free, true, sizeof is_free);
    return tree;
}

static void test_exactly_aligned_hole(void)
{
    gaps *tree = gaps_new(12);
    uint64_t start;

    CHECK(!gaps_give(tree, 512, 512, 0, UINT64_MAX));
    CHECK(!gaps_give(tree, 4700, 900, 0, UINT64_MAX));     /* larger, and holds no aligned 512 pages */
    CHECK(!gaps_alloc(tree, &(gaps_query){512, 512, UINT64_MAX >> 12, true}, &start) && start == 512);
    CHECK(gaps_alloc(tree, &(gaps_query){512, 512, UINT64_MAX >> 12, false}, &start) == -ENOSPC);
    CHECK(gaps_largest(tree, 512, UINT64_MAX >> 12) == 480);
    gaps_free(tree);
}

static void test_end_of_the_space(void)
{
    gaps *tree = gaps_new(12);
    uint64_t start, end = UINT64_C(1) << 52;

    CHECK(!gaps_give(tree, 1, end - 1, 0, UINT64_MAX));
    CHECK(!gaps_alloc(tree, &(gaps_query){1, 1, end - 1, true}, &start) && start == end - 1);
    CHECK(!gaps_alloc(tree, &(gaps_query){1 << 18, 1 << 18, end - 1, true}, &start) && start == end - (2 << 18));
    CHECK(gaps_alloc(tree, &(gaps_query){end, 1, end - 1, true}, &start) == -ENOSPC);
    CHECK(!gaps_give(tree, end - 1, 1, 0, UINT64_MAX));
    CHECK(!gaps_check(tree, true));
    gaps_free(tree);
}

/* The start of a leaf's last gap moves up to just below the next leaf. */
static void test_start_moves_past_the_separator(void)
{
    gaps *tree = gaps_new(12);
    uint64_t start;

    for (uint64_t i = 0; i < 4096; i++)
        CHECK(!gaps_give(tree, i * 16, 15, 0, UINT64_MAX));
    for (uint64_t i = 0; i < 4096; i++) {
        CHECK(!gaps_take(tree, i * 16, 14));
        CHECK(!gaps_check(tree, true));
    }
    for (uint64_t i = 0; i < 4096; i++) {
        CHECK(!gaps_alloc(tree, &(gaps_query){1, 1, 1 << 20, false}, &start) && start == i * 16 + 14);
        CHECK(!gaps_give(tree, i * 16, 8, 0, UINT64_MAX));
        CHECK(!gaps_take(tree, i * 16, 8));
    }
    CHECK(gaps_count(tree) == 0 && gaps_pages(tree) == 0);
    gaps_free(tree);
}

static void test_never_joins_past_a_border(void)
{
    gaps *tree = gaps_new(12);
    uint64_t start;

    CHECK(!gaps_give(tree, 512, 512, 512, 1023));
    CHECK(!gaps_give(tree, 1024, 512, 1024, 1535));
    CHECK(gaps_count(tree) == 2 && !gaps_check(tree, false) && gaps_check(tree, true));
    CHECK(gaps_alloc(tree, &(gaps_query){513, 1, 1 << 20, false}, &start) == -ENOSPC);
    gaps_free(tree);
}

static void test_wrong_places_change_nothing(void)
{
    gaps *tree = whole();

    CHECK(!gaps_take(tree, 10, 10));
    for (uint64_t start = 0; start < 32; start++)
        for (uint64_t n = 1; n < 32; n++) {
            bool touches_used = start < 20 && start + n > 10, inside_used = start >= 10 && start + n <= 20;
            if (touches_used)
                CHECK(gaps_take(tree, start, n) == -ENOENT);
            if (!inside_used)
                CHECK(gaps_give(tree, start, n, 0, UINT64_MAX) == -EEXIST);
        }
    CHECK(gaps_count(tree) == 2 && gaps_pages(tree) == PAGES - 10);
    gaps_free(tree);
}

static void fuzz(unsigned steps)
{
    static struct { uint64_t start, npages; } live[PAGES];
    unsigned nlive = 0, many = draw(2) ? 4000 : 300;
    gaps *tree = whole();

    for (step_no = 0; step_no < steps && !failed; step_no++) {
        uint64_t what = draw(10), start = 0, expected = 0;

        if (what < 5 && nlive < many) {
            gaps_query q = {1 + draw(draw(4) ? 4 : 40), UINT64_C(1) << (draw(3) ? 2 * draw(2) : draw(13)), PAGES - 1,
                            draw(2)};
            if (draw(3) == 0)
                q.last = draw(PAGES);
            bool fits = model_find(&q, &expected);
            int err = gaps_alloc(tree, &q, &start);
            CHECK(err == (fits ? 0 : -ENOSPC));
            if (err)
                continue;
            CHECK(start % q.align == 0 && start + q.npages - 1 <= q.last && all(start, q.npages, true));
            if (q.align == 1 || q.align == 4 || q.align == 2048)
                CHECK(start == expected);
            memset(is_free + start, false, q.npages);
            live[nlive].start = start;
            live[nlive++].npages = q.npages;
        } else if (what < 7 && nlive < many) {
            uint64_t npages = 1 + draw(8);
            start = draw(PAGES - npages);
            bool fits = all(start, npages, true);
            CHECK(gaps_take(tree, start, npages) == (fits ? 0 : -ENOENT));
            if (!fits)
                continue;
            memset(is_free + start, false, npages);
            live[nlive].start = start;
            live[nlive++].npages = npages;
        } else if (nlive) {
            unsigned i = draw(nlive);
            CHECK(!gaps_give(tree, live[i].start, live[i].npages, 0, UINT64_MAX));
            memset(is_free + live[i].start, true, live[i].npages);
            live[i] = live[--nlive];
        }
        if (step_no % 8 == 0) {
            uint64_t align = UINT64_C(1) << draw(13), last = draw(PAGES);
            CHECK(!gaps_check(tree, true));
            CHECK(same(tree));
            CHECK(gaps_largest(tree, align, last) == model_largest(align, last));
        }
    }
    while (nlive--)
        CHECK(!gaps_give(tree, live[nlive].start, live[nlive].npages, 0, UINT64_MAX));
    CHECK(gaps_count(tree) == 1 && gaps_pages(tree) == PAGES && !gaps_check(tree, true));
    gaps_free(tree);
}

/* Arguments: first seed, number of seeds, steps a seed. */
int main(int argc, char **argv)
{
    uint64_t first = argc > 1 ? strtoull(argv[1], NULL, 0) : 1, seeds = argc > 2 ? strtoull(argv[2], NULL, 0) : 8;
    unsigned steps = argc > 3 ? strtoul(argv[3], NULL, 0) : 8000;

    test_exactly_aligned_hole();
    test_end_of_the_space();
    test_start_moves_past_the_separator();
    test_never_joins_past_a_border();
    test_wrong_places_change_nothing();
    for (seed = first; seed < first + seeds && !failed; seed++) {
        state = seed * UINT64_C(0x9E3779B97F4A7C15);
        fuzz(steps);
    }
    printf("seeds %" PRIu64 " to %" PRIu64 ", %u steps each\n", first, first + seeds - 1, steps);
    printf("%u passed, %u failed\n", passed, failed);
    return failed != 0;
}
