"""Pages objects: the memory behind areas of I/O address spaces, pinned and charged once however many areas show it.

A mapping is a new object, copies share one.  Which of its pages are pinned is kept as pieces, cut where users begin and
end, so that every page is charged while somebody holds it and not longer.  Callers hold the context's lock; functions
return 0 or -errno and leave nothing behind when they fail.  Source: accounting and sharing rules of iommufd, Linux 6.12
and 7.2.
"""
from libc.errno cimport EBADF, EFAULT, EINVAL, ENOMEM
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.fcntl cimport fcntl
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.stat cimport fstat, struct_stat
from posix.unistd cimport close

from .ioas_state cimport (
    ACCOUNT_NONE, ACCOUNT_PROCESS, ACCOUNT_USER, context_t, pages_t, piece_t, pinned_t,
)
from .mappings cimport charge_process, uncharge_process
from .state cimport (
    PIN_NO_WRITEBACK, PIN_WRITE, PS, pin, pin_memory, pin_read, pin_release, pin_swap, pin_write, pthread_rwlock_unlock,
    pthread_rwlock_wrlock,
)

cdef extern from "memlock.h" nogil:
    void memlock_user_charge(uint64_t pages)
    void memlock_user_uncharge(uint64_t pages)
    uint64_t memlock_user_allowed(int64_t limit)
    bint memlock_capable()
    void memlock_forget()

cdef extern from "<fcntl.h>" nogil:
    int F_DUPFD_CLOEXEC
    int F_GET_SEALS

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *, size_t, int)
    int MADV_DONTFORK


cdef pages_t *pages_new(context_t *c, uint64_t start, uint64_t npages, bint writable) noexcept nogil:
    cdef pages_t *pages = <pages_t *> calloc(1, sizeof(pages_t))
    if not pages:
        return NULL
    pages.context = c
    pages.start = start
    pages.npages = npages
    pages.writable = writable
    pages.fd = -1
    if c.no_limit or memlock_capable():
        pages.account = ACCOUNT_NONE
    else:
        pages.account = ACCOUNT_PROCESS if c.per_process else ACCOUNT_USER
    return pages


cdef pages_t *pages_of_user(context_t *c, uint64_t start, uint64_t npages, bint writable) noexcept nogil:
    """Memory of this process from a page-aligned address; nothing is looked at before somebody holds it."""
    return pages_new(c, start, npages, writable)


cdef pages_t *pages_of_file(context_t *c, int fd, uint64_t start, uint64_t npages, bint writable, int *err) noexcept nogil:
    """Memory of a file from a page-aligned offset; what kind of file it is shows when somebody holds it."""
    cdef pages_t *pages
    cdef int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0)
    err[0] = -EBADF
    if copy < 0:
        return NULL
    err[0] = -ENOMEM
    pages = pages_new(c, start, npages, writable)
    if not pages:
        close(copy)
        return NULL
    pages.is_file = True
    pages.fd = copy
    return pages


cdef void pages_put(pages_t *pages) noexcept nogil:
    """Free an object that no area shows."""
    if pages.areas:
        return
    if pages.mapping:
        munmap(pages.mapping, pages.npages * PS)
    if pages.fd >= 0:
        close(pages.fd)
    free(pages)


# ---- where the bytes are

cdef int map_file(pages_t *pages) noexcept nogil:
    """Make our own mapping of a file; only memory-backed files that hold the whole range can be pinned."""
    cdef struct_stat info
    cdef int prot = PROT_READ | (PROT_WRITE if pages.writable else 0)
    cdef void *mapping
    # Only memfds answer to seals, as only they can be pinned.
    if fcntl(pages.fd, F_GET_SEALS) < 0 or fstat(pages.fd, &info) or pages.start + pages.npages * PS < pages.start:
        return -EINVAL
    if <uint64_t> info.st_size < pages.start + (pages.npages - 1) * PS + 1:
        return -EINVAL
    mapping = mmap(NULL, pages.npages * PS, prot, MAP_SHARED, pages.fd, pages.start)
    if mapping == MAP_FAILED:
        return -EINVAL
    madvise(mapping, pages.npages * PS, MADV_DONTFORK)
    pages.mapping = mapping
    return 0


cdef int pages_address(pages_t *pages, uint64_t *address) noexcept nogil:
    """Tell at which address of this process the object begins."""
    cdef int err = 0
    if pages.is_file and not pages.mapping:
        err = map_file(pages)
    address[0] = <uint64_t> pages.mapping if pages.is_file else pages.start
    return err


# ---- charging

cdef int charge(pages_t *pages, uint64_t n) noexcept nogil:
    cdef context_t *c = pages.context
    if pages.account == ACCOUNT_USER:
        if n > memlock_user_allowed(c.memlock_limit):
            return -ENOMEM
        memlock_user_charge(n)
    elif pages.account == ACCOUNT_PROCESS:
        if charge_process(n, c.memlock_limit):
            return -ENOMEM
    pages.npinned += n
    return 0


cdef void uncharge(pages_t *pages, uint64_t n) noexcept nogil:
    pages.npinned -= n
    if pages.account == ACCOUNT_USER:
        memlock_user_uncharge(n)
    elif pages.account == ACCOUNT_PROCESS:
        uncharge_process(n)


cdef void forget_user_charges() noexcept nogil:
    memlock_forget()


# ---- pieces

cdef int pin_piece(pages_t *pages, uint64_t first, uint64_t last, piece_t **out) noexcept nogil:
    """Pin pages that nobody holds."""
    cdef uint64_t address, counted, n = last - first + 1
    cdef pin *memory = NULL
    cdef pinned_t *pinned
    cdef piece_t *piece
    cdef int err = pages_address(pages, &address)
    if err:
        return err
    err = pin_memory(address + first * PS, n * PS, PIN_NO_WRITEBACK | (PIN_WRITE if pages.writable else 0), <uint64_t> -1,
                     &memory, &counted)
    if err:
        return err
    # Registers of devices are not counted by pin_memory(), and can't be pinned here.
    if counted != n:
        pin_release(memory)
        return -EFAULT
    pinned = <pinned_t *> calloc(1, sizeof(pinned_t))
    piece = <piece_t *> calloc(1, sizeof(piece_t))
    if not pinned or not piece:
        free(pinned)
        free(piece)
        pin_release(memory)
        return -ENOMEM
    pinned.memory = memory
    pinned.first = first
    pinned.users = 1
    piece.first = first
    piece.last = last
    piece.pinned = pinned
    out[0] = piece
    return 0


cdef int cut(pages_t *pages, uint64_t at) noexcept nogil:
    """Make a piece begin at page `at`, if one goes across it."""
    cdef piece_t *piece = pages.pieces
    cdef piece_t *rest
    while piece and piece.last < at:
        piece = piece.next
    if not piece or piece.first >= at:
        return 0
    rest = <piece_t *> calloc(1, sizeof(piece_t))
    if not rest:
        return -ENOMEM
    rest[0] = piece[0]
    rest.first = at
    rest.pinned.users += 1
    pthread_rwlock_wrlock(&pages.context.iotlb)
    piece.last = at - 1
    piece.next = rest
    pthread_rwlock_unlock(&pages.context.iotlb)
    return 0


cdef uint64_t remove_unused(pages_t *pages) noexcept nogil:
    """Unpin what nobody holds; return how many pages that was."""
    cdef piece_t **link = &pages.pieces
    cdef piece_t *piece
    cdef uint64_t n = 0
    while link[0]:
        piece = link[0]
        if piece.users:
            link = &piece.next
            continue
        pthread_rwlock_wrlock(&pages.context.iotlb)
        link[0] = piece.next
        pthread_rwlock_unlock(&pages.context.iotlb)
        n += piece.last - piece.first + 1
        piece.pinned.users -= 1
        if not piece.pinned.users:
            pin_release(piece.pinned.memory)
            free(piece.pinned)
        free(piece)
    return n


cdef int fill_gaps(pages_t *pages, uint64_t first, uint64_t last, uint64_t *n) noexcept nogil:
    """Pin what is not pinned yet of [first, last], *n pages; new pieces have no user."""
    cdef piece_t **link = &pages.pieces
    cdef piece_t *piece
    cdef uint64_t end
    cdef int err
    while first <= last:
        while link[0] and link[0].last < first:
            link = &link[0].next
        if link[0] and link[0].first <= first:
            if link[0].last >= last:
                break
            first = link[0].last + 1
            continue
        end = min(last, link[0].first - 1) if link[0] else last
        err = pin_piece(pages, first, end, &piece)
        if err:
            return err
        n[0] += end - first + 1
        piece.next = link[0]
        pthread_rwlock_wrlock(&pages.context.iotlb)
        link[0] = piece
        pthread_rwlock_unlock(&pages.context.iotlb)
        if end == last:
            break
        first = end + 1
    return 0


cdef int pages_hold(pages_t *pages, uint64_t first, uint64_t last) noexcept nogil:
    """Pin pages [first, last] for one more user."""
    cdef piece_t *piece
    cdef uint64_t n = 0
    cdef int err = fill_gaps(pages, first, last, &n)
    # A fault anywhere is found before a limit is.
    err = err or cut(pages, first) or cut(pages, last + 1) or charge(pages, n)
    if err:
        remove_unused(pages)
        return err
    piece = pages.pieces
    while piece:
        if piece.first >= first and piece.last <= last:
            piece.users += 1
        piece = piece.next
    return 0


cdef void pages_drop(pages_t *pages, uint64_t first, uint64_t last) noexcept nogil:
    """The opposite of pages_hold() with the same range."""
    cdef piece_t *piece = pages.pieces
    while piece:
        if piece.first >= first and piece.last <= last:
            piece.users -= 1
        piece = piece.next
    uncharge(pages, remove_unused(pages))


cdef int pages_access(pages_t *pages, uint64_t offset, void *data, uint64_t size, bint write) noexcept nogil:
    """A device's access to pages that are held; the caller has `iotlb`."""
    cdef piece_t *piece = pages.pieces
    cdef char *at = <char *> data
    cdef uint64_t part, inside
    cdef int err
    while size:
        while piece and piece.last < offset // PS:
            piece = piece.next
        if not piece or piece.first > offset // PS:
            return -EFAULT
        part = min(size, (piece.last + 1) * PS - offset)
        inside = offset - piece.pinned.first * PS
        err = pin_write(piece.pinned.memory, inside, at, part) if write else pin_read(piece.pinned.memory, inside, at, part)
        if err:
            return err
        offset += part
        at += part
        size -= part
    return 0


cdef int pages_swap(pages_t *pages, uint64_t offset, uint64_t seen, uint64_t wanted) noexcept nogil:
    """A device puts a word where another is, as pages_access(); -EAGAIN: there is another by now."""
    cdef piece_t *piece = pages.pieces
    while piece and piece.last < offset // PS:
        piece = piece.next
    if not piece or piece.first > offset // PS:
        return -EFAULT
    return pin_swap(piece.pinned.memory, offset - piece.pinned.first * PS, seen, wanted)
