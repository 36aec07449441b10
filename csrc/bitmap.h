/*
 * Dirty bitmaps: flat arrays of little-endian u64 words.  Bit i is bit i % 64 of word i / 64, least significant first.
 *
 * Functions that take `nbits` never read or change a bit at or after it, so that the last word may be shared with
 * somebody else's bits.  Functions that take `nwords` work on whole words.  No function is atomic: dirtylog.h is what
 * threads mark pages in.  Source and destination must not overlap unless they are the same array (or, andnot).
 */
#ifndef VFIODMA_BITMAP_H
#define VFIODMA_BITMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

static inline uint64_t bitmap_nwords(uint64_t nbits)
{
    return nbits / 64 + (nbits % 64 != 0);
}

static inline bool bitmap_test(const uint64_t *words, uint64_t i)
{
    return words[i / 64] >> (i % 64) & 1;
}

/* Set, or clear, the n bits from `first` on. */
void bitmap_set(uint64_t *words, uint64_t first, uint64_t n);
void bitmap_clear(uint64_t *words, uint64_t first, uint64_t n);

void bitmap_or(uint64_t *dst, const uint64_t *src, uint64_t nwords);
void bitmap_andnot(uint64_t *dst, const uint64_t *src, uint64_t nwords);
uint64_t bitmap_count(const uint64_t *words, uint64_t nwords);
bool bitmap_any(const uint64_t *words, uint64_t nwords);
uint64_t bitmap_count_bits(const uint64_t *words, uint64_t nbits);
bool bitmap_any_bits(const uint64_t *words, uint64_t nbits);

/* OR the nbits of src into dst from dst_bit on, clear them in src, and return how many were set. */
uint64_t bitmap_harvest(uint64_t *dst, uint64_t dst_bit, uint64_t *src, uint64_t nbits);
/* The same from any bit of src. */
uint64_t bitmap_harvest_at(uint64_t *dst, uint64_t dst_bit, uint64_t *src, uint64_t src_bit, uint64_t nbits);
/* The same for n of the lines of 512 bits of src: line k goes to dst from dst_bit + 512 * k on. */
uint64_t bitmap_harvest_lines(uint64_t *dst, uint64_t dst_bit, uint64_t *src, const uint64_t *lines, size_t n);

/*
 * Page-size scaling by 2^shift.  compact: bit j of dst is the OR of the bits [j << shift, (j + 1) << shift) of src's
 * nbits.  expand: bit i of dst's nbits is bit i >> shift of src.  Both overwrite every word of dst; bits after the last
 * are zero.
 */
void bitmap_compact(uint64_t *dst, const uint64_t *src, uint64_t nbits, unsigned shift);
void bitmap_expand(uint64_t *dst, const uint64_t *src, uint64_t nbits, unsigned shift);

/* Number of runs of set bits. */
uint64_t bitmap_count_runs(const uint64_t *words, uint64_t nbits);
/* Write the lowest `cap` runs as pairs (first, count), or the lowest `cap` set bits; return how many were written. */
size_t bitmap_runs(const uint64_t *words, uint64_t nbits, uint64_t *pairs, size_t cap);
size_t bitmap_indices(const uint64_t *words, uint64_t nbits, uint64_t *out, size_t cap);

/*
 * The CPU variant in use: "scalar", "neon", "avx2" or "avx512".  It is chosen when the library is loaded; the
 * environment variable VFIODMA_CPU lowers it.  bitmap_use_cpu() chooses another one for tests (-EINVAL: unknown, or
 * not on this CPU).
 */
const char *bitmap_cpu(void);
int bitmap_use_cpu(const char *name);

#endif
