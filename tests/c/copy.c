/* Gather and scatter against a copy page by page, small and large enough for streamed stores.  Argument: seed. */
#include "copy.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(what) ((what) ? (void)passed++ : (void)(failed++, printf("%s:%d: %s\n", __FILE__, __LINE__, #what)))

static unsigned passed, failed;

static void test_round_trip(uint64_t pgsize, uint64_t npages, size_t skew)
{
    size_t n = 0;
    uint64_t *runs = malloc(npages * 16), total, lowest, end, at = 0;
    char *memory = malloc(npages * pgsize), *back = calloc(npages, pgsize);
    char *linear = malloc(npages * pgsize + skew + 1);
    for (uint64_t i = 0; i < npages * pgsize; i++)
        memory[i] = (char)rand();
    /* Downwards, so that the order of the runs is seen to be kept. */
    for (uint64_t page = npages; page;) {
        uint64_t count = 1 + (uint64_t)rand() % 3;
        if (count > page)
            count = page;
        page -= count;
        if (rand() % 4) {
            runs[2 * n] = page;
            runs[2 * n++ + 1] = count;
        }
    }
    CHECK(copy_check(runs, n, npages, &total, &lowest, &end) == 0);
    linear[skew + total * pgsize] = 77;
    CHECK(copy_gather(linear + skew, total, memory, npages, runs, n, pgsize) == total);
    CHECK(linear[skew + total * pgsize] == 77);
    CHECK(copy_scatter(linear + skew, total, back, npages, runs, n, pgsize) == total);
    bool same = true;
    for (size_t i = 0; i < n; i++) {
        same = same && !memcmp(linear + skew + at, memory + runs[2 * i] * pgsize, runs[2 * i + 1] * pgsize);
        same = same && !memcmp(back + runs[2 * i] * pgsize, memory + runs[2 * i] * pgsize, runs[2 * i + 1] * pgsize);
        at += runs[2 * i + 1] * pgsize;
    }
    CHECK(same);
    if (n) {
        CHECK(copy_gather(linear + skew, total - 1, memory, npages, runs, n, pgsize) < total);
        CHECK(copy_gather(linear + skew, total, memory, runs[0] + runs[1] - 1, runs, n, pgsize) < total);
    }
    free(runs);
    free(memory);
    free(linear);
    free(back);
}

static void test_checks(void)
{
    uint64_t total, lowest, end;
    uint64_t good[] = {3, 2, 0, 1}, empty[] = {3, 0}, outside[] = {9, 2}, far[] = {UINT64_MAX, 1};
    uint64_t wraps[] = {1, UINT64_MAX};
    uint64_t many[] = {0, UINT64_MAX, 0, UINT64_MAX};
    CHECK(copy_check(good, 2, 5, &total, &lowest, &end) == 0 && total == 3 && lowest == 0 && end == 5);
    CHECK(copy_check(good, 2, 4, &total, &lowest, &end) == -ERANGE);
    CHECK(copy_check(empty, 1, 10, &total, &lowest, &end) == -EINVAL);
    CHECK(copy_check(outside, 1, 10, &total, &lowest, &end) == -ERANGE);
    CHECK(copy_check(far, 1, 10, &total, &lowest, &end) == -ERANGE);
    CHECK(copy_check(wraps, 1, 10, &total, &lowest, &end) == -ERANGE);
    CHECK(copy_check(many, 2, UINT64_MAX, &total, &lowest, &end) == -ERANGE);
    CHECK(copy_check(NULL, 0, 0, &total, &lowest, &end) == 0 && total == 0);
}

static void test_zero(void)
{
    static char pages[8 * 4096];
    uint8_t flags[8];
    CHECK(copy_is_zero(pages, 0) && copy_is_zero(pages, 1) && copy_is_zero(pages, sizeof(pages)));
    for (size_t at = 0; at < 4096; at += 1 + (size_t)rand() % 40) {
        pages[at] = (char)(1 << rand() % 8);
        CHECK(!copy_is_zero(pages, 4096));
        CHECK(copy_is_zero(pages, at));
        pages[at] = 0;
    }
    pages[4095] = pages[3 * 4096] = pages[7 * 4096 + 17] = 1;
    CHECK(copy_zero_pages(flags, pages, 8, 4096) == 5);
    CHECK(!memcmp(flags, "\0\1\1\0\1\1\1\0", 8));
}

static void test_chunks(void)
{
    enum { PAGES = 300, SIZE = 512 };
    char *memory = calloc(PAGES, SIZE), stage[7 * SIZE];
    uint64_t all[2] = {0, PAGES}, kept[8], zeros[8], seen = 0;
    bool right = true;
    for (int i = 0; i < PAGES; i++)
        memory[i * SIZE + rand() % SIZE] = (char)(rand() % 3);
    struct copy_chunk chunk = {.runs = all, .n = 1, .kept = kept, .zeros = zeros, .max_runs = 4};
    while (copy_next_chunk(&chunk, stage, memory, SIZE, 7, 20)) {
        uint64_t at = 0;
        for (size_t i = 0; i < chunk.nkept; i++)
            for (uint64_t page = kept[2 * i]; page < kept[2 * i] + kept[2 * i + 1]; page++)
                right = right && !memcmp(stage + at++ * SIZE, memory + page * SIZE, SIZE);
        for (size_t i = 0; i < chunk.nzeros; i++)
            for (uint64_t page = zeros[2 * i]; page < zeros[2 * i] + zeros[2 * i + 1]; page++)
                right = right && copy_is_zero(memory + page * SIZE, SIZE);
        right = right && at == chunk.kept_pages;
        seen += chunk.kept_pages + chunk.zero_pages;
    }
    CHECK(right);
    CHECK(seen == PAGES);
    free(memory);
}

static void test_admit(void)
{
    uint16_t brought[10] = {0};
    uint8_t touched[10] = {0};
    uint64_t own[4], total, good[] = {1, 2, 5, 5}, outside[] = {9, 2}, wrap[] = {1, UINT64_MAX}, back[] = {5, 1, 2, 1};
    uint64_t other[] = {0, 1, 3, 3};
    char memory[10 * 64];
    CHECK(copy_admit(own, good, 2, 10, 6, &total) == -E2BIG);
    CHECK(copy_admit(own, outside, 1, 10, 10, &total) == -ERANGE);
    CHECK(copy_admit(own, wrap, 1, 10, 10, &total) == -ERANGE);
    CHECK(copy_admit(own, back, 2, 10, 10, &total) == -EILSEQ);
    CHECK(copy_admit(own, good, 2, 10, 7, &total) == 0 && total == 7);
    CHECK(copy_claim(own, 2, brought, 1) == 0);
    CHECK(copy_claim(own, 2, brought, 1) == -EEXIST && brought[1] == 1 && brought[9] == 1);
    CHECK(copy_claim(other, 2, brought, 1) == -EEXIST && !brought[0] && !brought[3] && brought[5] == 1);
    CHECK(copy_claim(own, 2, brought, 2) == 0);
    copy_touch(own, 2, touched);
    memset(memory, 1, sizeof memory);
    uint64_t everything[] = {0, 10};
    copy_clear(memory, everything, 1, 64, touched);
    CHECK(memory[0] == 1 && memory[64] == 0 && memory[3 * 64 - 1] == 0 && memory[3 * 64] == 1 && memory[639] == 0);
    copy_clear(memory, everything, 1, 64, NULL);
    CHECK(copy_is_zero(memory, sizeof memory));
}

enum { CLAIMS = 1 << 16, CLAIMERS = 4 };
static uint16_t shared[CLAIMS];

static void *claim_some(void *won)
{
    for (uint64_t at = 0; at < CLAIMS; at += 8) {
        uint64_t run[] = {at, 8};
        *(unsigned *)won += !copy_claim(run, 1, shared, 7);
    }
    return NULL;
}

static void test_claims_of_several_threads(void)
{
    pthread_t threads[CLAIMERS];
    unsigned won[CLAIMERS] = {0}, total = 0;
    for (int i = 0; i < CLAIMERS; i++)
        pthread_create(&threads[i], NULL, claim_some, &won[i]);
    for (int i = 0; i < CLAIMERS; i++) {
        pthread_join(threads[i], NULL);
        total += won[i];
    }
    /* Two that want the same pages may both fail, as the epoch then does; they never both succeed. */
    CHECK(total <= CLAIMS / 8);
}

int main(int argc, char **argv)
{
    srand(argc > 1 ? (unsigned)strtoul(argv[1], NULL, 0) : 20240229);
    test_round_trip(4096, 100, 0);
    test_round_trip(4096, 100, 5);
    test_round_trip(64, 1000, 16);
    test_round_trip(4096, 8000, 0);
    test_round_trip(4096, 8000, 1);
    test_checks();
    test_zero();
    test_chunks();
    test_admit();
    test_claims_of_several_threads();
    printf("%u passed, %u failed\n", passed, failed);
    return failed != 0;
}
