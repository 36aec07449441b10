/*
 * The allocator and a first-fit list over the same 16 GiB of 4 KiB pages, 90 % full after churn; then holes of one page
 * only.  Prints "name nanoseconds" lines, thread CPU time an operation.
 */
#include "iovaspace.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { PAGES = 1 << 22, ROUND = 512 };

typedef struct hole {
    uint64_t start, npages;
    struct hole *next;
} hole;

static struct { uint64_t start, npages; } live[PAGES];
static uint64_t nlive, used, state = 88172645463325252;

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static uint64_t draw(uint64_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (state * UINT64_C(0x2545F4914F6CDD1D) >> 20) % below;
}

static bool list_alloc(hole **head, uint64_t npages, uint64_t *start)
{
    for (hole **at = head; *at; at = &(*at)->next) {
        hole *h = *at;
        if (h->npages < npages)
            continue;
        *start = h->start;
        h->start += npages;
        h->npages -= npages;
        if (!h->npages) {
            *at = h->next;
            free(h);
        }
        return true;
    }
    return false;
}

static void list_give(hole **head, uint64_t start, uint64_t npages)
{
    hole **at = head, *before = NULL;

    for (; *at && (*at)->start < start; at = &(*at)->next)
        before = *at;
    hole *after = *at;
    if (after && after->start == start + npages) {
        after->start = start;
        after->npages += npages;
    } else {
        after = malloc(sizeof *after);
        *after = (hole){start, npages, *at};
        *at = after;
    }
    if (before && before->start + before->npages == after->start) {
        before->npages += after->npages;
        before->next = after->next;
        free(after);
    }
}

static uint64_t any_size(void)
{
    return 1 + draw(draw(8) ? 8 : 300);
}

static iovaspace_request request(uint64_t npages)
{
    return (iovaspace_request){.npages = npages, .align = 1, .last = PAGES - 1, .hint = IOVASPACE_NO_HINT,
                               .hint_align = 1};
}

static void keep(uint64_t start, uint64_t npages)
{
    live[nlive].start = start;
    live[nlive++].npages = npages;
    used += npages;
}

/* Move `n` random live entries to the end. */
static void shuffle(unsigned n)
{
    for (uint64_t i = 1; i <= n; i++) {
        uint64_t k = draw(nlive - i + 1), j = nlive - i;
        typeof(live[0]) t = live[k];
        live[k] = live[j];
        live[j] = t;
    }
}

static void churn(iovaspace *space, hole **list, unsigned rounds)
{
    double alloc = 0, give = 0;
    uint64_t start, sizes[ROUND], places[ROUND];

    for (unsigned r = 0; r < rounds; r++) {
        bool ok[ROUND];
        shuffle(ROUND);
        double began = now();
        for (unsigned i = 1; i <= ROUND; i++)
            if (list)
                list_give(list, live[nlive - i].start, live[nlive - i].npages);
            else
                iovaspace_release(space, live[nlive - i].start);
        give += now() - began;
        for (unsigned i = 0; i < ROUND; i++) {
            used -= live[--nlive].npages;
            sizes[i] = any_size();
        }
        began = now();
        for (unsigned i = 0; i < ROUND; i++) {
            iovaspace_request q = request(sizes[i]);
            ok[i] = list ? list_alloc(list, sizes[i], &places[i]) : !iovaspace_allocate(space, &q, &places[i]);
        }
        alloc += now() - began;
        for (unsigned i = 0; i < ROUND; i++)
            if (ok[i])
                keep(places[i], sizes[i]);
        while (!list && used < PAGES / 10 * 9) {
            iovaspace_request q = request(any_size());
            if (iovaspace_allocate(space, &q, &start))
                break;
            keep(start, q.npages);
        }
    }
    printf("%s_alloc %.1f\n%s_free %.1f\n", list ? "list" : "own", alloc / rounds / ROUND, list ? "list" : "own",
           give / rounds / ROUND);
}

static void adversarial(void)
{
    gaps *tree = gaps_new(12);
    const struct { const char *name; gaps_query query; } cases[] = {
        {"holes_two_pages", {2, 1, PAGES - 1, false}},
        {"holes_aligned_2m", {512, 512, PAGES - 1, false}},
        {"holes_impossible", {PAGES, 1, PAGES - 1, false}},
        {"holes_impossible_aligned", {512, 512, PAGES / 2, false}},
        {"holes_impossible_limit", {2, 1, PAGES / 4 - 1, false}},
        {"holes_impossible_limit_top_down", {2, 1, PAGES / 4 - 1, true}},
    };
    uint64_t start;

    for (uint64_t i = 0; i < PAGES / 8; i++)
        gaps_give(tree, 2 * i + 1, 1, 0, UINT64_MAX);
    gaps_give(tree, PAGES - 1024, 1024, 0, UINT64_MAX);
    for (unsigned c = 0; c < sizeof cases / sizeof *cases; c++) {
        double began = now();
        for (unsigned i = 0; i < 20000; i++)
            if (!gaps_alloc(tree, &cases[c].query, &start))
                gaps_give(tree, start, cases[c].query.npages, 0, UINT64_MAX);
        printf("%s %.1f\n", cases[c].name, (now() - began) / 20000);
    }
    gaps_free(tree);
}

int main(void)
{
    iovaspace *space = iovaspace_new(12);
    iovaspace_range all = {0, PAGES - 1};
    hole *list = NULL, **tail = &list;
    uint64_t start, npages;

    iovaspace_set_ranges(space, &all, 1);
    while (used < PAGES / 10 * 9) {
        iovaspace_request q = request(any_size());
        if (iovaspace_allocate(space, &q, &start))
            break;
        keep(start, q.npages);
    }
    for (unsigned i = 0; i < 2; i++)        /* the second is the one that counts */
        churn(space, NULL, 300);
    printf("live %.1f\nholes %.1f\n", (double)nlive, (double)gaps_count(space->lasting));

    iovaspace_request impossible = request(PAGES / 4);
    double began = now();
    for (unsigned i = 0; i < 10000; i++)
        iovaspace_allocate(space, &impossible, &start);
    printf("own_impossible %.1f\n", (now() - began) / 10000);

    for (uint64_t at = 0; gaps_next(space->lasting, at, &start, &npages); at = start + npages, tail = &(*tail)->next) {
        *tail = malloc(sizeof **tail);
        **tail = (hole){start, npages, NULL};
    }
    began = now();
    for (unsigned i = 0; i < 100; i++)
        list_alloc(&list, PAGES / 4, &start);
    printf("list_impossible %.1f\n", (now() - began) / 100);
    churn(space, &list, 4);
    adversarial();
    return 0;
}
