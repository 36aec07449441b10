"""Every exception of the package.  An errno becomes one of these in one place only: vfiodma._core.errno."""
import contextlib
import errno as codes
import os
import struct
from collections.abc import Iterator

_MOST_WORDS = 1000


class VfioError(OSError):
    """A failed operation on an I/O address space.

    Attributes
    ----------
    errno : int
        The errno that the kernel returns, or would return, for this operation.
    operation : str
        What was asked for, in the field's words: ``"map_dma"``, ``"unmap_dma"``, ``"allocate"``, ...
    iova, size : int or None
        The range concerned, in bytes; None where there is none.
    hint : str
        What to do about it; empty when the errno says it all.
    """

    def __init__(self, errno, message=None, *, operation="", iova=None, size=None, hint=""):
        super().__init__(errno, message or os.strerror(errno))
        self.operation = operation
        self.iova = iova
        self.size = size
        self.hint = hint

    def __str__(self):
        place = "" if self.iova is None else f" at iova {self.iova:#x}"
        if self.size is not None:
            place += f" size {self.size:#x}"
        text = f"[Errno {self.errno}] {self.operation}{place}: {self.strerror}".replace("  ", " ")
        return f"{text}; {self.hint}" if self.hint else text

    def __reduce__(self):
        return _rebuild, (type(self), self.errno, self.strerror, self.operation, self.iova, self.size, self.hint)


def _rebuild(cls, errno, message, operation, iova, size, hint):
    return cls(errno, message, operation=operation, iova=iova, size=size, hint=hint)


class InvalidArgumentError(VfioError, ValueError):
    """EINVAL, EOVERFLOW, ERANGE, E2BIG, EMSGSIZE: an argument that can't be right in this state."""


class OverlapError(VfioError, FileExistsError):
    """EEXIST, EADDRINUSE: the range overlaps one that is in use, or reserved."""


class NotMappedError(VfioError, LookupError):
    """ENOENT: nothing is mapped, reserved or allocated there."""


class DmaLimitError(VfioError):
    """ENOSPC: the container's limit of mappings is reached."""


class IovaSpaceError(VfioError):
    """ENOSPC: no hole of that size, alignment and limit is left in the IOVA ranges."""


class LockedMemoryError(VfioError, MemoryError):
    """ENOMEM: over the limit of locked memory, or out of memory or address space."""


class MemoryFaultError(VfioError):
    """EFAULT: memory that is not mapped, or not with the permission needed."""


class DmaPermissionError(VfioError, PermissionError):
    """EPERM, EACCES: the mapping, the mode or the caller's rights forbid it."""


class BusyError(VfioError):
    """EBUSY, EDEADLK: something still in use stands against it."""


class NoDeviceError(VfioError):
    """ENODEV, ENXIO, ENOENT of a node: no such device, group or IOMMU type."""


class UnsupportedError(VfioError, NotImplementedError):
    """ENOTTY, EOPNOTSUPP: this backend or kernel version does not have the operation."""


class ClosedError(VfioError, ValueError):
    """EBADF, EBADFD: the object is closed, or the descriptor is not one of its own."""


class ForkedError(ClosedError):
    """EBADF: the object was opened before a fork and is used in the child."""


class TimedOutError(VfioError, TimeoutError):
    """ETIMEDOUT: what was waited for did not come in time."""


class ProtocolError(VfioError):
    """EPROTO, EBADMSG: a migration stream that is truncated, damaged or not ours."""


class MigrationError(VfioError):
    """A migration that ended without success; the source still owns the guest.

    Attributes
    ----------
    peer_errno : int or None
        Why the other side gave up, where it said so; ``errno`` is ECONNABORTED then.
    """

    peer_errno: "int | None" = None


class HandoverError(MigrationError):
    """EINPROGRESS: nobody knows yet whose the guest is; it stands still here."""


class PostcopyError(MigrationError):
    """The guest is the destination's, and a part of its memory does not come: it stands still where it touches that.

    ECONNRESET, ETIMEDOUT, ...: the source is gone, or silent.  EOWNERDEAD: the destination's helper process is gone.

    Attributes
    ----------
    missing : int
        Pages that the destination lacks, as far as this side knows.
    """

    missing: int = 0


class SnapshotError(VfioError):
    """A snapshot that can't be saved or loaded.

    ENOSPC, EDQUOT, EFBIG, EIO, EACCES, ...: the file system said so, and what was saved before is as it was.  EBADMSG:
    the file is damaged, truncated, or no snapshot.  EPROTONOSUPPORT: it is of a newer version.  ESTALE: it is not the
    snapshot that the changes are relative to.  EBUSY: somebody saves it, or has it mapped.
    """


class MissingExtraError(ImportError):
    """An optional library is needed; the text names the extra to install."""

    def __init__(self, library, extra):
        super().__init__(f"{library} is not installed: pip install 'vfiodma[{extra}]'", name=library)


def peer_words(words: "str | bytes | bytearray | memoryview") -> str:
    """Return what another process said as it may be shown: nothing that a terminal would obey, and no more than fits.

    Parameters
    ----------
    words : str or bytes-like
        UTF-8.

    Returns
    -------
    str
        Printable characters, 1000 at most; U+FFFD in place of others.
    """
    if not isinstance(words, str):
        words = bytes(words[:4 * _MOST_WORDS]).decode(errors="replace")
    return "".join(char if char.isprintable() else "\ufffd" for char in words[:_MOST_WORDS])


@contextlib.contextmanager
def fits(operation: str) -> Iterator[None]:
    """Pack what a caller gave: EINVAL of the operation where a number does not fit into its field."""
    try:
        yield
    except struct.error:
        raise InvalidArgumentError(codes.EINVAL, operation=operation,
                                   hint="a number is negative, or too large for its field") from None
