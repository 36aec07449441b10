/* Rows of mappings: every fault is found at its row, and what is taken apart is what was put in. */
#include "maprows.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#define N 4

static void fill(uint64_t rows[N][4])
{
    for (uint64_t i = 0; i < N; i++) {
        uint64_t row[4] = {0x10000 + i * 0x2000, i * 0x1000, 0x1000, (i & 1) << 3 | (i == 3) << 2 | 3};
        memcpy(rows[i], row, sizeof(row));
    }
}

int main(void)
{
    const uint64_t sizes[2] = {0x4000, 0x4000}, bases[2] = {0x7f0000000000, 0x7e0000000000};
    uint64_t rows[N][4], entries[N][4], parts[3][N][3], totals[2];
    size_t bad;
    static const struct { int column; uint64_t value; enum maprows_fault fault; } wrong[] = {
        {3, 2 << 3 | 3, MAPROWS_TAG}, {3, 0, MAPROWS_TAG}, {3, UINT64_MAX, MAPROWS_TAG},
        {2, 0, MAPROWS_RANGE}, {2, 0x800, MAPROWS_RANGE}, {0, 1, MAPROWS_RANGE}, {1, 0x10, MAPROWS_RANGE},
        {2, UINT64_MAX & ~0xfffULL, MAPROWS_RANGE}, {0, 0x10000, MAPROWS_ORDER}, {0, 0, MAPROWS_ORDER},
        {1, 0x4000, MAPROWS_OUTSIDE}, {1, UINT64_MAX & ~0xfffULL, MAPROWS_OUTSIDE}, {2, 0x5000, MAPROWS_OUTSIDE},
    };

    fill(rows);
    assert(maprows_check(rows[0], N, sizes, 2, 0x1000, totals, &bad) == MAPROWS_OK);
    assert(totals[0] == 0x4000 && totals[1] == 0x3000);
    assert(maprows_check(rows[0], 0, sizes, 2, 0x1000, totals, &bad) == MAPROWS_OK && totals[0] == 0);
    for (size_t i = 0; i < sizeof(wrong) / sizeof(*wrong); i++) {
        fill(rows);
        rows[2][wrong[i].column] = wrong[i].value;
        assert(maprows_check(rows[0], N, sizes, 2, 0x1000, totals, &bad) == wrong[i].fault && bad == 2);
    }
    fill(rows);
    maprows_place(rows[0], N, bases, entries[0]);
    assert(entries[1][1] == bases[1] + 0x1000 && entries[3][3] == 7 && entries[2][0] == rows[2][0]);
    assert(!maprows_split(entries[0], N, 1 << 3, parts[0][0], parts[1][0], parts[2][0], &bad));
    for (int i = 0; i < N; i++) {
        assert(parts[0][i][0] == entries[i][0] && parts[0][i][1] == entries[i][2] && parts[0][i][2] == entries[i][1]);
        assert(parts[1][i][0] == entries[i][0] && parts[1][i][1] == entries[i][2] && parts[1][i][2] == (entries[i][3] | 8));
        assert(parts[2][i][0] == entries[i][0] && parts[2][i][1] == entries[i][1] && parts[2][i][2] == entries[i][2]);
    }
    uint64_t waiting[N][3], joined[N][3];
    for (int i = 0; i < N; i++)
        memcpy(waiting[i], (uint64_t[]){entries[i][0], entries[i][2], 1}, sizeof(waiting[i]));
    assert(!maprows_rejoin(parts[2][0], waiting[0], N, joined[0]) && !memcmp(joined, parts[0], sizeof(joined)));
    waiting[2][1]++;
    assert(maprows_rejoin(parts[2][0], waiting[0], N, joined[0]) == -ENOENT);
    entries[1][3] = 4;
    assert(maprows_split(entries[0], N, 0, parts[0][0], parts[1][0], parts[2][0], &bad) == -EINVAL && bad == 1);
    entries[1][3] = 8 | 3;
    assert(maprows_split(entries[0], N, 0, parts[0][0], parts[1][0], parts[2][0], &bad) == -EINVAL && bad == 1);
    puts("ok");
    return 0;
}
