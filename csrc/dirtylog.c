/*
 * Two buffers: writers mark in the active one, and a harvest makes the other one active, waits until every writer has
 * left the old one, and then empties it with plain SIMD.  A third buffer keeps what a harvest of a sub-range had no
 * use for.  Each buffer has a summary: one bit per line of 64 bytes, set after a bit of that line.
 *
 * Leaving.  Each thread that marks has a record with a sequence number, odd while it is inside a buffer.  Entering is:
 * make it odd, load `active`.  Harvesting is: store `active`, read the numbers.  One of both must see the other, so a
 * full barrier belongs between the two steps on each side.  Marks are frequent and harvests rare, so membarrier(2)
 * makes the harvester pay for both; where the kernel has no membarrier, writers use sequentially consistent operations.
 *
 * Records belong to threads, not to logs, and are never freed, only reused: there are as many as threads ever ran at
 * once.  They are found by a pthread key and not by thread-local storage because this file may be linked into several
 * extensions, and a thread marking through one must be seen by a harvest through another.
 */
#include "dirtylog.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "bitmap.h"

#if defined(__linux__) && __has_include(<linux/membarrier.h>)
#include <linux/membarrier.h>
#include <sys/syscall.h>
#define HAVE_MEMBARRIER 1
#endif

#define LINE_WORDS 8
#define LINE_BITS (64 * LINE_WORDS)
#define HUGE (UINT64_C(2) << 20)
/* Dirty lines that are gathered before they are harvested. */
#define BATCH 64
/* Dirty lines among 64 from which reading all of them in order is faster than going to each. */
#define DENSE 24
/* Words of summary that are looked at together. */
#define SKIP 16
/* Words of one visit to a buffer, so that a harvest never waits long. */
#define VISIT_WORDS 16384

struct writer {
    _Alignas(64) _Atomic uint64_t seq;
    atomic_bool used;
    struct writer *next;
};

struct registry {
    pthread_once_t once;
    bool ready;             /* the key exists */
    bool asymmetric;        /* membarrier works */
    pthread_key_t key;
    _Atomic(struct writer *) writers;
};

struct buffer {
    _Atomic uint64_t *words, *summary;
};

struct dirtylog {
    uint64_t nbits;
    struct registry *registry;
    _Atomic(struct buffer *) active;
    struct buffer buffers[2], kept;
    bool keeps;             /* `kept` may have bits */
    pthread_mutex_t harvesting;
    void *memory;
    size_t size;
};

/* ---- writers ---- */

static struct registry registry = {.once = PTHREAD_ONCE_INIT};

static bool barrier_register(void)
{
#ifdef HAVE_MEMBARRIER
    return !syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0);
#else
    return false;
#endif
}

static void barrier_all_threads(void)
{
#ifdef HAVE_MEMBARRIER
    /* EPERM: the registration did not survive a fork. */
    while (syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0))
        if (!barrier_register())
            abort();                    /* it worked in this process before: going on would lose marks */
#endif
}

static void thread_exits(void *record)
{
    struct writer *writer = record;
    atomic_store_explicit(&writer->used, false, memory_order_release);
}

/* Only the calling thread lives on in the child of a fork. */
static void forked(void)
{
    struct writer *own = pthread_getspecific(registry.key);
    for (struct writer *writer = atomic_load(&registry.writers); writer; writer = writer->next) {
        if (writer == own)
            continue;
        atomic_store(&writer->seq, 0);
        atomic_store(&writer->used, false);
    }
}

static void prepare_registry(void)
{
    registry.asymmetric = barrier_register();
    registry.ready = !pthread_key_create(&registry.key, thread_exits);
    if (registry.ready)
        pthread_atfork(NULL, NULL, forked);
}

void dirtylog_use_membarrier(bool use)
{
    pthread_once(&registry.once, prepare_registry);
    registry.asymmetric = use && barrier_register();
}

/* A record for this thread: one that an ended thread left, or a new one.  NULL: no memory. */
static struct writer *register_writer(struct registry *with)
{
    struct writer *writer;
    if (!with->ready)
        return NULL;
    for (writer = atomic_load(&with->writers); writer; writer = writer->next) {
        bool expected = false;
        if (atomic_compare_exchange_strong(&writer->used, &expected, true))
            break;
    }
    if (!writer) {
        writer = aligned_alloc(_Alignof(struct writer), sizeof(*writer));
        if (!writer)
            return NULL;
        atomic_init(&writer->seq, 0);
        atomic_init(&writer->used, true);
        writer->next = atomic_load(&with->writers);
        while (!atomic_compare_exchange_weak(&with->writers, &writer->next, writer))
            ;
    }
    if (pthread_setspecific(with->key, writer)) {
        atomic_store(&writer->used, false);
        return NULL;
    }
    return writer;
}

/* `seq` is odd; leaving makes it even again. */
static struct buffer *enter(dirtylog *log, struct writer *writer, uint64_t seq)
{
    if (log->registry->asymmetric) {
        atomic_store_explicit(&writer->seq, seq, memory_order_relaxed);
        atomic_signal_fence(memory_order_seq_cst);
        return atomic_load_explicit(&log->active, memory_order_acquire);
    }
    atomic_store(&writer->seq, seq);
    return atomic_load(&log->active);
}

static void leave(struct writer *writer, uint64_t seq)
{
    atomic_store_explicit(&writer->seq, seq + 1, memory_order_release);
}

/* ---- marking ---- */

/* A word that is marked already costs no bus-locked operation: devices write the same pages again and again. */
static inline bool set_bits(_Atomic uint64_t *word, uint64_t bits)
{
    if ((atomic_load_explicit(word, memory_order_relaxed) & bits) == bits)
        return false;
    atomic_fetch_or_explicit(word, bits, memory_order_relaxed);
    return true;
}

static void set_range(_Atomic uint64_t *words, uint64_t first, uint64_t last)
{
    uint64_t a = first / 64, b = last / 64;
    uint64_t head = ~UINT64_C(0) << first % 64, tail = ~UINT64_C(0) >> (63 - last % 64);
    if (a == b) {
        set_bits(words + a, head & tail);
        return;
    }
    set_bits(words + a, head);
    /* All ones may overwrite what another thread sets in between: nothing is lost. */
    for (uint64_t i = a + 1; i < b; i++)
        atomic_store_explicit(words + i, ~UINT64_C(0), memory_order_relaxed);
    set_bits(words + b, tail);
}

/*
 * The summary bit may be left alone when the word had its bits already: whoever set them sets it before leaving this
 * buffer, and a harvest waits for that.
 */
static void mark_in(struct buffer *buffer, uint64_t first, uint64_t last)
{
    if (first / 64 == last / 64) {
        uint64_t bits = ~UINT64_C(0) << first % 64 & ~UINT64_C(0) >> (63 - last % 64);
        if (set_bits(buffer->words + first / 64, bits))
            set_bits(buffer->summary + first / LINE_BITS / 64, UINT64_C(1) << first / LINE_BITS % 64);
        return;
    }
    set_range(buffer->words, first, last);
    set_range(buffer->summary, first / LINE_BITS, last / LINE_BITS);
}

static void mark_locked(dirtylog *log, uint64_t first, uint64_t last)
{
    pthread_mutex_lock(&log->harvesting);
    mark_in(atomic_load(&log->active), first, last);
    pthread_mutex_unlock(&log->harvesting);
}

void dirtylog_mark(dirtylog *log, uint64_t first, uint64_t n)
{
    struct writer *writer = log->registry->ready ? pthread_getspecific(log->registry->key) : NULL;
    if (!n)
        return;
    uint64_t last = first + (n - 1);
    if (__builtin_expect(!writer, 0) && !(writer = register_writer(log->registry))) {
        mark_locked(log, first, last);
        return;
    }
    for (uint64_t seq = atomic_load_explicit(&writer->seq, memory_order_relaxed) + 1;; seq += 2) {
        uint64_t stop = (first / 64 + VISIT_WORDS) * 64 - 1;
        if (stop > last)
            stop = last;
        mark_in(enter(log, writer, seq), first, stop);
        leave(writer, seq);
        if (stop == last)
            return;
        first = stop + 1;
    }
}

/* ---- harvesting ---- */

static void wait_until_left(struct writer *writer)
{
    uint64_t seq = atomic_load_explicit(&writer->seq, memory_order_acquire);
    if (!(seq & 1))
        return;
    for (unsigned tries = 0; atomic_load_explicit(&writer->seq, memory_order_acquire) == seq; tries++) {
        static const struct timespec pause = {.tv_nsec = 50000};
        if (tries > 1000)               /* it was preempted, perhaps by us at a higher priority */
            nanosleep(&pause, NULL);
        else if (tries > 100)
            sched_yield();
    }
}

/* Make the other buffer the active one and return the old one, which nobody is in any more. */
static struct buffer *flip(dirtylog *log)
{
    struct buffer *old = atomic_load(&log->active);
    struct registry *with = log->registry;
    atomic_store(&log->active, old == log->buffers ? log->buffers + 1 : log->buffers);
    if (with->asymmetric)
        barrier_all_threads();
    for (struct writer *writer = atomic_load(&with->writers); writer; writer = writer->next)
        wait_until_left(writer);
    return old;
}

/* Where a harvest of a buffer that nobody is in goes to: bit `first` of the buffer becomes bit `bit` of `words`. */
struct target {
    uint64_t *words, first, bit;
    uint64_t *summary;      /* of `words`, where they are a buffer's */
};

/* The bits [from, last] of one line, of which it may have others. */
static uint64_t drain_part(struct buffer *buffer, uint64_t from, uint64_t last, const struct target *to)
{
    uint64_t *words = (uint64_t *)buffer->words, *summary = (uint64_t *)buffer->summary, line = from / LINE_BITS;
    if (!bitmap_test(summary, line))
        return 0;
    uint64_t total = bitmap_harvest_at(to->words, to->bit + (from - to->first), words, from, last - from + 1);
    if (!bitmap_any(words + line * LINE_WORDS, LINE_WORDS))
        bitmap_clear(summary, line, 1);
    if (to->summary && total)
        bitmap_set(to->summary, line, 1);
    return total;
}

/*
 * The whole lines [line, end).  Lines far from one another are gathered before they are touched, so that their cache
 * misses overlap; where most are dirty, all of them go to the kernel in one piece.
 */
static uint64_t drain_lines(struct buffer *buffer, uint64_t line, uint64_t end, const struct target *to)
{
    uint64_t *words = (uint64_t *)buffer->words, *summary = (uint64_t *)buffer->summary, total = 0;
    uint64_t base = line, bit = to->bit + (line * LINE_BITS - to->first), batch[2 * BATCH];
    size_t n = 0;
    for (uint64_t w = line / 64; line < end; w++, line = w * 64) {
        while (line + SKIP * 64 <= end && !bitmap_any(summary + w, SKIP)) {
            w += SKIP;
            line = w * 64;
        }
        if (line >= end)
            break;
        uint64_t mask = ~UINT64_C(0) << line % 64;
        if (end - w * 64 < 64)
            mask &= (UINT64_C(1) << end % 64) - 1;
        uint64_t dirty = summary[w] & mask;
        if (!dirty)
            continue;
        summary[w] ^= dirty;
        if (to->summary)
            to->summary[w] |= dirty;
        if (!~mask && __builtin_popcountll(dirty) >= DENSE) {
            total += bitmap_harvest(to->words, to->bit + (line * LINE_BITS - to->first), words + line * LINE_WORDS,
                                    64 * LINE_BITS);
            continue;
        }
        for (; dirty; dirty &= dirty - 1) {
            uint64_t next = w * 64 + (unsigned)__builtin_ctzll(dirty) - base;
            __builtin_prefetch(words + (base + next) * LINE_WORDS, 1);
            __builtin_prefetch(to->words + bit / 64 + next * LINE_WORDS, 1);
            batch[n++] = next;
        }
        if (n >= BATCH) {
            total += bitmap_harvest_lines(to->words, bit, words + base * LINE_WORDS, batch, n);
            n = 0;
        }
    }
    return total + bitmap_harvest_lines(to->words, bit, words + base * LINE_WORDS, batch, n);
}

static uint64_t drain(struct buffer *buffer, uint64_t nbits, const struct target *to)
{
    uint64_t first = to->first, stop = first + nbits, line = first / LINE_BITS, end = stop / LINE_BITS, total = 0;
    if (first % LINE_BITS) {
        line++;
        total += drain_part(buffer, first, (line * LINE_BITS < stop ? line * LINE_BITS : stop) - 1, to);
    }
    if (line < end)
        total += drain_lines(buffer, line, end, to);
    if (line <= end && stop % LINE_BITS)
        total += drain_part(buffer, end * LINE_BITS, stop - 1, to);
    return total;
}

uint64_t dirtylog_harvest(dirtylog *log, uint64_t first, uint64_t nbits, uint64_t *dst, uint64_t dst_bit)
{
    uint64_t total;
    bool whole = first == 0 && nbits == log->nbits;
    struct target to = {dst, first, dst_bit, NULL};
    if (!nbits)
        return 0;
    pthread_mutex_lock(&log->harvesting);
    struct buffer *old = flip(log);
    if (whole && !log->keeps) {
        total = drain(old, nbits, &to);
    } else {
        /* A page that is marked in both buffers counts once, so they come together before the range is taken out. */
        struct target kept = {(uint64_t *)log->kept.words, 0, 0, (uint64_t *)log->kept.summary};
        drain(old, log->nbits, &kept);
        total = drain(&log->kept, nbits, &to);
        log->keeps = !whole;
    }
    pthread_mutex_unlock(&log->harvesting);
    return total;
}

/* ---- life ---- */

dirtylog *dirtylog_new(uint64_t nbits)
{
    /* Whole lines and whole lines of summary; nothing below overflows up to 2^56 bits, which no machine can hold. */
    uint64_t lines = nbits / LINE_BITS + (nbits % LINE_BITS != 0);
    uint64_t words = lines * LINE_WORDS, summary = (lines + LINE_BITS - 1) / LINE_BITS * LINE_WORDS;
    if (!nbits || nbits >> 56)
        return NULL;
    dirtylog *log = calloc(1, sizeof(*log));
    if (!log)
        return NULL;
    pthread_once(&registry.once, prepare_registry);
    log->nbits = nbits;
    log->registry = &registry;
    log->size = 3 * (words + summary) * 8;
    /* Fresh pages are zero and cost nothing until they are marked; an idle log of a large guest stays small. */
    log->memory = mmap(NULL, log->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (log->memory == MAP_FAILED || pthread_mutex_init(&log->harvesting, NULL)) {
        if (log->memory != MAP_FAILED)
            munmap(log->memory, log->size);
        free(log);
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    /* Dirty lines are far from one another: with small pages each would be a TLB miss as well. */
    if (words * 8 >= HUGE)
        madvise(log->memory, log->size, MADV_HUGEPAGE);
#endif
    struct buffer *buffers[3] = {log->buffers, log->buffers + 1, &log->kept};
    _Atomic uint64_t *at = log->memory;
    for (unsigned i = 0; i < 3; i++) {
        buffers[i]->summary = at;
        buffers[i]->words = at + summary;
        at += summary + words;
    }
    atomic_init(&log->active, log->buffers);
    return log;
}

void dirtylog_free(dirtylog *log)
{
    if (!log)
        return;
    pthread_mutex_destroy(&log->harvesting);
    munmap(log->memory, log->size);
    free(log);
}
