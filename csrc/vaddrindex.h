/*
 * From a virtual address to the mappings that cover it.  Memory may be mapped at many IOVAs: ranges overlap.
 *
 * Insert and remove take O(log n) in the worst case, a look-up of k mappings O((k + 1) log n), mostly O(k + log n).
 * `last` is inclusive.  Each index has its own mutex.  Functions return 0 or -errno unless they say otherwise.
 */
#ifndef VFIODMA_VADDRINDEX_H
#define VFIODMA_VADDRINDEX_H
#include <stddef.h>
#include <stdint.h>

typedef struct vaddrindex vaddrindex;

typedef struct {
    uint64_t vaddr, last, iova;
} vaddrindex_entry;

vaddrindex *vaddrindex_new(void);       /* NULL when out of memory */
void vaddrindex_free(vaddrindex *index);

/* Note that [vaddr, last] is mapped at iova.  -EINVAL if last < vaddr, -EEXIST if (vaddr, iova) is there, -ENOMEM. */
int vaddrindex_insert(vaddrindex *index, uint64_t vaddr, uint64_t last, uint64_t iova);

/* Forget the mapping of exactly `vaddr` at exactly `iova`.  -ENOENT if there is none. */
int vaddrindex_remove(vaddrindex *index, uint64_t vaddr, uint64_t iova);

/*
 * Store up to cap mappings that cover address, ascending by (vaddr, iova), and return how many there are: maybe more.
 * The address itself is at iova + address - vaddr of each.
 */
size_t vaddrindex_find(vaddrindex *index, uint64_t address, vaddrindex_entry *out, size_t cap);

size_t vaddrindex_count(vaddrindex *index);
void vaddrindex_clear(vaddrindex *index);

/* For tests: 0, or the number of the first broken invariant. */
int vaddrindex_check(vaddrindex *index);
#endif
