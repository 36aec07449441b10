/* Locked-memory accounting: the process's own (VmLck) and what the software IOMMU has charged to it, against RLIMIT_MEMLOCK. */
#ifndef VFIODMA_MEMLOCK_H
#define VFIODMA_MEMLOCK_H
#include <stdbool.h>
#include <stdint.h>

#define MEMLOCK_PROCESS (-1)        /* the limit is the process's RLIMIT_MEMLOCK */
#define MEMLOCK_UNLIMITED (-2)      /* nothing is refused */

void memlock_charge(uint64_t pages);
void memlock_uncharge(uint64_t pages);

/* Pages charged here and not given back. */
uint64_t memlock_charged(void);

/* Pages that mlock() and its like hold: VmLck of /proc/self/status. */
uint64_t memlock_vmlck(void);

/* Pages that may still be charged under `limit` (bytes, or one of the above); UINT64_MAX = any number. */
uint64_t memlock_allowed(int64_t limit, bool capable);

/* The user's own account, which iommufd charges: it knows nothing of what the process has locked, and the other way round. */
void memlock_user_charge(uint64_t pages);
void memlock_user_uncharge(uint64_t pages);
uint64_t memlock_user_charged(void);
uint64_t memlock_user_allowed(int64_t limit);

/* Does the calling thread have CAP_IPC_LOCK? */
bool memlock_capable(void);

/* The same for any capability, by number. */
bool memlock_has_capability(int capability);

/* In a forked child: nothing is charged to this process yet. */
void memlock_forget(void);
#endif
