#include "tcetable.h"

#include <errno.h>
#include <stdlib.h>

#define BITS 9
#define FANOUT (1u << BITS)

union node {
    union node *child[FANOUT];
    struct tce entry[FANOUT];
};

struct tce_table {
    union node *root;
    unsigned depth;                 /* levels above the leaves */
};

static union node *new_node(unsigned depth)
{
    return depth ? calloc(FANOUT, sizeof(union node *)) : calloc(FANOUT, sizeof(struct tce));
}

tce_table *tce_table_new(uint64_t npages)
{
    tce_table *table = calloc(1, sizeof(*table));
    if (!table)
        return NULL;
    while (table->depth < 64 / BITS && (npages - 1) >> (BITS * (table->depth + 1)))
        table->depth++;
    table->root = new_node(table->depth);
    if (!table->root) {
        free(table);
        return NULL;
    }
    return table;
}

static unsigned slot(uint64_t index, unsigned depth)
{
    return index >> (BITS * depth) & (FANOUT - 1);
}

const struct tce *tce_table_find(const tce_table *table, uint64_t index)
{
    const union node *node = table->root;
    for (unsigned depth = table->depth; depth; depth--) {
        node = node->child[slot(index, depth)];
        if (!node)
            return NULL;
    }
    const struct tce *entry = &node->entry[slot(index, 0)];
    return entry->prot ? entry : NULL;
}

/* The leaf of an index, made where it is missing; NULL when out of memory. */
static union node *leaf(tce_table *table, uint64_t index)
{
    union node *node = table->root;
    for (unsigned depth = table->depth; depth; depth--) {
        union node **child = &node->child[slot(index, depth)];
        if (!*child)
            *child = new_node(depth - 1);
        node = *child;
        if (!node)
            return NULL;
    }
    return node;
}

static unsigned empty(struct tce *entry)
{
    unsigned found = entry->prot != 0;
    if (found && entry->region)
        entry->region->mapped--;
    *entry = (struct tce){0};
    return found;
}

int tce_table_fill(tce_table *table, uint64_t first, uint64_t npages, uint64_t vaddr, uint64_t page, uint32_t prot,
                   struct tce_region *region, uint64_t *done)
{
    for (*done = 0; *done < npages;) {
        union node *node = leaf(table, first + *done);
        if (!node)
            return -ENOMEM;
        for (unsigned i = slot(first + *done, 0); i < FANOUT && *done < npages; i++, ++*done) {
            empty(&node->entry[i]);
            node->entry[i] = (struct tce){vaddr + *done * page, region, prot};
            if (region)
                region->mapped++;
        }
    }
    return 0;
}

/* Clear entries first ... last of a node whose first entry is at `base`. */
static uint64_t clear(union node *node, unsigned depth, uint64_t base, uint64_t first, uint64_t last)
{
    uint64_t found = 0, span = UINT64_C(1) << (BITS * depth), from = base > first ? base : first;
    for (unsigned i = slot(from, depth); i < FANOUT && base + i * span <= last; i++) {
        if (!depth)
            found += empty(&node->entry[i]);
        else if (node->child[i])
            found += clear(node->child[i], depth - 1, base + i * span, first, last);
    }
    return found;
}

uint64_t tce_table_clear(tce_table *table, uint64_t first, uint64_t npages)
{
    return npages ? clear(table->root, table->depth, 0, first, first + npages - 1) : 0;
}

static void free_node(union node *node, unsigned depth)
{
    for (unsigned i = 0; i < FANOUT; i++) {
        if (!depth)
            empty(&node->entry[i]);
        else if (node->child[i])
            free_node(node->child[i], depth - 1);
    }
    free(node);
}

void tce_table_free(tce_table *table)
{
    if (!table)
        return;
    free_node(table->root, table->depth);
    free(table);
}
