/* Records stay apart, keep their vaddrs, and are used again; a restore takes exactly the mappings.  Argument: the seed. */
#include "dmapool.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 20000, PAGE = 4096 };

static uint64_t random_state;

static uint64_t rnd(void)       /* splitmix64 */
{
    uint64_t z = random_state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static dma_t *record[N];

static void set(size_t i)
{
    for (unsigned column = 0; column < 2; column++)
        *dmapool_vaddr(record[i], column) = i * 2 + column;
    record[i]->iova = record[i]->size = record[i]->bitmap_words = i;
}

static void take_and_give(void)
{
    dmapool *pool = dmapool_new();
    for (unsigned round = 0; round < 4; round++) {
        for (size_t i = 0; i < N; i++)
            if (!record[i]) {
                record[i] = dmapool_take(pool);
                assert(!((uintptr_t)record[i] % DMAPOOL_RECORD));
                assert(!record[i]->iova && !record[i]->next && !record[i]->pages && !record[i]->bitmap_words);
                set(i);
            }
        for (size_t i = 0; i < N; i++) {
            assert(record[i]->iova == i && record[i]->size == i && record[i]->bitmap_words == i);
            assert(*dmapool_vaddr(record[i], 0) == i * 2 && *dmapool_vaddr(record[i], 1) == i * 2 + 1);
        }
        for (size_t i = 0; i < N; i++)
            if (rnd() % 3 <= round) {
                dmapool_give(pool, record[i]);
                record[i] = NULL;
            }
    }
    dmapool_free(pool);
    dmapool_free(NULL);
}

/* Mappings of one or two pages with holes, in rows; every third row begins where the one before it ends. */
static void fill(uint64_t rows[][3], size_t n)
{
    uint64_t iova = 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t size = PAGE << rnd() % 2;
        memcpy(rows[i], (uint64_t[]){iova, (rnd() & 0xffffffff) * PAGE, size}, sizeof(rows[i]));
        iova += size + (i % 3 ? rnd() % 4 * PAGE : 0);
    }
}

static void restore(size_t n)
{
    static uint64_t rows[N][3], wrong[N + 1][3];
    dmapool *pool = dmapool_new();
    rangemap *map = rangemap_new();
    size_t *order = calloc(n + 1, sizeof(*order));

    fill(rows, n);
    for (size_t i = 0; i < n; i++)
        order[i] = i;
    for (size_t i = n; i > 1; i--) {
        size_t j = rnd() % i, other = order[j];
        order[j] = order[i - 1];
        order[i - 1] = other;
    }
    for (size_t k = 0; k < n; k++) {
        size_t i = order[k];
        record[i] = dmapool_take(pool);
        *dmapool_vaddr(record[i], 0) = i;
        assert(!rangemap_insert(map, rows[i][0], rows[i][0] + rows[i][2] - 1, (uint64_t)(uintptr_t)record[i]));
    }
    assert(dmapool_restore(map, rows[0], n, PAGE, 1));
    for (size_t i = 0; i < n; i++)
        assert(*dmapool_vaddr(record[i], 0) == i && *dmapool_vaddr(record[i], 1) == rows[i][1]);

    /* Whatever is wrong with one row, wherever it is, it is not taken; the other column stays as it was. */
    static const struct { int column; uint64_t flip; } faults[] = {
        {0, PAGE}, {0, 1}, {0, 1ULL << 63}, {1, 1}, {1, 0x800}, {2, 3 * PAGE}, {2, 1}, {2, 1ULL << 40},
    };
    for (unsigned fault = 0; n && fault < sizeof(faults) / sizeof(*faults); fault++) {
        memcpy(wrong, rows, n * sizeof(rows[0]));
        wrong[rnd() % n][faults[fault].column] ^= faults[fault].flip;
        assert(!dmapool_restore(map, wrong[0], n, PAGE, 0));
    }
    memcpy(wrong, rows, n * sizeof(rows[0]));
    if (n) {
        wrong[rnd() % n][1] = 0 - (uint64_t)PAGE;       /* the last page, where two do not fit: taken if it is one */
        bool fits = true;
        for (size_t i = 0; i < n; i++)
            fits &= wrong[i][1] != 0 - (uint64_t)PAGE || wrong[i][2] == PAGE;
        assert(dmapool_restore(map, wrong[0], n, PAGE, 0) == fits);
        assert(!dmapool_restore(map, rows[0], n - 1, PAGE, 0));
        assert(!dmapool_restore(map, rows[0], n, 4 * PAGE, 0));
    }
    memcpy(wrong, rows, n * sizeof(rows[0]));
    memcpy(wrong[n], (uint64_t[]){1ULL << 60, 0, PAGE}, sizeof(wrong[n]));
    assert(!dmapool_restore(map, wrong[0], n + 1, PAGE, 0));
    for (size_t i = 0; i < n; i++)
        assert(*dmapool_vaddr(record[i], 1) == rows[i][1]);
    free(order);
    rangemap_free(map);
    dmapool_free(pool);
}

int main(int argc, char **argv)
{
    random_state = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    take_and_give();
    for (size_t n = 0; n < 100; n++)
        restore(n);
    restore(5000);
    puts("ok");
    return 0;
}
