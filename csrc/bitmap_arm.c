/* NEON kernels of the bitmap: count, or and andnot.  Everything else is the scalar code. */
#include "bitmap_kernels.h"

#include <string.h>

#if defined(__aarch64__)
#include <arm_neon.h>

static void neon_or(uint64_t *dst, const uint64_t *src, uint64_t n)
{
    uint64_t i = 0;
    for (; i + 2 <= n; i += 2)
        vst1q_u64(dst + i, vorrq_u64(vld1q_u64(dst + i), vld1q_u64(src + i)));
    if (i < n)
        dst[i] |= src[i];
}

static void neon_andnot(uint64_t *dst, const uint64_t *src, uint64_t n)
{
    uint64_t i = 0;
    for (; i + 2 <= n; i += 2)
        vst1q_u64(dst + i, vbicq_u64(vld1q_u64(dst + i), vld1q_u64(src + i)));
    if (i < n)
        dst[i] &= ~src[i];
}

static uint64_t neon_count(const uint64_t *words, uint64_t n)
{
    uint64x2_t sum = vdupq_n_u64(0);
    uint64_t i = 0;
    for (; i + 2 <= n; i += 2) {
        uint8x16_t bytes = vcntq_u8(vreinterpretq_u8_u64(vld1q_u64(words + i)));
        sum = vaddq_u64(sum, vpaddlq_u32(vpaddlq_u16(vpaddlq_u8(bytes))));
    }
    return vaddvq_u64(sum) + bitmap_scalar.count(words + i, n - i);
}

const struct bitmap_kernels *bitmap_arm(const char *name)
{
    static struct bitmap_kernels neon;
    if (strcmp(name, "neon"))
        return NULL;
    if (!neon.name) {
        neon = bitmap_scalar;
        neon.or_words = neon_or;
        neon.andnot_words = neon_andnot;
        neon.count = neon_count;
        neon.name = "neon";
    }
    return &neon;
}

#else

const struct bitmap_kernels *bitmap_arm(const char *name)
{
    (void)name;
    return NULL;
}

#endif
