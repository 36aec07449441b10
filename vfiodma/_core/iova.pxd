from libc.stdint cimport uint64_t


cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_trylock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)


cdef extern from "iovaspace.h" nogil:
    ctypedef struct gaps:
        pass
    ctypedef struct rangemap:
        pass
    ctypedef struct rangemap_entry:
        uint64_t start, last, value
    ctypedef struct iovaspace_range:
        uint64_t start, last
    ctypedef struct iovaspace:
        pthread_mutex_t mutex "lock"
        gaps *lasting
        gaps *pool
        rangemap *used
        rangemap *chunks
        iovaspace_range *valid
        size_t nvalid
        uint64_t total_pages


cdef class IovaAllocator:
    cdef iovaspace *space
    cdef readonly uint64_t pgsizes
    cdef readonly uint64_t pgsize
    cdef unsigned pgshift
    cdef list reserved

    cdef inline void lock(self) noexcept:
        # Never wait for it with the GIL held: its holder may need the GIL to go on.
        if pthread_mutex_trylock(&self.space.mutex):
            with nogil:
                pthread_mutex_lock(&self.space.mutex)

    cdef inline void unlock(self) noexcept:
        pthread_mutex_unlock(&self.space.mutex)

    cdef apply(self, list valid, list reserved)
    cdef list listing(self, bint stranded)
    cdef uint64_t largest(self, uint64_t align, uint64_t last_page) noexcept
    cdef object no_space(self, object size, uint64_t align, uint64_t guard, object limit)
    cdef object misaligned(self, str operation, object iova, object size, str names)
