/*
 * Memory whose pages are not there yet: whoever touches one waits until it is placed (userfaultfd, missing mode).
 * Functions return 0 or -errno.
 */
#ifndef VFIODMA_MISSING_H
#define VFIODMA_MISSING_H

#include <stddef.h>
#include <stdint.h>

/* A userfaultfd for faults of the process and of the kernel on its behalf; or -EPERM, -ENOSYS, -EOPNOTSUPP. */
int missing_open(void);
int missing_register(int uffd, uint64_t vaddr, uint64_t size);
int missing_unregister(int uffd, uint64_t vaddr, uint64_t size);
/* Addresses that somebody waits for, at most `max`; waits for one up to `timeout` milliseconds.  The number, or -errno. */
int missing_next(int uffd, uint64_t *addresses, size_t max, int timeout);
/* Place bytes, or zeros where `content` is NULL, and wake who waits.  *placed = bytes.  -EEXIST: a page is there already. */
int missing_place(int uffd, uint64_t vaddr, const void *content, uint64_t size, uint64_t *placed);

int missing_wake(int uffd, uint64_t vaddr, uint64_t size);
/* Zeros for a page, unless it is there already, and wake who waits for it. */
int missing_fill(int uffd, uint64_t vaddr, uint64_t size);
/* Who touches a page that is not there, or waits for it, gets SIGBUS.  -EEXIST: it is there.  -EINVAL before Linux 6.6. */
int missing_poison(int uffd, uint64_t vaddr, uint64_t size);
/* Throw the pages away whose bits are set: who touches one waits, if the memory is registered.  shared: memfd, else anonymous.
 * -EBUSY: a page would not go (a huge page that can't be split, pinned, locked). */
int missing_discard(uint64_t vaddr, uint64_t pgsize, const uint64_t *words, uint64_t npages, int shared);
/* Leave the memory out of children, or not any more. */
int missing_keep_from_children(uint64_t vaddr, uint64_t size, int keep);

/* Test that the n pages' bits are set and clear them; false, and nothing is changed, where one is not. */
int missing_claim(uint64_t *words, uint64_t npages, const uint64_t *runs, size_t n, uint64_t *total);
void missing_unclaim(uint64_t *words, uint64_t first, uint64_t n);

#endif
