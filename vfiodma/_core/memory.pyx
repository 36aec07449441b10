"""Access to this process's memory by address, checked by the kernel: a bad address is EFAULT, never a crash."""
from libc.stdint cimport uint64_t
from cpython.bytes cimport PyBytes_AS_STRING
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer, Py_buffer

from .args cimport new_bytes, u64
from .errno cimport raise_errno

cdef extern from "usercopy.h" nogil:
    int user_read(void *dst, uint64_t src, size_t n)
    int user_write(uint64_t dst, const void *src, size_t n)


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
