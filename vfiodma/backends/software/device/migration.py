"""Migration of a device, version 2: the state machine, and the descriptors of the state that is saved or loaded."""
import errno
import struct
from typing import TYPE_CHECKING, Any

from ...._core.errno import error
from ...._core.memory import read_memory, write_memory
from ....uapi import vfio as abi
from .arguments import read_struct

if TYPE_CHECKING:
    from .state import DeviceState

ERROR, STOP, RUNNING, STOP_COPY = (abi.VFIO_DEVICE_STATE_ERROR, abi.VFIO_DEVICE_STATE_STOP,
                                   abi.VFIO_DEVICE_STATE_RUNNING, abi.VFIO_DEVICE_STATE_STOP_COPY)
RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = (abi.VFIO_DEVICE_STATE_RESUMING, abi.VFIO_DEVICE_STATE_RUNNING_P2P,
                                                 abi.VFIO_DEVICE_STATE_PRE_COPY, abi.VFIO_DEVICE_STATE_PRE_COPY_P2P)
HAS_STOP_COPY, HAS_P2P, HAS_PRE_COPY = (abi.VFIO_MIGRATION_STOP_COPY, abi.VFIO_MIGRATION_P2P,
                                        abi.VFIO_MIGRATION_PRE_COPY)
SAVING = (STOP_COPY, PRE_COPY, PRE_COPY_P2P)
_MAX_LOAD = 64 << 20        # bytes that may be written to a device that does not say how many

# What a device must support to have a state.
NEEDS = {STOP: HAS_STOP_COPY, RUNNING: HAS_STOP_COPY, STOP_COPY: HAS_STOP_COPY, RESUMING: HAS_STOP_COPY,
         RUNNING_P2P: HAS_STOP_COPY | HAS_P2P, PRE_COPY: HAS_STOP_COPY | HAS_PRE_COPY,
         PRE_COPY_P2P: HAS_STOP_COPY | HAS_P2P | HAS_PRE_COPY}

# From a state toward another: the state between, which may be one that the device lacks and that is then passed by.
_COLUMNS = (STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P)
_HOPS = {
    STOP: (STOP, RUNNING_P2P, STOP_COPY, RESUMING, RUNNING_P2P, RUNNING_P2P, RUNNING_P2P),
    RUNNING: (RUNNING_P2P, RUNNING, RUNNING_P2P, RUNNING_P2P, RUNNING_P2P, PRE_COPY, RUNNING_P2P),
    STOP_COPY: (STOP, STOP, STOP_COPY, STOP, STOP, ERROR, ERROR),
    RESUMING: (STOP, STOP, STOP, RESUMING, STOP, STOP, STOP),
    RUNNING_P2P: (STOP, RUNNING, STOP, STOP, RUNNING_P2P, RUNNING, PRE_COPY_P2P),
    PRE_COPY: (RUNNING, RUNNING, PRE_COPY_P2P, RUNNING, RUNNING, PRE_COPY, PRE_COPY_P2P),
    PRE_COPY_P2P: (RUNNING_P2P, RUNNING_P2P, STOP_COPY, RUNNING_P2P, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P),
}


def next_state(current: int, target: int, flags: int) -> int:
    """Return the next state on the way, or ERROR where there is no way.

    Parameters
    ----------
    current, target : int
        VFIO_DEVICE_STATE_*.
    flags : int
        VFIO_MIGRATION_* of the device.
    """
    def has(state):
        return state in NEEDS and NEEDS[state] & flags == NEEDS[state]

    if not has(current) or not has(target):
        return ERROR
    column = _COLUMNS.index(target)
    state = _HOPS[current][column]
    while state != ERROR and not has(state):
        state = _HOPS[state][column]
    return state


class MigrationFile:
    """A descriptor that a device's state is read from (saving) or written to (resuming)."""

    def __init__(self, migration: "Migration", state: int) -> None:
        self._migration = migration
        self._saving = state != RESUMING
        self._alive = True
        self._ended = False                     # nothing follows what is in `_data`
        self._data = bytearray()                # written, or to be read: from `_at` on
        self._at = 0
        self._initial = 0                       # where in `_data` the initial bytes end
        self._reinit = False                    # those are not the first ones
        if state == STOP_COPY:
            self.stop_copy()
        elif state != RESUMING:
            self._data += migration.device.initial()
            self._initial = len(self._data)

    def _begin_anew(self) -> None:
        """A device in PRE_COPY may have initial bytes again; users who don't ask for those take them for dirty ones."""
        migration = self._migration
        if not self._ended and getattr(migration.device, "reinit", bool)():
            self._data += migration.device.initial()
            if migration.precopy_v2:
                self._initial, self._reinit = len(self._data), True

    def stop_copy(self) -> None:
        """PRE_COPY goes over into STOP_COPY on the same descriptor."""
        self._data += self._migration.device.final()
        self._ended = True

    def written(self) -> bytes:
        """Return what was written so far."""
        return bytes(self._data)

    def end(self) -> None:
        """The device leaves the states that this belongs to."""
        self._alive = False
        self._data = bytearray()

    def _check(self, saving: bool, operation: str) -> None:
        if saving != self._saving:
            raise error(errno.EBADF, operation, hint="the descriptor goes the other way")
        if not self._alive:
            raise error(errno.ENODEV, operation, hint="the device has left the state that the descriptor belongs to")

    def read(self, size: int) -> bytes:
        """Read; ENOMSG when the device still runs and has nothing more for now."""
        with self._migration.lock:
            self._check(True, "migration_read")
            if size < 0:
                raise error(errno.EINVAL, "migration_read", size=size, hint="a negative size")
            self._begin_anew()
            if self._at == len(self._data):
                self._data, self._at, self._initial = bytearray(), 0, 0
                if not self._ended:
                    self._data += self._migration.device.dirty()
                    if not self._data and size:
                        raise error(errno.ENOMSG, "migration_read",
                                    hint="nothing more before the device stops or changes")
            with memoryview(self._data) as view:
                data = bytes(view[self._at:self._at + size])
            self._at += len(data)
            return data

    def write(self, data: Any) -> int:
        """Write."""
        with self._migration.lock:
            self._check(False, "migration_write")
            most = getattr(self._migration.device, "max_load", _MAX_LOAD)
            if len(self._data) + len(data) > most:
                raise error(errno.ENOMEM, "migration_write", hint=f"the device's state has at most {most} bytes")
            self._data += data
            return len(data)

    def pread(self, size: int, offset: int) -> bytes:
        """A stream has no offsets."""
        raise error(errno.ESPIPE, "pread", hint="a stream has no offsets")

    pwrite = pread

    def ioctl(self, request: int, arg: int) -> int:
        """Answer MIG_GET_PRECOPY_INFO."""
        operation = "get_precopy_info"
        layout, migration = abi.vfio_precopy_info, self._migration
        if request != abi.VFIO_MIG_GET_PRECOPY_INFO or not self._saving or not migration.state.at_least("6.12"):
            raise error(errno.ENOTTY, operation, hint=f"request {request:#x}")
        values = read_struct(layout, layout.size, arg, operation)
        with migration.lock:
            if migration.current not in (PRE_COPY, PRE_COPY_P2P):
                raise error(errno.EINVAL, operation, hint="the device is not in PRE_COPY or PRE_COPY_P2P")
            self._check(True, operation)
            self._begin_anew()
            initial = max(0, self._initial - self._at)
            dirty = len(self._data) - self._at - initial + migration.device.dirty_bytes()
            values |= {"initial_bytes": initial, "dirty_bytes": dirty}
            if migration.precopy_v2:
                values["flags"] = abi.VFIO_PRECOPY_INFO_REINIT if self._reinit and initial else 0
        write_memory(arg, layout.pack(**values))
        return 0

    def closed(self) -> None:
        """The descriptor is closed; the device keeps its state."""


class Migration:
    """The migration of an open device.

    Parameters
    ----------
    state : "DeviceState"
    device : MigratableDevice
        The device's own part.
    """

    def __init__(self, state: "DeviceState", device: Any) -> None:
        self.state = state
        self.device = device
        self.lock = state.lock
        self.current = RUNNING
        self.precopy_v2 = False
        self._file: MigrationFile | None = None

    def set(self, target: int) -> MigrationFile | None:
        """Bring the device into a state, through those between; return the file of a new data descriptor.

        Where an arc fails the device stays in the state before it; it is in ERROR when what was written is no state, or
        when it has stopped or begun and does not give its own.
        """
        file = None
        while self.current != target:
            following = next_state(self.current, target, self.device.flags)
            if following == ERROR:
                raise error(errno.EINVAL, "set_migration_state", hint=f"no way from state {self.current} to {target}")
            file = self._go(following)
            self.current = following
        return file

    def _go(self, following: int) -> MigrationFile | None:
        current = self.current
        if current == RESUMING:
            self._load()
        self.device.arc(current, following)
        try:
            if current in SAVING and following in SAVING:
                if following == STOP_COPY:
                    assert self._file is not None
                    self._file.stop_copy()
                return None
            if current in SAVING:
                self._end_file()
            if following in SAVING or following == RESUMING:
                self._file = MigrationFile(self, following)
                return self._file
            return None
        except OSError:
            self._fail()
            raise

    def _fail(self) -> None:
        self.current = ERROR
        self._end_file()

    def _load(self) -> None:
        """Have the device take over what was written; while that is not complete (EINVAL) it keeps resuming."""
        assert self._file is not None
        try:
            self.device.load(self._file.written())
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                self._fail()
            raise
        self._end_file()

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.end()
            self._file = None

    def reset(self) -> None:
        """The device was reset: it runs."""
        with self.lock:
            self._end_file()
            if self.current != RUNNING:
                self.current = RUNNING
                self.device.arc(ERROR, RUNNING)

    def close(self) -> None:
        """The last descriptor of the device is gone."""
        self.reset()


# ---- the features

def present(state: "DeviceState") -> bool:
    """Whether a device can be migrated."""
    return state.migration is not None


def has_precopy(state: "DeviceState") -> bool:
    """Whether it has PRE_COPY states."""
    return state.migration is not None and bool(state.migration.device.flags & HAS_PRE_COPY)


def _of(state: "DeviceState") -> Migration:
    assert state.migration is not None
    return state.migration


def get_flags(state: "DeviceState", op: int, data: int) -> None:
    """GET MIGRATION."""
    flags = _of(state).device.flags
    if not state.at_least("6.12"):
        flags &= ~HAS_PRE_COPY
    write_memory(data, struct.pack("=Q", flags))


def data_size(state: "DeviceState", op: int, data: int) -> None:
    """GET MIG_DATA_SIZE."""
    with state.lock:
        write_memory(data, struct.pack("=Q", _of(state).device.size()))


def use_precopy_v2(state: "DeviceState", op: int, data: int) -> None:
    """SET MIG_PRECOPY_INFOv2: from now on flags of the precopy information mean something."""
    _of(state).precopy_v2 = True


def device_state(state: "DeviceState", op: int, data: int) -> None:
    """GET or SET MIG_DEVICE_STATE."""
    layout, migration = abi.vfio_device_feature_mig_state, _of(state)
    values = layout.unpack(read_memory(data, layout.size)) | {"data_fd": -1}
    with migration.lock:
        if op == abi.VFIO_DEVICE_FEATURE_GET:
            write_memory(data, layout.pack(**values | {"device_state": migration.current}))
            return
        try:
            file = migration.set(values["device_state"])
        except OSError:
            write_memory(data, layout.pack(**values))       # EFAULT counts more than why it failed
            raise
        vfio = state.group.vfio
        if file is not None:
            values["data_fd"] = vfio._new_fd(file)
        try:
            write_memory(data, layout.pack(**values))
        except OSError:
            if file is not None:
                vfio._forget_fd(values["data_fd"])
            raise
