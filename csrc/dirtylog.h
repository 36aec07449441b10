/*
 * A dirty bitmap that device threads mark pages in while another thread harvests it.  No mark is lost: one made during
 * a harvest is in that harvest or in the next.
 */
#ifndef VFIODMA_DIRTYLOG_H
#define VFIODMA_DIRTYLOG_H

#include <stdbool.h>
#include <stdint.h>

typedef struct dirtylog dirtylog;

/* NULL when there is no memory for it, or nbits is zero. */
dirtylog *dirtylog_new(uint64_t nbits);
/* Nobody may be marking or harvesting. */
void dirtylog_free(dirtylog *log);

/*
 * Mark n bits from `first` on; they must lie inside the log.  Any thread, lock free and wait free but for the first
 * call of a thread (it registers the thread) and when there is no memory for that.  Not from signal handlers.
 */
void dirtylog_mark(dirtylog *log, uint64_t first, uint64_t n);

/*
 * OR the marks among the nbits from `first` on into dst from dst_bit on, forget them, and return how many there were.
 * Marks outside stay for later harvests.  Callers wait for one another.
 */
uint64_t dirtylog_harvest(dirtylog *log, uint64_t first, uint64_t nbits, uint64_t *dst, uint64_t dst_bit);

/* For tests: whether harvests pay for the order of marks (membarrier(2), where there is one) or marks do. */
void dirtylog_use_membarrier(bool use);

#endif
