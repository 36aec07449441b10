"""One device's state on its way: read from the source while it runs and when it stands still, written at the other end.

Groups of devices, and how chunks travel: see ``device_group``.
"""
import errno
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ..devices.migration import MigrationData, MigrationFlags, MigrationState
from ..devices.pci import VfioDevice
from ..errors import MigrationError, UnsupportedError, VfioError


class Pending(NamedTuple):
    """What is left to be read of a device; estimates, in bytes."""

    initial_bytes: int          #: to be read, and written at the destination, before stopping pays; may grow again
    dirty_bytes: int            #: changed since they were read
    final_bytes: int | None     #: of the whole if it stopped now; None: the device does not tell (before Linux 6.2)


@runtime_checkable
class StateSource(Protocol):
    """A device that a migration moves away: DeviceStateSource, or a VMM's own.

    The order is ``preflight``, ``start``, any number of ``pending`` and ``readinto``, then ``quiesce``, ``stop`` and
    ``readinto`` up to the end; after a failure ``resume_p2p`` and ``resume``, and it may begin again.  A method that
    fails raises VfioError (MigrationError with the device's name), and leaves it to ``resume`` to clear up.
    """

    name: str           #: unique on both sides

    def preflight(self) -> MigrationFlags:
        """Return the states that it has; raise UnsupportedError where it can't be migrated.  Changes nothing."""

    def start(self) -> None:
        """Begin to save; where it has PRE_COPY, while it runs."""

    def pending(self) -> Pending:
        """Return what is left."""

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer, or less; 0 = nothing for now, after ``stop`` the end."""

    def quiesce(self) -> None:
        """Begin no DMA to other devices any more, but answer theirs."""

    def stop(self) -> None:
        """Stand still: no DMA, no interrupts.  ``readinto`` gives the rest."""

    def resume_p2p(self) -> bool:
        """Answer other devices again, begin nothing; return whether it had to be reset for that."""

    def resume(self) -> bool:
        """Run; return whether it had to be reset for that."""

    def close(self) -> None:
        """Let go of what saving took; the device keeps its state.  Idempotent."""


@runtime_checkable
class StateSink(Protocol):
    """A device that takes over another one's state: DeviceStateSink, or a VMM's own."""

    name: str

    def preflight(self) -> MigrationFlags:
        """Return the states that it has; raise UnsupportedError where it can't be migrated."""

    def prepare(self) -> None:
        """Stop, and wait for the state."""

    def write(self, data: memoryview) -> None:
        """Take the next bytes of the state."""

    def load(self) -> None:
        """The state is complete: be what the source was, and stand still."""

    def resume_p2p(self) -> bool:
        """Answer other devices, begin nothing; return whether it had to be reset for that."""

    def resume(self) -> bool:
        """Run; return whether it had to be reset for that."""

    def reset(self) -> None:
        """Forget everything, and be as a device just opened."""

    def close(self) -> None:
        """Let go of what resuming took.  Idempotent."""


_STANDING = (MigrationState.STOP, MigrationState.STOP_COPY, MigrationState.RESUMING)


class _Device:
    """What both sides do: ask, change and repair the state of a VfioDevice."""

    def __init__(self, device: VfioDevice, name: str = "") -> None:
        self.device = device
        self.name = name or device.address
        self._stream: MigrationData | None = None

    @property
    def state(self) -> MigrationState:
        """The state now."""
        try:
            return self.device.migration.state
        except VfioError as exc:
            raise self._failed(exc, "it does not tell its state") from exc

    def preflight(self) -> MigrationFlags:
        """Return the states that the device has.

        Raises
        ------
        UnsupportedError
            EOPNOTSUPP: it can't be migrated.
        MigrationError
            EBUSY: it is not running, somebody else migrates it.
        """
        flags = self._flags()
        state = self.state
        if state is not MigrationState.RUNNING:
            raise self._error(errno.EBUSY, f"it is in {state.name} already; a migration begins in RUNNING")
        return flags

    def _flags(self) -> MigrationFlags:
        try:
            flags = self.device.migration.flags
        except VfioError as exc:
            raise self._failed(exc, "it does not tell its states") from exc
        if not flags & MigrationFlags.STOP_COPY:
            raise UnsupportedError(errno.EOPNOTSUPP, operation="migrate_device",
                                   hint=f"device {self.name} can't be migrated: its driver is no migration driver "
                                        "(as vfio-pci is none), or migration is switched off")
        return flags

    def _error(self, code: int, why: str) -> MigrationError:
        return MigrationError(code, operation="migrate_device", hint=f"device {self.name}: {why}")

    def _failed(self, exc: VfioError, why: str) -> MigrationError:
        return self._error(exc.errno or errno.EIO, f"{why}{f' ({exc.hint})' if exc.hint else ''}")

    def _go(self, target: MigrationState) -> None:
        """Change the state; an error tells the one that the device is left in."""
        try:
            stream = self.device.migration.set_state(target)
        except VfioError as exc:
            try:
                now = self.device.migration.state.name
            except VfioError as gone:
                now = f"an unknown state ({gone.strerror})"
            raise self._failed(exc, f"it does not go to {target.name}, and is left in {now}") from exc
        if stream is not None:
            self.close()
            self._stream = stream

    def _return(self, target: MigrationState) -> bool:
        """Go to a running state from wherever the device is; where that fails, reset it.  Return whether it was."""
        for _ in range(2):          # a failed arc may have gone a part of the way
            if self.state is MigrationState.ERROR:
                break
            try:
                self._go(target)
                return False
            except MigrationError:
                pass
        self.reset()
        return True

    def resume_p2p(self) -> bool:
        """Leave the states in which the device stands still, where it has RUNNING_P2P; else do nothing.

        Returns
        -------
        bool
            True: the way back failed, or the device was in ERROR.  It was reset and has lost its state.

        Raises
        ------
        MigrationError
            It could not even be reset.
        """
        state = self.state
        if state is MigrationState.ERROR:
            return self._return(MigrationState.RUNNING)
        if state in (MigrationState.RUNNING, MigrationState.PRE_COPY) or not self._flags() & MigrationFlags.P2P:
            return False
        return self._return(MigrationState.RUNNING_P2P)

    def resume(self) -> bool:
        """Bring the device to RUNNING from any state; see ``resume_p2p``."""
        try:
            return self.state is not MigrationState.RUNNING and self._return(MigrationState.RUNNING)
        finally:
            self.close()

    def reset(self) -> None:
        """Reset the device: it runs, and is as it was when it was opened."""
        self.close()
        try:
            self.device.reset()
        except VfioError as exc:
            raise self._failed(exc, f"it is in {self.state.name} and can't be reset: close and open it again") from exc

    def close(self) -> None:
        """Close the stream; the device keeps its state.  Idempotent."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


class DeviceStateSource(_Device):
    """A VFIO device that a migration moves away.

    Parameters
    ----------
    device : VfioDevice
        Stays the caller's, open until ``close``.
    name : str, optional
        What it is called on both sides; its PCI address by default.

    Notes
    -----
    Satisfies StateSource; for one thread at a time.  What the migration driver does not carry (the configuration space
    and interrupts of vfio-pci) is for the VMM to move.  The GIL is released in every system call.
    Source: VFIO_DEVICE_FEATURE_MIGRATION, _MIG_DEVICE_STATE, _MIG_DATA_SIZE, _MIG_PRECOPY_INFOv2;
    VFIO_MIG_GET_PRECOPY_INFO.
    """

    def __init__(self, device: VfioDevice, name: str = "") -> None:
        super().__init__(device, name)
        self._stopped = False

    def start(self) -> None:
        """Go to PRE_COPY, where the device has it.

        Raises
        ------
        MigrationError
            The driver's errno; the device runs on.
        """
        flags, self._stopped = self._flags(), False
        if flags & MigrationFlags.PRE_COPY:
            try:
                self.device.migration.report_reinit()
            except VfioError as exc:                    # kernels without it: initial bytes come once
                if exc.errno not in (errno.ENOTTY, errno.EINVAL):
                    raise self._failed(exc, "it refuses VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2") from exc
            self._go(MigrationState.PRE_COPY)

    def pending(self) -> Pending:
        """Return what is left to be read.

        Initial bytes fall to 0 as they are read, and grow again when the device begins anew (VFIO_PRECOPY_INFO_REINIT).
        A device without PRE_COPY has none of both.
        """
        initial = dirty = 0
        try:
            if self._stream is not None and not self._stopped:
                initial, dirty, _ = self._stream.precopy_info()
            return Pending(initial, dirty, self.device.migration.data_size())
        except UnsupportedError:
            return Pending(initial, dirty, None)
        except VfioError as exc:
            raise self._failed(exc, "it does not tell what is left") from exc

    def readinto(self, buffer: memoryview) -> int:
        """Read into a buffer; return the bytes, 0 = nothing for now, or the end when the device is stopped."""
        if self._stream is None:
            if self._stopped:
                raise self._error(errno.EBADF, "its stream is closed")
            return 0
        try:
            count = self._stream.readinto(buffer)
        except VfioError as exc:
            raise self._failed(exc, f"its state can't be read in {self.state.name}") from exc
        if count is None and self._stopped:             # taking that for the end would lose the rest
            raise self._error(errno.ENOMSG, "it is stopped, but says that there will be more: an error of its driver")
        return count or 0

    def quiesce(self) -> None:
        """Go to PRE_COPY_P2P or RUNNING_P2P, where the device has them."""
        if self._flags() & MigrationFlags.P2P:
            saving = self._stream is not None
            self._go(MigrationState.PRE_COPY_P2P if saving else MigrationState.RUNNING_P2P)

    def stop(self) -> None:
        """Go to STOP_COPY: the device stands still, and the rest can be read."""
        self._go(MigrationState.STOP_COPY)
        self._stopped = True


class DeviceStateSink(_Device):
    """A VFIO device that takes over the state of another one.

    Parameters
    ----------
    device : VfioDevice
        Just opened; stays the caller's.
    name : str, optional
        As at the source.

    Notes
    -----
    Satisfies StateSink; for one thread at a time.  Source: as of DeviceStateSource.
    """

    def prepare(self) -> None:
        """Go to RESUMING."""
        self.preflight()
        self._go(MigrationState.RESUMING)

    def write(self, data: Any) -> None:
        """Write all of ``data`` (bytes-like).

        Raises
        ------
        MigrationError
            The device refuses it: EINVAL, ENOMEM (too long), or what its driver says.  Only a reset helps then.
        """
        if self._stream is None:
            raise self._error(errno.EBADF, "it is not waiting for a state")
        with memoryview(data).cast("B") as view:
            done = 0
            while done < len(view):
                try:
                    count = self._stream.write(view[done:])
                except VfioError as exc:
                    raise self._failed(exc, "it refuses the state that came") from exc
                if count <= 0:
                    raise self._error(errno.EIO, "it takes no more of its state")
                done += count

    def load(self) -> None:
        """Go to STOP, with the state that was written.

        Raises
        ------
        MigrationError
            EINVAL: the state is not complete; or what the driver says about it.
        """
        self._go(MigrationState.STOP)
        self.close()
