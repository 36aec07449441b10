/* Which pages a process has written: userfaultfd write protection in asynchronous mode, read by PAGEMAP_SCAN (Linux 6.7).
 *
 * Writes through other mappings of the same memory (another process, the IOMMU) are not seen. */
#ifndef VFIODMA_PAGEMAP_H
#define VFIODMA_PAGEMAP_H
#include <stdint.h>

/* A userfaultfd that can write-protect asynchronously; or -errno: EPERM, ENOSYS, EOPNOTSUPP (the kernel lacks a feature). */
int writes_open(void);

/* Watch [vaddr, vaddr + size): every page counts as not written from here on.  0 or -errno. */
int writes_watch(int uffd, uint64_t vaddr, uint64_t size);
int writes_unwatch(int uffd, uint64_t vaddr, uint64_t size);

/* Set bit `first + i` for each page i (of pgsize bytes) written since the last call, and protect it anew, atomically.
 * *found = pages reported.  0 or -errno; -EPERM: some of the range is not watched any more. */
int writes_harvest(int pagemap, uint64_t vaddr, uint64_t size, uint64_t pgsize, uint64_t *words, uint64_t first,
                   uint64_t *found);
#endif
