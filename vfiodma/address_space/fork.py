"""Address spaces do not survive a fork: the devices belong to the parent."""
import os
import weakref
from typing import Any

_opened: weakref.WeakSet[Any] = weakref.WeakSet()


def retire_in_child(space: Any) -> None:
    """Call ``space._retire_forked()`` in every child that is forked from now on."""
    _opened.add(space)


def _after_fork() -> None:
    for space in list(_opened):
        space._retire_forked()


os.register_at_fork(after_in_child=_after_fork)
