# Arguments from Python: integers and arrays of uint64, with typed errors.
from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBUF_ND, PyBuffer_Release, PyObject_GetBuffer, Py_buffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_Clear, PyErr_Occurred
from cpython.long cimport PyLong_CheckExact
from cpython.number cimport PyNumber_Index
from libc.errno cimport EINVAL
from libc.stdint cimport UINT64_MAX, uint64_t

from .errno cimport raise_errno

cdef extern from "Python.h":
    # Declared without its exception, which u64() tests for itself: a `try` would save and restore the exception state each time.
    uint64_t PyLong_AsUnsignedLongLong(object) noexcept
    long long PyLong_AsLongLongAndOverflow(object, int *overflow) noexcept

cdef extern from *:
    """
    /* Not inlined: the short way then needs no register saved. */
    static uint64_t args_u64_of(PyObject *, PyObject *) __attribute__((cold));

    /* An int of up to two digits (60 bits, no sign), read without a call; 0 = not one, or laid out in another way. */
    static inline int args_digits(PyObject *number, uint64_t *value)
    {
    #if PyLong_SHIFT == 30 && !defined(Py_LIMITED_API) && !defined(PYPY_VERSION) && PY_VERSION_HEX < 0x030F0000
        if (PyLong_Check(number)) {
    #if PY_VERSION_HEX >= 0x030C0000
            const uintptr_t tag = ((PyLongObject *)number)->long_value.lv_tag;     /* digits << 3 | sign: 0 = positive */
            const digit *digits = ((PyLongObject *)number)->long_value.ob_digit;
            const uintptr_t one = 1 << 3, two = 2 << 3;
    #else
            const Py_ssize_t tag = Py_SIZE(number);                                 /* negative as the number is */
            const digit *digits = ((PyLongObject *)number)->ob_digit;
            const Py_ssize_t one = 1, two = 2;
    #endif
            if (tag == one) {
                *value = digits[0];
                return 1;
            }
            if (tag == two) {
                *value = (uint64_t)digits[1] << PyLong_SHIFT | digits[0];
                return 1;
            }
        }
    #endif
        return 0;
    }
    """
    bint args_digits(object, uint64_t *value) noexcept
    bint likely(bint) noexcept


# u64() of any object: every number of bits, and the errors.
cdef inline uint64_t u64_of "args_u64_of" (str operation, object number) except? 0xffffffffffffffff:
    cdef uint64_t value
    cdef long long small
    cdef int overflow
    if not PyLong_CheckExact(number):
        number = PyNumber_Index(number)
    small = PyLong_AsLongLongAndOverflow(number, &overflow)  # faster than the unsigned form
    if not overflow and small >= 0:
        return small
    value = PyLong_AsUnsignedLongLong(number)
    if value == UINT64_MAX and PyErr_Occurred():
        PyErr_Clear()
        raise_errno(EINVAL, operation, number, None, f"{number} is not within 0 ... 2**64 - 1")
    return value


# The integer as uint64: TypeError for another type, EINVAL for another integer.
cdef inline uint64_t u64(str operation, object number) except? 0xffffffffffffffff:
    cdef uint64_t value
    if likely(args_digits(number, &value)):
        return value
    return u64_of(operation, number)


# A C-contiguous buffer of native uint64; release it with PyBuffer_Release.
cdef inline int acquire(object source, Py_buffer *view, int flags, str operation) except -1:
    PyObject_GetBuffer(source, view, PyBUF_FORMAT | PyBUF_ND | PyBUF_C_CONTIGUOUS | flags)
    cdef const char *format = view.format
    if format != NULL and (format[0] == c"@" or format[0] == c"=" or format[0] == c"<"):
        format += 1
    if format == NULL or view.itemsize != 8 or (format[0] != c"Q" and format[0] != c"L") or format[1]:
        kind = (<bytes> view.format).decode() if view.format != NULL else "B"
        PyBuffer_Release(view)
        raise TypeError(f"{operation}: a C-contiguous buffer of uint64 is required, not of format {kind!r}")
    return 0


# The same with rows of `columns` values; sets *n to the number of rows.
cdef inline int acquire_rows(object source, Py_buffer *view, Py_ssize_t columns, Py_ssize_t *n, str operation) except -1:
    acquire(source, view, 0, operation)
    if view.ndim != 2 or view.shape[1] != columns:
        PyBuffer_Release(view)
        raise TypeError(f"{operation}: an array of shape (n, {columns}) is required")
    n[0] = view.shape[0]
    return 0


# Uninitialised bytes of a length that a caller gave.
cdef inline bytes new_bytes(str operation, object iova, uint64_t size):
    if size > <uint64_t> 1 << 40:
        raise_errno(EINVAL, operation, iova, size, "more than a terabyte at once")
    return PyBytes_FromStringAndSize(NULL, size)
