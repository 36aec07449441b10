"""The table of an iommufd's objects: ids of all kinds are drawn from one set, the lowest free number first."""
from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t
from libc.stdlib cimport realloc
from libc.string cimport memset

from .ioas_state cimport FREE, context_t, object_t


cdef int object_add(context_t *c, int kind, void *data, uint32_t *id) noexcept nogil:
    cdef size_t room
    cdef object_t *grown
    cdef uint32_t at = max(c.lowest, 1)
    while at < c.room and c.objects[at].kind != FREE:
        at += 1
    if at >= c.room:
        room = 2 * c.room + 8
        grown = <object_t *> realloc(c.objects, room * sizeof(object_t))
        if not grown:
            return -ENOMEM
        memset(&grown[c.room], 0, (room - c.room) * sizeof(object_t))
        c.objects = grown
        c.room = room
    c.objects[at].kind = kind
    c.objects[at].data = data
    c.nobjects += 1
    c.lowest = at + 1
    id[0] = at
    return 0


cdef void object_remove(context_t *c, uint32_t id) noexcept nogil:
    c.objects[id].kind = FREE
    c.objects[id].data = NULL
    c.nobjects -= 1
    c.lowest = min(c.lowest, id)
