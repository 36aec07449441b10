"""The raw door of a Type1 instance: ioctl requests with their structs in the caller's memory.

Bytes are copied in and out exactly where the kernel does it, and nowhere else.  Callers hold the instance's lock.
Source: vfio_iommu_type1_ioctl of Linux 5.4 to 7.2.
"""
from libc.errno cimport EACCES, EFAULT, EINVAL, ENOMEM, ENOTTY
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from .attach cimport enforces_coherency
from .dirty cimport bitmap_arguments_ok, dirty_get, dirty_start, dirty_stop
from .mappings cimport map_dma, unmap_dma
from .nesting cimport describe_nesting, nesting_op
from .state cimport V5_12, V6_1, V6_12, VSVA, min_pgsize, type1_t
from .uapi cimport (
    CAP_DMA_AVAIL, CAP_IOVA_RANGE, CAP_MIGRATION, CHECK_EXTENSION, DIRTY_GET, DIRTY_PAGES, DIRTY_START, DIRTY_STOP, DMA_CC_IOMMU,
    CAP_NESTING, EXT_UNMAP_ALL, EXT_UPDATE_VADDR, GET_INFO, INFO_CAPS, INFO_PGSIZES, MAP_DMA, NESTING_OP, TYPE1_IOMMU,
    TYPE1_NESTING_IOMMU, TYPE1v2_IOMMU,
    UNMAP_ALL, UNMAP_DIRTY, UNMAP_DMA, UNMAP_VADDR, cap_dma_avail, cap_header, cap_iova_range, cap_migration, cap_nesting, dirty_bitmap,
    dirty_bitmap_get, dma_map, dma_unmap, type1_info, user_bitmap,
)

cdef extern from "usercopy.h" nogil:
    int user_read(void *dst, uint64_t src, size_t n)
    int user_write(uint64_t dst, const void *src, size_t n)
    bint user_range_ok(uint64_t address, uint64_t size)

cdef enum:
    MAX_BITMAP_BYTES = 268435456
    INFO_MIN = 16                       # the first form of the info struct
    INFO_CAP_OFFSET = 20                # the form with cap_offset


# ---- extensions

cdef long type1_extension(int version, type1_t *t, uint64_t extension) noexcept nogil:
    """CHECK_EXTENSION of the driver; t is NULL before SET_IOMMU."""
    if extension == TYPE1_IOMMU or extension == TYPE1v2_IOMMU:
        return 1
    if extension == DMA_CC_IOMMU:
        return t != NULL and enforces_coherency(t)
    if extension == TYPE1_NESTING_IOMMU:
        return version <= V6_12
    if extension == EXT_UNMAP_ALL:
        return version >= V5_12
    if extension == EXT_UPDATE_VADDR:
        if version < V6_1:
            return version >= V5_12
        return t != NULL and t.emulated == NULL
    return 0


# ---- GET_INFO

cdef size_t caps_size(const type1_t *t) noexcept nogil:
    cdef size_t avail_size = 16 if t.version > V6_1 else 12     # padded to 8 from 6.6 on
    cdef size_t ranges_size = 16 + 16 * t.nranges if t.nranges else 0
    return (sizeof(cap_migration) + avail_size if t.version >= V5_12 else 0) + ranges_size + (sizeof(cap_nesting) if t.nest else 0)


cdef void put_header(cap_header *header, uint16_t id, uint32_t next) noexcept nogil:
    header.id = id
    header.version = 1
    header.next = next


cdef void put_caps(const type1_t *t, char *info) noexcept nogil:
    """Write the capability chain at offset 24 of the info struct."""
    cdef cap_migration migration
    cdef cap_dma_avail avail
    cdef cap_iova_range ranges
    cdef size_t at = sizeof(type1_info)
    cdef cap_nesting nesting
    cdef size_t avail_size = 16 if t.version > V6_1 else 12
    if t.version >= V5_12:
        memset(&migration, 0, sizeof(migration))
        put_header(&migration.header, CAP_MIGRATION, at + sizeof(migration))
        migration.pgsize_bitmap = min_pgsize(t)
        migration.max_dirty_bitmap_size = MAX_BITMAP_BYTES
        memcpy(info + at, &migration, sizeof(migration))
        at += sizeof(migration)
        put_header(&avail.header, CAP_DMA_AVAIL, at + avail_size if t.nranges or t.nest else 0)
        avail.avail = t.dma_avail
        memcpy(info + at, &avail, 12)
        at += avail_size
    if t.nranges:
        memset(&ranges, 0, sizeof(ranges))
        put_header(&ranges.header, CAP_IOVA_RANGE, at + 16 + 16 * t.nranges if t.nest else 0)
        ranges.nr_iovas = t.nranges
        memcpy(info + at, &ranges, 16)
        memcpy(info + at + 16, t.ranges, 16 * t.nranges)
        at += 16 + 16 * t.nranges
    if t.nest:
        memset(&nesting, 0, sizeof(nesting))
        put_header(&nesting.header, CAP_NESTING, 0)
        describe_nesting(t, &nesting.info)
        memcpy(info + at, &nesting, sizeof(nesting))


cdef int get_info(type1_t *t, uint64_t arg) noexcept nogil:
    cdef type1_info head
    cdef size_t caps = caps_size(t)
    cdef size_t size
    cdef char *info
    cdef int err
    if user_read(&head, arg, INFO_MIN):
        return -EFAULT
    if head.argsz < INFO_MIN:
        return -EINVAL
    if t.version > V6_1:
        size = min(<size_t> head.argsz, sizeof(type1_info))
    else:
        size = INFO_CAP_OFFSET if head.argsz >= INFO_CAP_OFFSET else INFO_MIN
    head.flags = INFO_PGSIZES | (INFO_CAPS if caps else 0)
    head.iova_pgsizes = t.pgsizes
    head.cap_offset = 0
    head.pad = 0
    if caps and head.argsz < sizeof(type1_info) + caps:
        head.argsz = sizeof(type1_info) + caps
        caps = 0
    elif caps:
        head.cap_offset = sizeof(type1_info)
    info = <char *> calloc(1, sizeof(type1_info) + caps)
    if not info:
        return -ENOMEM
    if caps:
        put_caps(t, info)
    err = user_write(arg + sizeof(type1_info), info + sizeof(type1_info), caps) if caps else 0
    if not err:
        err = user_write(arg, &head, size)
    free(info)
    return -EFAULT if err else 0


# ---- MAP, UNMAP, DIRTY_PAGES

cdef int map_ioctl(type1_t *t, uint64_t arg) noexcept nogil:
    cdef dma_map args
    cdef uint32_t known = 7 if t.version >= V5_12 else 3
    if user_read(&args, arg, sizeof(args)):
        return -EFAULT
    if args.argsz < sizeof(args) or args.flags & ~known:
        return -EINVAL
    return map_dma(t, args.iova, args.vaddr, args.size, args.flags)


cdef int unmap_ioctl(type1_t *t, uint64_t arg) noexcept nogil:
    cdef dma_unmap args
    cdef user_bitmap bitmap
    cdef uint32_t known = UNMAP_DIRTY | UNMAP_ALL | UNMAP_VADDR if t.version >= V5_12 else 0
    cdef uint64_t unmapped
    cdef int err
    if user_read(&args, arg, sizeof(args)):
        return -EFAULT
    if args.argsz < sizeof(args) or args.flags & ~known:
        return -EINVAL
    if args.flags & UNMAP_DIRTY:
        if args.flags & (UNMAP_ALL | UNMAP_VADDR) or args.argsz < sizeof(args) + sizeof(bitmap):
            return -EINVAL
        if user_read(&bitmap, arg + sizeof(args), sizeof(bitmap)):
            return -EFAULT
        if not user_range_ok(<uint64_t> bitmap.data, bitmap.size) or not bitmap_arguments_ok(args.size, bitmap.pgsize, bitmap.size):
            return -EINVAL
    else:
        memset(&bitmap, 0, sizeof(bitmap))
    err = unmap_dma(t, args.iova, args.size, args.flags, bitmap.pgsize, <uint64_t> bitmap.data, &unmapped)
    if err:
        return err
    args.size = unmapped
    return user_write(arg, &args, sizeof(args))


cdef int dirty_ioctl(type1_t *t, uint64_t arg) noexcept nogil:
    cdef dirty_bitmap args
    cdef dirty_bitmap_get get
    if not t.v2:
        return -EACCES
    if user_read(&args, arg, sizeof(args)):
        return -EFAULT
    if args.argsz < sizeof(args) or args.flags & ~<uint32_t> 7:
        return -EINVAL
    if args.flags == DIRTY_START:
        return dirty_start(t)
    if args.flags == DIRTY_STOP:
        dirty_stop(t)
        return 0
    if args.flags != DIRTY_GET or args.argsz - sizeof(args) < sizeof(get):
        return -EINVAL
    if user_read(&get, arg + sizeof(args), sizeof(get)):
        return -EFAULT
    return dirty_get(t, get.iova, get.size, get.bitmap.pgsize, get.bitmap.size, <uint64_t> get.bitmap.data)


cdef long type1_ioctl(type1_t *t, uint32_t request, uint64_t arg) noexcept nogil:
    """Return the ioctl's result, or -errno."""
    if request == CHECK_EXTENSION:
        return type1_extension(t.version, t, arg)
    if request == GET_INFO:
        return get_info(t, arg)
    if request == MAP_DMA:
        return map_ioctl(t, arg)
    if request == UNMAP_DMA:
        return unmap_ioctl(t, arg)
    if request == DIRTY_PAGES and t.version >= V5_12:
        return dirty_ioctl(t, arg)
    if request == NESTING_OP and t.version == VSVA:
        return nesting_op(t, arg)
    return -ENOTTY
