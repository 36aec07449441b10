/*
 * Copying pages.  memcpy of a page never bypasses the cache, so a large linear destination is first read into it: half
 * of the bandwidth.  Streaming stores avoid that, but lose when the destination is a small buffer that is used again
 * and again.  A few lines of the next run are asked for ahead, until the hardware sees where it goes; asking for whole
 * pages would saturate the fill buffers and halve the speed.
 */
#include "copy.h"

#include <endian.h>
#include <errno.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

/* Destinations from this size on are taken for cold; measured, the two ways cross at about 13 MiB. */
#define STREAM_FROM (UINT64_C(16) << 20)
#define AHEAD 512
/* From this size on memcpy knows better (it streams by itself, and has the page-crossing loop for it). */
#define STREAM_UP_TO (UINT64_C(256) << 10)

int copy_check(const uint64_t *runs, size_t n, uint64_t npages, uint64_t *total, uint64_t *lowest, uint64_t *end)
{
    *total = *end = 0;
    *lowest = UINT64_MAX;
    for (size_t i = 0; i < n; i++) {
        uint64_t first = runs[2 * i], count = runs[2 * i + 1];
        if (!count)
            return -EINVAL;
        if (first >= npages || count > npages - first || __builtin_add_overflow(*total, count, total))
            return -ERANGE;
        if (first < *lowest)
            *lowest = first;
        if (first + count > *end)
            *end = first + count;
    }
    return 0;
}

static void copy_run(char *dst, const char *src, uint64_t size, bool stream)
{
#ifdef __SSE2__
    if (stream && size <= STREAM_UP_TO && !((uintptr_t)dst % 16) && !(size % 64)) {
        for (uint64_t i = 0; i < size; i += 64) {
            __m128i a = _mm_loadu_si128((const __m128i *)(src + i));
            __m128i b = _mm_loadu_si128((const __m128i *)(src + i + 16));
            __m128i c = _mm_loadu_si128((const __m128i *)(src + i + 32));
            __m128i d = _mm_loadu_si128((const __m128i *)(src + i + 48));
            _mm_stream_si128((__m128i *)(dst + i), a);
            _mm_stream_si128((__m128i *)(dst + i + 16), b);
            _mm_stream_si128((__m128i *)(dst + i + 32), c);
            _mm_stream_si128((__m128i *)(dst + i + 48), d);
        }
        return;
    }
#endif
    (void)stream;
    memcpy(dst, src, size);
}

/* Streamed stores are not ordered with what follows. */
static void copy_done(bool stream)
{
#ifdef __SSE2__
    if (stream)
        _mm_sfence();
#endif
    (void)stream;
}

uint64_t copy_gather(void *linear, uint64_t room, const void *base, uint64_t npages, const uint64_t *runs, size_t n,
                     uint64_t pgsize)
{
    uint64_t done = 0;
    bool stream = room >= STREAM_FROM / pgsize;
    for (size_t i = 0; i < n; i++) {
        uint64_t first = *(const volatile uint64_t *)&runs[2 * i], count = *(const volatile uint64_t *)&runs[2 * i + 1];
        if (first >= npages || count > npages - first || count > room - done)
            break;
        if (i + 1 < n && runs[2 * i + 2] < npages)
            for (unsigned at = 0; at < AHEAD; at += 64)
                __builtin_prefetch((const char *)base + runs[2 * i + 2] * pgsize + at);
        copy_run((char *)linear + done * pgsize, (const char *)base + first * pgsize, count * pgsize, stream);
        done += count;
    }
    copy_done(stream);
    return done;
}

uint64_t copy_scatter(const void *linear, uint64_t room, void *base, uint64_t npages, const uint64_t *runs, size_t n,
                      uint64_t pgsize)
{
    uint64_t done = 0;
    bool stream = room >= STREAM_FROM / pgsize;
    for (size_t i = 0; i < n; i++) {
        uint64_t first = *(const volatile uint64_t *)&runs[2 * i], count = *(const volatile uint64_t *)&runs[2 * i + 1];
        if (first >= npages || count > npages - first || count > room - done)
            break;
        copy_run((char *)base + first * pgsize, (const char *)linear + done * pgsize, count * pgsize, stream);
        done += count;
    }
    copy_done(stream);
    return done;
}

/* Zero when the first byte is and each byte equals the one before it; memcmp is as fast as any loop of ours. */
bool copy_is_zero(const void *p, size_t n)
{
    const char *bytes = p;
    return !n || (!bytes[0] && !memcmp(bytes, bytes + 1, n - 1));
}

uint64_t copy_zero_pages(uint8_t *out, const void *base, uint64_t n, uint64_t pgsize)
{
    uint64_t total = 0;
    for (uint64_t i = 0; i < n; i++)
        total += out[i] = copy_is_zero((const char *)base + i * pgsize, pgsize);
    return total;
}

/* Append pages to the last run, or begin another one; false when there is no room for it. */
static bool add_pages(uint64_t *runs, size_t *n, size_t max_runs, uint64_t page, uint64_t count)
{
    if (*n && runs[2 * *n - 2] + runs[2 * *n - 1] == page) {
        runs[2 * *n - 1] += count;
        return true;
    }
    if (*n == max_runs)
        return false;
    runs[2 * *n] = page;
    runs[2 * *n + 1] = count;
    ++*n;
    return true;
}

bool copy_next_chunk(struct copy_chunk *chunk, void *stage, const void *base, uint64_t pgsize, uint64_t most,
                     uint64_t most_zeros)
{
    chunk->nkept = chunk->nzeros = 0;
    chunk->kept_pages = chunk->zero_pages = 0;
    for (; chunk->run < chunk->n; chunk->run++, chunk->page = 0) {
        uint64_t first = chunk->runs[2 * chunk->run], count = chunk->runs[2 * chunk->run + 1];
        for (; chunk->page < count; chunk->page++) {
            uint64_t page = first + chunk->page;
            const char *from = (const char *)base + page * pgsize;
            /* The first line of a page decides most often, and no hardware guesses the next page's. */
            if (chunk->page + 2 < count)
                __builtin_prefetch(from + 2 * pgsize);
            if (chunk->kept_pages == most || chunk->kept_pages + chunk->zero_pages == most_zeros)
                return true;
            if (copy_is_zero(from, pgsize)) {
                if (!add_pages(chunk->zeros, &chunk->nzeros, chunk->max_runs, page, 1))
                    return true;
                chunk->zero_pages++;
                continue;
            }
            if (!add_pages(chunk->kept, &chunk->nkept, chunk->max_runs, page, 1))
                return true;
            if (stage)
                memcpy((char *)stage + chunk->kept_pages * pgsize, from, pgsize);
            chunk->kept_pages++;
        }
    }
    return chunk->kept_pages || chunk->zero_pages;
}

int copy_admit(uint64_t *own, const void *runs, size_t n, uint64_t npages, uint64_t most, uint64_t *total)
{
    uint64_t end = 0;
    *total = 0;
    memcpy(own, runs, n * 16);
    for (size_t i = 0; i < n; i++) {
        uint64_t first = own[2 * i] = le64toh(own[2 * i]), count = own[2 * i + 1] = le64toh(own[2 * i + 1]);
        if (!count)
            return -EINVAL;
        if (first >= npages || count > npages - first)
            return -ERANGE;
        if (first < end)
            return -EILSEQ;
        end = first + count;
        *total += count;        /* disjoint: at most npages */
    }
    return *total > most ? -E2BIG : 0;
}

static void unclaim(const uint64_t *runs, size_t run, uint64_t upto, uint16_t *brought)
{
    for (size_t i = 0; i <= run; i++)
        for (uint64_t page = runs[2 * i]; page < runs[2 * i] + runs[2 * i + 1] && (i < run || page < upto); page++)
            __atomic_store_n(&brought[page], 0, __ATOMIC_RELAXED);
}

int copy_claim(const uint64_t *runs, size_t n, uint16_t *brought, uint16_t epoch)
{
    for (size_t i = 0; i < n; i++)
        for (uint64_t page = runs[2 * i]; page < runs[2 * i] + runs[2 * i + 1]; page++)
            if (__atomic_exchange_n(&brought[page], epoch, __ATOMIC_RELAXED) == epoch) {
                unclaim(runs, i, page, brought);
                return -EEXIST;
            }
    return 0;
}

void copy_touch(const uint64_t *runs, size_t n, uint8_t *touched)
{
    for (size_t i = 0; i < n; i++)
        memset(touched + runs[2 * i], 1, runs[2 * i + 1]);
}

void copy_clear(void *base, const uint64_t *runs, size_t n, uint64_t pgsize, const uint8_t *touched)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t first = runs[2 * i], count = runs[2 * i + 1];
        if (!touched) {
            memset((char *)base + first * pgsize, 0, count * pgsize);
            continue;
        }
        for (uint64_t page = first; page < first + count; page++)
            if (touched[page])
                memset((char *)base + page * pgsize, 0, pgsize);
    }
}
