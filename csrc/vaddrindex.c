/* An AVL tree by (vaddr, iova); each node knows the highest `last` below it, so look-ups skip what ends early. */
#include "vaddrindex.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

typedef struct node node;

struct node {
    vaddrindex_entry entry;
    uint64_t highest;           /* the highest `last` in this subtree */
    node *child[2];
    int height;
};

struct vaddrindex {
    node *root;
    size_t count;
    pthread_mutex_t mutex;
};

static int height(const node *at)
{
    return at ? at->height : 0;
}

static void update(node *at)
{
    at->height = 1;
    at->highest = at->entry.last;
    for (int side = 0; side < 2; side++) {
        const node *child = at->child[side];
        if (!child)
            continue;
        if (child->height >= at->height)
            at->height = child->height + 1;
        if (child->highest > at->highest)
            at->highest = child->highest;
    }
}

/* Lift the child on `side` above its parent. */
static node *rotate(node *at, int side)
{
    node *up = at->child[side];
    at->child[side] = up->child[!side];
    up->child[!side] = at;
    update(at);
    update(up);
    return up;
}

static node *balance(node *at)
{
    int lean = height(at->child[1]) - height(at->child[0]), side = lean > 0;

    if (lean >= -1 && lean <= 1) {
        update(at);
        return at;
    }
    node *child = at->child[side];
    if (height(child->child[!side]) > height(child->child[side]))
        at->child[side] = rotate(child, !side);
    return rotate(at, side);
}

static int compare(const vaddrindex_entry *a, const vaddrindex_entry *b)
{
    if (a->vaddr != b->vaddr)
        return a->vaddr < b->vaddr ? -1 : 1;
    return (a->iova > b->iova) - (a->iova < b->iova);
}

static node *insert(node *at, node *fresh, int *err)
{
    if (!at)
        return fresh;
    int order = compare(&fresh->entry, &at->entry);
    if (!order) {
        *err = -EEXIST;
        return at;
    }
    at->child[order > 0] = insert(at->child[order > 0], fresh, err);
    return balance(at);
}

static node *take_first(node *at, node **first)
{
    if (!at->child[0]) {
        *first = at;
        return at->child[1];
    }
    at->child[0] = take_first(at->child[0], first);
    return balance(at);
}

static node *take(node *at, const vaddrindex_entry *key, node **taken)
{
    if (!at)
        return NULL;
    int order = compare(key, &at->entry);
    if (order) {
        at->child[order > 0] = take(at->child[order > 0], key, taken);
        return balance(at);
    }
    *taken = at;
    if (!at->child[1])
        return at->child[0];
    node *next, *right = take_first(at->child[1], &next);
    next->child[0] = at->child[0];
    next->child[1] = right;
    return balance(next);
}

static size_t find(const node *at, uint64_t address, vaddrindex_entry *out, size_t cap, size_t n)
{
    for (; at && at->highest >= address; at = at->child[1]) {
        n = find(at->child[0], address, out, cap, n);
        if (at->entry.vaddr > address)
            break;
        if (at->entry.last >= address) {
            if (n < cap)
                out[n] = at->entry;
            n++;
        }
    }
    return n;
}

static void drop(node *at)
{
    while (at) {
        node *right = at->child[1];
        drop(at->child[0]);
        free(at);
        at = right;
    }
}

vaddrindex *vaddrindex_new(void)
{
    vaddrindex *index = calloc(1, sizeof(*index));
    if (index)
        pthread_mutex_init(&index->mutex, NULL);
    return index;
}

void vaddrindex_free(vaddrindex *index)
{
    if (!index)
        return;
    drop(index->root);
    pthread_mutex_destroy(&index->mutex);
    free(index);
}

int vaddrindex_insert(vaddrindex *index, uint64_t vaddr, uint64_t last, uint64_t iova)
{
    if (last < vaddr)
        return -EINVAL;
    node *fresh = calloc(1, sizeof(*fresh));
    if (!fresh)
        return -ENOMEM;
    fresh->entry = (vaddrindex_entry){vaddr, last, iova};
    update(fresh);

    int err = 0;
    pthread_mutex_lock(&index->mutex);
    index->root = insert(index->root, fresh, &err);
    index->count += !err;
    pthread_mutex_unlock(&index->mutex);
    if (err)
        free(fresh);
    return err;
}

int vaddrindex_remove(vaddrindex *index, uint64_t vaddr, uint64_t iova)
{
    vaddrindex_entry key = {vaddr, 0, iova};
    node *taken = NULL;

    pthread_mutex_lock(&index->mutex);
    index->root = take(index->root, &key, &taken);
    index->count -= taken != NULL;
    pthread_mutex_unlock(&index->mutex);
    free(taken);
    return taken ? 0 : -ENOENT;
}

size_t vaddrindex_find(vaddrindex *index, uint64_t address, vaddrindex_entry *out, size_t cap)
{
    pthread_mutex_lock(&index->mutex);
    size_t n = find(index->root, address, out, cap, 0);
    pthread_mutex_unlock(&index->mutex);
    return n;
}

size_t vaddrindex_count(vaddrindex *index)
{
    pthread_mutex_lock(&index->mutex);
    size_t count = index->count;
    pthread_mutex_unlock(&index->mutex);
    return count;
}

void vaddrindex_clear(vaddrindex *index)
{
    pthread_mutex_lock(&index->mutex);
    node *root = index->root;
    index->root = NULL;
    index->count = 0;
    pthread_mutex_unlock(&index->mutex);
    drop(root);
}

static int check(const node *at, const node **before, size_t *count)
{
    if (!at)
        return 0;
    uint64_t highest = at->entry.last;
    int lean = height(at->child[1]) - height(at->child[0]), broken = check(at->child[0], before, count);
    if (broken)
        return broken;
    if (*before && compare(&(*before)->entry, &at->entry) >= 0)
        return 1;                                       /* ascending */
    *before = at;
    ++*count;
    for (int side = 0; side < 2; side++)
        if (at->child[side] && at->child[side]->highest > highest)
            highest = at->child[side]->highest;
    int tallest = height(at->child[lean > 0]);
    if (highest != at->highest || at->height != tallest + 1 || lean < -1 || lean > 1)
        return 2;                                       /* balanced, and what a node says of its subtree is true */
    return check(at->child[1], before, count);
}

int vaddrindex_check(vaddrindex *index)
{
    const node *before = NULL;
    size_t count = 0;

    pthread_mutex_lock(&index->mutex);
    int broken = check(index->root, &before, &count);
    if (!broken && count != index->count)
        broken = 3;
    pthread_mutex_unlock(&index->mutex);
    return broken;
}
