#include "pagehash.h"

#include <endian.h>
#include <string.h>

static inline uint64_t load(const unsigned char *p)
{
    uint64_t value;
    memcpy(&value, p, 8);
    return le64toh(value);      /* hashes are kept in files: the same on every machine */
}

/* Both halves of the product of 64 x 64 bits, folded: the mixing step of multiply-based hashes. */
static inline uint64_t fold(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

uint64_t pagehash(const pagehash_key *key, const void *page, size_t size)
{
    const unsigned char *p = page, *end = p + size;
    /* Four lanes that do not wait for one another; each step multiplies two words of the page with the lane's past. */
    uint64_t lane[4] = {key->word[0], key->word[1], key->word[2], key->word[3]};
    for (; p < end; p += 64)
        for (int i = 0; i < 4; i++)
            lane[i] = fold(load(p + 16 * i) ^ key->word[4 + i], load(p + 16 * i + 8) ^ lane[i]) ^ lane[i];
    return fold(fold(lane[0] ^ key->word[4], lane[1] ^ key->word[5]) ^ size,
                fold(lane[2] ^ key->word[6], lane[3] ^ key->word[7]) ^ key->word[0]);
}

uint64_t pagehash_differ(const pagehash_key *key, const void *memory, uint64_t npages, size_t pgsize,
                         const uint64_t *hashes, uint64_t *words)
{
    uint64_t found = 0;
    for (uint64_t i = 0; i < npages; i++)
        if (!hashes[i] || pagehash(key, (const char *)memory + i * pgsize, pgsize) != hashes[i]) {
            words[i / 64] |= UINT64_C(1) << (i % 64);
            found++;
        }
    return found;
}

void pagehash_note(const pagehash_key *key, const uint64_t *runs, size_t nruns, const void *content, size_t pgsize,
                   uint64_t *hashes)
{
    const char *at = content;
    for (size_t i = 0; i < nruns; i++)
        for (uint64_t page = runs[2 * i], end = page + runs[2 * i + 1]; page < end; page++, at += pgsize)
            hashes[page] = pagehash(key, at, pgsize);
}
