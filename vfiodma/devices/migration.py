"""Migration of a device: its state machine, and the file that its state is read from or written to."""
import enum
import errno
import io
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from .._core.errno import error
from .._core.kernel import Descriptor
from ..errors import UnsupportedError, VfioError
from ..uapi import vfio as abi
from .features import Feature, FeatureOps

if TYPE_CHECKING:
    from .pci import VfioDevice


class MigrationState(enum.IntEnum):
    """States of a device (enum vfio_device_mig_state)."""

    ERROR = abi.VFIO_DEVICE_STATE_ERROR             #: only a reset leaves it
    STOP = abi.VFIO_DEVICE_STATE_STOP               #: no DMA, no interrupts
    RUNNING = abi.VFIO_DEVICE_STATE_RUNNING
    STOP_COPY = abi.VFIO_DEVICE_STATE_STOP_COPY     #: stopped, its state is read
    RESUMING = abi.VFIO_DEVICE_STATE_RESUMING       #: stopped, its state is written
    RUNNING_P2P = abi.VFIO_DEVICE_STATE_RUNNING_P2P     #: starts nothing itself, but answers other devices
    PRE_COPY = abi.VFIO_DEVICE_STATE_PRE_COPY       #: runs while its state is read
    PRE_COPY_P2P = abi.VFIO_DEVICE_STATE_PRE_COPY_P2P


class MigrationFlags(enum.IntFlag):
    """States that a device has besides RUNNING (VFIO_MIGRATION_*)."""

    STOP_COPY = abi.VFIO_MIGRATION_STOP_COPY
    P2P = abi.VFIO_MIGRATION_P2P
    PRE_COPY = abi.VFIO_MIGRATION_PRE_COPY


class PrecopyInfo(NamedTuple):
    """What VFIO_MIG_GET_PRECOPY_INFO tells; estimates, in bytes."""

    initial_bytes: int      #: to read before stopping pays
    dirty_bytes: int        #: changed since they were read
    reinit: bool = False    #: there are initial bytes again; only after Migration.report_reinit()


class MigrationData(io.RawIOBase):
    """The stream of a device's state: read it in PRE_COPY and STOP_COPY, write it in RESUMING.

    Notes
    -----
    An unbuffered binary file.  ``read`` and ``readinto`` return None when a device in PRE_COPY has nothing more for
    now, and b"" or 0 at the end.  It is dead (ENODEV) after the device has left those states.  The GIL is released.
    """

    def __init__(self, device: "VfioDevice", fd: int, *, write: bool) -> None:
        self._descriptor = Descriptor(device.system, fd)
        self._device = device
        self._writes = write

    def readable(self) -> bool:
        """Whether it is a saving device's."""
        return not self._writes

    def writable(self) -> bool:
        """Whether it is a resuming device's."""
        return self._writes

    def fileno(self) -> int:
        """Return the descriptor, readable when poll says so."""
        return self._fd("migration_data")

    def _fd(self, operation: str) -> int:
        self._device.check(operation)
        if self._descriptor.fd < 0:
            raise error(errno.EBADF, operation, hint="the stream is closed")
        return self._descriptor.fd

    def _failed(self, exc: OSError, operation: str) -> VfioError:
        hints = {errno.ENODEV: "the device has left the state that the stream belongs to",
                 errno.EBADF: "the stream goes the other way" if self._descriptor.fd >= 0 else "the stream is closed"}
        return error(exc.errno or errno.EIO, operation, hint=hints.get(exc.errno or 0, ""))

    def readinto(self, buffer: Any, /) -> int | None:
        """Read into a writable buffer; return the bytes, 0 at the end, None when there is nothing more for now."""
        fd, system = self._fd("migration_read"), self._descriptor.system
        view = memoryview(buffer).cast("B")
        try:
            if not hasattr(system, "read"):
                return os.readv(fd, [view])
            data = system.read(fd, len(view))
        except OSError as exc:
            if exc.errno == errno.ENOMSG:
                return None
            raise self._failed(exc, "migration_read") from None
        view[:len(data)] = data
        return len(data)

    def write(self, data: Any, /) -> int:
        """Write bytes-like ``data``; return the bytes taken."""
        fd, system = self._fd("migration_write"), self._descriptor.system
        try:
            return system.write(fd, data) if hasattr(system, "write") else os.write(fd, data)
        except OSError as exc:
            raise self._failed(exc, "migration_write") from None

    def precopy_info(self) -> PrecopyInfo:
        """Return how much there is to read in a PRE_COPY state.

        Raises
        ------
        VfioError
            EINVAL: the device is in no PRE_COPY state.
        """
        layout = abi.vfio_precopy_info
        data = bytearray(layout.pack(argsz=layout.size))
        self._fd("get_precopy_info")
        try:
            self._descriptor.ioctl(abi.VFIO_MIG_GET_PRECOPY_INFO, data, "get_precopy_info")
        except VfioError as exc:
            if exc.errno == errno.EINVAL:
                exc.hint = "the device is not in PRE_COPY or PRE_COPY_P2P"
            raise
        values = layout.unpack(data)
        return PrecopyInfo(values["initial_bytes"], values["dirty_bytes"],
                           bool(values["flags"] & abi.VFIO_PRECOPY_INFO_REINIT))

    def close(self) -> None:
        """Close the stream; the device keeps its state.  Idempotent."""
        if not self.closed:
            super().close()
            try:
                self._descriptor.close()
            except OSError:
                if not self._device.forked:
                    raise


_READ_STATES = (MigrationState.STOP_COPY, MigrationState.PRE_COPY, MigrationState.PRE_COPY_P2P)


class Migration:
    """A device's migration.  Source: VFIO_DEVICE_FEATURE_MIGRATION, _MIG_DEVICE_STATE, _MIG_DATA_SIZE."""

    __slots__ = ("_device",)

    def __init__(self, device: "VfioDevice") -> None:
        self._device = device

    @property
    def flags(self) -> MigrationFlags:
        """The states that the device has; none of them (false) where it can't be migrated."""
        features = self._device.features
        try:
            data = features.get(Feature.MIGRATION, abi.vfio_device_feature_migration.size)
        except UnsupportedError:
            return MigrationFlags(0)
        return MigrationFlags(abi.vfio_device_feature_migration.unpack(data)["flags"])

    @property
    def state(self) -> MigrationState:
        """The state now.  ENOTTY: the device can't be migrated."""
        data = self._device.features.get(Feature.MIG_DEVICE_STATE, abi.vfio_device_feature_mig_state.size)
        return MigrationState(abi.vfio_device_feature_mig_state.unpack(data)["device_state"])

    def set_state(self, target: MigrationState) -> MigrationData | None:
        """Bring the device into a state, through those between.

        Returns
        -------
        MigrationData or None
            A new stream when the device begins to save or to resume; going from PRE_COPY into STOP_COPY the one of
            PRE_COPY goes on.

        Raises
        ------
        VfioError
            EINVAL: no way leads there, or the device does not have the state; any errno of its driver.  The device is
            then in its old state, one between, or ERROR: ask ``state``.
        """
        layout = abi.vfio_device_feature_mig_state
        if not 0 <= target < abi.VFIO_DEVICE_STATE_NR:
            raise error(errno.EINVAL, "set_migration_state", hint=f"{target!r} is no MigrationState")
        try:
            data = self._device.features.call(Feature.MIG_DEVICE_STATE, FeatureOps.SET,
                                              layout.pack(device_state=target, data_fd=-1), "set_migration_state")
        except VfioError as exc:
            if exc.errno == errno.EINVAL:
                exc.hint = f"no way leads to {target!r}: flags has the states there are, and only a reset leaves " \
                           "ERROR; or the data written is not complete"
            raise
        fd = layout.unpack(data)["data_fd"]
        if fd < 0:
            return None
        stream = MigrationData(self._device, fd, write=target not in _READ_STATES)
        self._device.adopt(stream)
        return stream

    def report_reinit(self) -> None:
        """Have PrecopyInfo tell when there are initial bytes again.

        Raises
        ------
        VfioError
            EINVAL: the device has no PRE_COPY; ENOTTY: a kernel that can't tell.
        """
        self._device.features.set(Feature.MIG_PRECOPY_INFOV2)

    def data_size(self) -> int:
        """Return the estimated bytes of the stream if the device stopped now."""
        data = self._device.features.get(Feature.MIG_DATA_SIZE, abi.vfio_device_feature_mig_data_size.size)
        return abi.vfio_device_feature_mig_data_size.unpack(data)["stop_copy_length"]
