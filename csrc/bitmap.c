/* The scalar kernels, the choice of the CPU variant, and the heads and tails around every variant's kernels. */
#include "bitmap.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap_kernels.h"

/* ---- scalar kernels ---- */

static void scalar_or(uint64_t *dst, const uint64_t *src, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        dst[i] |= src[i];
}

static void scalar_andnot(uint64_t *dst, const uint64_t *src, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        dst[i] &= ~src[i];
}

/* Bits of one word.  Without -mpopcnt __builtin_popcountll is a call; this is not. */
static inline unsigned ones(uint64_t w)
{
    w -= w >> 1 & 0x5555555555555555;
    w = (w & 0x3333333333333333) + (w >> 2 & 0x3333333333333333);
    w = (w + (w >> 4)) & 0x0f0f0f0f0f0f0f0f;
    return (unsigned)(w * 0x0101010101010101 >> 56);
}

static uint64_t scalar_count(const uint64_t *words, uint64_t n)
{
    uint64_t total = 0;
    for (uint64_t i = 0; i < n; i++)
        total += ones(words[i]);
    return total;
}

static uint64_t scalar_count_starts(const uint64_t *words, uint64_t n, uint64_t *carry)
{
    uint64_t total = 0, before = *carry;
    for (uint64_t i = 0; i < n; i++) {
        total += ones(words[i] & ~(words[i] << 1 | before));
        before = words[i] >> 63;
    }
    *carry = before;
    return total;
}

static uint64_t scalar_harvest(uint64_t *dst, unsigned shift, uint64_t *src, uint64_t n)
{
    uint64_t total = 0, before = 0;
    for (uint64_t i = 0; i < n;) {
        uint64_t stop = i + 8 < n ? i + 8 : n, seen = before;
        for (uint64_t k = i; k < stop; k++)
            seen |= src[k];
        if (!seen) {
            i = stop;
            continue;
        }
        /* Shifting twice, since a shift by 64 is undefined. */
        for (; i < stop; i++) {
            uint64_t w = src[i];
            dst[i] |= w << shift | before >> 1 >> (63 - shift);
            src[i] = 0;
            total += ones(w);
            before = w;
        }
    }
    if (before >> 1 >> (63 - shift))
        dst[n] |= before >> 1 >> (63 - shift);
    return total;
}

static uint64_t scalar_harvest_lines(uint64_t *dst, unsigned shift, uint64_t *src, const uint64_t *lines, size_t n)
{
    uint64_t total = 0;
    for (size_t i = 0; i < n; i++)
        total += scalar_harvest(dst + 8 * lines[i], shift, src + 8 * lines[i], 8);
    return total;
}

static size_t scalar_extract(const uint64_t *words, size_t n, uint64_t base, uint64_t *out, size_t room,
                             uint64_t *carry)
{
    size_t found = 0;
    uint64_t before = carry ? *carry : 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t w = words[i];
        if (carry) {
            w ^= w << 1 | before;
            before = words[i] >> 63;
        }
        for (; w; w &= w - 1) {
            if (found == room)
                return found;
            out[found++] = base + 64 * i + (unsigned)__builtin_ctzll(w);
        }
    }
    if (carry)
        *carry = before;
    return found;
}

/* The lowest bit of each group of 2^shift bits, for shift 0..6. */
static const uint64_t group_bits[7] = {
    ~UINT64_C(0), 0x5555555555555555, 0x1111111111111111, 0x0101010101010101, 0x0001000100010001, 0x0000000100000001, 1,
};

static void scalar_compact(uint64_t *dst, const uint64_t *src, uint64_t n, unsigned shift)
{
    unsigned parts = 1u << shift, width = 64u >> shift;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t out = 0;
        for (unsigned part = 0; part < parts; part++) {
            uint64_t w = src[i * parts + part];
            if (!w)
                continue;
            for (unsigned step = 0; step < shift; step++)
                w |= w >> (1u << step);
            w &= group_bits[shift];
            /* Push the groups' bits together: pairs of them, then pairs of pairs, ... */
            for (unsigned size = 1; size < width; size *= 2) {
                uint64_t keep = (UINT64_C(1) << size) - 1;
                uint64_t stride = (uint64_t)size << shift, low = 0;
                for (unsigned at = 0; at < 64; at += 2 * stride)
                    low |= keep << at;
                w = (w & low) | (w & low << stride) >> (stride - size);
            }
            out |= w << part * width % 64;
        }
        dst[i] = out;
    }
}

static void scalar_expand(uint64_t *dst, const uint64_t *src, uint64_t n, unsigned shift)
{
    unsigned parts = 1u << shift, width = 64u >> shift;
    uint64_t fill = shift == 6 ? ~UINT64_C(0) : (UINT64_C(1) << parts) - 1;
    for (uint64_t i = 0; i < n; i++) {
        for (unsigned part = 0; part < parts; part++) {
            uint64_t bits = src[i] >> part * width, out = 0;
            if (width < 64)
                bits &= (UINT64_C(1) << width) - 1;
            for (; bits; bits &= bits - 1)
                out |= fill << ((unsigned)__builtin_ctzll(bits) << shift);
            dst[i * parts + part] = out;
        }
    }
}

const struct bitmap_kernels bitmap_scalar = {
    "scalar", scalar_or, scalar_andnot, scalar_count, scalar_count_starts, scalar_harvest,
    scalar_harvest_lines, scalar_extract, scalar_compact, scalar_expand,
};

/* ---- choice of the variant ---- */

/* Written by the constructor and by tests only. */
static const struct bitmap_kernels *kernels = &bitmap_scalar;

static const struct bitmap_kernels *variant(const char *name)
{
    const struct bitmap_kernels *found = bitmap_x86(name);
    if (!found)
        found = bitmap_arm(name);
    if (!found && !strcmp(name, "scalar"))
        found = &bitmap_scalar;
    return found;
}

__attribute__((constructor)) static void choose(void)
{
    static const char *const best_first[] = {"avx512", "avx2", "neon", "scalar"};
    const char *limit = getenv("VFIODMA_CPU");
    bool below = true;
    for (size_t i = 0; limit && i < sizeof(best_first) / sizeof(*best_first); i++)
        if (!strcmp(limit, best_first[i]))
            below = false;              /* a known limit: skip what stands before it */
    for (size_t i = 0; i < sizeof(best_first) / sizeof(*best_first); i++) {
        below = below || !strcmp(limit, best_first[i]);
        if (below && variant(best_first[i])) {
            kernels = variant(best_first[i]);
            return;
        }
    }
}

const char *bitmap_cpu(void)
{
    return kernels->name;
}

int bitmap_use_cpu(const char *name)
{
    const struct bitmap_kernels *found = variant(name);
    if (!found)
        return -EINVAL;
    kernels = found;
    return 0;
}

/* ---- the operations ---- */

/* Ones in the low n bits; n is 0..63. */
static inline uint64_t low_bits(unsigned n)
{
    return (UINT64_C(1) << n) - 1;
}

void bitmap_set(uint64_t *words, uint64_t first, uint64_t n)
{
    if (!n)
        return;
    uint64_t last = first + (n - 1), a = first / 64, b = last / 64;
    uint64_t head = ~UINT64_C(0) << first % 64, tail = ~UINT64_C(0) >> (63 - last % 64);
    if (a == b) {
        words[a] |= head & tail;
        return;
    }
    words[a] |= head;
    memset(words + a + 1, 0xff, (b - a - 1) * 8);
    words[b] |= tail;
}

void bitmap_clear(uint64_t *words, uint64_t first, uint64_t n)
{
    if (!n)
        return;
    uint64_t last = first + (n - 1), a = first / 64, b = last / 64;
    uint64_t head = ~UINT64_C(0) << first % 64, tail = ~UINT64_C(0) >> (63 - last % 64);
    if (a == b) {
        words[a] &= ~(head & tail);
        return;
    }
    words[a] &= ~head;
    memset(words + a + 1, 0, (b - a - 1) * 8);
    words[b] &= ~tail;
}

void bitmap_or(uint64_t *dst, const uint64_t *src, uint64_t nwords)
{
    kernels->or_words(dst, src, nwords);
}

void bitmap_andnot(uint64_t *dst, const uint64_t *src, uint64_t nwords)
{
    kernels->andnot_words(dst, src, nwords);
}

uint64_t bitmap_count(const uint64_t *words, uint64_t nwords)
{
    return kernels->count(words, nwords);
}

bool bitmap_any(const uint64_t *words, uint64_t nwords)
{
    uint64_t i = 0;
    for (; i + 16 <= nwords; i += 16) {
        uint64_t seen = 0;
        for (unsigned k = 0; k < 16; k++)
            seen |= words[i + k];
        if (seen)
            return true;
    }
    for (; i < nwords; i++)
        if (words[i])
            return true;
    return false;
}

uint64_t bitmap_count_bits(const uint64_t *words, uint64_t nbits)
{
    uint64_t total = kernels->count(words, nbits / 64);
    return nbits % 64 ? total + ones(words[nbits / 64] & low_bits(nbits % 64)) : total;
}

bool bitmap_any_bits(const uint64_t *words, uint64_t nbits)
{
    return bitmap_any(words, nbits / 64) || (nbits % 64 && words[nbits / 64] & low_bits(nbits % 64));
}

/* Harvest n (1..63) bits of the word at src, from bit `at` on; they may lie across two words of dst but not of src. */
static uint64_t harvest_part(uint64_t *dst, uint64_t dst_bit, uint64_t *src, unsigned at, unsigned n)
{
    uint64_t mask = low_bits(n) << at, w = (*src & mask) >> at;
    unsigned shift = dst_bit % 64;
    if (!w)
        return 0;
    *src &= ~mask;
    dst[dst_bit / 64] |= w << shift;
    if (shift && w >> (64 - shift))
        dst[dst_bit / 64 + 1] |= w >> (64 - shift);
    return ones(w);
}

uint64_t bitmap_harvest(uint64_t *dst, uint64_t dst_bit, uint64_t *src, uint64_t nbits)
{
    uint64_t n = nbits / 64, total = 0;
    if (n)
        total = kernels->harvest(dst + dst_bit / 64, dst_bit % 64, src, n);
    if (nbits % 64)
        total += harvest_part(dst, dst_bit + 64 * n, src + n, 0, nbits % 64);
    return total;
}

uint64_t bitmap_harvest_at(uint64_t *dst, uint64_t dst_bit, uint64_t *src, uint64_t src_bit, uint64_t nbits)
{
    uint64_t total = 0, head = -src_bit % 64;
    src += src_bit / 64;
    if (head > nbits)
        head = nbits;
    if (head) {
        total = harvest_part(dst, dst_bit, src, src_bit % 64, (unsigned)head);
        src++;
    }
    return total + bitmap_harvest(dst, dst_bit + head, src, nbits - head);
}

uint64_t bitmap_harvest_lines(uint64_t *dst, uint64_t dst_bit, uint64_t *src, const uint64_t *lines, size_t n)
{
    return kernels->harvest_lines(dst + dst_bit / 64, dst_bit % 64, src, lines, n);
}

/* Copy the first nbits of src into dst, which has `nwords` words, and clear the rest of dst. */
static void copy_bits(uint64_t *dst, uint64_t nwords, const uint64_t *src, uint64_t nbits)
{
    memset(dst, 0, nwords * 8);
    memcpy(dst, src, bitmap_nwords(nbits) * 8);
    if (nbits % 64)
        dst[nbits / 64] &= low_bits(nbits % 64);
}

/* More than 64 bits become one: each group is a row of whole words, the last one perhaps cut short. */
static void compact_rows(uint64_t *dst, const uint64_t *src, uint64_t nbits, unsigned shift)
{
    uint64_t groups = ((nbits - 1) >> shift) + 1;
    memset(dst, 0, bitmap_nwords(groups) * 8);
    for (uint64_t j = 0; j < groups; j++) {
        uint64_t first = j << shift, left = nbits - first;
        if (bitmap_any_bits(src + first / 64, left >> shift ? UINT64_C(1) << shift : left))
            dst[j / 64] |= UINT64_C(1) << j % 64;
    }
}

void bitmap_compact(uint64_t *dst, const uint64_t *src, uint64_t nbits, unsigned shift)
{
    uint64_t rest[64], n = nbits >> shift >> 6;
    if (!nbits)
        return;
    if (!shift) {
        copy_bits(dst, bitmap_nwords(nbits), src, nbits);
        return;
    }
    if (shift > 6) {
        compact_rows(dst, src, nbits, shift);
        return;
    }
    kernels->compact(dst, src, n, shift);
    if (nbits - (n << 6 << shift)) {
        copy_bits(rest, 64, src + (n << shift), nbits - (n << 6 << shift));
        bitmap_scalar.compact(dst + n, rest, 1, shift);
    }
}

void bitmap_expand(uint64_t *dst, const uint64_t *src, uint64_t nbits, unsigned shift)
{
    uint64_t rest[64], n = nbits >> shift >> 6;
    if (!shift) {
        copy_bits(dst, bitmap_nwords(nbits), src, nbits);
        return;
    }
    if (shift > 6) {
        memset(dst, 0, bitmap_nwords(nbits) * 8);
        for (uint64_t first = 0, j = 0; first < nbits; first += UINT64_C(1) << shift, j++) {
            uint64_t left = nbits - first;
            if (bitmap_test(src, j))
                bitmap_set(dst, first, left >> shift ? UINT64_C(1) << shift : left);
            if (!(left >> shift))
                break;
        }
        return;
    }
    kernels->expand(dst, src, n, shift);
    uint64_t left = nbits - (n << 6 << shift);
    if (left) {
        bitmap_scalar.expand(rest, src + n, 1, shift);
        copy_bits(dst + (n << shift), bitmap_nwords(left), rest, left);
    }
}

uint64_t bitmap_count_runs(const uint64_t *words, uint64_t nbits)
{
    uint64_t carry = 0, total = kernels->count_starts(words, nbits / 64, &carry);
    if (nbits % 64) {
        uint64_t w = words[nbits / 64] & low_bits(nbits % 64);
        total += scalar_count_starts(&w, 1, &carry);
    }
    return total;
}

size_t bitmap_indices(const uint64_t *words, uint64_t nbits, uint64_t *out, size_t cap)
{
    uint64_t n = nbits / 64;
    size_t found = 0;
    for (uint64_t i = 0; i < n && found < cap; i += BITMAP_BLOCK) {
        size_t block = n - i < BITMAP_BLOCK ? n - i : BITMAP_BLOCK;
        found += kernels->extract(words + i, block, 64 * i, out + found, cap - found, NULL);
    }
    if (nbits % 64) {
        uint64_t w = words[n] & low_bits(nbits % 64);
        found += scalar_extract(&w, 1, 64 * n, out + found, cap - found, NULL);
    }
    return found;
}

/* The places where the bits change come in pairs: the first bit of a run, and the bit after its last. */
size_t bitmap_runs(const uint64_t *words, uint64_t nbits, uint64_t *pairs, size_t cap)
{
    uint64_t n = nbits / 64, carry = 0;
    size_t found = 0, done = 0, room = cap > SIZE_MAX / 2 ? SIZE_MAX : 2 * cap;
    for (uint64_t i = 0; i < n && found < room; i += BITMAP_BLOCK) {
        size_t block = n - i < BITMAP_BLOCK ? n - i : BITMAP_BLOCK;
        found += kernels->extract(words + i, block, 64 * i, pairs + found, room - found, &carry);
        for (; done + 1 < found; done += 2)             /* while they are in the cache */
            pairs[done + 1] -= pairs[done];
    }
    if (nbits % 64 && found < room) {
        uint64_t w = words[n] & low_bits(nbits % 64);
        found += scalar_extract(&w, 1, 64 * n, pairs + found, room - found, &carry);
    }
    if (found % 2)                                      /* the last run goes up to the end */
        pairs[found++] = nbits;
    for (; done < found; done += 2)
        pairs[done + 1] -= pairs[done];
    return found / 2;
}
