# The state of one Type1 instance, shared by the modules that act on it:
#   mappings  the table: map, unmap, vaddr invalidation and update, accounting
#   dirty     dirty tracking and its bitmaps
#   attach    groups, domains, IOVA ranges
#   pinning   external pins and DMA of emulated devices
#   nesting   first-stage tables of the nesting series
#   ioctl     the raw door
#   type1     the class that owns an instance
#
# Lock order: lock, then iotlb.  `lock` serialises everything, as the kernel's iommu->lock does; nothing that holds it
# takes the GIL.  `iotlb` lets devices translate and copy beside each other: read-locked for a DMA access, write-locked
# while a mapping or its pages enter or leave the IOMMU.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from posix.time cimport timespec

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef struct pthread_rwlock_t:
        pass
    ctypedef struct pthread_rwlockattr_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_trylock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_cond_init(pthread_cond_t *, void *)
    int pthread_cond_destroy(pthread_cond_t *)
    int pthread_cond_broadcast(pthread_cond_t *)
    int pthread_cond_timedwait(pthread_cond_t *, pthread_mutex_t *, const timespec *)
    int pthread_rwlock_init(pthread_rwlock_t *, pthread_rwlockattr_t *)
    int pthread_rwlock_destroy(pthread_rwlock_t *)
    int pthread_rwlock_rdlock(pthread_rwlock_t *)
    int pthread_rwlock_wrlock(pthread_rwlock_t *)
    int pthread_rwlock_unlock(pthread_rwlock_t *)
    int pthread_rwlockattr_init(pthread_rwlockattr_t *)
    int pthread_rwlockattr_setkind_np(pthread_rwlockattr_t *, int)
    int PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP

cdef extern from "rangemap.h" nogil:
    ctypedef struct rangemap:
        pass
    ctypedef struct rangemap_entry:
        uint64_t start, last, value
    rangemap *rangemap_new()
    void rangemap_free(rangemap *)
    int rangemap_insert(rangemap *, uint64_t start, uint64_t last, uint64_t value)
    int rangemap_remove(rangemap *, uint64_t start, rangemap_entry *out)
    int rangemap_set_value(rangemap *, uint64_t start, uint64_t value)
    bint rangemap_find(rangemap *, uint64_t key, rangemap_entry *out)
    bint rangemap_lower(rangemap *, uint64_t key, rangemap_entry *out)
    bint rangemap_overlaps(rangemap *, uint64_t start, uint64_t last)
    size_t rangemap_count(rangemap *)
    size_t rangemap_copy(rangemap *, uint64_t key, rangemap_entry *out, size_t n)

cdef extern from "pin.h" nogil:
    ctypedef struct pin:
        pass
    int PIN_WRITE, PIN_ZERO_PAGE_FREE, PIN_NO_WRITEBACK, PIN_IN_BATCHES
    int pin_memory(uint64_t vaddr, uint64_t size, unsigned rules, uint64_t allowed, pin **out, uint64_t *counted)
    void pin_release(pin *)
    int pin_read(const pin *, uint64_t offset, void *dst, uint64_t n)
    int pin_write(const pin *, uint64_t offset, const void *src, uint64_t n)
    uint64_t *pin_page(const pin *, uint64_t offset)
    int pin_swap(const pin *, uint64_t offset, uint64_t seen, uint64_t wanted)

cdef extern from "pagewalk.h" nogil:
    ctypedef struct pagewalk:
        pass

# Kernel versions that a model can take; behaviour between two of them is that of the lower.
cdef enum:
    V5_4 = 504
    V5_12 = 512
    VSVA = 513                              # 5.12 with the nesting series
    V6_1 = 601
    V6_12 = 612
    V7_2 = 702

cdef enum:
    PS = 4096                               # CPU page size

cdef extern from "dmapool.h" nogil:         # what the fields are is said there
    ctypedef struct dmapool:
        pass
    ctypedef struct dma_t:
        uint64_t iova, size, exception_in
        uint32_t prot
        bint lock_cap
        uint64_t locked
        pin *pages
        rangemap *pinned
        uint64_t countable
        uint64_t *bitmap
        uint64_t bitmap_words
        dma_t *next
    dmapool *dmapool_new()
    void dmapool_free(dmapool *)
    dma_t *dmapool_take(dmapool *)
    void dmapool_give(dmapool *, dma_t *)
    uint64_t *dmapool_vaddr(const dma_t *, unsigned column)
    bint dmapool_restore(rangemap *mappings, const uint64_t *rows, size_t n, uint64_t pgsize, unsigned column)

cdef struct iova_range:
    uint64_t start, last

cdef struct group_t:                        # a group as the container sees it
    bint emulated, coherent, msi_isolated, nestable, pci
    iova_range aperture
    iova_range *reserved
    size_t nreserved
    uint64_t pgsizes
    bint pinned_scope                       # its devices pin what they write, so dirt is known exactly
    domain_t *domain
    group_t *next                           # in its domain's or the emulated list

cdef struct domain_t:
    group_t *groups
    iova_range aperture
    uint64_t pgsizes
    bint coherent
    domain_t *next

cdef struct type1_t:
    pthread_mutex_t lock
    pthread_rwlock_t iotlb
    pthread_cond_t valid                    # 5.12: somebody waits for a vaddr to be valid again
    int version
    bint v2, nesting, tracking, dead
    bint container_closed                   # its descriptor is gone: nobody can make a vaddr valid any more
    rangemap *mappings                      # iova -> dma_t *
    dmapool *pool                           # where these come from
    dma_t *unfindable                       # up to 6.12: mappings that end at 2**64, which only ALL finds
    domain_t *domains                       # newest first
    group_t *emulated
    iova_range *ranges                      # ascending; none = no restriction
    size_t nranges
    uint64_t pgsizes
    uint32_t dma_avail
    uint64_t vaddr_invalid_count
    uint64_t vaddr_generation               # from 1; a new one makes every vaddr what `vaddrs_valid` says, at once
    bint vaddrs_valid                       # but for those of mappings with exception_in == vaddr_generation
    unsigned vaddr_column                   # of the pool; changes under iotlb
    uint64_t mapped_bytes
    uint64_t non_pinned_groups
    uint64_t unmap_listeners                # open devices that registered an unmap callback
    int64_t memlock_limit
    pagewalk *nest                          # first stage of the one group of a VSVA nesting container; changes under iotlb
    uint8_t *pasids                         # bitmap of allocated PASIDs, borrowed; NULL = none
    void *owner                             # the Type1 object, borrowed: receives unmap callbacks

cdef inline uint64_t min_pgsize(const type1_t *t) noexcept nogil:
    return t.pgsizes & (~t.pgsizes + 1)

cdef inline bint iommu_mapped(const dma_t *dma) noexcept nogil:
    return dma.pages != NULL

cdef inline uint64_t *vaddr_of(const type1_t *t, const dma_t *dma) noexcept nogil:
    return dmapool_vaddr(dma, t.vaddr_column)

cdef inline bint vaddr_valid(const type1_t *t, const dma_t *dma) noexcept nogil:
    return (dma.exception_in == t.vaddr_generation) != t.vaddrs_valid

cdef inline void set_vaddr_valid(const type1_t *t, dma_t *dma, bint valid) noexcept nogil:
    dma.exception_in = 0 if valid == t.vaddrs_valid else t.vaddr_generation

# The first mapping that ends at or after key, or NULL.
cdef inline dma_t *first_from(type1_t *t, uint64_t key) noexcept nogil:
    cdef rangemap_entry entry
    return <dma_t *> entry.value if rangemap_lower(t.mappings, key, &entry) else NULL

cdef inline dma_t *next_of(type1_t *t, const dma_t *dma) noexcept nogil:
    cdef uint64_t last = dma.iova + dma.size - 1
    return NULL if last == <uint64_t> -1 else first_from(t, last + 1)
