"""EEH: how a POWER partitionable endpoint (PE) is stopped after an error, and brought back."""
import errno
from typing import Any

from ..._core.errno import error
from ...uapi import vfio as abi

_FUNCTIONS = 19                 # of injected errors, the last


class Endpoint:
    """The PE of a group.

    Parameters
    ----------
    injectable : set of int
        Error functions that the firmware can inject; others are ENXIO.

    Attributes
    ----------
    enabled : bool
        EEH is on.
    supported : bool
        The platform has operations on endpoints; without them most are ENOENT.
    failing : bool
        The platform's operations fail with EIO.
    mmio, dma : bool
        What passes.
    resetting : bool
        A reset is asserted; configuration space is blocked.
    parent_isolated : bool
        The host recovers the PE above it: its state is UNAVAIL up to then, unless it was ``removed``.
    """

    def __init__(self, injectable=frozenset(range(_FUNCTIONS + 1))):
        self.injectable = frozenset(injectable)
        self.path: Any = None               # a TcePath while the group is in a container
        self.enabled = self.supported = True
        self.mmio = True
        self._dma = True
        self.resetting = self.failing = self.parent_isolated = self.removed = False

    @property
    def dma(self):
        """Whether DMA passes; a DMA fault ends it, and register accesses with it."""
        if self.path is not None and self.path.frozen and self._dma:
            self._dma = self.mmio = False
        return self._dma

    @dma.setter
    def dma(self, value):
        self._dma = value
        if self.path is not None:
            self.path.frozen = not value

    def connect(self, path):
        """The group comes into a container, or (None) goes."""
        passes = self.dma       # a fault on the old path is not forgotten
        self.path = path
        if path is not None:
            path.frozen = not passes

    def freeze(self):
        """Stop DMA and register accesses."""
        self.dma = self.mmio = False

    def thaw(self):
        """Let everything pass."""
        self.dma, self.mmio, self.resetting = True, True, False

    @property
    def state(self):
        """What GET_STATE returns."""
        if self.parent_isolated and not self.removed:
            return abi.VFIO_EEH_PE_STATE_UNAVAIL
        if self.resetting:
            return abi.VFIO_EEH_PE_STATE_RESET
        if self.dma:        # asked first: a fault that nobody has noticed yet ends both
            return abi.VFIO_EEH_PE_STATE_NORMAL if self.mmio else abi.VFIO_EEH_PE_STATE_UNAVAIL
        return abi.VFIO_EEH_PE_STATE_STOPPED_DMA if self.mmio else abi.VFIO_EEH_PE_STATE_STOPPED

    def operate(self, op, argsz, injected):
        """Do one operation; return what the ioctl returns.

        Parameters
        ----------
        op, argsz : int
        injected : callable
            Returns the vfio_eeh_pe_err that the caller passed.
        """
        if op == abi.VFIO_EEH_PE_DISABLE:
            return 0
        if op == abi.VFIO_EEH_PE_INJECT_ERR:
            return self._inject(argsz, injected)
        if op == abi.VFIO_EEH_PE_ENABLE:
            if not self.enabled:
                raise error(errno.EIO, "eeh", hint="EEH is switched off")
        elif op != abi.VFIO_EEH_PE_CONFIGURE:
            self._need_support()
        if op == abi.VFIO_EEH_PE_GET_STATE:
            return self.state
        self._need_platform()
        if op in (abi.VFIO_EEH_PE_ENABLE, abi.VFIO_EEH_PE_RESET_DEACTIVATE):
            self.thaw()
        elif op == abi.VFIO_EEH_PE_UNFREEZE_IO:
            self.mmio = True
        elif op == abi.VFIO_EEH_PE_UNFREEZE_DMA:
            self.dma = True
        elif op in (abi.VFIO_EEH_PE_RESET_HOT, abi.VFIO_EEH_PE_RESET_FUNDAMENTAL):
            self.freeze()
            self.resetting = True
        return 0

    def _need_support(self):
        if not self.supported:
            raise error(errno.ENOENT, "eeh", hint="the platform has no operations on endpoints")

    def _need_platform(self):
        if self.failing:
            raise error(errno.EIO, "eeh", hint="the platform failed")

    def _inject(self, argsz, injected):
        if argsz < abi.vfio_eeh_pe_op.size:
            raise error(errno.EINVAL, "eeh", hint=f"argsz must be at least {abi.vfio_eeh_pe_op.size}")
        asked = injected()
        if asked["func"] > _FUNCTIONS:
            raise error(errno.EINVAL, "eeh", hint=f"functions are 0 to {_FUNCTIONS}")
        self._need_support()
        if asked["type"] > 1:
            raise error(errno.ERANGE, "eeh", hint="types are 0 (32-bit) and 1 (64-bit)")
        if asked["func"] not in self.injectable:
            raise error(errno.ENXIO, "eeh", hint="the firmware can't inject this error")
        self._need_platform()
        self.freeze()
        return 0
