/* The address space while every other malloc of its kernels fails: a refused call must have changed nothing. */
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

static bool failing;

static void *malloc_or_not(size_t size)
{
    return failing && rand() % 2 ? NULL : malloc(size);
}

#define malloc malloc_or_not
#define GAPS_SLAB 1
#include "../../csrc/gaps.c"
#include "../../csrc/iovaspace.c"

static const iovaspace_range ranges[] = {{0, 4}, {10, 60000}, {60010, (1 << 20) - 1}};
static uint64_t live[4000];
static unsigned nlive;

static int any_call(iovaspace *space)
{
    static const uint64_t sizes[] = {1, 3, 7, 513, 512, 1536};
    int err;

    if (nlive && rand() % 3 == 0) {
        unsigned i = rand() % nlive;
        err = iovaspace_release(space, live[i]);
        if (!err)
            live[i] = live[--nlive];
    } else if (rand() % 5 == 0) {
        uint64_t start = rand() % 2000;
        err = iovaspace_reserve(space, start, 1 + rand() % 4);
        if (!err)
            live[nlive++] = start;
    } else {
        iovaspace_request q = {sizes[rand() % 6], rand() % 2, rand() % 2 ? 1 : 16, (1 << 20) - 1,
                               rand() % 4 ? IOVASPACE_NO_HINT : (uint64_t)rand() % 3000, 1, rand() % 2, rand() % 2};
        err = iovaspace_allocate(space, &q, &live[nlive]);
        nlive += !err;
    }
    return err;
}

static const char *run(unsigned seed, unsigned steps, unsigned *refused)
{
    iovaspace *space = iovaspace_new(12);
    const char *broken = NULL;

    srand(seed);
    nlive = 0;
    iovaspace_set_ranges(space, ranges, 3);
    for (unsigned i = 0; i < steps && !broken; i++) {
        uint64_t before = iovaspace_free_pages(space);
        size_t count = rangemap_count(space->used);

        failing = true;
        int err = any_call(space);
        *refused += err == -ENOMEM;
        if (!err && rand() % 60 == 0)
            iovaspace_set_ranges(space, ranges, 1 + rand() % 3);
        failing = false;
        broken = iovaspace_check(space);
        if (err && (before != iovaspace_free_pages(space) || count != rangemap_count(space->used)))
            broken = "a refused call changed something";
    }
    iovaspace_set_ranges(space, ranges, 3);
    while (nlive && !broken)
        if (iovaspace_release(space, live[--nlive]))
            broken = "an allocation is lost";
    if (!broken && iovaspace_free_pages(space) != space->total_pages)
        broken = "pages are lost at the end";
    iovaspace_free(space);
    return broken;
}

/* Arguments: first seed, number of seeds, steps a seed. */
int main(int argc, char **argv)
{
    unsigned first = argc > 1 ? strtoul(argv[1], NULL, 0) : 1, seeds = argc > 2 ? strtoul(argv[2], NULL, 0) : 30;
    unsigned steps = argc > 3 ? strtoul(argv[3], NULL, 0) : 1500, failed = 0, refused = 0;

    for (unsigned seed = first; seed < first + seeds; seed++) {
        const char *broken = run(seed, steps, &refused);
        if (broken)
            printf("seed %u: %s\n", seed, broken);
        failed += broken != NULL;
    }
    printf("seeds %u to %u, %u steps each, %u calls out of memory\n", first, first + seeds - 1, steps, refused);
    printf("%u passed, %u failed\n", seeds - failed, failed);
    return failed != 0;
}
