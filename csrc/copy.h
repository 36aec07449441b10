/*
 * Pages between guest memory and a linear buffer.  A run is a pair of u64: its first page and its number of pages.  In
 * the linear buffer the runs' pages follow one another.
 */
#ifndef VFIODMA_COPY_H
#define VFIODMA_COPY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * Whether n runs lie inside memory of npages pages.  Sets how many pages they have, the lowest page and the one after
 * the highest.  -EINVAL: an empty run; -ERANGE: a run outside, or more than 2^64 - 1 pages in all.
 */
int copy_check(const uint64_t *runs, size_t n, uint64_t npages, uint64_t *total, uint64_t *lowest, uint64_t *end);

/*
 * Copy the runs' pages from the npages pages at `base` to the `room` pages at `linear`, or back, and return how many
 * pages were copied.  It stops at the first run that does not lie inside (the runs may change under us).
 */
uint64_t copy_gather(void *linear, uint64_t room, const void *base, uint64_t npages, const uint64_t *runs, size_t n,
                     uint64_t pgsize);
uint64_t copy_scatter(const void *linear, uint64_t room, void *base, uint64_t npages, const uint64_t *runs, size_t n,
                      uint64_t pgsize);

bool copy_is_zero(const void *p, size_t n);
/* For each of n pages 1 if it is all zero, else 0; returns how many are. */
uint64_t copy_zero_pages(uint8_t *out, const void *base, uint64_t n, uint64_t pgsize);

/*
 * The pages of runs, a chunk at a time: each run is cut into runs of pages that are all zero and runs of others (`kept`),
 * whose content is copied to `stage` in the same pass, or only looked at where `stage` is NULL.  Memory may change
 * meanwhile: what is staged was there at some time.
 */
struct copy_chunk {
    const uint64_t *runs;       /* inside the memory: copy_check() */
    size_t n;
    uint64_t run, page;         /* the next page: which run, and which page of it */
    uint64_t *kept, *zeros;     /* room for `max_runs` runs each */
    size_t nkept, nzeros, max_runs;
    uint64_t kept_pages, zero_pages;
};

/* The next chunk: at most `most` pages that are kept, and `most_zeros` in all.  False when there are no pages left. */
bool copy_next_chunk(struct copy_chunk *chunk, void *stage, const void *base, uint64_t pgsize, uint64_t most,
                     uint64_t most_zeros);

/*
 * Whether runs from outside (little-endian) are not empty (-EINVAL), ascending and disjoint (-EILSEQ), within npages
 * (-ERANGE) and `most` pages at most together (-E2BIG).  The runs are copied to `own` first, so that nobody changes
 * them any more.
 */
int copy_admit(uint64_t *own, const void *runs, size_t n, uint64_t npages, uint64_t most, uint64_t *total);
/*
 * Note that the runs' pages came in this epoch (not 0), or, where one of them did already, note nothing and return
 * -EEXIST.  Any number of threads may claim pages of one `brought` at once: each page is one thread's.
 */
int copy_claim(const uint64_t *runs, size_t n, uint16_t *brought, uint16_t epoch);
/* Note that there may be something else than zeros in the runs' pages. */
void copy_touch(const uint64_t *runs, size_t n, uint8_t *touched);
/* Clear the runs' pages; where `touched` is given, only those. */
void copy_clear(void *base, const uint64_t *runs, size_t n, uint64_t pgsize, const uint8_t *touched);

#endif
