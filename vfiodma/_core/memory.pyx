"""Access to this process's memory by address, checked by the kernel: a bad address is EFAULT, never a crash."""
from libc.errno cimport EINVAL, EOPNOTSUPP, ERANGE, errno
from libc.stdint cimport uint64_t, uintptr_t
from cpython.bytes cimport PyBytes_AS_STRING
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer, Py_buffer

from .args cimport new_bytes, u64
from .errno cimport raise_errno

cdef extern from "usercopy.h" nogil:
    int user_read(void *dst, uint64_t src, size_t n)
    int user_write(uint64_t dst, const void *src, size_t n)

cdef extern from "sys/mman.h" nogil:
    int madvise(void *addr, size_t length, int advice)

cdef enum:
    POPULATE_WRITE = 23         # MADV_POPULATE_WRITE, which older headers lack


def read_memory(address, size):
    """Copy bytes from an address of this process.

    Parameters
    ----------
    address : int
        Where to read.
    size : int
        Bytes.

    Returns
    -------
    bytes

    Raises
    ------
    MemoryFaultError
        EFAULT: some byte can't be read.

    Notes
    -----
    The GIL is released while copying.  Source: process_vm_readv(2).
    """
    cdef uint64_t at = u64("read_memory", address), length = u64("read_memory", size)
    cdef bytes data = new_bytes("read_memory", None, length)
    cdef char *to = PyBytes_AS_STRING(data)
    cdef int err
    with nogil:
        err = user_read(to, at, length)
    if err:
        raise_errno(-err, "read_memory", None, size, f"address {address:#x} is not readable memory of this process")
    return data


def write_memory(address, data):
    """Copy a bytes-like object to an address of this process.

    Parameters
    ----------
    address : int
        Where to write.
    data : bytes-like
        What to write.

    Raises
    ------
    MemoryFaultError
        EFAULT: some byte can't be written; those before it were.

    Notes
    -----
    The GIL is released while copying.  Source: process_vm_writev(2).
    """
    cdef uint64_t at = u64("write_memory", address)
    cdef Py_buffer view
    cdef int err
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            err = user_write(at, view.buf, view.len)
        if err:
            raise_errno(-err, "write_memory", None, view.len, f"address {address:#x} is not writable memory of this process")
    finally:
        PyBuffer_Release(&view)


def buffer_address(view):
    """Return the address of a contiguous buffer, read-only or not."""
    cdef Py_buffer source
    PyObject_GetBuffer(view, &source, PyBUF_SIMPLE)
    cdef uint64_t address = <uint64_t> <size_t> source.buf
    PyBuffer_Release(&source)
    return address


def populate(memory, offset, size):
    """Get pages for a part of memory, writable, as if it had been written; what is in it stays.

    Parameters
    ----------
    memory : writable buffer
        A mapping of this process, from the start of a page on.
    offset, size : int
        Bytes; multiples of the page size.

    Raises
    ------
    InvalidArgumentError
        EINVAL: not whole pages.  ERANGE: not inside the memory.
    UnsupportedError
        EOPNOTSUPP: Linux before 5.14.
    VfioError
        ENOMEM, EFAULT, EHWPOISON: not all pages could be got; those before are there.

    Notes
    -----
    The GIL is released.  Source: madvise(2), MADV_POPULATE_WRITE.
    """
    cdef Py_buffer view
    cdef uint64_t at = u64("populate", offset), length = u64("populate", size)
    cdef int err = 0
    PyObject_GetBuffer(memory, &view, PyBUF_WRITABLE)
    try:
        if at > <uint64_t> view.len or length > <uint64_t> view.len - at:
            raise_errno(ERANGE, "populate", None, size, f"the memory has {view.len} bytes")
        if (<uint64_t> <uintptr_t> view.buf + at) % 4096 or length % 4096:
            raise_errno(EINVAL, "populate", None, size, "populated are whole pages")
        with nogil:
            if madvise(<char *> view.buf + at, length, POPULATE_WRITE):
                err = errno
        if err == EINVAL:       # nothing else is wrong with the arguments
            raise_errno(EOPNOTSUPP, "populate", None, size, "populating memory needs Linux 5.14")
        if err:
            raise_errno(err, "populate", None, size, "not all pages could be populated")
    finally:
        PyBuffer_Release(&view)
