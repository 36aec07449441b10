/* The translation control entries (TCE) of one DMA window, as a tree of levels: memory is taken for what was written.
 *
 * An entry leads one IOMMU page to process memory.  No locks: the owner has one.
 */
#ifndef VFIODMA_TCETABLE_H
#define VFIODMA_TCETABLE_H
#include <stdint.h>

/* Memory that entries lead to; `mapped` counts them. */
struct tce_region {
    uint64_t vaddr, size, mapped;
    struct pin *memory;
};

struct tce {
    uint64_t vaddr;
    struct tce_region *region;      /* NULL: the page was pinned by itself */
    uint32_t prot;                  /* 0: empty */
};

typedef struct tce_table tce_table;

/* An empty table; NULL when out of memory. */
tce_table *tce_table_new(uint64_t npages);

/* Clear every entry and free the table. */
void tce_table_free(tce_table *);

/* The entry, NULL where it is empty. */
const struct tce *tce_table_find(const tce_table *, uint64_t index);

/* Lead entries [first, first + npages) to vaddr, vaddr + page, ...; what was there is replaced.  The range is inside.
 * 0, or -ENOMEM: then *done of them are written. */
int tce_table_fill(tce_table *, uint64_t first, uint64_t npages, uint64_t vaddr, uint64_t page, uint32_t prot,
                   struct tce_region *region, uint64_t *done);

/* Clear entries; how many were not empty. */
uint64_t tce_table_clear(tce_table *, uint64_t first, uint64_t npages);
#endif
