"""Roll-back: the steps of a change that failed, backwards."""
import logging
from typing import Any, Self

log = logging.getLogger(__name__)


class Undo(list):
    """Steps back (callable, arguments), run in reverse when the block fails.

    A step back that fails ends the roll-back: what was made before it is still in use, and must not be given away.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, exc: Any, traceback: Any) -> None:
        if kind is None:
            return
        for step, *arguments in reversed(self):
            try:
                step(*arguments)
            except Exception as failure:
                log.error("roll-back stopped: %s", failure)
                exc.add_note(f"The roll-back stopped as well: {failure}")
                return
