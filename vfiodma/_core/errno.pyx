"""The only place where an errno becomes an exception."""
import errno as _errno

from .. import errors

cdef dict _CLASSES = {
    _errno.EINVAL: errors.InvalidArgumentError, _errno.EOVERFLOW: errors.InvalidArgumentError,
    _errno.ERANGE: errors.InvalidArgumentError, _errno.E2BIG: errors.InvalidArgumentError,
    _errno.EMSGSIZE: errors.InvalidArgumentError,
    _errno.EEXIST: errors.OverlapError, _errno.EADDRINUSE: errors.OverlapError,
    _errno.ENOENT: errors.NotMappedError,
    _errno.ENOSPC: errors.DmaLimitError,
    _errno.ENOMEM: errors.LockedMemoryError,
    _errno.EFAULT: errors.MemoryFaultError,
    _errno.EPERM: errors.DmaPermissionError, _errno.EACCES: errors.DmaPermissionError,
    _errno.EBUSY: errors.BusyError, _errno.EDEADLK: errors.BusyError,
    _errno.ENODEV: errors.NoDeviceError, _errno.ENXIO: errors.NoDeviceError,
    _errno.ENOTTY: errors.UnsupportedError, _errno.EOPNOTSUPP: errors.UnsupportedError,
    _errno.ETIMEDOUT: errors.TimedOutError,
    _errno.EBADF: errors.ClosedError, _errno.EBADFD: errors.ClosedError,
    _errno.EPROTO: errors.ProtocolError, _errno.EBADMSG: errors.ProtocolError,
}


def error(err, operation, iova=None, size=None, hint="", message=None):
    """Build the exception of an errno.

    Parameters
    ----------
    err : int
        A positive errno.
    operation : str
        The operation that failed.
    iova, size : int, optional
        The range concerned, in bytes.
    hint : str
        What to do about it.
    message : str, optional
        Text in place of strerror's.

    Returns
    -------
    VfioError
        An instance of the subclass that fits.
    """
    return _CLASSES.get(err, errors.VfioError)(err, message, operation=operation, iova=iova, size=size, hint=hint)


cdef int raise_errno(int err, str operation, object iova=None, object size=None, str hint="", str message=None) except -1:
    raise error(err, operation, iova, size, hint, message)
