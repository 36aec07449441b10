/* Pinned memory of the software IOMMU.
 *
 * Pinning probes and populates pages as pin_user_pages() does, with its errno, and remembers how a device reaches them
 * later, when the process may have moved or unmapped its own addresses:
 *
 *   shared memory (memfd, hugetlb, shared files, shared anonymous): through a mapping of the IOMMU's own (an "alias"),
 *     made once for each of the process's mappings and shared by all pins in it.  It is used directly where the file is
 *     sealed against shrinking, else by a checked copy, as a shrunk file raises SIGBUS.
 *   private memory: by a checked copy at the address it was pinned at.  Pages that the owner has since unmapped are gone
 *     (a real kernel would keep them): the access is a fault.
 *   MMIO (VM_PFNMAP): pinned without being counted; the device's access is a fault.
 */
#ifndef VFIODMA_PIN_H
#define VFIODMA_PIN_H
#include <stdbool.h>
#include <stdint.h>

typedef struct pin pin;

enum pin_rules {
    PIN_WRITE = 1,              /* pin for writing */
    PIN_ZERO_PAGE_FREE = 2,     /* kernels up to 6.1: a READ pin of untouched anonymous memory takes the zero page, uncounted */
    PIN_NO_WRITEBACK = 4,       /* kernels from 6.5: no WRITE pin of shared file pages that need write-back */
    PIN_IN_BATCHES = 8,         /* kernels from 5.12: 512 pages are populated before the limit is looked at */
};

/* Pin [vaddr, vaddr + size), both multiples of the page size.  At most `allowed` pages may be counted (UINT64_MAX: no limit).
 * 0, or -EFAULT, -ENOMEM, -EINTR.  *counted = pages to account. */
int pin_memory(uint64_t vaddr, uint64_t size, unsigned rules, uint64_t allowed, pin **out, uint64_t *counted);
void pin_release(pin *);

/* Device access at an offset into the pinned range; 0 or -EFAULT. */
int pin_read(const pin *, uint64_t offset, void *dst, uint64_t n);
int pin_write(const pin *, uint64_t offset, const void *src, uint64_t n);

/* The 4 KiB at an offset that is a multiple of that, where the memory is used directly; NULL: only by the functions here. */
uint64_t *pin_page(const pin *, uint64_t offset);

/* Put `wanted` where `seen` is, in the aligned word at an offset: 0, -EAGAIN (something else is there), -EFAULT.  Atomic
 * where the memory is used directly.  Elsewhere there is a moment between the look and the write; bits 10:0 that are
 * only set then come to whatever was stored meanwhile, so that it is never undone. */
int pin_swap(const pin *, uint64_t offset, uint64_t seen, uint64_t wanted);
#endif
