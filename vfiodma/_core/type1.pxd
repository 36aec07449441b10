from libc.stdint cimport uint32_t, uint64_t

from .nesting cimport PasidSpace
from .state cimport group_t, type1_t


cdef class IommuGroup:
    cdef group_t group
    cdef readonly int number
    cdef readonly Type1 owner           # the instance that it is attached to, or None


cdef class Type1:
    cdef type1_t *t
    cdef unsigned generation            # of the process that made it: a forked child has a higher one
    cdef list listeners
    cdef PasidSpace pasids
    cdef object unbound                 # called when page tables may have been
    cdef set groups                     # attached: their C side is linked into t
    cdef readonly str kernel
    cdef readonly unsigned entry_limit

    cdef object interruption                # what a signal handler raised during a wait
    cdef int check_interruption(self, int err) except -1
    cdef int check_process(self, str operation) except -1
    cdef int enter(self, str operation) except -1
    cdef void leave(self) noexcept nogil
    cdef int fail(self, int err, str operation, object iova=*, object size=*, object entry=*) except -1
    cdef int needs_vaddr(self, str operation) except -1
    cdef int needs_dirty(self, str operation) except -1
    cdef object unmap(self, uint64_t iova, uint64_t size, uint32_t flags, str operation)
