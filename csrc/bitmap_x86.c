/*
 * AVX2 and AVX-512 (VBMI2, VPOPCNTDQ) kernels of the bitmap.  Functions are compiled for their CPU one by one, so that
 * the rest of the library runs on any x86-64.
 *
 * Taking out indices has two phases, both without a branch on the data: a block's non-zero words are pressed together
 * into the first-level cache, and then each word's bit numbers.  Most words of a sparse bitmap never reach the second
 * phase, and those that do mostly have at most eight bits, which is one store.
 */
#include "bitmap_kernels.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,bmi,bmi2,lzcnt,popcnt")))
#define AVX512 __attribute__((target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vpopcntdq,avx2,bmi,bmi2,lzcnt,popcnt")))

/* ---- AVX2 ---- */

AVX2 static inline __m256i load256(const uint64_t *p)
{
    return _mm256_loadu_si256((const __m256i *)p);
}

AVX2 static inline void store256(uint64_t *p, __m256i v)
{
    _mm256_storeu_si256((__m256i *)p, v);
}

/* Set bits of each u64, by a table of nibbles. */
AVX2 static inline __m256i ones256(__m256i v)
{
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,
                                           0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i low = _mm256_set1_epi8(15);
    __m256i a = _mm256_shuffle_epi8(table, _mm256_and_si256(v, low));
    __m256i b = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low));
    return _mm256_sad_epu8(_mm256_add_epi8(a, b), _mm256_setzero_si256());
}

AVX2 static inline uint64_t sum256(__m256i v)
{
    __m128i half = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return (uint64_t)_mm_extract_epi64(half, 0) + (uint64_t)_mm_extract_epi64(half, 1);
}

AVX2 static void avx2_or(uint64_t *dst, const uint64_t *src, uint64_t n)
{
    uint64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256i a = _mm256_or_si256(load256(dst + i), load256(src + i));
        __m256i b = _mm256_or_si256(load256(dst + i + 4), load256(src + i + 4));
        store256(dst + i, a);
        store256(dst + i + 4, b);
    }
    for (; i < n; i++)
        dst[i] |= src[i];
}

AVX2 static void avx2_andnot(uint64_t *dst, const uint64_t *src, uint64_t n)
{
    uint64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256i a = _mm256_andnot_si256(load256(src + i), load256(dst + i));
        __m256i b = _mm256_andnot_si256(load256(src + i + 4), load256(dst + i + 4));
        store256(dst + i, a);
        store256(dst + i + 4, b);
    }
    for (; i < n; i++)
        dst[i] &= ~src[i];
}

AVX2 static uint64_t avx2_count(const uint64_t *words, uint64_t n)
{
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    uint64_t i = 0, total = 0;
    for (; i + 16 <= n; i += 16) {
        a = _mm256_add_epi64(a, ones256(load256(words + i)));
        b = _mm256_add_epi64(b, ones256(load256(words + i + 4)));
        c = _mm256_add_epi64(c, ones256(load256(words + i + 8)));
        d = _mm256_add_epi64(d, ones256(load256(words + i + 12)));
    }
    for (; i < n; i++)
        total += (uint64_t)_mm_popcnt_u64(words[i]);
    return total + sum256(_mm256_add_epi64(_mm256_add_epi64(a, b), _mm256_add_epi64(c, d)));
}

AVX2 static uint64_t avx2_count_starts(const uint64_t *words, uint64_t n, uint64_t *carry)
{
    uint64_t total = 0, before = *carry;
    for (uint64_t i = 0; i < n; i++) {
        total += (uint64_t)_mm_popcnt_u64(words[i] & ~(words[i] << 1 | before));
        before = words[i] >> 63;
    }
    *carry = before;
    return total;
}

AVX2 static uint64_t avx2_harvest(uint64_t *dst, unsigned shift, uint64_t *src, uint64_t n)
{
    const __m128i left = _mm_cvtsi32_si128((int)shift), right = _mm_cvtsi32_si128(64 - (int)shift);
    const __m256i zero = _mm256_setzero_si256();
    __m256i before = zero, total = zero;
    uint64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        __m256i v = load256(src + i);
        /* A clean stretch costs one load and no store; `before` still has the bits that spill over into it. */
        if (_mm256_testz_si256(_mm256_or_si256(v, before), _mm256_or_si256(v, before)))
            continue;
        /* The word below each word: the last one of `before`, then v's. */
        __m256i below = _mm256_alignr_epi8(v, _mm256_permute2x128_si256(before, v, 0x21), 8);
        __m256i moved = _mm256_or_si256(_mm256_sll_epi64(v, left), _mm256_srl_epi64(below, right));
        store256(dst + i, _mm256_or_si256(load256(dst + i), moved));
        store256(src + i, zero);
        total = _mm256_add_epi64(total, ones256(v));
        before = v;
    }
    uint64_t last = (uint64_t)_mm256_extract_epi64(before, 3), sum = sum256(total);
    if (shift && last >> (64 - shift))
        dst[i] |= last >> (64 - shift);
    return i < n ? sum + bitmap_scalar.harvest(dst + i, shift, src + i, n - i) : sum;
}

AVX2 static uint64_t avx2_harvest_lines(uint64_t *dst, unsigned shift, uint64_t *src, const uint64_t *lines, size_t n)
{
    uint64_t total = 0;
    for (size_t i = 0; i < n; i++)
        total += avx2_harvest(dst + 8 * lines[i], shift, src + 8 * lines[i], 8);
    return total;
}

/* Scalar, but with the instructions that baseline x86-64 lacks, and a skip over clean stretches. */
AVX2 static size_t avx2_extract(const uint64_t *words, size_t n, uint64_t base, uint64_t *out, size_t room,
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
        if (!w) {
            for (; !before && i + 5 <= n; i += 4) {
                __m256i v = load256(words + i + 1);
                if (!_mm256_testz_si256(v, v))
                    break;
            }
            continue;
        }
        uint64_t at = base + 64 * i;
        unsigned count = (unsigned)_mm_popcnt_u64(w);
        if (room - found < 64) {
            for (; w && found < room; w &= w - 1)
                out[found++] = at + _tzcnt_u64(w);
            continue;
        }
        /* Four at a time, whether or not there are four: what is too much is written over. */
        for (uint64_t *to = out + found; w; to += 4)
            for (unsigned k = 0; k < 4; k++, w &= w - 1)
                to[k] = at + _tzcnt_u64(w);
        found += count;
    }
    if (carry)
        *carry = before;
    return found;
}

static const uint64_t group_bits[7] = {
    ~UINT64_C(0), 0x5555555555555555, 0x1111111111111111, 0x0101010101010101, 0x0001000100010001, 0x0000000100000001, 1,
};

AVX2 static void avx2_compact(uint64_t *dst, const uint64_t *src, uint64_t n, unsigned shift)
{
    unsigned parts = 1u << shift, width = 64u >> shift;
    uint64_t groups = group_bits[shift];
    for (uint64_t i = 0; i < n; i++) {
        uint64_t out = 0;
        for (unsigned part = 0; part < parts; part++) {
            uint64_t w = src[i * parts + part];
            for (unsigned step = 1; step < parts; step *= 2)
                w |= w >> step;
            out |= _pext_u64(w, groups) << part * width % 64;
        }
        dst[i] = out;
    }
}

AVX2 static void avx2_expand(uint64_t *dst, const uint64_t *src, uint64_t n, unsigned shift)
{
    unsigned parts = 1u << shift, width = 64u >> shift;
    uint64_t groups = group_bits[shift];
    for (uint64_t i = 0; i < n; i++) {
        uint64_t bits = src[i];
        for (unsigned part = 0; part < parts; part++) {
            uint64_t low = _pdep_u64(bits, groups);
            /* Each group's lowest bit, times all ones of the group's width. */
            dst[i * parts + part] = shift == 6 ? -low : (low << parts) - low;
            bits >>= width;
        }
    }
}

static const struct bitmap_kernels avx2 = {
    "avx2", avx2_or, avx2_andnot, avx2_count, avx2_count_starts, avx2_harvest, avx2_harvest_lines, avx2_extract,
    avx2_compact, avx2_expand,
};

/* ---- AVX-512 ---- */

AVX512 static uint64_t avx512_count(const uint64_t *words, uint64_t n)
{
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    uint64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        a = _mm512_add_epi64(a, _mm512_popcnt_epi64(_mm512_loadu_si512(words + i)));
        b = _mm512_add_epi64(b, _mm512_popcnt_epi64(_mm512_loadu_si512(words + i + 8)));
        c = _mm512_add_epi64(c, _mm512_popcnt_epi64(_mm512_loadu_si512(words + i + 16)));
        d = _mm512_add_epi64(d, _mm512_popcnt_epi64(_mm512_loadu_si512(words + i + 24)));
    }
    for (; i < n; i += 8) {
        __mmask8 rest = n - i < 8 ? (__mmask8)((1u << (n - i)) - 1) : 0xff;
        a = _mm512_add_epi64(a, _mm512_popcnt_epi64(_mm512_maskz_loadu_epi64(rest, words + i)));
    }
    a = _mm512_add_epi64(_mm512_add_epi64(a, b), _mm512_add_epi64(c, d));
    return (uint64_t)_mm512_reduce_add_epi64(a);
}

/* Bit k of the result is bit k - 1 of v; `before` is the vector of words before v. */
AVX512 static inline __m512i one_up(__m512i v, __m512i before)
{
    return _mm512_shldi_epi64(v, _mm512_alignr_epi64(v, before, 7), 1);
}

/* A vector whose last word has the carry as its last bit. */
AVX512 static inline __m512i carry_vector(uint64_t carry)
{
    return _mm512_maskz_set1_epi64(0x80, (long long)(carry << 63));
}

AVX512 static uint64_t avx512_count_starts(const uint64_t *words, uint64_t n, uint64_t *carry)
{
    __m512i before = carry_vector(*carry), total = _mm512_setzero_si512();
    for (uint64_t i = 0; i < n; i += 8) {
        __mmask8 rest = n - i < 8 ? (__mmask8)((1u << (n - i)) - 1) : 0xff;
        __m512i v = _mm512_maskz_loadu_epi64(rest, words + i);
        total = _mm512_add_epi64(total, _mm512_popcnt_epi64(_mm512_andnot_si512(one_up(v, before), v)));
        before = v;
    }
    if (n)
        *carry = words[n - 1] >> 63;
    return (uint64_t)_mm512_reduce_add_epi64(total);
}

/* dst |= v << shift but for what spills over after the last word; `before` is the vector of words before v. */
AVX512 static inline void or_shifted(uint64_t *dst, __m512i v, __m512i before, __m512i shift)
{
    __m512i moved = _mm512_shldv_epi64(v, _mm512_alignr_epi64(v, before, 7), shift);
    _mm512_storeu_si512(dst, _mm512_or_si512(moved, _mm512_loadu_si512(dst)));
}

AVX512 static uint64_t avx512_harvest(uint64_t *dst, unsigned shift, uint64_t *src, uint64_t n)
{
    const __m512i by = _mm512_set1_epi64(shift), zero = _mm512_setzero_si512();
    __m512i before = zero, total = zero;
    uint64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m512i v = _mm512_loadu_si512(src + i), either = _mm512_or_si512(v, before);
        /* A clean stretch costs one load and no store; `before` still has the bits that spill over into it. */
        if (!_mm512_test_epi64_mask(either, either))
            continue;
        or_shifted(dst + i, v, before, by);
        _mm512_storeu_si512(src + i, zero);
        total = _mm512_add_epi64(total, _mm512_popcnt_epi64(v));
        before = v;
    }
    uint64_t last = (uint64_t)_mm_extract_epi64(_mm512_extracti64x2_epi64(before, 3), 1);
    uint64_t sum = (uint64_t)_mm512_reduce_add_epi64(total);
    if (shift && last >> (64 - shift))
        dst[i] |= last >> (64 - shift);
    return i < n ? sum + bitmap_scalar.harvest(dst + i, shift, src + i, n - i) : sum;
}

AVX512 static uint64_t avx512_harvest_lines(uint64_t *dst, unsigned shift, uint64_t *src, const uint64_t *lines,
                                            size_t n)
{
    const __m512i by = _mm512_set1_epi64(shift), zero = _mm512_setzero_si512();
    __m512i total = zero;
    for (size_t i = 0; i < n; i++) {
        uint64_t *from = src + 8 * lines[i], *to = dst + 8 * lines[i], last = from[7];
        __m512i v = _mm512_loadu_si512(from);
        or_shifted(to, v, zero, by);
        _mm512_storeu_si512(from, zero);
        total = _mm512_add_epi64(total, _mm512_popcnt_epi64(v));
        if (shift && last >> (64 - shift))
            to[8] |= last >> (64 - shift);
    }
    return (uint64_t)_mm512_reduce_add_epi64(total);
}

/* The numbers of the set bits of w, from `base` on; at most room of them. */
AVX512 static inline size_t take_word(uint64_t w, uint64_t base, uint64_t *out, size_t room)
{
    const __m512i numbers = _mm512_set_epi8(
        63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46, 45, 44, 43, 42, 41, 40, 39, 38, 37, 36,
        35, 34, 33, 32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7,
        6, 5, 4, 3, 2, 1, 0);
    size_t count = (size_t)_mm_popcnt_u64(w);
    __m512i bits = _mm512_maskz_compress_epi8(w, numbers), from = _mm512_set1_epi64((long long)base);
    __m128i low = _mm512_castsi512_si128(bits);
    if (__builtin_expect(room >= 64, 1)) {
        /* Eight at a time, whether or not there are eight: what is too much is written over. */
        _mm512_storeu_si512(out, _mm512_add_epi64(from, _mm512_cvtepu8_epi64(low)));
        if (count > 8) {
            uint8_t rest[64];
            _mm512_storeu_si512(rest, bits);
            for (size_t i = 8; i < count; i += 8) {
                __m128i eight = _mm_loadl_epi64((const __m128i *)(rest + i));
                _mm512_storeu_si512(out + i, _mm512_add_epi64(from, _mm512_cvtepu8_epi64(eight)));
            }
        }
        return count;
    }
    uint8_t all[64];
    _mm512_storeu_si512(all, bits);
    if (count > room)
        count = room;
    for (size_t i = 0; i < count; i++)
        out[i] = base + all[i];
    return count;
}

AVX512 static size_t avx512_extract(const uint64_t *words, size_t n, uint64_t base, uint64_t *out, size_t room,
                                    uint64_t *carry)
{
    uint64_t dirty[BITMAP_BLOCK + 8], bases[BITMAP_BLOCK + 8];
    __m512i before = carry_vector(carry ? *carry : 0);
    __m512i at = _mm512_add_epi64(_mm512_set1_epi64((long long)base),
                                  _mm512_set_epi64(448, 384, 320, 256, 192, 128, 64, 0));
    const __m512i stride = _mm512_set1_epi64(512);
    size_t ndirty = 0, found = 0;
    for (size_t i = 0; i < n; i += 8, at = _mm512_add_epi64(at, stride)) {
        __mmask8 rest = n - i < 8 ? (__mmask8)((1u << (n - i)) - 1) : 0xff;
        __m512i v = _mm512_maskz_loadu_epi64(rest, words + i);
        if (carry) {
            __m512i changes = _mm512_xor_si512(v, one_up(v, before));
            before = v;
            v = changes;
        }
        __mmask8 some = _mm512_mask_test_epi64_mask(rest, v, v);
        if (!some)
            continue;
        _mm512_storeu_si512(dirty + ndirty, _mm512_maskz_compress_epi64(some, v));
        _mm512_storeu_si512(bases + ndirty, _mm512_maskz_compress_epi64(some, at));
        ndirty += (size_t)_mm_popcnt_u32(some);
    }
    if (carry && n)
        *carry = words[n - 1] >> 63;
    for (size_t i = 0; i < ndirty && found < room; i++)
        found += take_word(dirty[i], bases[i], out + found, room - found);
    return found;
}

/* Groups of 8 to 64 bits are lanes of a vector, and testing lanes is what AVX-512 does. */
AVX512 static void avx512_compact(uint64_t *dst, const uint64_t *src, uint64_t n, unsigned shift)
{
    if (shift < 3) {
        avx2_compact(dst, src, n, shift);
        return;
    }
    /* A word of dst: how many loads, and the bits of each. */
    unsigned vectors = 1u << (shift - 3), width = 64u >> (shift - 3);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t out = 0;
        for (unsigned k = 0; k < vectors; k++, src += 8) {
            __m512i v = _mm512_loadu_si512(src);
            uint64_t bits = shift == 3 ? _mm512_test_epi8_mask(v, v) : shift == 4 ? _mm512_test_epi16_mask(v, v) :
                            shift == 5 ? _mm512_test_epi32_mask(v, v) : _mm512_test_epi64_mask(v, v);
            out |= bits << k * width % 64;
        }
        dst[i] = out;
    }
}

AVX512 static void avx512_expand(uint64_t *dst, const uint64_t *src, uint64_t n, unsigned shift)
{
    if (shift < 3) {
        avx2_expand(dst, src, n, shift);
        return;
    }
    unsigned vectors = 1u << (shift - 3), width = 64u >> (shift - 3);
    for (uint64_t i = 0; i < n; i++) {
        for (unsigned k = 0; k < vectors; k++, dst += 8) {
            uint64_t bits = src[i] >> k * width % 64;
            __m512i v = shift == 3 ? _mm512_movm_epi8(bits) : shift == 4 ? _mm512_movm_epi16((__mmask32)bits) :
                        shift == 5 ? _mm512_movm_epi32((__mmask16)bits) : _mm512_movm_epi64((__mmask8)bits);
            _mm512_storeu_si512(dst, v);
        }
    }
}

/* Or and andnot wait for memory: wider registers gain nothing. */
static const struct bitmap_kernels avx512 = {
    "avx512", avx2_or, avx2_andnot, avx512_count, avx512_count_starts, avx512_harvest,
    avx512_harvest_lines, avx512_extract, avx512_compact, avx512_expand,
};

/* __builtin_cpu_supports also asks the operating system whether it saves the registers. */
const struct bitmap_kernels *bitmap_x86(const char *name)
{
    __builtin_cpu_init();
    bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("popcnt");
    if (!strcmp(name, "avx2"))
        return has_avx2 ? &avx2 : NULL;
    if (!strcmp(name, "avx512"))
        return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
               __builtin_cpu_supports("avx512vpopcntdq") ? &avx512 : NULL;
    return NULL;
}

#else

const struct bitmap_kernels *bitmap_x86(const char *name)
{
    (void)name;
    return NULL;
}

#endif
