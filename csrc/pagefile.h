/*
 * Pages of memory at fixed places of a file: page i of a run lies at offset + i * pgsize.  A run is a pair of u64: its
 * first page and its number of pages.  All return 0 or -errno; interrupted and short transfers go on.
 */
#ifndef VFIODMA_PAGEFILE_H
#define VFIODMA_PAGEFILE_H

#include <stddef.h>
#include <stdint.h>

/* Write the runs' pages, whose content stands one after another at `content`. */
int pagefile_write(int fd, uint64_t offset, const uint64_t *runs, size_t n, const void *content, uint64_t pgsize);
/* Read the runs' pages to where they belong in the memory at `base`.  -ENODATA: the file ends before. */
int pagefile_read(int fd, uint64_t offset, const uint64_t *runs, size_t n, void *base, uint64_t pgsize);
/* Map the runs' pages, private, over the memory at `base`, which is mapped and page-aligned. */
int pagefile_map(int fd, uint64_t offset, const uint64_t *runs, size_t n, void *base, uint64_t pgsize);
/* Make holes of the runs' pages. */
int pagefile_punch(int fd, uint64_t offset, const uint64_t *runs, size_t n, uint64_t pgsize);

#endif
