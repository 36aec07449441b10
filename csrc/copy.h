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

#endif
