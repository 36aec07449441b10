"""The raw door of an iommufd: requests with their structs in the caller's memory.

Bytes are copied in and out exactly where the kernel does it, and nowhere else.  Callers hold the context's lock.
Source: the dispatch rules and the commands of iommufd, Linux 6.12 and 7.2.
"""
from libc.errno cimport (
    E2BIG, EADDRINUSE, EBUSY, EEXIST, EFAULT, EINVAL, EMSGSIZE, ENODEV, ENOENT, ENOMEM, ENOTTY, EOPNOTSUPP, EOVERFLOW, EPERM,
)
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from .hwpt cimport hwpt_alloc, hwpt_arguments, hwpt_destroy
from .hwpt_nested cimport nested_invalidate
from .ioas cimport (
    FIXED_IOVA, READABLE, WRITEABLE, copy_areas, copy_check, disable_large_pages, enable_large_pages, ioas_free, ioas_new,
    map_file, map_user, next_hole, unmap, unmap_all,
)
from .ioas_compat cimport compat_ioctl
from .ioas_dirty cimport dirty_disable, dirty_enable, dirty_get
from .ioas_objects cimport object_add, object_remove
from .ioas_state cimport (
    DEVICE, FAULT_QUEUE, FREE, HWPT, IOAS, NESTED, area_after, area_from, area_t, context_t, device_t, hwpt_t, ioas_t, object_of,
    queue_t,
)
from .ioas_uapi cimport *
from .state cimport (
    PS, V7_2, iova_range, rangemap, rangemap_entry, rangemap_free, rangemap_insert, rangemap_lower, rangemap_new,
)

cdef extern from "usercopy.h" nogil:
    int user_read(void *dst, uint64_t src, size_t n)
    int user_write(uint64_t dst, const void *src, size_t n)

cdef extern from "<linux/capability.h>" nogil:
    int CAP_SYS_RESOURCE

cdef extern from "memlock.h" nogil:
    bint memlock_has_capability(int capability)

cdef enum:
    MAP_FLAGS = FIXED_IOVA | WRITEABLE | READABLE
    MAX_WORDS = 6                       # of any command's argument
    MAX_DEPTH = 524288                  # of event queues, and of entries to invalidate
    OPTION_RLIMIT_MODE = 0
    OPTION_HUGE_PAGES = 1
    OPTION_SET = 0
    OPTION_GET = 1
    VFIO_IOAS_GET = 0
    VFIO_IOAS_SET = 1
    VFIO_IOAS_CLEAR = 2
    FIRST_COMMAND = CMD_DESTROY
    IOMMUFD_TYPE = 0x3b00

ctypedef int (*command_function)(context_t *c, void *args, bint *respond) noexcept nogil

cdef struct command_t:                  # what the kernel knows of one command
    uint32_t minimum, size
    command_function call

cdef command_t[CMD_HW_QUEUE_ALLOC - CMD_DESTROY + 1] commands


cdef ioas_t *ioas_of(const context_t *c, uint32_t id) noexcept nogil:
    return <ioas_t *> object_of(c, id, IOAS)


cdef hwpt_t *any_hwpt(const context_t *c, uint32_t id) noexcept nogil:
    cdef hwpt_t *hwpt = <hwpt_t *> object_of(c, id, HWPT)
    return hwpt if hwpt else <hwpt_t *> object_of(c, id, NESTED)


# ---- objects

cdef int destroy(context_t *c, void *data, bint *respond) noexcept nogil:
    cdef destroy_args *args = <destroy_args *> data
    cdef ioas_t *ioas = ioas_of(c, args.id)
    cdef hwpt_t *hwpt = any_hwpt(c, args.id)
    cdef queue_t *queue = <queue_t *> object_of(c, args.id, FAULT_QUEUE)
    if args.id >= c.room or c.objects[args.id].kind == FREE:
        return -ENOENT
    if ioas:
        if ioas.hwpts or ioas.accesses or ioas.unmaps:
            return -EBUSY
        object_remove(c, ioas.id)
        if c.vfio_ioas == ioas:
            c.vfio_ioas = NULL
        ioas_free(ioas)
        return 0
    if hwpt:
        if hwpt.users:
            return -EBUSY
        hwpt_destroy(hwpt)
        return 0
    if queue and not queue.open and not queue.users:
        object_remove(c, args.id)
        free(queue)
        return 0
    return -EBUSY


cdef int ioas_alloc(context_t *c, void *data, bint *respond) noexcept nogil:
    cdef ioas_alloc_args *args = <ioas_alloc_args *> data
    cdef ioas_t *ioas
    cdef int err
    if args.flags:
        return -EOPNOTSUPP
    ioas = ioas_new(c)
    if not ioas:
        return -ENOMEM
    err = object_add(c, IOAS, ioas, &ioas.id)
    if err:
        ioas_free(ioas)
        return err
    args.out_ioas_id = ioas.id
    respond[0] = True
    return 0


# ---- ranges

cdef int iova_ranges(context_t *c, void *data, bint *respond) noexcept nogil:
    cdef ioas_iova_ranges_args *args = <ioas_iova_ranges_args *> data
    cdef uint32_t room = args.num_iovas, total = 0
    cdef uint64_t start = 0, last
    cdef iova_range found
    cdef ioas_t *ioas
    if args.reserved:
        return -EOPNOTSUPP
    ioas = ioas_of(c, args.ioas_id)
    if not ioas:
        return -ENOENT
    while next_hole(ioas, &start, &last):
        if total < room:
            found.start = start
            found.last = last
            if user_write(args.allowed_iovas + 16 * <uint64_t> total, &found, 16):
                return -EFAULT
        total += 1
        if last == UINT64_MAX:
            break
        start = last + 1
    args.num_iovas = total
    args.out_iova_alignment = ioas.alignment
    respond[0] = True
    return -EMSGSIZE if total > room else 0


cdef int read_ranges(rangemap *ranges, uint64_t address, uint32_t n) noexcept nogil:
    cdef iova_range given
    cdef uint32_t i
    cdef int err
    for i in range(n):
        if user_read(&given, address + 16 * <uint64_t> i, 16):
            return -EFAULT
        if given.start >= given.last:
            return -EINVAL
        err = rangemap_insert(ranges, given.start, given.last, 0)
        if err:
            return -EINVAL if err == -EEXIST else err
    return 0


cdef bint any_reserved(const ioas_t *ioas, rangemap *ranges) noexcept nogil:
    cdef rangemap_entry entry
    cdef size_t i
    for i in range(ioas.nreserved):
        if rangemap_lower(ranges, ioas.reserved[i].start, &entry) and entry.start <= ioas.reserved[i].last:
            return True
    return False


cdef int allow_iovas(context_t *c, void *data, bint *respond) noexcept nogil:
    cdef ioas_allow_iovas_args *args = <ioas_allow_iovas_args *> data
    cdef rangemap *ranges
    cdef ioas_t *ioas
    cdef int err
    if args.reserved:
        return -EOPNOTSUPP
    ioas = ioas_of(c, args.ioas_id)
    if not ioas:
        return -ENOENT
    ranges = rangemap_new()
    if not ranges:
        return -ENOMEM
    err = read_ranges(ranges, args.allowed_iovas, args.num_iovas)
    if not err and any_reserved(ioas, ranges):
        err = -EADDRINUSE
    if not err:
        ranges, ioas.allowed = ioas.allowed, ranges
    rangemap_free(ranges)
    return err


# ---- map, copy, unmap

cdef int check_flags(uint32_t flags) noexcept nogil:
    return 0 if flags & (WRITEABLE | READABLE) else -EINVAL


cdef int ioas_map(context_t *c, void *data, bint *respond) noexcept nogil:
    cdef ioas_map_args *args = <ioas_map_args *> data
    cdef ioas_t *ioas
    if args.flags & ~<uint32_t> MAP_FLAGS or args.reserved:
        return -EOPNOTSUPP
    if args.iova == UINT64_MAX or args.length == UINT64_MAX:
        return -EOVERFLOW
    if check_flags(args.flags):
        return -EINVAL
    ioas = ioas_of(c, args.ioas_id)
    if not ioas:
        return -ENOENT
    respond[0] = True
    return map_user(ioas, args.user_va, args.length, &args.iova, args.flags & (READABLE | WRITEABLE), args.flags & FIXED_IOVA)


cdef int ioas_map_file(context_t *c, void *data, bint *respond) noexcept nogil:
    cdef ioas_map_file_args *args = <ioas_map_file_args *> data
    cdef ioas_t *ioas
    if args.flags & ~<uint32_t> MAP_FLAGS:
        return -EOPNOTSUPP
    if args.iova == UINT64_MAX or args.length == UINT64_MAX:
        return -EOVERFLOW
    if check_flags(args.flags):
        return -EINVAL
    ioas = ioas_of(c, args.ioas_id)
    if not ioas:
        return -ENOENT
    respond[0] = True
    return map_file(ioas, args.fd, args.start, args.length, &args.iova, args.flags & (READABLE | WRITEABLE), args.flags & FIXED_IOVA)


cdef int ioas_copy(context_t *c, void *data, bint *respond) noexcept nogil:
    cdef ioas_copy_args *args = <ioas_copy_args *> data
    cdef ioas_t *source
    cdef ioas_t *target
    cdef int err
    if args.flags & ~<uint32_t> MAP_FLAGS:
        return -EOPNOTSUPP
    if args.length == UINT64_MAX or args.src_iova == UINT64_MAX or args.dst_iova == UINT64_MAX:
        return -EOVERFLOW
    if check_flags(args.flags):
        return -EINVAL
    source = ioas_of(c, args.src_ioas_id)
    if not source:
        return -ENOENT
    err = copy_check(source, args.src_iova, args.length)
    if err:
        return err
    target = ioas_of(c, args.dst_ioas_id)
    if not target:
        return -ENOENT
    respond[0] = True
    return copy_areas(target, source, args.src_iova, args.length, &args.dst_iova, args.flags & (READABLE | WRITEABLE),
                      args.flags & FIXED_IOVA)


cdef int ioas_unmap(context_t *c, void *data, bint *respond) noexcept nogil:
    cdef ioas_unmap_args *args = <ioas_unmap_args *> data
    cdef ioas_t *ioas = ioas_of(c, args.ioas_id)
    cdef uint64_t unmapped
    cdef int err
    if not ioas:
        return -ENOENT
    if args.iova == 0 and args.length == UINT64_MAX:
        err = unmap_all(ioas, &unmapped)
    elif args.iova == UINT64_MAX or args.length == UINT64_MAX:
        return -EOVERFLOW
    else:
        err = unmap(ioas, args.iova, args.length, &unmapped)
        if not err and not unmapped:
            return -ENOENT
    args.length = unmapped
    respond[0] = True
    return err


cdef int change_process(context_t *c, void *data, bint *respond) noexcept nogil:
    """All areas must be of files; the new owner is this process as the old one was, so nothing moves."""
    cdef change_process_args *args = <change_process_args *> data
    cdef ioas_t *ioas
    cdef area_t *area
    cdef size_t i
    if args.reserved:
        return -EOPNOTSUPP
    for i in range(c.room):
        ioas = <ioas_t *> object_of(c, i, IOAS)
        area = area_from(ioas, 0) if ioas else NULL
        while area:
            if not area.pages.is_file:
                return -EINVAL
            area = area_after(ioas, area)
    return 0


# ---- options

cdef int rlimit_mode(context_t *c, option_args *args) noexcept nogil:
    if args.object_id:
        return -EOPNOTSUPP
    if args.op == OPTION_GET:
        args.val64 = 1 if c.per_process else 0
        return 0
    if args.op != OPTION_SET:
        return -EOPNOTSUPP
    if not memlock_has_capability(CAP_SYS_RESOURCE):
        return -EPERM
    if c.nobjects:
        return -EBUSY
    if args.val64 > 1:
        return -EINVAL
    c.per_process = args.val64
    return 0


cdef int huge_pages(ioas_t *ioas, option_args *args) noexcept nogil:
    if args.op == OPTION_GET:
        args.val64 = 0 if ioas.small_pages else 1
        return 0
    if args.op != OPTION_SET:
        return -EOPNOTSUPP
    if args.val64 > 1:
        return -EINVAL
    return enable_large_pages(ioas) if args.val64 else disable_large_pages(ioas)


cdef int option(context_t *c, void *data, bint *respond) noexcept nogil:
    cdef option_args *args = <option_args *> data
    cdef ioas_t *ioas
    if args.reserved:
        return -EOPNOTSUPP
    respond[0] = True
    if args.option_id == OPTION_RLIMIT_MODE:
        return rlimit_mode(c, args)
    if args.option_id != OPTION_HUGE_PAGES:
        return -EOPNOTSUPP
    ioas = ioas_of(c, args.object_id)
    return huge_pages(ioas, args) if ioas else -ENOENT


cdef int vfio_ioas(context_t *c, void *data, bint *respond) noexcept nogil:
    cdef vfio_ioas_args *args = <vfio_ioas_args *> data
    cdef ioas_t *ioas
    if args.reserved:
        return -EOPNOTSUPP
    if args.op == VFIO_IOAS_GET:
        if not c.vfio_ioas:
            return -ENODEV
        args.ioas_id = c.vfio_ioas.id
        respond[0] = True
    elif args.op == VFIO_IOAS_SET:
        ioas = ioas_of(c, args.ioas_id)
        if not ioas:
            return -ENOENT
        c.vfio_ioas = ioas
    elif args.op == VFIO_IOAS_CLEAR:
        c.vfio_ioas = NULL
    else:
        return -EOPNOTSUPP
    return 0


# ---- page tables

cdef int alloc_hwpt(context_t *c, void *data, bint *respond) noexcept nogil:
    cdef hwpt_alloc_args *args = <hwpt_alloc_args *> data
    cdef hwpt_arguments wanted
    if args.reserved:                   # the kernel does not look at __reserved2
        return -EOPNOTSUPP
    wanted.flags = args.flags
    wanted.device = args.dev_id
    wanted.pt = args.pt_id
    wanted.data_type = args.data_type
    wanted.data_len = args.data_len
    wanted.data = args.data_uptr
    wanted.fault = args.fault_id
    respond[0] = True
    return hwpt_alloc(c, &wanted, &args.out_hwpt_id)


cdef int get_hw_info(context_t *c, void *data, bint *respond) noexcept nogil:
    cdef hw_info_args *args = <hw_info_args *> data
    cdef uint32_t known = 1 if c.version >= V7_2 else 0, n
    cdef unsigned char zero[256]
    cdef uint64_t at
    cdef device_t *device
    if args.flags & ~known or args.reserved[0] or args.reserved[1] or args.reserved[2]:
        return -EOPNOTSUPP
    device = <device_t *> object_of(c, args.dev_id, DEVICE)
    if not device:
        return -ENOENT
    # A kind that the driver does not have is refused; 0 is the default.
    if args.flags and args.out_data_type and args.out_data_type != device.hw_type:
        return -EOPNOTSUPP
    n = min(args.data_len, device.hw_size)
    if n and user_write(args.data_uptr, device.hw_data, n):
        return -EFAULT
    memset(zero, 0, sizeof(zero))
    at = args.data_uptr + n
    while n < args.data_len:
        if user_write(at, zero, min(args.data_len - n, <uint32_t> sizeof(zero))):
            return -EFAULT
        at += sizeof(zero)
        n += min(args.data_len - n, <uint32_t> sizeof(zero))
    args.data_len = device.hw_size
    args.out_data_type = device.hw_type
    args.out_max_pasid_log2 = 20 if device.npasids else 0
    args.out_capabilities = device.hw_capabilities
    respond[0] = True
    return 0


cdef int set_dirty_tracking(context_t *c, void *data, bint *respond) noexcept nogil:
    cdef set_dirty_tracking_args *args = <set_dirty_tracking_args *> data
    cdef hwpt_t *hwpt
    if args.flags & ~<uint32_t> 1:
        return -EOPNOTSUPP
    hwpt = <hwpt_t *> object_of(c, args.hwpt_id, HWPT)
    if not hwpt:
        return -ENOENT
    if not hwpt.tracks:
        return -EOPNOTSUPP
    if args.flags:
        return dirty_enable(hwpt)
    dirty_disable(hwpt)
    return 0


cdef int get_dirty_bitmap(context_t *c, void *data, bint *respond) noexcept nogil:
    cdef get_dirty_bitmap_args *args = <get_dirty_bitmap_args *> data
    cdef hwpt_t *hwpt
    if args.flags & ~<uint32_t> 1 or args.reserved:
        return -EOPNOTSUPP
    hwpt = <hwpt_t *> object_of(c, args.hwpt_id, HWPT)
    if not hwpt:
        return -ENOENT
    return dirty_get(hwpt, args.iova, args.length, args.page_size, args.data, not args.flags)


cdef int hwpt_invalidate(context_t *c, void *data, bint *respond) noexcept nogil:
    """Entries of a nested table; entry_num is written back, also on failure.  There are no virtual IOMMUs."""
    cdef invalidate_args *args = <invalidate_args *> data
    cdef uint32_t n = args.entry_num
    cdef hwpt_t *hwpt
    cdef int err
    args.entry_num = 0
    respond[0] = True
    if args.reserved:
        return -EOPNOTSUPP
    if n and (not args.data_uptr or args.entry_len == 0 or args.entry_len > PS or n > MAX_DEPTH):
        return -EINVAL
    hwpt = <hwpt_t *> object_of(c, args.hwpt_id, NESTED)
    if hwpt:
        err = nested_invalidate(hwpt, args.data_type, args.data_uptr, args.entry_len, &n)
        args.entry_num = n
        return err
    if c.version >= V7_2 and args.hwpt_id < c.room and c.objects[args.hwpt_id].kind != FREE:
        return -EINVAL
    return -ENOENT


cdef int fault_queue_alloc(context_t *c, void *data, bint *respond) noexcept nogil:
    return -EOPNOTSUPP if (<fault_alloc_args *> data).flags else NEEDS_DESCRIPTOR


# ---- virtual IOMMUs: no driver that is modelled has them

cdef int viommu_alloc(context_t *c, void *data, bint *respond) noexcept nogil:
    cdef viommu_alloc_args *args = <viommu_alloc_args *> data
    if args.flags or not args.type:
        return -EOPNOTSUPP
    return -EOPNOTSUPP if object_of(c, args.dev_id, DEVICE) else -ENOENT


cdef int vdevice_alloc(context_t *c, void *data, bint *respond) noexcept nogil:
    return -ENOENT                      # viommu_id


cdef int veventq_alloc(context_t *c, void *data, bint *respond) noexcept nogil:
    cdef veventq_alloc_args *args = <veventq_alloc_args *> data
    if args.flags or args.reserved or not args.type:
        return -EOPNOTSUPP
    if not args.veventq_depth or args.veventq_depth > MAX_DEPTH:
        return -EINVAL
    return -ENOENT


cdef int hw_queue_alloc(context_t *c, void *data, bint *respond) noexcept nogil:
    cdef hw_queue_alloc_args *args = <hw_queue_alloc_args *> data
    if args.flags or not args.type:
        return -EOPNOTSUPP
    if not args.length:
        return -EINVAL
    if args.nesting_parent_iova + args.length < args.nesting_parent_iova:
        return -EOVERFLOW
    return -ENOENT


# ---- dispatch

cdef void command(int number, uint32_t minimum, uint32_t size, command_function call) noexcept nogil:
    commands[number - FIRST_COMMAND].minimum = minimum
    commands[number - FIRST_COMMAND].size = size
    commands[number - FIRST_COMMAND].call = call


command(CMD_DESTROY, 8, sizeof(destroy_args), destroy)
command(CMD_IOAS_ALLOC, 12, sizeof(ioas_alloc_args), ioas_alloc)
command(CMD_IOAS_ALLOW_IOVAS, 24, sizeof(ioas_allow_iovas_args), allow_iovas)
command(CMD_IOAS_COPY, 40, sizeof(ioas_copy_args), ioas_copy)
command(CMD_IOAS_IOVA_RANGES, 32, sizeof(ioas_iova_ranges_args), iova_ranges)
command(CMD_IOAS_MAP, 40, sizeof(ioas_map_args), ioas_map)
command(CMD_IOAS_UNMAP, 24, sizeof(ioas_unmap_args), ioas_unmap)
command(CMD_OPTION, 24, sizeof(option_args), option)
command(CMD_VFIO_IOAS, 12, sizeof(vfio_ioas_args), vfio_ioas)
command(CMD_HWPT_ALLOC, 24, sizeof(hwpt_alloc_args), alloc_hwpt)
command(CMD_GET_HW_INFO, 32, sizeof(hw_info_args), get_hw_info)
command(CMD_SET_DIRTY_TRACKING, 16, sizeof(set_dirty_tracking_args), set_dirty_tracking)
command(CMD_GET_DIRTY_BITMAP, 48, sizeof(get_dirty_bitmap_args), get_dirty_bitmap)
command(CMD_HWPT_INVALIDATE, 32, sizeof(invalidate_args), hwpt_invalidate)
command(CMD_FAULT_QUEUE_ALLOC, 16, sizeof(fault_alloc_args), fault_queue_alloc)
command(CMD_IOAS_MAP_FILE, 40, sizeof(ioas_map_file_args), ioas_map_file)
command(CMD_VIOMMU_ALLOC, 24, sizeof(viommu_alloc_args), viommu_alloc)
command(CMD_VDEVICE_ALLOC, 24, sizeof(vdevice_alloc_args), vdevice_alloc)
command(CMD_IOAS_CHANGE_PROCESS, 8, sizeof(change_process_args), change_process)
command(CMD_VEVENTQ_ALLOC, 28, sizeof(veventq_alloc_args), veventq_alloc)
command(CMD_HW_QUEUE_ALLOC, 40, sizeof(hw_queue_alloc_args), hw_queue_alloc)


cdef int check_tail(uint64_t at, uint64_t n) noexcept nogil:
    """What is not known must be 0."""
    cdef unsigned char bytes[256]
    cdef uint64_t part, i
    while n:
        part = min(n, min(<uint64_t> sizeof(bytes), PS - at % PS))      # a byte before a fault counts
        if user_read(bytes, at, part):
            return -EFAULT
        for i in range(part):
            if bytes[i]:
                return -E2BIG
        at += part
        n -= part
    return 0


cdef void undo(context_t *c, uint32_t number, void *args) noexcept nogil:
    """The id of a new object could not be told: it never was."""
    if number == CMD_IOAS_ALLOC:
        ioas_free(ioas_of(c, (<ioas_alloc_args *> args).out_ioas_id))
        object_remove(c, (<ioas_alloc_args *> args).out_ioas_id)
    elif number == CMD_HWPT_ALLOC:
        hwpt_destroy(any_hwpt(c, (<hwpt_alloc_args *> args).out_hwpt_id))


cdef bint writes_on_error(uint32_t number, int err) noexcept nogil:
    return number == CMD_IOAS_IOVA_RANGES and err == -EMSGSIZE or number == CMD_HWPT_INVALIDATE


cdef long iommufd_ioctl(context_t *c, uint32_t request, uint64_t arg) noexcept nogil:
    """Return the ioctl's result, -errno or NEEDS_DESCRIPTOR."""
    cdef uint32_t number = request & 0xff, size
    cdef uint64_t args[MAX_WORDS]
    cdef uint32_t last_known = CMD_HW_QUEUE_ALLOC if c.version >= V7_2 else CMD_FAULT_QUEUE_ALLOC
    cdef bint respond = False, whole
    cdef command_t *known
    cdef int err
    if number < FIRST_COMMAND or number > last_known:
        return compat_ioctl(c, request, arg)
    known = &commands[number - FIRST_COMMAND]
    # Usually all of it is there, and one read is enough.
    whole = user_read(args, arg, known.size) == 0
    if whole:
        memcpy(&size, args, 4)
    elif user_read(&size, arg, 4):
        return -EFAULT
    if request != (IOMMUFD_TYPE | number):
        return -ENOTTY
    if size < known.minimum:
        return -EINVAL
    if size > known.size:
        err = check_tail(arg + known.size, size - known.size)
        if err:
            return err
    if not whole and user_read(args, arg, min(size, known.size)):
        return -EFAULT
    if size < known.size:
        memset(<char *> args + size, 0, known.size - size)
    err = known.call(c, args, &respond)
    if respond and (not err or writes_on_error(number, err)) and user_write(arg, args, min(size, known.size)):
        if not err:
            undo(c, number, args)
        return -EFAULT
    return err
