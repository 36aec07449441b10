"""Dirty tracking of page tables: which pages devices really wrote, one bit a page of the table's smallest size.

Devices set bits under the read side of `iotlb`, with atomic operations; a report takes them away in the same manner, so
that no write is lost.  Source: dirty tracking of iommufd, Linux 6.12 and 7.2.
"""
from libc.errno cimport EINVAL, ENOMEM, EOPNOTSUPP, EOVERFLOW
from libc.stdint cimport UINT64_MAX, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from .ioas_state cimport area_after, area_at, area_from, area_t, dirty_t, hwpt_t, ioas_t, lowest_bit
from .state cimport PS, V7_2, pthread_rwlock_unlock, pthread_rwlock_wrlock

cdef extern from "usercopy.h" nogil:
    int user_read(void *dst, uint64_t src, size_t n)
    int user_write(uint64_t dst, const void *src, size_t n)

cdef extern from *:
    """
    static inline void atomic_or(uint64_t *word, uint64_t bits) { __atomic_fetch_or(word, bits, __ATOMIC_RELEASE); }
    static inline void atomic_clear(uint64_t *word, uint64_t bits) { __atomic_fetch_and(word, ~bits, __ATOMIC_ACQ_REL); }
    static inline uint64_t atomic_load(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
    """
    void atomic_or(uint64_t *word, uint64_t bits) nogil
    void atomic_clear(uint64_t *word, uint64_t bits) nogil
    uint64_t atomic_load(const uint64_t *word) nogil
    int trailing_zeros "__builtin_ctzll" (unsigned long long) nogil

cdef enum:
    WINDOW = 4096                           # bytes of the caller's bitmap that are written at once

cdef struct writer_t:                       # ORs ascending runs of bits into the caller's memory
    uint64_t data
    uint64_t window                         # index of the window that is being filled
    uint64_t low, high                      # bytes of it that have bits; none when low > high
    unsigned char bytes[WINDOW]


# ---- bits of one area

cdef uint64_t granule_of(const hwpt_t *hwpt) noexcept nogil:
    return lowest_bit(hwpt.pgsizes)


cdef dirty_t *dirty_of(const area_t *area, const hwpt_t *hwpt) noexcept nogil:
    cdef dirty_t *dirty = area.dirty
    while dirty and dirty.hwpt != hwpt:
        dirty = dirty.next
    return dirty


cdef uint64_t bits_of(const area_t *area, const hwpt_t *hwpt) noexcept nogil:
    return (area.last - area.iova) // granule_of(hwpt) + 1


cdef int dirty_add(area_t *area, hwpt_t *hwpt) noexcept nogil:
    cdef dirty_t *dirty = <dirty_t *> calloc(1, sizeof(dirty_t))
    if not dirty:
        return -ENOMEM
    dirty.words = <uint64_t *> calloc(bits_of(area, hwpt) // 64 + 1, 8)
    if not dirty.words:
        free(dirty)
        return -ENOMEM
    dirty.hwpt = hwpt
    dirty.next = area.dirty
    area.dirty = dirty
    return 0


cdef int dirty_prepare(ioas_t *ioas, area_t *area) noexcept nogil:
    """Give a new area its bits in every table that tracks."""
    cdef hwpt_t *hwpt = ioas.hwpts
    cdef int err = 0
    while hwpt and not err:
        if hwpt.tracking:
            err = dirty_add(area, hwpt)
        hwpt = hwpt.next
    return err


cdef void dirty_forget(area_t *area, const hwpt_t *hwpt) noexcept nogil:
    """Free the bits of one table, or of all when it is NULL; no device reaches them any more."""
    cdef dirty_t **link = &area.dirty
    cdef dirty_t *dirty
    while link[0]:
        dirty = link[0]
        if hwpt == NULL or dirty.hwpt == hwpt:
            link[0] = dirty.next
            free(dirty.words)
            free(dirty)
        else:
            link = &dirty.next


cdef int dirty_split(area_t *area, area_t *rest) noexcept nogil:
    """Make room for the bits of `rest`, which will be the end of `area`."""
    cdef dirty_t *dirty = area.dirty
    cdef int err = 0
    while dirty and not err:
        err = dirty_add(rest, dirty.hwpt)
        dirty = dirty.next
    return err


cdef void dirty_move(area_t *area, area_t *rest) noexcept nogil:
    """Move the bits of `rest` from `area`, which ends before it now."""
    cdef dirty_t *dirty = rest.dirty
    cdef dirty_t *whole
    cdef uint64_t i, shift
    while dirty:
        whole = dirty_of(area, dirty.hwpt)
        shift = (rest.iova - area.iova) // granule_of(dirty.hwpt)
        for i in range(bits_of(rest, dirty.hwpt)):
            if whole.words[(i + shift) // 64] >> (i + shift) % 64 & 1:
                dirty.words[i // 64] |= <uint64_t> 1 << i % 64
        dirty = dirty.next


cdef void dirty_mark(area_t *area, const hwpt_t *hwpt, uint64_t iova, uint64_t size) noexcept nogil:
    """A device has written [iova, iova + size) of the area; the caller has `iotlb`."""
    cdef dirty_t *dirty = dirty_of(area, hwpt)
    cdef uint64_t bit, last
    if not dirty or not hwpt.tracking:
        return
    bit = (iova - area.iova) // granule_of(hwpt)
    last = (iova - area.iova + size - 1) // granule_of(hwpt)
    while bit <= last:
        atomic_or(&dirty.words[bit // 64], (UINT64_MAX << bit % 64) & (UINT64_MAX >> (63 - min(last, bit | 63) % 64)))
        bit = (bit | 63) + 1


# ---- switching

cdef int dirty_enable(hwpt_t *hwpt) noexcept nogil:
    """Switch tracking on; what was pending is dropped, also when it was on."""
    cdef area_t *area = area_from(hwpt.ioas, 0)
    cdef dirty_t *dirty
    cdef int err = 0
    pthread_rwlock_wrlock(&hwpt.ioas.context.iotlb)
    while area and not err:
        dirty = dirty_of(area, hwpt)
        if dirty:
            memset(dirty.words, 0, (bits_of(area, hwpt) // 64 + 1) * 8)
        else:
            err = dirty_add(area, hwpt)
        area = area_after(hwpt.ioas, area)
    if not err:
        hwpt.tracking = True
    pthread_rwlock_unlock(&hwpt.ioas.context.iotlb)
    return err


cdef void dirty_disable(hwpt_t *hwpt) noexcept nogil:
    pthread_rwlock_wrlock(&hwpt.ioas.context.iotlb)
    hwpt.tracking = False
    pthread_rwlock_unlock(&hwpt.ioas.context.iotlb)


# ---- the caller's bitmap

cdef void flush(writer_t *w) noexcept nogil:
    """Memory that can't be read or written loses its bits without a word, as in the kernel."""
    cdef unsigned char theirs[WINDOW]
    cdef uint64_t i, n, at
    if w.low <= w.high:
        n = w.high - w.low + 1
        at = w.data + w.window * WINDOW + w.low
        if user_read(theirs, at, n) == 0:
            for i in range(n):
                theirs[i] |= w.bytes[w.low + i]
            user_write(at, theirs, n)
        memset(&w.bytes[w.low], 0, n)
    w.low = WINDOW
    w.high = 0


cdef void report(writer_t *w, uint64_t first, uint64_t last) noexcept nogil:
    """Set bits [first, last] of the caller's bitmap."""
    cdef uint64_t bit = first, byte, end
    while bit <= last:
        byte = bit // 8
        if byte // WINDOW != w.window:
            flush(w)
            w.window = byte // WINDOW
        byte %= WINDOW
        w.low = min(w.low, byte)
        w.high = max(w.high, byte)
        end = min(last, bit | 7)
        w.bytes[byte] |= (0xff << bit % 8) & (0xff >> (7 - end % 8))
        if end == UINT64_MAX:
            break
        bit = end + 1


# ---- reports

cdef uint64_t next_set(const uint64_t *words, uint64_t bit, uint64_t last) noexcept nogil:
    """The first set bit of [bit, last]; more than last when there is none."""
    cdef uint64_t i, word
    for i in range(bit // 64, last // 64 + 1):
        word = atomic_load(&words[i])
        if i == bit // 64:
            word &= UINT64_MAX << bit % 64
        if word:
            return i * 64 + trailing_zeros(word)
    return UINT64_MAX


cdef void clear_bits(uint64_t *words, uint64_t bit, uint64_t last) noexcept nogil:
    while bit <= last:
        atomic_clear(&words[bit // 64], (UINT64_MAX << bit % 64) & (UINT64_MAX >> (63 - min(last, bit | 63) % 64)))
        bit = (bit | 63) + 1


cdef uint64_t block_of(const area_t *area, const hwpt_t *hwpt) noexcept nogil:
    """Pages of the area's blocks of contiguous entries, 1 when every page is an entry of its own."""
    cdef uint64_t block = min(hwpt.block, <uint64_t> PS) if area.small else hwpt.block
    if not hwpt.generic_table or block <= granule_of(hwpt):
        return 1
    return 1 if (area.iova ^ (area.pages.start + area.offset)) & (block - 1) else block // granule_of(hwpt)


cdef void read_area(const area_t *area, const hwpt_t *hwpt, uint64_t iova, uint64_t last, uint64_t base, unsigned shift,
                    bint clear, writer_t *w) noexcept nogil:
    """Report what is dirty in [iova, last] of an area."""
    cdef dirty_t *dirty = dirty_of(area, hwpt)
    cdef uint64_t granule = granule_of(hwpt), block = block_of(area, hwpt)
    cdef uint64_t low = (iova - area.iova) // granule, high = (last - area.iova) // granule
    cdef uint64_t phase = area.iova // granule % block, count = bits_of(area, hwpt)
    cdef uint64_t bit, first, end, from_, to, run
    if not dirty:
        return
    bit = low - min(low, (low + phase) % block)
    while True:
        bit = next_set(dirty.words, bit, min(count - 1, high - (high + phase) % block + block - 1))
        if bit >= count:
            return
        first = end = bit
        if (bit + phase) % block <= bit and bit - (bit + phase) % block + block <= count:
            first = bit - (bit + phase) % block
            end = first + block - 1
        elif bit > high:
            return
        if block == 1:
            run = ~(atomic_load(&dirty.words[bit // 64]) >> bit % 64)
            end = min(high, bit + trailing_zeros(run) - 1 if run else bit | 63)
        from_, to = max(first, low), min(end, high)
        if from_ <= to:
            if clear:
                clear_bits(dirty.words, first, end)
            # A block that is read whole is measured by the index of its last entry, and so loses that entry.
            if block > 1 and end > first and from_ == first and to == end:
                to -= 1
            report(w, (area.iova + from_ * granule - base) >> shift, (area.iova + (to + 1) * granule - 1 - base) >> shift)
        bit = end + 1
        if bit >= count:
            return


cdef int check_range(hwpt_t *hwpt, uint64_t iova, uint64_t length, uint64_t page_size) noexcept nogil:
    cdef uint64_t last = iova + (length - 1), mask = hwpt.ioas.alignment - 1
    if length == 0 and hwpt.ioas.context.version < V7_2:
        return -EINVAL
    if iova and length - 1 > UINT64_MAX - iova:
        return -EOVERFLOW
    if iova & mask or (last + 1) & mask or page_size == 0:
        return -EINVAL
    # A mask, not a remainder: page sizes that are no power of two pass where it happens to be 0.
    if iova & (page_size - 1) or (last + 1) & (page_size - 1):
        return -EINVAL
    return 0 if hwpt.tracks else -EOPNOTSUPP


cdef int dirty_get(hwpt_t *hwpt, uint64_t iova, uint64_t length, uint64_t page_size, uint64_t data, bint clear) noexcept nogil:
    """OR the dirty bits of the range into the caller's bitmap, up to the first hole."""
    cdef uint64_t at = iova, last = iova + (length - 1)
    cdef area_t *area
    cdef writer_t w
    cdef int err = check_range(hwpt, iova, length, page_size)
    if err:
        return err
    if not hwpt.tracking and not hwpt.generic_table:
        return 0
    w.data = data
    w.window = 0
    w.low = WINDOW
    w.high = 0
    memset(w.bytes, 0, WINDOW)
    area = area_at(hwpt.ioas, at)
    while area:
        read_area(area, hwpt, at, min(area.last, last), iova, trailing_zeros(page_size), clear, &w)
        if area.last >= last:
            break
        at = area.last + 1
        area = area_at(hwpt.ioas, at)
    flush(&w)
    return 0
