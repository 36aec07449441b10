"""Which pages the process itself has written: by write protection, or by comparison with what was sent."""
import os
import threading

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer, Py_buffer
from libc.errno cimport EBADF, EBUSY, EEXIST, EINVAL, ENOMEM, ENOSYS, EOPNOTSUPP, EPERM, EPROTO
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from .args cimport acquire_rows, u64
from .errno cimport raise_errno

cdef extern from "pagemap.h" nogil:
    int writes_open()
    int writes_watch(int uffd, uint64_t vaddr, uint64_t size)
    int writes_unwatch(int uffd, uint64_t vaddr, uint64_t size)
    int writes_harvest(int pagemap, uint64_t vaddr, uint64_t size, uint64_t pgsize, uint64_t *words, uint64_t first, uint64_t *found)

cdef extern from "missing.h" nogil:
    int missing_open()
    int missing_register(int uffd, uint64_t vaddr, uint64_t size)
    int missing_unregister(int uffd, uint64_t vaddr, uint64_t size)
    int missing_next(int uffd, uint64_t *addresses, size_t max, int timeout)
    int missing_place(int uffd, uint64_t vaddr, const void *content, uint64_t size, uint64_t *placed)
    int missing_wake(int uffd, uint64_t vaddr, uint64_t size)
    int missing_fill(int uffd, uint64_t vaddr, uint64_t size)
    int missing_discard(uint64_t vaddr, uint64_t pgsize, const uint64_t *words, uint64_t npages, int shared)
    int missing_keep_from_children(uint64_t vaddr, uint64_t size, int keep)
    int missing_claim(uint64_t *words, uint64_t npages, const uint64_t *runs, size_t n, uint64_t *total)
    void missing_unclaim(uint64_t *words, uint64_t first, uint64_t n)

cdef extern from "guard.h" nogil:
    ctypedef struct guard_t "struct guard":
        pass
    int guard_start(guard_t **guard, int uffd, int pidfd, const uint64_t *ranges, size_t nranges)
    void guard_stop(guard_t *guard)

cdef extern from *:
    int __builtin_popcountll(unsigned long long) nogil

cdef extern from "pagehash.h" nogil:
    ctypedef struct pagehash_key:
        uint64_t word[8]
    uint64_t pagehash_differ(const pagehash_key *, const void *, uint64_t npages, size_t pgsize, const uint64_t *, uint64_t *words)
    void pagehash_note(const pagehash_key *, const uint64_t *runs, size_t nruns, const void *content, size_t pgsize, uint64_t *)


cdef int check_place(str operation, uint64_t vaddr, uint64_t size, uint64_t pgsize) except -1:
    if pgsize < 4096 or pgsize & (pgsize - 1) or size == 0 or vaddr % 4096 or size % pgsize or vaddr + size < vaddr:
        raise_errno(EINVAL, operation, None, size, f"memory at {vaddr:#x} is not whole pages of {pgsize} bytes")
    return 0


cdef int take_bitmap(object into, Py_buffer *view, uint64_t npages) except -1:
    PyObject_GetBuffer(into, view, PyBUF_SIMPLE | PyBUF_WRITABLE)
    if <uint64_t> view.len < (npages + 63) // 64 * 8:
        PyBuffer_Release(view)
        raise_errno(EINVAL, "harvest", None, None, f"{view.len} bytes of bitmap are too few for {npages} pages")
    return 0


cdef class WriteWatch:
    """Writes of this process to its own memory, found by the kernel.

    Parameters
    ----------
    vaddr, size : int
        Bytes; multiples of the page size of what is mapped there (2 MiB for hugetlb memory).
    pgsize : int
        Bytes a bit stands for.

    Raises
    ------
    UnsupportedError
        EOPNOTSUPP, ENOSYS: the kernel has no asynchronous write protection (Linux 6.7), or not for such memory.
    DmaPermissionError
        EPERM: userfaultfd is not for this user.

    Notes
    -----
    Anonymous, memfd, hugetlb and transparent huge pages; a huge page counts as a whole.  Writes through other mappings
    of the same memory (another process, a device) are not seen.  The GIL is released.
    Source: userfaultfd(2) with UFFD_FEATURE_WP_ASYNC; PAGEMAP_SCAN of Documentation/admin-guide/mm/pagemap.rst.
    """
    cdef int uffd, pagemap
    cdef readonly uint64_t vaddr, size, pgsize

    def __cinit__(self, vaddr, size, pgsize=4096):
        cdef int err
        self.uffd = self.pagemap = -1
        self.vaddr, self.size, self.pgsize = u64("watch", vaddr), u64("watch", size), u64("watch", pgsize)
        check_place("watch", self.vaddr, self.size, self.pgsize)
        self.uffd = writes_open()
        if self.uffd < 0:
            self.refuse(self.uffd)
        self.pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        with nogil:
            err = writes_watch(self.uffd, self.vaddr, self.size)
        if err:
            # EINVAL and EBUSY: file memory of another kind, or somebody else watches it.
            self.refuse(-EOPNOTSUPP if err == -EINVAL else err)

    cdef int refuse(self, int err) except -1:
        hint = "this memory is watched by somebody else"
        if err in (-EOPNOTSUPP, -ENOSYS):
            hint = "the kernel can't write-protect this memory asynchronously (Linux 6.7 can, for anonymous, memfd and hugetlb memory)"
        elif err == -EPERM:
            hint = "userfaultfd is not for this user: open /proc/sys/vm/unprivileged_userfaultfd, or run with CAP_SYS_PTRACE"
        return raise_errno(-err, "watch", None, self.size, hint)

    def harvest(self, into):
        """OR the pages written since the last harvest into ``into``, and watch them anew.

        Parameters
        ----------
        into : writable buffer
            Little-endian u64 words, bit 0 = the page at ``vaddr``.

        Returns
        -------
        int
            Pages reported.

        Raises
        ------
        DmaPermissionError
            EPERM: the memory was unmapped or mapped anew meanwhile; what was written there is not known.
        ClosedError
            EBADF: after stop().
        """
        cdef Py_buffer view
        cdef uint64_t found = 0
        cdef int err
        take_bitmap(into, &view, self.size // self.pgsize)
        try:
            with nogil:
                err = writes_harvest(self.pagemap, self.vaddr, self.size, self.pgsize, <uint64_t *> view.buf, 0, &found)
        finally:
            PyBuffer_Release(&view)
        if err:
            raise_errno(-err, "harvest", None, self.size, "the memory was unmapped, or mapped anew, while it was watched"
                        if err == -EPERM else "")
        return found

    def stop(self):
        """Stop watching; idempotent."""
        if self.uffd >= 0:
            with nogil:
                writes_unwatch(self.uffd, self.vaddr, self.size)
            os.close(self.uffd)
        if self.pagemap >= 0:
            os.close(self.pagemap)
        self.uffd = self.pagemap = -1

    def __dealloc__(self):
        if self.uffd >= 0:
            os.close(self.uffd)
        if self.pagemap >= 0:
            os.close(self.pagemap)


cdef class PageHashes:
    """Pages that differ from what was sent, by their hashes: for kernels that can't watch writes.

    Parameters
    ----------
    memory : buffer
        Whole pages; held until this object goes.
    pgsize : int

    Notes
    -----
    ``note`` what was sent (from the bytes sent, not from memory, which may have changed since); ``harvest`` reads all of
    the memory, about as fast as it can be copied.  The hashes are keyed with random numbers, 8 bytes a page; two different
    pages are taken for the same with a probability of 2**-64.  The GIL is released.
    """
    cdef Py_buffer memory
    cdef pagehash_key key
    cdef uint64_t *hashes
    cdef readonly uint64_t npages, pgsize

    def __cinit__(self, memory, pgsize=4096):
        cdef bytes key = os.urandom(sizeof(pagehash_key))
        self.pgsize = u64("page_hashes", pgsize)
        PyObject_GetBuffer(memory, &self.memory, PyBUF_SIMPLE)
        self.npages = self.memory.len // self.pgsize if self.pgsize else 0
        check_place("page_hashes", 0, self.memory.len, self.pgsize)
        memcpy(&self.key, <const char *> key, sizeof(self.key))
        # 0 for what was never sent: such a page differs, but for one chance in 2**64.
        self.hashes = <uint64_t *> calloc(self.npages, 8)
        if not self.hashes:
            raise_errno(ENOMEM, "page_hashes")

    def __dealloc__(self):
        free(self.hashes)
        PyBuffer_Release(&self.memory)

    def note(self, runs, content):
        """Note what was sent.

        Parameters
        ----------
        runs : (n, 2) uint64 array
            First page and number of pages.
        content : buffer
            Their bytes, one after another.
        """
        cdef Py_buffer rows, data
        cdef uint64_t *run
        cdef uint64_t pages = 0
        cdef Py_ssize_t n, i
        acquire_rows(runs, &rows, 2, &n, "note")
        try:
            run = <uint64_t *> rows.buf
            for i in range(n):
                if run[2 * i] > self.npages or run[2 * i + 1] > self.npages - run[2 * i]:
                    raise_errno(EINVAL, "note", None, None, f"a run ends behind the {self.npages} pages")
                pages += run[2 * i + 1]
            PyObject_GetBuffer(content, &data, PyBUF_SIMPLE)
            try:
                if <uint64_t> data.len != pages * self.pgsize:
                    raise_errno(EINVAL, "note", None, None, f"{data.len} bytes for {pages} pages")
                with nogil:
                    pagehash_note(&self.key, run, n, data.buf, self.pgsize, self.hashes)
            finally:
                PyBuffer_Release(&data)
        finally:
            PyBuffer_Release(&rows)

    def harvest(self, into):
        """OR the pages that differ from what was sent into ``into`` (u64 words); return their number."""
        cdef Py_buffer view
        cdef uint64_t found
        take_bitmap(into, &view, self.npages)
        try:
            with nogil:
                found = pagehash_differ(&self.key, self.memory.buf, self.npages, self.pgsize, self.hashes, <uint64_t *> view.buf)
        finally:
            PyBuffer_Release(&view)
        return found


cdef class MissingPages:
    """Memory of which some pages are not there: who touches one waits until it is placed.

    Parameters
    ----------
    vaddr, size : int
        Bytes; anonymous memory, or memfd that no other mapping but the aliases touches.
    missing : buffer
        u64 words, bit 0 = the page at ``vaddr``: what these pages hold is thrown away.
    pgsize : int
        Bytes of a page; a multiple of the kernel's.
    shared : bool
        memfd; else anonymous.
    aliases : iterable of (int, int, int)
        Other mappings of the same memory in this process: address, first page, number of pages.  Who touches a missing
        page there waits as well.

    Attributes
    ----------
    left : int
        Pages that were not placed yet.

    Raises
    ------
    DmaPermissionError
        EPERM: userfaultfd is not for this user.
    UnsupportedError
        EOPNOTSUPP, ENOSYS: not with this kernel, or not for such memory (hugetlb).
    BusyError
        EBUSY: somebody else watches the memory, or a page can't be thrown away.  Some may have been.

    Notes
    -----
    The GIL is released.  A Python thread that touches a missing page, by a slice or ``memory.read``, waits *with* the GIL:
    what places pages must be another process then, which got the descriptor by fork.  Pages that are neither missing nor
    in memory (never written) are found by ``next`` as well, and are ``fill``'s.  Other mappings of the same memory do not
    wait.  Any thread may ``close`` while others wait in ``next``.
    Source: userfaultfd(2), UFFDIO_COPY, UFFDIO_ZEROPAGE; madvise(2), MADV_REMOVE, MADV_DONTNEED; mincore(2).
    """
    cdef int uffd, users, closing
    cdef uint64_t *words
    cdef uint64_t *aliases          # address, first page, number of pages of each
    cdef size_t naliases
    cdef guard_t *watcher
    cdef uint64_t *ranges           # start and bytes of all mappings; for the watcher
    cdef readonly uint64_t vaddr, size, pgsize, npages, left
    cdef object lock, placing

    def __cinit__(self, vaddr, size, missing, pgsize=4096, shared=True, aliases=()):
        cdef Py_buffer view
        cdef uint64_t i
        cdef int err
        cdef int is_shared = bool(shared)
        self.uffd = self.closing = -1
        self.vaddr, self.size, self.pgsize = u64("missing", vaddr), u64("missing", size), u64("missing", pgsize)
        check_place("missing", self.vaddr, self.size, self.pgsize)
        self.npages = self.size // self.pgsize
        self.lock, self.placing = threading.Lock(), threading.Lock()
        self.words = <uint64_t *> calloc((self.npages + 63) // 64, 8)
        if not self.words:
            raise_errno(ENOMEM, "missing")
        take_bitmap(missing, &view, self.npages)
        memcpy(self.words, view.buf, (self.npages + 63) // 64 * 8)
        PyBuffer_Release(&view)
        if self.npages % 64:
            self.words[self.npages // 64] &= (<uint64_t> 1 << self.npages % 64) - 1
        for i in range((self.npages + 63) // 64):
            self.left += __builtin_popcountll(self.words[i])
        self.uffd = missing_open()
        if self.uffd < 0:
            self.refuse(self.uffd)
        self.keep_aliases(list(aliases))
        err = missing_register(self.uffd, self.vaddr, self.size)
        for i in range(self.naliases):
            if not err:
                err = missing_register(self.uffd, self.aliases[3 * i], self.aliases[3 * i + 2] * self.pgsize)
        if err:
            self.forget()
            self.refuse(-EOPNOTSUPP if err == -EINVAL else err)
        with nogil:
            err = missing_discard(self.vaddr, self.pgsize, self.words, self.npages, is_shared)
        if err:
            self.forget()
            raise_errno(-err, "missing", None, self.size, "pages can't be thrown away: they are locked, pinned, or parts of a "
                        "huge page" if err in (-EBUSY, -EINVAL) else "")

    cdef int keep_aliases(self, list aliases) except -1:
        cdef size_t i
        self.aliases = <uint64_t *> calloc(len(aliases) + 1, 24)
        if not self.aliases:
            raise_errno(ENOMEM, "missing")
        for i, (vaddr, first, npages) in enumerate(aliases):
            self.aliases[3 * i], self.aliases[3 * i + 1] = u64("missing", vaddr), u64("missing", first)
            self.aliases[3 * i + 2] = u64("missing", npages)
            if self.aliases[3 * i + 1] >= self.npages or self.aliases[3 * i + 2] > self.npages - self.aliases[3 * i + 1]:
                raise_errno(EINVAL, "missing", None, None, "an alias of pages that are not there")
        self.naliases = len(aliases)
        return 0

    cdef void forget(self) noexcept:
        """Let all mappings go."""
        cdef size_t i
        missing_unregister(self.uffd, self.vaddr, self.size)
        for i in range(self.naliases):
            missing_unregister(self.uffd, self.aliases[3 * i], self.aliases[3 * i + 2] * self.pgsize)

    cdef void wake_aliases(self, int fd, uint64_t first, uint64_t npages) noexcept nogil:
        cdef uint64_t low, end
        cdef uint64_t *alias
        cdef size_t i
        for i in range(self.naliases):
            alias = self.aliases + 3 * i
            low, end = max(first, alias[1]), min(first + npages, alias[1] + alias[2])
            if low < end:
                missing_wake(fd, alias[0] + (low - alias[1]) * self.pgsize, (end - low) * self.pgsize)

    cdef uint64_t page_at(self, uint64_t address):
        cdef size_t i
        if self.vaddr <= address < self.vaddr + self.size:
            return (address - self.vaddr) // self.pgsize
        for i in range(self.naliases):
            if self.aliases[3 * i] <= address < self.aliases[3 * i] + self.aliases[3 * i + 2] * self.pgsize:
                return (address - self.aliases[3 * i]) // self.pgsize + self.aliases[3 * i + 1]
        return 0

    cdef int refuse(self, int err) except -1:
        hint = "this memory is watched by somebody else"
        if err in (-EOPNOTSUPP, -ENOSYS):
            hint = "the kernel can't wait for pages of this memory (userfaultfd can, for anonymous memory and memfd)"
        elif err == -EPERM:
            hint = ("userfaultfd is not for this user: sysctl vm.unprivileged_userfaultfd=1, run with CAP_SYS_PTRACE, or give "
                    "access to /dev/userfaultfd")
        return raise_errno(-err, "missing", None, self.size, hint)

    cdef int enter(self) except -1:
        """Return the descriptor, which stays open until leave()."""
        with self.lock:
            if self.uffd < 0:
                raise_errno(EBADF, "missing")
            self.users += 1
            return self.uffd

    cdef int leave(self) except -1:
        with self.lock:
            self.users -= 1
            if not self.users and self.closing >= 0:
                os.close(self.closing)
                self.closing = -1
        return 0

    def fileno(self):
        """Return the descriptor, readable when somebody waits."""
        if self.uffd < 0:
            raise_errno(EBADF, "missing")
        return self.uffd

    def next(self, timeout=1.0):
        """Return the numbers of pages that somebody waits for, after at most ``timeout`` seconds; an empty list if nobody."""
        cdef uint64_t addresses[64]
        cdef int n, wait = int(min(timeout, 3600) * 1000), fd = self.enter()
        try:
            with nogil:
                n = missing_next(fd, addresses, 64, wait)
        finally:
            self.leave()
        if n < 0:
            raise_errno(-n, "missing")
        return sorted({self.page_at(addresses[i]) for i in range(n)})

    def is_missing(self, page):
        """Whether a page was not placed yet."""
        cdef uint64_t number = u64("missing", page)
        return number < self.npages and bool(self.words[number // 64] >> (number % 64) & 1)

    def missing(self, into):
        """OR the pages that were not placed yet into u64 words."""
        cdef Py_buffer view
        cdef uint64_t i
        take_bitmap(into, &view, self.npages)
        with self.lock:
            for i in range((self.npages + 63) // 64):
                (<uint64_t *> view.buf)[i] |= self.words[i]
        PyBuffer_Release(&view)

    def fill(self, page):
        """Place zeros for a page that was never written, unless it is there already, and wake who waits.

        Returns
        -------
        bool
            False, and nothing is done: the page is missing, so it is not zero.
        """
        cdef uint64_t number = u64("missing", page)
        cdef int err = 0, fd
        if number >= self.npages:
            raise_errno(EINVAL, "missing", None, None, f"there is no page {number}")
        fd = self.enter()
        try:
            with self.placing:      # a page that is being placed is not counted as missing any more
                if self.is_missing(number):
                    return False
                with nogil:
                    err = missing_fill(fd, self.vaddr + number * self.pgsize, self.pgsize)
                    self.wake_aliases(fd, number, 1)
        finally:
            self.leave()
        if err:
            raise_errno(-err, "missing")
        return True

    def keep_from_children(self, keep=True):
        """Leave the memory out of processes that are forked from here on, or not any more."""
        cdef int err = missing_keep_from_children(self.vaddr, self.size, bool(keep))
        if err:
            raise_errno(-err, "missing", None, self.size)

    def place(self, runs, content=None):
        """Place pages, and wake who waits for them.

        Parameters
        ----------
        runs : (n, 2) uint64 array
            First page and number of pages.
        content : buffer, optional
            Their bytes, one after another; zeros by default.

        Raises
        ------
        ProtocolError
            EPROTO: a run outside, or a page that was placed already.  Nothing was placed.
        OverlapError
            EEXIST: somebody else put something there.  Pages before it were placed.
        """
        cdef Py_buffer rows, data
        cdef uint64_t total, done = 0, placed = 0, size
        cdef uint64_t *run
        cdef const char *at = NULL
        cdef Py_ssize_t n, i = 0
        cdef int err, fd
        fd = self.enter()
        try:
            acquire_rows(runs, &rows, 2, &n, "missing")
        except BaseException:
            self.leave()
            raise
        self.placing.acquire()
        try:
            run = <uint64_t *> rows.buf
            if content is not None:
                PyObject_GetBuffer(content, &data, PyBUF_SIMPLE)
                at = <const char *> data.buf
            try:
                with self.lock:
                    err = missing_claim(self.words, self.npages, run, n, &total)
                    if not err and at != NULL and total * self.pgsize != <uint64_t> data.len:
                        for i in range(n):
                            missing_unclaim(self.words, run[2 * i], run[2 * i + 1])
                        raise_errno(EPROTO, "missing", None, data.len, f"the content is not that of {total} pages")
                if err:
                    raise_errno(-err, "missing", None, None, "a run outside, or a page that came before")
                with nogil:
                    for i in range(n):
                        size = run[2 * i + 1] * self.pgsize
                        err = missing_place(fd, self.vaddr + run[2 * i] * self.pgsize, at, size, &placed)
                        done += placed // self.pgsize
                        self.wake_aliases(fd, run[2 * i], placed // self.pgsize)
                        if err:
                            break
                        if at != NULL:
                            at += size
                with self.lock:
                    self.left -= done
                    if err:
                        placed //= self.pgsize
                        missing_unclaim(self.words, run[2 * i] + placed, run[2 * i + 1] - placed)
                        for j in range(i + 1, n):
                            missing_unclaim(self.words, run[2 * j], run[2 * j + 1])
                        raise_errno(-err, "missing", None, None, "somebody else put something there: memory must be "
                                    "touched through this mapping only" if err == -EEXIST else "")
            finally:
                if content is not None:
                    PyBuffer_Release(&data)
        finally:
            self.placing.release()
            self.leave()
            PyBuffer_Release(&rows)

    def guard(self, pidfd):
        """When this process ends, who waits or touches a missing page gets SIGBUS (before Linux 6.6: this one is aborted).

        Of a thread without the GIL, until ``unguard`` or ``close``.

        Raises
        ------
        VfioError
            EAGAIN, EMFILE, ENOMEM: there can't be one.
        """
        cdef size_t i
        cdef int err = 0, fd = self.enter()
        try:
            with self.lock:
                guard_stop(self.watcher)
                self.watcher = NULL
                free(self.ranges)
                self.ranges = <uint64_t *> calloc(self.naliases + 1, 16)
                if not self.ranges:
                    raise_errno(ENOMEM, "missing")
                self.ranges[0], self.ranges[1] = self.vaddr, self.size
                for i in range(self.naliases):
                    self.ranges[2 * i + 2] = self.aliases[3 * i]
                    self.ranges[2 * i + 3] = self.aliases[3 * i + 2] * self.pgsize
                err = guard_start(&self.watcher, fd, pidfd, self.ranges, self.naliases + 1)
        finally:
            self.leave()
        if err:
            raise_errno(-err, "missing", None, None, "a thread and two descriptors are needed")

    def unguard(self):
        """The process that places pages may end now; idempotent."""
        with self.lock:
            guard_stop(self.watcher)
            self.watcher = NULL

    def close(self, abandon=False):
        """Let the memory go; idempotent.

        Raises
        ------
        BusyError
            EBUSY: pages are left.  With ``abandon``, whoever waits for one finds zeros.
        """
        with self.lock:
            fd = self.uffd
            if fd >= 0 and self.left and not abandon:
                raise_errno(EBUSY, "missing", None, None, f"{self.left} pages are not there yet")
            if fd >= 0:
                guard_stop(self.watcher)
                self.watcher = NULL
                self.forget()
                self.uffd = -1
                if self.users:
                    self.closing = fd
                else:
                    os.close(fd)

    def __dealloc__(self):
        if self.watcher:        # never closed: who touches a missing page finds no zeros, also while the interpreter ends
            return
        if self.uffd >= 0:
            os.close(self.uffd)
        free(self.words)
        free(self.aliases)
        free(self.ranges)
