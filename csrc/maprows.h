/* Rows of mappings on their way from one process to another.
 *
 * A placed row is {iova, offset into its region, size, region << 3 | mmio << 2 | prot}; an entry is {iova, vaddr, size,
 * mmio << 2 | prot}. */
#ifndef VFIODMA_MAPROWS_H
#define VFIODMA_MAPROWS_H
#include <stddef.h>
#include <stdint.h>

enum maprows_fault {
    MAPROWS_OK,
    MAPROWS_TAG,                /* no such region, or no permission */
    MAPROWS_RANGE,              /* empty, misaligned, or beyond 2^64 */
    MAPROWS_ORDER,              /* not above the row before it */
    MAPROWS_OUTSIDE,            /* beyond the end of its region */
    MAPROWS_TOTAL,              /* all rows together have more than 2^64 - 1 bytes */
};

/* Check placed rows against the regions' sizes.  totals[0] = bytes, totals[1] = bytes that are no device memory; of a fault,
 * *bad is the row. */
enum maprows_fault maprows_check(const uint64_t *rows, size_t n, const uint64_t *sizes, size_t nregions, uint64_t pgsize,
                                 uint64_t totals[2], size_t *bad);

/* Entries of checked rows: each region begins at bases[region]. */
void maprows_place(const uint64_t *rows, size_t n, const uint64_t *bases, uint64_t *entries);

/* Take entries apart: {iova, size, vaddr}, {iova, size, tag | extra}, and {iova, vaddr, size}.  0, or -EINVAL with *bad set for
 * a tag without permission or with further bits. */
int maprows_split(const uint64_t *entries, size_t n, uint64_t extra, uint64_t *translations, uint64_t *tags,
                  uint64_t *updates, size_t *bad);

/* Join rows {iova, vaddr, size} with what waits for them, {iova, size, old vaddr}, into {iova, size, vaddr}.  0, or -ENOENT where
 * they are not the same mappings in the same order. */
int maprows_rejoin(const uint64_t *rows, const uint64_t *waiting, size_t n, uint64_t *translations);
#endif
