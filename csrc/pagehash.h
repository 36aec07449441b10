/* 64-bit hashes of pages, to find out which ones differ from what was sent.
 *
 * Keyed: two contents have the same hash with probability 2^-64 for whoever does not know the key. */
#ifndef VFIODMA_PAGEHASH_H
#define VFIODMA_PAGEHASH_H
#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint64_t word[8];
} pagehash_key;

/* Hash of `size` bytes, a multiple of 64. */
uint64_t pagehash(const pagehash_key *, const void *page, size_t size);

/* Set bit i for each page i of `npages` whose hash is not hashes[i]; return how many.  A page whose hash is not known (0)
 * counts, and is not touched. */
uint64_t pagehash_differ(const pagehash_key *, const void *memory, uint64_t npages, size_t pgsize, const uint64_t *hashes,
                         uint64_t *words);

/* Note the hashes of the pages of `nruns` runs (first page, pages), whose bytes stand in `content` one after another. */
void pagehash_note(const pagehash_key *, const uint64_t *runs, size_t nruns, const void *content, size_t pgsize,
                   uint64_t *hashes);
#endif
