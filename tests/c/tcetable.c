/* Tables of TCEs against an array, at every edge of their levels; sparse ones of the largest size. */
#include "tcetable.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>

#define N 1300          /* three leaves, the last one short */

static uint64_t state = 88172645463325252;

static uint64_t next(uint64_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % below;
}

static void against_an_array(void)
{
    static struct { uint64_t vaddr; struct tce_region *region; } model[N];
    struct tce_region regions[2] = {{0}};
    tce_table *table = tce_table_new(N);
    assert(table);
    for (int step = 0; step < 20000; step++) {
        uint64_t first = next(N), npages = next(next(4) ? 20 : N), done, found = 0, mapped[2] = {0};
        if (npages > N - first)
            npages = N - first;
        if (next(2)) {
            unsigned which = next(3);
            struct tce_region *region = which < 2 ? &regions[which] : NULL;
            uint64_t vaddr = (1 + next(1000)) << 12;
            assert(!tce_table_fill(table, first, npages, vaddr, 4096, 3, region, &done) && done == npages);
            for (uint64_t i = 0; i < npages; i++) {
                model[first + i].vaddr = vaddr + i * 4096;
                model[first + i].region = region;
            }
        } else {
            for (uint64_t i = first; i < first + npages; i++) {
                found += model[i].vaddr != 0;
                model[i].vaddr = 0;
            }
            assert(tce_table_clear(table, first, npages) == found);
        }
        for (uint64_t i = 0; i < N; i++) {
            if (step % 100 == 0) {
                const struct tce *entry = tce_table_find(table, i);
                assert(entry ? entry->vaddr == model[i].vaddr && entry->region == model[i].region : !model[i].vaddr);
            }
            for (unsigned r = 0; r < 2; r++)
                mapped[r] += model[i].vaddr && model[i].region == &regions[r];
        }
        assert(regions[0].mapped == mapped[0] && regions[1].mapped == mapped[1]);
    }
    tce_table_free(table);
    assert(regions[0].mapped == 0 && regions[1].mapped == 0);
}

static void sparse(void)
{
    static const uint64_t sizes[] = {1, 511, 512, 513, 1 << 18, (1 << 18) + 1, UINT64_C(1) << 42, UINT64_C(1) << 52};
    for (unsigned s = 0; s < sizeof(sizes) / sizeof(*sizes); s++) {
        struct tce_region region = {0};
        uint64_t size = sizes[s], last = size - 1, done;
        tce_table *table = tce_table_new(size);
        assert(table && !tce_table_find(table, 0) && !tce_table_find(table, last));
        assert(tce_table_clear(table, 0, size) == 0 && tce_table_clear(table, last, 0) == 0);
        assert(!tce_table_fill(table, last, 1, 4096, 4096, 1, &region, &done));
        assert(!tce_table_fill(table, size / 2, 1, 8192, 4096, 1, &region, &done));
        assert(tce_table_find(table, size / 2)->vaddr == 8192 && region.mapped == 1 + (size > 2));
        assert(tce_table_clear(table, 0, size) == 1 + (size > 2) && region.mapped == 0);
        assert(!tce_table_fill(table, last, 1, 4096, 4096, 1, &region, &done));
        tce_table_free(table);
        assert(region.mapped == 0);
    }
    tce_table_free(NULL);
}

int main(void)
{
    against_an_array();
    sparse();
    puts("ok");
    return 0;
}
