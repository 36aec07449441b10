/*
 * First-stage translation of an IOMMU that nests: guest page tables in the x86 format of VT-d, and a cache of what was
 * walked.
 *
 * A table's root, the tables that its entries name and the result are guest-physical addresses (gpa).  They are reached
 * through the second stage, which the caller gives as functions.  The cache keeps a translation until it is
 * invalidated, however the guest's memory changes: a guest that forgets an invalidation sees stale data, as on hardware.
 * Not-present entries and tables above the leaf are not cached.  Thread-safe.  Functions return 0 or -errno unless they
 * say otherwise.
 */
#ifndef VFIODMA_PAGEWALK_H
#define VFIODMA_PAGEWALK_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct pagewalk pagewalk;

/* What is wanted of an address, in the numbers of IOMMU_FAULT_PERM_*.  Execution counts as reading. */
enum { PAGEWALK_READ = 1, PAGEWALK_WRITE = 2, PAGEWALK_EXEC = 4, PAGEWALK_PRIV = 8 };

/* How a table is walked: supervisor requests allowed, extended accessed flag, write protection for supervisors. */
enum { PAGEWALK_SRE = 1, PAGEWALK_EAFE = 2, PAGEWALK_WPE = 4 };

/* Why a walk ended, in the numbers of IOMMU_FAULT_REASON_*. */
enum {
    PAGEWALK_UNKNOWN, PAGEWALK_PASID_FETCH, PAGEWALK_BAD_PASID_ENTRY, PAGEWALK_PASID_INVALID, PAGEWALK_WALK_EABT,
    PAGEWALK_PTE_FETCH, PAGEWALK_PERMISSION, PAGEWALK_ACCESS, PAGEWALK_OOR_ADDRESS,
};

/* The second stage.  gpa is a multiple of 8. */
typedef struct {
    void *context;
    int (*load)(void *context, uint64_t gpa, uint64_t *entry);      /* -EINVAL not mapped, -EPERM, -EFAULT memory gone */
    /* Put `entry` where `seen` is; also -EAGAIN: something else is there by now. */
    int (*update)(void *context, uint64_t gpa, uint64_t seen, uint64_t entry);
    void (*fetch)(void *context, uint64_t gpa);     /* NULL, or a hint of pagewalk_translate_many(): load will ask for it */
} pagewalk_memory;

typedef struct {
    uint64_t gpa;               /* of the address asked for */
    uint64_t room;              /* bytes from there to the end of the page it is in */
} pagewalk_result;

typedef struct {
    uint32_t reason;
    bool missing;               /* an entry is not present: a page request may help */
    bool fetched;               /* fetch_addr is valid: the gpa of the entry that is to blame */
    uint64_t fetch_addr;
} pagewalk_fault;

/* For guest-physical addresses of `width` bits; huge: 1 GiB pages are known.  At most `most` translations are kept; one
 * more empties the cache.  NULL when out of memory. */
pagewalk *pagewalk_new(unsigned width, bool huge, size_t most);
void pagewalk_free(pagewalk *);

/* Bind the table at `root`, of 4 or 5 levels.  -EBUSY if the PASID has one, -EINVAL, -ENOMEM. */
int pagewalk_bind(pagewalk *, uint32_t pasid, uint64_t root, unsigned levels, unsigned flags);

/* Forget the table of a PASID and what is cached of it; false if it has none. */
bool pagewalk_unbind(pagewalk *, uint32_t pasid);
void pagewalk_unbind_all(pagewalk *);
/* A number that no other bind of the process has had; 0: nothing is bound. */
uint64_t pagewalk_bound(pagewalk *, uint64_t pasid);

/* Translate one address; -EFAULT with *fault filled in.  Sets accessed and dirty flags of a walk that succeeds. */
int pagewalk_translate(pagewalk *, const pagewalk_memory *, uint64_t pasid, uint64_t address, unsigned access,
                       pagewalk_result *, pagewalk_fault *);

/* The same for n addresses; UINT64_MAX where it would fail. */
void pagewalk_translate_many(pagewalk *, const pagewalk_memory *, uint64_t pasid, const uint64_t *addresses, uint64_t *gpas,
                             size_t n, unsigned access);

/* Drop the pages of a PASID that have a byte of the 2^order 4 KiB pages around `address`; order above 51: all. */
void pagewalk_flush_pages(pagewalk *, uint32_t pasid, uint64_t address, unsigned order);
/* The same of exactly these 4 KiB pages. */
void pagewalk_flush_range(pagewalk *, uint32_t pasid, uint64_t address, uint64_t npages);
/* Drop what is cached of a PASID except global pages. */
void pagewalk_flush_pasid(pagewalk *, uint32_t pasid);
void pagewalk_flush_all(pagewalk *);

size_t pagewalk_cached(pagewalk *);         /* translations */
size_t pagewalk_cache_bytes(pagewalk *);    /* memory that they take */
#endif
