"""What a migration needs from outside: who knows which pages are written, and who writes them."""
from collections.abc import Mapping
from typing import Protocol

from .._core.bitmap import DirtyBitmap


class Tracker(Protocol):
    """Where dirty pages come from: DirtyTracker, or anything like it."""

    def start(self) -> None:
        """Start; called before the first page is sent."""

    def harvest(self, into: DirtyBitmap) -> int:
        """OR what was written since the last call into the bitmap."""

    def stop(self) -> None:
        """Stop; idempotent."""


class Machine(Protocol):
    """What is migrated: whoever writes into the memory."""

    def stop(self) -> None:
        """Return when nothing is written any more."""

    def resume(self) -> None:
        """Go on after a stop: the migration failed."""

    def state(self) -> Mapping[str, bytes]:
        """Return the named states that the destination needs; called after ``stop``."""
