cdef int raise_errno(int err, str operation, object iova=*, object size=*, str hint=*, str message=*) except -1
