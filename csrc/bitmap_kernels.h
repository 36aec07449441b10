/* What a CPU variant of the bitmap provides.  bitmap.c does heads, tails and bounds; kernels see whole words only. */
#ifndef VFIODMA_BITMAP_KERNELS_H
#define VFIODMA_BITMAP_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Words that one call of `extract` gets at most: 4 KiB, so that its work area stays in the first-level cache. */
#define BITMAP_BLOCK 512

struct bitmap_kernels {
    const char *name;
    void (*or_words)(uint64_t *dst, const uint64_t *src, uint64_t n);
    void (*andnot_words)(uint64_t *dst, const uint64_t *src, uint64_t n);
    uint64_t (*count)(const uint64_t *words, uint64_t n);
    /* Set bits whose lower neighbour is clear; *carry is the bit before words[0], then the last bit seen. */
    uint64_t (*count_starts)(const uint64_t *words, uint64_t n, uint64_t *carry);
    /* dst |= src << shift (0..63; dst has one word more when shift is not 0), src = 0; the number of bits. */
    uint64_t (*harvest)(uint64_t *dst, unsigned shift, uint64_t *src, uint64_t n);
    /* The same for single lines of 8 words, at the same distance in dst as in src. */
    uint64_t (*harvest_lines)(uint64_t *dst, unsigned shift, uint64_t *src, const uint64_t *lines, size_t n);
    /*
     * Write base + i for each set bit i, at most `room` of them, and return how many were written.  With `carry` the
     * places where the bits change (from *carry before words[0]) in place of the set bits.  n <= BITMAP_BLOCK.
     */
    size_t (*extract)(const uint64_t *words, size_t n, uint64_t base, uint64_t *out, size_t room, uint64_t *carry);
    /* n words of dst from n << shift words of src, and n << shift words of dst from n words of src; shift 1..6. */
    void (*compact)(uint64_t *dst, const uint64_t *src, uint64_t n, unsigned shift);
    void (*expand)(uint64_t *dst, const uint64_t *src, uint64_t n, unsigned shift);
};

extern const struct bitmap_kernels bitmap_scalar;

/* The variant of that name if it is compiled in and this CPU has it, else NULL.  Best first in bitmap_variant_names. */
const struct bitmap_kernels *bitmap_x86(const char *name);
const struct bitmap_kernels *bitmap_arm(const char *name);

#endif
