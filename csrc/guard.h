/*
 * A loud end for who waits for a missing page when the process that places pages is gone: a thread that needs no
 * interpreter.  Functions return 0 or -errno.
 */
#ifndef VFIODMA_GUARD_H
#define VFIODMA_GUARD_H

#include <stddef.h>
#include <stdint.h>

struct guard;

/* Watch a process.  When it ends, all who wait in the ranges (start and bytes of each, kept by the caller) and all who
 * touch a missing page from there on get SIGBUS; where the kernel has no UFFDIO_POISON, this process is aborted. */
int guard_start(struct guard **guard, int uffd, int pidfd, const uint64_t *ranges, size_t nranges);
/* The thread has ended when it returns; nothing in a child of the process that started it. */
void guard_stop(struct guard *guard);

#endif
