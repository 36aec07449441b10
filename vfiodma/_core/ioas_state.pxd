# The state of one iommufd (an open /dev/iommu), shared by the modules that act on it:
#   ioas_objects the table of ids
#   ioas_pages   the memory behind areas: pinned and charged once, however many areas show it
#   ioas_dirty   which pages devices wrote, by page table
#   ioas         I/O address spaces: areas, reserved and allowed ranges, map, copy, unmap
#   hwpt         page tables of the hardware, devices that are attached to them
#   hwpt_nested  page tables of guests on top of them, and what devices do through both
#   ioas_access  emulated devices, which reach an address space without a page table
#   ioas_ioctl   the raw door;  ioas_compat  its VFIO container dialect
#   ioas_context the class that owns it all
#
# Lock order: lock, then iotlb.  `lock` serialises everything; nothing that holds it takes the GIL.  `iotlb` lets devices
# translate and copy beside each other: read-locked for a DMA access, write-locked while areas, their pages or the
# attachment of devices change.
from libc.stdint cimport UINT64_MAX, int64_t, uint32_t, uint64_t

from .state cimport (
    PS, iova_range, pagewalk, pin, pthread_mutex_t, pthread_rwlock_t, rangemap, rangemap_entry, rangemap_find, rangemap_lower,
)

cdef enum:
    ACCOUNT_NONE = 0                        # the mapper had CAP_IPC_LOCK
    ACCOUNT_USER = 1                        # the user's locked memory, across processes
    ACCOUNT_PROCESS = 2                     # the process's, as Type1 does

cdef enum:                                  # what stands behind an id
    FREE = 0
    IOAS = 1
    HWPT = 2
    DEVICE = 3
    ACCESS = 4
    FAULT_QUEUE = 5
    OTHER = 6                               # belongs to whoever asked for the id
    NESTED = 7                              # an hwpt_t with a parent

cdef enum:                                  # whose format the page tables of guests have
    NEST_NONE = 0
    NEST_VTD = 1
    NEST_SELFTEST = 2                       # the mock IOMMU of the kernel's self-test: it walks nothing

cdef struct object_t:
    int kind
    void *data

cdef struct pinned_t:                       # one pin, shared by the pieces that were cut from it
    pin *memory
    uint64_t first, users

cdef struct piece_t:                        # neighbouring pages of a pages object that the same number of users hold
    uint64_t first, last, users
    pinned_t *pinned
    piece_t *next

cdef struct pages_t:                        # memory that areas show parts of
    uint64_t start                          # page-aligned user address, or file offset: what automatic IOVAs are aligned by
    uint64_t npages, areas
    piece_t *pieces                         # what is pinned, ascending
    uint64_t npinned
    bint writable, is_file
    int fd                                  # is_file: a duplicate of the caller's
    void *mapping                           # is_file: our own mapping of it, once it was needed
    int account
    context_t *context

cdef struct dirty_t:                        # pages of an area that were written through one page table
    hwpt_t *hwpt
    uint64_t *words
    dirty_t *next

cdef struct area_t:
    uint64_t iova, last
    pages_t *pages
    uint64_t offset                         # of iova in the pages object, bytes
    uint32_t prot
    bint held                               # its pages are pinned for the page tables
    bint small                              # mapped with large pages disabled
    uint64_t pins                           # of accesses
    dirty_t *dirty

cdef struct reserved_t:
    uint64_t start, last
    void *owner                             # a device or a page table

cdef struct ioas_t:
    uint32_t id
    context_t *context
    rangemap *areas                         # iova -> area_t *
    rangemap *allowed                       # start -> anything; empty = no restriction
    reserved_t *reserved                    # ascending by start
    size_t nreserved, reserved_room
    uint64_t alignment
    uint64_t full_below                     # nothing from the second page up to here is free
    bint small_pages                        # large pages are disabled
    hwpt_t *hwpts
    access_t *accesses
    uint64_t unmaps                         # that wait for an emulated device, without the lock

cdef struct queue_t:                        # of page faults
    uint32_t id
    uint64_t users                          # page tables
    bint open                               # its descriptor is

cdef struct hwpt_t:
    uint32_t id
    ioas_t *ioas
    iova_range aperture
    uint64_t pgsizes
    bint coherent, automatic, nest_parent, tracks, tracking, pasids
    int nest                                # NEST_* of the IOMMU
    bint generic_table                      # the page-table code that AMD v1 uses after 6.12
    uint64_t block                          # generic_table: bytes of a block of contiguous entries
    uint64_t users                          # attached devices, and nested tables
    queue_t *queue                          # where its devices ask for missing pages, or NULL
    hwpt_t *parent                          # the second stage, if this is a guest's table; the fields above are its
    pagewalk *walk                          # the guest's table from the first attachment on, and what is cached of it
    uint64_t root                           # the rest as HWPT_ALLOC gave it
    uint32_t address_width, walk_flags
    hwpt_t *next                            # of the same address space

cdef struct attachment_t:                   # of a PASID of a device
    uint32_t pasid
    hwpt_t *hwpt
    uint64_t serial
    attachment_t *next

cdef struct device_t:
    uint32_t id
    void *group                             # identity of its IOMMU group
    const iova_range *reserved
    size_t nreserved
    iova_range aperture
    uint64_t pgsizes
    bint coherent, nestable, can_track, generic_table
    bint asks_pages                         # it has PRI
    uint32_t npasids                        # PASIDs below it can be attached; 0 = none
    int nest                                # NEST_*
    uint64_t cap, ecap                      # registers of VT-d
    uint64_t block
    hwpt_t *hwpt
    bint nests                              # a guest's table, or a queue to ask for pages, stands before its requests
    uint64_t serial                         # no two attachments have the same
    attachment_t *pasids
    uint32_t hw_type, hw_size
    unsigned char hw_data[64]
    uint64_t hw_capabilities
    device_t *next

cdef struct access_pin_t:
    uint64_t iova, last
    access_pin_t *next

cdef struct access_t:                       # an emulated device's way to an address space
    uint32_t id
    ioas_t *ioas
    access_pin_t *pins
    access_t *next                          # of the same address space

cdef struct context_t:
    pthread_mutex_t lock
    pthread_rwlock_t iotlb
    int version
    object_t *objects                       # by id; 0 is never used
    size_t room, nobjects
    uint32_t lowest                         # no id below it is free
    ioas_t *vfio_ioas
    device_t *devices
    uint64_t attachments                    # the last serial
    bint per_process
    bint no_limit                           # nothing is ever refused or charged
    int64_t memlock_limit
    uint64_t unmaps                         # the same, of all address spaces
    bint dead
    void *owner                             # the Python object, borrowed: hears of unmaps

cdef inline uint64_t lowest_bit(uint64_t value) noexcept nogil:
    return value & (~value + 1)

cdef inline void *object_of(const context_t *c, uint32_t id, int kind) noexcept nogil:
    return c.objects[id].data if id < c.room and c.objects[id].kind == kind else NULL

cdef inline area_t *area_at(ioas_t *ioas, uint64_t iova) noexcept nogil:
    cdef rangemap_entry entry
    return <area_t *> entry.value if rangemap_find(ioas.areas, iova, &entry) else NULL

# The first area that ends at or after iova.
cdef inline area_t *area_from(ioas_t *ioas, uint64_t iova) noexcept nogil:
    cdef rangemap_entry entry
    return <area_t *> entry.value if rangemap_lower(ioas.areas, iova, &entry) else NULL

cdef inline area_t *area_after(ioas_t *ioas, const area_t *area) noexcept nogil:
    return NULL if area.last == UINT64_MAX else area_from(ioas, area.last + 1)
