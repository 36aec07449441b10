#include "gaps.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#ifndef GAPS_SLAB
#define GAPS_SLAB 64    /* nodes a malloc; a test takes fewer */
#endif

enum {
    CLASSES = 3,
    FAN = 32,
    LEAST = FAN / 4,    /* rows of a node that is not the root */
    HEIGHT = 16,        /* LEAST ** HEIGHT gaps don't fit in memory */
    SLAB = GAPS_SLAB,
};

typedef struct node node;

/* A row is a gap in a leaf, a child in an inner node; both are searched and summed up by the same code. */
typedef struct {
    uint64_t start;             /* exactly the first page, so that separators are never stale */
    uint64_t fit[CLASSES];      /* the largest run that begins on a multiple of each alignment; fit[0] = the gap */
    node *child;
} row;

struct node {
    uint32_t count;
    uint64_t start[FAN];
    uint64_t fit[CLASSES][FAN];
    node *child[FAN];           /* inner nodes only; [0] links the spare nodes */
};

typedef struct slab {
    struct slab *next;
    node nodes[SLAB];
} slab;

struct gaps {
    node *root;
    unsigned height;            /* levels; 1 = the root is a leaf */
    uint64_t align[CLASSES];    /* in pages */
    size_t count;
    uint64_t pages;
    node *spare;
    size_t nspare;
    slab *slabs;
};

/* The way from a leaf (level 0) to the root: a node and the slot in it for each level. */
typedef struct {
    node *node[HEIGHT];
    int slot[HEIGHT];
} path;

/* ---- nodes ---- */

static node *node_new(gaps *tree)
{
    node *n = tree->spare;

    tree->spare = n->child[0];
    tree->nspare--;
    n->count = 0;
    return n;
}

static void node_drop(gaps *tree, node *n)
{
    n->child[0] = tree->spare;
    tree->spare = n;
    tree->nspare++;
}

int gaps_prepare(gaps *tree, size_t changes)
{
    /* A change splits at most one node a level and adds a root. */
    while (tree->nspare < changes * (tree->height + 2)) {
        slab *s = malloc(sizeof *s);
        if (!s)
            return -ENOMEM;
        s->next = tree->slabs;
        tree->slabs = s;
        for (unsigned i = 0; i < SLAB; i++)
            node_drop(tree, &s->nodes[i]);
    }
    return 0;
}

static inline uint64_t align_up(uint64_t page, uint64_t align)
{
    return (page + align - 1) & ~(align - 1);
}

static inline uint64_t fit_of(uint64_t start, uint64_t end, uint64_t align)
{
    uint64_t first = align_up(start, align);

    return first < end ? end - first : 0;
}

static inline row row_of_gap(const gaps *tree, uint64_t start, uint64_t npages)
{
    row r = {start, {npages, 0, 0}, NULL};

    for (unsigned c = 1; c < CLASSES; c++)
        r.fit[c] = fit_of(start, start + npages, tree->align[c]);
    return r;
}

static inline row row_get(const node *n, unsigned i, unsigned level)
{
    return (row){n->start[i], {n->fit[0][i], n->fit[1][i], n->fit[2][i]}, level ? n->child[i] : NULL};
}

static inline void row_put(node *n, unsigned i, const row *r, unsigned level)
{
    n->start[i] = r->start;
    for (unsigned c = 0; c < CLASSES; c++)
        n->fit[c][i] = r->fit[c];
    if (level)
        n->child[i] = r->child;
}

/* Move rows [from, from + count) of `src` to `to` in `dst`; the same node is allowed. */
static void rows_move(node *dst, unsigned to, node *src, unsigned from, unsigned count, unsigned level)
{
    memmove(dst->start + to, src->start + from, count * sizeof *src->start);
    for (unsigned c = 0; c < CLASSES; c++)
        memmove(dst->fit[c] + to, src->fit[c] + from, count * sizeof *src->start);
    if (level)
        memmove(dst->child + to, src->child + from, count * sizeof *src->child);
}

static inline uint64_t column_max(const uint64_t *column, unsigned count)
{
    uint64_t best = 0;

    for (unsigned i = 0; i < count; i++)
        best = column[i] > best ? column[i] : best;
    return best;
}

static row summary(node *n)
{
    row r = {n->start[0], {0}, n};

    for (unsigned c = 0; c < CLASSES; c++)
        r.fit[c] = column_max(n->fit[c], n->count);
    return r;
}

static inline bool row_equal(const row *a, const row *b)
{
    return a->start == b->start && a->fit[0] == b->fit[0] && a->fit[1] == b->fit[1] && a->fit[2] == b->fit[2];
}

/* ---- keeping the rows above in step ---- */

/* The node of `level` changed: write its summary into its parent, and so on up while that changes something. */
static void refresh(gaps *tree, path *p, unsigned level)
{
    for (; level + 1 < tree->height; level++) {
        node *parent = p->node[level + 1];
        unsigned slot = p->slot[level + 1];
        row was = row_get(parent, slot, level + 1), now = summary(p->node[level]);

        if (row_equal(&was, &now))
            return;
        row_put(parent, slot, &now, level + 1);
    }
}

/* The same after one row of the leaf went from `old` to `now` (all zero: there is none): a column is read again only
 * when its largest value may have gone down. */
static void refresh_row(gaps *tree, path *p, row old, row now)
{
    for (unsigned level = 0; level + 1 < tree->height; level++) {
        node *n = p->node[level], *parent = p->node[level + 1];
        unsigned slot = p->slot[level + 1];
        row was = row_get(parent, slot, level + 1), next = was;

        next.start = n->start[0];
        for (unsigned c = 0; c < CLASSES; c++)
            if (now.fit[c] >= was.fit[c])
                next.fit[c] = now.fit[c];
            else if (old.fit[c] == was.fit[c])
                next.fit[c] = column_max(n->fit[c], n->count);
        if (row_equal(&was, &next))
            return;
        row_put(parent, slot, &next, level + 1);
        old = was;
        now = next;
    }
}

static void leaf_set(gaps *tree, path *p, uint64_t start, uint64_t npages)
{
    row old = row_get(p->node[0], p->slot[0], 0), now = row_of_gap(tree, start, npages);

    row_put(p->node[0], p->slot[0], &now, 0);
    refresh_row(tree, p, old, now);
}

/* Put a gap before the slot of the leaf.  Needs gaps_prepare(). */
static void leaf_insert(gaps *tree, path *p, uint64_t start, uint64_t npages)
{
    row r = row_of_gap(tree, start, npages);

    tree->count++;
    for (unsigned level = 0;; level++) {
        node *n = p->node[level], *into = n;
        unsigned at = p->slot[level];

        if (n->count < FAN) {
            rows_move(n, at + 1, n, at, n->count - at, level);
            row_put(n, at, &r, level);
            n->count++;
            if (level)
                refresh(tree, p, level);
            else
                refresh_row(tree, p, (row){0}, r);
            return;
        }

        node *right = node_new(tree);
        right->count = FAN / 2;
        n->count = FAN - FAN / 2;
        rows_move(right, 0, n, n->count, right->count, level);
        if (at > n->count) {
            into = right;
            at -= n->count;
        }
        rows_move(into, at + 1, into, at, into->count - at, level);
        row_put(into, at, &r, level);
        into->count++;

        row left = summary(n);
        r = summary(right);
        if (level + 1 == tree->height) {
            node *root = node_new(tree);
            root->count = 2;
            row_put(root, 0, &left, level + 1);
            row_put(root, 1, &r, level + 1);
            tree->root = root;
            tree->height++;
            return;
        }
        row_put(p->node[level + 1], p->slot[level + 1], &left, level + 1);
        p->slot[level + 1]++;
    }
}

static void leaf_delete(gaps *tree, path *p)
{
    row old = row_get(p->node[0], p->slot[0], 0);

    tree->count--;
    for (unsigned level = 0;; level++) {
        node *n = p->node[level];
        unsigned at = p->slot[level];

        n->count--;
        rows_move(n, at, n, at + 1, n->count - at, level);
        if (level + 1 == tree->height) {
            if (level && n->count == 1) {
                tree->root = n->child[0];
                tree->height--;
                node_drop(tree, n);
            }
            return;
        }
        if (n->count >= LEAST) {
            if (level)
                refresh(tree, p, level);
            else
                refresh_row(tree, p, old, (row){0});
            return;
        }

        /* Too few rows: join a neighbour, or share evenly with it. */
        node *parent = p->node[level + 1];
        unsigned i = p->slot[level + 1];
        if (i + 1 == parent->count)
            i--;
        node *left = parent->child[i], *right = parent->child[i + 1];
        unsigned total = left->count + right->count, keep = total <= FAN * 3 / 4 ? total : total / 2;

        if (left->count < keep) {
            unsigned moved = keep - left->count;
            rows_move(left, left->count, right, 0, moved, level);
            rows_move(right, 0, right, moved, right->count - moved, level);
        } else {
            unsigned moved = left->count - keep;
            rows_move(right, moved, right, 0, right->count, level);
            rows_move(right, 0, left, keep, moved, level);
        }
        left->count = keep;
        right->count = total - keep;

        row r = summary(left);
        row_put(parent, i, &r, level + 1);
        if (right->count) {
            r = summary(right);
            row_put(parent, i + 1, &r, level + 1);
            refresh(tree, p, level + 1);
            return;
        }
        node_drop(tree, right);
        p->slot[level + 1] = i + 1;
    }
}

/* ---- finding ---- */

static inline unsigned rank(const node *n, uint64_t page)
{
    unsigned r = 0;

    for (unsigned i = 0; i < n->count; i++)
        r += n->start[i] <= page;
    return r;
}

/* To the slot after the last gap that starts at `page` or before it.  That gap is in the same leaf, because rows hold
 * the exact first page of their subtree; slot 0 means that there is none in the tree. */
static void locate(const gaps *tree, uint64_t page, path *p)
{
    node *n = tree->root;

    for (unsigned level = tree->height - 1; level; level--) {
        unsigned r = rank(n, page);
        p->node[level] = n;
        p->slot[level] = r ? r - 1 : 0;
        n = n->child[p->slot[level]];
    }
    p->node[0] = n;
    p->slot[0] = rank(n, page);
}

/* The first slot past `slot` in the given direction with at least `need`; -1 when there is none. */
static inline int scan(const node *n, int slot, bool down, unsigned class, uint64_t need)
{
    const uint64_t *fit = n->fit[class];

    if (down) {
        for (int i = slot - 1; i >= 0; i--)
            if (fit[i] >= need)
                return i;
    } else {
        for (int i = slot + 1; i < (int)n->count; i++)
            if (fit[i] >= need)
                return i;
    }
    return -1;
}

/* From the row at the slot of `level` down to the first gap below it, from the given side, with at least `need`. */
static void descend(path *p, unsigned level, bool down, unsigned class, uint64_t need)
{
    for (; level; level--) {
        node *n = p->node[level]->child[p->slot[level]];

        p->node[level - 1] = n;
        p->slot[level - 1] = scan(n, down ? (int)n->count : -1, down, class, need);
    }
}

/* From the slots of `level` and above to the next gap in the given direction with at least `need`. */
static bool step(const gaps *tree, path *p, unsigned level, bool down, unsigned class, uint64_t need)
{
    for (; level < tree->height; level++) {
        int slot = scan(p->node[level], p->slot[level], down, class, need);

        if (slot >= 0) {
            p->slot[level] = slot;
            descend(p, level, down, class, need);
            return true;
        }
    }
    return false;
}

static bool step_first(const gaps *tree, path *p, unsigned class, uint64_t need)
{
    p->node[tree->height - 1] = tree->root;
    p->slot[tree->height - 1] = -1;
    return step(tree, p, tree->height - 1, false, class, need);
}

static inline uint64_t path_start(const path *p)
{
    return p->node[0]->start[p->slot[0]];
}

static inline uint64_t path_npages(const path *p)
{
    return p->node[0]->fit[0][p->slot[0]];
}

/* Where the query fits in the gap of the path. */
static bool place(const path *p, const gaps_query *q, uint64_t *start)
{
    uint64_t first = path_start(p), end = first + path_npages(p);

    if (q->last < end - 1)
        end = q->last + 1;
    if (end < q->npages)
        return false;
    *start = q->top_down ? (end - q->npages) & ~(q->align - 1) : align_up(first, q->align);
    return *start >= first && *start <= end - q->npages;
}

static bool find(const gaps *tree, const gaps_query *q, path *p, uint64_t *start)
{
    unsigned class = 0, tried = 0;
    uint64_t sure;
    bool found;

    while (class + 1 < CLASSES && tree->align[class + 1] <= q->align)
        class++;
    sure = q->npages + q->align - tree->align[class];

    if (q->top_down) {
        /* The limit cuts only the last gap that starts below it, so that one is looked at apart. */
        locate(tree, q->last, p);
        found = p->slot[0]-- > 0;
    } else {
        found = step_first(tree, p, class, q->npages);
    }
    for (; found; found = step(tree, p, 0, q->top_down, class, q->npages)) {
        if (place(p, q, start))
            return true;
        if (!q->top_down && path_start(p) + q->npages - 1 > q->last)
            return false;
        if (++tried != GAPS_CANDIDATES)
            continue;

        /* Only another alignment than the three comes here.  A gap with room for the worst misfit, or for a larger
         * one of the three, fits for sure. */
        path other = *p;
        if (step(tree, &other, 0, q->top_down, class, sure) && place(&other, q, start)) {
            *p = other;
            return true;
        }
        other = *p;
        if (class + 1 < CLASSES && step(tree, &other, 0, q->top_down, class + 1, q->npages) &&
            place(&other, q, start)) {
            *p = other;
            return true;
        }
    }
    return false;
}

/* ---- giving and taking ---- */

static void take_at(gaps *tree, path *p, uint64_t start, uint64_t npages)
{
    uint64_t first = path_start(p), head = start - first, tail = path_npages(p) - head - npages;

    tree->pages -= npages;
    if (head && tail) {
        leaf_set(tree, p, first, head);
        p->slot[0]++;
        leaf_insert(tree, p, start + npages, tail);
    } else if (head) {
        leaf_set(tree, p, first, head);
    } else if (tail) {
        leaf_set(tree, p, start + npages, tail);
    } else {
        leaf_delete(tree, p);
    }
}

int gaps_alloc(gaps *tree, const gaps_query *query, uint64_t *start)
{
    path p;

    if (gaps_prepare(tree, 1))
        return -ENOMEM;
    if (!find(tree, query, &p, start))
        return -ENOSPC;
    take_at(tree, &p, *start, query->npages);
    return 0;
}

int gaps_take(gaps *tree, uint64_t start, uint64_t npages)
{
    path p;

    if (gaps_prepare(tree, 1))
        return -ENOMEM;
    locate(tree, start, &p);
    if (p.slot[0]-- == 0 || path_start(&p) + path_npages(&p) < start + npages)
        return -ENOENT;
    take_at(tree, &p, start, npages);
    return 0;
}

int gaps_give(gaps *tree, uint64_t start, uint64_t npages, uint64_t low, uint64_t high)
{
    path before, after;
    uint64_t end = start + npages, first = start;
    bool join_before = false, join_after = false;
    int slot;

    if (gaps_prepare(tree, 1))
        return -ENOMEM;
    locate(tree, start, &before);
    slot = before.slot[0]--;
    after = before;
    if (slot) {
        first = path_start(&before);
        if (first + path_npages(&before) > start)
            return -EEXIST;
        join_before = first + path_npages(&before) == start && start != low;
    }
    if (step(tree, &after, 0, false, 0, 1)) {
        if (path_start(&after) < end)
            return -EEXIST;
        join_after = path_start(&after) == end && end - 1 != high;
    }

    tree->pages += npages;
    if (join_before) {
        uint64_t joined = start - first + npages + (join_after ? path_npages(&after) : 0);
        leaf_set(tree, &before, first, joined);
        if (join_after)
            leaf_delete(tree, &after);
    } else if (join_after) {
        leaf_set(tree, &after, start, npages + path_npages(&after));
    } else {
        before.slot[0] = slot;
        leaf_insert(tree, &before, start, npages);
    }
    return 0;
}

/* ---- the rest ---- */

bool gaps_next(const gaps *tree, uint64_t page, uint64_t *start, uint64_t *npages)
{
    path p;

    locate(tree, page, &p);
    p.slot[0]--;
    if ((p.slot[0] < 0 || path_start(&p) + path_npages(&p) <= page) && !step(tree, &p, 0, false, 0, 1))
        return false;
    *start = path_start(&p);
    *npages = path_npages(&p);
    return true;
}

uint64_t gaps_largest(const gaps *tree, uint64_t align, uint64_t last)
{
    unsigned class = 0;
    uint64_t best = 0;
    path p;

    while (class + 1 < CLASSES && tree->align[class + 1] <= align)
        class++;
    locate(tree, last, &p);
    if (p.slot[0]-- == 0)
        return 0;

    uint64_t start = path_start(&p), end = start + path_npages(&p);
    best = fit_of(start, last < end - 1 ? last + 1 : end, align);
    if (tree->align[class] == align) {
        for (unsigned level = 0; level < tree->height; level++) {
            uint64_t most = column_max(p.node[level]->fit[class], p.slot[level]);
            best = most > best ? most : best;
        }
    } else {
        while (step(tree, &p, 0, true, class, best + 1)) {
            uint64_t fit = fit_of(path_start(&p), path_start(&p) + path_npages(&p), align);
            best = fit > best ? fit : best;
        }
    }
    return best;
}

size_t gaps_count(const gaps *tree)
{
    return tree->count;
}

uint64_t gaps_pages(const gaps *tree)
{
    return tree->pages;
}

gaps *gaps_new(unsigned pgshift)
{
    gaps *tree = calloc(1, sizeof *tree);

    if (!tree)
        return NULL;
    tree->align[0] = 1;
    tree->align[1] = pgshift < 21 ? UINT64_C(1) << (21 - pgshift) : 1;
    tree->align[2] = pgshift < 30 ? UINT64_C(1) << (30 - pgshift) : 1;
    if (gaps_prepare(tree, 1)) {
        gaps_free(tree);
        return NULL;
    }
    tree->root = node_new(tree);
    tree->height = 1;
    return tree;
}

void gaps_free(gaps *tree)
{
    if (!tree)
        return;
    for (slab *s = tree->slabs, *next; s; s = next) {
        next = s->next;
        free(s);
    }
    free(tree);
}

typedef struct {
    const gaps *tree;
    bool joined;
    size_t count;
    uint64_t pages, end;        /* of the gaps seen so far */
} check;

static const char *check_node(check *state, node *n, unsigned level)
{
    if (n != state->tree->root && n->count < LEAST)
        return "a node has too few rows";
    if (n->count > FAN || (level && n == state->tree->root && n->count < 2))
        return "a node has an impossible number of rows";
    for (unsigned i = 0; i < n->count; i++) {
        row r = row_get(n, i, level);
        if (level) {
            const char *broken = check_node(state, r.child, level - 1);
            if (broken)
                return broken;
            row real = summary(r.child);
            if (!row_equal(&r, &real))
                return "a row does not sum up its child";
            continue;
        }
        row real = row_of_gap(state->tree, r.start, r.fit[0]);
        if (!r.fit[0] || !row_equal(&r, &real))
            return "a gap is empty or its fits are wrong";
        if (state->count && (r.start < state->end || (state->joined && r.start == state->end)))
            return "gaps overlap or touch";
        state->count++;
        state->pages += r.fit[0];
        state->end = r.start + r.fit[0];
    }
    return NULL;
}

const char *gaps_check(const gaps *tree, bool joined)
{
    check state = {.tree = tree, .joined = joined};
    const char *broken = check_node(&state, tree->root, tree->height - 1);

    if (broken)
        return broken;
    return state.count == tree->count && state.pages == tree->pages ? NULL : "the counts are wrong";
}
