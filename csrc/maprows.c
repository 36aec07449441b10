#include "maprows.h"

#include <errno.h>

enum maprows_fault maprows_check(const uint64_t *rows, size_t n, const uint64_t *sizes, size_t nregions, uint64_t pgsize,
                                 uint64_t totals[2], size_t *bad)
{
    uint64_t last = 0;
    totals[0] = totals[1] = 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t iova = rows[4 * i], offset = rows[4 * i + 1], size = rows[4 * i + 2], tag = rows[4 * i + 3];
        *bad = i;
        if (tag >> 3 >= nregions || !(tag & 3))
            return MAPROWS_TAG;
        if (!size || (iova | offset | size) & (pgsize - 1) || iova + (size - 1) < iova)
            return MAPROWS_RANGE;
        if (i && iova <= last)
            return MAPROWS_ORDER;
        if (size > sizes[tag >> 3] || offset > sizes[tag >> 3] - size)
            return MAPROWS_OUTSIDE;
        if (totals[0] + size < size)
            return MAPROWS_TOTAL;
        last = iova + (size - 1);
        totals[0] += size;
        totals[1] += tag & 4 ? 0 : size;
    }
    return MAPROWS_OK;
}

void maprows_place(const uint64_t *rows, size_t n, const uint64_t *bases, uint64_t *entries)
{
    for (size_t i = 0; i < n; i++, rows += 4, entries += 4) {
        entries[0] = rows[0];
        entries[1] = bases[rows[3] >> 3] + rows[1];
        entries[2] = rows[2];
        entries[3] = rows[3] & 7;
    }
}

int maprows_split(const uint64_t *entries, size_t n, uint64_t extra, uint64_t *translations, uint64_t *tags,
                  uint64_t *updates, size_t *bad)
{
    for (size_t i = 0; i < n; i++, entries += 4, translations += 3, tags += 3, updates += 3) {
        if (!(entries[3] & 3) || entries[3] > 7) {
            *bad = i;
            return -EINVAL;
        }
        translations[0] = tags[0] = updates[0] = entries[0];
        translations[2] = updates[1] = entries[1];
        translations[1] = tags[1] = updates[2] = entries[2];
        tags[2] = entries[3] | extra;
    }
    return 0;
}

int maprows_rejoin(const uint64_t *rows, const uint64_t *waiting, size_t n, uint64_t *translations)
{
    for (size_t i = 0; i < n; i++, rows += 3, waiting += 3, translations += 3) {
        if (rows[0] != waiting[0] || rows[2] != waiting[1])
            return -ENOENT;
        translations[0] = rows[0];
        translations[1] = rows[2];
        translations[2] = rows[1];
    }
    return 0;
}
