"""The VFIO container dialect of an iommufd: the old ioctls on one of its address spaces.

Source: the VFIO compatibility of iommufd, Linux 6.12 and 7.2.
"""
from libc.errno cimport EFAULT, EINVAL, ENODEV, ENOMEM, ENOTTY
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.string cimport memset

from .ioas cimport (
    READABLE, WRITEABLE, disable_large_pages, ioas_free, ioas_new, map_user, next_hole, split, unmap, unmap_all,
)
from .ioas_objects cimport object_add
from .ioas_state cimport IOAS, context_t, hwpt_t, ioas_t
from .state cimport PS, iova_range
from .uapi cimport (
    CAP_DMA_AVAIL, CAP_IOVA_RANGE, CHECK_EXTENSION, DMA_CC_IOMMU, EXT_UNMAP_ALL, GET_INFO, INFO_CAPS, INFO_PGSIZES, MAP_DMA, MAP_READ,
    MAP_WRITE, TYPE1_IOMMU, TYPE1v2_IOMMU, UNMAP_ALL, UNMAP_DMA, cap_dma_avail, cap_iova_range, dma_map, dma_unmap,
    type1_info,
)

cdef extern from "usercopy.h" nogil:
    int user_read(void *dst, uint64_t src, size_t n)
    int user_write(uint64_t dst, const void *src, size_t n)

cdef extern from "uapi/vfio.h" nogil:
    enum:
        GET_API_VERSION "UAPI_VFIO_GET_API_VERSION"
        SET_IOMMU "UAPI_VFIO_SET_IOMMU"

cdef enum:
    INFO_MIN = 16                       # the first form of the info struct
    AVAIL_AT = 24
    AVAIL_SIZE = 12
    RANGES_AT = 40


cdef int compat_ioas(context_t *c) noexcept nogil:
    """Make the dialect's address space, if there is none."""
    cdef ioas_t *ioas
    cdef int err
    if c.vfio_ioas:
        return 0
    ioas = ioas_new(c)
    if not ioas:
        return -ENOMEM
    err = object_add(c, IOAS, ioas, &ioas.id)
    if err:
        ioas_free(ioas)
        return err
    c.vfio_ioas = ioas
    return 0


cdef long extension(context_t *c, uint64_t number) noexcept nogil:
    cdef hwpt_t *hwpt
    if number == TYPE1_IOMMU or number == TYPE1v2_IOMMU or number == EXT_UNMAP_ALL:
        return 1
    if number != DMA_CC_IOMMU:
        return 0
    if not c.vfio_ioas:
        return -ENODEV
    hwpt = c.vfio_ioas.hwpts
    while hwpt and hwpt.coherent:
        hwpt = hwpt.next
    return hwpt == NULL


cdef int set_iommu(context_t *c, uint64_t kind) noexcept nogil:
    if kind != TYPE1_IOMMU and kind != TYPE1v2_IOMMU:
        return -EINVAL
    if not c.vfio_ioas:
        return -ENODEV
    # The old type 1 can unmap parts of mappings, which large pages would not allow.
    return disable_large_pages(c.vfio_ioas) if kind == TYPE1_IOMMU else 0


# ---- GET_INFO

cdef uint64_t pgsizes_of(const ioas_t *ioas) noexcept nogil:
    cdef uint64_t sizes = UINT64_MAX
    cdef hwpt_t *hwpt = ioas.hwpts
    while hwpt:
        sizes &= hwpt.pgsizes
        hwpt = hwpt.next
    if sizes & (PS - 1):
        sizes = (sizes & ~<uint64_t> (PS - 1)) | PS
    return max(sizes, ioas.alignment)


cdef int put_ranges(ioas_t *ioas, uint64_t at, uint64_t room, uint64_t *size) noexcept nogil:
    """Write those ranges that fit, and the header if all do; *size = room that is needed."""
    cdef cap_iova_range head
    cdef iova_range found
    cdef uint64_t start = 0, last
    memset(&head, 0, sizeof(head))
    head.header.id = CAP_IOVA_RANGE
    head.header.version = 1
    size[0] = 16
    while next_hole(ioas, &start, &last):
        found.start = start
        found.last = last
        if room >= size[0] + 16 and user_write(at + size[0], &found, 16):
            return -EFAULT
        size[0] += 16
        head.nr_iovas += 1
        if last == UINT64_MAX:
            break
        start = last + 1
    return -EFAULT if room >= size[0] and user_write(at, &head, 16) else 0


cdef int get_info(context_t *c, uint64_t arg) noexcept nogil:
    cdef type1_info info
    cdef cap_dma_avail avail
    cdef uint64_t size, given, total = RANGES_AT
    cdef uint32_t next_ = RANGES_AT
    if user_read(&info, arg, INFO_MIN):
        return -EFAULT
    if info.argsz < INFO_MIN:
        return -EINVAL
    if not c.vfio_ioas:
        return -ENODEV
    given = info.argsz
    memset(&avail, 0, sizeof(avail))
    avail.header.id = CAP_DMA_AVAIL
    avail.header.version = 1
    avail.avail = <uint32_t> -1
    if given >= AVAIL_AT + AVAIL_SIZE and user_write(arg + AVAIL_AT, &avail, AVAIL_SIZE):
        return -EFAULT
    if put_ranges(c.vfio_ioas, arg + RANGES_AT, given - RANGES_AT if given > RANGES_AT else 0, &size):
        return -EFAULT
    if given >= RANGES_AT and user_write(arg + AVAIL_AT + 4, &next_, 4):
        return -EFAULT
    total += size
    info.argsz = total
    info.flags = INFO_PGSIZES | INFO_CAPS
    info.iova_pgsizes = pgsizes_of(c.vfio_ioas)
    info.cap_offset = sizeof(info) if given >= total else 0
    info.pad = 0
    return user_write(arg, &info, min(given, <uint64_t> sizeof(info)))


# ---- MAP, UNMAP

cdef int map_ioctl(context_t *c, uint64_t arg) noexcept nogil:
    cdef dma_map args
    cdef uint32_t prot
    if user_read(&args, arg, sizeof(args)):
        return -EFAULT
    if args.argsz < sizeof(args) or args.flags & ~<uint32_t> (MAP_READ | MAP_WRITE):
        return -EINVAL
    if not c.vfio_ioas:
        return -ENODEV
    prot = (READABLE if args.flags & MAP_READ else 0) | (WRITEABLE if args.flags & MAP_WRITE else 0)
    return map_user(c.vfio_ioas, args.vaddr, args.size, &args.iova, prot, True)


cdef int unmap_ioctl(context_t *c, uint64_t arg) noexcept nogil:
    cdef dma_unmap args
    cdef uint64_t unmapped = 0
    cdef ioas_t *ioas
    cdef int err
    if user_read(&args, arg, sizeof(args)):
        return -EFAULT
    if args.argsz < sizeof(args) or args.flags & ~<uint32_t> UNMAP_ALL:
        return -EINVAL
    ioas = c.vfio_ioas
    if not ioas:
        return -ENODEV
    if args.flags & UNMAP_ALL:
        if args.iova or args.size:
            return -EINVAL
        err = unmap_all(ioas, &unmapped)
    else:
        if ioas.small_pages:
            err = split(ioas, args.iova + args.size - 1)
            if not err and args.iova:
                err = split(ioas, args.iova - 1)
            if err:
                return err
        err = unmap(ioas, args.iova, args.size, &unmapped)
    args.size = unmapped
    return -EFAULT if user_write(arg, &args, sizeof(args)) else err


cdef long compat_ioctl(context_t *c, uint32_t request, uint64_t arg) noexcept nogil:
    """Return the ioctl's result, or -errno."""
    if request == GET_API_VERSION:
        return 0
    if request == CHECK_EXTENSION:
        return extension(c, arg)
    if request == SET_IOMMU:
        return set_iommu(c, arg)
    if request == GET_INFO:
        return get_info(c, arg)
    if request == MAP_DMA:
        return map_ioctl(c, arg)
    if request == UNMAP_DMA:
        return unmap_ioctl(c, arg)
    return -ENOTTY
