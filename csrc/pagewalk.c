#include "pagewalk.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "rangemap.h"

#define PRESENT 1ull
#define WRITABLE 2ull
#define USER 4ull
#define ACCESSED 0x20ull
#define DIRTY 0x40ull
#define LARGE 0x80ull           /* PS: a leaf above the last level */
#define GLOBAL 0x100ull
#define EXT_ACCESSED 0x400ull
#define ADDRESS 0x000ffffffffff000ull

#define MAX_PASID (1u << 20)
#define MAX_LEVELS 5
#define MAX_TRIES 64            /* of a walk whose entries change under it */
#define FIRST_ROOM 64
#define HUGE_PAGE (2ul << 20)
#define AHEAD 16                /* slots fetched before their turn: each is a cache miss */

/* A cached translation in 16 bytes.  where: bits 44:0 page number, 61:45 low bits of the PASID, 63:62 kind of page, 0 =
 * the slot is free.  to: bits 51:12 gpa, 11:9 high bits of the PASID, IS_GLOBAL, and the accesses that it answers: a
 * write only when the dirty flag is set already. */
typedef struct {
    uint64_t where, to;
} slot;

enum { READS = 1, WRITES = 2, PRIV_READS = 4, PRIV_WRITES = 8, IS_GLOBAL = 16 };
#define NOWHERE UINT64_MAX      /* of no slot */
#define PAGE_NUMBER ((1ull << 45) - 1)
#define PASID_HIGH 0xe00ull

typedef struct {
    uint64_t root, serial;
    unsigned levels, flags;
} table;

struct pagewalk {
    pthread_mutex_t lock;
    rangemap *tables;           /* PASID -> table * */
    slot *slots;                /* linear probing, a power of two of them */
    size_t room, used, most;
    size_t of_kind[4];          /* cached pages of each kind */
    uint64_t beyond;            /* address bits above the guest's width */
    bool huge;
};

/* ---- the cache */

static inline unsigned kind_shift(unsigned kind)
{
    return 3 + 9 * kind;        /* 1: 4 KiB, 2: 2 MiB, 3: 1 GiB */
}

static inline uint64_t where_of(uint32_t pasid, uint64_t address, unsigned kind)
{
    uint64_t page = address >> kind_shift(kind) << kind_shift(kind);
    return (page >> 12 & PAGE_NUMBER) | (uint64_t)(pasid & 0x1ffff) << 45 | (uint64_t)kind << 62;
}

static inline uint64_t high_of(uint32_t pasid)
{
    return (uint64_t)(pasid >> 17) << 9;
}

static inline unsigned kind_of(const slot *s)
{
    return s->where >> 62;
}

static bool is_of(const slot *s, uint32_t pasid)
{
    return s->where && (s->where >> 45 & 0x1ffff) == (pasid & 0x1ffff) && (s->to & PASID_HIGH) == high_of(pasid);
}

static inline uint64_t hash(uint64_t where, uint64_t high)
{
    uint64_t mixed = (where ^ high << 36) * 0x9e3779b97f4a7c15ull;
    return mixed ^ mixed >> 32;
}

static inline size_t home(const pagewalk *w, uint64_t where, uint64_t high)
{
    return hash(where, high) & (w->room - 1);
}

/* The slot of a page, or the free one where it would go. */
static inline slot *probe(const pagewalk *w, uint64_t where, uint64_t high)
{
    for (size_t i = home(w, where, high);; i = (i + 1) & (w->room - 1)) {
        slot *s = &w->slots[i];
        if (!s->where || (s->where == where && (s->to & PASID_HIGH) == high))
            return s;
    }
}

static inline slot *find(const pagewalk *w, uint32_t pasid, uint64_t address)
{
    for (unsigned kind = 1; kind <= 3; kind++) {
        if (!w->of_kind[kind])
            continue;
        slot *s = probe(w, where_of(pasid, address, kind), high_of(pasid));
        if (s->where)
            return s;
    }
    return NULL;
}

static void empty(pagewalk *w)
{
    free(w->slots);
    w->slots = NULL;
    w->room = w->used = 0;
    w->of_kind[1] = w->of_kind[2] = w->of_kind[3] = 0;
}

/* Free slots; many of them lie in huge pages, as each look-up is a miss of the TLB otherwise. */
static slot *slots_new(size_t n)
{
    size_t size = n * sizeof(slot);
    if (size < HUGE_PAGE)
        return calloc(n, sizeof(slot));
    slot *slots = aligned_alloc(HUGE_PAGE, size);
    if (slots) {
        madvise(slots, size, MADV_HUGEPAGE);
        memset(slots, 0, size);
    }
    return slots;
}

/* Room for one more; false: out of memory, or at the limit. */
static bool grow(pagewalk *w)
{
    if (w->used >= w->most)
        empty(w);
    if (w->used < w->room / 8 * 5)
        return true;
    size_t old_room = w->room;
    slot *old = w->slots, *fresh = slots_new(old_room ? old_room * 2 : FIRST_ROOM);
    if (!fresh)
        return false;
    w->slots = fresh;
    w->room = old_room ? old_room * 2 : FIRST_ROOM;
    for (size_t i = 0; i < old_room; i++)
        if (old[i].where)
            *probe(w, old[i].where, old[i].to & PASID_HIGH) = old[i];
    free(old);
    return true;
}

static void keep(pagewalk *w, uint32_t pasid, uint64_t address, unsigned kind, uint64_t to)
{
    if (!grow(w))
        return;                 /* nothing has to be cached */
    slot *s = probe(w, where_of(pasid, address, kind), high_of(pasid));
    if (!s->where) {
        w->used++;
        w->of_kind[kind]++;
    }
    *s = (slot){where_of(pasid, address, kind), to | high_of(pasid)};
}

/* Free a slot and move what was pushed away by it back towards its home. */
static void drop(pagewalk *w, slot *gone)
{
    size_t mask = w->room - 1, hole = gone - w->slots;
    w->used--;
    w->of_kind[kind_of(gone)]--;
    for (size_t i = (hole + 1) & mask; w->slots[i].where; i = (i + 1) & mask) {
        size_t wanted = home(w, w->slots[i].where, w->slots[i].to & PASID_HIGH);
        if (((i - wanted) & mask) >= ((i - hole) & mask)) {
            w->slots[hole] = w->slots[i];
            hole = i;
        }
    }
    w->slots[hole].where = 0;
}

static void drop_pasid(pagewalk *w, uint32_t pasid, bool global)
{
    for (size_t i = 0; i < w->room;)
        if (is_of(&w->slots[i], pasid) && (global || !(w->slots[i].to & IS_GLOBAL)))
            drop(w, &w->slots[i]);      /* another may be here now */
        else
            i++;
}

static void drop_range(pagewalk *w, uint32_t pasid, uint64_t page, uint64_t npages)
{
    for (size_t i = 0; i < w->room;) {
        const slot *s = &w->slots[i];
        uint64_t at = s->where & PAGE_NUMBER, n = s->where ? 1ull << (kind_shift(kind_of(s)) - 12) : 0;
        if (is_of(s, pasid) && at < page + npages && page < at + n)
            drop(w, &w->slots[i]);
        else
            i++;
    }
}

/* ---- walking */

static int fail(pagewalk_fault *fault, uint32_t reason)
{
    *fault = (pagewalk_fault){.reason = reason};
    return -EFAULT;
}

static int fail_at(pagewalk_fault *fault, uint32_t reason, uint64_t entry_gpa)
{
    *fault = (pagewalk_fault){.reason = reason, .fetched = true, .fetch_addr = entry_gpa};
    return -EFAULT;
}

static inline bool canonical(uint64_t address, unsigned bits)
{
    return (address + (1ull << (bits - 1))) >> bits == 0;
}

/* The one of READS ... PRIV_WRITES that an access is. */
static inline unsigned kind_of_access(unsigned access)
{
    return (access & PAGEWALK_WRITE ? WRITES : READS) << (access & PAGEWALK_PRIV ? 2 : 0);
}

/* Those that the entries of a walk allow. */
static unsigned rights_of(const table *t, bool writable, bool user)
{
    unsigned rights = user ? READS | (writable ? WRITES : 0) : 0;
    if (t->flags & PAGEWALK_SRE)
        rights |= PRIV_READS | (writable || !(t->flags & PAGEWALK_WPE) ? PRIV_WRITES : 0);
    return rights;
}

typedef struct {
    uint64_t gpa, entry;
} step;

/* A walk on its way down; all zero before the first step. */
typedef struct {
    step steps[MAX_LEVELS];
    unsigned n;
    bool at_leaf;
} descent;

static uint64_t next_gpa(const table *t, const descent *d, uint64_t address)
{
    uint64_t from = d->n ? d->steps[d->n - 1].entry : t->root;
    return (from & ADDRESS) + (address >> (3 + 9 * (t->levels - d->n)) & 511) * 8;
}

/* Follow the entries to the leaf, or to where a table of `level` comes next.  0 or -EFAULT. */
static int descend(const pagewalk *w, const pagewalk_memory *memory, const table *t, uint64_t address, descent *d,
                   unsigned level, pagewalk_fault *fault)
{
    while (!d->at_leaf && t->levels - d->n > level) {
        unsigned here = t->levels - d->n;
        uint64_t inside = (1ull << (3 + 9 * here)) - 1;
        step *s = &d->steps[d->n];
        s->gpa = next_gpa(t, d, address);
        if (s->gpa & w->beyond)
            return fail_at(fault, PAGEWALK_OOR_ADDRESS, s->gpa);
        if (memory->load(memory->context, s->gpa, &s->entry))
            return fail_at(fault, PAGEWALK_WALK_EABT, s->gpa);
        if (!(s->entry & PRESENT)) {
            fail_at(fault, PAGEWALK_PTE_FETCH, s->gpa);
            fault->missing = true;
            return -EFAULT;
        }
        if (s->entry & ADDRESS & w->beyond)
            return fail_at(fault, PAGEWALK_OOR_ADDRESS, s->gpa);
        bool large = here > 1 && s->entry & LARGE;
        if (large && (here > 3 || (here == 3 && !w->huge) || s->entry & inside & ADDRESS & ~0x1000ull))
            return fail_at(fault, PAGEWALK_PTE_FETCH, s->gpa);      /* reserved bits */
        d->n++;
        d->at_leaf = large || here == 1;
    }
    return 0;
}

/* Set the flags of the entries used.  -EAGAIN: one has changed. */
static int touch(const pagewalk_memory *memory, const table *t, const step *steps, int n, bool dirty,
                 pagewalk_fault *fault)
{
    for (int i = 0; i < n; i++) {
        uint64_t entry = steps[i].entry | ACCESSED | (t->flags & PAGEWALK_EAFE ? EXT_ACCESSED : 0)
                       | (dirty && i == n - 1 ? DIRTY : 0);
        if (entry == steps[i].entry)
            continue;
        int err = memory->update(memory->context, steps[i].gpa, steps[i].entry, entry);
        if (err == -EAGAIN)
            return err;
        if (err)                /* the table can't be written, or is gone */
            return fail_at(fault, err == -EPERM ? PAGEWALK_ACCESS : PAGEWALK_WALK_EABT, steps[i].gpa);
    }
    return 0;
}

static int walk(pagewalk *w, const pagewalk_memory *memory, const table *t, uint32_t pasid, uint64_t address,
                unsigned access, descent *d, pagewalk_result *out, pagewalk_fault *fault)
{
    if (descend(w, memory, t, address, d, 0, fault))
        return -EFAULT;
    const step *steps = d->steps;
    int n = d->n;
    uint64_t all = ~0ull, leaf = steps[n - 1].entry;
    for (int i = 0; i < n; i++)
        all &= steps[i].entry;
    unsigned rights = rights_of(t, all & WRITABLE, all & USER);
    if (!(rights & kind_of_access(access)))
        return fail_at(fault, PAGEWALK_PERMISSION, steps[n - 1].gpa);
    int err = touch(memory, t, steps, n, access & PAGEWALK_WRITE, fault);
    if (err)
        return err;
    unsigned kind = t->levels - n + 1;
    uint64_t inside = (1ull << kind_shift(kind)) - 1, page = leaf & ADDRESS & ~inside;
    if (!(leaf & DIRTY || access & PAGEWALK_WRITE))
        rights &= READS | PRIV_READS;
    keep(w, pasid, address, kind, page | rights | (leaf & GLOBAL ? IS_GLOBAL : 0));
    *out = (pagewalk_result){page | (address & inside), inside + 1 - (address & inside)};
    return 0;
}

/* What the cache does not answer: also an access that the cached rights don't allow, as raising them needs no
 * invalidation.  `begun` is the walk's beginning. */
static int walk_again(pagewalk *w, const pagewalk_memory *memory, const table *t, uint64_t pasid, uint64_t address,
                      unsigned access, descent *begun, pagewalk_result *out, pagewalk_fault *fault)
{
    if (!t)
        return fail(fault, pasid && pasid < MAX_PASID ? PAGEWALK_BAD_PASID_ENTRY : PAGEWALK_PASID_INVALID);
    if (!canonical(address, t->levels == 5 ? 57 : 48))
        return fail(fault, PAGEWALK_OOR_ADDRESS);
    if (access & PAGEWALK_PRIV && !(t->flags & PAGEWALK_SRE))
        return fail(fault, PAGEWALK_PERMISSION);
    for (int tries = 0; tries < MAX_TRIES; tries++) {
        int err = walk(w, memory, t, pasid, address, access, begun, out, fault);
        if (err != -EAGAIN)
            return err;
        *begun = (descent){0};
    }
    return fail(fault, PAGEWALK_UNKNOWN);
}

static const table *table_of(const pagewalk *w, uint64_t pasid)
{
    rangemap_entry bound;
    return pasid < MAX_PASID && rangemap_find(w->tables, pasid, &bound) ? (const table *)(uintptr_t)bound.value : NULL;
}

static inline int translate(pagewalk *w, const pagewalk_memory *memory, const table *t, uint64_t pasid, uint64_t address,
                            unsigned access, descent *begun, pagewalk_result *out, pagewalk_fault *fault)
{
    const slot *s = t && canonical(address, 57) ? find(w, pasid, address) : NULL;
    if (s && s->to & kind_of_access(access)) {
        uint64_t inside = (1ull << kind_shift(kind_of(s))) - 1;
        *out = (pagewalk_result){(s->to & ADDRESS) | (address & inside), inside + 1 - (address & inside)};
        return 0;
    }
    return walk_again(w, memory, t, pasid, address, access, begun, out, fault);
}

int pagewalk_translate(pagewalk *w, const pagewalk_memory *memory, uint64_t pasid, uint64_t address, unsigned access,
                       pagewalk_result *out, pagewalk_fault *fault)
{
    descent begun = {0};
    pthread_mutex_lock(&w->lock);
    int err = translate(w, memory, table_of(w, pasid), pasid, address, access, &begun, out, fault);
    pthread_mutex_unlock(&w->lock);
    return err;
}

/* An address of a batch, whose slot is on its way to the CPU. */
typedef struct {
    uint64_t where, hash;
} expected;

static inline expected expect(const pagewalk *w, uint32_t pasid, uint64_t address)
{
    expected e = {canonical(address, 57) ? where_of(pasid, address, 1) : NOWHERE, 0};
    e.hash = hash(e.where, high_of(pasid));
    if (w->room)
        __builtin_prefetch(&w->slots[e.hash & (w->room - 1)]);
    return e;
}

/* Walk down to the last table: most cache misses are there, and can be waited for together. */
static void walk_ahead(const pagewalk *w, const pagewalk_memory *memory, const table *t, uint64_t address, descent *d)
{
    pagewalk_fault ignored;
    d->n = d->at_leaf = 0;
    if (descend(w, memory, t, address, d, 1, &ignored))
        d->n = 0;               /* the walk itself will tell */
    else if (!d->at_leaf)
        memory->fetch(memory->context, next_gpa(t, d, address));
}

void pagewalk_translate_many(pagewalk *w, const pagewalk_memory *memory, uint64_t pasid, const uint64_t *addresses,
                             uint64_t *gpas, size_t n, unsigned access)
{
    uint64_t need = high_of(pasid) | kind_of_access(access);
    expected ahead[AHEAD];
    descent begun[AHEAD] = {0};
    size_t begun_for[AHEAD] = {0};
    pagewalk_result found;
    pagewalk_fault fault;
    pthread_mutex_lock(&w->lock);
    const table *t = table_of(w, pasid);
    for (size_t i = 0; i < n && i < AHEAD; i++)
        ahead[i] = expect(w, pasid, addresses[i]);
    for (size_t i = 0; i < n; i++) {
        size_t turn = i % AHEAD, used = w->used;
        uint64_t where = ahead[turn].where;
        /* Most are small pages, found where they are looked for first or next. */
        const slot *s = t && w->room ? &w->slots[ahead[turn].hash & (w->room - 1)] : NULL;
        if (s)
            s = &w->slots[(ahead[turn].hash + (s->where != where)) & (w->room - 1)];
        if (i + AHEAD < n)
            ahead[turn] = expect(w, pasid, addresses[i + AHEAD]);
        if (s && s->where == where && (s->to & (PASID_HIGH | need)) == need) {
            gpas[i] = (s->to & ADDRESS) | (addresses[i] & 4095);
            continue;
        }
        descent *b = &begun[turn];
        if (begun_for[turn] != i)
            b->n = b->at_leaf = 0;
        gpas[i] = translate(w, memory, t, pasid, addresses[i], access, b, &found, &fault) ? UINT64_MAX : found.gpa;
        /* This one was not in the cache: those that come won't be either. */
        if (w->used > used && memory->fetch && i + AHEAD < n) {
            walk_ahead(w, memory, t, addresses[i + AHEAD], b);
            begun_for[turn] = i + AHEAD;
        }
    }
    pthread_mutex_unlock(&w->lock);
}

/* ---- tables */

pagewalk *pagewalk_new(unsigned width, bool huge, size_t most)
{
    pagewalk *w = calloc(1, sizeof *w);
    if (!w)
        return NULL;
    w->tables = rangemap_new();
    if (!w->tables) {
        free(w);
        return NULL;
    }
    pthread_mutex_init(&w->lock, NULL);
    w->most = most;
    w->huge = huge;
    w->beyond = width < 64 ? UINT64_MAX << width : 0;
    return w;
}

void pagewalk_unbind_all(pagewalk *w)
{
    rangemap_entry bound;
    pthread_mutex_lock(&w->lock);
    while (rangemap_lower(w->tables, 0, &bound)) {
        rangemap_remove(w->tables, bound.start, NULL);
        free((void *)(uintptr_t)bound.value);
    }
    empty(w);
    pthread_mutex_unlock(&w->lock);
}

void pagewalk_free(pagewalk *w)
{
    if (!w)
        return;
    pagewalk_unbind_all(w);
    rangemap_free(w->tables);
    pthread_mutex_destroy(&w->lock);
    free(w);
}

int pagewalk_bind(pagewalk *w, uint32_t pasid, uint64_t root, unsigned levels, unsigned flags)
{
    if (pasid >= MAX_PASID || (levels != 4 && levels != 5))
        return -EINVAL;
    table *t = malloc(sizeof *t);
    if (!t)
        return -ENOMEM;
    static uint64_t binds;
    *t = (table){root, __atomic_add_fetch(&binds, 1, __ATOMIC_RELAXED), levels, flags};
    pthread_mutex_lock(&w->lock);
    int err = rangemap_insert(w->tables, pasid, pasid, (uintptr_t)t);
    pthread_mutex_unlock(&w->lock);
    if (err)
        free(t);
    return err == -EEXIST ? -EBUSY : err;
}

bool pagewalk_unbind(pagewalk *w, uint32_t pasid)
{
    rangemap_entry bound;
    pthread_mutex_lock(&w->lock);
    bool found = !rangemap_remove(w->tables, pasid, &bound);
    if (found) {
        free((void *)(uintptr_t)bound.value);
        drop_pasid(w, pasid, true);
    }
    pthread_mutex_unlock(&w->lock);
    return found;
}

uint64_t pagewalk_bound(pagewalk *w, uint64_t pasid)
{
    pthread_mutex_lock(&w->lock);
    const table *t = table_of(w, pasid);
    uint64_t serial = t ? t->serial : 0;
    pthread_mutex_unlock(&w->lock);
    return serial;
}

/* ---- invalidation */

void pagewalk_flush_range(pagewalk *w, uint32_t pasid, uint64_t address, uint64_t npages)
{
    uint64_t page = address >> 12 & PAGE_NUMBER;
    pthread_mutex_lock(&w->lock);
    if (npages > PAGE_NUMBER + 1 - page) {
        drop_pasid(w, pasid, true);     /* it goes round */
    } else if (npages > 256 || npages * 3 > w->room) {
        drop_range(w, pasid, page, npages);
    } else {
        slot *s;
        for (uint64_t i = 0; i < npages; i++)
            while ((s = find(w, pasid, (page + i) << 12)))
                drop(w, s);
    }
    pthread_mutex_unlock(&w->lock);
}

void pagewalk_flush_pages(pagewalk *w, uint32_t pasid, uint64_t address, unsigned order)
{
    uint64_t npages = 1ull << (order < 45 ? order : 45);
    pagewalk_flush_range(w, pasid, order < 45 ? address & ~(npages * 4096 - 1) : 0, npages);
}

void pagewalk_flush_pasid(pagewalk *w, uint32_t pasid)
{
    pthread_mutex_lock(&w->lock);
    drop_pasid(w, pasid, false);
    pthread_mutex_unlock(&w->lock);
}

void pagewalk_flush_all(pagewalk *w)
{
    pthread_mutex_lock(&w->lock);
    empty(w);
    pthread_mutex_unlock(&w->lock);
}

size_t pagewalk_cached(pagewalk *w)
{
    pthread_mutex_lock(&w->lock);
    size_t n = w->used;
    pthread_mutex_unlock(&w->lock);
    return n;
}

size_t pagewalk_cache_bytes(pagewalk *w)
{
    pthread_mutex_lock(&w->lock);
    size_t n = w->room * sizeof(slot);
    pthread_mutex_unlock(&w->lock);
    return n;
}
